"""What rows ask, as it travels from the task that prepares it to the worker: the same, whatever a row holds."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.batch.prepared import PREPARED_SCHEMA, PreparedRow, Refusal, prepared_bytes, read_prepared
from pipeline.engine.requests import PreparedPrompt
from pipeline.engine.types import Grammar, SamplingParams
from pipeline.errors import ExpertError
from pipeline.openai_api.protocol import Call

texts = st.text(st.characters(), max_size=20)  # halves of surrogate pairs among them
params = st.builds(
    SamplingParams,
    temperature=st.floats(0, 100),
    top_p=st.floats(0, 1, exclude_min=True),
    presence_penalty=st.floats(-2, 2),
    max_tokens=st.integers(1, 1 << 31),
    stop=st.lists(texts.filter(bool), max_size=3).map(tuple),
    stop_token_ids=st.lists(st.integers(0, 1 << 31), max_size=3).map(tuple),
    ignore_eos=st.booleans(),
    seed=st.integers(0, (1 << 64) - 1),
    n=st.integers(1, 128),
    logprobs=st.none() | st.integers(0, 20),
)
prompts = st.builds(
    PreparedPrompt,
    token_ids=st.lists(st.integers(0, (1 << 31) - 1), max_size=5).map(tuple),
    params=params,
    grammar=st.none() | st.builds(Grammar, st.sampled_from(("gbnf", "json_schema", "regex")), texts),
    prefix_length=st.integers(0, 5),
    soft_prompt=st.sampled_from((None, "style", "mood")),
)
calls = st.builds(
    Call,
    kind=st.sampled_from(("chat", "text")),
    model=texts,
    fields=st.just({}),
    options=st.just({}),
    num_answers=st.integers(1, 128),
    has_logprobs=st.booleans(),
)
rows = st.builds(
    PreparedRow,
    expert=st.sampled_from((None, "", "sql", "cypher")),
    prompt=st.none() | prompts,
    refusal=st.none() | st.builds(Refusal, texts, texts, st.none() | texts),
    call=st.none() | calls,
)


@given(st.lists(rows, max_size=6))
def test_rows_come_as_they_went(prepared: list[PreparedRow]) -> None:
    assert read_prepared(prepared_bytes(prepared)) == prepared


def test_what_many_rows_have_in_common_travels_once() -> None:
    grammar = Grammar("gbnf", "x" * 10_000)
    prompt = PreparedPrompt((1, 2, 3), SamplingParams(stop=("s" * 1000,)), grammar)
    data = prepared_bytes([PreparedRow("sql", prompt)] * 100)
    assert len(data) < 20_000
    assert PREPARED_SCHEMA.field("token_ids").type.value_type == "int32"


def test_a_seed_that_is_none_is_refused() -> None:
    changed = SamplingParams(temperature=0.5).with_seed(7)
    assert changed == SamplingParams(temperature=0.5, seed=7)
    for seed in (-1, 1 << 64, math.nan, "7"):
        with pytest.raises(ExpertError, match="seed is"):
            changed.with_seed(seed)  # type: ignore[arg-type]
