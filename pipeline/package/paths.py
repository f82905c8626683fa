"""Which names a package may use for its files."""

import re
import unicodedata
from typing import Literal

from pipeline.package.limits import ArchiveLimits

MAX_PART_BYTES = 255  # the longest file name that common file systems take
_DRIVE = re.compile(r"[A-Za-z]:")

Kind = Literal["file", "directory"]


def safe_path(name: str, limits: ArchiveLimits) -> str:
    """Return `name` as a clean relative path with `/` between its parts, `""` for the root itself.

    Args:
        name: A path as an archive or a manifest spells it; `./a//b/` is read as `a/b`.
        limits: Bounds its length and depth.

    Raises:
        ValueError: The path could point outside the package, or is not portable; the message says why.
    """
    if any(unicodedata.category(letter) in {"Cc", "Cs"} for letter in name):
        raise ValueError("the name is not UTF-8, or holds a control character")
    if "\\" in name:
        raise ValueError("the name holds a backslash")
    if name.startswith("/"):
        raise ValueError("the path is absolute")
    if _DRIVE.match(name):
        raise ValueError("the path begins with a drive letter")
    if len(name.encode()) > limits.path_length:
        raise ValueError(f"the path is longer than {limits.path_length} bytes")
    parts = [part for part in name.split("/") if part not in {"", "."}]
    if ".." in parts:
        raise ValueError("the path holds '..'")
    if len(parts) > limits.depth:
        raise ValueError(f"the path is deeper than {limits.depth} parts")
    if any(len(part.encode()) > MAX_PART_BYTES for part in parts):
        raise ValueError(f"a part of the path is longer than {MAX_PART_BYTES} bytes")
    return "/".join(parts)


class NameTable:
    """The paths of one package so far; refuses two that some file system would take for one."""

    def __init__(self) -> None:
        self._taken: dict[str, tuple[str, Kind, bool]] = {}

    def add(self, path: str, kind: Kind) -> None:
        """Record a clean path and the directories above it.

        Raises:
            ValueError: The path, or one above it, is taken; the message says by what.
        """
        parts = path.split("/")
        for end in range(1, len(parts)):
            self._claim("/".join(parts[:end]), "directory", listed=False)
        self._claim(path, kind, listed=True)

    def _claim(self, path: str, kind: Kind, *, listed: bool) -> None:
        key = unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())
        known, known_kind, known_listed = self._taken.get(key, (path, kind, False))
        if known != path:
            raise ValueError(f"{path!r} and {known!r} are one name on some file systems")
        if known_kind != kind:
            raise ValueError(f"{path!r} is both a file and a directory")
        if listed and known_listed:
            raise ValueError(f"{path!r} occurs twice")
        self._taken[key] = (path, kind, listed or known_listed)
