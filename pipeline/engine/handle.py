"""What a submitted request is answered through: its text as it comes, and its completions."""

import asyncio
import queue
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from pipeline.engine.types import Completion, Request, TokenLogprob
from pipeline.errors import ExpertError


@dataclass(frozen=True)
class Piece:
    """Text that a running request has become certain of, and the tokens generated since the piece before.

    `index` tells the request's answers apart; `logprobs` has an entry for each token, if asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    index: int = 0
    logprobs: tuple[TokenLogprob, ...] | None = None


class Handle:
    """A submitted request: iterate its text, wait for its completions, or cancel it.

    `for piece in handle` and `async for piece in handle` give the text as it comes (submit it with `stream=True`);
    `handle.result()` and `await handle` give the completions, one for each of its `n` answers. `begun_at` is when the
    engine began to compute it, `first_at` when its first token was there and `ended_at` when it was finished, by
    `time.monotonic()`.
    """

    def __init__(self, request: Request, cancel: Callable[["Handle"], None]) -> None:
        self.request = request
        self.begun_at: float | None = None
        self.first_at: float | None = None
        self.ended_at: float | None = None
        self._cancel = cancel
        self._future: Future[tuple[Completion, ...]] = Future()
        self._future.set_running_or_notify_cancel()  # who gives up waiting for it does not cancel it
        self._listeners: list[Callable[[Piece | None], None]] = []
        self._backlog: list[Piece | None] = []
        self._lock = threading.Lock()
        self._completions: dict[int, Completion] = {}

    @property
    def is_done(self) -> bool:
        """Whether all answers are finished."""
        return self._future.done()

    def result(self, timeout: float | None = None) -> tuple[Completion, ...]:
        """Wait for the completions.

        Args:
            timeout: Seconds; None for ever.

        Raises:
            TimeoutError: They are not there in time.
            InferenceError: The engine died or was closed.
        """
        return self._future.result(timeout)

    def cancel(self) -> None:
        """Stop the request within a step; its completions have finish reason `cancelled`. Again does nothing."""
        if not self.is_done:
            self._cancel(self)

    def add_done_callback(self, callback: Callable[["Handle"], None]) -> None:
        """Call `callback(handle)` when the request is finished, from the engine's thread; at once if it is."""
        self._future.add_done_callback(lambda _: callback(self))

    def __iter__(self) -> Iterator[Piece]:
        pieces: queue.SimpleQueue[Piece | None] = queue.SimpleQueue()
        with self._listening(pieces.put):
            while (piece := pieces.get()) is not None:
                yield piece
        self._raise_failure()

    def __await__(self) -> Generator[Any, None, tuple[Completion, ...]]:
        return asyncio.wrap_future(self._future).__await__()

    async def __aiter__(self) -> AsyncIterator[Piece]:
        async for pieces in self.gathered():
            for piece in pieces:
                yield piece

    async def gathered(self, pace: Callable[[], float] = lambda: 0.0) -> AsyncGenerator[list[Piece], None]:
        """The pieces as they come, each time all that have come since the last: a slow reader is told less often.

        Args:
            pace: The least seconds from one time to the next, asked for at each; the last pieces come at once.
        """
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[Piece | None] = asyncio.Queue()

        def listen(piece: Piece | None) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        with self._listening(listen):
            is_over = False
            next_at = loop.time()
            while not is_over:
                told = [await pieces.get()]
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(next_at):
                        while told[-1] is not None:
                            told.append(await pieces.get())
                while not pieces.empty():
                    told.append(pieces.get_nowait())
                is_over = told[-1] is None
                if given := [piece for piece in told if piece is not None]:
                    next_at = loop.time() + pace()
                    yield given
        self._raise_failure()

    @contextmanager
    def _listening(self, listener: Callable[[Piece | None], None]) -> Iterator[None]:
        """Tell a listener what was told already, and what comes."""
        with self._lock:
            for piece in self._backlog:
                listener(piece)
            self._listeners.append(listener)
        try:
            yield
        finally:
            with self._lock:
                self._listeners.remove(listener)

    def _raise_failure(self) -> None:
        if self._future.done() and (error := self._future.exception()) is not None:
            raise error

    def tell(self, piece: Piece | None) -> None:
        """Pass on text; None when no more comes. The engine's own, as all that follow."""
        with self._lock:
            self._backlog.append(piece)
            for listen in self._listeners:
                listen(piece)

    def finish(self, completion: Completion) -> None:
        """Take one of the answers; the last makes the request done."""
        self._completions[completion.index] = completion
        if len(self._completions) == self.request.params.n and not self.is_done:
            self.ended_at = time.monotonic()
            self._future.set_result(tuple(self._completions[at] for at in sorted(self._completions)))
            self.tell(None)

    def die(self, error: ExpertError) -> None:
        """End without an answer, where there is none yet."""
        if not self.is_done:
            self._future.set_exception(error)
            self.tell(None)
