"""The training loop of the demo models: loss, schedule, checkpoints."""

import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AttentionInterface

from pipeline.demo.corpus import Batch


def float32_attention(
    _: nn.Module,
    query: torch.Tensor,  # [batch, heads, length, head_dim]
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **__: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot product attention in float32 under autocast: its bfloat16 backward is twice as slow on a CPU."""
    with torch.autocast(query.device.type, enabled=False):
        mixed = nn.functional.scaled_dot_product_attention(
            query.float(), key.float(), value.float(), attn_mask=attention_mask, enable_gqa=True
        )
    return mixed.transpose(1, 2).contiguous(), None


AttentionInterface.register("float32_sdpa", float32_attention)


def answer_loss(model: nn.Module, batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted cross entropy, and the share of answer tokens predicted right."""
    wanted = batch.weight.to(device)
    chosen = wanted > 0
    core: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    with torch.autocast(device.type, torch.bfloat16):
        hidden = core.model(
            input_ids=batch.input_ids.to(device),
            position_ids=batch.position_ids.to(device),
            attention_mask=batch.mask.to(device),
            use_cache=False,
        ).last_hidden_state
        logits = core.lm_head(hidden[chosen]).float()  # [chosen, vocab]
    targets, weight = batch.targets.to(device)[chosen], wanted[chosen]
    loss = (nn.functional.cross_entropy(logits, targets, reduction="none") * weight).sum() / weight.sum()
    is_answer = weight == 1
    return loss, (logits.argmax(-1) == targets)[is_answer].float().mean()


def schedule(step: int, steps: int, warmup: int = 100) -> float:
    """Warm-up, a plateau for half of the steps, then a cosine down to 2 %."""
    done = step / steps
    decay = 1.0 if done < 0.5 else 0.02 + 0.49 * (1 + math.cos(math.pi * (done - 0.5) / 0.5))
    return min(1.0, (step + 1) / warmup) * decay


class Checkpoint:
    """The state of a stage on disk: parameters and optimizer tensors as safetensors, written whole or not at all."""

    def __init__(self, folder: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
        self.folder, self.optimizers = folder, optimizers
        self.parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}

    def save(self, step: int) -> None:
        fresh = self.folder.with_suffix(".tmp")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        save_file(
            {name: value.detach().clone() for name, value in self.parameters.items()}, fresh / "model.safetensors"
        )
        moments = {
            f"{number}.{index}.{key}": value.clone()
            for number, optimizer in enumerate(self.optimizers)
            for index, state in optimizer.state_dict()["state"].items()
            for key, value in state.items()
        }
        save_file(moments, fresh / "optimizer.safetensors")
        (fresh / "state.json").write_text(json.dumps({"step": step}))
        shutil.rmtree(self.folder, ignore_errors=True)
        fresh.rename(self.folder)

    def restore(self) -> int:
        """Load what was saved and return the next step to run."""
        if not (self.folder / "state.json").is_file():
            return 0
        saved = load_file(self.folder / "model.safetensors")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(saved[name])
        states: list[dict[int, dict[str, torch.Tensor]]] = [{} for _ in self.optimizers]
        for name, value in load_file(self.folder / "optimizer.safetensors").items():
            number, index, key = name.split(".")
            states[int(number)].setdefault(int(index), {})[key] = value
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return int(json.loads((self.folder / "state.json").read_text())["step"])


def train(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    draw: Callable[[int], list[Batch]],
    steps: int,
    checkpoint: Checkpoint,
    every: int,
    say: Callable[[str], None],
) -> float:
    """Run one stage to its end and return its answer-token accuracy over the last steps."""
    device = next(model.parameters()).device
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    first = checkpoint.restore()
    started, tokens, accuracy = time.monotonic(), 0, 0.0
    model.train()
    for step in range(first, steps):
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group, lr in zip(optimizer.param_groups, peak, strict=True):
                group["lr"] = lr * schedule(step, steps)
        batches = draw(step)
        total, right = 0.0, 0.0
        for batch in batches:
            loss, correct = answer_loss(model, batch, device)
            (loss / len(batches)).backward()
            total, right = total + loss.item() / len(batches), right + correct.item() / len(batches)
            tokens += batch.input_ids.numel()
        nn.utils.clip_grad_norm_([value for value in model.parameters() if value.requires_grad], 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        accuracy = right if step == first else 0.95 * accuracy + 0.05 * right
        if step % 25 == 0 or step == steps - 1:
            rate = tokens / (time.monotonic() - started)
            say(f"step {step}/{steps}  loss {total:.4f}  answer tokens {accuracy:.2%}  {rate:,.0f} tokens/s")
        if (step + 1) % every == 0:
            checkpoint.save(step + 1)
    return accuracy
