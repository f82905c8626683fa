"""What each run of a job did: a file `_runs/<uuid>.json`, created once, when the run ends.

A run that is killed leaves none: the rows that it committed are in the manifest, and how it made them is not known.
"""

import logging
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from pipeline.batch.histogram import Histogram
from pipeline.batch.layout import RUNS
from pipeline.batch.progress import Phases
from pipeline.batch.receipts import Receipt
from pipeline.batch.shard_stats import SAMPLES_PER_CODE, ErrorSample, ShardStats
from pipeline.batch.timeline import MAX_STEPS, Timeline
from pipeline.errors import ExpertError, OutputError
from pipeline.storage import Storage

logger = logging.getLogger(__name__)

MAX_CODES = 64
Outcome = Literal["complete", "failed", "interrupted"]


def _checked_histogram(values: dict[str, Any]) -> dict[str, Any]:
    Histogram.from_dict(values)
    return values


HistogramValues = Annotated[dict[str, Any], AfterValidator(_checked_histogram)]
Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Record(BaseModel):
    """Read strictly, as anybody may have written it; fields of a later version are passed over."""

    model_config = ConfigDict(frozen=True, strict=True)


class SampleRecord(_Record):
    """A row with an error; see `ErrorSample`."""

    row: str
    message: str


class TimelineRecord(_Record):
    """Work over time; see `Series`."""

    step_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    rows: Annotated[list[Amount], Field(max_length=MAX_STEPS)]
    tokens: Annotated[list[Amount], Field(max_length=MAX_STEPS)]


class RunRecord(_Record):
    """What one run did.

    The counts are of the shards that it answered itself; the manifest has those of the whole job.

    Args:
        run_id: A UUID.
        started_at: When it began, UTC, for a person to read.
        outcome: How it ended.
        error: Why it failed, in a sentence; None when it did not.
        price_per_hour: What its machines cost, when that was said.
        workers: How many it was planned with.
        workers_seen: How many answered a shard; those that replaced others are counted, too.
        shards: Shards answered.
        rows: Rows answered, those with an error among them.
        error_codes: Rows with an error, by code.
        prompt_tokens: Tokens of the prompts.
        completion_tokens: Tokens generated.
        seconds: By phase and in total.
        shard_seconds: Of all shards together: how much work there was at once.
        shard_milliseconds: Histogram of how long shards took.
        prompt_lengths: Histogram of the prompts' tokens.
        completion_lengths: Histogram of the answers' tokens.
        finish_reasons: Rows by the reason why their answer ended.
        error_samples: Some rows of each error code.
        timeline: Work over time.
    """

    run_id: str
    started_at: str
    outcome: Outcome
    error: str | None = None
    price_per_hour: Amount | None = None
    workers: Count = 0
    workers_seen: Count = 0
    shards: Count = 0
    rows: Count = 0
    error_codes: dict[str, Count] = Field(default_factory=dict)
    prompt_tokens: Count = 0
    completion_tokens: Count = 0
    seconds: dict[str, Amount] = Field(default_factory=dict)
    shard_seconds: Amount = 0.0
    shard_milliseconds: HistogramValues
    prompt_lengths: HistogramValues
    completion_lengths: HistogramValues
    finish_reasons: dict[str, Count] = Field(default_factory=dict)
    error_samples: dict[str, list[SampleRecord]] = Field(default_factory=dict)
    timeline: TimelineRecord

    @property
    def total_seconds(self) -> float:
        """From the run's beginning to its end."""
        return self.seconds.get("total", 0.0)


