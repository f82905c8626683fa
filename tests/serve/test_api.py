"""The gateway over a scripted backend, spoken to over real HTTP."""

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from pipeline.errors import InvalidRequestError, ReplicaLostError
from pipeline.serve.api import make_api
from pipeline.serve.in_flight import InFlight
from pipeline.serve.keys import KeyRing, key_hash
from pipeline.serve.limits import LimitsConfig
from pipeline.serve.messages import Ask, Delta, Ended, Event, Refused, Started, TokenText
from tests.serve.scripted import CARDS, WORDS, Script, ScriptedBackend, endless, serving, silent, wait_until, words

CHAT = {"model": "sql", "messages": [{"role": "user", "content": "users?"}]}
TEXT = {"model": "sql", "prompt": "users?"}
ANSWER = "".join(WORDS)
USAGE = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}


class Gateway:
    """A running gateway and what is behind it."""

    def __init__(self, url: str, backend: ScriptedBackend) -> None:
        self.backend = backend
        self.client = httpx.Client(base_url=url, timeout=20)

    def chat(self, **fields: Any) -> httpx.Response:
        return self.client.post("/v1/chat/completions", json={**CHAT, **fields})

    def text(self, **fields: Any) -> httpx.Response:
        return self.client.post("/v1/completions", json={**TEXT, **fields})

    def answers_by(self, script: Script) -> None:
        self.backend.script = script


@pytest.fixture
def start() -> Iterator[Any]:
    with ExitStack() as stack:

        def start_gateway(script: Script | None = None, **options: Any) -> Gateway:
            backend = ScriptedBackend(script) if script is not None else ScriptedBackend()
            gateway = Gateway(stack.enter_context(serving(make_api(backend, CARDS, **options))), backend)
            stack.callback(gateway.client.close)
            return gateway

        yield start_gateway


@pytest.fixture(scope="module")
def shared_gateway() -> Iterator[Gateway]:
    backend = ScriptedBackend()
    with serving(make_api(backend, CARDS)) as url:
        gateway = Gateway(url, backend)
        yield gateway
        gateway.client.close()


@pytest.fixture
def gateway(shared_gateway: Gateway) -> Gateway:
    shared_gateway.answers_by(words)
    shared_gateway.backend.asks.clear()
    return shared_gateway


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream, which must end as OpenAI's do."""
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    lines = response.text.split("\n\n")
    assert lines.pop() == ""
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error of a response, which must have OpenAI's shape and tell nothing of the inside."""
    error: dict[str, Any] = response.json()["error"]
    assert set(response.json()) == {"error"}
    assert set(error) == {"message", "type", "param", "code"}
    assert not re.search(r"Traceback|\.py\b|/(tmp|home|root|usr|work)\b", response.text)
    return error


def test_a_chat_is_answered_in_openais_shape(gateway: Gateway) -> None:
    response = gateway.chat(temperature=0.5, schema="CREATE TABLE users (id int)")
    assert response.status_code == 200
    body = response.json()
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{32}", body.pop("id"))
    assert abs(body.pop("created") - time.time()) < 60
    assert body == {
        "object": "chat.completion",
        "model": "sql",
        "system_fingerprint": "fp_aaaaaaaaaaaa",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": ANSWER, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": USAGE,
    }
    (ask,) = gateway.backend.asks
    assert (ask.expert, ask.is_streamed) == ("sql", False)
    assert ask.fields == {"messages": CHAT["messages"], "schema": "CREATE TABLE users (id int)"}
    assert ask.options == {"temperature": 0.5}
    assert ask.deadline == pytest.approx(LimitsConfig().max_seconds, abs=5)


def test_auto_asks_the_model_that_the_prompt_is_for(gateway: Gateway) -> None:
    chat = gateway.chat(model="auto", messages=[{"role": "user", "content": "Write SQL for users."}])
    assert chat.json()["model"] == "sql"
    assert gateway.text(model="auto", prompt="Users, in Cypher!").json()["model"] == "cypher"
    assert [ask.expert for ask in gateway.backend.asks] == ["sql", "cypher"]
    nobody = gateway.text(model="auto", prompt="Hm.")
    assert nobody.status_code == 400
    assert error_of(nobody)["code"] == "no_expert_fits"


