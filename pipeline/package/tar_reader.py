"""The members of a tar archive, walked by hand.

Source: POSIX.1-2017, pax interchange format; GNU tar's long names.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from pipeline.package.limits import ArchiveLimits
from pipeline.package.paths import safe_path
from pipeline.package.streams import ByteStream, DamageError

BLOCK = 512
MAX_EXTENDED_HEADER_BYTES = 64 << 10
_ZERO_BLOCK = bytes(BLOCK)
_REFUSED_TYPES = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a character device",
    tarfile.BLKTYPE: "a block device",
    tarfile.FIFOTYPE: "a named pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
    tarfile.GNUTYPE_LONGLINK: "a link",
}


@dataclass(frozen=True)
class Member:
    """A file or a directory of an archive, whose path is checked."""

    path: str
    size: int
    is_directory: bool


class ArchiveReader(Protocol):
    """Reads an archive from its beginning to its end.

    All of its methods raise DamageError where the archive is damaged, ValueError where it is not safe to unpack.
    """

    def members(self) -> Iterator[Member]:
        """Each file and directory; the caller reads all bytes of a file before it asks for the next."""
        ...

    def read(self, size: int) -> bytes:
        """At most `size` bytes of the file, at least one; none at the end of the archive."""
        ...

    def end_member(self) -> None:
        """All bytes of the file were read."""
        ...

    def finish(self) -> None:
        """Look at what follows the last member."""
        ...


class TarReader:
    """See `ArchiveReader`."""

    def __init__(self, stream: ByteStream, limits: ArchiveLimits) -> None:
        self._stream = stream
        self._limits = limits

    def members(self) -> Iterator[Member]:
        """See `ArchiveReader.members`."""
        return _members(self._stream, self._limits)

    def read(self, size: int) -> bytes:
        """See `ArchiveReader.read`."""
        return self._stream.read(size)

    def end_member(self) -> None:
        """See `ArchiveReader.end_member`."""

    def finish(self) -> None:
        """See `ArchiveReader.finish`."""
        self._stream.finish()


def _members(stream: ByteStream, limits: ArchiveLimits) -> Iterator[Member]:
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
        raise DamageError("The archive ends after an extended header.")


def _header(block: bytes) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError) as problem:
        raise DamageError(f"A member's header is corrupt: {problem}.") from problem


def _extended_header(stream: ByteStream, header: tarfile.TarInfo) -> bytes:
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
            raise DamageError("A pax header is corrupt.")
        name = _text(key)
        if name in records:
            raise ValueError(f"a pax header gives {name!r} twice")
        records[name] = _text(value)
        data = data[length:]
    return records


def _member(
    header: tarfile.TarInfo, block: bytes, long_name: str | None, pax: dict[str, str], limits: ArchiveLimits
) -> Member | None:
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
    return Member(path, header.size, is_directory) if path else None
