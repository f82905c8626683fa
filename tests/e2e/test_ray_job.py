"""The README's `ray job submit` line on a cluster of its own: the same answers as a local run, byte for byte."""

from pathlib import Path
from typing import Any

import pytest

from pipeline import run_batch
from tests.e2e.heads import Head
from tests.e2e.processes import BIN, PROJECT, run


@pytest.mark.timeout(400)
@pytest.mark.usefixtures("cluster")
def test_a_submitted_job_equals_a_local_run(
    job_options: dict[str, Any], questions: Path, head: Head, tmp_path: Path
) -> None:
    local = run_batch(**job_options, output=tmp_path / "local")
    submit = [BIN / "ray", "job", "submit", f"--address={head.dashboard}", f"--working-dir={PROJECT}", "--"]
    job = [
        *(BIN / "python", "jobs/batch.py", "--config", "configs/demo.yaml"),
        *(f"dataset={questions}", f"output={tmp_path / 'submitted'}", "shard_rows=32", "num_workers=1"),
    ]
    submitted = run([*submit, *job], seconds=240, more=head.token)
    for _ in range(10):  # the dashboard is up a little before the agent that starts jobs
        if "No available agent" not in submitted.stdout + submitted.stderr:
            break
        submitted = run([*submit, *job], seconds=240, more=head.token)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert "succeeded" in submitted.stdout.lower()
    failed = run(
        [*submit, BIN / "python", "jobs/batch.py", "--config", "configs/nothing.yaml"], seconds=120, more=head.token
    )
    assert failed.returncode != 0
    assert "ConfigError" in failed.stdout
    for path in map(Path, local.parts):
        assert path.read_bytes() == (tmp_path / "submitted" / path.name).read_bytes()
    assert (tmp_path / "submitted" / "_SUCCESS").exists()
