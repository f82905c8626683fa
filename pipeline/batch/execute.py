"""Running the shards of a job on Ray Data."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext

from pipeline.batch.blocks import ShardDatasource
from pipeline.batch.cluster import Cluster, connect
from pipeline.batch.commit import Receipt
from pipeline.batch.config import BatchConfig
from pipeline.batch.plan import PreparedJob, absolute
from pipeline.batch.progress import Phases, Progress
from pipeline.batch.shards import Shard
from pipeline.batch.worker import ShardWorker, WorkerJob
from pipeline.errors import ConfigError, ExpertError, JobFailedError

logger = logging.getLogger(__name__)

READ_CPUS = 0.1  # reading waits for storage; it must find room beside workers that hold every core


@dataclass(frozen=True)
class RunCounts:
    """What one run answered."""

    rows: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class Workers:
    """How many workers, and what each is given."""

    count: int
    num_cpus: float
    num_gpus: float
    num_threads: int | None


def execute(job: PreparedJob, done: Mapping[int, Receipt], progress: Progress, phases: Phases) -> RunCounts:
    """Answer every shard that is not done yet.

    Args:
        job: The job.
        done: Receipts of committed shards, by shard.
        progress: Shows how far it is.
        phases: Time until the first shard is begun counts as `start`, the rest as `run`.

    Raises:
        ConfigError: The workers do not fit the cluster.
        JobFailedError: Workers failed.
    """
    pending = [shard for shard in job.plan.shards if shard.index not in done]
    if not pending:
        return RunCounts()
    rows, tokens = 0, 0
    with phases.phase("start"):
        cluster = connect(job.config.ray_address)
        workers = plan_workers(job.config, cluster)
        receipts = _receipts(job, pending, workers)
        progress.start(len(job.plan.shards), len(done), job.plan.num_rows, sum(item.rows for item in done.values()))
    try:
        with phases.phase("start"):
            first, seconds = next(receipts)
        # The first shard was answered before its receipt came: that was running, not starting.
        phases.move(seconds, "start", "run")
        with phases.phase("run"):
            for receipt in _after(first, receipts):
                progress.update(receipt)
                rows += receipt.rows
                tokens += receipt.completion_tokens
    finally:
        progress.close()
    return RunCounts(rows, tokens)


def plan_workers(config: BatchConfig, cluster: Cluster) -> Workers:
    """How many workers a job gets, and what each reserves.

    Raises:
        ConfigError: They do not fit a cluster that cannot grow.
    """
    num_gpus = config.num_gpus
    if num_gpus is None:
        num_gpus = 1.0 if cluster.num_gpus >= 1 and config.device in (None, "cuda") else 0.0
    count = config.num_workers or (max(1, int(cluster.num_gpus // num_gpus)) if num_gpus else 1)
    num_cpus = 1.0 if config.num_cpus is None else config.num_cpus
    room = {"CPU": (count * num_cpus, cluster.num_cpus), "GPU": (count * num_gpus, cluster.num_gpus)}
    lacking = [
        f"{name}: {wanted:g} wanted, {there:g} there" for name, (wanted, there) in room.items() if wanted > there
    ]
    if lacking and not cluster.is_local:
        # A cluster with an autoscaler may grow to them; Ray waits until it has.
        logger.warning("%d workers do not fit the cluster as it is (%s); waiting", count, ", ".join(lacking))
    elif lacking:
        raise ConfigError(
            f"{count} workers do not fit this machine",
            details=lacking,
            hint="Lower num_workers, num_cpus or num_gpus, or set ray_address to a larger cluster.",
        )
    threads = None if num_gpus else max(1, int(num_cpus if config.num_cpus else cluster.num_cpus / count))
    return Workers(count, num_cpus, num_gpus, threads)


def _receipts(job: PreparedJob, pending: list[Shard], workers: Workers) -> Iterator[tuple[Receipt, float]]:
    """The receipt of each shard as it is committed, and how long it took."""
    with _quiet():
        answered = ray.data.read_datasource(
            ShardDatasource(pending, job.config.storage_options), num_cpus=READ_CPUS
        ).map_batches(
            ShardWorker,
            fn_constructor_args=(_worker_job(job, workers),),
            batch_size=None,
            batch_format="pyarrow",
            zero_copy_batch=True,
            compute=ActorPoolStrategy(size=workers.count),
            num_cpus=workers.num_cpus,
            num_gpus=workers.num_gpus,
        )
    try:
        batches: Iterator[pa.Table] = iter(answered.iter_batches(batch_size=None, batch_format="pyarrow"))
        for batch in batches:
            for text, seconds in zip(batch["receipt"].to_pylist(), batch["seconds"].to_pylist(), strict=True):
                yield Receipt.from_json(text), seconds
    except (ray.exceptions.RayError, RuntimeError) as error:
        raise _job_failed(error) from error


def _worker_job(job: PreparedJob, workers: Workers) -> WorkerJob:
    config = job.config
    return WorkerJob(
        package=absolute(config.expert),
        package_sha256=job.package.digest,
        base_path=str(job.base_path),
        cache_dir=config.cache_dir,
        device=config.device,
        dtype=config.dtype,
        num_threads=workers.num_threads,
        batch_size=config.batch_size,
        max_batch_tokens=config.max_batch_tokens,
        options=job.options,
        columns=job.columns,
        seed=config.seed,
        output=job.output,
        part_format=job.part_format,
    )


def _after(first: Receipt, receipts: Iterator[tuple[Receipt, float]]) -> Iterator[Receipt]:
    yield first
    for receipt, _ in receipts:
        yield receipt


@contextmanager
def _quiet() -> Iterator[None]:
    """Datasets made in here show none of Ray Data's own progress: the job has one line of its own."""
    context = DataContext.get_current()
    names = ("enable_progress_bars", "print_on_execution_start")
    before = {name: getattr(context, name) for name in names}
    try:
        for name in names:
            setattr(context, name, False)
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)


def _job_failed(error: BaseException) -> ExpertError:
    ours = _cause_of_ours(error)
    lines = [line for line in str(ours or error).splitlines() if line.strip()]
    return JobFailedError(
        "the job failed; the parts that are committed stay",
        details=lines if ours is not None else lines[-3:],
        hint="Correct what is said above, and run the same command again: it continues where it stopped.",
    )


def _cause_of_ours(error: Any) -> ExpertError | None:
    """The error of this project that a worker raised, as Ray wraps it."""
    seen = 0
    while error is not None and seen < 20:
        if isinstance(error, ExpertError):
            return error
        error, seen = getattr(error, "cause", None) or error.__cause__, seen + 1
    return None
