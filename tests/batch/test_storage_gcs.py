"""Create-only objects in Google Cloud Storage, through the real gcsfs, and a job that reads and writes there."""

import io
import itertools
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import demo
from pipeline.batch.config import BatchConfig
from pipeline.batch.drive import drive
from pipeline.batch.in_process import execute_here
from pipeline.batch.lease import acquire
from pipeline.batch.plan import open_experts, prepare
from pipeline.batch.progress import Phases, Progress
from pipeline.batch.run_record import RunRecorder
from pipeline.batch.verify import verify
from pipeline.errors import OutputError
from pipeline.storage import Storage, open_storage
from tests.batch.deaths import load_failing
from tests.gcs import ConditionalHandler, gcs_server

IDS = [f"row {number}" for number in range(10)]


@pytest.fixture(scope="module")
def options() -> Iterator[dict[str, Any]]:
    with gcs_server() as given:
        yield given


@pytest.fixture
def storage(options: dict[str, Any], request: pytest.FixtureRequest) -> Storage:
    return open_storage(f"gs://bucket/{request.node.name}/", options)


def test_the_first_writer_wins(storage: Storage) -> None:
    assert storage.list() == {}
    assert storage.create("a/b.txt", b"first")
    assert not storage.create("a/b.txt", b"second")
    assert storage.create("a/empty", b"")
    assert storage.read("a/b.txt") == b"first"
    assert storage.exists("a/b.txt")
    assert not storage.exists("a/c.txt")
    assert storage.list() == storage.list("a") == {"a/b.txt": 5, "a/empty": 0}
    assert pickle.loads(pickle.dumps(storage)).read("a/b.txt") == b"first"  # noqa: S301 - Ray carries it that way
    storage.replace("a/b.txt", b"third")
    assert storage.read("a/b.txt") == b"third"
    storage.remove_tree("a")
    storage.remove_tree("a")
    assert storage.list() == {}


@pytest.mark.filterwarnings(
    "ignore:Sending a large body directly:ResourceWarning"
)  # gcsfs's way, and aiohttp's word on it
def test_content_may_come_from_a_file(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"a" * 7_000_000)  # uploaded in pieces
    (tmp_path / "empty").touch()
    assert storage.create_from_file("a", str(tmp_path / "source"))
    assert not storage.create_from_file("a", str(tmp_path / "empty"))
    assert not storage.create_from_file("a", str(tmp_path / "source"))
    assert storage.list() == {"a": 7_000_000}


def test_racing_writers_have_one_winner(storage: Storage) -> None:
    for number in range(5):
        with ThreadPoolExecutor(6) as pool:
            won = list(pool.map(lambda i, n=number: storage.create(f"{n}", bytes([i]) * 100), range(6)))
        assert sum(won) == 1
        assert storage.read(f"{number}") == bytes([won.index(True)]) * 100


def test_an_object_that_is_there_after_a_failure_is_taken(storage: Storage) -> None:
    ConditionalHandler.loses.append(422)
    assert not storage.create("a", b"1")
    assert storage.read("a") == b"1"


def test_a_missing_object_is_an_error_of_ours(storage: Storage) -> None:
    with pytest.raises(OutputError, match="nothing cannot be read"):
        storage.read("nothing")


def test_a_job_is_answered_there_once_and_again_in_no_time(options: dict[str, Any]) -> None:
    sink = io.BytesIO()
    prompts = ["fail, row 4" if number == 4 else f"question {number}" for number in range(len(IDS))]
    pq.write_table(pa.table({"id": IDS, "prompt": prompts}), sink)
    fsspec.filesystem("gs", **options).pipe_file("bucket/in/x.parquet", sink.getvalue())
    config = BatchConfig.from_options(
        dataset="gs://bucket/in/*.parquet",
        expert=demo.package("sql"),
        base_model=demo.BASE_MODEL,
        output="gs://bucket/answers",
        storage_options=options,
        shard_rows=5,
    )
    answered = [run(config) for _ in range(2)]
    assert answered == [10, 0]
    storage = open_storage("gs://bucket/answers", options)
    parts = [name for name in storage.list() if name.startswith("part-")]
    assert [row for part in parts for row in pq.read_table(io.BytesIO(storage.read(part)))["id"].to_pylist()] == IDS
    found = verify(storage)
    assert (found.problems, found.rows, found.errors) == ((), 10, 1)


def run(config: BatchConfig) -> int:
    """Drive the job, with a worker in this process; how many rows were answered."""
    job, phases = prepare(config, open_experts(config)), Phases()
    now = itertools.count()
    lease = acquire(job.output.storage, seconds=60, clock=lambda: next(now), sleep=lambda _: None)
    execute = partial(execute_here, load=load_failing)
    _, counts = drive(job, lease, Progress(enabled=False), phases, RunRecorder(phases), execute=execute)
    lease.release()
    return 0 if counts is None else counts.rows
