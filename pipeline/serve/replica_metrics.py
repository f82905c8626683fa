"""What a replica tells Prometheus, at Ray's own endpoint."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ray.util.metrics import Counter, Gauge, Histogram

if TYPE_CHECKING:
    from pipeline.engine.stats import EngineStats
    from pipeline.serve.local import AskTimes

SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0]
_EXPERT = ("expert",)


class ReplicaMetrics:
    """The engine's metrics; those of requests as clients see them are the gateway's."""

    def __init__(self) -> None:
        self._prompt_tokens = Counter("expert_prompt_tokens_total", "Tokens of prompts.", _EXPERT)
        self._completion_tokens = Counter("expert_completion_tokens_total", "Tokens generated.", _EXPERT)
        self._loads = Counter("expert_loads_total", "How often an adapter was put on the device.", _EXPERT)
        self._queue = Histogram(
            "expert_queue_seconds", "From a request's arrival to its first computed token.", SECONDS, _EXPERT
        )
        self._first = Histogram(
            "expert_time_to_first_token_seconds",
            "From a request's arrival to its first generated token.",
            SECONDS,
            _EXPERT,
        )
        self._between = Histogram(
            "expert_inter_token_seconds", "From one token of an answer to the next, a request's mean.", SECONDS, _EXPERT
        )
        self._running = Gauge("expert_running_sequences", "Sequences in the batch.")
        self._waiting = Gauge("expert_waiting_requests", "Sequences that wait for a place in it.")
        self._kv = Gauge("expert_kv_cache_used_ratio", "Share of the memory for keys and values in use.")
        self._resident = Gauge("expert_resident_adapters", "Adapters on the device.")
        self._told_loads: dict[str, int] = {}

    def note(self, times: "AskTimes") -> None:
        """Count a request that is over."""
        tags = {"expert": times.expert}
        if times.first is None or times.begun is None:
            return
        self._prompt_tokens.inc(times.prompt_tokens, tags)
        self._queue.observe(times.begun - times.asked, tags)
        self._first.observe(times.first - times.asked, tags)
        if times.completion_tokens:
            self._completion_tokens.inc(times.completion_tokens, tags)
        if times.num_steps > 1:
            self._between.observe((times.ended - times.first) / (times.num_steps - 1), tags)

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
                self._loads.inc(new, {"expert": name})
                self._told_loads[name] = count
