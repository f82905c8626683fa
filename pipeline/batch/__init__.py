"""A dataset in, an answered dataset out, on Ray Data."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.batch.result import BatchResult
    from pipeline.batch.run import run_batch, run_config

__all__ = ["BatchResult", "run_batch", "run_config"]


def __getattr__(name: str) -> Any:
    if name == "BatchResult":
        from pipeline.batch.result import BatchResult

        return BatchResult
    if name in ("run_batch", "run_config"):
        from pipeline.batch import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
