"""Manifests of both schemas: strict where we act, tolerant elsewhere, problems named by line and column."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ManifestError
from pipeline.package.manifest import Manifest
from pipeline.package.manifest_reader import read_manifest
from tests.package.expert_fixtures import manifest

PUBLISHED = Path(__file__).parents[3] / "shared" / "upstream" / "expert-sql" / "manifest.json"


def read(value: dict[str, Any] | str) -> Manifest:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return read_manifest(text.encode(), source="test.expert").manifest


def details(value: dict[str, Any] | str) -> tuple[str, ...]:
    with pytest.raises(ManifestError) as caught:
        read(value)
    assert caught.value.message == "manifest.json in test.expert is not valid"
    return caught.value.details


def base(**changes: Any) -> dict[str, Any]:
    return {"name": "Tiny", "adapters": [{"type": "lora"}]} | changes


def test_a_complete_manifest_has_no_warnings() -> None:
    found = read(manifest())
    assert (found.name, found.version, found.schema_version) == ("expert-test", "0.1.0", "2.0")
    assert found.base_models[0].adapters[0].type == "dora"
    assert found.base_models[0].adapters[0].size_bytes is None
    assert found.base_models[0].sha256 is None
    assert found.decoding.temperature == 0.7
    assert found.decoding.min_p == 0
    assert found.constraints.load_order == 6
    assert found.routing.keywords == ("sql",)
    assert found.raw == manifest()
    assert found.warnings == ()


@pytest.mark.parametrize("named", [{"schema_version": "1.0"}, {}])
@pytest.mark.parametrize("base_model", ["Tiny", {"name": "Tiny", "quantization": "int4"}])
def test_schema_1_is_read_into_the_same_shape(named: dict[str, str], base_model: Any) -> None:
    adapters = [{"type": "lora", "r": 4, "path": "weights/a.safetensors", "sha256": "AB" * 32}]
    fields = manifest(schema_version=..., base_models=..., base_model=base_model, adapters=adapters) | named
    found = read(fields)
    assert found.schema_version == "1.0"
    assert [spec.name for spec in found.base_models] == ["Tiny"]
    assert found.base_models[0].adapters[0].path == "weights/a.safetensors"
    assert found.base_models[0].adapters[0].sha256 == "ab" * 32
    assert found.warnings == ()


def test_several_bases_keep_their_own_adapters() -> None:
    found = read(manifest(base_models=[base(), base(name="Other", adapters=[{"type": "ia3"}])]))
    assert [(spec.name, spec.adapters[0].type) for spec in found.base_models] == [("Tiny", "lora"), ("Other", "ia3")]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("F:/Node/hivellm/models/Qwen3-0.6B", "Qwen3-0.6B"),
        ("F:\\models\\Qwen3-0.6B\\", "Qwen3-0.6B"),
        ("/models/Qwen3-0.6B", "Qwen3-0.6B"),
        ("Qwen/Qwen3-0.6B", "Qwen3-0.6B"),
        ("Qwen3-0.6B", "Qwen3-0.6B"),
    ],
)
def test_the_last_part_of_a_base_name(name: str, expected: str) -> None:
    assert read(manifest(base_models=[base(name=name)])).base_models[0].short_name == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({"name": ...}, "name: Field required", id="no-name"),
        pytest.param({"name": "sql"}, "name: Input should match expert-", id="name-form"),
        pytest.param({"name": "expert-sql\n"}, "name: Input should match expert-", id="name-newline"),
        pytest.param({"name": "expert-../x"}, "name: Input should match expert-", id="name-path"),
        pytest.param({"version": "one"}, "version: Input should be a semantic version", id="version"),
        pytest.param({"version": "1.0.0/.."}, "version: Input should be a semantic version", id="version-path"),
        pytest.param({"version": 1}, "version: Input should be a valid string", id="version-type"),
        pytest.param({"schema_version": "3.0"}, 'schema_version: Input should be "1.0" or "2.0"', id="schema"),
        pytest.param({"base_models": ...}, "base_models: Field required", id="no-base"),
        pytest.param({"base_model": "x"}, "base_model: Both base_model and base_models", id="both-bases"),
        pytest.param({"base_models": []}, "base_models: Value should have at least 1 item", id="empty-bases"),
        pytest.param({"adapters": [{}]}, "adapters: In schema 2.0 adapters stand inside base_models", id="two-places"),
        pytest.param(
            {"base_models": [base(adapters=[])]}, "base_models[0].adapters: Value should have", id="no-adapter"
        ),
        pytest.param({"base_models": [base(sha256="abc")]}, "base_models[0].sha256: Input should be 64", id="base-sha"),
        pytest.param({"base_models": [base(name="a\0b")]}, "base_models[0].name: Input should hold no", id="base-nul"),
        pytest.param(
            {"base_models": [base(adapters=[{"type": "bone"}])]}, "adapters[0].type: Input should be 'lora'", id="type"
        ),
        pytest.param(
            {"base_models": [base(adapters=[{"type": "lora", "r": True}])]},
            "base_models[0].adapters[0].r: Input should be a valid integer",
            id="true-for-int",
        ),
        pytest.param(
            {"base_models": [base(adapters=[{"type": "lora", "r": 10**9}])]},
            "base_models[0].adapters[0].r: Input should be less than or equal to 1024",
            id="huge-rank",
        ),
        pytest.param(
            {"base_models": [base(adapters=[{"type": "lora", "path": "../x"}])]},
            "adapters[0].path: Input should be a path inside the package: the path holds '..'",
            id="path-out",
        ),
        pytest.param(
            {"base_models": [base(adapters=[{"type": "lora", "size_bytes": -1}])]},
            "base_models[0].adapters[0].size_bytes: Input should be greater",
            id="negative-size",
        ),
        pytest.param(
            {"base_models": [base(adapters=[{"type": "lora", "size_bytes": False}])]},
            "base_models[0].adapters[0].size_bytes: Input should be a valid integer",
            id="false-for-size",
        ),
        pytest.param({"training": {"decoding": {"top_p": 2}}}, "training.decoding.top_p: Input should be", id="top-p"),
        pytest.param(
            {"training": {"decoding": {"stop_sequences": [""]}}}, "training.decoding.stop_sequences[0]", id="empty-stop"
        ),
        pytest.param(
            {"training": {"decoding": {"grammar_file": "/etc/passwd"}}},
            "training.decoding.grammar_file: Input should be a path inside",
            id="grammar-out",
        ),
        pytest.param({"soft_prompts": [{"name": "a", "tokens": 4}]}, "soft_prompts[0].path: Field", id="soft-prompt"),
        pytest.param({"training": 5}, "training: Input should be an object", id="training-type"),
        pytest.param({"constraints": {"load_order": "6"}}, "constraints.load_order: Input should be", id="constraints"),
        pytest.param({"constraints": {"requires": "expert-x"}}, "constraints.requires: Input should be", id="requires"),
    ],
)
def test_what_is_acted_on_is_strict(changes: dict[str, Any], expected: str) -> None:
    lines = details(manifest(**changes))
    assert len(lines) == 1
    assert expected in lines[0]
    assert lines[0].startswith("line 1, column ")


def test_a_schema_that_does_not_fit_its_fields_is_an_error() -> None:
    assert details(manifest(schema_version="1.0"))[0].endswith("base_model: Field required in schema 1.0")
    old = manifest(base_models=..., base_model="Tiny", adapters=[{"type": "lora"}])
    assert details(old)[0].endswith("base_models: Field required in schema 2.0")
    assert details(manifest(schema_version="1.0", base_models=...))[0].endswith("base_model: Field required")


def test_a_wrong_choice_of_base_field_hides_no_other_problem() -> None:
    lines = details(manifest(base_model="x", base_models=[{"name": 5, "adapters": [{"type": "lora"}]}]))
    assert [line.split("  ")[1].split(":")[0] for line in lines] == ["base_models[0].name", "base_model"]


def test_all_problems_are_told_at_once_with_exact_places() -> None:
    text = """{
  "version": "0.1.0",
  "schema_version": "2.0",
  "base_models": [
    {"name": "Tiny",
     "adapters": [{"type": "lora", "r": true}]}
  ],
  "training": {
    "decoding": {"top_k": "20"}
  },
  "version": "0.1.0",
  "perf": NaN
}"""
    assert details(text) == (
        "line 1, column 1  name: Field required",
        "line 6, column 41  base_models[0].adapters[0].r: Input should be a valid integer",
        "line 9, column 27  training.decoding.top_k: Input should be a valid integer",
        "line 11, column 3  version: This key occurs twice.",
        "line 12, column 11  perf: NaN is not a JSON number.",
    )


def test_places_in_schema_1_are_those_of_the_text() -> None:
    text = """{"name": "expert-a", "version": "1.0.0",
 "base_model": {"name": 5},
 "adapters": [{"type": "lora",
   "r": 0}]}"""
    assert details(text) == (
        "line 2, column 25  base_model.name: Input should be a valid string",
        "line 4, column 9  adapters[0].r: Input should be greater than or equal to 1",
    )
    text = '{"name": "expert-a", "version": "1.0.0",\n "base_model": "Tiny"}'
    assert details(text) == ("line 1, column 1  adapters: Field required",)


def test_a_missing_field_is_placed_at_the_object_that_lacks_it() -> None:
    text = json.dumps(manifest(base_models=[{"name": "Tiny"}]), indent=2)
    line = next(number for number, line in enumerate(text.splitlines(), 1) if line == "    {")
    assert details(text) == (f"line {line}, column 5  base_models[0].adapters: Field required",)


def test_a_flood_of_problems_is_cut() -> None:
    lines = details(manifest(base_models=[base(adapters=[{}] * 500)]))
    assert len(lines) == 51
    assert lines[-1] == "and 450 more"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({"perf": ...}, "line 1, column 1  perf: missing; the published schema requires it", id="no-perf"),
        pytest.param({"color": 1}, "color: unknown field, kept but not used", id="unknown"),
        pytest.param({"training": {"x": 1}}, "training.x: unknown field", id="unknown-training"),
        pytest.param({"quality_metrics": {"sql_valid": "16/18"}}, "quality_metrics.sql_valid: unknown", id="metric"),
        pytest.param({"quality_metrics": {"checkpoint": "a"}}, "quality_metrics: lacks benchmark_score", id="lacks"),
        pytest.param({"quality_metrics": 5}, "quality_metrics: Input should be an object", id="metrics-type"),
        pytest.param({"base_models": [base(prompt_template="qwen3")]}, "'qwen3' is not a template", id="template"),
        pytest.param({"base_models": [base(name="F:/a/Tiny")]}, "read as 'Tiny'", id="windows-path"),
        pytest.param({"base_models": [base(x=1)]}, "base_models[0].x: unknown field", id="unknown-in-base"),
        pytest.param({"description": 5}, "description: Input should be a valid string; not used", id="description"),
        pytest.param({"routing": {"priority": "high"}}, "routing.priority: Input should be a valid", id="routing"),
        pytest.param({"routing": []}, "routing: Input should be an object; not used", id="routing-type"),
        pytest.param({"capabilities": "sql"}, "capabilities: Input should be a valid array; not used", id="caps"),
        pytest.param({"schema_version": ...}, "schema_version: missing; read as", id="no-schema-version"),
    ],
)
def test_the_rest_is_tolerated_and_reported(changes: dict[str, Any], expected: str) -> None:
    found = read(manifest(**changes))
    assert expected in "\n".join(found.warnings)
    assert found.raw == manifest(**changes)


def test_comments_are_no_unknown_fields() -> None:
    commented = manifest(_note="x", base_models=[base(_c=1, adapters=[{"type": "lora", "_comment": "ü"}])])
    commented["quality_metrics"]["_comment"] = "x"
    assert read(commented).warnings == ()


def test_a_manifest_survives_pickling() -> None:
    import pickle

    found = read(manifest())
    assert pickle.loads(pickle.dumps(found)) == found  # noqa: S301  # our own object: Ray sends it to workers


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="the published manifest is not beside this project")
def test_the_published_manifest_loads() -> None:
    found = read_manifest(PUBLISHED.read_bytes(), source="expert-sql").manifest
    assert (found.name, found.version) == ("expert-sql", "0.3.0")
    assert found.base_models[0].short_name == "Qwen3-0.6B"
    assert found.base_models[0].adapters[0].r == 12
    assert found.decoding.stop_sequences == (";", "\n\n")
    assert found.decoding.use_grammar
    told = "\n".join(found.warnings)
    for quirk in (
        "read as 'Qwen3-0.6B'",
        "'qwen3' is not a template",
        "quality_metrics.sql_valid",
        "quality_metrics: lacks",
    ):
        assert quirk in told
