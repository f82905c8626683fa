"""What `Expert` and `ExpertManager` share: from what a caller gives to requests on an engine, and back to results."""

import asyncio
import inspect
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import copy_context
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict, TypeVar

from pipeline.engine.handle import Handle
from pipeline.engine.requests import RequestBuilder, override_options, require_one_answer
from pipeline.engine.types import Completion, Failure, Request
from pipeline.errors import (
    ConfigError,
    ExpertError,
    GrammarError,
    InferenceError,
    InvalidRequestError,
    MissingDependencyError,
    OutOfMemoryError,
    PromptTooLongError,
    TokenizerError,
)
from pipeline.metrics import AnswerMetrics
from pipeline.package import ExpertPackage
from pipeline.results import InferenceResult, Timings, result_of
from pipeline.watching import Watch

if TYPE_CHECKING:
    from pipeline.engine.packed import PackedEngine
    from pipeline.engine.padded import PaddedEngine

T = TypeVar("T")

PROMPT_FIELDS = ("prompt", "messages", "schema", "dialect", "system")
ROW_ERRORS: dict[str, type[ExpertError]] = {
    kind.code: kind
    for kind in (
        GrammarError,
        InvalidRequestError,
        MissingDependencyError,
        OutOfMemoryError,
        PromptTooLongError,
        TokenizerError,
    )
}


class GenerateOptions(TypedDict, total=False):
    """What may be said of a prompt; what is left out, or None, follows the package's manifest.

    Args:
        messages: A conversation instead of a prompt, `{"role": ..., "content": ...}` each, the user's last.
        schema: The schema the question is about, as text.
        dialect: The query dialect named with the schema; the expert's own if None.
        system: A system message, put before the schema.
        temperature, top_p, top_k, min_p, repetition_penalty, presence_penalty, frequency_penalty, max_tokens,
            min_tokens, stop, stop_token_ids, ignore_eos, seed, n, logprobs: See `pipeline.engine.SamplingParams`.
        use_grammar: Hold the answer to the package's grammar, or not.
        grammar, json_schema, regex: Hold it to this GBNF grammar, JSON schema (a mapping, or JSON) or regular
            expression instead.
        truncate: `"left"` or `"right"`: cut the oldest or the newest tokens of a prompt that is too long, instead of
            raising.
        soft_prompt: Which of the package's soft prompts goes before the prompt, where it has several.
    """

    messages: Sequence[Mapping[str, str]] | None
    schema: str | None
    dialect: str | None
    system: str | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    max_tokens: int | None
    min_tokens: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    seed: int | None
    n: int | None
    logprobs: int | None
    use_grammar: bool | None
    grammar: str | None
    json_schema: str | Mapping[str, Any] | None
    regex: str | None
    truncate: Literal["left", "right"] | None
    soft_prompt: str | None


Item = str | Mapping[str, Any]


def spelled_out(function: Callable[..., T]) -> Callable[..., T]:
    """Have a function's signature name each of `GenerateOptions`, for `help` and for completion in a REPL."""
    signature = inspect.signature(function)
    named = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in GenerateOptions.__annotations__.items()
    ]
    function.__signature__ = signature.replace(parameters=[*named, *options])  # type: ignore[attr-defined]
    return function


