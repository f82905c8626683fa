"""An engine at the worker's seam that computes nothing: for what a job costs besides its model, and for tests of jobs.

`execute(job, ..., load=ECHO)` runs a job with it: rows are read, made into requests, answered by their own prompts,
encoded and committed as ever. With `Loader(partial(load_echo, seconds_per_row=0.01), echo_preparers)` each row takes
time.
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from threading import Lock
from typing import Any

from pipeline.batch.answering import EngineJob, LoadedEngine, Loader, Preparer
from pipeline.engine.requests import PreparedPrompt
from pipeline.engine.stats import EngineStats
from pipeline.engine.types import Completion, Request, SamplingParams
from pipeline.errors import InvalidRequestError


class EchoTokenizer:
    """A tokenizer whose tokens are bytes, without special ones."""

    added_tokens_decoder: Mapping[int, Any] = {}
    all_special_ids: tuple[int, ...] = ()


class EchoBuilder:
    """Makes requests whose tokens are the bytes of the prompt, or of the chat as JSON; nothing else is looked at.

    Args:
        expert: The name under which rows ask for it.
    """

    tokenizer: Any = EchoTokenizer()

    def __init__(self, expert: str | None = None) -> None:
        self._expert = expert

    def prepare(
        self,
        *,
        prompt: Any = None,
        messages: Any = None,
        schema: Any = None,  # noqa: ARG002  # a builder is told it
        dialect: str | None = None,  # noqa: ARG002
        system: Any = None,  # noqa: ARG002
        options: Mapping[str, Any] | None = None,
    ) -> PreparedPrompt:
        """What a row asks.

        Raises:
            InvalidRequestError: There is neither a prompt nor a chat, or the prompt is no text.
        """
        text = prompt if messages is None else json.dumps(messages, ensure_ascii=False)
        if not isinstance(text, str):
            raise InvalidRequestError("prompt is no text", hint="Give text.")
        params = SamplingParams(seed=(options or {}).get("seed", 0))
        return PreparedPrompt(tuple(text.encode(errors="replace")), params)

    def request(self, request_id: str, prepared: PreparedPrompt) -> Request:
        """The request of a row."""
        return Request(request_id, prepared.token_ids, prepared.params, expert=self._expert)


class EchoEngine:
    """Answers each prompt with itself, after the expert's name and a colon; may be used by many threads at a time.

    Args:
        seconds_per_row: Time that each row takes, one after another.
    """

    def __init__(self, *, seconds_per_row: float = 0.0) -> None:
        self._seconds_per_row = seconds_per_row
        self._num_steps = 0
        self._computing = Lock()

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Answer every request, in order."""
        for request in requests:
            with self._computing:
                self._num_steps += 1
                if self._seconds_per_row:
                    time.sleep(self._seconds_per_row)
            text = bytes(request.prompt_token_ids).decode(errors="replace")
            length = len(request.prompt_token_ids)
            yield Completion(request.id, f"{request.expert or ''}:{text}", "stop", length, length)

    def stats(self) -> EngineStats:
        """How many rows were answered."""
        return EngineStats(num_steps=self._num_steps, num_tokens_generated=self._num_steps)

    def close(self) -> None:
        """Nothing is to be freed."""


def load_echo(job: EngineJob, *, seconds_per_row: float = 0.0) -> LoadedEngine:
    """Come to an `EchoEngine`; see `answering.Loader`.

    Args:
        job: The job; its experts are not opened.
        seconds_per_row: Time that each row takes.
    """
    engine = EchoEngine(seconds_per_row=seconds_per_row)
    return LoadedEngine(engine, {expert.name: EchoBuilder(expert.name) for expert in job.experts})


def echo_preparers(job: EngineJob) -> Mapping[str | None, Preparer]:
    """What prepares rows for an `EchoEngine`; see `answering.Loader`."""
    return {expert.name: EchoBuilder(expert.name) for expert in job.experts}


ECHO = Loader(load_echo, echo_preparers)
"""A loader of `EchoEngine`."""
