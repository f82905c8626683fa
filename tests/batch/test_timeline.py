"""Work over time: nothing is lost, and there are never more steps than there may be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.batch.timeline import MAX_STEPS, Timeline

WORK = st.tuples(st.floats(0, 1e6), st.floats(0, 1e5), st.integers(0, 5000), st.integers(0, 10**6))


@given(st.lists(WORK, max_size=30))
def test_all_work_is_there_and_the_steps_are_few(work: list[tuple[float, float, int, int]]) -> None:
    timeline = Timeline()
    for begun, seconds, rows, tokens in work:
        timeline.add(begun, begun + seconds, rows, tokens)
    series = timeline.series()
    assert len(series.rows) == len(series.tokens) <= MAX_STEPS
    assert sum(series.rows) == pytest.approx(sum(item[2] for item in work), abs=0.1)
    assert sum(series.tokens) == pytest.approx(sum(item[3] for item in work), abs=0.1)


def test_work_is_spread_over_its_time() -> None:
    timeline = Timeline()
    timeline.add(0.125, 1.125, 8, 80)
    timeline.add(0.5, 0.5, 3, 0)  # no time at all
    series = timeline.series()
    assert series.step_seconds == 0.25
    assert series.rows == [1, 2, 5, 2, 1]
    assert series.tokens == [10, 20, 20, 20, 10]


def test_steps_double_when_there_would_be_too_many() -> None:
    timeline = Timeline()
    for second in range(100):
        timeline.add(second, second + 1, 4, 0)
    assert timeline.series().step_seconds == 1.0
    assert timeline.series().rows == [4.0] * 100 + [0.0]
