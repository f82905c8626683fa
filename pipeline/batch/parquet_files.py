"""Parquet: footers for planning, and the row groups that overlap a shard."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.batch.column_types import check_columns
from pipeline.batch.compression import BOMB_BYTES, is_bomb
from pipeline.batch.extension_types import defused, refuse_extensions
from pipeline.errors import DatasetError
from pipeline.storage.filesystems import first_line

_MAGIC = b"PAR1"
_MAX_FOOTER_BYTES = 1 << 30
_BUFFER_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class Footer:
    """A checked footer, and the schema it tells, extension types taken out."""

    metadata: pq.FileMetaData
    schema: pa.Schema


def read_footer(file: BinaryIO, name: str, *, bomb_bytes: int = BOMB_BYTES) -> Footer:
    """The footer of a Parquet file, checked; no data is decoded and no extension type is made.

    Args:
        file: Open for reading.
        name: The file, for messages.
        bomb_bytes: A column of a row group that unpacks to more than that, and to more than a thousand times its
            packed size, is refused.

    Raises:
        DatasetError: The footer is damaged, a column has a type that is not supported, or a column claims to unpack
            to an absurd size.
    """
    footer = defused(_footer_bytes(file, name))
    # the footer alone, dressed as a file: its data pages are never looked at
    lone = b"".join((_MAGIC, footer, len(footer).to_bytes(4, "little"), _MAGIC))
    try:
        parquet = pq.ParquetFile(io.BytesIO(lone), arrow_extensions_enabled=False)
        metadata, schema = parquet.metadata, parquet.schema_arrow
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DatasetError(
            f"the footer of {name} is damaged: {first_line(error)}", hint="Write or copy the file again."
        ) from error
    refuse_extensions(schema, name)
    check_columns(schema, name)
    _check_sizes(metadata, name, bomb_bytes)
    return Footer(metadata, schema)


def read_rows(
    file: BinaryIO, name: str, start: int, stop: int, columns: Sequence[str] | None, *, batch_rows: int = 1024
) -> pa.Table:
    """Rows `start` to `stop` of a Parquet file, from the row groups that hold them.

    Args:
        file: Open for reading.
        name: The file, for messages.
        start: First row, counted in the file.
        stop: One past the last row.
        columns: Those to read, as far as the file has them; None for all.
        batch_rows: Rows decoded at a time.

    Raises:
        DatasetError: The file is damaged, or has fewer rows than that.
    """
    footer = read_footer(file, name)
    metadata, names = footer.metadata, footer.schema.names
    if not 0 <= start <= stop <= metadata.num_rows:
        raise DatasetError(
            f"{name} has {metadata.num_rows} rows, not the {stop} it was planned with",
            hint="Do not change input files while a job runs; start the job again in another output folder.",
        )
    wanted = names if columns is None else [column for column in columns if column in names]
    if not wanted:
        return pa.Table.from_struct_array(pa.array([{}] * (stop - start), pa.struct([])))
    groups, first = _overlapping(metadata, start, stop)
    parquet = pq.ParquetFile(
        file,
        metadata=metadata,
        pre_buffer=False,
        buffer_size=_BUFFER_BYTES,
        page_checksum_verification=True,
        arrow_extensions_enabled=False,
    )
    batches = parquet.iter_batches(
        batch_rows, row_groups=groups, columns=None if columns is None else wanted, use_threads=False
    )
    pieces = list(_slices(batches, start - first, stop - start))
    table = pa.Table.from_batches(pieces) if pieces else footer.schema.empty_table()
    if table.num_rows != stop - start:
        raise DatasetError(
            f"{name} holds fewer rows than its footer says", hint="Write or copy the file again; it is damaged."
        )
    # a name in `columns` also brings columns whose names begin with it and a dot
    return table.select(wanted).replace_schema_metadata(None)


def _footer_bytes(file: BinaryIO, name: str) -> bytes:
    size = file.seek(0, io.SEEK_END)
    hint = "Write or copy the file again, or leave it out."
    if size < 12:
        raise DatasetError(f"{name} is not a Parquet file: it has {size} bytes", hint=hint)
    file.seek(size - 8)
    tail = file.read(8)
    if tail[4:] != _MAGIC:
        raise DatasetError(f"{name} is not a Parquet file, or is cut off: it does not end with PAR1", hint=hint)
    length = int.from_bytes(tail[:4], "little")
    if length > min(size - 12, _MAX_FOOTER_BYTES):
        raise DatasetError(f"the footer of {name} is damaged: it claims {length} of {size} bytes", hint=hint)
    file.seek(size - 8 - length)
    return file.read(length)


def _check_sizes(metadata: pq.FileMetaData, name: str, bomb_bytes: int) -> None:
    columns = range(metadata.num_columns)
    repeated = [index for index in columns if metadata.schema.column(index).max_repetition_level]
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for index in columns if row_group.total_byte_size >= bomb_bytes else repeated:
            chunk = row_group.column(index)
            packed, unpacked = chunk.total_compressed_size, chunk.total_uncompressed_size
            if index in repeated:  # a list of a billion nulls takes a few bytes even before it is compressed
                unpacked = max(unpacked, chunk.num_values)
            if is_bomb(packed, unpacked, bomb_bytes):
                raise DatasetError(
                    f"{name} would unpack {packed} bytes to {unpacked} bytes or values",
                    details=[f"row group {group}, column {chunk.path_in_schema!r}"],
                    hint="The file looks like a decompression bomb. Write it again with smaller row groups.",
                )


def _overlapping(metadata: pq.FileMetaData, start: int, stop: int) -> tuple[list[int], int]:
    """The row groups that hold rows of [start, stop), and the row with which the first of them begins."""
    groups: list[int] = []
    first = position = 0
    for group in range(metadata.num_row_groups):
        end = position + metadata.row_group(group).num_rows
        if position < stop and end > start:
            first = first if groups else position
            groups.append(group)
        position = end
    return groups, first


def _slices(batches: Iterator[Any], skip: int, take: int) -> Iterator[pa.RecordBatch]:
    """`take` rows after the first `skip` of a stream of batches; the rest is not decoded."""
    for batch in batches:
        if skip >= batch.num_rows:
            skip -= batch.num_rows
            continue
        piece = batch.slice(skip, take)
        skip, take = 0, take - piece.num_rows
        yield piece
        if take == 0:
            return