def test_a_prompt_is_completed_in_openais_shape(gateway: Gateway) -> None:
    body = gateway.text().json()
    assert re.fullmatch(r"cmpl-[0-9a-f]{32}", body.pop("id"))
    body.pop("created")
    assert body == {
        "object": "text_completion",
        "model": "sql",
        "system_fingerprint": "fp_aaaaaaaaaaaa",
        "choices": [{"index": 0, "text": ANSWER, "logprobs": None, "finish_reason": "stop"}],
        "usage": USAGE,
    }


def test_a_streamed_chat_says_who_speaks_then_the_words_then_why_it_ended(gateway: Gateway) -> None:
    chunks = events(gateway.chat(stream=True))
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    assert {(chunk["object"], chunk["model"]) for chunk in chunks} == {("chat.completion.chunk", "sql")}
    assert [chunk["choices"] for chunk in chunks] == [
        [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]
        for delta, reason in [
            ({"role": "assistant", "content": "", "refusal": None}, None),
            *(({"content": word}, None) for word in WORDS),
            ({}, "stop"),
        ]
    ]
    assert not any("usage" in chunk for chunk in chunks)


def test_a_streamed_completion_has_text_alone(gateway: Gateway) -> None:
    chunks = events(gateway.text(stream=True))
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert [chunk["choices"][0]["text"] for chunk in chunks] == [*WORDS, ""]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * len(WORDS) + ["stop"]


@pytest.mark.parametrize("route", ["chat", "text"])
def test_a_stream_tells_its_usage_last_if_asked(gateway: Gateway, route: str) -> None:
    chunks = events(getattr(gateway, route)(stream=True, stream_options={"include_usage": True}))
    assert [chunk["usage"] for chunk in chunks] == [None] * (len(chunks) - 1) + [USAGE]
    assert chunks[-1]["choices"] == []


def test_several_answers_are_told_apart(gateway: Gateway) -> None:
    body = gateway.chat(n=3).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert body["usage"]["completion_tokens"] == 15
    chunks = events(gateway.chat(n=3, stream=True))
    for index in range(3):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert "".join(choice["delta"].get("content", "") for choice in own) == ANSWER
        assert [choice["finish_reason"] for choice in own][-1] == "stop"


async def with_logprobs(_: Ask) -> AsyncIterator[Event]:
    other = TokenText("b", b"b", -3.0)
    first = TokenText("ä", "ä".encode(), -0.5, (TokenText("ä", "ä".encode(), -0.5), other))
    yield Started(2)
    yield Delta("ä", 0, (first,))
    yield Delta("b", 0, (TokenText("b", b"b", float("-inf"), (other,)),))
    yield Ended("length", 2)


def test_logprobs_of_a_chat(gateway: Gateway) -> None:
    gateway.answers_by(with_logprobs)
    whole = gateway.chat(logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]
    top = [{"token": "ä", "logprob": -0.5, "bytes": [195, 164]}, {"token": "b", "logprob": -3.0, "bytes": [98]}]
    assert whole == {
        "content": [
            {**top[0], "top_logprobs": top},
            {"token": "b", "logprob": -9999.0, "bytes": [98], "top_logprobs": [top[1]]},
        ],
        "refusal": None,
    }
    chunks = events(gateway.chat(logprobs=True, top_logprobs=2, stream=True))
    told = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [entry for logprobs in told if logprobs for entry in logprobs["content"]] == whole["content"]


def test_logprobs_of_a_completion(gateway: Gateway) -> None:
    gateway.answers_by(with_logprobs)
    whole = gateway.text(logprobs=2).json()["choices"][0]["logprobs"]
    assert whole == {
        "tokens": ["ä", "b"],
        "token_logprobs": [-0.5, -9999.0],
        "top_logprobs": [{"ä": -0.5, "b": -3.0}, {"b": -3.0}],
        "text_offset": [0, 1],
    }
    told = [chunk["choices"][0]["logprobs"] for chunk in events(gateway.text(logprobs=2, stream=True))]
    for column, values in whole.items():
        assert [value for logprobs in told if logprobs for value in logprobs[column]] == values


