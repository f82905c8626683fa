"""Attention over paged keys laid out as batched products of one size; numpy only.

What a step attends to is cut into *units*: up to `width` tokens times `span` keys of one sequence or of one shared
prefix, all of one size, so that a few batched products compute them all. A token that has several units, because its
keys are many or because some are a prefix's, gets its answer from their partial ones by log-sum-exp. For example, with
a span of 128, two new tokens with 40 and 200 keys of their own that share a prefix of 150, make five units:

    unit   tokens    keys
    0      0         0 to 40 of its own
    1      1         0 to 128 of its own
    2      1         128 to 200 of its own
    3      0 and 1   0 to 128 of the prefix
    4      0 and 1   128 to 150 of the prefix

Sources: Hydragen (arXiv 2402.05099) for shared prefixes, FlashDecoding
(https://pytorch.org/blog/flash-decoding/) for cutting the keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
Array = TypeVar("Array")

PAGE = 16  # tokens; the size of every slot is a multiple of it
EMPTY_PAGE, SCRATCH_PAGE, NOBODYS_PAGES = 0, 1, 2
DECODE_WIDTH, DECODE_SPAN = 8, 128
PREFILL_WIDTH, PREFILL_SPAN = 64, 512
SCORED_ROWS = 128  # of a recorded step, or all: so that there are few shapes


@dataclass(eq=False, slots=True)  # not frozen, which takes a microsecond: a step makes hundreds
class Keys:
    """Keys and values that lie in pages.

    Args:
        pages: Their pages, and maybe more. [num_pages]
        length: Their number, in tokens.
    """

    pages: Int64s
    length: int


@dataclass(eq=False, slots=True)
class Item:
    """Contiguous tokens of one sequence in a packed batch.

    Args:
        start: Its first token in the batch.
        count: Its tokens in the batch.
        own: Its own keys, those of these tokens included.
        prefix: Keys that come before, shared with the items that have the same object; None for none.
    """

    start: int
    count: int
    own: Keys
    prefix: Keys | None = None

    @property
    def position(self) -> int:
        """Where its first token in the batch stands in its text."""
        return (self.prefix.length if self.prefix else 0) + self.own.length - self.count


@dataclass(frozen=True)
class Units(Generic[Array]):
    """The units of some tokens of a step, as arrays of numpy or as tensors.

    Args:
        tokens: Which tokens of the batch. [num_tokens]
        positions: Where each stands in its text. [num_tokens]
        lanes: The tokens of each unit, as indices into `tokens`; the first one where lanes are left over.
            [num_units, width]
        pages: Where its keys lie. [num_units, span / PAGE]
        first: The position of its first key in the text. [num_units]
        count: Its keys. [num_units]
        parts: For each token its units, as `unit * width + lane`; the first of them where there are no more.
            [num_tokens, most units of a token]
        num_parts: How many units each token has. [num_tokens]
    """

    tokens: Array
    positions: Array
    lanes: Array
    pages: Array
    first: Array
    count: Array
    parts: Array
    num_parts: Array

    def arrays(self) -> list[Array]:
        """All of them, in the order of the fields."""
        return [getattr(self, field.name) for field in fields(self)]


def units_of(arrays: Sequence[Array]) -> list[Units[Array]]:
    """Several `Units` from their arrays, one after another."""
    size = len(fields(Units))
    return [Units(*arrays[at : at + size]) for at in range(0, len(arrays), size)]


def places(items: Sequence[Item]) -> Int64s:  # [num_tokens]
    """Where the keys of the new tokens go: `page * PAGE + token in the page`."""
    counts = np.array([item.count for item in items])
    at = _ranges(np.array([item.own.length for item in items]) - counts, counts)
    pages, before = _laid_out([item.own for item in items])
    found: Int64s = pages[np.repeat(before, counts) + at // PAGE] * PAGE + at % PAGE
    return found


def plan_step(items: Sequence[Item]) -> list[Units[Int64s]]:
    """The units of a step, no larger than it needs: narrow ones for single tokens, wide ones for pieces of prompts."""
    single = [item for item in items if item.count == 1]
    longer = [item for item in items if item.count > 1]
    return [
        plan_units(members, min(width, _most_tokens(members)), min(span, _most_keys(members)))
        for members, width, span in (
            (single, DECODE_WIDTH, DECODE_SPAN),
            (longer, PREFILL_WIDTH, PREFILL_SPAN),
        )
        if members
    ]


def plan_units(items: Sequence[Item], width: int, span: int) -> Units[Int64s]:
    """Cut the attention of some items into units of one size.

    Args:
        items: In the order of the batch.
        width: Tokens of a unit.
        span: Keys of a unit, a multiple of `PAGE`.
    """
    tiles = _tiles(items, width)
    num_spans = -(-tiles.num_keys // span)
    tile = np.repeat(np.arange(len(num_spans)), num_spans)  # of each unit
    at = _ranges(np.zeros_like(num_spans), num_spans)  # which of its tile's units
    count = np.minimum(tiles.num_keys[tile] - at * span, span)
    all_pages, before = _laid_out(tiles.keys)
    num_pages = np.array([len(keys.pages) for keys in tiles.keys])
    of_keys = tiles.of_keys[tile]
    in_keys = at[:, None] * (span // PAGE) + np.arange(span // PAGE)  # [num_units, span / PAGE]
    pages = all_pages[before[of_keys, None] + np.minimum(in_keys, num_pages[of_keys, None] - 1)]
    pages[np.arange(span // PAGE) * PAGE >= count[:, None]] = EMPTY_PAGE
    lanes = tiles.lanes[tile]
    parts, num_parts = _parts(lanes, np.arange(width) < tiles.sizes[tile, None], len(tiles.tokens))
    first = tiles.first[tile] + at * span
    return Units(tiles.tokens, tiles.positions, lanes, pages, first, count, parts, num_parts)


def plan_recorded(
    token_ids: Sequence[int],
    items: Sequence[Item],
    scored: Sequence[int],
    least_units: int = 1,
    least_parts: int = 1,
) -> list[Int64s]:
    """A step of few tokens in one of few sizes, so that many steps have one shape.

    Rows that only fill the batch up attend to nothing and write to `SCRATCH_PAGE`.

    Args:
        token_ids: The tokens: of most sequences one, of those that begin their prompts or pieces of them.
        items: One for each sequence or prefix, in the order of its tokens.
        scored: The tokens after which scores are wanted.
        least_units: There are as many units, empty ones among them: more where empty ones cost little.
        least_parts: Room for as many units of a token.

    Returns:
        Which rows are scored, [num_scored]; token ids and places, [num_rows] each; and the arrays of the step's
        `Units`.
    """
    units = plan_units(items, DECODE_WIDTH, DECODE_SPAN)
    num_rows, num_units = rounded_up(len(token_ids)), rounded_up(max(len(units.first), least_units))
    num_scored = min(num_rows, SCORED_ROWS) if len(scored) <= SCORED_ROWS else num_rows
    num_parts = rounded_up(max(units.parts.shape[1], least_parts))
    most = units.parts.shape[1]
    parts = units.parts[:, np.minimum(np.arange(num_parts), most - 1)]
    filled = Units(
        tokens=np.arange(num_rows),
        positions=_longer(units.positions, num_rows, 0),
        lanes=_longer(units.lanes, num_units, 0),
        pages=_longer(units.pages, num_units, EMPTY_PAGE),
        first=_longer(units.first, num_units, 0),
        count=_longer(units.count, num_units, 0),
        parts=_longer(parts, num_rows, 0),
        num_parts=_longer(units.num_parts, num_rows, 0),
    )
    return [
        _longer(np.array(scored, np.int64), num_scored, 0),
        _longer(np.array(token_ids, np.int64), num_rows, 0),
        _longer(places(items), num_rows, SCRATCH_PAGE * PAGE),
        *filled.arrays(),
    ]


def rounded_up(number: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, ..."""
    power = 1 << max(number - 1, 0).bit_length()
    return power * 3 // 4 if number <= power * 3 // 4 and power >= 4 else power


