"""Tiny random models and adapters, made in seconds: what the tests compare engines on."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pipeline import demo
from pipeline.package import pack

BASE_NAME = "tiny-random"
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, Any] = {
    "lora": peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM"),
    "rslora": peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, use_rslora=True, task_type="CAUSAL_LM"),
    "patterns": peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=TARGETS,
        rank_pattern={"q_proj": 2},
        alpha_pattern={"down_proj": 32},
        task_type="CAUSAL_LM",
    ),
    "dora": peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, use_dora=True, task_type="CAUSAL_LM"),
    "ia3": peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "lokr": peft.LoKrConfig(r=4, alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM"),
    "adalora": peft.AdaLoraConfig(
        init_r=4, target_r=4, lora_alpha=8, target_modules=TARGETS, total_step=10, task_type="CAUSAL_LM"
    ),
}

# Model types of transformers and what is special of them; a window is shorter than the prompts of the tests.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "llama": {"attention_bias": True},
    "qwen2": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": None},
    "mistral windowed": {"sliding_window": 9},
    "gemma": {},
    "gemma2": {"sliding_window": 9, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 24},
    "gemma3_text": {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]},
}
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.4,
    "tie_word_embeddings": False,  # a tied random model says its last token again and again
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tokenizer() -> PreTrainedTokenizerFast:
    """The demo's tokenizer: a real byte-level BPE one with a ChatML template."""
    return AutoTokenizer.from_pretrained(demo.BASE_MODEL)


def make_base(folder: Path, *, vocab_size: int, context: int = 512) -> Path:
    """A random Qwen3 of two layers, saved as an ordinary model directory."""
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        initializer_range=0.4,  # large, so that different prompts get different answers
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = Qwen3ForCausalLM(config)
    path = folder / BASE_NAME
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def make_model(folder: Path, model_type: str, **options: Any) -> Path:
    """A random model of two layers and any type that transformers has, saved as an ordinary model directory."""
    torch.manual_seed(3)
    config = AutoConfig.for_model(model_type, **(SHAPE | {"vocab_size": len(tokenizer())} | options))
    path = folder / model_type
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name or "bias" in name or "sinks" in name:  # ones and zeros would hide how they are used
                value.add_(torch.randn_like(value) * 0.2)
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def make_adapted(kind: str, base: Path) -> peft.PeftModel:
    """The base with a random adapter of that kind, as PEFT runs it: the oracle."""
    model = Qwen3ForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(2)
    adapted = peft.get_peft_model(model, copy.deepcopy(ADAPTERS[kind]))  # PEFT writes into its config
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_" in name or "lokr_" in name or "ia3_" in name:
                spread = 0.5 + torch.rand_like(value)
                is_scale = "ia3_" in name or "magnitude" in name
                value.copy_(value * spread if is_scale else torch.randn_like(value) * 0.2)
    return adapted.eval()


def make_package(kind: str, base: Path, folder: Path, **decoding: Any) -> tuple[Path, peft.PeftModel]:
    """A `.expert` file with a random adapter of that kind, and the same adapter under PEFT."""
    adapted = make_adapted(kind, base)
    source = folder / kind
    adapted.save_pretrained(str(source))
    manifest = {
        "name": f"expert-{kind}",
        "version": "1.0.0",
        "schema_version": "2.0",
        "description": "random weights",
        "capabilities": ["database:sql"],
        "base_models": [
            {"name": BASE_NAME, "adapters": [{"type": "lora", "target_modules": TARGETS, "r": 4, "alpha": 8}]}
        ],
        "training": {"decoding": {"temperature": 0.0, "max_new_tokens": 12, **decoding}},
    }
    (source / "manifest.json").write_text(json.dumps(manifest))
    return pack(source, folder), adapted
