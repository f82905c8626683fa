"""A batch job as Ray runs it: `ray job submit --working-dir . -- python jobs/batch.py --config FILE [key=value ...]`.

It joins the cluster it is submitted to; run by hand, it joins a running cluster or starts one on this machine. The exit
code is 0 only when the job is committed.
"""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli import run_job


def main(
    config: Annotated[Path, typer.Option(help="A YAML file; configs/batch.yaml shows every key.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys to override.")] = None,
) -> None:
    """Run a batch job, or continue it."""
    run_job(config, overrides or [])


if __name__ == "__main__":
    typer.run(main)
