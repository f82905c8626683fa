"""Asking the experts of this process: what a replica does, without Ray."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING, Protocol, TypeVar

from pipeline.engine.requests import RequestBuilder
from pipeline.engine.token_bytes import TokenBytes
from pipeline.engine.types import Completion, Request
from pipeline.errors import DeadlineError, ExpertError, PromptTooLongError
from pipeline.metrics import AnswerTimes
from pipeline.openai_api.token_texts import TokenTexts, whole_text
from pipeline.serve.cards import model_card
from pipeline.serve.messages import Ask, Delta, Ended, Event, ModelCard, Refused, Started
from pipeline.tracing import begin_span

if TYPE_CHECKING:
    from pipeline.engine.packed import Handle, Piece
    from pipeline.engine.residents import ResidentExperts

T = TypeVar("T")

PIECE_SECONDS = 0.03  # the least between two pieces of a stream
PIECES_PER_SECOND = 200  # of all streams: each piece takes the gateway and the proxy a millisecond or two


class Watcher(Protocol):
    """Is told of every request that is over."""

    def __call__(self, times: AnswerTimes) -> None:
        """Take note; from the event loop's thread."""
        ...


class LocalBackend:
    """Answers from an engine in this process; see `pipeline.serve.messages.Backend`.

    Its coroutines belong to one event loop. Whatever takes time happens in threads: loading in one, the tokeniser in
    another, so that neither waits for the other.

    Args:
        experts: Who answers. The backend closes their engine.
        max_prompt_tokens: Longer prompts are refused; None for what the model's context holds.
        watch: Is told of every request when it is over.
    """

    def __init__(
        self, experts: "ResidentExperts", *, max_prompt_tokens: int | None = None, watch: Watcher | None = None
    ) -> None:
        self.experts = experts
        self._max_prompt_tokens = max_prompt_tokens
        self.watch = watch
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="expert-load")
        self._builder = ThreadPoolExecutor(1, thread_name_prefix="expert-build")
        self._compiler = ThreadPoolExecutor(4, thread_name_prefix="expert-grammar")
        self._token_bytes = TokenBytes(experts.engine.tokenizer)
        self._num_streams = 0

    @property
    def cards(self) -> tuple[ModelCard, ...]:
        """The experts, as clients see them."""
        return tuple(model_card(name, package) for name, package in self.experts.packages.items())

    async def ask(self, ask: Ask) -> AsyncGenerator[Event, None]:
        """Answer one request; see `Backend.ask`."""
        async with aclosing(self.ask_gathered(ask)) as gathered:
            async for events in gathered:
                for event in events:
                    yield event

    async def ask_gathered(self, ask: Ask) -> AsyncGenerator[list[Event], None]:
        """As `ask`, each time with all events there are: what travels to another process goes in fewer pieces."""
        run = _Run(ask, None if ask.deadline is None else time.monotonic() + ask.deadline)
        held = False
        try:
            try:
                builder = await run.in_time(self._acquire(ask.expert))
                held = True
                handle = await run.in_time(self._submit(ask, builder))
            except ExpertError as error:
                if not self.experts.engine.is_alive:
                    raise
                run.code = error.code
                yield [Refused(error.code, error.message, error.hint)]
                return
            run.handle = handle
            run.prompt_tokens = len(handle.request.prompt_token_ids)
            started = Started(run.prompt_tokens)
            if ask.is_streamed:
                yield [started]
                self._num_streams += 1
                try:
                    async with aclosing(self._stream(run, handle)) as stream:
                        async for events in stream:
                            yield events
                finally:
                    self._num_streams -= 1
            else:
                completions = await run.result(handle)
                yield [started, *(event for one in completions for event in self._whole(run, one))]
        except ExpertError as error:
            run.finish_reason, run.code = "error", error.code
            raise
        finally:
            if run.handle is not None:
                run.handle.cancel()
            if held:
                self.experts.release(ask.expert)
            run.close(self.watch)

    def close(self) -> None:
        """Close the engine; what is unfinished ends with an error."""
        self.experts.engine.close()
        for pool in (self._loader, self._builder, self._compiler):
            pool.shutdown(wait=False, cancel_futures=True)

    async def _acquire(self, name: str) -> RequestBuilder:
        builder = self.experts.try_acquire(name)
        if builder is not None:
            return builder
        loading = self._loader.submit(self.experts.acquire, name)
        try:
            return await asyncio.shield(asyncio.wrap_future(loading))
        except asyncio.CancelledError:
            loading.add_done_callback(lambda done: self._give_back(name, done))
            raise

    def _give_back(self, name: str, loading: "Future[RequestBuilder]") -> None:
        """Release what was loaded for someone who did not wait for it."""
        if not loading.cancelled() and loading.exception() is None:
            self.experts.release(name)

    async def _submit(self, ask: Ask, builder: RequestBuilder) -> "Handle":
        loop, engine = asyncio.get_running_loop(), self.experts.engine
        request = await loop.run_in_executor(self._builder, self._build, ask, builder)
        if request.grammar is not None:
            await loop.run_in_executor(self._compiler, engine.check_grammar, request.grammar)
        return engine.submit(request, stream=ask.is_streamed)

    def _build(self, ask: Ask, builder: RequestBuilder) -> Request:
        request = builder.build(ask.request_id, **ask.fields, options=ask.options)
        length, most = len(request.prompt_token_ids), self._max_prompt_tokens
        if most is not None and length > most:
            raise PromptTooLongError(
                f"the prompt has {length:,} tokens, and {most:,} are allowed",
                hint="Shorten the prompt or the schema.",
            )
        return request

    def _pace(self) -> float:
        """Seconds between two pieces of a stream: the more streams there are, the larger their pieces."""
        return max(PIECE_SECONDS, self._num_streams / PIECES_PER_SECOND)

    async def _stream(self, run: "_Run", handle: "Handle") -> AsyncGenerator[list[Event], None]:
        texts = TokenTexts(self._token_bytes)
        async with aclosing(handle.gathered(self._pace)) as gathered:
            while (pieces := await run.next_of(gathered)) is not None:
                yield [
                    Delta(piece.text, piece.index, texts.of(piece.index, piece.text, piece.logprobs))
                    for piece in pieces
                ]
        yield [run.end(completion) for completion in await run.result(handle)]

    def _whole(self, run: "_Run", completion: Completion) -> Iterator[Event]:
        if completion.failure is None:
            yield whole_text(completion, self._token_bytes)
        yield run.end(completion)


