"""The load that the servers' benchmark makes is what it says, and so are its figures; against a real HTTP server."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from benchmarks import serve
from benchmarks.serve_client import CUT_OFF, NO_CONNECTION, NOT_FINISHED, Outcome, connected, read_answer
from benchmarks.serve_load import (
    Load,
    closed_loop,
    open_loop,
    percentile,
    poisson_arrivals,
    summary,
)
from benchmarks.serve_measure import Bounds, compare_ways
from benchmarks.serve_report import errors_text, targets, with_ratios
from benchmarks.serve_requests import make_scene
from benchmarks.serve_servers import BASELINE, OURS, free_port
from pipeline.demo import TASKS

SLOW = 0.2
Answers = Callable[[dict[str, Any], web.Request], Awaitable[web.StreamResponse]]


def chunk(text: str = "", finish_reason: str | None = None, usage: int | None = None) -> bytes:
    choices = [{"index": 0, "delta": {"content": text}, "finish_reason": finish_reason}] if usage is None else []
    body = {"choices": choices, "usage": None if usage is None else {"completion_tokens": usage}}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


async def stream(request: web.Request, *parts: bytes | float) -> web.StreamResponse:
    """Send bytes, and wait where there is a number."""
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    for part in parts:
        if isinstance(part, bytes):
            await response.write(part)
        else:
            await asyncio.sleep(part)
    return response


@asynccontextmanager
async def server(answer: Answers) -> AsyncIterator[str]:
    async def handle(request: web.Request) -> web.StreamResponse:
        return await answer(await request.json(), request)

    application = web.Application()
    application.router.add_post("/v1/chat/completions", handle)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def ask(answer: Answers, body: dict[str, Any]) -> Outcome:
    async def run() -> Outcome:
        async with server(answer) as url, connected(url) as client:
            return await client.send(7, body)

    return asyncio.run(run())


def test_a_streamed_answer_is_timed_at_its_first_text_and_at_its_end() -> None:
    async def answer(_: dict[str, Any], request: web.Request) -> web.StreamResponse:
        parts = (chunk(), SLOW, chunk("SEL"), SLOW, chunk("ECT"), chunk("", "stop"), chunk(usage=5))
        return await stream(request, *parts, b"data: [DONE]\n\n")

    outcome = ask(answer, {"stream": True})
    assert (outcome.number, outcome.status, outcome.error) == (7, 200, None)
    assert (outcome.text, outcome.output_tokens) == ("SELECT", 5)
    assert outcome.first_seconds is not None
    assert outcome.first_seconds >= SLOW, "an empty delta was taken for text"
    assert outcome.seconds >= outcome.first_seconds + SLOW * 0.9


def test_an_answer_that_comes_whole() -> None:
    async def answer(body: dict[str, Any], _: web.Request) -> web.StreamResponse:
        message = {"message": {"content": body["messages"]}, "finish_reason": "stop"}
        return web.json_response({"choices": [message], "usage": {"completion_tokens": 3}})

    outcome = ask(answer, {"messages": "the question"})
    assert (outcome.error, outcome.text, outcome.output_tokens) == (None, "the question", 3)


@pytest.mark.parametrize(
    ("parts", "error"),
    [
        ((chunk("half"),), CUT_OFF),
        ((chunk("half"), b'data: {"error": {"code": "replica_lost", "message": "gone"}}\n\n'), "replica_lost"),
        ((chunk("half"), b'data: {"error": "out of memory"}\n\n'), "out of memory"),
        ((b"data: {nonsense\n\n",), "not an answer"),
    ],
)
def test_a_stream_that_is_no_whole_answer(parts: tuple[bytes, ...], error: str) -> None:
    async def answer(_: dict[str, Any], request: web.Request) -> web.StreamResponse:
        return await stream(request, *parts)

    outcome = ask(answer, {"stream": True})
    assert (outcome.status, outcome.error) == (200, error)


def test_a_broken_connection() -> None:
    async def answer(_: dict[str, Any], request: web.Request) -> web.StreamResponse:
        response = await stream(request, chunk("half"))
        assert request.transport is not None
        request.transport.abort()
        return response

    outcome = ask(answer, {"stream": True})
    assert outcome.status == 200
    assert outcome.error is not None
    assert outcome.error.startswith(CUT_OFF)


def test_refusals_are_told_by_their_code() -> None:
    async def answer(_: dict[str, Any], __: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"code": "overloaded", "message": "too many"}}, status=429)

    outcome = ask(answer, {"stream": True})
    assert (outcome.status, outcome.error, outcome.first_seconds) == (429, "overloaded", None)
    assert read_answer(b"<html>", 502, is_stream=True).error == "status 502"


def test_nobody_listens() -> None:
    async def run() -> Outcome:
        async with connected(f"http://127.0.0.1:{free_port()}") as client:
            return await client.send(0, {})

    outcome = asyncio.run(run())
    assert (outcome.status, outcome.error) == (None, NO_CONNECTION)


class Scripted:
    """Answers after a while; counts how many are asked at once."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.begun: list[float] = []
        self.numbers: list[int] = []
        self.at_once = self.most_at_once = 0

    async def send(self, number: int) -> Outcome:
        loop = asyncio.get_running_loop()
        self.begun.append(loop.time())
        self.numbers.append(number)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.at_once -= 1
        return Outcome(number, self.begun[-1], self.seconds, self.seconds / 2, 200, None, 10, "text")


