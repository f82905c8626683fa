"""One answer being generated: everything that is known of it so far."""

from collections import Counter
from functools import cached_property

import torch

from pipeline.engine.grammar_matcher import GrammarMatcher
from pipeline.engine.sampling import answer_seed
from pipeline.engine.stopping import StopChecker, StopRules
from pipeline.engine.types import Choice, Completion, Failure, FinishReason, Request, TokenLogprob
from pipeline.errors import ExpertError, GrammarError


class Sequence:
    """The state of one answer, owned here and read elsewhere.

    Args:
        request: What is asked.
        stopping: Tells when it is finished, and keeps its text.
        index: Which of the request's `n` answers it is.

    `matcher` is where it stands in its grammar. An engine sets it before the first token is chosen, where the request
    has a grammar.
    """

    def __init__(self, request: Request, stopping: StopChecker, index: int = 0) -> None:
        self.request = request
        self.index = index
        self.seed = answer_seed(request.params.seed, index)
        self.matcher: GrammarMatcher | None = None
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: FinishReason | None = None
        self.failure: Failure | None = None
        self.begun_at: float | None = None  # by time.monotonic(), when the first of its tokens was computed
        self.counts: Counter[int] = Counter()  # of generated tokens, kept where a penalty needs them
        self._stopping = stopping
        params = request.params
        self.is_repetition_penalised = params.repetition_penalty != 1.0
        self.is_count_penalised = params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        self._is_counting = self.is_repetition_penalised or self.is_count_penalised

    @property
    def num_generated(self) -> int:
        """How many tokens have been generated."""
        return len(self.token_ids)

    @property
    def is_finished(self) -> bool:
        """Whether no more tokens are wanted."""
        return self.finish_reason is not None

    @property
    def barred_token_ids(self) -> frozenset[int]:
        """The tokens that may not come next, because they would end the text before its `min_tokens`.

        For a sequence without a grammar; a matcher sees to its own.
        """
        if self.num_generated >= self.request.params.min_tokens:
            return frozenset()
        return self._stopping.end_token_ids

    def seen_tensor(self) -> torch.Tensor:  # [num_seen]
        """The tokens of prompt and answer, some of them twice, where a penalty needs them."""
        return torch.cat([self._prompt_tensor, torch.tensor(list(self.counts), dtype=torch.long)])

    @cached_property
    def _prompt_tensor(self) -> torch.Tensor:
        token_ids: torch.Tensor = torch.tensor(self.request.prompt_token_ids, dtype=torch.long).unique()
        return token_ids

    def append(self, choice: Choice) -> None:
        """Take the next generated token, and finish if it is the last. A finished sequence takes none.

        A sequence fails whose grammar cannot be followed any further.
        """
        if self.is_finished:
            return
        self.token_ids.append(choice.token_id)
        if choice.logprob is not None:
            self.logprobs.append(choice.logprob)
        if self._is_counting:
            self.counts[choice.token_id] += 1
        try:
            self.finish_reason = self._stopping.check(self.token_ids, self.matcher)
            if self.matcher is not None:
                self._follow(self.matcher, choice.token_id)
        except GrammarError as error:
            self.fail(error)

    def _follow(self, matcher: GrammarMatcher, token_id: int) -> None:
        if self.finish_reason != "stop" and not matcher.accept(token_id):
            raise GrammarError(
                f"no token continues the text of {self.num_generated - 1} tokens within the grammar",
                hint="Give a grammar whose texts the tokenizer can write.",
            )
        is_checked = matcher.is_byte_exact or self.finish_reason != "stop"
        if not is_checked and not matcher.accepts(self._stopping.text(self.token_ids)):
            raise GrammarError("the finished text is not one of the grammar", hint="Report this, with the grammar.")

    def new_text(self) -> str:
        """The text that has become certain since the last call: no part of a stop string, no half of a character.

        All pieces together, the last asked for after finishing, are the text of `completion`. A sequence that failed
        has no text any more.
        """
        if self.failure is not None:
            return ""
        return self._stopping.new_text(self.token_ids, is_finished=self.is_finished)

    def cancel(self) -> None:
        """Finish with what there is; nothing happens to a finished sequence."""
        if not self.is_finished:
            self.finish_reason = "cancelled"

    def fail(self, error: ExpertError) -> None:
        """Finish without an answer."""
        self.finish_reason = "error"
        self.failure = Failure(error.code, error.message)

    def completion(self) -> Completion:
        """The answer of a finished sequence."""
        if self.finish_reason is None:
            raise RuntimeError(f"request {self.request.id} is not finished")
        if self.failure is not None:
            return failed(self.request, self.failure, self.index)
        text = self._stopping.text(self.token_ids)
        return Completion(
            request_id=self.request.id,
            text=text,
            finish_reason=self.finish_reason,
            prompt_tokens=len(self.request.prompt_token_ids),
            completion_tokens=self.num_generated,
            index=self.index,
            token_ids=tuple(self.token_ids),
            logprobs=None if self.request.params.logprobs is None else tuple(self.logprobs),
            grammar_valid=self._is_grammatical(text),
        )

    def _is_grammatical(self, text: str) -> bool | None:
        if self.matcher is None or self.finish_reason == "stop":  # what stops of itself has been seen to
            return None if self.matcher is None else True
        try:
            return self.matcher.accepts(text)
        except GrammarError:
            return False  # to follow it took too long: it is not known to be one


def start(request: Request, rules: StopRules) -> list[Sequence]:
    """The sequences of a request, one for each of its `n` answers, without their grammar."""
    return [Sequence(request, rules.checker(request.params), index) for index in range(request.params.n)]


def failed(request: Request, failure: Failure, index: int = 0) -> Completion:
    """The completion of an answer that there is none of."""
    return Completion(
        request.id, "", "error", len(request.prompt_token_ids), completion_tokens=0, failure=failure, index=index
    )
