"""Parts: every input column and ours, one schema with and without errors, the same bytes every time."""

import io
import json
from dataclasses import replace
from datetime import date
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.batch.parts import AnsweredRow, PartCounts, count_part, encode_part, plan_part_format
from pipeline.batch.rows import Row, iter_rows
from pipeline.batch.source import plan_shards, read_shard
from pipeline.engine.types import Completion, Failure
from pipeline.errors import ConfigError, DatasetError, OutputError

OURS = ["text", "finish_reason", "prompt_tokens", "completion_tokens", "expert", "expert_sha256", "error"]
FAILED = Failure("prompt_too_long", "the prompt has 9 tokens")


def answer(row: Row, failure: Failure | None = None) -> AnsweredRow:
    if row.failure:
        return AnsweredRow(row, None)
    if failure:
        return AnsweredRow(row, Completion(row.identity, "", "error", 9, 0, failure))
    return AnsweredRow(row, Completion(row.identity, f"answer to {row.identity}", "stop", 5, 7))


def shard_rows(path):
    plan = plan_shards(path)
    (shard,) = plan.shards
    table = read_shard(shard)
    return plan, list(iter_rows(shard, table)), table


def jsonl(tmp_path, *lines):
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(lines))
    return shard_rows(path)


def read_parquet(data: bytes) -> pa.Table:
    return pq.read_table(io.BytesIO(data))


def test_jsonl_parts_keep_the_rows_keys_and_say_what_failed(tmp_path):
    plan, rows, _ = jsonl(tmp_path, '{"q": "ä", "n": 1}', '{"extra": [1.5, null], "q": "b"}', "broken")
    form = plan_part_format(plan, expert="sql@0.3.0", expert_sha256="ab")
    assert form.kind == "jsonl"
    data = encode_part([answer(rows[0]), answer(rows[1], FAILED), answer(rows[2])], form)
    lines = data.decode().splitlines()
    assert lines[0].startswith('{"q":"ä","n":1,"text":"answer to x.jsonl@0","finish_reason":"stop","prompt_tokens":5,')
    objects = [json.loads(line) for line in lines]
    assert list(objects[1]) == ["extra", "q", *OURS]
    nothing = {"text": None, "finish_reason": "error", "prompt_tokens": 0, "completion_tokens": 0}
    who = {"expert": "sql@0.3.0", "expert_sha256": "ab"}
    error = {"code": "prompt_too_long", "message": "the prompt has 9 tokens"}
    assert objects[1] == {"extra": [1.5, None], "q": "b", **nothing, **who, "error": error}
    assert {name: objects[2][name] for name in nothing} == nothing
    assert objects[2]["error"]["code"] == "invalid_row"
    assert count_part(data, "jsonl") == PartCounts(
        rows=3, error_codes={"invalid_row": 1, "prompt_too_long": 1}, prompt_tokens=5, completion_tokens=7
    )


@pytest.fixture
def table():
    return pa.table(
        {
            "q": ["a", None, "c"],
            "d": [date(2024, 1, 1), None, date(1, 1, 1)],
            "t": pa.array([1, None, 2**62], pa.timestamp("ns", "UTC")),
            "far": pa.array([2**60, 0, None], pa.timestamp("us")),
            "n": [Decimal("1.50"), None, Decimal("-2.00")],
            "f": pa.array([1.5, float("nan"), None], pa.float32()),
            "b": [b"\xff\0", None, b""],
            "l": [[1, 2], [], None],
            "s": [{"x": 1, "y": "z"}, None, {"x": None, "y": None}],
            "m": pa.array([[("k", 1)], None, []], pa.map_(pa.string(), pa.int64())),
            "c": pa.array(["u", "v", "u"]).dictionary_encode(),
            "time": pa.array([1, None, 3], pa.time64("ns")),
            "nothing": pa.nulls(3),
        }
    )


