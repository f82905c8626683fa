"""`InferenceResult`: the answer to one prompt, and how it came about."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.engine.types import Completion, Failure, FinishReason, TokenLogprob

MAX_SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class Timings:
    """Seconds from the call of a prompt; None for what did not happen, or was not measured.

    Args:
        queue: Until the engine began to compute it; the prompt was tokenised meanwhile.
        first_token: Until the first token was there.
        total: Until the answer was finished.
    """

    queue: float | None = None
    first_token: float | None = None
    total: float | None = None


@dataclass(frozen=True, repr=False)
class InferenceResult:
    """The answer to one prompt.

    Two results are equal when they say the same, however long they took.

    Args:
        text: The answer, without stop string or end token; empty when there was an error.
        finish_reason: `"stop"`, `"length"` (cut at `max_tokens` or the context), `"cancelled"` (a stream was closed;
            `text` is what there was) or `"error"`.
        prompt_tokens: Tokens of the templated prompt.
        completion_tokens: Tokens generated, the end token included.
        expert: The expert that answered, `name@version`.
        expert_sha256: The digest of its package.
        error: Why there is no answer, or None.
        logprobs: The log probability of each generated token, if asked for.
        grammar_valid: Whether `text` is a whole one of the grammar it was held to, which an answer that was cut may not
            be; None without a grammar.
        timings: How long it took.
        alternatives: The other answers, where `n` is more than 1.
    """

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    expert: str
    expert_sha256: str
    error: Failure | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    grammar_valid: bool | None = None
    timings: Timings = field(default=Timings(), compare=False)
    alternatives: "tuple[InferenceResult, ...]" = ()

    @property
    def expert_name(self) -> str:
        """The name in the expert's manifest."""
        return self.expert.partition("@")[0]

    @property
    def expert_version(self) -> str:
        """The version in the expert's manifest."""
        return self.expert.partition("@")[2]

    @property
    def texts(self) -> tuple[str, ...]:
        """The text of this answer and of the alternatives."""
        return (self.text, *(other.text for other in self.alternatives))

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values, for JSON or a DataFrame."""
        return asdict(self)

    def __repr__(self) -> str:
        if self.error is not None:
            return f"InferenceResult(error {self.error.code}: {_short(self.error.message)}, {self.expert})"
        parts = [
            repr(_short(self.text)),
            self.expert,
            self.finish_reason,
            f"{self.prompt_tokens} + {self.completion_tokens} tokens",
        ]
        parts += [f"{self.timings.total:.3g} s"] if self.timings.total is not None else []
        parts += [f"{len(self.alternatives)} alternatives"] if self.alternatives else []
        return f"InferenceResult({', '.join(parts)})"


def result_of(
    completions: Sequence[Completion], *, expert: str, expert_sha256: str, timings: Timings
) -> InferenceResult:
    """The result of a request.

    Args:
        completions: Its answers, in order; one at least.
        expert: `name@version`.
        expert_sha256: The digest of its package.
        timings: How long it took.
    """
    first, *others = [
        InferenceResult(
            text=completion.text,
            finish_reason=completion.finish_reason,
            prompt_tokens=completion.prompt_tokens,
            completion_tokens=completion.completion_tokens,
            expert=expert,
            expert_sha256=expert_sha256,
            error=completion.failure,
            logprobs=completion.logprobs,
            grammar_valid=completion.grammar_valid,
            timings=timings,
        )
        for completion in completions
    ]
    return InferenceResult(**{**vars(first), "alternatives": tuple(others)}) if others else first


def _short(text: str) -> str:
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]}..."
