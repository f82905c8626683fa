"""A job that is watched: its report, its metrics, its scores, and two outputs compared."""

import json
import re
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
from typer.testing import CliRunner

from pipeline import BatchResult, run_batch
from pipeline.batch.config import BatchConfig
from pipeline.batch.evaluate import evaluate_job
from pipeline.cli import app
from pipeline.errors import DatasetError, JobFailedError
from tests.e2e.chromium import LOW_CONTRAST, chromium, evaluate, find_chromium, lightness
from tests.e2e.processes import wait_until

pytestmark = pytest.mark.usefixtures("cluster")


BAD = [json.dumps({"prompt": None}), json.dumps({"prompt": 7, "expected": "x"}), "{no JSON"]


@pytest.fixture(scope="module")
def options(job_options: dict[str, Any], questions: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A job over 96 questions and three bad rows, in a file with a hostile name."""
    folder = tmp_path_factory.mktemp("watched")
    path = folder / "<b>rows&.jsonl"
    good = [json.dumps(row) for row in pq.read_table(questions).slice(0, 96).to_pylist()]
    path.write_text("\n".join([*good, *BAD]) + "\n")
    return {**job_options, "dataset": str(path), "output": str(folder / "out"), "price_per_hour": 1.5}


@pytest.fixture(scope="module")
def answered(options: dict[str, Any]) -> BatchResult:
    """Two runs of it: the first fails, as its workers cannot load; the second completes."""
    with pytest.raises(JobFailedError) as caught:
        run_batch(**options, device="mps")
    assert any("mps" in detail for detail in caught.value.details), caught.value.details
    assert not Path(options["output"], "_report").exists()
    return run_batch(**options)


def report_of(result: BatchResult) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(Path(result.output, "_report", "report.json").read_text())
    return values


def test_the_report_says_what_the_parts_hold(answered: BatchResult) -> None:
    report, frame = report_of(answered), answered.to_pandas()
    good = frame[frame["error"].isna()]
    assert (report["rows"], report["errors"], report["shards"]) == (99, 3, len(answered.parts))
    assert report["completion_tokens"] == frame["completion_tokens"].sum()
    for name in ("prompt_tokens", "completion_tokens"):
        seen = report[f"{name}_per_row"]
        assert (seen["count"], seen["min"], seen["max"]) == (len(good), good[name].min(), good[name].max())
        assert seen["mean"] == pytest.approx(good[name].mean())
    assert report["finish_reasons"] == frame["finish_reason"].value_counts().to_dict()
    assert report["shard_milliseconds"]["count"] == len(answered.parts)
    assert report["rows_of_unrecorded_runs"] == 0
    assert report["cost"]["total"] == pytest.approx(1.5 * report["seconds"]["total"] / 3600, rel=1e-3)
    assert answered.report.page == str(Path(answered.output, "_report", "report.html"))
    assert answered.report.page in str(answered.report)


def test_it_tells_of_every_run(answered: BatchResult) -> None:
    failed, complete = report_of(answered)["runs"]
    assert (failed["outcome"], failed["rows"], failed["shards"]) == ("failed", 0, 0)
    assert failed["error"] == "the job failed; the parts that are committed stay"
    assert (complete["outcome"], complete["rows"], complete["workers"]) == ("complete", 99, 1)
    assert complete["workers_seen"] == 1
    assert sum(complete["timeline"]["rows"]) == pytest.approx(99, abs=0.1)
    assert set(complete["seconds"]) == {"plan", "start", "run", "commit", "total"}


def test_bad_rows_are_in_it_with_samples_and_are_no_markup(answered: BatchResult) -> None:
    errors = report_of(answered)["errors_by_code"]
    assert {code: item["rows"] for code, item in errors.items()} == {"invalid_request": 2, "invalid_row": 1}
    assert [len(item["samples"]) for item in errors.values()] == [2, 1]
    assert errors["invalid_row"]["samples"][0]["row"].startswith("<b>rows&.jsonl@")
    page = Path(answered.output, "_report", "report.html").read_text()
    assert "<b>" not in page
    assert "&lt;b&gt;rows&amp;.jsonl@" in page


def test_a_complete_job_keeps_its_report(answered: BatchResult, options: dict[str, Any]) -> None:
    files = [Path(answered.output, "_report", name) for name in ("report.json", "report.html")]
    before = [path.read_bytes() for path in files]
    again = run_batch(**options)
    assert again.report.already_complete
    assert again.report.page == answered.report.page
    assert [path.read_bytes() for path in files] == before
    assert len(list(Path(answered.output, "_runs").iterdir())) == 2
    assert not Path(answered.output, "_attempts").exists()


def test_its_numbers_are_at_rays_prometheus_endpoint(answered: BatchResult) -> None:
    port = ray.nodes()[0]["MetricsExportPort"]
    found: dict[str, float] = {}

    def arrived() -> bool:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        job = report_of(answered)["fingerprint_sha256"][:12]
        for name, tags, value in re.findall(r"^ray_(expert_batch_\w+)\{(.*)\} (\S+)$", text, flags=re.MULTILINE):
            if f'job="{job}"' in tags:
                found[name] = float(value)
        return found.get("expert_batch_rows_done") == answered.report.rows

    assert wait_until(arrived, seconds=180), "Ray exports every second here"
    report = answered.report
    assert found["expert_batch_rows_total"] == report.rows
    assert found["expert_batch_errors_total"] > 0
    assert found["expert_batch_completion_tokens_total"] == report.completion_tokens
    assert found["expert_batch_done_ratio"] == found["expert_batch_workers"] == 1
    assert found["expert_batch_seconds_left"] == 0


def test_its_answers_are_judged(answered: BatchResult, options: dict[str, Any]) -> None:
    result, (score,) = evaluate_job(BatchConfig.from_options(**without_progress(options)), progress=False)
    frame = result.to_pandas()
    assert result.report.already_complete, "what is expected is no part of the fingerprint"
    assert (score.expert, score.rows, score.errors) == ("expert-sql@0.1.0", 99, 3)
    assert (score.judged, score.executable) == (97, 96), "a bad row has an expected answer, too, and is wrong"
    assert score.exact == (frame["text"].str.strip() == frame["expected"].str.strip()).sum() >= 91
    assert score.executed >= score.exact
    assert score.mean_tokens == pytest.approx(frame["completion_tokens"].sum() / 96)


def without_progress(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "progress"}


def test_a_dataset_without_right_answers_is_refused_before_anything_runs(
    options: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "List the city of all users."}\n')
    given = {**without_progress(options), "dataset": str(path), "output": str(tmp_path / "out")}
    with pytest.raises(DatasetError, match="expected"):
        evaluate_job(BatchConfig.from_options(**given), progress=False)
    assert not (tmp_path / "out").exists()


def test_the_commands_print_tables(answered: BatchResult, options: dict[str, Any], tmp_path: Path) -> None:
    config = tmp_path / "job.yaml"
    config.write_text(json.dumps(without_progress(options), default=str))
    told = CliRunner().invoke(app, ["eval", str(config), "--samples", "1"])
    assert told.exit_code == 0, told.stderr
    assert re.search(r"expert-sql@0\.1\.0 +99 +3 +\d+\.\d% of 97 +\d+\.\d% of 96 +\d+\.\d", told.stdout), told.stdout
    assert told.stdout.count("  expected  ") == 1
    in_json = CliRunner().invoke(app, ["eval", str(config), "--json"])
    assert json.loads(in_json.stdout)[0]["rows"] == 99

    other = shutil.copytree(answered.output, tmp_path / "other")
    part = other / "part-00001.jsonl"
    part.write_text(part.read_text().replace('"text":"SELECT ', '"text":"SELECT [red] ', 1))
    compared = CliRunner().invoke(app, ["diff", answered.output, str(other), "--exit-code"])
    assert compared.exit_code == 1
    assert "rows 99  same 98  different 1  errors: first 0, second 0, both 3" in compared.stdout
    assert "  < SELECT " in compared.stdout
    assert "  > SELECT [red] " in compared.stdout
    equal = CliRunner().invoke(app, ["diff", answered.output, answered.output, "--exit-code", "--json"])
    assert equal.exit_code == 0
    assert json.loads(equal.stdout)["same"] == 99


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if find_chromium() is None:
        pytest.skip("needs a Chromium")
    with chromium() as running:
        yield running


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_reads_well(browser: Any, answered: BatchResult, scheme: str, width: int) -> None:
    page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 900})
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(Path(answered.output, "_report", "report.html").as_uri())
    assert said == []
    assert len(asked) == 1, "the page alone"
    assert evaluate(page, LOW_CONTRAST) == []
    assert evaluate(page, "document.documentElement.scrollWidth") <= width
    assert (lightness(page) > 0.5) == (scheme == "light")
    assert evaluate(page, "document.querySelectorAll('svg .bar').length") > 10
    assert evaluate(page, "Math.min(...[...document.querySelectorAll('.canvas')].map(x => x.clientHeight))") > 100
    page.close()
