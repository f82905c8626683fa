"""Three experts over one base model answer Parquet on S3, submitted to a cluster of two nodes, and killed twice.

    python -m benchmarks.submitted_job

moto serves S3 on this machine. The job is submitted by `ray job submit` to `jobs/batch.py`; first its driver is killed,
then, in the job that is submitted again, a worker. In the end the output must be whole, in order, and verified, and
each row answered by the expert that it names.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import fsspec
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import typer
import yaml
from ray.cluster_utils import Cluster
from rich.console import Console

from pipeline import demo
from pipeline.batch.verify import verify
from pipeline.demo.questions import draw_questions
from pipeline.package import open_package
from pipeline.storage import Storage, open_storage

SHARD_ROWS = 16
TRIES = 20
PATIENCE = 900.0  # seconds for a step on a machine that does much else
_MOTO = """
import logging, sys
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = make_server("127.0.0.1", 0, DomainDispatcherApplication(create_backend_app), threaded=True)
print(server.server_port, flush=True)
server.serve_forever()
"""


def main(
    rows: Annotated[int, typer.Option(help="Questions of each expert.")] = 200,
) -> None:
    """Run it all, and say what happened."""
    console = Console(width=120)
    with tempfile.TemporaryDirectory(prefix="expert-submitted-") as name:
        moto = subprocess.Popen([sys.executable, "-c", _MOTO], stdout=subprocess.PIPE, text=True)  # noqa: S603
        cluster = None
        try:
            options = _storage_options(int(moto.stdout.readline()) if moto.stdout is not None else 0)
            tasks = _write_dataset(options, rows)
            cluster = Cluster(
                initialize_head=True,
                head_node_args={
                    "num_cpus": 1,
                    "include_dashboard": True,
                    "dashboard_port": _free_port(),
                    "dashboard_agent_listen_port": _free_port(),  # it is what starts jobs
                },
            )
            cluster.add_node(num_cpus=1)
            submit = _submission(Path(name), cluster, options)
            storage = open_storage("s3://bucket/answers", options)
            started = time.monotonic()
            _run_and_kill(submit, storage, 6, "jobs/batch.py")
            console.print(f"driver killed after {_num_parts(storage)} parts, {time.monotonic() - started:.0f} s")
            _run_and_kill(submit, storage, _num_parts(storage) + 6, "ray::MapWorker", waits=True)
            console.print(f"a worker killed in the second run, which went on: {time.monotonic() - started:.0f} s")
            console.print(_check(storage, options, tasks))
        finally:
            if cluster is not None:
                cluster.shutdown()
            moto.kill()
            moto.wait()


def _storage_options(port: int) -> dict[str, Any]:
    return {
        "key": "test",
        "secret": "test",
        "client_kwargs": {"endpoint_url": f"http://127.0.0.1:{port}", "region_name": "us-east-1"},
    }


def _write_dataset(options: Mapping[str, Any], rows: int) -> list[str]:
    """Questions for the demo's experts, in turn; `task` names the expert. Returns the tasks, row by row."""
    filesystem = fsspec.filesystem("s3", **options)
    filesystem.call_s3("create_bucket", Bucket="bucket")
    drawn = {task: list(draw_questions(task, rows, seed=3)) for task in demo.TASKS}
    table = pa.Table.from_pylist(
        [
            {"id": f"{task}-{at}", "prompt": drawn[task][at].prompt, "schema": drawn[task][at].schema, "task": task}
            for at in range(rows)
            for task in demo.TASKS
        ]
    )
    half = table.num_rows // 2
    for number, piece in enumerate((table.slice(0, half), table.slice(half))):
        sink = pa.BufferOutputStream()
        pq.write_table(piece, sink)
        filesystem.pipe_file(f"bucket/questions/{number}.parquet", sink.getvalue().to_pybytes())
    tasks: list[str] = table["task"].to_pylist()
    return tasks


def _submission(folder: Path, cluster: Any, options: Mapping[str, Any]) -> list[str]:
    """The command that submits the job."""
    config = {
        "dataset": "s3://bucket/questions/*.parquet",
        "experts": {task: str(demo.package(task)) for task in demo.TASKS},
        "columns": {"expert": "task"},
        "base_model": str(demo.BASE_MODEL),
        "output": "s3://bucket/answers",
        "storage_options": dict(options),
        "shard_rows": SHARD_ROWS,
        "num_workers": 2,
        "lease_seconds": 10,
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(config))
    ray = Path(sys.executable).with_name("ray")
    address = f"http://{cluster.webui_url}"
    submit = [str(ray), "job", "submit", f"--address={address}", f"--working-dir={Path(__file__).parent.parent}", "--"]
    return [*submit, sys.executable, "jobs/batch.py", "--config", str(path)]


def _run_and_kill(submit: list[str], storage: Storage, parts: int, victim: str, *, waits: bool = False) -> None:
    """Submit the job, and kill one of its processes when there are so many parts.

    Args:
        submit: The command.
        storage: The output.
        parts: So many.
        victim: What stands in the command line of the process.
        waits: Whether the job is to succeed all the same; else it is to fail.
    """
    for _ in range(TRIES):  # the dashboard is up a little before the agent that starts jobs
        job = subprocess.Popen(submit, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # noqa: S603
        _wait_until(lambda: _num_parts(storage) >= parts or job.poll() is not None)  # noqa: B023 - called at once
        if job.poll() is None:
            break
        output = job.communicate()[0]
        if "No available agent" not in output:
            raise RuntimeError(f"the job ended too early: {output}")
        time.sleep(3)
    os.kill(_find(victim), signal.SIGKILL)
    output = job.communicate(timeout=PATIENCE)[0]
    if (job.returncode == 0) != waits:
        raise RuntimeError(output)


def _find(victim: str) -> int:
    for process in psutil.Process().children(recursive=True):
        command = process.cmdline()
        is_submission = any(part == "submit" for part in command)
        if any(victim in part for part in command) and not is_submission and "/bin/sh" not in command[0]:
            return int(process.pid)
    raise RuntimeError(f"no process of {victim} is running")


def _check(storage: Storage, options: Mapping[str, Any], tasks: list[str]) -> str:
    found = verify(storage)
    filesystem = fsspec.filesystem("s3", **options)
    rows: list[dict[str, Any]] = []
    for name in sorted(name for name in storage.list() if name.startswith("part-")):
        with filesystem.open(f"bucket/answers/{name}") as file:
            rows.extend(pq.read_table(file).to_pylist())
    if found.problems or [row["task"] for row in rows] != tasks or found.duplicate_ids:
        raise RuntimeError(json.dumps({"problems": list(found.problems), "rows": len(rows)}))
    labels = {task: open_package(str(demo.package(task))).label for task in demo.TASKS}
    wrong = [row["id"] for row in rows if row["error"] is not None or row["expert"] != labels[row["task"]]]
    if wrong:
        raise RuntimeError(f"not answered by the expert they name: {wrong[:8]}")
    return f"{found.rows} rows in {found.parts} parts: verified, in order, each answered by its own expert"


def _num_parts(storage: Storage) -> int:
    return sum(name.startswith("part-") for name in storage.list())


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError("it takes too long")
        time.sleep(0.5)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    typer.run(main)
