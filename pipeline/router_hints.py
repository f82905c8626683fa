"""The language of a manifest's `router_hint`: `database=sql OR (task=text2sql AND NOT "explain this")`.

    hint    = all, { "OR", all }
    all     = single, { "AND", single }
    single  = "NOT", single | "(", hint, ")" | word, [ ( "=" | "!=" ), word ]
    word    = a quoted text, or characters other than space, quotes, brackets, "=" and "!"

AND binds more tightly than OR; AND, OR and NOT may be written in any case. Source: the published expert format, which
gives examples only.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import ManifestError

MAX_CHARACTERS = 4096
MAX_DEPTH = 32
_TOKEN = re.compile(r"""\s*(?:(?P<mark>!=|[()=])|(?P<quoted>"[^"]*"|'[^']*')|(?P<word>[^\s()"'=!]+))""")
_OPERATORS = ("AND", "OR", "NOT")


class Hint:
    """A parsed hint."""

    def holds(self, text: str, facts: Mapping[str, str]) -> bool:
        """Whether it is true of a prompt.

        Args:
            text: The prompt.
            facts: What is known besides, by key.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Term(Hint):
    """`value`, `key=value` or `key!=value`.

    With a key that is known, it compares with what is known. Else it holds where the value stands in the prompt.
    """

    key: str | None
    value: str
    is_equal: bool = True

    def holds(self, text: str, facts: Mapping[str, str]) -> bool:
        """See `Hint.holds`."""
        known = {key.casefold(): value for key, value in facts.items()}
        if self.key is not None and self.key.casefold() in known:
            is_so = str(known[self.key.casefold()]).casefold() == self.value.casefold()
        else:
            is_so = phrase(self.value).search(text) is not None
        return is_so is self.is_equal


@dataclass(frozen=True)
class Not(Hint):
    """The opposite."""

    part: Hint

    def holds(self, text: str, facts: Mapping[str, str]) -> bool:
        """See `Hint.holds`."""
        return not self.part.holds(text, facts)


@dataclass(frozen=True)
class Several(Hint):
    """All of its parts, or any of them."""

    kind: Literal["AND", "OR"]
    parts: tuple[Hint, ...]

    def holds(self, text: str, facts: Mapping[str, str]) -> bool:
        """See `Hint.holds`."""
        held = (part.holds(text, facts) for part in self.parts)
        return all(held) if self.kind == "AND" else any(held)


def phrase(words: str) -> re.Pattern[str]:
    """Finds words as whole ones, in any case and with any space between them."""
    middle = r"\s+".join(re.escape(word) for word in words.split())
    return re.compile(rf"(?<!\w){middle}(?!\w)", re.IGNORECASE)


def parse_hint(text: str) -> Hint:
    """Read a hint.

    Raises:
        ManifestError: It is not one; the details give the place.
    """
    if len(text) > MAX_CHARACTERS:
        raise _wrong(MAX_CHARACTERS, f"it has {len(text):,} characters, more than {MAX_CHARACTERS:,}")
    parser = _Parser(text)
    hint = parser.several("OR", 0)
    parser.expect_end()
    return hint


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    at: int


class _Parser:
    """Recursive descent over the tokens of a hint."""

    def __init__(self, text: str) -> None:
        self._tokens: list[_Token] = []
        end = len(text.rstrip())
        at = 0
        while at < end:
            found = _TOKEN.match(text, at)
            if found is None:
                at += len(text[at:]) - len(text[at:].lstrip())
                raise _wrong(at, f"{text[at]!r} does not belong here")
            kind = str(found.lastgroup)
            said = found[kind]
            if kind == "word" and said.upper() in _OPERATORS:
                kind, said = "operator", said.upper()
            self._tokens.append(_Token(kind, said, found.start(str(found.lastgroup))))
            at = found.end()
        self._end = _Token("end", "the end", end)
        self._next = 0

    def several(self, kind: Literal["AND", "OR"], depth: int) -> Hint:
        """Parts joined by one operator; the parts of OR are joined by AND."""
        parts = [self._part(kind, depth)]
        while self._takes("operator", kind):
            parts.append(self._part(kind, depth))
        return parts[0] if len(parts) == 1 else Several(kind, tuple(parts))

    def expect_end(self) -> None:
        """See that nothing is left."""
        if self._token.kind != "end":
            raise _wrong(self._token.at, f"{self._token.text!r} does not belong here")

    @property
    def _token(self) -> _Token:
        return self._tokens[self._next] if self._next < len(self._tokens) else self._end

    def _part(self, kind: Literal["AND", "OR"], depth: int) -> Hint:
        return self.several("AND", depth) if kind == "OR" else self._single(depth)

    def _single(self, depth: int) -> Hint:
        if depth > MAX_DEPTH:
            raise _wrong(self._token.at, f"it is nested more than {MAX_DEPTH} deep")
        if self._takes("operator", "NOT"):
            return Not(self._single(depth + 1))
        if self._takes("mark", "("):
            hint = self.several("OR", depth + 1)
            if not self._takes("mark", ")"):
                raise _wrong(self._token.at, f"there is {self._token.text} where a ) should be")
            return hint
        first = self._word()
        for mark, is_equal in (("=", True), ("!=", False)):
            if self._takes("mark", mark):
                return Term(first, self._word(), is_equal)
        return Term(None, first)

    def _word(self) -> str:
        token = self._token
        said = token.text[1:-1] if token.kind == "quoted" else token.text
        if token.kind not in ("word", "quoted") or not said.strip():
            raise _wrong(token.at, f"there is {token.text} where a word should be")
        self._next += 1
        return said

    def _takes(self, kind: str, text: str) -> bool:
        is_there = self._token.kind == kind and self._token.text == text
        self._next += is_there
        return is_there


def _wrong(at: int, why: str) -> ManifestError:
    return ManifestError(
        "the router_hint is not one",
        details=[f"character {at + 1}: {why}"],
        hint='Write terms such as database=sql, joined by AND, OR, NOT and brackets; quote words with spaces: "so".',
    )
