"""What is in the cache of this machine, whether it is whole, and what can go."""

import json
import shutil
import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.package.cache import FILES_NAME, INDEX_NAME, KINDS, Kind, index_of, lock_of
from pipeline.package.integrity import file_sha256
from pipeline.package.known_archives import forget, remembered
from pipeline.package.locks import SCRATCH_PREFIX, file_lock, scratch_directory, sweep, unwritable

DAY_SECONDS = 86_400.0
IN_USE_SECONDS = 3600.0  # an entry that was opened so shortly ago may be in use: its weights may not be read yet


@dataclass(frozen=True)
class CachedItem:
    """One entry of the cache.

    Args:
        kind: `packages` or `models`.
        key: Of the entry.
        path: Its directory.
        label: `name@version` of a package; of a model what its directory was called, if it is known.
        size: Bytes of its files.
        made: When it was put there, in seconds since 1970.
        used: When it was last opened.
        sources: Archives on this machine that it was unpacked from, and whether each is still there, unchanged.
        is_whole: Whether its index can be read and every file is there, with its size.
    """

    kind: Kind
    key: str
    path: Path
    label: str
    size: int
    made: float
    used: float
    sources: tuple[tuple[str, bool], ...]
    is_whole: bool

    @property
    def source_is_gone(self) -> bool:
        """Whether every archive it was unpacked from is deleted or changed, and there was one."""
        return bool(self.sources) and not any(there for _, there in self.sources)


def list_cache(cache_dir: Path) -> tuple[CachedItem, ...]:
    """The entries of a cache, those used last first."""
    sources: dict[str, list[tuple[str, bool]]] = defaultdict(list)
    for path, sha256, unchanged in remembered(cache_dir):
        sources[sha256].append((path, unchanged))
    found = [
        _item(kind, folder, tuple(sorted(sources.get(folder.name, ()))))
        for kind in KINDS
        for folder in _folders(cache_dir / kind)
    ]
    return tuple(sorted(found, key=lambda item: (-item.used, item.key)))


def verify_cache(cache_dir: Path) -> dict[CachedItem, tuple[str, ...]]:
    """Read every file of the cache and compare it with its checksum.

    Returns:
        What is wrong with each entry; nothing for those that are whole.
    """
    return {item: tuple(_problems(item)) for item in list_cache(cache_dir)}


def prune_cache(
    cache_dir: Path,
    *,
    unused_days: float | None = None,
    max_bytes: int | None = None,
    source_gone: bool = False,
    everything: bool = False,
    dry_run: bool = False,
) -> tuple[CachedItem, ...]:
    """Remove entries, and what killed processes left behind.

    An entry is removed when any of the conditions holds, or when it is not whole; one that was opened within the last
    hour stays, for it may be in use.

    Args:
        cache_dir: The cache.
        unused_days: Those that were not opened for so many days.
        max_bytes: Those used longest ago, until what stays has at most so many bytes.
        source_gone: Those whose archives are deleted or changed.
        everything: All of them.
        dry_run: Say what would be removed, and remove nothing.

    Returns:
        What was removed.

    Raises:
        StoreError: The cache cannot be written.
    """
    now = time.time()
    for kind in KINDS:
        if not dry_run:
            sweep(cache_dir / kind)
    chosen = []
    left = 0
    for item in list_cache(cache_dir):
        left += item.size
        unused = now - item.used
        goes = (
            everything
            or not item.is_whole
            or (unused_days is not None and unused >= unused_days * DAY_SECONDS)
            or (max_bytes is not None and left > max_bytes)
            or (source_gone and item.source_is_gone)
        )
        if goes and (unused >= IN_USE_SECONDS or not item.is_whole):
            left -= item.size
            chosen.append(item)
    if not dry_run:
        for item in chosen:
            _remove(cache_dir, item)
    return tuple(chosen)


def parse_size(text: str) -> int:
    """A number of bytes as people write it: `500MB`, `20 GiB`, `1000`.

    Raises:
        ConfigError: It is none.
    """
    units = {"": 1, "b": 1}
    for power, letter in enumerate("kmgt", start=1):
        units |= {letter: 1000**power, f"{letter}b": 1000**power, f"{letter}ib": 1024**power}
    digits = text.strip().rstrip("bBiIkKmMgGtT ")
    unit = text.strip()[len(digits) :].strip().lower()
    try:
        return int(float(digits) * units[unit])
    except (ValueError, KeyError, OverflowError) as problem:
        raise ConfigError(f"{text!r} is no size", hint="Write for example 500MB or 20GiB.") from problem


def _folders(parent: Path) -> Iterable[Path]:
    if not parent.is_dir():
        return []
    return sorted(path for path in parent.iterdir() if path.is_dir() and not path.name.startswith(SCRATCH_PREFIX))


def _item(kind: Kind, folder: Path, sources: tuple[tuple[str, bool], ...]) -> CachedItem:
    entry = index_of(folder)
    try:
        status = (folder / INDEX_NAME).stat()
        made, used = folder.stat().st_mtime, status.st_mtime
    except OSError:
        made, used = 0.0, 0.0
    files = [path for path in (folder / FILES_NAME).rglob("*") if path.is_file() and not path.is_symlink()]
    size = sum(path.stat().st_size for path in files)
    return CachedItem(kind, folder.name, folder, _label(kind, folder), size, made, used, sources, entry is not None)


def _label(kind: Kind, folder: Path) -> str:
    name = "manifest.json" if kind == "packages" else "config.json"
    try:
        value = json.loads((folder / FILES_NAME / name).read_bytes())
        return f"{value['name']}@{value['version']}" if kind == "packages" else str(value["model_type"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "unknown"


def _problems(item: CachedItem) -> Iterable[str]:
    entry = index_of(item.path)
    if entry is None:
        yield "its index cannot be read, or a file is missing, added or of another size"
        return
    for record in entry.files:
        if file_sha256(entry.root / record.path) != record.sha256:
            yield f"{record.path} differs from its checksum"


def _remove(cache_dir: Path, item: CachedItem) -> None:
    """Take an entry away in one step, so that nobody sees a part of it, and only then remove its files."""
    try:
        with (
            file_lock(lock_of(cache_dir, item.kind, item.key)),
            scratch_directory(cache_dir / item.kind) as scratch,
        ):
            with suppress(FileNotFoundError):
                item.path.rename(scratch / "removed")
            shutil.rmtree(scratch / "removed", ignore_errors=True)
        forget(cache_dir, item.key)
    except OSError as problem:
        raise unwritable(item.path, problem) from problem
