"""Prompts in, completions out, on one device.

`load_expert` gives an engine and the builder of its requests, `load_experts` those of several experts side by side;
`pipeline.engine.types` holds the records that flow.
This package imports torch only when a model is loaded, and never Ray.
"""

from typing import TYPE_CHECKING, Any

from pipeline.engine.types import Completion, Engine, Failure, Request, SamplingParams

if TYPE_CHECKING:
    from pipeline.engine.runtime import LoadedExpert, LoadedExperts, load_expert, load_experts

__all__ = [
    "Completion",
    "Engine",
    "Failure",
    "LoadedExpert",
    "LoadedExperts",
    "Request",
    "SamplingParams",
    "load_expert",
    "load_experts",
]


def __getattr__(name: str) -> Any:
    if name in ("LoadedExpert", "LoadedExperts", "load_expert", "load_experts"):
        from pipeline.engine import runtime

        return getattr(runtime, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
