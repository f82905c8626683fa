"""What a replica counts and measures, at Ray's own Prometheus endpoint."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pipeline.metrics import AnswerMetrics, Metrics

if TYPE_CHECKING:
    from pipeline.engine.stats import EngineStats


class ReplicaMetrics:
    """The engine's metrics; those of requests as clients see them are the gateway's.

    Args:
        metrics: Makes what is told.

    `answers` takes note of each request that is over.
    """

    def __init__(self, metrics: Metrics) -> None:
        self.answers = AnswerMetrics(metrics)
        self._running = metrics.gauge("expert_running_sequences", "Sequences in the batch.")
        self._waiting = metrics.gauge("expert_waiting_requests", "Sequences that wait for a place in it.")
        self._kv = metrics.gauge("expert_kv_cache_used_ratio", "Share of the memory for keys and values in use.")
        self._resident = metrics.gauge("expert_resident_adapters", "Adapters on the device.")
        self._told_loads: dict[str, int] = {}

    def set_gauges(self, stats: "EngineStats", loads: Mapping[str, int]) -> None:
        """Tell what the engine is doing now.

        Args:
            stats: The engine's.
            loads: How often each expert was loaded so far.
        """
        self._running.set(stats.num_running)
        self._waiting.set(stats.num_waiting)
        self._kv.set(stats.kv_used_ratio)
        self._resident.set(stats.num_resident)
        for name, count in loads.items():
            new = count - self._told_loads.get(name, 0)
            if new:
                self.answers.note_loads(name, new)
                self._told_loads[name] = count