def _longer(array: Int64s, length: int, value: int) -> Int64s:
    longer = np.full((length, *array.shape[1:]), value, np.int64)
    longer[: len(array)] = array
    return longer


def _ranges(starts: Int64s, counts: Int64s) -> Int64s:
    """The numbers from each start on, `counts` of them, one range after another."""
    ends = np.cumsum(counts)
    return np.repeat(starts - ends + counts, counts) + np.arange(ends[-1] if len(ends) else 0)


def _laid_out(keys: Sequence[Keys]) -> tuple[Int64s, Int64s]:
    """All pages one after another, and how many come before those of each."""
    lengths = np.array([len(one.pages) for one in keys])
    return np.concatenate([one.pages for one in keys]), np.cumsum(lengths) - lengths


@dataclass(frozen=True)
class _Tiles:
    """Up to `width` tokens with keys that all of them read, at least in part; there is a unit for each span of these.

    Args:
        tokens, positions: As of `Units`.
        keys: All there are, of the items themselves and of what they share.
        lanes: The tokens of each tile, as of `Units`. [num_tiles, width]
        sizes: How many tokens each has. [num_tiles]
        of_keys: Which keys they read, as an index into `keys`. [num_tiles]
        first, num_keys: The position of the first of these keys in the text, and how many they read. [num_tiles]
    """

    tokens: Int64s
    positions: Int64s
    keys: list[Keys]
    lanes: Int64s
    sizes: Int64s
    of_keys: Int64s
    first: Int64s
    num_keys: Int64s


