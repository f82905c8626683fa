"""How many answers of a finished job are right, by expert: the same text, and for SQL the same rows when it is run."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from pipeline.batch.columns import ResolvedColumns
from pipeline.batch.config import BatchConfig
from pipeline.batch.jsonl_files import json_text
from pipeline.batch.matching import exact_match, execution_match
from pipeline.batch.result import BatchResult
from pipeline.batch.run import run_config
from pipeline.errors import ConfigError

MAX_SAMPLES = 5
NO_EXPERT = "(none)"


@dataclass(frozen=True)
class WrongAnswer:
    """An answer whose text is not the expected one.

    Args:
        row: Its place in the output, from 0.
        expected: The right answer.
        answer: The given one; None when the row has an error.
        same_rows: Whether it gives the same rows as the right one; None when that cannot be judged.
    """

    row: int
    expected: str
    answer: str | None
    same_rows: bool | None


@dataclass(frozen=True)
class ExpertScore:
    """How well one expert did.

    Args:
        expert: `name@version`.
        rows: Rows that it was asked.
        errors: Those with an error; they count as wrong.
        judged: Rows with an expected answer.
        exact: Of these, answers that are the expected text, apart from white space around it.
        executable: Rows whose expected answer runs as SQL on the row's schema and finds something.
        executed: Of these, answers that give the same rows.
        completion_tokens: Tokens generated.
        wrong: Some answers that are not the expected text.
    """

    expert: str
    rows: int = 0
    errors: int = 0
    judged: int = 0
    exact: int = 0
    executable: int = 0
    executed: int = 0
    completion_tokens: int = 0
    wrong: tuple[WrongAnswer, ...] = ()

    @property
    def exact_rate(self) -> float | None:
        """The share of exact answers; None when none was judged."""
        return self.exact / self.judged if self.judged else None

    @property
    def execution_rate(self) -> float | None:
        """The share of answers that give the same rows; None where that cannot be judged."""
        return self.executed / self.executable if self.executable else None

    @property
    def mean_tokens(self) -> float | None:
        """Generated tokens of an answered row, on average."""
        answered = self.rows - self.errors
        return self.completion_tokens / answered if answered else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        values = {name: value for name, value in vars(self).items() if name != "wrong"}
        rates = {"exact_rate": self.exact_rate, "execution_rate": self.execution_rate, "mean_tokens": self.mean_tokens}
        return {**values, **rates, "wrong": [vars(item) for item in self.wrong]}


@dataclass
class _Tally:
    """A score that is being counted."""

    counts: dict[str, int] = field(default_factory=dict)
    wrong: list[WrongAnswer] = field(default_factory=list)

    def add(self, name: str, count: int = 1) -> None:
        self.counts[name] = self.counts.get(name, 0) + count


def evaluate_job(config: BatchConfig, *, progress: bool = True) -> tuple[BatchResult, list[ExpertScore]]:
    """Run a job, or continue it, and judge its answers by the dataset's column of right ones.

    Args:
        config: The job. `columns.expected` names the column; `expected` if it names none.
        progress: Show the progress line on standard error.

    Returns:
        The job's result, and a score for each expert, in the order of their names.

    Raises:
        ConfigError: The dataset is of OpenAI batch files, which have no column of right answers.
        DatasetError: The dataset has no such column; nothing was answered.
        ExpertError: As `run_batch` does.
    """
    if config.format == "openai":
        raise ConfigError(
            "an OpenAI batch file has no column of right answers to judge by",
            hint="Give the questions as a dataset with such a column, in another format.",
        )
    # Named, the column must be there, and a dataset without it is refused before anything is answered. What is expected
    # is no part of the fingerprint: a job that ran without can be judged afterwards.
    columns = config.columns.model_copy(update={"expected": config.columns.expected or "expected"})
    result = run_config(config.model_copy(update={"columns": columns}), progress=progress)
    return result, score_tables(result.iter_tables(), result.columns, prefix=config.output_prefix)


def score_tables(tables: Iterable[pa.Table], columns: ResolvedColumns, *, prefix: str = "") -> list[ExpertScore]:
    """Judge answers, one table after the other.

    Args:
        tables: The output of a job, in order.
        columns: Which column plays which role; without an `expected` column nothing is judged.
        prefix: Stands before the names of the job's own columns.

    Returns:
        A score for each expert, in the order of their names.
    """
    tallies: dict[str, _Tally] = {}
    row = 0
    for table in tables:
        nothing = [None] * table.num_rows
        expected, schemas = (
            nothing if name is None else table[name].to_pylist() for name in (columns.expected, columns.schema)
        )
        ours = (table[prefix + name].to_pylist() for name in ("expert", "text", "error", "completion_tokens"))
        for expert, text, error, tokens, wanted, schema in zip(*ours, expected, schemas, strict=True):
            tally = tallies.setdefault(expert or NO_EXPERT, _Tally())
            tally.add("rows")
            tally.add("errors", error is not None)
            tally.add("completion_tokens", tokens)
            if wanted is not None:
                _judge(tally, row, text, _text(wanted), schema)
            row += 1
    return [ExpertScore(name, **tally.counts, wrong=tuple(tally.wrong)) for name, tally in sorted(tallies.items())]


def total_score(scores: Iterable[ExpertScore]) -> ExpertScore:
    """All experts together."""
    total = ExpertScore("all")
    names = ("rows", "errors", "judged", "exact", "executable", "executed", "completion_tokens")
    for score in scores:
        total = replace(total, **{name: getattr(total, name) + getattr(score, name) for name in names})
    return total


def _judge(tally: _Tally, row: int, answer: str | None, expected: str, schema: Any) -> None:
    is_exact = exact_match(answer, expected)
    same_rows = execution_match(schema, answer, expected) if isinstance(schema, str) else None
    tally.add("judged")
    tally.add("exact", is_exact)
    if same_rows is not None:
        tally.add("executable")
        tally.add("executed", same_rows)
    if not is_exact and len(tally.wrong) < MAX_SAMPLES:
        tally.wrong.append(WrongAnswer(row, expected, answer, same_rows))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json_text(value)
