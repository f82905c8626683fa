"""Answered rows -> the bytes of a part, and back to what a part says of itself."""

import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.batch import openai_lines
from pipeline.batch.part_values import json_value, loose_value
from pipeline.batch.rows import Row
from pipeline.batch.shards import ShardPlan
from pipeline.engine.types import Completion, Failure
from pipeline.errors import ConfigError, DatasetError, OutputError

PartKind = Literal["parquet", "jsonl", "openai"]
Compression = Literal["zstd", "snappy", "gzip", "lz4", "none"]
OUR_SCHEMA = pa.schema(
    [
        ("text", pa.string()),
        ("finish_reason", pa.string()),
        ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
        ("expert", pa.string()),
        ("expert_sha256", pa.string()),
        ("error", pa.struct([("code", pa.string()), ("message", pa.string())])),
    ]
)
SCHEMA_DRIFT = "schema_drift"


@dataclass(frozen=True)
class PartFormat:
    """How the parts of a job are written; the same for all of them.

    Args:
        kind: `parquet`, `jsonl`, or `openai` for the lines of `openai_lines`, which have none of the columns below.
        inputs: The input columns of a Parquet part; see `ShardPlan.schema`.
        is_loose: Whether the rows come from JSONL, where a value may not fit its column.
        prefix: Put before the names of our columns.
        expert: Name and version of what answered, `name@version`; None where each row says so itself.
        expert_sha256: Its digest.
        metadata: Written into the footer of a Parquet part.
        compression: Of a Parquet part.
        row_group_rows: Rows in a row group of a Parquet part; None for one group, up to Parquet's own limit.
    """

    kind: PartKind
    inputs: pa.Schema
    is_loose: bool
    prefix: str = ""
    expert: str | None = None
    expert_sha256: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    compression: Compression = "zstd"
    row_group_rows: int | None = None

    @property
    def output_names(self) -> tuple[str, ...]:
        """The names of our columns."""
        return tuple(self.prefix + name for name in OUR_SCHEMA.names)

    @property
    def schema(self) -> pa.Schema:
        """The schema of a part as a table: every input column, then ours."""
        if self.kind == "openai":
            return openai_lines.PART_SCHEMA
        ours = [pa.field(name, item.type) for name, item in zip(self.output_names, OUR_SCHEMA, strict=True)]
        return pa.schema([*self.inputs, *ours], metadata=dict(self.metadata) or None)

    def misfit(self, values: Mapping[str, Any]) -> Failure | None:
        """Why a row's values cannot be written, before it is answered in vain; None when they can.

        Only a row of JSONL can have such a failure, with the code `schema_drift`.
        """
        taken = next((name for name in self.output_names if name in values), None)
        if taken is not None:
            return _drift(f"column {taken!r} has the name of an output column; set output_prefix")
        if self.kind == "jsonl" or not self.is_loose:
            return None
        for name, value in values.items():
            if name not in self.inputs.names:
                return _drift(f"column {name!r} is not in the first lines of the dataset's files")
            item = self.inputs.field(name)
            if not loose_value(value, item)[1]:
                return _drift(f"column {name!r} is {item.type} in the first lines, and {json_value(value)!r:.80} here")
        return None


class AnsweredBy(Protocol):
    """An expert, as the part names it."""

    @property
    def label(self) -> str:
        """Its name and version, `name@version`."""

    @property
    def sha256(self) -> str:
        """Its digest."""


@dataclass(frozen=True)
class AnsweredRow:
    """A row of the dataset and its answer; None when the row itself has a failure.

    `by` answered it, where the rows of a job are not all answered by the one that the part's format names.
    """

    row: Row
    completion: Completion | None
    by: AnsweredBy | None = None


@dataclass(frozen=True)
class PartCounts:
    """What a part holds: rows, rows with an error by the error's code, and tokens."""

    rows: int
    error_codes: dict[str, int]
    prompt_tokens: int
    completion_tokens: int


