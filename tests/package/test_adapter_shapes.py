"""The shapes of an adapter's tensors: those that PEFT makes are taken, any other is refused by name."""

import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from torch import nn

from pipeline.errors import AdapterError
from pipeline.package.adapter import read_adapter_config
from pipeline.package.adapter_shapes import PREFIX, _factors
from pipeline.package.adapter_weights import check_adapter_weights, check_fits_base
from pipeline.package.weights import read_safetensors_header

peft = pytest.importorskip("peft")
Q, DOWN, TABLE = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.embed_tokens"
LAYERS = {Q: (12, 8), DOWN: (8, 30), TABLE: (10, 8)}  # [out_features, in_features]
TARGETS = ["q_proj", "down_proj"]
E_OF_Q = f"{Q}.lora_E"
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"peft_type": "LORA", "r": 4, "target_modules": TARGETS, "rank_pattern": {"q_proj": 2}},
    "lora with a pattern": {"peft_type": "LORA", "r": 4, "target_modules": TARGETS, "rank_pattern": {"self.*proj": 2}},
    "lora with biases": {"peft_type": "LORA", "r": 4, "target_modules": TARGETS, "lora_bias": True},
    "dora": {"peft_type": "LORA", "r": 4, "target_modules": TARGETS, "use_dora": True},
    "lora of an embedding": {"peft_type": "LORA", "r": 4, "target_modules": ["embed_tokens"]},
    "dora of an embedding": {"peft_type": "LORA", "r": 4, "target_modules": ["embed_tokens"], "use_dora": True},
    "ia3": {"peft_type": "IA3", "target_modules": TARGETS, "feedforward_modules": ["down_proj"]},
    "ia3 with a pattern": {"peft_type": "IA3", "target_modules": ".*_proj", "feedforward_modules": ".*down_proj"},
    "lokr": {"peft_type": "LOKR", "r": 2, "alpha": 4, "target_modules": TARGETS},
    "lokr whole": {"peft_type": "LOKR", "r": 8, "target_modules": TARGETS},
    "lokr by factor": {"peft_type": "LOKR", "r": 2, "target_modules": TARGETS, "decompose_factor": 4},
    "lokr of both": {
        "peft_type": "LOKR",
        "r": 1,
        "target_modules": TARGETS,
        "decompose_both": True,
        "rank_pattern": {"down_proj": 2},
    },
    "lokr with a pattern": {"peft_type": "LOKR", "r": 9, "target_modules": TARGETS, "rank_pattern": {"q_p.*": 1}},
    "adalora": {"peft_type": "ADALORA", "init_r": 6, "target_modules": TARGETS, "total_step": 10},
    "adalora pruned": {
        "peft_type": "ADALORA",
        "init_r": 3,
        "target_modules": TARGETS,
        "total_step": 10,
        "rank_pattern": {E_OF_Q: [True, False, True], f"{DOWN}.lora_E.default": [False] * 3},
    },
}


class _Layers(nn.Module):
    """A model of the layers above, by their names."""

    def __init__(self) -> None:
        super().__init__()
        for path, (out_features, in_features) in LAYERS.items():
            place: Any = self
            *parents, name = path.split(".")
            for parent in parents:
                if not hasattr(place, parent):
                    place.add_module(parent, nn.Module())
                place = getattr(place, parent)
            is_table = path == TABLE
            place.add_module(
                name,
                nn.Embedding(out_features, in_features)
                if is_table
                else nn.Linear(in_features, out_features, bias=False),
            )


@cache
def peft_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """The tensors in a file of PEFT's."""
    config, _ = read_adapter_config(json.dumps(CONFIGS[name]).encode(), source="x")
    classes = {
        "LORA": peft.LoraConfig,
        "IA3": peft.IA3Config,
        "LOKR": peft.LoKrConfig,
        "ADALORA": peft.AdaLoraConfig,
    }
    kwargs = config.to_peft_kwargs()
    pruned = kwargs.pop("rank_pattern") if config.peft_type == "ADALORA" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice is for training and merging
        adapted = peft.get_peft_model(_Layers(), classes[config.peft_type](**kwargs))
        if pruned:
            adapted.peft_config["default"].rank_pattern = pruned  # as training leaves it
        return {key: tuple(value.shape) for key, value in peft.get_peft_model_state_dict(adapted).items()}


def check(fields: dict[str, Any], shapes: dict[str, tuple[int, ...]], folder: Path) -> None:
    """Write the tensors, and a base model, and compare them as opening and loading do."""
    config, _ = read_adapter_config(json.dumps(fields).encode(), source="x")
    save_file({key: np.zeros(shape, "f4") for key, shape in shapes.items()}, folder / "adapter.safetensors")
    (folder / "base").mkdir(exist_ok=True)
    save_file({f"{path}.weight": np.zeros(size, "f4") for path, size in LAYERS.items()}, folder / "base/m.safetensors")
    tensors = read_safetensors_header(folder / "adapter.safetensors", source="x")
    check_adapter_weights(tensors, config, source="x")
    check_fits_base(folder / "adapter.safetensors", config, folder / "base", label="x")


