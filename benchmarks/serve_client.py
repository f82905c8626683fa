"""One request to a server that speaks OpenAI's API, and what became of it.

aiohttp and not httpx: for an answer of 25 pieces httpx needs 3.4 ms of processor time, aiohttp 0.4 and plain asyncio
streams 0.3; on a machine that the server shares, the client's time is taken from what it measures.
"""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

PATH = "/v1/chat/completions"
_HAS_TEXT = re.compile(rb'"content": ?"[^"]')
NO_CONNECTION, CUT_OFF, NOT_FINISHED = "no connection", "cut off", "not finished"


@dataclass(frozen=True)
class Outcome:
    """What became of one request.

    Args:
        number: Of the request in its scene.
        begun: When it was sent, by `time.monotonic()`.
        seconds: Until its end, or until it was given up.
        first_seconds: Until the first text; None where none came. Of an answer that came whole, `seconds`.
        status: Of HTTP; None where there was no response.
        error: None for a whole answer; else the server's code for what went wrong, or ours.
        output_tokens: As the server counts them.
        text: The answer.
    """

    number: int
    begun: float
    seconds: float
    first_seconds: float | None = None
    status: int | None = None
    error: str | None = None
    output_tokens: int = 0
    text: str = ""


class Client:
    """Sends requests to one server, as many at once as it is asked to, over connections that are kept."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url

    async def send(self, number: int, body: Mapping[str, Any]) -> Outcome:
        """Send a request and take its answer to the end; what fails is an outcome with an error.

        Args:
            number: Of the request.
            body: What to send, as JSON.
        """
        content = json.dumps(body).encode()
        begun = time.monotonic()
        first: float | None = None
        status: int | None = None
        parts: list[bytes] = []
        error: str | None = None
        try:
            async with self._session.post(
                self._url + PATH, data=content, headers={"content-type": "application/json"}
            ) as response:
                status = response.status
                async for part in response.content.iter_any():
                    if first is None and _HAS_TEXT.search(part):
                        first = time.monotonic()
                    parts.append(part)
        except (aiohttp.ClientError, OSError) as failure:
            error = NO_CONNECTION if status is None else f"{CUT_OFF}: {type(failure).__name__}"
        seconds = time.monotonic() - begun
        read = (
            read_answer(b"".join(parts), status, is_stream=bool(body.get("stream"))) if error is None else Answer(error)
        )
        return Outcome(
            number,
            begun,
            seconds,
            None if first is None else first - begun,
            status,
            read.error,
            read.output_tokens,
            read.text,
        )


@dataclass(frozen=True)
class Answer:
    """What a response says; the fields are those of `Outcome`."""

    error: str | None = None
    output_tokens: int = 0
    text: str = ""


def read_answer(content: bytes, status: int | None, *, is_stream: bool) -> Answer:
    """Read a response of `/v1/chat/completions`.

    Args:
        content: Its body.
        status: Of HTTP.
        is_stream: Whether an answer was to come as server-sent events.
    """
    try:
        if status != 200:
            return Answer(_error_code(json.loads(content)) or f"status {status}")
        if not is_stream:
            body = json.loads(content)
            text = body["choices"][0]["message"]["content"]
            return Answer(None, int(body["usage"]["completion_tokens"]), text or "")
        return _read_events(content)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return Answer("not an answer" if status == 200 else f"status {status}")


def _read_events(content: bytes) -> Answer:
    texts: list[str] = []
    output_tokens = 0
    is_finished = False
    for line in content.split(b"\n"):
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[len(b"data: ") :])
        if "error" in event:
            return Answer(_error_code(event) or "error event", output_tokens, "".join(texts))
        output_tokens = int((event.get("usage") or {}).get("completion_tokens", output_tokens))
        for choice in event["choices"]:
            texts.append(choice["delta"].get("content") or "")
            is_finished = is_finished or choice.get("finish_reason") is not None
    return Answer(None if is_finished else CUT_OFF, output_tokens, "".join(texts))


def _error_code(body: Any) -> str | None:
    error = body.get("error", body.get("detail")) if isinstance(body, dict) else None
    if isinstance(error, dict):
        error = error.get("code") or error.get("message")
    return None if error is None else str(error)[:80]


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Client]:
    """A client of a server, with no limits of its own.

    Args:
        url: Without the path.
    """
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None, connect=None, sock_connect=None, sock_read=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        try:
            yield Client(session, url)
        finally:
            await asyncio.sleep(0)  # what was given up closes its connection
