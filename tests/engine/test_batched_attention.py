"""Batched attention over pages against the plain formula, and the pages themselves."""

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.engine import batched_attention
from pipeline.engine.batched_attention import BatchedAttention
from pipeline.engine.kernels import reference
from pipeline.engine.kv_cache import PagedCache
from pipeline.engine.paged_plan import (
    EMPTY_PAGE,
    NOBODYS_PAGES,
    PAGE,
    SCRATCH_PAGE,
    Item,
    Keys,
    places,
    plan_recorded,
    plan_step,
    plan_units,
    rounded_up,
    units_of,
)
from pipeline.engine.slots import Slot, slot_size
from pipeline.engine.transfer import to_device

CPU = torch.device("cpu")
LAYERS, LAYER = 2, 1  # not the first, so that a wrong layer shows
KV_HEADS, HEAD_DIM = 2, 8


@dataclass(frozen=True)
class Case:
    """Items as (tokens, own past, prefix), in the order of the batch; prefixes as lengths, -1 for none."""

    items: tuple[tuple[int, int, int], ...]
    prefixes: tuple[int, ...]
    group: int = 2
    seed: int = 0


@st.composite
def cases(draw: st.DrawFn, *, most_tokens: int = 150) -> Case:
    prefixes = tuple(draw(st.lists(st.sampled_from([1, 15, 16, 17, 150, 600]), max_size=2)))
    items = tuple(
        (min(draw(st.sampled_from([1, 1, 1, 2, 9, 64, 65, 150])), most_tokens), past, prefix)
        for prefix in (*range(len(prefixes)), -1)
        for past in draw(st.lists(st.sampled_from([0, 0, 1, 15, 16, 63, 130, 520]), max_size=9))
    )
    return Case(items or ((1, 0, -1),), prefixes, draw(st.sampled_from([1, 2, 4])), draw(st.integers(0, 99)))


