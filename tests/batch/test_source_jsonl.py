"""JSON lines: whatever the cuts, every line once; whatever the line, a row or a failure that says where."""

import io
import json
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.batch.json_rows import MAX_DEPTH, InvalidRowError, parse_object
from pipeline.batch.jsonl_files import head_bytes, head_kinds, read_lines, sampled_schema, shard_bytes
from pipeline.batch.rows import iter_rows
from pipeline.batch.shards import JSON_TEXT
from pipeline.batch.source import plan_shards, read_shard

lines = st.one_of(
    st.sampled_from([b"", b"  ", b"\t", b"{}", b'{"a": "\xe4\xbd\xa0\xe5\xa5\xbd"}', b"x" * 300_000, b"\xff\xfe"]),
    st.text(max_size=20).map(lambda text: text.replace("\n", " ").encode()),
)
files = st.tuples(st.lists(st.tuples(lines, st.sampled_from([b"\n", b"\r\n"])), max_size=8), st.booleans())


def content_of(parts: tuple[list[tuple[bytes, bytes]], bool]) -> bytes:
    pairs, has_end = parts
    content = b"".join(line + end for line, end in pairs)
    return content if has_end or not pairs else content[: -len(pairs[-1][1])]


def expected_lines(content: bytes) -> list[tuple[int, bytes]]:
    """Every non-blank line and where it begins, the slow way."""
    found, offset = [], 0
    for line in content.split(b"\n"):
        bare = line.removeprefix(b"\xef\xbb\xbf") if offset == 0 else line
        if bare.strip(b" \t\r\n"):
            found.append((offset, line))
        offset += len(line) + 1
    return found


def lines_in(content: bytes, start: int, stop: int) -> list[tuple[int, bytes]]:
    table = read_lines(io.BytesIO(content), start, stop)
    return list(zip(table["offset"].to_pylist(), table["line"].to_pylist(), strict=True))


@settings(deadline=None)
@given(files, st.data())
@example(([(b"a", b"\n"), (b"b", b"\n")], True), None)
def test_any_cuts_give_every_line_once(parts, data):
    content = content_of(parts)
    positions = st.integers(0, len(content))
    cuts = data.draw(st.lists(positions, max_size=6)) if data is not None else range(len(content))
    bounds = sorted({0, len(content), *cuts})
    found = [line for start, stop in pairwise(bounds) for line in lines_in(content, start, stop)]
    assert found == (expected_lines(content) if content else [])


def test_a_line_is_its_shards_wherever_it_ends():
    content = b'{"a":1}\n{"b":2}\n'
    assert lines_in(content, 0, 1) == [(0, b'{"a":1}')]
    assert lines_in(content, 1, 8) == []
    assert lines_in(content, 8, 9) == [(8, b'{"b":2}')]


@pytest.mark.parametrize("length", [10, 11, 200_000])
def test_a_line_over_the_limit_is_null_whichever_range_holds_it(length):
    content = b"a\n" + b"x" * length + b"\nb"
    table = read_lines(io.BytesIO(content), 0, 3, max_line_bytes=10)
    whole = read_lines(io.BytesIO(content), 0, len(content), max_line_bytes=10)
    second = b"x" * length if length <= 10 else None
    assert table.to_pylist() == [{"line": b"a", "offset": 0}, {"line": second, "offset": 2}]
    assert whole.to_pylist() == [*table.to_pylist(), {"line": b"b", "offset": length + 3}]


