"""From the host to the device without waiting for it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Shapes = tuple[tuple[int, ...], ...]


def packed(arrays: Sequence[npt.NDArray[Any]], device: torch.device) -> torch.Tensor:  # [num_numbers]
    """Whole numbers one after another in memory of the host that `device` copies from without waiting."""
    flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]).astype(np.int64, copy=False))
    return flat.pin_memory() if device.type == "cuda" else flat


def unpacked(flat: torch.Tensor, shapes: Shapes) -> list[torch.Tensor]:
    """Views of numbers that were packed, in their shapes."""
    sizes = [int(np.prod(shape)) for shape in shapes]
    return [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]


def to_device(arrays: Sequence[npt.NDArray[Any]], device: torch.device) -> list[torch.Tensor]:
    """Arrays of whole numbers on the device as int64, all of them in one copy that the host does not wait for."""
    return unpacked(packed(arrays, device).to(device, non_blocking=True), tuple(array.shape for array in arrays))