@pytest.mark.parametrize("name", CONFIGS)
def test_what_peft_makes_is_taken(name: str, tmp_path: Path) -> None:
    assert peft_shapes(name)
    check(CONFIGS[name], peft_shapes(name), tmp_path)


@pytest.mark.parametrize("name", CONFIGS)
def test_any_other_shape_is_refused(name: str, tmp_path: Path) -> None:
    good = peft_shapes(name)
    for key, shape in good.items():
        others = [(*shape[:axis], size + 1, *shape[axis + 1 :]) for axis, size in enumerate(shape)]
        others += [(*shape, 1), shape[::-1] if shape != shape[::-1] else (7, *shape[1:])]
        for other in others:
            with pytest.raises(AdapterError) as caught:
                check(CONFIGS[name], good | {key: other}, tmp_path)
            told = "\n".join(caught.value.details)
            assert key.rpartition(".lo")[0].removeprefix(PREFIX) in told, (key, other)
            assert caught.value.hint


@pytest.mark.parametrize("name", CONFIGS)
def test_a_missing_tensor_is_named(name: str, tmp_path: Path) -> None:
    good = peft_shapes(name)
    for key in good if len(good) > 2 else ():
        if key.endswith((".ia3_l", ".bias")):
            continue  # a module that is not adapted is no mistake of its shapes; the engine knows which must be there
        with pytest.raises(AdapterError) as caught:
            check(CONFIGS[name], {other: shape for other, shape in good.items() if other != key}, tmp_path)
        assert any(key.removesuffix(".weight") in line and "missing" in line for line in caught.value.details)


@pytest.mark.parametrize(
    ("name", "key", "shape", "expected"),
    [
        ("ia3", f"{Q}.ia3_l", (1, 12), "ia3_l: shape [1, 12], adapter_config.json says [12, 1]"),
        ("ia3", f"{Q}.ia3_l", (13, 1), "ia3_l: shape [13, 1], for the base model's [12, 8] it would be [12, 1]"),
        ("lokr", f"{Q}.lokr_w1", (3, 3), "lokr_w1: shape [3, 3], for the base model's [12, 8] it would be [3, 2]"),
        ("lokr", f"{Q}.lokr_w1", (3, 0), "its tensors are for a layer of [12, 0]"),
        ("lokr", f"{Q}.lokr_t2", (1, 1), "lokr_t2: shape [1, 1], adapter_config.json says that there is none"),
        ("adalora", f"{Q}.lora_E", (5, 1), "lora_E: shape [5, 1], adapter_config.json says [6, 1]"),
        ("adalora pruned", f"{Q}.lora_E", (3, 1), "lora_E: shape [3, 1], adapter_config.json says [2, 1]"),
        ("adalora", f"{Q}.lora_E", (6,), "lora_E: shape [6], a matrix is wanted"),
        ("dora", f"{Q}.lora_magnitude_vector", (8,), "lora_magnitude_vector: shape [8], [12] is wanted"),
        ("lora", f"{Q}.lora_A.weight", (4, 8), "do not belong together"),
    ],
)
def test_a_wrong_shape_is_told_with_the_right_one(
    name: str, key: str, shape: tuple[int, ...], expected: str, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError) as caught:
        check(CONFIGS[name], peft_shapes(name) | {PREFIX + key: shape}, tmp_path)
    told = "\n".join(caught.value.details)
    assert f"{key.removesuffix('.weight').rpartition('.')[0]}" in told
    assert expected in told


def test_a_mask_of_another_length_is_refused(tmp_path: Path) -> None:
    fields = CONFIGS["adalora pruned"] | {"rank_pattern": {E_OF_Q: [True, True]}}
    with pytest.raises(AdapterError) as caught:
        check(fields, peft_shapes("adalora pruned"), tmp_path)
    assert "rank_pattern tells of 2 ranks, init_r is 3" in "\n".join(caught.value.details)


@pytest.mark.parametrize("factor", [-1, 0, 1, 3, 4, 8, 100])
def test_sizes_are_split_as_peft_splits_them(factor: int) -> None:
    from peft.tuners.lokr.layer import factorization

    for size in (*range(1, 200), 1024, 3072, 4093):
        assert _factors(size, factor) == factorization(size, factor), size


def test_a_size_without_bound_is_refused_at_once(tmp_path: Path) -> None:
    shapes = peft_shapes("lokr whole")
    huge = {PREFIX + f"{Q}.lokr_w1": (1 << 22, 1), PREFIX + f"{Q}.lokr_w2": (1 << 22, 1)}
    with pytest.raises(AdapterError, match="describes") as caught:
        check(CONFIGS["lokr whole"], shapes | huge, tmp_path)
    assert "for a layer of [17592186044416, 1]" in caught.value.details[0]
