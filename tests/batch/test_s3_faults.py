"""Jobs that read from and write to S3, as moto serves it: with faults, two drivers, retries and overwriting."""

import io
import itertools
import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import demo
from pipeline.batch.answering import Loader
from pipeline.batch.config import BatchConfig
from pipeline.batch.drive import drive
from pipeline.batch.echo import ECHO
from pipeline.batch.in_process import execute_here
from pipeline.batch.lease import acquire
from pipeline.batch.plan import OpenExperts, open_experts, prepare
from pipeline.batch.progress import Phases, Progress
from pipeline.batch.run_record import RunRecorder
from pipeline.batch.verify import verify
from pipeline.errors import BatchError, FingerprintError, OutputInUseError
from pipeline.storage import Storage, open_storage
from tests.batch.deaths import load_failing
from tests.batch.moto_s3 import Fault, FaultyS3, faulty_s3
from tests.batch.outputs import contents
from tests.batch.test_commit_machine import CrashError, MortalStorage

PROMPTS = ["fail, row 4" if number == 4 else f"question {number}" for number in range(10)]


@pytest.fixture(scope="module")
def server() -> Iterator[FaultyS3]:
    with faulty_s3() as started:
        filesystem = fsspec.filesystem("s3", **started.options)
        for name, prompts in (("in", PROMPTS), ("other", PROMPTS[:4])):
            table = pa.table({"id": [f"row {number}" for number in range(len(prompts))], "prompt": prompts})
            sink = io.BytesIO()
            pq.write_table(table, sink)
            filesystem.pipe_file(f"bucket/{name}/x.parquet", sink.getvalue())
        yield started


@pytest.fixture(scope="module")
def opened(server: FaultyS3) -> OpenExperts:
    return open_experts(config(server, "any"))


@pytest.fixture(scope="module")
def undisturbed(server: FaultyS3, opened: OpenExperts) -> dict[str, bytes]:
    run(config(server, "undisturbed"), opened)
    return answers(storage_of(server, "undisturbed"))


def config(server: FaultyS3, output: str, **more: Any) -> BatchConfig:
    options = {"dataset": "s3://bucket/in/*.parquet", "shard_rows": 5, **more}
    return BatchConfig.from_options(
        expert=demo.package("sql"),
        base_model=demo.BASE_MODEL,
        output=f"s3://bucket/{output}",
        storage_options=server.options,
        **options,
    )


def storage_of(server: FaultyS3, output: str) -> Storage:
    return open_storage(f"s3://bucket/{output}", server.options)


def run(job_config: BatchConfig, opened: OpenExperts, load: Loader = load_failing, wrap: Any = None) -> dict[str, Any]:
    """Drive a job as `run_batch` does, with a worker in this process; `wrap` stands between it and the storage."""
    job, phases = prepare(job_config, opened), Phases()
    if wrap is not None:
        object.__setattr__(job.output, "storage", wrap(job.output.storage))
    recorder = RunRecorder(phases)
    now = itertools.count()  # whoever died before is this process, too: it takes a minute of no real time to see it
    lease = acquire(job.output.storage, seconds=60, clock=lambda: next(now), sleep=lambda _: None)
    execute = partial(execute_here, load=load)
    manifest, _ = drive(job, lease, Progress(enabled=False), phases, recorder, execute=execute)
    lease.release()
    return manifest


def answers(storage: Storage) -> dict[str, bytes]:
    return {name: data for name, data in contents(storage).items() if not name.startswith("_runs/")}


@pytest.mark.parametrize("seed", range(2))
def test_a_store_that_fails_and_loses_answers_costs_time_and_nothing_else(
    server: FaultyS3, opened: OpenExperts, undisturbed: dict[str, bytes], seed: int
) -> None:
    chooser = random.Random(seed)
    kinds: list[Fault] = ["error", "lost", "slow", "short"]

    def choose(method: str, _: str) -> Fault | None:
        fault = chooser.choice(kinds) if chooser.random() < 0.2 else None
        return "slow" if fault == "short" and method != "GET" else fault

    output, tries = f"faults-{seed}", 0
    server.met.clear()
    server.choose = choose
    try:
        while tries < 30:
            tries += 1
            try:
                run(config(server, output), opened)
                break
            except BatchError:
                continue
    finally:
        server.choose = lambda *_: None
    assert len(server.met) > 5
    assert answers(storage_of(server, output)) == undisturbed
    assert verify(storage_of(server, output)).problems == ()


def test_a_second_driver_is_refused_on_s3_and_takes_over_when_the_first_is_silent(server: FaultyS3) -> None:
    storage, other = storage_of(server, "leased"), storage_of(server, "leased")
    first = acquire(storage, seconds=60)
    now = 0.0

    def wait_beating(seconds: float) -> None:
        nonlocal now
        now += seconds
        first.renew()

    def wait(seconds: float) -> None:
        nonlocal now
        now += seconds

    # The first one's process is this one, and alive; it seems to be on another machine.
    from_elsewhere(storage)
    with pytest.raises(OutputInUseError, match="another driver is writing"):
        acquire(other, seconds=60, clock=lambda: now, sleep=wait_beating)
    from_elsewhere(storage)
    second = acquire(other, seconds=60, clock=lambda: now, sleep=wait)
    assert now >= 60
    assert (first.number, second.number) == (1, 2)
    second.release()
    assert acquire(storage, seconds=60).number == 3


def from_elsewhere(storage: Storage) -> None:
    """Change the machine in the lease that counts, as if its owner were on another one."""
    name = max(storage.list("_lease"))
    here = storage.read(name)
    machine = b'"machine": "'
    storage.replace(name, here.replace(machine, machine + b"not ", 1))


def test_rows_with_errors_are_answered_again_on_s3_whatever_dies(server: FaultyS3, opened: OpenExperts) -> None:
    run(config(server, "retried"), opened)
    for operation in (24, 32, 40):
        mortal = partial(MortalStorage, operation=operation, moment="after")
        with pytest.raises(CrashError):
            run(config(server, "retried", retry_errors=True), opened, ECHO, wrap=mortal)
    manifest = run(config(server, "retried", retry_errors=True), opened, ECHO)
    assert manifest["errors"] == 0
    found = verify(storage_of(server, "retried"))
    assert (found.problems, found.rows, found.errors) == ((), len(PROMPTS), 0)
    assert not storage_of(server, "retried").list("_retry")


def test_another_job_is_replaced_on_s3_whatever_dies(
    server: FaultyS3, opened: OpenExperts, undisturbed: dict[str, bytes]
) -> None:
    run(config(server, "replaced", dataset="s3://bucket/other/*.parquet"), opened)
    with pytest.raises(FingerprintError):
        run(config(server, "replaced"), opened)
    for operation in (12, 24):
        mortal = partial(MortalStorage, operation=operation, moment="before")
        with pytest.raises(CrashError):
            run(config(server, "replaced", overwrite=True), opened, wrap=mortal)
    run(config(server, "replaced", overwrite=True), opened)
    assert answers(storage_of(server, "replaced")) == undisturbed
