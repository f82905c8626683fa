"""Where a valid manifest differs from the published schema.

Source: the JSON schema of the published format; published manifests do not satisfy it, so none of this is an error.
"""

import re
from collections.abc import Set
from typing import Any

from pipeline.package.fields import unknown_fields
from pipeline.package.json_text import JsonDocument, JsonPath
from pipeline.package.layout import original_path
from pipeline.package.manifest import ActedOn, AdapterSpec, BaseModelSpec, Constraints, Decoding, Routing, SoftPrompt

PROMPT_TEMPLATES = ("chatml", "llama2", "alpaca", "vicuna", "custom")
_TOP = {
    "name", "version", "schema_version", "description", "author", "homepage", "repository", "base_model", "base_models",
    "adapters", "soft_prompts", "capabilities", "routing", "constraints", "perf", "runtime", "training", "evaluation",
    "integrity", "license", "limitations", "tags", "quality_metrics",
}  # fmt: skip
_EXPECTED = ("description", "capabilities", "constraints", "training", "license", "quality_metrics", "perf")
_TRAINING = {
    "dataset", "config", "decoding", "trained_on", "base_model_version", "packaging_checkpoint", "checkpoint",
    "quality_score", "test_scenarios", "alternative_checkpoints",
}  # fmt: skip
_METRICS = (
    "benchmark_score",
    "base_model_score",
    "improvement_percent",
    "win_rate_vs_base",
    "test_queries",
    "checkpoint",
    "training_steps",
    "test_date",
)
_BASE = {"name", "sha256", "prompt_template", "adapters", "quantization", "rope_scaling"}
_ADAPTER = set(AdapterSpec.model_fields) | {
    "feedforward_modules",
    "scaling",
    "dropout",
    "use_dora",
    "checkpoint_step",
}


def quirks(document: JsonDocument, strict: ActedOn) -> list[str]:
    """A warning for each difference, with its line and column.

    Args:
        document: The manifest's text and value.
        strict: Its checked part.
    """
    raw = document.value
    found = [
        document.describe((name,), "missing; the published schema requires it")
        for name in _EXPECTED
        if raw.get(name) is None
    ]
    if "base_models" in raw and "schema_version" not in raw:
        found.append(document.describe(("schema_version",), 'missing; read as "2.0", because base_models is given'))
    known: list[tuple[JsonPath, Set[str]]] = [
        ((), _TOP),
        (("training",), _TRAINING),
        (("training", "decoding"), set(Decoding.model_fields)),
        (("constraints",), set(Constraints.model_fields)),
        (("routing",), set(Routing.model_fields)),
        (("quality_metrics",), set(_METRICS)),
        *((("soft_prompts", index), set(SoftPrompt.model_fields)) for index in range(len(strict.soft_prompts))),
    ]
    for index, base in enumerate(strict.base_models):
        place = original_path(document, ("base_models", index))
        known.append((place, _BASE))
        known += [
            (original_path(document, ("base_models", index, "adapters", number)), _ADAPTER)
            for number in range(len(base.adapters))
        ]
        found += _base_warnings(document, place, base)
    for path, names in known:
        found += unknown_fields(document, path, _at(raw, path), names)
    found += _metrics_warnings(document)
    return found


def _base_warnings(document: JsonDocument, place: JsonPath, base: BaseModelSpec) -> list[str]:
    found = []
    name = (*place, "name")
    is_path = "\\" in base.name or base.name.count("/") > 1 or re.match(r"[A-Za-z]:|\.\.?/", base.name)
    if is_path:
        found.append(document.describe(name, f"a path of the machine it was made on; read as {base.short_name!r}"))
    if base.prompt_template not in (None, *PROMPT_TEMPLATES):
        message = f"{base.prompt_template!r} is not a template of the published schema"
        found.append(document.describe((*place, "prompt_template"), message))
    return found


def _metrics_warnings(document: JsonDocument) -> list[str]:
    metrics = document.value.get("quality_metrics")
    if metrics is None:
        return []
    if not isinstance(metrics, dict):
        return [document.describe(("quality_metrics",), "Input should be an object; not used")]
    missing = [name for name in _METRICS if name not in metrics]
    return [document.describe(("quality_metrics",), f"lacks {', '.join(missing)}")] if missing else []


def _at(value: Any, path: JsonPath) -> Any:
    for part in path:
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            return None
    return value
