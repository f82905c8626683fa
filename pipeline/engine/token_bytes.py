"""The text of single tokens, as bytes: a token may hold only a part of a character."""

from functools import lru_cache
from typing import Any


class TokenBytes:
    """Looks up what tokens stand for.

    Args:
        tokenizer: The Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added: dict[int, str] = {
            token_id: token.content for token_id, token in tokenizer.added_tokens_decoder.items()
        }
        self._special = frozenset(
            token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
        ) | frozenset(tokenizer.all_special_ids)
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        self._bytes_of = _byte_level() if type(decoder).__name__ == "ByteLevel" else None

    def is_special(self, token_id: int) -> bool:
        """Whether it is a control token, which has no text in an answer."""
        return token_id in self._special

    def __getitem__(self, token_id: int) -> bytes:
        """The bytes of a token; of an added token, its name; empty for an id beyond the vocabulary."""
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:
            return b""
        if self._bytes_of is not None:
            return bytes(self._bytes_of[char] for char in token)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return str(token).replace("\u2581", " ").encode()


@lru_cache(maxsize=1)
def _byte_level() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for.

    Printable ones stand for themselves, the others for 256 and up, in order. Source: the GPT-2 tokenizer.
    """
    own = [*range(ord("!"), ord("~") + 1), *range(ord("\xa1"), ord("\xac") + 1), *range(ord("\xae"), ord("\xff") + 1)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + at): byte for at, byte in enumerate(others)}
