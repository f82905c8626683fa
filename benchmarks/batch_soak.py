"""Minutes of jobs on a Ray of two nodes while workers, drivers and nodes are killed at random, by a seed.

    python -m benchmarks.batch_soak --minutes 10 --seed 1

Jobs (their engine only echoes) run one after another. Whenever some more parts are there, a worker, the driver or a
node is killed; a driver that was killed is run again by the same command, a node is followed by another one. When a
job is finished, its output must have every row once, in order, with its own answer, and `verify` must find nothing.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from ray.cluster_utils import Cluster
from rich.console import Console

from benchmarks.machine import describe, one_line
from pipeline import demo
from pipeline.batch.verify import verify
from pipeline.storage.local import LocalStorage

ROWS, SHARD_ROWS, SECONDS_PER_ROW = 400, 5, 0.05
VICTIMS = {"worker": 6, "driver": 3, "node": 2}  # and how often, one to another
MOST_RUNS = 50  # of one job


class Soak:
    """A cluster, and what was done to it.

    Args:
        chooser: Draws who is killed, and when.
        folder: Where jobs read and write.
    """

    def __init__(self, chooser: random.Random, folder: Path) -> None:
        self.killed = Counter[str]()
        self.num_jobs = self.num_runs = self.num_left_behind = 0
        self._chooser = chooser
        self._folder = folder
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        self._nodes = [self._cluster.add_node(num_cpus=1), self._cluster.add_node(num_cpus=1)]

    def run_job(self, until: float) -> None:
        """Run a job to its end, whoever is killed; after `until` nobody is."""
        self.num_jobs += 1
        output = self._folder / f"out-{self.num_jobs}"
        for _ in range(MOST_RUNS):
            self.num_runs += 1
            if self._run_driver(output, until) == 0:
                break
        self._check(output)
        shutil.rmtree(output)

    def close(self) -> None:
        """End the cluster."""
        self._cluster.shutdown()

    def _run_driver(self, output: Path, until: float) -> int:
        told = {"job": self._options(output), "seconds_per_row": SECONDS_PER_ROW}
        command = [sys.executable, "-m", "benchmarks.batch_driver", json.dumps(told)]
        with (self._folder / "driver.log").open("ab") as log:
            driver = subprocess.Popen(command, stdout=log, stderr=log)  # noqa: S603 - our own module
            while driver.poll() is None:
                self._wait(driver, output)
                if driver.poll() is None and time.monotonic() < until:
                    self._kill(driver)
        return driver.returncode

    def _wait(self, driver: "subprocess.Popen[bytes]", output: Path) -> None:
        """Until some more parts are there, so that a slow machine is not killed faster than it works."""
        wanted = len(list(output.glob("part-*"))) + self._chooser.randint(0, 12)
        patience = time.monotonic() + self._chooser.uniform(5, 60)
        while driver.poll() is None and time.monotonic() < patience and len(list(output.glob("part-*"))) < wanted:
            time.sleep(0.1)
        time.sleep(self._chooser.uniform(0, 0.5))

    def _options(self, output: Path) -> dict[str, Any]:
        dataset = self._folder / "in.parquet"
        if not dataset.exists():
            prompts = [f"question {number}" for number in range(ROWS)]
            pq.write_table(pa.table({"id": range(ROWS), "prompt": prompts}), dataset)
        return {
            "dataset": str(dataset),
            "expert": str(demo.package("sql")),
            "base_model": str(demo.BASE_MODEL),
            "output": str(output),
            "shard_rows": SHARD_ROWS,
            "num_workers": 2,
            "ray_address": self._cluster.address,
        }

    def _kill(self, driver: "subprocess.Popen[bytes]") -> None:
        victim = self._chooser.choices(list(VICTIMS), list(VICTIMS.values()))[0]
        if victim == "worker":
            workers = [process for process in psutil.Process().children(recursive=True) if _is_worker(process)]
            if not workers:
                return
            self._chooser.choice(workers).kill()
        elif victim == "driver":
            os.kill(driver.pid, signal.SIGKILL)
        else:
            place = self._chooser.randrange(len(self._nodes))
            self._cluster.remove_node(self._nodes[place], allow_graceful=False)
            self._nodes[place] = self._cluster.add_node(num_cpus=1)
        self.killed[victim] += 1

    def _check(self, output: Path) -> None:
        rows = [row for part in sorted(output.glob("part-*")) for row in pq.read_table(part).to_pylist()]
        wanted = [(number, f":question {number}") for number in range(ROWS)]
        found = verify(LocalStorage(str(output)))
        answered = [(row["id"], row["text"]) for row in rows]
        if answered != wanted or found.problems:
            wrong = [row for row, right in zip(rows, wanted, strict=False) if (row["id"], row["text"]) != right]
            raise RuntimeError(f"job {self.num_jobs}: {len(rows)} rows, {found.problems}, wrong: {wrong[:3]}")
        if (output / "_attempts").exists():  # of a worker that outlived its driver, and came after the end
            self.num_left_behind += 1


def _is_worker(process: psutil.Process) -> bool:
    try:
        return any(part.startswith("ray::MapWorker") for part in process.cmdline())
    except psutil.Error:
        return False


def main(
    minutes: Annotated[float, typer.Option(help="How long somebody is killed.")] = 10.0,
    seed: Annotated[int, typer.Option(help="Of who is killed, and when.")] = 1,
) -> None:
    """Run jobs and kill, and say what was killed and what came of it."""
    console = Console(width=120)
    console.print(one_line(describe()), highlight=False)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="expert-soak-") as folder:
        soak = Soak(random.Random(seed), Path(folder))
        try:
            while time.monotonic() < started + 60 * minutes:
                soak.run_job(started + 60 * minutes)
        finally:
            soak.close()
    killed = ", ".join(f"{count} {victim}s" for victim, count in sorted(soak.killed.items()))
    console.print(
        f"{time.monotonic() - started:.0f} s, seed {seed}: {soak.num_jobs} jobs of {ROWS} rows in {soak.num_runs} runs,"
        f" each with every row once and in order; killed: {killed};"
        f" attempts of workers that outlived their driver were left behind {soak.num_left_behind} times",
        highlight=False,
    )


if __name__ == "__main__":
    typer.run(main)