def test_parquet_parts_hold_the_input_unchanged(tmp_path, table):
    pq.write_table(table, tmp_path / "x.parquet")
    plan, rows, read = shard_rows(tmp_path / "x.parquet")
    form = plan_part_format(plan, expert="sql@0.3.0", metadata={"fingerprint": "f00"})
    assert form.kind == "parquet"
    data = encode_part([answer(rows[0]), answer(rows[1], FAILED), answer(rows[2])], form, read)
    part = read_parquet(data)
    assert part.column_names == [*table.column_names, *OURS]
    wanted = table.set_column(table.column_names.index("c"), "c", table["c"].cast(pa.string()))
    for name in wanted.column_names:
        assert part[name].type == wanted[name].type
        # NaN equals nothing, so those two are compared as text
        same = (
            str(part[name].to_pylist()) == str(wanted[name].to_pylist())
            if name == "f"
            else part[name].equals(wanted[name])
        )
        assert same, name
    assert part["text"].to_pylist() == ["answer to x.parquet#0", None, "answer to x.parquet#2"]
    assert part["finish_reason"].to_pylist() == ["stop", "error", "stop"]
    assert part["prompt_tokens"].to_pylist() == [5, 0, 5]
    assert part["error"].to_pylist() == [None, {"code": FAILED.code, "message": FAILED.message}, None]
    assert part["expert"].to_pylist() == ["sql@0.3.0"] * 3
    assert part.schema.metadata[b"fingerprint"] == b"f00"
    assert count_part(data, "parquet") == PartCounts(
        rows=3, error_codes={FAILED.code: 1}, prompt_tokens=10, completion_tokens=14
    )


def test_python_values_give_the_same_part_as_the_table(tmp_path, table):
    table = table.drop_columns(["far", "time"])  # Python cannot hold these
    pq.write_table(table, tmp_path / "x.parquet")
    plan, rows, read = shard_rows(tmp_path / "x.parquet")
    form = plan_part_format(plan)
    answers = [answer(row) for row in rows]
    assert encode_part(answers, form) == encode_part(answers, form, read)


def test_every_part_has_one_schema_and_the_same_bytes(tmp_path, table):
    pq.write_table(table, tmp_path / "x.parquet")
    plan, rows, read = shard_rows(tmp_path / "x.parquet")
    form = plan_part_format(plan)
    good = encode_part([answer(row) for row in rows], form, read)
    bad = encode_part([answer(row, FAILED) for row in rows], form, read)
    none = encode_part([], form, read.slice(0, 0))
    without = encode_part([answer(row) for row in rows[:1]], form, read.slice(0, 1).select(["q"]))
    schemas = [pq.read_schema(io.BytesIO(data)) for data in (good, bad, none, without)]
    assert all(schema.equals(form.schema, check_metadata=True) for schema in schemas)
    assert good == encode_part([answer(row) for row in rows], form, read)
    assert read_parquet(without)["l"].to_pylist() == [None]


def test_parquet_rows_as_jsonl(tmp_path, table):
    pq.write_table(table, tmp_path / "x.parquet")
    plan, rows, _ = shard_rows(tmp_path / "x.parquet")
    data = encode_part([answer(row) for row in rows], plan_part_format(plan, kind="jsonl"))
    first, second, third = [json.loads(line) for line in data.splitlines()]
    assert first["d"] == "2024-01-01"
    assert first["n"] == "1.50"
    assert first["b"] == "/wA="
    assert first["m"] == [["k", 1]]
    assert first["s"] == {"x": 1, "y": "z"}
    assert second["f"] == "NaN"
    assert third["l"] is None
    assert list(first) == [*table.column_names, *OURS]


