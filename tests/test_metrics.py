"""What is counted and measured, through the one interface: by programs, services and jobs."""

from collections.abc import Callable

import pytest
from ray.util import metrics as ray_metrics

from pipeline import Expert, ExpertManager, demo
from pipeline.batch.metrics import JobMetrics
from pipeline.demo.questions import draw_questions
from pipeline.errors import InvalidRequestError
from pipeline.metrics import MemoryMetrics, Metrics, NullMetrics
from pipeline.ray_metrics import RayMetrics
from pipeline.serve.metrics import GatewayMetrics
from pipeline.serve.replica_metrics import ReplicaMetrics

QUESTION = next(iter(draw_questions("sql", 1)))


def test_an_expert_counts_and_measures_its_answers() -> None:
    metrics = MemoryMetrics()
    with Expert.load(demo.package("sql"), base_model=demo.BASE_MODEL, device="cpu", metrics=metrics) as expert:
        result = expert.generate(QUESTION.prompt, schema=QUESTION.schema)
        stream = expert.generate_stream(QUESTION.prompt, schema=QUESTION.schema)
        list(stream)
        expert.generate_batch([""])
        with pytest.raises(InvalidRequestError):
            expert.generate("")
    tags = {"expert": "expert-sql"}
    assert metrics.value("expert_loads_total", **tags) == 1
    assert metrics.value("expert_prompt_tokens_total", **tags) == 2 * result.prompt_tokens
    assert metrics.value("expert_completion_tokens_total", **tags) == 2 * result.completion_tokens
    assert metrics.value("expert_failed_answers_total", code="invalid_request", **tags) == 2
    (queue, _), (first, _) = (
        metrics.values(name, **tags) for name in ("expert_queue_seconds", "expert_time_to_first_token_seconds")
    )
    assert (queue, first) == (result.timings.queue, result.timings.first_token)
    assert len(metrics.values("expert_inter_token_seconds", **tags)) == 2


def test_a_manager_counts_loads_and_answers_by_expert() -> None:
    metrics = MemoryMetrics()
    with ExpertManager(base_model=demo.BASE_MODEL, device="cpu", max_loaded_experts=1, metrics=metrics) as manager:
        for task in ("sql", "json", "sql"):
            manager.load_expert(task, demo.package(task))
            manager.generate(task, "Who?", max_tokens=2)
    assert metrics.value("expert_loads_total", expert="expert-sql") == 2
    assert metrics.value("expert_completion_tokens_total", expert="expert-json") == 2


def test_rays_are_made_of_the_same_calls_and_null_takes_them_too() -> None:
    made = RayMetrics().histogram("test_seconds", "Seconds.", (0.1, 1.0), ("expert",))
    assert isinstance(made, ray_metrics.Histogram)
    assert (made.info["name"], made.info["tag_keys"], made.info["boundaries"]) == (
        "test_seconds",
        ("expert",),
        [0.1, 1.0],
    )
    assert isinstance(RayMetrics().gauge("test_now", "Now."), ray_metrics.Gauge)
    counter = RayMetrics().counter("test_total", "All.")
    assert isinstance(counter, ray_metrics.Counter)
    for refused in (counter, MemoryMetrics().counter("test_total", "All.")):
        with pytest.raises(ValueError, match="0"):
            refused.inc(0)
    nothing = NullMetrics()
    nothing.counter("a_total", "A.").inc(1)
    nothing.gauge("a", "A.").set(1)
    nothing.histogram("a_seconds", "A.", (1.0,)).observe(1)


MAKERS: list[Callable[[Metrics], object]] = [
    GatewayMetrics,
    ReplicaMetrics,
    lambda metrics: JobMetrics(metrics, job="a", expert="b"),
]


@pytest.mark.parametrize("make", MAKERS)
def test_jobs_and_services_tell_any_metrics(make: Callable[[Metrics], object]) -> None:
    make(NullMetrics())
    metrics = MemoryMetrics()
    made = make(metrics)
    if isinstance(made, GatewayMetrics):
        made.note(expert=None, status=404, code="model_not_found", seconds=0.1)
        assert metrics.value("expert_requests_total", expert="unknown", status="404") == 1
        assert metrics.values("expert_request_seconds", expert="unknown") == (0.1,)
        assert metrics.names == ("expert_errors_total", "expert_request_seconds", "expert_requests_total")
