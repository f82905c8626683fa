"""Kinds of values that several configurations hold, with what a person is told to give."""

import math
import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from pipeline.engine.devices import DEVICE_NAMES, DEVICE_PATTERN, gpu_index

STRICT = ConfigDict(frozen=True, extra="forbid", strict=True)


def section(value: Any) -> Any:
    """A section whose keys are all commented out reads as null."""
    return {} if value is None else value


def path_text(value: Any) -> Any:
    """A path object as text; anything else as it is."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _ray_quantity(value: float) -> float:
    if value > 1 and value != int(value):
        raise PydanticCustomError("ray_quantity", "Ray shares out a resource below 1 in fractions, above it whole")
    return value


def check_gpu_number(device: str | None, num_gpus: float | None) -> None:
    """Refuse a GPU by a number that its process cannot have: Ray gives each process GPUs of its own, numbered from 0.

    Args:
        device: Of each process.
        num_gpus: How many GPUs each reserves; None for one. With 0 Ray deals out none, and nothing is known of them.

    Raises:
        PydanticCustomError: There is no such number.
    """
    index = gpu_index(device)
    most = 1 if num_gpus is None else math.ceil(num_gpus)
    if index is not None and 0 < most <= index:
        names = "GPU, its cuda:0" if most == 1 else f"GPUs, its cuda:0 to cuda:{most - 1}"
        raise PydanticCustomError(
            "gpu_number",
            "there is no {device} where Ray gives each process {most} {names}: write cuda",
            {"device": device, "most": most, "names": names},
        )


Text = Annotated[str, Field(min_length=1)]
PathText = Annotated[Text, BeforeValidator(path_text)]
RayQuantity = Annotated[
    float,
    Field(ge=0, allow_inf_nan=False, json_schema_extra={"expected": "a number from 0 to 1, or a whole number"}),
    AfterValidator(_ray_quantity),
]
DeviceName = Annotated[str, Field(pattern=DEVICE_PATTERN, json_schema_extra={"expected": DEVICE_NAMES})]
DtypeName = Literal["float32", "bfloat16", "float16"]
