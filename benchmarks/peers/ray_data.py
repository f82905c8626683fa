"""Ray Data as its examples have it: a callable with stock `generate`, batches of 16, left-padded, in an actor."""

import shutil
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import ray

BATCH_SIZE = 16
MAX_TOKENS = 64


class ThirtyLines:
    """Answers batches of tokenised prompts.

    Args:
        base: The base model's directory.
        adapter: The adapter's, which is merged into it.
    """

    def __init__(self, base: str, adapter: str) -> None:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        self._model = PeftModel.from_pretrained(model, adapter).merge_and_unload().eval()
        self._torch = torch

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Answer a batch; `tokens` are the answers, `began` is when it was begun."""
        began, torch = time.time(), self._torch
        prompts = [list(prompt) for prompt in batch["tokens"]]
        longest = max(map(len, prompts))
        pad = [longest - len(prompt) for prompt in prompts]
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=torch.tensor([[0] * num + prompt for num, prompt in zip(pad, prompts, strict=True)]),
                attention_mask=torch.tensor([[0] * num + [1] * (longest - num) for num in pad]),
                max_new_tokens=MAX_TOKENS,
                do_sample=False,
            )
        return {
            "expected": batch["expected"],
            "tokens": [row[longest:] for row in output.tolist()],
            "began": [began] * len(prompts),
        }


def answer_all(dataset: Path, output: Path, base: Path, adapter: Path) -> dict[str, list[Any]]:
    """Read, answer, write, and read what was written: `tokens`, `expected` and `began` of each row."""
    shutil.rmtree(output, ignore_errors=True)
    ray.data.read_parquet(str(dataset)).map_batches(
        ThirtyLines,
        fn_constructor_args=(str(base), str(adapter)),
        batch_size=BATCH_SIZE,
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=1,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(int(ray.cluster_resources()["CPU"]))}},
    ).write_parquet(str(output))
    answered: dict[str, list[Any]] = pq.read_table(output).to_pydict()
    return answered
