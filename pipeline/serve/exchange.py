"""One request and its answer: read, ask, send; whatever happens, the replica is told as soon as nobody waits."""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

from starlette.types import Message, Receive, Scope, Send

from pipeline.errors import (
    BodyTooLargeError,
    DeadlineError,
    ExpertError,
    InferenceError,
    ReplicaLostError,
    ServeError,
    ShuttingDownError,
    SlowClientError,
)
from pipeline.openai_api.http_errors import HttpError, coded_error, http_error
from pipeline.openai_api.protocol import Call, Kind, read_call, unknown_model
from pipeline.openai_api.responses import ID_PREFIXES, Answers, error_event
from pipeline.routing import AUTO, Router
from pipeline.serve.bodies import ClientGoneError, drop_rest, read_body
from pipeline.serve.guard import CLIENT, REQUEST_ID, send_error, send_json
from pipeline.serve.in_flight import InFlight
from pipeline.serve.limits import LimitsConfig
from pipeline.serve.messages import Ask, Backend, Delta, Ended, Event, ModelCard, Refused, Started
from pipeline.tracing import Span, current_headers, span

logger = logging.getLogger(__name__)
CLIENT_GONE_STATUS = 499
_STREAM_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache, no-store"),
    (b"x-accel-buffering", b"no"),
)


class RequestMetrics(Protocol):
    """Takes note of requests that are over."""

    def note(self, *, expert: str | None, status: int, code: str | None, seconds: float) -> None:
        """Take note of one.

        Args:
            expert: The served name; None where the request named none that there is.
            status: The HTTP status; 499 where the client left first.
            code: Of the error, if there was one; a stream may end with one after the status 200.
            seconds: From its arrival to its last byte.
        """
        ...


@dataclass(frozen=True)
class Service:
    """What every exchange needs.

    Args:
        backend: Answers.
        models: The experts, by served name.
        limits: Bounds on requests.
        in_flight: Counts them.
        metrics: Takes note of them, if anything does.
        log_prompts: Whether bodies and answers are logged.
    """

    backend: Backend
    models: Mapping[str, ModelCard]
    limits: LimitsConfig
    in_flight: InFlight
    metrics: RequestMetrics | None = None
    log_prompts: bool = False

    @cached_property
    def router(self) -> Router:
        """Chooses the expert for a prompt, by the manifests."""
        return Router({name: card.routing for name, card in self.models.items()})

    def asked(self, call: Call) -> ModelCard:
        """The expert that a call asks for: the one of that name, or the one that its prompt is for where it says auto.

        Raises:
            UnknownModelError: There is none of that name.
            RoutingError: The prompt is for none.
        """
        name = call.model
        if name == AUTO and AUTO not in self.models:
            name = self.router.route(call.fields.get("prompt", call.fields.get("messages"))).expert
        return self.card(name)

    def card(self, name: str) -> ModelCard:
        """The expert of a name.

        Raises:
            UnknownModelError: There is none; the hint lists those there are.
        """
        card = self.models.get(name)
        if card is None:
            raise unknown_model(name, self.models)
        return card


class CompletionsRoute:
    """The ASGI application of one of the two routes that answer.

    Args:
        kind: Which one.
        service: What it answers with.
    """

    def __init__(self, kind: Kind, service: Service) -> None:
        self._kind: Kind = kind
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; see ASGI."""
        await _Exchange(self._kind, self._service, scope, receive, send).run()


class _FailedError(Exception):
    """A replica's refusal or failure, in the words for the client."""

    def __init__(self, error: HttpError) -> None:
        super().__init__(error.code)
        self.error = error


