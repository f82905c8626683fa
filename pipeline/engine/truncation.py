"""Cutting a prompt that is too long: tokens of its longest text, never of the chat template around it."""

from collections.abc import Mapping
from typing import Any

from pipeline.errors import PromptTooLongError

SIDES = ("left", "right")


def shorten(texts: Mapping[str, Any], tokenizer: Any, num_tokens: int, side: str) -> dict[str, Any]:
    """Cut tokens from the longest text of a prompt.

    Args:
        texts: `prompt` or `messages`, `schema` and `system`, as `build_messages` has accepted them.
        tokenizer: A fast one.
        num_tokens: How many to cut, at least 1. What is left may have a few more than that many less, where tokens at
            the cut join otherwise.
        side: `"left"` cuts the oldest tokens, `"right"` the newest.

    Returns:
        The same texts, one of them shorter.

    Raises:
        PromptTooLongError: The longest text has no more tokens than that.
    """
    places: dict[tuple[str, int], str] = {
        (name, 0): texts[name] for name in ("prompt", "schema", "system") if texts.get(name) is not None
    }
    for at, message in enumerate(texts.get("messages") or ()):
        places["messages", at] = message["content"]
    spans = {place: _token_spans(tokenizer, text) for place, text in places.items()}
    place = max(spans, key=lambda place: len(spans[place]))
    cut = _cut(places[place], spans[place], num_tokens, side)
    name, at = place
    if name != "messages":
        return {**texts, name: cut}
    messages = list(texts["messages"])
    messages[at] = {**messages[at], "content": cut}
    return {**texts, "messages": messages}


def _cut(text: str, spans: list[tuple[int, int]], num_tokens: int, side: str) -> str:
    if num_tokens < len(spans):
        cut = text[spans[num_tokens][0] :] if side == "left" else text[: spans[-num_tokens - 1][1]]
        # Some tokens are bytes of one character, and the character is on both sides of the cut.
        cut = cut if len(cut) < len(text) else (text[1:] if side == "left" else text[:-1])
        if cut.strip():
            return cut
    raise PromptTooLongError(
        f"the prompt has {num_tokens:,} tokens too many, and its longest text only {len(spans):,}",
        hint="Shorten the other texts, or lower max_tokens.",
    )


def _token_spans(tokenizer: Any, text: str) -> list[tuple[int, int]]:
    """Where each token of a text begins and ends, in characters."""
    # Control tokens in a text are encoded as the text they are; see `encode_chat`.
    encoded = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )
    return [(int(start), int(end)) for start, end in encoded["offset_mapping"]]
