"""What a gateway counts and measures, at Ray's own Prometheus endpoint: requests as clients see them."""

from pipeline.metrics import SECONDS, Metrics

UNKNOWN_EXPERT = "unknown"


class GatewayMetrics:
    """Requests by expert and status, errors by code, and how long requests take.

    Args:
        metrics: Makes what is told.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._requests = metrics.counter("expert_requests_total", "Requests answered or refused.", ("expert", "status"))
        self._errors = metrics.counter("expert_errors_total", "Requests that ended with an error.", ("code",))
        self._seconds = metrics.histogram(
            "expert_request_seconds", "From a request's arrival at the gateway to its last byte.", SECONDS, ("expert",)
        )

    def note(self, *, expert: str | None, status: int, code: str | None, seconds: float) -> None:
        """Count a request that is over; see `pipeline.serve.exchange.RequestMetrics`."""
        expert = expert or UNKNOWN_EXPERT  # never the client's own word: every name would be a series of its own
        self._requests.inc(1, {"expert": expert, "status": str(status)})
        self._seconds.observe(seconds, {"expert": expert})
        if code is not None:
            self._errors.inc(1, {"code": code})
