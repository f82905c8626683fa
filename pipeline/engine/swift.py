"""A loaded model made swift for inference, its modules and its answers staying what they were.

Nothing here knows an architecture. A module is made swift only where it is built like one that is known, and only when
it gives the same result on trial.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pipeline.engine.kernels.cpu import Kernels
from pipeline.engine.linear import PackedLinear, can_pack
from pipeline.engine.loader import BaseModel
from pipeline.engine.memory import give_back, page_out

if TYPE_CHECKING:
    from pipeline.engine.kernels.gpu import GpuKernels

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
# With more, torch's product on AMX is faster than ours on AVX-512: 34 ms against 122 for the output layer of the
# 0.6B shape with 64 rows, on two cores.
AMX_ROWS = 16
QUANTIZED_TOLERANCE = 2e-2  # quantised products round their inputs, and a last bit decides to which step


def pack_linears(base: BaseModel, num_rows: int) -> None:
    """Lay the weights of all linear layers out as oneDNN wants them, where that is faster: bfloat16 on CPUs that can.

    A head that shares its weight with the embedding stays as it is: it would be in memory twice.

    Args:
        base: The model, changed in place.
        num_rows: How many tokens a step usually has.
    """
    if base.device.type != "cpu" or base.dtype != torch.bfloat16 or not can_pack():
        return
    tied = base.model.get_input_embeddings().weight.data_ptr()
    linears = (name for name, module in base.model.named_modules() if type(module) is nn.Linear)
    for name in tuple(linears):  # names, so that each plain weight is gone before the next one is copied
        linear = base.model.get_submodule(name)
        if linear.weight.data_ptr() != tied:
            parent, _, own = name.rpartition(".")
            setattr(base.model.get_submodule(parent), own, PackedLinear(linear, num_rows))
            page_out(linear.weight)
    give_back()


def use_kernels(base: BaseModel, kernels: Kernels | GpuKernels) -> None:
    """Let the compiled kernels compute norms, gated feed-forward layers and a head that shares the embedding's weight.

    Args:
        base: The model, changed in place.
        kernels: Of the model's dtype.
    """
    for module in base.model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            _use_norm(module, kernels)
        elif all(isinstance(getattr(module, name, None), nn.Module) for name in ("gate_proj", "up_proj", "down_proj")):
            tolerance = QUANTIZED_TOLERANCE if base.quantization else TOLERANCE[kernels.dtype]
            _use_gate(module, kernels, tolerance, base.device)
    head = base.model.get_output_embeddings()
    is_tied = type(head) is nn.Linear and head.weight is base.model.get_input_embeddings().weight
    if is_tied and isinstance(kernels, Kernels) and kernels.has_linear:
        _use_product(head, kernels)


def _use_product(linear: Any, kernels: Kernels) -> None:
    stock = linear.forward
    most_rows = AMX_ROWS if torch.cpu.get_capabilities().get("amx_bf16") else math.inf

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        if hidden.numel() // linear.in_features > most_rows:
            answer: torch.Tensor = stock(hidden)
            return answer
        return kernels.linear(hidden, linear.weight, linear.bias)

    trial = torch.linspace(-2, 2, 3 * linear.in_features, dtype=kernels.dtype).view(1, 3, -1)
    if _is_same(forward(trial), linear(trial), TOLERANCE[kernels.dtype]):
        linear.forward = forward


def _use_norm(module: Any, kernels: Kernels | GpuKernels) -> None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if not isinstance(eps, float) or not isinstance(weight, torch.Tensor) or weight.ndim != 1:
        return
    trial = torch.linspace(-2, 2, 3 * len(weight), dtype=kernels.dtype, device=weight.device).view(3, -1)
    for add_one in (False, True):

        def forward(hidden: torch.Tensor, add_one: bool = add_one) -> torch.Tensor:
            return kernels.rms_norm(hidden, module.weight, eps, add_one=add_one)

        if _is_same(forward(trial), module(trial), TOLERANCE[kernels.dtype]):
            module.forward = forward
            return


def _use_gate(module: Any, kernels: Kernels | GpuKernels, tolerance: float, device: torch.device) -> None:
    def forward(hidden: torch.Tensor) -> torch.Tensor:
        gated: torch.Tensor = module.down_proj(kernels.silu_mul(module.gate_proj(hidden), module.up_proj(hidden)))
        return gated

    numbers = torch.linspace(-2, 2, 3 * module.gate_proj.in_features, dtype=kernels.dtype, device=device)
    trial = numbers.view(1, 3, -1)
    if _is_same(forward(trial), module(trial), tolerance):
        module.forward = forward


def _is_same(swift: torch.Tensor, stock: torch.Tensor, tolerance: float) -> bool:
    scale = max(float(stock.abs().max()), 1e-6)
    return bool((swift - stock).abs().max() <= tolerance * scale)
