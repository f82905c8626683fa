"""The service as a whole: a real Ray Serve, real HTTP, and what cannot be served."""

import asyncio
import json
import os
import socket
import urllib.request
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline import Expert, demo
from pipeline.demo.questions import write_questions
from pipeline.serve.messages import Ask, Delta, Ended, Started
from tests.e2e.processes import BIN, LOOPBACK, descendants, listening_addresses, run, wait_until
from tests.e2e.serving import FEW_RESIDENT, LONG, SCHEMA, SECONDS, Service, free_port


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(  # noqa: S310  # our own server
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=SECONDS) as response:  # noqa: S310
        answer: dict[str, Any] = json.load(response)
        return answer


@pytest.fixture(scope="module")
def service(shared_service: Service) -> Service:
    shared_service.offer(FEW_RESIDENT)
    return shared_service


def test_http_answers_as_the_expert_in_this_process(service: Service, tmp_path: Path) -> None:
    """Rows of all three experts, sampled with seeds, at once: the same texts, token counts and reasons to end."""
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
        asked = service.handle.options(stream=True, multiplexed_model_id="sql").ask.remote(Ask("whole", "sql", fields))
        events = [event async for event in asked]
        assert isinstance(events[0], Started)
        assert isinstance(events[-1], Ended)
        arriving = service.handle.options(stream=True).ask.remote(Ask("long", "sql", fields, LONG, is_streamed=True))
        assert isinstance(await anext(arriving), Started)
        assert isinstance(await anext(arriving), Delta)
        arriving.cancel()

    asyncio.run(leave())
    before = service.stats().num_tokens_generated
    assert wait_until(service.is_idle, seconds=SECONDS)
    assert service.stats().num_tokens_generated - before < 700


def test_a_client_that_leaves_stops_the_engine(service: Service) -> None:
    body = json.dumps({"model": "sql", "prompt": "How many?", "stream": True, **LONG}).encode()
    with socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2])), timeout=SECONDS) as client:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert b"200" in client.recv(4096)
        assert not service.is_idle()
    before = service.stats().num_tokens_generated
    assert wait_until(service.is_idle, seconds=SECONDS)
    assert service.stats().num_tokens_generated - before < 700


def test_experts_are_loaded_when_they_are_asked(service: Service) -> None:
    for task in ("cypher", "json", "cypher"):
        assert post(service.url, {"model": task, "prompt": "How many users are there?", "schema": SCHEMA})["choices"]
        resident = service.handle.resident.remote().result(timeout_s=SECONDS)
        assert set(resident) == {"sql", task}, "the pinned one stays"


def test_what_cannot_be_served_is_told_before_anything_starts(tmp_path: Path) -> None:
    done = run([BIN / "expert", "serve", tmp_path / "nothing.expert", "--port", free_port()], seconds=180)
    assert done.returncode != 0
    assert "PackageNotFoundError" in done.stderr
    open_to_all = run([BIN / "expert", "serve", demo.package("sql"), "--host", "0.0.0.0"], seconds=180)  # noqa: S104
    assert open_to_all.returncode == 2
    assert "lets other machines ask" in open_to_all.stderr
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run([BIN / "expert", "serve", demo.package("sql"), "--port", str(port)], seconds=180)
    assert done.returncode == 2
    assert f"port {port} of 127.0.0.1 cannot be listened on" in done.stderr
    assert "Traceback" not in done.stderr
