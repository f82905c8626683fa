"""`run_batch` on a real Ray: every kind of dataset, every row answered once, in order, and never twice."""

import gzip
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
    JobFailedError,
    OutputError,
    PackageNotFoundError,
    PromptTooLongError,
)

pytestmark = pytest.mark.usefixtures("cluster")
OUR_COLUMNS = [
    *("text", "finish_reason", "prompt_tokens", "completion_tokens"),
    *("expert", "expert_sha256", "error"),
]


@pytest.fixture(scope="module")
def answered(job_options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> BatchResult:
    return run_batch(**job_options, output=tmp_path_factory.mktemp("answers") / "out")


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
    assert (report.rows, report.errors, report.rows_this_run, report.shards) == (rows, 0, rows, 7)
    assert report.rows_per_second > 0
    assert report.completion_tokens == sum(answered.to_pandas()["completion_tokens"])
    assert set(report.seconds) == {"plan", "start", "run", "commit", "total"}
    folder = Path(answered.output)
    manifest = json.loads((folder / "_manifest.json").read_text())
    assert manifest["rows"] == rows
    assert [part["rows"] for part in manifest["parts"]] == [32] * 6 + [8]
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
    answered: BatchResult, job_options: dict[str, Any], tmp_path: Path
) -> None:
    first = run_batch(**job_options, output=tmp_path / "out")
    before = {part: Path(part).read_bytes() for part in first.parts}
    folder = Path(first.output)
    for name in ("_SUCCESS", "_manifest.json", "part-00002.parquet", "_commits/00002.json", "_commits/00004.json"):
        (folder / name).unlink()
    again = run_batch(**job_options, output=tmp_path / "out")
    assert again.report.rows_this_run == 32, "shard 2 lost its part; shard 4 only its receipt, which is made from it"
    assert {part: Path(part).read_bytes() for part in again.parts} == before
    assert answers(again) == answers(answered)


def test_draws_do_not_depend_on_shards_or_workers(job_options: dict[str, Any], tmp_path: Path) -> None:
    options = {**job_options, "sampling": {"temperature": 3.0, "use_grammar": False, "max_tokens": 12}, "seed": 5}
    few = run_batch(**{**options, "shard_rows": 200}, output=tmp_path / "few")
    many = run_batch(**{**options, "shard_rows": 17, "num_workers": 2, "batch_size": 5}, output=tmp_path / "many")
    other = run_batch(**{**options, "shard_rows": 200, "seed": 6}, output=tmp_path / "other")
    assert answers(few) == answers(many)
    assert answers(few) != answers(other)


def test_bad_rows_become_error_rows_and_the_others_are_answered(job_options: dict[str, Any], tmp_path: Path) -> None:
    schema = "CREATE TABLE users (id INT, name TEXT, city TEXT);"
    good = {"prompt": "List the city of all users.", "schema": schema}
    rows: list[dict[str, Any]] = [
        {"id": 0, **good},
        {"id": 1, "prompt": None, "schema": schema},
        {"id": 2, "prompt": "users " * 3000, "schema": schema},
        {"id": 3, "prompt": 12, "schema": schema},
        {"id": 4, **good, "schema": 7},
        {"id": 5, "prompt": "   "},
        {"id": 6, **good},
    ]
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join([*lines[:6], "{not json", "[1, 2]", '{"prompt": "\\ud800"}', lines[6]]) + "\n")
    result = run_batch(**{**job_options, "dataset": str(path)}, output=tmp_path / "out")
    written = [json.loads(line) for part in result.parts for line in Path(part).read_text().splitlines()]
    codes = [row["error"] and row["error"]["code"] for row in written]
    invalid, too_long = InvalidRequestError.code, PromptTooLongError.code
    unreadable = "invalid_row"
    assert codes == [None, invalid, too_long, invalid, invalid, invalid, unreadable, unreadable, unreadable, None]
    assert written[0]["text"] == written[-1]["text"] == "SELECT city FROM users"
    assert [row.get("id") for row in written] == [0, 1, 2, 3, 4, 5, None, None, None, 6]
    assert written[3]["prompt"] == 12, "the input is kept as it was"
    assert result.report.errors == 8
    assert result.report.errors_by_code == {invalid: 4, too_long: 1, unreadable: 3}
    assert len(result.to_pandas()) == 10


