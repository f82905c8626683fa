"""Find an adapter in a package and read its `adapter_config.json` by an allow-list of fields.

PEFT imports modules that some fields of this file name. So the file never reaches PEFT: what is read here is built into
a PEFT config with `AdapterConfig.to_peft_kwargs`, and nothing else is.

Source: the config classes of PEFT 0.21.2.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_core import PydanticCustomError

from pipeline.errors import AdapterError
from pipeline.package.fields import Part, Positive, Rank, Strings, as_tuple, problems_of, refuse
from pipeline.package.json_text import JsonDocument, JsonPath, read_json
from pipeline.package.manifest import AdapterSpec
from pipeline.package.patterns import runs_away

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAMES = ("adapter_model.safetensors", "adapter.safetensors")
PICKLE_NAMES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
MAX_CONFIG_BYTES = 1 << 20
MAX_PATTERN = 1000

PeftType = Literal["LORA", "IA3", "LOKR", "ADALORA"]
AdapterKind = Literal["lora", "dora", "ia3", "lokr", "adalora"]


def _pattern(value: Any) -> Any:
    """Module names as a list, or one regular expression over their full names."""
    if not isinstance(value, str):
        return as_tuple(value)
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError) as problem:
        raise PydanticCustomError("pattern", "Input is not a regular expression") from problem
    if runs_away(value, is_strict=True):
        raise PydanticCustomError("pattern", "Input is a regular expression that could take time without end")
    if not value or len(value) > MAX_PATTERN:
        raise PydanticCustomError("pattern", "Input should have 1 to {most} characters", {"most": MAX_PATTERN})
    return value


def _patterns(value: dict[str, Any]) -> dict[str, Any]:
    for key in value:
        _pattern(key)
    return value


def _null_is_empty(value: Any) -> Any:
    return {} if value is None else value


def _one_is_list(value: Any) -> Any:
    return (value,) if isinstance(value, str | int) and not isinstance(value, bool) else as_tuple(value)


Modules = Annotated[Annotated[str, Field(max_length=MAX_PATTERN)] | Strings, BeforeValidator(_pattern)]
Ranks = Annotated[
    dict[str, Rank | Annotated[tuple[bool, ...], BeforeValidator(as_tuple)]],
    BeforeValidator(_null_is_empty),
    AfterValidator(_patterns),
]
Alphas = Annotated[dict[str, Positive], BeforeValidator(_null_is_empty), AfterValidator(_patterns)]
LayerNames = Annotated[
    tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]+$", max_length=200)], ...], BeforeValidator(_one_is_list)
]
Layers = Annotated[tuple[Annotated[int, Field(ge=0, le=10_000)], ...], BeforeValidator(_one_is_list)]


class AdapterConfig(Part):
    """The fields of `adapter_config.json` that decide how an adapter computes; names as in PEFT.

    Fields of another type than `peft_type` keep their default.
    """

    peft_type: PeftType
    target_modules: Modules | None = None
    exclude_modules: Modules | None = None
    modules_to_save: Strings | None = None
    fan_in_fan_out: bool = False
    r: Rank = 8
    lora_alpha: Positive = 8
    use_dora: bool = False
    use_rslora: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: bool = False
    rank_pattern: Ranks = Field(default_factory=dict)
    alpha_pattern: Alphas = Field(default_factory=dict)
    layers_to_transform: Layers | None = None
    layers_pattern: LayerNames | None = None
    feedforward_modules: Modules | None = None
    alpha: Positive = 8
    decompose_both: bool = False
    decompose_factor: Annotated[int, Field(ge=-1, le=1 << 20)] = -1
    use_effective_conv2d: bool = False
    target_r: Rank = 8
    init_r: Rank = 12
    tinit: Annotated[int, Field(ge=0)] = 0
    tfinal: Annotated[int, Field(ge=0)] = 0
    deltaT: Annotated[int, Field(ge=1)] = 1  # noqa: N815  # PEFT's name
    beta1: Annotated[float, Field(ge=0, le=1)] = 0.85
    beta2: Annotated[float, Field(ge=0, le=1)] = 0.85
    orth_reg_weight: Annotated[float, Field(ge=0)] = 0.5
    total_step: Annotated[int | None, Field(ge=1)] = None

    @property
    def kind(self) -> AdapterKind:
        """The method, as a manifest names it."""
        if self.peft_type == "LORA":
            return "dora" if self.use_dora else "lora"
        return _KINDS[self.peft_type]

    def to_peft_kwargs(self) -> dict[str, Any]:
        """Arguments for PEFT's own config class: `LoraConfig(**config.to_peft_kwargs())`, by `peft_type`.

        Returns:
            Only fields of the allow-list, as plain lists and dicts, with dropout left at its default of 0.
        """
        names = _FIELDS[self.peft_type] - ({"r"} if self.peft_type == "ADALORA" else set())
        chosen = {name: getattr(self, name) for name in sorted(names)}
        return {name: _plain(value) for name, value in chosen.items()}


_KINDS: dict[str, AdapterKind] = {"IA3": "ia3", "LOKR": "lokr", "ADALORA": "adalora"}
_COMMON = frozenset({"target_modules", "exclude_modules", "modules_to_save"})
_LAYERED = _COMMON | {"r", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern"}
_LORA = _LAYERED | {"fan_in_fan_out", "lora_alpha", "use_dora", "use_rslora", "bias", "lora_bias"}
_SCHEDULE = {"target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"}
_FIELDS: dict[str, frozenset[str]] = {
    "LORA": _LORA,
    "IA3": _COMMON | {"fan_in_fan_out", "feedforward_modules"},
    "LOKR": _LAYERED | {"alpha", "decompose_both", "decompose_factor", "use_effective_conv2d"},
    "ADALORA": _LORA | _SCHEDULE,
}
# No meaning for an answer: about training, or a note of where the adapter came from.
_IGNORED = {
    "peft_type", "task_type", "base_model_name_or_path", "peft_version", "inference_mode", "revision",
    "lora_dropout", "rank_dropout", "module_dropout", "rank_dropout_scale",
    "init_lora_weights", "init_ia3_weights", "init_weights", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "velora_config", "runtime_config", "qalora_group_size", "auto_mapping", "megatron_core",
}  # fmt: skip
# They name code to import or run.
_CODE = ("megatron_config", "auto_map", "trust_remote_code", "code_revision", "custom_modules")
# They change what the adapter computes in ways that are not implemented.
_UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
)


def read_adapter_config(data: bytes, *, source: str) -> tuple[AdapterConfig, tuple[str, ...]]:
    """Read an `adapter_config.json`.

    Returns:
        The config, and a warning for each field that is set but not used.

    Raises:
        AdapterError: It is not valid, of a method we do not know, names code to import, or asks for a variant that is
            not implemented; `details` gives line and column.
    """
    name = f"{CONFIG_NAME} in {source}"
    document = read_json(data, name=name, error=AdapterError, max_bytes=MAX_CONFIG_BYTES)
    raw: dict[str, Any] = document.value
    problems: list[tuple[JsonPath, str]]
    problems = [((field,), "names code to import, which is never done") for field in _CODE if _is_set(raw.get(field))]
    problems += [((field,), "is not supported") for field in _UNSUPPORTED if _is_set(raw.get(field))]
    if raw.get("megatron_core") not in (None, "megatron.core"):  # the default of PEFT, which every LoRA file carries
        problems.append((("megatron_core",), "names code to import, which is never done"))
    if not _harmless_auto_mapping(raw.get("auto_mapping")):
        problems.append((("auto_mapping",), "names code to import, which is never done"))
    peft_type = raw.get("peft_type")
    fields = _FIELDS.get(peft_type, frozenset()) if isinstance(peft_type, str) else frozenset()
    config: AdapterConfig | None = None
    try:
        allowed = {field: raw[field] for field in fields | {"peft_type"} if raw.get(field) is not None}
        config = AdapterConfig.model_validate(allowed)
    except ValidationError as problem:
        problems += [(path[:1], message) for path, message in problems_of(problem)]
    if config is not None and any(
        isinstance(rank, int) == (peft_type == "ADALORA") for rank in config.rank_pattern.values()
    ):
        wanted = "arrays of true and false" if peft_type == "ADALORA" else "whole numbers"
        problems.append((("rank_pattern",), f"Input should hold {wanted}"))
    hint = "Save the adapter again with PEFT, without these fields, and pack it."
    refuse(document, list(dict.fromkeys(problems)), error=AdapterError, message=f"{name} cannot be used", hint=hint)
    if config is None:
        raise AdapterError(f"{name} cannot be used", hint=hint)
    return config, tuple(_config_warnings(document, raw, fields))


def _is_set(value: Any) -> bool:
    return value is not None and value is not False and value != [] and value != {} and value != ""


def _harmless_auto_mapping(value: Any) -> bool:
    """Whether it only notes the transformers class that was trained, as PEFT and Unsloth write it; we never read it."""
    if not _is_set(value):
        return True
    if not isinstance(value, dict) or not value.keys() <= {"base_model_class", "parent_library", "unsloth_fixed"}:
        return False
    library, model = value.get("parent_library"), value.get("base_model_class")
    return (
        isinstance(library, str)
        and isinstance(model, str)
        and re.fullmatch(r"transformers(\.[A-Za-z_][A-Za-z0-9_]*)*", library) is not None
        and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", model) is not None
    )


def _config_warnings(document: JsonDocument, raw: dict[str, Any], fields: frozenset[str]) -> list[str]:
    found = [
        f"{CONFIG_NAME}: " + document.describe((name,), "unknown field, kept but not used", key=True)
        for name, value in raw.items()
        if _is_set(value) and name not in fields | _IGNORED and not name.startswith("_")
    ]
    found += [
        f"{CONFIG_NAME}: " + document.describe((name,), "not used", key=True)
        for name in ("auto_mapping", "revision")
        if _is_set(raw.get(name))
    ]
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


@dataclass(frozen=True)
class AdapterFiles:
    """Where an adapter lies in a package."""

    config: Path
    weights: Path
    warnings: tuple[str, ...]


def locate_adapter(root: Path, spec: AdapterSpec, *, source: str) -> AdapterFiles:
    """Find an adapter: at the manifest's `path` (a file or a directory) where that exists, else at the root.

    Published manifests give the path the adapter had where it was trained, while the package holds it at its root.

    Raises:
        AdapterError: The weights or the config are missing, or the weights are a pickle only.
    """
    warnings: list[str] = []
    place = root
    if spec.path is not None:
        if (root / spec.path).exists():
            place = root / spec.path
        else:
            warnings.append(f"adapters.path: {spec.path!r} is not in the package; the adapter at its root is used")
    folder = place if place.is_dir() else place.parent
    weights = (
        place if place.is_file() else next((folder / name for name in WEIGHTS_NAMES if (folder / name).is_file()), None)
    )
    pickles = [name for name in PICKLE_NAMES if (folder / name).is_file()]
    if weights is None or weights.suffix != ".safetensors":
        raise _no_weights(root, folder, spec, source, weights.name if weights else next(iter(pickles), None))
    warnings += [f"{name} beside {weights.name} is a pickle; it is never opened" for name in pickles]
    config = next((at / CONFIG_NAME for at in (folder, root) if (at / CONFIG_NAME).is_file()), None)
    if config is None:
        raise AdapterError(f"{source} holds no {CONFIG_NAME}", hint="Pack the whole output of PEFT's save_pretrained.")
    return AdapterFiles(config, weights, tuple(warnings))


def _no_weights(root: Path, folder: Path, spec: AdapterSpec, source: str, other: str | None) -> AdapterError:
    where = folder.relative_to(root).as_posix()
    details = [
        f"looked in {'the root' if where == '.' else where}"
        + (f"; adapters.path is {spec.path!r}" if spec.path else "")
    ]
    if other is not None:
        return AdapterError(
            f"{source} holds its adapter as {other}, a pickle, which can run code and is never opened",
            hint="Save the adapter again with safe_serialization=True (safetensors) and pack it.",
            details=details,
        )
    return AdapterError(
        f"{source} holds no {WEIGHTS_NAMES[0]}",
        hint="Pack the whole output of PEFT's save_pretrained.",
        details=details,
    )


def adapter_mismatches(spec: AdapterSpec, config: AdapterConfig) -> tuple[str, ...]:
    """Warnings where the manifest describes another adapter than its config; the config is what computes."""
    pairs: list[tuple[str, object, object]] = [("type", spec.type, config.kind)]
    if config.peft_type in ("LORA", "LOKR"):
        alpha = config.alpha if config.peft_type == "LOKR" else config.lora_alpha
        pairs += [("r", spec.r, config.r), ("alpha", spec.alpha, alpha)]
    return tuple(
        f"adapters.{name}: the manifest says {said!r}, {CONFIG_NAME} says {used!r}, which is used"
        for name, said, used in pairs
        if said is not None and said != used
    )
