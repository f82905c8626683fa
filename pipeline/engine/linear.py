"""A linear layer as the engine computes it: plain, packed for the CPU or quantised, behind one set of functions."""

from functools import cache
from typing import Any

import torch
from torch import nn


class FrozenLinear(nn.Module):
    """A linear layer whose weight lies in a form of its own and never changes.

    Args:
        linear: The layer whose weight is taken.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias

    @property
    def weight(self) -> torch.Tensor:  # [out_features, in_features]
        """The weight as an ordinary tensor, made anew at each call."""
        raise NotImplementedError

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:  # [..., in_features] -> [..., out_features]
        """The product, with the bias."""
        raise NotImplementedError


@cache
def can_pack() -> bool:
    """Whether this CPU computes on bfloat16 weights in oneDNN's layout; torch refuses where there is no AVX-512."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        torch.ops.mkldnn._reorder_linear_weight(torch.zeros(16, 16, dtype=torch.bfloat16), 1)
    except RuntimeError:
        return False
    return True


class PackedLinear(FrozenLinear):
    """A bfloat16 linear layer with its weight in the layout that oneDNN computes in; for CPUs that `can_pack`.

    A plain weight is rearranged by oneDNN at every call; at 1 to 32 rows that takes as long as the product itself.

    Args:
        linear: The layer; its weight is copied.
        num_rows: The usual number of rows of an input, which decides the layout.
    """

    def __init__(self, linear: nn.Linear, num_rows: int = 64) -> None:
        super().__init__(linear)
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), num_rows)

    @property
    def weight(self) -> torch.Tensor:  # [out_features, in_features]
        """The weight in the plain layout, made anew at each call."""
        dense: torch.Tensor = self._packed.to_dense()
        return dense

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:  # [..., in_features] -> [..., out_features]
        """The product, with the bias."""
        return self.multiply(hidden, self.bias)

    def multiply(self, hidden: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The product, with the bias given."""
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(hidden, self._packed, bias, "none", [], "")
        return product


class Int8Linear(FrozenLinear):
    """A linear layer of 8-bit weights, one scale for each output, for CPUs that multiply 8-bit numbers.

    Each row of an input is rounded to 8 bits as well, by a scale of its own, so that no row depends on its neighbours.

    Args:
        linear: The layer, of any float dtype.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        values, scale = quantize_int8(linear.weight.detach())
        self._dtype = linear.weight.dtype
        self._packed = torch.ops.onednn.qlinear_prepack(values, None)
        self._scale = scale
        self._zero_point = torch.zeros(1, dtype=torch.int32)

    @property
    def weight(self) -> torch.Tensor:  # [out_features, in_features]
        """The weight that it multiplies with, in float32."""
        values: torch.Tensor = self._packed.to_dense()  # [in_features, out_features]
        return values.t() * self._scale[:, None]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:  # [..., in_features] -> [..., out_features]
        """The product, with the bias."""
        rows = hidden.reshape(-1, self.in_features)
        scale = rows.abs().amax(dim=-1, keepdim=True).float().mul_(1 / 127).clamp_min_(1e-30)  # [num_rows, 1]
        # oneDNN is fast with unsigned inputs only: 128 stands for zero, and the half rounds
        values = (rows / scale).add_(128.5).to(torch.uint8)
        out: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            *(values, 1.0, 128, self._packed, self._scale, self._zero_point, None),
            *(1.0, 0, torch.float32, "none", [], ""),
        )
        out = out.mul_(scale) if self.bias is None else torch.addcmul(self.bias.float(), out, scale)
        return out.to(self._dtype).view(*hidden.shape[:-1], self.out_features)


