"""Lines of a batch file and bodies over HTTP, answered by one engine: the same statuses, answers and errors."""

import asyncio
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import httpx
import pytest

from pipeline import demo
from pipeline.batch.answering import Answering, EngineFailedError, row_seed
from pipeline.batch.openai_answers import CREATED, LineAnswers, OpenAIRules
from pipeline.batch.openai_lines import LineIds
from pipeline.batch.rows import Row
from pipeline.batch.shard_stats import SAMPLES_PER_CODE
from pipeline.engine.requests import RequestBuilder
from pipeline.engine.runtime import open_experts
from pipeline.engine.stats import EngineStats
from pipeline.engine.types import Completion, Engine, Failure, Request
from pipeline.errors import InferenceError, OutputError, RoutingError
from pipeline.package import Routing, open_package
from pipeline.serve.api import make_api
from pipeline.serve.local import LocalBackend

NAMES = {task: f"expert-{task}" for task in demo.TASKS}
SCHEMA = "CREATE TABLE users (id INT, name TEXT, city TEXT);"
QUESTION = "How many users are there per city?"
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
PEOPLE = '{"city": "string", "age": "integer"}'
CITY = {"type": "object", "properties": {"city": {"enum": ["Paris", "Oslo"]}}, "required": ["city"]}
FREE = {"use_grammar": False, "temperature": 8.0, "max_tokens": 12}

Body = dict[str, Any]
Answer = Callable[..., list[dict[str, Any]]]


@dataclass(frozen=True)
class Bench:
    """One engine with the demo's three experts, and the two ways to ask it."""

    backend: LocalBackend
    builders: dict[str, RequestBuilder]
    rules: OpenAIRules

    def lines(self, engine: Engine | None = None, rules: OpenAIRules | None = None, seed: int = 0) -> Answering[bytes]:
        chosen = engine if engine is not None else self.backend.experts.engine
        return Answering(chosen, LineAnswers(rules or self.rules, self.builders, partial(row_seed, seed)))


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    packages = {NAMES[task]: open_package(demo.package(task)) for task in demo.TASKS}
    backend = LocalBackend(open_experts(packages, demo.BASE_MODEL, dtype="float32", device="cpu"))
    digests = {name: package.digest for name, package in packages.items()}
    rules = OpenAIRules({name: name for name in packages}, None, digests, "f00")
    yield Bench(backend, {name: backend.experts.load(name) for name in packages}, rules)
    backend.close()


def chat(**fields: Any) -> tuple[str, Body]:
    asked: Body = {"model": NAMES["sql"], "messages": [{"role": "user", "content": QUESTION}], "schema": SCHEMA}
    return CHAT, {name: value for name, value in {**asked, **fields}.items() if value is not ...}


def text(**fields: Any) -> tuple[str, Body]:
    return TEXT, {"model": NAMES["cypher"], "prompt": QUESTION, "schema": SCHEMA, **fields}


def row(number: int, url: str, body: Any, custom_id: Any = ...) -> Row:
    name = f"request-{number}" if custom_id is ... else custom_id
    values = {"custom_id": name, "method": "POST", "url": url, "body": body}
    return Row(f"in.jsonl@{number}", values, None)


def parsed(lines: Iterable[bytes]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines]


def in_batch(bench: Bench, asked: Iterable[tuple[str, Body]], seed: int = 0) -> list[dict[str, Any]]:
    rows = [row(number, url, body) for number, (url, body) in enumerate(asked)]
    return parsed(bench.lines(seed=seed).answer(rows))


def online(bench: Bench, asked: Iterable[tuple[str, Body]]) -> list[httpx.Response]:
    async def ask_all() -> list[httpx.Response]:
        app = make_api(bench.backend, bench.backend.cards)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return list(await asyncio.gather(*(client.post(url, json=body, timeout=60) for url, body in asked)))

    return asyncio.run(ask_all())


