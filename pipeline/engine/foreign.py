"""What torch, transformers and PEFT raise while they load something, as errors of ours.

What they read was written by others: a number too large, a list where a text belongs, an adapter of another model. The
kind of error that a library has for it depends on the line where it stumbles (TypeError, IndexError, an assertion), so
any is taken; its kind and words are in `details`, and it is the cause.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

from pipeline.errors import ExpertError, LoadError, OutOfMemoryError

P = ParamSpec("P")
R = TypeVar("R")

MEMORY_HINT = "Use a device with more memory, dtype bfloat16, or quantization int8 or int4."
_NO_MEMORY = "allocate memory"  # what torch ("can't") and the system ("Cannot") say on a CPU, in errors of no kind


@contextmanager
def foreign_errors_as(kind: type[LoadError], message: str, *, hint: str) -> Iterator[None]:
    """Raise what a library raises in here as an error of ours; errors of ours pass.

    Args:
        kind, message, hint: Of the error; what the library said is in its details.

    Raises:
        OutOfMemoryError: The device has too little memory.
        LoadError: Of that kind, for all else.
    """
    try:
        yield
    except ExpertError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemoryError(
                f"{message}: there is too little memory", details=said(error), hint=MEMORY_HINT
            ) from error
        raise kind(message, details=said(error), hint=hint) from error


def memory_told(message: str, *, hint: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Have a function that loads something say in our words that the device has too little memory.

    Args:
        message, hint: Of the error; what the library said is in its details. All other errors pass.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return function(*args, **kwargs)
            except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
                if not is_out_of_memory(error):
                    raise
                raise OutOfMemoryError(message, details=said(error), hint=hint) from error

        return run

    return decorate


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device, or the machine, had too little memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or _NO_MEMORY in str(error)


def said(error: Exception) -> tuple[str, ...]:
    """The kind of an error and its first two lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()][:2]
    return (": ".join([type(error).__name__, *lines[:1]]), *lines[1:])
