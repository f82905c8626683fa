"""Where the time of a step goes: by kind of module, beside the least that its products can take.

It is measured on the job's model and prompts, not compared with others; prints one JSON line.
"""

import itertools
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.engine.loader import load_base_model, load_tokenizer
from pipeline.engine.runner import Runner
from pipeline.engine.sequence import start
from pipeline.engine.step_engine import StepEngine
from pipeline.engine.stopping import StopRules
from pipeline.engine.together import default_step_tokens
from pipeline.engine.types import Request, SamplingParams

DECODE_ROWS = (1, 16, 64)
PREFILL_PROMPTS = 4  # fill one step
_STEPS = 8
_KV_BYTES = 4 << 30
_ANSWER = 256  # more than is ever generated here


@dataclass
class ModuleTimes:
    """Seconds in modules of each kind, what they call left out."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _running: list[list[Any]] = field(default_factory=list)  # kind, start, seconds in callees

    @contextmanager
    def of(self, model: Any) -> Iterator[None]:
        """Measure the calls of a model's modules inside."""
        head = model.get_output_embeddings()
        handles = []
        for module in model.modules():
            kind = kind_of(module, is_head=module is head)
            handles.append(module.register_forward_pre_hook(lambda *_, kind=kind: self._enter(kind)))
            handles.append(module.register_forward_hook(lambda *_: self._leave()))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, kind: str) -> None:
        self._running.append([kind, _now(), 0.0])

    def _leave(self) -> None:
        kind, started, inside = self._running.pop()
        seconds = _now() - started
        self.seconds[kind] += seconds - inside
        if self._running:
            self._running[-1][2] += seconds


def kind_of(module: nn.Module, *, is_head: bool) -> str:
    """What a module computes itself: `output layer`, `products`, `norms`, `attention`, `gates` or `other modules`."""
    if is_head:
        return "output layer"
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return "products"
    name = type(module).__name__
    if name.endswith("Norm"):
        return "norms"
    if name.endswith("Attention"):
        return "attention"  # and rotary positions, and the writing of keys and values
    return "gates" if hasattr(module, "gate_proj") else "other modules"


class Profiler:
    """An engine that is stepped by hand.

    Args:
        job: `model`, `dtype` and `rows`, as of any peer.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        path = Path(job["model"])
        base = load_base_model(path, dtype=job["dtype"])
        self._model = base.model
        self._rules = StopRules(load_tokenizer(None, path), base.eos_token_ids)
        self._runner = Runner(base, kv_cache_bytes=_KV_BYTES, num_rows=max(DECODE_ROWS))
        self._runner.graphs = None  # a replayed step calls no modules
        self._prompts = [(tuple(row["prompt"]), row["prefix_length"]) for row in job["rows"]]
        self._numbers = itertools.count()
        self._context_length = base.context_length
        self._step_tokens = default_step_tokens(base.device.type)

    def decode(self, num_rows: int) -> dict[str, Any]:
        """Steps of so many sequences with prompts of the workload, one token each."""
        loop = self._loop()
        sequences = self._add(loop, [self._prompts[at % len(self._prompts)] for at in range(num_rows)])
        while not all(sequence.num_generated for sequence in sequences):
            loop.step()
        seconds, profiled, parts = self._measured([loop] * _STEPS)
        return {"tokens": num_rows, "rows": num_rows, "seconds": seconds, "profiled_seconds": profiled, "parts": parts}

    def prefill(self) -> dict[str, Any]:
        """Steps that are filled by prompts that share nothing."""
        rounds = []
        for _ in range(2 * _STEPS):
            loop = self._loop()
            pieces = [(self._distinct(self._step_tokens // PREFILL_PROMPTS), 0) for _ in range(PREFILL_PROMPTS)]
            self._add(loop, pieces)
            rounds.append(loop)
        seconds, profiled, parts = self._measured(rounds)
        return {
            "tokens": self._step_tokens,
            "rows": PREFILL_PROMPTS,
            "seconds": seconds,
            "profiled_seconds": profiled,
            "parts": parts,
        }

    def _measured(self, rounds: Sequence[StepEngine]) -> tuple[float, float, dict[str, float]]:
        """Median seconds of a step as it is, and as it is while modules are timed; and the mean of each part then."""
        half = len(rounds) // 2 or 1
        plain = [_seconds(loop) for loop in rounds[:half]]
        times = ModuleTimes()
        with times.of(self._model):
            timed = [_seconds(loop) for loop in rounds[half:]]
        parts = {kind: seconds / len(timed) for kind, seconds in times.seconds.items()}
        parts["scheduling and choosing"] = statistics.mean(timed) - sum(parts.values())
        return statistics.median(plain), statistics.median(timed), parts

    def _loop(self) -> StepEngine:
        self._runner.clear()
        return StepEngine(
            self._runner, self._context_length, max_running=max(DECODE_ROWS), max_step_tokens=self._step_tokens
        )

    def _add(self, loop: StepEngine, prompts: Sequence[tuple[tuple[int, ...], int]]) -> list[Any]:
        params = SamplingParams(max_tokens=_ANSWER, ignore_eos=True)
        requests = [
            Request(str(next(self._numbers)), prompt, params, prefix_length=length) for prompt, length in prompts
        ]
        sequences = [sequence for request in requests for sequence in start(request, self._rules)]
        if loop.add(sequences):
            raise RuntimeError("a prompt is too long for the model")
        return sequences

    def _distinct(self, length: int) -> tuple[int, ...]:
        first = 16 + next(self._numbers)
        return (first, *itertools.islice(itertools.cycle(self._prompts[0][0]), length - 1))


def profile(job: dict[str, Any]) -> dict[str, Any]:
    """Profiles of decode steps of several sizes and of a prefill step: `tokens`, `seconds`, `parts` by name."""
    with torch.inference_mode():
        profiler = Profiler(job)
        profiler.decode(2)  # warms up
        return {
            "prefill": profiler.prefill(),
            **{f"decode-{num_rows}": profiler.decode(num_rows) for num_rows in DECODE_ROWS},
        }


def _seconds(loop: StepEngine) -> float:
    before = _now()
    loop.step()
    return _now() - before


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    result = profile(json.loads(Path(sys.argv[1]).read_text()))
    print("\n" + json.dumps(result), flush=True)  # noqa: T201 - the line is this program's result
