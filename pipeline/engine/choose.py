"""The one place that chooses the next token of every sequence of a batch, whatever engine computed the scores."""

from collections.abc import Sequence as Rows

import torch

from pipeline.engine.grammar_matcher import mask_grammars_
from pipeline.engine.ranking import CHUNK, highest, top_tokens
from pipeline.engine.sampling import draw, penalise_counts_, penalise_repetition_, uniform
from pipeline.engine.sequence import Sequence
from pipeline.engine.types import Choice, SamplingParams, TokenLogprob

NUM_LIKELY = 64  # tokens that a grammar is asked about before its mask is made
MOST_NEEDED = 40  # of them, so that a few that are forbidden do not matter


@torch.inference_mode()
def choose_tokens_(logits: torch.Tensor, sequences: Rows[Sequence]) -> list[Choice]:
    """Choose the next token of each sequence: by its grammar, `min_tokens`, penalties, temperature and seed.

    A finished sequence gets any token. Only rows that ask for a feature pay for it; plain greedy rows cost one argmax
    for all of them.

    Args:
        logits: The model's scores, [rows, vocab], float32, bfloat16 or float16. They are overwritten.
        sequences: One a row.

    Returns:
        A choice for each row, to be given to `Sequence.append`. Among equally likely tokens the lowest id wins.
    """
    num_rows = range(len(sequences))
    params = [sequence.request.params for sequence in sequences]
    asked = [row for row in num_rows if params[row].logprobs is not None]
    drawn = [row for row in num_rows if params[row].temperature > 0]
    penalised = [row for row in num_rows if sequences[row].is_repetition_penalised or sequences[row].is_count_penalised]
    if (drawn or penalised) and logits.dtype != torch.float32:
        logits = logits.float()
    table = _LogprobTable(logits, {row: params[row].logprobs or 0 for row in asked}, penalised) if asked else None
    if penalised:
        _penalise_(logits, penalised, sequences)
    _bar_(logits, sequences)
    # Rows without a temperature are greedy.
    is_greedy = len(drawn) < len(sequences)
    token_ids: list[int] = highest(logits).tolist() if is_greedy else [0] * len(sequences)
    held = [row for row in num_rows if sequences[row].matcher is not None and not sequences[row].is_finished]
    if held:
        _hold_(logits, sequences, held, token_ids)
    if drawn:
        uniforms = [uniform(sequences[row].seed, sequences[row].num_generated) for row in drawn]
        tokens = draw(logits, [params[row] for row in drawn], uniforms, drawn).tolist()
        for row, token_id in zip(drawn, tokens, strict=True):
            token_ids[row] = token_id
    logprobs = {} if table is None else table.of(logits, token_ids)
    return [Choice(token_id, logprobs.get(row)) for row, token_id in enumerate(token_ids)]


class _LogprobTable:
    """The log probabilities by the model alone of rows that ask for them, taken before the scores are changed.

    Args:
        logits: The model's scores.
        counts: The rows that ask, and for how many of the most likely tokens.
        penalised: The rows whose scores will be changed where they are not set to minus infinity.
    """

    def __init__(self, logits: torch.Tensor, counts: dict[int, int], penalised: list[int]) -> None:
        rows = torch.tensor(list(counts), device=logits.device)
        self._counts = counts
        self._kept = {row: logits[row].clone() for row in penalised if row in counts}
        sums = [logits[part].float().logsumexp(dim=-1) for part in rows.split(CHUNK)]
        self._totals: list[float] = torch.cat(sums).tolist()
        self._top: list[list[tuple[int, float]]] = [[] for _ in counts]
        if max(counts.values()) > 0:
            values, token_ids = top_tokens(logits, max(counts.values()), rows)
            pairs = zip(token_ids.tolist(), values.float().tolist(), strict=True)
            self._top = [list(zip(*pair, strict=True)) for pair in pairs]

    def of(self, logits: torch.Tensor, token_ids: list[int]) -> dict[int, TokenLogprob]:
        """What is told of the tokens that were chosen, by row."""
        chosen = [self._kept.get(row, logits[row])[token_ids[row]] for row in self._counts]
        scores = torch.stack(chosen).float().tolist()
        return {
            row: TokenLogprob(
                token_ids[row],
                score - total,
                tuple((token_id, value - total) for token_id, value in top[:count]),
            )
            for (row, count), score, total, top in zip(
                self._counts.items(), scores, self._totals, self._top, strict=True
            )
        }


