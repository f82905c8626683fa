"""CSV (RFC 4180 with a header line): every value is text, an empty one is null."""

import csv
import io
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import BinaryIO, cast

import pyarrow as pa
import pyarrow.csv as pa_csv

from pipeline.batch.column_types import check_columns
from pipeline.errors import DatasetError

BLOCK_BYTES = 16 * 1024 * 1024
_HINT = "Mend the file: RFC 4180, UTF-8, one header line, as many values in every record, records below 16 MiB."


def survey(file: BinaryIO, name: str) -> tuple[pa.Schema, int]:
    """The columns of a CSV file and its number of records, by reading it once.

    Args:
        file: Open for reading.
        name: The file, for messages.

    Raises:
        DatasetError: A record has more or fewer values than the header, a quote is never closed, a text is not UTF-8,
            or a name occurs twice.
    """
    schema = _header(file, name)
    counted = _QuoteCounter(file)
    num_records = sum(batch.num_rows for batch in _batches(cast(BinaryIO, counted), name, schema, None))
    if counted.num_quotes % 2:  # pyarrow would take the rest of the file as one value
        raise DatasetError(
            f'{name} has an odd number of quotes ("): one is never closed, or stands in a value without quotes',
            hint='Write a value that holds a quote in quotes, and the quote twice: "5"" pipe".',
        )
    return schema, num_records


class _QuoteCounter:
    """A file that counts the quotes that are read from it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.num_quotes = 0

    closed = False

    def seek(self, position: int) -> int:
        self.num_quotes = 0
        return self._file.seek(position)

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.num_quotes += data.count(b'"')
        return data

    def close(self) -> None:
        """The file belongs to the caller."""


def read_records(file: BinaryIO, name: str, start: int, stop: int, columns: Sequence[str] | None) -> pa.Table:
    """Records `start` to `stop`, counted from the header, by reading the file up to there.

    Args:
        file: Open for reading.
        name: The file, for messages.
        start: First record.
        stop: One past the last record.
        columns: Those to read, as far as the file has them; None for all.

    Raises:
        DatasetError: The file is not valid, or has fewer records than that.
    """
    schema = _header(file, name)
    wanted = schema.names if columns is None else [column for column in columns if column in schema.names]
    if not wanted:
        return pa.Table.from_struct_array(pa.array([{}] * (stop - start), pa.struct([])))
    pieces, position = [], 0
    with closing(_batches(file, name, schema, wanted)) as batches:
        for batch in batches:
            pieces.append(batch.slice(max(0, start - position), max(0, stop - max(start, position))))
            position += batch.num_rows
            if position >= stop:
                break
    table = pa.Table.from_batches(pieces, pa.schema([schema.field(column) for column in wanted]))
    if table.num_rows != stop - start:
        raise DatasetError(
            f"{name} has fewer than the {stop} records it was planned with",
            hint="Do not change input files while a job runs; start the job again in another output folder.",
        )
    return table


def _header(file: BinaryIO, name: str) -> pa.Schema:
    try:
        with _open(file, {}, None) as reader:
            names = reader.schema.names
    except pa.ArrowInvalid as error:
        if "Empty CSV" not in str(error):
            raise DatasetError(f"{name} is not valid CSV: {error}", hint=_HINT) from error
        names = _lone_header(file, name)
    except (UnicodeDecodeError, pa.ArrowException) as error:
        raise DatasetError(f"{name} is not valid CSV: {error}", hint=_HINT) from error
    schema = pa.schema([(column, pa.string()) for column in names])
    check_columns(schema, name)
    return schema


def _lone_header(file: BinaryIO, name: str) -> list[str]:
    """The names in a file of one line, which pyarrow takes for an empty one."""
    file.seek(0)
    try:
        text = file.read(BLOCK_BYTES).decode("utf-8-sig")
        return next((record for record in csv.reader(io.StringIO(text, newline=""), strict=True) if record), [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{name} is not valid CSV: {error}", hint=_HINT) from error


def _batches(
    file: BinaryIO, name: str, schema: pa.Schema, columns: Sequence[str] | None
) -> Generator[pa.RecordBatch, None, None]:
    types = {field.name: field.type for field in schema}
    try:
        with _open(file, types, columns) as reader:
            yield from reader
    except pa.ArrowException as error:
        if "Empty CSV" not in str(error):
            raise DatasetError(f"{name} is not valid CSV: {error}", hint=_HINT) from error


def _open(file: BinaryIO, types: dict[str, pa.DataType], columns: Sequence[str] | None) -> pa_csv.CSVStreamingReader:
    file.seek(0)
    return pa_csv.open_csv(
        pa.PythonFile(file, mode="r"),
        read_options=pa_csv.ReadOptions(block_size=BLOCK_BYTES, use_threads=False),
        parse_options=pa_csv.ParseOptions(newlines_in_values=True),
        convert_options=pa_csv.ConvertOptions(
            column_types=types,
            strings_can_be_null=True,
            null_values=[""],
            include_columns=list(columns) if columns is not None else None,
        ),
    )
