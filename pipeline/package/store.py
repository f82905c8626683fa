"""The cache of unpacked packages, addressed by the sha256 of the archive.

    <cache>/packages/<sha256 of the archive>/.index.json     every file with size and sha256
    <cache>/packages/<sha256 of the archive>/files/...       the package

An entry is made in a temporary directory beside the others and appears by one rename: it is whole, or not there.
"""

import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from io import BufferedReader
from pathlib import Path

from pipeline.errors import IntegrityError, LoadError, PackageNotFoundError
from pipeline.package.archive import unpack
from pipeline.package.integrity import FileRecord, check_sha256, content_digest, sidecar_sha256
from pipeline.package.limits import ArchiveLimits

INDEX_NAME = ".index.json"
FILES_NAME = "files"
_INDEX_FORMAT = 1


@dataclass(frozen=True)
class CacheEntry:
    """An unpacked package: where its files are, what they are, and the digest over them."""

    root: Path
    files: tuple[FileRecord, ...]
    digest: str


def default_cache_dir() -> Path:
    """`$EXPERT_CACHE_DIR`, or `~/.cache/expert`."""
    named = os.environ.get("EXPERT_CACHE_DIR")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "expert"


def unpack_cached(archive: Path, cache_dir: Path, limits: ArchiveLimits, *, source: str) -> CacheEntry:
    """The cache entry of an archive, made when it is not there yet.

    Any number of processes may ask for the same archive at once: each gets a whole entry.

    Args:
        archive: A local `.expert` file. When `<archive>.sha256` is beside it, it is checked first.
        cache_dir: The root of the cache; created when missing.
        limits: What the archive may hold.
        source: The package, as messages name it.

    Raises:
        ArchiveError: The archive is damaged or unsafe.
        IntegrityError: It differs from the checksum beside it.
        LoadError: The cache cannot be written.
        PackageNotFoundError: The archive cannot be read.
    """
    expected = sidecar_sha256(archive)
    with _opened(archive) as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if expected is not None:
            check_sha256(source, expected=expected, actual=sha256, stated_by=f"{archive.name}.sha256")
        final = cache_dir / "packages" / sha256
        entry = read_entry(final)
        if entry is not None:
            return entry
        try:
            with scratch_directory(cache_dir / "packages") as scratch:
                fresh = scratch / "entry"
                (fresh / FILES_NAME).mkdir(parents=True)
                unpacked = unpack(file, fresh / FILES_NAME, limits, source=source)
                if unpacked.archive_sha256 != sha256:
                    raise IntegrityError(f"{source} changed while it was read", hint="Load it again.")
                _write_index(fresh, unpacked.files)
                return _publish(fresh, final, scratch)
        except OSError as problem:
            raise _unwritable(cache_dir, problem) from problem


def read_entry(place: Path) -> CacheEntry | None:
    """The entry at `place`, or None where there is none or where a file is missing, added or of another size."""
    try:
        index = json.loads((place / INDEX_NAME).read_bytes())
        if index["format"] != _INDEX_FORMAT:
            return None
        files = tuple(FileRecord(**record) for record in index["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    root = place / FILES_NAME
    if content_digest(files) != index.get("digest") or {file.path: file.size for file in files} != _sizes(root):
        return None
    return CacheEntry(root, files, index["digest"])


@contextmanager
def scratch_directory(parent: Path) -> Iterator[Path]:
    """A fresh directory below `parent`, which is created when missing; removed at the end, whatever happens.

    Raises:
        LoadError: It cannot be made.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".fresh-", dir=parent))
    except OSError as problem:
        raise _unwritable(parent, problem) from problem
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _unwritable(place: Path, problem: OSError) -> LoadError:
    return LoadError(
        f"the package cache cannot be written: {problem.strerror or problem}",
        hint="Set EXPERT_CACHE_DIR to a directory with free space that you may write to.",
        details=[str(place)],
    )


@contextmanager
def _opened(archive: Path) -> Iterator[BufferedReader]:
    try:
        file = archive.open("rb")
    except OSError as problem:
        raise PackageNotFoundError(
            f"{archive} cannot be read: {problem.strerror}", hint="Check the path and its permissions."
        ) from problem
    with file:
        yield file


def _sizes(root: Path) -> dict[str, int] | None:
    """The size of every file below `root`; None where something else is there."""
    sizes: dict[str, int] = {}
    folders = [root]
    while folders:
        try:
            entries = list(os.scandir(folders.pop()))
        except OSError:
            return None
        for entry in entries:
            status = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                folders.append(Path(entry.path))
            elif stat.S_ISREG(status.st_mode):
                sizes[Path(entry.path).relative_to(root).as_posix()] = status.st_size
            else:
                return None
    return sizes


def _write_index(entry: Path, files: tuple[FileRecord, ...]) -> None:
    index = {
        "format": _INDEX_FORMAT,
        "digest": content_digest(files),
        "files": [asdict(record) for record in files],
    }
    with (entry / INDEX_NAME).open("x") as file:
        json.dump(index, file)
        file.flush()
        os.fsync(file.fileno())
    _sync_directory(entry)


def _publish(fresh: Path, final: Path, scratch: Path) -> CacheEntry:
    """Give a finished entry its place, or use the one that another process put there first."""
    for _ in range(3):
        try:
            fresh.rename(final)
        except OSError as problem:
            if problem.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if (entry := read_entry(final)) is not None:
                return entry
            with suppress(FileNotFoundError):  # damaged: aside with it, unless another process was faster
                final.rename(scratch / f"damaged-{os.urandom(4).hex()}")
            continue
        _sync_directory(final.parent)
        break
    entry = read_entry(final)
    if entry is None:
        raise LoadError(
            "the package cache changes while it is read",
            hint="Load again; let no other program write there.",
            details=[str(final)],
        )
    return entry


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
