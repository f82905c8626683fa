"""The plan: shards that together are the dataset, the same on every machine; and reading them."""

import csv
import gzip
import io
import json
import shutil
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.batch.compression import split_codec
from pipeline.batch.csv_files import BLOCK_BYTES
from pipeline.batch.rows import iter_rows
from pipeline.batch.shards import Shard
from pipeline.batch.source import MAX_SLICES, plan_shards, read_shard
from pipeline.errors import ConfigError, DatasetError

texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
datasets = st.lists(st.lists(texts, max_size=9), min_size=1, max_size=4)


FORMS = ["parquet", "jsonl", "csv", "arrow", "jsonl.gz", "csv.zst"]


def write_files(folder: Path, form: str, files: list[list[str]]) -> None:
    bare, codec = split_codec(f".{form}")
    for number, values in enumerate(files):
        path = folder / f"{number}.{form}"
        table = pa.table({"q": pa.array(values, pa.string())})
        if form == "parquet":
            pq.write_table(table, path, row_group_size=3)
        elif form == "arrow":
            with pa.ipc.new_file(path, table.schema) as arrow:
                arrow.write_table(table, max_chunksize=3)
        else:
            text = json_lines(values) if bare == ".jsonl" else csv_text(values)
            with pa.output_stream(path, compression=codec) as out:
                out.write(text.encode())


def json_lines(values: list[str]) -> str:
    return "".join(json.dumps({"q": value}) + "\n" for value in values)


def csv_text(values: list[str]) -> str:
    sink = io.StringIO()
    writer = csv.writer(sink, quoting=csv.QUOTE_ALL)
    writer.writerows([["n", "q"], *([str(n), value] for n, value in enumerate(values))])
    return sink.getvalue()


