"""Archives that were hashed before: a file that has not changed since is not read again to know its sha256.

As git does with its index, a file counts as unchanged when its inode, size and both times are the same, and as unknown
when it was changed so shortly before it was hashed that a later change could have the same times.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

_SETTLED_NANOSECONDS = 2_000_000_000
_MOST_BEFORE = 64
_FIELDS = ("st_dev", "st_ino", "st_size", "st_mtime_ns", "st_ctime_ns")


def known_sha256(cache_dir: Path, archive: Path, status: os.stat_result) -> str | None:
    """The sha256 of an archive that was hashed before and is the same file still, else None."""
    try:
        record = json.loads(_place(cache_dir, archive).read_bytes())
        same = record["is_settled"] and record["status"] == _facts(status)
        return str(record["sha256"]) if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember_archive(cache_dir: Path, archive: Path, status: os.stat_result, sha256: str) -> None:
    """Note the sha256 of an archive, and what lay at its path before.

    One that has changed a moment ago is noted, and hashed again the next time: it could change once more and look the
    same.

    Args:
        cache_dir: The cache.
        archive: The file.
        status: What the system said of it before it was read.
        sha256: Of its bytes.
    """
    place = _place(cache_dir, archive)
    age = time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns)
    record = {
        "path": str(archive.absolute()),
        "status": _facts(status),
        "sha256": sha256,
        "is_settled": age >= _SETTLED_NANOSECONDS,
        "before": _earlier(place, sha256),
    }
    with suppress(OSError):  # it is a help for the next time, nothing else
        place.parent.mkdir(parents=True, exist_ok=True)
        _write(place, record)


def remembered(cache_dir: Path) -> Iterator[tuple[str, str, bool]]:
    """Every archive that was noted: its path, its sha256, and whether it is still there, unchanged.

    What another file has taken the place of is not.
    """
    for _, record in _records(cache_dir):
        try:
            unchanged = _facts(os.stat(record["path"])) == record["status"]  # noqa: PTH116  # a path of any form
        except OSError:
            unchanged = False
        yield record["path"], record["sha256"], unchanged
        for sha256 in _before(record):
            yield record["path"], sha256, False


def forget(cache_dir: Path, sha256: str) -> None:
    """Remove the notes of the archives of that sha256."""
    for place, record in _records(cache_dir):
        if record["sha256"] == sha256 and not _before(record):
            place.unlink(missing_ok=True)
        elif sha256 in (record["sha256"], *_before(record)):
            kept = [one for one in _before(record) if one != sha256]
            settled = record["sha256"] != sha256 and record.get("is_settled")
            _write(place, record | {"before": kept, "is_settled": bool(settled)})


def _records(cache_dir: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for place in sorted((cache_dir / "archives").glob("*.json")):
        with suppress(OSError, ValueError):
            record = json.loads(place.read_bytes())
            if (
                isinstance(record, dict)
                and isinstance(record.get("path"), str)
                and {"sha256", "status"} <= record.keys()
            ):
                yield place, record


def _before(record: Mapping[str, Any]) -> list[str]:
    """The sha256 of what was opened at a path before, the newest last."""
    before = record.get("before")
    return [one for one in before if isinstance(one, str)] if isinstance(before, list) else []


def _earlier(place: Path, sha256: str) -> list[str]:
    try:
        record = json.loads(place.read_bytes())
        earlier = [*_before(record), str(record["sha256"])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    return [one for one in dict.fromkeys(earlier) if one != sha256][-_MOST_BEFORE:]


def _write(place: Path, record: Mapping[str, Any]) -> None:
    fresh = place.with_name(f"{place.name}.{os.getpid()}")
    fresh.write_text(json.dumps(record), encoding="utf-8")
    fresh.replace(place)


def _place(cache_dir: Path, archive: Path) -> Path:
    return cache_dir / "archives" / f"{hashlib.sha256(os.fsencode(archive.absolute())).hexdigest()}.json"


def _facts(status: os.stat_result) -> list[int]:
    return [getattr(status, name) for name in _FIELDS]
