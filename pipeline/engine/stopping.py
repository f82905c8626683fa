"""When a sequence ends, what its text is then, and what of it is certain before."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pipeline.engine.detokenizer import Detokenizer, TokenDecoder
from pipeline.engine.types import SamplingParams

if TYPE_CHECKING:
    from pipeline.engine.grammar_matcher import GrammarMatcher


class StopRules:
    """What ends a text with one tokenizer and model, whatever the request.

    Args:
        tokenizer: Decodes the tokens.
        eos_token_ids: The model's end tokens; the tokenizer's own is added.
    """

    def __init__(self, tokenizer: Any, eos_token_ids: frozenset[int]) -> None:
        own = frozenset() if tokenizer.eos_token_id is None else frozenset({int(tokenizer.eos_token_id)})
        self.eos_token_ids = eos_token_ids | own
        self.decoder = TokenDecoder(tokenizer)
        self._added_tokens: dict[str, int] = tokenizer.get_added_vocab()

    def stop_token_ids(self, params: SamplingParams) -> frozenset[int]:
        """The tokens that end a request's text besides the model's end tokens.

        A stop string that is a control token has no text to be found in; its token is among them.
        """
        control = (self._added_tokens[text] for text in params.stop if text in self._added_tokens)
        return frozenset((*params.stop_token_ids, *control))

    def checker(self, params: SamplingParams) -> "StopChecker":
        """A checker for one sequence that is answered with these parameters."""
        return StopChecker(self, params)


class StopChecker:
    """Decides, token by token, whether one sequence is finished, and keeps its text.

    Nothing ends a text before `min_tokens` tokens but its grammar, where that allows nothing else. A text held to a
    grammar ends only where the grammar is complete: elsewhere a stop string or a stop token is a part of it like any
    other. Stop strings are found across token borders.

    Args:
        rules: The engine's.
        params: The request's.
    """

    def __init__(self, rules: StopRules, params: SamplingParams) -> None:
        self._params = params
        self._eos_token_ids = rules.eos_token_ids
        self._stop_token_ids = rules.stop_token_ids(params)
        self._detokenizer = Detokenizer(rules.decoder)
        self._length: int | None = None  # of the finished text in characters
        self._num_streamed = 0

    @property
    def end_token_ids(self) -> frozenset[int]:
        """The tokens that end a text without a grammar."""
        return self._stop_token_ids if self._params.ignore_eos else self._stop_token_ids | self._eos_token_ids

    def check(
        self, token_ids: Sequence[int], matcher: "GrammarMatcher | None" = None
    ) -> Literal["stop", "length"] | None:
        """Why the sequence is finished after its newest token, or None while it is not.

        Args:
            token_ids: All generated tokens.
            matcher: Where the text stood in its grammar before the newest token.
        """
        if self._ends(token_ids[-1], len(token_ids), matcher):
            self._finish(token_ids[:-1])
            return "stop"
        if self._params.stop:
            searched = len(self._detokenizer.certain)
            self._detokenizer.feed(token_ids)
            cut = self._cut(searched, matcher) if len(token_ids) >= self._params.min_tokens else None
            if cut is not None:
                self._length = cut
                return "stop"
        if len(token_ids) >= self._params.max_tokens:
            self._finish(token_ids)
            return "length"
        return None

    def text(self, token_ids: Sequence[int]) -> str:
        """The text, without its end token or stop string; of an unfinished sequence, all there is."""
        if self._length is None:
            self._detokenizer.feed(token_ids)
        return (self._detokenizer.certain + self._detokenizer.pending)[: self._length]

    def new_text(self, token_ids: Sequence[int], *, is_finished: bool) -> str:
        """The text that has become certain since the last call: no part of a stop string, no half of a character.

        All pieces together, the last asked for when the sequence is finished, are `text`.
        """
        if is_finished:
            text = self.text(token_ids)
            end = len(text)
        else:
            self._detokenizer.feed(token_ids)
            text = self._detokenizer.certain
            end = len(text) - self._num_held(text)
        piece = text[self._num_streamed : end]
        self._num_streamed = max(self._num_streamed, end)
        return piece

    def _ends(self, token_id: int, num_tokens: int, matcher: "GrammarMatcher | None") -> bool:
        if matcher is not None:
            is_stop = token_id in self._stop_token_ids and num_tokens > self._params.min_tokens
            return (is_stop or token_id in self._eos_token_ids) and matcher.is_complete
        return token_id in self.end_token_ids and num_tokens > self._params.min_tokens

    def _cut(self, searched: int, matcher: "GrammarMatcher | None") -> int | None:
        """Where the text ends before a stop string that goes beyond the first `searched` characters."""
        text = self._detokenizer.certain
        if matcher is None:
            found = (text.find(stop, max(0, searched - len(stop) + 1)) for stop in self._params.stop)
            return min((at for at in found if at >= 0), default=None)
        for at in _occurrences(text, self._params.stop, searched):
            if matcher.accepts(text[:at]):
                return at
        return None

    def _finish(self, token_ids: Sequence[int]) -> None:
        self._detokenizer.feed(token_ids)
        self._length = len(self._detokenizer.certain) + len(self._detokenizer.pending)

    def _num_held(self, text: str) -> int:
        """How many characters at the end of the text may turn out to begin a stop string."""
        longest = max((len(stop) for stop in self._params.stop), default=0)
        for count in range(min(longest - 1, len(text)), 0, -1):
            tail = text[-count:]
            if any(stop.startswith(tail) and len(stop) > count for stop in self._params.stop):
                return count
        return 0


def _occurrences(text: str, stop: Sequence[str], searched: int) -> list[int]:
    """Where the stop strings begin that go beyond the first `searched` characters, in order."""
    starts = set()
    for item in stop:
        at = text.find(item, max(0, searched - len(item) + 1))
        while at >= 0:
            starts.add(at)
            at = text.find(item, at + 1)
    return sorted(starts)
