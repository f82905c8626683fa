"""Parquet files: damaged, hostile, and of several minds about their columns."""

import io
import random
from dataclasses import replace
from datetime import date, datetime
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.batch.parquet_files import read_footer, read_ranges, read_rows
from pipeline.batch.rows import iter_rows
from pipeline.batch.source import plan_shards, read_shard
from pipeline.errors import DatasetError


@pytest.mark.parametrize("before", range(4))
@pytest.mark.parametrize("place", ["column", "struct", "list"])
def test_an_extension_type_is_refused_and_its_code_never_runs(tmp_path, trap, place, before):
    column = {
        "column": trap,
        "struct": pa.StructArray.from_arrays([trap], ["inner"]),
        "list": pa.ListArray.from_arrays([0, 1, 2], trap),
    }[place]
    # other columns before it, to shift where the marker falls in the base64 text
    table = pa.table({**{"c" * (n + 1): [1, 2] for n in range(before)}, "evil": column})
    pq.write_table(table, tmp_path / "bad.parquet")
    trap.type.runs.clear()
    with pytest.raises(DatasetError, match=r"bad\.parquet has a column of an extension type") as caught:
        plan_shards(tmp_path)
    assert "'evil'" in caught.value.details[0]
    assert "test.trap" in caught.value.details[0]
    assert trap.type.runs == []
    pq.read_schema(tmp_path / "bad.parquet")
    assert set(trap.type.runs) == {b"payload"}, "the trap does not work"


def test_a_file_swapped_for_an_extension_type_is_refused_when_read(tmp_path, trap):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"evil": trap}), path)
    content = path.read_bytes()
    pq.write_table(pa.table({"evil": ["x", "y"]}), path)
    shard = plan_shards(path).shards[0]
    path.write_bytes(content)
    trap.type.runs.clear()
    swapped = replace(shard, slices=(replace(shard.slices[0], file_bytes=len(content)),))
    with pytest.raises(DatasetError, match="extension type"):
        read_shard(swapped)
    assert trap.type.runs == []


@pytest.mark.parametrize("kind", [pa.binary_view(), pa.string_view()], ids=str)
def test_types_outside_the_list_are_refused(tmp_path, kind):
    pq.write_table(pa.table({"ok": [1, 2], "odd": pa.array(["x", "y"], kind)}), tmp_path / "x.parquet")
    with pytest.raises(DatasetError, match="not supported") as caught:
        plan_shards(tmp_path)
    assert caught.value.details == (f"column 'odd'  {kind}",)


def test_two_columns_of_one_name_are_refused(tmp_path):
    pq.write_table(pa.table([pa.array([1]), pa.array([2])], names=["a", "a"]), tmp_path / "x.parquet")
    with pytest.raises(DatasetError, match="two columns of one name"):
        plan_shards(tmp_path)


def parquet_bytes(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def test_every_damaged_file_is_refused_by_name(tmp_path):
    good = parquet_bytes(pa.table({"q": ["some text"] * 50}))
    cases = [b"x", b"PAR1", b"PAR1PAR1", good[:-1], good[:-8], good[4:] + b"x", b"PAR1\xff\xff\xff\x7fPAR1", b"x" * 99]
    for case in cases:
        (tmp_path / "x.parquet").write_bytes(case)
        with pytest.raises(DatasetError, match=r"x\.parquet"):
            plan_shards(tmp_path)


def test_any_flipped_byte_is_an_error_of_ours_or_harmless(tmp_path):
    good = parquet_bytes(pa.table({"q": ["some text", None, "ä"] * 20, "n": range(60)}))
    draw = random.Random(0)
    for _ in range(300):
        bad = bytearray(good)
        bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        (tmp_path / "x.parquet").write_bytes(bad)
        try:
            for shard in plan_shards(tmp_path, shard_rows=7).shards:
                list(iter_rows(shard, read_shard(shard)))
        except DatasetError as error:
            assert "x.parquet" in str(error)  # noqa: PT017 - not every flip raises


def test_a_footer_that_claims_a_bomb_is_refused(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"q": ["a" * 1_000_000] * 4}), path, compression="zstd", use_dictionary=False)
    assert plan_shards(path).num_rows == 4
    with path.open("rb") as file, pytest.raises(DatasetError, match="would unpack") as caught:
        read_footer(file, "x.parquet", bomb_bytes=1_000_000)
    assert "'q'" in caught.value.details[0]


def test_a_list_of_endless_nulls_is_refused(tmp_path):
    path = tmp_path / "x.parquet"
    nulls = pa.ListArray.from_arrays([0, 2_000_000], pa.nulls(2_000_000, pa.int32()))
    pq.write_table(pa.table({"q": nulls}), path)
    assert path.stat().st_size < 2_000
    with path.open("rb") as file, pytest.raises(DatasetError, match="would unpack"):
        read_footer(file, "x.parquet", bomb_bytes=1_000_000)
    with path.open("rb") as file:
        assert read_footer(file, "x.parquet", bomb_bytes=3_000_000).metadata.num_rows == 1


