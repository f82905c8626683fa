"""What a JSON schema must be for its answers to be held to it: small, shallow, and without what cannot be honoured."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.errors import GrammarError

MAX_DEPTH = 128
UNSUPPORTED = ("not", "if", "then", "else", "uniqueItems", "dependentRequired", "dependentSchemas", "dependencies")
MAPS = ("properties", "patternProperties", "$defs", "definitions")
LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
SINGLE = ("items", "additionalItems", "additionalProperties", "contains", "propertyNames", "unevaluatedItems")


def check_json_schema(text: str) -> None:
    """Refuse a schema that is not JSON, is too deep, or asks for what would be silently left out of the grammar.

    `oneOf` is read as `anyOf`, a pattern as one of the whole string, and an object has the properties of its schema
    alone, in their order, unless `additionalProperties` says otherwise.

    Raises:
        GrammarError: The message or the details name the keyword and its place.
    """
    try:
        schema = json.loads(text)
    except RecursionError as error:
        raise _too_deep() from error
    except ValueError as error:
        raise GrammarError("the JSON schema is not JSON", details=(str(error),), hint="Correct it there.") from error
    if not isinstance(schema, dict | bool):
        raise GrammarError("the JSON schema is not an object", hint='Give a schema such as {"type": "object"}.')
    if _depth(schema) > MAX_DEPTH:
        raise _too_deep()
    problems = list(_problems(schema, "#"))
    if problems:
        raise GrammarError(
            "the JSON schema asks for what no grammar here can hold an answer to",
            details=problems[:8],
            hint="Leave these keywords out, and check the answers for what they say.",
        )


def _problems(schema: Any, where: str) -> Iterator[str]:
    if not isinstance(schema, Mapping):
        return
    for keyword in UNSUPPORTED:
        if schema.get(keyword, False) is not False:
            yield f"{where}/{keyword}"
    all_of = schema.get("allOf")
    if isinstance(all_of, list) and len(all_of) > 1:
        yield f"{where}/allOf with more than one schema"
    for keyword in ("$ref", "$dynamicRef", "$recursiveRef"):
        target = schema.get(keyword)
        if target is not None and not (keyword == "$ref" and isinstance(target, str) and target.startswith("#")):
            yield f"{where}/{keyword} to another document"
    for keyword in MAPS:
        if isinstance(schema.get(keyword), Mapping):
            for name, part in schema[keyword].items():
                yield from _problems(part, f"{where}/{keyword}/{name}")
    for keyword in LISTS:
        if isinstance(schema.get(keyword), list):
            for at, part in enumerate(schema[keyword]):
                yield from _problems(part, f"{where}/{keyword}/{at}")
    for keyword in SINGLE:
        yield from _problems(schema.get(keyword), f"{where}/{keyword}")


def _depth(value: Any) -> int:
    depth, layer = 0, [value]
    while layer:
        depth += 1
        inner = [part.values() if isinstance(part, dict) else part for part in layer if isinstance(part, dict | list)]
        layer = [item for items in inner for item in items]
    return depth


def _too_deep() -> GrammarError:
    return GrammarError("the JSON schema is nested too deeply", hint=f"Give a schema of at most {MAX_DEPTH} levels.")
