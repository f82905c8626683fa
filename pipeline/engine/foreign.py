"""What torch, transformers and PEFT raise while they load something, as errors of ours.

What they read was written by others: a number too large, a list where a text belongs, an adapter of another model. The
kind of error that a library has for it depends on the line where it stumbles (TypeError, IndexError, an assertion), so
any is taken; its kind and words are in `details`, and it is the cause.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipeline.errors import ExpertError, LoadError, OutOfMemoryError

MEMORY_HINT = "Use a device with more memory, dtype bfloat16, or quantization int8 or int4."
_NO_MEMORY = "can't allocate memory"  # torch's words on a CPU, in an error of no kind


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
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or _NO_MEMORY in str(error):
            raise OutOfMemoryError(
                f"{message}: there is too little memory", details=said(error), hint=MEMORY_HINT
            ) from error
        raise kind(message, details=said(error), hint=hint) from error


def said(error: Exception) -> tuple[str, ...]:
    """The kind of an error and its first two lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()][:2]
    return (": ".join([type(error).__name__, *lines[:1]]), *lines[1:])