def test_a_row_may_bring_its_own_options(job_options: dict[str, Any], tmp_path: Path) -> None:
    row = {"prompt": "List the city of all users.", "schema": "CREATE TABLE users (id INT, name TEXT, city TEXT);"}
    rows = [{**row, "limit": limit} for limit in (1, None, 2, "two")]
    options = {name: value for name, value in job_options.items() if name != "dataset"}
    result = run_batch(rows, **options, columns={"sampling": {"max_tokens": "limit"}}, output=tmp_path / "out")
    frame = result.to_pandas()
    assert frame["completion_tokens"].tolist()[0] == 1
    assert frame["text"][1] == "SELECT city FROM users"
    assert frame["completion_tokens"].tolist()[2] == 2
    assert frame["error"][3]["code"] == InvalidRequestError.code


def test_rows_in_memory(answered: BatchResult, job_options: dict[str, Any], questions: Path, tmp_path: Path) -> None:
    import ray.data

    frame = pq.read_table(questions).to_pandas().head(40)
    wanted = answered.to_pandas()["text"].head(40).tolist()
    options = {name: value for name, value in job_options.items() if name != "dataset"}
    datasets = {
        "frame": frame,
        "dicts": frame.to_dict("records"),
        "ray": ray.data.from_pandas(frame),
    }
    for name, dataset in datasets.items():
        result = run_batch(dataset, **options, output=tmp_path / name)
        assert result.to_pandas()["text"].tolist() == wanted, name
        assert run_batch(dataset, **options, output=tmp_path / name).report.already_complete, name


def test_a_list_of_prompts_and_no_output(job_options: dict[str, Any]) -> None:
    options = {name: value for name, value in job_options.items() if name != "dataset"}
    result = run_batch(["List the name of all users.", "Count the cars for each color."], **options)
    assert result.to_pandas()["prompt"].tolist() == ["List the name of all users.", "Count the cars for each color."]
    assert result.report.rows == 2


def test_csv_and_other_column_names(
    answered: BatchResult, job_options: dict[str, Any], questions: Path, tmp_path: Path
) -> None:
    frame = pq.read_table(questions).to_pandas().head(10)
    renamed = frame.rename(columns={"prompt": "question", "schema": "ddl", "id": "text"})
    renamed.to_csv(tmp_path / "rows.csv", index=False)
    options = {
        **job_options,
        "dataset": str(tmp_path / "*.csv"),
        "columns": {"prompt": "question", "schema": "ddl", "id": "text"},
    }
    with pytest.raises(DatasetError, match="names of output columns"):
        run_batch(**options, output=tmp_path / "out")
    result = run_batch(**options, output_prefix="answer_", output=tmp_path / "out")
    assert result.to_pandas()["answer_text"].tolist() == answered.to_pandas()["text"].head(10).tolist()


def test_compressed_lines_in_hive_directories_by_a_template(
    answered: BatchResult, job_options: dict[str, Any], questions: Path, tmp_path: Path
) -> None:
    frame = pq.read_table(questions).to_pandas().head(6)
    rows = [{"question": row["prompt"], "about": row["schema"]} for _, row in frame.iterrows()]
    for year, some in (("2023", rows[:4]), ("2024", [*rows[4:], {"question": None, "about": "x"}])):
        folder = tmp_path / "data" / f"year={year}"
        folder.mkdir(parents=True)
        lines = "".join(json.dumps(row) + "\n" for row in some)
        (folder / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    options = {**job_options, "dataset": str(tmp_path / "data"), "columns": {"schema": "about"}}
    result = run_batch(**options, prompt_template="{question}", output=tmp_path / "out")
    found = result.to_pandas()
    assert found["text"].tolist()[:6] == answered.to_pandas()["text"].tolist()[:6]
    assert found["year"].tolist() == [2023] * 4 + [2024] * 3
    assert found["error"][6]["code"] == InvalidRequestError.code
    assert "'question'" in found["error"][6]["message"]
    with pytest.raises(FingerprintError) as caught:
        run_batch(**options, prompt_template="Q: {question}", output=tmp_path / "out")
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


def test_workers_that_cannot_load_say_why(job_options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(JobFailedError) as caught:
        run_batch(**job_options, device="mps", output=tmp_path / "out")
    assert any("mps" in detail for detail in caught.value.details), caught.value.details
