"""The shards of a job in this process, one after another, without Ray: the worker and the commits are the same."""

from collections.abc import Callable, Iterator, Mapping

from pipeline.batch.answering import EXPERTS, Loader
from pipeline.batch.blocks import run_blocks
from pipeline.batch.execute import RunCounts, Workers, prepare_job, worker_job
from pipeline.batch.plan import PreparedJob
from pipeline.batch.preparing import PrepareJob
from pipeline.batch.progress import Phases, Progress
from pipeline.batch.receipts import Receipt
from pipeline.batch.run_record import RunRecorder
from pipeline.batch.shard_stats import ShardStats
from pipeline.batch.shards import Shard
from pipeline.batch.worker import ShardWorker


def execute_here(
    job: PreparedJob,
    done: Mapping[int, Receipt],
    progress: Progress,
    phases: Phases,
    on_receipt: Callable[[Receipt], None] = lambda _: None,
    *,
    recorder: RunRecorder | None = None,
    is_resumed: bool = False,
    load: Loader = EXPERTS,
) -> RunCounts:
    """Answer every shard that is not done yet; see `execute.execute`, whose place it takes in `drive`.

    Nothing stands between this process and its engine: an engine that raises ends the process.

    Raises:
        ExpertError: The expert cannot be loaded, or a part cannot be written.
    """
    pending = [shard for shard in job.plan.shards if shard.index not in done]
    if not pending:
        return RunCounts()
    already = list(done.values())
    progress.start(len(job.plan.shards), len(already), job.plan.num_rows, sum(item.rows for item in already))
    workers = Workers(count=1, num_cpus=1, num_gpus=0, num_threads=None)
    rows, tokens = 0, 0
    try:
        with phases.phase("start"):
            worker = ShardWorker(worker_job(job, workers, is_resumed=is_resumed, load=load))
        with phases.phase("run"):
            told = prepare_job(job, load) if job.config.prepare == "tasks" else None
            for receipt, stats in _answered(worker, pending, job, told):
                if recorder is not None:
                    recorder.add(receipt, stats)
                progress.update(receipt, worker=stats.worker, seconds=stats.seconds)
                on_receipt(receipt)
                rows += receipt.rows
                tokens += receipt.completion_tokens
    finally:
        progress.close()
    return RunCounts(rows, tokens)


def _answered(
    worker: ShardWorker, shards: list[Shard], job: PreparedJob, prepare: PrepareJob | None
) -> Iterator[tuple[Receipt, ShardStats]]:
    for block in run_blocks(shards, job.config.storage_options, job.kept, prepare):
        answered = worker(block)
        yield Receipt.from_json(answered["receipt"][0].as_py()), ShardStats.from_json(answered["stats"][0].as_py())
