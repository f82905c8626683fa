"""How many shards may wait for workers, and for whom that is set."""

import pytest
from ray.data import DataContext
from ray.data._internal.execution.backpressure_policy import ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY

from pipeline.batch.read_ahead import most_waiting, read_at_most


@pytest.mark.parametrize(("num_workers", "num_shards"), [(1, 32), (4, 32), (5, 40), (100, 800)])
def test_more_shards_may_wait_for_more_workers(num_workers: int, num_shards: int) -> None:
    assert most_waiting(num_workers) == num_shards


def test_a_person_s_own_policies_stay_and_come_back() -> None:
    context, key = DataContext.get_current(), ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY
    assert context.get_config(key) is None
    with read_at_most(5):
        outer = context.get_config(key)
        with read_at_most(6):
            assert context.get_config(key)[:-1] == outer
        assert context.get_config(key) == outer
    assert context.get_config(key) is None
