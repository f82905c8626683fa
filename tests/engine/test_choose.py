"""One place chooses for a whole batch: against the definitions, and one row at a time."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engine import Request, SamplingParams
from pipeline.engine.choose import choose_tokens_
from pipeline.engine.grammar_compiler import GrammarCompiler
from pipeline.engine.grammar_matcher import mask_grammars_
from pipeline.engine.sampling import answer_seed, draw, uniform
from pipeline.engine.sequence import Sequence, start
from pipeline.engine.stopping import StopRules
from pipeline.engine.types import Choice, Grammar
from tests import tiny

TOKENIZER = tiny.tokenizer()
EOS = TOKENIZER.eos_token_id
RULES = StopRules(TOKENIZER, frozenset({EOS}))
VOCAB = 2048
SUM = Grammar("gbnf", 'root ::= sum\nsum ::= sum "+" num | num\nnum ::= [0-9]+\n')


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    pytest.importorskip("xgrammar", reason="the extra `grammar` is not installed")
    return GrammarCompiler(TOKENIZER, VOCAB, RULES)


def sequence(
    params: SamplingParams, generated: tuple[int, ...] = (), *, prompt: tuple[int, ...] = (5, 6, 7), index: int = 0
) -> Sequence:
    made = Sequence(Request("a", prompt, params), RULES.checker(params), index)
    for token_id in generated:
        made.append(Choice(token_id))
    return made


def scores(seed: int, rows: int = 1) -> torch.Tensor:  # [rows, VOCAB]
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def plain_penalties(
    row: list[float], params: SamplingParams, prompt: tuple[int, ...], generated: tuple[int, ...]
) -> int:
    """The token with the highest score after penalties, as their definitions say it."""
    for token in {token for token in (*prompt, *generated) if token < len(row)}:
        factor = params.repetition_penalty
        row[token] = row[token] / factor if row[token] > 0 else row[token] * factor
    for token in set(generated):
        row[token] -= params.presence_penalty + params.frequency_penalty * generated.count(token)
    return max(range(len(row)), key=lambda token: (row[token], -token))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 1000),
    st.sampled_from([1.0, 0.5, 1.3, 4.0]),
    st.sampled_from([0.0, 1.5, -2.0]),
    st.sampled_from([0.0, 0.7, -1.0]),
    st.lists(st.integers(0, 30), max_size=40),
)
def test_penalties_are_those_of_the_definitions(
    seed: int, repetition: float, presence: float, frequency: float, generated: list[int]
) -> None:
    params = SamplingParams(
        repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency, ignore_eos=True
    )
    prompt = (3, 9, 9, 40, VOCAB + 1, 10**9)  # the last two are soft-prompt positions
    logits = scores(seed)
    logits[0, :50] += 6  # so that the penalised ones matter
    wanted = plain_penalties(logits[0].tolist(), params, prompt, tuple(generated))
    chosen = choose_tokens_(logits, [sequence(params, tuple(generated), prompt=prompt)])
    assert chosen == [Choice(wanted)]


def test_a_greedy_batch_takes_the_first_of_the_highest() -> None:
    logits = scores(1, rows=40).round()
    wanted = logits.argmax(dim=-1).tolist()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        batch = [sequence(SamplingParams()) for _ in wanted]
        assert [choice.token_id for choice in choose_tokens_(logits.to(dtype), batch)] == wanted


def test_log_probabilities_are_the_models_own() -> None:
    params = SamplingParams(temperature=2.0, repetition_penalty=5.0, min_tokens=3, logprobs=4, top_k=3)
    logits = scores(2, rows=3)
    logits[1, EOS] = 30
    expected = logits.double().log_softmax(dim=-1)
    batch = [sequence(params), sequence(params), sequence(SamplingParams(logprobs=0))]
    choices = choose_tokens_(logits.clone(), batch)
    for row, choice in enumerate(choices):
        assert choice.logprob is not None
        assert choice.logprob.token_id == choice.token_id
        assert math.isclose(choice.logprob.logprob, expected[row, choice.token_id].item(), abs_tol=1e-5)
        values, ids = expected[row].topk(4 if row < 2 else 0)
        assert [token for token, _ in choice.logprob.top] == ids.tolist()
        assert torch.allclose(torch.tensor([value for _, value in choice.logprob.top]), values.float(), atol=1e-5)
    assert choices[1].token_id != EOS, "the end may not come yet"
    assert choices[1].logprob is not None
    assert choices[1].logprob.top[0][0] == EOS, "and yet the model wants it"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_ends_before_min_tokens(temperature: float) -> None:
    semicolon = TOKENIZER.convert_tokens_to_ids(";")
    params = SamplingParams(
        temperature=temperature, min_tokens=3, stop_token_ids=(semicolon, 10**9), stop=("<|im_start|>",)
    )
    control = TOKENIZER.convert_tokens_to_ids("<|im_start|>")
    for length in range(5):
        for wanted in (EOS, semicolon, control):
            logits = scores(3)
            logits[0, wanted] = 99
            held = sequence(params, (40,) * length)
            (choice,) = choose_tokens_(logits, [held])
            assert (choice.token_id == wanted) == (length >= 3)
    logits = scores(3)
    logits[0, EOS] = 99
    free = SamplingParams(temperature=temperature, min_tokens=3, ignore_eos=True)
    assert choose_tokens_(logits, [sequence(free)]) == [Choice(EOS)], "an end token that ends nothing is like any other"


def test_each_answer_draws_as_a_request_of_its_own() -> None:
    params = SamplingParams(temperature=1.5, seed=9, n=6)
    logits = scores(4)
    together = choose_tokens_(logits.repeat(6, 1), start(Request("a", (5,), params), RULES))
    alone = [
        choose_tokens_(logits.clone(), [sequence(SamplingParams(temperature=1.5, seed=answer_seed(9, index)))])[0]
        for index in range(6)
    ]
    assert together == alone
    assert len({choice.token_id for choice in together}) > 1


OPTIONS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.0, 0.7, 2.0]),
    top_p=st.sampled_from([1.0, 0.8]),
    top_k=st.sampled_from([0, 1, 40]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, -0.5]),
    min_tokens=st.sampled_from([0, 4]),
    stop=st.sampled_from([(), ("+",), ("users",)]),
    stop_token_ids=st.sampled_from([(), (30,)]),
    ignore_eos=st.booleans(),
    seed=st.integers(0, 2**64 - 1),
    logprobs=st.sampled_from([None, None, 0, 3]),
)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([0.0, 0.0, 1.0, 3.0]),
    st.sampled_from([0, 1, 3, 20, 40, 41]),
    st.sampled_from([1.0, 0.8]),
    st.sampled_from(["", "1", "12+", "1+1"]),
    st.integers(0, 1000),
    st.booleans(),
)
def test_a_grammar_leaves_what_its_mask_leaves(
    compiler: GrammarCompiler, temperature: float, top_k: int, top_p: float, text: str, seed: int, is_likely: bool
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop=("users",))
    held = sequence(params)
    held.matcher = compiler.matcher(SUM, params)
    for token_id in TOKENIZER.encode(text, add_special_tokens=False):
        held.append(Choice(token_id))
    logits = scores(seed, rows=3)
    masked = logits.clone()
    mask_grammars_(masked, [(1, held.matcher, held.num_generated)])
    is_allowed = masked[1] > -torch.inf
    if is_likely:  # as after training
        logits[1, is_allowed] += 9
        masked[1, is_allowed] += 9
    free = [sequence(SamplingParams()), sequence(SamplingParams())]
    number = uniform(seed, held.num_generated)
    wanted = int(masked[1].argmax()) if temperature == 0 else int(draw(masked[1:2], [params], [number]))
    chosen = choose_tokens_(logits.clone(), [free[0], held, free[1]])
    assert [choice.token_id for choice in chosen] == [int(logits[0].argmax()), wanted, int(logits[2].argmax())]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(OPTIONS, st.booleans()), min_size=2, max_size=8), st.integers(0, 1000))
def test_a_batch_chooses_what_each_row_would_alone(
    compiler: GrammarCompiler, rows: list[tuple[SamplingParams, bool]], seed: int
) -> None:
    def fresh(row: int) -> Sequence:
        params, is_held = rows[row]
        made = sequence(params, prompt=(row, 5, 3000))
        made.matcher = compiler.matcher(SUM, params) if is_held else None
        return made

    together = [fresh(row) for row in range(len(rows))]
    alone = [fresh(row) for row in range(len(rows))]
    for step in range(5):
        logits = scores(seed + step, rows=len(rows))
        for one, choice in zip(together, choose_tokens_(logits.clone(), together), strict=True):
            one.append(choice)
        for row, one in enumerate(alone):
            one.append(choose_tokens_(logits[row : row + 1].clone(), [one])[0])
    for one, other in zip(together, alone, strict=True):
        assert one.token_ids == other.token_ids
        assert one.finish_reason == other.finish_reason
        for left, right in zip(one.logprobs, other.logprobs, strict=True):
            assert [token for token, _ in left.top] == [token for token, _ in right.top]
            assert math.isclose(left.logprob, right.logprob, abs_tol=1e-5)
