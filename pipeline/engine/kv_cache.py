"""The memory of keys and values: a tensor for each slot, or one pool of pages for all."""

from collections.abc import Iterable
from typing import Protocol

import numpy as np
import torch

from pipeline.engine.paged_plan import NOBODYS_PAGES, PAGE, Int64s
from pipeline.engine.slots import Slot
from pipeline.engine.transfer import to_device

DEFAULT_SHARE = 0.25  # of the free memory of the CPU
MOST_ON_CPU = 8 << 30  # bytes
CUDA_SHARE = 0.85
LEAST_PAGES = 8  # so many are there whatever the budget: a model is tried before it runs


class KVCache(Protocol):
    """Keys and values of sequences and shared prefixes, whatever their layout.

    Args:
        shape: Layers, 2 (keys and values), heads of keys, and numbers in each.
        num_tokens: There is room for so many.
        num_bytes_per_token: Of keys and values in all layers.
    """

    shape: tuple[int, int, int, int]
    num_tokens: int
    num_bytes_per_token: int

    @property
    def slots(self) -> set[Slot]:
        """The slots that hold memory."""
        ...

    def move(self, moves: Iterable[tuple[Slot, Slot, int]]) -> None:
        """Bring the first tokens of slots into other slots: (from, to, tokens). The old ones are to be freed."""
        ...

    def free(self, slots: Iterable[Slot]) -> None:
        """Keep the memory of slots that are no longer used, for slots to come."""
        ...

    def clear(self) -> None:
        """Give back what memory can be given back."""
        ...


class SlotCache:
    """A tensor for each slot, reused by size: for kernels that read through addresses.

    A slot's tensor is [num_layers, 2, num_kv_heads, size, head_dim]: the keys of one head lie together, as attention
    reads them.

    Args:
        shape: As of `KVCache`.
        dtype: Of keys and values.
        device: Where they lie.
        num_bytes: The memory they may take.
    """

    def __init__(
        self, shape: tuple[int, int, int, int], *, dtype: torch.dtype, device: torch.device, num_bytes: int
    ) -> None:
        self.shape = shape
        self.num_bytes_per_token = int(np.prod(shape)) * dtype.itemsize
        self.num_tokens = max(num_bytes // self.num_bytes_per_token, 0)
        self._dtype = dtype
        self._device = device
        self._tensors: dict[Slot, torch.Tensor] = {}
        self._spare: dict[int, list[torch.Tensor]] = {}
        self._num_held = 0  # tokens, spare ones included

    @property
    def slots(self) -> set[Slot]:
        """See `KVCache`."""
        return set(self._tensors)

    def tensor(self, slot: Slot) -> torch.Tensor:  # [num_layers, 2, num_kv_heads, size, head_dim]
        """The keys (index 0) and values (index 1) of a slot."""
        found = self._tensors.get(slot)
        if found is None:
            found = self._tensors[slot] = self._new(slot.size)
        return found

    def move(self, moves: Iterable[tuple[Slot, Slot, int]]) -> None:
        """See `KVCache`."""
        for old, new, num_tokens in moves:
            self.tensor(new)[:, :, :, :num_tokens] = self._tensors[old][:, :, :, :num_tokens]

    def free(self, slots: Iterable[Slot]) -> None:
        """See `KVCache`."""
        for slot in slots:
            tensor = self._tensors.pop(slot, None)
            if tensor is not None:
                self._spare.setdefault(slot.size, []).append(tensor)

    def clear(self) -> None:
        """Give back the memory of slots that are not used."""
        self._num_held -= sum(size * len(tensors) for size, tensors in self._spare.items())
        self._spare.clear()

    def _new(self, size: int) -> torch.Tensor:
        spare = self._spare.get(size)
        if spare:
            return spare.pop()
        if self._num_held + size > self.num_tokens:
            self.clear()
        self._num_held += size
        layers, two, heads, head_dim = self.shape
        return torch.empty((layers, two, heads, size, head_dim), dtype=self._dtype, device=self._device)


class PagedCache:
    """One tensor of pages for all slots: batched attention gathers them, and a CUDA graph may hold its address.

    Slots have sizes of whole pages, so that what `SlotTable` counts as free always fits. The first pages are nobody's:
    `EMPTY_PAGE` is never written, and what reads beyond a slot's end reads zeros there; `SCRATCH_PAGE` takes the keys
    of rows that only fill a batch up, and is never read. Arguments as of `SlotCache`.
    """

    def __init__(
        self, shape: tuple[int, int, int, int], *, dtype: torch.dtype, device: torch.device, num_bytes: int
    ) -> None:
        layers, two, heads, head_dim = self.shape = shape
        self.num_bytes_per_token = int(np.prod(shape)) * dtype.itemsize
        self.num_tokens = max(num_bytes // self.num_bytes_per_token, 0)
        num_pages = max(self.num_tokens // PAGE, LEAST_PAGES) + NOBODYS_PAGES
        pages = (layers, two, num_pages, heads, PAGE, head_dim)
        self.pool = torch.zeros(pages, dtype=dtype, device=device)  # [layers, 2, pages, kv_heads, PAGE, head_dim]
        self._free = list(range(num_pages - 1, NOBODYS_PAGES - 1, -1))
        self._pages: dict[Slot, Int64s] = {}
        self._reused: list[int] = []  # pages given out again that hold what their last owner left

    @property
    def slots(self) -> set[Slot]:
        """See `KVCache`."""
        return set(self._pages)

    def pages(self, slot: Slot) -> Int64s:  # [size / PAGE]
        """The pages of a slot. Call `wipe` before it is written to."""
        found = self._pages.get(slot)
        if found is None:
            found = self._pages[slot] = self._take(slot.size // PAGE)
        return found

    def wipe(self) -> None:
        """Zero the pages that changed hands.

        Attention reads whole pages and gives no weight to what is beyond a sequence's end; but no weight times the
        infinity of another sequence would be no number.
        """
        if self._reused:
            (index,) = to_device([np.array(self._reused)], self.pool.device)
            self.pool.index_fill_(2, index, 0)
            self._reused = []

    def move(self, moves: Iterable[tuple[Slot, Slot, int]]) -> None:
        """See `KVCache`: the pages change hands, and nothing is copied."""
        for old, new, _ in moves:
            own = self._pages.pop(old)
            self._pages[new] = np.concatenate([own, self._take(new.size // PAGE - len(own))])

    def free(self, slots: Iterable[Slot]) -> None:
        """See `KVCache`."""
        for slot in slots:
            self._free += self._pages.pop(slot, np.empty(0, np.int64)).tolist()

    def clear(self) -> None:
        """The pool stays: there is nothing that could be given back."""

    def _take(self, count: int) -> Int64s:
        taken = [self._free.pop() for _ in range(count)]
        self._reused += taken
        return np.array(taken, np.int64)


def default_num_bytes(device: torch.device) -> int:
    """How much memory keys and values may take when nobody says: most of what is free on CUDA, a share on the CPU."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * CUDA_SHARE)
    return min(int(_free_memory() * DEFAULT_SHARE), MOST_ON_CPU)


def _free_memory() -> int:
    import os

    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # not told on this system
        return 8 << 30
