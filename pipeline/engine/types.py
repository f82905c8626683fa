"""The small records that flow through an engine."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol

from pipeline.errors import InvalidRequestError

FinishReason = Literal["stop", "length", "error"]
DEFAULT_MAX_TOKENS = 256
MAX_STOP_STRINGS = 64


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen and when to stop.

    Args:
        temperature: 0 takes the most likely token; higher draws more freely.
        top_p: Draw from the smallest set of tokens with at least this probability, in (0, 1].
        top_k: Draw from this many most likely tokens; 0 for all.
        min_p: Leave out tokens less likely than this share of the most likely one, in [0, 1].
        repetition_penalty: Divides the score of tokens already seen; 1 changes nothing.
        max_tokens: At most this many tokens are generated.
        stop: Strings that end the text; they are cut from it.
        seed: The draws of a request depend on this number and the position alone, never on its neighbours.

    Raises:
        InvalidRequestError: A value has the wrong type or is out of range; the message names it.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int = DEFAULT_MAX_TOKENS
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _whole("top_k", self.top_k, 0, 1 << 31)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        _whole("max_tokens", self.max_tokens, 1, 1 << 31)
        _whole("seed", self.seed, 0, (1 << 64) - 1)
        object.__setattr__(self, "stop", _strings("stop", self.stop))

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        """The names of all options, in order."""
        return tuple(option.name for option in fields(cls))


@dataclass(frozen=True)
class Request:
    """One prompt, tokenised, and how to answer it. `id` is unique within one `generate` call."""

    id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    grammar: str | None = None


@dataclass(frozen=True)
class Failure:
    """Why a request was not answered: a code of the error tree, and a sentence."""

    code: str
    message: str


@dataclass(frozen=True)
class Completion:
    """The answer to one request.

    `completion_tokens` counts every generated token, the end-of-sequence or stop tokens included. With finish reason
    `error`, `text` is empty and `failure` says why.
    """

    request_id: str
    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    failure: Failure | None = None


class Engine(Protocol):
    """The seam between what asks and what computes: requests in, completions out, on one device."""

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Answer every request, yielding each completion as it finishes, in any order."""
        ...

    def close(self) -> None:
        """Free the device. The engine cannot be used afterwards."""
        ...


def _number(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> None:
    valid = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not valid or value > high or value < low or (open_low and value == low):
        bounds = f"{'more than' if open_low else 'at least'} {low:g} and at most {high:g}"
        raise InvalidRequestError(f"{name} is {value!r}", hint=f"Give a number of {bounds}.")


def _whole(name: str, value: Any, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidRequestError(f"{name} is {value!r}", hint=f"Give a whole number from {low} to {high}.")


def _strings(name: str, value: Any) -> tuple[str, ...]:
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) and item for item in items):
        raise InvalidRequestError(
            f"{name} is {value!r}", hint="Give a string or a list of strings, none of them empty."
        )
    if len(items) > MAX_STOP_STRINGS:
        raise InvalidRequestError(f"{name} has {len(items)} strings", hint=f"Give at most {MAX_STOP_STRINGS}.")
    return tuple(items)
