"""JSON lines: byte ranges that hold the lines which begin in them, and a look at a file's first lines."""

import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import pyarrow as pa

from pipeline.batch.compression import split_codec
from pipeline.batch.json_rows import InvalidRowError, parse_object
from pipeline.batch.shards import JSON_TEXT
from pipeline.errors import DatasetError

HEAD_BYTES = 256 * 1024  # of a file are looked at, and fewer where there are so many files
_MIN_HEAD_BYTES = 16 * 1024
_ALL_HEADS_BYTES = 64 * 1024 * 1024
MAX_LINE_BYTES = 64 * 1024 * 1024
LINE_SCHEMA = pa.schema([pa.field("line", pa.large_binary()), pa.field("offset", pa.int64())])

_BLANK = b" \t\r\n"
_BOM = b"\xef\xbb\xbf"
_CHUNK_BYTES = 64 * 1024


def read_lines(file: BinaryIO, start: int, stop: int, *, max_line_bytes: int = MAX_LINE_BYTES) -> pa.Table:
    """The lines that begin at a byte in [start, stop), blank ones left out.

    A line ends with a line feed or with the file. Whatever the bounds, neighbouring ranges give each line once.

    Args:
        file: Open for reading.
        start: First byte at which a line may begin.
        stop: Byte at which no line may begin.
        max_line_bytes: A longer line is null in the table.

    Returns:
        A table of `line` (large_binary, without the line feed) and `offset` (int64, the byte at which the line begins).
    """
    lines: list[bytes | None] = []
    offsets: list[int] = []
    for offset, line in _lines(file, start, stop, max_line_bytes):
        if line is None or _content(line, offset):
            lines.append(line)
            offsets.append(offset)
    return pa.table([pa.array(lines, pa.large_binary()), pa.array(offsets, pa.int64())], schema=LINE_SCHEMA)


def _lines(file: BinaryIO, start: int, stop: int, max_line_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    begin = max(0, start - 1)  # one byte early: a line feed just before the range begins a line in it
    file.seek(begin)
    data = file.read(stop - begin)
    position = 0
    if start > 0:
        position = data.find(b"\n") + 1
        if position == 0:
            return
    while position < len(data):
        end = data.find(b"\n", position)
        line: bytes | None
        if end < 0:
            line = _tail(file, data[position:], max_line_bytes)
            end = len(data)
        else:
            line = data[position:end] if end - position <= max_line_bytes else None
        yield begin + position, line
        position = end + 1


def _tail(file: BinaryIO, line: bytes, max_line_bytes: int) -> bytes | None:
    """The whole of a line whose beginning was read, or None when it is too long."""
    pieces, length = [line], len(line)
    while length <= max_line_bytes:
        piece = file.read(_CHUNK_BYTES)
        end = piece.find(b"\n")
        pieces.append(piece if end < 0 else piece[:end])
        length += len(pieces[-1])
        if end >= 0 or not piece:
            break
    return b"".join(pieces) if length <= max_line_bytes else None


def _content(line: bytes, offset: int) -> bytes:
    """The line without white space around it and, at the beginning of a file, without a byte order mark."""
    return (line.removeprefix(_BOM) if offset == 0 else line).strip(_BLANK)


def parse_line(line: bytes | None, offset: int) -> dict[str, Any]:
    """The object in a line of `read_lines`.

    Raises:
        InvalidRowError: The line is not one JSON object, or is too long.
    """
    if line is None:
        raise InvalidRowError(f"the line is longer than {MAX_LINE_BYTES} bytes")
    return parse_object(_content(line, offset))


def head_bytes(num_files: int) -> int:
    """How much of each file is looked at for a plan: less of each when there are many."""
    return max(_MIN_HEAD_BYTES, min(HEAD_BYTES, _ALL_HEADS_BYTES // max(1, num_files)))


def read_head(file: BinaryIO, name: str, num_bytes: int = HEAD_BYTES) -> bytes:
    """The first bytes of a file.

    Args:
        file: Open for reading.
        name: The file, for messages.
        num_bytes: How many.

    Raises:
        DatasetError: It is one JSON array, not lines.
    """
    file.seek(0)
    head = file.read(num_bytes)
    if split_codec(name)[0].lower().endswith(".json") and _content(head, 0).startswith(b"["):
        raise DatasetError(
            f"{name} is one JSON array, not JSON lines", hint="Write one object a line, and name the file *.jsonl."
        )
    return head


def shard_bytes(head: bytes, shard_rows: int) -> int:
    """The size of a shard in bytes: `shard_rows` lines of the mean length in a file's head."""
    num_lines = sum(1 for line in head.split(b"\n") if line.strip(_BLANK))
    return max(1, math.ceil(shard_rows * len(head) / max(1, num_lines)))


def head_kinds(head: bytes, *, is_whole: bool) -> dict[str, frozenset[str]]:
    """Which kinds of values the first lines of a file hold, by key, in the order the keys are met.

    Args:
        head: From `read_head`.
        is_whole: Whether it is the whole file.
    """
    kinds: dict[str, set[str]] = {}
    for values in _objects(head, is_whole=is_whole):
        for key, value in values.items():
            kinds.setdefault(key, set()).add(_kind(value))
    return {key: frozenset(found) for key, found in kinds.items()}


def sampled_schema(files: Iterable[Mapping[str, frozenset[str]]]) -> pa.Schema:
    """What the first lines of all files suggest as columns, in the order they are met.

    All strings (or nulls) give string, whole numbers int64, numbers float64, truth values bool. Anything else, and
    any mixture, gives a string column of JSON texts (`JSON_TEXT`).

    Args:
        files: What `head_kinds` found in each.
    """
    kinds: dict[str, set[str]] = {}
    for file in files:
        for key, found in file.items():
            kinds.setdefault(key, set()).update(found)
    return pa.schema([_field(key, found - {"null"}) for key, found in kinds.items()])


def _objects(head: bytes, *, is_whole: bool) -> Iterator[dict[str, Any]]:
    whole = head if is_whole else head[: head.rfind(b"\n") + 1]
    for offset, line in _lines(io.BytesIO(whole), 0, len(whole), HEAD_BYTES):
        if line is None or not _content(line, offset):
            continue
        try:
            yield parse_line(line, offset)
        except InvalidRowError:  # reported for the row itself when it is read
            continue


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int64" if -(1 << 63) <= value < 1 << 63 else "json"
    return {float: "float64", str: "string"}.get(type(value), "json")


def _field(name: str, kinds: set[str]) -> pa.Field:
    if kinds <= {"string"}:
        return pa.field(name, pa.string())
    if kinds <= {"int64", "float64"}:
        return pa.field(name, pa.float64() if "float64" in kinds else pa.int64())
    if kinds == {"bool"}:
        return pa.field(name, pa.bool_())
    return pa.field(name, pa.string(), metadata=JSON_TEXT)


def json_text(value: Any) -> str:
    """A value as compact JSON text."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
