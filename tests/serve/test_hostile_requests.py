"""Every hostile request we know of: an answer in our words, in bounded time, nothing left behind, the server alive."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from pipeline.demo import BASE_MODEL, package
from pipeline.engine.runtime import open_experts
from pipeline.package import open_package
from pipeline.serve.api import make_api
from pipeline.serve.keys import KeyRing, key_hash
from pipeline.serve.limits import LimitsConfig
from pipeline.serve.local import local_backend
from pipeline.serve.messages import Ask, Delta, Event, Started
from tests.serve.scripted import CARDS, ScriptedBackend, endless, serving, wait_until, words

LIMITS = LimitsConfig(max_body_bytes=100_000, body_seconds=0.5, send_seconds=0.5)
PROMPT = b'{"model": "sql", "prompt": "users?"'
BOUND_SECONDS = 5.0


@dataclass(frozen=True)
class Reply:
    """What came back on a raw connection."""

    status: int
    body: bytes
    seconds: float

    @property
    def code(self) -> str | None:
        """The code of its error; None where the HTTP server itself refused."""
        return str(json.loads(self.body)["error"]["code"]) if self.body.startswith(b"{") else None


def connect(url: str) -> socket.socket:
    host, _, port = url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=BOUND_SECONDS)


def read_reply(connection: socket.socket, started: float) -> Reply:
    """Read one response."""
    data = b""
    while b"\r\n\r\n" not in data:
        part = connection.recv(65536)
        assert part, f"the connection was closed after {data!r}"
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    lengths = [line.partition(b":")[2] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")]
    while lengths and len(body) < int(lengths[0]):
        body += connection.recv(65536)
    return Reply(int(head.split()[1]), body, time.monotonic() - started)


def head(*lines: str, host: str = "127.0.0.1", path: str = "/v1/completions") -> bytes:
    """The head of a POST."""
    all_lines = [f"POST {path} HTTP/1.1", f"Host: {host}", "Content-Type: application/json", *lines]
    return "\r\n".join(all_lines).encode() + b"\r\n\r\n"


def raw(*parts: bytes) -> Callable[[str], Reply]:
    """Send bytes, and read what comes back; the server may answer and close before all are sent."""

    def send(url: str) -> Reply:
        started = time.monotonic()
        with connect(url) as connection:
            for part in parts:
                try:
                    connection.sendall(part)
                except (BrokenPipeError, ConnectionResetError):
                    break
            return read_reply(connection, started)

    return send


def body(text: bytes) -> Callable[[str], Reply]:
    """A completion's body."""
    return raw(head(f"Content-Length: {len(text)}") + text)


def fields(**values: Any) -> Callable[[str], Reply]:
    """A completion with these fields."""
    return body(json.dumps({"model": "sql", "prompt": "users?", **values}).encode())


