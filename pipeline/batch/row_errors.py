"""The rows of a part that have an error, and the part that comes of answering them again."""

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.batch.openai_lines import line_counts
from pipeline.batch.part_values import json_value
from pipeline.batch.parts import PartFormat, PartKind, write_parquet
from pipeline.errors import OutputError

_HINT = "Delete the part and its receipt, and run the same command again."


@dataclass(frozen=True)
class RowError:
    """A row whose answer is an error.

    Args:
        shard: The shard, and so the part, it is in.
        row: Its place in the part, from 0.
        id: What the job's id column holds, as JSON holds it, or the `custom_id` of a line; None without one.
        code: The error's code, e.g. `prompt_too_long`.
        message: What was wrong.
    """

    shard: int
    row: int
    id: Any
    code: str
    message: str

    def to_json(self) -> str:
        """The error as one line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, line: str | bytes) -> "RowError":
        """The error that `to_json` wrote.

        Raises:
            OutputError: The line is not one.
        """
        try:
            return cls(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise OutputError(f"a list of errors is damaged: {error}", hint="Delete it; it is made anew.") from error


def row_errors(data: bytes, kind: PartKind, shard: int, *, prefix: str = "", id_column: str | None) -> list[RowError]:
    """The rows of a part that have an error, in order.

    Args:
        data: The whole part.
        kind: How it is written.
        shard: The shard it answers.
        prefix: Stands before the names of our columns.
        id_column: The job's id column, if it has one.

    Raises:
        OutputError: The bytes are not a part.
    """
    try:
        if kind == "openai":
            errors, ids = _openai(data)
        else:
            errors, ids = _parquet(data, prefix, id_column) if kind == "parquet" else _jsonl(data, prefix, id_column)
        return [
            RowError(shard, row, json_value(ids[row]), error["code"], error["message"])
            for row, error in enumerate(errors)
            if error is not None
        ]
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise OutputError(f"a part is damaged: {error!r:.200}", hint=_HINT) from error


def rows_to_mend(data: bytes, form: PartFormat, shard: int) -> list[int]:
    """The places in a part of the rows that are to be answered again, in order.

    Args:
        data: The whole part.
        form: How it is written.
        shard: The shard it answers.

    Raises:
        OutputError: The bytes are not a part.
    """
    return [error.row for error in row_errors(data, form.kind, shard, prefix=form.prefix, id_column=None)]


def row_errors_bytes(errors: Sequence[RowError]) -> bytes:
    """Errors as JSON lines."""
    return "".join(error.to_json() + "\n" for error in errors).encode()


def mended_part(old: bytes, new: bytes, rows: Sequence[int], form: PartFormat) -> bytes:
    """A part in which some rows have new answers.

    Args:
        old: The part as it is.
        new: A part of those rows alone.
        rows: Their places in the old part, in the order of the new one.
        form: How both are written.

    Raises:
        OutputError: They do not go together.
    """
    try:
        if form.kind == "jsonl":
            lines, answers = old.splitlines(keepends=True), new.splitlines(keepends=True)
            _check_count(len(answers), rows)
            for row, line in zip(rows, answers, strict=True):
                lines[row] = line
            return b"".join(lines)
        before, after = (pq.read_table(io.BytesIO(data), schema=form.schema) for data in (old, new))
        _check_count(after.num_rows, rows)
        order = list(range(before.num_rows))
        for place, row in enumerate(rows):
            order[row] = before.num_rows + place
        both = pa.concat_tables([before, after])
        return write_parquet(both.take(pa.array(order, pa.int64())).combine_chunks(), form)
    except (OSError, IndexError, pa.ArrowException) as error:
        raise OutputError(f"a part is damaged: {error!r:.200}", hint=_HINT) from error


def _check_count(count: int, rows: Sequence[int]) -> None:
    if count != len(rows):
        raise OutputError(
            f"{count} rows were answered again in place of {len(rows)}", hint="Report this: it is a mistake of ours."
        )


def _parquet(data: bytes, prefix: str, id_column: str | None) -> tuple[list[Any], list[Any]]:
    file = pq.ParquetFile(io.BytesIO(data))
    has_id = id_column is not None and id_column in file.schema_arrow.names
    table = file.read(columns=[f"{prefix}error", *([id_column] if has_id else [])])
    errors = table[f"{prefix}error"].to_pylist()
    if not has_id or not any(error is not None for error in errors):
        return errors, [None] * len(errors)
    column = table[id_column]
    return errors, [_plain(column[row]) if error is not None else None for row, error in enumerate(errors)]


def _plain(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except (ValueError, OverflowError):  # such as a date after the year 9999
        return str(scalar.cast(pa.string()))


def _openai(data: bytes) -> tuple[list[Any], list[Any]]:
    lines = data.splitlines()
    errors = [line_counts(line)[0] for line in lines]
    named = [line if error is not None else None for line, error in zip(lines, errors, strict=True)]
    return errors, [None if line is None else json.loads(line)["custom_id"] for line in named]


def _jsonl(data: bytes, prefix: str, id_column: str | None) -> tuple[list[Any], list[Any]]:
    rows = [json.loads(line) for line in data.splitlines()]
    return [row[f"{prefix}error"] for row in rows], [None if id_column is None else row.get(id_column) for row in rows]
