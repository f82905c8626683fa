"""What is counted and measured: one small interface, and behind it Ray's metrics, a program's own, or nothing.

`pipeline.ray_metrics.RayMetrics` tells Prometheus through Ray, in batch jobs and services; `MemoryMetrics` keeps what
it is told, for tests and notebooks; `NullMetrics` does nothing.
"""

import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Tags = dict[str, str]
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Counter(Protocol):
    """Counts up."""

    def inc(self, value: float = 1.0, tags: Tags | None = None) -> None:
        """Add a value above 0.

        Args:
            value: What is added.
            tags: A value for each of the counter's tags.
        """
        ...


class Gauge(Protocol):
    """Says how much of something there is now."""

    def set(self, value: float, tags: Tags | None = None) -> None:
        """Say so; see `Counter.inc`."""
        ...


class Histogram(Protocol):
    """Counts values by their size."""

    def observe(self, value: float, tags: Tags | None = None) -> None:
        """Count one; see `Counter.inc`."""
        ...


class Metrics(Protocol):
    """Makes counters, gauges and histograms. Each is made once, and may be used from any thread.

    Args of each: its name and what it says, as Prometheus has them; the names of its tags; of a histogram, the upper
    bounds of its buckets, rising.
    """

    def counter(self, name: str, description: str, tags: Sequence[str] = ()) -> Counter:
        """A counter."""
        ...

    def gauge(self, name: str, description: str, tags: Sequence[str] = ()) -> Gauge:
        """A gauge."""
        ...

    def histogram(self, name: str, description: str, bounds: Sequence[float], tags: Sequence[str] = ()) -> Histogram:
        """A histogram."""
        ...


class NullMetrics:
    """Takes note of nothing."""

    def counter(self, name: str, description: str, tags: Sequence[str] = ()) -> Counter:  # noqa: ARG002
        """A counter that counts nothing."""
        return _NOTHING

    def gauge(self, name: str, description: str, tags: Sequence[str] = ()) -> Gauge:  # noqa: ARG002
        """A gauge that keeps nothing."""
        return _NOTHING

    def histogram(self, name: str, description: str, bounds: Sequence[float], tags: Sequence[str] = ()) -> Histogram:  # noqa: ARG002
        """A histogram that keeps nothing."""
        return _NOTHING


