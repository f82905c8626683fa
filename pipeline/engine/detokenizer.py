"""Token ids to text, a few at a time, never splitting a character."""

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\ufffd"  # what half a character decodes to


class TokenDecoder:
    """Decodes runs of tokens with one tokenizer; special tokens have no text.

    Args:
        tokenizer: The Hugging Face tokenizer.

    `needs_context` tells whether the text of a token depends on the tokens before it, as where a decoder strips the
    first space; with a byte-level tokenizer it does not.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # The wrapper around the Rust tokenizer takes ten times as long as the decoding itself.
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = getattr(self._backend, "decoder", None)
        self.needs_context = type(decoder).__name__ != "ByteLevel"

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of these tokens, half a character at either end as U+FFFD."""
        if self._backend is not None:
            return str(self._backend.decode(list(token_ids), skip_special_tokens=True))
        return str(
            self._tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )


class Detokenizer:
    """The text of one growing list of tokens.

    `certain` never changes but at its end; `pending` is what follows it by now: a character of which only some bytes
    are there. Together they are the text of all tokens fed.

    Args:
        decoder: The tokenizer's.
    """

    def __init__(self, decoder: TokenDecoder) -> None:
        self.certain = ""
        self.pending = ""
        self._decoder = decoder
        self._num_fed = 0
        self._context = 0  # the tokens from here to `_settled` are decoded again, for what they say of the next ones
        self._settled = 0  # the tokens before this one end with a whole character
        self._settled_text = 0  # the characters they make

    def feed(self, token_ids: Sequence[int]) -> None:
        """Take the tokens that were added since the last call.

        Args:
            token_ids: All tokens so far, not the new ones alone.
        """
        while self._num_fed < len(token_ids):
            # Where no context is needed, any number of tokens decodes as one by one.
            self._num_fed += 1 if self._decoder.needs_context else len(token_ids) - self._num_fed
            self._decode(token_ids[self._context : self._num_fed])

    def _decode(self, window: Sequence[int]) -> None:
        before = 0
        if self._context < self._settled:
            before = len(self._decoder.decode(window[: self._settled - self._context]))
        fresh = self._decoder.decode(window)[before:]
        whole = fresh.rstrip(REPLACEMENT)
        self.certain = self.certain[: self._settled_text] + whole
        self.pending = fresh[len(whole) :]
        if not self.pending:
            self._context = self._settled if self._decoder.needs_context else self._num_fed
            self._settled = self._num_fed
            self._settled_text = len(self.certain)