def _tiles(items: Sequence[Item], width: int) -> _Tiles:
    counts = np.array([item.count for item in items])
    lengths = np.array([item.own.length for item in items])
    before = np.array([0 if item.prefix is None else item.prefix.length for item in items])
    start = np.cumsum(counts) - counts  # among the tokens of these items
    members: dict[Keys, list[int]] = {}
    for at, item in enumerate(items):
        if item.prefix is not None:
            members.setdefault(item.prefix, []).append(at)
    # first the tiles over each item's own keys, then those over what items share
    num_own = -(-counts // width)
    of_item = np.repeat(np.arange(len(items)), num_own)
    nth = _ranges(np.zeros_like(num_own), num_own) * width
    own_sizes = np.minimum(counts[of_item] - nth, width)
    shared = [_ranges(start[at], counts[at]) for at in members.values()]  # tokens
    num_shared = np.array([-(-len(tokens) // width) for tokens in shared], np.int64)
    of_shared = np.repeat(np.arange(len(shared)), num_shared)
    nth_shared = _ranges(np.zeros_like(num_shared), num_shared) * width
    shared_sizes = np.minimum(np.array([len(tokens) for tokens in shared], np.int64)[of_shared] - nth_shared, width)
    sizes = np.concatenate([own_sizes, shared_sizes])
    lanes = np.zeros((len(sizes), width), np.int64)
    lanes[np.arange(width) < sizes[:, None]] = np.concatenate([np.arange(counts.sum()), *shared])
    return _Tiles(
        tokens=_ranges(np.array([item.start for item in items]), counts),
        positions=_ranges(before + lengths - counts, counts),
        keys=[*(item.own for item in items), *members],
        lanes=lanes,
        sizes=sizes,
        of_keys=np.concatenate([of_item, len(items) + of_shared]),
        first=np.concatenate([before[of_item], np.zeros_like(of_shared)]),
        num_keys=np.concatenate(
            [
                (lengths - counts)[of_item] + nth + own_sizes,
                np.array([keys.length for keys in members], np.int64)[of_shared],
            ]
        ),
    )


def _parts(lanes: Int64s, is_used: npt.NDArray[np.bool_], num_tokens: int) -> tuple[Int64s, Int64s]:
    """The parts of each token, from the tokens of each unit."""
    part = np.arange(lanes.size).reshape(lanes.shape)[is_used]
    token = lanes[is_used]
    order = np.argsort(token, kind="stable")
    part, token = part[order], token[order]
    num_parts = np.bincount(token, minlength=num_tokens)
    first = np.cumsum(num_parts) - num_parts
    parts = np.repeat(part[first, None], int(num_parts.max()), axis=1)
    parts[token, np.arange(len(token)) - first[token]] = part
    return parts, num_parts


def _most_tokens(items: Sequence[Item]) -> int:
    """The most tokens that could share a unit."""
    shared: dict[Keys, int] = {}
    for item in items:
        if item.prefix is not None:
            shared[item.prefix] = shared.get(item.prefix, 0) + item.count
    return max(*(item.count for item in items), *shared.values(), 1)


def _most_keys(items: Sequence[Item]) -> int:
    """The most keys that could be in a unit, rounded up to whole pages."""
    most = max(max(item.own.length, item.prefix.length if item.prefix else 0) for item in items)
    return -(-most // PAGE) * PAGE
