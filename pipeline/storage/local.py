"""Create-only files on a local or mounted disk."""

import errno
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import ExpertError, OutputError
from pipeline.storage.copying import copy_hashed

ATTEMPTS = "_attempts"
_CLAIMS = f"{ATTEMPTS}/claims"
_COPY_BYTES = 1 << 20
_SWEPT_TRIES = 5
_SWEPT = (FileNotFoundError, FileExistsError)  # the second from mkdir, when the folder goes while it looks
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class LocalStorage:
    """A folder on a disk; see `storage.Storage`.

    A file is written to `_attempts/<uuid>`, flushed to the disk, and hard-linked to its name: linking fails when the
    name is taken, and a link is there whole or not at all.

    Where there are no hard links, the right to a name is an empty file `_attempts/claims/<name>` that only one process
    can create (`O_EXCL`); its owner then renames the attempt. When the owner dies between the two, no other attempt may
    write the name: `create` raises, and says which claim a person may delete. Nothing is lost or overwritten.

    Args:
        root: The folder, as an absolute path; made when needed.
        hard_links: False to use claims from the start.
        claim_seconds: How long to wait for a claim's owner to finish.
        error: What is raised instead of OutputError.
    """

    root: str
    hard_links: bool = True
    claim_seconds: float = 10.0
    error: type[ExpertError] = OutputError

    def create(self, name: str, data: bytes) -> bool:
        """Create a file with all its content, unless there is one of that name; see `Storage.create`."""
        return self._create(name, lambda attempt: attempt.write(data))

    def create_from_file(self, name: str, path: str) -> bool:
        """Create a file with the content of another, unless there is one of that name; see `Storage`."""

        def copy(attempt: BinaryIO) -> None:
            with Path(path).open("rb") as source:
                shutil.copyfileobj(source, attempt, _COPY_BYTES)

        return self._create(name, copy)

    def replace(self, name: str, data: bytes) -> None:
        """Write a file over the one that is there, if any; see `Storage.replace`."""
        with self._translated(name, "written"):
            final = self._path(name)
            final.parent.mkdir(parents=True, exist_ok=True)
            for left in reversed(range(_SWEPT_TRIES)):
                attempt = self._path(f"{ATTEMPTS}/{uuid.uuid4()}")
                try:
                    _write(attempt, lambda file: file.write(data))
                    attempt.replace(final)
                    break
                except _SWEPT:  # someone removed the folder of attempts at the same moment
                    if not left:
                        raise
                finally:
                    attempt.unlink(missing_ok=True)
            with suppress(OSError):  # attempts of others are in it
                self._path(ATTEMPTS).rmdir()  # a lease is given back after the sweep
            _flush_folder(final.parent)

    def _create(self, name: str, write: Callable[[BinaryIO], object]) -> bool:
        final = self._path(name)
        with self._translated(name, "written"):
            if final.exists():
                return False
            final.parent.mkdir(parents=True, exist_ok=True)
            for _ in range(_SWEPT_TRIES):
                attempt = self._path(f"{ATTEMPTS}/{uuid.uuid4()}")
                try:
                    _write(attempt, write)
                    return self._publish(attempt, final, name)
                except _SWEPT:
                    # who finished the job swept the attempts away; then the file is there, or the sweeper was late
                    if final.exists():
                        return False
                finally:
                    attempt.unlink(missing_ok=True)
        raise self.error(
            f"{self.url(name)} cannot be written: its attempts disappear",
            hint=f"See who empties {self.url(ATTEMPTS)}, and run the same command again.",
        )

    def read(self, name: str) -> bytes:
        """The content of a file; see `Storage.read`."""
        with self._translated(name, "read"):
            return self._path(name).read_bytes()

    def fetch(self, name: str, path: str) -> str:
        """Copy a file to a new local one; see `Storage.fetch`."""
        with self._translated(name, "copied"), self._path(name).open("rb") as source:
            return copy_hashed(source, path)

    def exists(self, name: str) -> bool:
        """Whether there is a file of that name."""
        with self._translated(name, "looked at"):
            return self._path(name).is_file()

    def list(self, prefix: str = "") -> dict[str, int]:
        """Name and size of every file below a subfolder; see `Storage.list`."""
        sizes: dict[str, int] = {}
        with self._translated(prefix, "listed"):
            folders = [str(self._path(prefix))]
            while folders:
                sizes.update(_files_of(folders.pop(), folders))
        start = len(str(Path(self.root)).rstrip(os.sep)) + 1
        return {path[start:].replace(os.sep, "/"): size for path, size in sorted(sizes.items())}

    def remove(self, names: Sequence[str]) -> None:
        """Remove files; see `Storage.remove`."""
        for name in names:
            with self._translated(name, "removed"):
                self._path(name).unlink(missing_ok=True)

    def remove_tree(self, prefix: str) -> None:
        """Remove a subfolder and what is in it; see `Storage.remove_tree`."""
        with self._translated(prefix, "removed"):
            for _ in range(10):  # a late attempt may add a file while the folder is emptied
                try:
                    shutil.rmtree(self._path(prefix))
                except FileNotFoundError:
                    if not self._path(prefix).exists():
                        return
                except OSError as error:
                    if error.errno != errno.ENOTEMPTY:
                        raise
                else:
                    return

    def subfolder(self, prefix: str) -> "LocalStorage":
        """A storage of a subfolder; see `Storage.subfolder`."""
        return replace(self, root=self.url(prefix))

    def url(self, name: str) -> str:
        """The absolute path of a file."""
        return str(self._path(name))

    def _path(self, name: str) -> Path:
        return Path(self.root, name)

    def _publish(self, attempt: Path, final: Path, name: str) -> bool:
        if self.hard_links:
            try:
                os.link(attempt, final)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                return self._publish_by_claim(attempt, final, name)
            _flush_folder(final.parent)
            return True
        return self._publish_by_claim(attempt, final, name)

    def _publish_by_claim(self, attempt: Path, final: Path, name: str) -> bool:
        claim = self._path(f"{_CLAIMS}/{name}")
        claim.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            self._await_claimed(claim, final, name)
            return False
        if final.exists():  # claimed, written, and the claims swept away since
            return False
        attempt.rename(final)
        _flush_folder(final.parent)
        return True

    def _await_claimed(self, claim: Path, final: Path, name: str) -> None:
        deadline = time.monotonic() + self.claim_seconds
        while not final.exists():
            if time.monotonic() > deadline:
                raise self.error(
                    f"{name} is claimed by an attempt that did not finish",
                    details=[f"claim  {claim}"],
                    hint="When no job is writing to this folder, delete the claim and run the same command again.",
                )
            time.sleep(0.05)

    @contextmanager
    def _translated(self, name: str, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            hint = "Check that the folder exists, is a folder, and may be written to."
            if error.errno in _NO_SPACE:
                hint = "Free some space or raise the quota, and run the same command again."
            reason = error.strerror or str(error)
            raise self.error(f"{self.url(name)} cannot be {what}: {reason}", hint=hint) from error


def _write(attempt: Path, write: Callable[[BinaryIO], object]) -> None:
    attempt.parent.mkdir(parents=True, exist_ok=True)
    with attempt.open("xb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Make a new name in a folder last through a power cut, where the file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def _files_of(folder: str, below: list[str]) -> dict[str, int]:
    """Path and size of the files of one folder; its folders are added to `below`. One call of the system a file."""
    sizes: dict[str, int] = {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                try:
                    if entry.is_dir(follow_symlinks=False):
                        below.append(entry.path)
                    else:
                        sizes[entry.path] = entry.stat(follow_symlinks=False).st_size
                except FileNotFoundError:  # an attempt of another process, gone since
                    continue
    except FileNotFoundError:
        return sizes
    return sizes
