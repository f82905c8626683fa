"""Too many errors: when a job stops, and what it says."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.batch.config import BatchConfig
from pipeline.batch.error_limits import broken_limit


def limits(**options: Any) -> BatchConfig:
    return BatchConfig.from_options(dataset="a", expert="b", output=Path("c"), **options)


@pytest.mark.parametrize(
    ("options", "rows", "errors", "broken"),
    [
        ({}, 1000, 1000, None),
        ({"max_errors": 0}, 50, 0, None),
        ({"max_errors": 0}, 50, 1, "max_errors (0)"),
        ({"max_errors": 10}, 1000, 10, None),
        ({"max_errors": 1000}, 2000, 1001, "max_errors (1,000)"),
        ({"max_error_rate": 0.1}, 99, 99, None),  # too few to judge
        ({"max_error_rate": 0.1}, 100, 10, None),
        ({"max_error_rate": 0.1}, 100, 11, "max_error_rate (0.1)"),
        ({"max_error_rate": 0.0}, 100_000, 1, "max_error_rate (0)"),
        ({"max_errors": 5, "max_error_rate": 0.5}, 200, 6, "max_errors (5)"),
    ],
)
def test_limits(options: dict[str, Any], rows: int, errors: int, broken: str | None) -> None:
    assert broken_limit(limits(**options), rows, errors) == broken
