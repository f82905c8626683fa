"""A batch job and its scores as Ray runs it: `ray job submit --working-dir . -- python jobs/evaluate.py --config FILE`.

It runs or continues the job of the file, compares its answers with the dataset's column of right ones, and prints a
table by expert. The exit code is 0 only when the job is committed.
"""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli import evaluate_job


def main(
    config: Annotated[Path, typer.Option(help="A YAML file; columns.expected names the right answers.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys to override.")] = None,
    samples: Annotated[int, typer.Option(help="Show so many wrong answers of each expert.", min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
) -> None:
    """Run a batch job, or continue it, and print how many answers are right, by expert."""
    evaluate_job(config, overrides or [], samples=samples, as_json=as_json)


if __name__ == "__main__":
    typer.run(main)
