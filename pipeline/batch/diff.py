"""Two outputs compared row by row: the same questions, answered twice."""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.batch.layout import JOB, MANIFEST
from pipeline.errors import OutputError
from pipeline.storage import Storage, open_storage

MAX_SAMPLES = 10
_ASKED = ("id", "prompt", "messages", "schema", "system", "dialect")
_ANSWERED = ("text", "error")


@dataclass(frozen=True)
class Difference:
    """A row with two answers.

    Args:
        row: Its place in the outputs, from 0.
        question: Its prompt or messages, as text.
        answers: Of the first and of the second output; None where the row has an error.
        errors: The codes of their errors; None where there is none.
    """

    row: int
    question: str
    answers: tuple[str | None, str | None]
    errors: tuple[str | None, str | None]


@dataclass(frozen=True)
class OutputDiff:
    """How two outputs differ.

    Args:
        rows: Rows of each.
        same: Rows with the same text, or with the same error code.
        different: Rows that both answered, differently.
        errors: Rows with an error in the first output alone, in the second alone, and in both.
        fields: What is different about the jobs: field of the fingerprint to both values, as JSON text.
        samples: The first rows that are not the same.
    """

    rows: int
    same: int
    different: int
    errors: tuple[int, int, int]
    fields: Mapping[str, tuple[str, str]]
    samples: tuple[Difference, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**vars(self), "samples": [vars(sample) for sample in self.samples]}


def diff_outputs(
    first: str, second: str, *, storage_options: Mapping[str, Any] | None = None, max_samples: int = MAX_SAMPLES
) -> OutputDiff:
    """Compare two finished outputs of the same dataset; they may have other shards, formats, experts or options.

    Args:
        first: An output folder or URL.
        second: Another.
        storage_options: Passed to the file system of both.
        max_samples: So many rows that differ are kept.

    Raises:
        OutputError: One is not the output of a finished job, or of one for OpenAI batch files, or they answer other
            questions.
    """
    one, other = (_Output(open_storage(url, storage_options)) for url in (first, second))
    rows = same = different = 0
    only_first = only_second = both = 0
    samples: list[Difference] = []
    roles = [role for role in one.roles if role in other.roles]
    for left, right in zip_longest(one.rows(roles), other.rows(roles)):
        if left is None or right is None or left.asked != right.asked:
            raise OutputError(
                "the outputs answer other questions",
                details=[
                    f"row {rows}",
                    *(f"{item.storage.url('')}  {_shown(row)}" for item, row in ((one, left), (other, right))),
                ],
                hint="Compare two outputs of one dataset.",
            )
        errors = (left.error, right.error)
        is_same = errors[0] == errors[1] and left.text == right.text
        rows += 1
        same += is_same
        different += not is_same and errors == (None, None)
        only_first += errors[0] is not None and errors[1] is None
        only_second += errors[1] is not None and errors[0] is None
        both += None not in errors
        if not is_same and len(samples) < max_samples:
            samples.append(Difference(rows - 1, left.question, (left.text, right.text), errors))
    fields = {
        name: (_json(one.job.get(name)), _json(other.job.get(name)))
        for name in sorted(one.job.keys() | other.job.keys())
        if one.job.get(name) != other.job.get(name)
    }
    return OutputDiff(rows, same, different, (only_first, only_second, both), fields, tuple(samples))


@dataclass(frozen=True)
class _Answer:
    asked: tuple[str, ...]
    question: str
    text: str | None
    error: str | None


class _Output:
    """A finished output, read from storage alone, part by part."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.job = self._read_json(JOB)
        if self.job.get("output_format") == "openai":
            raise OutputError(
                f"{storage.url('')} answers OpenAI batch files, whose answers are not compared",
                hint="Compare two results.jsonl by their custom_id.",
            )
        self._parts = self._read_json(MANIFEST)["parts"]
        columns = self.job.get("columns", {})
        self.roles = {role: columns[role] for role in _ASKED if isinstance(columns.get(role), str)}
        self._ours = [self.job.get("output_prefix", "") + name for name in _ANSWERED]

    def rows(self, roles: Sequence[str]) -> Iterator[_Answer]:
        """Every row, in order; what was asked are the columns of these roles."""
        asked = [self.roles[role] for role in roles]
        question = self.roles.get("prompt") or self.roles.get("messages") or ""
        for part in self._parts:
            for row in self._read_part(part["path"]):
                text, error = (row.get(name) for name in self._ours)
                yield _Answer(
                    asked=tuple(_json(row.get(name)) for name in asked),
                    question=_plain(row.get(question)),
                    text=text,
                    error=None if error is None else error["code"],
                )

    def _read_part(self, name: str) -> Iterator[dict[str, Any]]:
        data = self.storage.read(name)
        try:
            if not name.endswith(".parquet"):
                yield from (json.loads(line) for line in data.splitlines())
                return
            file = pq.ParquetFile(io.BytesIO(data))
            wanted = (*self.roles.values(), *self._ours)
            known = [column for column in wanted if column in file.schema_arrow.names]
            for batch in file.iter_batches(batch_size=1024, columns=known):
                yield from batch.to_pylist()
        except (OSError, ValueError, pa.ArrowException) as error:
            raise OutputError(
                f"{self.storage.url(name)} is damaged: {error}", hint="Run the job that wrote it again."
            ) from error

    def _read_json(self, name: str) -> dict[str, Any]:
        if not self.storage.exists(name):
            raise OutputError(
                f"{self.storage.url('')} is not the output of a finished job: there is no {name}",
                hint="Name the output folder of a job, and run the job to its end first.",
            )
        try:
            values: dict[str, Any] = json.loads(self.storage.read(name))
        except ValueError as error:
            raise OutputError(
                f"{self.storage.url(name)} is damaged: {error}", hint="Run the job that wrote it again."
            ) from error
        return values


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else _json(value)


def _shown(row: _Answer | None) -> str:
    return "no such row" if row is None else row.question[:120]
