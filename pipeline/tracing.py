"""Spans of OpenTelemetry around what takes time, where its API is installed; else nothing.

A program that wants them sets a tracer provider, as OpenTelemetry's own documentation says; without one they cost
nothing. The processes that are ours alone (commands, a job's workers, a service's gateway and replicas) set one
themselves where OpenTelemetry's environment variables ask for it; see `export_spans`.

Spans: `expert.load`, `expert.generate` (a prompt), `expert.shard` (a batch job's), `expert.request` (online);
attributes of prompts are named by OpenTelemetry's conventions for generative AI.
"""

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from pipeline.version import __version__

logger = logging.getLogger(__name__)

SERVICE_NAME = "expert-pipeline"  # of the spans' resource, unless OTEL_SERVICE_NAME says another
FLUSH_MILLISECONDS = 2000  # what the end of a process may wait for a collector
EXPORTERS = "opentelemetry_traces_exporter"  # the entry points by which OpenTelemetry's packages offer them
OTLP = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}

Value = str | int | float | bool | Sequence[str] | None


class Span:
    """Something that takes time.

    Args:
        span: OpenTelemetry's; None where nothing is traced.
    """

    def __init__(self, span: Any = None) -> None:
        self._span = span if span is not None and span.is_recording() else None

    @property
    def is_recorded(self) -> bool:
        """Whether anybody wants to know."""
        return self._span is not None

    def set(self, attributes: Mapping[str, Value]) -> None:
        """Say more of it; an attribute that is None is left out."""
        if self._span is not None:
            self._span.set_attributes(_given(attributes))

    def fail(self, code: str, message: str) -> None:
        """Say that it went wrong.

        Args:
            code: The `code` of our error.
            message: What is wrong.
        """
        if self._span is not None:
            from opentelemetry.trace import Status, StatusCode

            self._span.set_status(Status(StatusCode.ERROR, message))
            self._span.set_attribute("error.type", code)

    def end(self) -> None:
        """It is over."""
        if self._span is not None:
            self._span.end()


@contextmanager
def span(
    name: str, attributes: Mapping[str, Value] | None = None, *, headers: Mapping[str, str] | None = None
) -> Iterator[Span]:
    """A span around a block; what is begun inside is its child, and an error that leaves it is recorded.

    Args:
        name: What it is.
        attributes: What is known of it.
        headers: Where the caller's span is told (W3C Trace Context), if it is.
    """
    tracer = _tracer()
    if tracer is None:
        yield Span()
        return
    with tracer.start_as_current_span(name, context=_context(headers), attributes=_given(attributes or {})) as inner:
        yield Span(inner)


def begin_span(
    name: str,
    attributes: Mapping[str, Value] | None = None,
    *,
    seconds_ago: float = 0.0,
    headers: Mapping[str, str] | None = None,
) -> Span:
    """A span that `end` ends, in any thread; a child of the span that is current now.

    Args:
        name: What it is.
        attributes: What is known of it.
        seconds_ago: When it began.
        headers: Where the span is told whose child it is instead; see `current_headers`.
    """
    tracer = _tracer()
    if tracer is None:
        return Span()
    began = time.time_ns() - int(seconds_ago * 1e9)
    given = _given(attributes or {})
    return Span(tracer.start_span(name, context=_context(headers), attributes=given, start_time=began))


def current_headers() -> dict[str, str]:
    """The current span as W3C Trace Context headers, for another process; empty where there is none."""
    headers: dict[str, str] = {}
    if _tracer() is not None:
        from opentelemetry import propagate

        propagate.inject(headers)
    return headers


def exporters_asked(environment: Mapping[str, str]) -> list[str]:
    """The exporters of spans that `OTEL_TRACES_EXPORTER` asks for, by the names of their entry points."""
    asked = [name.strip() for name in environment.get("OTEL_TRACES_EXPORTER", "").split(",")]
    return [_exporter_name(name, environment) for name in asked if name not in ("", "none")]


def export_spans(environment: Mapping[str, str]) -> bool:
    """Have this process's spans exported as OpenTelemetry's environment variables say.

    For processes that are ours alone; a program that uses the library sets a tracer provider of its own, and where
    there is one nothing is done. What cannot be had is warned of, as OpenTelemetry asks of an SDK: whoever answers
    goes on without.

    Args:
        environment: `OTEL_TRACES_EXPORTER` names what exports, by commas: `otlp`, `console`, or any other that is
            installed; without it, or with `none`, nothing is exported. `OTEL_EXPORTER_OTLP_PROTOCOL` may be
            `http/protobuf` (if left out) or `grpc`. All others, such as `OTEL_EXPORTER_OTLP_ENDPOINT`,
            `OTEL_TRACES_SAMPLER` and `OTEL_SERVICE_NAME`, the SDK reads itself.

    Returns:
        Whether they are exported from now on.
    """
    names = exporters_asked(environment)
    if not names:
        return False
    try:
        from opentelemetry import trace
        from opentelemetry.sdk.resources import SERVICE_NAME as SERVICE
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        _warn_of_no_export("OpenTelemetry's SDK is not installed")
        return False
    if not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return False
    exporters = [exporter for name in names if (exporter := _exporter(name)) is not None]
    if not exporters:
        return False
    resource = Resource.create()
    if str(resource.attributes.get(SERVICE, "")).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE: SERVICE_NAME}))
    provider = TracerProvider(resource=resource.merge(Resource({"process.pid": os.getpid()})))
    for exporter in exporters:
        provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return True


def flush_spans() -> None:
    """Export what has ended now: this process may be killed before its next turn to do so."""
    if _tracer() is not None:
        from opentelemetry import trace

        flush = getattr(trace.get_tracer_provider(), "force_flush", None)
        if flush is not None:
            flush(FLUSH_MILLISECONDS)


def _exporter_name(name: str, environment: Mapping[str, str]) -> str:
    """What an exporter is called among the entry points."""
    if name != "otlp":
        return name
    given = (environment.get(f"OTEL_EXPORTER_OTLP_{which}PROTOCOL", "").strip() for which in ("TRACES_", ""))
    protocol = next(filter(None, given), "http/protobuf")
    return OTLP.get(protocol, f"otlp over {protocol}")


def _exporter(name: str) -> Any:
    """A span exporter that has an entry point; None, and a warning, where it cannot be made."""
    found = next(iter(entry_points(group=EXPORTERS, name=name)), None)
    if found is None:
        _warn_of_no_export(f"no exporter {name} is installed")
        return None
    try:
        return found.load()()
    except (ImportError, ValueError) as error:  # a library that it needs is missing; a variable that it reads is wrong
        _warn_of_no_export(f"the exporter {name} cannot be made: {error}")
        return None


def _warn_of_no_export(why: str) -> None:
    logger.warning('spans are not exported: %s; for otlp: pip install "expert-pipeline[tracing]"', why)


@cache
def _tracer() -> Any:
    """OpenTelemetry's tracer, which asks for the provider each time; None without its API."""
    try:
        from opentelemetry import trace
    except ImportError:
        return None
    return trace.get_tracer("pipeline", __version__)


def _context(headers: Mapping[str, str] | None) -> Any:
    if headers is None:
        return None
    from opentelemetry import propagate

    return propagate.extract(headers)


def _given(attributes: Mapping[str, Value]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if value is not None}
