"""What a soak sends: requests of every kind, good, hostile and left alone; and what becomes of each."""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.replies import MalformedReplyError, Reply, ask, read_body, stream_events, text_of
from pipeline.demo.names import TASKS
from pipeline.demo.questions import draw_questions

BODIES_A_KIND = 24  # each is asked again and again, and must be answered with the same text
QUESTION_SEED = 5
MOST_TOLD = 20
REFUSALS = {429, 503}  # of a good request: come again later
FREE: Mapping[str, Any] = {"use_grammar": False, "stop": ["\0"], "ignore_eos": True}
JSON_SCHEMA = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
# Kinds of good requests, each with its share and what it asks for beside a question.
KINDS: Mapping[str, tuple[int, Mapping[str, Any]]] = {
    "whole": (6, {}),
    "streamed": (6, {"stream": True}),
    "sampled": (4, {"temperature": 2.0, "max_tokens": 40, **FREE}),
    "long": (2, {"stream": True, "max_tokens": 300, **FREE}),
    "several": (2, {"n": 3, "temperature": 1.0, "max_tokens": 40}),
    "several, streamed": (2, {"n": 3, "temperature": 1.0, "max_tokens": 40, "stream": True}),
    "regex": (2, {"regex": "[A-Z]{2,4}-[0-9]{2}", "temperature": 1.0}),
    "grammar": (2, {"grammar": 'root ::= "SELECT " [a-z]+ ";"', "temperature": 1.0, "max_tokens": 20, "stream": True}),
    "JSON schema": (2, {"json_schema": JSON_SCHEMA, "temperature": 1.0}),
    "log probabilities": (1, {"logprobs": 3, "max_tokens": 20}),
}
LEAVE_STREAM, LEAVE_WHOLE, HOSTILE = "left mid-stream", "left before the answer", "hostile"
OTHER_KINDS = {LEAVE_STREAM: 2, LEAVE_WHOLE: 2, HOSTILE: 4}
_GOOD = {"model": f"expert-{TASKS[0]}", "prompt": "users?"}
_DEEP = b'{"model": "expert-sql", "prompt": "?", "stop": ' + b"[" * 20_000 + b"]" * 20_000 + b"}"
_HOSTILE_FIELDS: Mapping[str, Mapping[str, Any]] = {
    "unknown model": {"model": "../../etc/passwd"},
    "unknown field": {"tools": [{"type": "function"}]},
    "wrong type": {"temperature": "hot"},
    "out of range": {"n": 10_000_000},
    "too long a prompt": {"prompt": "users " * 20_000},
    "no regex": {"regex": "([a-z"},
    "no grammar": {"grammar": "root ::= missing"},
    "a schema from elsewhere": {"json_schema": {"$ref": "http://127.0.0.1:1/schema.json"}},
    "two constraints": {"regex": "a", "grammar": 'root ::= "a"'},
}
HOSTILE_BODIES: Mapping[str, bytes] = {
    "no JSON": b"{",
    "not UTF-8": b"\xff\xfe",
    "deep": _DEEP,
    "too large": b'{"prompt": "' + b"x" * (2 << 20) + b'"}',
    "twice the same key": b'{"model": "expert-sql", "prompt": "?", "n": 1, "n": 128}',
    "not a number": b'{"model": "expert-sql", "prompt": "?", "temperature": NaN}',
    **{name: json.dumps({**_GOOD, **fields}).encode() for name, fields in _HOSTILE_FIELDS.items()},
}


@dataclass
class Tally:
    """What has become of all requests so far.

    Args:
        counts: By kind and outcome.
        faults: What was neither answered nor refused cleanly, in words.
        codes: Of refusals and of streams that were cut.
        seconds: Of answers, by kind.
        num_faults: How many; `faults` keeps the first ones.
    """

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    codes: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    num_faults: int = 0

    @property
    def total(self) -> int:
        """How many requests are over."""
        return sum(self.counts.values())

    def note(self, kind: str, outcome: str, seconds: float, code: str | None = None) -> None:
        """Count a request that ended as it may."""
        self.counts[kind, outcome] += 1
        if code is not None:
            self.codes[code] += 1
        if outcome == "answered":
            self.seconds.setdefault(kind, []).append(seconds)

    def fault(self, kind: str, words: str) -> None:
        """Count a request that was neither answered nor refused cleanly."""
        self.counts[kind, "NEITHER"] += 1
        self.num_faults += 1
        if len(self.faults) < MOST_TOLD:
            self.faults.append(f"{kind}: {words}")


