"""Preparing rows beside the workers: templates and tokens are made by the tasks that read, on CPU cores.

A worker's process has one lock for all its Python, and its engine's steps wait for it; what is prepared elsewhere, the
worker only has to read. Rows are prepared by the same code there, so that answers are the same.

A row may end the process that prepares it, or hold it up for ever, as it may a worker's. A task that is tried again
therefore prepares nothing: the worker does, and its trials (`trials.py`) find the row.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from typing import Any, Protocol

import pyarrow as pa
import ray

from pipeline.batch.answering import EngineJob, Preparer, engine_name, row_seed
from pipeline.batch.commit import JobOutput
from pipeline.batch.openai_answers import LinePreparer, OpenAIRules
from pipeline.batch.parts import PartFormat
from pipeline.batch.prepared import PreparedRow, prepared_bytes
from pipeline.batch.row_answers import RowPreparer
from pipeline.batch.row_errors import rows_to_mend
from pipeline.batch.rows import Row, iter_rows
from pipeline.batch.shards import Shard
from pipeline.batch.watchdog import Watchdog

MAX_LOADED = 2  # runs of which a process keeps what it prepares with


@dataclass(frozen=True)
class PrepareJob:
    """Everything that a task which prepares rows is told; it travels with every task.

    Args:
        key: Tells this run of a job from every other, so that what is loaded for it is loaded once in a process.
        engine: How rows become requests.
        part_format: How parts are written, and so which rows can be.
        load: How a process comes to what it prepares with.
        mends: Where the parts are of which only rows with an error are answered again; None where all rows are.
        progress_timeout: So long a row may take, in seconds.
        openai: How the lines of OpenAI batch files are answered; None where the rows are others.
        kept: The columns of lines of JSON that are wanted; None for all.
    """

    key: str
    engine: EngineJob = field(compare=False)
    part_format: PartFormat = field(compare=False)
    load: Callable[[EngineJob], Mapping[str | None, Preparer]] = field(compare=False)
    mends: JobOutput | None = field(default=None, compare=False)
    progress_timeout: float = field(default=600.0, compare=False)
    openai: OpenAIRules | None = field(default=None, compare=False)
    kept: tuple[str, ...] | None = field(default=None, compare=False)


class _Prepares(Protocol):
    def prepare(self, row: Row) -> PreparedRow:
        """What a row asks."""


def prepare_shard(job: PrepareJob, shard: Shard, table: pa.Table) -> bytes | None:
    """What the rows of a shard ask, as `prepared.prepared_bytes`; None where the worker is to find out.

    Of rows that are not answered again there is nothing in it but their places.

    Args:
        job: What to prepare with.
        shard: The shard.
        table: Its whole table, from `source.read_shards`.

    Raises:
        LoadError: A package, its tokenizer or the base model cannot be used on this machine.
        OutputError: The part whose rows are answered again cannot be read.
    """
    if is_second_try():
        return None
    old_part = None if job.mends is None else job.mends.part_to_mend(shard.index)
    wanted = range(table.num_rows) if old_part is None else set(rows_to_mend(old_part, job.part_format, shard.index))
    preparer, progress = _loaded(job), _watched(job.progress_timeout)
    progress.is_busy = True
    try:
        prepared = []
        for place, row in enumerate(iter_rows(shard, table, job.kept)):
            prepared.append(preparer.prepare(row) if place in wanted else PreparedRow())
            progress.num_rows += 1
    finally:
        progress.is_busy = False
    return prepared_bytes(prepared)


def is_second_try() -> bool:
    """Whether this is a task whose process, or whose result, was lost before."""
    if not ray.is_initialized():
        return False
    from ray._private.worker import global_worker

    core: Any = global_worker.core_worker  # type: ignore[attr-defined]  # Ray does not annotate it
    return int(core.get_current_task_attempt_number()) > 0


@lru_cache(maxsize=MAX_LOADED)
def _loaded(job: PrepareJob) -> _Prepares:
    preparers = job.load(job.engine)
    if job.openai is None:
        return RowPreparer(job.engine, preparers, job.part_format)
    by_name = {engine_name(name): preparer for name, preparer in preparers.items()}
    return LinePreparer(job.openai, by_name, partial(row_seed, job.engine.seed))


class _Progress:
    """How far this process is."""

    def __init__(self) -> None:
        self.is_busy = False
        self.num_rows = 0

    def now(self) -> int | None:
        """Something that changes with each row; None when there is nothing to prepare."""
        return self.num_rows if self.is_busy else None


@cache
def _watched(seconds: float) -> _Progress:
    """This process's progress, with a watchdog that ends it when a row takes so long."""
    progress = _Progress()
    Watchdog(progress.now, seconds, what="a task that prepares rows")
    return progress
