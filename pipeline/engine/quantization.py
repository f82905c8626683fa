"""The weights of a model's linear layers in 8 or 4 bits: less to hold and to read.

- `int8`: a scale for each output. Each row of an input is rounded to 8 bits too, by a scale of its own, where the
  device multiplies 8-bit numbers; elsewhere inputs stay as they are.
- `int4`: a step and an offset for each group of `GROUP_SIZE` weights. Inputs are rounded to bfloat16.

What multiplies them is oneDNN and ATen on the CPU, which come with torch, and torchao on CUDA. Embeddings and norms
stay as they are, and so do adapters, which work on top. The output layer, a quarter of a small model's weights, gets 8
bits on the CPU either way, and stays as it is on CUDA.
"""

import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from pipeline.engine.linear import Int4Linear, Int8Linear, Int8WeightLinear
from pipeline.engine.loader import BaseModel
from pipeline.errors import ConfigError, MissingDependencyError

logger = logging.getLogger(__name__)

Quantization = Literal["int8", "int4"]
QUANTIZATIONS: tuple[Quantization, ...] = ("int8", "int4")
GROUP_SIZE = 32  # of int4; 64 would save 0.5 bits of 5, and moves weights by 9.1 % instead of 7.9 %
_VNNI = ("avx512_vnni", "avx_vnni", "amx_int8")  # without one of these, oneDNN's sums of 8-bit products overflow
_INT4_OUTPUTS = 16  # ATen's products take a multiple of this
_INT8_INPUTS = 32  # ATen's products of 8-bit weights alone read beyond the end of others

Method = Callable[[nn.Linear], nn.Module | None]  # None: not a layer of this shape


def check_quantization(quantization: str | None) -> Quantization | None:
    """The quantisation of that name; None and `"none"` mean the same.

    Raises:
        ConfigError: The name is unknown.
    """
    if quantization is None or quantization == "none":
        return None
    for known in QUANTIZATIONS:
        if quantization == known:
            return known
    raise ConfigError(f"quantization {quantization!r} is unknown", hint=f"Use {', '.join(QUANTIZATIONS)} or none.")


def quantize(base: BaseModel, quantization: Quantization | None) -> BaseModel:
    """Quantise the weights of a model's linear layers.

    Merge an adapter before. Layers of a shape that cannot be quantised stay in their dtype; the log says how many.

    Args:
        base: The model, changed in place; use the returned one from then on.
        quantization: What to make of the weights; None changes nothing.

    Raises:
        ConfigError: The device or dtype cannot compute with such weights.
        MissingDependencyError: torchao, which CUDA needs for it, is not installed.
    """
    if quantization is None:
        return base
    layer_method, head_method = _methods(base, quantization)
    head = base.model.get_output_embeddings()
    num_made = 0
    left: list[str] = []
    for path, module in list(base.model.named_modules()):
        method = head_method if module is head else layer_method
        if type(module) is not nn.Linear or method is None:
            continue
        made = method(module)
        if made is None:
            left.append(path)
            continue
        parent, _, name = path.rpartition(".")
        setattr(base.model.get_submodule(parent), name, made)
        num_made += 1
    logger.info("made %d linear layers %s", num_made, quantization)
    if left:
        logger.warning(
            "%d of %d linear layers have a shape that %s cannot take, and stay in %s; the first is %s",
            *(len(left), num_made + len(left), quantization, str(base.dtype).removeprefix("torch."), left[0]),
        )
    return replace(base, quantization=quantization)


def _methods(base: BaseModel, quantization: Quantization) -> tuple[Method, Method | None]:
    """What makes a quantised layer of a plain one, and what of the output layer, on the model's device."""
    if base.device.type == "cuda":
        capability = torch.cuda.get_device_capability(base.device)
        if quantization == "int4" and (base.dtype != torch.bfloat16 or capability < (8, 0)):
            raise ConfigError(
                f"quantization int4 is not available in {str(base.dtype).removeprefix('torch.')} on {base.device}",
                hint="It takes bfloat16 and a GPU of compute capability 8.0 or newer; or use int8.",
            )
        return torchao_method(quantization), None
    if base.device.type != "cpu":
        raise ConfigError(
            f"quantization {quantization} is not available on {base.device.type}",
            hint="Use device cpu or cuda, or quantization none.",
        )
    int8: Method = Int8Linear if has_int8_products() else _int8_weights
    return (int8 if quantization == "int8" else _int4), int8


def has_int8_products() -> bool:
    """Whether this CPU multiplies 8-bit numbers, and torch can let it."""
    capabilities = torch.cpu.get_capabilities()
    return torch.backends.mkldnn.is_available() and any(capabilities.get(name) for name in _VNNI)


def _int8_weights(linear: nn.Linear) -> nn.Module | None:
    return None if linear.in_features % _INT8_INPUTS else Int8WeightLinear(linear)


def _int4(linear: nn.Linear) -> nn.Module | None:
    fits = linear.out_features % _INT4_OUTPUTS == 0 and linear.in_features % GROUP_SIZE == 0
    return Int4Linear(linear, GROUP_SIZE) if fits else None


def torchao_method(quantization: Quantization) -> Method:
    """What gives a plain layer a weight that torchao multiplies with; the layer itself stays.

    Raises:
        MissingDependencyError: torchao is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about kernels for other GPUs than this
            from torchao.quantization import Int4WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError as error:
        raise MissingDependencyError(
            f"quantization {quantization} on CUDA needs torchao",
            hint="Install it: pip install 'expert-pipeline[quantization]' (or pip install torchao).",
        ) from error
    config: Any = (
        Int8DynamicActivationInt8WeightConfig()
        if quantization == "int8"
        else Int4WeightOnlyConfig(group_size=GROUP_SIZE, int4_packing_format="tile_packed_to_4d")
    )

    def quantized(linear: nn.Linear) -> nn.Module | None:
        if quantization == "int4" and linear.in_features % GROUP_SIZE:
            return None
        quantize_(linear, config)
        return linear

    return quantized