class Batch:
    """Real memory behind a case: pages of every item and prefix, and this step's queries, keys and values."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float32) -> None:
        random = torch.Generator().manual_seed(case.seed)
        lengths = [past + count for count, past, _ in case.items]
        slots = [Slot(at, slot_size(length)) for at, length in enumerate([*lengths, *case.prefixes])]
        shape = (LAYERS, 2, KV_HEADS, HEAD_DIM)
        num_tokens = sum(slot.size for slot in slots)
        num_bytes = num_tokens * 2 * LAYERS * KV_HEADS * HEAD_DIM * dtype.itemsize
        self.cache = PagedCache(shape, dtype=dtype, device=CPU, num_bytes=num_bytes)
        self.cache._free = (torch.randperm(len(self.cache._free), generator=random) + NOBODYS_PAGES).tolist()
        keys = [Keys(self.cache.pages(slot), slot.size) for slot in slots]
        own, shared = keys[: len(lengths)], keys[len(lengths) :]
        shared = [replace(one, length=length) for one, length in zip(shared, case.prefixes, strict=True)]
        # What lies beyond an end is another's, and large: who reads it shows.
        self.cache.pool[:, :, NOBODYS_PAGES:] = 1e3
        for one, length in zip([*own, *shared], [past for _, past, _ in case.items] + [*case.prefixes], strict=True):
            at = np.arange(length)
            new = torch.randn(LAYERS, 2, length, KV_HEADS, HEAD_DIM, generator=random).to(dtype)
            self.cache.pool.transpose(3, 4)[:, :, one.pages[at // PAGE], at % PAGE] = new
        starts = np.cumsum([0, *(count for count, _, _ in case.items)])
        self.items = [
            Item(int(start), count, replace(one, length=past + count), shared[prefix] if prefix >= 0 else None)
            for start, (count, past, prefix), one in zip(starts, case.items, own, strict=False)
        ]
        heads = (KV_HEADS * case.group, KV_HEADS, KV_HEADS)
        self.q, self.k, self.v = (
            torch.randn(int(starts[-1]), number, HEAD_DIM, generator=random).to(dtype) for number in heads
        )

    def dense(self, keys: Keys) -> torch.Tensor:  # [2, kv_heads, tokens, head_dim], a copy
        pages = self.cache.pool[LAYER][:, torch.from_numpy(keys.pages)]
        return pages.transpose(1, 2).flatten(2, 3).float()

    def reference_items(self) -> list[reference.Item]:
        found = []
        for item in self.items:
            keys, values = self.dense(item.own)
            prefix = self.dense(item.prefix)[:, :, : item.prefix.length] if item.prefix else (None, None)
            past = item.own.length - item.count
            found.append(reference.Item(item.start, item.count, past, keys, values, prefix[0], prefix[1]))
        return found

    def expected(self, window: int, softcap: float) -> torch.Tensor:
        items = self.reference_items()
        reference.store(items, self.k.float(), self.v.float())
        return reference.attention(items, self.q.float(), scale=0.3, window=window, softcap=softcap)

    def found(self, attention: BatchedAttention, window: int, softcap: float, num_rows: int = 0) -> torch.Tensor:
        more = max(num_rows - len(self.q), 0)
        q, k, v = (torch.cat([one, one.new_ones(more, *one.shape[1:])]) for one in (self.q, self.k, self.v))
        attention.store(LAYER, k, v)
        return attention.attend(LAYER, q, 0.3, window, softcap)[: len(self.q)]

    def attention(self) -> BatchedAttention:
        arrays = [array for units in plan_step(self.items) for array in units.arrays()]
        own_places, *others = to_device([places(self.items), *arrays], CPU)
        return BatchedAttention(self.cache, own_places, units_of(others))


windows = st.sampled_from([0, 0, 1, 7, 70])
softcaps = st.sampled_from([0.0, 0.0, 2.0])


@settings(max_examples=120)
@given(case=cases(), window=windows, softcap=softcaps, most=st.sampled_from([1, 1 << 26]))
def test_attention_equals_the_plain_formula(case: Case, window: int, softcap: float, most: int) -> None:
    batch = Batch(case)
    expected = batch.expected(window, softcap)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batched_attention, "MOST_SCORES", most)  # unit by unit, or all at once
        found = batch.found(batch.attention(), window, softcap)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=40)
@given(case=cases(), window=windows)
def test_attention_in_half_precision_is_computed_in_float32(case: Case, window: int) -> None:
    batch = Batch(case, torch.bfloat16)
    expected = batch.expected(window, 0.0)
    found = batch.found(batch.attention(), window, 0.0)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=1.2e-2, atol=1.2e-2)


@settings(max_examples=40)
@given(case=cases() | cases(most_tokens=1), window=windows, softcap=softcaps)
def test_a_step_that_is_filled_up_is_the_same(case: Case, window: int, softcap: float) -> None:
    batch = Batch(case)
    expected = batch.expected(window, softcap)
    num_tokens = sum(item.count for item in batch.items)
    _, token_ids, own_places, *others = to_device(plan_recorded(range(num_tokens), batch.items, [0]), CPU)
    attention = BatchedAttention(batch.cache, own_places, units_of(others))
    found = batch.found(attention, window, softcap, len(token_ids))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not batch.cache.pool[:, :, EMPTY_PAGE].any()
    assert batch.cache.pool[LAYER, :, SCRATCH_PAGE].any() == (len(token_ids) > num_tokens)


def test_the_number_of_operations_does_not_depend_on_the_number_of_sequences() -> None:
    class Count(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.operations: Counter[str] = Counter()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.operations[str(func)] += 1
            return func(*args, **(kwargs or {}))

    found = []
    for number in (2, 40):
        items = (
            (((1, 30, 0),) * number) + (((9, 10, 0),) * number) + (((1, 30, -1),) * number) + (((9, 1, -1),) * number)
        )
        batch = Batch(Case(items, (40,)))
        attention = batch.attention()
        with Count() as count:
            batch.found(attention, 0, 0.0)
        found.append(count.operations)
    assert found[0] == found[1]
    assert 10 < sum(found[0].values()) < 150


def test_a_prefix_is_read_once_by_eight_rows_that_share_it() -> None:
    shared = Keys(np.arange(2, 12), 150)
    own = [Keys(np.arange(20 + at, 21 + at), 3) for at in range(16)]
    items = [Item(at, 1, one, shared) for at, one in enumerate(own)]
    units = plan_units(items, 8, 128)
    assert len(units.first) == 16 + 2 * 2  # of each row's own keys, and two spans for each eight rows
    assert units.num_parts.tolist() == [3] * 16


@settings(max_examples=100)
@given(case=cases(), width=st.sampled_from([1, 3, 8, 64]), span=st.sampled_from([16, 128]))
def test_each_token_meets_each_key_that_it_may_see_once(case: Case, width: int, span: int) -> None:
    items = Batch(case).items
    units = plan_units(items, width, span)
    for item in items:
        for token in range(item.start, item.start + item.count):
            place = int(np.flatnonzero(units.tokens == token)[0])
            position = int(units.positions[place])
            met = []
            for part in units.parts[place, : units.num_parts[place]]:
                unit, lane = divmod(int(part), width)
                assert units.lanes[unit, lane] == place
                met += range(units.first[unit], units.first[unit] + units.count[unit])
                num_used = -(-units.count[unit] // PAGE)
                assert EMPTY_PAGE not in units.pages[unit, :num_used]
                assert (units.pages[unit, num_used:] == EMPTY_PAGE).all()
            assert sorted(key for key in met if key <= position) == list(range(position + 1))


def test_sizes_are_rounded_up_by_at_most_a_third() -> None:
    sizes = [rounded_up(number) for number in range(1, 400)]
    assert sorted(set(sizes))[:10] == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]
    assert all(number <= size <= max(number * 1.5, number + 1) for number, size in enumerate(sizes, 1))


# --- pages -----------------------------------------------------------------------------------------------------------


def small_cache(num_tokens: int) -> PagedCache:
    return PagedCache((1, 2, 1, 4), dtype=torch.float32, device=CPU, num_bytes=num_tokens * 32)


def test_pages_change_hands_when_a_slot_grows() -> None:
    cache = small_cache(256)
    old, new = Slot(0, 32), Slot(1, 96)
    before = cache.pages(old)
    cache.move([(old, new, 20)])
    cache.free([old])
    assert cache.pages(new)[:2].tolist() == before.tolist()
    assert cache.slots == {new}


def test_all_tokens_can_be_given_out_in_any_order() -> None:
    cache = small_cache(512)
    slots = [Slot(at, 32 + 16 * (at % 2)) for at in range(12)]  # 480 tokens
    for _ in range(3):
        taken = [page for slot in slots for page in cache.pages(slot).tolist()]
        assert len(taken) == len(set(taken)) == 30
        assert min(taken) >= NOBODYS_PAGES
        cache.free(slots[::2])
        again = [page for slot in slots for page in cache.pages(slot).tolist()]
        assert sorted(again) == sorted(taken)
        cache.free(slots)
    assert cache.slots == set()


def test_what_one_sequence_left_in_a_page_reaches_no_other() -> None:
    """Not even where it is no number, which a weight of zero would not hide."""
    cache = small_cache(64)
    first, second = Slot(0, 32), Slot(1, 32)
    cache.pool[:, :, torch.from_numpy(cache.pages(first))] = torch.nan
    cache.free([first])
    item = Item(0, 1, Keys(cache.pages(second), 1))
    cache.wipe()
    assert not cache.pool.isnan().any()
    arrays = [array for units in plan_step([item]) for array in units.arrays()]
    own_places, *others = to_device([places([item]), *arrays], CPU)
    attention = BatchedAttention(cache, own_places, units_of(others))
    value = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    attention.store(0, value, value)
    assert torch.equal(attention.attend(0, value, 1.0, 0, 0.0), value)