@pytest.mark.parametrize("concurrency", [1, 4, 50])
def test_a_closed_loop_keeps_so_many_requests_under_way(concurrency: int) -> None:
    answering = Scripted(0.01)
    load = asyncio.run(closed_loop(answering.send, concurrency, num_requests=20, first=100, patience=10.0))
    assert answering.most_at_once == min(concurrency, 20)
    assert sorted(answering.numbers) == list(range(100, 120))
    assert len(load.finished) == 20
    assert load.seconds >= 0.01 * 20 / min(concurrency, 20)


def test_a_closed_loop_ends_when_its_time_is_up() -> None:
    answering = Scripted(0.05)
    load = asyncio.run(closed_loop(answering.send, 2, num_requests=1000, seconds=0.2, patience=10.0))
    assert 2 <= len(load.outcomes) <= 12
    assert load.num_given_up == 0


def test_what_takes_too_long_is_given_up_and_counted() -> None:
    async def send(number: int) -> Outcome:
        return await Scripted(0.01 if number < 3 else 60.0).send(number)

    load = asyncio.run(closed_loop(send, 4, num_requests=4, seconds=0.1, patience=1.0))
    figures = summary(load)
    assert (figures["finished"], figures["given_up"], figures["is_lower_bound"]) == (3, 1, True)
    assert figures["errors"] == {NOT_FINISHED: 1}
    assert figures["total_ms"]["p99"] >= 1090, "a request that was given up took at least as long as it was waited for"
    assert figures["requests_per_second"] == pytest.approx(3 / load.seconds)
    assert load.seconds >= 1.09


def test_an_open_loop_waits_for_nobody() -> None:
    answering = Scripted(0.3)
    arrivals = [0.0, 0.05, 0.05, 0.1]
    load = asyncio.run(open_loop(answering.send, arrivals, first=5, patience=10.0))
    assert answering.most_at_once == 4
    assert sorted(answering.numbers) == [5, 6, 7, 8]
    begun = [at - answering.begun[0] for at in answering.begun]
    assert all(at >= wanted - 0.01 for at, wanted in zip(begun, arrivals, strict=True))
    assert load.lateness >= 0


def test_an_error_of_the_client_is_not_taken_for_an_answer() -> None:
    async def send(_: int) -> Outcome:
        raise LookupError("a mistake in this program")

    with pytest.raises(LookupError):
        asyncio.run(closed_loop(send, 2, num_requests=4, patience=1.0))


def test_arrivals_are_poisson() -> None:
    times = poisson_arrivals(50.0, 200.0, seed=3)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    assert times == sorted(times)
    assert times[-1] < 200.0
    assert len(times) == pytest.approx(10_000, rel=0.05)
    # Of exponential gaps the standard deviation is the mean, and 1/e of them are longer than it.
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(mean**2, rel=0.1)
    assert sum(gap > mean for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.02)
    assert times == poisson_arrivals(50.0, 200.0, seed=3)
    assert times != poisson_arrivals(50.0, 200.0, seed=4)
    assert poisson_arrivals(50.0, 200.0, seed=3, most=10) == times[:10]


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [(range(1, 101), 50, 50), (range(1, 101), 99, 99), (range(1, 11), 95, 10), ([7.0], 50, 7.0), ([3, 1, 2], 34, 2)],
)
def test_percentiles(values: Any, share: float, expected: float) -> None:
    assert percentile(list(values), share) == expected


def outcome(seconds: float, error: str | None = None, status: int | None = 200, tokens: int = 10) -> Outcome:
    return Outcome(0, 0.0, seconds, seconds / 2 if error is None else None, status, error, tokens)


def test_rates_count_whole_answers_alone() -> None:
    refused = [outcome(0.001, "overloaded", 429, 0)] * 6
    cut = outcome(0.5, CUT_OFF, 200, 3)
    figures = summary(Load((outcome(1.0), outcome(2.0), cut, *refused), 4.0))
    assert figures["requests_per_second"] == 0.5
    assert figures["output_tokens_per_second"] == 5.0
    assert figures["statuses"] == {"200": 3, "429": 6}
    assert figures["errors"] == {CUT_OFF: 1, "overloaded": 6}
    assert figures["total_ms"] == {"p50": 1000.0, "p95": 2000.0, "p99": 2000.0}
    assert figures["first_ms"]["p50"] == 500.0
    assert errors_text(figures) == f"429: 6, {CUT_OFF}: 1, overloaded: 6"


