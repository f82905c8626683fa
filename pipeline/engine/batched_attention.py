"""Attention of a step over paged keys in a fixed number of torch operations a layer: on any device, in any dtype.

Everything that depends on the step is in tensors of whole numbers, and nothing asks the device for a value: computed
once more over the same tensors with other numbers in them, it answers another step of the same shape.

torch's own fused attention is not used: none of it returns the log-sum-exp that prefixes need, takes a softcap, and
runs on every device. Where there is Triton, its kernels do the same in two launches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from pipeline.engine.kv_cache import PagedCache
from pipeline.engine.paged_plan import PAGE, Units

if TYPE_CHECKING:
    from pipeline.engine.kernels.gpu import GpuKernels

MOST_SCORES = 1 << 26  # computed at once, in float32
LOWEST = -1e30  # in place of minus infinity, from which nothing can be taken
BEYOND = 1 << 62  # the position of what is no key


class BatchedAttention:
    """Attention at work on one step; see `pipeline.engine.attention.StepAttention`.

    Args:
        cache: Where keys and values lie.
        places: Where those of the new tokens go; see `paged_plan.places`. [num_tokens]
        units: Those of the step; together they have each token once.
        kernels: What computes it; None for torch's operations.
    """

    def __init__(
        self,
        cache: PagedCache,
        places: torch.Tensor,
        units: Sequence[Units[torch.Tensor]],
        kernels: GpuKernels | None = None,
    ) -> None:
        self._pool = cache.pool
        num_kv_heads = cache.shape[2]
        self._kernels = kernels
        self._places = places
        self._groups: list[_Group]
        if kernels is None:
            self._rows = _rows_of_pages(places // PAGE, num_kv_heads) * PAGE + (places % PAGE)[:, None]
            self._groups = [_UnitAttention(one, num_kv_heads) for one in units]
        else:
            self._groups = [_UnitKernels(one, kernels) for one in units]

    def store(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """See `StepAttention`."""
        if self._kernels is not None:
            self._kernels.store(keys, values, self._pool[layer], self._places)
            return
        for pool, new in zip(self._pool[layer], (keys, values), strict=True):
            head_dim = new.shape[-1]
            pool.view(-1, head_dim).index_copy_(0, self._rows.flatten(), new.reshape(-1, head_dim))

    def attend(self, layer: int, queries: torch.Tensor, scale: float, window: int, softcap: float) -> torch.Tensor:
        """See `StepAttention`."""
        pool = self._pool[layer]
        if len(self._groups) == 1:  # it has all tokens, in their order
            return self._groups[0].attend(queries, pool, scale, window, softcap)
        out = torch.empty_like(queries, memory_format=torch.contiguous_format)
        for group in self._groups:
            own = queries.index_select(0, group.tokens)
            out.index_copy_(0, group.tokens, group.attend(own, pool, scale, window, softcap))
        return out


class _Group(Protocol):
    """The attention of some tokens of a step."""

    tokens: torch.Tensor

    def attend(
        self, queries: torch.Tensor, pool: torch.Tensor, scale: float, window: int, softcap: float
    ) -> torch.Tensor: ...


class _UnitKernels:
    """Attention of the tokens of some units by the compiled kernels; the arguments are theirs."""

    def __init__(self, units: Units[torch.Tensor], kernels: GpuKernels) -> None:
        self.tokens = units.tokens
        self._units = units
        self._kernels = kernels

    def attend(
        self, queries: torch.Tensor, pool: torch.Tensor, scale: float, window: int, softcap: float
    ) -> torch.Tensor:
        """See `_UnitAttention`."""
        return self._kernels.attention(queries, pool, self._units, scale=scale, window=window, softcap=softcap)


class _UnitAttention:
    """Attention of the tokens of some units; the arguments are theirs.

    A unit's products are batched over its key heads, and the query heads that share one are rows beside each other.
    """

    def __init__(self, units: Units[torch.Tensor], num_kv_heads: int) -> None:
        self.tokens = units.tokens
        self._lanes = units.lanes  # [num_units, width]
        self._rows = _rows_of_pages(units.pages, num_kv_heads).transpose(1, 2)  # [num_units, kv_heads, span / PAGE]
        at = torch.arange(units.pages.shape[1] * PAGE, device=units.pages.device)
        key_at = (units.first[:, None] + at).masked_fill(at >= units.count[:, None], BEYOND)  # [num_units, span]
        self._key_at = key_at[:, None, :]
        self._token_at = units.positions[units.lanes][:, :, None]  # [num_units, width, 1]
        self._is_future = self._key_at > self._token_at  # [num_units, width, span]
        self._hidden: dict[int, torch.Tensor] = {0: self._is_future}  # by window
        width = units.lanes.shape[1]
        self._unit, self._lane = units.parts // width, units.parts % width  # [num_tokens, num_parts]
        part = torch.arange(units.parts.shape[1], device=units.parts.device)
        self._is_no_part = part >= units.num_parts[:, None]

    def attend(
        self,
        queries: torch.Tensor,  # [num_tokens, num_q_heads, head_dim]
        pool: torch.Tensor,  # [2, pages, num_kv_heads, PAGE, head_dim]
        scale: float,
        window: int,
        softcap: float,
    ) -> torch.Tensor:  # as `queries`
        """Attention of the tokens over their keys, computed in float32."""
        num_units, num_kv_heads, num_pages = self._rows.shape
        num_tokens, num_q_heads, head_dim = queries.shape
        group, width = num_q_heads // num_kv_heads, self._lanes.shape[1]
        rows = queries[self._lanes].unflatten(2, (num_kv_heads, group)).permute(0, 2, 3, 1, 4)
        rows = rows.reshape(num_units, num_kv_heads, group * width, head_dim)
        hidden = self._hidden_by(window)
        most = max(MOST_SCORES // (num_q_heads * width * num_pages * PAGE), 1)
        computed = []
        for start in range(0, num_units, most):
            part = slice(start, start + most)
            key_rows, value_rows = (
                one.view(-1, PAGE * head_dim)[self._rows[part].flatten()].view(-1, num_pages * PAGE, head_dim)
                for one in pool
            )  # [units * num_kv_heads, span, head_dim]
            scores = _product(rows[part].flatten(0, 1), key_rows.transpose(1, 2)).mul_(scale)
            if softcap:
                scores = scores.div_(softcap).tanh_().mul_(softcap)
            lanes = scores.view(-1, num_kv_heads, group, width, num_pages * PAGE)
            lanes.masked_fill_(hidden[part, None, None], -math.inf)
            peak = scores.amax(dim=-1, keepdim=True).clamp_min_(LOWEST)
            weights = scores.sub_(peak).exp_()
            sums = _product(weights.to(queries.dtype), value_rows)
            size = (-1, num_kv_heads, group, width)
            computed.append((sums.view(*size, head_dim), weights.sum(dim=-1).view(size), peak.view(size)))
        sums, mass, peak = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*computed, strict=True))
        # Each token's units are put together by log-sum-exp.
        unit, lane = self._unit, self._lane
        peaks = peak[unit, :, :, lane].masked_fill(self._is_no_part[:, :, None, None], -math.inf)
        shares = (peaks - peaks.amax(dim=1, keepdim=True).clamp_min(LOWEST)).exp()  # [num_tokens, parts, heads, group]
        total = (mass[unit, :, :, lane] * shares).sum(dim=1).clamp_min(1e-30)
        out = (sums[unit, :, :, lane] * shares[..., None]).sum(dim=1) / total[..., None]
        return out.view(num_tokens, num_q_heads, head_dim).to(queries.dtype)

    def _hidden_by(self, window: int) -> torch.Tensor:  # [num_units, width, span]
        """Which keys each token does not see; the same in all layers of one window."""
        if window not in self._hidden:
            self._hidden[window] = self._is_future | (self._key_at <= self._token_at - window)
        return self._hidden[window]


def _rows_of_pages(pages: torch.Tensor, num_kv_heads: int) -> torch.Tensor:  # [..., num_kv_heads]
    """Where the heads of pages lie, in units of one head of one page."""
    return pages[..., None] * num_kv_heads + torch.arange(num_kv_heads, device=pages.device)


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Batched products, in float32 whatever the dtype of the factors."""
    if left.dtype == torch.float32:
        return torch.bmm(left, right)
    if left.device.type == "cuda":
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left.float(), right.float())