class RunRecorder:
    """Collects what a run does, in memory that does not grow with the rows.

    Args:
        phases: The run's timer; its total is the clock of the timeline.
        price_per_hour: What the run's machines cost together, if known.
        now: The time of day.
    """

    def __init__(
        self,
        phases: Phases,
        *,
        price_per_hour: float | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.run_id = str(uuid.uuid4())
        self._phases = phases
        self._price = price_per_hour
        started = now() - timedelta(seconds=phases.seconds()["total"])
        self._started_at = started.isoformat(timespec="seconds")
        self._workers = 0
        self._seen: set[str] = set()
        self._totals = Counter[str]()
        self._codes = Counter[str]()
        self._reasons = Counter[str]()
        self._samples: dict[str, list[ErrorSample]] = {}
        self._shard_seconds = 0.0
        self._shard_times, self._prompts, self._completions = Histogram(), Histogram(), Histogram()
        self._timeline = Timeline()

    def plan_workers(self, count: int) -> None:
        """Say how many workers there are to be."""
        self._workers = count

    def add(self, receipt: Receipt, stats: ShardStats) -> None:
        """Count a shard that this run has answered; to be called as soon as it is known."""
        for name in ("rows", "prompt_tokens", "completion_tokens"):
            self._totals[name] += getattr(receipt, name)
        self._totals["shards"] += 1
        self._codes.update(receipt.error_codes)
        self._reasons.update(stats.finish_reasons)
        self._seen.add(stats.worker)
        self._shard_seconds += stats.seconds
        self._shard_times.add(round(stats.seconds * 1000))
        self._prompts.merge(stats.prompt_tokens)
        self._completions.merge(stats.completion_tokens)
        for code, found in stats.error_samples.items():
            if code in self._samples or len(self._samples) < MAX_CODES:
                kept = self._samples.setdefault(code, [])
                kept.extend(found[: SAMPLES_PER_CODE - len(kept)])
        ended = self._phases.seconds()["total"]
        self._timeline.add(ended - stats.seconds, ended, receipt.rows, receipt.completion_tokens)

    def record(self, outcome: Outcome, error: str | None = None) -> RunRecord:
        """What was collected so far."""
        return RunRecord(
            run_id=self.run_id,
            started_at=self._started_at,
            outcome=outcome,
            error=error,
            price_per_hour=self._price,
            workers=self._workers,
            workers_seen=len(self._seen),
            **self._totals,
            error_codes=dict(self._codes),
            seconds=self._phases.seconds(),
            shard_seconds=self._shard_seconds,
            shard_milliseconds=self._shard_times.to_dict(),
            prompt_lengths=self._prompts.to_dict(),
            completion_lengths=self._completions.to_dict(),
            finish_reasons=dict(self._reasons),
            error_samples={
                code: [SampleRecord(row=sample.row, message=sample.message) for sample in found]
                for code, found in self._samples.items()
            },
            timeline=TimelineRecord(**asdict(self._timeline.series())),
        )

    @contextmanager
    def recording(self, storage: Storage) -> Iterator[None]:
        """Write the record when the inside ends, well or not. That it cannot be written is a warning, not an error."""
        try:
            yield
        except BaseException as error:  # whatever ends a run is told, and goes on
            interrupted = not isinstance(error, Exception)
            message = error.message if isinstance(error, ExpertError) else type(error).__name__
            self._write(storage, self.record("interrupted" if interrupted else "failed", message))
            raise
        self._write(storage, self.record("complete"))

    def _write(self, storage: Storage, record: RunRecord) -> None:
        try:
            storage.create(f"{RUNS}/{record.run_id}.json", record.model_dump_json(indent=1).encode() + b"\n")
        except OutputError as error:
            logger.warning("what this run did cannot be written down: %s", error.message)


def read_records(storage: Storage) -> list[RunRecord]:
    """The records of all runs that left one, the oldest first; one that is damaged is passed over with a warning."""
    found = []
    for name in storage.list(RUNS):
        try:
            found.append(RunRecord.model_validate_json(storage.read(name)))
        except ValidationError as error:
            logger.warning("%s is damaged and passed over: %s", storage.url(name), _first(error.errors()))
    return sorted(found, key=lambda record: (record.started_at, record.run_id))


def _first(errors: list[Any]) -> str:
    problem: Mapping[str, Any] = errors[0]
    return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
