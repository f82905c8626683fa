"""How far a running job is: counted by the driver, shard by shard."""

from dataclasses import dataclass, field
from typing import Protocol

# A worker that has not finished a shard for this long, and for so many times the longest shard, is gone.
_WORKER_SECONDS, _WORKER_SHARDS = 60.0, 3.0


class Receipt(Protocol):
    """What the progress line needs to know of a shard that is done."""

    @property
    def rows(self) -> int:
        """Rows answered, failed ones included."""

    @property
    def errors(self) -> int:
        """Rows that got an error for an answer."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompts."""

    @property
    def completion_tokens(self) -> int:
        """Tokens generated."""


@dataclass(frozen=True)
class Snapshot:
    """How far a job is, at one moment.

    Args:
        shards_done: Shards that are committed.
        shards_total: Shards of the whole job.
        rows_done: Rows that are committed.
        rows_total: Rows of the whole job, when they are known.
        share: How much of the job is done, from 0 to 1: of the rows, or of the shards when they are not known.
        errors: Rows that got an error for an answer.
        rows_per_second: Of this run.
        tokens_per_second: Generated tokens, of this run.
        workers: Workers that answered a shard lately, or were to be started; None when nobody counts them.
        seconds_left: Until the job is done, at this run's pace; None when nothing is done yet.
    """

    shards_done: int
    shards_total: int
    rows_done: int
    rows_total: int | None
    share: float
    errors: int
    rows_per_second: float
    tokens_per_second: float
    workers: int | None
    seconds_left: float | None


@dataclass
class JobCount:
    """What is done so far; `new_*` is the work of this run."""

    shards_total: int
    shards_done: int
    rows_total: int | None
    rows_done: int
    started: float  # seconds on the clock
    new_shards: int = 0
    new_rows: int = 0
    new_tokens: int = 0
    errors: int = 0
    workers: int | None = None  # planned
    seen: dict[str, float] = field(default_factory=dict)  # worker -> when it last finished a shard
    longest: float = 0.0  # seconds of a shard

    def add(self, receipt: Receipt, worker: str, seconds: float, now: float) -> None:
        """Count a shard that `worker` finished `now`, after so many seconds."""
        self.shards_done += 1
        self.new_shards += 1
        self.rows_done += receipt.rows
        self.new_rows += receipt.rows
        self.new_tokens += receipt.completion_tokens
        self.errors += receipt.errors
        self.seen[worker] = now
        self.longest = max(self.longest, seconds)

    def snapshot(self, now: float) -> Snapshot:
        """How far the job is."""
        elapsed = now - self.started
        if self.rows_total is not None:
            done, new, total = self.rows_done, self.new_rows, self.rows_total
        else:
            done, new, total = self.shards_done, self.new_shards, self.shards_total
        rate, left = per_second(new, elapsed), max(total - done, 0)
        return Snapshot(
            shards_done=self.shards_done,
            shards_total=self.shards_total,
            rows_done=self.rows_done,
            rows_total=self.rows_total,
            share=done / total if total else 1.0,
            errors=self.errors,
            rows_per_second=per_second(self.new_rows, elapsed),
            tokens_per_second=per_second(self.new_tokens, elapsed),
            workers=self._active(now),
            seconds_left=0.0 if not left else left / rate if rate else None,
        )

    def _active(self, now: float) -> int | None:
        """Workers that finished a shard within the time in which each must have; until then, those planned."""
        if self.workers is None:
            return None
        patience = max(_WORKER_SECONDS, _WORKER_SHARDS * self.longest)
        if not self.new_shards or now - self.started < patience:
            return self.workers
        self.seen = {worker: at for worker, at in self.seen.items() if now - at <= patience}
        return min(len(self.seen), self.workers)


def per_second(count: int, seconds: float) -> float:
    """A rate; 0 when no time has passed."""
    return count / seconds if seconds > 0 else 0.0
