"""The driver or a worker killed half way: every row once, and the same bytes as if undisturbed."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from pipeline import BatchResult, run_batch
from pipeline.batch import run_config
from pipeline.batch.config_file import load_config
from pipeline.batch.status import output_status
from pipeline.batch.verify import verify
from pipeline.cli import app
from pipeline.storage.local import LocalStorage
from tests.e2e.processes import BIN, descendants, running, wait_until

WORKER = "ray::MapWorker"


def num_parts(folder: Path) -> int:
    return len(list(folder.glob("part-*.parquet")))


def ids(folder: Path) -> list[str]:
    return [row for path in sorted(folder.glob("part-*.parquet")) for row in pq.read_table(path)["id"].to_pylist()]


def test_a_driver_killed_half_way_and_again(
    answered: BatchResult, job_options: dict[str, Any], questions: Path, tmp_path: Path
) -> None:
    killed, config = tmp_path / "killed", tmp_path / "job.yaml"
    options = {name: str(value) if isinstance(value, Path) else value for name, value in job_options.items()}
    del options["progress"]
    config.write_text(yaml.safe_dump({**options, "output": str(killed), "batch_size": 8, "ray_address": "local"}))
    with running([BIN / "expert", "run", config], tmp_path / "log") as driver:
        assert wait_until(lambda: num_parts(killed) >= 6 or driver.poll() is not None, seconds=150), "no progress"
        assert driver.poll() is None, (tmp_path / "log").read_text()
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait(timeout=30)
    left = {path.name: path.read_bytes() for path in killed.glob("part-*.parquet")}
    assert 6 <= len(left) < 13
    assert not (killed / "_SUCCESS").exists()
    status = output_status(LocalStorage(str(killed)), sleep=lambda _: pytest.fail("the driver's process is gone"))
    assert (status.lease.state, status.lease.pid) == ("stale", driver.pid)
    assert (status.complete, status.shards) == (False, 13)

    again = run_config(load_config(config), progress=False)
    # The orphaned worker may have committed another part before it ended; it is not computed again either.
    assert 0 < again.report.rows_this_run <= 200 - 16 * len(left)
    parts = sorted(killed.glob("part-*.parquet"))
    assert len(parts) == 13
    for path in parts:
        assert path.read_bytes() == Path(answered.output, path.name).read_bytes()
        assert path.read_bytes() == left.get(path.name, path.read_bytes()), "a committed part is never written again"
    assert ids(killed) == pq.read_table(questions)["id"].to_pylist()
    assert (killed / "_SUCCESS").exists()
    assert not (killed / "_attempts").exists()
    assert verify(LocalStorage(str(killed))).problems == ()

    complete = CliRunner().invoke(app, ["run", str(config)])
    assert complete.exit_code == 0, complete.stderr
    assert "already complete" in complete.stdout


def test_a_killed_worker_is_replaced_and_its_shard_answered_once(
    answered: BatchResult, job_options: dict[str, Any], tmp_path: Path
) -> None:
    output = tmp_path / "killed"
    others = set(descendants(os.getpid(), WORKER))  # of jobs that are over, and have not ended yet
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(run_batch, **job_options, batch_size=8, output=output)
        assert wait_until(lambda: num_parts(output) >= 2 or job.done(), seconds=150), "no progress"
        (worker,) = set(descendants(os.getpid(), WORKER)) - others
        os.kill(worker, signal.SIGKILL)
        result = job.result(timeout=150)
    assert result.report.errors == 0
    assert (output / "_SUCCESS").exists()
    for path in output.glob("part-*.parquet"):
        assert path.read_bytes() == Path(answered.output, path.name).read_bytes()
