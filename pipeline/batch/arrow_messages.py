"""What the headers in an Arrow IPC file say, read without making anything of it.

The headers are flatbuffers. pyarrow reads them too, but only together with the data and with the extension types they
name, whose code runs when they are read; a plan needs neither.

Source: the Arrow columnar format, `format/File.fbs`, `format/Message.fbs`; the flatbuffers internals page.
"""

import struct
from dataclasses import dataclass

_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3


@dataclass(frozen=True)
class Block:
    """Where one message of a file is.

    Args:
        offset: Its first byte in the file.
        header_bytes: Bytes of its header, with the length before it and the padding behind it.
        body_bytes: Bytes of its data, which follow the header.
    """

    offset: int
    header_bytes: int
    body_bytes: int

    @property
    def end(self) -> int:
        """One past its last byte."""
        return self.offset + self.header_bytes + self.body_bytes


@dataclass(frozen=True)
class BatchHeader:
    """What the header of a record batch, or of the record batch in a dictionary, says.

    Args:
        num_rows: Rows in it.
        body_bytes: Bytes of its data.
        is_compressed: Whether its buffers are compressed, each by itself.
        buffers: Offset in the body and length of every buffer, in bytes.
    """

    num_rows: int
    body_bytes: int
    is_compressed: bool
    buffers: tuple[tuple[int, int], ...]


def read_blocks(footer: bytes) -> tuple[list[Block], list[Block]]:
    """The dictionaries and the record batches that a file's footer lists.

    Args:
        footer: The flatbuffer alone.

    Raises:
        ValueError: It is damaged.
    """
    table = _Table.root(footer)
    dictionaries, batches = ([Block(*block) for block in table.structs(field, "<qi4xq")] for field in (2, 3))
    return dictionaries, batches


def read_batch_header(message: bytes) -> BatchHeader:
    """The header of one record batch or dictionary.

    Args:
        message: The message, or its header alone, from the length on.

    Raises:
        ValueError: It is damaged, or the header of something else.
    """
    table = _Table.root(message[message_start(message) :])
    kind, header = table.integer(1, "<B"), table.table(2)
    if kind == _DICTIONARY_BATCH and header is not None:
        header = header.table(1)
    if header is None or kind not in (_DICTIONARY_BATCH, _RECORD_BATCH):
        raise ValueError("a message that is no record batch")
    num_rows, body_bytes = header.integer(0, "<q"), table.integer(3, "<q")
    if num_rows < 0 or body_bytes < 0:
        raise ValueError("a negative length")
    return BatchHeader(
        num_rows=num_rows,
        body_bytes=body_bytes,
        is_compressed=header.table(3) is not None,
        buffers=tuple((offset, length) for offset, length in header.structs(2, "<qq")),
    )


def message_start(message: bytes) -> int:
    """Where the flatbuffer of a message begins: behind its length, which the marker `FFFFFFFF` precedes since 2019."""
    return 8 if message[:4] == b"\xff\xff\xff\xff" else 4


class _Table:
    """A table of a flatbuffer: its fields by number. Every place that is followed is checked to lie inside.

    Raises:
        ValueError: From any method: a place does not.
    """

    def __init__(self, data: bytes, at: int) -> None:
        self._data = data
        self._at = at
        self._vtable = at - self._number("<i", at)

    @classmethod
    def root(cls, data: bytes) -> "_Table":
        return cls(data, _number(data, "<I", 0))

    def integer(self, field: int, form: str) -> int:
        """A number; 0, the default of the format, where the field is left out."""
        place = self._place(field)
        return 0 if place is None else self._number(form, place)

    def table(self, field: int) -> "_Table | None":
        place = self._place(field)
        return None if place is None else _Table(self._data, place + self._number("<I", place))

    def structs(self, field: int, form: str) -> list[tuple[int, ...]]:
        """A vector of structs."""
        place = self._place(field)
        if place is None:
            return []
        vector = place + self._number("<I", place)
        size = self._number("<I", vector) * struct.calcsize(form)
        if vector + 4 + size > len(self._data):
            raise ValueError("a list that is longer than its file")
        return list(struct.iter_unpack(form, self._data[vector + 4 : vector + 4 + size]))

    def _place(self, field: int) -> int | None:
        entry = 4 + 2 * field
        if entry + 2 > self._number("<H", self._vtable):
            return None
        offset = self._number("<H", self._vtable + entry)
        return self._at + offset if offset else None

    def _number(self, form: str, at: int) -> int:
        return _number(self._data, form, at)


def _number(data: bytes, form: str, at: int) -> int:
    if at < 0 or at + struct.calcsize(form) > len(data):
        raise ValueError("a place outside its file")
    number: int = struct.unpack_from(form, data, at)[0]
    return number
