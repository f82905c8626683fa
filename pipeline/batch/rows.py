"""A shard's table -> rows with an identity, each readable or with the reason why not."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.batch.json_rows import InvalidRowError
from pipeline.batch.jsonl_files import parse_line
from pipeline.batch.shards import FileSlice, Shard
from pipeline.engine.types import Failure

INVALID_ROW = "invalid_row"


@dataclass(frozen=True)
class Row:
    """One row of the dataset.

    Args:
        identity: `name#row` (Parquet, Arrow, CSV) or `name@byte` (JSONL; of the text, when it is compressed) in the
            file; it does not depend on the sharding.
        values: Column to value; empty when the row cannot be read.
        failure: Why the row cannot be read, with the code `invalid_row`; None when it can.
    """

    identity: str
    values: dict[str, Any]
    failure: Failure | None


def iter_rows(shard: Shard, table: pa.Table, columns: Collection[str] | None = None) -> Iterator[Row]:
    """The rows of a shard, in order.

    Values of columns become Python values; one that Python cannot hold (such as a date after year 9999) becomes its
    text. A line that has a column of its directories itself cannot be read: which is meant, nobody knows.

    Args:
        shard: The shard.
        table: Its whole table, from `source.read_shard`.
        columns: Of lines of JSON, those that are wanted; None for all. Tables have the columns that were read.
    """
    return _line_rows(shard, table, columns) if shard.format == "jsonl" else _column_rows(shard, table)


def _line_rows(shard: Shard, table: pa.Table, columns: Collection[str] | None) -> Iterator[Row]:
    places = zip(table["slice"].to_pylist(), table["offset"].to_pylist(), strict=True)
    for line, (number, offset) in zip(table["line"].to_pylist(), places, strict=True):
        file = shard.slices[number]
        identity = f"{file.name}@{offset}"
        try:
            values = _line_values(file, line, offset)
            wanted = values if columns is None else {name: values[name] for name in values if name in columns}
            yield Row(identity, wanted, None)
        except InvalidRowError as error:
            yield Row(identity, {}, Failure(INVALID_ROW, f"line at byte {offset} of {file.name}: {error}"))


def _line_values(file: FileSlice, line: bytes | None, offset: int) -> dict[str, Any]:
    values = parse_line(line, offset)
    twice = next((name for name, _ in file.partition if name in values), None)
    if twice is not None:
        raise InvalidRowError(f"it has the column {twice!r}, which its directory has as well")
    return values | dict(file.partition)


def _column_rows(shard: Shard, table: pa.Table) -> Iterator[Row]:
    unreadable: dict[int, str] = {}
    columns = [
        _values(column, name, unreadable) for name, column in zip(table.column_names, table.columns, strict=True)
    ]
    places = ((file.name, number) for file in shard.slices for number in range(file.start, file.stop))
    for index, (file_name, number) in zip(range(table.num_rows), places, strict=True):
        identity = f"{file_name}#{number}"
        if index in unreadable:
            message = f"row {number} of {file_name}: {unreadable[index]}"
            yield Row(identity, {}, Failure(INVALID_ROW, message))
        else:
            values = {name: column[index] for name, column in zip(table.column_names, columns, strict=True)}
            yield Row(identity, values, None)


def _values(column: pa.ChunkedArray, name: str, unreadable: dict[int, str]) -> list[Any]:
    try:
        values: list[Any] = column.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException):  # one odd value; find it, and keep the others
        values = [_value(scalar, name, index, unreadable) for index, scalar in enumerate(column)]
    return values


def _value(scalar: pa.Scalar, name: str, index: int, unreadable: dict[int, str]) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        unreadable[index] = f"column {name!r} is not UTF-8"
    except (ValueError, OverflowError, pa.ArrowException):
        try:
            return scalar.cast(pa.string()).as_py()
        except (ValueError, pa.ArrowException):
            unreadable[index] = f"column {name!r} holds a value of type {scalar.type} that cannot be read"
    return None