def plan_part_format(
    plan: ShardPlan,
    *,
    kind: str | None = None,
    output_prefix: str = "",
    expert: str | None = None,
    expert_sha256: str | None = None,
    metadata: Mapping[str, str] | None = None,
    compression: Compression = "zstd",
    row_group_rows: int | None = None,
) -> PartFormat:
    """How the parts of a job are written.

    Args:
        plan: The job's plan.
        kind: `parquet` or `jsonl`; None for JSONL from JSONL and Parquet from the rest.
        output_prefix: Put before the names of our columns, against collisions.
        expert: Name and version of what answers.
        expert_sha256: Its digest.
        metadata: Written into the footer of Parquet parts, e.g. the fingerprint's digest; no times.
        compression: Of Parquet parts.
        row_group_rows: Rows in a row group of Parquet parts; None for one group.

    Raises:
        ConfigError: `kind` is neither.
        DatasetError: An input column has the name of one of ours; names it.
    """
    chosen = kind or ("jsonl" if plan.format == "jsonl" else "parquet")
    if chosen not in ("parquet", "jsonl"):
        raise ConfigError(f"output_format is {kind!r}", hint="Give parquet or jsonl.")
    form = PartFormat(
        kind="parquet" if chosen == "parquet" else "jsonl",
        inputs=plan.schema,
        is_loose=plan.format == "jsonl",
        prefix=output_prefix,
        expert=expert,
        expert_sha256=expert_sha256,
        metadata=dict(metadata or {}),
        compression=compression,
        row_group_rows=row_group_rows,
    )
    taken = [name for name in form.output_names if name in plan.columns]
    if taken:
        raise DatasetError(
            "the dataset has columns with the names of output columns",
            details=[f"column {name!r}" for name in taken],
            hint='Set output_prefix, e.g. output_prefix: "answer_", or rename the columns.',
        )
    return form


def encode_part(rows: Sequence[AnsweredRow], form: PartFormat, inputs: pa.Table | None = None) -> bytes:
    """The bytes of a part: a row for every row, in order. The same rows give the same bytes.

    A row with a failure has null text, finish reason `error` and no tokens.

    Args:
        rows: All rows of a shard.
        form: The job's.
        inputs: The shard's table as it was read. A Parquet part of rows that are not JSONL then takes the input columns
            from it, rather than from Python values, which lose what Python cannot hold; a value that does not fit the
            type that the dataset's files have in common is null there, and its row a failure.

    Raises:
        OutputError: A value does not fit its column.
    """
    misfits = [row.row.failure or form.misfit(row.row.values) for row in rows]
    if form.kind == "jsonl":
        return b"".join(
            _json_line(row, _ours(row, misfit, form), form) for row, misfit in zip(rows, misfits, strict=True)
        )
    names = OUR_SCHEMA.names
    unfit: dict[int, Failure] = {}
    try:
        if inputs is not None and not form.is_loose:
            columns = [_table_column(inputs, item, unfit) for item in form.inputs]
        else:
            columns = [_value_column(rows, item, is_loose=form.is_loose) for item in form.inputs]
        ours = [
            _ours(row, misfit or unfit.get(index), form)
            for index, (row, misfit) in enumerate(zip(rows, misfits, strict=True))
        ]
        columns += [
            pa.array([answer[name] for answer in ours], kind)
            for name, kind in zip(names, OUR_SCHEMA.types, strict=True)
        ]
        table = pa.table(columns, schema=form.schema)
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise OutputError(
            f"a part cannot be written as Parquet: {error}", hint="Write the output as JSONL: output_format: jsonl."
        ) from error
    return write_parquet(table, form)


