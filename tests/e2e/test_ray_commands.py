"""What Ray's own commands take, on a cluster of its own: `ray job submit`, `serve deploy` and `serve run`."""

import json
import signal
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import BatchResult, demo
from tests.collector import collecting
from tests.e2e.heads import Head
from tests.e2e.processes import BIN, PROJECT, run, running, wait_until
from tests.e2e.serving import SCHEMA, SECONDS, free_port

ANSWER = "SELECT city, COUNT(*) FROM users GROUP BY city"


def own_file(folder: Path, port: int) -> Path:
    """The project's file with what everyone has to change: the packages, the base model, the port."""
    content = yaml.safe_load((PROJECT / "configs/serve.yaml").read_text())
    content["http_options"]["port"] = port
    (application,) = content["applications"]
    application["args"] |= {
        "experts": [{"package": str(demo.package("sql")), "name": "sql", "pin": True}],
        "base_model": str(demo.BASE_MODEL),
        "port": port,
    }
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def answer(port: int) -> str | None:
    """What the service says to a question; None while it does not."""
    body = {"model": "sql", "prompt": "How many users are there per city?", "schema": SCHEMA}
    request = urllib.request.Request(  # loopback
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as response:  # noqa: S310  # loopback
            text: str = json.load(response)["choices"][0]["text"]
            return text
    except (urllib.error.URLError, OSError):
        return None


def serve(head: Head, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run([BIN / "serve", *arguments, "--address", head.dashboard], seconds=240, more=head.token)


def test_a_job_asks_the_cluster_that_it_finds_with_the_token_that_is_there(head: Head, tmp_path: Path) -> None:
    """RAY_AUTH_MODE says nothing, as in a new shell; Ray's own commands take the token, too."""
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(head.address)
    more = {"RAY_TMPDIR": str(tmp_path), "RAY_AUTH_TOKEN": head.token["RAY_AUTH_TOKEN"]}
    code = "from pipeline.batch.cluster import connect; print(connect().is_local)"
    found = run([BIN / "python", "-c", code], more=more)
    assert found.stdout == "False\n", found.stderr


@pytest.mark.timeout(600)
def test_serve_deploy_and_serve_run_take_the_projects_file(head: Head, tmp_path: Path) -> None:
    port = free_port()
    path = own_file(tmp_path, port)
    deployed = serve(head, "deploy", str(path))
    assert deployed.returncode == 0, deployed.stdout + deployed.stderr
    assert wait_until(lambda: answer(port) == ANSWER, seconds=180), serve(head, "status").stdout
    ended = serve(head, "shutdown", "-y")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert wait_until(lambda: answer(port) is None, seconds=180)

    log = tmp_path / "log"
    with running([BIN / "serve", "run", path, "--address", head.address], log, more=head.token) as process:
        assert wait_until(lambda: answer(port) == ANSWER or process.poll() is not None, seconds=180), log.read_text()
        assert process.poll() is None, log.read_text()
        process.send_signal(signal.SIGINT)
        process.wait(SECONDS)
    assert answer(port) is None


@pytest.mark.timeout(600)
def test_a_submitted_job_equals_a_local_run(
    answered: BatchResult, job_options: dict[str, Any], questions: Path, head: Head, tmp_path: Path
) -> None:
    """The README's line: the same parts, byte for byte; with a runtime environment that asks for spans."""
    with collecting() as collector:
        submit_job(head, job_options, questions, tmp_path, environment=collector.environment)
        shards = {one.attributes["expert.shard.index"] for one in collector.named("expert.shard")}
    for path in map(Path, answered.parts):
        assert path.read_bytes() == (tmp_path / "submitted" / path.name).read_bytes()
    assert (tmp_path / "submitted" / "_SUCCESS").exists()
    assert shards == set(range(len(answered.parts)))


def submit_job(
    head: Head, job_options: dict[str, Any], questions: Path, tmp_path: Path, *, environment: dict[str, str]
) -> None:
    """Submit one, and wait until it has succeeded."""
    submit = [
        *(BIN / "ray", "job", "submit", f"--address={head.dashboard}", f"--working-dir={PROJECT}"),
        *("--runtime-env-json", json.dumps({"env_vars": environment}), "--"),
    ]
    job = [
        *(BIN / "python", "jobs/batch.py", "--config", "configs/demo.yaml"),
        *(f"dataset={questions}", f"output={tmp_path / 'submitted'}", "num_workers=1"),
        f"shard_rows={job_options['shard_rows']}",
    ]
    submitted = run([*submit, *job], seconds=240, more=head.token)
    for _ in range(10):  # the dashboard is up a little before the agent that starts jobs
        if "No available agent" not in submitted.stdout + submitted.stderr:
            break
        submitted = run([*submit, *job], seconds=240, more=head.token)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert "succeeded" in submitted.stdout.lower()


def test_a_job_that_cannot_begin_fails_as_a_program() -> None:
    """So that Ray marks it as failed."""
    failed = run([BIN / "python", "jobs/batch.py", "--config", "configs/nothing.yaml"], seconds=240)
    assert failed.returncode != 0
    assert "ConfigError" in failed.stderr