PARTS = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/"}}]
IMAGE = json.dumps({"model": "sql", "messages": [{"role": "user", "content": PARTS}]}).encode()
FORM = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\n{}"
CHUNK = b"4000\r\n" + b"x" * 0x4000 + b"\r\n"
CASES: dict[str, tuple[Callable[[str], Reply], int, str | None]] = {
    "94 oversize body": (body(b"x" * 100_001), 413, "body_too_large"),
    "94 oversize body, announced only": (raw(head("Content-Length: 900000000")), 413, "body_too_large"),
    "94 length of thirty digits": (raw(head(f"Content-Length: {10**30}")), 400, None),
    "94 oversize body, chunked": (raw(head("Transfer-Encoding: chunked"), *[CHUNK] * 20), 413, "body_too_large"),
    "94 both lengths": (raw(head("Transfer-Encoding: chunked", "Content-Length: 5") + b"0\r\n\r\n"), 400, None),
    "94 compressed body": (raw(head("Content-Encoding: gzip", "Content-Length: 2") + b"{}"), 400, "invalid_request"),
    "95 deep JSON": (body(PROMPT + b', "stop": ' + b"[" * 40_000 + b"]" * 40_000 + b"}"), 400, "invalid_request"),
    "95 deep JSON schema": (
        body(PROMPT + b', "json_schema": ' + b'{"a":' * 9_000 + b"1" + b"}" * 9_000 + b"}"),
        400,
        "invalid_request",
    ),
    "95 one key twice": (body(PROMPT + b', "n": 1, "n": 128}'), 400, "invalid_request"),
    "95 a number of 90,000 digits": (body(PROMPT + b', "seed": ' + b"9" * 90_000 + b"}"), 400, "invalid_request"),
    "95 nine thousand unknown keys": (
        body(b"{" + b",".join(b'"k%d":1' % at for at in range(9_000)) + b"}"),
        400,
        "invalid_request",
    ),
    "95 not UTF-8": (body(b"\xff\xfe{"), 400, "invalid_request"),
    "95 half a surrogate pair": (body(b'{"model": "sql", "prompt": "\\ud800"}'), 400, "invalid_request"),
    "95 an array": (body(b"[]"), 400, "invalid_request"),
    "95 nothing": (raw(head("Content-Length: 0")), 400, "invalid_request"),
    "96 negative max_tokens": (fields(max_tokens=-1), 400, "invalid_request"),
    "96 huge max_tokens": (fields(max_tokens=10**18), 400, "invalid_request"),
    "97 NaN temperature": (body(PROMPT + b', "temperature": NaN}'), 400, "invalid_request"),
    "97 infinite temperature": (body(PROMPT + b', "temperature": 1e400}'), 400, "invalid_request"),
    "98 ten thousand stop strings": (fields(stop=["a"] * 10_000), 400, "invalid_request"),
    "99 a milliard answers": (fields(n=10**9), 400, "invalid_request"),
    "100 list of prompts": (fields(prompt=["a"] * 1000), 400, "invalid_request"),
    "100 list of tokens": (fields(prompt=[1, 2, 3]), 400, "invalid_request"),
    "101 slow body": (raw(head("Content-Length: 50") + b"{"), 408, "slow_client"),
    "104 unknown model": (fields(model="../../etc/passwd"), 404, "model_not_found"),
    "104 model of 90,000 letters": (fields(model="x" * 90_000), 404, "model_not_found"),
    "106 forged Host": (raw(head("Content-Length: 2", host="evil.example") + b"{}"), 400, "invalid_request"),
    "106 Host that begins as ours": (
        raw(head("Content-Length: 2", host="127.0.0.1.evil.example:80") + b"{}"),
        400,
        "invalid_request",
    ),
    "106 two Hosts": (raw(head("Host: 127.0.0.1", "Content-Length: 2") + b"{}"), 400, None),
    "106 no Host": (raw(b"GET /v1/models HTTP/1.0\r\n\r\n"), 400, "invalid_request"),
    "another site's form": (raw(FORM), 400, "invalid_request"),
    "an image to be fetched": (
        raw(head(f"Content-Length: {len(IMAGE)}", path="/v1/chat/completions") + IMAGE),
        400,
        "invalid_request",
    ),
    "no HTTP at all": (raw(b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n"), 400, None),
}


@dataclass(frozen=True)
class Target:
    """The server under attack, and what is behind it."""

    url: str
    backend: ScriptedBackend

    def answers(self) -> bool:
        """Whether a plain request is answered."""
        response = httpx.post(f"{self.url}/v1/completions", json={"model": "sql", "prompt": "users?"}, timeout=5)
        return response.status_code == 200 and response.json()["choices"][0]["finish_reason"] == "stop"


@pytest.fixture(scope="module")
def running() -> Iterator[Target]:
    backend = ScriptedBackend()
    with serving(make_api(backend, CARDS, limits=LIMITS)) as url:
        yield Target(url, backend)


@pytest.fixture
def target(running: Target) -> Iterator[Target]:
    running.backend.script = words
    running.backend.asks.clear()
    yield running
    running.backend.script = words
    wait_until(lambda: running.backend.num_open == 0)
    assert running.answers()


@pytest.mark.parametrize(("send", "status", "code"), CASES.values(), ids=CASES.keys())
def test_a_hostile_request_is_refused(
    target: Target, send: Callable[[str], Reply], status: int, code: str | None
) -> None:
    reply = send(target.url)
    assert reply.status == status
    assert code is None or reply.code == code
    assert reply.seconds < BOUND_SECONDS
    assert len(reply.body) < 2000
    assert not any(word in reply.body for word in (b"Traceback", b".py", b"site-packages"))
    assert not target.backend.asks


def test_slow_heads_keep_nobody_else_waiting(target: Target) -> None:  # 101
    connections = [connect(target.url) for _ in range(100)]
    try:
        for connection in connections:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: ")
        assert target.answers()
    finally:
        for connection in connections:
            connection.close()


def test_slow_bodies_count_as_requests_and_are_cut_off() -> None:  # 101
    limits = LIMITS.model_copy(update={"max_requests": 4, "body_seconds": 1.0})
    with serving(make_api(ScriptedBackend(), CARDS, limits=limits)) as url:
        connections = [connect(url) for _ in range(4)]
        for connection in connections:
            connection.sendall(head("Content-Length: 50") + b"{")
        wait_until(lambda: fields()(url).status == 429, seconds=0.9)
        assert [read_reply(connection, 0).status for connection in connections] == [408] * 4
        for connection in connections:
            connection.close()
        assert fields()(url).status == 200


def test_a_slow_reader_is_cut_off(target: Target) -> None:  # 102
    async def flood(_: Ask) -> AsyncIterator[Event]:  # more than the buffers between us hold
        yield Started(7)
        while True:
            yield Delta("more " * 20_000)
            await asyncio.sleep(0.001)

    target.backend.script = flood
    with connect(target.url) as connection:
        text = PROMPT + b', "stream": true}'
        connection.sendall(head(f"Content-Length: {len(text)}") + text)
        wait_until(lambda: target.backend.num_open == 1)
        wait_until(lambda: target.backend.num_open == 0)


def test_a_storm_of_cancels_leaves_nothing_behind(target: Target) -> None:  # 107
    target.backend.script = endless
    text = PROMPT + b', "stream": true}'
    for _ in range(10):
        connections = [connect(target.url) for _ in range(30)]
        for connection in connections:
            connection.sendall(head(f"Content-Length: {len(text)}") + text)
        for connection in connections[::2]:
            connection.recv(100)
        for connection in connections:
            connection.close()
    wait_until(lambda: target.backend.num_open == 0)
    target.backend.script = words
    assert target.answers()


ROUTES = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/sql"),
    ("GET", "/ready"),
    ("GET", "/nothing"),
    ("POST", "/"),
    ("POST", "/health"),
    ("OPTIONS", "/v1/completions"),
    ("GET", "//health"),
    ("GET", "/health/"),
    ("GET", "/health/../v1/models"),
    ("GET", "/%68ealth%2f..%2fv1%2fmodels"),
    ("GET", "/metrics"),
    ("GET", "/docs"),
]


@pytest.fixture(scope="module")
def locked() -> Iterator[str]:
    with serving(make_api(ScriptedBackend(), CARDS, keys=KeyRing({"alice": key_hash("right")}))) as url:
        yield url


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer wrong", "Basic cmlnaHQ=", "right", "Bearer right wrong", "Bearer RIGHT"],
)
def test_nothing_is_answered_without_a_key(locked: str, authorization: str | None) -> None:  # 105
    headers = {} if authorization is None else {"Authorization": authorization}
    for method, path in ROUTES:
        response = httpx.request(method, locked + path, headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key"), (method, path)
        assert response.headers["www-authenticate"] == "Bearer"


def test_every_route_there_is_needs_a_key_but_health_and_the_page(locked: str) -> None:  # 105
    app = make_api(ScriptedBackend(), CARDS)
    paths = {str(route.path).replace("{name:path}", "sql") for route in app.routes}  # type: ignore[attr-defined]
    open_paths = {path for path in paths if httpx.get(locked + path).status_code != 401}
    assert {path for path in open_paths if not path.startswith("/playground/")} == {"/", "/health"}
    assert paths - open_paths == {"/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/sql", "/ready"}


def test_the_right_key_is_let_in(locked: str) -> None:
    for scheme in ("Bearer", "bearer"):
        assert httpx.get(f"{locked}/v1/models", headers={"Authorization": f"{scheme} right"}).status_code == 200


def test_a_key_does_not_stand_in_an_answer_or_the_log(locked: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(0)
    response = httpx.get(f"{locked}/v1/models", headers={"Authorization": "Bearer secret-key"})
    assert "secret-key" not in response.text + str(response.headers) + caplog.text


def test_the_engine_stops_for_a_client_that_has_gone() -> None:  # 103
    experts = open_experts({"sql": open_package(package("sql"))}, BASE_MODEL, device="cpu", dtype="float32")
    with local_backend(experts) as backend, serving(make_api(backend, backend.cards)) as url:
        ask = {"model": "sql", "prompt": "users?", "stream": True, "ignore_eos": True, "use_grammar": False}
        with httpx.stream("POST", f"{url}/v1/completions", json={**ask, "max_tokens": 500}, timeout=60) as response:
            lines = response.iter_lines()  # kept: when it goes, the connection is closed
            next(lines)
            assert experts.engine.stats().num_running == 1
        wait_until(lambda: experts.engine.stats().num_running == 0, seconds=5)
        assert experts.engine.stats().num_tokens_generated < 500
