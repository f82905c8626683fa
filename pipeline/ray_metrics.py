"""Ray's counters, gauges and histograms behind `pipeline.metrics.Metrics`: Prometheus reads them at Ray's endpoint."""

from collections.abc import Sequence
from typing import cast

from ray.util import metrics as ray_metrics

from pipeline.metrics import Counter, Gauge, Histogram


class RayMetrics:
    """What it makes belongs to this process, which must be one of Ray's, or be connected to it.

    It is Ray's own; the casts are for tags that may be left out, which Ray does not declare.
    """

    def counter(self, name: str, description: str, tags: Sequence[str] = ()) -> Counter:
        """A counter of Ray's."""
        return cast(Counter, ray_metrics.Counter(name, description, tuple(tags)))

    def gauge(self, name: str, description: str, tags: Sequence[str] = ()) -> Gauge:
        """A gauge of Ray's."""
        return cast(Gauge, ray_metrics.Gauge(name, description, tuple(tags)))

    def histogram(self, name: str, description: str, bounds: Sequence[float], tags: Sequence[str] = ()) -> Histogram:
        """A histogram of Ray's."""
        return cast(Histogram, ray_metrics.Histogram(name, description, list(bounds), tuple(tags)))
