"""Arrow IPC files: the rows that pyarrow reads, and nothing of what a hostile one can do with pyarrow."""

import io
import random
import struct
from datetime import date

import pyarrow as pa
import pyarrow.feather
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.batch import arrow_files
from pipeline.batch.arrow_messages import read_blocks
from pipeline.batch.rows import iter_rows
from pipeline.batch.shards import FileSlice, Shard
from pipeline.batch.source import plan_shards, read_shard
from pipeline.errors import DatasetError


def arrow_bytes(table: pa.Table, *, rows: int | None = None, compression: str | None = None) -> bytes:
    sink = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_file(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=rows)
    return sink.getvalue()


def read_back(data: bytes, shard_rows: int) -> list[dict]:
    """All rows, shard by shard; a row that cannot be read is empty."""
    _, num_rows = arrow_files.survey(io.BytesIO(data), "x.arrow")
    rows = []
    for start in range(0, num_rows, shard_rows):
        stop = min(start + shard_rows, num_rows)
        table = arrow_files.read_rows(io.BytesIO(data), "x.arrow", start, stop, None)
        shard = Shard(0, "arrow", (FileSlice("x.arrow", "x.arrow", start, stop, stop - start, len(data)),))
        rows += [row.values for row in iter_rows(shard, table)]
    return rows


TABLE = pa.table(
    {
        "q": ["some text", None, "ä", ""] * 15,
        "big": pa.array(["x" * 50] * 60, pa.large_string()),
        "n": range(60),
        "b": [b"\xff", None] * 30,
        "d": pa.array(["u", "v", None] * 20).dictionary_encode(),
        "l": [[{"role": "user", "content": "hi"}], [], None] * 20,
        "m": pa.array([[("k", 1)], None] * 30, pa.map_(pa.string(), pa.int64())),
        "f": pa.array([[1, 2]] * 60, pa.list_(pa.int8(), 2)),
        "day": [date(2024, 1, 1)] * 60,
        "nothing": pa.nulls(60),
    }
)


@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
@given(rows=st.integers(1, 70), shard_rows=st.integers(1, 70))
@settings(deadline=None, max_examples=8)
def test_any_batches_and_any_cuts_give_all_rows(compression, rows, shard_rows):
    assert read_back(arrow_bytes(TABLE, rows=rows, compression=compression), shard_rows) == TABLE.to_pylist()


def test_feather_is_arrow(tmp_path):
    pyarrow.feather.write_feather(TABLE, tmp_path / "x.feather", chunksize=7)
    plan = plan_shards(tmp_path, shard_rows=25)
    assert (plan.format, plan.num_rows, [shard.num_rows for shard in plan.shards]) == ("arrow", 60, [25, 25, 10])
    assert plan.schema.field("d").type == pa.string()
    rows = [row for shard in plan.shards for row in iter_rows(shard, read_shard(shard))]
    assert [row.values for row in rows] == TABLE.to_pylist()
    assert rows[-1].identity == "x.feather#59"


def test_dictionaries_that_grow_are_read(tmp_path):
    batches = [
        pa.record_batch({"d": pa.DictionaryArray.from_arrays([0, 1], ["a", "b"])}),
        pa.record_batch({"d": pa.DictionaryArray.from_arrays([2, 0], ["a", "b", "c"])}),
    ]
    options = pa.ipc.IpcWriteOptions(emit_dictionary_deltas=True)
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, batches[0].schema, options=options) as writer:
        for batch in batches:
            writer.write_batch(batch)
    assert [row["d"] for row in read_back(sink.getvalue(), 2)] == ["a", "b", "c", "a"]


def test_only_the_batches_that_overlap_are_read():
    data = bytearray(arrow_bytes(pa.table({"q": [str(n) for n in range(30)]}), rows=10))
    *_, last = arrow_files.read_footer(io.BytesIO(data), "x").batches
    data[last.offset + last.header_bytes : last.end] = b"\xff" * last.body_bytes
    read = lambda start: arrow_files.read_rows(io.BytesIO(data), "x.arrow", start, start + 10, None)  # noqa: E731
    assert read(0)["q"].to_pylist() + read(10)["q"].to_pylist() == [str(n) for n in range(20)]
    with pytest.raises(DatasetError, match=r"x\.arrow is damaged"):
        read(20)


