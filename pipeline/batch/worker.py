"""The actor of a batch job: it holds one engine and answers shards, several at a time."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import ray

from pipeline.batch.answering import Answering, EngineFailedError, EngineJob, Loader, load_engine
from pipeline.batch.commit import JobOutput
from pipeline.batch.parts import AnsweredRow, PartFormat, encode_part
from pipeline.batch.receipts import Receipt
from pipeline.batch.row_errors import mended_part, row_errors
from pipeline.batch.rows import Row, iter_rows
from pipeline.batch.shard_stats import shard_stats
from pipeline.batch.shards import Shard
from pipeline.batch.trials import ROW_KILLS_WORKER, History, Range, Trials, plan_trials
from pipeline.batch.turns import Turns
from pipeline.batch.watchdog import Watchdog, end_process
from pipeline.engine.types import Completion, Failure
from pipeline.errors import ExpertError


@dataclass(frozen=True)
class WorkerJob:
    """Everything a worker is told; it travels to every actor once.

    Args:
        engine: What to answer with.
        output: Where to commit.
        part_format: How parts are written.
        progress_timeout: So long the engine may do nothing while it has rows to answer, in seconds.
        is_resumed: Whether the output was begun by another run, whose workers may have been lost.
        load: How the worker comes to its engine.
    """

    engine: EngineJob
    output: JobOutput
    part_format: PartFormat
    progress_timeout: float = 600.0
    is_resumed: bool = False
    load: Loader = load_engine


class ShardWorker:
    """Answers one shard a call and commits it; only the receipt goes back.

    Ray Data calls it from several threads at a time, so that the engine has the next shard's rows before the last of
    one are answered, and while its part is written. Where a worker was lost before, what it may have been lost of is
    tried alone; see `trials`.

    Args:
        job: What to answer with, and where to write.
    """

    def __init__(self, job: WorkerJob) -> None:
        self._job = job
        self._turns = Turns()
        self._trials = Trials(job.output.storage, is_noting=job.is_resumed or was_restarted())
        # Ray reports an actor that cannot be made without its reason; so this one is made, and its first shard says it.
        self._failure: ExpertError | None = None
        try:
            self._answering = Answering(job.engine, job.load(job.engine), job.part_format)
        except ExpertError as error:
            self._failure = error
        else:
            Watchdog(self._answering.progress, job.progress_timeout, last_words=self._trials.explain)

    def __call__(self, block: pa.Table) -> pa.Table:
        """Answer the shards of a block; see `blocks.shard_blocks` for its form.

        Returns:
            A row a shard: `receipt` and `stats` (`ShardStats`), both JSON.

        Raises:
            ExpertError: The expert cannot be loaded on this machine, or a part cannot be written.
        """
        if self._failure is not None:
            raise self._failure
        receipts, stats = [], []
        for text, rows in zip(block["shard"].to_pylist(), block["rows"].to_pylist(), strict=True):
            started = time.monotonic()
            shard = Shard.from_json(text)
            with pa.ipc.open_stream(rows) as reader:
                table = reader.read_all()
            receipt, answered = self._answer(shard, table)
            receipts.append(receipt.to_json())
            stats.append(shard_stats(answered, self._job.part_format, time.monotonic() - started).to_json())
        return pa.table({"receipt": receipts, "stats": stats})

    def _answer(self, shard: Shard, table: pa.Table) -> tuple[Receipt, list[AnsweredRow]]:
        rows = list(iter_rows(shard, table))
        form = self._job.part_format
        old_part = self._job.output.part_to_mend(shard.index)
        wanted: list[int] = []  # rows that are answered again, when others of the part have answers already
        if old_part is not None:
            errors = row_errors(old_part, form.kind, shard.index, prefix=form.prefix, id_column=None)
            wanted = [error.row for error in errors]
            rows, table = [rows[row] for row in wanted], table.take(pa.array(wanted, pa.int64()))
        history = self._trials.history(shard.index)
        if history.is_suspect:
            with self._turns.alone():
                completions = self._try_alone(shard.index, rows, history)
        else:
            with self._turns.together():
                self._trials.begin(shard.index, Range(0, len(rows)), history, is_alone=False)
                completions = self._try(rows)
        self._trials.end(shard.index)
        answered = [
            AnsweredRow(row, completion, self._answering.expert_of(row))
            for row, completion in zip(rows, completions, strict=True)
        ]
        part = encode_part(answered, form, table)
        if old_part is not None:
            part = mended_part(old_part, part, wanted, form)
        return self._job.output.commit(shard.index, part), answered

    def _try(self, rows: Sequence[Row]) -> list[Completion | None]:
        try:
            return self._answering.answer(rows)
        except EngineFailedError as error:
            # Another process can go on; in this one, what the device or a native library has left behind is not known.
            end_process(str(error), self._trials.explain)
            raise

    def _try_alone(self, shard: int, rows: Sequence[Row], history: History) -> list[Completion | None]:
        plan = plan_trials(len(rows), history.deaths)
        completions: list[Completion | None] = [None] * len(rows)
        for start, stop in plan.ranges:
            history = self._trials.begin(shard, Range(start, stop), history, is_alone=True)
            completions[start:stop] = self._try(rows[start:stop])
            self._trials.end(shard)
        for killer in plan.killers:
            completions[killer] = _killer(rows[killer], history)
        return completions


def was_restarted() -> bool:
    """Whether this process is an actor's, and not its first."""
    if not ray.is_initialized():
        return False
    context = ray.get_runtime_context()
    return context.get_actor_id() is not None and bool(context.was_current_actor_reconstructed)


def _killer(row: Row, history: History) -> Completion:
    why = f": {history.reason}" if history.reason else ""
    message = f"each process that answered this row ended{why}"
    return Completion(row.identity, "", "error", 0, 0, Failure(ROW_KILLS_WORKER, message))
