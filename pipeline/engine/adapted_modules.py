"""Modules that answer each row of a batch as the row's own expert does.

Each stands in the place of a module of the base model, holds what the experts change in it, and reads from the shared
`CurrentStep` which rows are whose.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from pipeline.engine.adapter_step import CurrentStep, StepRows
from pipeline.engine.deltas import Delta, EmbeddingDelta, LinearDelta, NormDelta
from pipeline.errors import AdapterError

Vectors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class VectorStack:
    """One vector of each expert, stacked, so that a row finds its own by an index.

    Args:
        slots: The experts, in the order of the rows 1, 2, ... of `data`.
        data: `[1 + len(slots), num_features]`; row 0 changes nothing.
    """

    slots: tuple[str, ...]
    data: torch.Tensor

    @classmethod
    def build(cls, vectors: Vectors, neutral: float) -> "VectorStack | None":
        """Stack vectors, or None where there is none."""
        if not vectors:
            return None
        rows = list(vectors.values())
        return cls(tuple(vectors), torch.stack([torch.full_like(rows[0], neutral), *rows]))

    def apply_(
        self, values: torch.Tensor, step: StepRows, combine_: Callable[[torch.Tensor, torch.Tensor], Any]
    ) -> None:
        """Combine each row of `values`, `[num_rows, num_features]`, with its expert's vector in place."""
        if not step.concerns(self.slots):
            return
        if step.is_by_row:
            combine_(values, self.data.index_select(0, step.index(self.slots)))
            return
        for start, stop, slot in step.placed(self.slots):
            combine_(values[start:stop], self.data[slot + 1])


