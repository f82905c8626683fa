"""The cache of unpacked packages and base models on this machine.

    <cache>/packages/<key>/.index.json     every file with size and sha256
    <cache>/packages/<key>/files/...       the package
    <cache>/models/<key>/...               a base model that was staged, alike
    <cache>/archives/<path's sha256>.json  which entry an archive that was opened before belongs to
    <cache>/locks/...                      held while an entry is made; empty files, at most a few hundred

The key is the sha256 of the archive, or the digest of what was staged. An entry is made in a temporary directory beside
the others, by one process at a time, and appears by one rename: it is whole, or not there.
"""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from io import BufferedReader
from pathlib import Path
from typing import Literal

from pipeline.errors import ArchiveError, IntegrityError, PackageNotFoundError, StoreError
from pipeline.package.archive import unpack
from pipeline.package.hashing import hash_with_tail
from pipeline.package.integrity import FileRecord, check_sha256, content_digest, sidecar_sha256
from pipeline.package.known_archives import known_sha256, remember_archive
from pipeline.package.limits import ArchiveLimits
from pipeline.package.locks import file_lock, scratch_directory, unwritable
from pipeline.package.seal import SEALED_HEADER_BYTES, sealed_sha256

INDEX_NAME = ".index.json"
FILES_NAME = "files"
_INDEX_FORMAT = 1
_FETCH_AGAIN = "Fetch the package again; it may be incomplete."

Kind = Literal["packages", "models"]
KINDS: tuple[Kind, ...] = ("packages", "models")


@dataclass(frozen=True)
class CacheEntry:
    """An unpacked package or base model: where its files are, what they are, and the digest over them.

    `is_checked`: it is kept in the cache, so that its tensors have been looked at.
    """

    root: Path
    files: tuple[FileRecord, ...]
    digest: str
    is_checked: bool = False


Check = Callable[[CacheEntry], object]
"""Refuses what is not valid by raising, before it is put into the cache."""


def accept(_: CacheEntry) -> None:
    """The check that refuses nothing."""


def default_cache_dir() -> Path:
    """`$EXPERT_CACHE_DIR`, or `~/.cache/expert`."""
    named = os.environ.get("EXPERT_CACHE_DIR")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "expert"


def unpack_cached(
    archive: Path,
    cache_dir: Path,
    limits: ArchiveLimits,
    *,
    source: str,
    check: Check,
    is_temporary: bool = False,
) -> CacheEntry:
    """The cache entry of an archive, made when it is not there yet.

    Any number of processes may ask for the same archive at once: one of them unpacks it, and each gets a whole entry.

    Args:
        archive: A local `.expert` file. When `<archive>.sha256` is beside it, it is checked first.
        cache_dir: The root of the cache; created when missing.
        limits: What the archive may hold.
        source: The package, as messages name it.
        check: Looks at a fresh entry before it is kept.
        is_temporary: The file is a copy that goes; it is not noted as where the entry came from.

    Raises:
        ArchiveError: The archive is damaged or unsafe.
        IntegrityError: It differs from the checksum beside it.
        LoadError: What `check` raises.
        PackageNotFoundError: The archive cannot be read.
        StoreError: The cache cannot be written.
    """
    expected = sidecar_sha256(archive)
    with _opened(archive) as file:
        status = os.fstat(file.fileno())
        known = known_sha256(cache_dir, archive, status)
        sha256 = known or _checked_sha256(file, source)
        if expected is not None:
            check_sha256(source, expected=expected, actual=sha256, stated_by=f"{archive.name}.sha256")

        def fill(root: Path) -> tuple[FileRecord, ...]:
            unpacked = unpack(file, root, limits, source=source)
            if unpacked.archive_sha256 != sha256:
                raise IntegrityError(f"{source} changed while it was read", hint="Load it again.")
            return unpacked.files

        entry = cached(cache_dir, "packages", sha256, fill, check)
        if known is None and not is_temporary:
            remember_archive(cache_dir, archive, status, sha256)
        return entry


def cached(
    cache_dir: Path, kind: Kind, key: str, fill: Callable[[Path], tuple[FileRecord, ...]], check: Check
) -> CacheEntry:
    """The entry of that key, made when it is not there yet, by one process of this machine at a time.

    Args:
        cache_dir: The root of the cache; created when missing.
        kind: Of the entry.
        key: A sha256.
        fill: Writes the files below an empty directory, and says which.
        check: Looks at a fresh entry before it is kept.

    Raises:
        LoadError: What `fill` or `check` raises.
        StoreError: The cache cannot be written.
    """
    final = cache_dir / kind / key
    entry = read_entry(final)
    if entry is not None:
        return entry
    with file_lock(lock_of(cache_dir, kind, key)):
        entry = read_entry(final)
        if entry is not None:
            return entry
        try:
            with scratch_directory(cache_dir / kind) as scratch:
                fresh = scratch / "entry"
                (fresh / FILES_NAME).mkdir(parents=True)
                files = fill(fresh / FILES_NAME)
                check(CacheEntry(fresh / FILES_NAME, files, content_digest(files)))
                _write_index(fresh, files)
                return _publish(fresh, final, scratch)
        except OSError as problem:
            raise unwritable(cache_dir, problem) from problem


def lock_of(cache_dir: Path, kind: Kind, key: str) -> Path:
    """The file that is locked while the entry of that key is made or removed."""
    return cache_dir / "locks" / f"{kind}-{key[:2]}.lock"


def read_entry(place: Path) -> CacheEntry | None:
    """The entry at `place`, as `index_of` finds it, marked as used now."""
    entry = index_of(place)
    if entry is not None:
        with suppress(OSError):  # a cache that others filled may be read-only
            os.utime(place / INDEX_NAME)
    return entry


def index_of(place: Path) -> CacheEntry | None:
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
    return CacheEntry(root, files, index["digest"], is_checked=True)


def _checked_sha256(file: BufferedReader, source: str) -> str:
    """The sha256 of an archive, which is compared with its seal where it has one."""
    head = file.read(SEALED_HEADER_BYTES)
    file.seek(0)
    try:
        seal = sealed_sha256(head)
    except ValueError as problem:
        raise ArchiveError(f"{source} is damaged", hint=_FETCH_AGAIN, details=[str(problem)]) from problem
    if seal is None:
        return hashlib.file_digest(file, "sha256").hexdigest()
    sha256, rest = hash_with_tail(file, SEALED_HEADER_BYTES)
    if rest != seal:
        detail = "The gzip stream differs from the checksum in its header."
        raise ArchiveError(f"{source} is damaged", hint=_FETCH_AGAIN, details=[detail])
    return sha256


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
    start = len(str(root)) + 1
    folders = [str(root)]
    while folders:
        try:
            entries = list(os.scandir(folders.pop()))
        except OSError:
            return None
        for entry in entries:
            status = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                folders.append(entry.path)
            elif stat.S_ISREG(status.st_mode):
                sizes[entry.path[start:]] = status.st_size
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
    """Give a finished entry its place; what is there, and is damaged, goes."""
    for _ in range(3):
        try:
            fresh.rename(final)
        except OSError as problem:
            if problem.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if (entry := read_entry(final)) is not None:
                return entry
            with suppress(FileNotFoundError):
                final.rename(scratch / f"damaged-{os.urandom(4).hex()}")
            continue
        _sync_directory(final.parent)
        break
    entry = read_entry(final)
    if entry is None:
        raise StoreError(
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
