"""The members of a zip file, where its two directories say the same and its bytes belong to one member each.

Source: PKWARE's APPNOTE 6.3.10. Zip64, comments, encryption and other methods than deflate are refused.
"""

import stat
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from pipeline.package.limits import ArchiveLimits
from pipeline.package.paths import safe_path
from pipeline.package.streams import CHUNK_BYTES, RATIO_FREE_BYTES, DamageError
from pipeline.package.tar_reader import Member

_END = struct.Struct("<4s4H2LH")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_STORED, _DEFLATED = 0, 8
_ENCRYPTED, _DESCRIPTOR, _UTF8 = 0x0001, 0x0008, 0x0800
_HARMLESS_FLAGS = _DESCRIPTOR | _UTF8 | 0x0006  # how hard deflate tried
_REFUSED_EXTRAS = {0x0001: "zip64 sizes", 0x7075: "a second name", 0x9901: "encryption"}
_DOS_DIRECTORY = 0x10


@dataclass(frozen=True)
class _Entry:
    name: bytes
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    offset: int
    mode: int


class ZipReader:
    """See `ArchiveReader`.

    Args:
        file: The zip file; it must be able to seek.
        size: Its bytes.
        limits: What it may hold.
    """

    def __init__(self, file: BinaryIO, size: int, limits: ArchiveLimits) -> None:
        self._file = file
        self._size = size
        self._limits = limits
        self._content: Iterator[bytes] = iter(())
        self._ready = b""

    def members(self) -> Iterator[Member]:
        """See `ArchiveReader.members`."""
        entries, end = self._directory()
        total, at = 0, 0
        for entry in sorted(entries, key=lambda entry: entry.offset):
            member = self._member(entry)
            total += entry.size
            if total > self._limits.total_bytes:
                raise ValueError(f"it unpacks to more than {self._limits.total_bytes:,} bytes")
            if total > max(RATIO_FREE_BYTES, self._limits.ratio * self._size):
                raise ValueError(f"it unpacks to more than {self._limits.ratio} times its size")
            if entry.offset != at:
                raise ValueError("its members overlap, or something lies between them")
            data_at = self._check_local(entry)
            at = data_at + entry.packed
            if entry.flags & _DESCRIPTOR:
                at += self._descriptor_bytes(entry, at)
            self._content, self._ready = self._inflated(entry, data_at), b""
            if member is not None:
                yield member
            for left in self._content:  # also compares the checksum of what nobody has read
                if left:
                    raise DamageError(f"{entry.name!r} is longer than its headers say.")
        if at != end:
            raise ValueError("something lies between its members and its directory")

    def read(self, size: int) -> bytes:
        """See `ArchiveReader.read`."""
        while not self._ready:
            chunk = next(self._content, None)
            if chunk is None:
                return b""
            self._ready = chunk
        part, self._ready = self._ready[:size], self._ready[size:]
        return part

    def end_member(self) -> None:
        """See `ArchiveReader.end_member`."""

    def finish(self) -> None:
        """See `ArchiveReader.finish`."""

    def _directory(self) -> tuple[list[_Entry], int]:
        """The entries of the central directory, and where it begins."""
        if self._size < _END.size:
            raise DamageError("The zip file is cut short.")
        data = self._at(self._size - _END.size, _END.size)
        magic, disk, first_disk, here, count, length, offset, comment = _END.unpack(data)
        if magic != b"PK\x05\x06" or comment:
            raise DamageError("The zip file is cut short, or something follows its end.")
        if disk or first_disk or here != count or 0xFFFF in (here, count) or 0xFFFFFFFF in (length, offset):
            raise ValueError("it is a zip64 file, or one of several parts")
        if count > self._limits.members:
            raise ValueError(f"it holds more than {self._limits.members:,} members")
        if offset + length != self._size - _END.size:
            raise ValueError("its directory is not where its end says")
        directory, entries = self._at(offset, length), []
        at = 0
        while at < length:
            if length - at < _CENTRAL.size:
                raise DamageError("The zip file's directory is cut short.")
            fields = _CENTRAL.unpack_from(directory, at)
            name_length, extra_length, comment_length = fields[10:13]
            end = at + _CENTRAL.size + name_length + extra_length + comment_length
            if fields[0] != b"PK\x01\x02" or end > length or fields[13]:
                raise DamageError("The zip file's directory is corrupt.")
            name = directory[at + _CENTRAL.size : at + _CENTRAL.size + name_length]
            extra_at = at + _CENTRAL.size + name_length
            _check_extra(directory[extra_at : extra_at + extra_length], name)
            mode = fields[15] >> 16 or (stat.S_IFDIR if fields[15] & _DOS_DIRECTORY else 0)
            entries.append(
                _Entry(name, fields[3], fields[4], fields[7], fields[8], fields[9], offset=fields[16], mode=mode)
            )
            at = end
        if len(entries) != count:
            raise DamageError("The zip file's directory has another number of entries than its end says.")
        return entries, offset

    def _member(self, entry: _Entry) -> Member | None:
        """Check one entry; None for that of the root itself."""
        if entry.flags & _ENCRYPTED:
            raise ValueError(f"{entry.name!r} is encrypted")
        if entry.flags & ~_HARMLESS_FLAGS or entry.method not in (_STORED, _DEFLATED):
            raise ValueError(f"{entry.name!r} is compressed by a method that is not known ({entry.method})")
        if entry.method == _STORED and entry.packed != entry.size:
            raise ValueError(f"{entry.name!r} is stored, and has two sizes")
        kind = stat.S_IFMT(entry.mode)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise ValueError(f"{entry.name!r} is {'a symbolic link' if kind == stat.S_IFLNK else 'a special file'}")
        try:
            name = entry.name.decode("utf-8" if entry.flags & _UTF8 else "ascii")
            path = safe_path(name, self._limits)
        except ValueError as problem:
            why = "the name is not UTF-8" if isinstance(problem, UnicodeDecodeError) else str(problem)
            raise ValueError(f"{entry.name[:100]!r}: {why}") from problem
        is_directory = name.endswith("/")
        if is_directory != (kind == stat.S_IFDIR) and (kind or not is_directory):
            raise ValueError(f"{name!r} is both a file and a directory")
        if entry.size > self._limits.file_bytes or (is_directory and entry.size):
            raise ValueError(f"{name!r} has {entry.size:,} bytes; a file may have {self._limits.file_bytes:,}")
        if not path and not is_directory:
            raise ValueError(f"{name!r} is a file without a name")
        return Member(path, entry.size, is_directory) if path else None

    def _check_local(self, entry: _Entry) -> int:
        """Compare the header before the bytes with the directory's; where the bytes begin."""
        fields = _LOCAL.unpack(self._at(entry.offset, _LOCAL.size))
        name = self._at(entry.offset + _LOCAL.size, fields[9])
        _check_extra(self._at(entry.offset + _LOCAL.size + fields[9], fields[10]), name)
        sizes = tuple(fields[6:9])
        known = [(entry.crc, entry.packed, entry.size)] + ([(0, 0, 0)] if entry.flags & _DESCRIPTOR else [])
        same = (fields[0], fields[2], fields[3], name) == (b"PK\x03\x04", entry.flags, entry.method, entry.name)
        if not same or sizes not in known:
            raise ValueError(f"{entry.name!r}: its two headers differ")
        return int(entry.offset + _LOCAL.size + fields[9] + fields[10])

    def _descriptor_bytes(self, entry: _Entry, at: int) -> int:
        facts = struct.pack("<3L", entry.crc, entry.packed, entry.size)
        for descriptor in (b"PK\x07\x08" + facts, facts):
            if self._at(at, len(descriptor)) == descriptor:
                return len(descriptor)
        raise ValueError(f"{entry.name!r}: what follows it differs from its headers")

    def _inflated(self, entry: _Entry, at: int) -> Iterator[bytes]:
        left, count, crc = entry.packed, 0, 0
        inflate = zlib.decompressobj(-15) if entry.method == _DEFLATED else None
        data = b""
        while True:
            if not data and left:
                data = self._at(at, min(left, CHUNK_BYTES))
                at, left = at + len(data), left - len(data)
            try:
                ready = data if inflate is None else inflate.decompress(data, CHUNK_BYTES)
            except zlib.error as problem:
                raise DamageError(f"{entry.name!r} is corrupt: {problem}.") from problem
            data = b"" if inflate is None else inflate.unconsumed_tail
            count, crc = count + len(ready), zlib.crc32(ready, crc)
            if count > entry.size:
                raise DamageError(f"{entry.name!r} is longer than its headers say.")
            if ready:
                yield ready
            if (inflate is not None and inflate.eof) or (not ready and not data and not left):
                break
        is_whole = inflate is None or (inflate.eof and not inflate.unused_data)
        if not is_whole or left or count != entry.size or crc != entry.crc:
            raise DamageError(f"{entry.name!r} is corrupt or fails its checksum.")

    def _at(self, offset: int, size: int) -> bytes:
        self._file.seek(offset)
        data = self._file.read(size)
        if len(data) != size:
            raise DamageError("The zip file is cut short.")
        return data


def _check_extra(extra: bytes, name: bytes) -> None:
    at = 0
    while at < len(extra):
        if len(extra) - at < 4:
            raise DamageError(f"{name!r}: its extra field is corrupt.")
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind in _REFUSED_EXTRAS:
            raise ValueError(f"{name!r}: its extra field holds {_REFUSED_EXTRAS[kind]}")
        at += 4 + length
    if at != len(extra):
        raise DamageError(f"{name!r}: its extra field is corrupt.")
