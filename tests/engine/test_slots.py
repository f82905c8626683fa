"""Slots: few sizes, little waste, and never more given out than there is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.engine.slots import SMALLEST, Slot, SlotTable, slot_size


def test_sizes_grow_by_half_and_by_a_third_in_turn() -> None:
    assert sorted({slot_size(count) for count in range(300)}) == [32, 48, 64, 96, 128, 192, 256, 384]


@given(st.integers(0, 1_000_000))
def test_a_size_is_the_smallest_of_its_kind_that_holds_the_tokens(num_tokens: int) -> None:
    sizes = sorted(factor * 2**power for power in range(20) for factor in (32, 48))
    assert slot_size(num_tokens) == next(size for size in sizes if size >= num_tokens)


@given(st.integers(0, 600), st.lists(st.one_of(st.integers(0, 200), st.none()), max_size=30))
def test_the_table_counts_what_is_out(num_tokens: int, calls: list[int | None]) -> None:
    """A number allocates so many tokens, None frees the oldest slot."""
    table = SlotTable(num_tokens)
    out: list[Slot] = []
    back: list[Slot] = []
    seen: set[int] = set()
    for wanted in calls:
        if wanted is None:
            if out:
                back.append(out.pop(0))
                table.free(back[-1])
        elif slot_size(wanted) <= num_tokens - sum(slot.size for slot in out):
            assert table.can_allocate(wanted)
            slot = table.allocate(wanted)
            assert slot.size >= wanted
            assert slot.number not in seen  # a number is never used again
            seen.add(slot.number)
            out.append(slot)
        else:
            assert not table.can_allocate(wanted)
            with pytest.raises(ValueError, match="no room"):
                table.allocate(wanted)
        assert table.num_used == sum(slot.size for slot in out)
        assert table.num_free == num_tokens - table.num_used >= 0
    assert table.take_freed() == back
    assert table.take_freed() == []


def test_the_smallest_slot_needs_no_tokens() -> None:
    table = SlotTable(SMALLEST)
    assert table.allocate(0).size == SMALLEST
    assert not table.can_allocate(0)
