"""A shard's table -> rows with an identity, each readable or with the reason why not."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.batch.json_rows import InvalidRowError
from pipeline.batch.jsonl_files import parse_line
from pipeline.batch.shards import Shard
from pipeline.engine.types import Failure

INVALID_ROW = "invalid_row"


@dataclass(frozen=True)
class Row:
    """One row of the dataset.

    Args:
        identity: `name#row` (Parquet, CSV) or `name@byte` (JSONL) in the file; it does not depend on the sharding.
        values: Column to value; empty when the row cannot be read.
        failure: Why the row cannot be read, with the code `invalid_row`; None when it can.
    """

    identity: str
    values: dict[str, Any]
    failure: Failure | None


def iter_rows(shard: Shard, table: pa.Table) -> Iterator[Row]:
    """The rows of a shard, in order.

    Parquet values become Python values; one that Python cannot hold (such as a date after year 9999) becomes its
    text.

    Args:
        shard: The shard.
        table: Its whole table, from `source.read_shard`.
    """
    return _line_rows(shard, table) if shard.format == "jsonl" else _column_rows(shard, table)


def _line_rows(shard: Shard, table: pa.Table) -> Iterator[Row]:
    for line, offset in zip(table["line"].to_pylist(), table["offset"].to_pylist(), strict=True):
        identity = f"{shard.name}@{offset}"
        try:
            yield Row(identity, parse_line(line, offset), None)
        except InvalidRowError as error:
            yield Row(identity, {}, Failure(INVALID_ROW, f"line at byte {offset} of {shard.name}: {error}"))


def _column_rows(shard: Shard, table: pa.Table) -> Iterator[Row]:
    unreadable: dict[int, str] = {}
    columns = [
        _values(column, name, unreadable) for name, column in zip(table.column_names, table.columns, strict=True)
    ]
    for index in range(table.num_rows):
        number = shard.start + index
        identity = f"{shard.name}#{number}"
        if index in unreadable:
            message = f"row {number} of {shard.name}: {unreadable[index]}"
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
