"""`run_batch` on a real Ray: every kind of dataset, every row answered once, in order, and never twice."""

import doctest
import gzip
import importlib
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import BatchResult, Expert, demo, run_batch
from pipeline.demo.scoring import exact_match
from pipeline.errors import (
    BaseModelError,
    ConfigError,
    DatasetError,
    FingerprintError,
    GrammarError,
    InvalidRequestError,
    OutputError,
    PackageNotFoundError,
)

pytestmark = pytest.mark.usefixtures("cluster")
OUR_COLUMNS = [
    *("text", "finish_reason", "prompt_tokens", "completion_tokens"),
    *("expert", "expert_sha256", "error"),
]


def answers(result: BatchResult) -> dict[str, str]:
    frame = result.to_pandas()
    return dict(zip(frame["id"], frame["text"], strict=True))


def test_every_row_is_answered_in_order(answered: BatchResult, questions: Path) -> None:
    asked = pq.read_table(questions).to_pandas()
    frame = answered.to_pandas()
    assert list(frame.columns) == [*asked.columns, *OUR_COLUMNS]
    for name in asked.columns:
        assert frame[name].tolist() == asked[name].tolist()
    right = [exact_match(text, wanted) for text, wanted in zip(frame["text"], frame["expected"], strict=True)]
    assert sum(right) >= 0.95 * len(asked)
    assert frame["error"].isna().all()
    assert set(frame["expert"]) == {"expert-sql@0.1.0"}


def test_the_answers_equal_those_of_expert(answered: BatchResult) -> None:
    frame = answered.to_pandas().head(20)
    items = [{"prompt": row["prompt"], "schema": row["schema"]} for _, row in frame.iterrows()]
    with Expert.load(demo.package("sql"), base_model=demo.BASE_MODEL, device="cpu") as expert:
        assert [result.text for result in expert.generate_batch(items)] == frame["text"].tolist()


def test_the_report_and_the_manifest_count_the_rows(answered: BatchResult, questions: Path) -> None:
    rows = pq.read_metadata(questions).num_rows
    report = answered.report
    assert (report.rows, report.errors, report.rows_this_run, report.shards) == (rows, 0, rows, 13)
    assert report.rows_per_second > 0
    assert report.completion_tokens == sum(answered.to_pandas()["completion_tokens"])
    assert set(report.seconds) == {"plan", "start", "run", "commit", "total"}
    folder = Path(answered.output)
    manifest = json.loads((folder / "_manifest.json").read_text())
    assert manifest["rows"] == rows
    assert [part["rows"] for part in manifest["parts"]] == [16] * 12 + [8]
    assert (folder / "_SUCCESS").exists()
    assert not (folder / "_attempts").exists()
    schemas = {str(pq.read_schema(part).remove_metadata()) for part in answered.parts}
    assert len(schemas) == 1


def test_the_dataset_is_a_ray_dataset_in_input_order(answered: BatchResult) -> None:
    rows = answered.dataset.take_all()
    assert [row["id"] for row in rows] == answered.to_pandas()["id"].tolist()


def test_a_finished_job_is_not_run_again(answered: BatchResult, job_options: dict[str, Any]) -> None:
    again = run_batch(**job_options, output=answered.output)
    assert again.report.already_complete
    assert again.report.rows_this_run == 0
    assert answers(again) == answers(answered)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"sampling": {"max_tokens": 5}}, "sampling"),
        ({"seed": 7}, "seed"),
        ({"shard_rows": 64}, "shard_rows"),
        ({"expert": demo.package("json")}, "expert"),
        ({"output_format": "jsonl"}, "output_format"),
    ],
)
def test_another_configuration_is_refused_by_field(
    answered: BatchResult, job_options: dict[str, Any], change: dict[str, Any], field: str
) -> None:
    with pytest.raises(FingerprintError) as caught:
        run_batch(**{**job_options, **change}, output=answered.output)
    assert any(detail.startswith(f"{field}: ") for detail in caught.value.details)


def test_parts_that_are_gone_are_made_again_and_only_those(
    answered: BatchResult, copied: Path, job_options: dict[str, Any]
) -> None:
    for name in ("_SUCCESS", "_manifest.json", "part-00002.parquet", "_commits/00002.json", "_commits/00004.json"):
        (copied / name).unlink()
    again = run_batch(**job_options, output=copied)
    assert again.report.rows_this_run == 16, "shard 2 lost its part; shard 4 only its receipt, which is made from it"
    for path in map(Path, again.parts):
        assert path.read_bytes() == Path(answered.output, path.name).read_bytes()


def test_draws_do_not_depend_on_shards_or_workers(
    answered: BatchResult, job_options: dict[str, Any], questions: Path, tmp_path: Path
) -> None:
    pq.write_table(pq.read_table(questions).slice(0, 60), tmp_path / "rows.parquet")
    options = {
        **job_options,
        "dataset": str(tmp_path / "rows.parquet"),
        "sampling": {"temperature": 3.0, "use_grammar": False, "max_tokens": 12},
        "seed": 5,
    }
    few = run_batch(**{**options, "shard_rows": 60}, output=tmp_path / "few")
    many = run_batch(**{**options, "shard_rows": 7, "num_workers": 2, "batch_size": 5}, output=tmp_path / "many")
    assert answers(few) == answers(many)
    drawn, chosen = answers(few).values(), answers(answered).values()
    assert sum(one != other for one, other in zip(drawn, chosen, strict=False)) > 50


