"""The actor of a batch job: it holds one engine and answers shards, several at a time."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import ray

from pipeline.batch.answering import (
    EXPERTS,
    Answering,
    EngineFailedError,
    EngineJob,
    LoadedEngine,
    Loader,
    engine_name,
    row_seed,
)
from pipeline.batch.commit import JobOutput
from pipeline.batch.loads import LoadNotes
from pipeline.batch.openai_answers import LineAnswers, OpenAIRules
from pipeline.batch.parts import PartFormat
from pipeline.batch.prepared import PreparedRow, read_prepared
from pipeline.batch.receipts import Receipt
from pipeline.batch.row_answers import RowAnswers
from pipeline.batch.row_errors import mended_part, rows_to_mend
from pipeline.batch.rows import Row, iter_rows
from pipeline.batch.shard_stats import ShardStats
from pipeline.batch.shards import Shard
from pipeline.batch.trials import ROW_KILLS_WORKER, History, Range, Trials, plan_trials
from pipeline.batch.turns import Turns
from pipeline.batch.watchdog import Watchdog, end_process
from pipeline.engine.types import Failure
from pipeline.errors import ExpertError
from pipeline.tracing import export_spans, span


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
        openai: How the lines of OpenAI batch files are answered; None where the rows are others.
        kept: The columns of lines of JSON that are wanted; None for all.
    """

    engine: EngineJob
    output: JobOutput
    part_format: PartFormat
    progress_timeout: float = 600.0
    is_resumed: bool = False
    load: Loader = EXPERTS
    openai: OpenAIRules | None = None
    kept: tuple[str, ...] | None = None


class ShardWorker:
    """Answers one shard a call and commits it; only the receipt goes back.

    Ray Data calls it from several threads at a time, so that the engine has the next shard's rows before the last of
    one are answered, and while its part is written. Where a worker was lost before, what it may have been lost of is
    tried alone; see `trials`.

    Args:
        job: What to answer with, and where to write.
    """

    def __init__(self, job: WorkerJob) -> None:
        export_spans(os.environ)
        self._job = job
        self._turns = Turns()
        self._trials = Trials(job.output.storage, is_noting=job.is_resumed or was_restarted())
        # Ray reports an actor that cannot be made without its reason; so this one is made, and its first shard says it.
        self._failure: ExpertError | None = None
        notes = LoadNotes(job.output.storage, actor_name() if was_restarted() else None)
        try:
            notes.begin()
            labels = [expert.label for expert in job.engine.experts]
            with span("expert.load", {"expert": ", ".join(labels)}):
                self._answering = _answering(job, job.load.engine(job.engine))
            notes.end()
        except ExpertError as error:
            self._failure = error
        else:
            Watchdog(self._answering.progress, job.progress_timeout, last_words=self._trials.explain)

    def __call__(self, block: pa.Table) -> pa.Table:
        """Answer the shards of a block; see `blocks.run_blocks` for its form.

        Returns:
            A row a shard: `receipt` and `stats` (`ShardStats`), both JSON.

        Raises:
            ExpertError: The expert cannot be loaded on this machine, or a part cannot be written.
        """
        if self._failure is not None:
            raise self._failure
        receipts, stats = [], []
        for text, rows, prepared in zip(
            *(block[name].to_pylist() for name in ("shard", "rows", "prepared")), strict=True
        ):
            started = time.monotonic()
            shard = Shard.from_json(text)
            with pa.ipc.open_stream(rows) as reader:
                table = reader.read_all()
            with span(
                "expert.shard", {"expert.shard.index": shard.index, "expert.shard.rows": table.num_rows}
            ) as traced:
                receipt, told = self._answer(
                    shard, table, None if prepared is None else read_prepared(prepared), started
                )
                traced.set(
                    {
                        "gen_ai.usage.input_tokens": receipt.prompt_tokens,
                        "gen_ai.usage.output_tokens": receipt.completion_tokens,
                        "expert.shard.errors": receipt.errors,
                    }
                )
            receipts.append(receipt.to_json())
            stats.append(told.to_json())
        return pa.table({"receipt": receipts, "stats": stats})

    def _answer(
        self, shard: Shard, table: pa.Table, prepared: Sequence[PreparedRow] | None, started: float
    ) -> tuple[Receipt, ShardStats]:
        rows = list(iter_rows(shard, table, self._job.kept))
        form = self._job.part_format
        old_part = self._job.output.part_to_mend(shard.index)
        wanted: list[int] = []  # rows that are answered again, when others of the part have answers already
        if old_part is not None:
            wanted = rows_to_mend(old_part, form, shard.index)
            rows, table = [rows[row] for row in wanted], table.take(pa.array(wanted, pa.int64()))
            prepared = None if prepared is None else [prepared[row] for row in wanted]
        history = self._trials.history(shard.index)
        if history.is_suspect:
            with self._turns.alone():
                answers = self._try_alone(shard.index, rows, prepared, history)
        else:
            with self._turns.together():
                self._trials.begin(shard.index, Range(0, len(rows)), history, is_alone=False)
                answers = self._try(rows, prepared)
        self._trials.end(shard.index)
        part = self._answering.form.encode(answers, table)
        if old_part is not None:
            part = mended_part(old_part, part, wanted, form)
        receipt = self._job.output.commit(shard.index, part)
        return receipt, self._answering.form.stats(rows, answers, time.monotonic() - started)

    def _try(self, rows: Sequence[Row], prepared: Sequence[PreparedRow] | None) -> list[Any]:
        try:
            return self._answering.answer(rows, prepared)
        except EngineFailedError as error:
            # Another process can go on; in this one, what the device or a native library has left behind is not known.
            end_process(str(error), self._trials.explain)
            raise

    def _try_alone(
        self, shard: int, rows: Sequence[Row], prepared: Sequence[PreparedRow] | None, history: History
    ) -> list[Any]:
        plan = plan_trials(len(rows), history.deaths)
        answers: list[Any] = [None] * len(rows)
        for start, stop in plan.ranges:
            history = self._trials.begin(shard, Range(start, stop), history, is_alone=True)
            answers[start:stop] = self._try(rows[start:stop], None if prepared is None else prepared[start:stop])
            self._trials.end(shard)
        for killer in plan.killers:
            answers[killer] = self._answering.form.fail(rows[killer], _killer(history))
        return answers


def was_restarted() -> bool:
    """Whether this process is an actor's, and not its first."""
    if not ray.is_initialized():
        return False
    context = ray.get_runtime_context()
    return context.get_actor_id() is not None and bool(context.was_current_actor_reconstructed)


def actor_name() -> str:
    """What names this process's actor, also when it is started again; to be called in one."""
    return str(ray.get_runtime_context().get_actor_id())


def _answering(job: WorkerJob, loaded: LoadedEngine) -> Answering[Any]:
    """With answers of the job's own form, which alone looks into them."""
    if job.openai is None:
        return Answering(loaded.engine, RowAnswers(job.engine, loaded.builders, job.part_format))
    builders = {engine_name(name): builder for name, builder in loaded.builders.items()}
    return Answering(loaded.engine, LineAnswers(job.openai, builders, partial(row_seed, job.engine.seed)))


def _killer(history: History) -> Failure:
    why = f": {history.reason}" if history.reason else ""
    return Failure(ROW_KILLS_WORKER, f"each process that answered this row ended{why}")
