"""Decompressed bytes of a tar archive, counted against the limits while they are read.

Sources: RFC 1952, gzip; RFC 8878, zstandard.
"""

import zlib
from collections.abc import Iterator
from typing import BinaryIO, Protocol

from pipeline.errors import MissingDependencyError
from pipeline.package.limits import ArchiveLimits

CHUNK_BYTES = 256 << 10
RATIO_FREE_BYTES = 16 << 20
ZSTD_WINDOW_BYTES = 128 << 20
_ZSTD_BLOCK_BYTES = 128 << 10


class DamageError(Exception):
    """The bytes are not what a whole archive would hold."""


class Decompressor(Protocol):
    """Turns the bytes of one compressed stream into those of the archive."""

    def chunks(self) -> Iterator[bytes]:
        """The decompressed bytes, none of them larger than a few hundred kilobytes.

        Raises:
            DamageError: The stream is damaged, cut short, or followed by something.
            ValueError: It is not safe to read.
        """
        ...


class ByteStream:
    """The decompressed bytes of exactly one stream.

    Args:
        source: Where they come from.
        size: Bytes of the compressed file.
        limits: What the stream may hold.
    """

    def __init__(self, source: Decompressor, size: int, limits: ArchiveLimits) -> None:
        self._chunks = source.chunks()
        self._ready = b""
        self._at = 0
        self._count = 0
        self._limits = limits
        self._ratio_bytes = max(RATIO_FREE_BYTES, limits.ratio * size)

    def read(self, size: int) -> bytes:
        """At most `size` bytes, at least one; none at the end of the stream."""
        while self._at == len(self._ready):
            chunk = next(self._chunks, None)
            if chunk is None:
                return b""
            self._ready, self._at = chunk, 0
            self._count += len(chunk)
            if self._count > self._limits.total_bytes:
                raise ValueError(f"it unpacks to more than {self._limits.total_bytes:,} bytes")
            if self._count > self._ratio_bytes:
                raise ValueError(f"it unpacks to more than {self._limits.ratio} times its size")
        part = self._ready if self._at == 0 and len(self._ready) <= size else self._ready[self._at : self._at + size]
        self._at += len(part)
        return part

    def exactly(self, size: int, what: str) -> bytes:
        """Exactly `size` bytes.

        Raises:
            DamageError: The stream ends before; the message says inside of what.
        """
        parts, missing = [], size
        while missing:
            chunk = self.read(missing)
            if not chunk:
                raise DamageError(f"The archive ends inside {what}.")
            parts.append(chunk)
            missing -= len(chunk)
        return b"".join(parts)

    def finish(self) -> None:
        """Read to the end; only the zeros that fill up a tar may be left.

        Raises:
            DamageError: Something else is.
        """
        while chunk := self.read(CHUNK_BYTES):
            if chunk.strip(b"\0"):
                raise DamageError("Something follows the end of the tar archive.")


class Gzip:
    """One gzip stream."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def chunks(self) -> Iterator[bytes]:
        """See `Decompressor`."""
        inflate = zlib.decompressobj(wbits=31)
        data = self._file.read(CHUNK_BYTES)
        try:
            while True:
                ready = inflate.decompress(data, CHUNK_BYTES)
                if ready:
                    yield ready
                if inflate.eof:
                    break
                data = inflate.unconsumed_tail
                if not data:
                    data = self._file.read(CHUNK_BYTES)
                    if not data and not ready:
                        raise DamageError("The gzip stream is cut short.")
        except zlib.error as problem:
            raise DamageError(f"The gzip stream is corrupt or fails its checksum: {problem}.") from problem
        if inflate.unused_data or self._file.read(1):
            raise DamageError("Something follows the end of the gzip stream.")


class Zstandard:
    """One frame of zstandard, without a dictionary; its blocks are decompressed one by one."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def chunks(self) -> Iterator[bytes]:
        """See `Decompressor`."""
        try:
            import zstandard
        except ImportError as problem:
            raise MissingDependencyError(
                "a tar.zst archive needs the package zstandard, which is not installed", hint="pip install zstandard"
            ) from problem
        inflate = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES).decompressobj()
        try:
            header, has_checksum = self._frame_header()
            inflate.decompress(header)
            is_last = False
            while not is_last:
                prefix = self._exactly(3)
                word = int.from_bytes(prefix, "little")
                is_last, kind, size = bool(word & 1), word >> 1 & 3, word >> 3
                if kind == 3 or size > _ZSTD_BLOCK_BYTES:
                    raise DamageError("The zstandard stream is corrupt.")
                data = inflate.decompress(prefix + self._exactly(1 if kind == 1 else size))
                if is_last and has_checksum:
                    data += inflate.decompress(self._exactly(4))
                if data:
                    yield data
        except zstandard.ZstdError as problem:
            raise DamageError(f"The zstandard stream is corrupt or fails its checksum: {problem}.") from problem
        if not inflate.eof or inflate.unused_data or self._file.read(1):
            raise DamageError("Something follows the end of the zstandard frame.")

    def _frame_header(self) -> tuple[bytes, bool]:
        """The header's bytes, and whether a checksum ends the frame."""
        start = self._exactly(5)
        descriptor = start[4]
        size_flag, is_single, dictionary = descriptor >> 6, bool(descriptor & 0x20), descriptor & 3
        if dictionary or descriptor & 0x08:
            raise ValueError("its zstandard frame needs a dictionary, or is of a form that is not known")
        size_bytes = (1 if is_single else 0, 2, 4, 8)[size_flag]
        return start + self._exactly(size_bytes + (0 if is_single else 1)), bool(descriptor & 0x04)

    def _exactly(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) != size:
            raise DamageError("The zstandard stream is cut short.")
        return data
