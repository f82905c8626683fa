"""Random weights in the shape of a real model, saved as an ordinary model directory."""

import json
import shutil
from pathlib import Path
from typing import Any

from pipeline.demo import BASE_MODEL

BUILD = Path("build/bench")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_COMMON: dict[str, Any] = {
    "bos_token_id": None,
    "eos_token_id": None,  # answers end at their length, whatever the weights say
    "pad_token_id": 0,
    "tie_word_embeddings": True,
    "rope_theta": 1_000_000.0,
}
SHAPES: dict[str, dict[str, Any]] = {
    # https://huggingface.co/Qwen/Qwen3-0.6B/blob/main/config.json
    "qwen3-0.6b": {
        "vocab_size": 151_936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 4096,
    },
    "tiny": {
        "vocab_size": 4096,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "initializer_range": 0.2,  # large, so that different prompts get different answers
    },
}


def make_model(name: str, folder: Path = BUILD) -> Path:
    """The directory of a random Qwen3 of that shape, made once: seeded weights and the demo's tokenizer.

    Args:
        name: One of `SHAPES`.
        folder: Where it is made, or was made before.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    path = folder / name
    shape = {**_COMMON, **SHAPES[name]}
    recipe = path / "recipe.json"
    if recipe.is_file() and json.loads(recipe.read_text()) == shape:
        return path
    torch.manual_seed(0)
    config = Qwen3Config(**shape)
    config.dtype = torch.bfloat16
    model: Any = Qwen3ForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(path)
    for file in _TOKENIZER_FILES:
        shutil.copy(BASE_MODEL / file, path)
    (path / "generation_config.json").write_text(json.dumps({"pad_token_id": 0}))
    recipe.write_text(json.dumps(shape))  # last: its presence says that the rest is whole
    return path


def num_parameters(name: str) -> tuple[int, int]:
    """Parameters that every token is multiplied with, and those that only generated tokens are (the output layer)."""
    shape = SHAPES[name]
    hidden, heads, kv_heads = shape["hidden_size"], shape["num_attention_heads"], shape["num_key_value_heads"]
    attention = hidden * shape["head_dim"] * (2 * heads + 2 * kv_heads)
    layer = attention + 3 * hidden * shape["intermediate_size"]
    return layer * shape["num_hidden_layers"], hidden * shape["vocab_size"]
