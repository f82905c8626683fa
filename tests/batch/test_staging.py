"""Data in memory becomes files that are planned and read back as the same rows."""

from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.batch.rows import iter_rows
from pipeline.batch.source import plan_shards, read_shard
from pipeline.batch.staging import hugging_face_tables, is_hugging_face, stage_in_memory, stage_tables
from pipeline.errors import DatasetError


def rows_of(dataset, **options):
    plan = plan_shards(dataset, **options)
    return [row.values for shard in plan.shards for row in iter_rows(shard, read_shard(shard))]


def test_prompts_and_rows(tmp_path):
    path = stage_in_memory(["one", {"prompt": "zwei", "n": 2}, {"prompt": None}], str(tmp_path))
    assert rows_of(path) == [{"prompt": "one"}, {"prompt": "zwei", "n": 2}, {"prompt": None}]
    assert Path(path).name.startswith("rows-")
    assert Path(path).suffix == ".jsonl"


def test_the_same_data_is_the_same_file(tmp_path):
    first = stage_in_memory(["a"], str(tmp_path))
    assert stage_in_memory([{"prompt": "a"}], str(tmp_path)) == first
    assert stage_in_memory(["b"], str(tmp_path)) != first
    assert len(list(tmp_path.glob("rows-*"))) == 2


def test_no_rows(tmp_path):
    assert rows_of(stage_in_memory([], str(tmp_path))) == []
    assert rows_of(stage_in_memory(pd.DataFrame({"q": []}), str(tmp_path))) == []
    assert rows_of(stage_tables([], str(tmp_path))) == []


def test_a_data_frame(tmp_path):
    frame = pd.DataFrame({"q": ["a", None], "n": [1, 2], "c": pd.Categorical(["u", "v"])}, index=[7, 8])
    path = stage_in_memory(frame, str(tmp_path))
    assert rows_of(path) == [{"q": "a", "n": 1, "c": "u"}, {"q": None, "n": 2, "c": "v"}]
    assert path == stage_in_memory(frame.copy(), str(tmp_path))
    assert path.endswith(".parquet")


circle: list = []
circle.append([circle, circle])
BAD = {
    "number": ([1], "item 0 of the dataset is a int"),
    "none": (["a", None], "item 1 of the dataset is a NoneType"),
    "date": (["a", {"x": {"y": [datetime(2024, 1, 1)]}}], "item 1", "['x']['y'][0]  a datetime"),
    "nan": ([{"x": float("nan")}], "item 0", "['x']  nan"),
    "key": ([{1: 2}], "item 0", "the row  the key 1 is a int"),
    "numpy": ([{"x": np.int64(1)}], "item 0", "['x']  a int64"),
    "bytes": ([{"x": b"y"}], "item 0", "['x']  a bytes"),
    "surrogate": (["\ud800"], "item 0", "['prompt']  half a surrogate pair"),
    "circle": ([{"x": circle}], "item 0", "nested more than 64 levels"),
    "huge": ([{"x": 10**5000}], "item 0", "['x']  a number of"),
    "dict": ({"prompt": ["a"]}, "the dataset is a dict"),
    "generator": ((text for text in "ab"), "the dataset is a generator"),
    "mixed frame": (pd.DataFrame({"x": [1, "a"]}), "does not become a table"),
    "number as name": (pd.DataFrame({1: [1]}), "column names that are not text"),
    "twice": (pd.DataFrame([[1, 2]], columns=["a", "a"]), "two columns of one name"),
    "period": (pd.DataFrame({"x": pd.period_range("2024", periods=1)}), "not supported"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_staged_says_where(tmp_path, case):
    dataset, message, *detail = BAD[case]
    with pytest.raises(DatasetError) as caught:
        stage_in_memory(dataset, str(tmp_path / "folder"))
    assert message in caught.value.message
    for text in detail:
        assert text in caught.value.details[0]
    assert not (tmp_path / "folder").exists()


def test_a_stream_of_tables_becomes_files_of_bounded_size(tmp_path):
    tables = [pa.table({"q": [f"{n} {i}" * 20 for i in range(100)]}) for n in range(10)]
    paths = stage_tables(iter(tables), str(tmp_path), file_bytes=20_000)
    assert 3 < len(paths) < 15
    assert [Path(path).name[:11] for path in paths] == [f"table-{index:05d}" for index in range(len(paths))]
    assert [row["q"] for row in rows_of(paths)] == [value for table in tables for value in table["q"].to_pylist()]
    assert stage_tables(iter(tables), str(tmp_path), file_bytes=20_000) == paths


def test_one_large_table_is_cut(tmp_path):
    big = pa.table({"n": range(10_000)})
    paths = stage_tables([big], str(tmp_path), file_bytes=8_000)
    assert len(paths) == 10
    assert [row["n"] for row in rows_of(paths)] == list(range(10_000))


def test_tables_may_change_their_columns(tmp_path):
    tables = [pa.table({"q": ["a"]}), pa.table({"q": ["b"], "n": [1]}), pa.table({"q": ["c"]}).slice(0, 0)]
    paths = stage_tables(tables, str(tmp_path))
    assert rows_of(paths) == [{"q": "a"}, {"q": "b", "n": 1}]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(st.lists(st.text() | st.dictionaries(st.text(), json_values, max_size=3), max_size=6), st.integers(1, 5))
@settings(deadline=None, max_examples=60)
def test_any_rows_come_back(tmp_path_factory, dataset, shard_rows):
    path = stage_in_memory(dataset, str(tmp_path_factory.mktemp("staged")))
    assert rows_of(path, shard_rows=shard_rows) == [
        {"prompt": item} if isinstance(item, str) else item for item in dataset
    ]


class TestHuggingFace:
    """Their `datasets`, where it is installed; it is none of our dependencies."""

    @pytest.fixture
    def datasets(self):
        return pytest.importorskip("datasets")

    def test_rows_come_in_the_datasets_order(self, datasets, tmp_path):
        dataset = datasets.Dataset.from_dict({"q": [f"{n}" for n in range(3000)], "n": list(range(3000))})
        chosen = dataset.select(range(2999, -1, -1)).filter(lambda row: row["n"] % 2 == 0)
        paths = stage_tables(hugging_face_tables(chosen), str(tmp_path))
        assert rows_of(paths) == [{"q": f"{n}", "n": n} for n in range(2998, -1, -2)]
        assert stage_tables(hugging_face_tables(chosen), str(tmp_path)) == paths
        assert is_hugging_face(chosen)

    def test_a_stream_is_read_as_well(self, datasets, tmp_path):
        dataset = datasets.Dataset.from_dict({"q": ["a", "b"]}).to_iterable_dataset()
        assert rows_of(stage_tables(hugging_face_tables(dataset), str(tmp_path))) == [{"q": "a"}, {"q": "b"}]

    def test_several_splits_are_refused(self, datasets):
        splits = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"q": ["a"]})})
        with pytest.raises(DatasetError, match="is a DatasetDict") as caught:
            list(hugging_face_tables(splits))
        assert caught.value.details == ("it has  'train'",)


def test_what_is_not_of_hugging_face_is_not_taken_for_it():
    assert not any(is_hugging_face(value) for value in ([], pd.DataFrame(), "datasets", pa.table({})))
