"""Kernels of the packed engine: for CPUs, compiled on first use, and the same in plain torch; for GPUs in `gpu`."""

from pipeline.engine.kernels.build import KernelsUnavailableError
from pipeline.engine.kernels.cpu import Kernels, PreparedAttention, load_kernels
from pipeline.engine.kernels.plan import AttentionPlan, Spans

__all__ = ["AttentionPlan", "Kernels", "KernelsUnavailableError", "PreparedAttention", "Spans", "load_kernels"]
