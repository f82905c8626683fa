"""Parquet: footers for planning, and the row groups that overlap a shard."""

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.batch.column_types import check_columns
from pipeline.errors import DatasetError

_MAGIC = b"PAR1"
_MAX_FOOTER_BYTES = 1 << 30
BOMB_BYTES = 1 << 30
_BOMB_RATIO = 1000
_BUFFER_BYTES = 4 * 1024 * 1024

# Arrow keeps its own schema in the footer, base64-encoded, and runs the code registered for an extension type as soon
# as that schema is read, which opening the file does. Writing another key over the marker turns extension types into
# their storage types, with a field metadata that tells them.
_MARKER = b"ARROW:extension:name"
_DEFUSED = b"ARROW:extensi_n:name"


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
    footer = _defused(_footer_bytes(file, name))
    # the footer alone, dressed as a file: its data pages are never looked at
    lone = b"".join((_MAGIC, footer, len(footer).to_bytes(4, "little"), _MAGIC))
    try:
        parquet = pq.ParquetFile(io.BytesIO(lone), arrow_extensions_enabled=False)
        metadata, schema = parquet.metadata, parquet.schema_arrow
        extension = next((path for field in schema for path in _extensions(field)), None)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DatasetError(
            f"the footer of {name} is damaged: {str(error).splitlines()[0]}", hint="Write or copy the file again."
        ) from error
    if extension:
        raise DatasetError(
            f"{name} has a column of an extension type",
            details=[f"column {extension}"],
            hint="Extension types are not read, for they can run code. Write the column as its plain type.",
        )
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


def _defused(footer: bytes) -> bytes:
    for shift in range(3):
        footer = footer.replace(_base64_core(_MARKER, shift), _base64_core(_DEFUSED, shift))
    return footer.replace(_MARKER, _DEFUSED)


def _base64_core(text: bytes, shift: int) -> bytes:
    """The characters that tell `text` in base64, whatever stands around it, when it begins at byte `shift` of three."""
    encoded = base64.b64encode(b"\0" * shift + text).rstrip(b"=")
    return encoded[(0, 2, 3)[shift] : len(encoded) - ((shift + len(text)) % 3 > 0)]


def _extensions(field: pa.Field, path: str = "") -> Iterator[str]:
    here = f"{path}.{field.name}" if path else repr(field.name)
    marker = (field.metadata or {}).get(_DEFUSED)
    if marker is not None:
        yield f"{here}  {marker.decode(errors='replace')}"
    kind = field.type
    for index in range(kind.num_fields):
        yield from _extensions(kind.field(index), here)


def _check_sizes(metadata: pq.FileMetaData, name: str, bomb_bytes: int) -> None:
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        if row_group.total_byte_size < bomb_bytes:
            continue
        for index in range(row_group.num_columns):
            chunk = row_group.column(index)
            packed, unpacked = max(1, chunk.total_compressed_size), chunk.total_uncompressed_size
            if unpacked > bomb_bytes and unpacked > _BOMB_RATIO * packed:
                raise DatasetError(
                    f"{name} would unpack {packed} bytes to {unpacked}",
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