class _Run:
    """One request on its way."""

    def __init__(self, ask: Ask, deadline: float | None) -> None:
        self.ask = ask
        self.deadline = deadline
        self.handle: Handle | None = None
        self.prompt_tokens = 0
        self.completion_tokens = self.num_steps = 0
        self.finish_reason: str | None = None
        self.code: str | None = None
        self._asked = time.monotonic()
        self._is_late = False
        self._span = begin_span("expert.generate", {"gen_ai.request.model": ask.expert}, headers=ask.trace or None)

    async def in_time(self, work: Awaitable[T]) -> T:
        """The result of some work, or DeadlineError when the time is up."""
        try:
            async with asyncio.timeout(self._seconds_left()):
                return await work
        except TimeoutError as error:
            raise self._late() from error

    async def next_of(self, gathered: AsyncIterator[list["Piece"]]) -> list["Piece"] | None:
        """The next pieces; None at the end, which comes at once when the time is up."""
        try:
            async with asyncio.timeout(self._seconds_left()):
                return await anext(gathered, None)
        except TimeoutError:
            self._is_late = True
            return None

    async def result(self, handle: "Handle") -> tuple[Completion, ...]:
        """The completions; when the time is up, what there is of them."""
        if not self._is_late:
            try:
                async with asyncio.timeout(self._seconds_left()):
                    return await handle
            except TimeoutError:
                self._is_late = True
        handle.cancel()
        return await handle

    def end(self, completion: Completion) -> Ended:
        """The last event of an answer."""
        reason, failure = completion.finish_reason, completion.failure
        code, message = (failure.code, failure.message) if failure is not None else (None, None)
        if reason == "cancelled" and self._is_late:
            late = self._late()
            reason, code, message = "error", late.code, late.message
        self.completion_tokens += completion.completion_tokens
        self.num_steps = max(self.num_steps, completion.completion_tokens)
        self.finish_reason, self.code = self.finish_reason or reason, self.code or code
        return Ended(reason, completion.completion_tokens, completion.index, code, message)

    def close(self, watch: Watcher | None) -> None:
        """Tell what happened, to whom it is told."""
        times = self._times()
        if watch is not None:
            watch(times)
        self._span.set(times.attributes())
        if times.code is not None:
            self._span.fail(times.code, times.finish_reason)
        self._span.end()

    def _times(self) -> AnswerTimes:
        return AnswerTimes(
            expert=self.ask.expert,
            asked=self._asked,
            begun=self.handle.begun_at if self.handle is not None else None,
            first=self.handle.first_at if self.handle is not None else None,
            ended=time.monotonic(),
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            num_steps=self.num_steps,
            finish_reason=self.finish_reason or ("refused" if self.code else "cancelled"),
            code=self.code,
        )

    def _seconds_left(self) -> float | None:
        return None if self.deadline is None else max(self.deadline - time.monotonic(), 0.0)

    def _late(self) -> DeadlineError:
        return DeadlineError(
            f"the answer was not finished within {self.ask.deadline:g} seconds",
            hint="Ask for fewer tokens or a longer timeout, or ask again when there is less to do.",
        )


@contextmanager
def local_backend(experts: "ResidentExperts", *, max_prompt_tokens: int | None = None) -> Iterator[LocalBackend]:
    """A backend that is closed at the end.

    Args:
        experts: Who answers; see `pipeline.engine.runtime.open_experts`.
        max_prompt_tokens: As for `LocalBackend`.
    """
    backend = LocalBackend(experts, max_prompt_tokens=max_prompt_tokens)
    try:
        yield backend
    finally:
        backend.close()