BAD_LINES = {
    b"{": "not JSON: Expecting property name enclosed in double quotes at character 2",
    b"[1]": "not a JSON object but an array",
    b"null": "not a JSON object but null",
    b'"text"': "not a JSON object but a string",
    b'{"a": NaN}': "NaN is not JSON",
    b'{"a": -Infinity}': "-Infinity is not JSON",
    b'{"a": 1e999}': "the number 1e999 is too large",
    b'{"a": {"b": 1, "b": 2}}': 'the key "b" occurs twice',
    b'{"a": "\\ud83d"}': "half a surrogate pair",
    b'{"\\uDE00": 1}': "half a surrogate pair",
    b'{"a": "\xff"}': "not UTF-8: invalid start byte at byte 7",
    b'{"a": ' + b"[" * 100_000: "nested more than",
    b'{"a":' * MAX_DEPTH + b"{}" + b"}" * MAX_DEPTH: "nested more than",
    b'{"a": ' + b"1" * 5_000 + b"}": "Exceeds the limit",
    b'{"a": 1} {"b": 2}': "not JSON: Extra data at character 10",
    b"\xff\xfe{\x00}\x00": "not UTF-8",
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.items(), ids=range(len(BAD_LINES)))
def test_a_bad_line_is_one_rows_failure(tmp_path, line, message):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "before"}\n' + line + b'\n{"prompt": "after"}\n')
    plan = plan_shards(path)
    before, bad, after = [row for shard in plan.shards for row in iter_rows(shard, read_shard(shard))]
    assert (before.values, before.failure) == ({"prompt": "before"}, None)
    assert (after.values, after.failure) == ({"prompt": "after"}, None)
    assert (bad.identity, bad.values) == ("data.jsonl@21", {})
    assert bad.failure.code == "invalid_row"
    assert bad.failure.message.startswith("line at byte 21 of data.jsonl: ")
    assert message in bad.failure.message


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@settings(deadline=None)
@given(st.dictionaries(st.text(), json_values, max_size=4), st.booleans())
def test_good_json_is_read_as_it_was_written(values, ascii_only):
    assert parse_object(json.dumps(values, ensure_ascii=ascii_only).encode()) == values


@settings(deadline=None)
@given(st.binary(max_size=40) | st.text(alphabet='{}[]:,"\\udD8a01e-. \n', max_size=40).map(str.encode))
def test_any_bytes_are_an_object_or_a_failure(text):
    try:
        values = parse_object(text)
    except InvalidRowError:
        return
    assert isinstance(values, dict)
    json.dumps(values, allow_nan=False, ensure_ascii=False).encode()


def test_a_surrogate_pair_is_text():
    assert parse_object(b'{"a": "\\ud83d\\ude00"}') == {"a": "😀"}


def test_a_byte_order_mark_is_not_part_of_the_first_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n')
    plan = plan_shards(path)
    assert plan.columns == ("a",)
    assert [row.values for row in iter_rows(plan.shards[0], read_shard(plan.shards[0]))] == [{"a": 1}]


def test_shards_hold_about_the_rows_asked_for():
    head = b'{"a": 1}\n' * 100
    assert shard_bytes(head, 10) == 90
    assert shard_bytes(b"no end of line", 10) == 140
    assert shard_bytes(b"\n\n", 1) == 2


def test_of_many_files_less_is_looked_at_in_each():
    assert head_bytes(1) == head_bytes(256) == 256 * 1024
    assert head_bytes(1_024) == 64 * 1024
    assert head_bytes(100_000) == 16 * 1024


def test_columns_and_types_come_from_the_first_lines_of_all_files():
    first = b'{"s": "x", "i": 1, "f": 1, "b": true, "n": null, "m": 1, "l": [1], "big": 9223372036854775808}\n'
    second = b'{"s": null, "f": 1.5, "m": "x", "later": "y"}\nnot json\n{"cut": 1'
    schema = sampled_schema([head_kinds(first, is_whole=True), head_kinds(second, is_whole=False)])
    types = {item.name: "json" if item.metadata == JSON_TEXT else str(item.type) for item in schema}
    assert types == {
        "s": "string",
        "i": "int64",
        "f": "double",
        "b": "bool",
        "n": "string",
        "m": "json",
        "l": "json",
        "big": "json",
        "later": "string",
    }
