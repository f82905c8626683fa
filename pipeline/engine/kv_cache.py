"""The memory of keys and values: one tensor a slot, reused by size."""

from collections.abc import Iterable

import torch

from pipeline.engine.slots import Slot

DEFAULT_SHARE = 0.25  # of the free memory of the CPU
MOST_ON_CPU = 8 << 30  # bytes
CUDA_SHARE = 0.85


class KVCache:
    """Keys and values of sequences and shared prefixes.

    A slot's tensor is [num_layers, 2, num_kv_heads, size, head_dim]: the keys of one head lie together, as attention
    reads them.

    Args:
        num_layers, num_kv_heads, head_dim: The model's shape.
        dtype: Of keys and values.
        device: Where they lie.
        num_bytes: The memory they may take.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        num_bytes: int,
    ) -> None:
        self.shape = (num_layers, 2, num_kv_heads, head_dim)
        self.num_bytes_per_token = 2 * num_layers * num_kv_heads * head_dim * dtype.itemsize
        self.num_tokens = max(num_bytes // self.num_bytes_per_token, 0)
        self._dtype = dtype
        self._device = device
        self._tensors: dict[Slot, torch.Tensor] = {}
        self._spare: dict[int, list[torch.Tensor]] = {}
        self._num_held = 0  # tokens, spare ones included

    def tensor(self, slot: Slot) -> torch.Tensor:  # [num_layers, 2, num_kv_heads, size, head_dim]
        """The keys (index 0) and values (index 1) of a slot."""
        found = self._tensors.get(slot)
        if found is None:
            found = self._tensors[slot] = self._new(slot.size)
        return found

    def move(self, moves: Iterable[tuple[Slot, Slot, int]]) -> None:
        """Copy the first tokens of slots into other slots: (from, to, tokens)."""
        for old, new, num_tokens in moves:
            self.tensor(new)[:, :, :, :num_tokens] = self._tensors[old][:, :, :, :num_tokens]

    def free(self, slots: Iterable[Slot]) -> None:
        """Keep the memory of slots that are no longer used, for slots to come."""
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