def test_ratios_compare_one_level() -> None:
    def row(server: str, level: int, seconds: float) -> dict[str, Any]:
        return {"server": server, "concurrency": level, **summary(Load((outcome(seconds),), seconds))}

    rows = [row(OURS, 1, 2.0), row(BASELINE, 1, 4.0), row(OURS, 32, 1.0), row(BASELINE, 32, 10.0), row(OURS, 64, 1.0)]
    compared = with_ratios(rows, "concurrency")
    assert [one.get("times_rate") for one in compared] == [2.0, 1.0, pytest.approx(10.0), 1.0, None]
    assert compared[2]["times_p99"] == pytest.approx(0.1)
    ((text, is_met),) = targets({"closed": compared})
    assert is_met
    assert "10.0 x" in text
    assert not targets({"closed": with_ratios([row(OURS, 32, 3.0), row(BASELINE, 32, 9.0)], "concurrency")})[0][1]


def test_the_gateway_is_compared_by_medians() -> None:
    def round_of(gateway_ms: float, handle_ms: float) -> dict[str, Any]:
        def way(ms: float) -> dict[str, Any]:
            return {
                "total_ms": {"p50": ms},
                "first_ms": {"p50": ms / 2},
                "requests_per_second": 1000 / ms,
                "errors": {},
            }

        return {"gateway": way(gateway_ms), "handle": way(handle_ms)}

    level = compare_ways(1, [round_of(10.0, 8.0), round_of(12.5, 10.0), round_of(500.0, 11.0)])
    assert level["added_ms"] == pytest.approx(2.5)
    assert level["lost_share"] == pytest.approx(0.2)
    failed = round_of(10.0, 8.0)
    failed["handle"]["errors"] = {CUT_OFF: 1}
    with pytest.raises(RuntimeError, match=CUT_OFF):
        compare_ways(1, [failed])
    found = dict(targets({"gateway": {"levels": [level, {**level, "concurrency": 32}]}}))
    assert list(found.values()) == [True, False]


@pytest.mark.parametrize(("failed", "calm", "is_met"), [(0, 20.0, True), (1, 20.0, False), (0, None, False)])
def test_overload_is_refused_cleanly_or_not(failed: int, calm: float | None, is_met: bool) -> None:
    report = {"overload": {"server_errors": failed, "requests": 1000, "calm_ms": calm}}
    assert [met for _, met in targets(report)] == [is_met]


def test_levels_are_bounded() -> None:
    bounds = Bounds(per_client=8, least=32, most=1024)
    assert [bounds.num_requests(level) for level in (1, 4, 16, 256, 2048)] == [32, 32, 128, 1024, 2048]


def test_every_server_is_asked_the_same_of_the_demo() -> None:
    scene, again = (make_scene("tiny-demo", num_requests=50) for _ in range(2))
    assert scene == again
    assert {request.expert for request in scene.requests[:3]} == set(range(len(TASKS)))
    assert len({request.messages for request in map(_frozen, scene.requests)}) > 45
    body = scene.body(51, model="m", stream=True, more={"ignore_eos": True})
    assert body["messages"] == list(scene.requests[1].messages)
    assert body["stream"]
    assert "ignore_eos" not in body, "an answer of the demo ends by itself"
    assert body["messages"][0]["content"].startswith("Dialect: neo4j\nSchema:\n")


def _frozen(request: Any) -> Any:
    from dataclasses import replace

    return replace(request, messages=tuple(message["content"] for message in request.messages))


def test_random_weights_answer_a_fixed_number_of_tokens() -> None:
    scene = make_scene("tiny", num_requests=40)
    assert all(request.is_exact for request in scene.requests)
    assert scene.body(0, model="m", stream=False, more={"ignore_eos": True})["ignore_eos"]
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(scene.base / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 4096
    lengths = [len(tokenizer.encode(request.messages[1]["content"])) for request in scene.requests]
    assert 18 <= min(lengths) <= max(lengths) <= 56
    texts = [tokenizer.decode([token_id]) for token_id in range(16, 4096)]
    assert all(texts), "a token without text: no client could tell when it came"


def test_the_whole_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--servers", BASELINE, "--concurrency", "1,2", "--least", "4", "--per-client", "2", "--seconds", "3"]
    arguments += ["--measure", "closed,open", "--rates", "1", "--json", str(tmp_path / "report.json")]
    status = serve.main(arguments)
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert status == 0, printed
    assert [(row["concurrency"], row["finished"], row["errors"]) for row in report["closed"]] == [
        (1, 4, {}),
        (2, 4, {}),
    ]
    assert all(row["times_rate"] == 1.0 for row in report["closed"])
    assert report["open"][0]["finished"] == report["open"][0]["requests"] > 0
    assert report["starts"][BASELINE]["seconds"] > 0
    assert report["machine"]["cpu"]
    assert BASELINE in printed


def test_a_server_that_does_not_start_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no such module >&2\nexit 3\n")
    python.chmod(0o755)
    arguments = ["--servers", "vllm", "--peer", f"vllm={python}", "--measure", "closed", "--concurrency", "1"]
    assert serve.main(arguments) == 1
    assert "no such module" in capsys.readouterr().out
