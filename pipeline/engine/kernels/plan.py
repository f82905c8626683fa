"""Which tokens of a step attend to what, and the units of work that follow from it; numpy only."""

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Spans:
    """Contiguous tokens of a batch, each with keys and values: the items' own, or the shared prefixes of groups.

    Args:
        start: The first token of each. [num_spans]
        count: Tokens of each. [num_spans]
        length: For items: own keys from before these tokens. For groups: keys of the prefix. [num_spans]
        keys: The address of the keys in layer 0, [num_kv_heads, capacity, head_dim] there. [num_spans]
        values: The address of the values, as `keys`. [num_spans]
        head_stride: From one head to the next, in elements. [num_spans]
        layer_stride: From one layer to the next, in elements. [num_spans]
    """

    start: Int64s
    count: Int64s
    length: Int64s
    keys: Int64s
    values: Int64s
    head_stride: Int64s
    layer_stride: Int64s

    @staticmethod
    def none() -> "Spans":
        """No spans."""
        return Spans(*(np.empty(0, np.int64) for _ in fields(Spans)))


@dataclass(frozen=True)
class AttentionPlan:
    """Who attends to what in one step; the same for all layers.

    A token at position `j` of an item sees the whole prefix of its group, if it is in one, and the item's own keys
    0 to `length + j`. Each item lies in one group entirely or in none.

    Args:
        num_tokens: Tokens in the batch.
        items: Sequences, each with its own keys and values. They may leave tokens out; these get no answer.
        groups: Shared prefixes, each with the items that share it, which are neighbours.
    """

    num_tokens: int
    items: Spans
    groups: Spans


def checked(spans: Spans, num_tokens: int) -> Spans:
    """Contiguous int64, in the order of the batch, none over another."""
    arrays = [np.ascontiguousarray(getattr(spans, field.name), dtype=np.int64) for field in fields(Spans)]
    found = Spans(*arrays)
    if any(array.shape != found.start.shape or array.ndim != 1 for array in arrays):
        raise ValueError("the arrays of a plan differ in length")
    end = found.start + found.count
    if len(end) and (
        found.start[0] < 0
        or end[-1] > num_tokens
        or (found.count < 1).any()
        or (found.length < 0).any()
        or (end[:-1] > found.start[1:]).any()
    ):
        raise ValueError("the tokens of a plan are not in the order of the batch, each once")
    return found


def prefix_lengths(items: Spans, groups: Spans) -> Int64s:
    """For each item, the prefix of its group, or 0. [num_items]"""
    if not len(groups.start) or not len(items.start):
        return np.zeros(len(items.start), np.int64)
    group = np.searchsorted(groups.start, items.start, side="right") - 1
    end = np.where(group >= 0, groups.start[group] + groups.count[group], 0)
    inside = items.start < end
    last = items.start + items.count
    following = np.append(groups.start, np.iinfo(np.int64).max)[group + 1]
    if (last > np.where(inside, end, following)).any():
        raise ValueError("an item lies partly in a group")
    covered = np.bincount(group[inside], weights=items.count[inside], minlength=len(groups.start))
    if (covered != groups.count).any():
        raise ValueError("a group has tokens of no item")
    return np.ascontiguousarray(np.where(inside, groups.length[group], 0))


def positions(num_tokens: int, items: Spans, before: Int64s) -> Int64s:
    """Where each token stands in its text, prefix included; 0 for tokens of no item. [num_tokens]"""
    position = np.zeros(num_tokens, np.int64)
    if len(items.start):
        first = np.cumsum(items.count) - items.count
        offset = np.arange(int(items.count.sum())) - np.repeat(first, items.count)
        tokens = offset + np.repeat(items.start, items.count)
        position[tokens] = offset + np.repeat(before + items.length, items.count)
    return position


def units(count: Int64s, num_keys: Int64s, heads: int, num_kv_heads: int, rows: int) -> Int64s:
    """The work of one pass, the largest first: (span, key head, first query row). [num_units, 3]"""
    blocks = -(-count * heads // rows)
    span = np.repeat(np.arange(len(count)), blocks)
    block = np.arange(len(span)) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    size = np.minimum(count[span] * heads - block * rows, rows) * num_keys[span]
    order = np.argsort(-size, kind="stable")
    units = np.empty((len(order), num_kv_heads, 3), np.int64)
    units[:, :, 0] = span[order, None]
    units[:, :, 1] = np.arange(num_kv_heads)
    units[:, :, 2] = block[order, None] * rows
    return units.reshape(-1, 3)
