"""A collector of OpenTelemetry's spans on this machine, as any that speaks OTLP over HTTP."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.web import listening


@dataclass(frozen=True)
class Collected:
    """A span as it came.

    Args:
        name: What it is.
        trace_id, span_id, parent_id: In hexadecimal digits; the parent's empty where there is none.
        attributes: Of the span, those that are text or whole numbers.
        resource: Of the process that it was in.
    """

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict[str, Any]
    resource: dict[str, Any]


class Collector:
    """What has come so far."""

    def __init__(self) -> None:
        self.environment: dict[str, str] = {}
        self._lock = threading.Lock()
        self._spans: list[Collected] = []

    def named(self, name: str, trace_id: str | None = None) -> list[Collected]:
        """The spans of a name, of one trace or of any, in the order in which they came."""
        with self._lock:
            return [one for one in self._spans if one.name == name and trace_id in (None, one.trace_id)]

    def take(self, body: bytes) -> None:
        """Take in what a process has sent."""
        with self._lock:
            for batch in ExportTraceServiceRequest.FromString(body).resource_spans:
                resource = _values(batch.resource.attributes)
                self._spans += [
                    Collected(
                        span.name,
                        span.trace_id.hex(),
                        span.span_id.hex(),
                        span.parent_span_id.hex(),
                        _values(span.attributes),
                        resource,
                    )
                    for scope in batch.scope_spans
                    for span in scope.spans
                ]


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector while it listens; its `environment` has programs export to it, at their end and not before."""
    collector = Collector()

    class Taking(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            collector.take(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200 if self.path == "/v1/traces" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Nobody wants to know."""

    with listening(Taking) as address:
        collector.environment = {
            "OTEL_TRACES_EXPORTER": "otlp",
            "OTEL_EXPORTER_OTLP_ENDPOINT": address,
            "OTEL_BSP_SCHEDULE_DELAY": "600000",
        }
        yield collector


def _values(attributes: Any) -> dict[str, Any]:
    kinds = ("string_value", "int_value")
    return {one.key: getattr(one.value, kind) for one in attributes if (kind := one.value.WhichOneof("value")) in kinds}
