"""The driver killed half way, and the same command again: every row once, and the same bytes as if undisturbed."""

import os
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from pipeline import demo
from tests.e2e.processes import BIN, run, running, wait_until


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


@pytest.mark.timeout(400)
def test_sigkill_half_way_and_again(config: Path, questions: Path, tmp_path: Path) -> None:
    command = [BIN / "expert", "run", config]
    killed = tmp_path / "killed"

    def num_parts() -> int:
        return len(list(killed.glob("part-*.parquet")))

    with running(command, tmp_path / "log") as driver:
        assert wait_until(lambda: num_parts() >= 6 or driver.poll() is not None, seconds=150), "no progress"
        assert driver.poll() is None, (tmp_path / "log").read_text()
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait(timeout=30)
    left = {path.name: path.read_bytes() for path in killed.glob("part-*.parquet")}
    assert 6 <= len(left) < 13
    assert not (killed / "_SUCCESS").exists()

    again = run(command)
    assert again.returncode == 0, again.stderr
    assert f"{200 - 16 * len(left)} answered by this run" in again.stdout
    undisturbed = run([*command, f"output={tmp_path / 'undisturbed'}"])
    assert undisturbed.returncode == 0, undisturbed.stderr

    parts = sorted(killed.glob("part-*.parquet"))
    assert len(parts) == 13
    for path in parts:
        assert path.read_bytes() == (tmp_path / "undisturbed" / path.name).read_bytes()
        assert path.read_bytes() == left.get(path.name, path.read_bytes()), "a committed part is never written again"
    ids = [row for path in parts for row in pq.read_table(path)["id"].to_pylist()]
    assert ids == pq.read_table(questions)["id"].to_pylist()
    assert (killed / "_SUCCESS").exists()
    assert not (killed / "_attempts").exists()

    complete = run(command)
    assert complete.returncode == 0, complete.stderr
    assert "already complete" in complete.stdout
