"""JSON with positions: the same values as `json.loads`, exact places, and nothing that is not JSON."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import AdapterError, ManifestError
from pipeline.package.json_text import JsonDocument, dotted, read_json

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=15,
)


def read(data: str | bytes) -> JsonDocument:
    data = data.encode() if isinstance(data, str) else data
    return read_json(data, name="x.json", error=ManifestError, max_bytes=1 << 20)


@given(st.dictionaries(st.text(), VALUES, max_size=4), st.sampled_from([None, 2]), st.booleans())
def test_values_equal_those_of_json_loads(value: dict[str, Any], indent: int | None, ascii_only: bool) -> None:
    assert read(json.dumps(value, indent=indent, ensure_ascii=ascii_only)).value == value


@given(st.dictionaries(st.text(), VALUES, max_size=4))
def test_every_place_is_where_its_value_begins(value: dict[str, Any]) -> None:
    document = read(json.dumps(value, indent=1))
    for path, offset in document.places.items():
        expected: Any = value
        for part in path:
            expected = expected[part]
        assert json.JSONDecoder().raw_decode(document.text, offset)[0] == expected
    for path, offset in document.keys.items():
        assert json.JSONDecoder().raw_decode(document.text, offset)[0] == path[-1]


def test_lines_and_columns_count_characters_from_one() -> None:
    document = read('{\n  "ü": [1,\r\n    {"b": true}]\n}')
    assert document.describe(("ü", 1, "b"), "bad") == "line 3, column 11  ü[1].b: bad"
    assert document.describe(("ü", 1, "b"), "bad", key=True) == "line 3, column 6  ü[1].b: bad"
    assert document.describe(("ü", 1, "missing"), "bad") == "line 3, column 5  ü[1].missing: bad"
    assert document.describe((), "bad") == "line 1, column 1  the document: bad"


def test_dotted_paths() -> None:
    assert dotted(("base_models", 0, "adapters", 1, "r")) == "base_models[0].adapters[1].r"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(b"\xef\xbb\xbf{}", "byte order mark", id="utf8-bom"),
        pytest.param('{"a": 1}'.encode("utf-16"), "byte order mark", id="utf16-bom"),
        pytest.param('{"a": 1}'.encode("utf-16-le"), "UTF-16", id="utf16-no-bom"),
        pytest.param(b'{"a":\n "\xff"}', "line 2, column 3  It is not UTF-8", id="not-utf8"),
        pytest.param(b"[1]", "not an object", id="array-root"),
        pytest.param(b"", "ends too early", id="empty"),
        pytest.param(b'{"a": 1', "line 1, column 8  ',' is expected", id="cut"),
        pytest.param(b'{"a": 1,}', "line 1, column 9  A key", id="trailing-comma"),
        pytest.param(b'{"a": tru}', "line 1, column 7  A value", id="bad-word"),
        pytest.param(b'{"a": 01}', "',' is expected", id="leading-zero"),
        pytest.param(b'{"a": "x\n"}', "line 1, column 7  This string", id="raw-newline"),
        pytest.param(b'{"a": "\\q"}', "line 1, column 8  This escape", id="bad-escape"),
        pytest.param(b"{} {}", "line 1, column 4  Something follows", id="two-documents"),
        pytest.param(b'{"a": ' + b"[" * 100_000, "nested deeper than 64", id="deep"),
        pytest.param(b'{"a": "' + b"x" * (1 << 20) + b'"}', "at most 1,048,576", id="huge"),
    ],
)
def test_refused_text(data: bytes, expected: str) -> None:
    with pytest.raises(AdapterError) as caught:
        read_json(data, name="adapter_config.json in x", error=AdapterError, max_bytes=1 << 20)
    assert expected in caught.value.details[0]
    assert "adapter_config.json in x" in caught.value.message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1,\n "a": 2}', (("a",), "This key occurs twice.")),
        ('{"a":\n NaN}', (("a",), "NaN is not a JSON number.")),
        ('{"a":\n -Infinity}', (("a",), "-Infinity is not a JSON number.")),
        ('{"a":\n 1e999}', (("a",), "This number does not fit 64 bits.")),
        ('{"a":\n 1' + "0" * 400 + "}", (("a",), "This number does not fit 64 bits.")),
        ('{"a":\n 1' + "0" * 5000 + "}", (("a",), "This number does not fit 64 bits.")),
        ('{"a":\n "\\ud800"}', (("a",), "This string holds half of a surrogate pair.")),
    ],
)
def test_problems_are_kept_with_their_place(text: str, expected: tuple[Any, str]) -> None:
    document = read(text)
    assert [(path, message) for _, path, message in document.problems] == [expected]
    assert document.describe_offset(*document.problems[0]).startswith("line 2, column 2  a: ")


def test_many_problems_are_all_found() -> None:
    assert len(read('{"a": NaN, "b": [NaN, 1e999], "a": 1}').problems) == 4
