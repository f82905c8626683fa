"""A gzip stream that carries the checksum of its own bytes, so that not one of them can change unseen.

A compressed stream has bits that mean nothing (times, names, what fills up the last byte); a checksum of the content
does not notice them. The seal is the stream's comment, `sha256:<hex>` of everything behind the header; every gzip reads
over it.

Source: RFC 1952, gzip.
"""

import hashlib
import re
import zlib
from types import TracebackType
from typing import BinaryIO

_HEADER = b"\x1f\x8b\x08\x10\0\0\0\0\0\xff"  # deflate, a comment follows, no time, no system
_COMMENT, _NAME, _EXTRA = 0x10, 0x08, 0x04
_SEAL = re.compile(re.escape(_HEADER) + rb"sha256:([0-9a-f]{64})\0", re.DOTALL)
SEALED_HEADER_BYTES = len(_HEADER) + len("sha256:") + 64 + 1


def sealed_sha256(head: bytes) -> str | None:
    """What the rest of a sealed gzip stream must add up to; None where it is not sealed.

    Args:
        head: Its first bytes, a few hundred at least.

    Raises:
        ValueError: It looks like a seal that is broken.
    """
    match = _SEAL.match(head)
    if match is not None:
        return match[1].decode()
    flags = head[3] if head.startswith(_HEADER[:2]) and len(head) > 3 else 0
    if flags & _COMMENT or (flags & _NAME and not flags & _EXTRA and head[10:].startswith(b"sha256:")):
        raise ValueError("its gzip header holds a seal that is broken")
    return None


class SealedGzipWriter:
    """Writes a sealed gzip stream; the same content gives the same bytes.

    Args:
        file: Where to; it must be able to seek, and stays open.
        level: Of the compression, 0 to 9.
    """

    def __init__(self, file: BinaryIO, level: int) -> None:
        self._file = file
        self._start = file.tell()
        self._deflate = zlib.compressobj(level, zlib.DEFLATED, -15)
        self._hash = hashlib.sha256()
        self._crc = self._size = 0
        file.write(_HEADER + b"sha256:" + bytes(64) + b"\0")

    def write(self, data: bytes) -> int:
        """Add bytes to the content."""
        self._crc = zlib.crc32(data, self._crc)
        self._size += len(data)
        self._put(self._deflate.compress(data))
        return len(data)

    def tell(self) -> int:
        """How many bytes of content there are."""
        return self._size

    def close(self) -> None:
        """Finish the stream, and seal it."""
        self._put(self._deflate.flush())
        self._put(self._crc.to_bytes(4, "little") + (self._size & 0xFFFFFFFF).to_bytes(4, "little"))
        end = self._file.tell()
        self._file.seek(self._start + len(_HEADER) + len("sha256:"))
        self._file.write(self._hash.hexdigest().encode())
        self._file.seek(end)

    def __enter__(self) -> "SealedGzipWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()

    def _put(self, data: bytes) -> None:
        self._hash.update(data)
        self._file.write(data)
