"""One forward pass over the packed tokens of a step."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import torch

from pipeline.engine.adapters import AdapterBank, Slice
from pipeline.engine.attention import NAME, StepCache, kernels_for, step_attention
from pipeline.engine.kv_cache import KVCache, default_num_bytes
from pipeline.engine.loader import BaseModel
from pipeline.engine.scheduler import Chunk, Entry, Prefix, Step
from pipeline.engine.slots import Slot
from pipeline.engine.soft_prompts import SoftPrompts
from pipeline.engine.swift import pack_linears, use_kernels
from pipeline.errors import BaseModelError

USE_PADDED = 'Use engine "padded", which runs whatever transformers runs.'
TRIAL = (3, 5, 4, 2)  # tokens of a prefix, of two sequences that share it, and of one of its own
AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}  # relative, of the trial's scores


class Runner:
    """Runs a model on packed tokens. The model is changed in place and must not be used otherwise afterwards.

    Args:
        base: The model.
        kv_cache_bytes: The memory for keys and values; None for what the device has to spare.
        num_rows: How many tokens a step usually has.

    Raises:
        BaseModelError: The model cannot be run packed: it attends in a way of its own.
    """

    def __init__(self, base: BaseModel, *, kv_cache_bytes: int | None = None, num_rows: int = 64) -> None:
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
        self.cache = KVCache(
            num_layers,
            num_kv_heads,
            head_dim,
            dtype=base.dtype,
            device=base.device,
            num_bytes=default_num_bytes(base.device) if kv_cache_bytes is None else kv_cache_bytes,
        )
        self.soft_prompts = SoftPrompts(int(config.vocab_size), int(config.hidden_size), base.device, base.dtype)
        self._kernels = kernels_for(base.device, base.dtype)
        if self._kernels is not None:
            use_kernels(base, self._kernels)
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

    def _forward(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        device = self._base.device
        token_ids: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        for chunk in chunks:
            tokens, first = _tokens(chunk)
            token_ids += tokens
            positions += range(first, first + chunk.count)
            if chunk.samples:
                rows.append(len(token_ids) - 1)
        if self.bank is not None:
            sampling = [(chunk.owner.expert, 1) for chunk in chunks if chunk.samples]
            self.bank.begin(
                _slices((chunk.owner.expert, chunk.count) for chunk in chunks), _slices(sampling or [(None, 1)])
            )
        inputs = torch.tensor([token_ids], device=device)  # [1, num_tokens]
        cache = StepCache(step_attention(list(chunks), self.cache, self._num_q_heads, self._kernels))
        is_soft = max(token_ids) >= self.soft_prompts.vocab_size
        given = (
            {"inputs_embeds": self.soft_prompts.embed(inputs, self._model.get_input_embeddings())}
            if is_soft
            else {"input_ids": inputs}
        )
        scores: torch.Tensor = self._model(
            **given,
            position_ids=torch.tensor([positions], device=device),
            past_key_values=cache,
            use_cache=False,
            logits_to_keep=torch.tensor(rows or [0], device=device),
            packed=cache,
        ).logits[0]  # [num_rows, vocab_size]
        return scores[: len(rows)]

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
        try:
            found = self._forward(chunks)
        except (TypeError, AttributeError, KeyError, IndexError, ValueError, RuntimeError) as error:
            raise BaseModelError(
                f"{kind} cannot be run packed",
                details=(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",),
                hint=USE_PADDED,
            ) from error
        self.cache.free([Slot(-1, 32), *slots])
        self.cache.clear()
        difference = float((found.float() - wanted.float()).norm() / wanted.float().norm().clamp_min(1e-6))
        if not difference <= AGREEMENT[self._base.dtype]:
            raise BaseModelError(
                f"{kind} computes something else when it is run packed: its scores differ by {difference:.1%}",
                hint=USE_PADDED,
            )


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


def _tokens(chunk: Chunk) -> tuple[list[int], int]:
    """A chunk's tokens, and the position of the first."""
    owner = chunk.owner
    if isinstance(owner, Prefix):
        return list(owner.token_ids[chunk.start : chunk.start + chunk.count]), chunk.start
    return owner.own_tokens(chunk.start, chunk.count), owner.prefix_length + chunk.start


def _slices(counts: Iterable[tuple[str | None, int]]) -> list[Slice]:
    """Neighbours with the same expert as one slice each."""
    slices, start = [], 0
    for expert, members in groupby(counts, key=lambda pair: pair[0]):
        stop = start + sum(count for _, count in members)
        slices.append(Slice(start, stop, expert))
        start = stop
    return slices
