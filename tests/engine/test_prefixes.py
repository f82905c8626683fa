"""Which prompts share a prefix: against every other way to group them, and against the obvious rules."""

import random
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engine.prefixes import MIN_PREFIX, Prompt, TokenIds, common_prefix, plan_prefixes

EXPERTS = ("sql", "extract", None)


def saved(prompts: list[Prompt], lengths: list[int]) -> int:
    """The tokens that a plan saves: all but the first of a group find their prefix computed."""
    seen = set()
    total = 0
    for prompt, length in zip(prompts, lengths, strict=True):
        key = (prompt.expert, prompt.token_ids[:length])
        total += length if key in seen else 0
        seen.add(key)
    return total


def most_saved(prompts: list[Prompt]) -> int:
    """The most that any plan saves, found by trying all; only lengths at which prompts part can be best."""
    choices = []
    for at, prompt in enumerate(prompts):
        lengths = {
            common_prefix(prompt.token_ids, other.token_ids)
            for to, other in enumerate(prompts)
            if to != at and other.expert == prompt.expert
        }
        choices.append([0, *(length for length in lengths if length >= MIN_PREFIX)])
    return max(saved(prompts, list(lengths)) for lengths in product(*choices))


def texts(repeat: int, longest: int) -> st.SearchStrategy[TokenIds]:
    """Prompts over two letters, each of them `repeat` tokens long, so that short ones share enough."""
    letters = st.lists(st.integers(0, 1), min_size=1, max_size=longest)
    return letters.map(lambda word: tuple(letter for letter in word for _ in range(repeat)))


@settings(max_examples=600)
@given(st.data(), st.sampled_from([6, 11, MIN_PREFIX]))
def test_a_plan_saves_the_most_that_is_possible(data: st.DataObject, repeat: int) -> None:
    words = data.draw(st.lists(texts(repeat, 6), min_size=1, max_size=7))
    tails = data.draw(st.lists(st.integers(0, 40), min_size=len(words), max_size=len(words)))
    owns = data.draw(st.booleans())  # tokens of its own at the end of each prompt, or prompts that begin others
    prompts = [
        Prompt(None, word + ((100 + at,) * (tail + 1) if owns else ()))
        for at, (word, tail) in enumerate(zip(words, tails, strict=True))
    ]
    assert saved(prompts, plan_prefixes(prompts)) == most_saved(prompts)


def test_those_that_a_longer_group_leaves_over_are_a_group() -> None:
    """Two share 250 tokens; two others share 50 with these and with each other."""
    system, schema = tuple(range(50)), tuple(range(50, 250))
    prompts = [
        Prompt(None, (*system, *body, own)) for body, own in ((schema, 900), (schema, 901), ((), 902), ((), 903))
    ]
    assert plan_prefixes(prompts) == [250, 250, 50, 50]


def test_one_group_is_kept_where_two_would_save_less() -> None:
    system = tuple(range(100))
    prompts = [Prompt(None, (*system, *(group,) * 20, own)) for group in (500, 501) for own in (900, 901)]
    assert plan_prefixes(prompts) == [100] * 4  # 300 tokens saved, where two groups would save 240


def prompts_of_all_kinds() -> st.SearchStrategy[list[Prompt]]:
    prompt = st.builds(Prompt, st.sampled_from(EXPERTS), texts(9, 7), st.sampled_from([0, 0, 5, 18, 27, 36, 400]))
    return st.lists(prompt, max_size=12)


@settings(max_examples=400)
@given(prompts_of_all_kinds())
def test_a_prefix_is_never_the_whole_prompt_nor_too_short(prompts: list[Prompt]) -> None:
    for prompt, length in zip(prompts, plan_prefixes(prompts), strict=True):
        assert length == 0 or MIN_PREFIX <= length < len(prompt.token_ids)


