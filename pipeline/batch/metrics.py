"""What a running job counts and measures: the numbers of the live line, at Ray's own Prometheus endpoint."""

from pipeline.batch.job_count import Snapshot
from pipeline.batch.receipts import Receipt
from pipeline.metrics import Metrics

_TAGS = ("job", "expert")


class JobMetrics:
    """Counters of the work of this run, and gauges of how far the whole job is.

    Args:
        metrics: Makes what is told.
        job: What tells the job from others: the beginning of its fingerprint's digest.
        expert: What answers, `name@version`.
    """

    def __init__(self, metrics: Metrics, *, job: str, expert: str) -> None:
        counter, gauge = metrics.counter, metrics.gauge
        self._tags = {"job": job, "expert": expert}
        self._rows = counter("expert_batch_rows_total", "Rows answered by this run.", _TAGS)
        self._errors = counter("expert_batch_errors_total", "Rows that got an error for an answer.", (*_TAGS, "code"))
        self._prompt_tokens = counter("expert_batch_prompt_tokens_total", "Tokens of prompts.", _TAGS)
        self._completion_tokens = counter("expert_batch_completion_tokens_total", "Tokens generated.", _TAGS)
        self._shards = counter("expert_batch_shards_total", "Shards answered by this run.", _TAGS)
        self._done_ratio = gauge("expert_batch_done_ratio", "How much of the whole job is done, from 0 to 1.", _TAGS)
        self._rows_done = gauge("expert_batch_rows_done", "Rows of the whole job that are committed.", _TAGS)
        self._rows_rate = gauge("expert_batch_rows_per_second", "Rows a second of this run.", _TAGS)
        self._tokens_rate = gauge("expert_batch_tokens_per_second", "Generated tokens a second of this run.", _TAGS)
        self._workers = gauge("expert_batch_workers", "Workers that answered a shard lately.", _TAGS)
        self._seconds_left = gauge("expert_batch_seconds_left", "Until the job is done, at this run's pace.", _TAGS)

    def count(self, receipt: Receipt) -> None:
        """Count a shard that this run has answered."""
        self._shards.inc(1, self._tags)
        for counter, value in (
            (self._rows, receipt.rows),
            (self._prompt_tokens, receipt.prompt_tokens),
            (self._completion_tokens, receipt.completion_tokens),
        ):
            if value:  # a counter refuses to count nothing
                counter.inc(value, self._tags)
        for code, rows in receipt.error_codes.items():
            self._errors.inc(rows, {**self._tags, "code": code})

    def show(self, now: Snapshot) -> None:
        """Tell how far the job is."""
        self._done_ratio.set(now.share, self._tags)
        self._rows_done.set(now.rows_done, self._tags)
        self._rows_rate.set(now.rows_per_second, self._tags)
        self._tokens_rate.set(now.tokens_per_second, self._tags)
        if now.workers is not None:
            self._workers.set(now.workers, self._tags)
        if now.seconds_left is not None:
            self._seconds_left.set(now.seconds_left, self._tags)
