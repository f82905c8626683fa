"""Create-only objects in S3 and Google Cloud Storage, through fsspec."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from pipeline.errors import ExpertError, OutputError
from pipeline.storage.copying import copy_hashed
from pipeline.storage.filesystems import is_foreign, translated

PROTOCOLS = ("s3", "s3a", "gs", "gcs")
_RETRY_SECONDS = (0.2, 1.0, 3.0)


@dataclass(frozen=True)
class ObjectStorage:
    """A folder in an object store; see `storage.Storage`.

    An object appears whole or not at all, and a conditional write (`If-None-Match: *` in S3, generation 0 in GCS) is
    refused when the name is taken.

    Args:
        filesystem: Its fsspec file system, without a cache of listings.
        root: The folder, as the file system writes it: bucket and prefix.
        error: What is raised instead of OutputError.
    """

    filesystem: Any
    root: str
    error: type[ExpertError] = OutputError

    def create(self, name: str, data: bytes) -> bool:
        """Create an object with all its content, unless there is one of that name; see `Storage.create`.

        A store may answer a lost race in several ways (412, 409, or after a retry of its own): what counts is whether
        the name is taken afterwards.
        """
        return self._create(name, lambda path: self.filesystem.pipe_file(path, data, mode="create"))

    def create_from_file(self, name: str, path: str) -> bool:
        """Create an object with the content of a local file, unless there is one of that name; see `Storage`."""
        return self._create(name, lambda to: self.filesystem.put_file(path, to, mode="create"))

    def replace(self, name: str, data: bytes) -> None:
        """Write an object over the one that is there, if any; see `Storage.replace`."""
        with self._translated(name, "written"):
            self.filesystem.pipe_file(self._path(name), data)

    def _create(self, name: str, write: Callable[[str], object]) -> bool:
        with self._translated(name, "written"):
            for pause in (*_RETRY_SECONDS, None):
                try:
                    write(self._path(name))
                except FileExistsError:
                    return False
                except PermissionError:
                    raise
                except Exception as error:  # gcsfs has errors of its own, that are no OSError
                    if not is_foreign(error):
                        raise
                    if self._is_taken(name):
                        return False
                    if pause is None:
                        raise
                    time.sleep(pause)
                else:
                    return True
        return False

    def read(self, name: str) -> bytes:
        """The content of an object; see `Storage.read`."""
        with self._translated(name, "read"):
            return bytes(self.filesystem.cat_file(self._path(name)))

    def fetch(self, name: str, path: str) -> str:
        """Copy an object to a new local file; see `Storage.fetch`."""
        with self._translated(name, "copied"), self.filesystem.open(self._path(name), "rb") as source:
            return copy_hashed(source, path)

    def exists(self, name: str) -> bool:
        """Whether there is an object of that name."""
        with self._translated(name, "looked at"):
            return self._is_taken(name)

    def list(self, prefix: str = "") -> dict[str, int]:
        """Name and size of every object below a subfolder; see `Storage.list`."""
        with self._translated(prefix, "listed"):
            self.filesystem.invalidate_cache()
            found = self.filesystem.find(self._path(prefix), detail=True)
        start = len(self.root) + 1
        sizes = {path[start:]: int(info["size"]) for path, info in found.items() if not path.endswith("/")}
        return dict(sorted(sizes.items()))

    def remove(self, names: Sequence[str]) -> None:
        """Remove objects, a thousand a request where the store can; see `Storage.remove`."""
        if not names:
            return
        with self._translated(names[0], "removed"):
            try:
                self.filesystem.rm([self._path(name) for name in names])
            except FileNotFoundError:  # some stores mind that one is gone already
                for name in names:
                    with suppress(FileNotFoundError):
                        self.filesystem.rm_file(self._path(name))

    def remove_tree(self, prefix: str) -> None:
        """Remove a subfolder and what is in it; see `Storage.remove_tree`."""
        self.remove(list(self.list(prefix)))

    def subfolder(self, prefix: str) -> "ObjectStorage":
        """A storage of a subfolder; see `Storage.subfolder`."""
        return replace(self, root=self._path(prefix))

    def url(self, name: str) -> str:
        """The URL of an object."""
        return str(self.filesystem.unstrip_protocol(self._path(name)))

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}".rstrip("/")

    def _is_taken(self, name: str) -> bool:
        self.filesystem.invalidate_cache(self._path(name))
        try:
            return bool(self.filesystem.info(self._path(name))["type"] == "file")
        except FileNotFoundError:
            return False

    @contextmanager
    def _translated(self, name: str, what: str) -> Iterator[None]:
        hint = "Check that the bucket exists, and that the credentials may write, read and list there."
        with translated(f"{self.url(name)} cannot be {what}", self.error, hint=hint):
            yield