@pytest.mark.parametrize("form", FORMS)
@given(files=datasets, shard_rows=st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_the_shards_together_are_the_files(form, files, shard_rows):
    with tempfile.TemporaryDirectory() as name:
        write_files(Path(name), form, files)
        plan = plan_shards(name, shard_rows=shard_rows)
        whole = plan_shards(name, shard_rows=1_000_000)
        rows = [row for shard in plan.shards for row in iter_rows(shard, read_shard(shard))]
        same = [row for shard in whole.shards for row in iter_rows(shard, read_shard(shard))]
    wanted = [value for values in files for value in values]
    if form.startswith("csv"):
        wanted = [value or None for value in wanted]
    assert [row.values["q"] for row in rows] == wanted
    assert rows == same, "identities depend on the sharding"
    assert len({row.identity for row in rows}) == len(rows)
    assert [shard.index for shard in plan.shards] == list(range(len(plan.shards)))
    if not form.startswith("jsonl"):
        assert plan.num_rows == len(rows) == sum(shard.num_rows for shard in plan.shards)
        assert all(0 < shard.num_rows <= shard_rows for shard in plan.shards)
        assert all(row.identity.rpartition("#")[0].endswith(f".{form}") for row in rows)


@pytest.mark.parametrize("form", FORMS)
def test_the_digest_follows_the_data_and_not_the_place(tmp_path, form):
    write_files(tmp_path, form, [["a", "b", "c"], ["d"]])
    one = tmp_path / "one"
    two = tmp_path / "other" / "two"
    for folder in (one, two):
        folder.mkdir(parents=True)
        for path in tmp_path.glob(f"*.{form}"):
            shutil.copy(path, folder)
    plan = plan_shards(one, shard_rows=2)
    assert plan_shards(two, shard_rows=2).digest == plan.digest
    assert plan_shards(f"{one}/*.{form}", shard_rows=2).digest == plan.digest
    assert (plan_shards(one, shard_rows=1).digest == plan.digest) == (form == "jsonl.gz"), "one shard a file"
    (two / f"0.{form}").rename(two / f"00.{form}")
    assert plan_shards(two, shard_rows=2).digest != plan.digest
    write_files(one, form, [["a", "b", "c", "x"], ["d"]])
    assert plan_shards(one, shard_rows=2).digest != plan.digest


@pytest.mark.parametrize("form", [form for form in FORMS if form != "jsonl.gz"])
def test_empty_files_and_empty_datasets(tmp_path, form):
    write_files(tmp_path, form, [[], ["a"]])
    (tmp_path / f"2.{form}").write_bytes(b"")
    plan = plan_shards(tmp_path)
    assert [item.name for shard in plan.shards for item in shard.slices] == [f"1.{form}"]
    empty = plan_shards(tmp_path / f"2.{form}")
    assert (empty.shards, empty.columns, empty.num_bytes) == ((), (), 0)
    assert plan_shards(tmp_path / f"0.{form}").shards == ()


def test_a_compressed_file_of_nothing_is_a_shard_without_rows(tmp_path):
    write_files(tmp_path, "jsonl.gz", [[]])
    (shard,) = plan_shards(tmp_path).shards
    assert list(iter_rows(shard, read_shard(shard))) == []


def test_a_file_of_blank_lines_is_a_shard_without_rows(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n\n \n")
    (shard,) = plan_shards(tmp_path).shards
    assert list(iter_rows(shard, read_shard(shard))) == []


@pytest.mark.parametrize("form", FORMS)
def test_a_file_that_changed_since_planning_is_refused(tmp_path, form):
    write_files(tmp_path, form, [["a", "b", "c"]])
    (shard,) = plan_shards(tmp_path).shards
    write_files(tmp_path, form, [["a", "b", "c", "d" * 100]])
    with pytest.raises(DatasetError, match=rf"0\.{form} has \d+ bytes now"):
        read_shard(shard)
    (tmp_path / f"0.{form}").unlink()
    with pytest.raises(DatasetError, match=rf"0\.{form} cannot be read"):
        read_shard(shard)


def test_columns_are_read_as_asked(tmp_path):
    table = pa.table({"a.b": [1, 2], "a": ["x", "y"], "c": [1.0, 2.0]})
    pq.write_table(table, tmp_path / "x.parquet")
    (tmp_path / "x.csv").write_text("q,r\n1,2\n3,4\n")
    (shard,) = plan_shards(tmp_path / "x.parquet").shards
    assert read_shard(shard, ["c", "a", "absent"]).to_pydict() == {"c": [1.0, 2.0], "a": ["x", "y"]}
    assert read_shard(shard, []).num_rows == 2
    assert read_shard(shard).equals(table)
    (shard,) = plan_shards(tmp_path / "x.csv").shards
    assert read_shard(shard, ["r"]).to_pydict() == {"r": ["2", "4"]}
    assert read_shard(shard, ["absent"]).num_rows == 2


def test_a_shard_travels_as_json(tmp_path):
    (tmp_path / "year=2024" / "kind=%C3%A4").mkdir(parents=True)
    write_files(tmp_path / "year=2024" / "kind=%C3%A4", "jsonl.gz", [["ä"]])
    (shard,) = plan_shards(tmp_path).shards
    assert shard.slices[0].partition == (("year", 2024), ("kind", "ä"))
    assert Shard.from_json(shard.to_json()) == shard
    for text in ("{", "[]", '{"index": 0}', '{"index": 0, "format": "csv", "slices": [{"path": "x"}]}'):
        with pytest.raises(DatasetError, match="not a shard"):
            Shard.from_json(text)


def slices_of(dataset, **options):
    """Name, start and stop of every slice, shard by shard."""
    plan = plan_shards(dataset, **options)
    return [[(item.name[0], item.start, item.stop) for item in shard.slices] for shard in plan.shards]


@pytest.mark.parametrize("form", ["parquet", "csv", "arrow"])
def test_small_files_are_put_together_and_large_ones_cut(tmp_path, form):
    counts = [3, 4, 4, 0, 2, 25, 1, 10, 1]
    write_files(tmp_path, form, [[f"{n}.{row}" for row in range(count)] for n, count in enumerate(counts)])
    assert slices_of(tmp_path, shard_rows=10) == [
        [("0", 0, 3), ("1", 0, 4)],
        [("2", 0, 4), ("4", 0, 2)],
        [("5", 0, 10)],
        [("5", 10, 20)],
        [("5", 20, 25)],
        [("6", 0, 1)],
        [("7", 0, 10)],
        [("8", 0, 1)],
    ]


def test_small_files_of_lines_are_put_together_by_their_bytes(tmp_path):
    line = '{"q": "x"}\n'
    for n, count in enumerate([2, 2, 2, 9, 1, 1]):
        (tmp_path / f"{n}.jsonl").write_text(line * count)
    size = len(line)
    assert slices_of(tmp_path, shard_rows=5) == [
        [("0", 0, 2 * size), ("1", 0, 2 * size)],
        [("2", 0, 2 * size)],
        [("3", 0, 5 * size)],
        [("3", 5 * size, 9 * size)],
        [("4", 0, size), ("5", 0, size)],
    ]


def test_compressed_files_count_as_what_they_unpack_to(tmp_path):
    for n, count in enumerate([2, 2, 2, 100_000, 1]):
        (tmp_path / f"{n}.jsonl.gz").write_bytes(gzip.compress(b'{"q": "x"}\n' * count))
    assert [[name for name, _, _ in shard] for shard in slices_of(tmp_path, shard_rows=5)] == [
        ["0", "1"],
        ["2"],
        ["3"],
        ["4"],
    ]


def test_files_whose_columns_differ_are_not_put_together(tmp_path):
    tables = [{"q": ["a"]}, {"q": ["b"]}, {"q": [1]}, {"q": [2], "r": [3]}, {"r": [4], "q": [5]}]
    for n, columns in enumerate(tables):
        pq.write_table(pa.table(columns), tmp_path / f"{n}.parquet")
    assert [[name for name, _, _ in shard] for shard in slices_of(tmp_path)] == [["0", "1"], ["2"], ["3"], ["4"]]


def test_files_put_together_keep_what_differs_in_other_ways(tmp_path):
    kinds = [pa.field("q", pa.string(), nullable=False), pa.field("q", pa.string(), metadata={"a": "b"})]
    for n, kind in enumerate(kinds):
        column = pa.DictionaryArray.from_arrays([0, 1], [f"a{n}", f"b{n}"])
        table = pa.table([pa.array(["x", "y"]), column], schema=pa.schema([kind, ("d", column.type)]))
        folder = tmp_path / (f"p={n}" if n else "p=__HIVE_DEFAULT_PARTITION__")
        folder.mkdir()
        pq.write_table(table, folder / "x.parquet")
    (shard,) = plan_shards(tmp_path).shards
    rows = list(iter_rows(shard, read_shard(shard)))
    assert [(row.values["d"], row.values["p"]) for row in rows] == [("a1", 1), ("b1", 1), ("a0", None), ("b0", None)]
    assert [row.identity for row in rows] == [
        *("p=1/x.parquet#0", "p=1/x.parquet#1"),
        *("p=__HIVE_DEFAULT_PARTITION__/x.parquet#0", "p=__HIVE_DEFAULT_PARTITION__/x.parquet#1"),
    ]


def test_a_shard_has_a_bounded_number_of_files(tmp_path):
    for n in range(600):
        (tmp_path / f"{n:03d}.jsonl").write_text("{}\n")
    assert [len(shard.slices) for shard in plan_shards(tmp_path, shard_rows=1_000).shards] == [256, 256, 88]


def test_a_plan_of_absurdly_many_shards_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n" * (2 * MAX_SLICES))
    with pytest.raises(DatasetError, match=f"at most {MAX_SLICES}") as caught:
        plan_shards(tmp_path, shard_rows=1)
    assert "shard_rows" in caught.value.hint


@pytest.mark.parametrize("shard_rows", [0, -1, True, 2.5, "3"])
def test_shard_rows_is_a_whole_number(tmp_path, shard_rows):
    with pytest.raises(ConfigError, match="shard_rows"):
        plan_shards(tmp_path, shard_rows=shard_rows)


def test_a_json_array_is_not_json_lines(tmp_path):
    (tmp_path / "a.json").write_text('\n[{"a": 1}]')
    with pytest.raises(DatasetError, match=r"a\.json is one JSON array"):
        plan_shards(tmp_path)


GOOD_CSV = {
    'q\n"x\ny"\n"say ""hi"""\n': ["x\ny", 'say "hi"'],
    "q\r\na\r\nb": ["a", "b"],
    "\ufeffq\n1.50\n": ["1.50"],
    "q\n007\nNA\nnull\n": ["007", "NA", "null"],
    "q": [],
    'q\n""\nx\n': [None, "x"],
}


@pytest.mark.parametrize(("text", "values"), GOOD_CSV.items(), ids=range(len(GOOD_CSV)))
def test_csv_is_read_as_text(tmp_path, text, values):
    (tmp_path / "a.csv").write_bytes(text.encode())
    plan = plan_shards(tmp_path, shard_rows=1)
    assert plan.columns == ("q",)
    assert [row.values["q"] for shard in plan.shards for row in iter_rows(shard, read_shard(shard))] == values


def test_a_quoted_line_feed_at_the_edge_of_a_block_does_not_end_a_record(tmp_path):
    value = "nine chars\n" * 1_000
    num_records = 2 * BLOCK_BYTES // len(value)
    (tmp_path / "a.csv").write_text("q\n" + f'"{value}"\n' * num_records)
    plan = plan_shards(tmp_path, shard_rows=num_records - 1)
    assert plan.num_rows == num_records
    assert read_shard(plan.shards[1])["q"].to_pylist() == [value]


def test_a_record_larger_than_a_block_is_refused_with_the_limit(tmp_path):
    (tmp_path / "a.csv").write_text("q\n1\n" + f'"{"x" * (2 * BLOCK_BYTES + 1)}"\n' + "2\n")
    with pytest.raises(DatasetError, match=r"a\.csv is not valid CSV") as caught:
        plan_shards(tmp_path)
    assert "16 MiB" in caught.value.hint


BAD_CSV = {
    b"a,b\n1,2\n3\n": "Expected 2 columns",
    b"a,b\n" + b"1,2\n" * 500_000 + b"1,2,3\n": "Expected 2 columns",
    b"a\n\xff\n": "UTF8",
    b"\xff\xfea\n": "is not valid CSV",
    b"a,a\n1,2\n": "two columns of one name",
    b'a\n"never closed\n1\n2\n': "odd number of quotes",
    b'a,b\n1,"x"\n2,5" pipe\n': "odd number of quotes",
    b'"never closed\n1\n': "is not valid CSV",
}


@pytest.mark.parametrize(("content", "message"), BAD_CSV.items(), ids=range(len(BAD_CSV)))
def test_bad_csv_is_refused_before_any_work(tmp_path, content, message):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DatasetError, match=message) as caught:
        plan_shards(tmp_path)
    assert "a.csv" in caught.value.message
