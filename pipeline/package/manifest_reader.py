"""Read `manifest.json`, schema 1.0 and 2.0, into one shape.

Strict about what is acted on (name, version, base models, adapters, decoding, soft prompts, constraints); the rest may
be anything, is kept in `raw`, and is reported as a warning where it differs from the published schema.
"""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from pipeline.errors import ManifestError
from pipeline.package.fields import Strings, problems_of, refuse
from pipeline.package.json_text import JsonDocument, JsonPath, read_json
from pipeline.package.layout import original_path, schema_version, to_layout_2
from pipeline.package.manifest import ActedOn, Manifest, Routing
from pipeline.package.quirks import quirks

MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 4 << 20


@dataclass(frozen=True)
class ManifestFile:
    """A manifest, and its text: to name the line of a problem that shows only later."""

    manifest: Manifest
    document: JsonDocument

    def error(self, source: str, path: JsonPath, message: str) -> ManifestError:
        """An error at the place `path` of the manifest, in its 2.0 layout."""
        place = original_path(self.document, path)
        return _invalid(source, [self.document.describe(place, message)])


def read_manifest(data: bytes, *, source: str) -> ManifestFile:
    """Read and check a manifest.

    Args:
        data: The bytes of `manifest.json`.
        source: The package, as messages name it.

    Raises:
        ManifestError: It is not valid; `details` names every problem with its line and column.
    """
    document = read_json(data, name=f"{MANIFEST_NAME} in {source}", error=ManifestError, max_bytes=MAX_MANIFEST_BYTES)
    raw: dict[str, Any] = document.value
    schema, problems = schema_version(raw)
    if not isinstance(raw.get("training", {}), dict | None):
        problems.append((("training",), "Input should be an object"))
    strict: ActedOn | None = None
    try:
        strict = ActedOn.model_validate(to_layout_2(raw))
    except ValidationError as problem:
        told = {path for path, _ in problems} & {("base_model",), ("base_models",)}
        problems += [
            (original_path(document, path), message)
            for path, message in problems_of(problem)
            if not (told and path == ("base_models",))
        ]
    if problems or document.problems or strict is None:
        refuse(document, problems, error=ManifestError, message=_headline(source), hint=_HINT)
        raise _invalid(source, [])
    warnings = quirks(document, strict)
    texts = {name: _lenient(document, (name,), _TEXT, "", warnings) for name in ("description", "author", "license")}
    manifest = Manifest(
        name=strict.name,
        version=strict.version,
        schema_version=schema,
        capabilities=_lenient(document, ("capabilities",), _STRINGS, (), warnings),
        base_models=strict.base_models,
        soft_prompts=strict.soft_prompts,
        decoding=strict.decoding,
        routing=_routing(document, warnings),
        constraints=strict.constraints,
        raw=raw,
        warnings=tuple(warnings),
        **texts,
    )
    return ManifestFile(manifest, document)


_HINT = "Correct the places named above and pack the expert again."


def _headline(source: str) -> str:
    return f"{MANIFEST_NAME} in {source} is not valid"


def _invalid(source: str, details: list[str]) -> ManifestError:
    return ManifestError(_headline(source), hint=_HINT, details=details)


_TEXT: TypeAdapter[str] = TypeAdapter(Annotated[str, Field(strict=True)])
_STRINGS: TypeAdapter[tuple[str, ...]] = TypeAdapter(Strings)
_FLOAT: TypeAdapter[float] = TypeAdapter(Annotated[float, Field(strict=True)])
_ROUTING: dict[str, TypeAdapter[Any]] = {
    "keywords": _STRINGS,
    "exclude_keywords": _STRINGS,
    "router_hint": _TEXT,
    "priority": _FLOAT,
}


def _lenient(document: JsonDocument, path: JsonPath, kind: TypeAdapter[Any], default: Any, warnings: list[str]) -> Any:
    """The value of a field we only show; a warning and `default` where it has another type."""
    value: Any = document.value
    for part in path:
        if not isinstance(value, dict) or value.get(str(part)) is None:
            return default
        value = value[str(part)]
    try:
        return kind.validate_python(value)
    except ValidationError as problem:
        for inner, message in problems_of(problem):
            warnings.append(document.describe((*path, *inner), f"{message}; not used"))
        return default


def _routing(document: JsonDocument, warnings: list[str]) -> Routing:
    section = document.value.get("routing")
    if section is not None and not isinstance(section, dict):
        warnings.append(document.describe(("routing",), "Input should be an object; not used"))
    values = {
        name: _lenient(document, ("routing", name), kind, getattr(Routing(), name), warnings)
        for name, kind in _ROUTING.items()
    }
    return Routing(**values)
