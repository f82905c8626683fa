"""How a prompt becomes ChatML messages, and messages become tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

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


def encode_chat(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
    """Render messages with the tokenizer's chat template, ready for the answer, and tokenise them.

    Control tokens that stand in a message's content are encoded as the text they are, so that a prompt cannot open or
    close a turn.

    Raises:
        TokenizerError: The chat template cannot render these messages.
    """
    try:
        encoded = tokenizer.apply_chat_template(
            list(messages),
            add_generation_prompt=True,
            enable_thinking=False,
            sanitize_control_tokens=True,
            return_dict=False,
        )
    except Exception as error:  # a chat template is a foreign program: it may raise anything
        raise TokenizerError(
            "the chat template cannot render this conversation",
            details=(f"{type(error).__name__}: {error}",),
            hint="Check chat_template in tokenizer_config.json (or chat_template.jinja) of the package or base model.",
        ) from error
    return tuple(encoded)


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
