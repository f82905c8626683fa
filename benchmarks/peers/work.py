"""What a peer shares with the program that measures it: a job comes in as a JSON file, one JSON line goes out."""

import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Answers = dict[str, list[int]]  # row id -> token ids
Run = Callable[[Sequence[dict[str, Any]]], Answers]


def main(load: Callable[[dict[str, Any]], Run]) -> None:
    """Load an engine, warm it up, time it on the job's rows, and print the measurement as the last line.

    The job is a JSON file, the only argument: `model` (a directory), `dtype`, `options` of the peer, `experts`
    (PEFT folders, each with its package beside it), `rows`, `warmup`, rows of the same kind with other tokens, and
    `one_by_one`, which hands in each row after the answer to the one before. A row is a `benchmarks.workloads.Row` as
    a dictionary.

    Args:
        load: Takes the job and returns what answers rows.
    """
    job = json.loads(Path(sys.argv[1]).read_text())
    before = time.perf_counter()
    run = load(job)
    loaded = time.perf_counter()
    run(job["warmup"])
    all_before, own_before = cpu_seconds()
    started = time.perf_counter()
    answers: Answers = {}
    row_seconds: list[float] = []
    for rows in [[row] for row in job["rows"]] if job["one_by_one"] else [job["rows"]]:
        before_row = time.perf_counter()
        answers |= run(rows)
        row_seconds.append(time.perf_counter() - before_row)
    seconds = time.perf_counter() - started
    all_after, own_after = cpu_seconds()
    others = max(0.0, (all_after - all_before) - (own_after - own_before))
    measured = {
        "seconds": statistics.median(row_seconds),
        "load_seconds": loaded - before,
        "warmup_seconds": started - loaded,
        "peak_bytes": peak_bytes(),
        "cpu_seconds": own_after - own_before,
        "others_share": others / (seconds * (os.cpu_count() or 1)),
        "answers": answers,
    }
    sys.stdout.flush()
    print("\n" + json.dumps(measured), flush=True)  # noqa: T201 - the line is this program's result


def peak_bytes() -> int:
    """The most memory this process and the processes it started had resident, in bytes; 0 where /proc is missing.

    Pages that two processes share count twice.
    """
    total = 0
    for process in own_processes():
        with contextlib.suppress(OSError):  # it ended meanwhile
            lines = (process / "status").read_text().splitlines()
            total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return total


def cpu_seconds() -> tuple[float, float]:
    """Processor time that all programs took so far, and this one with what it started; zeros without /proc."""
    ticks = os.sysconf("SC_CLK_TCK")
    try:
        user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
    except OSError:
        return 0.0, 0.0
    own = 0
    for process in own_processes():
        with contextlib.suppress(OSError):
            fields = (process / "stat").read_text().rpartition(")")[2].split()
            own += sum(map(int, fields[11:15]))  # utime, stime, and those of children that ended
    return (user + nice + system) / ticks, own / ticks


def own_processes() -> list[Path]:
    """This process and all that it started, as directories of /proc."""
    children: dict[str, list[str]] = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
            children.setdefault(parent, []).append(process.name)
    found = [str(os.getpid())] if children else []
    for process_id in found:  # grows while it is read
        found += children.get(process_id, [])
    return [Path("/proc") / process_id for process_id in found]
