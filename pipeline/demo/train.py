"""The recipe of the demo artifacts: `python -m pipeline.demo.train`.

Stages: tokenizer, base model, one adapter per task, packages, evaluation. The base and the adapters are resumable, and
skipped when they are done. Every training step draws its questions from a generator seeded by (seed, stage, step), so a
stopped run continues with the same data. Checkpoints are safetensors. Hidden matrices learn by Muon, the rest by AdamW.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from pipeline.demo.corpus import Batch, build_tokenizer, collate, draw_tree
from pipeline.demo.names import BASE_NAME, TASKS, Task
from pipeline.demo.release import Score, evaluate, pack_expert
from pipeline.demo.training import Checkpoint, train
from pipeline.errors import ConfigError

EVALUATED_QUESTIONS = 500


@dataclass(frozen=True)
class Recipe:
    """Every number of the recipe. `*_steps` are optimizer steps; a step holds `trees * tree_size` questions."""

    seed: int = 0
    hidden_size: int = 192
    num_layers: int = 4
    base_steps: int = 2200
    adapter_steps: int = 200
    trees: int = 16
    tree_size: int = 4
    prompt_weight: float = 0.05
    instructed_share: float = 0.5
    muon_lr: float = 3e-3
    adamw_lr: float = 3e-3
    adapter_lr: float = 4e-3
    checkpoint_every: int = 200


ADAPTERS: dict[Task, dict[str, Any]] = {
    "sql": {
        "r": 12,
        "lora_alpha": 24,
        "use_dora": True,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
    },
    "cypher": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]},
    "json": {
        "r": 16,
        "lora_alpha": 16,
        "use_rslora": True,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    },
}


def new_base_model(recipe: Recipe, vocab_size: int, eos_token_id: int, pad_token_id: int) -> Qwen3ForCausalLM:
    torch.manual_seed(recipe.seed)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.hidden_size * 8 // 3,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.hidden_size // 32,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def drawer(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, stage: str, tasks: tuple[Task, ...], share: float | None
) -> Callable[[int], list[Batch]]:
    def draw(step: int) -> list[Batch]:
        rng = Random(f"{recipe.seed}/{stage}/{step}")
        trees = [
            draw_tree(tokenizer, rng, tasks[number % len(tasks)], recipe.tree_size, share)
            for number in range(recipe.trees)
        ]
        trees.sort(key=len)
        quarter = max(1, len(trees) // 4)
        return [collate(trees[at : at + quarter], recipe.prompt_weight) for at in range(0, len(trees), quarter)]

    return draw


def train_base(
    recipe: Recipe, work: Path, tokenizer: PreTrainedTokenizerFast, device: str, say: Callable[[str], None]
) -> Path:
    """Train the base model unless it is there already, and return its directory."""
    final = work / BASE_NAME
    if (final / "model.safetensors").is_file():
        return final
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    model = new_base_model(recipe, len(tokenizer), eos, pad)
    model.to(torch.device(device))  # type: ignore[arg-type]  # transformers wraps `to` without its overloads
    model.set_attn_implementation("float32_sdpa")
    matrices = [value for name, value in model.named_parameters() if value.ndim == 2 and "embed" not in name]
    others = [value for name, value in model.named_parameters() if value.ndim != 2 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=recipe.muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=recipe.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    checkpoint = Checkpoint(work / "base.checkpoint", model, optimizers)
    draw = drawer(recipe, tokenizer, "base", TASKS, recipe.instructed_share)
    train(model, optimizers, draw, recipe.base_steps, checkpoint, recipe.checkpoint_every, say)
    fresh = work / f"{BASE_NAME}.tmp"
    shutil.rmtree(fresh, ignore_errors=True)
    model.set_attn_implementation("sdpa")
    model.to(torch.device("cpu"))  # type: ignore[arg-type]  # likewise
    model.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    fresh.replace(final)
    return final


def train_adapter(recipe: Recipe, work: Path, base: Path, task: Task, device: str, say: Callable[[str], None]) -> Path:
    """Train one task's adapter unless it is there already, and return its directory."""
    final = work / f"adapter-{task}"
    if (final / "adapter_model.safetensors").is_file():
        return final
    torch.manual_seed(recipe.seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    model = Qwen3ForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.to(torch.device(device))  # type: ignore[arg-type]  # likewise
    model.set_attn_implementation("float32_sdpa")
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **ADAPTERS[task]))
    trainable = [value for value in adapted.parameters() if value.requires_grad]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(trainable, lr=recipe.adapter_lr, weight_decay=0.0)]
    checkpoint = Checkpoint(work / f"adapter-{task}.checkpoint", adapted, optimizers)
    draw = drawer(recipe, tokenizer, f"adapter-{task}", (task,), None)
    train(adapted, optimizers, draw, recipe.adapter_steps, checkpoint, recipe.checkpoint_every, say)
    fresh = work / f"adapter-{task}.tmp"
    shutil.rmtree(fresh, ignore_errors=True)
    adapted.save_pretrained(str(fresh))
    tokenizer.save_pretrained(fresh)
    fresh.replace(final)
    return final


