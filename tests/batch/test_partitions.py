"""Hive partitions: what directories say is a column, whatever the format, and never beside one of the files'."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.batch.partitions import read_partitions
from pipeline.batch.parts import AnsweredRow, encode_part, plan_part_format
from pipeline.batch.rows import iter_rows
from pipeline.batch.source import plan_shards, read_shard
from pipeline.engine.types import Completion
from pipeline.errors import DatasetError
from tests.batch.test_source_plan import FORMS, write_files


def rows_of(dataset, **options):
    plan = plan_shards(dataset, **options)
    return [row for shard in plan.shards for row in iter_rows(shard, read_shard(shard))]


@pytest.mark.parametrize(
    ("paths", "columns"),
    [
        (["x"], {}),
        (["a=1/x", "a=2/x"], {"a": [1, 2]}),
        (["a=1/x", "a=b/x"], {"a": ["1", "b"]}),
        (["a=01/x", "a=2/x"], {"a": ["01", "2"]}),
        (["a=-5/x", "a=0/x"], {"a": [-5, 0]}),
        (["a=9223372036854775807/x"], {"a": [2**63 - 1]}),
        (["a=9223372036854775808/x"], {"a": ["9223372036854775808"]}),
        (["a=1/b=x/f", "a=2/b=y/f"], {"a": [1, 2], "b": ["x", "y"]}),
        (["a=1/x", "y"], {"a": [1, None]}),
        (["a=__HIVE_DEFAULT_PARTITION__/x", "a=3/x"], {"a": [None, 3]}),
        (["a=__HIVE_DEFAULT_PARTITION__/x"], {"a": [None]}),
        (["a=x%2Fy/f", "a=%C3%A4/f"], {"a": ["x/y", "ä"]}),
        (["a%20b=1=2/f"], {"a b": ["1=2"]}),
        (["a=/f"], {"a": [""]}),
        (["=1/f", "plain/f", "x=1"], {}),
        (["a=٣/f"], {"a": ["٣"]}),
    ],
)
def test_directories_become_columns(paths, columns):
    found = read_partitions(paths)
    assert {name: [dict(values)[name] for values in found.of_files] for name in found.schema.names} == columns
    is_number = {name: any(isinstance(value, int) for value in values) for name, values in columns.items()}
    assert [field.type for field in found.schema] == [
        pa.int64() if is_number[name] else pa.string() for name in columns
    ]


@pytest.mark.parametrize("path", ["a=1/a=2/x", "a=1/b=2/%61=3/x"])
def test_a_column_named_twice_in_a_path_is_refused(path):
    with pytest.raises(DatasetError, match="names the column 'a' twice"):
        read_partitions([path])


def test_a_name_that_is_not_utf8_is_refused():
    with pytest.raises(DatasetError, match="not UTF-8") as caught:
        read_partitions(["a=%FF/x"])
    assert "hive_partitions" in caught.value.hint


@pytest.fixture
def folder(tmp_path):
    def write(form):
        for year, values in (("2023", ["a", "b", "c"]), ("2024", ["d"])):
            inner = tmp_path / "data" / f"year={year}" / "lang=de%20AT"
            inner.mkdir(parents=True)
            write_files(inner, form, [values])
        return tmp_path / "data"

    return write


@pytest.mark.parametrize("form", FORMS)
def test_rows_carry_what_their_directories_say(folder, form):
    data = folder(form)
    plan = plan_shards(data, shard_rows=2)
    own = ("n", "q") if form.startswith("csv") else ("q",)
    assert plan.columns == (*own, "year", "lang")
    assert [plan.schema.field(name).type for name in ("year", "lang")] == [pa.int64(), pa.string()]
    rows = rows_of(data, shard_rows=2)
    assert [(row.values["q"], row.values["year"], row.values["lang"]) for row in rows] == [
        *((value, 2023, "de AT") for value in "abc"),
        ("d", 2024, "de AT"),
    ]
    assert rows_of(f"{data}/year=*") == rows_of(data), "a glob's root is what stands before its first star"
    assert "year" not in plan_shards(data / "year=2024").columns, "the root's own name says nothing"
    assert [row.values for row in rows_of(data, hive_partitions=False)] == [
        {name: value for name, value in row.values.items() if name in own} for row in rows
    ]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_parts_hold_them(folder, form, kind):
    plan = plan_shards(folder(form))
    plan_format = plan_part_format(plan, kind=kind)
    years = []
    for shard in plan.shards:
        table = read_shard(shard)
        answered = [AnsweredRow(row, Completion(row.identity, "text", "stop", 1, 1)) for row in iter_rows(shard, table)]
        data = encode_part(answered, plan_format, table)
        rows = (
            pq.read_table(io.BytesIO(data)).to_pylist()
            if kind == "parquet"
            else [json.loads(line) for line in data.splitlines()]
        )
        years += [(row["q"], row["year"], row["lang"], row["error"]) for row in rows]
    assert years == [
        ("a", 2023, "de AT", None),
        ("b", 2023, "de AT", None),
        ("c", 2023, "de AT", None),
        ("d", 2024, "de AT", None),
    ]


def test_only_the_columns_asked_for_are_added(folder):
    shard = plan_shards(folder("parquet"), shard_rows=3).shards[0]
    assert read_shard(shard, ["lang"]).to_pydict() == {"lang": ["de AT"] * 3}
    assert read_shard(shard, ["q"]).column_names == ["q"]


def test_a_renamed_directory_is_another_dataset(folder):
    data = folder("parquet")
    before = plan_shards(data).digest
    (data / "year=2024").rename(data / "year=2025")
    assert plan_shards(data).digest != before


@pytest.mark.parametrize("form", FORMS)
def test_a_column_of_directory_and_file_is_refused(tmp_path, form):
    (tmp_path / "q=1").mkdir()
    write_files(tmp_path / "q=1", form, [["a"]])
    with pytest.raises(DatasetError, match="columns of the same name") as caught:
        plan_shards(tmp_path)
    assert caught.value.details == ("column 'q'",)
    assert "hive_partitions: false" in caught.value.hint
    assert [row.values["q"] for row in rows_of(tmp_path, hive_partitions=False)] == ["a"]


def test_a_later_line_with_such_a_column_is_its_rows_failure(tmp_path):
    (tmp_path / "a=1").mkdir()
    lines = ['{"q": "x"}'] * 30_000 + ['{"q": "y", "a": 1}', '{"q": "z"}']
    (tmp_path / "a=1" / "x.jsonl").write_text("\n".join(lines))
    *_, bad, last = rows_of(tmp_path)
    assert bad.failure.code == "invalid_row"
    assert "column 'a', which its directory has as well" in bad.failure.message
    assert last.values == {"q": "z", "a": 1}
