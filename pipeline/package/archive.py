"""The only code that opens an untrusted archive: a gzip'd tar, read as a stream and counted while it is read.

Nothing here follows what the archive says without a check: the members are walked by hand, only plain files and
directories are written, and each file is created new, below a destination that nobody else writes to.

Source: POSIX.1-2017, pax interchange format; RFC 1952, gzip.
"""

import hashlib
import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import ArchiveError
from pipeline.package.integrity import FileRecord
from pipeline.package.limits import ArchiveLimits
from pipeline.package.paths import NameTable, safe_path

BLOCK = 512
CHUNK_BYTES = 256 << 10
MAX_EXTENDED_HEADER_BYTES = 64 << 10
RATIO_FREE_BYTES = 16 << 20
_ZERO_BLOCK = bytes(BLOCK)
_GZIP = b"\x1f\x8b"
_REFUSED_TYPES = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a character device",
    tarfile.BLKTYPE: "a block device",
    tarfile.FIFOTYPE: "a named pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
    tarfile.GNUTYPE_LONGLINK: "a link",
}
_LOOKS_LIKE = (
    (b"PK\x03\x04", "a zip archive, which is not supported yet"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"\x28\xb5\x2f\xfd", "a zstandard archive, which is not supported yet"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ\x00", "an xz archive"),
    (b"version https://git-lfs", "a Git LFS pointer; fetch the file itself with git lfs pull"),
    (b"<", "a web page or XML"),
    (b"{", "JSON text"),
)


@dataclass(frozen=True)
class Unpacked:
    """What was written: every file, sorted by path, and the sha256 of the compressed bytes that were read."""

    files: tuple[FileRecord, ...]
    archive_sha256: str


def unpack(archive: BinaryIO, destination: Path, limits: ArchiveLimits, *, source: str) -> Unpacked:
    """Write the files of an archive below `destination`.

    Args:
        archive: The open file, at its beginning; it must be able to seek.
        destination: An existing empty directory that only this process writes to. On an error it holds a part of the
            files, and the caller removes it.
        limits: What the archive may hold.
        source: The package, as messages name it.

    Raises:
        ArchiveError: The archive is damaged, unsafe or larger than the limits; nothing is written outside
            `destination`.
    """
    size = archive.seek(0, os.SEEK_END)
    archive.seek(0)
    _check_magic(archive.read(BLOCK), source)
    archive.seek(0)
    if size > limits.total_bytes:
        raise ArchiveError(
            f"{source} has {size:,} bytes; at most {limits.total_bytes:,} are read", hint="Raise limits.total_bytes."
        )
    stream = _Inflater(archive, size, limits)
    names, records = NameTable(), []
    try:
        for member in _members(stream, limits):
            names.add(member.path, "directory" if member.is_directory else "file")
            target = destination / member.path
            if member.is_directory:
                target.mkdir(parents=True, exist_ok=True)
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                records.append(FileRecord(member.path, member.size, _write(stream, member.size, target)))
        stream.finish()
    except _DamageError as problem:
        raise ArchiveError(
            f"{source} is damaged", hint="Fetch the package again; it may be incomplete.", details=[str(problem)]
        ) from problem
    except ValueError as problem:
        raise ArchiveError(
            f"{source} is not safe to unpack",
            hint="Pack the expert again as a plain tar.gz of files and directories.",
            details=[str(problem)],
        ) from problem
    return Unpacked(tuple(sorted(records, key=lambda record: record.path)), stream.sha256())


class _DamageError(Exception):
    """The bytes are not what a whole archive would hold."""


@dataclass(frozen=True)
class _Member:
    path: str
    size: int
    is_directory: bool


class _Inflater:
    """The decompressed bytes of exactly one gzip stream, counted against the limits."""

    def __init__(self, file: BinaryIO, size: int, limits: ArchiveLimits) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self._gzip = zlib.decompressobj(wbits=31)
        self._ready = b""
        self._count = 0
        self._limits = limits
        self._ratio_bytes = max(RATIO_FREE_BYTES, limits.ratio * size)

    def read(self, size: int) -> bytes:
        """At most `size` bytes, at least one; none at the end of the stream."""
        while not self._ready and not self._gzip.eof:
            self._inflate()
        chunk, self._ready = self._ready[:size], self._ready[size:]
        return chunk

    def exactly(self, size: int, what: str) -> bytes:
        parts, missing = [], size
        while missing:
            chunk = self.read(missing)
            if not chunk:
                raise _DamageError(f"The archive ends inside {what}.")
            parts.append(chunk)
            missing -= len(chunk)
        return b"".join(parts)

    def finish(self) -> None:
        """Read to the end; only the zeros that fill up a tar may be left."""
        while chunk := self.read(CHUNK_BYTES):
            if chunk.strip(b"\0"):
                raise _DamageError("Something follows the end of the tar archive.")
        if self._gzip.unused_data or self._file.read(1):
            raise _DamageError("Something follows the end of the gzip stream.")

    def sha256(self) -> str:
        return self._hash.hexdigest()

    def _inflate(self) -> None:
        data = self._gzip.unconsumed_tail
        if not data:
            data = self._file.read(CHUNK_BYTES)
            self._hash.update(data)
        try:
            self._ready = self._gzip.decompress(data, CHUNK_BYTES)
        except zlib.error as problem:
            raise _DamageError(f"The gzip stream is corrupt or fails its checksum: {problem}.") from problem
        if not data and not self._ready and not self._gzip.eof:
            raise _DamageError("The gzip stream is cut short.")
        self._count += len(self._ready)
        if self._count > self._limits.total_bytes:
            raise ValueError(f"it unpacks to more than {self._limits.total_bytes:,} bytes")
        if self._count > self._ratio_bytes:
            raise ValueError(f"it unpacks to more than {self._limits.ratio} times its size")


def _members(stream: _Inflater, limits: ArchiveLimits) -> Iterator[_Member]:
    """Each file and directory; the caller reads a file's bytes before it asks for the next."""
    long_name: str | None = None
    pax: dict[str, str] | None = None
    count = 0
    while (block := stream.exactly(BLOCK, "a member's header")) != _ZERO_BLOCK:
        header = _header(block)
        if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE):
            data = _extended_header(stream, header)
            if header.type == tarfile.GNUTYPE_LONGNAME and long_name is None:
                long_name = _text(data.rstrip(b"\0"))
            elif header.type == tarfile.XHDTYPE and pax is None:
                pax = _pax_records(data)
            elif header.type != tarfile.XGLTYPE or not _pax_records(data).keys() <= {"comment"}:
                raise ValueError("extended headers are repeated, or set values for all members")
            else:
                count += 1
        else:
            if (member := _member(header, block, long_name, pax or {}, limits)) is not None:
                yield member
                if not member.is_directory:
                    stream.exactly(-member.size % BLOCK, "a member's padding")
            long_name, pax = None, None
            count += 1
        if count > limits.members:
            raise ValueError(f"it holds more than {limits.members:,} members")
    if long_name is not None or pax is not None:
        raise _DamageError("The archive ends after an extended header.")


