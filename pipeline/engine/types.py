"""The small records that flow through an engine."""

from collections.abc import Iterable, Iterator
from copy import copy
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol, Self

from pipeline.engine.stats import EngineStats
from pipeline.errors import InvalidRequestError

FinishReason = Literal["stop", "length", "error", "cancelled"]
DEFAULT_MAX_TOKENS = 256
MAX_STOP_STRINGS = 64
MAX_ANSWERS = 128
MAX_LOGPROBS = 20
GrammarKind = Literal["gbnf", "json_schema", "regex"]


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen and when to stop.

    Args:
        temperature: 0 takes the most likely token; higher draws more freely.
        top_p: Draw from the smallest set of tokens with at least this probability, in (0, 1].
        top_k: Draw from this many most likely tokens; 0 for all.
        min_p: Leave out tokens less likely than this share of the most likely one, in [0, 1].
        repetition_penalty: Divides the score of tokens already seen; 1 changes nothing.
        presence_penalty: Taken once from the score of every token generated so far, in [-2, 2].
        frequency_penalty: Taken from a token's score for each time it was generated so far, in [-2, 2].
        max_tokens: At most this many tokens are generated.
        min_tokens: Nothing ends the text before this many tokens: no end token, stop string or stop token.
        stop: Strings that end the text; they are cut from it.
        stop_token_ids: Tokens that end the text; they are not part of it.
        ignore_eos: Go on after the model's end token.
        seed: The draws of a request depend on this number and the position alone, never on its neighbours.
        n: How many answers are drawn; answer `i` draws as a request of its own would, see `sampling.answer_seed`.
        logprobs: With each token, its log probability and those of this many most likely ones; None for none.

    Raises:
        InvalidRequestError: A value has the wrong type or is out of range; the message names it.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_tokens: int = DEFAULT_MAX_TOKENS
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int = 0
    n: int = 1
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _whole("top_k", self.top_k, 0, 1 << 31)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _whole("max_tokens", self.max_tokens, 1, 1 << 31)
        _whole("min_tokens", self.min_tokens, 0, self.max_tokens)
        _whole("seed", self.seed, 0, (1 << 64) - 1)
        _whole("n", self.n, 1, MAX_ANSWERS)
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if not isinstance(self.ignore_eos, bool):
            raise InvalidRequestError(f"ignore_eos is {self.ignore_eos!r}", hint="Give true or false.")
        object.__setattr__(self, "stop", _strings("stop", self.stop))
        object.__setattr__(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        """The names of all options, in order."""
        return tuple(option.name for option in fields(cls))

    def with_seed(self, seed: int) -> Self:
        """The same parameters with another seed; several times faster than checking all of them again.

        Raises:
            InvalidRequestError: It is no whole number below 2**64.
        """
        _whole("seed", seed, 0, (1 << 64) - 1)
        params = copy(self)
        object.__setattr__(params, "seed", seed)
        return params


@dataclass(frozen=True)
class Grammar:
    """What an answer must be: a text of this grammar.

    Args:
        kind: How `text` is to be read.
        text: A GBNF grammar, a JSON schema as JSON, or a regular expression.
    """

    kind: GrammarKind
    text: str


@dataclass(frozen=True)
class Request:
    """One prompt, tokenised, and how to answer it.

    Args:
        id: Unique within one `generate` call.
        prompt_token_ids: The prompt. An id at or above the vocabulary size is a soft-prompt position of the engine.
        params: How to choose tokens and when to stop.
        grammar: What the answer is held to, or None.
        expert: The name under which the engine holds the adapter that answers; None for the base model alone.
        prefix_length: How many of the first tokens other requests are likely to share (a system message, a schema).
            It only helps to compute them once; the answer does not depend on it.
    """

    id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    grammar: Grammar | None = None
    expert: str | None = None
    prefix_length: int = 0


@dataclass(frozen=True)
class Failure:
    """Why a request was not answered: a code of the error tree, and a sentence."""

    code: str
    message: str


@dataclass(frozen=True)
class TokenLogprob:
    """The log probability of one generated token, by the model alone: before temperature, penalties and grammar.

    `top` holds the most likely tokens of that position, `(token_id, logprob)`, best first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """The token that was chosen to come next, with its log probability if asked for."""

    token_id: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True)
class Completion:
    """One answer to one request.

    `completion_tokens` counts every generated token, the end-of-sequence or stop tokens included. With finish reason
    `error`, `text` is empty and `failure` says why; with `cancelled`, `text` is what there was. `index` tells the
    answers of a request with `n` above 1 apart. `logprobs` has an entry for each generated token, if asked for.
    `grammar_valid` says whether `text` is a whole one of the request's grammar, which one that was cut may not be; None
    without a grammar.
    """

    request_id: str
    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    failure: Failure | None = None
    index: int = 0
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    grammar_valid: bool | None = None


class Engine(Protocol):
    """The seam between what asks and what computes: requests in, completions out, on one device."""

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Answer every request, yielding each completion as it finishes, in any order."""
        ...

    def stats(self) -> EngineStats:
        """What the engine is doing now."""
        ...

    def close(self) -> None:
        """Free the device. The engine cannot be used afterwards."""
        ...


def _number(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> None:
    valid = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high  # false for NaN
    if not valid or (open_low and value == low):
        bounds = f"{'more than' if open_low else 'at least'} {low:g} and at most {high:g}"
        raise InvalidRequestError(f"{name} is {value!r}", hint=f"Give a number of {bounds}.")


def _whole(name: str, value: Any, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidRequestError(f"{name} is {value!r}", hint=f"Give a whole number from {low} to {high}.")


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or len(value) > MAX_STOP_STRINGS:
        raise InvalidRequestError(f"{name} is {value!r}", hint=f"Give a list of at most {MAX_STOP_STRINGS} token ids.")
    for item in value:
        _whole(name, item, 0, 1 << 31)
    return tuple(value)


def _strings(name: str, value: Any) -> tuple[str, ...]:
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) and item for item in items):
        raise InvalidRequestError(
            f"{name} is {value!r}", hint="Give a string or a list of strings, none of them empty."
        )
    if len(items) > MAX_STOP_STRINGS:
        raise InvalidRequestError(f"{name} has {len(items)} strings", hint=f"Give at most {MAX_STOP_STRINGS}.")
    return tuple(items)
