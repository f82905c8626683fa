"""Create-only files on a local or mounted disk."""

import errno
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import OutputError

ATTEMPTS = "_attempts"
_CLAIMS = f"{ATTEMPTS}/claims"
_COPY_BYTES = 1 << 20
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
    """

    root: str
    hard_links: bool = True
    claim_seconds: float = 10.0

    def create(self, name: str, data: bytes) -> bool:
        """Create a file with all its content, unless there is one of that name; see `Storage.create`."""
        return self._create(name, lambda attempt: attempt.write(data))

    def create_from_file(self, name: str, path: str) -> bool:
        """Create a file with the content of another, unless there is one of that name; see `Storage`."""

        def copy(attempt: BinaryIO) -> None:
            with Path(path).open("rb") as source:
                shutil.copyfileobj(source, attempt, _COPY_BYTES)

        return self._create(name, copy)

    def _create(self, name: str, write: Callable[[BinaryIO], object]) -> bool:
        final = self._path(name)
        with self._translated(name, "written"):
            if final.exists():
                return False
            final.parent.mkdir(parents=True, exist_ok=True)
            attempt = self._path(f"{ATTEMPTS}/{uuid.uuid4()}")
            try:
                _write(attempt, write)
                return self._publish(attempt, final, name)
            except FileNotFoundError:
                # who finished the job swept the attempts away; then the file is there
                if final.exists():
                    return False
                raise
            finally:
                attempt.unlink(missing_ok=True)

    def read(self, name: str) -> bytes:
        """The content of a file; see `Storage.read`."""
        with self._translated(name, "read"):
            return self._path(name).read_bytes()

    def exists(self, name: str) -> bool:
        """Whether there is a file of that name."""
        with self._translated(name, "looked at"):
            return self._path(name).is_file()

    def list(self, prefix: str = "") -> dict[str, int]:
        """Name and size of every file below a subfolder; see `Storage.list`."""
        sizes: dict[str, int] = {}
        with self._translated(prefix, "listed"):
            for parent, _, names in os.walk(self._path(prefix), onerror=_raise_unless_missing):
                for name in names:
                    path = Path(parent, name)
                    try:
                        sizes[path.relative_to(self.root).as_posix()] = path.lstat().st_size
                    except FileNotFoundError:  # an attempt of another process, gone since
                        continue
        return dict(sorted(sizes.items()))

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
                raise OutputError(
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
            raise OutputError(f"{self.url(name)} cannot be {what}: {reason}", hint=hint) from error


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


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
