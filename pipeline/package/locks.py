"""Locks between the processes of one machine, and scratch folders that a dead process leaves nothing behind in.

Both are advisory locks of the kernel (`flock`): they end with the process that holds them, however it ends.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.errors import StoreError

SCRATCH_PREFIX = ".fresh-"


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold a lock that one thread of one process of this machine holds at a time; wait for it.

    Args:
        path: The lock's file; made when missing, with the folders above it, and never removed.

    Raises:
        StoreError: The file cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as problem:
        raise unwritable(path, problem) from problem
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def scratch_directory(parent: Path) -> Iterator[Path]:
    """A fresh directory below `parent`, which is created when missing; removed at the end, whatever happens.

    What processes that were killed have left there is removed as well: a directory that nobody holds a lock on.

    Raises:
        StoreError: It cannot be made.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        # while it is held, no directory is between being made and being locked
        with file_lock(parent.parent / "locks" / f"{parent.name}.births.lock"):
            sweep(parent)
            scratch = Path(tempfile.mkdtemp(prefix=SCRATCH_PREFIX, dir=parent))
            handle = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as problem:
        raise unwritable(parent, problem) from problem
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(handle)


def sweep(parent: Path) -> None:
    """Remove the scratch directories below `parent` whose processes are gone."""
    for left in parent.glob(f"{SCRATCH_PREFIX}*"):
        with suppress(OSError):
            handle = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(handle)


def unwritable(place: Path, problem: OSError) -> StoreError:
    """The error for a cache that cannot be written."""
    return StoreError(
        f"the package cache cannot be written: {problem.strerror or problem}",
        hint="Set EXPERT_CACHE_DIR to a directory with free space that you may write to.",
        details=[str(place)],
    )
