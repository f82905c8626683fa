"""What every request passes first: its id, the Host that it names, its API key; and errors, brought into shape."""

import logging
import re
import uuid
from collections.abc import Collection, Iterable, Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.errors import AuthenticationError, ExpertError, InvalidRequestError, ServeError
from pipeline.openai_api.http_errors import HttpError, http_error
from pipeline.serve.keys import KeyRing
from pipeline.serve.limits import LimitsConfig

logger = logging.getLogger(__name__)
REQUEST_ID = "expert.request_id"  # in the scope: the id under which the request is known to its client
CLIENT = "expert.client"  # in the scope: the name of the client whose key it was; None where no key is needed
HEALTH_PATH = "/health"
_REQUEST_ID_PATTERN = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._:/+=-]{0,127}")
_BEARER = re.compile(rb"[Bb]earer +(\S+) *")
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


class Guard:
    """Lets a request through when its Host is allowed and its API key known; nothing else decides who may ask.

    Args:
        app: What is guarded.
        keys: Who may ask; empty for everyone.
        limits: Its `allowed_hosts`.
        open_paths: What may be had (GET, HEAD) without a key.
        echoes_request_id: Whether responses name the request's id; not where the server in front does it already.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: KeyRing,
        limits: LimitsConfig,
        open_paths: Collection[str],
        echoes_request_id: bool = True,
    ) -> None:
        self._app = app
        self._keys = keys
        self._hosts = tuple(name.lower() for name in limits.allowed_hosts)
        self._open_paths = frozenset(open_paths)
        self._echoes_request_id = echoes_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Guard one connection; see ASGI."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        request_id = _request_id(headers)
        scope[REQUEST_ID] = request_id
        marks = (*_HEADERS, (b"x-request-id", request_id.encode())) if self._echoes_request_id else _HEADERS
        has_begun = False

        async def send_marked(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                own = {name for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *(mark for mark in marks if mark[0] not in own)]
            await send(message)

        try:
            self._admit(scope, headers)
            await self._app(scope, receive, send_marked)
        except ExpertError as error:
            await send_error(send_marked, http_error(error))
        except Exception:  # the outermost place: what nobody foresaw is logged, and told without its words
            logger.exception("request %s failed", request_id)
            if not has_begun:
                await send_error(send_marked, http_error(ServeError("the request failed", hint="See the log.")))

    def _admit(self, scope: Scope, headers: Sequence[tuple[bytes, bytes]]) -> None:
        scope[CLIENT] = None
        is_read = scope["method"] in ("GET", "HEAD")
        if is_read and scope["path"] == HEALTH_PATH:
            return  # whoever asks how it is names it by its address, and learns nothing else
        self._check_host(headers)
        if not self._keys or (is_read and scope["path"] in self._open_paths):
            return
        found = [_BEARER.fullmatch(value) for name, value in headers if name == b"authorization"]
        if len(found) != 1 or found[0] is None:
            raise AuthenticationError("no API key is given", hint="Send it as the header Authorization: Bearer KEY.")
        client = self._keys.client_of(found[0][1].decode("latin-1"))
        if client is None:
            raise AuthenticationError("the API key is not known", hint="Ask the operator of this service for one.")
        scope[CLIENT] = client

    def _check_host(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Refuse names that are not ours: a page elsewhere that has its own name point here gets no further."""
        if "*" in self._hosts:
            return
        named = [value.decode("latin-1") for name, value in headers if name == b"host"]
        host = _host_name(named[0]) if len(named) == 1 else ""
        if not any(host == name or (name.startswith("*.") and host.endswith(name[1:])) for name in self._hosts):
            raise InvalidRequestError(
                f"the Host {host[:100]!r} is not one that this service answers to",
                hint="Use an allowed name, or have the operator add it to limits.allowed_hosts.",
            )


async def send_error(send: Send, error: HttpError) -> None:
    """Send an error as a whole response."""
    headers = [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    await send_json(send, error.body, status=error.status, headers=headers)


async def send_json(send: Send, body: bytes, *, status: int = 200, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
    """Send JSON as a whole response that nothing may keep."""
    own = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    start = {"type": "http.response.start", "status": status}
    await send({**start, "headers": [*own, (b"cache-control", b"no-store"), *headers]})
    await send({"type": "http.response.body", "body": body})


def _request_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """What the client calls the request, where that can stand in a log; else a new name."""
    given = next((value for name, value in headers if name == b"x-request-id"), b"")
    return given.decode() if _REQUEST_ID_PATTERN.fullmatch(given) else uuid.uuid4().hex


def _host_name(host: str) -> str:
    """The name in a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower().removesuffix(".")
