"""What a job is planned from: the experts and the base model that they share."""

import json
from pathlib import Path

import pytest

from pipeline import demo
from pipeline.batch.config import BatchConfig
from pipeline.batch.plan import open_experts, prepare
from pipeline.errors import BaseModelError, ConfigError, TrustError
from pipeline.package import PackageStore, local_base_model
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


def test_what_is_staged_reaches_workers_by_its_url(tmp_path: Path) -> None:
    store = PackageStore(tmp_path / "store")
    staged = store.stage(package(tmp_path, "expert-one", "Base-A"))
    base = store.stage_base_model(base_model(tmp_path, "a"))
    opened = open_experts(
        BatchConfig.from_options(dataset="rows.parquet", expert=staged.url, base_model=base.url, output="out")
    )
    assert (opened.experts[0].location, opened.experts[0].package.digest) == (staged.url, staged.digest)
    assert opened.base_place == base.url
    node = tmp_path / "node"
    assert local_base_model(opened.base_place, str(node)).is_relative_to(node)


def test_trust_is_asked_of_every_package(tmp_path: Path) -> None:
    asked = config(tmp_path, A=base_model(tmp_path, "a"), B=tmp_path / "a").model_copy(update={"trust": "signed"})
    with pytest.raises(TrustError, match=r"expert-one@0\.1\.0 is not signed; trust is 'signed'"):
        open_experts(asked)


def test_experts_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    asked = config(tmp_path, A=base_model(tmp_path, "a"), B=tmp_path / "a")
    one = tmp_path / "expert-one" / "manifest.json"
    changed = json.loads(one.read_bytes()) | {"constraints": {"incompatible_with": ["expert-two"]}}
    one.write_text(json.dumps(changed))
    with pytest.raises(ConfigError, match="do not go together"):
        open_experts(asked)


def test_a_job_is_the_same_whatever_it_computes_together(tmp_path: Path) -> None:
    """So that it may be continued on another device, or with another size."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "How many users are there?"}\n')
    fingerprints = []
    for options in ({}, {"batch_size": 1}, {"batch_size": 256, "max_batch_tokens": 64, "device": "cpu"}):
        config = BatchConfig.from_options(
            dataset=str(tmp_path / "rows.jsonl"),
            expert=str(demo.package("sql")),
            base_model=str(demo.BASE_MODEL),
            output=str(tmp_path / "output"),
            **options,
        )
        fingerprints.append(prepare(config, open_experts(config)).output.fingerprint)
    assert fingerprints[0] == fingerprints[1] == fingerprints[2]