@settings(max_examples=400)
@given(prompts_of_all_kinds())
def test_without_hints_every_prefix_has_users_of_one_expert(prompts: list[Prompt]) -> None:
    prompts = [Prompt(prompt.expert, prompt.token_ids) for prompt in prompts]
    lengths = plan_prefixes(prompts)
    for prompt, length in zip(prompts, lengths, strict=True):
        mates = [
            other
            for other, its in zip(prompts, lengths, strict=True)
            if (other.expert, its) == (prompt.expert, length) and other.token_ids[:its] == prompt.token_ids[:length]
        ]
        assert length == 0 or len(mates) > 1
    for expert in EXPERTS:  # other experts' prompts change nothing
        own = [at for at, prompt in enumerate(prompts) if prompt.expert == expert]
        assert plan_prefixes([prompts[at] for at in own]) == [lengths[at] for at in own]


@settings(max_examples=400)
@given(prompts_of_all_kinds(), st.randoms(use_true_random=False))
def test_the_order_of_the_prompts_changes_nothing(prompts: list[Prompt], shuffle: random.Random) -> None:
    order = list(range(len(prompts)))
    shuffle.shuffle(order)
    lengths = plan_prefixes(prompts)
    assert plan_prefixes([prompts[at] for at in order]) == [lengths[at] for at in order]


@pytest.mark.parametrize(
    ("hints", "planned"),
    [
        ((0, 0), 100),
        ((80, 80), 80),  # nearly as good, and later requests share it too
        ((79, 79), 100),
        ((101, 101), 100),  # they part before it
        ((80, 90), 100),  # they do not agree
    ],
)
def test_a_hint_is_preferred_where_it_saves_nearly_as_much(hints: tuple[int, int], planned: int) -> None:
    prompts = [Prompt(None, (*range(100), 900 + own, *range(30)), hint) for own, hint in enumerate(hints)]
    assert plan_prefixes(prompts) == [planned, planned]


@pytest.mark.parametrize(
    ("length", "hint", "planned"), [(40, 30, 30), (40, 39, 39), (40, 40, 0), (40, 16, 16), (40, 15, 0), (40, 0, 0)]
)
def test_a_hint_is_followed_where_nobody_shares_yet(length: int, hint: int, planned: int) -> None:
    assert plan_prefixes([Prompt("sql", tuple(range(length)), hint)]) == [planned]


def test_equal_prompts_share_all_but_the_last_token() -> None:
    assert plan_prefixes([Prompt(None, tuple(range(40)))] * 3) == [39] * 3
    assert plan_prefixes([Prompt(None, tuple(range(MIN_PREFIX)))] * 3) == [0] * 3  # 15 are too few


def test_nobody_asks() -> None:
    assert plan_prefixes([]) == []


@settings(max_examples=500)
@given(st.lists(st.integers(0, 1), max_size=40), st.lists(st.integers(0, 1), max_size=8), st.data())
def test_common_prefix_agrees_with_a_loop(same: list[int], rest: list[int], data: st.DataObject) -> None:
    other = data.draw(st.lists(st.integers(0, 1), max_size=8))
    first, second = (*same, *rest), (*same, *other)
    count = 0
    while count < min(len(first), len(second)) - 1 and first[count] == second[count]:
        count += 1
    assert common_prefix(first, second) == common_prefix(second, first) == count


def test_five_thousand_prompts_of_two_experts() -> None:
    """A system message for each expert, one of 50 schemas below it, and a question."""
    draw = random.Random(7)
    systems = {expert: tuple(draw.randrange(1000) for _ in range(100)) for expert in ("sql", "extract")}
    schemas = [tuple(draw.randrange(1000) for _ in range(250)) for _ in range(50)]
    prompts = []
    for at in range(5000):
        expert = ("sql", "extract")[at % 2]
        question = tuple(draw.randrange(1000) for _ in range(49))
        prompts.append(Prompt(expert, systems[expert] + schemas[at // 2 % 50] + (1000 + at,) + question))
    assert plan_prefixes(prompts) == [350] * 5000
