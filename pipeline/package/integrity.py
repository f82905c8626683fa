"""Checksums: of files, of whole packages, and the `.sha256` file beside an archive."""

import hashlib
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import ArchiveError, IntegrityError
from pipeline.package.limits import ArchiveLimits
from pipeline.package.paths import NameTable, safe_path

INTEGRITY_NAME = "integrity.json"
SIGNATURE_NAME = "signature.sig"
SIDECAR_SUFFIX = ".sha256"
MAX_SIDECAR_BYTES = 64 << 10
CHUNK_BYTES = 1 << 20
_SIDECAR_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")


@dataclass(frozen=True)
class FileRecord:
    """One file of a package: its path inside it (parts joined by `/`), its size in bytes and its checksum."""

    path: str
    size: int
    sha256: str


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in lower-case hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_digest(records: Iterable[FileRecord]) -> str:
    """One digest for all files of a package, the same for an archive and for its unpacked directory.

    Returns:
        The sha256 over `path NUL sha256 newline` of every file, sorted by path.
    """
    lines = sorted(f"{record.path}\0{record.sha256}\n".encode() for record in records)
    return hashlib.sha256(b"".join(lines)).hexdigest()


def scan_directory(root: Path, limits: ArchiveLimits) -> tuple[FileRecord, ...]:
    """Read every file below `root`, in the order of their paths.

    Raises:
        ArchiveError: It holds something other than files and directories, an unsafe name, or more than the limits.
    """
    names, total, members = NameTable(), 0, 0
    records, folders = [], [root]
    while folders:
        folder = folders.pop()
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            members += 1
            place = Path(entry.path).relative_to(root).as_posix()
            kind = _kind(entry, root)
            try:
                path = safe_path(place, limits)
                names.add(path, "directory" if kind == stat.S_IFDIR else "file")
            except ValueError as problem:
                raise _unsafe(root, f"{place!r}: {problem}") from problem
            if kind == stat.S_IFDIR:
                folders.append(Path(entry.path))
            else:
                size = entry.stat(follow_symlinks=False).st_size
                total += size
                _check_bounds(root, path, size, total, limits)
                records.append(FileRecord(path, size, file_sha256(Path(entry.path))))
            if members > limits.members:
                raise _unsafe(root, f"more than {limits.members:,} files and directories")
    return tuple(sorted(records, key=lambda record: record.path))


def _check_bounds(root: Path, path: str, size: int, total: int, limits: ArchiveLimits) -> None:
    if size > limits.file_bytes:
        raise _unsafe(root, f"{path}: {size:,} bytes; at most {limits.file_bytes:,} are allowed in one file")
    if total > limits.total_bytes:
        raise _unsafe(root, f"more than {limits.total_bytes:,} bytes")


def _kind(entry: os.DirEntry[str], root: Path) -> int:
    kind = stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode)
    if kind == stat.S_IFLNK:
        raise _unsafe(root, f"{entry.name!r} is a symbolic link", hint="Copy the files in place of the links (cp -L).")
    if kind not in (stat.S_IFDIR, stat.S_IFREG):
        raise _unsafe(root, f"{entry.name!r} is a device, pipe or socket")
    return kind


def _unsafe(root: Path, detail: str, hint: str = "Keep only the expert's own files in the directory.") -> ArchiveError:
    return ArchiveError(f"{root.name} cannot be used as a package directory", hint=hint, details=[detail])


def sidecar_sha256(archive: Path) -> str | None:
    """The checksum that `<archive>.sha256` gives for the archive; None where there is no such file.

    Raises:
        IntegrityError: The file is not in the format of `sha256sum`, or does not name this archive.
    """
    sidecar = archive.with_name(archive.name + SIDECAR_SUFFIX)
    if not sidecar.is_file():
        return None
    with sidecar.open("rb") as file:
        data = file.read(MAX_SIDECAR_BYTES + 1)
    try:
        lines = data.decode().splitlines()
    except UnicodeDecodeError:
        lines = [""]
    found = [match for line in lines if line.strip() for match in [_SIDECAR_LINE.fullmatch(line)]]
    if not found or None in found or len(data) > MAX_SIDECAR_BYTES:
        raise IntegrityError(
            f"{sidecar.name} is not a checksum file",
            hint=f"Write it again: sha256sum {archive.name} > {sidecar.name}",
        )
    named = {Path(match[2]).name: match[1].lower() for match in found if match is not None}
    if archive.name not in named:
        raise IntegrityError(
            f"{sidecar.name} does not name {archive.name}",
            hint="Give the package its original name back, or write its checksum file again.",
            details=[f"it names {', '.join(sorted(named))}"],
        )
    return named[archive.name]


def check_sha256(what: str, *, expected: str, actual: str, stated_by: str) -> None:
    """Compare two checksums.

    Raises:
        IntegrityError: They differ.
    """
    if expected != actual:
        raise IntegrityError(
            f"{what} differs from its checksum",
            hint="Fetch the package again from where it was published.",
            details=[f"{stated_by} says sha256 {expected}", f"the file has   sha256 {actual}"],
        )
