"""Running the shards of a job on Ray Data."""

import logging
import math
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy
from ray.data.exceptions import ExecutionTimeoutError

from pipeline.batch.answering import EXPERTS, EngineJob, Loader
from pipeline.batch.blocks import ONE_ROW_A_BLOCK, ShardDatasource, plan_runs
from pipeline.batch.cluster import Cluster, connect
from pipeline.batch.config import BatchConfig
from pipeline.batch.error_limits import ErrorTally
from pipeline.batch.metrics import JobMetrics
from pipeline.batch.plan import PreparedJob, digest_of
from pipeline.batch.preparing import PrepareJob
from pipeline.batch.progress import Phases, Progress
from pipeline.batch.read_ahead import most_waiting, read_at_most
from pipeline.batch.receipts import Receipt
from pipeline.batch.run_record import RunRecorder
from pipeline.batch.shard_stats import ShardStats
from pipeline.batch.shards import Shard
from pipeline.batch.worker import ShardWorker, WorkerJob
from pipeline.cluster import takes_gpu
from pipeline.engine.together import default_batch_size
from pipeline.errors import ConfigError, ExpertError, JobFailedError
from pipeline.ray_metrics import RayMetrics

logger = logging.getLogger(__name__)

READS_PER_WORKER = 2  # so that one opens its next file while shards of the other are taken; see `read_ahead.py`
PREPARES_PER_WORKER = 4  # at most, where they are also prepared: each a process with a tokenizer, and a core's work
MOST_IN_FLIGHT = 8  # shards of a worker, unless told otherwise: what is in flight is done again when it dies
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
    """How many workers, and what each is given.

    Args:
        count: Workers at the start.
        num_cpus: CPU cores that each reserves.
        num_gpus: GPUs that each reserves.
        num_threads: Threads that each computes with; None for torch's own number.
        most: Workers at most; more than `count` are added while shards wait.
        shards_in_flight: Shards that each answers at a time.
    """

    count: int
    num_cpus: float
    num_gpus: float
    num_threads: int | None
    most: int = 1
    shards_in_flight: int = 2

    @property
    def shards_sent(self) -> int:
        """Shards that each is sent at a time: one waits beside those that are answered.

        Ray Data adds workers where 1.75 shards are sent for each that is answered.
        """
        return 2 * self.shards_in_flight if self.most > self.count else self.shards_in_flight + 1


@dataclass(frozen=True)
class Reading:
    """How shards are read for workers.

    Args:
        num_tasks: Tasks that read at a time.
        prepares: Whether they also prepare the rows.
    """

    num_tasks: int
    prepares: bool


