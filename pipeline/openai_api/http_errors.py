"""Our errors as HTTP says them: a status, headers, and a body in OpenAI's shape."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline import errors
from pipeline.openai_api.protocol import field_of

MAX_MESSAGE_CHARACTERS = 500
_STATUSES: Mapping[type[errors.ExpertError], int] = {
    errors.ExpertError: 500,
    errors.MissingDependencyError: 400,  # what was asked for cannot be had here
    errors.TokenizerError: 400,  # the chat template refuses this conversation
    errors.InvalidRequestError: 400,
    errors.PromptTooLongError: 400,
    errors.GrammarError: 400,
    errors.RoutingError: 400,
    errors.OutOfMemoryError: 503,
    errors.DeadlineError: 504,
    errors.AuthenticationError: 401,
    errors.UnknownRouteError: 404,
    errors.UnknownModelError: 404,
    errors.BodyTooLargeError: 413,
    errors.SlowClientError: 408,
    errors.TooManyRequestsError: 429,
    errors.OverloadedError: 429,
    errors.ReplicaLostError: 503,
    errors.ShuttingDownError: 503,
}
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
# The words of an error of ours that a client must not see: they may name a file or a host.
_INTERNAL = "The service failed to answer; its log has the reason under this request's id"


@dataclass(frozen=True)
class HttpError:
    """An error as a client gets it.

    Args:
        status: The HTTP status.
        body: `{"error": {"message", "type", "param", "code"}}`, as JSON.
        code: The code of our tree, for the log and the metrics.
        headers: What else the response carries.
        reason: What the log says, where the client is not told.
    """

    status: int
    body: bytes
    code: str
    headers: Mapping[str, str] = field(default_factory=dict)
    reason: str | None = None

    @property
    def content(self) -> dict[str, Any]:
        """The body, as plain values."""
        content: dict[str, Any] = json.loads(self.body)
        return content


def http_error(error: errors.ExpertError, *, status: int | None = None, retry_after: int = 1) -> HttpError:
    """Put an error into OpenAI's shape.

    Args:
        error: Any error of our tree.
        status: Another status than the tree's.
        retry_after: Seconds that a refused client is told to wait.
    """
    return coded_error(error.code, error.message, error.hint, status=status, retry_after=retry_after)


def coded_error(
    code: str,
    message: str,
    hint: str | None = None,
    *,
    status: int | None = None,
    retry_after: int = 1,
    hides_inside: bool = True,
) -> HttpError:
    """The same, for an error that came from another process as its code and its words.

    Args:
        code, message, hint: Of the error.
        status, retry_after: As for `http_error`.
        hides_inside: Whether the words of an error of ours are kept from the client, and are for the log alone.
    """
    status = status or _BY_CODE.get(code, 500)
    reason = None
    if status == 500 and hides_inside:
        reason, message, hint = message, _INTERNAL, None
    text = message if len(message) <= MAX_MESSAGE_CHARACTERS else f"{message[:MAX_MESSAGE_CHARACTERS]}..."
    sentence = text[:1].upper() + text[1:] if field_of(text) is None else text
    content = {
        "message": f"{sentence.rstrip('.')}. {hint}" if hint else f"{sentence.rstrip('.')}.",
        "type": _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error"),
        "param": field_of(message) if status in (400, 404) else None,
        "code": code,
    }
    headers: dict[str, str] = {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    elif status in (408, 413):
        headers["Connection"] = "close"  # the rest of the body is not wanted
    elif status in (429, 503):
        headers["Retry-After"] = str(retry_after)
    elif status == 504:
        headers["x-should-retry"] = "false"  # OpenAI's clients ask again by themselves; it would take as long again
    return HttpError(status, json.dumps({"error": content}, ensure_ascii=False).encode(), code, headers, reason)


def status_of(kind: type[errors.ExpertError]) -> int:
    """The status of an error that has none of its own: that of the nearest one above it."""
    return next(_STATUSES[base] for base in kind.__mro__ if base in _STATUSES)


def _tree(kind: type[errors.ExpertError]) -> Iterator[type[errors.ExpertError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _tree(below)


_BY_CODE: Mapping[str, int] = {kind.code: status_of(kind) for kind in _tree(errors.ExpertError)}
