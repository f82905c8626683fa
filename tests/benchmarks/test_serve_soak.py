"""The soak's verdict: each thing that should not be is found; and what is read of a server is read strictly."""

import argparse
import asyncio
import json
from collections.abc import Callable

import httpx
import pytest

from benchmarks.replies import MalformedReplyError, Reply, ask
from benchmarks.serve_soak import Life, Soak, judge

MIB = 1 << 20
CHUNK = {"choices": [{"index": 0, "text": "a", "finish_reason": None}]}
END = {"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]}
USAGE = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}
ERROR = {"error": {"message": "It is lost.", "type": "server_error", "param": None, "code": "replica_lost"}}


def soak_with(*lives: Life) -> Soak:
    soak = Soak(1, "http://127.0.0.1:1", argparse.Namespace(minutes=1.0))
    soak.lives = dict(enumerate(lives))
    soak.tally.note("whole", "answered", 0.5)
    return soak


def life(role: str, born: float, size_at: Callable[[float], float]) -> Life:
    return Life(role, born, [(born + age, int(size_at(age) * MIB)) for age in range(120)])


def flat(age: float) -> float:
    return 300.0 + min(age, 15) * 5


def test_flat_memory_and_clean_answers_pass() -> None:
    soak = soak_with(life("gateway", 0, flat), life("replica", 0, flat), life("replica", 60, flat))
    assert judge(soak, 0, "").problems == []


@pytest.mark.parametrize(
    ("lives", "ended", "said", "found"),
    [
        ([life("gateway", 0, lambda age: 300 + age)], 0, "", "memory of the gateway grew"),
        (
            [life("replica", 60.0 * n, lambda _, n=n: 300 + 20 * n) for n in range(4)],
            0,
            "",
            "memory of the replica grew",
        ),
        ([], 1, "", "the service ended with exit code 1"),
        ([], None, "", "the service did not end"),
        ([], 0, "Traceback (most recent call last):\nValueError: 7", "the service printed a traceback: ValueError: 7"),
    ],
)
def test_what_should_not_be_is_found(lives: list[Life], ended: int | None, said: str, found: str) -> None:
    assert judge(soak_with(*lives), ended, said).problems == [found]


def test_a_fault_is_a_problem() -> None:
    soak = soak_with()
    soak.tally.fault("whole", "500")
    assert judge(soak, 0, "").problems == ["1 requests were neither answered nor refused cleanly"]


def reply_to(status: int, content: str, *, stream: bool = True) -> Reply:
    """What is read of a server that says this."""
    kind = "text/event-stream" if stream and status == 200 else "application/json"
    transport = httpx.MockTransport(lambda _: httpx.Response(status, text=content, headers={"content-type": kind}))

    async def once() -> Reply:
        async with httpx.AsyncClient(base_url="http://test", transport=transport) as client:
            return await ask(client, {"prompt": "?", "stream": stream})

    return asyncio.run(once())


def events(*values: object) -> str:
    return "".join(f"data: {json.dumps(value)}\n\n" for value in values)


def test_streams_are_read_to_their_end() -> None:
    whole = reply_to(200, events(CHUNK, CHUNK, END, USAGE) + "data: [DONE]\n\n")
    assert (whole.is_answered, whole.texts, whole.finish_reasons) == (True, ("aa",), ("stop",))
    cut = reply_to(200, events(CHUNK, ERROR))
    assert (cut.is_answered, cut.is_cut, cut.code) == (False, True, "replica_lost")
    refused = reply_to(503, json.dumps(ERROR))
    assert (refused.is_answered, refused.is_cut, refused.status) == (False, False, 503)


@pytest.mark.parametrize(
    ("status", "content", "stream"),
    [
        (200, events(CHUNK), True),
        (200, events(CHUNK, USAGE) + "data: [DONE]\n\n", True),
        (200, events(CHUNK, END) + "data: [DONE]\n\n", True),
        (200, "Internal Server Error", True),
        (500, "Internal Server Error", False),
        (400, '{"error": "no"}', False),
        (200, '{"choices": [], "usage": {}}', False),
    ],
)
def test_what_no_client_could_read_is_no_answer(status: int, content: str, stream: bool) -> None:
    with pytest.raises(MalformedReplyError):
        reply_to(status, content, stream=stream)
