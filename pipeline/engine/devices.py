"""The device that a model is computed on: what it may be called, which ones there are, and which is taken."""

import logging
import os
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

DEVICE_NAMES = "auto, cpu, cuda, cuda:1 or mps"
DEVICE_PATTERN = r"^(auto|cpu|mps|cuda(:(0|[1-9][0-9]{0,2}))?)$"
GPU_DEVICE = Path("/dev/nvidia0")  # there once the driver of an NVIDIA GPU is loaded, whether torch can use it or not


def check_device(device: Any) -> None:
    """Refuse a device that is not there, before anything is loaded for it.

    Args:
        device: As for `choose_device`. Torch is imported only for one that may be missing: not for the CPU, not for
            `"auto"`.

    Raises:
        ConfigError: The device is unknown or not there.
    """
    if device is None:
        return
    _check_name(device)
    if device not in ("auto", "cpu"):
        choose_device(device)


def gpu_index(device: str | None) -> int | None:
    """Which GPU a device's name asks for, by its number; None where it leaves that open, or is none."""
    kind, _, number = (device or "").partition(":")
    return int(number) if kind == "cuda" and number else None


def choose_device(device: str | None = None) -> "torch.device":
    """The device asked for, or the best there is: CUDA, then MPS, then the CPU.

    Args:
        device: `"cpu"`; `"cuda"` for the first GPU that this process sees, `"cuda:1"` for its second; `"mps"` for
            Apple's; `"auto"` or None for the best. What is named is taken or refused: only the best may be the CPU.

    Raises:
        ConfigError: The device asked for is unknown or not there; it names those that are.
    """
    import torch

    if device in (None, "auto"):
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        logger.info("chose the device %s", name)
        if name == "cpu" and os.environ.get("CUDA_VISIBLE_DEVICES", "0") not in ("", "-1") and GPU_DEVICE.exists():
            _warn_of_unused_gpu(torch.version.cuda)
        return torch.device(name)
    if device == "cpu":
        return torch.device(device)
    _check_name(device)
    there = available_devices()
    if (f"{device}:0" if device == "cuda" else device) not in there:
        raise ConfigError(
            f"device {device!r} is not available",
            details=(f"there is: {', '.join(there)}", *_why_not(device)),
            hint="Use one of these, or leave device out to take the best there is.",
        )
    return torch.device(device)


def _check_name(device: Any) -> None:
    if not isinstance(device, str) or re.fullmatch(DEVICE_PATTERN, device) is None:
        raise ConfigError(f"device {device!r} is unknown", hint=f"Use {DEVICE_NAMES}.")


def available_devices() -> tuple[str, ...]:
    """The devices that torch can use in this process, by the names that `choose_device` takes."""
    import torch

    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return (
        "cpu",
        *(f"cuda:{index}" for index in range(num_gpus)),
        *(("mps",) if torch.backends.mps.is_available() else ()),
    )


def _why_not(device: str) -> tuple[str, ...]:
    """What is known of the reason that a device is not there; nothing where the list of devices says it."""
    import torch

    if device == "mps":
        return (
            "mps is the GPU of a Mac: this torch is not built for it"
            if not torch.backends.mps.is_built()
            else "mps needs a Mac with a chip of Apple's own, and a macOS that this torch knows",
        )
    if torch.cuda.is_available():
        return ()
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden in ("", "-1"):
        return (f"CUDA_VISIBLE_DEVICES={hidden} hides every GPU from this process",)
    return (_cuda_reason(torch.version.cuda),)


def _cuda_reason(built_for: str | None) -> str:
    if built_for is None:
        return "this torch has no CUDA"
    return f"this torch is built for CUDA {built_for}: is there a GPU, and a driver as new?"


@cache
def _warn_of_unused_gpu(built_for: str | None) -> None:
    """Say once that this machine has a GPU which torch cannot use."""
    why = _cuda_reason(built_for)
    logger.warning('there is an NVIDIA GPU, and answers come from the CPU: %s; device="cpu" says it is meant', why)
