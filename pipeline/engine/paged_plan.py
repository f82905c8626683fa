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

from collections.abc import Iterable, Sequence
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


@dataclass(frozen=True, eq=False)
class Keys:
    """Keys and values that lie in pages.

    Args:
        pages: Their pages, and maybe more. [num_pages]
        length: Their number, in tokens.
    """

    pages: Int64s
    length: int


@dataclass(frozen=True)
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
    found = []
    for item in items:
        at = np.arange(item.own.length - item.count, item.own.length)
        found.append(item.own.pages[at // PAGE] * PAGE + at % PAGE)
    return np.concatenate(found)


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
    tokens = np.concatenate([np.arange(item.start, item.start + item.count) for item in items])
    positions = np.concatenate([np.arange(item.position, item.position + item.count) for item in items])
    tiles = [*_own_tiles(items, width), *_prefix_tiles(items, width)]
    num_keys = np.array([tile.num_keys for tile in tiles])
    num_spans = -(-num_keys // span)
    tile = np.repeat(np.arange(len(tiles)), num_spans)  # of each unit
    at = np.arange(len(tile)) - np.repeat(np.cumsum(num_spans) - num_spans, num_spans)  # which of its tile's units
    count = np.minimum(num_keys[tile] - at * span, span)
    num_pages = np.array([len(one.keys.pages) for one in tiles])
    in_slot = at[:, None] * (span // PAGE) + np.arange(span // PAGE)  # [num_units, span / PAGE]
    in_all = (np.cumsum(num_pages) - num_pages)[tile, None] + np.minimum(in_slot, num_pages[tile, None] - 1)
    pages = np.concatenate([one.keys.pages for one in tiles])[in_all]
    pages[np.arange(span // PAGE) * PAGE >= count[:, None]] = EMPTY_PAGE
    lanes = np.zeros((len(tiles), width), np.int64)
    sizes = np.array([len(one.tokens) for one in tiles])
    is_used = np.arange(width) < sizes[:, None]
    lanes[is_used] = np.concatenate([one.tokens for one in tiles])
    lanes, is_used = lanes[tile], is_used[tile]
    parts, num_parts = _parts(lanes, is_used, len(tokens))
    first = np.array([one.first for one in tiles])[tile] + at * span
    return Units(tokens, positions, lanes, pages, first, count, parts, num_parts)


def plan_decode(
    token_ids: Sequence[int], items: Sequence[Item], *, least_units: int = 1, least_parts: int = 1
) -> list[Int64s]:
    """A step of one new token for each of some sequences, in one of few sizes, so that many steps have one shape.

    Rows that only fill the batch up attend to nothing and write to `SCRATCH_PAGE`.

    Args:
        token_ids: The new tokens.
        items: One for each.
        least_units: There are as many units, empty ones among them: more where empty ones cost little.
        least_parts: Room for as many units of a token.

    Returns:
        Token ids and places, [num_rows] each, and the arrays of the step's `Units`.
    """
    units = plan_units(items, DECODE_WIDTH, DECODE_SPAN)
    num_rows, num_units = rounded_up(len(items)), rounded_up(max(len(units.first), least_units))
    num_parts = rounded_up(max(units.parts.shape[1], least_parts))
    parts = np.pad(units.parts, ((0, 0), (0, num_parts - units.parts.shape[1])), mode="edge")
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
    own_places = _longer(places(items), num_rows, SCRATCH_PAGE * PAGE)
    return [_longer(np.array(token_ids, np.int64), num_rows, 0), own_places, *filled.arrays()]


def rounded_up(number: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, ..."""
    power = 1 << max(number - 1, 0).bit_length()
    return power * 3 // 4 if number <= power * 3 // 4 and power >= 4 else power


def _longer(array: Int64s, length: int, value: int) -> Int64s:
    return np.pad(array, ((0, length - len(array)), *((0, 0) for _ in array.shape[1:])), constant_values=value)


@dataclass(frozen=True)
class _Tile:
    """Up to `width` tokens with keys that all of them read, at least in part; a unit for each span of these."""

    tokens: Int64s
    keys: Keys
    first: int
    num_keys: int


def _own_tiles(items: Sequence[Item], width: int) -> Iterable[_Tile]:
    start = 0  # among the tokens of these items
    for item in items:
        past, before = item.own.length - item.count, item.prefix.length if item.prefix else 0
        for at in range(0, item.count, width):
            stop = min(at + width, item.count)
            yield _Tile(np.arange(start + at, start + stop), item.own, before, past + stop)
        start += item.count


def _prefix_tiles(items: Sequence[Item], width: int) -> Iterable[_Tile]:
    members: dict[Keys, list[Int64s]] = {}
    start = 0
    for item in items:
        if item.prefix is not None:
            members.setdefault(item.prefix, []).append(np.arange(start, start + item.count))
        start += item.count
    for keys, parts in members.items():
        tokens = np.concatenate(parts)
        for at in range(0, len(tokens), width):
            yield _Tile(tokens[at : at + width], keys, 0, keys.length)


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
