"""What clients notice of replicas that are killed, of deployments and of scaling: as little as can be."""

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI

from benchmarks.replies import Reply, ask, stream_events, text_of
from pipeline import demo
from tests.e2e.processes import wait_until
from tests.e2e.serving import LONG, SCHEMA, SECONDS, Load, Service, options

QUESTIONS = ("How many users are there per city?", "List the name of all users.", "How many users are there?")
BATCH_SIZE = 4  # so that requests wait
SHARE = 0.2  # of a core, for each replica: two of them and their successors fit
FIELDS = options(batch_size=BATCH_SIZE, replicas={"num_cpus": SHARE})


def body(number: int, **more: Any) -> dict[str, Any]:
    """One of many requests; the same number asks the same."""
    task = demo.TASKS[number % len(demo.TASKS)]
    question = QUESTIONS[number // len(demo.TASKS) % len(QUESTIONS)]
    return {"model": task, "prompt": question, "schema": SCHEMA, **more}


def long_body(number: int, **more: Any) -> dict[str, Any]:
    """One that takes seconds."""
    return {**body(number), **LONG, "seed": number, "temperature": 1.0, **more}


@pytest.fixture(scope="module")
def service(shared_service: Service) -> Service:
    shared_service.offer(FIELDS)
    return shared_service


@pytest.fixture(scope="module")
def load_bodies() -> list[dict[str, Any]]:
    """Short requests of all experts; every second one is streamed."""
    return [body(number, stream=bool(number % 2), max_tokens=40) for number in range(9)]


@pytest.fixture(scope="module")
def load_texts(service: Service, load_bodies: list[dict[str, Any]]) -> list[str]:
    """What they are answered with while nothing happens."""
    return [reply.texts[0] for reply in service.ask_all(load_bodies)]


def test_a_client_that_leaves_mid_stream_stops_the_engine(service: Service) -> None:
    async def leave() -> None:
        async with service.client() as client:
            request = client.build_request("POST", "/v1/completions", json=long_body(0, stream=True, n=4))
            response = await client.send(request, stream=True)
            async for event in stream_events(response):
                if text_of(event):
                    break
            await response.aclose()

    asyncio.run(leave())
    before = service.stats()
    assert before.num_running <= BATCH_SIZE
    assert wait_until(service.is_idle, seconds=SECONDS)
    steps = service.stats().num_steps - before.num_steps
    assert steps < LONG["max_tokens"] / 2, "what is computed while the word travels through two processes"


def test_a_replica_killed_mid_stream(service: Service) -> None:
    """Its stream ends with an error; what had not begun is asked of its successor, and nobody notices."""
    whole = [long_body(number, max_tokens=700) for number in range(1, BATCH_SIZE)]  # they run; nothing is sent yet
    waiting = [body(number, stream=True) for number in range(4)]  # nothing of them is computed yet
    pid = service.pid()

    async def ask_and_kill() -> tuple[Reply, list[Reply]]:
        async with service.client() as client:
            request = client.build_request("POST", "/v1/completions", json=long_body(0, stream=True))
            response = await client.send(request, stream=True)
            events = stream_events(response)
            assert text_of(await anext(events))
            others = [asyncio.create_task(ask(client, one)) for one in whole]
            await asyncio.to_thread(_wait_for, lambda: service.stats().num_running == BATCH_SIZE)
            others += [asyncio.create_task(ask(client, one)) for one in waiting]
            await asyncio.to_thread(_wait_for, lambda: service.stats().num_waiting == len(waiting))
            os.kill(pid, signal.SIGKILL)
            rest = [event async for event in events]
            cut = Reply(response.status_code, error=rest[-1].get("error"))
            return cut, list(await asyncio.gather(*others))

    cut, others = asyncio.run(ask_and_kill())
    assert cut.is_cut
    assert cut.code == "replica_lost"
    assert cut.error is not None
    assert cut.error["type"] == "server_error"
    assert [(reply.status, reply.code) for reply in others] == [(200, None)] * len(others)
    again = service.ask_all([*whole, *waiting])
    assert [reply.texts for reply in others] == [reply.texts for reply in again]


def _wait_for(condition: Callable[[], bool]) -> None:
    assert wait_until(condition, seconds=SECONDS)


def test_a_replica_killed_at_idle_is_replaced(
    service: Service, load_bodies: list[dict[str, Any]], load_texts: list[str]
) -> None:
    """OpenAI's client, which asks again by itself, sees no error; one that does not, neither."""
    old = service.pid()
    os.kill(old, signal.SIGKILL)

    async def ask_at_once() -> list[str]:
        async with AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none", timeout=SECONDS) as retrying:
            answers = await asyncio.gather(
                *(
                    retrying.completions.create(
                        model=one["model"], prompt=one["prompt"], max_tokens=40, extra_body={"schema": SCHEMA}
                    )
                    for one in load_bodies
                )
            )
        return [answer.choices[0].text for answer in answers]

    assert asyncio.run(ask_at_once()) == load_texts
    assert [reply.texts[0] for reply in service.ask_all(load_bodies)] == load_texts
    assert wait_until(lambda: list(service.pids().values()) not in ([old], []), seconds=SECONDS)


def test_a_deployment_under_load_fails_no_request(
    service: Service, load_bodies: list[dict[str, Any]], load_texts: list[str]
) -> None:
    """Another limit, which concerns the gateway, and one more expert, which concerns the replicas."""
    experts = [*options()["experts"], {"package": str(demo.package("sql")), "name": "sql-again"}]
    with Load(service, load_bodies, load_texts, clients=6) as load:
        load.wait_for_more(12)
        old = service.pid()
        service.deploy({**FIELDS, "experts": experts, "limits": {"max_tokens": 1000}})
        load.wait_for_more(12)
        assert service.pid() != old
    assert load.failures == []
    refused, added = service.ask_all([body(0, max_tokens=1001), {**body(0), "model": "sql-again"}])
    assert refused.status == 400
    assert refused.error is not None
    assert "max_tokens" in refused.error["message"]
    assert added.texts == (load_texts[0],)


def test_scaling_up_and_down_under_load_fails_no_request(
    service: Service, load_bodies: list[dict[str, Any]], load_texts: list[str]
) -> None:
    delays = {"upscale_delay_seconds": 0.0, "downscale_delay_seconds": 0.5, "look_back_seconds": 3.0}
    replicas = {"num_cpus": SHARE, "min": 1, "max": 2, "target_ongoing_requests": 4.0, **delays}
    with Load(service, load_bodies, load_texts, clients=1) as few:
        with Load(service, load_bodies, load_texts, clients=12) as many:
            service.deploy({**FIELDS, "replicas": replicas})
            assert wait_until(lambda: len(service.pids()) == 2 or bool(many.failures), seconds=SECONDS)
            used = {pid: _cpu_seconds(pid) for pid in service.pids().values()}
            many.wait_for_more(60)
            assert [pid for pid, before in used.items() if _cpu_seconds(pid) - before < 0.1] == []
        assert wait_until(lambda: len(service.pids()) == 1 or bool(few.failures), seconds=SECONDS)
        few.wait_for_more(5)
    assert many.failures == []
    assert few.failures == []


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
