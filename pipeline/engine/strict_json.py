"""One JSON object from bytes we do not trust, strictly: nothing that another program would read differently."""

import json
import math
import re
from collections import Counter
from typing import Any, NoReturn

MAX_DEPTH = 64
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class InvalidJsonError(ValueError):
    """The bytes are not one valid JSON object; the caller makes it an error of its own."""


def parse_object(text: bytes) -> dict[str, Any]:
    """The JSON object that a UTF-8 text holds.

    Raises:
        InvalidJsonError: It is not JSON (RFC 8259), not an object, or has NaN or infinite numbers, one key twice,
            half a surrogate pair, or more than `MAX_DEPTH` levels.
    """
    try:
        value = _DECODER.decode(text.decode())
    except UnicodeDecodeError as error:
        raise InvalidJsonError(f"not UTF-8: {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise InvalidJsonError(f"not JSON: {error.msg} at character {error.pos + 1}") from error
    except RecursionError as error:
        raise InvalidJsonError(f"nested more than {MAX_DEPTH} levels deep") from error
    except InvalidJsonError:
        raise
    except ValueError as error:  # a whole number of thousands of digits
        raise InvalidJsonError(str(error)) from error
    if not isinstance(value, dict):
        raise InvalidJsonError(f"not a JSON object but {_NAMES.get(type(value), 'null')}")
    if not fits_depth(value):
        raise InvalidJsonError(f"nested more than {MAX_DEPTH} levels deep")
    if _SURROGATE.search(text) and not is_utf8(json.dumps(value, ensure_ascii=False)):
        raise InvalidJsonError("half a surrogate pair, which UTF-8 cannot hold")
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
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise InvalidJsonError(f"the key {json.dumps(twice[:_SHOWN_CHARACTERS])} occurs twice")
    return values


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise InvalidJsonError(f"the number {text[:_SHOWN_CHARACTERS]} is too large")
    return number


def _refuse(name: str) -> NoReturn:
    raise InvalidJsonError(f"{name} is not JSON")


_SHOWN_CHARACTERS = 40
_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite, parse_constant=_refuse)
_NAMES = {list: "an array", str: "a string", int: "a number", float: "a number", bool: "a truth value"}