def same(here: Any, there: Any) -> bool:
    """Whether two values of JSON are equal, numbers but for their last digits."""
    if isinstance(here, dict) and isinstance(there, dict):
        return here.keys() == there.keys() and all(same(value, there[name]) for name, value in here.items())
    if isinstance(here, list) and isinstance(there, list):
        return len(here) == len(there) and all(map(same, here, there))
    if isinstance(here, float) and isinstance(there, float):
        return math.isclose(here, there, rel_tol=1e-4, abs_tol=1e-4)
    return type(here) is type(there) and bool(here == there)


ANSWERED: dict[str, tuple[str, Body]] = {
    "a plain chat": chat(),
    "a plain completion": text(),
    "another expert": chat(
        model=NAMES["json"],
        messages=[{"role": "user", "content": "Maria lives in Lima and is 30 years old."}],
        schema=PEOPLE,
    ),
    "a seed": chat(**FREE, seed=7),
    "another seed": text(**FREE, seed=8),
    "three answers": chat(**FREE, seed=9, n=3),
    "two completions with logprobs": text(**FREE, seed=10, n=2, logprobs=2),
    "logprobs": chat(seed=11, logprobs=True, top_logprobs=3),
    "a schema for the answer": chat(
        seed=12, response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
    ),
    "a JSON object": chat(seed=13, max_tokens=8, response_format={"type": "json_object"}),
    "an expression": text(seed=14, regex="[A-Z]{3}", temperature=1.5),
    "a limit": chat(max_completion_tokens=3),
    "a stop string": chat(use_grammar=False, stop=[" FROM"]),
    "a developer and parts": chat(
        messages=[
            {"role": "developer", "content": "Answer briefly."},
            {"role": "user", "content": [{"type": "text", "text": QUESTION}]},
        ],
        schema=...,
    ),
    "neutral fields": chat(user="someone", store=False, stream=False, logit_bias={}, metadata=None),
}
REFUSED: dict[str, tuple[str, Body]] = {
    "an unknown model": chat(model="gpt-4o-mini"),
    "no model": chat(model=...),
    "tools": chat(tools=[{"type": "function", "function": {"name": "f"}}]),
    "a misspelt field": chat(temprature=1),
    "no answers": chat(n=0),
    "too many answers": text(n=1000),
    "cold": text(temperature=-1.0),
    "an image": chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
    "no messages": chat(messages=[]),
    "several prompts": text(prompt=["a", "b"]),
    "a long prompt": chat(messages=[{"role": "user", "content": "users " * 3000}]),
    "two constraints": chat(response_format={"type": "json_object"}, regex="a"),
    "a grammar of no use": text(grammar="root ::= ("),
    "an unknown format": chat(response_format={"type": "xml"}),
    "an unknown speaker": chat(messages=[{"role": "ghost", "content": "boo"}]),
}


def test_bodies_are_answered_as_online(bench: Bench) -> None:
    here, there = in_batch(bench, ANSWERED.values()), online(bench, ANSWERED.values())
    texts = set()
    for number, (name, line, response) in enumerate(zip(ANSWERED, here, there, strict=True)):
        assert (line["custom_id"], line["error"]) == (f"request-{number}", None)
        assert (line["response"]["status_code"], response.status_code) == (200, 200), (name, line, response.text)
        content, wanted = line["response"]["body"], response.json()
        url, _ = ANSWERED[name]
        ids = LineIds.of("f00", f"in.jsonl@{number}")
        assert content.pop("id") == ids.answer("chat" if url == CHAT else "text")
        assert content.pop("created") == CREATED
        assert {wanted.pop("id")[:5], wanted.pop("created") > 0} == {"chatc" if url == CHAT else "cmpl-", True}
        assert same(content, wanted), f"{name}\n{content}\n{wanted}"
        texts |= {json.dumps(choice.get("message") or choice.get("text")) for choice in content["choices"]}
    assert len(texts) > 10, "answers are many and various"