def write_parquet(table: pa.Table, form: PartFormat) -> bytes:
    """A table as the bytes of a Parquet part."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression=form.compression, row_group_size=form.row_group_rows, version="2.6")
    return sink.getvalue()


def count_part(data: bytes, kind: PartKind, prefix: str = "") -> PartCounts:
    """What the bytes of a part hold.

    Args:
        data: The whole part.
        kind: How it is written.
        prefix: Stands before the names of our columns.

    Raises:
        OutputError: The bytes are not a part.
    """
    names = [prefix + name for name in ("error", "prompt_tokens", "completion_tokens")]
    try:
        if kind == "parquet":
            table = pq.read_table(io.BytesIO(data), columns=names)
            columns = [table[name].to_pylist() for name in names]
        elif kind == "openai":
            columns = [list(column) for column in zip(*map(openai_lines.line_counts, data.splitlines()), strict=True)]
        else:
            objects = [json.loads(line) for line in data.splitlines()]
            columns = [[item[name] for item in objects] for name in names]
        errors, prompt_tokens, completion_tokens = columns or ([], [], [])
        return PartCounts(
            rows=len(errors),
            error_codes=dict(sorted(Counter(error["code"] for error in errors if error is not None).items())),
            prompt_tokens=sum(prompt_tokens),
            completion_tokens=sum(completion_tokens),
        )
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise OutputError(
            f"a part is damaged: {error!r:.200}",
            hint="Delete the part and its receipt, and run the same command again.",
        ) from error


def failure_of(row: AnsweredRow, form: PartFormat) -> Failure | None:
    """Why a row has no answer in its part: it could not be read, does not fit, or was not answered; None when it has.

    Args:
        row: The row.
        form: The job's.
    """
    misfit = row.row.failure or form.misfit(row.row.values)
    return misfit or (row.completion.failure if row.completion is not None else None)


def _ours(row: AnsweredRow, misfit: Failure | None, form: PartFormat) -> dict[str, Any]:
    completion = row.completion
    by = {
        "expert": form.expert if row.by is None else row.by.label,
        "expert_sha256": form.expert_sha256 if row.by is None else row.by.sha256,
    }
    failure = misfit or (completion.failure if completion is not None else None)
    if completion is None and failure is None:
        raise OutputError(
            f"row {row.row.identity} has neither an answer nor a failure", hint="Report this: it is a mistake of ours."
        )
    if failure is not None or completion is None:
        error = None if failure is None else {"code": failure.code, "message": _utf8(failure.message)}
        answer: dict[str, Any] = {"text": None, "finish_reason": "error", "prompt_tokens": 0, "completion_tokens": 0}
        return {**answer, **by, "error": error}
    return {
        "text": _utf8(completion.text),
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": completion.completion_tokens,
        **by,
        "error": None,
    }


def _json_line(row: AnsweredRow, answer: Mapping[str, Any], form: PartFormat) -> bytes:
    values = {name: json_value(value) for name, value in row.row.values.items()}
    values |= {form.prefix + name: value for name, value in answer.items()}
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode() + b"\n"


def _table_column(table: pa.Table, item: pa.Field, unfit: dict[int, Failure]) -> Any:
    if item.name not in table.column_names:
        return pa.nulls(table.num_rows, item.type)
    column = table[item.name]
    try:
        return column.cast(item.type)
    except pa.ArrowInvalid:  # a value too large for the type that the files have in common; find it, keep the others
        return pa.array([_cast(value, item, index, unfit) for index, value in enumerate(column)], item.type)


def _cast(value: pa.Scalar, item: pa.Field, index: int, unfit: dict[int, Failure]) -> pa.Scalar | None:
    try:
        return value.cast(item.type)
    except pa.ArrowInvalid:
        why = f"column {item.name!r} is {item.type} in all files together, which cannot hold {value.as_py()!r:.80}"
        unfit.setdefault(index, _drift(why))
        return None


def _value_column(rows: Sequence[AnsweredRow], item: pa.Field, *, is_loose: bool) -> pa.Array:
    values = [row.row.values.get(item.name) for row in rows]
    return pa.array([loose_value(value, item)[0] for value in values] if is_loose else values, item.type)


def _utf8(text: str) -> str:
    """The text with `?` for what UTF-8 cannot hold: halves of surrogate pairs."""
    return text.encode(errors="replace").decode()


def _drift(message: str) -> Failure:
    return Failure(SCHEMA_DRIFT, message)
