"""Spans around loads, prompts, shards and requests, as OpenTelemetry's own SDK records them."""

import asyncio
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from pipeline import Expert, cli, demo, tracing
from pipeline.batch.worker import ShardWorker
from pipeline.demo.questions import draw_questions
from pipeline.engine.runtime import open_experts
from pipeline.package import open_package
from pipeline.serve.api import make_api
from pipeline.serve.local import local_backend
from tests.batch.scripted import load_scripted
from tests.batch.test_worker import make_job
from tests.collector import collecting
from tests.serve.scripted import serving

QUESTION = next(iter(draw_questions("sql", 1)))


@pytest.fixture(scope="module")
def recorded() -> Iterator[InMemorySpanExporter]:
    """What is recorded while this file is tested."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    yield exporter
    provider.shutdown()


@pytest.fixture
def spans(recorded: InMemorySpanExporter) -> InMemorySpanExporter:
    recorded.clear()
    return recorded


def named(spans: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    return [span for span in spans.get_finished_spans() if span.name == name]


def about(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def test_loads_and_prompts_of_an_expert(spans: InMemorySpanExporter) -> None:
    tracer = trace.get_tracer("test")
    with Expert.load(demo.package("sql"), base_model=demo.BASE_MODEL, device="cpu") as expert:
        with tracer.start_as_current_span("mine") as mine:
            result = expert.generate(QUESTION.prompt, schema=QUESTION.schema)
            list(expert.generate_stream(QUESTION.prompt, schema=QUESTION.schema))
            asyncio.run(expert.agenerate(QUESTION.prompt, schema=QUESTION.schema))
        expert.generate_batch(["", "Who?"], max_tokens=2)
    (load,) = named(spans, "expert.load")
    assert about(load)["expert"] == "expert-sql@0.1.0"
    first, streamed, awaited, failed, cut = named(spans, "expert.generate")
    for one in (first, streamed, awaited):
        assert one.parent is not None
        assert one.parent.span_id == mine.get_span_context().span_id, (
            "also from a task, whose prompt begins in a thread"
        )
    told = about(first)
    assert told["gen_ai.request.model"] == "expert-sql"
    assert told["gen_ai.response.model"] == "expert-sql@0.1.0"
    assert (told["gen_ai.usage.input_tokens"], told["gen_ai.usage.output_tokens"]) == (
        result.prompt_tokens,
        result.completion_tokens,
    )
    assert told["gen_ai.response.finish_reasons"] == ("stop",)
    assert told["expert.queue_seconds"] == result.timings.queue
    assert first.start_time is not None
    assert first.end_time is not None
    assert result.timings.total is not None
    assert (first.end_time - first.start_time) / 1e9 == pytest.approx(result.timings.total, abs=0.05)
    assert (failed.status.status_code, about(failed)["error.type"]) == (StatusCode.ERROR, "invalid_request")
    assert about(cut)["gen_ai.response.finish_reasons"] == ("length",)


def test_a_request_continues_the_clients_trace(spans: InMemorySpanExporter) -> None:
    packages = {"sql": open_package(demo.package("sql"))}
    experts = open_experts(packages, demo.BASE_MODEL, device="cpu", dtype="float32")
    with local_backend(experts) as backend:
        body = {"model": "sql", "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 2}
        headers = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
        with serving(make_api(backend, backend.cards)) as url:
            chat = f"{url}/v1/chat/completions"
            assert httpx.post(chat, json=body, headers=headers).status_code == 200
            assert httpx.post(chat, json={**body, "model": "nobody"}).status_code == 404
    good, bad = named(spans, "expert.request")
    assert good.context is not None
    assert good.context.trace_id == 0x0AF7651916CD43DD8448EB211C80319C
    assert about(good)["gen_ai.request.model"] == "sql"
    assert about(good)["http.response.status_code"] == 200
    assert about(good)["gen_ai.usage.output_tokens"] == 2
    assert (bad.status.status_code, about(bad)["error.type"]) == (StatusCode.ERROR, "model_not_found")
    (answered,) = named(spans, "expert.generate")
    assert answered.parent is not None
    assert answered.parent.span_id == good.context.span_id, "the replica's span is a child of the gateway's"


def test_shards_of_a_job(spans: InMemorySpanExporter, tmp_path: Path) -> None:
    job = make_job(tmp_path, {"prompt": [f"row {number}" for number in range(50)]}, load=load_scripted)
    worker = ShardWorker(job.told)
    for block in job.blocks():
        worker(block)
    (load,) = named(spans, "expert.load")
    assert about(load)["expert"] == "expert-None@1"
    told = [about(span) for span in named(spans, "expert.shard")]
    assert [(one["expert.shard.index"], one["expert.shard.rows"]) for one in told] == [(0, 40), (1, 10)]
    assert [one["gen_ai.usage.output_tokens"] for one in told] == [40, 10]
    assert all(one["expert.shard.errors"] == 0 for one in told)


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[TracerProvider]]:
    """The provider that is set, in what could be a process of ours: this one has its own already."""
    providers: list[TracerProvider] = []
    monkeypatch.setattr(trace, "get_tracer_provider", trace.ProxyTracerProvider)
    monkeypatch.setattr(trace, "set_tracer_provider", providers.append)
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    yield providers
    for provider in providers:
        provider.shutdown()


@pytest.mark.parametrize("name", [None, "mine"])
def test_spans_go_where_the_environment_says(
    exported: list[TracerProvider], monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    with collecting() as collector:
        for variable, value in collector.environment.items():
            monkeypatch.setenv(variable, value)
        if name is not None:
            monkeypatch.setenv("OTEL_SERVICE_NAME", name)
        assert tracing.export_spans(os.environ)
        (provider,) = exported
        provider.get_tracer("test").start_span("one").end()
        monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
        tracing.flush_spans()
        (one,) = collector.named("one")
        assert one.resource["service.name"] == (name or "expert-pipeline")
        assert one.resource["process.pid"] == os.getpid()
        assert not tracing.export_spans(os.environ), "it is set"


def test_a_command_exports_its_spans(exported: list[TracerProvider], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "app", lambda: None)
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console")
    cli.main()
    assert len(exported) == 1


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({}, None),
        ({"OTEL_TRACES_EXPORTER": ""}, None),
        ({"OTEL_TRACES_EXPORTER": "none"}, None),
        ({"OTEL_TRACES_EXPORTER": "abacus"}, "no exporter abacus is installed"),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "no exporter otlp_proto_grpc is"),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "tin"}, "no exporter otlp over tin is"),
    ],
)
def test_what_cannot_be_exported_is_warned_of_and_hinders_nothing(
    exported: list[TracerProvider], caplog: pytest.LogCaptureFixture, environment: dict[str, str], says: str | None
) -> None:
    assert not tracing.export_spans(environment)
    assert exported == []
    if says is None:
        assert not caplog.text
    else:
        assert f"spans are not exported: {says}" in caplog.text
        assert 'pip install "expert-pipeline[tracing]"' in caplog.text


def test_an_sdk_that_is_missing_is_warned_of(
    exported: list[TracerProvider], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    assert not tracing.export_spans({"OTEL_TRACES_EXPORTER": "otlp"})
    assert exported == []
    assert "OpenTelemetry's SDK is not installed" in caplog.text


def test_a_program_that_has_a_provider_keeps_it(recorded: InMemorySpanExporter) -> None:
    before = trace.get_tracer_provider()
    assert not tracing.export_spans({"OTEL_TRACES_EXPORTER": "console"})
    assert trace.get_tracer_provider() is before


def test_without_opentelemetry_nothing_is_missed(monkeypatch: pytest.MonkeyPatch, spans: InMemorySpanExporter) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    tracing._tracer.cache_clear()
    try:
        with tracing.span("a", headers={}) as one:
            assert not one.is_recorded
            one.set({"b": 1})
            one.fail("c", "d")
        tracing.begin_span("a").end()
        assert tracing.current_headers() == {}
    finally:
        tracing._tracer.cache_clear()
    assert not spans.get_finished_spans()
