"""What the machine itself allows: the rate of its matrix product, its memory bandwidth, and a workload's least time."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.models import num_parameters
from benchmarks.workloads import Workload

ROWS, COLUMNS = 3072, 1024  # of the matrices that are multiplied: the feed-forward ones of the 0.6B shape
TOKENS = 512
_COLD_BYTES = 512 << 20  # read in turn, so that no cache holds what comes next


@dataclass(frozen=True)
class Floor:
    """Rates of this machine, of its GPU or of all its cores, in the weights' format that the engine computes in.

    Args:
        flops_per_second: Of products of weights and 512 tokens.
        bytes_per_second: At which weights are read for one token.
        bytes_per_parameter: Of that format.
    """

    flops_per_second: float
    bytes_per_second: float
    bytes_per_parameter: int

    def seconds(self, model: str, workload: Workload) -> float:
        """The least time that the weights' products of a workload take; attention and all else come on top.

        Each distinct prompt token is computed once. Generated tokens take at least their products, and at least one
        reading of all weights for each token of the longest answer. Rows answered one by one share nothing.

        Args:
            model: The model's shape, one of `SHAPES`.
            workload: What is answered; one by one, the mean row counts.
        """
        layers, head = num_parameters(model)
        num_rows = len(workload.rows)
        decoded = workload.num_output_tokens - num_rows  # a row's first token comes from its prompt's last
        prompts = 2 * (layers * workload.num_unique_prompt_tokens + head * num_rows) / self.flops_per_second
        products = 2 * (layers + head) * decoded / self.flops_per_second
        steps = decoded if workload.is_one_by_one else max(row.max_tokens for row in workload.rows) - 1
        readings = steps * (layers + head) * self.bytes_per_parameter / self.bytes_per_second
        return (prompts + max(products, readings)) / (num_rows if workload.is_one_by_one else 1)

    def step_seconds(self, model: str, num_tokens: int, num_rows: int) -> float:
        """The least time of the products of one step: all its tokens computed, and all weights read once.

        Args:
            model: The model's shape, one of `SHAPES`.
            num_tokens: Tokens of the step.
            num_rows: Those after which a token is chosen.
        """
        layers, head = num_parameters(model)
        products = 2 * (layers * num_tokens + head * num_rows) / self.flops_per_second
        return max(products, (layers + head) * self.bytes_per_parameter / self.bytes_per_second)


def measure_floor(dtype: str) -> Floor:
    """Measure for about two seconds; the best of several runs counts.

    Args:
        dtype: `"bfloat16"` or `"float32"`.
    """
    import torch
    from torch import nn

    from pipeline.engine.linear import PackedLinear, can_pack

    kind: torch.dtype = getattr(torch, dtype)
    number = _COLD_BYTES // (ROWS * COLUMNS * kind.itemsize)
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    num_products = 64 if on_gpu else 8
    linear = nn.Linear(COLUMNS, ROWS, bias=False, dtype=kind, device=device)
    # As the engine does it on a CPU.
    is_packed = not on_gpu and kind == torch.bfloat16 and can_pack()

    def layers(num_tokens: int, count: int) -> list[nn.Module]:
        if on_gpu:  # as one: launching so many would take longer than computing them
            return [nn.Linear(COLUMNS, ROWS * count, bias=False, dtype=kind, device=device)]
        return [PackedLinear(linear, num_tokens) if is_packed else copy.deepcopy(linear) for _ in range(count)]

    def multiply(modules: list[nn.Module], num_tokens: int) -> Callable[[], None]:
        hidden = torch.randn(num_tokens, COLUMNS, dtype=kind, device=device)

        def run() -> None:
            for module in modules:
                module(hidden)
            if on_gpu:
                torch.cuda.synchronize()

        return run

    with torch.inference_mode():
        many, one = layers(TOKENS, num_products), layers(1, number)
        product = _best_seconds(multiply(many, TOKENS))
        reading = _best_seconds(multiply(one, 1))
    return Floor(
        flops_per_second=2 * ROWS * COLUMNS * TOKENS * num_products / product,
        bytes_per_second=ROWS * COLUMNS * kind.itemsize * number / reading,
        bytes_per_parameter=kind.itemsize,
    )


def _best_seconds(run: Callable[[], None]) -> float:
    run()
    best = float("inf")
    for _ in range(5):
        before = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - before)
    return best
