"""One JSON object from one line, strictly: nothing that another program would read differently."""

import json
import math
import re
from typing import Any, NoReturn

MAX_DEPTH = 64
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class InvalidRowError(ValueError):
    """A line is not one valid JSON object; the caller makes it the row's failure."""


def parse_object(text: bytes) -> dict[str, Any]:
    """The JSON object that a UTF-8 text holds.

    Raises:
        InvalidRowError: It is not JSON (RFC 8259), not an object, or has NaN or infinite numbers, one key twice,
            half a surrogate pair, or more than `MAX_DEPTH` levels.
    """
    try:
        value = _DECODER.decode(text.decode())
    except UnicodeDecodeError as error:
        raise InvalidRowError(f"not UTF-8: {error.reason} at byte {error.start} of the line") from error
    except json.JSONDecodeError as error:
        raise InvalidRowError(f"not JSON: {error.msg} at character {error.pos + 1} of the line") from error
    except RecursionError as error:
        raise InvalidRowError(f"nested more than {MAX_DEPTH} levels deep") from error
    except InvalidRowError:
        raise
    except ValueError as error:  # a whole number of thousands of digits
        raise InvalidRowError(str(error)) from error
    if not isinstance(value, dict):
        raise InvalidRowError(f"not a JSON object but {_NAMES.get(type(value), 'null')}")
    if not fits_depth(value):
        raise InvalidRowError(f"nested more than {MAX_DEPTH} levels deep")
    if _SURROGATE.search(text) and not is_utf8(json.dumps(value, ensure_ascii=False)):
        raise InvalidRowError("half a surrogate pair, which UTF-8 cannot hold")
    return value


def fits_depth(value: dict[str, Any]) -> bool:
    """Whether lists and objects are nested at most `MAX_DEPTH` levels deep."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        inner = (item for outer in level for item in (outer.values() if isinstance(outer, dict) else outer))
        level = [item for item in inner if isinstance(item, dict | list)]
        if not level:
            return True
    return False


def is_utf8(text: str) -> bool:
    """Whether a text can be written as UTF-8: it holds no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise InvalidRowError(f"the key {json.dumps(twice)} occurs twice")
    return values


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise InvalidRowError(f"the number {text[:40]} is too large")
    return number


def _refuse(name: str) -> NoReturn:
    raise InvalidRowError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite, parse_constant=_refuse)
_NAMES = {list: "an array", str: "a string", int: "a number", float: "a number", bool: "a truth value"}