def describe(recipe: Recipe, scores: list[Score], packages: dict[Task, Path], seconds: float) -> dict[str, Any]:
    """What `artifacts.json` says: how everything was made, and what it scores."""
    return {
        "recipe": asdict(recipe),
        "adapters": ADAPTERS,
        "made_with": {name: version(name) for name in ("torch", "transformers", "peft", "tokenizers")},
        "seconds": round(seconds),
        "packages": {
            task: {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            for task, path in packages.items()
        },
        "scores": [asdict(score) for score in scores],
    }


def claim(path: Path, recipe: Recipe) -> None:
    """Write down what a work folder is made with, or refuse one that was made with other numbers.

    Raises:
        ConfigError: The folder's recipe is another one; its finished stages would pass for this one's.
    """
    mine = {"recipe": asdict(recipe), "adapters": ADAPTERS}
    if not path.is_file():
        path.write_text(json.dumps(mine, indent=2))
        return
    if json.loads(path.read_text()) != mine:
        raise ConfigError(
            f"{path.parent} holds stages of another recipe", hint="Name another --work folder, or delete this one."
        )


def main(
    work: Annotated[Path, typer.Option(help="Where stages and checkpoints are kept.")] = Path("build/demo"),
    device: Annotated[str, typer.Option(help="Where to train: cpu or cuda.")] = "cpu",
    base_steps: Annotated[int, typer.Option(help="Optimizer steps of the base.")] = Recipe.base_steps,
    adapter_steps: Annotated[int, typer.Option(help="Optimizer steps of each adapter.")] = Recipe.adapter_steps,
) -> None:
    """Train the demo base model and its three experts, pack them and score them.

    Run it again to continue where it stopped. The results lie in WORK/artifacts; copy them over
    pipeline/demo/artifacts to use them.
    """
    recipe = Recipe(base_steps=base_steps, adapter_steps=adapter_steps)
    artifacts = work / "artifacts"
    artifacts.mkdir(parents=True, exist_ok=True)
    claim(work / "recipe.json", recipe)
    clock = work / "seconds.json"
    before = json.loads(clock.read_text()) if clock.is_file() else 0.0
    started = time.monotonic()

    def say(line: str) -> None:
        seconds = before + time.monotonic() - started
        clock.write_text(json.dumps(seconds))
        typer.echo(f"{seconds:7.0f} s  {line}")

    base = train_base(recipe, work, build_tokenizer(recipe.seed), device, say)
    packages: dict[Task, Path] = {}
    for task in TASKS:
        adapter = train_adapter(recipe, work, base, task, device, say)
        packages[task] = pack_expert(task, adapter, ADAPTERS[task], base, artifacts)
    scores = evaluate(packages, base, EVALUATED_QUESTIONS, say)
    shutil.copytree(base, artifacts / BASE_NAME, dirs_exist_ok=True)
    report = describe(recipe, scores, packages, before + time.monotonic() - started)
    (artifacts / "artifacts.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