class _Exchange:
    """One request."""

    def __init__(self, kind: Kind, service: Service, scope: Scope, receive: Receive, send: Send) -> None:
        self._kind: Kind = kind
        self._service = service
        self._scope = scope
        self._receive = receive
        self._plain_send = send
        self._begun_at = time.monotonic()
        self._answer_id = ID_PREFIXES[kind] + uuid.uuid4().hex
        self._has_begun = False  # a response: from here on an error can only be told inside it
        self._status = 200
        self._code: str | None = None
        self._expert: str | None = None
        self._answers: Answers | None = None

    async def run(self) -> None:
        """Answer it, or say why not; and take note."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in self._scope["headers"]}
        with span("expert.request", {"gen_ai.operation.name": self._kind}, headers=headers) as traced:
            try:
                await self._answer()
            except ClientGoneError:
                self._status = CLIENT_GONE_STATUS
            except asyncio.CancelledError:
                self._status = CLIENT_GONE_STATUS
                if not self._service.in_flight.is_cut_off:
                    raise  # the server's way to say the same
                with suppress(ClientGoneError):
                    await self._fail(http_error(_ended(), retry_after=self._service.limits.retry_after_seconds))
            finally:
                self._note(traced)

    async def _answer(self) -> None:
        limits = self._service.limits
        try:
            with self._service.in_flight.entered(self._scope[CLIENT]):
                body = await read_body(self._scope, self._receive, limits)
                call = read_call(self._kind, body, limits)
                card = self._service.asked(call)
                self._expert = card.name
                self._log_text("asks", body)
                await self._while_there(self._ask(replace(call, model=card.name), card))
        except ClientGoneError:
            raise
        except _FailedError as failed:
            await self._fail(failed.error)
        except ExpertError as error:
            await self._fail(http_error(error, retry_after=limits.retry_after_seconds))
        except Exception:  # the last place that can still tell the client of a stream
            logger.exception("request %s failed", self._scope[REQUEST_ID])
            await self._fail(http_error(ServeError("the request failed", hint="See the log.")))

    async def _while_there(self, work: Coroutine[Any, Any, None]) -> None:
        """Do some work, and stop it when the client goes away."""
        working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(self._receive))
        try:
            await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise ClientGoneError
            await working
        finally:
            working.cancel()
            leaving.cancel()
            await asyncio.gather(working, leaving, return_exceptions=True)

    async def _ask(self, call: Call, card: ModelCard) -> None:
        deadline = call.timeout or self._service.limits.max_seconds
        seconds_left = max(deadline - (time.monotonic() - self._begun_at), 0.0)
        trace = current_headers()
        ask = Ask(self._answer_id, card.name, call.fields, call.options, call.is_streamed, seconds_left, trace)
        answers = Answers(call, self._answer_id, digest=card.digest, created=int(time.time()))
        self._answers = answers
        timer = asyncio.timeout(seconds_left)
        try:
            async with _closing(self._service.backend.ask(ask)) as events, timer:
                await (self._stream(events, answers) if call.is_streamed else self._whole(events, answers))
        except TimeoutError as error:
            if not timer.expired():
                raise
            raise DeadlineError(
                f"the answer was not finished within {deadline:g} seconds",
                hint="Ask for fewer tokens or a longer timeout, or ask again when there is less to do.",
            ) from error

    async def _whole(self, events: AsyncIterator[Event], answers: Answers) -> None:
        async for event in events:
            match _checked(event):
                case Started(prompt_tokens=prompt_tokens):
                    answers.prompt_tokens = prompt_tokens
                case Delta() as delta:
                    answers.add(delta)
                case Ended() as ended:
                    answers.end(ended)
        _check_complete(answers)
        body = answers.body()
        self._has_begun = True
        await send_json(self._send, body)
        self._log_text("is answered", body)

    async def _stream(self, events: AsyncIterator[Event], answers: Answers) -> None:
        async for event in events:
            match _checked(event):
                case Started(prompt_tokens=prompt_tokens):  # nothing is sent yet: a refusal can still be told as one
                    answers.prompt_tokens = prompt_tokens
                case Delta() as delta:
                    await self._send_part(answers.delta_chunk(delta))
                    if self._service.log_prompts:
                        answers.add(delta)
                case Ended() as ended:
                    answers.end(ended)
                    await self._send_part(answers.end_chunk(ended))
        _check_complete(answers)
        await self._send_part(answers.last_chunks(), is_last=True)
        if self._service.log_prompts:
            self._log_text("is answered", answers.body())

    async def _fail(self, error: HttpError) -> None:
        self._code = error.code
        if error.reason is not None:
            logger.error("request %s failed: %s: %s", self._scope[REQUEST_ID], error.code, error.reason)
        if self._has_begun:
            await self._send_part(error_event(error), is_last=True)
        else:
            self._status = error.status
            await send_error(self._send if error.code != BodyTooLargeError.code else self._send_and_linger, error)

    async def _send_and_linger(self, message: Message) -> None:
        """Send, and end the response only when the client has sent all, or enough."""
        if message["type"] != "http.response.body":
            await self._send(message)
            return
        await self._send({**message, "more_body": True})
        await drop_rest(self._receive)
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_part(self, part: bytes, *, is_last: bool = False) -> None:
        if not self._has_begun:
            self._has_begun = True
            await self._send({"type": "http.response.start", "status": 200, "headers": [*_STREAM_HEADERS]})
        if part or is_last:
            await self._send({"type": "http.response.body", "body": part, "more_body": not is_last})

    async def _send(self, message: Message) -> None:
        """Send, in bounded time."""
        timer = asyncio.timeout(self._service.limits.send_seconds)
        try:
            async with timer:
                await self._plain_send(message)
        except TimeoutError as error:
            if not timer.expired():
                raise
            self._code = SlowClientError.code
            raise ClientGoneError from error
        except OSError as error:
            raise ClientGoneError from error

    def _log_text(self, what: str, text: bytes) -> None:
        if self._service.log_prompts:
            logger.info("request %s %s: %s", self._scope[REQUEST_ID], what, text.decode("utf-8", "replace"))

    def _note(self, traced: Span) -> None:
        seconds = time.monotonic() - self._begun_at
        if self._service.metrics is not None:
            self._service.metrics.note(expert=self._expert, status=self._status, code=self._code, seconds=seconds)
        answers = self._answers
        traced.set(
            {
                "gen_ai.request.model": self._expert,
                "gen_ai.usage.input_tokens": answers.prompt_tokens if answers else 0,
                "gen_ai.usage.output_tokens": answers.completion_tokens if answers else 0,
                "http.response.status_code": self._status,
            }
        )
        if self._code is not None:
            traced.fail(self._code, f"status {self._status}")
        logger.info(
            "request %s %s client=%s expert=%s status=%d code=%s seconds=%.3f prompt_tokens=%d completion_tokens=%d",
            self._scope[REQUEST_ID],
            self._answer_id,
            self._scope[CLIENT] or "-",
            self._expert or "-",
            self._status,
            self._code or "-",
            seconds,
            answers.prompt_tokens if answers else 0,
            answers.completion_tokens if answers else 0,
        )


def _checked(event: Event) -> Event:
    """The event, unless it tells of an error."""
    match event:
        case Refused(code=code, message=message, hint=hint):
            raise _FailedError(coded_error(code, message, hint))
        case Ended(finish_reason="error", code=code, message=message):
            raise _FailedError(coded_error(code or InferenceError.code, message or "the answer failed"))
        case Ended(finish_reason="cancelled"):
            raise _cut_off()
    return event


def _check_complete(answers: Answers) -> None:
    if answers.num_missing:
        raise _cut_off()


def _ended() -> ShuttingDownError:
    return ShuttingDownError("the service ended before the answer did", hint="Ask again in a moment, or another one.")


def _cut_off() -> ReplicaLostError:
    return ReplicaLostError("the answer was cut off before its end", hint="Ask again.")


async def _left(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


@asynccontextmanager
async def _closing(events: AsyncIterator[Event]) -> AsyncIterator[AsyncIterator[Event]]:
    """The events, closed at the end: that cancels what is not computed yet."""
    try:
        yield events
    finally:
        if isinstance(events, AsyncGenerator):
            await events.aclose()
