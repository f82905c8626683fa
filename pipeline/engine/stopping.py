"""When a sequence ends, and what its text is then."""

from collections.abc import Sequence
from typing import Any, Literal

LOOK_BACK = 4  # extra tokens decoded before a stop string, for characters that span several tokens


class StopChecker:
    """Decides, token by token, whether a sequence is finished.

    Args:
        tokenizer: Decodes the tokens.
        eos_token_ids: Tokens that end a sequence; they are not part of its text.
        stop: Strings that end a sequence, also across token borders; they are cut from its text.
        max_tokens: The sequence ends with `length` after this many tokens.
    """

    def __init__(self, tokenizer: Any, eos_token_ids: frozenset[int], stop: tuple[str, ...], max_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._stop = stop
        self._max_tokens = max_tokens
        # A token holds at least one byte, so a stop string of n bytes lies within the last n tokens.
        self._window = LOOK_BACK + max((len(text.encode()) for text in stop), default=0)

    def check(self, token_ids: Sequence[int]) -> Literal["stop", "length"] | None:
        """Why the sequence is finished after its newest token, or None while it is not."""
        if token_ids[-1] in self._eos_token_ids:
            return "stop"
        if self._stop:
            tail = self._decode(token_ids[-self._window :])
            if any(text in tail for text in self._stop):
                return "stop"
        return "length" if len(token_ids) >= self._max_tokens else None

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of a finished sequence, without its end token or stop string."""
        if token_ids and token_ids[-1] in self._eos_token_ids:
            token_ids = token_ids[:-1]
        text = self._decode(token_ids)
        cuts = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        return text[: min(cuts)] if cuts else text

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(
            self._tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )
