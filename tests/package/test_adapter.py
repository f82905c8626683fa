"""Adapters: found where they are, read by an allow-list, pickles refused."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import AdapterError, IntegrityError, ManifestError
from pipeline.package import AdapterConfig, open_package
from pipeline.package.adapter import read_adapter_config
from tests.package.expert_fixtures import ADAPTER_CONFIG, manifest, weights

IA3 = {"peft_type": "IA3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
LOKR = {"peft_type": "LOKR", "r": 8, "alpha": 16, "target_modules": ["q_proj"], "decompose_factor": 4}
ADALORA = {
    "peft_type": "ADALORA",
    "target_modules": ["q_proj"],
    "init_r": 6,
    "target_r": 4,
    "total_step": 100,
    "rank_pattern": {"q_proj": [True, False]},
}


def read(**changes: Any) -> tuple[AdapterConfig, tuple[str, ...]]:
    return read_adapter_config(json.dumps(ADAPTER_CONFIG | changes).encode(), source="x.expert")


UNSIGNED = "expert-test@0.1.0 is not signed"


def adapter_manifest(**adapter: Any) -> bytes:
    return json.dumps(manifest(base_models=[{"name": "Tiny", "adapters": [{"type": "dora"} | adapter]}])).encode()


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"peft_type": "LORA"}, "lora"),
        ({"peft_type": "LORA", "use_dora": True}, "dora"),
        (IA3, "ia3"),
        (LOKR, "lokr"),
        (ADALORA, "adalora"),
    ],
)
def test_every_kind_builds_a_config_that_peft_accepts(fields: dict[str, Any], kind: str) -> None:
    peft = pytest.importorskip("peft")
    classes = {
        "LORA": peft.LoraConfig,
        "IA3": peft.IA3Config,
        "LOKR": peft.LoKrConfig,
        "ADALORA": peft.AdaLoraConfig,
    }
    config, warnings = read_adapter_config(json.dumps(fields).encode(), source="x")
    assert config.kind == kind
    assert warnings == ()
    kwargs = config.to_peft_kwargs()
    known = {field.name for field in dataclasses.fields(classes[config.peft_type])}
    assert kwargs.keys() <= known
    built = classes[config.peft_type](task_type="CAUSAL_LM", inference_mode=True, **kwargs)
    assert all(getattr(built, name) == value for name, value in fields.items() if not isinstance(value, list))


def test_a_config_as_peft_writes_it_is_read_without_warnings(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    peft.LoraConfig(
        task_type="CAUSAL_LM", r=12, lora_alpha=24, use_dora=True, use_rslora=True, target_modules=["q_proj", "v_proj"],
        rank_pattern={"q_proj": 6}, alpha_pattern={"q_proj": 3}, modules_to_save=["lm_head"],
    ).save_pretrained(tmp_path)  # fmt: skip
    config, warnings = read_adapter_config((tmp_path / "adapter_config.json").read_bytes(), source="x")
    assert warnings == ()
    assert (config.kind, config.r, config.lora_alpha, config.use_rslora) == ("dora", 12, 24, True)
    assert sorted(config.target_modules or ()) == ["q_proj", "v_proj"]
    assert (config.rank_pattern, config.alpha_pattern) == ({"q_proj": 6}, {"q_proj": 3})
    again = peft.LoraConfig(task_type="CAUSAL_LM", **config.to_peft_kwargs())
    assert again.rank_pattern == {"q_proj": 6}
    assert again.modules_to_save == ["lm_head"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"auto_mapping": {"base_model_class": "x", "parent_library": "os"}}, "auto_mapping: names code"),
        ({"auto_mapping": {"parent_library": "transformers"}}, "auto_mapping: names code"),
        ({"auto_mapping": "os.system"}, "auto_mapping: names code"),
        ({"megatron_core": "evil.module"}, "megatron_core: names code"),
        ({"megatron_config": {"a": 1}}, "megatron_config: names code"),
        ({"trust_remote_code": True}, "trust_remote_code: names code"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map: names code"),
        ({"peft_type": "VERA"}, "peft_type: Input should be 'LORA', 'IA3', 'LOKR' or 'ADALORA'"),
        ({"peft_type": ["LORA"]}, "peft_type: Input should be"),
        ({"peft_type": None}, "peft_type: Field required"),
        ({"r": 10**9}, "r: Input should be less than or equal to 1024"),
        ({"r": 0}, "r: Input should be greater than or equal to 1"),
        ({"r": True}, "r: Input should be a valid integer"),
        ({"r": 4.0}, "r: Input should be a valid integer"),
        ({"lora_alpha": "8"}, "lora_alpha: Input should be a number greater than 0"),
        ({"lora_alpha": -1}, "lora_alpha: Input should be a number greater than 0"),
        ({"use_dora": 1}, "use_dora: Input should be a valid boolean"),
        ({"bias": "some"}, "bias: Input should be"),
        ({"target_modules": "(a"}, "target_modules: Input is not a regular expression"),
        ({"target_modules": [""]}, "target_modules: String should have at least 1"),
        ({"rank_pattern": {"q_proj": 10**9}}, "rank_pattern: Input should be less"),
        ({"rank_pattern": {"(a": 4}}, "rank_pattern: Input is not a regular expression"),
        ({"layers_pattern": "(a+)+b"}, "layers_pattern: String should match"),
        ({"layers_to_transform": [-1]}, "layers_to_transform: Input should be greater"),
        ({"layer_replication": [[0, 2]]}, "layer_replication: is not supported"),
        ({"use_qalora": True}, "use_qalora: is not supported"),
        ({"target_parameters": ["experts.w"]}, "target_parameters: is not supported"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices: is not supported"),
    ],
)
def test_refused_configs(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(AdapterError) as caught:
        read(**changes)
    assert expected in "\n".join(caught.value.details)
    assert caught.value.message == "adapter_config.json in x.expert cannot be used"


def test_problems_of_a_config_have_places() -> None:
    with pytest.raises(AdapterError) as caught:
        read_adapter_config(b'{"peft_type": "LORA",\n "r": true,\n "auto_map": {"a": "b"}}', source="x")
    assert caught.value.details == (
        "line 2, column 7  r: Input should be a valid integer",
        "line 3, column 14  auto_map: names code to import, which is never done",
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"future_option": 3}, "adapter_config.json: line 1, column"),
        ({"future_option": 3}, "future_option: unknown field"),
        ({"feedforward_modules": ["down_proj"]}, "feedforward_modules: unknown field"),
        ({"revision": "main"}, "revision: not used"),
        (
            {
                "auto_mapping": {
                    "base_model_class": "Q",
                    "parent_library": "transformers.models.q",
                    "unsloth_fixed": True,
                }
            },
            "auto_mapping: not used",
        ),
    ],
)
def test_other_set_fields_are_warnings(changes: dict[str, Any], expected: str) -> None:
    assert expected in "\n".join(read(**changes)[1])


@pytest.mark.parametrize("value", [None, False, [], {}, ""])
def test_unknown_fields_at_a_default_are_ignored(value: Any) -> None:
    assert read(future_option=value, layer_replication=value)[1] == ()


def test_the_base_model_of_the_config_is_not_used(expert_dir: Callable[..., Path]) -> None:
    assert open_package(expert_dir()).base.name == "Tiny-1.5B"


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_a_pickled_adapter_is_refused(name: str, expert_dir: Callable[..., Path]) -> None:
    root = expert_dir(adapter_model__safetensors=None, **{name: b"\x80\x04"})
    with pytest.raises(AdapterError, match=f"holds its adapter as {name}, a pickle") as caught:
        open_package(root)
    assert "safe_serialization" in caught.value.hint


def test_a_pickle_named_by_the_manifest_is_refused(expert_dir: Callable[..., Path]) -> None:
    root = expert_dir(manifest__json=adapter_manifest(path="weights.bin"), weights__bin=b"\x80\x04")
    with pytest.raises(AdapterError, match="a pickle"):
        open_package(root)


def test_a_pickle_beside_safetensors_is_a_warning(expert_dir: Callable[..., Path]) -> None:
    package = open_package(expert_dir(adapter_model__bin=b"\x80\x04"))
    assert package.adapter_weights.name == "adapter_model.safetensors"
    assert "adapter_model.bin beside adapter_model.safetensors is a pickle; it is never opened" in package.warnings


@pytest.mark.parametrize("path", ["weights/tiny", "weights/tiny/adapter_model.safetensors"])
def test_the_path_of_the_manifest_is_honoured(path: str, expert_dir: Callable[..., Path]) -> None:
    root = expert_dir(
        manifest__json=adapter_manifest(path=path),
        **{
            "weights/tiny/adapter_model.safetensors": weights(seed=1),
            "weights/tiny/adapter_config.json": json.dumps(ADAPTER_CONFIG | {"lora_alpha": 6}).encode(),
        },
    )
    package = open_package(root)
    assert package.adapter_weights == root / "weights/tiny/adapter_model.safetensors"
    assert package.adapter.lora_alpha == 6


def test_a_config_at_the_root_serves_weights_in_a_directory(expert_dir: Callable[..., Path]) -> None:
    root = expert_dir(
        manifest__json=adapter_manifest(path="weights/tiny/adapter.safetensors"),
        adapter_model__safetensors=None,
        **{"weights/tiny/adapter.safetensors": weights()},
    )
    assert open_package(root).adapter_weights.name == "adapter.safetensors"


def test_a_path_of_the_training_machine_falls_to_the_root_and_says_so(expert_dir: Callable[..., Path]) -> None:
    package = open_package(expert_dir(manifest__json=adapter_manifest(path="qwen3-06b/final")))
    assert package.adapter_weights.parent == package.root
    assert any("'qwen3-06b/final' is not in the package" in warning for warning in package.warnings)


@pytest.mark.parametrize("missing", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_missing_file_is_named(missing: str, expert_dir: Callable[..., Path]) -> None:
    with pytest.raises(AdapterError, match=f"holds no {missing}"):
        open_package(expert_dir(**{missing.replace(".", "__"): None}))


def test_two_adapters_for_one_base_are_refused(expert_dir: Callable[..., Path]) -> None:
    two = manifest(base_models=[{"name": "Tiny", "adapters": [{"type": "dora"}, {"type": "lora"}]}])
    with pytest.raises(ManifestError, match="More than one adapter"):
        open_package(expert_dir(manifest__json=json.dumps(two).encode()))


def test_size_and_checksum_of_the_manifest_are_compared(expert_dir: Callable[..., Path]) -> None:
    with pytest.raises(IntegrityError, match="size"):
        open_package(expert_dir(manifest__json=adapter_manifest(size_bytes=7)))
    with pytest.raises(IntegrityError, match="differs from its checksum"):
        open_package(expert_dir(manifest__json=adapter_manifest(sha256="0" * 64)))
    import hashlib

    good = {"sha256": hashlib.sha256(weights()).hexdigest().upper(), "size_bytes": len(weights())}
    assert open_package(expert_dir(manifest__json=adapter_manifest(**good))).warnings == (UNSIGNED,)


def test_a_manifest_that_describes_another_adapter_is_a_warning(expert_dir: Callable[..., Path]) -> None:
    root = expert_dir(manifest__json=adapter_manifest(type="lora", r=16, alpha=32))
    assert [warning.split(":")[0] for warning in open_package(root).warnings] == [
        "adapters.type",
        "adapters.r",
        "adapters.alpha",
        UNSIGNED,
    ]
