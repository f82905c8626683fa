"""This project's engines, through the seam that everything else uses.

Options: `engine` (`packed` or `padded`); `hint`, the prefix length told instead of the true one; `merge`, which merges
the only expert into the model instead of holding it beside others; `bank`, false for an engine that can hold none;
`quantization`, of the weights; `triton`, false for torch's operations on a GPU.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.work import Answers, Run, main
from pipeline.engine.loader import load_base_model, load_tokenizer
from pipeline.engine.packed import PackedEngine
from pipeline.engine.runtime import load_engine, load_expert
from pipeline.engine.types import Engine, Request, SamplingParams
from pipeline.package import open_package


def load(job: dict[str, Any]) -> Run:
    """The engine with all the job's experts."""
    options = job["options"]
    base = Path(job["model"])
    quantization = options.get("quantization")
    packages = {f"expert-{at}": open_package(Path(f"{path}.expert")) for at, path in enumerate(job["experts"])}
    engine: Engine
    if options.get("merge"):
        (package,) = packages.values()
        engine = load_expert(
            package, base, engine=options["engine"], dtype=job["dtype"], quantization=quantization
        ).engine
    elif options.get("bank", True):
        engine = load_engine(
            base,
            packages,
            engine=options["engine"],
            dtype=job["dtype"],
            quantization=quantization,
            use_triton=options.get("triton"),
        )
    else:
        engine = PackedEngine(load_base_model(base, dtype=job["dtype"]), load_tokenizer(None, base))
    hint = options.get("hint")

    def run(rows: Sequence[dict[str, Any]]) -> Answers:
        requests = [
            Request(
                row["id"],
                tuple(row["prompt"]),
                SamplingParams(max_tokens=row["max_tokens"], ignore_eos=True),
                expert=None if row["expert"] is None or options.get("merge") else f"expert-{row['expert']}",
                prefix_length=row["prefix_length"] if hint is None else hint,
            )
            for row in rows
        ]
        answers: Answers = {}
        for completion in engine.generate(requests):
            if completion.failure is not None:
                raise RuntimeError(f"row {completion.request_id}: {completion.failure.message}")
            answers[completion.request_id] = list(completion.token_ids)
        return answers

    return run


if __name__ == "__main__":
    main(load)