@dataclass(frozen=True)
class Ask:
    """One prompt, as it was given.

    Args:
        fields: Any of `PROMPT_FIELDS`.
        options: Any of `pipeline.engine.requests.OPTION_NAMES`.
        expert: Which expert is asked, by its name; None where there is one only.
        error: Why it cannot be asked at all.
        asked_at: When, by `time.monotonic()`.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    expert: str | None = None
    error: ExpertError | None = None
    asked_at: float = field(default_factory=time.monotonic)


def read_ask(item: Any, shared: Mapping[str, Any], *, where: str = "prompt", expert: str | None = None) -> Ask:
    """One prompt with its own options before the shared ones; what is wrong with it is in its `error`.

    Args:
        item: The question, or a mapping with any of the fields and options, or None where `shared` has them.
        shared: Fields and options of all prompts; None says nothing.
        where: What an error calls it.
        expert: Which expert is asked.
    """
    own = {"prompt": item} if isinstance(item, str) or item is None else item
    if not isinstance(own, Mapping):
        error = InvalidRequestError(
            f"{where} is {type(item).__name__}", hint="Give each prompt as a string or a mapping."
        )
        return Ask(error=error, expert=expert)
    own = {name: value for name, value in own.items() if value is not None}
    fields = {name: value for name, value in {**shared, **own}.items() if name in PROMPT_FIELDS and value is not None}
    common = {name: value for name, value in shared.items() if name not in PROMPT_FIELDS}
    overrides = {name: value for name, value in own.items() if name not in PROMPT_FIELDS}
    return Ask(fields, override_options(common, overrides), expert)


@dataclass(frozen=True)
class Answerer:
    """An expert on a running engine.

    Args:
        package: The expert.
        engine: Answers.
        requests: Makes requests for it.
        building: Held while a request is made: a tokenizer is not for several threads at once.
        metrics: Takes note of what is answered; None for nobody.
    """

    package: ExpertPackage
    engine: "PackedEngine | PaddedEngine"
    requests: RequestBuilder
    building: threading.Lock
    metrics: AnswerMetrics | None = None


class Running:
    """A prompt on its way to a result.

    Args:
        ask: What was asked.
        package: The expert that is asked; None where there is none.
        handle: The request; None where there is none, for the reason that is given.
        error: That reason.
    """

    def __init__(
        self,
        ask: Ask,
        package: ExpertPackage | None,
        handle: Handle | None = None,
        error: ExpertError | None = None,
    ) -> None:
        self._handle = handle
        self.error = error
        self._asked_at = ask.asked_at
        self._label = package.label if package is not None else ask.expert or ""
        self._digest = package.digest if package is not None else ""

    @property
    def submitted(self) -> Handle | None:
        """The request; None where there is none."""
        return self._handle

    @property
    def handle(self) -> Handle:
        """The request.

        Raises:
            ExpertError: There is none, for this reason.
        """
        if self._handle is None:
            raise self.error or InferenceError("nothing was asked", hint="Report this.")
        return self._handle

    def cancel(self) -> None:
        """Stop it, unless it is finished."""
        if self._handle is not None:
            self._handle.cancel()

    def wait(self) -> InferenceResult:
        """The result, when it is finished; one without an answer has an `error`.

        Raises:
            InferenceError: The engine died or was closed.
        """
        return self._result(self._handle.result() if self._handle is not None else None)

    async def finished(self) -> InferenceResult:
        """As `wait`."""
        return self._result(await self._handle if self._handle is not None else None)

    def _result(self, completions: tuple[Completion, ...] | None) -> InferenceResult:
        if completions is None:
            failure = None if self.error is None else Failure(self.error.code, self.error.message)
            completions = (Completion("", "", "error", 0, 0, failure),)
        handle = self._handle
        timings = Timings()
        if handle is not None:
            begun, first, ended = (
                None if at is None else max(at - self._asked_at, 0.0)
                for at in (handle.begun_at, handle.first_at, handle.ended_at)
            )
            timings = Timings(begun, first, ended)
        return result_of(completions, expert=self._label, expert_sha256=self._digest, timings=timings)


def begin(answerer: Answerer, asks: Sequence[Ask], *, is_streamed: bool, is_strict: bool) -> list[Running]:
    """Have one expert's prompts answered, all in the engine's running batch.

    Args:
        answerer: The expert.
        asks: What is asked.
        is_streamed: Whether the handles give text as it comes; a prompt has one answer then.
        is_strict: Whether a prompt that cannot be asked is raised, before anything is computed.

    Raises:
        ExpertError: With `is_strict`, what is wrong with the first such prompt; else the engine is closed.
    """
    requests: dict[int, Request] = {}
    errors: dict[int, ExpertError] = {}
    watches = [Watch.begin(answerer.package, ask.asked_at, time.monotonic(), answerer.metrics) for ask in asks]
    with answerer.building:
        for position, ask in enumerate(asks):
            try:
                requests[position] = _request(answerer, str(position), ask, is_streamed=is_streamed)
            except ExpertError as error:
                watches[position].refuse(error, time.monotonic())
                if is_strict:
                    raise
                errors[position] = error
    handles = dict(zip(requests, _submit(answerer, list(requests.values()), is_streamed=is_streamed), strict=True))
    for position, handle in handles.items():
        watches[position].follow(handle)
    return [
        Running(ask, answerer.package, handles.get(position), errors.get(position)) for position, ask in enumerate(asks)
    ]


def _request(answerer: Answerer, request_id: str, ask: Ask, *, is_streamed: bool) -> Request:
    if ask.error is not None:
        raise ask.error
    request = answerer.requests.build(request_id, **ask.fields, options=ask.options)
    if is_streamed:
        require_one_answer(request.params)
    return request


def _submit(answerer: Answerer, requests: list[Request], *, is_streamed: bool) -> Iterable[Handle]:
    from pipeline.engine.packed import PackedEngine

    engine = answerer.engine
    if not is_streamed:
        return engine.submit_all(requests)
    if not isinstance(engine, PackedEngine):
        raise ConfigError(
            "the padded engine answers whole batches, and streams none", hint='Use generate, or engine "packed".'
        )
    return [engine.submit(request, stream=True) for request in requests]


def raise_failure(result: InferenceResult) -> None:
    """Raise what a result says went wrong, if anything did."""
    if result.error is not None:
        kind = ROW_ERRORS.get(result.error.code, InferenceError)
        raise kind(result.error.message, hint="See the message; other prompts are not affected.")


class Begin(Protocol):
    """Begins to answer prompts; see `Asker`."""

    def __call__(self) -> list[Running]:
        """Begin; called from any thread."""


async def begin_in_thread(begin: Begin) -> list[Running]:
    """Begin in a thread: tokenising, and loading at first, would hold up the event loop.

    What was begun for a task that has been cancelled is cancelled too.
    """
    context = copy_context()  # a span that is current here is so there
    begun = asyncio.get_running_loop().run_in_executor(None, lambda: context.run(begin))
    try:
        return await asyncio.shield(begun)
    except asyncio.CancelledError:
        begun.add_done_callback(_cancel_all)
        raise


def _cancel_all(begun: "asyncio.Future[list[Running]]") -> None:
    if not begun.cancelled() and begun.exception() is None:
        for running in begun.result():
            running.cancel()


class Asker(ABC):
    """Asks prompts in all the ways there are, by one that begins to answer them."""

    @abstractmethod
    def _begin(self, asks: Sequence[Ask], *, is_streamed: bool = False, is_strict: bool = False) -> list[Running]:
        """Begin to answer, as `begin` does; called from any thread."""

    def _answer(self, asks: Sequence[Ask], *, raise_on_error: bool) -> list[InferenceResult]:
        begun = self._begin(asks, is_strict=raise_on_error)
        try:
            return [_checked(running.wait(), is_strict=raise_on_error) for running in begun]
        finally:
            for running in begun:
                running.cancel()

    async def _aanswer(self, asks: Sequence[Ask], *, raise_on_error: bool) -> list[InferenceResult]:
        begun = await begin_in_thread(lambda: self._begin(asks, is_strict=raise_on_error))
        try:
            return [_checked(await running.finished(), is_strict=raise_on_error) for running in begun]
        finally:
            for running in begun:
                running.cancel()


def _checked(result: InferenceResult, *, is_strict: bool) -> InferenceResult:
    if is_strict:
        raise_failure(result)
    return result
