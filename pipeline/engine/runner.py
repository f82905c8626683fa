"""One forward pass over the packed tokens of a step."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pipeline.engine.adapter_step import REPLAYED_ROWS
from pipeline.engine.adapters import AdapterBank, Slice
from pipeline.engine.attention import (
    NAME,
    KernelAttention,
    StepAttention,
    StepCache,
    kernels_for,
    paged_items,
)
from pipeline.engine.batched_attention import BatchedAttention
from pipeline.engine.decode_graphs import DecodeGraphs, Recorder, recorder_for
from pipeline.engine.foreign import is_out_of_memory, said
from pipeline.engine.kernels.cpu import Kernels
from pipeline.engine.kv_cache import PagedCache, SlotCache, default_num_bytes
from pipeline.engine.loader import BaseModel
from pipeline.engine.paged_plan import Item, places, plan_recorded, plan_step, units_of
from pipeline.engine.slots import Slot
from pipeline.engine.soft_prompts import SoftPrompts
from pipeline.engine.steps import Chunk, Entry, Prefix, Step
from pipeline.engine.swift import pack_linears, use_kernels
from pipeline.engine.transfer import to_device
from pipeline.errors import BaseModelError

if TYPE_CHECKING:
    from pipeline.engine.kernels.gpu import GpuKernels

logger = logging.getLogger(__name__)

USE_PADDED = 'Use engine "padded", which runs whatever transformers runs.'
TRIAL = (3, 5, 4, 2)  # tokens of a prefix, of two sequences that share it, and of one of its own
AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}  # relative, of the trial's scores
LEAST_PARTS = 4  # for which a recorded step with prompts in it has room where torch computes attention
QUANTIZED_AGREEMENT = 0.1  # quantised products round their inputs, and a last bit decides to which step


class Runner:
    """Runs a model on packed tokens. The model is changed in place and must not be used otherwise afterwards.

    Args:
        base: The model.
        kv_cache_bytes: The memory for keys and values; None for what the device has to spare.
        num_rows: How many tokens a step usually has.
        record: What records short steps so that they are replayed; None for what the device has, CUDA graphs or
            nothing.
        use_triton: Compute attention, norms and gates by kernels of Triton; None for wherever they work.

    Raises:
        BaseModelError: The model cannot be run packed: it attends in a way of its own.
        ConfigError: Triton's kernels are asked for, and the device is not a GPU.
        MissingDependencyError: They are asked for, and Triton is not installed.
    """

    def __init__(
        self,
        base: BaseModel,
        *,
        kv_cache_bytes: int | None = None,
        num_rows: int = 64,
        record: Recorder | None = None,
        use_triton: bool | None = None,
    ) -> None:
        self.bank: AdapterBank | None = None
        self._base = base
        self._model = base.model
        config = self._model.config.get_text_config()
        self._num_q_heads = int(config.num_attention_heads)
        num_kv_heads = int(getattr(config, "num_key_value_heads", None) or self._num_q_heads)
        head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // self._num_q_heads)
        num_layers = int(config.num_hidden_layers)
        _check_config(config, type(self._model).__name__, base.context_length)
        trial = self._trial_tokens(int(config.vocab_size))
        wanted = self._stock_scores(trial)
        kernels = kernels_for(base.device, base.dtype, use_triton=use_triton)
        self._slot_kernels = kernels if isinstance(kernels, Kernels) else None
        self._page_kernels = None if isinstance(kernels, Kernels) else kernels
        self.cache = (PagedCache if self._slot_kernels is None else SlotCache)(
            (num_layers, 2, num_kv_heads, head_dim),
            dtype=base.dtype,
            device=base.device,
            num_bytes=default_num_bytes(base.device) if kv_cache_bytes is None else kv_cache_bytes,
        )
        self.soft_prompts = SoftPrompts(int(config.vocab_size), int(config.hidden_size), base.device, base.dtype)
        record = record or recorder_for(base.device)
        self.graphs = None if record is None else DecodeGraphs(self._decode, record, base.device)
        self._graphs_version = 0
        self._told: set[str] = set()  # why steps ran eagerly
        if kernels is not None:
            use_kernels(base, kernels)
        pack_linears(base, num_rows)
        self._model.set_attn_implementation(NAME)
        self._check(trial, wanted)

    @torch.inference_mode()
    def run(self, step: Step) -> torch.Tensor:  # [num_sampling_chunks, vocab_size]
        """Do a step's moves and compute its chunks.

        Returns:
            The scores after the last token of each chunk that samples, in the order of the chunks.
        """
        sources = {old for old, _, _ in step.moves}
        self.cache.free(slot for slot in step.freed if slot not in sources)
        self.cache.move(step.moves)
        self.cache.free(sources)
        return self._forward(step.chunks)

    def clear(self) -> None:
        """Give back the memory that nothing is in: of slots that are free, and of recorded steps."""
        self.cache.clear()
        if self.graphs is not None:
            self.graphs.clear()

    def _forward(self, chunks: list[Chunk], *, is_eager: bool = False) -> torch.Tensor:
        token_ids = [token_id for chunk in chunks for token_id in _tokens(chunk)]
        items = paged_items(chunks, self.cache) if isinstance(self.cache, PagedCache) else []
        if self.graphs is not None and not (is_eager or self._runs_eagerly(chunks, token_ids)):
            return self._replay(self.graphs, chunks, token_ids, items)
        if self.bank is not None:
            sampling = [(chunk.owner.expert, 1) for chunk in chunks if chunk.samples]
            self.bank.begin(
                _slices((chunk.owner.expert, chunk.count) for chunk in chunks), _slices(sampling or [(None, 1)])
            )
        positions: list[int] = []
        rows: list[int] = []
        for chunk in chunks:
            first = _position(chunk)
            positions += range(first, first + chunk.count)
            if chunk.samples:
                rows.append(len(positions) - 1)
        told = [np.array(numbers) for numbers in (token_ids, positions, rows or [0])]
        attention: StepAttention
        if isinstance(self.cache, PagedCache):
            told += [places(items), *(array for units in plan_step(items) for array in units.arrays())]
            inputs, at, last, own_places, *others = to_device(told, self._base.device)
            attention = BatchedAttention(self.cache, own_places, units_of(others), self._page_kernels)
        elif self._slot_kernels is not None:
            inputs, at, last = to_device(told, self._base.device)
            attention = KernelAttention(self._slot_kernels, chunks, self.cache, self._num_q_heads)
        else:
            raise TypeError("slots of their own are for the compiled kernels")
        is_soft = max(token_ids) >= self.soft_prompts.vocab_size
        given = (
            {"inputs_embeds": self.soft_prompts.embed(inputs[None], self._model.get_input_embeddings())}
            if is_soft
            else {"input_ids": inputs[None]}
        )
        return _scores(self._model, attention, at, logits_to_keep=last, **given)[: len(rows)]

    def _decode(self, numbers: list[torch.Tensor]) -> torch.Tensor:
        if not isinstance(self.cache, PagedCache):
            raise TypeError("a recorded step needs keys and values in pages")
        return step_scores(self._model, self.cache, numbers, self._page_kernels)

    def _replay(
        self, graphs: DecodeGraphs, chunks: list[Chunk], token_ids: Sequence[int], items: Sequence[Item]
    ) -> torch.Tensor:
        scored = np.cumsum([chunk.count for chunk in chunks])[[chunk.samples for chunk in chunks]] - 1
        if self._page_kernels is not None:
            room = self._page_kernels.least_sizes
        else:
            room = (1, 1) if len(token_ids) == len(chunks) else (len(token_ids), LEAST_PARTS)
        numbers = plan_recorded(token_ids, items, scored.tolist(), *room)
        num_scored, num_rows = len(numbers[0]), len(numbers[1])
        if self.bank is None:
            return graphs.run(numbers, key=False)[: len(scored)]
        tokens = [(chunk.owner.expert, chunk.count) for chunk in chunks]
        rows = [(chunk.owner.expert, 1) for chunk in chunks if chunk.samples]
        with self.bank.unchanged() as version:  # the adapters' tensors are where they were when it was recorded
            if version != self._graphs_version:
                graphs.clear()
                self._graphs_version = version
            self.bank.begin(
                _slices([*tokens, (None, num_rows - len(token_ids))]),
                _slices([*rows, (None, num_scored - len(rows))]),
                is_replayed=True,
            )
            # An expert may have tokens in a step and none that is scored: the head's adapters are not computed then.
            key = tuple(any(expert for expert, _ in counts) for counts in (tokens, rows))
            return graphs.run(numbers, key=key)[: len(scored)]

    def _runs_eagerly(self, chunks: list[Chunk], token_ids: Sequence[int]) -> bool:
        """Whether a step is none that can be replayed; why, is logged once."""
        why = ""
        if len(token_ids) > REPLAYED_ROWS:
            why = f"they compute more than {REPLAYED_ROWS} tokens"
        elif max(token_ids) >= self.soft_prompts.vocab_size:
            why = "they compute a soft prompt"
        elif self.bank is not None and not self.bank.is_replayable({chunk.owner.expert for chunk in chunks}):
            why = "an expert changes whole modules, which are computed by slices"
        if why and why not in self._told:
            self._told.add(why)
            logger.info("some steps run eagerly, not from a recorded graph: %s", why)
        return bool(why)

    def _trial_tokens(self, vocab_size: int) -> list[list[int]]:
        numbers = torch.arange(sum(TRIAL), dtype=torch.long) * 7919 % vocab_size
        return [part.tolist() for part in numbers.split(TRIAL)]

    @torch.inference_mode()
    def _stock_scores(self, trial: list[list[int]]) -> torch.Tensor:  # [3, vocab_size]
        prefix, *others = trial
        prompts = [prefix + others[0], prefix + others[1], others[2]]
        return torch.cat(
            [
                self._model(input_ids=torch.tensor([prompt], device=self._base.device), use_cache=False).logits[0, -1:]
                for prompt in prompts
            ]
        )

    @torch.inference_mode()
    def _check(self, trial: list[list[int]], wanted: torch.Tensor) -> None:
        """See that the model computes the same packed as it does on its own."""
        tokens = [tuple(part) for part in trial]
        prefix = Prefix(None, tokens[0], slot=Slot(-1, 32))
        entries = [Entry(None, tokens[0] + own, len(tokens[0]), 1, prefix=prefix) for own in tokens[1:3]]
        entries.append(Entry(None, tokens[3], 0, 1))
        slots = [Slot(-2 - at, 32) for at in range(len(entries))]
        chunks = [Chunk(prefix, Slot(-1, 32), 0, prefix.length, samples=False)]
        chunks += [
            Chunk(entry, slot, 0, entry.num_own, samples=True) for entry, slot in zip(entries, slots, strict=True)
        ]
        kind = type(self._model).__name__
        ways = (True,) if self.graphs is None else (True, False)  # long steps run eagerly, the others as recorded
        try:
            founds = [self._forward(chunks, is_eager=is_eager) for is_eager in ways]
        except (TypeError, AttributeError, KeyError, IndexError, ValueError, RuntimeError) as error:
            if is_out_of_memory(error):  # the padded engine would have no more of it
                raise
            raise BaseModelError(f"{kind} cannot be run packed", details=said(error), hint=USE_PADDED) from error
        self.cache.free([Slot(-1, 32), *slots])
        self.cache.clear()
        difference = max(
            float((found.float() - wanted.float()).norm() / wanted.float().norm().clamp_min(1e-6)) for found in founds
        )
        allowed = QUANTIZED_AGREEMENT if self._base.quantization else AGREEMENT[self._base.dtype]
        if not difference <= allowed:
            raise BaseModelError(
                f"{kind} computes something else when it is run packed: its scores differ by {difference:.1%}",
                hint=USE_PADDED,
            )


def step_scores(
    model: Any, cache: PagedCache, numbers: Sequence[torch.Tensor], kernels: GpuKernels | None = None
) -> torch.Tensor:
    """A step as a function of tensors of whole numbers alone, none of which the host reads.

    Args:
        model: Attends by `packed_attention`.
        cache: Where keys and values lie.
        numbers: What `plan_recorded` gives, on the device.
        kernels: What computes attention; None for torch's operations.

    Returns:
        The scores of the rows that are scored, [num_scored, vocab_size].
    """
    scored, token_ids, own_places, *others = numbers
    (units,) = units_of(others)
    attention = BatchedAttention(cache, own_places, [units], kernels)
    return _scores(model, attention, units.positions, input_ids=token_ids[None], logits_to_keep=scored)


def _scores(model: Any, attention: StepAttention, positions: torch.Tensor, **given: Any) -> torch.Tensor:
    cache = StepCache(attention)
    scores: torch.Tensor = model(
        position_ids=positions[None], past_key_values=cache, use_cache=False, packed=cache, **given
    ).logits[0]
    return scores  # [num_scored, vocab_size]


def _check_config(config: Any, kind: str, context_length: int) -> None:
    """Refuse what a trial of a few tokens cannot show, because it begins with longer texts."""
    told = getattr(config, "rope_parameters", None) or {}
    ropes = [told, *(own for own in told.values() if isinstance(own, dict))]
    reason = ""
    for rope in ropes:
        if rope.get("rope_type") in ("dynamic", "longrope"):
            first = rope.get("original_max_position_embeddings") or 0
            if rope["rope_type"] == "dynamic" or first < context_length:
                reason = f"its {rope['rope_type']} rotary positions depend on the longest text of the batch"
    chunk = getattr(config, "attention_chunk_size", None)
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()) and (chunk or 0) < context_length:
        reason = f"it attends within pieces of {chunk} tokens"
    if reason:
        raise BaseModelError(f"{kind} cannot be run packed: {reason}", hint=USE_PADDED)


def _tokens(chunk: Chunk) -> Sequence[int]:
    """A chunk's tokens."""
    owner = chunk.owner
    if isinstance(owner, Prefix):
        return owner.token_ids[chunk.start : chunk.start + chunk.count]
    return owner.own_tokens(chunk.start, chunk.count)


def _position(chunk: Chunk) -> int:
    """Where a chunk's first token stands in its text."""
    return chunk.start if isinstance(chunk.owner, Prefix) else chunk.owner.prefix_length + chunk.start


def _slices(counts: Iterable[tuple[str | None, int]]) -> list[Slice]:
    """Neighbours with the same expert as one slice each."""
    slices, start = [], 0
    for expert, members in groupby(counts, key=lambda pair: pair[0]):
        stop = start + sum(count for _, count in members)
        slices.append(Slice(start, stop, expert))
        start = stop
    return slices
