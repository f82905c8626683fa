"""Engines at the worker's seam that compute nothing: they answer, end the process, raise or hang as the prompt says."""

import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from pipeline.batch.answering import EngineJob, LoadedEngine, Loader, Preparer
from pipeline.engine.requests import PreparedPrompt
from pipeline.engine.stats import EngineStats
from pipeline.engine.types import Completion, Request, SamplingParams
from pipeline.errors import InvalidRequestError

KILL, RAISE, HANG = "kill", "raise", "hang"
KILL_EARLY = "kill early"
"""Ends whoever prepares it."""


class ScriptedTokenizer:
    """A tokenizer without special tokens."""

    added_tokens_decoder: Mapping[int, Any] = {}
    all_special_ids: tuple[int, ...] = ()


class ScriptedBuilder:
    """Makes requests whose tokens are the prompt's bytes; a prompt that is no text is that row's error."""

    tokenizer: Any = ScriptedTokenizer()

    def __init__(self, expert: str | None = None) -> None:
        self._expert = expert

    def prepare(self, *, options: Mapping[str, Any] | None = None, **fields: Any) -> PreparedPrompt:
        """What a prompt asks."""
        prompt = fields["prompt"]
        if prompt == KILL_EARLY:
            os.kill(os.getpid(), signal.SIGKILL)
        if not isinstance(prompt, str):
            raise InvalidRequestError("prompt is no text", hint="Give text.")
        params = SamplingParams(seed=(options or {}).get("seed", 0))
        return PreparedPrompt(tuple(prompt.encode()), params)

    def request(self, request_id: str, prepared: PreparedPrompt) -> Request:
        """The request of a prompt."""
        return Request(request_id, prepared.token_ids, prepared.params, expert=self._expert)


class MarkingBuilder(ScriptedBuilder):
    """Puts a star after each prompt that it prepares."""

    def prepare(self, *, options: Mapping[str, Any] | None = None, **fields: Any) -> PreparedPrompt:
        """What a prompt asks."""
        prepared = super().prepare(options=options, **fields)
        return replace(prepared, token_ids=(*prepared.token_ids, *b"*"))


class ScriptedEngine:
    """Answers a prompt with itself in capitals, after the expert's name; remembers the calls it was given."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self._num_steps = 0

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Answer, last one first."""
        asked = list(requests)
        self.calls.append([_prompt(request) for request in asked])
        self._begin([_prompt(request) for request in asked])
        for request in reversed(asked):
            self._num_steps += 1
            text = f"{request.expert or ''}:{_prompt(request).upper()}"
            yield Completion(request.id, text, "stop", len(request.prompt_token_ids), 1)

    def stats(self) -> EngineStats:
        """How many were answered."""
        return EngineStats(num_steps=self._num_steps)

    def close(self) -> None:
        """Nothing is to be freed."""

    def _begin(self, prompts: list[str]) -> None:
        """What happens before anything is answered."""


class DeadlyEngine(ScriptedEngine):
    """Ends its process, raises, or does nothing for ever, where a prompt says so."""

    def _begin(self, prompts: list[str]) -> None:
        if KILL in prompts:
            os.kill(os.getpid(), signal.SIGKILL)
        if RAISE in prompts:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        while HANG in prompts:
            time.sleep(1)


class MeetingEngine(ScriptedEngine):
    """Answers nobody until two calls have met in it; who stays alone fails the job after a minute."""

    def __init__(self) -> None:
        super().__init__()
        self._meeting = threading.Barrier(2, timeout=60)

    def _begin(self, _: list[str]) -> None:
        self._meeting.wait()


def _prompt(request: Request) -> str:
    return bytes(request.prompt_token_ids).decode()


def scripted_preparers(job: EngineJob) -> Mapping[str | None, Preparer]:
    """What prepares rows for all of them."""
    return {expert.name: ScriptedBuilder(expert.name) for expert in job.experts}


def _load_marking(job: EngineJob) -> LoadedEngine:
    """An engine whose rows tell by a star that its process prepared them."""
    return LoadedEngine(ScriptedEngine(), {expert.name: MarkingBuilder(expert.name) for expert in job.experts})


def _loaded(kind: type[ScriptedEngine], job: EngineJob) -> LoadedEngine:
    return LoadedEngine(kind(), {expert.name: ScriptedBuilder(expert.name) for expert in job.experts})


load_scripted = Loader(partial(_loaded, ScriptedEngine), scripted_preparers)
load_deadly = Loader(partial(_loaded, DeadlyEngine), scripted_preparers)
load_marking = Loader(_load_marking, scripted_preparers)
load_meeting = Loader(partial(_loaded, MeetingEngine), scripted_preparers)
