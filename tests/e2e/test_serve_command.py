"""The command that serves: it answers the questions of its guide, and at its end finishes what it has begun."""

import asyncio
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.replies import MalformedReplyError, Reply, ask, stream_events, text_of
from tests.collector import Collector, collecting
from tests.documents import of_language
from tests.e2e.processes import descendants, running, wait_until
from tests.e2e.serving import LONG, SCHEMA, SECONDS
from tests.readme import CONSOLE

ADDRESS = "http://127.0.0.1:8000"  # as the guide has it


@dataclass(frozen=True)
class Command:
    """The command while it runs.

    Args:
        process: It.
        url: Where it answers.
        log: What it has said.
        collector: What its processes export their spans to.
    """

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    collector: Collector


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    (line,) = (line for line in CONSOLE.splitlines() if line.startswith("expert serve "))
    log = tmp_path_factory.mktemp("serve") / "log"

    def addresses() -> list[str]:
        return re.findall(r"http://127\.0\.0\.1:\d+", log.read_text())

    with (
        collecting() as collector,
        running(["/bin/sh", "-c", f"exec {line} --port 0"], log, more=collector.environment) as process,
    ):
        assert wait_until(lambda: bool(addresses()) or process.poll() is not None, seconds=SECONDS), log.read_text()
        assert process.poll() is None, log.read_text()
        yield Command(process, addresses()[0], log, collector)


def test_it_answers_the_guides_questions(command: Command) -> None:
    curl, client = (
        next(block.code for block in of_language(language) if block.page == "docs/guides/online.md")
        for language in ("sh", "py")
    )
    for program in (["/bin/sh", "-c", curl], [sys.executable, "-c", client]):
        asked = [part.replace(ADDRESS, command.url) for part in program]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=SECONDS, check=False)
        assert "SELECT city, COUNT(*) FROM users GROUP BY city" in done.stdout, done.stderr


CLIENTS_SPAN = "b7ad6b7169203331"


@pytest.fixture(scope="module")
def traced(command: Command) -> dict[str, set[int]]:
    """Traces that a client has begun, one for a whole answer and one for a stream; and the processes of replicas."""
    traces = {f"0af7651916cd43dd8448eb211c80319{int(stream)}": stream for stream in (False, True)}
    body = {"model": "expert-sql", "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 3}
    for trace_id, stream in traces.items():
        answer = httpx.post(
            f"{command.url}/v1/chat/completions",
            json={**body, "stream": stream},
            headers={"traceparent": f"00-{trace_id}-{CLIENTS_SPAN}-01"},
            timeout=SECONDS,
        )
        assert answer.status_code == 200
    pids = set(descendants(command.process.pid, "ray::ServeReplica"))
    return dict.fromkeys(traces, pids)


def long_body(number: int, **more: Any) -> dict[str, Any]:
    """One that takes seconds."""
    asked = {"model": "expert-sql", "prompt": "How many users are there?", "schema": SCHEMA}
    return {**asked, **LONG, "seed": number, "temperature": 1.0, "max_tokens": 500, **more}


@pytest.mark.usefixtures("traced")
def test_requests_are_in_a_log_and_prompts_are_not(command: Command) -> None:
    (path,) = re.findall(r"log: (\S+)", command.log.read_text())
    # A line is written once the answer is out.
    assert wait_until(
        lambda: Path(path).read_text().count("expert=expert-sql status=200 code=- ") >= 2, seconds=SECONDS
    )
    assert "Who?" not in Path(path).read_text()


@pytest.mark.usefixtures("traced")
def test_it_ends_gracefully(command: Command) -> None:
    """At SIGTERM what was begun is finished, and what comes then is refused in our words, until nothing listens."""
    process = command.process
    bodies = [long_body(number, stream=bool(number % 2)) for number in range(4)]

    async def end_while_asking() -> tuple[list[Reply], list[str]]:
        async with httpx.AsyncClient(base_url=command.url, timeout=SECONDS, trust_env=False) as client:
            response = await client.send(
                client.build_request("POST", "/v1/completions", json={**bodies[1], "n": 2}), stream=True
            )
            events = stream_events(response)
            assert text_of(await anext(events))
            begun = [asyncio.create_task(ask(client, one)) for one in bodies]
            await ask(client, {**bodies[0], "max_tokens": 1})  # those before it are begun as well
            process.send_signal(signal.SIGTERM)
            refusals = asyncio.create_task(_ask_until_the_end(command.url, bodies[0], process, begun))
            rest = [event async for event in events]
            assert [event["choices"][0]["finish_reason"] for event in rest[-2:]] == ["length", "length"]
            return list(await asyncio.gather(*begun)), await refusals

    replies, refusals = asyncio.run(end_while_asking())
    assert process.wait(SECONDS) == 0
    assert [reply.finish_reasons for reply in replies] == [("length",)] * len(replies)
    assert "503 shutting_down" in refusals
    assert set(refusals) <= {"answered", "503 shutting_down", "not taken"}
    said = command.log.read_text()
    assert "ending: what was begun is finished first" in said
    assert len(said.splitlines()) == 3, "neither a traceback nor a line of Ray's"


def test_a_request_is_one_trace_from_the_client_through_gateway_and_replica(
    command: Command, traced: dict[str, set[int]]
) -> None:
    """Each process exports its own spans, where OpenTelemetry's environment tells it to; at its end what is left."""
    command.process.send_signal(signal.SIGTERM)
    assert command.process.wait(SECONDS) == 0
    for trace_id, pids in traced.items():
        (request,), (answered,) = (
            command.collector.named(name, trace_id) for name in ("expert.request", "expert.generate")
        )
        assert request.parent_id == CLIENTS_SPAN
        assert request.attributes["http.response.status_code"] == 200
        assert answered.parent_id == request.span_id
        assert answered.attributes["gen_ai.usage.output_tokens"] == 3
        assert request.resource["process.pid"] == command.process.pid
        assert answered.resource["process.pid"] in pids


async def _ask_until_the_end(
    url: str, one: dict[str, Any], process: subprocess.Popen[bytes], begun: list[asyncio.Task[Reply]]
) -> list[str]:
    """What each new connection is told; once all that was begun is over, it need not be taken."""
    said: list[str] = []
    async with httpx.AsyncClient(
        base_url=url, timeout=SECONDS, trust_env=False, headers={"Connection": "close"}
    ) as client:
        while process.poll() is None:
            try:
                reply = await ask(client, {**one, "stream": False, "max_tokens": 1})
            except (httpx.TransportError, MalformedReplyError) as error:
                is_over = isinstance(error, httpx.TransportError) and all(task.done() for task in begun)
                said.append("not taken" if is_over else f"{type(error).__name__}: {error}")
            else:
                said.append("answered" if reply.is_answered else f"{reply.status} {reply.code}")
                assert reply.is_answered or "retry-after" in reply.headers
            await asyncio.sleep(0.05)  # a client's pause between two tries
    return said