def _penalise_(logits: torch.Tensor, rows: list[int], sequences: Rows[Sequence]) -> None:
    """Apply the penalties of these rows: of repetition over prompt and answer, then of counts over the answer."""
    device = logits.device
    repeated = [row for row in rows if sequences[row].is_repetition_penalised]
    if repeated:
        seen = [sequences[row].seen_tensor() for row in repeated]
        sizes = torch.tensor([len(token_ids) for token_ids in seen])
        factors = torch.tensor([sequences[row].request.params.repetition_penalty for row in repeated])
        penalise_repetition_(
            logits,
            torch.tensor(repeated).repeat_interleave(sizes).to(device),
            torch.cat(seen).to(device),
            factors.repeat_interleave(sizes).to(device),
        )
    counted = [
        (row, token_id, options.presence_penalty + options.frequency_penalty * count)
        for row, options in ((row, sequences[row].request.params) for row in rows if sequences[row].is_count_penalised)
        for token_id, count in sequences[row].counts.items()
    ]
    if counted:
        at, token_ids, penalties = (torch.tensor(column, device=device) for column in zip(*counted, strict=True))
        penalise_counts_(logits, at, token_ids, penalties)


def _hold_(logits: torch.Tensor, sequences: Rows[Sequence], held: list[int], best: list[int]) -> None:
    """Keep these rows within their grammars.

    Args:
        logits: Where a row draws, scores that its grammar forbids are set to minus infinity; so are some others, that
            its top_k would leave out.
        sequences: One a row.
        held: The rows with a grammar.
        best: The best token of each greedy row; replaced where the grammar forbids it.
    """
    counts = {row: _num_needed(sequences[row].request.params) for row in held}
    is_greedy = {row: sequences[row].request.params.temperature == 0 for row in held}
    waiting = [row for row in held if not is_greedy[row] or _first_allowed(sequences[row], [best[row]], 1) is None]
    few = [row for row in waiting if 0 < counts[row] <= MOST_NEEDED]
    masked = [row for row in waiting if row not in few]
    if few:
        rows = torch.tensor(few, device=logits.device)
        _, likely = top_tokens(logits, min(NUM_LIKELY, logits.shape[-1]), rows)
        for row, token_ids in zip(few, likely.tolist(), strict=True):
            found = _first_allowed(sequences[row], token_ids, counts[row])
            if found is None:
                masked.append(row)
            elif is_greedy[row]:
                best[row] = found[0]
            else:
                values = logits[row, found]
                logits[row] = -torch.inf
                logits[row, found] = values
    mask_grammars_(
        logits,
        [
            (row, one.matcher, one.num_generated)
            for row, one in ((row, sequences[row]) for row in masked)
            if one.matcher
        ],
    )
    greedy = [row for row in masked if is_greedy[row]]
    if greedy:
        again = highest(logits).tolist()
        for row in greedy:
            best[row] = again[row]


def _num_needed(params: SamplingParams) -> int:
    """How many of the most likely tokens that are allowed decide what is chosen; 0 for all."""
    return 1 if params.temperature == 0 else params.top_k


def _first_allowed(sequence: Sequence, token_ids: list[int], count: int) -> list[int] | None:
    matcher = sequence.matcher
    return None if matcher is None else matcher.first_allowed(token_ids, sequence.num_generated, count)


def _bar_(logits: torch.Tensor, sequences: Rows[Sequence]) -> None:
    """Set the score of tokens that would end a text before its `min_tokens` to minus infinity."""
    barred = [
        (row, token_id)
        for row, sequence in enumerate(sequences)
        if sequence.matcher is None
        for token_id in sequence.barred_token_ids
        if token_id < logits.shape[-1]
    ]
    if barred:
        rows, token_ids = (torch.tensor(column, device=logits.device) for column in zip(*barred, strict=True))
        logits[rows, token_ids] = -torch.inf
