"""What a batch job costs besides its model, at any size: planning, resuming, running with an engine that only echoes.

    python -m benchmarks.scale                                  # plan and resume 100 million rows in 100,000 shards
    python -m benchmarks.scale --jobs 10000,100000,1000000      # and run jobs of so many rows
    python -m benchmarks.scale --jobs 10000 --shard-rows 1      # the cost of a shard

Each measurement is made in a process of its own, so that its memory is its own. See docs/scaling.md.
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

_MEASURE = "benchmarks.scale_measure"


def main(
    files: Annotated[int, typer.Option(help="Files of the dataset that is planned.")] = 10_000,
    shards: Annotated[int, typer.Option(help="Shards of the job that is resumed.")] = 100_000,
    jobs: Annotated[str, typer.Option(help="Rows of the jobs that are run, separated by commas.")] = "",
    shard_rows: Annotated[int, typer.Option(help="Rows in a shard.")] = 1000,
    workers: Annotated[int, typer.Option(help="Workers of the jobs that are run.")] = 1,
    folder: Annotated[Path, typer.Option(help="Where files are made; kept for the next time.")] = Path("build/scale"),
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
    skip_plan: Annotated[bool, typer.Option(help="Only run jobs.")] = False,
) -> None:
    """Measure, print a table, and say which of the aims are missed."""
    results: list[dict[str, Any]] = []
    if not skip_plan:
        results.append(_measure("plan", folder=folder, files=files, shard_rows=shard_rows))
        results.extend(_measure("resume", folder=folder, shards=shards, packed=packed) for packed in (True, False))
    results.extend(
        _measure("job", folder=folder, rows=int(text), shard_rows=shard_rows, workers=workers)
        for text in jobs.split(",")
        if text.strip()
    )
    machine = describe()
    _show(results, one_line(machine))
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


def _measure(what: str, **options: Any) -> dict[str, Any]:
    told = {name: str(value.absolute()) if isinstance(value, Path) else value for name, value in options.items()}
    command = [sys.executable, "-m", _MEASURE, what, json.dumps(told)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603 - our own module
    if done.returncode != 0:
        return {"what": what, **told, "error": f"ended with {done.returncode}"}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    Console(stderr=True, soft_wrap=True).print(f"{what}: {result}", highlight=False)
    return result


def _show(results: list[dict[str, Any]], machine: str) -> None:
    console = Console(width=160)
    console.print(f"[bold]{machine}[/bold]", highlight=False)
    for what, columns in _COLUMNS.items():
        rows = [result for result in results if result["what"] == what]
        if not rows:
            continue
        table = Table(title=what, title_justify="left")
        for column in columns:
            table.add_column(column.replace("_", " "), justify="right")
        for row in rows:
            if "error" in row:
                table.add_row(row["error"])
            else:
                table.add_row(*(text_of(row[column]) for column in columns))
        console.print(table)


_COLUMNS = {
    "plan": ("rows", "files", "shards", "seconds", "memory_before_mib", "memory_peak_mib"),
    "resume": ("shards", "packed", "seconds", "memory_before_mib", "memory_peak_mib", "finish_seconds"),
    "job": (
        *("rows", "shards", "workers", "first_row_seconds", "run_seconds", "rows_per_second", "ms_per_shard"),
        *("cpu_ms_per_shard", "driver_cpu_ms_per_shard"),
        *("finish_seconds", "memory_before_mib", "memory_half_mib", "memory_peak_mib"),
    ),
}


def text_of(value: Any) -> str:
    """A figure as a table shows it."""
    if isinstance(value, float):
        return f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


if __name__ == "__main__":
    typer.run(main)