class Traffic:
    """Clients that ask without a pause, each in its own random order.

    Args:
        client: Its base URL is the server's.
        seed: Of what is asked.
    """

    def __init__(self, client: httpx.AsyncClient, *, seed: int) -> None:
        self.tally = Tally()
        self._client = client
        self._seed = seed
        self._bodies = {kind: _bodies_of(fields) for kind, (_, fields) in KINDS.items()}
        self._texts: dict[tuple[str, int], tuple[str, ...]] = {}
        self._shares = {**{kind: share for kind, (share, _) in KINDS.items()}, **OTHER_KINDS}

    async def run(self, num_clients: int, until: float) -> None:
        """Ask until a time of `time.monotonic()`, and let what was begun end."""
        await asyncio.gather(*(self._ask_on(number, until) for number in range(num_clients)))

    async def _ask_on(self, number: int, until: float) -> None:
        rng = random.Random(f"{self._seed}/{number}")
        kinds, shares = list(self._shares), list(self._shares.values())
        while time.monotonic() < until:
            (kind,) = rng.choices(kinds, shares)
            match kind:
                case "left mid-stream" | "left before the answer":
                    await self._watched(kind, self._leave, rng)
                case "hostile":
                    await self._watched(kind, self._attack, rng)
                case _:
                    await self._watched(kind, self._ask, rng)

    async def _watched(
        self, kind: str, send: Callable[[str, random.Random], Awaitable[None]], rng: random.Random
    ) -> None:
        try:
            await send(kind, rng)
        except (httpx.HTTPError, MalformedReplyError) as error:
            self.tally.fault(kind, f"{type(error).__name__}: {error}")

    async def _ask(self, kind: str, rng: random.Random) -> None:
        place = rng.randrange(BODIES_A_KIND)
        reply = await ask(self._client, self._bodies[kind][place])
        if reply.is_answered:
            if self._texts.setdefault((kind, place), reply.texts) != reply.texts:
                self.tally.fault(kind, f"another answer than before to body {place}: {reply.texts}")
            else:
                self.tally.note(kind, "answered", reply.seconds)
        elif reply.is_cut:
            self.tally.note(kind, "cut, and told so", reply.seconds, reply.code)
        else:
            self._note_refusal(kind, reply, REFUSALS)

    async def _attack(self, kind: str, rng: random.Random) -> None:
        name = rng.choice(list(HOSTILE_BODIES))
        try:
            response = await self._client.post(
                "/v1/completions", content=HOSTILE_BODIES[name], headers={"Content-Type": "application/json"}
            )
        except httpx.HTTPError as error:
            self.tally.fault(f"{kind}: {name}", f"{type(error).__name__}: {error}")
            return
        reply = read_body(response, response.content, 1, response.elapsed.total_seconds())
        self._note_refusal(f"{kind}: {name}", reply, {400, 404, 413, *REFUSALS})

    async def _leave(self, kind: str, rng: random.Random) -> None:
        started = time.monotonic()
        is_stream = kind == LEAVE_STREAM
        body = {**self._bodies["long"][rng.randrange(BODIES_A_KIND)], "stream": is_stream}
        request = self._client.build_request("POST", "/v1/completions", json=body)
        if not is_stream:
            try:
                async with asyncio.timeout(rng.uniform(0.01, 0.5)):
                    await self._client.send(request)
            except TimeoutError:
                self.tally.note(kind, "left", time.monotonic() - started)
            else:
                self.tally.note(kind, "answered", time.monotonic() - started)
            return
        response = await self._client.send(request, stream=True)
        try:
            if response.status_code != 200:
                reply = read_body(response, await response.aread(), 1, time.monotonic() - started)
                self._note_refusal(kind, reply, REFUSALS)
                return
            events_left = rng.randrange(1, 40)
            async for event in stream_events(response):
                events_left -= bool(text_of(event))
                if events_left <= 0:
                    break
            self.tally.note(kind, "left", time.monotonic() - started)
        finally:
            await response.aclose()

    def _note_refusal(self, kind: str, reply: Reply, allowed: set[int]) -> None:
        if reply.error is None:
            self.tally.fault(kind, "it is answered")
        elif reply.status not in allowed:
            self.tally.fault(kind, f"{reply.status} {dict(reply.error)}")
        elif reply.status in REFUSALS and "retry-after" not in reply.headers:
            self.tally.fault(kind, f"{reply.status} without Retry-After")
        else:
            self.tally.note(kind, "refused", reply.seconds, reply.code)


def _bodies_of(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Questions for all experts in turn, each with a seed of its own."""
    questions = {task: list(draw_questions(task, BODIES_A_KIND, seed=QUESTION_SEED)) for task in TASKS}
    bodies = []
    for place in range(BODIES_A_KIND):
        task = TASKS[place % len(TASKS)]
        question = questions[task][place]
        asked = {"model": f"expert-{task}", "prompt": question.prompt, "schema": question.schema, "seed": place}
        bodies.append({**asked, **fields})
    return bodies
