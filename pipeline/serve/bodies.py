"""Reading a request's body, bounded in bytes and in time."""

import asyncio
from contextlib import suppress

from starlette.types import Receive, Scope

from pipeline.errors import BodyTooLargeError, InvalidRequestError, SlowClientError
from pipeline.serve.limits import LimitsConfig

LINGER_SECONDS = 1.0
LINGER_BYTES = 16 << 20


class ClientGoneError(Exception):
    """The client has closed the connection: there is nobody to tell anything."""


async def read_body(scope: Scope, receive: Receive, limits: LimitsConfig) -> bytes:
    """The body of a JSON request.

    Raises:
        BodyTooLargeError: It is larger than allowed; it is not read any further.
        SlowClientError: It was not there in time.
        InvalidRequestError: It is said not to be JSON, or is compressed.
        ClientGoneError: The client went away before its end.
    """
    length = 0
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            length = int(value) if len(value) < 20 else limits.max_body_bytes + 1
        elif name == b"content-encoding" and value.lower() != b"identity":
            raise InvalidRequestError("the body is compressed", hint="Send it as it is.")
    # A page of another origin can send any other type without asking first.
    types = [value for name, value in scope["headers"] if name == b"content-type"]
    if len(types) != 1 or types[0].partition(b";")[0].strip().lower() != b"application/json":
        raise InvalidRequestError("the body has no type, or another one than JSON", hint=_TYPE_HINT)
    _check_length(length, limits)
    parts: list[bytes] = []
    received = 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                part = message.get("body", b"")
                received += len(part)
                _check_length(received, limits)
                parts.append(part)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError as error:
        raise SlowClientError(
            f"the body was not there after {limits.body_seconds:g} seconds", hint="Send it faster, or less of it."
        ) from error


async def drop_rest(receive: Receive) -> None:
    """Take what is left of a body that is refused, within bounds, and drop it.

    A connection that is closed while its client still sends is reset, and the client may never see the response: see
    RFC 9112, section 9.6.
    """
    dropped = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            while dropped < LINGER_BYTES:
                message = await receive()
                dropped += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


_TYPE_HINT = "Send JSON, with the header Content-Type: application/json."


def _check_length(length: int, limits: LimitsConfig) -> None:
    if length > limits.max_body_bytes:
        raise BodyTooLargeError(
            f"the body has more than {limits.max_body_bytes:,} bytes", hint="Send less; shorten the prompt or schema."
        )
