"""A hundred threads that call `generate` at once, beside the same calls one after the other.

python -m benchmarks.threads
python -m benchmarks.threads --callers 32 --tokens 64 --package expert-sql.expert --base-model models/Qwen3-0.6B
"""

import argparse
import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe, one_line
from benchmarks.report import write_json
from pipeline import Expert, demo

Way = Callable[[Expert, list[str], dict[str, Any]], list[str]]


def one_after_the_other(expert: Expert, prompts: list[str], options: dict[str, Any]) -> list[str]:
    """What a loop does."""
    return [expert.generate(prompt, **options).text for prompt in prompts]


def threads(expert: Expert, prompts: list[str], options: dict[str, Any]) -> list[str]:
    """A thread for each prompt; all begin together."""
    together = threading.Barrier(len(prompts))

    def ask(prompt: str) -> str:
        together.wait()
        return expert.generate(prompt, **options).text

    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(ask, prompts))


def tasks(expert: Expert, prompts: list[str], options: dict[str, Any]) -> list[str]:
    """A task of asyncio for each prompt."""

    async def ask_all() -> list[str]:
        asked = (expert.agenerate(prompt, **options) for prompt in prompts)
        return [result.text for result in await asyncio.gather(*asked)]

    return asyncio.run(ask_all())


def one_list(expert: Expert, prompts: list[str], options: dict[str, Any]) -> list[str]:
    """All in one call: what the others are at best."""
    return [result.text for result in expert.generate_batch(prompts, **options)]


WAYS: dict[str, Way] = {
    "one after the other": one_after_the_other,
    "threads": threads,
    "asyncio tasks": tasks,
    "one list": one_list,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print a table; 0 if every way gave the same answers, else 1."""
    console = Console(width=120)
    options = _parser().parse_args(arguments)
    machine = describe()
    console.print(one_line(machine), highlight=False)
    with Expert.load(options.package, base_model=options.base_model, device=options.device) as expert:
        rows = measure_ways(expert, options.callers, options.tokens, options.repeat)
    _print(f"{options.callers} callers, {options.tokens} tokens each, the best of {options.repeat}", rows, console)
    if options.json:
        write_json(options.json, {"machine": machine, "ways": rows})
    return int(not all(row["same_answers"] for row in rows))


def measure_ways(expert: Expert, num_callers: int, num_tokens: int, repeat: int) -> list[dict[str, Any]]:
    """Seconds, steps of the engine and rates of each way, in turn; of each the fastest run counts.

    Args:
        expert: What is asked; it is warmed up.
        num_callers: Prompts, each of a caller of its own.
        num_tokens: Of each answer, exactly.
        repeat: How often each way is run.
    """
    asked: dict[str, Any] = {"max_tokens": num_tokens, "ignore_eos": True, "use_grammar": False, "stop": []}
    prompts = [f"What is {number}?" for number in range(num_callers)]
    expert.warm_up()
    best: dict[str, dict[str, Any]] = {}
    wanted: list[str] | None = None
    for _ in range(repeat):
        for name, way in WAYS.items():
            before, began = expert.stats().num_steps, time.perf_counter()
            texts = way(expert, prompts, asked)
            seconds = time.perf_counter() - began
            wanted = texts if wanted is None else wanted
            row = {
                "way": name,
                "seconds": seconds,
                "steps": expert.stats().num_steps - before,
                "tokens_per_second": num_callers * num_tokens / seconds,
                "same_answers": texts == wanted and best.get(name, {"same_answers": True})["same_answers"],
            }
            best[name] = min(best.get(name, row), row, key=lambda one: float(one["seconds"]))
            best[name]["same_answers"] = row["same_answers"]
    slowest = best["one after the other"]["seconds"]
    return [{**row, "times": slowest / row["seconds"]} for row in best.values()]


def _print(title: str, rows: Sequence[dict[str, Any]], console: Console) -> None:
    table = Table(title=title, title_justify="left")
    for name in ("way", "seconds", "steps", "tokens/s", "times faster", "same answers"):
        table.add_column(name)
    for row in rows:
        table.add_row(
            row["way"],
            f"{row['seconds']:.2f}",
            f"{row['steps']:,}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['times']:.1f}",
            "yes" if row["same_answers"] else "no",
        )
    console.print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--callers", type=int, default=100, help="threads, or tasks, that ask at once")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--repeat", type=int, default=3, help="how often each way is run; the fastest counts")
    parser.add_argument("--package", default=str(demo.package("sql")), help="the expert; the demo's sql")
    parser.add_argument("--base-model", default=str(demo.BASE_MODEL), help="its base model; the demo's")
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1 or mps; the best there is")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