def test_models_are_listed_and_shown(gateway: Gateway) -> None:
    listed = gateway.client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [entry["id"] for entry in listed["data"]] == ["cypher", "sql"]
    shown = gateway.client.get("/v1/models/sql").json()
    assert shown in listed["data"]
    shown.pop("created")
    assert shown == {
        "id": "sql",
        "object": "model",
        "owned_by": "expert-pipeline",
        "base": "tiny",
        "version": "1.2.0",
        "digest": "a" * 64,
        "kind": "lora",
        "description": None,
        "takes_schema": True,
        "dialects": [],
    }


@pytest.mark.parametrize("name", ["automatic", "gpt-4o", "../sql", "SQL"])
def test_an_unknown_model_is_answered_with_the_list(gateway: Gateway, name: str) -> None:
    response = gateway.chat(model=name)
    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert error["message"].endswith("The models are cypher, sql.")
    assert not gateway.backend.asks


def test_an_unknown_model_cannot_be_shown(gateway: Gateway) -> None:
    response = gateway.client.get("/v1/models/a/b")
    assert (response.status_code, error_of(response)["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/..%2f..%2fetc/passwd", 404),
        ("GET", "/playground/..%2f..%2fgateway", 404),
    ],
)
def test_unknown_routes_are_told_in_the_same_shape(gateway: Gateway, method: str, path: str, status: int) -> None:
    response = gateway.client.request(method, path)
    assert (response.status_code, error_of(response)["code"]) == (status, "unknown_route")


def test_health_and_readiness(start: Any) -> None:
    state = [True]

    async def is_ready() -> bool:
        return state[0]

    gateway = start(is_ready=is_ready)
    assert gateway.client.get("/health").json() == {"status": "ok"}
    assert gateway.client.get("/ready").json() == {"status": "ready"}
    state[0] = False
    response = gateway.client.get("/ready")
    assert (response.status_code, error_of(response)["code"]) == (503, "replica_lost")
    assert gateway.client.get("/health").status_code == 200


def test_the_page_is_served_under_strict_headers_and_can_be_left_out(start: Any) -> None:
    page = start().client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    assert len(page.headers.get_list("referrer-policy")) == 1
    assert start(playground=False).client.get("/").status_code == 404


def test_every_response_names_its_request(gateway: Gateway) -> None:
    sent = gateway.client.get("/health", headers={"x-request-id": "order-66:a.b"})
    assert sent.headers["x-request-id"] == "order-66:a.b"
    for odd in ("x" * 200, "a b", "<script>", ""):
        own = gateway.client.get("/v1/nothing", headers={"x-request-id": odd}).headers["x-request-id"]
        assert re.fullmatch(r"[0-9a-f]{32}", own)


async def refused(_: Ask) -> AsyncIterator[Event]:
    yield Refused("prompt_too_long", "the prompt has 900 tokens, and the model's context holds 512", "Shorten it.")


async def broken(_: Ask) -> AsyncIterator[Event]:
    raise KeyError("/home/secret/place")
    yield


async def broken_package(_: Ask) -> AsyncIterator[Event]:
    yield Refused("invalid_archive", "/home/secret/expert-sql.expert is damaged", "Copy it again.")


async def lost_early(_: Ask) -> AsyncIterator[Event]:
    yield Started(7)
    raise ReplicaLostError("the replica that was answering is lost", hint="Ask again.")


async def cut_off(_: Ask) -> AsyncIterator[Event]:
    yield Started(7)


async def out_of_memory(_: Ask) -> AsyncIterator[Event]:
    yield Started(7)
    yield Ended("error", 0, 0, "out_of_memory", "the device has too little memory")


async def late(_: Ask) -> AsyncIterator[Event]:
    yield Started(7)
    yield Ended("error", 3, 0, "deadline_exceeded", "the answer was not finished within 1 seconds")


