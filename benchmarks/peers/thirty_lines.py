"""The thirty lines everybody writes first: stock `generate` over left-padded batches of 16.

Options: `sort` puts prompts of one length together; without it rows are answered in input order. Rows of experts are
answered expert by expert; the model is loaded anew for each, since merging changes it, and that is part of the time.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.peers.work import Answers, Run, main

BATCH_SIZE = 16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def load(job: dict[str, Any]) -> Run:
    """The model as a person loads it."""
    model = None if job["experts"] else load_model(job)

    def run(rows: Sequence[dict[str, Any]]) -> Answers:
        answers: Answers = {}
        for expert in dict.fromkeys(row["expert"] for row in rows):
            own = [row for row in rows if row["expert"] == expert]
            ordered = sorted(own, key=lambda row: len(row["prompt"])) if job["options"].get("sort") else own
            answering = model if model is not None else load_model(job, expert)
            for at in range(0, len(ordered), BATCH_SIZE):
                answers |= answer_batch(answering, ordered[at : at + BATCH_SIZE])
        return answers

    return run


def load_model(job: dict[str, Any], expert: int | None = None) -> Any:
    """The base model, with the expert of that number merged into it."""
    model: Any = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"]))
    if expert is not None:
        model = PeftModel.from_pretrained(model, job["experts"][expert]).merge_and_unload()
    return model.eval().to(DEVICE)


def answer_batch(model: Any, batch: Sequence[dict[str, Any]]) -> Answers:
    """Answer a batch until its longest answer is finished; what a row has beyond its own length is cut."""
    longest = max(len(row["prompt"]) for row in batch)
    pad = [longest - len(row["prompt"]) for row in batch]
    input_ids = torch.tensor([[0] * num + row["prompt"] for num, row in zip(pad, batch, strict=True)])
    mask = torch.tensor([[0] * num + [1] * (longest - num) for num in pad])
    with torch.inference_mode():
        output = model.generate(
            input_ids=input_ids.to(DEVICE),  # [rows, longest]
            attention_mask=mask.to(DEVICE),
            max_new_tokens=max(row["max_tokens"] for row in batch),
            do_sample=False,
        )
    return {
        row["id"]: tokens[longest : longest + row["max_tokens"]]
        for row, tokens in zip(batch, output.tolist(), strict=True)
    }


if __name__ == "__main__":
    main(load)