def test_columns_of_several_files_become_one_schema(tmp_path):
    pq.write_table(pa.table({"a": pa.array([1], pa.int32()), "b": [None]}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"a": pa.array([2], pa.int64()), "b": ["x"], "c": [True]}), tmp_path / "2.parquet")
    pq.write_table(pa.table({"b": pa.array(["y"]).dictionary_encode()}), tmp_path / "3.parquet")
    plan = plan_shards(tmp_path)
    assert plan.schema == pa.schema([("a", pa.int64()), ("b", pa.string()), ("c", pa.bool_())])
    rows = [row.values for shard in plan.shards for row in iter_rows(shard, read_shard(shard))]
    assert rows == [{"a": 1, "b": None}, {"a": 2, "b": "x", "c": True}, {"b": "y"}]


def test_columns_that_do_not_fit_are_named_with_both_types(tmp_path):
    pq.write_table(pa.table({"a": [1], "b": [1]}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"a": [1], "b": [{"x": 1}]}), tmp_path / "2.parquet")
    with pytest.raises(DatasetError, match=r"2\.parquet does not fit") as caught:
        plan_shards(tmp_path)
    assert caught.value.details == ("column 'b'  int64 before, struct<x: int64> here",)


def test_values_become_python_values_and_odd_ones_text_or_a_failure(tmp_path):
    bad_text = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pa.py_buffer(b"ok\xff\xfe"))
    table = pa.table(
        {
            "d": [date(2024, 1, 1), None],
            "t": pa.array([253402300800_000000, 0], pa.timestamp("us")),
            "n": [Decimal("1.50"), Decimal("2.00")],
            "m": pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int64())),
            "s": bad_text,
        }
    )
    pq.write_table(table, tmp_path / "x.parquet", store_schema=True)
    (shard,) = plan_shards(tmp_path).shards
    first, second = iter_rows(shard, read_shard(shard))
    assert first.failure is None
    assert first.values["d"] == date(2024, 1, 1)
    assert first.values["t"].startswith("10000-01-01 00:00:00")
    assert first.values["n"] == Decimal("1.50")
    assert first.values["m"] == [("k", 1)]
    assert second.failure.code == "invalid_row"
    assert second.failure.message == "row 1 of x.parquet: column 's' is not UTF-8"
    assert second.values == {}
    assert datetime(1970, 1, 1) == read_shard(shard)["t"][1].as_py()


def test_only_the_row_groups_that_overlap_are_read(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"q": [str(n) * 100 for n in range(30)]}), path, row_group_size=10, use_dictionary=False)
    shards = plan_shards(path, shard_rows=10).shards
    metadata = pq.read_metadata(path)
    chunk = metadata.row_group(2).column(0)
    content = bytearray(path.read_bytes())
    begin = chunk.data_page_offset
    content[begin : begin + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(content)
    assert read_shard(shards[0]).num_rows == read_shard(shards[1]).num_rows == 10
    with pytest.raises(DatasetError, match=r"x\.parquet cannot be read"):
        read_shard(shards[2])


class CountedFile(io.BytesIO):
    """Counts the bytes that are read."""

    num_read = 0

    def read(self, size=-1):
        data = super().read(size)
        self.num_read += len(data)
        return data


@pytest.mark.parametrize("group_rows", [3, 1000])
@pytest.mark.parametrize("columns", [None, ["n"], []])
def test_ranges_read_together_equal_ranges_read_one_by_one(group_rows, columns):
    table = pa.table({"n": range(1000), "q": [str(n) * 10 for n in range(1000)]})
    data = parquet_bytes_in_groups(table, group_rows)
    chooser = random.Random(group_rows)
    for _ in range(10):
        cuts = sorted(chooser.sample(range(1001), 12))
        ranges = list(zip(cuts[::2], cuts[1::2], strict=True))
        found = list(read_ranges(io.BytesIO(data), "x", ranges, columns, batch_rows=7))
        assert [item.num_rows for item in found] == [stop - start for start, stop in ranges]
        for item, (start, stop) in zip(found, ranges, strict=True):
            assert item.equals(read_rows(io.BytesIO(data), "x", start, stop, columns))
            if columns != []:
                assert item["n"].to_pylist() == list(range(start, stop))


def test_a_large_row_group_is_decoded_once_for_all_its_shards():
    table = pa.table({"q": [random.Random(n).randbytes(500) for n in range(4000)]})
    data = parquet_bytes_in_groups(table, 4000)
    ranges = [(start, start + 100) for start in range(0, 4000, 100)]
    together, one_by_one = CountedFile(data), CountedFile(data)
    assert len(list(read_ranges(together, "x", ranges, None))) == 40
    for start, stop in ranges:
        read_rows(one_by_one, "x", start, stop, None)
    assert together.num_read < 1.5 * len(data)
    assert one_by_one.num_read > 10 * len(data)


def parquet_bytes_in_groups(table: pa.Table, rows: int) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=rows, use_dictionary=False)
    return sink.getvalue()