@dataclass(frozen=True)
class LowRankStack:
    """The low-rank pairs of the experts, in slots of one height.

    Args:
        slots: Whose pair lies in each slot; None where the slot is free.
        a: `[num_slots, rank, in_features]`.
        b: `[num_slots, rank, out_features]`.
    """

    slots: tuple[str | None, ...]
    a: torch.Tensor
    b: torch.Tensor
    pairs: tuple[tuple[torch.Tensor, torch.Tensor], ...] = field(init=False)  # views: [in_features, rank] and b's

    def __post_init__(self) -> None:
        pairs = tuple((self.a[slot].T, self.b[slot]) for slot in range(len(self.slots)))
        object.__setattr__(self, "pairs", pairs)

    @property
    def rank(self) -> int:
        """The height of a slot; pairs of a lower rank are filled up with zeros."""
        return self.a.shape[1]

    @classmethod
    def allocate(cls, like: "LowRankStack", num_slots: int) -> "LowRankStack":
        """A larger or smaller stack with the same pairs in its first slots."""
        used = [slot for slot, name in enumerate(like.slots) if name is not None]
        a, b = (old.new_zeros((num_slots, *old.shape[1:])) for old in (like.a, like.b))
        for slot, old in enumerate(used):
            a[slot], b[slot] = like.a[old], like.b[old]
        free = [None] * (num_slots - len(used))
        return cls((*(like.slots[slot] for slot in used), *free), a, b)

    def with_pair(self, name: str, a: torch.Tensor, b: torch.Tensor) -> "LowRankStack":
        """The stack with one pair more. A free slot is filled in place: nobody reads it yet."""
        stack = self
        if None not in self.slots:
            stack = self.allocate(self, len(self.slots) + max(1, len(self.slots) // 4))
        slot = stack.slots.index(None)
        stack.a[slot].zero_()[: a.shape[0]] = a
        stack.b[slot].zero_()[: b.shape[0]] = b
        return LowRankStack((*stack.slots[:slot], name, *stack.slots[slot + 1 :]), stack.a, stack.b)

    def without(self, name: str) -> "LowRankStack | None":
        """The stack with a slot freed, packed when half of it is free; None when none is left."""
        slots = tuple(None if other == name else other for other in self.slots)
        num_used = len(slots) - slots.count(None)
        stack = LowRankStack(slots, self.a, self.b)
        if num_used == 0:
            return None
        return self.allocate(stack, num_used) if num_used * 2 <= len(slots) else stack

    def add_(self, out: torch.Tensor, rows: torch.Tensor, step: StepRows) -> None:
        """Add each row's own product.

        Args:
            out: `[num_rows, out_features]`, changed in place.
            rows: `[num_rows, in_features]`.
            step: Whose the rows are.
        """
        if not step.concerns(self.slots):
            return
        if step.is_wide:
            height = len(self.slots) * self.rank
            hidden = rows @ self.a.view(height, -1).T  # [num_rows, num_slots * rank]
            out.addmm_(hidden.mul_(step.mask(self.slots, self.rank, out.dtype)), self.b.view(height, -1))
            return
        plan = step.plan(self.slots)
        for start, stop, slot in plan.slices:
            a, b = self.pairs[slot]
            out[start:stop].addmm_(rows[start:stop] @ a, b)
        batch = plan.batch
        if batch is None:
            return
        a, b = self.a[batch.first : batch.last], self.b[batch.first : batch.last]
        places = rows.index_select(0, batch.gather).view(a.shape[0], batch.height, -1)  # zeros are never needed here
        hidden = torch.bmm(places, a.transpose(1, 2))  # [num_slots, height, rank]
        num_places = a.shape[0] * batch.height
        products = out.new_empty((num_places + 1, out.shape[1]))
        products[num_places].zero_()  # what the rows of nobody get
        torch.bmm(hidden, b, out=products[:num_places].view(a.shape[0], batch.height, -1))
        out[batch.start : batch.stop].add_(products.index_select(0, batch.scatter))


class AdaptedModule(nn.Module):
    """What stands in the place of a base module.

    Args:
        plain: The base's own module.
        current: Which rows are whose; shared by all.
        is_head: Whether it sees the rows that reach the head, rather than all tokens.
    """

    def __init__(self, plain: nn.Module, current: CurrentStep, *, is_head: bool = False) -> None:
        super().__init__()
        self.plain = plain
        self._current = current
        self._is_head = is_head
        self._deltas: dict[str, Any] = {}

    def install(self, name: str, delta: Any) -> None:
        """Take up what an expert changes here. A forward that runs meanwhile does not see it."""
        self._deltas = {**self._deltas, name: delta}

    def remove(self, name: str) -> None:
        """Forget an expert, which no row of the current step may belong to."""
        self._deltas = {other: delta for other, delta in self._deltas.items() if other != name}

    def _step(self, num_rows: int, experts: Iterable[str]) -> StepRows | None:
        """The current step, or None when none of its rows belongs to these experts."""
        step = self._current.rows if self._is_head else self._current.tokens
        if not step.experts:
            return None
        if step.has_lost_an_expert:
            raise AdapterError(
                "an adapter was unloaded while its rows were computed",
                hint="Acquire an adapter while sequences run with it.",
            )
        if step.num_rows != num_rows:
            raise AdapterError(
                f"the adapters were told of {step.num_rows} rows, and {num_rows} came",
                hint="Call AdapterBank.begin before each forward, with the slices of that forward.",
            )
        return step if step.concerns(experts) else None


class AdaptedLinear(AdaptedModule):
    """A linear layer, plain, packed or quantised, with what experts change in it."""

    def __init__(self, plain: nn.Module, current: CurrentStep, *, is_head: bool = False) -> None:
        super().__init__(plain, current, is_head=is_head)
        self._parts = _LinearParts()

    @property
    def in_features(self) -> int:
        """The length of an input row."""
        return self.plain.in_features  # type: ignore[return-value]  # torch types every attribute of a module alike

    @property
    def out_features(self) -> int:
        """The length of an output row."""
        return self.plain.out_features  # type: ignore[return-value]

    @property
    def weight(self) -> torch.Tensor:
        """The base's own weight."""
        return self.plain.weight  # type: ignore[return-value]

    @property
    def bias(self) -> torch.Tensor | None:
        """The base's own bias."""
        return self.plain.bias  # type: ignore[return-value]

    def install(self, name: str, delta: LinearDelta) -> None:
        """Take up what an expert changes here; its tensors are copied into the stacks."""
        self._parts = self._parts.with_delta(name, delta)
        super().install(name, None)

    def remove(self, name: str) -> None:
        """Forget an expert."""
        self._parts = self._parts.without(name)
        super().remove(name)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:  # [..., in_features] -> [..., out_features]
        """The layer's answer, each row as its expert has it."""
        parts = self._parts
        rows = hidden.reshape(-1, hidden.shape[-1])  # [num_rows, in_features]
        step = self._step(rows.shape[0], self._deltas)
        if step is None:
            return self.plain(hidden)  # type: ignore[no-any-return]
        scaled = rows
        if parts.input_scale is not None and step.concerns(parts.input_scale.slots):
            scaled = rows.clone()
            parts.input_scale.apply_(scaled, step, torch.Tensor.mul_)
        out: torch.Tensor = self.plain(scaled)  # [num_rows, out_features]
        for start, stop, name in step.slices if parts.own else ():
            if name in parts.own:
                out[start:stop] = functional.linear(scaled[start:stop], *parts.own[name])
        if parts.output_scale is not None:
            parts.output_scale.apply_(out, step, torch.Tensor.mul_)
        for stack in parts.low_rank.values():
            stack.add_(out, rows, step)
        for start, stop, name in step.slices if parts.kronecker else ():
            if name in parts.kronecker:
                first, second = parts.kronecker[name]  # [out_1, in_1], [out_2, in_2]
                blocks = rows[start:stop].unflatten(1, (first.shape[1], second.shape[1]))
                out[start:stop] += (first @ (blocks @ second.T)).flatten(1)
        if parts.offset is not None:
            parts.offset.apply_(out, step, torch.Tensor.add_)
        return out.view(*hidden.shape[:-1], -1)


@dataclass(frozen=True)
class _LinearParts:
    """All that experts change in one linear layer; replaced as a whole, so that a running forward sees no half."""

    own: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = field(default_factory=dict)
    kronecker: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    low_rank: dict[int, LowRankStack] = field(default_factory=dict)  # by the height of their slots
    input_scale: VectorStack | None = None
    output_scale: VectorStack | None = None
    offset: VectorStack | None = None

    def with_delta(self, name: str, delta: LinearDelta) -> "_LinearParts":
        low_rank = self.low_rank
        if delta.low_rank is not None:
            a, b = delta.low_rank
            height = _slot_height(a.shape[0])
            empty = LowRankStack((), a.new_empty((0, height, a.shape[1])), b.new_empty((0, height, b.shape[1])))
            low_rank = {**low_rank, height: low_rank.get(height, empty).with_pair(name, a, b)}
        return _LinearParts(
            own=self.own if delta.own is None else {**self.own, name: delta.own},
            kronecker=self.kronecker if delta.kronecker is None else {**self.kronecker, name: delta.kronecker},
            low_rank=low_rank,
            input_scale=_restacked(self.input_scale, name, delta.input_scale, 1.0),
            output_scale=_restacked(self.output_scale, name, delta.output_scale, 1.0),
            offset=_restacked(self.offset, name, delta.offset, 0.0),
        )

    def without(self, name: str) -> "_LinearParts":
        stacks = {height: stack.without(name) for height, stack in self.low_rank.items()}
        return _LinearParts(
            own={other: pair for other, pair in self.own.items() if other != name},
            kronecker={other: pair for other, pair in self.kronecker.items() if other != name},
            low_rank={height: stack for height, stack in stacks.items() if stack is not None},
            input_scale=_restacked(self.input_scale, name, None, 1.0),
            output_scale=_restacked(self.output_scale, name, None, 1.0),
            offset=_restacked(self.offset, name, None, 0.0),
        )


def _restacked(stack: VectorStack | None, name: str, vector: torch.Tensor | None, neutral: float) -> VectorStack | None:
    vectors = {} if stack is None else dict(zip(stack.slots, stack.data[1:], strict=True))
    if vector is None and name not in vectors:
        return stack
    others = {other: value for other, value in vectors.items() if other != name}
    return VectorStack.build(others if vector is None else {**others, name: vector}, neutral)


def num_bytes_held(delta: Delta) -> int:
    """What a delta takes once it is installed, in bytes."""
    num_bytes = sum(tensor.nbytes for tensor in delta.tensors())
    if isinstance(delta, LinearDelta) and delta.low_rank is not None:
        rank = delta.low_rank[0].shape[0]
        num_bytes += sum(matrix[0].nbytes for matrix in delta.low_rank) * (_slot_height(rank) - rank)
    return num_bytes


def is_replayable(delta: Delta) -> bool:
    """Whether a module applies a delta by the numbers of a step alone, as a recorded step needs it."""
    return isinstance(delta, LinearDelta) and delta.own is None and delta.kronecker is None


def _slot_height(rank: int) -> int:
    """Ranks are filled up to a power of two, so that most experts share one stack."""
    return max(8, 1 << (rank - 1).bit_length())


class AdaptedEmbedding(AdaptedModule):
    """An embedding of tokens with what experts change in it."""

    @property
    def weight(self) -> torch.Tensor:
        """The base's own weight."""
        return self.plain.weight  # type: ignore[return-value]

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:  # [...] -> [..., hidden_size]
        """The embeddings, each as its expert has it."""
        ids = token_ids.reshape(-1)  # [num_tokens]
        deltas = self._deltas
        step = self._step(ids.shape[0], deltas)
        if step is None:
            return self.plain(token_ids)  # type: ignore[no-any-return]
        out: torch.Tensor = self.plain(ids)  # [num_tokens, hidden_size]
        for start, stop, name in step.slices:
            delta: EmbeddingDelta | None = deltas.get(name)
            if delta is None:
                continue
            mine = out[start:stop]
            if delta.own is not None:
                mine.copy_(functional.embedding(ids[start:stop], delta.own))
                embed_scale = getattr(self.plain, "embed_scale", None)  # Gemma multiplies what it looks up
                if isinstance(embed_scale, torch.Tensor):
                    mine.mul_(embed_scale.to(mine.dtype))
            if delta.scale is not None:
                mine.mul_(delta.scale)
            if delta.low_rank is not None:
                a, b = delta.low_rank
                mine.addmm_(functional.embedding(ids[start:stop], a), b)
        return out.view(*token_ids.shape, -1)


class ExchangedNorm(AdaptedModule):
    """A norm over the hidden size, with the experts' own norms in its place."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:  # [..., hidden_size] -> the same
        """Each row as its expert's norm has it."""
        rows = hidden.reshape(-1, hidden.shape[-1])  # [num_tokens, hidden_size]
        deltas = self._deltas
        step = self._step(rows.shape[0], deltas)
        out: torch.Tensor = self.plain(hidden)
        if step is None:
            return out
        out_rows = out.view(rows.shape)
        for start, stop, name in step.slices:
            if name in deltas:
                out_rows[start:stop] = deltas[name].norm(rows[start:stop])
        return out


def adapted_module(plain: nn.Module, delta: Delta, current: CurrentStep, *, is_head: bool) -> AdaptedModule:
    """The module that takes the place of a plain one, for the kind of change that an expert brings."""
    kinds: dict[type, type[AdaptedModule]] = {
        LinearDelta: AdaptedLinear,
        EmbeddingDelta: AdaptedEmbedding,
        NormDelta: ExchangedNorm,
    }
    return kinds[type(delta)](plain, current, is_head=is_head)
