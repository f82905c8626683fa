"""The table a person reads, and the JSON that keeps it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.measure import Measurement
from benchmarks.workloads import Workload

BASELINES = ("thirty-lines", "vllm", "packed-merged")
_MIB = 1 << 20


def rows_of(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """What the table shows of each peer: seconds, rates, how many times faster than the baselines, and agreement.

    `same_answers` is the share of rows whose tokens are those of the first peer that was measured, `others_share` the
    share of the processors that other programs took from it. Keys are missing
    where there is nothing to compare with; a peer without a measurement has `error`.
    """
    measured = {one.peer: one for one in measurements if one.error is None}
    first = next(iter(measured.values()), None)
    rows: list[dict[str, Any]] = []
    for one in measurements:
        if one.error is not None:
            rows.append({"peer": one.peer, "error": one.error})
            continue
        row: dict[str, Any] = {
            "peer": one.peer,
            "seconds": one.seconds,
            "load_seconds": one.load_seconds,
            "output_tokens_per_second": one.output_tokens / one.seconds,
            "total_tokens_per_second": (one.prompt_tokens + one.output_tokens) / one.seconds,
            "peak_mib": one.peak_bytes / _MIB,
            "cpu_seconds": one.cpu_seconds,
            "others_share": one.others_share,
        }
        row |= {f"times_{name}": measured[name].seconds / one.seconds for name in BASELINES if name in measured}
        if first is not None and first.answers and one.answers:
            same = sum(list(one.answers[row_id]) == list(tokens) for row_id, tokens in first.answers.items())
            row["same_answers"] = same / len(first.answers)
        rows.append(row)
    return rows


def print_table(workload: Workload, rows: Sequence[Mapping[str, Any]], about: str, console: Console) -> None:
    """Print the rows of one workload; what failed, and why, stands below."""
    title = (
        f"{workload.name}: {len(workload.rows)} rows, {workload.num_prompt_tokens:,} prompt tokens "
        f"({workload.num_unique_prompt_tokens:,} unique), {workload.num_output_tokens:,} output tokens\n{about}"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("engine")
    for column in (
        "seconds",
        "out tok/s",
        "tok/s",
        *(f"x {name}" for name in BASELINES),
        "peak MiB",
        "same answers",
        "others",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        if "error" in row:
            table.add_row(row["peer"], "-", *[""] * (len(BASELINES) + 5))
            continue
        table.add_row(
            row["peer"],
            f"{row['seconds']:.2f}",
            f"{row['output_tokens_per_second']:.0f}",
            f"{row['total_tokens_per_second']:.0f}",
            *(f"{row[key]:.2f}" if (key := f"times_{name}") in row else "" for name in BASELINES),
            f"{row['peak_mib']:,.0f}",
            f"{row['same_answers']:.0%}" if "same_answers" in row else "",
            f"{row['others_share']:.0%}",
        )
    console.print(table)
    for row in rows:
        if "error" in row:
            console.print(f"{row['peer']}: {row['error']}", markup=False, highlight=False)


def print_profile(profile: Mapping[str, Mapping[str, Any]], about: str, console: Console) -> None:
    """Print where the time of each kind of step goes, in milliseconds, beside the least its products can take."""
    table = Table(title=f"milliseconds of a step\n{about}", title_justify="left")
    table.add_column("")
    for name, step in profile.items():
        table.add_column(f"{name}, {step['tokens']:,} tokens", justify="right")
    kinds = sorted(
        {kind for step in profile.values() for kind in step["parts"]},
        key=lambda kind: -sum(step["parts"].get(kind, 0.0) for step in profile.values()),
    )
    for kind in kinds:
        table.add_row(kind, *(f"{step['parts'].get(kind, 0.0) * 1e3:.1f}" for step in profile.values()))
    for title, key in (
        ("all, with modules timed", "profiled_seconds"),
        ("all, as it is", "seconds"),
        ("floor", "floor_seconds"),
    ):
        table.add_row(title, *(f"{step[key] * 1e3:.1f}" for step in profile.values()), style="bold")
    console.print(table)


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    """Write a report, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".draft")
    draft.write_text(json.dumps(report, indent=2) + "\n")
    draft.replace(path)
