"""Which of several versions is the newest: semantic versions, a release after its pre-releases.

Source: Semantic Versioning 2.0.0, section 11.
"""

from collections.abc import Iterable

Key = tuple[tuple[int, ...], bool, tuple[tuple[int, int, str], ...]]


def version_key(version: str) -> Key:
    """What versions are sorted by; build metadata (`+...`) counts for nothing.

    Args:
        version: `major.minor.patch[-pre.release][+build]`, as the manifest's reader has checked it.
    """
    core, _, pre = version.partition("+")[0].partition("-")
    parts = tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in pre.split("."))
    return tuple(int(part) for part in core.split(".")), not pre, parts if pre else ()


def newest(versions: Iterable[str]) -> str | None:
    """The newest of some versions, the first of equal ones; None of none."""
    return max(versions, key=version_key, default=None)
