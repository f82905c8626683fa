"""Streams of text: generators of the pieces of an answer, with its result at the end."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any, NoReturn

from pipeline.asking import Begin, Running, begin_in_thread, raise_failure
from pipeline.engine.handle import Piece
from pipeline.errors import ExpertError, InvalidRequestError
from pipeline.results import InferenceResult


class TextStream(Generator[str, None, InferenceResult]):
    """The text of one answer as it comes; the return value of the generator, and `result`, is the whole of it.

    Closing it early cancels the request and leaves a partial result. Dropping it cancels too.

    Args:
        running: A request that was submitted as a stream.
    """

    def __init__(self, running: Running) -> None:
        self._running = running
        self._pieces: Iterator[Piece] = iter(running.handle)
        self._is_over = False
        self._result: InferenceResult | None = None
        self._error: ExpertError | None = None

    @property
    def result(self) -> InferenceResult:
        """The result, once the stream has ended or was closed.

        Raises:
            InvalidRequestError: It has not ended yet.
            ExpertError: There is no answer; the iteration has raised the same.
        """
        return _result_or_raise(self._result, self._error)

    def send(self, value: None, /) -> str:  # noqa: ARG002
        """The next piece, as `next` gives it."""
        if self._is_over:
            raise StopIteration
        try:
            return next(self._pieces).text
        except StopIteration:
            self._end()
            raise_failure(self.result)
        except ExpertError as error:
            self._is_over, self._error = True, error
            raise
        raise StopIteration(self.result)

    def throw(self, typ: Any, val: Any = None, tb: TracebackType | None = None, /) -> NoReturn:
        """Close the stream, and raise."""
        self.close()
        error = val if isinstance(val, BaseException) else typ if isinstance(typ, BaseException) else typ()
        raise error.with_traceback(tb) if tb is not None else error

    def close(self) -> None:
        """Cancel what is unfinished, and keep what there is of the answer. Again does nothing."""
        if not self._is_over:
            self._running.cancel()
            self._end()

    def __del__(self) -> None:
        if not getattr(self, "_is_over", True):
            self._running.cancel()

    def _end(self) -> None:
        self._is_over = True
        try:
            self._result = self._running.wait()
        except ExpertError as error:
            self._error = error


class AsyncTextStream(AsyncGenerator[str, None]):
    """The text of one answer as it comes, for `async for`; `result` is the whole of it afterwards.

    It is asked when the first piece is asked for. `aclose`, or the cancellation of the task that waits for a piece,
    cancels the request and leaves a partial result.

    Args:
        begin: Submits the request as a stream.
    """

    def __init__(self, begin: Begin) -> None:
        self._begin = begin
        self._running: Running | None = None
        self._pieces: AsyncIterator[Piece] | None = None
        self._is_over = False
        self._result: InferenceResult | None = None
        self._error: ExpertError | None = None

    @property
    def result(self) -> InferenceResult:
        """The result, once the stream has ended or was closed.

        Raises:
            InvalidRequestError: It has not ended yet, or was closed before it began.
            ExpertError: There is no answer; the iteration has raised the same.
        """
        running = self._running
        if self._is_over and self._result is None and running is not None and running.handle.is_done:
            self._result = running.wait()  # it was left by a task that was cancelled
        return _result_or_raise(self._result, self._error)

    async def asend(self, value: None, /) -> str:  # noqa: ARG002
        """The next piece, as `anext` gives it."""
        if self._is_over:
            raise StopAsyncIteration
        try:
            if self._running is None or self._pieces is None:
                (self._running,) = await begin_in_thread(self._begin)
                self._pieces = aiter(self._running.handle)
            return (await anext(self._pieces)).text
        except StopAsyncIteration:
            self._is_over = True
        except ExpertError as error:
            self._is_over, self._error = True, error
            raise
        except asyncio.CancelledError:
            self._is_over = True
            if self._running is not None:
                self._running.cancel()
            raise
        if self._running is not None:
            self._result = await self._running.finished()
            raise_failure(self._result)
        raise StopAsyncIteration

    async def athrow(self, typ: Any, val: Any = None, tb: TracebackType | None = None, /) -> NoReturn:
        """Close the stream, and raise."""
        await self.aclose()
        error = val if isinstance(val, BaseException) else typ if isinstance(typ, BaseException) else typ()
        raise error.with_traceback(tb) if tb is not None else error

    async def aclose(self) -> None:
        """Cancel what is unfinished, and keep what there is of the answer. Again does nothing."""
        if self._is_over:
            return
        self._is_over = True
        if self._running is not None:
            self._running.cancel()
            try:
                self._result = await self._running.finished()
            except ExpertError as error:
                self._error = error
        if isinstance(self._pieces, AsyncGenerator):
            with suppress(ExpertError):
                await self._pieces.aclose()

    def __del__(self) -> None:
        if not getattr(self, "_is_over", True) and self._running is not None:
            self._running.cancel()


def _result_or_raise(result: InferenceResult | None, error: ExpertError | None) -> InferenceResult:
    if error is not None:
        raise error
    if result is None:
        raise InvalidRequestError("the stream has not ended", hint="Iterate to its end, or close it, first.")
    return result
