"""The Grafana dashboard shows the metrics that the code defines, all of them and no others."""

import json
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from ray.util.metrics import Counter, Gauge, Histogram, Metric

from pipeline.ray_metrics import RayMetrics
from pipeline.serve.metrics import GatewayMetrics
from pipeline.serve.replica_metrics import ReplicaMetrics

PROJECT = Path(__file__).parents[2]
DASHBOARD = PROJECT / "configs" / "grafana" / "serving.json"
RAY_PREFIX = "ray_"  # Ray puts it before the name of every metric that it exports
HISTOGRAM_SUFFIXES = ("_bucket", "_sum", "_count")


class _Made(RayMetrics):
    """Ray's metrics, and which were made."""

    def __init__(self) -> None:
        self.parts: list[Metric] = []

    def counter(self, *args: Any) -> Counter:
        self.parts.append(made := super().counter(*args))
        return made

    def gauge(self, *args: Any) -> Gauge:
        self.parts.append(made := super().gauge(*args))
        return made

    def histogram(self, *args: Any) -> Histogram:
        self.parts.append(made := super().histogram(*args))
        return made


@pytest.fixture(scope="module")
def dashboard() -> Any:
    return json.loads(DASHBOARD.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def metrics() -> dict[str, Metric]:
    """The gateway's and the replica's metrics, by the names under which Ray exports them."""
    made = _Made()
    GatewayMetrics(made)
    ReplicaMetrics(made)
    return {RAY_PREFIX + part.info["name"]: part for part in made.parts}


def test_every_query_asks_for_a_metric_that_exists(dashboard: Any, metrics: dict[str, Metric]) -> None:
    asked = {name for query in _queries(dashboard) for name in _series(query)}

    assert asked - set(_exported(metrics)) == set()


def test_every_metric_is_shown(dashboard: Any, metrics: dict[str, Metric]) -> None:
    exported = _exported(metrics)
    shown = {exported[name] for query in _queries(dashboard) for name in _series(query)}

    assert set(metrics) - shown == set()


def test_queries_name_only_tags_of_their_metric(dashboard: Any, metrics: dict[str, Metric]) -> None:
    exported = _exported(metrics)
    for query in _queries(dashboard):
        known = {tag for name in _series(query) for tag in metrics[exported[name]].info["tag_keys"]}
        assert _labels(query) - known - {"le"} == set(), query


def test_counters_and_histograms_are_asked_for_their_rate(dashboard: Any, metrics: dict[str, Metric]) -> None:
    exported = _exported(metrics)
    for query in _targets(dashboard):
        for name in _series(query):
            is_gauge = isinstance(metrics[exported[name]], Gauge)
            rated = re.search(rf"(?:rate|increase)\({name}(?:{{[^}}]*}})?\[", query)
            assert (rated is None) == is_gauge, query


def test_panels_use_the_chosen_data_source_and_do_not_overlap(dashboard: Any) -> None:
    panels = dashboard["panels"]
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    for panel in panels:
        for part in [panel, *panel.get("targets", [])] if panel["type"] != "row" else []:
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    for query in _queries(dashboard):
        assert set(re.findall(r"\$(\w+)", query)) <= {*variables, "__rate_interval"}

    assert len({panel["id"] for panel in panels}) == len(panels)
    boxes = [panel["gridPos"] for panel in panels]
    assert all(box["x"] + box["w"] <= 24 for box in boxes)
    assert not [(a, b) for a, b in combinations(boxes, 2) if _overlap(a, b)]


def _targets(dashboard: Any) -> Iterator[str]:
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield target["expr"]


def _queries(dashboard: Any) -> Iterator[str]:
    yield from _targets(dashboard)
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]["query"]


def _exported(metrics: dict[str, Metric]) -> dict[str, str]:
    """From each series to the metric that it belongs to."""
    return {
        name + suffix: name
        for name, metric in metrics.items()
        for suffix in (HISTOGRAM_SUFFIXES if isinstance(metric, Histogram) else ("",))
    }


def _series(query: str) -> list[str]:
    names = re.findall(rf"\b{RAY_PREFIX}\w+", query)
    assert names, f"{query} asks for nothing of Ray's"
    return names


def _labels(query: str) -> set[str]:
    filtered = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", query)
    grouped = [name for names in re.findall(r"\bby \(([^)]*)\)", query) for name in re.split(r",\s*", names)]
    listed = re.findall(r"label_values\([^,]+,\s*(\w+)\)", query)
    return {*filtered, *grouped, *listed}


def _overlap(a: dict[str, int], b: dict[str, int]) -> bool:
    return (
        a["x"] < b["x"] + b["w"] and b["x"] < a["x"] + a["w"] and a["y"] < b["y"] + b["h"] and b["y"] < a["y"] + a["h"]
    )
