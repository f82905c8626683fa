"""Kinds of values that several configurations hold, with what a person is told to give."""

import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

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


Text = Annotated[str, Field(min_length=1)]
PathText = Annotated[Text, BeforeValidator(path_text)]
RayQuantity = Annotated[
    float,
    Field(ge=0, allow_inf_nan=False, json_schema_extra={"expected": "a number from 0 to 1, or a whole number"}),
    AfterValidator(_ray_quantity),
]
DtypeName = Literal["float32", "bfloat16", "float16"]