FAILURES = [
    (refused, 400, "prompt_too_long"),
    (broken, 500, "serve_failed"),
    (broken_package, 500, "invalid_archive"),
    (lost_early, 503, "replica_lost"),
    (cut_off, 503, "replica_lost"),
    (out_of_memory, 503, "out_of_memory"),
    (late, 504, "deadline_exceeded"),
]


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(("script", "status", "code"), FAILURES)
def test_a_failure_before_the_first_word_is_a_status(
    gateway: Gateway, script: Script, status: int, code: str, is_streamed: bool
) -> None:
    gateway.answers_by(script)
    response = gateway.chat(stream=is_streamed)
    assert (response.status_code, error_of(response)["code"]) == (status, code)
    assert "secret" not in response.text
    assert ("retry-after" in response.headers) == (status == 503)
    assert gateway.backend.num_open == 0


@pytest.mark.parametrize(("script", "status", "code"), FAILURES[1:])
def test_a_failure_after_the_first_word_is_the_streams_last_event(
    gateway: Gateway, script: Script, status: int, code: str
) -> None:
    async def late_failure(ask: Ask) -> AsyncIterator[Event]:
        yield Started(7)
        yield Delta("SELECT")
        async for event in script(ask):
            yield event

    gateway.answers_by(late_failure)
    response = gateway.chat(stream=True)
    assert response.status_code == 200
    last = response.text.removesuffix("\n\n").rpartition("data: ")[2]
    assert json.loads(last)["error"]["code"] == code
    assert "secret" not in response.text
    assert gateway.backend.num_open == 0


def test_the_reason_that_a_client_is_not_told_is_in_the_log(gateway: Gateway, caplog: pytest.LogCaptureFixture) -> None:
    gateway.answers_by(broken_package)
    response = gateway.chat()
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "/home/secret/expert-sql.expert is damaged" in record.getMessage()
    assert response.headers["x-request-id"] in record.getMessage()


def test_prompts_are_logged_only_if_asked(start: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pipeline.serve")
    for log_prompts in (False, True):
        caplog.clear()
        gateway = start(log_prompts=log_prompts)
        gateway.chat()
        gateway.chat(stream=True)
        wait_until(lambda: caplog.text.count("status=200") == 2)  # written after the answer's last byte
        assert caplog.text.count("users?") == (2 if log_prompts else 0)
        assert caplog.text.count(json.dumps(ANSWER)) == (2 if log_prompts else 0)


def test_a_client_that_leaves_a_stream_stops_the_backend(start: Any) -> None:
    gateway = start(endless)
    with gateway.client.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as response:
        lines = response.iter_lines()  # kept: when it goes, the connection is closed
        next(lines)
        assert gateway.backend.num_open == 1
    wait_until(lambda: gateway.backend.num_open == 0, seconds=2)


def test_a_client_that_leaves_before_a_whole_answer_stops_the_backend(start: Any) -> None:
    gateway = start(silent)
    with pytest.raises(httpx.ReadTimeout):
        gateway.client.post("/v1/completions", json=TEXT, timeout=0.3)
    wait_until(lambda: gateway.backend.num_open == 0, seconds=2)
    assert len(gateway.backend.asks) == 1


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_request_ends_at_its_deadline(start: Any, is_streamed: bool) -> None:
    gateway = start(silent)
    response = gateway.chat(timeout=0.2, stream=is_streamed)
    assert (response.status_code, error_of(response)["code"]) == (504, "deadline_exceeded")
    assert "0.2 seconds" in response.text
    assert response.headers["x-should-retry"] == "false"
    assert gateway.backend.asks[0].deadline == pytest.approx(0.2, abs=0.1)
    assert gateway.backend.num_open == 0


def test_a_stream_that_runs_into_the_services_deadline_ends_with_an_error(start: Any) -> None:
    gateway = start(endless, limits=LimitsConfig(max_seconds=0.3))
    response = gateway.chat(stream=True)
    assert response.status_code == 200
    assert '"deadline_exceeded"' in response.text.rpartition("data: ")[2]
    assert gateway.backend.num_open == 0


def test_too_many_requests_are_refused_and_room_is_given_back(start: Any) -> None:
    limits = LimitsConfig(max_requests=2, retry_after_seconds=3)
    gateway = start(silent, limits=limits)
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(gateway.chat, timeout=1.0) for _ in range(2)]
        wait_until(lambda: gateway.backend.num_open == 2)
        response = gateway.chat()
        assert (response.status_code, error_of(response)["code"]) == (429, "overloaded")
        assert response.headers["retry-after"] == "3"
        assert error_of(response)["type"] == "rate_limit_error"
        assert gateway.client.get("/health").status_code == 200
        assert [one.result().status_code for one in running] == [504, 504]
    assert gateway.chat(timeout=0.1).status_code == 504


