"""Files 87 to 93 of the hostile inputs: an error of ours that names the file, before anything runs; or its rows."""

import gzip
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.batch.parts import AnsweredRow, encode_part, plan_part_format
from pipeline.batch.rows import iter_rows
from pipeline.batch.source import plan_shards, read_shard
from pipeline.engine.types import Completion
from pipeline.errors import DatasetError

LIMIT = 1_000_000


class Pickled(pa.ExtensionType):
    """What a pickle in an extension type's metadata can do: anything, when the type is read."""

    ran = 0

    def __init__(self) -> None:
        super().__init__(pa.string(), "test.pickled")

    def __arrow_ext_serialize__(self) -> bytes:
        return pickle.dumps(print)

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> "Pickled":
        cls.ran += 1
        pickle.loads(serialized)  # noqa: S301 - the attack itself
        return cls()


@pytest.fixture(autouse=True)
def registered():
    pa.register_extension_type(Pickled())
    yield
    pa.unregister_extension_type("test.pickled")


def parquet(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def arrow(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    return sink.getvalue()


def pickled() -> pa.Table:
    return pa.table({"evil": pa.ExtensionArray.from_storage(Pickled(), pa.array(["x"]))})


def parquet_bomb() -> bytes:
    """A page whose column claims in the footer that it unpacks to a terabyte."""
    data = parquet(pa.table({"q": ["a" * 1_000_000]}), compression="zstd", use_dictionary=False)
    size = pq.read_metadata(io.BytesIO(data)).row_group(0).column(0).total_uncompressed_size
    end = len(data) - 8
    start = end - int.from_bytes(data[end : end + 4], "little")
    footer = data[start:end].replace(thrift_integer(size), thrift_integer(1 << 40))
    return data[:start] + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def thrift_integer(value: int) -> bytes:
    """A number as Thrift's compact protocol writes it: zigzag, seven bits a byte."""
    value <<= 1
    digits = []
    while value:
        digits.append(value & 127 | 128)
        value >>= 7
    digits[-1] &= 127
    return bytes(digits)


def arrow_bomb() -> bytes:
    data = bytearray(arrow(pa.table({"q": ["a" * 1_000_000]})))
    at = data.rindex((1_000_000).to_bytes(8, "little"))
    data[at : at + 8] = (1 << 40).to_bytes(8, "little")
    return bytes(data)


GOOD = parquet(pa.table({"q": ["a", "b"]}))
# Files by name, and what the error says; the name of the file that is wrong is in it as well.
REFUSED: dict[str, tuple[Callable[[], dict[str, bytes]], str]] = {
    "87 columns that nothing joins": (
        lambda: {"1.parquet": parquet(pa.table({"q": [1]})), "2.parquet": parquet(pa.table({"q": [[1]]}))},
        "2.parquet does not fit the files before it",
    ),
    "88 footer of other bytes": (lambda: {"x.parquet": GOOD[:-60] + b"\xff" * 40 + GOOD[-20:]}, "x.parquet"),
    "88 footer length": (lambda: {"x.parquet": GOOD[:-8] + b"\xff\xff\xff\x7fPAR1"}, "the footer of x.parquet"),
    "88 cut off": (lambda: {"x.parquet": GOOD[:-3]}, "x.parquet is not a Parquet file, or is cut off"),
    "88 arrow": (lambda: {"x.arrow": arrow(pa.table({"q": [1]}))[:-3]}, "x.arrow is not an Arrow file, or is cut off"),
    "89 one JSON array": (lambda: {"x.json": b'[{"q": 1}]'}, "x.json is one JSON array"),
    "89 compressed JSON array": (lambda: {"x.json.gz": gzip.compress(b'[{"q": 1}]')}, "x.json.gz is one JSON array"),
    "92 pickle in Parquet": (lambda: {"x.parquet": parquet(pickled())}, "x.parquet has a column of an extension type"),
    "92 pickle in Arrow": (lambda: {"x.arrow": arrow(pickled())}, "x.arrow has a column of an extension type"),
    "93 page": (lambda: {"x.parquet": parquet_bomb()}, "x.parquet would unpack"),
    "93 batch": (lambda: {"x.arrow": arrow_bomb()}, "x.arrow would unpack"),
    "93 gzip": (lambda: {"x.jsonl.gz": gzip.compress(b"\n" * 10 * LIMIT)}, "x.jsonl.gz unpacks to more than"),
    "93 gzip CSV": (lambda: {"x.csv.gz": gzip.compress(b"q\n" + b"1\n" * LIMIT)}, "x.csv.gz unpacks to more"),
}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def parts_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of all parts, as Parquet."""
    plan = plan_shards(folder, max_decompressed_bytes=LIMIT)
    form = plan_part_format(plan, kind="parquet")
    rows = []
    for shard in plan.shards:
        table = read_shard(shard)
        answered = [AnsweredRow(row, Completion(row.identity, "yes", "stop", 1, 1)) for row in iter_rows(shard, table)]
        rows += pq.read_table(io.BytesIO(encode_part(answered, form, table))).to_pylist()
    return rows


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_cannot_be_used_is_named(tmp_path, case):
    files, message = REFUSED[case]
    folder = write(tmp_path, files())
    Pickled.ran = 0
    before = pa.total_allocated_bytes()
    with pytest.raises(DatasetError) as caught:
        parts_of(folder)
    assert message in caught.value.message
    assert caught.value.hint
    assert Pickled.ran == 0
    assert pa.total_allocated_bytes() - before < 1 << 26


BIG = 2**60
READ: dict[str, tuple[Callable[[], dict[str, bytes]], list[Any], list[str | None]]] = {
    "87 text after numbers": (
        lambda: {"1.parquet": parquet(pa.table({"q": [1, None]})), "2.parquet": parquet(pa.table({"q": ["a"]}))},
        ["1", None, "a"],
        [None, None, None],
    ),
    "87 numbers after text": (
        lambda: {"1.arrow": arrow(pa.table({"q": ["a"]})), "2.arrow": arrow(pa.table({"q": [1.5, 2.0]}))},
        ["a", "1.5", "2"],
        [None, None, None],
    ),
    "87 a number that floats cannot hold": (
        lambda: {"1.parquet": parquet(pa.table({"q": [0.5]})), "2.parquet": parquet(pa.table({"q": [1, BIG + 1, 3]}))},
        [0.5, 1.0, None, 3.0],
        [None, None, "schema_drift", None],
    ),
    "87 JSON of both": (lambda: {"x.jsonl": b'{"q": 1}\n{"q": "a"}\n'}, ["1", '"a"'], [None, None]),
    "89 invalid line": (
        lambda: {"x.jsonl": b'{"q": "a"}\n{"q": \n{"q": "b"}'},
        ["a", None, "b"],
        [None, "invalid_row", None],
    ),
    "89 invalid line, compressed": (
        lambda: {"x.jsonl.gz": gzip.compress(b'{"q": "a"}\nnonsense\n')},
        ["a", None],
        [None, "invalid_row"],
    ),
    "90 an empty file among others": (
        lambda: {"1.parquet": b"", "2.parquet": parquet(pa.table({"q": ["a"]})), "3.parquet": b""},
        ["a"],
        [None],
    ),
    "90 an empty compressed file": (lambda: {"1.jsonl.gz": b"", "2.jsonl.gz": gzip.compress(b"")}, [], []),
    "91 no rows": (lambda: {"x.parquet": parquet(pa.table({"q": pa.array([], pa.string())}))}, [], []),
    "91 no rows in Arrow": (lambda: {"x.arrow": arrow(pa.table({"q": pa.array([], pa.string())}))}, [], []),
    "91 nothing but white space": (lambda: {"x.jsonl": b"\n \r\n\t\n"}, [], []),
}


@pytest.mark.parametrize("case", READ)
def test_a_file_that_can_be_used_is(tmp_path, case):
    files, values, codes = READ[case]
    rows = parts_of(write(tmp_path, files()))
    assert [row["q"] for row in rows] == values
    assert [row["error"] and row["error"]["code"] for row in rows] == codes
    assert [row["text"] for row in rows] == ["yes" if code is None else None for code in codes]
