"""Read JSON from a file we do not trust, and remember where every value stands."""

import json
import math
import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from pipeline.errors import LoadError

MAX_DEPTH = 64
MAX_INTEGER_BITS = 64
_SPACE = re.compile(r"[ \t\n\r]*")
_STRING = re.compile(r'"[^"\\\x00-\x1f]*(?:\\.[^"\\\x00-\x1f]*)*"')
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_WORD = re.compile(r"[+-]?[A-Za-z_]+")
_LITERALS = {"true": True, "false": False, "null": None}
_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")

JsonPath = tuple[str | int, ...]


@dataclass(frozen=True)
class JsonDocument:
    """A JSON value and the place of every part of it.

    Args:
        value: The value, as `json.loads` gives it.
        text: The text it was read from.
        places: Offset into `text` of each value, by its path: `("base_models", 0, "name")`.
        keys: Offset of each key.
        problems: What is wrong with the text although its shape is right: (offset, path, message).
    """

    value: Any
    text: str
    places: Mapping[JsonPath, int]
    keys: Mapping[JsonPath, int]
    problems: tuple[tuple[int, JsonPath, str], ...]
    _lines: tuple[int, ...] = field(repr=False)

    def offset(self, path: JsonPath, *, key: bool = False) -> int:
        """Where the value or key at `path` begins; for a missing one, where the nearest value around it begins."""
        if key and path in self.keys:
            return self.keys[path]
        while path and path not in self.places:
            path = path[:-1]
        return self.places[path]

    def describe(self, path: JsonPath, message: str, *, key: bool = False) -> str:
        """One line for `details` or a warning: `line 12, column 5  base_models: Field required`."""
        return self.describe_offset(self.offset(path, key=key), path, message)

    def describe_offset(self, offset: int, path: JsonPath, message: str) -> str:
        """The same, for a place that is known."""
        return f"{_position(self._lines, offset)}  {dotted(path)}: {message}"


