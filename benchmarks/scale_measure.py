"""One measurement of `benchmarks.scale`, as a program: `python -m benchmarks.scale_measure WHAT OPTIONS_AS_JSON`."""

import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.scale_data import make_commits, make_files, output_of

FILE_ROWS = 10_000


def measure_plan(*, folder: str, files: int, shard_rows: int) -> dict[str, Any]:
    """Plan a dataset from the footers of its files."""
    from pipeline.batch.source import plan_shards

    dataset = make_files(Path(folder) / "files", files, FILE_ROWS)
    names = sorted(str(path) for path in dataset.iterdir())[:files]
    before, started = resident_mib(), time.perf_counter()
    plan = plan_shards(str(dataset) if len(list(dataset.iterdir())) == files else names, shard_rows=shard_rows)
    seconds = time.perf_counter() - started
    return {
        "rows": plan.num_rows,
        "files": files,
        "shards": len(plan.shards),
        "seconds": seconds,
        "memory_before_mib": before,
        "memory_peak_mib": peak_mib(),
    }


def measure_resume(*, folder: str, shards: int, packed: bool) -> dict[str, Any]:
    """List what is committed, as a driver does that continues a job; then finish it."""
    place = make_commits(Path(folder) / f"commits-{shards}-{'packed' if packed else 'loose'}", shards, packed=packed)
    output = output_of(place, shards)
    before, started = resident_mib(), time.perf_counter()
    found = output.committed()
    seconds = time.perf_counter() - started
    if len(found) != shards:
        raise RuntimeError(f"{len(found)} of {shards} shards were found")
    started = time.perf_counter()
    output.finish(found)
    finish_seconds = time.perf_counter() - started
    peak = peak_mib()
    shutil.rmtree(place)  # it is finished now; the next time it is made anew
    return {
        "shards": shards,
        "packed": packed,
        "seconds": seconds,
        "memory_before_mib": before,
        "memory_peak_mib": peak,
        "finish_seconds": finish_seconds,
    }


def measure_job(*, folder: str, rows: int, shard_rows: int, workers: int) -> dict[str, Any]:
    """Run a job with the engine that only echoes, on a Ray of its own."""
    from pipeline import demo
    from pipeline.batch.cluster import connect
    from pipeline.batch.config import BatchConfig
    from pipeline.batch.echo import ECHO
    from pipeline.batch.execute import execute
    from pipeline.batch.plan import open_experts, prepare
    from pipeline.batch.progress import Phases, Progress
    from pipeline.batch.receipts import Packer, Receipt

    file_rows = min(rows, FILE_ROWS)
    dataset = make_files(Path(folder) / f"job-{rows}", rows // file_rows, file_rows)
    output = Path(folder) / "job-output"
    shutil.rmtree(output, ignore_errors=True)
    config = BatchConfig.from_options(
        dataset=str(dataset),
        expert=demo.package("sql"),
        base_model=demo.BASE_MODEL,
        output=output,
        shard_rows=shard_rows,
        num_workers=workers,
        ray_address="local",
    )
    job = prepare(config, open_experts(config))
    job.output.begin()
    packer = Packer(job.output.storage)
    done: dict[int, Receipt] = {}
    memory: list[float] = []

    def on_receipt(receipt: Receipt) -> None:
        done[receipt.shard] = receipt
        packer.add(receipt)
        if len(done) == max(1, len(job.plan.shards) // 2):
            memory.append(resident_mib())

    before, phases = resident_mib(), Phases()
    connect(config.ray_address)
    cpu_before, driver_before = tree_cpu_seconds(), time.process_time()
    execute(job, {}, Progress(enabled=False), phases, on_receipt, load=ECHO)
    cpu, driver_cpu = tree_cpu_seconds() - cpu_before, time.process_time() - driver_before
    started = time.perf_counter()
    manifest = job.output.finish(done)
    finish_seconds = time.perf_counter() - started
    if (manifest["rows"], manifest["errors"]) != (rows, 0):
        raise RuntimeError(f"{manifest['rows']} rows were answered, {manifest['errors']} of them with an error")
    seconds = phases.seconds()
    shards = len(job.plan.shards)
    shutil.rmtree(output)
    return {
        "rows": rows,
        "shards": shards,
        "workers": workers,
        "first_row_seconds": seconds["start"],
        "run_seconds": seconds["run"],
        "rows_per_second": round(rows / seconds["run"]),
        "ms_per_shard": 1000 * seconds["run"] / shards,
        "cpu_ms_per_shard": 1000 * cpu / shards,
        "driver_cpu_ms_per_shard": 1000 * driver_cpu / shards,
        "finish_seconds": finish_seconds,
        "memory_before_mib": before,
        "memory_half_mib": memory[0],
        "memory_peak_mib": peak_mib(),
    }


def tree_cpu_seconds() -> float:
    """Processor time of this process and of all it has started: what stays the same on a machine that does more."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    total = 0.0
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def resident_mib() -> float:
    """Memory of this process that is resident now, in MiB."""
    return _status_mib("VmRSS")


def peak_mib() -> float:
    """The most memory that this process had resident, in MiB."""
    return _status_mib("VmHWM")


def _status_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024)


MEASUREMENTS: Mapping[str, Callable[..., dict[str, Any]]] = {
    "plan": measure_plan,
    "resume": measure_resume,
    "job": measure_job,
}


if __name__ == "__main__":
    what, options = sys.argv[1], json.loads(sys.argv[2])
    print(json.dumps({"what": what, **MEASUREMENTS[what](**options)}))  # noqa: T201 - the result
