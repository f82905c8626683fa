"""The JSON schema: it takes what the reader takes, and refuses what that refuses for its form."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from pipeline.errors import ManifestError
from pipeline.package.manifest_reader import read_manifest
from pipeline.package.schema import manifest_schema
from tests.package.expert_fixtures import manifest

PUBLISHED = Path(__file__).parents[3] / "shared" / "upstream" / "expert-sql" / "manifest.json"
ONE = {"schema_version": "1.0", "base_models": ..., "base_model": {"name": "Tiny"}, "adapters": [{"type": "lora"}]}
SCHEMA = jsonschema.Draft202012Validator(manifest_schema())


def base(**adapter: Any) -> list[dict[str, Any]]:
    return [{"name": "Tiny", "adapters": [{"type": "dora"} | adapter]}]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        ONE,
        ONE | {"base_model": "Tiny"},
        {"soft_prompts": None, "constraints": None, "training": None},
        {"_comment": 1, "anything": {"else": []}},
        {"base_models": base(sha256="", size_bytes=0, r=4, path="weights/a.safetensors")},
    ],
)
def test_what_is_read_fits_the_schema(changes: dict[str, Any]) -> None:
    value = manifest(**changes)
    read_manifest(json.dumps(value).encode(), source="x")
    SCHEMA.validate(value)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": ...},
        {"name": "sql"},
        {"version": "one"},
        {"base_models": ...},
        {"base_models": []},
        {"base_model": "Tiny"},
        {"adapters": [{"type": "lora"}]},
        {"base_models": base(type="bone")},
        {"base_models": base(r=True)},
        {"base_models": base(r=10**9)},
        {"base_models": base(sha256="abc")},
        {"base_models": base(size_bytes=-1)},
        {"soft_prompts": [{"name": "p", "path": "p.pt", "tokens": 0}]},
        {"training": {"decoding": {"top_p": 2}}},
        {"constraints": {"requires": "expert-a"}},
    ],
)
def test_what_is_refused_for_its_form_does_not_fit(changes: dict[str, Any]) -> None:
    value = manifest(**changes)
    with pytest.raises(ManifestError):
        read_manifest(json.dumps(value).encode(), source="x")
    assert not SCHEMA.is_valid(value)


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="the published manifest is not beside this project")
def test_the_published_manifest_fits() -> None:
    SCHEMA.validate(json.loads(PUBLISHED.read_bytes()))
