"""What a running job tells Prometheus, at Ray's own endpoint: the numbers of the live line."""

from ray.util.metrics import Counter, Gauge

from pipeline.batch.job_count import Snapshot
from pipeline.batch.receipts import Receipt

_TAGS = ("job", "expert")


class JobMetrics:
    """Counters of the work of this run, and gauges of how far the whole job is. Ray must be connected.

    Args:
        job: What tells the job from others: the beginning of its fingerprint's digest.
        expert: What answers, `name@version`.
    """

    def __init__(self, *, job: str, expert: str) -> None:
        self._tags = {"job": job, "expert": expert}
        self._rows = Counter("expert_batch_rows_total", "Rows answered by this run.", _TAGS)
        self._errors = Counter("expert_batch_errors_total", "Rows that got an error for an answer.", (*_TAGS, "code"))
        self._prompt_tokens = Counter("expert_batch_prompt_tokens_total", "Tokens of prompts.", _TAGS)
        self._completion_tokens = Counter("expert_batch_completion_tokens_total", "Tokens generated.", _TAGS)
        self._shards = Counter("expert_batch_shards_total", "Shards answered by this run.", _TAGS)
        self._done_ratio = Gauge("expert_batch_done_ratio", "How much of the whole job is done, from 0 to 1.", _TAGS)
        self._rows_done = Gauge("expert_batch_rows_done", "Rows of the whole job that are committed.", _TAGS)
        self._rows_rate = Gauge("expert_batch_rows_per_second", "Rows a second of this run.", _TAGS)
        self._tokens_rate = Gauge("expert_batch_tokens_per_second", "Generated tokens a second of this run.", _TAGS)
        self._workers = Gauge("expert_batch_workers", "Workers that answered a shard lately.", _TAGS)
        self._seconds_left = Gauge("expert_batch_seconds_left", "Until the job is done, at this run's pace.", _TAGS)

    def count(self, receipt: Receipt) -> None:
        """Count a shard that this run has answered."""
        self._shards.inc(1, self._tags)
        for counter, value in (
            (self._rows, receipt.rows),
            (self._prompt_tokens, receipt.prompt_tokens),
            (self._completion_tokens, receipt.completion_tokens),
        ):
            if value:  # Ray refuses to count nothing
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