class Int8WeightLinear(FrozenLinear):
    """A linear layer of 8-bit weights, one scale for each output, for CPUs without products of 8-bit numbers.

    Args:
        linear: The layer.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        values, scale = quantize_int8(linear.weight.detach())
        self._values = values
        self._scale = scale.to(linear.weight.dtype)

    @property
    def weight(self) -> torch.Tensor:  # [out_features, in_features]
        """The weight that it multiplies with, in float32."""
        return self._values * self._scale.float()[:, None]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:  # [..., in_features] -> [..., out_features]
        """The product, with the bias."""
        rows = hidden.reshape(-1, self.in_features).contiguous()
        out: torch.Tensor = torch.ops.aten._weight_int8pack_mm(rows, self._values, self._scale)
        return _with_bias_(out, self.bias).view(*hidden.shape[:-1], self.out_features)


class Int4Linear(FrozenLinear):
    """A linear layer of 4-bit weights on the CPU, a step and an offset for each group of them.

    It multiplies in bfloat16 whatever the layer's dtype: ATen's product in others is sixty times slower, and what
    bfloat16 rounds is little beside what 4 bits do.

    Args:
        linear: The layer.
        group_size: How many neighbours along the input share a step.
    """

    def __init__(self, linear: nn.Linear, group_size: int) -> None:
        super().__init__(linear)
        values, scale, middle = quantize_int4(linear.weight.detach(), group_size)
        self._dtype = linear.weight.dtype
        self._group_size = group_size
        self._packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1)
        self._scale_and_middle = torch.stack([scale.t(), middle.t()], dim=2).bfloat16()  # [groups, outputs, 2]

    @property
    def weight(self) -> torch.Tensor:  # [out_features, in_features]
        """The weight that it multiplies with: the layout is torch's own, so it is asked for row by row."""
        return self._multiply(torch.eye(self.in_features)).t()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:  # [..., in_features] -> [..., out_features]
        """The product, with the bias."""
        out = self._multiply(hidden.reshape(-1, self.in_features)).to(self._dtype)
        return _with_bias_(out, self.bias).view(*hidden.shape[:-1], self.out_features)

    def _multiply(self, rows: torch.Tensor) -> torch.Tensor:  # [num_rows, in_features] -> [num_rows, out_features]
        product: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows.bfloat16().contiguous(), self._packed, self._group_size, self._scale_and_middle
        )
        return product


def quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight to 8 bits, symmetrically for each output.

    Args:
        weight: `[out_features, in_features]`.

    Returns:
        Whole numbers from -127 to 127, and the float32 scale of each output, `[out_features]`.
    """
    weight = weight.float()
    scale = weight.abs().amax(dim=1).mul_(1 / 127).clamp_min_(1e-30)
    return (weight / scale[:, None]).round_().to(torch.int8), scale


def quantize_int4(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round a weight to 4 bits: the 16 steps of a group go from its least to its greatest number.

    Args:
        weight: `[out_features, in_features]`.
        group_size: How many neighbours along the input share a scale; divides `in_features`.

    Returns:
        Whole numbers from 0 to 15 as int32, and of each group its step and what stands for 8, float32
        `[out_features, in_features / group_size]`: a weight is `(number - 8) * step + middle`.
    """
    groups = weight.float().unflatten(1, (-1, group_size))
    least, greatest = groups.aminmax(dim=2, keepdim=True)
    step = (greatest - least).mul_(1 / 15).clamp_min_(1e-30)
    values = ((groups - least) / step).round_().clamp_(0, 15).to(torch.int32)
    return values.flatten(1), step.squeeze(2), (least + 8 * step).squeeze(2)


def dense_weight(linear: Any) -> torch.Tensor:  # [out_features, in_features]
    """The weight of a linear layer, plain, packed or quantised, as an ordinary tensor."""
    weight: torch.Tensor = linear.weight
    if not hasattr(weight, "qdata"):
        return weight
    if hasattr(weight, "dequantize"):
        return weight.dequantize()
    # torchao's 4-bit tensors for CUDA have no way back but their product
    return nn.functional.linear(torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device), weight).t()


def _with_bias_(out: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return out if bias is None else out.add_(bias)
