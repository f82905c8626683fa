"""Random experts over a benchmark model, as PEFT folders and as `.expert` packages."""

import json
from pathlib import Path
from typing import Any

from benchmarks.models import SHAPES

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
RANKS = (12, 13, 14, 15, 16)
_RECIPE = 1  # counts changes of what is written here


def make_experts(model: Path, number: int, folder: Path | None = None) -> list[Path]:
    """The first so many experts of a model, made once: LoRA and DoRA in turn, of ranks 12 to 16.

    Weights are drawn and written one matrix at a time, so that no adapted model is ever in memory. An update of a
    weight is about as large as a tenth of the weight, and DoRA's magnitudes lie within a tenth of the changed rows'
    norms, so that no expert answers like another or like the base model.

    Args:
        model: A directory of `make_model`.
        number: How many.
        folder: Where they are made, or were made before; None for beside the model.

    Returns:
        Folders as PEFT's `save_pretrained` writes them, each with a manifest; the package of `NAME` is `NAME.expert`.
    """
    folder = folder or model.parent / f"experts-{model.name}"
    folder.mkdir(parents=True, exist_ok=True)
    recipe = (model / "recipe.json").read_text()
    return [_make(at, model, json.dumps([_RECIPE, recipe]), folder) for at in range(number)]


def package_of(expert: Path) -> Path:
    """The `.expert` file of a folder of `make_experts`."""
    return expert.with_name(expert.name + ".expert")


def _make(at: int, model: Path, recipe: str, folder: Path) -> Path:
    from safetensors.torch import save_file

    from pipeline.package import pack

    expert = folder / f"expert-{at:02}"
    made_from = folder / f"expert-{at:02}.recipe.json"
    if made_from.is_file() and made_from.read_text() == recipe:
        return expert
    expert.mkdir(exist_ok=True)
    rank, use_dora = RANKS[at % len(RANKS)], at % 2 == 1
    save_file(_weights(at, model, rank, use_dora), expert / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.name,
        "target_modules": list(TARGETS),
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": use_dora,
        "inference_mode": True,
    }
    adapter = {"type": "lora", "target_modules": list(TARGETS), "r": rank, "alpha": 2 * rank, "use_dora": use_dora}
    manifest = {
        "name": expert.name,
        "version": "1.0.0",
        "schema_version": "2.0",
        "description": "random weights",
        "capabilities": ["database:sql"],
        "base_models": [{"name": model.name, "adapters": [adapter]}],
        "training": {"decoding": {"temperature": 0.0, "max_new_tokens": 64}},
    }
    (expert / "adapter_config.json").write_text(json.dumps(config, indent=2))
    (expert / "manifest.json").write_text(json.dumps(manifest, indent=2))
    pack(expert, package_of(expert))
    made_from.write_text(recipe)  # last: its presence says that the rest is whole
    return expert


def _weights(at: int, model: Path, rank: int, use_dora: bool) -> dict[str, Any]:
    """The tensors of an adapter under PEFT's names, in float32 as PEFT trains them."""
    import torch
    from safetensors import safe_open

    draw = torch.Generator().manual_seed(1000 + at)
    shape = SHAPES[model.name]
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(model / "model.safetensors", "pt") as base:
        for name in sorted(base.keys()):
            path = name.removesuffix(".weight")
            if path.rpartition(".")[2] not in TARGETS:
                continue
            rows, columns = base.get_slice(name).get_shape()
            spread = shape.get("initializer_range", 0.02)  # of the base's weights
            a = torch.randn(rank, columns, generator=draw) * columns**-0.5
            b = torch.randn(rows, rank, generator=draw) * (0.05 * spread * (columns / rank) ** 0.5)
            key = f"base_model.model.{path}"
            tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
            if use_dora:
                norms = (base.get_tensor(name).float() + 2.0 * b @ a).norm(dim=1)  # [rows]; alpha is twice the rank
                tensors[f"{key}.lora_magnitude_vector"] = norms * (0.9 + 0.2 * torch.rand(rows, generator=draw))
    return tensors
