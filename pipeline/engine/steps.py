"""What steps are made of: sequences and prefixes as the scheduler sees them, and what it decides. Knows no torch."""

from dataclasses import dataclass, field

from pipeline.engine.slots import Slot


@dataclass(eq=False)
class Prefix:
    """Tokens that several sequences begin with, computed once.

    Args:
        expert: Who answers them.
        token_ids: The tokens; with `expert` the key.
    """

    expert: str | None
    token_ids: tuple[int, ...]
    slot: Slot | None = None
    num_computed: int = 0
    num_users: int = 0
    last_used: int = 0

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.token_ids)


@dataclass(eq=False)
class Entry:
    """A sequence as the scheduler sees it.

    Args:
        expert: Who answers.
        prompt: The prompt's tokens.
        prefix_length: How many of them are computed once for all that have them.
        max_tokens: At most this many are generated.
        generated: The tokens generated so far, appended by whoever generates them.
    """

    expert: str | None
    prompt: tuple[int, ...]
    prefix_length: int
    max_tokens: int
    generated: list[int] = field(default_factory=list)
    num_computed: int = 0  # of its own tokens, those after the prefix
    arrival: int = -1
    prefix: Prefix | None = None
    slot: Slot | None = None
    is_done: bool = False

    @property
    def num_generated(self) -> int:
        """Tokens of the answer so far."""
        return len(self.generated)

    @property
    def num_own(self) -> int:
        """Tokens after the prefix, generated ones included."""
        return len(self.prompt) - self.prefix_length + self.num_generated

    def own_tokens(self, start: int, count: int) -> list[int]:
        """Tokens after the prefix, `count` of them from `start` on."""
        first = self.prefix_length + start
        if first >= len(self.prompt):
            at = first - len(self.prompt)
            return self.generated[at : at + count]
        tokens = list(self.prompt[first : first + count])
        if len(tokens) < count:
            tokens += self.generated[: count - len(tokens)]
        return tokens

    @property
    def group(self) -> tuple[str | None, tuple[int, ...]]:
        """What it shares with others: the expert and the prefix."""
        return self.expert, self.prompt[: self.prefix_length]


@dataclass(slots=True)  # not frozen, which takes a microsecond: a step makes hundreds
class Chunk:
    """Tokens of one sequence or prefix to compute in a step.

    Args:
        owner: Whose.
        slot: Where their keys and values go.
        start: How many of the owner's own tokens are computed already.
        count: How many are computed now.
        samples: Whether the last one's scores choose a token.
    """

    owner: Entry | Prefix
    slot: Slot
    start: int
    count: int
    samples: bool


@dataclass
class Step:
    """What to do in one step: first the moves, then the chunks, which stand in the order of the batch.

    Args:
        chunks: Neighbours have the same expert and the same prefix.
        moves: Keys and values to copy to a larger slot: (from, to, tokens).
        freed: Slots that are no longer used, once the moves are done.
        too_large: Sequences that can never fit; they are no longer scheduled.
    """

    chunks: list[Chunk] = field(default_factory=list)
    moves: list[tuple[Slot, Slot, int]] = field(default_factory=list)
    freed: list[Slot] = field(default_factory=list)
    too_large: list[Entry] = field(default_factory=list)
