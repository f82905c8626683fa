"""The driver or a worker killed half way: every row once, and the same bytes as if undisturbed."""

import os
import re
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from pipeline import demo
from pipeline.batch.status import output_status
from pipeline.batch.verify import verify
from pipeline.storage.local import LocalStorage
from tests.e2e.processes import BIN, descendants, run, running, wait_until


@pytest.fixture
def config(questions: Path, tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    options = {
        "dataset": str(questions),
        "expert": str(demo.package("sql")),
        "base_model": str(demo.BASE_MODEL),
        "output": str(tmp_path / "killed"),
        "shard_rows": 16,
        "batch_size": 8,
        "ray_address": "local",
    }
    path.write_text(yaml.safe_dump(options))
    return path


def num_parts(folder: Path) -> int:
    return len(list(folder.glob("part-*.parquet")))


def ids(folder: Path) -> list[str]:
    return [row for path in sorted(folder.glob("part-*.parquet")) for row in pq.read_table(path)["id"].to_pylist()]


@pytest.mark.timeout(400)
def test_sigkill_half_way_and_again(config: Path, questions: Path, tmp_path: Path) -> None:
    command = [BIN / "expert", "run", config]
    killed = tmp_path / "killed"

    with running(command, tmp_path / "log") as driver:
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

    again = run(command)
    assert again.returncode == 0, again.stderr
    computed = re.search(r"([\d,]+) answered by this run", again.stdout)
    assert computed is not None, again.stdout
    # The orphaned worker may have committed another part before it ended; it is not computed again either.
    assert 0 < int(computed[1]) <= 200 - 16 * len(left)
    undisturbed = run([*command, f"output={tmp_path / 'undisturbed'}"])
    assert undisturbed.returncode == 0, undisturbed.stderr

    parts = sorted(killed.glob("part-*.parquet"))
    assert len(parts) == 13
    for path in parts:
        assert path.read_bytes() == (tmp_path / "undisturbed" / path.name).read_bytes()
        assert path.read_bytes() == left.get(path.name, path.read_bytes()), "a committed part is never written again"
    assert ids(killed) == pq.read_table(questions)["id"].to_pylist()
    assert (killed / "_SUCCESS").exists()
    assert not (killed / "_attempts").exists()

    complete = run(command)
    assert complete.returncode == 0, complete.stderr
    assert "already complete" in complete.stdout
    for output in (killed, tmp_path / "undisturbed"):
        assert verify(LocalStorage(str(output))).problems == ()


@pytest.mark.timeout(400)
def test_a_killed_worker_is_replaced_and_its_shard_answered_once(config: Path, questions: Path, tmp_path: Path) -> None:
    output = tmp_path / "killed"
    with running([BIN / "expert", "run", config], tmp_path / "log") as driver:
        assert wait_until(lambda: num_parts(output) >= 2 or driver.poll() is not None, seconds=150), "no progress"
        workers = descendants(driver.pid, "ray::MapWorker")
        assert len(workers) == 1, "the job has one worker"
        os.kill(workers[0], signal.SIGKILL)
        assert wait_until(lambda: driver.poll() is not None, seconds=150), (tmp_path / "log").read_text()
        assert driver.returncode == 0, (tmp_path / "log").read_text()
    assert ids(output) == pq.read_table(questions)["id"].to_pylist()
    assert (output / "_SUCCESS").exists()
    errors = [error for path in output.glob("part-*.parquet") for error in pq.read_table(path)["error"].to_pylist()]
    assert errors == [None] * 200
