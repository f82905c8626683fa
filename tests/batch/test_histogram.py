"""Histograms against all the values they were made of."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.batch.histogram import MAX_VALUE, Histogram

VALUES = st.lists(st.one_of(st.integers(0, 40), st.integers(0, 5000), st.integers(0, MAX_VALUE)), max_size=60)


def histogram(values: list[int]) -> Histogram:
    made = Histogram()
    for value in values:
        made.add(value)
    return made


@given(VALUES.filter(bool), st.floats(0, 1))
def test_it_says_of_the_values_what_they_say_themselves(values: list[int], share: float) -> None:
    made = histogram(values)
    assert (made.count, made.total, made.low, made.high) == (len(values), sum(values), min(values), max(values))
    assert made.mean == pytest.approx(sum(values) / len(values))
    found = made.quantile(share)
    assert found is not None
    # the exact quantile, of the same definition: the smallest value that a share of the values is at most
    wanted = next(value for value in sorted(values) if sum(item <= value for item in values) >= share * len(values))
    assert abs(found - wanted) <= max(wanted, found) / 32


@given(VALUES)
def test_every_value_is_in_its_bucket(values: list[int]) -> None:
    buckets = list(histogram(values).buckets())
    assert [bucket.count for bucket in buckets] == [
        sum(bucket.low <= value < bucket.high for value in values) for bucket in buckets
    ]
    assert sum(bucket.count for bucket in buckets) == len(values)
    assert all(one.high <= other.low for one, other in itertools.pairwise(buckets))
    assert all(bucket.high - bucket.low <= max(1, bucket.low / 32) for bucket in buckets)


@given(VALUES, VALUES)
def test_two_together_are_one_of_all_values(first: list[int], second: list[int]) -> None:
    added = histogram(first)
    added.merge(histogram(second))
    assert added.to_dict() == histogram([*first, *second]).to_dict()
    assert added.count == len(first) + len(second)


@given(VALUES)
def test_it_survives_json(values: list[int]) -> None:
    made = histogram(values)
    again = Histogram.from_dict(json.loads(json.dumps(made.to_dict())))
    assert again.to_dict() == made.to_dict()
    assert (again.count, list(again.buckets())) == (made.count, list(made.buckets()))


@given(VALUES, st.lists(st.integers(0, 5000), min_size=1, max_size=5))
def test_pieces_of_its_range_add_up(values: list[int], cuts: list[int]) -> None:
    made, edges = histogram(values), sorted({0, *cuts, MAX_VALUE + 1})
    pieces = [made.between(low, high) for low, high in itertools.pairwise(edges)]
    assert sum(pieces) == pytest.approx(len(values))


def test_it_stays_small_and_takes_any_number() -> None:
    made = histogram([value * 7919 for value in range(100_000)])
    assert len(list(made.buckets())) < 500
    odd = histogram([-5, MAX_VALUE * 9])
    assert (odd.low, odd.high) == (0, MAX_VALUE)


def test_of_nothing_there_is_nothing_to_say() -> None:
    assert Histogram().mean is None
    assert Histogram().quantile(0.5) is None
    assert list(Histogram().buckets()) == []


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"counts": [], "total": 0, "low": None, "high": None},
        {"counts": {"x": 1}, "total": 0, "low": 0, "high": 0},
        {"counts": {"1": -1}, "total": 1, "low": 1, "high": 1},
        {"counts": {"99999": 1}, "total": 1, "low": 1, "high": 1},
        {"counts": {"1": 1}, "total": 1, "low": None, "high": 1},
        {"counts": {"1": 1}, "total": "many", "low": 1, "high": 1},
    ],
)
def test_what_is_no_histogram_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"histogram|invalid literal"):
        Histogram.from_dict(values)