def test_columns_are_read_as_asked():
    data = arrow_bytes(TABLE)
    assert arrow_files.read_rows(io.BytesIO(data), "x", 1, 3, ["n", "absent", "q"]).to_pydict() == {
        "n": [1, 2],
        "q": [None, "ä"],
    }
    assert arrow_files.read_rows(io.BytesIO(data), "x", 1, 3, []).num_rows == 2


def test_more_rows_than_there_are_is_another_file():
    with pytest.raises(DatasetError, match="has 60 rows, not the 61"):
        arrow_files.read_rows(io.BytesIO(arrow_bytes(TABLE)), "x", 50, 61, None)


@pytest.mark.parametrize("place", ["column", "struct", "list"])
def test_an_extension_type_is_refused_and_its_code_never_runs(tmp_path, trap, place):
    column = {
        "column": trap,
        "struct": pa.StructArray.from_arrays([trap], ["inner"]),
        "list": pa.ListArray.from_arrays([0, 1, 2], trap),
    }[place]
    (tmp_path / "bad.arrow").write_bytes(arrow_bytes(pa.table({"ok": [1, 2], "evil": column})))
    trap.type.runs.clear()
    with pytest.raises(DatasetError, match=r"bad\.arrow has a column of an extension type") as caught:
        plan_shards(tmp_path)
    assert "'evil'" in caught.value.details[0]
    assert "test.trap" in caught.value.details[0]
    assert trap.type.runs == []
    pa.ipc.open_file(tmp_path / "bad.arrow")
    assert trap.type.runs, "the trap does not work"


def test_a_file_swapped_for_an_extension_type_is_refused_when_read(trap):
    data = arrow_bytes(pa.table({"evil": trap}))
    trap.type.runs.clear()
    with pytest.raises(DatasetError, match="extension type"):
        arrow_files.read_rows(io.BytesIO(data), "x.arrow", 0, 1, None)
    assert trap.type.runs == []


union = pa.UnionArray.from_sparse(pa.array([0, 1], pa.int8()), [pa.array([1, 2]), pa.array(["a", "b"])])
ODD = {
    "view": pa.array(["x", "y"], pa.string_view()),
    "union": union,
    "run ends": pa.RunEndEncodedArray.from_arrays([2], ["x"]),
    "interval": pa.array([(1, 2, 3), None], pa.month_day_nano_interval()),
    "union in a list": pa.ListArray.from_arrays([0, 1, 2], union),
}


@pytest.mark.parametrize("odd", ODD)
def test_types_outside_the_list_are_refused(odd):
    with pytest.raises(DatasetError, match="not supported") as caught:
        arrow_files.survey(io.BytesIO(arrow_bytes(pa.table({"ok": [1, 2], "odd": ODD[odd]}))), "x.arrow")
    assert caught.value.details[0].startswith("column 'odd'  ")


def stream_bytes() -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, TABLE.schema) as writer:
        writer.write_table(TABLE)
    return sink.getvalue()


