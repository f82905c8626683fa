"""Staging as a Ray job: `ray job submit --working-dir . -- python jobs/stage.py --to STORE PACKAGE --base-model DIR`.

It puts packages and base models where every machine of the cluster finds them, and prints what names them in the
configuration of a batch job or a service. What is there already is not written again.
"""

import typer

from pipeline.cli_packages import stage

if __name__ == "__main__":
    typer.run(stage)