def _header(block: bytes) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError) as problem:
        raise _DamageError(f"A member's header is corrupt: {problem}.") from problem


def _extended_header(stream: _Inflater, header: tarfile.TarInfo) -> bytes:
    if not 0 <= header.size <= MAX_EXTENDED_HEADER_BYTES:
        raise ValueError(f"an extended header has {header.size:,} bytes")
    data = stream.exactly(header.size, "an extended header")
    stream.exactly(-header.size % BLOCK, "an extended header's padding")
    return data


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")  # what is not UTF-8 is refused by name in `safe_path`


def _pax_records(data: bytes) -> dict[str, str]:
    """The `length key=value` records of a pax header."""
    records: dict[str, str] = {}
    while data:
        digits, space, _ = data.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) <= 6 else 0
        key, equals, value = data[len(digits) + 1 : length - 1].partition(b"=")
        if not space or not equals or not len(digits) + 3 <= length <= len(data) or data[length - 1 : length] != b"\n":
            raise _DamageError("A pax header is corrupt.")
        name = _text(key)
        if name in records:
            raise ValueError(f"a pax header gives {name!r} twice")
        records[name] = _text(value)
        data = data[length:]
    return records


def _member(
    header: tarfile.TarInfo, block: bytes, long_name: str | None, pax: dict[str, str], limits: ArchiveLimits
) -> _Member | None:
    """Check one member; None for the entry of the root itself."""
    if long_name is not None and "path" in pax:
        raise ValueError("a member has both a GNU long name and a pax path")
    name = long_name if long_name is not None else pax.get("path", header.name)
    if any(field.partition(b"\0")[2].strip(b"\0") for field in (block[:100], block[345:500])):
        raise ValueError(f"{name!r}: the name holds a NUL")
    if header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE):
        raise ValueError(f"{name!r} is {_REFUSED_TYPES.get(header.type, f'a member of unknown type {header.type!r}')}")
    if "linkpath" in pax or any(key.startswith("GNU.sparse") for key in pax):
        raise ValueError(f"{name!r} is a link or a sparse file")
    if pax.get("size", str(header.size)) != str(header.size):
        raise ValueError(f"{name!r}: two headers give different sizes")
    is_directory = header.type == tarfile.DIRTYPE
    if header.size < 0 or header.size > limits.file_bytes or (is_directory and header.size):
        raise ValueError(f"{name!r} has {header.size:,} bytes; a file may have {limits.file_bytes:,}, a directory none")
    try:
        path = safe_path(name, limits)
    except ValueError as problem:
        raise ValueError(f"{name[:100]!r}: {problem}") from problem
    if not is_directory and (not path or name.endswith("/")):
        raise ValueError(f"{name!r} is a file with the name of a directory")
    return _Member(path, header.size, is_directory) if path else None


def _write(stream: _Inflater, size: int, target: Path) -> str:
    """Create one file and return its sha256."""
    digest, missing = hashlib.sha256(), size
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with os.fdopen(descriptor, "wb") as file:
        while missing:
            chunk = stream.read(min(missing, CHUNK_BYTES))
            if not chunk:
                raise _DamageError(f"The archive ends inside {target.name!r}.")
            digest.update(chunk)
            file.write(chunk)
            missing -= len(chunk)
        file.flush()
        os.fchmod(descriptor, 0o644)
        os.fsync(descriptor)
    return digest.hexdigest()


def _check_magic(head: bytes, source: str) -> None:
    if head.startswith(_GZIP):
        return
    looks = next((words for magic, words in _LOOKS_LIKE if head.startswith(magic)), "something else")
    if not head:
        looks = "an empty file"
    elif head[257:262] == b"ustar":
        looks = "a tar archive without gzip"
    raise ArchiveError(
        f"{source} is not a gzip'd tar archive: it looks like {looks}", hint="Pack it again as tar.gz: expert pack."
    )
