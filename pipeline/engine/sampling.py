"""Penalties, and drawing the next token of every row, each by its own rules.

The draw for token t of an answer depends on (seed, answer, t) and the probabilities alone: never on the batch, the
order or the worker. It is an inverse-CDF draw over token ids, with one uniform number a token from a keyed hash.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch

from pipeline.engine.ranking import top_tokens
from pipeline.engine.types import SamplingParams

WIDTHS = (64, 1024)  # how many of the most likely tokens are looked at first, where that is enough
CHUNK = 8  # rows drawn at a time from the whole vocabulary
ERROR = 1e-4  # a bound for the relative error of a sum of exponentials in float32


def uniform(seed: int, position: int) -> float:
    """The uniform number in [0, 1) that belongs to token `position` of an answer with this seed.

    It is the same on every machine and with every version of torch.
    """
    key = seed.to_bytes(8, "little") + position.to_bytes(8, "little")
    return (int.from_bytes(blake2b(key, digest_size=8).digest(), "little") >> 11) * 2.0**-53


def answer_seed(seed: int, index: int) -> int:
    """The seed of answer `index` of a request with this seed; the first one draws with the request's own."""
    if index == 0:
        return seed
    digest = blake2b(index.to_bytes(8, "little"), key=seed.to_bytes(8, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def penalise_repetition_(
    scores: torch.Tensor,  # [rows, vocab]
    rows: torch.Tensor,  # [num_seen]
    token_ids: torch.Tensor,  # [num_seen]
    factors: torch.Tensor,  # [num_seen]
) -> None:
    """Divide positive and multiply negative scores of tokens already seen (Keskar et al. 2019, arXiv 1909.05858).

    A token named twice is penalised once; one at or above the vocabulary size (a soft-prompt position) is left out.
    """
    known = token_ids < scores.shape[-1]
    rows, token_ids, factors = rows[known], token_ids[known], factors[known]
    seen = scores[rows, token_ids]
    scores[rows, token_ids] = torch.where(seen > 0, seen / factors, seen * factors)


def penalise_counts_(
    scores: torch.Tensor,  # [rows, vocab]
    rows: torch.Tensor,  # [num_generated]
    token_ids: torch.Tensor,  # [num_generated]
    penalties: torch.Tensor,  # [num_generated]
) -> None:
    """Take presence and frequency penalties from the scores of generated tokens, each named once (OpenAI's formula)."""
    scores[rows, token_ids] -= penalties


@dataclass(frozen=True)
class _Rules:
    """The rules of some rows as columns, [rows, 1] in float64."""

    temperature: torch.Tensor
    top_k: torch.Tensor  # the vocabulary size for all
    top_p: torch.Tensor
    min_p: torch.Tensor
    uniform: torch.Tensor

    def __getitem__(self, rows: torch.Tensor) -> "_Rules":
        return _Rules(**{name: column[rows] for name, column in vars(self).items()})


def draw(
    scores: torch.Tensor,  # [rows, vocab], float32
    params: Sequence[SamplingParams],
    uniforms: Sequence[float],
    rows: Sequence[int] | None = None,
) -> torch.Tensor:  # [drawn]
    """Draw one token for each of some rows that have a temperature.

    Temperature first; then the `top_k` most likely tokens, of them those of at least `min_p` of the most likely one's
    probability, of them the fewest that hold `top_p` of the probability. Where a few of the most likely tokens are
    provably enough, only they are looked at.

    Args:
        scores: With forbidden tokens at minus infinity.
        params: The rules of each row that is drawn.
        uniforms: The number of each draw, in [0, 1).
        rows: Which rows are drawn; None for all.
    """
    vocab = scores.shape[-1]
    # float64 for the same numbers in any batch; some devices have none.
    device = torch.device("cpu") if scores.device.type == "mps" else scores.device
    scores = scores.to(device)

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device)[:, None]  # [rows, 1]

    rules = _Rules(
        temperature=column([options.temperature for options in params]),
        top_k=column([min(options.top_k or vocab, vocab) for options in params]),
        top_p=column([options.top_p for options in params]),
        min_p=column([options.min_p for options in params]),
        uniform=column(uniforms),
    )
    place = torch.arange(len(scores), device=device) if rows is None else torch.tensor(rows, device=device)
    chosen = torch.zeros(len(place), dtype=torch.long, device=device)
    waiting = torch.arange(len(place), device=device)
    for width in (width for width in WIDTHS if width < vocab):
        own = rules[waiting]
        # A row that leaves nothing out needs the whole vocabulary.
        is_free = ((own.top_k == vocab) & (own.top_p == 1.0) & (own.min_p == 0.0)).flatten()
        asked = waiting[~is_free]
        if len(asked) == 0:
            break
        tokens, is_enough = _draw_narrow(scores, place[asked], rules[asked], width)
        chosen[asked[is_enough]] = tokens[is_enough]
        waiting = torch.cat([waiting[is_free], asked[~is_enough]])
    for part in waiting.split(CHUNK):
        chosen[part] = _draw_wide(scores[place[part]], rules[part])
    return chosen


def _draw_narrow(
    scores: torch.Tensor, rows: torch.Tensor, rules: _Rules, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw from the `width` most likely tokens of rows; the second result tells for which rows they are enough."""
    values, token_ids = top_tokens(scores, width, rows)  # [rows, width]
    weights = _weights(values, values[:, :1], rules)
    rank = torch.arange(width, device=scores.device)[None, :]
    kept = (rank < rules.top_k) & (weights >= rules.min_p)
    is_enough = ((rules.top_k <= width) | (weights[:, -1:] < rules.min_p)).flatten()  # all that may be kept are here
    mass = (weights * kept).cumsum(dim=-1)
    total = mass[:, -1:].clone()
    by_mass = ~is_enough & ((rules.top_k == scores.shape[-1]) & (rules.min_p == 0.0)).flatten()
    if by_mass.any():
        own = rules[by_mass]
        sums = _total_weight(scores, rows[by_mass], own)
        # The nucleus ends where the mass reaches top_p of the total; both bounds of the total must agree where.
        ends = [(mass[by_mass] < own.top_p * sums * bound).sum(dim=-1) for bound in (1 - ERROR, 1 + ERROR)]
        is_enough[by_mass] = (ends[0] == ends[1]) & (ends[1] < width)
        total[by_mass] = sums
    kept &= mass - weights * kept < rules.top_p * total
    kept[:, 0] = True
    token_ids, order = token_ids.sort(dim=-1)
    at = _place((weights * kept).gather(-1, order), rules.uniform)
    return token_ids.gather(-1, at)[:, 0], is_enough


def _draw_wide(scores: torch.Tensor, rules: _Rules) -> torch.Tensor:
    """Draw from the whole vocabulary."""
    vocab = scores.shape[-1]
    highest = scores.amax(dim=-1, keepdim=True)
    weights = _weights(scores, highest, rules)
    if (rules.min_p > 0).any():
        weights *= weights >= rules.min_p
    ranked = ((rules.top_k < vocab) | (rules.top_p < 1.0)).flatten().nonzero().flatten()
    if len(ranked) > 0:
        weights[ranked] *= _nucleus(scores[ranked], highest[ranked], rules[ranked])
    return _place(weights, rules.uniform)[:, 0]


def _nucleus(scores: torch.Tensor, highest: torch.Tensor, rules: _Rules) -> torch.Tensor:
    """Which tokens are in by rank and mass, [rows, vocab]; only the scores are sorted, not the tokens."""
    ordered = _descending(scores)
    weights = _weights(ordered, highest, rules)
    rank = torch.arange(scores.shape[-1], device=scores.device)[None, :]
    kept = (rank < rules.top_k) & (weights >= rules.min_p)
    mass = (weights * kept).cumsum(dim=-1)
    kept &= mass - weights * kept < rules.top_p * mass[:, -1:]
    kept[:, 0] = True
    count = kept.sum(dim=-1, keepdim=True)
    border = ordered.gather(-1, count - 1)
    above, equal = scores > border, scores == border
    # Among the equals at the border those with the lowest ids are in.
    return above | (equal & (equal.cumsum(dim=-1) <= count - above.sum(dim=-1, keepdim=True)))


def _descending(scores: torch.Tensor) -> torch.Tensor:
    if scores.device.type == "cpu":
        return torch.from_numpy(np.sort(scores.numpy(), axis=-1)).flip(-1)  # numpy sorts values alone, in a third
    return scores.sort(dim=-1, descending=True).values


def _weights(scores: torch.Tensor, highest: torch.Tensor, rules: _Rules) -> torch.Tensor:
    """Probabilities as shares of the most likely token's, in float64."""
    return ((scores.double() - highest.double()) / rules.temperature).exp()


def _total_weight(scores: torch.Tensor, rows: torch.Tensor, rules: _Rules) -> torch.Tensor:
    """The sum of the weights of rows over the vocabulary, but for an `ERROR`, [rows, 1]."""
    sums = []
    for part in torch.arange(len(rows), device=scores.device).split(CHUNK):
        chunk = scores[rows[part]]
        heat = rules.temperature[part].float().clamp(min=1e-30)  # not rounded to zero
        sums.append((chunk - chunk.amax(dim=-1, keepdim=True)).div_(heat).exp_().sum(dim=-1, keepdim=True))
    return torch.cat(sums).double()


def _place(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:  # [rows, 1]
    """The inverse-CDF draw over the columns, by their weights.

    It runs over token ids, not over ranks: tokens of nearly the same probability change ranks with the rounding of
    another batch shape, and would change places in the draw.
    """
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:].contiguous()
    last = torch.searchsorted(cumulative, total)  # where the last weight is
    drawn = torch.searchsorted(cumulative, uniforms * total, right=True)
    return torch.minimum(drawn, last).clamp(max=weights.shape[-1] - 1)
