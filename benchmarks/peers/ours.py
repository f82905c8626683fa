"""This project's engines, through the seam that everything else uses.

Options: `engine` (`packed` or `padded`); `hint`, the prefix length told instead of the true one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.work import Answers, Run, main
from pipeline.engine.runtime import load_engine
from pipeline.engine.types import Request, SamplingParams
from pipeline.package import open_package


def load(job: dict[str, Any]) -> Run:
    """The engine with all the job's experts."""
    options = job["options"]
    packages = {f"expert-{at}": open_package(Path(path)) for at, path in enumerate(job["experts"])}
    engine = load_engine(Path(job["model"]), packages, engine=options["engine"], dtype=job["dtype"])
    hint = options.get("hint")

    def run(rows: Sequence[dict[str, Any]]) -> Answers:
        requests = [
            Request(
                row["id"],
                tuple(row["prompt"]),
                SamplingParams(max_tokens=row["max_tokens"], ignore_eos=True),
                expert=None if row["expert"] is None else f"expert-{row['expert']}",
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
