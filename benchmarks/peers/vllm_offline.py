"""vLLM's offline `LLM`, in an interpreter that has it.

Options: `prefix_caching` (on by default), `compile` (on by default), `kv_cache_gib`.
"""

from collections.abc import Sequence
from typing import Any

from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

from benchmarks.peers.work import Answers, Run, main


def load(job: dict[str, Any]) -> Run:
    """The engine with room for the longest row and no tokenizer; compiled before the first token."""
    options = job["options"]
    llm = LLM(
        model=job["model"],
        dtype=job["dtype"],
        skip_tokenizer_init=True,
        max_model_len=max(len(row["prompt"]) + row["max_tokens"] for row in [*job["rows"], *job["warmup"]]),
        enable_prefix_caching=options.get("prefix_caching", True),
        enforce_eager=not options.get("compile", True),
    )

    def run(rows: Sequence[dict[str, Any]]) -> Answers:
        params = [
            SamplingParams(temperature=0.0, max_tokens=row["max_tokens"], ignore_eos=True, detokenize=False)
            for row in rows
        ]
        prompts = [{"prompt_token_ids": row["prompt"]} for row in rows]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return {row["id"]: list(output.outputs[0].token_ids) for row, output in zip(rows, outputs, strict=True)}

    return run


if __name__ == "__main__":
    main(load)
