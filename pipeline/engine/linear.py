"""A linear layer as the engine computes it: plain, packed for the CPU or quantised, behind one set of functions."""

from typing import Any

import torch
from torch import nn


class PackedLinear(nn.Module):
    """A frozen bfloat16 linear layer with its weight in the layout that oneDNN computes in.

    A plain weight is rearranged by oneDNN at every call; at 1 to 32 rows that takes as long as the product itself.

    Args:
        linear: The layer; its weight is copied.
        num_rows: The usual number of rows of an input, which decides the layout.
    """

    def __init__(self, linear: nn.Linear, num_rows: int = 64) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
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


def dense_weight(linear: Any) -> torch.Tensor:  # [out_features, in_features]
    """The weight of a linear layer, plain, packed or quantised, as an ordinary tensor."""
    weight: torch.Tensor = linear.weight
    return weight.dequantize() if hasattr(weight, "tensor_impl") or hasattr(weight, "qdata") else weight
