"""`ray start --head`, then the README's `ray job submit` line: the same answers as a local run, byte for byte."""

import secrets
import shutil
import socket
import tempfile
import urllib.error
import urllib.request
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest

from pipeline import run_batch
from tests.e2e.processes import BIN, PROJECT, run, running, wait_until


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(address: str) -> bool:
    """Whether the dashboard is up; that it asks for a token is an answer too, and `ray job submit` has one."""
    try:
        with urllib.request.urlopen(f"{address}/api/version", timeout=2):  # noqa: S310  # loopback
            return True
    except urllib.error.HTTPError as error:
        return error.code == HTTPStatus.UNAUTHORIZED
    except OSError:
        return False


@pytest.mark.timeout(400)
@pytest.mark.usefixtures("cluster")
def test_a_submitted_job_equals_a_local_run(job_options: dict[str, Any], questions: Path, tmp_path: Path) -> None:
    local = run_batch(**job_options, output=tmp_path / "local")
    session = tempfile.mkdtemp(prefix="ray-")  # sockets lie in it: a path of pytest's would be too long for them
    port = free_port()
    head = [
        *(BIN / "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"),
        *(f"--port={free_port()}", f"--dashboard-port={port}", "--num-cpus=2", "--disable-usage-stats"),
        f"--temp-dir={session}",  # where it writes down its address, too
        f"--dashboard-agent-listen-port={free_port()}",  # another cluster of these tests has the usual one
    ]
    address = f"http://127.0.0.1:{port}"
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with running(head, tmp_path / "head.log", more=token):
        assert wait_until(lambda: answers(address), seconds=90), (tmp_path / "head.log").read_text()
        submit = [BIN / "ray", "job", "submit", f"--address={address}", f"--working-dir={PROJECT}", "--"]
        job = [
            *(BIN / "python", "jobs/batch.py", "--config", "configs/demo.yaml"),
            *(f"dataset={questions}", f"output={tmp_path / 'submitted'}", "shard_rows=32", "num_workers=1"),
        ]
        submitted = run([*submit, *job], seconds=240, more=token)
        for _ in range(10):  # the dashboard is up a little before the agent that starts jobs
            if "No available agent" not in submitted.stdout + submitted.stderr:
                break
            submitted = run([*submit, *job], seconds=240, more=token)
        assert submitted.returncode == 0, submitted.stdout + submitted.stderr
        assert "succeeded" in submitted.stdout.lower()
        failed = run(
            [*submit, BIN / "python", "jobs/batch.py", "--config", "configs/nothing.yaml"], seconds=120, more=token
        )
        assert failed.returncode != 0
        assert "ConfigError" in failed.stdout
    shutil.rmtree(session, ignore_errors=True)
    for path in map(Path, local.parts):
        assert path.read_bytes() == (tmp_path / "submitted" / path.name).read_bytes()
    assert (tmp_path / "submitted" / "_SUCCESS").exists()