def test_bodies_are_refused_as_online(bench: Bench) -> None:
    here, there = in_batch(bench, REFUSED.values()), online(bench, REFUSED.values())
    for number, (name, line, response) in enumerate(zip(REFUSED, here, there, strict=True)):
        assert (line["custom_id"], line["error"]) == (f"request-{number}", None)
        assert line["response"]["status_code"] == response.status_code != 200, (name, line, response.text)
        error, wanted = line["response"]["body"]["error"], response.json()["error"]
        assert {**error, "message": ""} == {**wanted, "message": ""}, name
        assert wanted["message"].startswith(error["message"][:40].rstrip(".")), name


def test_a_line_without_a_seed_draws_by_its_custom_id(bench: Bench) -> None:
    (first, again, other) = parsed(
        bench.lines(seed=5).answer(
            [row(0, *chat(**FREE)), row(1, *chat(**FREE), custom_id="request-0"), row(2, *chat(**FREE))]
        )
    )
    (seeded,) = in_batch(bench, [chat(**FREE, seed=row_seed(5, "id:request-0"))])
    (elsewhere,) = in_batch(bench, [chat(**FREE)], seed=6)
    drawn = [line["response"]["body"]["choices"] for line in (first, again, other, seeded, elsewhere)]
    assert drawn[0] == drawn[1] == drawn[3], "two lines of one custom_id are both answered, and alike"
    assert drawn[0] != drawn[2]
    assert drawn[0] != drawn[4]
    assert len({line["id"] for line in (first, again, other)}) == 3


@pytest.mark.parametrize(
    ("fields", "param"), [({"stream": True}, "stream"), ({"timeout": 5.0}, "timeout")], ids=["stream", "timeout"]
)
def test_what_only_a_service_can_give_is_an_error_that_names_it(bench: Bench, fields: Body, param: str) -> None:
    (line,) = in_batch(bench, [chat(**fields)])
    error = line["response"]["body"]["error"]
    assert (line["response"]["status_code"], error["param"], error["code"]) == (400, param, "invalid_request")
    assert error["message"].startswith(f"{param} is not supported in a batch file. ")


def test_every_line_has_its_answer_in_its_place_whatever_is_around_it(bench: Bench) -> None:
    good = chat()
    broken = Row("in.jsonl@9", {}, Failure("invalid_row", "line at byte 9 of in.jsonl: not JSON"))
    rows = [
        row(0, *good),
        broken,
        row(2, *good, custom_id=None),
        row(3, CHAT, None),
        row(4, "/v1/x", {}),
        row(5, *good),
    ]
    lines = parsed(bench.lines().answer(rows))
    assert [line["custom_id"] for line in lines] == ["request-0", None, None, "request-3", "request-4", "request-5"]
    assert [line["response"]["status_code"] for line in lines] == [200, 400, 400, 400, 404, 200]
    codes = [line["response"]["body"]["error"]["code"] for line in lines[1:5]]
    assert codes == ["invalid_row", "invalid_request", "invalid_request", "unknown_route"]
    assert lines[1]["response"]["body"]["error"]["message"] == "Line at byte 9 of in.jsonl: not JSON."
    assert lines[0]["response"]["body"]["choices"] == lines[5]["response"]["body"]["choices"]
    assert bench.lines().answer(rows) == bench.lines().answer(rows), "the same rows give the same bytes"
    assert bench.lines().answer([]) == []


def test_any_model_is_answered_where_the_job_says_so(bench: Bench) -> None:
    rules = replace(bench.rules, otherwise=NAMES["sql"])
    rows = [row(0, *chat()), row(1, *chat(model="meta-llama/Meta-Llama-3-8B-Instruct"))]
    named, any_other = (line["response"]["body"] for line in parsed(bench.lines(rules=rules).answer(rows)))
    assert any_other["model"] == "meta-llama/Meta-Llama-3-8B-Instruct", "the answer says what was asked for"
    assert any_other["choices"] == named["choices"]
    assert any_other["system_fingerprint"] == named["system_fingerprint"]


class BrokenEngine:
    """An engine whose answers are given; the seam is `pipeline.engine.types.Engine`."""

    def __init__(self, *completions: Completion) -> None:
        self.completions = completions

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:  # noqa: ARG002 - the seam
        return iter(self.completions)

    def stats(self) -> EngineStats:
        return EngineStats()

    def close(self) -> None: ...


