"""pydantic's validation errors, said as a person would: the key, what was expected, what was given, the nearest key."""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

KeyPath = tuple[str | int, ...]

_NEAREST_CUTOFF = 0.5
_SHOWN_CHARACTERS = 60
# The kinds of error that "expected ..., got ..." says in full; any other keeps pydantic's own message.
_WRONG_VALUE = frozenset(
    {
        "bool_type",
        "dict_type",
        "finite_number",
        "float_type",
        "greater_than",
        "greater_than_equal",
        "int_type",
        "less_than",
        "less_than_equal",
        "list_type",
        "literal_error",
        "model_type",
        "ray_quantity",
        "string_pattern_mismatch",
        "string_too_long",
        "string_too_short",
        "string_type",
        "string_unicode",
        "too_long",
        "too_short",
        "tuple_type",
    }
)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong in a configuration.

    Args:
        path: The keys and list positions that lead to it.
        message: What is wrong, and what was expected.
        at_key: The key itself is wrong, not its value.
    """

    path: KeyPath
    message: str
    at_key: bool = False

    @property
    def key(self) -> str:
        """The path as a person writes it: `sampling.stop[1]`."""
        return dotted(self.path)


def dotted(path: KeyPath) -> str:
    """A path as a person writes it: `sampling.stop[1]`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return printable(text)


def problems_of(error: ValidationError, model: type[BaseModel], given: Mapping[str, Any]) -> list[Problem]:
    """Say each of pydantic's errors in plain words.

    Args:
        error: What pydantic raised for `given`.
        model: The class that was validated; its schema tells what each key expects.
        given: The values as they were given.

    Returns:
        One problem for each place, in pydantic's order.
    """
    schema = model.model_json_schema()
    found: dict[KeyPath, Problem] = {}
    for item in error.errors(include_url=False):
        path = _path_in(given, item["loc"], is_missing=item["type"] == "missing")
        if path not in found:
            is_key = bool(item["loc"]) and item["loc"][-1] == "[key]"
            kind = "key" if is_key else item["type"]
            found[path] = Problem(
                path, _message(kind, item["msg"], path, schema, given), kind in {"key", "extra_forbidden"}
            )
    # A union reports each of its branches: the deepest place is the one that is wrong.
    above = {path[:length] for path in found for length in range(len(path))}
    return [problem for path, problem in found.items() if path not in above]


def nearest(name: str, names: Sequence[str]) -> str | None:
    """The name most like `name`, or None when none is near."""
    return next(iter(difflib.get_close_matches(name, names, n=1, cutoff=_NEAREST_CUTOFF)), None)


def shown(value: Any) -> str:
    """A given value in a message: short, printable, in the words of YAML."""
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return shortened(json.dumps(printable(value), ensure_ascii=False).replace("\\\\", "\\"))
    if isinstance(value, int):
        return str(value) if value.bit_length() <= 128 else f"a number of {value.bit_length()} bits"
    if isinstance(value, float):
        return str(value)
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}" if value else "an empty list"
    return f"a {type(value).__name__}"


