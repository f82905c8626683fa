"""Spans of OpenTelemetry around what takes time, where its API is installed; else nothing.

A program that wants them sets a tracer provider, as OpenTelemetry's own documentation says; without one they cost
nothing. Spans: `expert.load`, `expert.generate` (a prompt), `expert.shard` (a batch job's), `expert.request` (online);
attributes of prompts are named by OpenTelemetry's conventions for generative AI.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from pipeline.version import __version__

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
