"""`_report/report.json` and `_report/report.html`: how a finished job went, for a program and for a person.

Both are views: made after `_SUCCESS` from the manifest and the records of the runs (`run_record.py`), and not part of
what is verified. They lie in a folder of their own whose name begins with an underscore, so that the output is still a
folder of Parquet files to whatever reads it. It may be deleted: the same command makes it again. A run that finds the
job complete leaves it as it is.
"""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.batch.commit import JobOutput
from pipeline.batch.histogram import Histogram
from pipeline.batch.job_count import per_second
from pipeline.batch.layout import ATTEMPTS, REPORT
from pipeline.batch.plan import digest_of
from pipeline.batch.progress import PHASES
from pipeline.batch.run_record import RunRecord, SampleRecord, read_records
from pipeline.errors import OutputError

logger = logging.getLogger(__name__)

REPORT_JSON, REPORT_HTML = f"{REPORT}/report.json", f"{REPORT}/report.html"
REPORT_VERSION = 1
SECONDS_PER_HOUR = 3600
_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
_TOTALS = ("rows", "errors", "prompt_tokens", "completion_tokens", "bytes")


@dataclass(frozen=True)
class Cost:
    """What the runs with a price cost.

    Args:
        total: Price an hour times hours, of all of them.
        per_million_rows: The same for a million rows at that rate; None when they answered none.
    """

    total: float
    per_million_rows: float | None


@dataclass(frozen=True)
class JobReport:
    """How a finished job went.

    Args:
        output: Its output folder.
        manifest: What `_manifest.json` says.
        runs: The record of every run that left one, the oldest first.
        fingerprint_sha256: The digest of the job's fingerprint, as Parquet parts have it in their footers.
    """

    output: str
    manifest: Mapping[str, Any]
    runs: Sequence[RunRecord]
    fingerprint_sha256: str

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """What made the job this job, field by field."""
        fields: Mapping[str, Any] = self.manifest["fingerprint"]
        return fields

    @property
    def num_shards(self) -> int:
        """Shards of the job."""
        return len(self.manifest["parts"])

    @property
    def rows_recorded(self) -> int:
        """Rows that the recorded runs answered; the others were committed by runs that were killed."""
        return sum(run.rows for run in self.runs)

    @property
    def rows_unrecorded(self) -> int:
        """Rows of the job of which it is not known how they were answered."""
        rows: int = self.manifest["rows"]
        return max(rows - self.rows_recorded, 0)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by phase and in total, of all runs together."""
        return {name: sum(run.seconds.get(name, 0.0) for run in self.runs) for name in (*PHASES, "total")}

    @property
    def rows_per_second(self) -> float:
        """Rows a second, while rows were answered."""
        return per_second(self.rows_recorded, self.seconds["run"])

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens a second, while rows were answered."""
        return per_second(sum(run.completion_tokens for run in self.runs), self.seconds["run"])

    @property
    def cost(self) -> Cost | None:
        """What it cost; None when no run had a price."""
        priced = [(run, run.price_per_hour) for run in self.runs if run.price_per_hour is not None]
        if not priced:
            return None
        total = sum(price * run.total_seconds / SECONDS_PER_HOUR for run, price in priced)
        rows = sum(run.rows for run, _ in priced)
        return Cost(total, total / rows * 1_000_000 if rows else None)

    @property
    def finish_reasons(self) -> dict[str, int]:
        """Rows of the recorded runs by the reason why their answer ended, the most frequent first."""
        reasons = Counter[str]()
        for run in self.runs:
            reasons.update(run.finish_reasons)
        return dict(reasons.most_common())

    def errors_by_code(self) -> dict[str, int]:
        """Rows with an error by its code, the most frequent first."""
        return dict(Counter(self.manifest["error_codes"]).most_common())

    def samples(self, code: str) -> Sequence[SampleRecord]:
        """Some rows with an error of that code."""
        return next((run.error_samples[code] for run in reversed(self.runs) if run.error_samples.get(code)), ())

    def histogram(self, name: str) -> Histogram:
        """The sum of a histogram over all runs.

        Args:
            name: `shard_milliseconds`, `prompt_lengths` or `completion_lengths`.
        """
        added = Histogram()
        for run in self.runs:
            added.merge(Histogram.from_dict(getattr(run, name)))
        return added

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, ready for JSON."""
        cost = self.cost
        return {
            "report_version": REPORT_VERSION,
            "output": self.output,
            "fingerprint_sha256": self.fingerprint_sha256,
            "expert": self.fingerprint.get("expert"),
            "base_model": self.fingerprint.get("base_model"),
            **{name: self.manifest[name] for name in _TOTALS},
            "shards": self.num_shards,
            "errors_by_code": {
                code: {"rows": rows, "samples": [sample.model_dump() for sample in self.samples(code)]}
                for code, rows in self.errors_by_code().items()
            },
            "finish_reasons": self.finish_reasons,
            "rows_per_second": round(self.rows_per_second, 3),
            "tokens_per_second": round(self.tokens_per_second, 3),
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "cost": cost and {"total": cost.total, "per_million_rows": cost.per_million_rows},
            "shard_milliseconds": _summary(self.histogram("shard_milliseconds")),
            "prompt_tokens_per_row": _summary(self.histogram("prompt_lengths")),
            "completion_tokens_per_row": _summary(self.histogram("completion_lengths")),
            "rows_of_unrecorded_runs": self.rows_unrecorded,
            "runs": [run.model_dump() for run in self.runs],
        }


def write_report(output: JobOutput, manifest: Mapping[str, Any], *, anew: bool) -> str | None:
    """Write the report of a job that is complete.

    A report that cannot be written is a warning: the answers are committed all the same.

    Args:
        output: The job's output folder.
        manifest: What `finish` returned.
        anew: Replace a report that is there, which knows nothing of the last run; else it is kept.

    Returns:
        The page's path or URL; None when it could not be written.
    """
    storage = output.storage
    try:
        if anew:
            storage.remove_tree(REPORT)
        if not (storage.exists(REPORT_JSON) and storage.exists(REPORT_HTML)):
            from pipeline.batch.report_page import render_page

            report = JobReport(storage.url(""), manifest, read_records(storage), digest_of(output.fingerprint))
            data = json.dumps(report.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
            storage.create(REPORT_JSON, data.encode() + b"\n")
            storage.create(REPORT_HTML, render_page(report).encode())
            storage.remove_tree(ATTEMPTS)
    except OutputError as error:
        logger.warning("the report cannot be written: %s", error.message)
        return None
    return storage.url(REPORT_HTML)


def _summary(histogram: Histogram) -> dict[str, Any]:
    quantiles = {name: histogram.quantile(share) for name, share in _QUANTILES.items()}
    return {
        "count": histogram.count,
        "min": histogram.low,
        "mean": histogram.mean,
        **quantiles,
        "max": histogram.high,
        "buckets": [[bucket.low, bucket.high, bucket.count] for bucket in histogram.buckets()],
    }
