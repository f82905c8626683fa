"""How the memory for keys and values is shared out, in tokens. Knows no torch; `kv_cache` holds the tensors."""

from typing import NamedTuple

SMALLEST = 32  # tokens


def slot_size(num_tokens: int) -> int:
    """The size of the slot that holds so many tokens: 32, 48, 64, 96, 128, 192, ... so that few sizes are reused."""
    size = SMALLEST
    while size < num_tokens:
        if size + size // 2 >= num_tokens:
            return size + size // 2
        size *= 2
    return size


class Slot(NamedTuple):
    """Room for the keys and values of `size` tokens in every layer."""

    number: int
    size: int


class SlotTable:
    """Counts what is given out of a fixed number of tokens.

    Args:
        num_tokens: How many tokens there is room for in all.
    """

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.num_used = 0
        self._next = 0
        self._freed: list[Slot] = []

    @property
    def num_free(self) -> int:
        """Tokens that are not given out."""
        return self.num_tokens - self.num_used

    def can_allocate(self, num_tokens: int) -> bool:
        """Whether a slot for so many tokens is free."""
        return slot_size(num_tokens) <= self.num_free

    def allocate(self, num_tokens: int) -> Slot:
        """Give out a slot for at least so many tokens.

        Raises:
            ValueError: It does not fit; ask `can_allocate` first.
        """
        slot = Slot(self._next, slot_size(num_tokens))
        if slot.size > self.num_free:
            raise ValueError(f"no room for {slot.size} tokens: {self.num_free} of {self.num_tokens} are free")
        self._next += 1
        self.num_used += slot.size
        return slot

    def free(self, slot: Slot) -> None:
        """Take a slot back."""
        self.num_used -= slot.size
        self._freed.append(slot)

    def take_freed(self) -> list[Slot]:
        """The slots that came back since the last call, whose memory can be used again."""
        freed, self._freed = self._freed, []
        return freed
