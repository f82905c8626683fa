"""Which prompts share a prefix that is worth computing once. Knows no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

MIN_PREFIX = 16  # tokens; a shorter one costs more to keep apart than it saves
HINT_SHARE = 0.8  # of the best saving; a hint that gives this much is preferred, since later requests share it too

TokenIds = tuple[int, ...]


@dataclass(frozen=True)
class Prompt:
    """What is known of a request before it is scheduled.

    Args:
        expert: Who answers; keys and values depend on it, so prompts of two experts share nothing.
        token_ids: The whole prompt.
        hint: How many of its first tokens are likely to be shared with requests to come; 0 if nothing is known.
    """

    expert: str | None
    token_ids: TokenIds
    hint: int = 0


def plan_prefixes(prompts: Sequence[Prompt]) -> list[int]:
    """For each prompt, how many of its first tokens to compute once for all that have them.

    Prompts are grouped so that the tokens saved, `length * (members - 1)` summed over groups, are the most possible.
    The last token of a prompt is never part of its prefix: its scores are wanted.

    Returns:
        A length for each prompt, 0 for none. Members of a group have the same.
    """
    order = sorted(range(len(prompts)), key=lambda at: (prompts[at].expert or "", prompts[at].token_ids))
    ordered = [prompts[at] for at in order]
    lengths = [_hint(prompt) for prompt in prompts]
    for first, last, length in _best_groups(ordered):
        members = order[first:last]
        hints = {prompts[at].hint for at in members}
        hint = min(hints)
        if len(hints) == 1 and MIN_PREFIX <= hint <= length and hint >= HINT_SHARE * length:
            length = hint
        for at in members:
            lengths[at] = length
    return lengths


def common_prefix(first: TokenIds, second: TokenIds) -> int:
    """How many tokens two prompts share at their beginning, the last token of each left out."""
    most = min(len(first), len(second)) - 1
    if most <= 0:
        return 0
    if first[:most] == second[:most]:
        return most
    low, high = 0, most  # they agree on `low` tokens and differ within `high`
    while high - low > 1:
        middle = (low + high) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle
    return low


def _hint(prompt: Prompt) -> int:
    return prompt.hint if MIN_PREFIX <= prompt.hint < len(prompt.token_ids) else 0


@dataclass
class _Interval:
    """Neighbours in order that share `length` tokens, and the best groups found inside them."""

    length: int
    first: int
    saved: int
    groups: list[tuple[int, int, int]]

    def close(self, last: int) -> tuple[int, list[tuple[int, int, int]]]:
        whole = self.length * (last - self.first - 1) if self.length >= MIN_PREFIX else 0
        if whole > 0 and whole >= self.saved:
            return whole, [(self.first, last, self.length)]
        return self.saved, self.groups


def _best_groups(ordered: Sequence[Prompt]) -> list[tuple[int, int, int]]:
    """Groups `(first, last, length)` of sorted prompts, by one pass over the tree of their common prefixes."""
    stack = [_Interval(0, 0, 0, [])]
    for at in range(1, len(ordered) + 1):
        shared = 0
        if at < len(ordered) and ordered[at].expert == ordered[at - 1].expert:
            shared = common_prefix(ordered[at - 1].token_ids, ordered[at].token_ids)
        first, saved, groups = at - 1, 0, []
        while stack[-1].length > shared:
            interval = stack.pop()
            interval.saved += saved
            interval.groups += groups
            first, (saved, groups) = interval.first, interval.close(at)
        if stack[-1].length < shared:
            stack.append(_Interval(shared, first, saved, groups))
        else:
            stack[-1].saved += saved
            stack[-1].groups += groups
    return stack[0].groups
