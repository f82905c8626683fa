"""A real Ray of two cores, started once for the tests of this folder and ended with them."""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from pipeline import BatchResult, demo, run_batch
from pipeline.demo.questions import write_questions
from tests.e2e.heads import Head, ray_head

ROWS = 200


def end_tests(number: int, frame: FrameType | None) -> None:
    """What the tests do at SIGTERM; Ray leaves it as it is."""
    raise KeyboardInterrupt


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    import ray

    from pipeline.batch.cluster import connect

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_metrics_report_interval_ms", "1000")
        before = signal.signal(signal.SIGTERM, end_tests)
        connect("local")
        yield
        ray.shutdown()
        signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")  # it listens as Ray does, which is not what tests of our own clusters should find
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A cluster of its own, for what is submitted and deployed from outside."""
    with ray_head(tmp_path_factory.mktemp("head")) as started:
        yield started


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Parquet file of questions for the SQL expert."""
    return write_questions(tmp_path_factory.mktemp("questions") / "questions.parquet", ROWS)


@pytest.fixture(scope="session")
def job_options(questions: Path) -> dict[str, Any]:
    """What `run_batch` is given throughout: the demo's SQL expert, in small shards."""
    return {
        "dataset": str(questions),
        "expert": demo.package("sql"),
        "base_model": demo.BASE_MODEL,
        "shard_rows": 16,
        "progress": False,
    }


@pytest.fixture(scope="session")
def answered(cluster: None, job_options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> BatchResult:
    """That job, undisturbed; tests only read its output."""
    return run_batch(**job_options, output=tmp_path_factory.mktemp("answers") / "out")


@pytest.fixture
def copied(answered: BatchResult, tmp_path: Path) -> Path:
    """A copy of its output, to spoil."""
    return shutil.copytree(answered.output, tmp_path / "out")