def test_a_service_that_ends_finishes_what_was_begun_and_takes_no_more(start: Any) -> None:
    limits = LimitsConfig()
    in_flight = InFlight(limits)
    gateway = start(silent, limits=limits, in_flight=in_flight)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(gateway.chat, timeout=1.0)
        wait_until(lambda: gateway.backend.num_open == 1)
        in_flight.close()
        refused = gateway.chat()
        assert (refused.status_code, error_of(refused)["code"]) == (503, "shutting_down")
        assert running.result().status_code == 504  # at its own deadline
    assert in_flight.total == 0


def test_one_keys_requests_do_not_stand_in_anothers_way(start: Any) -> None:
    keys = KeyRing({"alice": key_hash("one"), "bob": key_hash("two")})
    gateway = start(silent, keys=keys, limits=LimitsConfig(max_requests_per_key=1))

    def ask(key: str) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"}
        return gateway.client.post("/v1/completions", json={**TEXT, "timeout": 1.0}, headers=headers)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, "one")
        wait_until(lambda: gateway.backend.num_open == 1)
        refused_one = ask("one")
        assert (refused_one.status_code, error_of(refused_one)["code"]) == (429, "too_many_requests")
        assert ask("two").status_code == 504
        assert running.result().status_code == 504


def test_metrics_take_note_of_every_request(start: Any) -> None:
    notes: list[tuple[str | None, int, str | None]] = []

    class Notes:
        def note(self, *, expert: str | None, status: int, code: str | None, seconds: float) -> None:
            assert 0 <= seconds < 60
            notes.append((expert, status, code))

    gateway = start(metrics=Notes())
    gateway.chat()
    gateway.chat(model="nobody")
    gateway.chat(tools=[1])
    gateway.answers_by(broken)
    gateway.chat()
    wait_until(lambda: len(notes) == 4)
    assert set(notes) == {
        ("sql", 200, None),
        (None, 404, "model_not_found"),
        (None, 400, "invalid_request"),
        ("sql", 500, "serve_failed"),
    }


def test_an_error_of_the_backends_own_kind_keeps_its_words(start: Any) -> None:
    async def refusing(_: Ask) -> AsyncIterator[Event]:
        raise InvalidRequestError("prompt is empty", hint="Give prompt as text that is not blank.")
        yield

    error = error_of(start(refusing).text())
    assert error["message"] == "prompt is empty. Give prompt as text that is not blank."
    assert error["param"] == "prompt"


def test_many_streams_at_once_are_not_mixed_up(gateway: Gateway) -> None:
    async def echo(ask: Ask) -> AsyncIterator[Event]:
        yield Started(1)
        for letter in ask.fields["prompt"]:
            await asyncio.sleep(0)
            yield Delta(letter)
        yield Ended("stop", 1)

    gateway.answers_by(echo)
    prompts = [f"prompt number {number}" for number in range(32)]
    with ThreadPoolExecutor(32) as pool:
        answers = pool.map(lambda prompt: events(gateway.text(prompt=prompt, stream=True)), prompts)
        told = ["".join(chunk["choices"][0]["text"] for chunk in chunks) for chunks in answers]
    assert told == prompts
