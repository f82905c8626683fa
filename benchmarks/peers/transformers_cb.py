"""transformers' own continuous batching, with its defaults and its prefix sharing.

`generate_batch` gives every row the same length, so that rows are handed to its manager one by one, which is told each
row's own. As `generate_batch` does, they are sorted by their tokens, so that prefixes meet.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from benchmarks.peers.work import Answers, Run, main

MAX_ROWS = 64
MAX_BATCH_TOKENS = 1024


def load(job: dict[str, Any]) -> Run:
    """The model, with a cache that holds 64 of the longest rows at once: on a CPU nothing is inferred."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"])).eval().to(device)
    longest = max(len(row["prompt"]) + row["max_tokens"] for row in [*job["rows"], *job["warmup"]])
    page_size = 64
    config = ContinuousBatchingConfig(
        page_size=page_size,
        num_blocks=MAX_ROWS * -(-longest // page_size),
        max_batch_tokens=MAX_BATCH_TOKENS,
        max_requests_per_batch=MAX_ROWS,
    )
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)

    def run(rows: Sequence[dict[str, Any]]) -> Answers:
        answers: Answers = {}
        with model.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=config
        ) as manager:
            for row in sorted(rows, key=lambda row: row["prompt"], reverse=True):
                manager.add_request(row["prompt"], request_id=row["id"], max_new_tokens=row["max_tokens"])
            while len(answers) < len(rows):
                result = manager.get_result(timeout=1)
                if result is None and not manager.is_running():
                    raise RuntimeError("its generation thread ended")
                if result is not None and result.error is not None:
                    raise RuntimeError(f"row {result.request_id}: {result.error}")
                if result is not None and result.is_finished():
                    answers[result.request_id] = list(result.generated_tokens)
        return answers

    return run


if __name__ == "__main__":
    main(load)
