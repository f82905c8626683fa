"""Attention over packed tokens, through the seam that transformers has for it.

`AttentionInterface` finds `packed_attention` by name; the step's tokens, and where their keys and values lie, come with
the model's keyword arguments and its cache object. Nothing is global.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from transformers import AttentionInterface

from pipeline.engine.kernels import AttentionPlan, KernelsUnavailableError, Spans, load_kernels
from pipeline.engine.kernels.cpu import Kernels
from pipeline.engine.kv_cache import PagedCache, SlotCache
from pipeline.engine.paged_plan import Item, Keys
from pipeline.engine.steps import Chunk, Entry, Prefix
from pipeline.errors import BaseModelError, ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from pipeline.engine.kernels.gpu import GpuKernels

logger = logging.getLogger(__name__)

NAME = "expert_packed"
_HARMLESS = frozenset({"dropout", "position_ids", "use_cache", "is_causal", "output_router_logits"})


class StepAttention(Protocol):
    """What attends in one step: made once, called for each layer."""

    def store(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put the new keys and values, [num_tokens, num_kv_heads, head_dim], where they belong."""
        ...

    def attend(self, layer: int, queries: torch.Tensor, scale: float, window: int, softcap: float) -> torch.Tensor:
        """Attention of the queries, [num_tokens, num_q_heads, head_dim], over all that each token sees."""
        ...


class StepCache:
    """A step as the models see it: the object that they hand their new keys and values to.

    Args:
        attention: The step's.
    """

    def __init__(self, attention: StepAttention) -> None:
        self.attention = attention

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:  # [1, num_kv_heads, num_tokens, head_dim] each
        """Store the new keys and values; `packed_attention` reads them where they lie."""
        self.attention.store(layer_idx, keys[0].transpose(0, 1), values[0].transpose(0, 1))
        return keys, values

    def get_seq_length(self, *_: Any) -> int:
        """Nothing is told by a length: positions are given."""
        return 0


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, num_q_heads, num_tokens, head_dim]
    _key: torch.Tensor,
    _value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    packed: StepCache | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:  # [1, num_tokens, num_q_heads, head_dim]
    """Attention of packed tokens, as transformers calls it."""
    unknown = sorted(name for name, told in others.items() if told is not None and name not in _HARMLESS)
    if packed is None or attention_mask is not None or unknown:
        raise BaseModelError(
            f"the attention of {type(module).__name__} needs {', '.join(unknown) or 'a mask'}, which the packed engine "
            "does not compute",
            hint='Use engine "padded", which runs whatever transformers runs.',
        )
    layer: Any = module.layer_idx
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    queries = query[0].transpose(0, 1)
    return packed.attention.attend(layer, queries, scale, sliding_window or 0, softcap or 0.0)[None], None


AttentionInterface.register(NAME, packed_attention)


class KernelAttention:
    """The compiled kernels at work on one step.

    Args:
        kernels: Of the model's dtype.
        chunks: The step's tokens, in the order of the batch.
        cache: Where keys and values lie.
        num_q_heads: Query heads.
    """

    def __init__(self, kernels: Kernels, chunks: list[Chunk], cache: SlotCache, num_q_heads: int) -> None:
        _, _, num_kv_heads, head_dim = cache.shape
        self._kernels = kernels
        self._tensors = []
        items: list[tuple[int, ...]] = []
        groups: list[tuple[int, ...]] = []
        start = 0
        last: Prefix | None = None
        for chunk in chunks:
            tensor = cache.tensor(chunk.slot)
            self._tensors.append(tensor)
            items.append((start, chunk.count, chunk.start, *_addresses(tensor)))
            prefix = chunk.owner.prefix if isinstance(chunk.owner, Entry) else None
            if prefix is not None and prefix is last:
                groups[-1] = (groups[-1][0], groups[-1][1] + chunk.count, *groups[-1][2:])
            elif prefix is not None and prefix.slot is not None:
                shared = cache.tensor(prefix.slot)
                self._tensors.append(shared)
                groups.append((start, chunk.count, prefix.length, *_addresses(shared)))
            last = prefix
            start += chunk.count
        plan = AttentionPlan(start, _spans(items), _spans(groups))
        self._prepared = kernels.prepare(plan, num_q_heads, num_kv_heads, head_dim)

    def store(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """See `StepAttention`."""
        self._kernels.store_inplace(self._prepared, layer, keys, values)

    def attend(self, layer: int, queries: torch.Tensor, scale: float, window: int, softcap: float) -> torch.Tensor:
        """See `StepAttention`."""
        return self._kernels.attention(self._prepared, layer, queries, scale=scale, window=window, softcap=softcap)


def paged_items(chunks: list[Chunk], cache: PagedCache) -> list[Item]:
    """What attends to which pages in a step; the pages are ready to be written to.

    Args:
        chunks: The step's tokens, in the order of the batch.
        cache: Where keys and values lie.
    """
    items, start = [], 0
    shared: dict[Prefix, Keys] = {}
    for chunk in chunks:
        prefix = chunk.owner.prefix if isinstance(chunk.owner, Entry) else None
        if prefix is not None and prefix.slot is not None and prefix not in shared:
            shared[prefix] = Keys(cache.pages(prefix.slot), prefix.length)
        own = Keys(cache.pages(chunk.slot), chunk.start + chunk.count)
        items.append(Item(start, chunk.count, own, shared.get(prefix) if prefix is not None else None))
        start += chunk.count
    cache.wipe()
    return items


def kernels_for(
    device: torch.device, dtype: torch.dtype, *, use_triton: bool | None = None
) -> Kernels | GpuKernels | None:
    """What computes attention, norms and gates on a device; None for torch's own operations.

    Args:
        device: Of the model.
        dtype: Of the model.
        use_triton: On a GPU, whether by kernels of Triton; None for where they work. That they do not, is warned of.

    Raises:
        ConfigError: Triton's kernels are asked for, and the device is not a GPU.
        MissingDependencyError: They are asked for, and Triton is not installed.
    """
    if use_triton:
        return _triton_kernels(device, dtype)
    if device.type == "cpu":
        return load_kernels(dtype)
    if device.type != "cuda" or use_triton is False:
        return None
    try:
        kernels = _triton_kernels(device, dtype)
        kernels.try_out(device)
    except (KernelsUnavailableError, MissingDependencyError) as problem:
        logger.warning(
            "no kernels on %s: attention and norms run in plain torch, at about half the speed\n  %s\n  Fix: %s",
            device,
            problem,
            problem.hint,
        )
        return None
    return kernels


def _triton_kernels(device: torch.device, dtype: torch.dtype) -> GpuKernels:
    if device.type != "cuda":
        raise ConfigError(f"Triton's kernels do not run on {device}", hint="Leave use_triton out, or use a GPU.")
    try:
        from pipeline.engine.kernels.gpu import GpuKernels
    except ImportError as error:
        raise MissingDependencyError(
            "Triton is not installed", hint="Run: pip install triton; or leave use_triton out."
        ) from error
    return GpuKernels(dtype)


def _addresses(tensor: torch.Tensor) -> tuple[int, int, int, int]:
    keys, values = tensor[0, 0], tensor[0, 1]
    return keys.data_ptr(), values.data_ptr(), tensor.stride(2), tensor.stride(0)


def _spans(rows: list[tuple[int, ...]]) -> Spans:
    if not rows:
        return Spans.none()
    return Spans(*np.array(rows, dtype=np.int64).T)
