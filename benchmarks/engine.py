"""Engines side by side: the same rows, one after another, each in a process of its own.

python -m benchmarks.engine --workload shared-schema --peers thirty-lines,sorted,packed
python -m benchmarks.engine --workload mixed-experts-30 --peers thirty-lines,packed-merged,packed
python -m benchmarks.engine --single --swap --profile
python -m benchmarks.engine --peer vllm=build/peers/bin/python --peers thirty-lines,vllm,packed --json out.json
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.experts import make_experts
from benchmarks.floor import TOKENS, measure_floor
from benchmarks.machine import describe, one_line
from benchmarks.measure import Measurement, measure, measure_profile, measure_swap
from benchmarks.models import SHAPES, make_model
from benchmarks.registry import PEERS
from benchmarks.report import print_profile, print_table, rows_of, write_json
from benchmarks.workloads import WORKLOADS, make_workload

DEFAULT_PEERS = "thirty-lines,sorted,transformers-cb,padded,packed"
SINGLE_PEERS = "thirty-lines,packed-no-bank,packed"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the arguments ask for; 0 if every peer was measured, 1 if one failed."""
    console = Console(width=150)
    options = _parser().parse_args(arguments)
    interpreters = dict(options.peer)
    peers = [name for name in (options.peers or DEFAULT_PEERS).split(",") if name]
    peers += [name for name in interpreters if name not in peers]
    unknown = [name for name in peers if name not in PEERS]
    if unknown:
        console.print(f"unknown: {', '.join(unknown)}; known: {', '.join(PEERS)}", markup=False)
        return 2
    model = make_model(options.model)
    machine = describe(interpreters)
    floor = measure_floor(options.dtype)
    console.print(
        f"floor: {floor.flops_per_second / 1e9:,.0f} GFLOP/s in products with {TOKENS} tokens, "
        f"{floor.bytes_per_second / 1e9:.1f} GB/s with one",
        highlight=False,
    )
    report: dict[str, Any] = {
        "machine": machine,
        "floor": asdict(floor),
        "model": options.model,
        "dtype": options.dtype,
        "workloads": [],
    }
    failed = False
    names = [name for name in (options.workload or "").split(",") if name] + ["single"] * options.single
    for name in names or ([] if options.swap or options.profile else ["shared-schema"]):
        workload = make_workload(name, rows=options.rows, vocab_size=SHAPES[options.model]["vocab_size"])
        experts = make_experts(model, 1 + max(row.expert or 0 for row in workload.rows)) if workload.num_experts else []
        measurements: list[Measurement] = []
        alone = name == "single" and options.peers is None
        for peer in SINGLE_PEERS.split(",") if alone else peers:
            for _ in range(options.repeat):
                console.print(f"{name}: {peer} ...", end=" ", highlight=False)
                one = measure(
                    peer,
                    PEERS[peer],
                    workload,
                    model=model,
                    dtype=options.dtype,
                    experts=experts,
                    interpreters=interpreters,
                )
                console.print(f"{one.seconds:.2f} s" if one.error is None else "failed", highlight=False)
                measurements.append(one)
        rows = rows_of(best_of(measurements))
        print_table(workload, rows, f"{options.model}, {options.dtype}; {one_line(machine)}", console)
        least = floor.seconds(options.model, workload)
        console.print(f"floor: {least:.2f} s\n", highlight=False)
        runs = [replace(one, answers=None).__dict__ for one in measurements]
        report["workloads"].append(
            {"name": name, "seed": workload.seed, "floor_seconds": least, "peers": rows, "runs": runs}
        )
        failed |= any(one.error is not None for one in measurements)
        if options.json:
            write_json(options.json, report)
    if options.swap:
        workload = make_workload("single", vocab_size=SHAPES[options.model]["vocab_size"])
        swap = measure_swap(workload, model=model, dtype=options.dtype, experts=make_experts(model, 4))
        for key, value in swap.items():
            console.print(f"{key}: {value if key == 'error' else f'{value:.3f}'}", markup=False, highlight=False)
        report["swap"] = swap
        failed |= "error" in swap
    if options.profile:
        workload = make_workload("shared-schema", vocab_size=SHAPES[options.model]["vocab_size"])
        profile = measure_profile(workload, model=model, dtype=options.dtype)
        if "error" in profile:
            console.print(f"profile: {profile['error']}", markup=False, highlight=False)
        else:
            for step in profile.values():
                step["floor_seconds"] = floor.step_seconds(options.model, step["tokens"], step["rows"])
            print_profile(profile, f"{options.model}, {options.dtype}; {one_line(machine)}", console)
        report["profile"] = profile
        failed |= "error" in profile
    if options.json:
        write_json(options.json, report)
    return int(failed)


def best_of(measurements: Sequence[Measurement]) -> list[Measurement]:
    """The fastest run of each peer, or a failed one if there is no other."""
    best: dict[str, Measurement] = {}
    for one in measurements:
        held = best.get(one.peer)
        if held is None or (one.error is None and (held.error is not None or one.seconds < held.seconds)):
            best[one.peer] = one
    return list(best.values())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description="Compare engines on one machine.")
    parser.add_argument("--workload", help=f"with commas: {', '.join(WORKLOADS)}; left out: shared-schema")
    parser.add_argument("--peers", help=f"with commas: {', '.join(PEERS)}; left out: {DEFAULT_PEERS}")
    parser.add_argument("--single", action="store_true", help=f"the workload single, too, by {SINGLE_PEERS}")
    parser.add_argument("--swap", action="store_true", help="measure, too, what changing the expert costs")
    parser.add_argument("--profile", action="store_true", help="measure, too, where the time of a step goes")
    parser.add_argument(
        "--peer", action="append", default=[], type=_interpreter, metavar="NAME=PYTHON", help="vllm=PATH/bin/python"
    )
    parser.add_argument("--model", default="qwen3-0.6b", choices=SHAPES)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--rows", type=int, help="rows of the workload; left out: as many as it is defined with")
    parser.add_argument("--repeat", type=int, default=1, help="run each peer this often and take its fastest run")
    parser.add_argument("--json", type=Path, help="write the measurements and the machine here")
    return parser


def _interpreter(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    # absolute, but not resolved: a virtual environment's python is a link, and must be called by its own name
    python = Path(path).absolute()
    if name not in {peer.interpreter for peer in PEERS.values()} or not python.is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is not vllm=PATH of a Python")
    return name, python


if __name__ == "__main__":
    raise SystemExit(main())
