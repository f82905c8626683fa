"""Quantised weights beside unquantised ones: what they answer right, how fast, and in how much memory.

python -m benchmarks.quantization --accuracy --questions 500
python -m benchmarks.quantization --speed --workload single,shared-schema --rows 32 --json out.json
python -m benchmarks.quantization --products
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.experts import make_experts
from benchmarks.machine import describe, one_line
from benchmarks.measure import measure
from benchmarks.models import SHAPES, make_model
from benchmarks.registry import Peer
from benchmarks.report import rows_of, write_json
from benchmarks.workloads import make_workload

KINDS = (None, "int8", "int4")
PRODUCT_ROWS = (1, 8, 64, 512)
INPUTS, OUTPUTS = 1024, 3072  # of the products: the feed-forward ones of the 0.6B shape
COLD_BYTES = 128 << 20  # read in turn, so that no cache holds what comes next


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the arguments ask for; 0 if all was measured, 1 if a run failed."""
    console = Console(width=150)
    options = _parser().parse_args(arguments)
    machine = describe()
    console.print(one_line(machine), highlight=False)
    report: dict[str, Any] = {"machine": machine, "dtype": options.dtype}
    failed = False
    if options.products:
        report["products"] = measure_products(options.dtype)
        _print("milliseconds of a product of 1024 by 3072", report["products"], console)
    if options.accuracy:
        report["accuracy"] = measure_accuracy(options.questions, options.dtype)
        _print(f"share of {options.questions} held-out questions a task answered exactly", report["accuracy"], console)
    if options.speed:
        report["speed"] = {}
        for name in options.workload.split(","):
            rows = measure_speed(name, options.rows, options.model, options.dtype, options.repeat)
            report["speed"][name] = rows
            _print(f"{name}: {options.model}, {options.dtype}", rows, console)
            failed |= any("error" in row for row in rows)
    if options.json:
        write_json(options.json, report)
    return int(failed)


def measure_accuracy(questions: int, dtype: str) -> list[dict[str, Any]]:
    """The share of the demo's held-out questions that its experts answer exactly, mixed over one base and merged.

    Args:
        questions: How many a task.
        dtype: `"bfloat16"` or `"float32"`.
    """
    from pipeline import demo
    from pipeline.demo.questions import draw_questions
    from pipeline.demo.scoring import exact_match, execution_match
    from pipeline.demo.tasks import DIALECTS
    from pipeline.engine.runtime import load_expert, load_experts
    from pipeline.engine.types import Engine
    from pipeline.package import ExpertPackage, open_package

    asked = {task: list(draw_questions(task, questions, seed=7)) for task in demo.TASKS}
    packages: dict[str, ExpertPackage] = {task: open_package(demo.package(task)) for task in demo.TASKS}
    rows = []
    for kind in KINDS:
        shared: dict[str, Any] = {"device": "cpu", "dtype": dtype, "quantization": kind, "kv_cache_bytes": 1 << 29}
        mixed = load_experts(packages, demo.BASE_MODEL, **shared)
        for form in ("mixed", "merged"):
            row: dict[str, Any] = {"weights": kind or dtype, "experts": form}
            for task in demo.TASKS:
                engine: Engine = mixed.engine
                builder = mixed.requests[task]
                if form == "merged":
                    alone = load_expert(packages[task], demo.BASE_MODEL, **shared)
                    engine, builder = alone.engine, alone.requests
                requests = [
                    builder.build(one.id, prompt=one.prompt, schema=one.schema, dialect=DIALECTS[task] or "")
                    for one in asked[task]
                ]
                texts = {answer.request_id: answer.text for answer in engine.generate(requests)}
                row[task] = sum(exact_match(texts[one.id], one.expected) for one in asked[task]) / questions
                if task == "sql":
                    executed = [execution_match(one.schema, texts[one.id], one.expected) for one in asked[task]]
                    row["sql executed"] = sum(executed) / questions
                if form == "merged":
                    engine.close()
            rows.append(row)
        mixed.engine.close()
    return rows


