"""What a row costs its worker's process before the engine has it: prepared there, or received from a task beside it.

    python -m benchmarks.prepare                     # the demo's questions, and long prompts of many lengths

Both hold Python's lock, which the engine's steps wait for. No engine is loaded. Reading the row, its answer and the
part are the same both ways, and not counted; see docs/scaling.md for those.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe, one_line
from pipeline import demo
from pipeline.batch.config import BatchConfig
from pipeline.batch.execute import engine_job
from pipeline.batch.plan import open_experts, prepare
from pipeline.batch.prepared import prepared_bytes, read_prepared
from pipeline.batch.row_answers import RowAnswers
from pipeline.batch.rows import Row, iter_rows
from pipeline.batch.source import read_shard
from pipeline.demo.questions import draw_questions
from pipeline.engine.loader import load_tokenizer
from pipeline.engine.requests import RequestBuilder
from pipeline.package import open_package

ANY_CONTEXT = 1 << 20


def workloads(rows: int) -> dict[str, list[dict[str, str]]]:
    """Rows by the name of what they are: questions that share schemas, and prompts that share nothing."""
    drawn = [{"prompt": one.prompt, "schema": one.schema} for one in draw_questions("sql", rows)]
    text = " ".join(f"{one['prompt']} {one['schema']}" for one in drawn)
    long = {
        f"long prompts of {size:,} characters": [{"prompt": f"{at} {text[at : at + size]}"} for at in range(rows)]
        for size in (1_000, 8_000)
    }
    return {"the demo's questions": drawn} | long


def measure(rows: Sequence[dict[str, str]], folder: Path) -> dict[str, float]:
    """Seconds a row of each way, and bytes that travel."""
    pq.write_table(pa.Table.from_pylist(list(rows)), folder / "in.parquet")
    config = BatchConfig.from_options(
        dataset=str(folder / "in.parquet"),
        expert=demo.package("sql"),
        base_model=demo.BASE_MODEL,
        output=folder / "out",
        shard_rows=len(rows),
    )
    job = prepare(config, open_experts(config))
    told, package = engine_job(job, num_threads=1), open_package(demo.package("sql"))
    tokenizer = load_tokenizer(package, Path(demo.BASE_MODEL))
    builder = RequestBuilder(package, tokenizer, ANY_CONTEXT, told.experts[0].options)
    form = RowAnswers(told, {None: builder}, job.part_format)
    shard = job.plan.shards[0]
    read = list(iter_rows(shard, read_shard(shard)))
    data = prepared_bytes([form.prepare(row) for row in read])
    if [form.prepare(row) for row in read] != read_prepared(data):
        raise RuntimeError("what is received is not what was prepared")
    lengths = [len(row.prompt.token_ids) for row in read_prepared(data) if row.prompt is not None]
    return {
        "tokens": sum(lengths) / len(lengths),
        "prepared_us": _microseconds(lambda: _prepare(form, read), len(read)),
        "received_us": _microseconds(lambda: _receive(form, read, data), len(read)),
        "task_us": _microseconds(lambda: prepared_bytes([form.prepare(row) for row in read]), len(read)),
        "bytes": len(data) / len(read),
    }


def _prepare(form: RowAnswers, rows: Sequence[Row]) -> None:
    for row in rows:
        form.ask(row.identity, row, form.prepare(row))


def _receive(form: RowAnswers, rows: Sequence[Row], data: bytes) -> None:
    for row, prepared in zip(rows, read_prepared(data), strict=True):
        form.ask(row.identity, row, prepared)


def _microseconds(work: Callable[[], object], num_rows: int, repeat: int = 7) -> float:
    """A row's share of the fastest run."""
    seconds = []
    for _ in range(repeat):
        begun = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begun)
    return min(seconds) / num_rows * 1e6


def main(
    rows: Annotated[int, typer.Option(help="Rows of each workload.")] = 512,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """Measure, and print a table."""
    found: dict[str, Any] = {}
    for name, asked in workloads(rows).items():
        with TemporaryDirectory() as folder:
            found[name] = measure(asked, Path(folder))
    machine = describe()
    table = Table(title="microseconds a row")
    titles = ("rows", "tokens", "prepared in the worker", "received", "in the task", "bytes that travel")
    for title in titles:
        table.add_column(title, justify="right")
    for name, one in found.items():
        table.add_row(name, *(f"{value:,.0f}" for value in one.values()))
    console = Console(width=140)
    console.print(f"[bold]{one_line(machine)}[/bold]", highlight=False)
    console.print(table)
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps({"machine": machine, "microseconds": found}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
