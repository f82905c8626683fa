"""What is told of an answer: its text as it becomes certain, and its end."""

from dataclasses import dataclass

from pipeline.engine.types import FinishReason


@dataclass(frozen=True)
class TokenText:
    """A generated token and its log probability; `top` holds the likeliest ones of that position, best first."""

    text: str
    utf8: bytes
    logprob: float
    top: tuple["TokenText", ...] = ()


@dataclass(frozen=True)
class Delta:
    """Text that answer `index` has become certain of since its last one, and the log probabilities of its tokens."""

    text: str
    index: int = 0
    logprobs: tuple[TokenText, ...] | None = None


@dataclass(frozen=True)
class Ended:
    """Answer `index` is finished. With finish reason `error`, `code` and `message` say why."""

    finish_reason: FinishReason
    completion_tokens: int
    index: int = 0
    code: str | None = None
    message: str | None = None
