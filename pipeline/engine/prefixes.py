"""Which prompts share a prefix that is worth computing once. Knows no torch."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

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
    for places, length in _best_groups(ordered):
        members = [order[at] for at in places]
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
class _Node:
    """Neighbours in order that share `length` tokens. Those that no node below groups may be a group here.

    What is saved below, once `length` is paid for each group, depends on the longest group above: `saved` tokens where
    there is none, and from each bend `(length, slope)` on, `slope` more for each token that the group above has.
    """

    length: int
    places: list[int] = field(default_factory=list)
    children: "list[_Node]" = field(default_factory=list)
    saved: float = 0
    bends: dict[float, int] = field(default_factory=dict)
    opens_below: float = -1.0  # it is a group if the one above is shorter than this

    def close(self) -> None:
        """Weigh a group here against none, once all below are known."""
        if self.places:
            self.bends[0] = len(self.places)
        for child in self.children:
            self.saved += child.saved
            for bend, slope in child.bends.items():
                self.bends[bend] = self.bends.get(bend, 0) + slope
        bends = sorted((bend, slope) for bend, slope in self.bends.items() if bend < self.length)
        grouped = self.saved + sum(slope * (self.length - bend) for bend, slope in bends) - self.length
        if self.length >= MIN_PREFIX and grouped > self.saved:
            reached, at, steepness, left = self.saved, 0.0, 0, deque(bends)
            while left and reached + steepness * (left[0][0] - at) <= grouped:
                reached, at = reached + steepness * (left[0][0] - at), left[0][0]
                steepness += left.popleft()[1]
            self.opens_below = at + (grouped - reached) / steepness
            self.saved, bends = grouped, [(self.opens_below, steepness), *left]
        self.bends = dict(bends)


def _best_groups(ordered: Sequence[Prompt]) -> list[tuple[list[int], int]]:
    """Groups `(places, length)` of sorted prompts, by one pass up the tree of their common prefixes and one down."""
    stack = [_Node(0)]
    for at in range(len(ordered)):
        shared = 0
        if at + 1 < len(ordered) and ordered[at].expert == ordered[at + 1].expert:
            shared = common_prefix(ordered[at].token_ids, ordered[at + 1].token_ids)
        if shared > stack[-1].length:
            stack.append(_Node(shared))
        stack[-1].places.append(at)
        while stack[-1].length > shared:
            node = stack.pop()
            node.close()
            if stack[-1].length < shared:
                stack.append(_Node(shared))
            stack[-1].children.append(node)
    groups: list[tuple[list[int], int]] = []
    below: list[tuple[_Node, list[int], int]] = [(stack[0], [], 0)]  # with the group above
    while below:
        node, members, length = below.pop()
        if length < node.opens_below:
            members, length = [], node.length
            groups.append((members, length))
        members += node.places
        below += [(child, members, length) for child in node.children]
    return groups
