"""The safetensors header is checked before any library reads it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save

from pipeline.errors import AdapterError
from pipeline.package.weights import read_safetensors_header

ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def build(header: Any, data: bytes = bytes(8), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(b"", "claims 0 bytes", id="empty"),
        pytest.param(b"\x02\0\0", "claims 2 bytes", id="cut"),
        pytest.param(build({"a": ONE}, length=0), "claims 0 bytes", id="length-0"),
        pytest.param(build({"a": ONE}, length=10_000), "claims 10,000 bytes", id="beyond"),
        pytest.param(build({"a": ONE}, length=2**63), "claims 9,223", id="2^63"),
        pytest.param(build(b"[1]"), "not an object", id="array"),
        pytest.param(build(b"{]"), "not valid JSON", id="no-json"),
        pytest.param(build(b"\xff\xff"), "not valid JSON", id="not-utf8"),
        pytest.param(build(b"[" * 100_000), "not valid JSON", id="deep"),
        pytest.param(build(b'{"a": NaN}'), "NaN is not", id="nan"),
        pytest.param(
            build(b'{"a": %b, "a": %b}' % ((json.dumps(ONE).encode(),) * 2)), "a name occurs twice", id="duplicate"
        ),
        pytest.param(build({"__metadata__": {"a": 1}}), "__metadata__", id="metadata"),
        pytest.param(build({"a": 5}), "exactly dtype", id="entry"),
        pytest.param(build({"a": ONE | {"dtype": "F33"}}), "unknown dtype", id="dtype"),
        pytest.param(build({"a": ONE | {"shape": [-2]}}), "has the shape", id="negative"),
        pytest.param(build({"a": ONE | {"shape": [True, 2]}}), "has the shape", id="bool"),
        pytest.param(build({"a": ONE | {"shape": [1] * 9}}), "has the shape", id="dimensions"),
        pytest.param(build({"a": ONE | {"shape": [2**62, 2**62]}}), "do not fit", id="overflow"),
        pytest.param(build({"a": ONE | {"data_offsets": [8, 0]}}), "data_offsets", id="backwards"),
        pytest.param(build({"a": ONE | {"data_offsets": [0, 4]}}), "do not fit", id="shape"),
        pytest.param(build({"a": ONE, "b": ONE}), "begins at byte 0", id="overlap"),
        pytest.param(build({"a": ONE | {"data_offsets": [4, 12]}}, bytes(12)), "begins at byte 4", id="hole"),
        pytest.param(build({"a": ONE}, bytes(4)), "the file holds 4", id="short"),
        pytest.param(build({"a": ONE}, bytes(9)), "the file holds 9", id="trailing"),
    ],
)
def test_a_bad_header_is_refused(content: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(content)
    with pytest.raises(AdapterError) as caught:
        read_safetensors_header(path, source="x.expert")
    assert expected in caught.value.details[0]


@given(
    st.dictionaries(
        st.text(max_size=10).filter(lambda name: name != "__metadata__"),
        hnp.arrays(
            st.sampled_from([np.float32, np.float16, np.int8, np.int64, np.bool_]), hnp.array_shapes(min_dims=0)
        ),
        max_size=4,
    ),
    st.none() | st.dictionaries(st.text(max_size=5), st.text(max_size=5), min_size=1, max_size=2),
)
def test_what_safetensors_writes_is_read(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None
) -> None:
    path = tmp_path_factory.mktemp("weights") / "a.safetensors"
    path.write_bytes(save(tensors, metadata))
    found = {tensor.name: tensor.shape for tensor in read_safetensors_header(path, source="x")}
    assert found == {name: value.shape for name, value in tensors.items()}
