"""What a job is planned from: the experts and the base model that they share."""

import json
from pathlib import Path

import pytest

from pipeline.batch.config import BatchConfig
from pipeline.batch.plan import open_experts
from pipeline.errors import BaseModelError
from tests.package.expert_fixtures import expert_files, manifest, write_files


def package(folder: Path, name: str, base: str) -> Path:
    """A package over a base model of that name."""
    bases = [{**manifest()["base_models"][0], "name": base}]
    text = json.dumps(manifest(name=name, base_models=bases))
    return write_files(folder / name, expert_files(manifest__json=text.encode()))


def base_model(folder: Path, name: str) -> Path:
    """What is taken for a base model until it is loaded."""
    tokenizer = b'{"name": "%b"}' % name.encode()
    weights = b"\x02" + bytes(7) + b"{}"  # safetensors without a tensor
    return write_files(folder / name, {"config.json": b"{}", "model.safetensors": weights, "tokenizer.json": tokenizer})


def config(folder: Path, **models: Path) -> BatchConfig:
    return BatchConfig.from_options(
        dataset="rows.parquet",
        experts={"one": package(folder, "expert-one", "Base-A"), "two": package(folder, "expert-two", "Base-B")},
        output="out",
        sampling={"use_grammar": False},
        cache_dir=folder / "cache",
        models={f"Base-{name}": place for name, place in models.items()},
    )


def test_experts_over_several_base_models_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="over several base models") as caught:
        open_experts(config(tmp_path, A=base_model(tmp_path, "a"), B=base_model(tmp_path, "b")))
    assert caught.value.details == (
        f"experts.one: expert-one@0.1.0 over Base-A, {tmp_path / 'a'}",
        f"experts.two: expert-two@0.1.0 over Base-B, {tmp_path / 'b'}",
    )


def test_one_directory_under_two_names_is_one_base_model(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(base_model(tmp_path, "a"))
    opened = open_experts(config(tmp_path, A=tmp_path / "a", B=tmp_path / "link"))
    assert [expert.name for expert in opened.experts] == ["one", "two"]
    assert opened.default is None
