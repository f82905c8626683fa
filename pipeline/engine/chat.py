"""How a prompt becomes ChatML messages, and messages become tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pipeline.engine.chat_template import ChatTemplate
from pipeline.errors import InvalidRequestError, TokenizerError

ROLES = ("system", "user", "assistant")
DIALECTS = {
    # capability in a manifest -> the dialect its expert was trained with
    "database:postgresql": "postgres",
    "database:sql": "postgres",
    "database:neo4j": "neo4j",
    "database:elasticsearch": "elasticsearch",
}


def schema_message(schema: str, dialect: str | None = None) -> str:
    """The system message that carries a schema, in the wording the experts were trained with.

    Args:
        schema: The schema as text, e.g. `CREATE TABLE` statements.
        dialect: The query dialect, e.g. `"postgres"`; its line is left out when None.

    Returns:
        `Dialect: <dialect>`, `Schema:` and the schema, a line each.

    Source: the published expert format.
    """
    head = f"Dialect: {dialect}\n" if dialect else ""
    return f"{head}Schema:\n{schema}"


def default_dialect(capabilities: Sequence[str]) -> str | None:
    """The dialect that goes with a schema when the caller names none, from the capabilities in a manifest."""
    return next((DIALECTS[name] for name in capabilities if name in DIALECTS), None)


def build_messages(
    *,
    prompt: Any = None,
    messages: Any = None,
    schema: Any = None,
    dialect: Any = None,
    system: Any = None,
) -> list[dict[str, str]]:
    """Check what a caller gave and turn it into a list of ChatML messages.

    Args:
        prompt: The user's question; give this or `messages`.
        messages: A conversation, `{"role": "system" | "user" | "assistant", "content": text}` each, the user's last.
        schema: Text put into the system message by `schema_message`.
        dialect: See `schema_message`; an empty one is none.
        system: A system message, put before the schema.

    Raises:
        InvalidRequestError: Something is missing, empty, not text, or given twice.
    """
    if (prompt is None) == (messages is None):
        what = "prompt is null" if prompt is None else "both prompt and messages are given"
        raise InvalidRequestError(what, hint="Give a prompt, or a list of messages, not both.")
    conversation = [{"role": "user", "content": _text("prompt", prompt)}] if messages is None else _messages(messages)
    heads = [] if system is None else [_text("system", system)]
    if schema is not None:
        heads.append(schema_message(_text("schema", schema), _text("dialect", dialect) if dialect else None))
    if not heads:
        return conversation
    if conversation[0]["role"] == "system":
        raise InvalidRequestError(
            "messages begin with a system message, and a schema or system is given as well",
            hint="Put the schema into the system message, or leave the system message out.",
        )
    return [{"role": "system", "content": "\n\n".join(heads)}, *conversation]


def encode_chat(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
) -> tuple[int, ...]:
    """Render messages with the tokenizer's chat template, ready for the answer, and tokenise them.

    Control tokens that stand in a message's content are encoded as the text they are, so that a prompt cannot open or
    close a turn.

    Raises:
        TokenizerError: The chat template cannot render these messages, or runs away with them.
    """
    return ChatTemplate(tokenizer).encode(messages, add_generation_prompt=add_generation_prompt)


@dataclass(frozen=True)
class _Head:
    """Everything before the last message, encoded alone; `text` is None where it may not be put before another text."""

    token_ids: tuple[int, ...]
    text: str | None


class ChatEncoder:
    """Encodes conversations as `encode_chat` does, and tells what they share with others.

    What stands before the last user message, a schema most of all, is tokenised once for all conversations that begin
    with it, where that provably gives the same tokens.

    Args:
        tokenizer: With a chat template.
        max_heads: How many such beginnings are kept.
    """

    def __init__(self, tokenizer: Any, max_heads: int = 64) -> None:
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer)
        self._added_tokens = tokenizer.added_tokens_decoder.values()
        # A byte-level tokenizer takes an added token out of the text first, and encodes each side of it by itself.
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        self._is_splittable = type(decoder).__name__ == "ByteLevel"
        self._borders = tuple(
            token.content
            for token in self._added_tokens
            if not (token.lstrip or token.rstrip or token.single_word or token.normalized)
            and not any(_overlaps(other.content, token.content) for other in self._added_tokens)
        )
        self._head = lru_cache(maxsize=max_heads)(self._encode_head)

    def encode(self, messages: Sequence[Mapping[str, str]]) -> tuple[tuple[int, ...], int]:
        """The tokens of a conversation, ready for the answer.

        Returns:
            The token ids, and how many of the first ones come from what stands before the last user message.

        Raises:
            TokenizerError: The chat template cannot render these messages, or runs away with them.
        """
        last = max(at for at, message in enumerate(messages) if message["role"] == "user")
        if last == 0:
            return self._template.encode(messages), 0
        head = self._head(tuple((message["role"], message["content"]) for message in messages[:last]))
        if head.text is not None and self._is_plain(messages[last:]):
            text = self._template.render(messages)
            tail = text[len(head.text) :]
            if text.startswith(head.text) and tail.startswith(self._borders):
                tail_ids = self._tokenizer.encode(tail, add_special_tokens=False)
                return (*head.token_ids, *tail_ids), len(head.token_ids)
        token_ids = self._template.encode(messages)
        differing = (at for at, pair in enumerate(zip(head.token_ids, token_ids, strict=False)) if pair[0] != pair[1])
        return token_ids, next(differing, min(len(head.token_ids), len(token_ids)))

    def _encode_head(self, contents: tuple[tuple[str, str], ...]) -> _Head:
        messages = [{"role": role, "content": content} for role, content in contents]
        try:
            token_ids = self._template.encode(messages, add_generation_prompt=False)
            text = None
            if self._is_splittable and self._is_plain(messages):
                text = self._template.render(messages, add_generation_prompt=False)
        except TokenizerError:
            return _Head((), None)  # a template may refuse a conversation without a user
        return _Head(token_ids, text)

    def _is_plain(self, messages: Sequence[Mapping[str, str]]) -> bool:
        """Whether no added token stands in a content, so that there is nothing to encode as text."""
        return not any(token.content in message["content"] for message in messages for token in self._added_tokens)


def _overlaps(first: str, second: str) -> bool:
    """Whether `second` can begin inside `first`: then it is not always found where it stands."""
    rests = (first[at:] for at in range(1, len(first)))
    return any(rest.startswith(second) or second.startswith(rest) for rest in rests)


def _messages(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or len(messages) == 0:
        raise InvalidRequestError(
            f"messages is {_kind(messages)}", hint='Give a list such as [{"role": "user", "content": "..."}].'
        )
    checked = []
    for position, message in enumerate(messages):
        where = f"messages[{position}]"
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise InvalidRequestError(
                f"{where} has no valid role", hint=f"Give each message a role ({', '.join(ROLES)}) and a content."
            )
        checked.append({"role": message["role"], "content": _text(f"{where}.content", message.get("content"))})
    if checked[-1]["role"] != "user":
        raise InvalidRequestError(
            "the last message is not the user's", hint="End the conversation with a user message."
        )
    return checked


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidRequestError(f"{name} is {_kind(value)}", hint=f"Give {name} as a string.")
    if not value.strip():
        raise InvalidRequestError(f"{name} is empty", hint=f"Give {name} as text that is not blank.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"{name} is not valid Unicode: a lone surrogate at character {error.start}",
            hint="Decode the source with the right encoding.",
        ) from error
    return value


def _kind(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__}, not text"
