"""Sampling against the plain formulas, and draws that depend on the seed and the position alone."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engine import SamplingParams
from pipeline.engine.ranking import highest, top_tokens
from pipeline.engine.sampling import answer_seed, draw, penalise_counts_, penalise_repetition_, uniform
from pipeline.errors import InvalidRequestError

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
DRAWS = 20_000


def frequencies(params: SamplingParams, draws: int = DRAWS) -> torch.Tensor:
    uniforms = [uniform(params.seed, position) for position in range(draws)]
    chosen = draw(LOGITS.repeat(draws, 1), [params] * draws, uniforms)
    return torch.bincount(chosen, minlength=len(LOGITS)) / draws


def kept_weights(logits: list[float], params: SamplingParams) -> list[float]:
    """Token by token, as the definitions say it: temperature, then top-k and min-p, then top-p over what is left."""
    most = max(logits)
    weights = [math.exp((score - most) / params.temperature) for score in logits]
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    kept = [
        token
        for rank, token in enumerate(order)
        if (params.top_k == 0 or rank < params.top_k) and weights[token] >= params.min_p * weights[order[0]]
    ]
    mass = sum(weights[token] for token in kept)
    nucleus, before = set(), 0.0
    for token in kept:
        if before < params.top_p * mass:
            nucleus.add(token)
        before += weights[token]
    return [weights[token] if token in nucleus else 0.0 for token in range(len(logits))]


def plain_draw(logits: list[float], params: SamplingParams, number: float) -> int:
    """The inverse of the cumulative distribution over token ids, one token after the other."""
    weights = kept_weights(logits, params)
    total, passed = sum(weights), 0.0
    for token, weight in enumerate(weights):
        passed += weight
        if weight > 0 and passed > number * total:
            return token
    return max(token for token, weight in enumerate(weights) if weight > 0)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(temperature=0.5, seed=2),
        SamplingParams(temperature=2.0, seed=3),
        SamplingParams(temperature=1.0, top_k=2, seed=4),
        SamplingParams(temperature=1.0, top_p=0.6, seed=5),
        SamplingParams(temperature=1.0, min_p=0.3, seed=6),
        SamplingParams(temperature=1.5, top_k=4, top_p=0.9, min_p=0.05, seed=7),
    ],
)
def test_draws_follow_the_plain_formula(params: SamplingParams) -> None:
    weights = torch.tensor(kept_weights(LOGITS.tolist(), params))
    expected = weights / weights.sum()
    measured = frequencies(params)
    assert not (measured[expected == 0] > 0).any(), "no other token is drawn"
    spread = 4 * (expected * (1 - expected) / DRAWS).sqrt() + 2 / DRAWS
    assert ((measured - expected).abs() <= spread).all(), (measured, expected)


SHARP, FLAT, TIED, BARRED = "sharp", "flat", "tied", "barred"


def scores_of(kind: str, vocab: int, seed: int) -> torch.Tensor:  # [vocab]
    scores = torch.randn(vocab, generator=torch.Generator().manual_seed(seed))
    if kind == SHARP:
        return scores * 4
    if kind == TIED:
        return (scores * 2).round()  # as the scores of a bfloat16 model are
    if kind == BARRED:
        scores[torch.randperm(vocab, generator=torch.Generator().manual_seed(seed))[: vocab - 5]] = -torch.inf
    return scores


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([SHARP, FLAT, TIED, BARRED]),
            st.builds(
                SamplingParams,
                temperature=st.sampled_from([0.01, 0.3, 1.0, 3.0]),
                top_k=st.sampled_from([0, 0, 1, 5, 63, 64, 65, 200, 1200, 5000]),
                top_p=st.sampled_from([1.0, 1.0, 0.1, 0.5, 0.95, 0.9999]),
                min_p=st.sampled_from([0.0, 0.0, 0.001, 0.2, 1.0]),
            ),
            st.integers(0, 2**32),
        ),
        min_size=1,
        max_size=9,
    ),
    st.sampled_from([100, 1536, 2017]),
)
def test_every_shortcut_draws_what_the_plain_formula_draws(
    rows: list[tuple[str, SamplingParams, int]], vocab: int
) -> None:
    scores = torch.stack([scores_of(kind, vocab, seed) for kind, _, seed in rows])
    params = [options for _, options, _ in rows]
    uniforms = [uniform(seed, 0) for _, _, seed in rows]
    wanted = [
        plain_draw(row, options, number) for row, options, number in zip(scores.tolist(), params, uniforms, strict=True)
    ]
    assert draw(scores, params, uniforms).tolist() == wanted


def test_extreme_numbers_are_drawn_from_the_ends() -> None:
    for width in (6, 2048):
        scores = torch.full((1, width), -torch.inf)
        scores[0, [1, 3]] = 0.0
        for options in (SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_k=3)):
            assert draw(scores, [options], [0.0]).tolist() == [1]
            assert draw(scores, [options], [1 - 2**-53]).tolist() == [3]
    cold = SamplingParams(temperature=1e-300, top_p=0.5)
    assert draw(LOGITS[None].repeat(1, 400), [cold], [0.9]).item() % len(LOGITS) == 0


def test_top_k_of_one_and_a_tiny_top_p_are_greedy() -> None:
    for options in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        params = SamplingParams(temperature=1.0, **options)
        numbers = [uniform(0, position) for position in range(50)]
        assert draw(LOGITS.repeat(50, 1), [params] * 50, numbers).tolist() == [0] * 50


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 5),
    st.sampled_from([7, 640, 2048, 2050]),
    st.integers(1, 600),
    st.integers(0, 2**32),
    st.integers(1, 60),
)
def test_the_highest_tokens_are_those_of_a_stable_sort(
    rows: int, vocab: int, count: int, seed: int, distinct: int
) -> None:
    count = min(count, vocab)
    scores = torch.randint(0, distinct, (rows, vocab), generator=torch.Generator().manual_seed(seed)).float()
    values, order = scores.sort(dim=-1, descending=True, stable=True)
    found, token_ids = top_tokens(scores, count)
    assert torch.equal(found, values[:, :count])
    assert torch.equal(token_ids, order[:, :count])
    assert torch.equal(highest(scores), order[:, 0])
    assert torch.equal(highest(scores.bfloat16()), order[:, 0])


def test_uniform_numbers_are_fixed_for_ever() -> None:
    # Golden values: a job that is continued with a later version must draw the same numbers.
    assert [round(uniform(seed, at), 12) for seed, at in ((0, 0), (0, 1), (1, 0), (2**64 - 1, 7))] == [
        0.056466399,
        0.44008326622,
        0.648750831049,
        0.962242907736,
    ]


def test_uniform_numbers_are_uniform() -> None:
    numbers = torch.tensor([uniform(seed, at) for seed in range(100) for at in range(200)], dtype=torch.float64)
    assert (numbers >= 0).all()
    assert (numbers < 1).all()
    counts = torch.histc(numbers, bins=20, min=0, max=1)
    assert ((counts - 1000) ** 2 / 1000).sum() < 45, "chi-square with 19 degrees of freedom, p about 0.0007"


def test_each_answer_of_a_request_has_a_seed_of_its_own() -> None:
    assert answer_seed(7, 0) == 7, "one answer draws as it always did"
    seeds = {answer_seed(seed, index) for seed in range(50) for index in range(20)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 1 << 64 for seed in seeds)
    assert answer_seed(7, 1) == 16121955707118586674


def test_repetition_penalty_is_the_published_formula() -> None:
    scores = LOGITS[None].clone()
    seen = torch.tensor([0, 4, 4, 6, 99])  # one twice, and two soft-prompt positions
    penalise_repetition_(scores, torch.zeros(5, dtype=torch.long), seen, torch.full((5,), 2.0))
    assert scores[0].tolist() == [1.0, 1.0, 0.5, 0.0, -2.0, -3.0]


def test_count_penalties_are_subtracted() -> None:
    scores = LOGITS[None].clone()
    penalise_counts_(scores, torch.tensor([0, 0]), torch.tensor([1, 5]), torch.tensor([0.5, -1.0]))
    assert scores[0].tolist() == [2.0, 0.5, 0.5, 0.0, -1.0, -2.0]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"temperature": math.nan},
        {"temperature": True},
        {"temperature": "hot"},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"top_k": 1.5},
        {"min_p": 2},
        {"max_tokens": 0},
        {"max_tokens": True},
        {"max_tokens": 1e9},
        {"min_tokens": -1},
        {"min_tokens": 257},
        {"presence_penalty": 2.1},
        {"frequency_penalty": -3},
        {"stop_token_ids": [-1]},
        {"stop_token_ids": 5},
        {"stop_token_ids": list(range(65))},
        {"ignore_eos": 1},
        {"n": 0},
        {"n": 129},
        {"logprobs": -1},
        {"logprobs": 21},
        {"seed": -1},
        {"seed": 2**64},
        {"stop": [""]},
        {"stop": [1]},
        {"stop": ["x"] * 65},
        {"repetition_penalty": 0},
    ],
)
def test_a_wrong_option_is_refused_by_name(options: dict[str, object]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(options))):
        replace(SamplingParams(), **options)


def test_one_stop_string_may_stand_alone() -> None:
    assert SamplingParams(stop=";").stop == (";",)  # type: ignore[arg-type]
