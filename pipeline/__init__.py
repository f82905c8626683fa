"""Distributed batch inference for expert adapters over one base language model, on Ray.

`Expert` answers prompts in this process, `ExpertManager` those of many experts, `run_batch` answers a dataset on Ray;
`demo` is a tiny model to try them with.
Importing this package imports neither torch nor Ray; they are imported when first needed.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

from pipeline import logs as _logs
from pipeline.version import __version__ as __version__

if TYPE_CHECKING:
    from pipeline import demo, errors
    from pipeline.batch import BatchResult, run_batch
    from pipeline.expert import Expert, InferenceResult
    from pipeline.manager import ExpertManager

__all__ = ["BatchResult", "Expert", "ExpertManager", "InferenceResult", "demo", "errors", "run_batch"]

_HOMES = {
    "BatchResult": "pipeline.batch",
    "Expert": "pipeline.expert",
    "ExpertManager": "pipeline.manager",
    "InferenceResult": "pipeline.expert",
    "run_batch": "pipeline.batch",
}


_logs.set_up(os.environ)


def __getattr__(name: str) -> Any:
    if name in ("demo", "errors"):
        return importlib.import_module(f"pipeline.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
