"""A JSON schema of the manifests that are accepted, drawn from the types that read them."""

from typing import Any

from pipeline.package.manifest import ActedOn

_URL = "https://json-schema.org/draft/2020-12/schema"


def manifest_schema() -> dict[str, Any]:
    """The schema, for editors and for those who write manifests.

    It says what is acted on; further fields are kept as they are. What depends on the package's files (a path that must
    be in it) is checked when it is opened.
    """
    drawn = ActedOn.model_json_schema(ref_template="#/$defs/{model}")
    parts = drawn["$defs"]
    fields = drawn["properties"]
    fields["base_models"] |= {"minItems": 1}  # what is checked after a tuple is made of it is not drawn
    parts["BaseModelSpec"]["properties"]["adapters"] |= {"minItems": 1}
    adapters = {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/AdapterSpec"}}
    one = {name: value for name, value in parts["BaseModelSpec"]["properties"].items() if name != "adapters"}
    shared = {name: fields[name] for name in ("name", "version", "soft_prompts", "constraints")}
    shared["training"] = {"type": ["object", "null"], "properties": {"decoding": fields["decoding"]}}
    for name in ("soft_prompts", "constraints"):
        shared[name] = {"anyOf": [shared[name], {"type": "null"}]}
    return {
        "$schema": _URL,
        "title": "manifest.json of an expert package",
        "type": "object",
        "required": ["name", "version"],
        "properties": shared,
        "oneOf": [
            {
                "title": "schema 1.0: one base model",
                "required": ["base_model", "adapters"],
                "properties": {
                    "schema_version": {"const": "1.0"},
                    "base_model": {"anyOf": [one["name"], {"type": "object", "required": ["name"], "properties": one}]},
                    "base_models": False,
                    "adapters": adapters,
                },
            },
            {
                "title": "schema 2.0: base models, each with its adapters",
                "required": ["base_models"],
                "properties": {
                    "schema_version": {"const": "2.0"},
                    "base_models": fields["base_models"],
                    "base_model": False,
                    "adapters": {"maxItems": 0},
                },
            },
        ],
        "$defs": parts,
    }
