"""How long a package takes to load, the first time and again, beside `tar -xzf` and `sha256sum` on the same file.

    python -m benchmarks.package                     # 25 MB and 1 GB, float32 adapters
    python -m benchmarks.package --sizes 25 --json build/bench/package.json

Both unpack to the same disk and end with the data on it (`sync` of the folder); the file is in the page cache for both.
A warm load is timed in the process that did the cold one, and as the first of a new process, its imports not counted.
Figures are ratios from one run, the median of several rounds that take turns.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from benchmarks.machine import describe
from pipeline.package import open_package, pack

MEGABYTE = 1_000_000
TENSOR_ROWS, RANK = 8192, 16


def make_package(folder: Path, megabytes: int) -> Path:
    """Pack an expert whose float32 adapter has about so many megabytes of drawn numbers."""
    source = folder / f"expert-{megabytes}"
    source.mkdir()
    count = max(1, megabytes * MEGABYTE // (TENSOR_ROWS * RANK * 4 * 2))
    draw = np.random.default_rng(megabytes)
    tensors = {}
    for number in range(count):
        module = f"base_model.model.model.layers.{number}.self_attn.q_proj"
        down = draw.standard_normal((RANK, TENSOR_ROWS), np.float32) * 0.02
        tensors[f"{module}.lora_A.weight"] = down
        tensors[f"{module}.lora_B.weight"] = np.ascontiguousarray(down.T)
    save_file(tensors, source / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 32, "target_modules": ["q_proj"]}
    (source / "adapter_config.json").write_text(json.dumps(config))
    base = {"name": "Big", "adapters": [{"type": "lora", "r": RANK, "alpha": 32}]}
    manifest = {"name": "expert-big", "version": "1.0.0", "schema_version": "2.0", "base_models": [base]}
    target = pack(source, folder / f"{megabytes}.expert", manifest=manifest)
    shutil.rmtree(source)
    return target


def timed(work: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def with_tar(archive: Path, folder: Path) -> None:
    """Unpack with tar, compare the checksum with sha256sum, and flush to the disk."""
    folder.mkdir()
    for command in (["sha256sum", "--check", "--quiet", f"{archive}.sha256"], ["tar", "-xzf", str(archive)]):
        place = archive.parent if command[0] == "sha256sum" else folder
        subprocess.run(command, cwd=place, check=True)  # noqa: S603  # the system's own programs
    for path in folder.rglob("*"):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


NEW_PROCESS = """
import sys, time
from pathlib import Path
from pipeline.package import open_package
begun = time.perf_counter()
open_package(sys.argv[1], cache_dir=Path(sys.argv[2]))
print(time.perf_counter() - begun)
"""


def in_new_process(archive: Path, cache: Path) -> float:
    """Seconds that the first load of a new process takes."""
    command = [sys.executable, "-c", NEW_PROCESS, str(archive), str(cache)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)  # noqa: S603  # this file's


def measure(megabytes: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Cold and warm loads of one size beside tar, in turns."""
    archive = make_package(folder, megabytes)
    archive.read_bytes()
    settled = archive.stat().st_ctime + 2.5 - time.time()
    time.sleep(max(0.0, settled))  # a file changed a moment ago is hashed at every load
    cold, warm, first, tar = [], [], [], []
    for number in range(rounds):
        cache, plain = folder / f"cache-{number}", folder / f"tar-{number}"
        tar.append(timed(partial(with_tar, archive, plain)))
        shutil.rmtree(plain)
        load = partial(open_package, archive, cache_dir=cache)
        cold.append(timed(load))
        warm.append(statistics.median(timed(load) for _ in range(5)))
        first.append(statistics.median(in_new_process(archive, cache) for _ in range(5)))
        shutil.rmtree(cache)
    found = {"tar": tar, "cold": cold, "warm": warm, "warm_first": first}
    seconds = {name: statistics.median(times) for name, times in found.items()}
    return {
        "megabytes": megabytes,
        "archive_bytes": archive.stat().st_size,
        "rounds": rounds,
        "seconds": seconds,
        "cold_over_tar": seconds["cold"] / seconds["tar"],
        "all": found,
    }


def main() -> None:
    """Measure, print a table, and write JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="25,1000", help="Megabytes of the adapters, by commas.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="Where to work; a folder of the system's if not given.")
    parser.add_argument("--json", type=Path, help="Also write the figures here.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="bench-package-") as folder:
        results = [measure(int(size), arguments.rounds, Path(folder)) for size in arguments.sizes.split(",")]
    out = sys.stdout.write
    out(f"{'MB':>6}{'tar + sha256sum':>18}{'cold':>10}{'ratio':>8}{'warm':>12}{'new process':>14}\n")
    for result in results:
        seconds = result["seconds"]
        out(
            f"{result['megabytes']:>6}{seconds['tar']:>16.2f} s{seconds['cold']:>8.2f} s"
            f"{result['cold_over_tar']:>8.2f}{1000 * seconds['warm']:>9.1f} ms"
            f"{1000 * seconds['warm_first']:>11.1f} ms\n"
        )
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"machine": describe(), "results": results}, indent=1))


if __name__ == "__main__":
    main()
