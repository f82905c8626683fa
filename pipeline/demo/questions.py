"""The demo dataset: held-out questions with their right answers, as rows of a file."""

import filecmp
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.demo.names import Task
from pipeline.demo.tasks import draw_group
from pipeline.errors import ConfigError

QuestionFormat = Literal["parquet", "jsonl", "openai"]
ROWS_PER_GROUP = 2048
_FORMATS: dict[str, QuestionFormat] = {".parquet": "parquet", ".jsonl": "jsonl"}
ROW_SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "schema", "prompt", "expected")])


@dataclass(frozen=True)
class Question:
    """One row of the demo dataset."""

    id: str
    schema: str
    prompt: str
    expected: str


def draw_questions(task: Task, rows: int, *, seed: int = 1) -> Iterator[Question]:
    """Questions that training never saw (each asks about at least one held-out pair), with their answers.

    Args:
        task: `"sql"`, `"cypher"` or `"json"`.
        rows: How many.
        seed: The same seed gives the same questions.

    Yields:
        Two to eight questions to a schema, schema after schema.
    """
    rng = Random(f"{seed}/{task}")

    def endless() -> Iterator[Question]:
        number = 0
        while True:
            for example in draw_group(rng, task, rng.randint(2, 8), held_out=True):
                yield Question(f"{task}-{number:07d}", example.schema, example.prompt, example.expected)
                number += 1

    return islice(endless(), rows)


def write_questions(
    path: Path,
    rows: int,
    *,
    task: Task = "sql",
    seed: int = 1,
    file_format: QuestionFormat | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a demo dataset with the columns id, schema, prompt and expected.

    Args:
        path: Where to; the file appears whole or not at all. One that holds the same already stays as it is.
        rows: How many questions.
        task, seed: See `draw_questions`.
        file_format: `"parquet"`, `"jsonl"`, or `"openai"` for a batch file of OpenAI's API, which has no answers; None
            for what the file's name says.
        overwrite: Replace a file that holds something else.

    Raises:
        ConfigError: `rows` is not positive, the name goes with no format or with another one, the file holds something
            else, or it cannot be written.
    """
    if rows < 1:
        raise ConfigError(f"rows is {rows}", hint="Give the number of questions to make, at least 1.")
    writers: dict[QuestionFormat, Callable[[Path, Iterable[Question]], None]] = {
        "parquet": _write_parquet,
        "jsonl": _write_jsonl,
        "openai": partial(_write_openai, task),
    }
    write = writers[_format(path, file_format)]
    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(fresh, draw_questions(task, rows, seed=seed))
        if path.is_file() and not overwrite and not filecmp.cmp(fresh, path, shallow=False):
            raise ConfigError(
                f"{path} exists, and holds something else than these {rows:,} questions",
                hint="Name another file, or replace this one: --overwrite (overwrite=True).",
            )
        fresh.replace(path)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}", hint="Choose a folder you may write to."
        ) from error
    finally:
        fresh.unlink(missing_ok=True)
    return path


def _format(path: Path, wanted: QuestionFormat | None) -> QuestionFormat:
    by_name = _FORMATS.get(path.suffix)
    if by_name is None or (wanted is not None and (wanted == "parquet") != (by_name == "parquet")):
        told = "ends with neither .parquet nor .jsonl" if by_name is None else f"does not go with --format {wanted}"
        raise ConfigError(f"the name {path} {told}", hint="Name a .parquet file, or a .jsonl file (jsonl and openai).")
    return wanted or by_name


def _write_parquet(path: Path, questions: Iterable[Question]) -> None:
    rows = (vars(question) for question in questions)
    with pq.ParquetWriter(path, ROW_SCHEMA, compression="zstd") as writer:
        while group := list(islice(rows, ROWS_PER_GROUP)):
            writer.write_table(pa.Table.from_pylist(group, schema=ROW_SCHEMA))


def _write_jsonl(path: Path, questions: Iterable[Question]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for question in questions:
            file.write(json.dumps(vars(question), ensure_ascii=False) + "\n")


def _write_openai(task: Task, path: Path, questions: Iterable[Question]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for question in questions:
            messages = [{"role": "user", "content": question.prompt}]
            body = {"model": f"expert-{task}", "messages": messages, "schema": question.schema}
            line = {"custom_id": question.id, "method": "POST", "url": "/v1/chat/completions", "body": body}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
