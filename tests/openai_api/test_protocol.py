"""Bodies in OpenAI's shape become what the engine is asked; whatever it cannot honour is refused by name."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.engine.requests import OPTION_NAMES
from pipeline.engine.types import MAX_ANSWERS, MAX_LOGPROBS, MAX_STOP_STRINGS
from pipeline.errors import InvalidRequestError
from pipeline.openai_api.http_errors import http_error
from pipeline.openai_api.protocol import Call, Kind, field_of, read_call
from pipeline.serve.limits import LimitsConfig

HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields: Any) -> Call:
    return read("chat", {"model": "sql", "messages": HELLO, **fields})


def text(**fields: Any) -> Call:
    return read("text", {"model": "sql", "prompt": "hello", **fields})


def read(kind: Kind, fields: dict[str, Any]) -> Call:
    return read_call(kind, json.dumps(fields).encode(), LimitsConfig())


def test_a_plain_chat_asks_for_one_answer_with_the_experts_own_options() -> None:
    assert chat() == Call("chat", "sql", {"messages": HELLO}, {})


def test_a_plain_completion_asks_the_same_of_a_prompt() -> None:
    assert text() == Call("text", "sql", {"prompt": "hello"}, {})
    assert text(prompt=["hello"]) == text()


OPTIONS: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "presence_penalty": -1.0,
    "frequency_penalty": 1.0,
    "max_tokens": 9,
    "min_tokens": 2,
    "stop": [";"],
    "stop_token_ids": [3],
    "ignore_eos": True,
    "seed": 7,
    "n": 3,
    "use_grammar": True,
    "grammar": 'root ::= "a"',
    "json_schema": {"type": "object"},
    "regex": "a+",
    "truncate": "left",
    "soft_prompt": "terse",
}


@pytest.mark.parametrize("name", [name for name in OPTION_NAMES if name != "logprobs"])
@pytest.mark.parametrize("ask", [chat, text])
def test_every_option_of_the_engine_is_a_field(ask: Any, name: str) -> None:
    more = {"max_tokens": 9} if name == "min_tokens" else {}
    assert ask(**{name: OPTIONS[name]}, **more).options == {name: OPTIONS[name], **more}


def test_a_schema_goes_along_with_a_chat_and_a_prompt() -> None:
    extra = {"schema": "CREATE TABLE users (id int)", "dialect": "postgres", "system": "Be brief."}
    assert chat(**extra).fields == {"messages": HELLO, **extra}
    assert text(**extra).fields == {"prompt": "hello", **extra}


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"max_completion_tokens": 5}, {"max_tokens": 5}),
        ({"max_completion_tokens": 5, "max_tokens": 5}, {"max_tokens": 5}),
        ({"logprobs": True}, {"logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 4}, {"logprobs": 4}),
        ({"logprobs": False}, {}),
        ({"response_format": {"type": "text"}}, {}),
        ({"response_format": {"type": "json_object"}}, {"json_schema": {"type": "object"}}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array"}}}},
            {"json_schema": {"type": "array"}},
        ),
        ({"temperature": None, "tools": None, "seed": None}, {}),
        ({"user": "someone"}, {}),
        ({"store": False, "logit_bias": {}, "service_tier": "auto"}, {}),
    ],
    ids=str,
)
def test_chat_fields_become_options(fields: dict[str, Any], options: dict[str, Any]) -> None:
    assert chat(**fields).options == options


def test_logprobs_of_a_completion_is_a_number() -> None:
    assert text(logprobs=2).options == {"logprobs": 2}
    assert text(logprobs=2).has_logprobs
    assert not text().has_logprobs


def test_streams_and_their_counts() -> None:
    assert not chat(stream=True).includes_usage
    assert chat(stream=True, stream_options={"include_usage": True}).includes_usage


def test_text_parts_are_joined_and_a_developer_is_the_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    assert chat(messages=messages).fields["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "ab"},
    ]


IMAGE = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest/meta-data"}}
SOUND = {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}
REFUSED: list[tuple[Kind, dict[str, Any], str]] = [
    ("chat", {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ("chat", {"tool_choice": "auto"}, "tool_choice"),
    ("chat", {"parallel_tool_calls": True}, "parallel_tool_calls"),
    ("chat", {"functions": [{"name": "f"}]}, "functions"),
    ("chat", {"function_call": "auto"}, "function_call"),
    ("chat", {"audio": {"voice": "alloy", "format": "wav"}}, "audio"),
    ("chat", {"modalities": ["audio"]}, "modalities"),
    ("chat", {"logit_bias": {"5": 100}}, "logit_bias"),
    ("chat", {"prediction": {"type": "content", "content": "x"}}, "prediction"),
    ("chat", {"reasoning_effort": "high"}, "reasoning_effort"),
    ("chat", {"web_search_options": {}}, "web_search_options"),
    ("chat", {"store": True}, "store"),
    ("chat", {"temprature": 1}, "temprature"),
    ("chat", {"prompt": "hello"}, "prompt"),
    ("chat", {"messages": []}, "messages"),
    ("chat", {"messages": None}, "messages"),
    ("chat", {"messages": "hello"}, "messages"),
    ("chat", {"messages": ["hello"]}, "messages[0]"),
    ("chat", {"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0]"),
    ("chat", {"messages": [{"role": "user", "content": [SOUND]}]}, "messages[0].content[0]"),
    ("chat", {"messages": [{"role": "user", "content": ["hello"]}]}, "messages[0].content[0]"),
    ("chat", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ("chat", {"messages": [{"role": "user", "content": "a", "tool_calls": [{"id": "1"}]}]}, "messages[0].tool_calls"),
    ("chat", {"logprobs": 3}, "logprobs"),
    ("chat", {"top_logprobs": 3}, "top_logprobs"),
    ("chat", {"logprobs": True, "top_logprobs": MAX_LOGPROBS + 1}, "top_logprobs"),
    ("chat", {"response_format": "json"}, "response_format"),
    ("chat", {"response_format": {"type": "xml"}}, "response_format"),
    ("chat", {"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ("chat", {"response_format": {"type": "json_object"}, "regex": "a"}, "response_format"),
    ("chat", {"max_completion_tokens": 5, "max_tokens": 6}, "max_completion_tokens"),
    ("text", {"suffix": "after"}, "suffix"),
    ("text", {"echo": True}, "echo"),
    ("text", {"best_of": 2}, "best_of"),
    ("text", {"messages": HELLO}, "messages"),
    ("text", {"prompt": ["a", "b"]}, "prompt"),
    ("text", {"prompt": [1, 2, 3]}, "prompt"),
    ("text", {"prompt": None}, "prompt"),
    ("text", {"logprobs": True}, "logprobs"),
    ("text", {"logprobs": MAX_LOGPROBS + 1}, "logprobs"),
    ("text", {"model": None}, "model"),
    ("text", {"model": 5}, "model"),
    ("text", {"temperature": -1}, "temperature"),
    ("text", {"temperature": 10**400}, "temperature"),
    ("text", {"temperature": "hot"}, "temperature"),
    ("text", {"top_p": 0}, "top_p"),
    ("text", {"top_k": -1}, "top_k"),
    ("text", {"max_tokens": 0}, "max_tokens"),
    ("text", {"max_tokens": 1 << 20}, "max_tokens"),
    ("text", {"max_tokens": 1 << 40}, "max_tokens"),
    ("text", {"n": 0}, "n"),
    ("text", {"n": MAX_ANSWERS + 1}, "n"),
    ("text", {"seed": -1}, "seed"),
    ("text", {"stop": ["a"] * (MAX_STOP_STRINGS + 1)}, "stop"),
    ("text", {"stop": [""]}, "stop"),
    ("text", {"stream": "yes"}, "stream"),
    ("text", {"stream_options": {"include_usage": True}}, "stream_options"),
    ("text", {"stream": True, "stream_options": {"chunk": 1}}, "stream_options.chunk"),
    ("text", {"stream": True, "stream_options": []}, "stream_options"),
    ("text", {"timeout": 0}, "timeout"),
    ("text", {"timeout": 10**6}, "timeout"),
    ("text", {"timeout": 10**400}, "timeout"),
    ("text", {"timeout": True}, "timeout"),
    ("text", {"user": "x" * 600}, "user"),
]


@pytest.mark.parametrize(("kind", "fields", "param"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_cannot_be_honoured_is_refused_by_name(kind: Kind, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        (chat if kind == "chat" else text)(**fields)
    assert field_of(caught.value.message) == param
    error = json.loads(http_error(caught.value).body)["error"]
    assert (error["param"], error["code"], error["type"]) == (param, "invalid_request", "invalid_request_error")
    assert len(error["message"]) < 800


def test_a_misspelt_field_is_told_its_neighbour() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        chat(temprature=1)
    assert caught.value.hint == "Did you mean temperature?"


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'{"model": NaN}', b'{"a": 1, "a": 2}', b'{"a": 1e999}', b"\xff", b'"\\ud800"'],
)
def test_what_is_not_strict_json_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequestError, match=r"^the body is not "):
        read_call("chat", body, LimitsConfig())


def test_deep_json_is_refused_however_deep() -> None:
    for depth in (65, 100_000):
        with pytest.raises(InvalidRequestError, match="nested more than 64 levels"):
            read_call("chat", b'{"a":' * depth + b"1" + b"}" * depth, LimitsConfig())


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from((*OPTION_NAMES, "model", "messages", "prompt", "stream", "stream_options", "response_format"))


@given(st.sampled_from(["chat", "text"]), st.dictionaries(NAMES, VALUES, max_size=4))
def test_any_values_are_a_call_or_a_refusal(kind: Kind, fields: dict[str, Any]) -> None:
    whole = {"model": "sql", "messages" if kind == "chat" else "prompt": HELLO if kind == "chat" else "hello", **fields}
    try:
        call = read(kind, whole)
    except InvalidRequestError as error:
        json.loads(http_error(error).body)
        return
    assert call.model == whole["model"]
