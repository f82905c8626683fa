"""Rows as they are prepared: what each asks, without an engine, and how it travels from a task to a worker as Arrow.

Whoever prepares, a task beside the workers or the worker itself, does it by `AnswerForm.prepare`; so that the answers
are the same.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from pipeline.engine.requests import PreparedPrompt
from pipeline.engine.types import Grammar, SamplingParams
from pipeline.errors import ExpertError
from pipeline.openai_api.protocol import Call

_FEW = pa.dictionary(pa.int32(), pa.string())  # the rows of a shard have few different ones
PREPARED_SCHEMA = pa.schema(
    [
        ("expert", _FEW),
        ("token_ids", pa.list_(pa.int32())),
        ("prefix_length", pa.int32()),
        ("soft_prompt", _FEW),
        ("seed", pa.uint64()),
        ("params", _FEW),  # JSON, without the seed
        ("grammar", _FEW),  # JSON
        ("call", _FEW),  # JSON
        ("refusal", pa.string()),  # JSON
    ]
)
"""Token ids and its fellows are null where nothing is asked; text is JSON, which holds whatever a row may."""

_PARAMS = tuple(name for name in SamplingParams.option_names() if name != "seed")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Refusal:
    """Why a row is not asked: a code of the error tree, what is wrong, and what to do."""

    code: str
    message: str
    hint: str | None = None

    @classmethod
    def of(cls, error: ExpertError) -> "Refusal":
        """The refusal that an error is."""
        return cls(error.code, error.message, error.hint)


@dataclass(frozen=True)
class PreparedRow:
    """What a row asks.

    Args:
        expert: Who is to answer it, by the engine's name; None where nobody is.
        prompt: For the engine; None where nothing is asked.
        refusal: Why nothing is asked; None too where the row itself says it.
        call: Of a line of a batch file, what its answer shall look like; `fields` and `options` are empty.
    """

    expert: str | None = None
    prompt: PreparedPrompt | None = None
    refusal: Refusal | None = None
    call: Call | None = None


def prepared_bytes(rows: Sequence[PreparedRow]) -> bytes:
    """Prepared rows as an Arrow IPC stream of `PREPARED_SCHEMA`."""
    prompts = [row.prompt for row in rows]
    columns = {
        "expert": [row.expert for row in rows],
        "token_ids": _token_lists(prompts),
        "prefix_length": [None if prompt is None else prompt.prefix_length for prompt in prompts],
        "soft_prompt": [None if prompt is None else prompt.soft_prompt for prompt in prompts],
        "seed": [None if prompt is None else prompt.params.seed for prompt in prompts],
        "params": [None if prompt is None else _params_text(prompt.params) for prompt in prompts],
        "grammar": [None if prompt is None else _grammar_text(prompt.grammar) for prompt in prompts],
        "call": [None if row.call is None else _call_text(row.call) for row in rows],
        "refusal": [None if row.refusal is None else _refusal_text(row.refusal) for row in rows],
    }
    arrays = [_array(columns[item.name], item.type) for item in PREPARED_SCHEMA]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, PREPARED_SCHEMA) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=PREPARED_SCHEMA))
    data: bytes = sink.getvalue().to_pybytes()
    return data


def read_prepared(data: bytes) -> list[PreparedRow]:
    """The rows that `prepared_bytes` wrote."""
    with pa.ipc.open_stream(data) as reader:
        batch = reader.read_next_batch()
    prefixes, seeds = batch["prefix_length"].to_pylist(), batch["seed"].to_pylist()
    params = _decoded(batch["params"], _read_params)
    grammars = _decoded(batch["grammar"], _read_grammar)
    soft_prompts = _decoded(batch["soft_prompt"], str)
    prompts = [
        None
        if token_ids is None or base is None
        else PreparedPrompt(
            token_ids, base.with_seed(seeds[place]), grammars[place], prefixes[place], soft_prompts[place]
        )
        for place, (token_ids, base) in enumerate(zip(_read_token_lists(batch["token_ids"]), params, strict=True))
    ]
    refusals = (None if text is None else Refusal(*json.loads(text)) for text in batch["refusal"].to_pylist())
    experts, calls = _decoded(batch["expert"], str), _decoded(batch["call"], _read_call)
    return [PreparedRow(*row) for row in zip(experts, prompts, refusals, calls, strict=True)]


def _array(values: Any, kind: pa.DataType) -> pa.Array:
    if isinstance(values, pa.Array):
        return values
    if pa.types.is_dictionary(kind):
        return pa.array(values, kind.value_type).dictionary_encode()
    return pa.array(values, kind)


def _token_lists(prompts: Sequence[PreparedPrompt | None]) -> pa.Array:
    lengths = [0 if prompt is None else len(prompt.token_ids) for prompt in prompts]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    flat = chain.from_iterable(prompt.token_ids for prompt in prompts if prompt is not None)
    values = np.fromiter(flat, np.int32, int(offsets[-1]))
    nulls = pa.array([prompt is None for prompt in prompts], pa.bool_())
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), mask=nulls)


def _read_token_lists(lists: pa.ListArray) -> Iterator[tuple[int, ...] | None]:
    values, offsets = lists.values.to_numpy(), lists.offsets.to_pylist()
    for is_there, start, stop in zip(lists.is_valid().to_pylist(), offsets, offsets[1:], strict=False):
        yield tuple(values[start:stop].tolist()) if is_there else None


def _decoded(column: pa.DictionaryArray, read: Callable[[str], Value]) -> list[Value | None]:
    """The values of a column of texts; each different text is read once."""
    values = [read(text) for text in column.dictionary.to_pylist()]
    return [None if index is None else values[index] for index in column.indices.to_pylist()]


def _params_text(params: SamplingParams) -> str:
    return json.dumps([getattr(params, name) for name in _PARAMS])


def _read_params(text: str) -> SamplingParams:
    return SamplingParams(**dict(zip(_PARAMS, json.loads(text), strict=True)))


def _grammar_text(grammar: Grammar | None) -> str | None:
    return None if grammar is None else json.dumps([grammar.kind, grammar.text])


def _read_grammar(text: str) -> Grammar:
    return Grammar(*json.loads(text))


def _call_text(call: Call) -> str:
    return json.dumps([call.kind, call.model, call.num_answers, call.has_logprobs])


def _read_call(text: str) -> Call:
    kind, model, num_answers, has_logprobs = json.loads(text)
    return Call(kind, model, {}, {}, num_answers=num_answers, has_logprobs=has_logprobs)


def _refusal_text(refusal: Refusal) -> str:
    return json.dumps([refusal.code, refusal.message, refusal.hint])