def measure_speed(name: str, num_rows: int | None, model: str, dtype: str, repeat: int) -> list[dict[str, Any]]:
    """Seconds and memory of a workload of `benchmarks.workloads`, each kind of weights in a process of its own.

    Args:
        name: The workload.
        num_rows: How many rows; None for as many as it is defined with.
        model: One of `SHAPES`.
        dtype: Of what is not quantised.
        repeat: How often each is run; the fastest counts.
    """
    path = make_model(model)
    workload = make_workload(name, rows=num_rows, vocab_size=SHAPES[model]["vocab_size"])
    experts = make_experts(path, 1 + max(row.expert or 0 for row in workload.rows)) if workload.num_experts else []
    rows: list[dict[str, Any]] = []
    for kind in KINDS:
        peer = Peer("ours", "packed", {"engine": "packed", "quantization": kind}, takes_experts=True)
        runs = [measure(kind or dtype, peer, workload, model=path, dtype=dtype, experts=experts) for _ in range(repeat)]
        best = min((run for run in runs if run.error is None), key=lambda run: run.seconds, default=runs[0])
        (row,) = rows_of([best])
        if "error" not in row:
            row["times"] = rows[0]["seconds"] / row["seconds"] if rows and "seconds" in rows[0] else 1.0
        rows.append(row)
    return rows


def measure_products(dtype: str) -> list[dict[str, Any]]:
    """Milliseconds of one product with cold weights, and how far it is from the unquantised one.

    Args:
        dtype: Of the inputs and of the plain weight.
    """
    import torch
    from torch import nn

    from pipeline.engine.linear import Int4Linear, Int8Linear, Int8WeightLinear, PackedLinear, can_pack
    from pipeline.engine.quantization import has_int8_products

    kind: torch.dtype = getattr(torch, dtype)
    torch.manual_seed(0)
    linear = nn.Linear(INPUTS, OUTPUTS, bias=False).to(kind).requires_grad_(False)
    number = COLD_BYTES // linear.weight.nbytes
    forms: dict[str, Callable[[], nn.Module]] = {dtype: lambda: PackedLinear(linear)}
    if kind != torch.bfloat16 or not can_pack():
        forms[dtype] = lambda: _copy(linear)
    if has_int8_products():
        forms["int8"] = lambda: Int8Linear(linear)
    forms |= {
        "int8 weights alone": lambda: Int8WeightLinear(linear),
        "int4, groups of 32": lambda: Int4Linear(linear, 32),
        "int4, groups of 64": lambda: Int4Linear(linear, 64),
    }
    rows = []
    for name, make in forms.items():
        row: dict[str, Any] = {"weights": name}
        modules = [make() for _ in range(number)]
        with torch.inference_mode():
            for num_rows in PRODUCT_ROWS:
                hidden = torch.randn(num_rows, INPUTS, dtype=kind)
                used = modules if num_rows < PRODUCT_ROWS[-1] else modules[:4]
                row[f"{num_rows} rows"] = _milliseconds(used, hidden)
            wanted = hidden.float() @ linear.weight.float().T
            row["distance"] = float((modules[0](hidden).float() - wanted).norm() / wanted.norm())
        rows.append(row)
    return rows


def _copy(linear: Any) -> Any:
    import copy

    return copy.deepcopy(linear)


def _milliseconds(modules: Sequence[Callable[[Any], Any]], hidden: Any) -> float:
    modules[0](hidden)
    times = []
    for _ in range(3):
        before = time.perf_counter()
        for module in modules:
            module(hidden)
        times.append((time.perf_counter() - before) / len(modules))
    return 1e3 * statistics.median(times)


def _print(title: str, rows: Sequence[dict[str, Any]], console: Console) -> None:
    table = Table(title=title, title_justify="left")
    names = [name for name in rows[0] if name not in {"same_answers", "total_tokens_per_second", "cpu_seconds"}]
    for name in names:
        table.add_column(name.replace("_", " "))
    for row in rows:
        values = [row.get(name, "failed") for name in names]
        table.add_row(*(f"{value:,.3f}" if isinstance(value, float) else str(value) for value in values))
    console.print(table)
    for row in rows:
        if "error" in row:
            console.print(f"{row['peer']}: {row['error']}", markup=False, highlight=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantization", description="Compare kinds of weights.")
    parser.add_argument("--products", action="store_true", help="single products")
    parser.add_argument("--accuracy", action="store_true", help="the demo's experts on held-out questions")
    parser.add_argument("--speed", action="store_true", help="whole workloads")
    parser.add_argument("--questions", type=int, default=500, help="a task")
    parser.add_argument("--workload", default="single,shared-schema,unique-prompts", help="with commas")
    parser.add_argument("--rows", type=int, help="of a workload; left out: as many as it is defined with")
    parser.add_argument("--repeat", type=int, default=1, help="run each so often and take its fastest run")
    parser.add_argument("--model", default="qwen3-0.6b", choices=SHAPES)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--json", type=Path, help="write the measurements and the machine here")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
