"""The two layouts of a manifest: schema 1.0 has one `base_model`, schema 2.0 has `base_models`."""

from typing import Any

from pipeline.package.json_text import JsonDocument, JsonPath


def schema_version(raw: dict[str, Any]) -> tuple[str, list[tuple[JsonPath, str]]]:
    """The schema a manifest follows, and what is wrong with its choice of base model fields."""
    shape = "2.0" if "base_models" in raw else "1.0"
    schema = raw.get("schema_version", shape)
    if schema not in ("1.0", "2.0"):
        return shape, [(("schema_version",), 'Input should be "1.0" or "2.0"')]
    one, several = "base_model" in raw, "base_models" in raw
    if one and several:
        return schema, [(("base_model",), "Both base_model and base_models are given; keep one")]
    if not one and not several:
        field = "base_model" if schema == "1.0" and "schema_version" in raw else "base_models"
        return schema, [((field,), "Field required")]
    if schema != shape:
        wanted = "base_models" if schema == "2.0" else "base_model"
        return schema, [((wanted,), f"Field required in schema {schema}")]
    if several and raw.get("adapters"):
        return schema, [(("adapters",), "In schema 2.0 adapters stand inside base_models")]
    return schema, []


def to_layout_2(raw: dict[str, Any]) -> dict[str, Any]:
    """The acted-on fields, in the layout of schema 2.0."""
    layout: dict[str, Any] = {
        name: raw[name] for name in ("name", "version", "base_models", "soft_prompts") if name in raw
    }
    if "base_models" not in raw and "base_model" in raw:
        base = raw["base_model"]
        if isinstance(base, str):
            base = {"name": base}
        if isinstance(base, dict):
            base = {name: value for name, value in base.items() if name != "adapters"}
            base |= {"adapters": raw["adapters"]} if "adapters" in raw else {}
        layout["base_models"] = [base]
    if raw.get("constraints") is not None:
        layout["constraints"] = raw["constraints"]
    training = raw.get("training")
    if isinstance(training, dict) and training.get("decoding") is not None:
        layout["decoding"] = training["decoding"]
    return layout


def original_path(document: JsonDocument, path: JsonPath) -> JsonPath:
    """A path in the 2.0 layout, turned into the path in the text."""
    if path[:1] == ("decoding",):
        return ("training", *path)
    if path[:1] != ("base_models",) or "base_models" in document.value:
        return path
    inner = path[2:]
    if inner[:1] == ("adapters",):
        return inner
    if isinstance(document.value.get("base_model"), str):
        return ("base_model",)
    return ("base_model", *inner) if "base_model" in document.value else path
