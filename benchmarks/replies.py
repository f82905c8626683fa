"""One request to a server that speaks as OpenAI's, and all that it says; read more strictly than any client would."""

import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

ERROR_FIELDS = {"message", "type", "param", "code"}
ROUTES = {True: "/v1/chat/completions", False: "/v1/completions"}  # by whether there are messages


class MalformedReplyError(Exception):
    """The server said what no client could make sense of."""


@dataclass(frozen=True)
class Reply:
    """What a server said to one request.

    Args:
        status: The HTTP status.
        texts: The answers, by their index; of a stream that was cut, what there was.
        finish_reasons: Why each ended; None for one that did not.
        prompt_tokens, completion_tokens: The usage.
        error: OpenAI's error object, from the body or from the event that ended the stream.
        headers: Of the response, with lower-case names.
        seconds: From sending the request to the last byte.
    """

    status: int
    texts: tuple[str, ...] = ()
    finish_reasons: tuple[str | None, ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: Mapping[str, Any] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def is_answered(self) -> bool:
        """Whether every answer is there, with its end."""
        return self.error is None

    @property
    def is_cut(self) -> bool:
        """Whether an answer had begun, and an error event ended it."""
        return self.error is not None and self.status == 200

    @property
    def code(self) -> str | None:
        """The code of the error, if there is one."""
        return None if self.error is None else str(self.error["code"])


async def ask(client: httpx.AsyncClient, body: Mapping[str, Any]) -> Reply:
    """Ask, and read to the end.

    Args:
        client: Its base URL is the server's.
        body: A chat where it has `messages`, else a completion; streamed where it has `stream`, and then the usage is
            asked for as well.

    Raises:
        httpx.HTTPError: The connection failed.
        MalformedReplyError: The response is not in OpenAI's shape, or a stream ends without a word.
    """
    started = time.monotonic()
    body = {**body, "stream_options": {"include_usage": True}} if body.get("stream") else dict(body)
    request = client.build_request("POST", ROUTES["messages" in body], json=body)
    response = await client.send(request, stream=True)
    try:
        is_stream = response.headers.get("content-type", "").startswith("text/event-stream")
        if response.status_code == 200 and is_stream != bool(body.get("stream")):
            raise MalformedReplyError(f"the type is {response.headers.get('content-type')}")
        if is_stream:
            events = [event async for event in stream_events(response)]
            return _of_stream(response, events, body.get("n", 1), time.monotonic() - started)
        return read_body(response, await response.aread(), body.get("n", 1), time.monotonic() - started)
    finally:
        await response.aclose()


async def stream_events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The events of a stream, to the mark of its end or to an error event.

    Raises:
        MalformedReplyError: It ends without either; or what comes is not an event.
    """
    async for line in response.aiter_lines():
        if not line:
            continue
        if not line.startswith("data: "):
            raise MalformedReplyError(f"no event: {line[:100]!r}")
        if line == "data: [DONE]":
            return
        event = json.loads(line.removeprefix("data: "))
        yield event
        if "error" in event:
            return
    raise MalformedReplyError("the stream ends without a mark or an error")


def text_of(event: Mapping[str, Any]) -> str:
    """The text that an event of a stream carries."""
    return "".join(_text_of(choice) for choice in event.get("choices", ()))


def _of_stream(response: httpx.Response, events: list[dict[str, Any]], num_answers: int, seconds: float) -> Reply:
    texts, reasons = [""] * num_answers, [None] * num_answers
    usage: Mapping[str, int] = {}
    error = None
    for event in events:
        if "error" in event:
            error = _checked_error(event)
            break
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            texts[choice["index"]] += _text_of(choice)
            reasons[choice["index"]] = choice["finish_reason"] or reasons[choice["index"]]
    return _checked(_reply(response, texts, reasons, usage, error, seconds))


def read_body(response: httpx.Response, content: bytes, num_answers: int, seconds: float) -> Reply:
    """What a response says that came whole.

    Args:
        response: Its status and headers.
        content: Its body.
        num_answers: How many were asked for.
        seconds: How long it took.

    Raises:
        MalformedReplyError: It is not in OpenAI's shape.
    """
    try:
        body = json.loads(content)
    except ValueError as error:
        raise MalformedReplyError(f"{response.status_code}, not JSON: {content[:100]!r}") from error
    if response.status_code != 200:
        return _reply(response, (), (), {}, _checked_error(body), seconds)
    choices = sorted(body["choices"], key=lambda choice: choice["index"])
    if [choice["index"] for choice in choices] != list(range(num_answers)):
        raise MalformedReplyError(f"{len(choices)} answers, {num_answers} asked for")
    texts = [_text_of(choice) for choice in choices]
    reasons = [choice["finish_reason"] for choice in choices]
    return _checked(_reply(response, texts, reasons, body["usage"], None, seconds))


def _reply(
    response: httpx.Response,
    texts: Any,
    reasons: Any,
    usage: Mapping[str, int],
    error: Mapping[str, Any] | None,
    seconds: float,
) -> Reply:
    return Reply(
        status=response.status_code,
        texts=tuple(texts),
        finish_reasons=tuple(reasons),
        prompt_tokens=usage.get("prompt_tokens", 0),
        completion_tokens=usage.get("completion_tokens", 0),
        error=error,
        headers=dict(response.headers),
        seconds=seconds,
    )


def _checked(reply: Reply) -> Reply:
    if reply.error is None and (None in reply.finish_reasons or not reply.prompt_tokens):
        raise MalformedReplyError("an answer without an end, or without usage")
    return reply


def _checked_error(body: Any) -> Mapping[str, Any]:
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict) or set(error) != ERROR_FIELDS or not error["message"] or not error["code"]:
        raise MalformedReplyError(f"an error in another shape: {str(body)[:200]}")
    return error


def _text_of(choice: Mapping[str, Any]) -> str:
    content = choice.get("message") or choice.get("delta")
    return str(choice["text"] if content is None and "text" in choice else (content or {}).get("content") or "")
