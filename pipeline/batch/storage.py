"""Files that are created once and whole: the only way anything reaches an output folder."""

import os
from collections.abc import Mapping
from typing import Any, Protocol

from pipeline.batch.filesystems import open_filesystem, protocol_of
from pipeline.batch.local_storage import LocalStorage
from pipeline.batch.object_storage import PROTOCOLS, ObjectStorage
from pipeline.errors import OutputError


class Storage(Protocol):
    """One folder. Names are relative to it, with `/`. An instance can be used by many threads, and be pickled."""

    def create(self, name: str, data: bytes) -> bool:
        """Create a file with all its content, unless there is one of that name.

        Whenever a process dies, the file is there whole or not at all.

        Returns:
            True when this call created it; False when it was there, whoever wrote it.

        Raises:
            OutputError: It cannot be written, e.g. for lack of space; no file of that name came to be.
        """
        ...

    def create_from_file(self, name: str, path: str) -> bool:
        """Create a file as `create` does, with the content of a local file, which need not fit into memory.

        Args:
            name: The file to create.
            path: The local file.
        """
        ...

    def read(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            OutputError: There is none, or it cannot be read.
        """
        ...

    def exists(self, name: str) -> bool:
        """Whether there is a file of that name."""
        ...

    def list(self, prefix: str = "") -> dict[str, int]:
        """Name and size in bytes of every file at any depth of the subfolder `prefix`, sorted by name."""
        ...

    def remove_tree(self, prefix: str) -> None:
        """Remove the subfolder `prefix` and what is in it; no error when it is not there."""
        ...

    def url(self, name: str) -> str:
        """Where the file is, for a person or another program: an absolute path or a URL."""
        ...


def open_storage(url: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> Storage:
    """The storage of a folder, which need not exist yet.

    Args:
        url: A local path, or an `s3://`, `s3a://`, `gs://` or `gcs://` URL.
        storage_options: Passed to the file system, e.g. an endpoint.

    Raises:
        OutputError: Files cannot be created once and whole there.
        MissingDependencyError: The package of the file system is not installed.
    """
    text = os.fspath(url)
    protocol = protocol_of(text)
    if protocol in ("file", "local"):
        _, path = open_filesystem(text, storage_options, OutputError)
        return LocalStorage(path)
    if protocol not in PROTOCOLS:
        raise OutputError(
            f"the output cannot be written to {text}",
            hint=f"Name a local folder or a URL of {', '.join(PROTOCOLS)}: there a file can be created once and whole.",
        )
    # a cached listing, even one that another thread has just made, may miss what another process created
    options = {**(storage_options or {}), "use_listings_cache": False, "skip_instance_cache": True}
    filesystem, path = open_filesystem(text, options, OutputError)
    return ObjectStorage(filesystem, path.rstrip("/"))
