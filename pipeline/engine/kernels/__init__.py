"""CPU kernels of the packed engine, compiled on first use, and the same in plain torch."""

from pipeline.engine.kernels.cpu import Kernels, PreparedAttention, load_kernels
from pipeline.engine.kernels.plan import AttentionPlan, Spans

__all__ = ["AttentionPlan", "Kernels", "PreparedAttention", "Spans", "load_kernels"]
