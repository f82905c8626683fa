"""Arrow IPC files (`.arrow`, Feather V2): footers and headers for planning, and the batches that overlap a shard."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import pyarrow as pa
import pyarrow.types as types

from pipeline.batch.arrow_messages import BatchHeader, Block, message_start, read_batch_header, read_blocks
from pipeline.batch.column_types import check_columns
from pipeline.batch.compression import BOMB_BYTES, is_bomb
from pipeline.batch.extension_types import defused, refuse_extensions
from pipeline.errors import DatasetError
from pipeline.storage.filesystems import first_line

_MAGIC = b"ARROW1"
_SCHEMA_AT = 8  # behind the magic and its padding
_MAX_HEADER_BYTES = 1 << 28
_MAX_NULLS = 1 << 24
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_HINT = "Write or copy the file again, or leave it out."


@dataclass(frozen=True)
class Footer:
    """A checked footer.

    Args:
        schema: The columns, extension types taken out.
        schema_message: The message it was read from.
        dictionaries: Where the values of dictionary columns are.
        batches: Where the record batches are, in order.
    """

    schema: pa.Schema
    schema_message: bytes
    dictionaries: tuple[Block, ...]
    batches: tuple[Block, ...]


def survey(file: BinaryIO, name: str) -> tuple[pa.Schema, int]:
    """The columns of an Arrow file and its number of rows, from its footer and the headers of its batches.

    Args:
        file: Open for reading.
        name: The file, for messages.

    Raises:
        DatasetError: The file is damaged or another kind of file, or a column has a type that is not supported.
    """
    footer = read_footer(file, name)
    return footer.schema, sum(_header(file, name, block).num_rows for block in footer.batches)


def read_footer(file: BinaryIO, name: str) -> Footer:
    """The schema and the footer of an Arrow file, checked; no data is decoded and no extension type is made.

    Args:
        file: Open for reading.
        name: The file, for messages.

    Raises:
        DatasetError: See `survey`.
    """
    size = file.seek(0, io.SEEK_END)
    _check_magic(file, name, size)
    file.seek(size - len(_MAGIC) - 4)
    length = int.from_bytes(file.read(4), "little")
    end = size - len(_MAGIC) - 4 - length
    if end < _SCHEMA_AT or length > _MAX_HEADER_BYTES:
        raise _damaged(name, f"its footer claims {length} of {size} bytes")
    file.seek(end)
    footer = file.read(length)
    try:
        dictionaries, batches = read_blocks(footer)
        message = _schema_message(file, end)
    except ValueError as error:
        raise _damaged(name, str(error)) from error
    try:
        schema = pa.ipc.read_schema(pa.py_buffer(message))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _damaged(name, first_line(error)) from error
    refuse_extensions(schema, name)
    check_columns(schema, name)
    for block in (*dictionaries, *batches):
        if block.offset < _SCHEMA_AT or block.header_bytes < 8 or block.body_bytes < 0 or block.end > end:
            raise _damaged(name, "its footer names a place outside the file")
    return Footer(schema, message, tuple(dictionaries), tuple(batches))


def read_rows(
    file: BinaryIO,
    name: str,
    start: int,
    stop: int,
    columns: Sequence[str] | None,
    *,
    bomb_bytes: int = BOMB_BYTES,
) -> pa.Table:
    """Rows `start` to `stop` of an Arrow file, from the record batches that hold them.

    Args:
        file: Open for reading.
        name: The file, for messages.
        start: First row, counted in the file.
        stop: One past the last row.
        columns: Those to read, as far as the file has them; None for all.
        bomb_bytes: A batch that unpacks to more than that, and to more than a thousand times its packed size, is
            refused.

    Raises:
        DatasetError: The file is damaged, has fewer rows than that, or holds a decompression bomb.
    """
    footer = read_footer(file, name)
    wanted = footer.schema.names if columns is None else [column for column in columns if column in footer.schema.names]
    blocks, skip = _overlapping(file, name, footer.batches, start, stop)
    messages = [_message(file, name, block, bomb_bytes) for block in (*footer.dictionaries, *blocks)]
    stream = b"".join((footer.schema_message, *messages, _END_OF_STREAM))
    try:
        with pa.ipc.open_stream(pa.py_buffer(stream), options=pa.ipc.IpcReadOptions(use_threads=False)) as reader:
            batches = [_sound(batch) for batch in reader]
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _damaged(name, first_line(error)) from error
    table = pa.Table.from_batches(batches, footer.schema).slice(skip, stop - start)
    if table.num_rows != stop - start:
        raise _damaged(name, "its batches hold fewer rows than their headers say")
    if not wanted:
        return pa.Table.from_struct_array(pa.array([{}] * (stop - start), pa.struct([])))
    return table.select(wanted).replace_schema_metadata(None)


def _check_magic(file: BinaryIO, name: str, size: int) -> None:
    file.seek(0)
    head = file.read(len(_MAGIC))
    file.seek(max(0, size - len(_MAGIC)))
    if head == _MAGIC and size >= 2 * _SCHEMA_AT + 4 and file.read() == _MAGIC:
        return
    if head[:4] == b"FEA1":
        raise DatasetError(f"{name} is Feather version 1", hint="Write it again with pyarrow.feather: version 2.")
    if head[:4] == b"\xff\xff\xff\xff":
        raise DatasetError(
            f"{name} is an Arrow stream, not an Arrow file",
            hint="Write it with pyarrow.ipc.new_file, or as Parquet; a datasets.Dataset can be passed to run_batch.",
        )
    raise DatasetError(f"{name} is not an Arrow file, or is cut off: it does not begin and end with ARROW1", hint=_HINT)


def _schema_message(file: BinaryIO, end: int) -> bytes:
    """The message with the schema, extension types taken out; it is the first of the file."""
    file.seek(_SCHEMA_AT)
    head = file.read(8)
    start = message_start(head)
    length = int.from_bytes(head[start - 4 : start], "little", signed=True)
    if not 0 < length <= min(end - _SCHEMA_AT - start, _MAX_HEADER_BYTES):
        raise ValueError(f"its schema claims {length} bytes")
    file.seek(_SCHEMA_AT)
    return defused(file.read(start + length))


def _header(file: BinaryIO, name: str, block: Block) -> BatchHeader:
    file.seek(block.offset)
    return _checked_header(file.read(block.header_bytes), name, block)


def _checked_header(message: bytes, name: str, block: Block) -> BatchHeader:
    try:
        header = read_batch_header(message[: block.header_bytes])
    except ValueError as error:
        raise _damaged(name, f"the batch at byte {block.offset} has {error}") from error
    if header.body_bytes != block.body_bytes:
        raise _damaged(name, f"the batch at byte {block.offset} has another size than the footer says")
    return header


def _overlapping(file: BinaryIO, name: str, blocks: Sequence[Block], start: int, stop: int) -> tuple[list[Block], int]:
    """The batches that hold rows of [start, stop), and how many rows of the first of them come before."""
    found: list[Block] = []
    skip = position = 0
    for block in blocks:
        end = position + _header(file, name, block).num_rows
        if position < stop and end > start:
            skip = skip if found else start - position
            found.append(block)
        position = end
        if position >= stop:
            return found, skip
    if position < stop:
        raise DatasetError(
            f"{name} has {position} rows, not the {stop} it was planned with",
            hint="Do not change input files while a job runs; start the job again in another output folder.",
        )
    return found, skip


def _message(file: BinaryIO, name: str, block: Block, bomb_bytes: int) -> bytes:
    """A whole message, after a look at what its buffers would unpack to."""
    file.seek(block.offset)
    message = file.read(block.end - block.offset)
    header = _checked_header(message, name, block)
    if header.is_compressed:
        try:
            unpacked = sum(_unpacked_sizes(message[block.header_bytes :], header))
        except ValueError as error:
            raise _damaged(name, f"the batch at byte {block.offset} has {error}") from error
        if is_bomb(block.body_bytes, unpacked, bomb_bytes):
            raise DatasetError(
                f"{name} would unpack {block.body_bytes} bytes to {unpacked}",
                details=[f"batch at byte {block.offset}"],
                hint="The file looks like a decompression bomb. Write it again with smaller batches.",
            )
    return message


def _unpacked_sizes(body: bytes, header: BatchHeader) -> Iterator[int]:
    """The size that each compressed buffer claims in its first eight bytes; -1 there is a buffer as it is."""
    for offset, length in header.buffers:
        if length == 0:
            continue
        if offset < 0 or length < 8 or offset + length > len(body):
            raise ValueError("a buffer outside it")
        claimed = int.from_bytes(body[offset : offset + 8], "little", signed=True)
        if claimed < -1:
            raise ValueError("a buffer of negative size")
        yield length if claimed == -1 else claimed


def _sound(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch, once it is known that nothing in it points outside it: pyarrow believes what a file says.

    Texts are only looked at as bytes; one that is not UTF-8 is its row's failure, later.
    """
    for column in batch.columns:
        kind = column.type
        plain = pa.binary() if types.is_string(kind) else pa.large_binary() if types.is_large_string(kind) else None
        (column if plain is None else column.view(plain)).validate(full=True)
        if any(types.is_null(inner.type) and len(inner) > _MAX_NULLS for inner in _inner(column)):
            raise ValueError(f"lists of more than {_MAX_NULLS} nulls, which take no bytes here and many in memory")
    return batch


def _inner(column: pa.Array) -> Iterator[pa.Array]:
    """The arrays within an array, at any depth."""
    kind = column.type
    arrays: list[pa.Array] = []
    if types.is_map(kind):
        arrays = [column.keys, column.items]
    elif types.is_struct(kind):
        arrays = [column.field(index) for index in range(kind.num_fields)]
    elif types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        arrays = [column.values]
    for array in arrays:
        yield array
        yield from _inner(array)


def _damaged(name: str, reason: str) -> DatasetError:
    return DatasetError(f"{name} is damaged: {reason}", hint=_HINT)
