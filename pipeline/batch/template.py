"""`prompt_template`: a prompt made from a row's columns, `"Q: {question}"`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from pipeline.batch.jsonl_files import json_text
from pipeline.batch.part_values import json_value
from pipeline.errors import ConfigError, InvalidRequestError

_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_HINT = "Write the name of a column in braces, such as {question}; {{ and }} stand for braces."


@dataclass(frozen=True)
class PromptTemplate:
    """Text with the names of columns in braces.

    A name is taken as it stands: no attribute, index, conversion or format is looked for in it, so a template can
    reach nothing but the row. `{{` and `}}` stand for braces.

    Args:
        pieces: Text, and the column whose value follows it; None after the last text.
    """

    pieces: tuple[tuple[str, str | None], ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a template.

        Raises:
            ConfigError: A brace has no partner, a name is empty, or there is none at all.
        """
        pieces: list[tuple[str, str | None]] = []
        literal, end = "", 0
        for token in _TOKEN.finditer(text):
            literal += text[end : token.start()]
            end = token.end()
            if token[0] in ("{{", "}}"):
                literal += token[0][0]
            elif token[1]:
                pieces.append((literal, token[1]))
                literal = ""
            else:
                what = "names no column" if token[1] is not None else "has no partner"
                raise ConfigError(f"{token[0]} at character {token.start() + 1} {what}", hint=_HINT)
        if not pieces:
            raise ConfigError("no column is named, and every prompt would be the same", hint=_HINT)
        return cls((*pieces, (literal + text[end:], None)))

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns it names, each once, in order."""
        return tuple(dict.fromkeys(column for _, column in self.pieces if column is not None))

    def render(self, values: Mapping[str, Any]) -> str:
        """The prompt of a row. Text goes in as it is, any other value as JSON.

        Args:
            values: Column to value.

        Raises:
            InvalidRequestError: A column that is named is null.
        """
        return "".join(
            text if column is None else text + _text(column, values.get(column)) for text, column in self.pieces
        )


def _text(column: str, value: Any) -> str:
    if value is None:
        raise InvalidRequestError(
            f"column {column!r}, which the prompt is made of, is null",
            hint="Give the row a value, or leave the column out of prompt_template.",
        )
    plain = json_value(value)
    return plain if isinstance(plain, str) else json_text(plain)
