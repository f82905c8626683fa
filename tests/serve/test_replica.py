"""What a replica does, in this process: the same answers as the engine alone, experts that come and go, deadlines."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from pipeline import demo
from pipeline.engine.residents import ResidentExperts
from pipeline.engine.runtime import load_expert, open_experts
from pipeline.engine.token_bytes import TokenBytes
from pipeline.errors import AdapterError, InferenceError, OverloadedError, UnknownModelError
from pipeline.metrics import AnswerTimes
from pipeline.package import ExpertPackage, open_package
from pipeline.serve.local import LocalBackend
from pipeline.serve.messages import Ask, Delta, Ended, Event, Refused, Started
from tests import tiny

SCHEMA = "CREATE TABLE users (id INT, name TEXT, city TEXT);"
QUESTIONS = ["How many users are there per city?", "List the name of all users.", "How many users are there?"]
LONG = {"max_tokens": 400, "ignore_eos": True, "use_grammar": False, "stop": ["\0"]}
SECONDS = 30.0


@pytest.fixture(scope="module")
def packages() -> dict[str, ExpertPackage]:
    return {task: open_package(demo.package(task)) for task in demo.TASKS}


@pytest.fixture(scope="module")
def backend(packages: dict[str, ExpertPackage]) -> Iterator[LocalBackend]:
    """Room for two of the three experts."""
    backend = LocalBackend(open_experts(packages, demo.BASE_MODEL, max_resident=2, dtype="float32", device="cpu"))
    yield backend
    backend.close()


@pytest.fixture
def own(packages: dict[str, ExpertPackage]) -> Iterator[Callable[..., LocalBackend]]:
    """Makes backends for one test."""
    made: list[LocalBackend] = []

    def make(max_resident: int | None = None, **options: Any) -> LocalBackend:
        experts = open_experts(packages, demo.BASE_MODEL, max_resident=max_resident, dtype="float32", device="cpu")
        made.append(LocalBackend(experts, **options))
        return made[-1]

    yield make
    for backend in made:
        backend.close()


def ask(
    number: int, expert: str = "sql", *, stream: bool = False, deadline: float | None = None, **options: Any
) -> Ask:
    fields = {"prompt": QUESTIONS[number % len(QUESTIONS)], "schema": SCHEMA}
    return Ask(str(number), expert, fields, options, is_streamed=stream, deadline=deadline)


async def events_of(backend: LocalBackend, one: Ask) -> list[Event]:
    async with aclosing(backend.ask(one)) as events:
        return [event async for event in events]


async def all_events(backend: LocalBackend, asks: list[Ask]) -> list[list[Event]]:
    return list(await asyncio.gather(*(events_of(backend, one) for one in asks)))


def text_of(events: list[Event], index: int = 0) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta) and event.index == index)


def ends_of(events: list[Event]) -> list[Ended]:
    return [event for event in events if isinstance(event, Ended)]


def wait_until(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + SECONDS
    while not is_so():
        assert time.monotonic() < until, "it did not come to pass"
        time.sleep(0.005)


def is_idle(experts: ResidentExperts) -> bool:
    stats = experts.engine.stats()
    bank = experts.engine.bank
    in_use = bank is not None and any(bank.info(name).is_in_use for name in bank.names())
    return not (stats.num_running or stats.num_waiting or in_use)


# --- answers ---------------------------------------------------------------------------------------------------------


def test_experts_that_take_turns_on_the_device_answer_as_each_does_alone(
    backend: LocalBackend, packages: dict[str, ExpertPackage]
) -> None:
    """Sampled, with seeds, three experts in room for two, whole and streamed: the oracle is each expert by itself."""
    options = {"temperature": 4.0, "max_tokens": 24, "seed": 7}
    asks = [
        ask(at, expert, stream=stream, **options)
        for expert in packages
        for at in range(len(QUESTIONS))
        for stream in (False, True)
    ]
    found = asyncio.run(all_events(backend, asks))
    for expert, package in packages.items():
        alone = load_expert(package, demo.BASE_MODEL, dtype="float32", device="cpu")
        try:
            requests = [
                alone.requests.build(str(at), prompt=question, schema=SCHEMA, options=options)
                for at, question in enumerate(QUESTIONS)
            ]
            wanted = {one.request_id: one for one in alone.engine.generate(requests)}
        finally:
            alone.engine.close()
        mine = [(one, events) for one, events in zip(asks, found, strict=True) if one.expert == expert]
        assert len(mine) == 6
        for one, events in mine:
            completion = wanted[one.request_id]
            assert events[0] == Started(completion.prompt_tokens)
            assert text_of(events) == completion.text
            assert ends_of(events) == [Ended(completion.finish_reason, completion.completion_tokens)]
    assert len(backend.experts.resident()) == 2
    assert min(backend.experts.loads.values()) >= 1
    assert is_idle(backend.experts)


def test_each_of_several_answers_comes_and_ends(backend: LocalBackend) -> None:
    options = {"n": 3, "temperature": 6.0, "seed": 1, "max_tokens": 12, "use_grammar": False}
    whole, streamed = asyncio.run(all_events(backend, [ask(0, **options), ask(0, stream=True, **options)]))
    assert sorted(end.index for end in ends_of(whole)) == [0, 1, 2]
    assert sorted(end.index for end in ends_of(streamed)) == [0, 1, 2]
    texts = [text_of(whole, index) for index in range(3)]
    assert texts == [text_of(streamed, index) for index in range(3)]
    assert len(set(texts)) > 1


@pytest.mark.parametrize("options", [{}, {"temperature": 1.2, "seed": 3, "use_grammar": False, "stop": ["ER", "o"]}])
def test_log_probabilities_are_those_of_the_text(backend: LocalBackend, options: dict[str, Any]) -> None:
    """Whole and streamed the same; the tokens are the text, without the end token, `;` or what a stop string cut."""
    asks = [ask(0, stream=stream, logprobs=2, max_tokens=30, **options) for stream in (False, True)]
    whole, streamed = asyncio.run(all_events(backend, asks))
    told = [
        [token for event in events if isinstance(event, Delta) for token in event.logprobs or ()]
        for events in (whole, streamed)
    ]
    assert told[0]
    assert [(token.utf8, [other.utf8 for other in token.top]) for token in told[0]] == [
        (token.utf8, [other.utf8 for other in token.top]) for token in told[1]
    ]
    assert [token.logprob for token in told[0]] == pytest.approx([token.logprob for token in told[1]], abs=1e-4)
    spelled = b"".join(token.utf8 for token in told[0]).decode()
    text = text_of(whole)
    assert spelled.startswith(text)
    assert b"".join(token.utf8 for token in told[0][:-1]).decode() in text, "only the last may reach beyond the text"
    assert all(len(token.top) == 2 and token.top[0].logprob >= token.top[1].logprob for token in told[0])
    assert all(token.logprob <= 0 for token in told[0])


def test_the_bytes_of_tokens_are_what_the_tokenizer_decodes() -> None:
    tokenizer = tiny.tokenizer()
    token_bytes = TokenBytes(tokenizer)
    for text in (SCHEMA, "naïve — 東京 🦊\n\ttab"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(token_bytes[token_id] for token_id in ids).decode() == text
    for token_id in range(len(tokenizer)):
        decoded = tokenizer.decode([token_id])
        if "\ufffd" not in decoded:
            assert token_bytes[token_id].decode() == decoded
    end = tokenizer.eos_token_id
    assert token_bytes.is_special(end)
    assert not token_bytes.is_special(tokenizer.encode("a")[0])
    assert token_bytes[len(tokenizer) + 5] == b""


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "options", "code"),
    [
        ({"prompt": ""}, {}, "invalid_request"),
        ({"prompt": "a", "messages": []}, {}, "invalid_request"),
        ({"prompt": "a"}, {"temperature": float("nan")}, "invalid_request"),
        ({"prompt": "a"}, {"max_tokens": -1}, "invalid_request"),
        ({"prompt": "a"}, {"temprature": 1}, "invalid_request"),
        ({"prompt": "a " * 4000}, {}, "prompt_too_long"),
        ({"prompt": "a"}, {"grammar": "root ::= ("}, "invalid_grammar"),
    ],
)
def test_what_cannot_be_answered_is_refused_and_nothing_is_computed(
    backend: LocalBackend, fields: dict[str, Any], options: dict[str, Any], code: str
) -> None:
    before = backend.experts.engine.stats().num_tokens_computed
    (event,) = asyncio.run(events_of(backend, Ask("x", "sql", fields, options)))
    assert isinstance(event, Refused)
    assert event.code == code
    assert event.message
    assert event.hint
    assert backend.experts.engine.stats().num_tokens_computed == before
    assert is_idle(backend.experts)


def test_a_prompt_beyond_the_limit_is_refused(own: Callable[..., LocalBackend]) -> None:
    backend = own(max_prompt_tokens=20)
    (event,) = asyncio.run(events_of(backend, ask(0)))
    assert isinstance(event, Refused)
    assert event.code == "prompt_too_long"
    assert "20 are allowed" in event.message


def test_an_expert_that_there_is_not_is_refused(backend: LocalBackend) -> None:
    (event,) = asyncio.run(events_of(backend, ask(0, "nobody")))
    assert isinstance(event, Refused)
    assert event.code == UnknownModelError.code


# --- deadlines, leaving, dying ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_ends_the_answer_and_frees_the_engine(backend: LocalBackend, stream: bool) -> None:
    asyncio.run(events_of(backend, ask(0)))
    events = asyncio.run(events_of(backend, ask(0, stream=stream, deadline=0.15, **LONG)))
    (end,) = ends_of(events)
    assert (end.finish_reason, end.code) == ("error", "deadline_exceeded")
    assert "0.15 seconds" in (end.message or "")
    assert 0 < end.completion_tokens < 400
    wait_until(lambda: is_idle(backend.experts))


def test_a_deadline_that_is_over_at_once_is_a_refusal_or_an_error(own: Callable[..., LocalBackend]) -> None:
    backend = own()
    (event,) = asyncio.run(events_of(backend, ask(0, deadline=0.0)))  # the expert has to be loaded first
    assert isinstance(event, Refused)
    assert event.code == "deadline_exceeded"
    wait_until(lambda: "sql" in backend.experts.resident() and is_idle(backend.experts))


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_stops_the_engine_within_a_step(backend: LocalBackend, stream: bool) -> None:
    async def leave() -> int:
        events = backend.ask(ask(0, stream=stream, **LONG))
        if stream:
            assert isinstance(await anext(events), Started)
            assert isinstance(await anext(events), Delta)
            await events.aclose()
        else:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(events), 0.2)
        return backend.experts.engine.stats().num_steps

    steps = asyncio.run(leave())
    wait_until(lambda: is_idle(backend.experts))
    assert backend.experts.engine.stats().num_steps <= steps + 2


def test_when_the_engine_is_gone_the_caller_is_told(own: Callable[..., LocalBackend]) -> None:
    backend = own()

    async def die() -> None:
        events = backend.ask(ask(0, stream=True, **LONG))
        await anext(events)
        await anext(events)
        await asyncio.to_thread(backend.experts.engine.close)
        with pytest.raises(InferenceError, match="closed"):
            async for _ in events:
                pass
        with pytest.raises(InferenceError, match="closed"):
            await events_of(backend, ask(1))

    asyncio.run(die())


def test_the_times_of_requests_are_told(own: Callable[..., LocalBackend]) -> None:
    told: list[AnswerTimes] = []
    backend = own(watch=told.append)
    asyncio.run(all_events(backend, [ask(0), Ask("x", "json", {"prompt": ""})]))
    good, bad = sorted(told, key=lambda times: times.expert != "sql")
    assert good.begun is not None
    assert good.first is not None
    assert good.asked <= good.begun <= good.first <= good.ended
    assert (good.finish_reason, good.code, good.prompt_tokens > 0, good.num_steps) == ("stop", None, True, 11)
    assert (bad.expert, bad.finish_reason, bad.code) == ("json", "refused", "invalid_request")


# --- experts on the device -------------------------------------------------------------------------------------------


def test_the_expert_not_asked_for_longest_goes_and_a_pinned_one_stays(packages: dict[str, ExpertPackage]) -> None:
    experts = open_experts(packages, demo.BASE_MODEL, max_resident=2, device="cpu", dtype="float32")
    try:
        experts.load("sql", pin=True)
        experts.load("cypher")
        experts.load("json")
        assert set(experts.resident()) == {"sql", "json"}
        experts.load("cypher")
        assert set(experts.resident()) == {"sql", "cypher"}
        assert experts.loads == {"sql": 1, "cypher": 2, "json": 1}
    finally:
        experts.engine.close()


def test_an_expert_in_use_is_waited_for(packages: dict[str, ExpertPackage]) -> None:
    opened = open_experts(packages, demo.BASE_MODEL, max_resident=1, device="cpu", dtype="float32")
    experts = ResidentExperts(opened.engine, packages, max_resident=1, room_seconds=0.3)
    try:
        experts.acquire("sql")
        with pytest.raises(OverloadedError, match="no room for the expert json"):
            experts.acquire("json")
        assert experts.try_acquire("json") is None
        timer = threading.Timer(0.1, experts.release, ["sql"])
        timer.start()
        with experts.held("json"):
            assert experts.resident() == ("json",)
        timer.join()
    finally:
        experts.engine.close()


def test_two_experts_with_one_tokenizer_share_it(packages: dict[str, ExpertPackage]) -> None:
    experts = open_experts(packages, demo.BASE_MODEL, device="cpu", dtype="float32")
    try:
        for name in packages:
            experts.load(name)
        assert len(experts._tokenizers) <= 2
    finally:
        experts.engine.close()


def test_many_who_ask_for_more_experts_than_there_is_room_for_are_all_answered(
    own: Callable[..., LocalBackend],
) -> None:
    backend = own(max_resident=1)
    asks = [ask(at, task, stream=at % 2 == 0, max_tokens=8) for at, task in enumerate(list(demo.TASKS) * 6)]
    found = asyncio.run(all_events(backend, asks))
    assert all(len(ends_of(events)) == 1 and ends_of(events)[0].code is None for events in found)
    assert len(backend.experts.resident()) == 1
    wait_until(lambda: is_idle(backend.experts))


def test_a_merged_engine_holds_no_others(packages: dict[str, ExpertPackage], tmp_path: Path) -> None:
    base = tiny.make_base(tmp_path, vocab_size=len(tiny.tokenizer()))
    path, _ = tiny.make_package("lora", base, tmp_path)
    merged = load_expert(open_package(path), base, device="cpu", dtype="float32")
    try:
        with pytest.raises(AdapterError, match="one merged expert"):
            ResidentExperts(merged.engine, packages)  # type: ignore[arg-type]
    finally:
        merged.engine.close()
