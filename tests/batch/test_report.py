"""The report of a job: its numbers, what it shows, and that nothing a person wrote becomes markup."""

import json
import logging
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pipeline.batch.commit import JobOutput
from pipeline.batch.histogram import Histogram
from pipeline.batch.progress import Phases
from pipeline.batch.receipts import Receipt
from pipeline.batch.report import REPORT_HTML, REPORT_JSON, JobReport, write_report
from pipeline.batch.report_page import brief, duration, price, render_page
from pipeline.batch.report_page.charts import histogram_chart, nice, nice_top, throughput_chart
from pipeline.batch.run_record import Outcome, RunRecord, RunRecorder
from pipeline.batch.shard_stats import ErrorSample, ShardStats
from pipeline.storage.local import LocalStorage

HOSTILE = "</title></style><script>alert(1)</script><img src=x onerror=alert(2)> \" ' & {{ 7 * 7 }} ✓"
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Page(HTMLParser):
    """Reads a page strictly: every tag that is opened is closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


def run_record(
    rows: int = 100, *, seconds: float = 10.0, outcome: Outcome = "complete", word: str = "plain", **options: Any
) -> RunRecord:
    clock = Clock()
    phases = Phases(clock=clock)
    recorder = RunRecorder(phases, **options)
    recorder.plan_workers(2)
    lengths = Histogram()
    for value in range(rows):
        lengths.add(40 + value % 60)
    with phases.phase("plan"):
        clock.now += 1
    with phases.phase("run"):
        for shard in range(10):
            clock.now += seconds / 10
            samples = {word: [ErrorSample(f"{word}@{shard}", f"{word} is wrong")]}
            receipt = Receipt(shard, rows // 10, {word: 1}, 1000, 500, 1, "part", "0" * 64)
            stats = ShardStats(seconds / 10, f"{word}:1", lengths, lengths, {"stop": 9, word: 1}, samples)
            recorder.add(receipt, stats)
    return recorder.record(outcome, None if outcome == "complete" else f"{word} went wrong")


def job_report(output: str, manifest: dict[str, Any], runs: list[RunRecord]) -> JobReport:
    return JobReport(output, manifest, runs, "0" * 64)


def manifest(rows: int = 100, word: str = "plain", **fields: Any) -> dict[str, Any]:
    return {
        "fingerprint": {"expert": f"expert-{word}", "base_model": f"base {word}", "sampling": {word: [word]}, **fields},
        "rows": rows,
        "errors": 10,
        "prompt_tokens": 10_000,
        "completion_tokens": 5_000,
        "bytes": 12,
        "error_codes": {word: 10},
        "parts": [{"shard": shard} for shard in range(10)],
    }


@pytest.fixture
def output(tmp_path: Path) -> JobOutput:
    return JobOutput(LocalStorage(str(tmp_path)), {"expert": "e"}, "jsonl", 1)


def test_the_numbers_of_several_runs_add_up() -> None:
    runs = [run_record(60, price_per_hour=36.0, outcome="failed"), run_record(30, seconds=5.0, price_per_hour=36.0)]
    report = job_report("out", manifest(100), runs)
    values = json.loads(json.dumps(report.to_dict()))
    assert (values["rows"], values["shards"], values["rows_of_unrecorded_runs"]) == (100, 10, 10)
    assert values["seconds"] == {"plan": 2.0, "start": 0.0, "run": 15.0, "commit": 0.0, "total": 17.0}
    assert values["rows_per_second"] == pytest.approx(90 / 15)
    assert values["tokens_per_second"] == pytest.approx(10_000 / 15, abs=0.001)
    # 17 seconds at 36 an hour are 0.17, for 90 rows
    assert values["cost"]["total"] == pytest.approx(0.17)
    assert values["cost"]["per_million_rows"] == pytest.approx(0.17 / 90 * 1e6)
    assert values["prompt_tokens_per_row"]["count"] == 10 * 90
    assert values["prompt_tokens_per_row"]["mean"] == pytest.approx(64.5)
    assert sum(count for _, _, count in values["shard_milliseconds"]["buckets"]) == 20
    assert values["errors_by_code"]["plain"]["rows"] == 10
    assert [run["outcome"] for run in values["runs"]] == ["failed", "complete"]


def test_cost_counts_only_what_has_a_price() -> None:
    assert job_report("out", manifest(), [run_record()]).cost is None
    mixed = job_report("out", manifest(), [run_record(50), run_record(50, seconds=35.0, price_per_hour=100.0)]).cost
    assert mixed is not None
    assert mixed.total == pytest.approx(1.0)  # 36 seconds
    assert mixed.per_million_rows == pytest.approx(1 / 50 * 1e6)


def test_nothing_a_person_wrote_becomes_markup() -> None:
    plain, hostile = (
        Page(
            render_page(
                job_report(
                    f"/out/{word}", manifest(100, word, **{word: word}), [run_record(word=word, outcome="failed")]
                )
            )
        )
        for word in ("plain", HOSTILE)
    )
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in plain.tags]
    assert [sorted(given) for _, given in hostile.tags] == [sorted(given) for _, given in plain.tags]
    assert f"{HOSTILE} is wrong" in hostile.text
    assert f"/out/{HOSTILE}" in hostile.text
    assert f"expert-{HOSTILE}" in hostile.text


def test_the_page_needs_nothing_from_elsewhere_and_runs_no_script() -> None:
    text = render_page(job_report("out", manifest(), [run_record(price_per_hour=2.0)]))
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    assert not [name for _, given in page.tags for name in given if name in ("src", "href") or name.startswith("on")]
    assert "url(" not in text
    assert "@import" not in text
    assert "http" not in text.replace("http-equiv", "")
    (policy,) = [given["content"] for _, given in page.tags if given.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'")


def test_the_page_says_what_happened() -> None:
    runs = [run_record(40, outcome="failed", price_per_hour=9.0), run_record(30, price_per_hour=9.0)]
    page = Page(render_page(job_report("/data/out", manifest(100), runs)))
    for words in (
        "/data/out",
        "Rows answered 90 of 100 in 10 shards",
        "Rows with an error 10 10% of all rows",
        "Cost of a million rows",
        "30 rows were committed by runs that were killed",
        "failed",
        "plain went wrong",
        "plain@0 plain is wrong",
        "Answers ended by: stop 180",
    ):
        assert words in page.text, page.text


@pytest.mark.parametrize(
    "report",
    [
        job_report("out", {**manifest(0), "errors": 0, "error_codes": {}, "parts": []}, []),
        job_report("out", manifest(0), [RunRecorder(Phases(clock=lambda: 0.0)).record("complete")]),
        job_report("out", {**manifest(), "fingerprint": {}}, [RunRecorder(Phases()).record("interrupted", "Ctrl-C")]),
    ],
    ids=["no runs", "no time", "nothing done"],
)
def test_a_job_that_did_nothing_has_a_page_too(report: JobReport) -> None:
    assert "Batch report" in Page(render_page(report)).text
    assert json.dumps(report.to_dict(), allow_nan=False)


def test_the_page_stays_small_whatever_the_runs() -> None:
    runs = [run_record() for _ in range(120)]
    text = render_page(job_report("out", manifest(12_000), runs))
    assert len(text) < 400_000
    assert "the last 50 of 120 runs" in text


def test_both_files_are_written_kept_and_made_anew(output: JobOutput, tmp_path: Path) -> None:
    page = write_report(output, manifest(), anew=True)
    assert page == str(tmp_path / REPORT_HTML)
    assert json.loads((tmp_path / REPORT_JSON).read_text())["rows"] == 100
    before = {name: (tmp_path / name).read_bytes() for name in (REPORT_JSON, REPORT_HTML)}
    write_report(output, manifest(200), anew=False)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before, "a job that was complete keeps it"
    (tmp_path / REPORT_HTML).unlink()
    write_report(output, manifest(), anew=False)
    assert (tmp_path / REPORT_HTML).read_bytes() == before[REPORT_HTML], "what is missing is made again"
    write_report(output, manifest(200), anew=True)
    assert json.loads((tmp_path / REPORT_JSON).read_text())["rows"] == 200
    assert sorted(path.name for path in tmp_path.iterdir()) == ["_report"], "no attempts are left behind"


def test_a_report_that_cannot_be_written_is_a_warning(
    output: JobOutput, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "_report").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        assert write_report(output, manifest(), anew=False) is None
    assert "report cannot be written" in caplog.text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.254, "0.25"),
        (12.54, "12.5"),
        (1250, "1,250"),
        (12_500, "12.5k"),
        (3.2e6, "3.2M"),
        (7e13, "70,000G"),
    ],
)
def test_numbers_are_brief(value: float, text: str) -> None:
    assert brief(value) == text


def test_times_and_prices_read_as_a_person_says_them() -> None:
    told = {0: "0 s", 0.4: "0.4 s", 59.4: "59.4 s", 65: "1:05 min", 600: "10 min", 9000: "2:30 h", 273_600: "3 d 4 h"}
    assert {seconds: duration(seconds) for seconds in told} == told
    assert [price(value) for value in (0, 0.00123, 0.5, 12.345, 1234.5)] == [
        "0.00",
        "0.0012",
        "0.5",
        "12.35",
        "1,234.50",
    ]


@pytest.mark.parametrize(
    ("value", "wanted"), [(0.03, 0.05), (1, 1), (1.1, 2), (2.2, 2.5), (26, 50), (1000, 1000), (1001, 2000)]
)
def test_steps_of_an_axis_are_round(value: float, wanted: float) -> None:
    assert nice(value) == pytest.approx(wanted)
    assert value <= nice_top(value) <= 2.1 * value


def test_bars_hold_every_value_and_a_long_tail_is_cut() -> None:
    lengths = Histogram()
    for value in [*range(100, 300)] * 5:
        lengths.add(value)
    chart = histogram_chart(lengths, "x", str)
    assert chart is not None
    assert sum(int(found.replace(",", "")) for found in re.findall(r": ([\d,]+)</title>", chart.svg)) == pytest.approx(
        1000, abs=20
    )
    assert chart.beyond == 0
    for _ in range(3):
        lengths.add(50_000)
    cut = histogram_chart(lengths, "x", str)
    assert cut is not None
    assert cut.end < 400
    assert 3 <= cut.beyond <= 15, "all but what a bucket at the edge smears"


def test_a_chart_stays_in_its_box() -> None:
    chart = throughput_chart([run_record(), run_record(seconds=3.0)], "rows", "x")
    assert chart is not None
    points = [
        tuple(map(float, point.split(",")))
        for points in re.findall(r'points="([^"]+)"', chart.svg)
        for point in points.split()
    ]
    assert all(0 <= x <= 100.001 and 0 <= y <= 100 for x, y in points)
    assert [tick.percent for tick in chart.x] == sorted(tick.percent for tick in chart.x)
    assert chart.svg.count("run-edge") == 1
