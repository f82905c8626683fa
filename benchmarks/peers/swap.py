"""What changing the expert costs: a cold load into the bank, a change between resident ones, an unload.

It is measured on the job's experts and first row, not compared with others; prints one JSON line.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.engine.packed import PackedEngine
from pipeline.engine.runtime import load_engine
from pipeline.engine.types import Request, SamplingParams
from pipeline.package import open_package

_REPEATS = 20


def measure_swap(job: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of each kind, by name; the changes are the median of 20.

    `change_ms` is a request of one token answered by the expert that did not answer the one before, less the same
    request answered again by the expert that did.
    """
    engine = load_engine(Path(job["model"]), {}, dtype=job["dtype"])
    if not isinstance(engine, PackedEngine) or engine.bank is None:
        raise TypeError("this engine has no bank of experts")
    bank = engine.bank
    packages = [open_package(Path(f"{path}.expert")) for path in job["experts"]]
    names = [package.manifest.name for package in packages]
    cold = [_ms(partial(bank.load, *pair)) for pair in zip(names, packages, strict=True)]
    resident = [_ms(partial(bank.load, *pair)) for pair in zip(names, packages, strict=True)]
    prompt = job["rows"][0]["prompt"]

    def ask(name: str, at: int) -> None:
        # another first token each time, so that no prompt is kept from before
        request = Request("0", (16 + at, *prompt[1:32]), SamplingParams(max_tokens=1, ignore_eos=True), expert=name)
        (completion,) = engine.generate([request])
        if completion.failure is not None:
            raise RuntimeError(completion.failure.message)

    for at in range(4):
        ask(names[at % 2], at)
    same, other = [], []
    for at in range(4, 4 + _REPEATS):
        ask(names[0], 4 * at)
        same.append(_ms(partial(ask, names[0], 4 * at + 1)))
        other.append(_ms(partial(ask, names[1], 4 * at + 2)))
    unload = [_ms(partial(bank.unload, name)) for name in names]
    num_bytes = sum(Path(f"{path}.expert").stat().st_size for path in job["experts"])
    engine.close()
    return {
        "package_mib": num_bytes / len(names) / (1 << 20),
        "cold_load_ms": statistics.median(cold),
        "resident_load_ms": statistics.median(resident),
        "same_expert_request_ms": statistics.median(same),
        "other_expert_request_ms": statistics.median(other),
        "change_ms": statistics.median(other) - statistics.median(same),
        "unload_ms": statistics.median(unload),
    }


def _ms(action: Callable[[], object]) -> float:
    before = time.perf_counter()
    action()
    return (time.perf_counter() - before) * 1e3


if __name__ == "__main__":
    result = measure_swap(json.loads(Path(sys.argv[1]).read_text()))
    print("\n" + json.dumps(result), flush=True)  # noqa: T201 - the line is this program's result
