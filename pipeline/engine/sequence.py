"""One request being answered: everything that is known of it so far."""

from pipeline.engine.grammar import GrammarMatcher
from pipeline.engine.stopping import StopChecker
from pipeline.engine.types import Completion, FinishReason, Request


class Sequence:
    """The state of one request, owned here and read elsewhere.

    Args:
        request: What is asked.
        stopping: Tells when it is finished.
        matcher: Where it stands in its grammar, if it has one.
    """

    def __init__(self, request: Request, stopping: StopChecker, matcher: GrammarMatcher | None = None) -> None:
        self.request = request
        self.matcher = matcher
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._stopping = stopping

    @property
    def num_generated(self) -> int:
        """How many tokens have been generated."""
        return len(self.token_ids)

    @property
    def is_finished(self) -> bool:
        """Whether no more tokens are wanted."""
        return self.finish_reason is not None

    def append(self, token_id: int) -> None:
        """Take the next generated token, and finish if it is the last."""
        self.token_ids.append(token_id)
        self.finish_reason = self._stopping.check(self.token_ids)
        if self.matcher is not None and not self.is_finished:
            self.matcher.accept(token_id)

    def completion(self) -> Completion:
        """The answer of a finished sequence."""
        if self.finish_reason is None:
            raise RuntimeError(f"request {self.request.id} is not finished")
        return Completion(
            request_id=self.request.id,
            text=self._stopping.text(self.token_ids),
            finish_reason=self.finish_reason,
            prompt_tokens=len(self.request.prompt_token_ids),
            completion_tokens=self.num_generated,
        )