def test_a_line_of_which_one_answer_fails_is_an_error_with_its_reason(bench: Bench) -> None:
    reason = Failure(InferenceError.code, "the number of row 7 is not finite")
    engine = BrokenEngine(Completion("0", "", "error", 7, 0, reason, index=1), Completion("0", "x", "stop", 7, 1))
    (line,) = parsed(bench.lines(engine).answer([row(0, *chat(n=2))]))
    assert line["response"]["status_code"] == 500
    assert line["response"]["body"]["error"]["message"] == "The number of row 7 is not finite."


def test_a_line_that_is_given_up_is_an_error_under_its_name(bench: Bench) -> None:
    lines, failure = bench.lines(), Failure("row_kills_worker", "each process that answered this row ended")
    asked = [row(0, *chat()), row(1, *chat(), custom_id=None)]
    given_up = parsed(lines.form.fail(one, failure) for one in asked)
    assert [line["custom_id"] for line in given_up] == ["request-0", None]
    assert [line["id"] for line in given_up] == [line["id"] for line in parsed(lines.answer(asked))]
    assert {line["response"]["status_code"] for line in given_up} == {500}
    assert {line["response"]["body"]["error"]["code"] for line in given_up} == {"row_kills_worker"}


def test_an_engine_that_has_died_fails_the_shard(bench: Bench) -> None:
    class DeadEngine(BrokenEngine):
        def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:  # noqa: ARG002 - the seam
            raise InferenceError("the device is gone", hint="-")

    lines = bench.lines(DeadEngine())
    with pytest.raises(EngineFailedError, match="the device is gone"):
        lines.answer([row(0, *chat())])
    assert lines.progress() is None


def test_what_a_shard_tells_of_its_lines(bench: Bench) -> None:
    lines = bench.lines()
    rows = [row(0, *chat()), row(1, *text(n=2, seed=3, **FREE)), *(row(2, *chat(model="x")) for _ in range(5))]
    answers = lines.answer(rows)
    stats = lines.form.stats(rows, answers, 1.5)
    usages = [line["response"]["body"]["usage"] for line in parsed(answers[:2])]
    assert stats.seconds == 1.5
    assert stats.finish_reasons == {"stop": 1, "length": 1, "error": 5}
    assert stats.prompt_tokens.total == sum(usage["prompt_tokens"] for usage in usages)
    assert stats.completion_tokens.total == sum(usage["completion_tokens"] for usage in usages)
    assert [sample.row for sample in stats.error_samples["model_not_found"]] == ["in.jsonl@2"] * SAMPLES_PER_CODE


def test_an_answer_that_is_lost_fails_the_shard(bench: Bench) -> None:
    """So that it is tried again, rather than committed as an error for ever."""
    engine = BrokenEngine(Completion("0", "x", "stop", 7, 1))
    with pytest.raises(OutputError, match="neither an answer nor a failure"):
        bench.lines(engine).answer([row(0, *chat(n=2))])


def test_auto_asks_the_expert_that_the_prompt_is_for(bench: Bench) -> None:
    routings = {NAMES["sql"]: Routing(keywords=("users",)), NAMES["json"]: Routing(keywords=("turned",))}
    rules = replace(bench.rules, routings=routings)
    asked = [chat(model="auto"), chat(model="auto", messages=[{"role": "user", "content": "Hm."}])]
    rows = [row(number, url, body) for number, (url, body) in enumerate(asked)]
    routed, lost = parsed(bench.lines(rules=rules).answer(rows))
    (named,) = in_batch(bench, [chat()])
    assert routed["response"]["body"]["model"] == NAMES["sql"]
    assert routed["response"]["body"]["choices"] == named["response"]["body"]["choices"]
    assert lost["response"]["body"]["error"]["code"] == RoutingError.code
    (unknown,) = in_batch(bench, [chat(model="auto")])
    assert unknown["response"]["body"]["error"]["code"] == "model_not_found", "one expert alone is no choice"
