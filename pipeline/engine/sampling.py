"""Choosing the next token of every sequence of a batch, each by its own rules.

The draw for token t of a request depends on (seed, t) and the probabilities alone: never on the batch, the order or the
worker. It is an inverse-CDF draw, with one uniform number a token from a keyed hash.
"""

from collections.abc import Sequence
from hashlib import blake2b

import torch

from pipeline.engine.types import SamplingParams


def uniform(seed: int, position: int) -> float:
    """The uniform number in [0, 1) that belongs to token `position` of a request with this seed.

    It is the same on every machine and with every version of torch.
    """
    key = seed.to_bytes(8, "little") + position.to_bytes(8, "little")
    return (int.from_bytes(blake2b(key, digest_size=8).digest(), "little") >> 11) * 2.0**-53


def penalise_repetition(
    logits: torch.Tensor,  # [rows, vocab]
    seen: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
) -> torch.Tensor:
    """Divide positive and multiply negative scores of tokens already seen (Keskar et al. 2019, arXiv 1909.05858)."""
    penalised = logits
    for row, (token_ids, options) in enumerate(zip(seen, params, strict=True)):
        if options.repetition_penalty == 1.0 or not token_ids:
            continue
        if penalised is logits:
            penalised = logits.clone()
        index = torch.tensor(sorted(set(token_ids)), device=logits.device)
        scores = penalised[row, index]
        factor = options.repetition_penalty
        penalised[row, index] = torch.where(scores > 0, scores / factor, scores * factor)
    return penalised


def sample(
    logits: torch.Tensor,  # [rows, vocab]
    params: Sequence[SamplingParams],
    positions: Sequence[int],
) -> torch.Tensor:  # [rows]
    """Choose one token a row.

    Args:
        logits: Scores, with forbidden tokens at minus infinity.
        params: The rules of each row.
        positions: How many tokens each row has generated already.

    Returns:
        The chosen token ids. Among equally likely tokens the lowest id wins.
    """
    chosen = logits.argmax(dim=-1)
    drawn = [row for row, options in enumerate(params) if options.temperature > 0]
    if drawn:
        # In float64 on the CPU, for the same numbers on every device; some devices have no float64 at all.
        tokens = _draw(logits[drawn].cpu(), [params[row] for row in drawn], [positions[row] for row in drawn])
        chosen[drawn] = tokens.to(chosen.device)
    return chosen


def _draw(logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> torch.Tensor:
    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]  # [rows, 1]

    vocab = logits.shape[-1]
    probabilities = (logits.double() / column([options.temperature for options in params])).softmax(dim=-1)
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(vocab, device=logits.device)[None, :]  # [1, vocab]
    kept = rank < column([options.top_k or vocab for options in params])
    kept &= ordered >= ordered[:, :1] * column([options.min_p for options in params])
    mass = (ordered * kept).cumsum(dim=-1)
    kept &= mass - ordered * kept < column([options.top_p for options in params]) * mass[:, -1:]
    kept[:, 0] = True
    # The draw runs over token ids, not over ranks: tokens of nearly the same probability change ranks with the rounding
    # of another batch shape, and would change places in the draw.
    kept = torch.zeros_like(kept).scatter_(-1, order, kept)
    cumulative = (probabilities * kept).cumsum(dim=-1)  # [rows, vocab]
    target = column([uniform(options.seed, at) for options, at in zip(params, positions, strict=True)])
    index = (cumulative <= target * cumulative[:, -1:]).sum(dim=-1)
    last = (kept * rank).amax(dim=-1)
    return torch.minimum(index, last)