def test_jsonl_rows_as_parquet_and_what_drifts(tmp_path):
    head = '{"s": "x", "i": 1, "f": 1.5, "b": true, "j": [1]}'
    plan, _, _ = jsonl(tmp_path, head)
    form = plan_part_format(plan, kind="parquet")

    def part(**values):
        (row,) = read_parquet(encode_part([answer(Row("x@0", values, None))], form)).to_pylist()
        return {name: row[name] for name in "sifbj"}, row["error"] and row["error"]["message"], row["text"]

    nothing = dict.fromkeys("sifbj")
    assert part() == (nothing, None, "answer to x@0")
    assert part(s="y", i=2, f=3, b=False, j="t")[:2] == ({"s": "y", "i": 2, "f": 3.0, "b": False, "j": '"t"'}, None)
    assert part(s={"a": [1]})[:2] == (nothing | {"s": '{"a":[1]}'}, None)
    for name, value in {"i": 1.5, "f": "x", "b": 1}.items():
        values, message, text = part(**{name: value})
        assert (values, text) == (nothing, None)
        assert f"column {name!r}" in message
    assert part(i=True)[1]
    assert part(i=2**63)[1]
    assert part(f=2**53 + 1)[1]
    assert part(f=False)[1]
    values, message, text = part(new=1, s="kept")
    assert (values, text) == (nothing | {"s": "kept"}, None)
    assert "column 'new' is not in the first lines" in message
    assert form.misfit({"i": "x"}).code == "schema_drift"
    assert form.misfit({"i": 1}) is None


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_collision_names_the_column_and_the_way_out(tmp_path, kind):
    plan, rows, _ = jsonl(tmp_path, '{"text": "x", "expert": "mine"}')
    with pytest.raises(DatasetError, match="names of output columns") as caught:
        plan_part_format(plan, kind=kind)
    assert caught.value.details == ("column 'text'", "column 'expert'")
    assert "output_prefix" in caught.value.hint
    form = plan_part_format(plan, kind=kind, output_prefix="out_")
    data = encode_part([answer(row) for row in rows], form)
    row = read_parquet(data).to_pylist()[0] if kind == "parquet" else json.loads(data)
    assert list(row) == ["text", "expert", *(f"out_{name}" for name in OURS)]
    assert row["text"] == "x"
    assert count_part(data, kind, "out_").completion_tokens == 7


def test_a_collision_in_a_later_line_is_that_rows_failure(tmp_path):
    plan, _, _ = jsonl(tmp_path, '{"q": "x"}')
    data = encode_part([answer(Row("x@9", {"q": "y", "error": 1}, None))], plan_part_format(plan))
    row = json.loads(data)
    assert row["error"]["code"] == "schema_drift"
    assert "'error'" in row["error"]["message"]
    assert row["text"] is None


def test_an_unknown_kind_is_refused(tmp_path):
    plan, _, _ = jsonl(tmp_path, "{}")
    with pytest.raises(ConfigError, match="output_format is 'csv'"):
        plan_part_format(plan, kind="csv")


def test_half_surrogates_in_answers_do_not_stop_a_part(tmp_path):
    plan, rows, _ = jsonl(tmp_path, '{"q": "x"}')
    odd = AnsweredRow(rows[0], Completion("x", "a\ud800b", "stop", 1, 1))
    for kind in ("parquet", "jsonl"):
        assert b"a?b" in encode_part([odd], replace(plan_part_format(plan, kind=kind), metadata={}))


def test_a_row_without_answer_or_failure_is_an_error(tmp_path):
    plan, rows, _ = jsonl(tmp_path, '{"q": "x"}')
    with pytest.raises(OutputError, match=r"x\.jsonl@0 has neither"):
        encode_part([AnsweredRow(rows[0], None)], plan_part_format(plan))


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize("data", [b"x", b'{"error": null}\n', b"PAR1", b"[]\n"])
def test_what_is_not_a_part_is_refused(kind, data):
    with pytest.raises(OutputError, match="a part is damaged"):
        count_part(data, kind)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from(["q", "n", "z", "Text"])


@given(st.lists(st.dictionaries(names, json_values), min_size=1, max_size=6), st.integers(0, 5))
@settings(deadline=None, max_examples=60)
def test_any_rows_make_a_part_of_as_many_rows(tmp_path_factory, dicts, cut):
    path = tmp_path_factory.mktemp("parts") / "x.jsonl"
    path.write_text("\n".join(json.dumps(values) for values in dicts[: cut + 1]))
    plan = plan_shards(path)
    answers = [answer(Row(f"x@{index}", values, None)) for index, values in enumerate(dicts)]
    lines = encode_part(answers, plan_part_format(plan)).splitlines()
    assert [{name: value for name, value in json.loads(line).items() if name not in OURS} for line in lines] == dicts
    form = plan_part_format(plan, kind="parquet")
    part = read_parquet(encode_part(answers, form))
    assert part.num_rows == len(dicts)
    assert part.schema.equals(form.schema)
    failed = [error is not None for error in part["error"].to_pylist()]
    assert failed == [form.misfit(values) is not None for values in dicts]
    assert not any(failed[: cut + 1]), "the lines the types come from always fit"