def execute(
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
    """Answer every shard that is not done yet.

    Args:
        job: The job.
        done: Receipts of committed shards, by shard.
        progress: Shows how far it is.
        phases: Time until the first shard is begun counts as `start`, the rest as `run`.
        on_receipt: Called with the receipt of each shard that is answered; what it raises ends the job.
        recorder: Takes down what this run does.
        is_resumed: Whether the output was begun by another run.
        load: How workers come to their engines.

    Raises:
        ConfigError: The workers do not fit the cluster.
        JobFailedError: Workers failed.
        TooManyErrorsError: More rows have errors than the job allows.
    """
    pending = [shard for shard in job.plan.shards if shard.index not in done]
    if not pending:
        return RunCounts()
    rows, tokens = 0, 0
    already = list(done.values())
    tally = ErrorTally(job, already)
    with phases.phase("start"):
        cluster = connect(job.config.ray_address)
        workers = plan_workers(job.config, cluster, len(pending))
        reading = plan_reading(job.config, cluster, workers, is_mending=job.output.mends is not None)
        told = worker_job(job, workers, is_resumed=is_resumed, load=load)
        receipts = _receipts(job, pending, workers, told, reading)
    rows_done, errors_done = sum(item.rows for item in already), sum(item.errors for item in already)
    if recorder is not None:
        recorder.plan_workers(workers.most)
    experts = ", ".join(expert.label for expert in job.experts)
    metrics = JobMetrics(RayMetrics(), job=digest_of(job.output.fingerprint)[:12], expert=experts)
    progress.tell(metrics.show)
    progress.start(len(job.plan.shards), len(already), job.plan.num_rows, rows_done, errors_done, workers.most)
    try:
        with progress.ticking(), closing(receipts):
            with phases.phase("start"):
                first, first_stats = next(receipts)
            # The first shard was answered before its receipt came: that was running, not starting.
            phases.move(first_stats.seconds, "start", "run")
            progress.began(first_stats.seconds)
            with phases.phase("run"):
                for receipt, stats in chain([(first, first_stats)], receipts):
                    if recorder is not None:
                        recorder.add(receipt, stats)
                    metrics.count(receipt)
                    progress.update(receipt, worker=stats.worker, seconds=stats.seconds)
                    on_receipt(receipt)
                    rows += receipt.rows
                    tokens += receipt.completion_tokens
                    tally.add(receipt)
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
        num_gpus = 1.0 if cluster.num_gpus >= 1 and takes_gpu(config.device) else 0.0
    count = config.num_workers or (max(1, int(cluster.num_gpus // num_gpus)) if num_gpus else 1)
    if config.max_workers is not None and config.num_workers is None:
        count = 1
    most = config.max_workers or count
    num_cpus = 1.0 if config.num_cpus is None else config.num_cpus
    room = {"CPU": (most * num_cpus, cluster.num_cpus), "GPU": (most * num_gpus, cluster.num_gpus)}
    lacking = [
        f"{name}: {wanted:g} wanted, {there:g} there" for name, (wanted, there) in room.items() if wanted > there
    ]
    if lacking and not cluster.is_local:
        # A cluster with an autoscaler may grow to them; Ray waits until it has.
        logger.warning("%d workers do not fit the cluster as it is (%s); waiting", most, ", ".join(lacking))
    elif lacking:
        raise ConfigError(
            f"{most} workers do not fit this machine",
            details=lacking,
            hint="Lower num_workers, max_workers, num_cpus or num_gpus, or set ray_address to a larger cluster.",
        )
    most = min(most, num_shards)
    threads = None if num_gpus else max(1, int(num_cpus if config.num_cpus else cluster.num_cpus / most))
    in_flight = _shards_in_flight(config, num_gpus, num_shards // most)
    return Workers(min(count, most), num_cpus, num_gpus, threads, most, in_flight)


def _shards_in_flight(config: BatchConfig, num_gpus: float, num_shards_each: int) -> int:
    """Shards that a worker answers at a time: two at least, so that one is answered while another is written.

    Small shards need more to fill the batch. Where there are few, a worker leaves some to those that start later.
    """
    if config.shards_in_flight is not None:
        return config.shards_in_flight
    kind = "cuda" if num_gpus and takes_gpu(config.device) else "cpu"  # the worker sees no other GPU than Ray's
    batch_size = config.batch_size or default_batch_size(kind)
    wanted = 1 + math.ceil(batch_size / config.shard_rows)
    return max(2, min(MOST_IN_FLIGHT, wanted, num_shards_each // 2))


def plan_reading(config: BatchConfig, cluster: Cluster, workers: Workers, *, is_mending: bool = False) -> Reading:
    """How shards are read for workers, and who prepares them.

    Tasks that prepare compute, so that there are no more of them than cores which no worker reserves, and one where
    there is none. They reserve nothing all the same: one that waits, for a worker to take what it has, would keep its
    core from the worker that is to be started there.

    Args:
        config: The job's.
        cluster: Where it runs.
        workers: From `plan_workers`.
        is_mending: Whether only rows with an error are answered again: too few to load a tokenizer for, unless told to.
    """
    is_wanted = config.prepare == "tasks" or (config.prepare == "auto" and workers.num_gpus > 0 and not is_mending)
    if not is_wanted:
        return Reading(READS_PER_WORKER * workers.most, prepares=False)
    reserved = workers.most * workers.num_cpus
    is_there = reserved <= cluster.num_cpus and workers.most * workers.num_gpus <= cluster.num_gpus
    # Of a cluster that is to grow first, nobody knows the cores.
    free = int(cluster.num_cpus - reserved) if is_there else READS_PER_WORKER * workers.most
    return Reading(max(1, min(PREPARES_PER_WORKER * workers.most, free)), prepares=True)


def _receipts(
    job: PreparedJob, pending: list[Shard], workers: Workers, told: WorkerJob, reading: Reading
) -> Generator[tuple[Receipt, ShardStats], None, None]:
    """The receipt of each shard as it is committed, and how it was answered."""
    answered = answered_shards(job, pending, workers, told, reading)
    try:
        batches: Iterator[pa.Table] = iter(answered.iter_batches(batch_size=None, batch_format="pyarrow"))
        for batch in batches:
            for text, stats in zip(batch["receipt"].to_pylist(), batch["stats"].to_pylist(), strict=True):
                yield Receipt.from_json(text), ShardStats.from_json(stats)
    except (ExpertError, ray.exceptions.RayError, ExecutionTimeoutError, RuntimeError) as error:
        raise _job_failed(error) from error


def answered_shards(
    job: PreparedJob, pending: list[Shard], workers: Workers, told: WorkerJob, reading: Reading
) -> ray.data.Dataset:
    """The dataset of a job's receipts and stats, a row a shard; nothing runs before it is iterated.

    Args:
        job: The job.
        pending: Its shards that are still to be answered.
        workers: From `plan_workers`.
        told: From `worker_job`.
        reading: From `plan_reading`.
    """
    runs = plan_runs(pending, reading.num_tasks)
    prepare = prepare_job(job, told.load) if reading.prepares else None
    with quiet(**ONE_ROW_A_BLOCK), read_at_most(most_waiting(workers.most)):
        answered: ray.data.Dataset = ray.data.read_datasource(
            ShardDatasource(runs, job.config.storage_options, job.kept, prepare),
            num_cpus=0,  # it must find room beside workers that hold every core; see `plan_reading`
            compute=TaskPoolStrategy(size=min(reading.num_tasks, len(runs))),
            override_num_blocks=len(runs),  # Ray Data would cut the blocks of a short plan further
        ).map_batches(
            ShardWorker,
            fn_constructor_args=(told,),
            batch_size=1,  # a block; for workers with GPUs, Ray Data takes no None
            batch_format="pyarrow",
            zero_copy_batch=True,
            compute=ActorPoolStrategy(
                min_size=workers.count,
                max_size=workers.most,
                max_concurrent_calls_per_actor=workers.shards_in_flight,
                max_tasks_in_flight_per_actor=workers.shards_sent,
                enable_true_multi_threading=True,  # the engine is made for many threads
            ),
            num_cpus=workers.num_cpus,
            num_gpus=workers.num_gpus,
        )
    return answered


def worker_job(job: PreparedJob, workers: Workers, *, is_resumed: bool, load: Loader) -> WorkerJob:
    """What each worker of a job is told.

    Args:
        job: The job.
        workers: What each is given.
        is_resumed: Whether the output was begun by another run.
        load: How workers come to their engines.
    """
    return WorkerJob(
        engine=engine_job(job, workers.num_threads),
        output=job.output,
        part_format=job.part_format,
        progress_timeout=job.config.progress_timeout,
        is_resumed=is_resumed,
        load=load,
        openai=job.openai,
        kept=job.kept,
    )


def engine_job(job: PreparedJob, num_threads: int | None) -> EngineJob:
    """What the engines of a job are, and how rows become their requests.

    Args:
        job: The job.
        num_threads: Threads to compute with on a CPU; None for torch's own number.
    """
    config = job.config
    return EngineJob(
        experts=job.experts,
        base_place=job.base_place,
        columns=job.columns,
        prompt_template=config.prompt_template,
        seed=config.seed,
        cache_dir=config.cache_dir,
        device=config.device,
        dtype=config.dtype,
        quantization=config.quantization,
        num_threads=num_threads,
        engine=config.engine,
        batch_size=config.batch_size,
        max_batch_tokens=config.max_batch_tokens,
        kv_cache_bytes=config.kv_cache_bytes,
        storage_options={
            place: config.storage_options_of(place)
            for place in (job.base_place, *(expert.package for expert in job.experts))
        },
    )


def prepare_job(job: PreparedJob, load: Loader) -> PrepareJob:
    """What each task is told that prepares rows for workers.

    Args:
        job: The job.
        load: How it comes to what it prepares with.
    """
    return PrepareJob(
        key=str(uuid.uuid4()),
        engine=engine_job(job, num_threads=1),
        part_format=job.part_format,
        load=load.preparers,
        mends=job.output if job.output.mends is not None else None,
        progress_timeout=job.config.progress_timeout,
        openai=job.openai,
        kept=job.kept,
    )


@contextmanager
def quiet(**more: Any) -> Iterator[None]:
    """Datasets made in here show none of Ray Data's own progress, and hand our errors back.

    Args:
        more: Other settings of Ray Data's context.
    """
    context = DataContext.get_current()
    settings = {**QUIET, **more}
    before = {name: getattr(context, name) for name in settings}
    try:
        for name, value in settings.items():
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
