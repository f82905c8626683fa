"""The gateway in the process of `expert serve`: its socket, its end, its log."""

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from pipeline.errors import ConfigError
from pipeline.metrics import MemoryMetrics
from pipeline.serve.api import GatewayJob
from pipeline.serve.config import ServeConfig
from pipeline.serve.front import Front, logging_to
from pipeline.serve.messages import Ask, Delta, Ended, Event, Started
from pipeline.serve.run import bound, run_service
from tests.serve.scripted import CARDS, ScriptedBackend, words

BODY = {"model": "sql", "prompt": "Who?"}


class Replicas(ScriptedBackend):
    """A scripted backend that says whether it was warmed up."""

    is_warm = False

    async def warm_up(self) -> None:
        self.is_warm = True

    async def is_ready(self) -> bool:
        return self.is_warm


def config(**more: Any) -> ServeConfig:
    return ServeConfig.from_options({"experts": [{"package": "sql.expert"}], **more})


@asynccontextmanager
async def started(backend: Replicas, **more: Any) -> AsyncIterator[tuple[Front, httpx.AsyncClient, MemoryMetrics]]:
    metrics = MemoryMetrics()
    front = Front(GatewayJob.of(config(**more), CARDS), backend, metrics)
    with bound("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        await front.start(listening)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=10, trust_env=False) as client:
            yield front, client, metrics
        await front.stop(0.0)


def gated(gate: asyncio.Event) -> Callable[[Ask], AsyncIterator[Event]]:
    """Begins, and ends when the gate is open."""

    async def script(_: Ask) -> AsyncIterator[Event]:
        yield Started(prompt_tokens=7)
        yield Delta("SELECT")
        await gate.wait()
        yield Delta(" 1")
        yield Ended("stop", 2)

    return script


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await test()

    asyncio.run(bounded())


def test_it_answers_and_counts_once_the_replicas_are_warm() -> None:
    async def check() -> None:
        backend = Replicas(words)
        async with started(backend) as (_, client, metrics):
            assert backend.is_warm
            assert (await client.get("/ready")).json() == {"status": "ready"}
            answer = await client.post("/v1/completions", json=BODY)
            assert answer.json()["choices"][0]["text"] == "SELECT * FROM users"
            assert answer.headers["x-request-id"]
            assert "server" not in answer.headers, "what runs behind it is nobody's business"
            assert metrics.value("expert_requests_total", expert="sql", status="200") == 1

    run(check)


@pytest.mark.parametrize("stream", [False, True])
def test_at_its_end_what_was_begun_is_finished_and_new_requests_are_refused(stream: bool) -> None:
    async def check() -> None:
        gate = asyncio.Event()
        async with started(Replicas(gated(gate))) as (front, client, _):
            begun = asyncio.create_task(client.post("/v1/completions", json={**BODY, "stream": stream}))
            await until(lambda: front.num_in_flight == 1)
            stopping = asyncio.create_task(front.stop(30.0))
            await asyncio.sleep(0)
            refused = await client.post("/v1/completions", json=BODY)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            assert not stopping.done()
            gate.set()
            await stopping
            assert " 1" in (await begun).text
            with pytest.raises(httpx.ConnectError):
                await client.post("/v1/completions", json=BODY)

    run(check)


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_not_finished_in_time_is_cut_off_and_told_so(stream: bool) -> None:
    async def check() -> None:
        backend = Replicas(gated(asyncio.Event()))
        async with started(backend) as (front, client, metrics):
            begun = asyncio.create_task(client.post("/v1/completions", json={**BODY, "stream": stream}))
            await until(lambda: backend.num_events == 2)
            await front.stop(0.1)
            answer = await begun
            assert "shutting_down" in answer.text
            assert answer.status_code == (200 if stream else 503)
            assert answer.headers["x-request-id"]
            assert backend.num_open == 0
            assert metrics.value("expert_errors_total", code="shutting_down") == 1

    run(check)


def test_a_port_that_is_taken_meanwhile_is_told_when_it_is_to_be_listened_to() -> None:
    async def check() -> None:
        with bound("127.0.0.1", 0) as first, bound("127.0.0.1", first.getsockname()[1]) as second:
            fronts = [Front(GatewayJob.of(config(), CARDS), Replicas(words), MemoryMetrics()) for _ in range(2)]
            await fronts[0].start(first)
            with pytest.raises(OSError, match="in use"):
                await fronts[1].start(second)
            await fronts[0].stop(0.0)
            await fronts[0].ended()

    run(check)


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * (80 << 10), b"HTTP/1.1 431 "),
        (b"GET /health HTTP/1.1\r\nHost: lo", b"HTTP/1.1 408 "),
        (b"", b"HTTP/1.1 408 "),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea", b"HTTP/1.1 200 "),
    ],
    ids=["large", "slow", "silent", "slow second"],
)
def test_heads_are_bounded_in_bytes_and_time(sent: bytes, told: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.serve.heads.HEAD_SECONDS", 0.3)

    async def check() -> None:
        async with started(Replicas(words)) as (_, client, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
            writer.write(sent)
            said = await reader.read()  # to the end: the connection is closed
            assert said.startswith(told)
            assert (b"408" in said) == (len(sent) < 100)
            writer.close()
            assert (await client.get("/health")).status_code == 200, "others are served"

    run(check)


def test_a_whole_body_after_a_head_has_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.serve.heads.HEAD_SECONDS", 0.2)

    async def check() -> None:
        async with started(Replicas(words)) as (_, client, _):
            for _ in range(2):  # and so has a connection that is kept
                body = json.dumps({**BODY, "prompt": "a" * (100 << 10)}).encode()

                async def slowly(body: bytes = body) -> AsyncIterator[bytes]:
                    yield body[:1000]
                    await asyncio.sleep(0.4)
                    yield body[1000:]

                headers = {"Content-Length": str(len(body)), "Content-Type": "application/json"}
                answer = await client.post("/v1/completions", content=slowly(), headers=headers)
                assert answer.status_code == 200, answer.text
                await asyncio.sleep(0.3)

    run(check)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def test_an_address_that_is_taken_is_refused_with_what_to_do() -> None:
    with bound("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1 cannot be listened on") as caught,
            bound("127.0.0.1", port),
        ):
            pass
    assert "--port" in caught.value.hint
    for host in ("nosuch.invalid", "203.0.113.7"):
        with pytest.raises(ConfigError, match=host) as caught, bound(host, 0):
            pass
        assert "--host" in caught.value.hint
    with bound("127.0.0.1", port) as again:
        assert again.getsockname()[1] == port


@pytest.mark.skipif(not socket.has_ipv6, reason="this machine has no IPv6")
def test_addresses_may_be_of_ipv6() -> None:
    with bound("::1", 0) as listening:
        assert listening.family == socket.AF_INET6
    with bound("[::1]", 0) as listening:
        assert listening.getsockname()[0] == "::1"


def test_several_gateways_are_for_a_cluster() -> None:
    with pytest.raises(ConfigError, match="gateways is 2") as caught:
        run_service(config(gateways=2), print)
    assert "serve run" in caught.value.hint


def test_the_log_is_a_file_and_nothing_else_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own, servers = logging.getLogger("pipeline.serve.exchange"), logging.getLogger("uvicorn.error")
    servers.setLevel(logging.CRITICAL)  # as other servers of this process have it
    with logging_to(tmp_path / "serve") as path:
        own.info("request %s", "abc")
        servers.warning("Invalid HTTP request received.")
    own.info("afterwards")
    logged = path.read_text()
    assert "pipeline.serve.exchange -- request abc" in logged
    assert "Invalid HTTP request" in logged
    assert "afterwards" not in logged
    assert capsys.readouterr() == ("", "")
