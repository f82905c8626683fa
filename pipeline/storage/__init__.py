"""Files that are created once and whole: the only way anything reaches an output folder or a store of packages."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from pipeline.errors import ExpertError, OutputError
from pipeline.storage.filesystems import open_filesystem, protocol_of
from pipeline.storage.local import LocalStorage
from pipeline.storage.objects import PROTOCOLS, ObjectStorage


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

    def replace(self, name: str, data: bytes) -> None:
        """Write a file with all its content, over the one that is there, if any.

        Whoever reads it sees the old content or the new one. Nothing that answers depend on is written this way, but
        the parts of `retry`.

        Raises:
            OutputError: It cannot be written; the file is as it was.
        """
        ...

    def read(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            OutputError: There is none, or it cannot be read.
        """
        ...

    def fetch(self, name: str, path: str) -> str:
        """Copy a file to a new local one, which need not fit into memory.

        Args:
            name: The file to copy.
            path: The local file; there must be none yet. After an error it is gone.

        Returns:
            The SHA-256 of what was copied.

        Raises:
            OutputError: There is none, or it cannot be read, or the copy cannot be written.
        """
        ...

    def exists(self, name: str) -> bool:
        """Whether there is a file of that name."""
        ...

    def list(self, prefix: str = "") -> dict[str, int]:
        """Name and size in bytes of every file at any depth of the subfolder `prefix`, sorted by name."""
        ...

    def remove(self, names: Sequence[str]) -> None:
        """Remove files; no error for those that are not there."""
        ...

    def remove_tree(self, prefix: str) -> None:
        """Remove the subfolder `prefix` and what is in it; no error when it is not there."""
        ...

    def subfolder(self, prefix: str) -> "Storage":
        """A storage of the subfolder `prefix`, which need not exist yet."""
        ...

    def url(self, name: str) -> str:
        """Where the file is, for a person or another program: an absolute path or a URL."""
        ...


def open_storage(
    url: str | os.PathLike[str],
    storage_options: Mapping[str, Any] | None = None,
    *,
    error: type[ExpertError] = OutputError,
    any_protocol: bool = False,
) -> Storage:
    """The storage of a folder, which need not exist yet.

    Args:
        url: A local path, or an `s3://`, `s3a://`, `gs://` or `gcs://` URL.
        storage_options: Passed to the file system, e.g. an endpoint.
        error: What the storage raises instead of OutputError.
        any_protocol: Take any other file system of fsspec that can create a file in mode `xb` as well. What a dying
            writer leaves there may be a part of a file: only for files whose content is checked when they are read.

    Raises:
        OutputError: As `error`: files cannot be created once and whole there.
        MissingDependencyError: The package of the file system is not installed.
    """
    text = os.fspath(url)
    protocol = protocol_of(text)
    if protocol in ("file", "local"):
        _, path = open_filesystem(text, storage_options, error)
        return LocalStorage(path, error=error)
    if protocol not in PROTOCOLS and not any_protocol:
        raise error(
            f"the output cannot be written to {text}",
            hint=f"Name a local folder or a URL of {', '.join(PROTOCOLS)}: there a file can be created once and whole.",
        )
    # a cached listing, even one that another thread has just made, may miss what another process created
    options = dict(storage_options or {})
    if protocol in PROTOCOLS:
        options |= {"use_listings_cache": False, "skip_instance_cache": True}
    filesystem, path = open_filesystem(text, options, error)
    return ObjectStorage(filesystem, path.rstrip("/"), error=error)
