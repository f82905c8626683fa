"""What an engine says of itself. Knows no torch, so that any process can read it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineStats:
    """What an engine is doing at one moment.

    Args:
        num_running: Sequences that hold a slot.
        num_waiting: Sequences that wait for one.
        num_kv_tokens_used: Tokens of the memory for keys and values that are given out, kept prefixes among them.
        num_kv_tokens: Tokens of it in all.
        num_resident: Adapters on the device.
        num_steps: Steps since the beginning.
        num_tokens_computed: Tokens computed since the beginning, recomputed ones counted again.
        num_tokens_generated: Tokens of answers since the beginning.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_kv_tokens_used: int = 0
    num_kv_tokens: int = 0
    num_resident: int = 0
    num_steps: int = 0
    num_tokens_computed: int = 0
    num_tokens_generated: int = 0

    @property
    def kv_used_ratio(self) -> float:
        """How much of the memory for keys and values is given out, from 0 to 1."""
        return self.num_kv_tokens_used / self.num_kv_tokens if self.num_kv_tokens else 0.0
