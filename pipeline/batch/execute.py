"""Running the shards of a job on Ray Data."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy
from ray.data.exceptions import ExecutionTimeoutError

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

READS_PER_WORKER = 2  # shards are read ahead of the workers, under Ray Data's own back-pressure
QUIET = {
    "enable_progress_bars": False,
    "print_on_execution_start": False,
    "raise_original_map_exception": True,  # our own errors come back as they are
    "execution_no_progress_timeout_s": -1,  # a long shard is not a hung job
}


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
        workers = plan_workers(job.config, cluster, len(pending))
        receipts = _receipts(job, pending, workers)
    already = list(done.values())
    rows_done, errors_done = sum(item.rows for item in already), sum(item.errors for item in already)
    progress.start(len(job.plan.shards), len(already), job.plan.num_rows, rows_done, errors_done)
    try:
        with progress.ticking():
            with phases.phase("start"):
                first, seconds = next(receipts)
            # The first shard was answered before its receipt came: that was running, not starting.
            phases.move(seconds, "start", "run")
            progress.began(seconds)
            with phases.phase("run"):
                for receipt, _ in chain([(first, seconds)], receipts):
                    progress.update(receipt)
                    rows += receipt.rows
                    tokens += receipt.completion_tokens
    finally:
        progress.close()
    return RunCounts(rows, tokens)


def plan_workers(config: BatchConfig, cluster: Cluster, num_shards: int) -> Workers:
    """How many workers a job gets, at most one a shard, and what each reserves.

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
    count = min(count, num_shards)
    threads = None if num_gpus else max(1, int(num_cpus if config.num_cpus else cluster.num_cpus / count))
    return Workers(count, num_cpus, num_gpus, threads)


def _receipts(job: PreparedJob, pending: list[Shard], workers: Workers) -> Iterator[tuple[Receipt, float]]:
    """The receipt of each shard as it is committed, and how long it took."""
    with quiet():
        answered = ray.data.read_datasource(
            ShardDatasource(pending, job.config.storage_options),
            num_cpus=0,  # reading waits for storage; it must find room beside workers that hold every core
            compute=TaskPoolStrategy(size=min(READS_PER_WORKER * workers.count, len(pending))),
            override_num_blocks=len(pending),  # Ray Data would cut the blocks of a short plan further
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
    except (ExpertError, ray.exceptions.RayError, ExecutionTimeoutError, RuntimeError) as error:
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
        quantization=config.quantization,
        num_threads=workers.num_threads,
        engine=config.engine,
        batch_size=config.batch_size,
        max_batch_tokens=config.max_batch_tokens,
        kv_cache_bytes=config.kv_cache_bytes,
        options=job.options,
        columns=job.columns,
        seed=config.seed,
        output=job.output,
        part_format=job.part_format,
        openai=job.openai,
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Datasets made in here show none of Ray Data's own progress, and hand our errors back."""
    context = DataContext.get_current()
    before = {name: getattr(context, name) for name in QUIET}
    try:
        for name, value in QUIET.items():
            setattr(context, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)


def _job_failed(error: BaseException) -> ExpertError:
    ours = _cause_of_ours(error)
    lines = [line for line in str(error).splitlines() if line.strip()][-3:]
    if ours is not None:
        lines = [f"{type(ours).__name__}: {ours.message}", *ours.details, f"Fix: {ours.hint}"]
    return JobFailedError(
        "the job failed; the parts that are committed stay",
        details=lines,
        hint="Correct what is said above, and run the same command again: it continues where it stopped.",
    )


def _cause_of_ours(error: Any) -> ExpertError | None:
    """The error of this project that a worker raised, as Ray wraps it: an error that is both Ray's and ours."""
    for _ in range(20):
        if error is None:
            return None
        cause = getattr(error, "cause", None)
        if isinstance(error, ExpertError) and cause is None:
            return error
        error = cause or error.__cause__
    return None
