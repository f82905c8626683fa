"""How many workers a job gets, and what each reserves."""

import logging
from typing import Any

import pytest

from pipeline.batch.answering import row_seed
from pipeline.batch.cluster import Cluster
from pipeline.batch.config import BatchConfig
from pipeline.batch.execute import Reading, Workers, plan_reading, plan_workers
from pipeline.errors import ConfigError

LAPTOP = Cluster(num_cpus=8, num_gpus=0, is_local=True)
GPU_BOX = Cluster(num_cpus=32, num_gpus=4, is_local=True)


def config(**options: Any) -> BatchConfig:
    return BatchConfig.from_options(dataset="a", expert="b", output="c", **options)


@pytest.mark.parametrize(
    ("cluster", "options", "workers"),
    [
        (LAPTOP, {}, Workers(1, 1, 0, 8, 1)),
        (LAPTOP, {"num_workers": 4}, Workers(4, 1, 0, 2, 4)),
        (LAPTOP, {"num_workers": 2, "num_cpus": 3}, Workers(2, 3, 0, 3, 2)),
        (LAPTOP, {"num_workers": 2, "max_workers": 4}, Workers(2, 1, 0, 2, 4)),
        (LAPTOP, {"max_workers": 2}, Workers(1, 1, 0, 4, 2)),
        (GPU_BOX, {}, Workers(4, 1, 1, None, 4)),
        (GPU_BOX, {"num_gpus": 0.5}, Workers(8, 1, 0.5, None, 8)),
        (GPU_BOX, {"num_gpus": 2}, Workers(2, 1, 2, None, 2)),
        (GPU_BOX, {"num_workers": 3}, Workers(3, 1, 1, None, 3)),
        (GPU_BOX, {"max_workers": 3}, Workers(1, 1, 1, None, 3)),
        (GPU_BOX, {"device": "auto"}, Workers(4, 1, 1, None, 4)),
        (GPU_BOX, {"device": "cuda"}, Workers(4, 1, 1, None, 4)),
        (GPU_BOX, {"device": "cpu"}, Workers(1, 1, 0, 32, 1)),
    ],
)
def test_workers_follow_the_cluster(cluster: Cluster, options: dict[str, Any], workers: Workers) -> None:
    assert plan_workers(config(**options), cluster, 100) == workers


@pytest.mark.parametrize(
    ("options", "lacking"),
    [
        ({"num_workers": 9}, "CPU: 9 wanted, 8 there"),
        ({"max_workers": 9}, "CPU: 9 wanted, 8 there"),
        ({"num_workers": 3, "num_cpus": 4}, "CPU: 12 wanted, 8 there"),
        ({"num_gpus": 1}, "GPU: 1 wanted, 0 there"),
    ],
)
def test_workers_that_can_never_start_are_refused(options: dict[str, Any], lacking: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_workers(config(**options), LAPTOP, 100)
    assert lacking in caught.value.details


@pytest.mark.parametrize(
    ("cluster", "options", "reading"),
    [
        (LAPTOP, {}, Reading(2, prepares=False)),
        (LAPTOP, {"num_workers": 4}, Reading(8, prepares=False)),
        (LAPTOP, {"prepare": "tasks"}, Reading(4, prepares=True)),
        (LAPTOP, {"prepare": "tasks", "num_workers": 6}, Reading(2, prepares=True)),  # the cores that are left
        (LAPTOP, {"prepare": "tasks", "num_workers": 8}, Reading(1, prepares=True)),
        (LAPTOP, {"prepare": "tasks", "num_workers": 7, "num_cpus": 0.9}, Reading(1, prepares=True)),
        (GPU_BOX, {}, Reading(16, prepares=True)),
        (GPU_BOX, {"num_cpus": 7}, Reading(4, prepares=True)),
        (GPU_BOX, {"prepare": "worker"}, Reading(8, prepares=False)),
        (GPU_BOX, {"device": "cpu"}, Reading(2, prepares=False)),
        (Cluster(4, 0, is_local=False), {"num_workers": 16, "num_gpus": 1}, Reading(32, prepares=True)),  # it will grow
    ],
)
def test_tasks_prepare_for_gpus_on_the_cores_that_workers_leave(
    cluster: Cluster, options: dict[str, Any], reading: Reading
) -> None:
    job = config(**options)
    assert plan_reading(job, cluster, plan_workers(job, cluster, 100)) == reading


def test_a_round_that_mends_parts_is_prepared_where_its_rows_are_found() -> None:
    for options, prepares in (({}, False), ({"prepare": "tasks"}, True)):
        job = config(**options)
        assert plan_reading(job, GPU_BOX, plan_workers(job, GPU_BOX, 100), is_mending=True).prepares is prepares


def test_there_are_no_more_workers_than_shards() -> None:
    assert plan_workers(config(num_workers=8), LAPTOP, 3).count == 3
    workers = plan_workers(config(num_workers=2, max_workers=8), LAPTOP, 3)
    assert (workers.count, workers.most) == (2, 3)


@pytest.mark.parametrize(
    ("options", "number"),
    [
        ({}, 2),
        ({"shard_rows": 5000}, 2),
        ({"shard_rows": 64}, 3),  # two fill the batch while the third is written
        ({"shard_rows": 1}, 8),
        ({"shard_rows": 1, "shards_in_flight": 40}, 40),
        ({"shards_in_flight": 1}, 1),
    ],
)
def test_shards_in_flight_fill_the_batch(options: dict[str, Any], number: int) -> None:
    assert plan_workers(config(**options), LAPTOP, 100).shards_in_flight == number


@pytest.mark.parametrize(
    ("options", "number"),
    [
        ({}, 5),
        ({"num_gpus": 0}, 3),
        ({"device": "cpu"}, 3),
        ({"device": "cpu", "num_gpus": 1}, 3),
        ({"batch_size": 64}, 2),
        ({"batch_size": 448}, 8),
    ],
)
def test_the_batch_of_a_worker_with_a_gpu_takes_more_shards(options: dict[str, Any], number: int) -> None:
    assert plan_workers(config(shard_rows=64, **options), GPU_BOX, 100).shards_in_flight == number


def test_a_cluster_that_may_grow_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        workers = plan_workers(config(num_gpus=1), Cluster(num_cpus=8, num_gpus=0, is_local=False), 100)
    assert workers.count == 1
    assert "GPU: 1 wanted, 0 there" in caplog.text


def test_the_seed_of_a_row_depends_on_job_and_row_alone() -> None:
    seeds = {row_seed(job, identity) for job in range(20) for identity in ("a#0", "a#1", "b#0", "id:7")}
    assert len(seeds) == 80
    assert all(0 <= seed < 2**64 for seed in seeds)
    # Golden: a job that is continued with a later version must draw the same numbers.
    assert row_seed(0, "a#0") == 16818016952417708869
