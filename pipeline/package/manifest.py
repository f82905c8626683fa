"""What a manifest says, in one shape for schema 1.0 and 2.0."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from pipeline.package.fields import (
    PackagePath,
    Part,
    Positive,
    Rank,
    Sha256,
    Size,
    Strings,
    Text,
    as_tuple,
)
from pipeline.package.version_ranges import parse_pattern

MAX_STOP_SEQUENCES = 64
_NAME = re.compile(r"expert-[a-z0-9-]+")
_VERSION = re.compile(r"[0-9]+\.[0-9]+\.[0-9]+(?:-[0-9A-Za-z.-]+)?(?:\+[0-9A-Za-z.-]+)?")

AdapterType = Literal["lora", "dora", "ia3", "lokr", "adalora"]


def is_name(text: str) -> bool:
    """Whether a text is of the form that names of experts have: `expert-...`."""
    return _NAME.fullmatch(text) is not None


def is_version(text: str) -> bool:
    """Whether a text is a semantic version, such as `0.3.0`."""
    return _VERSION.fullmatch(text) is not None


def _expert_name(value: str) -> str:
    if not is_name(value):
        raise PydanticCustomError("name", "Input should match expert-[a-z0-9-]+")
    return value


def _semantic_version(value: str) -> str:
    if not is_version(value):
        raise PydanticCustomError("version", "Input should be a semantic version such as 0.3.0")
    return value


def _none_is_empty(value: Any) -> Any:
    return () if value is None else as_tuple(value)


class AdapterSpec(Part):
    """What the manifest says of one adapter. None means unknown: published packages leave checksums empty, sizes 0."""

    type: AdapterType
    path: PackagePath | None = None
    r: Rank | None = None
    alpha: Positive | None = None
    target_modules: Strings = ()
    size_bytes: Size = None
    sha256: Sha256 = None


class BaseModelSpec(Part):
    """A base model the expert was trained over, and its adapters. The name is a hint, not a path."""

    name: Text
    sha256: Sha256 = None
    prompt_template: str | None = None
    adapters: Annotated[tuple[AdapterSpec, ...], BeforeValidator(as_tuple), Field(min_length=1)]

    @property
    def short_name(self) -> str:
        """The last part of the name, whether it is a path of Windows, of another system, or an `org/name` id."""
        parts = [part for part in re.split(r"[/\\]", self.name) if part]
        return parts[-1] if parts else self.name


class SoftPrompt(Part):
    """A learned prompt: a `[tokens, hidden_size]` matrix set before the input embeddings."""

    name: Text
    path: PackagePath
    tokens: Annotated[int, Field(ge=1, le=4096)]
    init_method: str | None = None
    init_text: str | None = None
    purpose: str | None = None


class Decoding(Part):
    """The expert's own defaults for every call, from `training.decoding`; None where it says nothing."""

    temperature: Annotated[float | None, Field(ge=0, le=100)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=0)] = None
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    max_new_tokens: Annotated[int | None, Field(ge=1)] = None
    stop_sequences: Annotated[Strings, BeforeValidator(_none_is_empty), Field(max_length=MAX_STOP_SEQUENCES)] = ()
    use_grammar: bool = False
    grammar_type: str | None = None
    grammar_file: PackagePath | None = None
    validation: str | None = None


def _pattern_text(value: str) -> str:
    try:
        parse_pattern(value)
    except ValueError as problem:
        raise PydanticCustomError("range", "{why}", {"why": str(problem)}) from problem
    return value


Patterns = Annotated[
    tuple[Annotated[str, Field(max_length=200), AfterValidator(_pattern_text)], ...], BeforeValidator(_none_is_empty)
]


class Constraints(Part):
    """Which experts go together: patterns of the form `name@<range>`."""

    max_chain: Annotated[int | None, Field(ge=1)] = None
    load_order: Annotated[int | None, Field(ge=0)] = None
    incompatible_with: Patterns = ()
    requires: Patterns = ()


class Routing(Part):
    """Hints for choosing an expert by prompt."""

    keywords: Strings = ()
    exclude_keywords: Strings = ()
    router_hint: str | None = None
    priority: float | None = None


class ActedOn(Part):
    """The part of a manifest that is acted on, in the layout of schema 2.0."""

    name: Annotated[
        str,
        Field(max_length=128),
        AfterValidator(_expert_name),
        WithJsonSchema({"type": "string", "maxLength": 128, "pattern": f"^{_NAME.pattern}$"}),
    ]
    version: Annotated[
        str,
        Field(max_length=64),
        AfterValidator(_semantic_version),
        WithJsonSchema({"type": "string", "maxLength": 64, "pattern": f"^{_VERSION.pattern}$"}),
    ]
    base_models: Annotated[tuple[BaseModelSpec, ...], BeforeValidator(as_tuple), Field(min_length=1)]
    soft_prompts: Annotated[tuple[SoftPrompt, ...], BeforeValidator(_none_is_empty)] = ()
    decoding: Decoding = Decoding()
    constraints: Constraints = Constraints()


@dataclass(frozen=True)
class Manifest:
    """A manifest in one shape, whichever schema it was written in.

    Args:
        schema_version: `"1.0"` (one base model) or `"2.0"` (one or several).
        raw: The manifest as it was written, every field; not to be changed.
        warnings: Where it differs from the published schema, each with its line and column.
    """

    name: str
    version: str
    schema_version: str
    description: str
    author: str
    license: str
    capabilities: tuple[str, ...]
    base_models: tuple[BaseModelSpec, ...]
    soft_prompts: tuple[SoftPrompt, ...]
    decoding: Decoding
    routing: Routing
    constraints: Constraints
    raw: Mapping[str, Any]
    warnings: tuple[str, ...]
