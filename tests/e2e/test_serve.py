"""The service as a whole: a real Ray Serve, real HTTP, replicas that are killed, and the command that starts it."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import Expert, demo
from pipeline.demo.questions import write_questions
from pipeline.serve.messages import Ask, Delta, Ended, Started
from tests.e2e.processes import BIN, descendants, listening_addresses, run, running, wait_until

LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
SCHEMA = "CREATE TABLE users (id INT, name TEXT, city TEXT);"
APPLICATION = "serve-tests"
LONG: dict[str, Any] = {"max_tokens": 800, "ignore_eos": True, "use_grammar": False, "stop": ["\0"]}
SECONDS = 120.0
CURL = shutil.which("curl") or "curl"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def post(url: str, body: dict[str, Any], *, seconds: float = SECONDS) -> dict[str, Any]:
    request = urllib.request.Request(  # noqa: S310  # our own server
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=seconds) as response:  # noqa: S310
        answer: dict[str, Any] = json.load(response)
        return answer


class Service:
    """The application of the demo's three experts, on the tests' own cluster."""

    def __init__(self, url: str, handle: Any) -> None:
        self.url = url
        self.handle = handle

    def stats(self) -> Any:
        return self.handle.stats.remote().result(timeout_s=SECONDS)

    def is_idle(self) -> bool:
        stats = self.stats()
        return not (stats.num_running or stats.num_waiting)

    async def events(self, ask: Ask) -> list[Any]:
        handle = self.handle.options(stream=True, multiplexed_model_id=ask.expert)
        return [event async for event in handle.ask.remote(ask)]


@pytest.fixture(scope="module")
def service(cluster: None) -> Iterator[Service]:
    from ray import serve

    from pipeline.serve.app import build_application, plan_service
    from pipeline.serve.config import ServeConfig

    port = free_port()
    plan = plan_service(
        ServeConfig.from_options(
            {
                "experts": [
                    {"package": str(demo.package(task)), "name": task, "pin": task == "sql"} for task in demo.TASKS
                ],
                "base_model": demo.BASE_MODEL,
                "max_resident_experts": 2,
                "dtype": "float32",
                "port": port,
            }
        )
    )
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    serve.run(build_application(plan), name=APPLICATION, route_prefix="/")
    yield Service(f"http://127.0.0.1:{port}", serve.get_deployment_handle(plan.groups[0].name, APPLICATION))
    serve.shutdown()


def test_http_answers_as_the_expert_in_this_process(service: Service, tmp_path: Path) -> None:
    """Rows of all three experts, sampled with seeds, at once: the same texts, token counts and reasons to end."""
    import pyarrow.parquet as pq

    asked: list[tuple[str, dict[str, Any]]] = []
    for task in demo.TASKS:
        rows = pq.read_table(write_questions(tmp_path / f"{task}.parquet", 12, task=task)).to_pylist()
        asked += [
            (task, {"prompt": row["prompt"], "schema": row["schema"], "seed": at, "temperature": 3.0, "max_tokens": 32})
            for at, row in enumerate(rows)
        ]

    async def ask_all() -> list[dict[str, Any]]:
        return await asyncio.gather(
            *(asyncio.to_thread(post, service.url, {"model": task, **row}) for task, row in asked)
        )

    found = asyncio.run(ask_all())
    wanted: list[Any] = []
    for task in demo.TASKS:
        with Expert.load(demo.package(task), base_model=demo.BASE_MODEL, dtype="float32", device="cpu") as expert:
            wanted += expert.generate_batch([row for one, row in asked if one == task])
    assert [one["choices"][0]["text"] for one in found] == [one.text for one in wanted]
    assert [one["choices"][0]["finish_reason"] for one in found] == [one.finish_reason for one in wanted]
    assert [one["usage"]["completion_tokens"] for one in found] == [one.completion_tokens for one in wanted]


def test_everything_listens_on_loopback_only(service: Service) -> None:
    """But for the port on which Serve's replicas call each other: Ray binds it everywhere, behind its token."""
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    replicas = set(descendants(os.getpid(), "ray::ServeReplica"))
    others = set(descendants(os.getpid(), "")) - replicas
    assert len(replicas) >= 2
    assert listening_addresses(others) <= LOOPBACK
    assert is_token_auth_enabled()


