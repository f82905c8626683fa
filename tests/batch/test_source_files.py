"""What a dataset names: which files, in which order, under which names."""

import os
import shutil

import fsspec
import pytest

from pipeline.batch.files import file_format, find_files, format_of
from pipeline.batch.source import plan_shards
from pipeline.errors import ConfigError, DatasetError, MissingDependencyError


@pytest.fixture
def folder(tmp_path):
    for name in (
        "b.jsonl",
        "a.jsonl",
        "deep/er/c.jsonl",
        "_logs/x.jsonl",
        ".hidden.jsonl",
        "deep/_SUCCESS",
        "_meta.jsonl",
    ):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"a": 1}\n')
    return tmp_path / "data"


def names(dataset):
    return [file.name for file in find_files(dataset)]


def test_a_directory_gives_its_visible_files_at_any_depth_in_order(folder):
    assert names(folder) == names(str(folder) + "/") == ["a.jsonl", "b.jsonl", "deep/er/c.jsonl"]


def test_a_glob_a_file_and_a_list(folder):
    assert names(f"{folder}/*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert names(f"{folder}/**/*.jsonl") == ["a.jsonl", "b.jsonl", "deep/er/c.jsonl"]
    assert names(f"{folder}/d*") == ["deep/er/c.jsonl"]
    assert names(f"{folder}/_m*.jsonl") == ["_meta.jsonl"]
    assert names(folder / "_meta.jsonl") == ["_meta.jsonl"]
    assert names([folder / "b.jsonl", folder / "a.jsonl", folder / "b.jsonl"]) == ["a.jsonl", "b.jsonl"]
    assert names([folder / "b.jsonl", folder / "deep"]) == ["b.jsonl", "deep/er/c.jsonl"]


def test_equal_names_in_two_directories_stay_apart(folder):
    (folder / "one").mkdir()
    (folder / "two").mkdir()
    for parent in ("one", "two"):
        shutil.copy(folder / "a.jsonl", folder / parent / "part.jsonl")
    assert names([folder / "two", folder / "one"]) == ["one/part.jsonl", "two/part.jsonl"]


def test_a_path_with_glob_characters_that_exists_is_a_path(folder):
    (folder / "what[1]?.jsonl").write_text("{}\n")
    assert names(f"{folder}/what[1]?.jsonl") == ["what[1]?.jsonl"]


def test_relative_paths_and_urls(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    (file,) = find_files("data/a.jsonl")
    assert file.path == str(folder / "a.jsonl")
    assert find_files(f"file://{folder}/a.jsonl") == [file]
    with fsspec.open("memory://bucket/in/x.jsonl", "wb") as remote:
        remote.write(b"{}\n")
    (file,) = find_files("memory://bucket/in")
    assert (file.name, file.size) == ("x.jsonl", 3)
    plan = plan_shards("memory://bucket/in/*.jsonl")
    assert plan.shards[0].paths[0].startswith("memory://")


def test_links_are_followed_but_never_in_circles(folder):
    (folder / "link.jsonl").symlink_to(folder / "a.jsonl")
    (folder / "deep" / "back").symlink_to(folder)
    (folder / "other").symlink_to(folder / "deep" / "er")
    assert names(folder) == ["a.jsonl", "b.jsonl", "deep/er/c.jsonl", "link.jsonl", "other/c.jsonl"]


def test_a_pipe_is_refused(folder):
    os.mkfifo(folder / "pipe.jsonl")
    with pytest.raises(DatasetError, match=r"pipe\.jsonl is not a regular file"):
        find_files(folder)


def test_a_broken_link_is_refused(folder):
    (folder / "gone.jsonl").symlink_to(folder / "nowhere")
    with pytest.raises(DatasetError, match=r"cannot be listed.*gone\.jsonl"):
        find_files(folder)


def test_a_name_that_is_not_utf8_is_refused(folder):
    (folder / os.fsdecode(b"\xff.jsonl")).write_text("{}")
    with pytest.raises(DatasetError, match="not UTF-8"):
        find_files(folder)


@pytest.mark.parametrize("name", ["data/aa.jsonl", "data/x*.jsonl", "nowhere/a.jsonl"])
def test_nothing_there_says_what_was_looked_for_and_what_is_near(folder, name):
    with pytest.raises(DatasetError) as caught:
        find_files(f"{folder.parent}/{name}")
    assert f"{folder.parent}/{name}" in caught.value.message
    assert caught.value.details


def test_a_near_miss_is_named(folder):
    with pytest.raises(DatasetError) as caught:
        find_files(folder / "aa.jsonl")
    assert "beside it  a.jsonl" in caught.value.details


def test_files_of_the_same_kind_are_named_where_nothing_is_alike(tmp_path):
    for name in ("answers", "model", "out", "questions-2000.parquet", ".q.parquet"):
        (tmp_path / name).touch()
    with pytest.raises(DatasetError) as caught:
        find_files(tmp_path / "input.parquet")
    assert caught.value.details == ("beside it  questions-2000.parquet",)


def test_a_directory_without_data_files(tmp_path):
    (tmp_path / "_SUCCESS").touch()
    with pytest.raises(DatasetError, match="holds no data files") as caught:
        find_files(tmp_path)
    assert "left out, for its first character  " in caught.value.details[0]


def test_what_cannot_be_opened():
    with pytest.raises(DatasetError, match="empty list"):
        find_files([])
    with pytest.raises(DatasetError, match="Protocol not known"):
        find_files("nosuch://bucket/x.jsonl")
    with pytest.raises(DatasetError, match="chained"):
        find_files("zip://x.jsonl::/tmp/a.zip")


@pytest.mark.usefixtures("without_gcsfs")
def test_a_file_system_whose_package_is_missing():
    with pytest.raises(MissingDependencyError, match="gs://") as caught:
        find_files("gs://bucket/x.jsonl")
    assert "gcsfs" in caught.value.hint


def test_two_file_systems_are_refused(folder):
    with fsspec.open("memory://mixed/x.jsonl", "wb") as remote:
        remote.write(b"{}\n")
    with pytest.raises(DatasetError, match="several file systems"):
        find_files([folder, "memory://mixed/x.jsonl"])


def test_the_format_is_told_by_the_extension_or_given(tmp_path):
    for name in ("a.PARQUET", "b.ndjson", "c.csv", "d.txt", "e.json"):
        (tmp_path / name).touch()
    formats = {name: file_format(find_files(tmp_path / name), None) for name in ("a.PARQUET", "b.ndjson", "c.csv")}
    assert formats == {"a.PARQUET": "parquet", "b.ndjson": "jsonl", "c.csv": "csv"}
    assert [format_of(name) for name in ("a.json.gz", "b.CSV.ZST", "c.feather", "d.arrow")] == [
        *("jsonl", "csv", "arrow", "arrow")
    ]
    assert [format_of(name) for name in ("a.parquet.gz", "b.arrow.zst", "c.jsonl.bz2", "d.gz", "e")] == [None] * 5
    assert file_format(find_files(tmp_path / "d.txt"), "csv") == "csv"
    with pytest.raises(DatasetError, match="extension") as caught:
        file_format(find_files(tmp_path), None)
    assert caught.value.details == ("d.txt",)
    with pytest.raises(DatasetError, match="mixes formats") as caught:
        file_format(find_files(f"{tmp_path}/[abc]*"), None)
    assert caught.value.details == ("csv  c.csv", "jsonl  b.ndjson", "parquet  a.PARQUET")
    with pytest.raises(ConfigError, match="format is 'avro'"):
        file_format(find_files(tmp_path), "avro")
