"""Every seed of the fuzzers passes their targets, so that they can be run; `make fuzz` goes on from there."""

import pytest

from tests.fuzz.targets import TARGETS, seeds


@pytest.mark.parametrize("target", TARGETS)
def test_seeds_pass(target: str) -> None:
    count = 0
    for seed in seeds(target):
        TARGETS[target](seed)
        count += 1
    assert count > 40
