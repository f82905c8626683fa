"""Sampling against the plain formulas, and draws that depend on the seed and the position alone."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engine import SamplingParams
from pipeline.engine.sampling import penalise_repetition, sample, uniform
from pipeline.errors import InvalidRequestError

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
DRAWS = 20_000


def frequencies(params: SamplingParams, draws: int = DRAWS) -> torch.Tensor:
    chosen = sample(LOGITS.repeat(draws, 1), [params] * draws, list(range(draws)))
    return torch.bincount(chosen, minlength=len(LOGITS)) / draws


def plain_formula(params: SamplingParams) -> torch.Tensor:
    """Token by token, as the definitions say it: temperature, then top-k and min-p, then top-p over what is left."""
    weights = [math.exp(score / params.temperature) for score in LOGITS.tolist()]
    order = sorted(range(len(weights)), key=lambda token: -weights[token])
    kept = [
        token
        for rank, token in enumerate(order)
        if (params.top_k == 0 or rank < params.top_k) and weights[token] >= params.min_p * weights[order[0]]
    ]
    mass = sum(weights[token] for token in kept)
    nucleus, before = [], 0.0
    for token in kept:
        if before < params.top_p * mass:
            nucleus.append(token)
        before += weights[token]
    total = sum(weights[token] for token in nucleus)
    return torch.tensor([weights[token] / total if token in nucleus else 0.0 for token in range(len(weights))])


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
    expected = plain_formula(params)
    measured = frequencies(params)
    assert not (measured[expected == 0] > 0).any(), "no other token is drawn"
    spread = 4 * (expected * (1 - expected) / DRAWS).sqrt() + 2 / DRAWS
    assert ((measured - expected).abs() <= spread).all(), (measured, expected)


def test_zero_temperature_takes_the_most_likely_token() -> None:
    logits = torch.stack([LOGITS, LOGITS.flip(0)])
    assert sample(logits, [SamplingParams()] * 2, [0, 9]).tolist() == [0, 5]


def test_top_k_of_one_and_a_tiny_top_p_are_greedy() -> None:
    for options in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        params = SamplingParams(temperature=1.0, **options)
        assert sample(LOGITS.repeat(50, 1), [params] * 50, list(range(50))).tolist() == [0] * 50


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = LOGITS.clone()
    logits[0] = -torch.inf
    params = SamplingParams(temperature=5.0)
    assert 0 not in sample(logits.repeat(2000, 1), [params] * 2000, list(range(2000))).tolist()


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 500), st.sampled_from([0.0, 0.7, 1.5])),
        min_size=1,
        max_size=8,
    )
)
def test_a_row_draws_the_same_in_any_batch(rows: list[tuple[int, int, float]]) -> None:
    params = [SamplingParams(temperature=heat, seed=seed, top_p=0.9) for seed, _, heat in rows]
    positions = [position for _, position, _ in rows]
    together = sample(LOGITS.repeat(len(rows), 1), params, positions).tolist()
    alone = [sample(LOGITS[None], [one], [at]).item() for one, at in zip(params, positions, strict=True)]
    assert together == alone


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


def test_repetition_penalty_is_the_published_formula() -> None:
    params = SamplingParams(repetition_penalty=2.0)
    penalised = penalise_repetition(LOGITS[None], [[0, 4, 4]], [params])
    assert penalised[0].tolist() == [1.0, 1.0, 0.5, 0.0, -2.0, -3.0]
    assert penalise_repetition(LOGITS[None], [[0]], [SamplingParams()])[0].tolist() == LOGITS.tolist()


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