def test_a_list_of_prompts_and_no_output(job_options: dict[str, Any]) -> None:
    options = {name: value for name, value in job_options.items() if name != "dataset"}
    result = run_batch(["List the name of all users.", "Count the cars for each color."], **options)
    assert result.to_pandas()["prompt"].tolist() == ["List the name of all users.", "Count the cars for each color."]
    assert result.report.rows == 2


def test_a_frame_whose_rows_bring_their_own_options(
    answered: BatchResult, job_options: dict[str, Any], questions: Path, tmp_path: Path
) -> None:
    frame = pq.read_table(questions).to_pandas().head(20)
    frame["limit"] = [1, *[100] * 17, 2, -1]
    options = {**job_options, "columns": {"sampling": {"max_tokens": "limit"}}, "output": tmp_path / "out"}
    del options["dataset"]
    found = run_batch(frame, **options).to_pandas()
    assert found["text"].tolist()[1:18] == answered.to_pandas()["text"].tolist()[1:18]
    assert found["completion_tokens"].tolist()[0] == 1
    assert found["completion_tokens"].tolist()[18] == 2
    assert found["error"][19]["code"] == InvalidRequestError.code
    assert run_batch(frame, **options).report.already_complete


def test_a_dataset_of_rays(answered: BatchResult, job_options: dict[str, Any], questions: Path, tmp_path: Path) -> None:
    import ray.data

    dataset = ray.data.from_pandas(pq.read_table(questions).to_pandas().head(40))
    options = {name: value for name, value in job_options.items() if name != "dataset"}
    result = run_batch(dataset, **options, output=tmp_path / "out")
    assert result.to_pandas()["text"].tolist() == answered.to_pandas()["text"].head(40).tolist()
    assert run_batch(dataset, **options, output=tmp_path / "out").report.already_complete


def test_compressed_csv_in_hive_directories_by_a_template_under_other_names(
    answered: BatchResult, job_options: dict[str, Any], questions: Path, tmp_path: Path
) -> None:
    frame = pq.read_table(questions).to_pandas().head(6)
    rows = frame.rename(columns={"prompt": "question", "schema": "ddl", "id": "text"})
    for year, some in (("2023", rows[:4]), ("2024", pd.concat([rows[4:], rows[:1].assign(question=None)]))):
        folder = tmp_path / "data" / f"year={year}"
        folder.mkdir(parents=True)
        (folder / "rows.csv.gz").write_bytes(gzip.compress(some.to_csv(index=False).encode()))
    options = {
        **job_options,
        "dataset": str(tmp_path / "data"),
        "columns": {"schema": "ddl", "id": "text"},
        "output": tmp_path / "out",
    }
    with pytest.raises(DatasetError, match="names of output columns"):
        run_batch(**options, prompt_template="{question}")
    options["output_prefix"] = "answer_"
    found = run_batch(**options, prompt_template="{question}").to_pandas()
    assert found["answer_text"].tolist()[:6] == answered.to_pandas()["text"].tolist()[:6]
    assert found["year"].tolist() == [2023] * 4 + [2024] * 3
    assert found["answer_error"][6]["code"] == InvalidRequestError.code
    assert "'question'" in found["answer_error"][6]["message"]
    with pytest.raises(FingerprintError) as caught:
        run_batch(**options, prompt_template="Q: {question}")
    assert caught.value.details == ('prompt_template: there "{question}", now "Q: {question}"',)


def test_an_empty_dataset_is_a_finished_job(job_options: dict[str, Any], tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    result = run_batch(**{**job_options, "dataset": str(tmp_path / "empty.parquet")}, output=tmp_path / "out")
    assert result.report.rows == 0
    assert (tmp_path / "out" / "_SUCCESS").exists()
    assert isinstance(result.to_pandas(), pd.DataFrame)
    assert result.dataset.count() == 0


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        ({"dataset": "nowhere/*.parquet"}, DatasetError, "nowhere"),
        ({"expert": "nowhere.expert"}, PackageNotFoundError, "nowhere"),
        ({"base_model": "nowhere"}, BaseModelError, "nowhere"),
        ({"batch_sise": 3}, ConfigError, "batch_size"),
        ({"num_workers": 0}, ConfigError, "num_workers"),
        ({"columns": {"prompt": "promt"}}, DatasetError, "promt"),
        ({"expert": demo.package("json"), "sampling": {"use_grammar": True}}, GrammarError, "no grammar"),
        ({"output": "ftp://example/out"}, OutputError, "ftp"),
    ],
)
def test_a_mistake_is_told_before_anything_runs(
    job_options: dict[str, Any], tmp_path: Path, change: dict[str, Any], kind: type[Exception], says: str
) -> None:
    with pytest.raises(kind, match=says):
        run_batch(**{**job_options, "output": tmp_path / "out", **change})
    assert not list(tmp_path.glob("out/part-*"))


def test_foreign_and_nested_outputs_are_refused(job_options: dict[str, Any], questions: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="not the output of a job"):
        run_batch(**job_options, output=tmp_path)
    with pytest.raises(ConfigError, match="inside the dataset"):
        run_batch(**{**job_options, "dataset": str(questions.parent)}, output=questions.parent / "answers")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt"]


def test_the_example_of_its_docstring() -> None:
    tried = doctest.testmod(importlib.import_module("pipeline.batch.run"))
    assert tried.attempted > 0
    assert tried.failed == 0
