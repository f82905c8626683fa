"""Field types for what the package's JSON files tell us to act on."""

import math
import re
from collections.abc import Set
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema
from pydantic_core import PydanticCustomError

from pipeline.errors import LoadError
from pipeline.package.json_text import JsonDocument, JsonPath
from pipeline.package.limits import ArchiveLimits
from pipeline.package.paths import safe_path

MAX_RANK = 1024
MAX_PROBLEMS = 50
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


class Part(BaseModel):
    """A piece of a file that is read strictly (`true` is no number) and never changes.

    Fields we do not know are no error here: real packages have them, and they are reported as warnings instead.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)


def as_tuple(value: Any) -> Any:
    """A JSON array as a tuple; anything else as it is, for the next check to refuse."""
    return tuple(value) if isinstance(value, list) else value


def _checksum(value: Any) -> Any:
    if value is None or value == "":
        return None
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise PydanticCustomError("sha256", "Input should be 64 hexadecimal digits, or empty when unknown")
    return value.lower()


def _zero_is_unknown(value: Any) -> Any:
    return None if value == 0 and not isinstance(value, bool) else value


def _number(value: Any) -> Any:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
        raise PydanticCustomError("number", "Input should be a number greater than 0")
    return value


def _inside_package(value: str) -> str:
    try:
        path = safe_path(value, ArchiveLimits())
    except ValueError as problem:
        raise PydanticCustomError(
            "path", "Input should be a path inside the package: {why}", {"why": str(problem)}
        ) from problem
    if not path:
        raise PydanticCustomError("path", "Input should name a file or directory inside the package")
    return path


def _printable(value: str) -> str:
    if not value.isprintable():
        raise PydanticCustomError("text", "Input should hold no control characters")
    return value


Text = Annotated[str, Field(min_length=1, max_length=1024), AfterValidator(_printable)]
Strings = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(as_tuple)]
Sha256 = Annotated[
    str | None,
    BeforeValidator(_checksum),
    WithJsonSchema({"anyOf": [{"type": "string", "pattern": "^([0-9a-fA-F]{64})?$"}, {"type": "null"}]}),
]
Size = Annotated[
    int | None,
    Field(ge=1),
    BeforeValidator(_zero_is_unknown),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "null"}]}),
]
PackagePath = Annotated[
    str, AfterValidator(_inside_package), WithJsonSchema({"type": "string", "pattern": r"^[^/\\].*$"})
]
Positive = Annotated[int | float, BeforeValidator(_number), WithJsonSchema({"type": "number", "exclusiveMinimum": 0})]
Rank = Annotated[int, Field(ge=1, le=MAX_RANK)]


def problems_of(problem: ValidationError) -> list[tuple[JsonPath, str]]:
    """The places and messages of a failed validation, in the words of JSON."""
    found = problem.errors(include_url=False, include_context=False)
    return [(item["loc"], re.sub("[Tt]uple", "array", item["msg"])) for item in found]


def refuse(
    document: JsonDocument,
    problems: list[tuple[JsonPath, str]],
    *,
    error: type[LoadError],
    message: str,
    hint: str,
) -> None:
    """Raise `error` with every problem of the document, in the order of the text; return when there is none."""
    placed = [(document.offset(path), path, text) for path, text in problems]
    placed += document.problems
    if not placed:
        return
    lines = [document.describe_offset(*item) for item in sorted(placed, key=lambda item: (item[0], str(item[1])))]
    if len(lines) > MAX_PROBLEMS:
        lines[MAX_PROBLEMS:] = [f"and {len(lines) - MAX_PROBLEMS} more"]
    raise error(message, hint=hint, details=lines)


def unknown_fields(document: JsonDocument, path: JsonPath, value: Any, known: Set[str]) -> list[str]:
    """A warning for each field of an object that is not `known`; names that begin with `_` are comments."""
    if not isinstance(value, dict):
        return []
    return [
        document.describe((*path, name), "unknown field, kept but not used", key=True)
        for name in value
        if name not in known and not name.startswith("_")
    ]
