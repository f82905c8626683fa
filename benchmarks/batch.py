"""The batch job beside its own engine alone, Ray Data with the thirty lines that everybody writes first, and Ray Data's
own LLM processor with vLLM.

    python -m benchmarks.batch --rows 4000                       # job, engine, ray-data, one after another
    python -m benchmarks.batch --rows 4000 --peers job,engine    # what the job adds to its engine
    python -m benchmarks.batch --rows 4000 --peers job,ray-data-llm    # after make bench-peers

All answer the demo's questions with the demo's SQL expert, greedily and without a grammar, with all cores. Each peer
runs in a process of its own; starting (Ray, the worker, the model) is told apart from answering.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe, one_line
from benchmarks.scale import text_of

LLM = "ray-data-llm"
COLUMNS = ("peer", "rows", "start_seconds", "run_seconds", "rows_per_second", "cpu_seconds", "right")


def main(
    rows: Annotated[int, typer.Option(help="Questions to answer.")] = 4000,
    peers: Annotated[
        str, typer.Option(help="Of job, engine, ray-data and ray-data-llm, separated by commas.")
    ] = "engine,job,ray-data",
    python: Annotated[Path, typer.Option(help="The interpreter that has vLLM and Ray, for ray-data-llm.")] = Path(
        "build/peers/bin/python"
    ),
    repeat: Annotated[int, typer.Option(help="Run each peer so often, in turn; the best run counts.")] = 1,
    folder: Annotated[Path, typer.Option(help="Where files are made.")] = Path("build/batch"),
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """Measure, print a table, and say what the job adds to its engine."""
    runs = [
        _measure(peer, rows=rows, folder=str(folder.absolute()), **({"python": str(python)} if peer == LLM else {}))
        for _ in range(repeat)
        for peer in map(str.strip, peers.split(","))
    ]
    best: dict[str, dict[str, Any]] = {}
    for run in runs:
        name = run["peer"]
        if name not in best or run.get("run_seconds", float("inf")) < best[name].get("run_seconds", float("inf")):
            best[name] = run
    machine = describe()
    console = Console(width=140)
    console.print(f"[bold]{one_line(machine)}[/bold]", highlight=False)
    table = Table(title=f"{rows:,} questions of the demo")
    for column in COLUMNS:
        table.add_column(column.replace("_", " "), justify="right")
    for run in best.values():
        table.add_row(
            *(
                [run["peer"], run["error"]]
                if "error" in run
                else [text_of(run[name]) if name in run else "-" for name in COLUMNS]
            )
        )
    console.print(table)
    _compare(console, best)
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps({"machine": machine, "runs": runs}, indent=1) + "\n")


def _measure(peer: str, **options: Any) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.batch_measure", peer, json.dumps(options)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603 - our own module
    if done.returncode != 0:
        return {"peer": peer, "error": f"ended with {done.returncode}"}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    Console(stderr=True, soft_wrap=True).print(result, highlight=False)
    return result


def _compare(console: Console, best: dict[str, dict[str, Any]]) -> None:
    rates = {name: run["rows_per_second"] for name, run in best.items() if "rows_per_second" in run}
    if "job" not in rates:
        return
    for other in ("engine", "ray-data", LLM):
        if other in rates:
            console.print(f"the job answers {rates['job'] / rates[other]:.2f} times the rows of {other} a second")
    console.print(f"the first row was being answered {best['job']['start_seconds']:.1f} s after the job began")


if __name__ == "__main__":
    typer.run(main)