def shortened(text: str) -> str:
    """The beginning of a long text."""
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def printable(text: str) -> str:
    """The text with whatever a terminal cannot show written as an escape."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _message(kind: str, message: str, path: KeyPath, schema: Mapping[str, Any], given: Any) -> str:
    if kind == "extra_forbidden":
        return _unknown(path, schema)
    if kind == "key":
        return "expected a key that is a string"
    expected = _expected(_node(schema, path), schema)
    if kind == "missing":
        return f"missing; expected {expected}"
    if kind not in _WRONG_VALUE:
        return message
    value = _value(given, path)
    text = f"expected {expected}, got {shown(value)}"
    is_scalar = isinstance(value, bool | int | float)
    return f"{text}; to mean a string, put it in quotes" if is_scalar and "string" in expected else text


def _unknown(path: KeyPath, schema: Mapping[str, Any]) -> str:
    name = str(path[-1])
    siblings = tuple(_keys(_node(schema, path[:-1]), schema))
    match = _elsewhere(name, schema)
    if match is None:
        inner = [key for node in _keys(schema, schema).values() for key in _keys(node, schema)]
        match = nearest(name, [*siblings, *inner])
        match = _elsewhere(match, schema) if match is not None and match not in siblings else match
    if match is not None:
        return f"unknown key; did you mean `{match}`?"
    return f"unknown key; expected one of {', '.join(siblings)}"


def _elsewhere(name: str, schema: Mapping[str, Any]) -> str | None:
    """The dotted key of another level that has exactly this name."""
    for key, node in _keys(schema, schema).items():
        if key == name:
            return key
        if name in _keys(node, schema):
            return f"{key}.{name}"
    return None


def _path_in(given: Any, location: tuple[str | int, ...], *, is_missing: bool) -> KeyPath:
    """Where an error is in what was given: pydantic also names the branches of a union."""
    path: list[str | int] = []
    value = given
    for part in location:
        is_item = isinstance(value, list | tuple) and isinstance(part, int) and part < len(value)
        if is_item or (isinstance(value, Mapping) and part in value):
            value = value[part]
            path.append(part)
    is_absent = is_missing and location[-1:] != tuple(path[-1:])  # a key that is there with nothing in it is not
    return (*path, location[-1]) if is_absent else tuple(path)


def _value(given: Any, path: KeyPath) -> Any:
    for part in path:
        given = given[part]
    return given


def _node(schema: Mapping[str, Any], path: KeyPath) -> Mapping[str, Any]:
    """The JSON schema at a path."""
    node = schema
    for part in path:
        for option in _options(node, schema):
            below = option.get("items") if isinstance(part, int) else _keys(option, schema).get(part)
            below = below if below is not None else _any_key(option)
            if isinstance(below, Mapping):
                node = below
                break
    return node


def _keys(node: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    return {key: value for option in _options(node, schema) for key, value in option.get("properties", {}).items()}


def _any_key(node: Mapping[str, Any]) -> Any:
    """The JSON schema of the values under keys that a person chooses, if any."""
    return next(iter(node.get("patternProperties", {}).values()), node.get("additionalProperties"))


def _options(node: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The branches of a JSON schema, references followed and null left out."""
    if "$ref" in node:
        node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    for option in node.get("anyOf", (node,)):
        if option is not node:
            yield from _options(option, schema)
        elif option.get("type") != "null":
            yield option


def _expected(node: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """What a JSON schema allows, in words."""
    if "expected" in node:
        return str(node["expected"])
    return _either([_expected_option(option) for option in _options(node, schema)])


def _expected_option(option: Mapping[str, Any]) -> str:
    if "expected" in option:
        return str(option["expected"])
    if "enum" in option:
        return _either([json.dumps(value) for value in option["enum"]])
    kind = option.get("type")
    if kind in {"integer", "number"}:
        return ("a whole number" if kind == "integer" else "a number") + _bounds(option)
    if kind == "boolean":
        return "true or false"
    if kind == "string":
        return "a non-empty string" if option.get("minLength") else "a string"
    if kind == "array":
        return _expected_list(option)
    keys = ", ".join(option.get("properties", ()))
    return f"a mapping with the keys {keys}" if keys else "a mapping"


def _expected_list(option: Mapping[str, Any]) -> str:
    items = "non-empty strings" if option.get("items", {}).get("minLength") else "strings"
    return f"a {'non-empty ' if option.get('minItems') else ''}list of {items}"


def _bounds(option: Mapping[str, Any]) -> str:
    low, above, high = option.get("minimum"), option.get("exclusiveMinimum"), option.get("maximum")
    if low is not None and high is not None:
        return f" from {low} to {high}"
    parts = [
        f"{words} {bound}"
        for words, bound in (("of at least", low), ("above", above), ("at most", high))
        if bound is not None
    ]
    return f" {' and '.join(parts)}" if parts else ""


def _either(names: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))