GOOD = arrow_bytes(TABLE, rows=20)
REFUSED = {
    "stream": (stream_bytes(), "is an Arrow stream, not an Arrow file"),
    "feather 1": (b"FEA1" + b"\0" * 50 + b"FEA1", "is Feather version 1"),
    "something else": (b"PAR1" * 20, "is not an Arrow file"),
    "cut off": (GOOD[:-1], "is not an Arrow file, or is cut off"),
    "its beginning": (GOOD[:100], "is not an Arrow file, or is cut off"),
    "two magics": (b"ARROW1\0\0ARROW1", "is not an Arrow file, or is cut off"),
    "short": (b"ARROW1", "is not an Arrow file"),
    "footer too long": (GOOD[:-10] + b"\xff\xff\xff\x7fARROW1", "its footer claims 2147483647 of"),
    "no footer": (GOOD[:-10] + b"\0\0\0\0ARROW1", "is damaged"),
    "hole at the beginning": (GOOD[:-500] + GOOD[-200:], "is damaged"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_an_arrow_file_is_refused_by_name(tmp_path, case):
    data, message = REFUSED[case]
    (tmp_path / "x.arrow").write_bytes(data)
    with pytest.raises(DatasetError, match=message) as caught:
        plan_shards(tmp_path)
    assert "x.arrow" in caught.value.message


@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
def test_any_flipped_byte_is_an_error_of_ours_or_harmless(compression):
    good = arrow_bytes(TABLE, rows=20, compression=compression)
    draw = random.Random(0)
    for _ in range(200):
        bad = bytearray(good)
        for _ in range(draw.choice([1, 1, 4])):
            bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        try:
            assert len(read_back(bytes(bad), 7)) < 1_000_000
        except DatasetError as error:
            assert "x.arrow" in str(error)  # noqa: PT017 - not every flip raises


OUTSIDE = {
    # a column, and whole numbers of its buffer that are overwritten
    "string": (pa.array(["a", "b"]), [0, 1, 2], [0, 1, 0x0FFFFFFF]),
    "string in the middle": (pa.array(["a", "b"]), [0, 1, 2], [0, 7, 2]),
    "string backwards": (pa.array(["a", "b"]), [0, 1, 2], [1, 0, 2]),
    "binary": (pa.array([b"a", b"b"]), [0, 1, 2], [0, 1, -1]),
    "list": (pa.array([[1], [2]]), [0, 1, 2], [0, 1, 0x0FFFFFFF]),
    "list of lists": (pa.array([[["a"], ["b"]]]), [0, 1, 2], [0, 9, 2]),
    "dictionary": (pa.DictionaryArray.from_arrays(pa.array([3, 7], pa.int32()), list("abcdefgh")), [3, 7], [3, 99]),
}


@pytest.mark.parametrize("kind", OUTSIDE)
def test_a_column_that_points_outside_its_batch_is_refused(kind):
    column, good, bad = OUTSIDE[kind]
    data = arrow_bytes(pa.table({"evil": column}))
    (block,) = arrow_files.read_footer(io.BytesIO(data), "x").batches
    at = data.index(struct.pack(f"<{len(good)}i", *good), block.offset + block.header_bytes)
    changed = bytearray(data)
    struct.pack_into(f"<{len(bad)}i", changed, at, *bad)
    with pytest.raises(DatasetError, match=r"x\.arrow is damaged"):
        read_back(bytes(changed), 1)
    assert read_back(data, 1) == [{"evil": value} for value in column.to_pylist()]


def test_a_text_that_is_not_utf8_is_its_rows_failure(tmp_path):
    bad = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pa.py_buffer(b"ok\xff\xfe"))
    (tmp_path / "x.arrow").write_bytes(arrow_bytes(pa.table({"q": bad})))
    (shard,) = plan_shards(tmp_path).shards
    good, failed = iter_rows(shard, read_shard(shard))
    assert good.values == {"q": "ok"}
    assert failed.failure.message == "row 1 of x.arrow: column 'q' is not UTF-8"


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_a_batch_that_claims_a_bomb_is_refused_before_it_is_unpacked(compression):
    data = arrow_bytes(pa.table({"q": ["a" * 10_000_000]}), compression=compression)
    assert arrow_files.read_rows(io.BytesIO(data), "x", 0, 1, None).num_rows == 1
    changed = bytearray(data)
    block = arrow_files.read_footer(io.BytesIO(data), "x").batches[0]
    claim = (10_000_000).to_bytes(8, "little")
    at = data.rindex(claim, block.offset)
    changed[at : at + 8] = (1 << 46).to_bytes(8, "little")
    before = pa.total_allocated_bytes()
    with pytest.raises(DatasetError, match=r"would unpack \d+ bytes to 7036874417\d{4}"):
        arrow_files.read_rows(io.BytesIO(changed), "x", 0, 1, None)
    changed[at : at + 8] = (-2).to_bytes(8, "little", signed=True)
    with pytest.raises(DatasetError, match="a buffer of negative size"):
        arrow_files.read_rows(io.BytesIO(changed), "x", 0, 1, None)
    assert pa.total_allocated_bytes() - before < 1_000_000


@pytest.mark.parametrize("depth", [1, 2])
def test_endless_lists_of_nothing_are_refused(depth):
    column = pa.ListArray.from_arrays(pa.array([0, (1 << 24) + 1], pa.int32()), pa.nulls((1 << 24) + 1))
    if depth == 2:
        column = pa.StructArray.from_arrays([column], ["inner"])
    with pytest.raises(DatasetError, match="lists of more than 16777216 nulls"):
        read_back(arrow_bytes(pa.table({"q": column})), 1)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_footer_or_damage(data):
    try:
        dictionaries, batches = read_blocks(data)
    except ValueError:
        return
    assert all(isinstance(block.offset, int) for block in (*dictionaries, *batches))
