"""Compressed text files, told by their names; and the bounds on what anything compressed may unpack to."""

from typing import BinaryIO, Literal

import pyarrow as pa

from pipeline.errors import DatasetError

Codec = Literal["gzip", "zstd"]
CODECS: dict[str, Codec] = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
MAX_DECOMPRESSED_BYTES = 256 * 1024 * 1024
BOMB_BYTES = 1 << 30
_BOMB_RATIO = 1000
_CHUNK_BYTES = 1024 * 1024


def split_codec(name: str) -> tuple[str, Codec | None]:
    """A file name without the extension of its compression, and that compression: `a.csv.gz` is `a.csv` by gzip."""
    extension = next((extension for extension in CODECS if name.lower().endswith(extension)), None)
    return (name, None) if extension is None else (name[: -len(extension)], CODECS[extension])


def is_bomb(packed: int, unpacked: int, bomb_bytes: int = BOMB_BYTES) -> bool:
    """Whether data is absurdly compressed: it unpacks to more than `bomb_bytes`, and to a thousand times its size."""
    return unpacked > bomb_bytes and unpacked > _BOMB_RATIO * max(1, packed)


class DecompressedFile:
    """The bytes that a compressed file stands for: to be read forwards, or again from the beginning.

    Several gzip members or zstd frames, one after the other, are one text.

    Args:
        file: Open for reading; it stays the caller's.
        name: The file, for messages.
        codec: How it is compressed.
        max_bytes: At most so many bytes are given.

    Raises:
        DatasetError: From `read`: there are more bytes than that.
    """

    closed = False

    def __init__(self, file: BinaryIO, name: str, codec: Codec, max_bytes: int) -> None:
        self._file = file
        self._name = name
        self._codec = codec
        self._max_bytes = max_bytes
        self.seek(0)

    def seek(self, position: int) -> int:
        """Begin again; `position` can only be 0."""
        if position != 0:
            raise ValueError(f"a compressed file cannot be read from byte {position}")
        self._file.seek(0)
        self._position = 0
        self._stream = pa.CompressedInputStream(pa.PythonFile(_Borrowed(self._file), mode="r"), self._codec)
        return 0

    def read(self, size: int = -1) -> bytes:
        """The next `size` bytes, fewer at the end; all that are left if negative."""
        if size < 0:
            return b"".join(iter(lambda: self.read(_CHUNK_BYTES), b""))
        room = self._max_bytes - self._position + 1  # one more than allowed tells that there are more
        data: bytes = self._stream.read(min(size, room))
        self._position += len(data)
        if self._position > self._max_bytes:
            raise DatasetError(
                f"{self._name} unpacks to more than {self._max_bytes} bytes",
                hint="Raise max_decompressed_bytes if the file can be trusted, or split it: a compressed file of JSON "
                "lines is one shard, and is held in memory as a whole.",
            )
        return data

    def close(self) -> None:
        """The file belongs to the caller."""


class _Borrowed:
    """A file that is not closed when what reads it goes away."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size)

    def close(self) -> None:
        """The file belongs to the caller."""