def dotted(path: JsonPath) -> str:
    """A path as people write it: `base_models[0].name`."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return "".join(parts).removeprefix(".") or "the document"


def read_json(data: bytes, *, name: str, error: type[LoadError], max_bytes: int) -> JsonDocument:
    """Parse one JSON object.

    Args:
        data: The bytes of the file.
        name: What to call it in messages, e.g. `"manifest.json in expert-sql.expert"`.
        error: The error to raise.
        max_bytes: The longest text that is read.

    Returns:
        The document. Repeated keys, numbers beyond 64 bits, NaN and lone surrogates are listed in its `problems`.

    Raises:
        LoadError: As `error`: the text is not JSON, not UTF-8, not an object, too long or nested too deep.
    """

    def refuse(message: str) -> NoReturn:
        raise error(f"{name} is not valid JSON", hint="Save it as plain JSON in UTF-8.", details=[message])

    if len(data) > max_bytes:
        refuse(f"It has {len(data):,} bytes; at most {max_bytes:,} are read.")
    if data.startswith(_MARKS) or b"\0" in data[:4]:
        refuse("line 1, column 1  It begins with a byte order mark, or is UTF-16; it must be UTF-8 without a mark.")
    try:
        text = data.decode()
    except UnicodeDecodeError as problem:
        before = data[: problem.start].decode()
        lines = _line_starts(before)
        refuse(f"{_position(lines, len(before))}  It is not UTF-8.")
    reader = _Reader(text)
    try:
        value = reader.document()
    except _SyntaxError as problem:
        refuse(f"{_position(reader.lines, problem.offset)}  {problem}")
    if not isinstance(value, dict):
        refuse("line 1, column 1  It is not an object ({...}).")
    return JsonDocument(value, text, reader.places, reader.keys, tuple(reader.problems), reader.lines)


class _SyntaxError(Exception):
    def __init__(self, offset: int, message: str) -> None:
        super().__init__(message)
        self.offset = offset


class _Reader:
    """A recursive-descent reader; `MAX_DEPTH` bounds its recursion."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.lines = _line_starts(text)
        self.places: dict[JsonPath, int] = {}
        self.keys: dict[JsonPath, int] = {}
        self.problems: list[tuple[int, JsonPath, str]] = []

    def document(self) -> Any:
        self._space()
        value = self._value(())
        self._space()
        if self.at != len(self.text):
            self._fail("Something follows the end of the document.")
        return value

    def _value(self, path: JsonPath) -> Any:
        if len(path) > MAX_DEPTH:
            self._fail(f"It is nested deeper than {MAX_DEPTH} levels.")
        self.places[path] = self.at
        match self.text[self.at : self.at + 1]:
            case "{":
                return self._object(path)
            case "[":
                return self._array(path)
            case '"':
                return self._string(path)
            case "":
                self._fail("The text ends too early.")
        return self._scalar(path)

    def _object(self, path: JsonPath) -> dict[str, Any]:
        found: dict[str, Any] = {}
        self.at += 1
        if self._take("}"):
            return found
        while True:
            self._space()
            start = self.at
            if self.text[start : start + 1] != '"':
                self._fail("A key in double quotes is expected here.")
            key = self._string(path)
            if key in found:
                self.problems.append((start, (*path, key), "This key occurs twice."))
            self.keys[(*path, key)] = start
            self._expect(":")
            self._space()
            found[key] = self._value((*path, key))
            if self._take("}"):
                return found
            self._expect(",")

    def _array(self, path: JsonPath) -> list[Any]:
        found: list[Any] = []
        self.at += 1
        if self._take("]"):
            return found
        while True:
            self._space()
            found.append(self._value((*path, len(found))))
            if self._take("]"):
                return found
            self._expect(",")

    def _string(self, path: JsonPath) -> str:
        start, match = self.at, _STRING.match(self.text, self.at)
        if match is None:
            self._fail("This string does not end, or holds a control character.")
        try:
            value = str(json.loads(match.group()))
        except json.JSONDecodeError as problem:
            raise _SyntaxError(start + problem.pos, "This escape is not valid.") from problem
        self.at = match.end()
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            self.problems.append((start, path, "This string holds half of a surrogate pair."))
        return value

    def _scalar(self, path: JsonPath) -> Any:
        start = self.at
        if word := _WORD.match(self.text, start):
            self.at = word.end()
            if word.group() in _LITERALS:
                return _LITERALS[word.group()]
            if word.group().lstrip("+-") in {"NaN", "Infinity"}:
                self.problems.append((start, path, f"{word.group()} is not a JSON number."))
                return 0
            self.at = start
        number = _NUMBER.match(self.text, start)
        if number is None:
            self._fail("A value is expected here.")
        self.at = number.end()
        return self._number(number.group(), start, path)

    def _number(self, token: str, start: int, path: JsonPath) -> int | float:
        value: int | float = math.inf
        if len(token) <= 400:  # long enough for every double; `int` refuses more than 4,300 digits
            value = int(token) if token.lstrip("-").isdigit() else float(token)
        if not math.isfinite(value) or (isinstance(value, int) and value.bit_length() > MAX_INTEGER_BITS):
            self.problems.append((start, path, "This number does not fit 64 bits."))
            return 0
        return value

    def _space(self) -> None:
        match = _SPACE.match(self.text, self.at)
        self.at = match.end() if match else self.at

    def _take(self, letter: str) -> bool:
        self._space()
        if self.text.startswith(letter, self.at):
            self.at += 1
            return True
        return False

    def _expect(self, letter: str) -> None:
        if not self._take(letter):
            self._fail(f"'{letter}' is expected here.")

    def _fail(self, message: str) -> NoReturn:
        raise _SyntaxError(self.at, message)


def _line_starts(text: str) -> tuple[int, ...]:
    return (0, *(match.end() for match in re.finditer("\n", text)))


def _position(lines: tuple[int, ...], offset: int) -> str:
    line = bisect_right(lines, offset)
    return f"line {line}, column {offset - lines[line - 1] + 1}"
