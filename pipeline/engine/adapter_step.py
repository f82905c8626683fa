"""Which rows of one forward belong to which expert, and in which form the adapters compute on them.

Three forms compute the same low-rank products `y[rows of e] += x[rows of e] A_e' B_e`:

- *slices*: one pair of products for each expert; best for long slices, as in a prefill.
- *batch*: the rows of each expert are filled up to one height, and all experts computed in one pair of batched
  products; best on a CPU for a decode step, where each expert has few rows.
- *wide*: all rows times the A of all experts, masked so that each row keeps its own part, times all B; on a GPU, where
  launching counts and multiplying does not. Its tensors keep their addresses, so a CUDA graph can hold it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from pipeline.engine.transfer import to_device
from pipeline.errors import AdapterError

Form = Literal["slices", "batch", "wide"]
Slots = tuple[str | None, ...]
Key = tuple[Slots, int, torch.dtype]  # the slots, their height in a mask or 0 for an index, the dtype
Buffers = dict[Key, torch.Tensor]

# Measured with rank 16 at 1024 to 3072 features in bfloat16 on a CPU, in units of one pair of products on a short
# slice (40 microseconds): what a batch costs at all, for each slot that it spans, and for each row filled up.
_BATCH_COST = 1.0
_SLOT_COST = 0.12
_PLACE_COST = 0.01
_ROW_COST = 0.007  # of a slice
_WIDE_ROWS = 512  # of a slice, on the average, up to which a GPU computes in the wide form
REPLAYED_ROWS = 512  # of a step that a CUDA graph may hold
_SHORT_SLICE = 32  # rows, on the average, up to which a vector is picked for each row


@dataclass(frozen=True)
class Slice:
    """Contiguous rows of a packed batch that belong to one expert.

    Args:
        start: The first row.
        stop: The row after the last.
        expert: The name of the adapter, or None for the base model alone.
    """

    start: int
    stop: int
    expert: str | None


@dataclass(frozen=True)
class Batch:
    """How rows are laid out for batched products over the slots `first` to `last`.

    Args:
        height: Places for each slot.
        gather: The row that lies in each place, `[(last - first) * height]`; any row where a place is left over.
        start: The first row that gets a product.
        stop: The row after the last that does.
        scatter: The place of each of these rows, `[stop - start]`; one past the places for rows that have none.
    """

    first: int
    last: int
    height: int
    gather: torch.Tensor
    start: int
    stop: int
    scatter: torch.Tensor


@dataclass(frozen=True)
class Plan:
    """What is computed slice by slice, as start, stop and slot, and what as one batch."""

    slices: tuple[tuple[int, int, int], ...]
    batch: Batch | None


class StepRows:
    """The rows of one forward; built once per step and read by every module.

    Args:
        slices: A partition of the rows, in order.
        device: Where the model is.
        form: The form of computing, or None to choose by cost.
        buffers: Where the wide form keeps its tensors from step to step, so that their addresses stay.
        is_replayed: Compute the same operations whichever experts the rows have, if they have any: in the wide form,
            by the numbers in the buffers alone. For rows of experts that `AdapterBank.is_replayable` allows.

    Raises:
        AdapterError: The slices are no partition.
    """

    def __init__(
        self,
        slices: Sequence[Slice],
        device: torch.device,
        *,
        form: Form | None = None,
        buffers: Buffers | None = None,
        is_replayed: bool = False,
    ) -> None:
        stop = 0
        merged: list[tuple[int, int, str]] = []  # neighbours of one expert are one slice
        for part in slices:
            if part.start != stop or part.stop < part.start:
                raise AdapterError(
                    "the slices of a step are no partition of its rows",
                    details=(f"rows {part.start} to {part.stop} come after row {stop}",),
                    hint="Give slices in order, from row 0 on, without gaps.",
                )
            stop = part.stop
            if part.expert is None or part.start == part.stop:
                continue
            if merged and merged[-1][1:] == (part.start, part.expert):
                merged[-1] = (merged[-1][0], part.stop, part.expert)
            else:
                merged.append((part.start, part.stop, part.expert))
        self.num_rows = stop
        self.slices = tuple(merged)
        self.experts = frozenset(name for _, _, name in self.slices)
        self._is_replayed = is_replayed
        if is_replayed:
            form = "wide"
        self.is_by_row = is_replayed or device.type == "cuda" or len(self.slices) * _SHORT_SLICE > self.num_rows
        if form is None and device.type == "cuda":
            form = "wide" if self.num_rows <= _WIDE_ROWS * len(self.slices) else "slices"
        self._form = form
        self._is_replayable = form == "wide" and self.num_rows <= REPLAYED_ROWS
        self._device = device
        self._buffers: Buffers = {} if buffers is None else buffers
        self._tensors: Buffers = {}
        self.has_lost_an_expert = False
        self._plans: dict[Slots, Plan] = {}
        self._placed: dict[Slots, tuple[tuple[int, int, int], ...]] = {}
        for key in tuple(self._buffers) if self._is_replayable else ():
            self._tensor(key)  # a replayed CUDA graph runs no Python: what it reads must be there before

    def concerns(self, experts: Iterable[str | None]) -> bool:
        """Whether something must be computed for some of these experts."""
        return bool(self.slices) and (self._is_replayed or not self.experts.isdisjoint(experts))

    @property
    def is_wide(self) -> bool:
        """Whether all rows are multiplied with all experts."""
        return self._form == "wide"

    def placed(self, slots: Slots) -> tuple[tuple[int, int, int], ...]:
        """The slices whose expert has a slot: start, stop, slot."""
        found = self._placed.get(slots)
        if found is None:
            places = {name: slot for slot, name in enumerate(slots) if name is not None}
            found = tuple((start, stop, places[name]) for start, stop, name in self.slices if name in places)
            self._placed[slots] = found
        return found

    def index(self, slots: Slots) -> torch.Tensor:  # [num_rows]
        """For each row, one more than the slot of its expert; 0 where it has none."""
        return self._tensor((slots, 0, torch.long))

    def mask(self, slots: Slots, rank: int, dtype: torch.dtype) -> torch.Tensor:  # [num_rows, len(slots) * rank]
        """1 where a row meets its own expert's part."""
        return self._tensor((slots, rank, dtype))

    def plan(self, slots: Slots) -> Plan:
        """What is computed slice by slice and what as a batch."""
        found = self._plans.get(slots)
        if found is None:
            found = self._plans[slots] = self._choose(self.placed(slots))
        return found

    def _tensor(self, key: Key) -> torch.Tensor:
        found = self._tensors.get(key)
        if found is None:
            found = self._tensors[key] = self._kept(key, self._values(key))
        return found

    def _values(self, key: Key) -> torch.Tensor:
        slots, rank, dtype = key
        numbers = np.zeros(self.num_rows, np.int64)
        for start, stop, slot in self.placed(slots):
            numbers[start:stop] = slot + 1
        (index,) = to_device([numbers], self._device)
        if not rank:
            return index
        owners = torch.arange(1, len(slots) + 1, device=self._device).repeat_interleave(rank)  # [len(slots) * rank]
        return (index[:, None] == owners[None, :]).to(dtype)

    def _kept(self, key: Key, values: torch.Tensor) -> torch.Tensor:
        if not self._is_replayable:
            return values
        if key not in self._buffers:
            with torch.inference_mode(False):  # else only inference mode could write to it again
                self._buffers[key] = values.new_zeros((REPLAYED_ROWS, *values.shape[1:]))
        return self._buffers[key][: self.num_rows].copy_(values)

    def _choose(self, placed: tuple[tuple[int, int, int], ...]) -> Plan:
        """Long slices one by one, the others as a batch, with the border where the estimated cost is least."""
        if self._form == "slices" or not placed:
            return Plan(placed, None)
        lengths: dict[int, int] = {}
        for start, stop, slot in placed:
            lengths[slot] = lengths.get(slot, 0) + stop - start
        heights = [0, *sorted(set(lengths.values()))]
        height = heights[-1] if self._form == "batch" else min(heights, key=lambda height: _cost(lengths, height))
        batched = [part for part in placed if lengths[part[2]] <= height]
        slices = tuple(part for part in placed if lengths[part[2]] > height)
        return Plan(slices, self._batch(batched, height) if batched else None)

    def _batch(self, placed: Iterable[tuple[int, int, int]], height: int) -> Batch:
        placed = list(placed)
        slots = [slot for _, _, slot in placed]
        first, last = min(slots), max(slots) + 1
        start, stop = placed[0][0], placed[-1][1]
        num_places = (last - first) * height
        gather = torch.full((num_places,), start)
        scatter = torch.full((stop - start,), num_places)
        filled: dict[int, int] = {}
        for part_start, part_stop, slot in placed:
            place = (slot - first) * height + filled.get(slot, 0)
            num_rows = part_stop - part_start
            gather[place : place + num_rows] = torch.arange(part_start, part_stop)
            scatter[part_start - start : part_stop - start] = torch.arange(place, place + num_rows)
            filled[slot] = filled.get(slot, 0) + num_rows
        return Batch(first, last, height, gather.to(self._device), start, stop, scatter.to(self._device))


class CurrentStep:
    """The step that the model computes; one object, shared by a bank and its modules."""

    def __init__(self, device: torch.device) -> None:
        self._nobody = StepRows((), device)
        self.tokens = self.rows = self._nobody

    def reset(self) -> None:
        """Let the base model alone answer."""
        self.tokens = self.rows = self._nobody


def _cost(lengths: dict[int, int], height: int) -> float:
    """The estimated cost of computing slots of up to `height` rows as one batch and the others slice by slice."""
    long = [length for length in lengths.values() if length > height]
    slots = [slot for slot, length in lengths.items() if length <= height]
    cost = len(long) + _ROW_COST * sum(long)
    if slots:
        num_slots = max(slots) - min(slots) + 1
        cost += _BATCH_COST + num_slots * (_SLOT_COST + _PLACE_COST * height)
    return cost
