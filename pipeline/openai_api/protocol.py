"""OpenAI's request bodies, and our extra fields, read into what an engine is asked.

Options, their defaults and their bounds are the engine's own: see `pipeline.engine.requests`.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, Protocol

from pipeline.engine.requests import CONSTRAINTS, OPTION_NAMES, override_params
from pipeline.engine.strict_json import InvalidJsonError, parse_object
from pipeline.engine.types import SamplingParams
from pipeline.errors import InvalidRequestError, UnknownModelError

Kind = Literal["chat", "text"]
ROUTES: Mapping[str, Kind] = {"/v1/chat/completions": "chat", "/v1/completions": "text"}
TEXT_FIELDS = ("schema", "dialect", "system")
_SHARED_FIELDS = ("model", "stream", "stream_options", "user", "timeout", *TEXT_FIELDS)
FIELDS: Mapping[Kind, frozenset[str]] = {
    "chat": frozenset(
        ("messages", "top_logprobs", "max_completion_tokens", "response_format", *_SHARED_FIELDS, *OPTION_NAMES)
    ),
    "text": frozenset(("prompt", *_SHARED_FIELDS, *OPTION_NAMES)),
}
# What clients send of fields that we do not support without asking for anything by it.
_NEUTRAL: Mapping[str, Any] = {
    "best_of": 1,
    "echo": False,
    "logit_bias": {},
    "modalities": ["text"],
    "service_tier": "auto",
    "store": False,
    "suffix": "",
}
_READ_HERE = frozenset(("logprobs",))  # options that OpenAI's two routes spell in two ways
_PLAIN_OPTIONS = tuple(name for name in OPTION_NAMES if name not in _READ_HERE)
_MESSAGE_FIELDS = frozenset(("role", "content"))
_NOT_SUPPORTED = "is not supported"
_MAX_NAMED = 5
_MAX_LISTED_NAMES = 50
_MAX_NAME_CHARACTERS = 64
_MAX_USER_CHARACTERS = 512


class CallLimits(Protocol):
    """What a body may ask for."""

    @property
    def max_tokens(self) -> int:
        """Most tokens of each answer."""

    @property
    def max_answers(self) -> int:
        """Most answers (`n`)."""

    @property
    def max_seconds(self) -> float:
        """Longest `timeout`."""


@dataclass(frozen=True)
class Call:
    """A checked body: what to ask, and how the answer shall look.

    Args:
        kind: Which route it came by, and so the shape of its answer.
        model: The expert that is asked for.
        fields: `prompt`, `messages`, `schema`, `dialect`, `system`, as `RequestBuilder.build` takes them.
        options: Any of `pipeline.engine.requests.OPTION_NAMES`, as a batch row has them.
        num_answers: How many answers will come.
        has_logprobs: Whether they come with log probabilities.
        is_streamed: Whether text is sent as it comes.
        includes_usage: Whether a stream ends with the counts of tokens.
        timeout: Seconds that the client gives it; None for the service's own deadline.
    """

    kind: Kind
    model: str
    fields: Mapping[str, Any]
    options: Mapping[str, Any]
    num_answers: int = 1
    has_logprobs: bool = False
    is_streamed: bool = False
    includes_usage: bool = False
    timeout: float | None = None


def read_call(kind: Kind, body: bytes, limits: CallLimits) -> Call:
    """Check the body of a request.

    Args:
        kind: `"chat"` for `/v1/chat/completions`, `"text"` for `/v1/completions`.
        body: JSON, in UTF-8.
        limits: What a client may ask for.

    Raises:
        InvalidRequestError: It is not JSON; a field is missing, unknown, not supported or wrong. The message begins
            with the name of the field.
    """
    try:
        values = parse_object(body)
    except InvalidJsonError as error:
        raise InvalidRequestError(f"the body is {_cause(error)}", hint="Send one JSON object in UTF-8.") from error
    return check_call(kind, values, limits)


def check_call(kind: Kind, values: Mapping[str, Any], limits: CallLimits) -> Call:
    """Check a body that is read already.

    Args:
        kind: As for `read_call`.
        values: Its fields, from strict JSON; null is as good as left out.
        limits: As for `read_call`.

    Raises:
        InvalidRequestError: As `read_call`.
    """
    given = {name: value for name, value in values.items() if value is not None}
    _refuse_unsupported(kind, given)
    model = given.get("model")
    if not isinstance(model, str) or not model:
        _wrong("model", model, "the name of an expert; GET /v1/models lists them")
    if "user" in given and (not isinstance(given["user"], str) or len(given["user"]) > _MAX_USER_CHARACTERS):
        _wrong("user", given["user"], f"a string of at most {_MAX_USER_CHARACTERS} characters")
    options = _options(kind, given)
    params = override_params(SamplingParams(max_tokens=limits.max_tokens), options)
    if params.max_tokens > limits.max_tokens:
        _wrong("max_tokens", params.max_tokens, f"at most {limits.max_tokens:,}: this service's limit")
    if params.n > limits.max_answers:
        _wrong("n", params.n, f"at most {limits.max_answers}: this service's limit")
    is_streamed = _truth("stream", given.get("stream", False))
    return Call(
        kind=kind,
        model=model,
        fields=_texts(kind, given),
        options=options,
        num_answers=params.n,
        has_logprobs=params.logprobs is not None,
        is_streamed=is_streamed,
        includes_usage=_includes_usage(given.get("stream_options"), is_streamed=is_streamed),
        timeout=_timeout(given.get("timeout"), limits),
    )


def unknown_model(name: str, names: Iterable[str], *, hint: str = "") -> UnknownModelError:
    """The error of a body whose `model` is none of ours.

    Args:
        name: What it asks for.
        names: What it may ask for.
        hint: What else can be done, as a sentence.
    """
    known = sorted(names)
    more = f" and {len(known) - _MAX_LISTED_NAMES} more" if len(known) > _MAX_LISTED_NAMES else ""
    listed = f"The models are {', '.join(known[:_MAX_LISTED_NAMES])}{more}."
    return UnknownModelError(f"model {name[:100]!r} is not served here", hint=f"{listed} {hint}".rstrip())


def field_of(message: str) -> str | None:
    """The field that an error's message begins with, as OpenAI's `param` names it; None when it names none."""
    word = message.partition(" ")[0]
    root = word.partition("[")[0].partition(".")[0]
    is_field = any(root in fields for fields in FIELDS.values()) or message.startswith(f"{word} {_NOT_SUPPORTED}")
    return word if is_field else None


def _refuse_unsupported(kind: Kind, given: Mapping[str, Any]) -> None:
    supported = FIELDS[kind]
    unsupported = [name for name in given if name not in supported and given[name] != _NEUTRAL.get(name)]
    if not unsupported:
        return
    first, *others = (name[:_MAX_NAME_CHARACTERS] for name in unsupported[:_MAX_NAMED])
    near = difflib.get_close_matches(first, sorted(supported), n=1)
    raise InvalidRequestError(
        f"{first} {_NOT_SUPPORTED}{', nor is ' if others else ''}{', '.join(others)}",
        hint=f"Did you mean {near[0]}?" if near else "Leave it out.",
    )


def _options(kind: Kind, given: Mapping[str, Any]) -> dict[str, Any]:
    options = {name: given[name] for name in _PLAIN_OPTIONS if name in given}
    if "max_completion_tokens" in given:
        if given.get("max_tokens", given["max_completion_tokens"]) != given["max_completion_tokens"]:
            raise InvalidRequestError(
                "max_completion_tokens is given, and max_tokens is another number", hint="Give one of them."
            )
        options["max_tokens"] = given["max_completion_tokens"]
    logprobs = _chat_logprobs(given) if kind == "chat" else given.get("logprobs")
    if logprobs is not None:
        options["logprobs"] = logprobs
    if "response_format" in given:
        schema = _response_schema(given["response_format"])
        if schema is not None:
            others = [name for name in CONSTRAINTS if options.get(name)]
            if others:
                raise InvalidRequestError(
                    f"response_format asks for JSON, and {' and '.join(others)} is given", hint="Give one of them."
                )
            options["json_schema"] = schema
    return options


def _chat_logprobs(given: Mapping[str, Any]) -> Any:
    """What the engine is asked for by `logprobs` (true or false) and `top_logprobs` (a number)."""
    if not _truth("logprobs", given.get("logprobs", False)):
        if "top_logprobs" in given:
            raise InvalidRequestError("top_logprobs is given without logprobs", hint="Set logprobs to true as well.")
        return None
    top = given.get("top_logprobs", 0)
    try:
        return override_params(SamplingParams(), {"logprobs": top}).logprobs
    except InvalidRequestError as error:
        raise InvalidRequestError(f"top_{error.message}", hint=error.hint) from error


def _response_schema(value: Any) -> Mapping[str, Any] | None:
    """The JSON schema that `response_format` asks for; None when it asks for text."""
    kind = value.get("type") if isinstance(value, dict) else None
    match kind:
        case "text":
            return None
        case "json_object":
            return {"type": "object"}
        case "json_schema":
            described = value.get("json_schema")
            schema = described.get("schema") if isinstance(described, dict) else None
            if not isinstance(schema, dict):
                _wrong("response_format.json_schema", described, 'an object {"name": ..., "schema": {...}}')
            return schema
    return _wrong("response_format", value, 'an object with the type "text", "json_object" or "json_schema"')


def _texts(kind: Kind, given: Mapping[str, Any]) -> dict[str, Any]:
    fields = {name: given[name] for name in TEXT_FIELDS if name in given}
    if kind == "chat":
        fields["messages"] = _messages(given.get("messages"))
        return fields
    prompt = given.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        _wrong("prompt", prompt, "one text; send several prompts as several requests, or run a batch")
    return fields | {"prompt": prompt}


def _messages(value: Any) -> list[dict[str, Any]]:
    """The messages with each content as text; who may say what in which order, the engine decides."""
    if not isinstance(value, list) or not value:
        _wrong("messages", value, 'a list such as [{"role": "user", "content": "..."}]')
    return [_message(f"messages[{position}]", message) for position, message in enumerate(value)]


def _message(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        _wrong(where, value, "an object with a role and a content")
    unsupported = [name for name in value if name not in _MESSAGE_FIELDS and value[name] not in (None, [])]
    if unsupported:
        raise InvalidRequestError(
            f"{where}.{unsupported[0][:_MAX_NAME_CHARACTERS]} {_NOT_SUPPORTED}", hint="Leave it out."
        )
    role = "system" if value.get("role") == "developer" else value.get("role")
    content = value.get("content")
    if isinstance(content, list):
        content = "".join(_part(f"{where}.content[{at}]", part) for at, part in enumerate(content))
    return {"role": role, "content": content}


def _part(where: str, value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind != "text":
        what = f"of the type {kind[:_MAX_NAME_CHARACTERS]!r}" if isinstance(kind, str) else "of no type"
        raise InvalidRequestError(
            f"{where} is {what}, which is not supported", hint="Give text; nothing is fetched from anywhere."
        )
    if not isinstance(value.get("text"), str):
        _wrong(f"{where}.text", value.get("text"), "a string")
    return str(value["text"])


def _includes_usage(value: Any, *, is_streamed: bool) -> bool:
    if value is None:
        return False
    if not is_streamed:
        raise InvalidRequestError("stream_options is given without stream", hint="Set stream to true as well.")
    if not isinstance(value, dict):
        _wrong("stream_options", value, 'an object such as {"include_usage": true}')
    others = [name for name in value if name != "include_usage" and value[name] not in (None, False)]
    if others:
        raise InvalidRequestError(
            f"stream_options.{others[0][:_MAX_NAME_CHARACTERS]} {_NOT_SUPPORTED}", hint="Leave it out."
        )
    return _truth("stream_options.include_usage", value.get("include_usage") or False)


def _timeout(value: Any, limits: CallLimits) -> float | None:
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value <= limits.max_seconds:  # NaN and infinity are no JSON
        _wrong("timeout", value, f"seconds, more than 0 and at most {limits.max_seconds:g}")
    return float(value)


def _truth(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        _wrong(name, value, "true or false")
    return bool(value)


def _wrong(name: str, value: Any, expected: str) -> NoReturn:
    raise InvalidRequestError(f"{name} is {_shown(value)}", hint=f"Give {expected}.")


def _shown(value: Any) -> str:
    """A value in a message: short, and never the whole of what a client sent."""
    match value:
        case None:
            return "missing"
        case bool():
            return "true" if value else "false"
        case str():
            return repr(value) if len(value) <= 60 else f"a string of {len(value):,} characters"
        case int() | float():
            return "a huge number" if isinstance(value, int) and value.bit_length() > 64 else str(value)
        case Sequence():
            return f"a list of {len(value):,}"
    return "an object"


def _cause(error: InvalidJsonError) -> str:
    text = str(error)
    return text if text.startswith(("not ", "nested ")) else f"not valid JSON: {text}"