class MemoryMetrics:
    """Keeps what it is told, in this process.

    Examples:
        >>> metrics = MemoryMetrics()
        >>> tokens = metrics.counter("tokens_total", "Tokens.", ["expert"])
        >>> tokens.inc(3, {"expert": "sql"})
        >>> tokens.inc(4, {"expert": "sql"})
        >>> metrics.value("tokens_total", expert="sql")
        7.0
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._told: dict[tuple[str, frozenset[tuple[str, str]]], list[float]] = defaultdict(list)

    def counter(self, name: str, description: str, tags: Sequence[str] = ()) -> Counter:  # noqa: ARG002
        """A counter; `value` is its sum."""
        return _Kept(self, name)

    def gauge(self, name: str, description: str, tags: Sequence[str] = ()) -> Gauge:  # noqa: ARG002
        """A gauge; `value` is what it was set to last."""
        return _Kept(self, name)

    def histogram(self, name: str, description: str, bounds: Sequence[float], tags: Sequence[str] = ()) -> Histogram:  # noqa: ARG002
        """A histogram; `values` are all that it was told, and `value` their sum."""
        return _Kept(self, name)

    @property
    def names(self) -> tuple[str, ...]:
        """Of what was told anything, in order."""
        with self._lock:
            return tuple(sorted({name for name, _ in self._told}))

    def value(self, name: str, **tags: str) -> float:
        """The sum of a counter or histogram, or where a gauge stands; 0 where nothing was told."""
        return sum(self.values(name, **tags), 0.0)

    def values(self, name: str, **tags: str) -> tuple[float, ...]:
        """All that a counter or histogram was told, in order; of a gauge, the last."""
        with self._lock:
            return tuple(self._told.get((name, frozenset(tags.items())), ()))

    def tell(self, name: str, value: float, tags: Tags | None, *, is_last_only: bool = False) -> None:
        """Keep a value; its instruments call it."""
        with self._lock:
            kept = self._told[name, frozenset((tags or {}).items())]
            if is_last_only:
                kept.clear()
            kept.append(value)


@dataclass(frozen=True)
class _Kept:
    """A counter, gauge or histogram of `MemoryMetrics`."""

    metrics: MemoryMetrics
    name: str

    def inc(self, value: float = 1.0, tags: Tags | None = None) -> None:
        if value <= 0:
            raise ValueError(f"{self.name} was told {value}: a counter only grows")
        self.metrics.tell(self.name, value, tags)

    def set(self, value: float, tags: Tags | None = None) -> None:
        self.metrics.tell(self.name, value, tags, is_last_only=True)

    def observe(self, value: float, tags: Tags | None = None) -> None:
        self.metrics.tell(self.name, value, tags)


class _Nothing:
    def inc(self, value: float = 1.0, tags: Tags | None = None) -> None:
        pass

    def set(self, value: float, tags: Tags | None = None) -> None:
        pass

    def observe(self, value: float, tags: Tags | None = None) -> None:
        pass


_NOTHING = _Nothing()


@dataclass(frozen=True)
class AnswerTimes:
    """When things happened to one request, by `time.monotonic()`; None for what did not.

    Args:
        expert: Its name.
        asked: It arrived.
        ended: It was over.
        begun: The engine began to compute it.
        first: The first token was there.
        prompt_tokens, completion_tokens: How many; all answers together.
        num_steps: Tokens of the longest answer.
        finish_reason: Of the first answer; `refused`, or `cancelled` where the caller left.
        code: Of the error, if there was one.
    """

    expert: str
    asked: float
    ended: float
    begun: float | None = None
    first: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    num_steps: int = 0
    finish_reason: str = "refused"
    code: str | None = None

    def attributes(self) -> dict[str, Any]:
        """What a span says of it, by OpenTelemetry's names where it has some."""
        return {
            "gen_ai.usage.input_tokens": self.prompt_tokens,
            "gen_ai.usage.output_tokens": self.completion_tokens,
            "gen_ai.response.finish_reasons": [self.finish_reason],
            "expert.queue_seconds": None if self.begun is None else self.begun - self.asked,
            "expert.first_token_seconds": None if self.first is None else self.first - self.asked,
        }


class AnswerMetrics:
    """What engines answer, by expert: the same numbers from a program of one's own and from a service's replicas.

    Args:
        metrics: Makes what is told.
    """

    def __init__(self, metrics: Metrics) -> None:
        expert = ("expert",)
        self._prompt_tokens = metrics.counter("expert_prompt_tokens_total", "Tokens of prompts.", expert)
        self._completion_tokens = metrics.counter("expert_completion_tokens_total", "Tokens generated.", expert)
        self._loads = metrics.counter("expert_loads_total", "How often an adapter was put on the device.", expert)
        self._failures = metrics.counter(
            "expert_failed_answers_total", "Prompts that got an error for an answer.", (*expert, "code")
        )
        self._queue = metrics.histogram(
            "expert_queue_seconds", "From a request's arrival to its first computed token.", SECONDS, expert
        )
        self._first = metrics.histogram(
            "expert_time_to_first_token_seconds",
            "From a request's arrival to its first generated token.",
            SECONDS,
            expert,
        )
        self._between = metrics.histogram(
            "expert_inter_token_seconds", "From one token of an answer to the next, a request's mean.", SECONDS, expert
        )

    def note(self, times: AnswerTimes) -> None:
        """Count a request that is over."""
        tags = {"expert": times.expert}
        if times.code is not None:
            self._failures.inc(1, {**tags, "code": times.code})
        if times.first is None or times.begun is None:
            return
        self._prompt_tokens.inc(times.prompt_tokens, tags)
        self._queue.observe(times.begun - times.asked, tags)
        self._first.observe(times.first - times.asked, tags)
        if times.completion_tokens:
            self._completion_tokens.inc(times.completion_tokens, tags)
        if times.num_steps > 1:
            self._between.observe((times.ended - times.first) / (times.num_steps - 1), tags)

    def note_loads(self, expert: str, count: int = 1) -> None:
        """Count adapters that were put on the device."""
        self._loads.inc(count, {"expert": expert})
