"""How far a job reads ahead of its workers, on a real Ray."""

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.data import DataContext
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
)

from pipeline import demo
from pipeline.batch.answering import EngineJob, LoadedEngine, Loader, Preparer
from pipeline.batch.cluster import connect
from pipeline.batch.config import BatchConfig
from pipeline.batch.echo import ECHO, EchoBuilder, EchoEngine, echo_preparers
from pipeline.batch.execute import Reading, answered_shards, execute, plan_workers, worker_job
from pipeline.batch.plan import PreparedJob, open_experts, prepare
from pipeline.batch.progress import Phases, Progress
from pipeline.batch.read_ahead import most_waiting
from pipeline.batch.receipts import Receipt
from pipeline.engine.requests import PreparedPrompt
from pipeline.engine.types import Completion, Request

pytestmark = [pytest.mark.usefixtures("cluster"), pytest.mark.timeout(240)]

ROWS = 200
READERS = 2  # of twelve shards at a time
LOADS_FOR = 8  # seconds: under the ten after which Ray Data takes a shard all the same
BUFFERED = 3  # shards of a task: two that are ready to be taken, and the one that it reads


class MarkingBuilder(EchoBuilder):
    """Leaves a file in a folder for each row that it prepares."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def prepare(self, *, prompt: Any = None, **fields: Any) -> PreparedPrompt:
        """What a row asks."""
        (self._folder / prompt).touch()
        return super().prepare(prompt=prompt, **fields)


class CountingEngine(EchoEngine):
    """Answers with how many files are in a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(seconds_per_row=0.01)
        self._folder = folder

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Answer every request, in order."""
        for answer in super().generate(requests):
            yield replace(answer, text=f"{len(list(self._folder.iterdir()))}")


class MeetingEngine(EchoEngine):
    """Answers nobody before two processes have asked, and then with its process's number."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Answer every request, in order."""
        (self._folder / f"{os.getpid()}").touch()
        give_up = time.monotonic() + 120
        while len(list(self._folder.iterdir())) < 2 and time.monotonic() < give_up:
            time.sleep(0.1)
        for answer in super().generate(requests):
            yield replace(answer, text=f"{os.getpid()}")


def load_slowly(_: EngineJob, folder: Path) -> LoadedEngine:
    """Come to an engine that counts, after a while."""
    time.sleep(LOADS_FOR)
    return LoadedEngine(CountingEngine(folder), {None: EchoBuilder()})


def load_meeting(_: EngineJob, folder: Path) -> LoadedEngine:
    """Come to an engine that waits for another one."""
    return LoadedEngine(MeetingEngine(folder), {None: EchoBuilder()})


def marking_preparers(_: EngineJob, folder: Path) -> Mapping[str | None, Preparer]:
    """What leaves a file for each row."""
    return {None: MarkingBuilder(folder)}


@pytest.fixture
def prompts() -> list[str]:
    return [f"row {number}" for number in range(ROWS)]


@pytest.fixture
def marks(tmp_path: Path) -> Path:
    """Where files are left."""
    (tmp_path / "marks").mkdir()
    return tmp_path / "marks"


def begun(folder: Path, prompts: list[str], **options: Any) -> PreparedJob:
    """A job of one row a shard, whose output is begun."""
    pq.write_table(pa.table({"prompt": prompts}), folder / "in.parquet")
    places = {"dataset": folder / "in.parquet", "output": folder / "out", "base_model": demo.BASE_MODEL}
    config = BatchConfig.from_options(expert=demo.package("sql"), shard_rows=1, **places, **options)
    job = prepare(config, open_experts(config))
    job.output.begin()
    return job


def finished(job: PreparedJob, folder: Path) -> list[dict[str, Any]]:
    """The rows of its output."""
    job.output.finish()
    return [row for part in sorted(folder.glob("out/part-*")) for row in pq.read_table(part).to_pylist()]


def test_what_is_read_and_waits_is_bounded_before_the_first_worker_is_up_and_after(
    tmp_path: Path, prompts: list[str], marks: Path
) -> None:
    job = begun(tmp_path, prompts, num_workers=1)
    workers = plan_workers(job.config, connect(None), ROWS)
    load = Loader(partial(load_slowly, folder=marks), partial(marking_preparers, folder=marks))
    told = worker_job(job, workers, is_resumed=False, load=load)
    receipts = answered_shards(job, list(job.plan.shards), workers, told, Reading(READERS, prepares=True))
    assert sum(Receipt.from_json(row["receipt"]).rows for row in receipts.iter_rows()) == ROWS

    rows = finished(job, tmp_path)
    assert [row["prompt"] for row in rows] == prompts
    ahead = [read - answered for answered, read in enumerate(sorted(int(row["text"]) for row in rows))]
    assert max(ahead) <= most_waiting(1) + workers.shards_sent + READERS * BUFFERED
    assert ahead[0] > workers.shards_sent + READERS * BUFFERED  # they were read while it loaded


def test_a_pool_that_may_grow_grows_where_shards_wait(tmp_path: Path, prompts: list[str], marks: Path) -> None:
    job = begun(tmp_path, prompts[:100], max_workers=2, num_cpus=0.5)
    load = Loader(partial(load_meeting, folder=marks), echo_preparers)
    execute(job, {}, Progress(enabled=False), Phases(), load=load)
    rows = finished(job, tmp_path)
    assert [row["prompt"] for row in rows] == prompts[:100]
    assert len({row["text"] for row in rows}) == 2


def test_the_bound_is_of_our_datasets_alone(tmp_path: Path) -> None:
    job = begun(tmp_path, ["a", "b"])
    workers = plan_workers(job.config, connect(None), 2)
    told = worker_job(job, workers, is_resumed=False, load=ECHO)
    before = DataContext.get_current().get_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY)
    ours = answered_shards(job, list(job.plan.shards), workers, told, Reading(1, prepares=False))
    assert DataContext.get_current().get_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY) == before
    policies = ours.context.get_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY)
    assert policies[:-1] == ENABLED_BACKPRESSURE_POLICIES
    assert policies[-1].keywords == {"most": most_waiting(1)}