def test_a_handle_streams_and_a_cancelled_call_stops_the_engine(service: Service) -> None:
    async def leave() -> None:
        fields = {"prompt": "How many users are there?", "schema": SCHEMA}
        events = await service.events(Ask("whole", "sql", fields))
        assert isinstance(events[0], Started)
        assert isinstance(events[-1], Ended)
        arriving = service.handle.options(stream=True).ask.remote(Ask("long", "sql", fields, LONG, is_streamed=True))
        assert isinstance(await anext(arriving), Started)
        assert isinstance(await anext(arriving), Delta)
        arriving.cancel()

    asyncio.run(leave())
    before = service.stats().num_tokens_generated
    assert wait_until(service.is_idle, seconds=5)
    assert service.stats().num_tokens_generated - before < 700


def test_a_client_that_leaves_stops_the_engine(service: Service) -> None:
    body = json.dumps({"model": "sql", "prompt": "How many?", "stream": True, **LONG}).encode()
    with socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2])), timeout=SECONDS) as client:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert b"200" in client.recv(4096)
        assert not service.is_idle()
    assert wait_until(service.is_idle, seconds=5)
    assert service.stats().num_tokens_generated < 10_000


def test_experts_are_loaded_when_they_are_asked(service: Service) -> None:
    for task in ("cypher", "json", "cypher"):
        assert post(service.url, {"model": task, "prompt": "How many users are there?", "schema": SCHEMA})["choices"]
        resident = service.handle.resident.remote().result(timeout_s=SECONDS)
        assert set(resident) == {"sql", task}, "the pinned one stays"


def test_a_replica_whose_engine_died_is_replaced(service: Service) -> None:
    (old,) = descendants(os.getpid(), "ray::ServeReplica:serve-tests:ExpertReplica")
    os.kill(old, signal.SIGKILL)
    body = {"model": "sql", "prompt": "How many users are there?", "schema": SCHEMA}

    def is_answered() -> bool:
        try:
            return bool(post(service.url, body)["choices"])
        except (urllib.error.HTTPError, urllib.error.URLError):
            return False

    assert wait_until(is_answered, seconds=SECONDS)
    (new,) = descendants(os.getpid(), "ray::ServeReplica:serve-tests:ExpertReplica")
    assert new != old


# --- the command -----------------------------------------------------------------------------------------------------


def command(port: int, *more: str) -> list[str]:
    return [
        str(BIN / "expert"),
        "serve",
        *(str(demo.package(task)) for task in demo.TASKS),
        "--base-model",
        str(demo.BASE_MODEL),
        "--port",
        str(port),
        *more,
    ]


def test_one_command_answers_curl_and_drains_when_it_is_ended(tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    url = f"http://127.0.0.1:{port}"
    with running(command(port), log) as process:
        assert wait_until(lambda: url in log.read_text() or process.poll() is not None, seconds=120), log.read_text()
        assert process.poll() is None, log.read_text()
        body = {"model": "expert-sql", "prompt": "How many users are there per city?", "schema": SCHEMA}
        answer = subprocess.run(
            [CURL, "-sf", f"{url}/v1/completions", "-H", "Content-Type: application/json", "-d", json.dumps(body)],
            capture_output=True,
            check=True,
            timeout=SECONDS,
        )
        assert json.loads(answer.stdout)["choices"][0]["text"] == "SELECT city, COUNT(*) FROM users GROUP BY city"
        long = json.dumps({"model": "expert-sql", "prompt": "How many?", "stream": True, **LONG})
        with subprocess.Popen(
            [CURL, "-sfN", f"{url}/v1/completions", "-H", "Content-Type: application/json", "-d", long],
            stdout=subprocess.PIPE,
        ) as streaming:
            assert streaming.stdout is not None
            streaming.stdout.readline()
            process.send_signal(signal.SIGTERM)
            rest, _ = streaming.communicate(timeout=SECONDS)
        assert rest.decode().rstrip().endswith("data: [DONE]"), "what was begun is finished"
        assert process.wait(SECONDS) == 0
    said = log.read_text()
    assert "ending: what was begun is finished first" in said
    assert "Traceback" not in said
    assert "(raylet)" not in said
    assert len(said.splitlines()) == 2


def test_what_cannot_be_served_is_told_before_anything_starts(tmp_path: Path) -> None:
    done = run([BIN / "expert", "serve", tmp_path / "nothing.expert", "--port", free_port()], seconds=60)
    assert done.returncode != 0
    assert "PackageNotFoundError" in done.stderr
    open_to_all = run([BIN / "expert", "serve", demo.package("sql"), "--host", "0.0.0.0"], seconds=60)  # noqa: S104
    assert open_to_all.returncode == 2
    assert "lets other machines ask" in open_to_all.stderr
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run([BIN / "expert", "serve", demo.package("sql"), "--port", str(port)], seconds=60)
    assert done.returncode == 2
    assert f"port {port} of 127.0.0.1 cannot be listened on" in done.stderr
    assert "Traceback" not in done.stderr
