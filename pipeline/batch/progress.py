"""What a running job shows, one line, and what a finished job reports."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from threading import Event, RLock, Thread
from typing import Any, Literal, TextIO, get_args

from pipeline.batch.job_count import JobCount, Receipt, Snapshot

Phase = Literal["plan", "start", "run", "commit"]
PHASES: tuple[str, ...] = get_args(Phase)

_TERMINAL_SECONDS = 0.1  # between two drawings of the line on a terminal
_DEFAULT_COLUMNS = 80
_GAP = "  "


class Progress:
    """The live line of a job: rows done, rows and tokens a second, errors, workers, and the time that is left.

    On a terminal one line is drawn again and again in its place; in a log a line is added from time to time. Rates
    count the work of this run alone, so what an earlier run committed does not make a resumed job look fast. A stream
    that can no longer be written to ends the line, not the job.

    Args:
        enabled: False shows nothing.
        stream: Where to; standard error by default.
        seconds: Between two lines in a log.
        clock: Seconds that never go back.
    """

    def __init__(
        self,
        *,
        enabled: bool = True,
        stream: TextIO | None = None,
        seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._enabled = enabled
        self._stream = stream if stream is not None else sys.stderr
        self._is_terminal = enabled and self._stream.isatty()
        self._seconds = _TERMINAL_SECONDS if self._is_terminal else seconds
        self._clock = clock
        self._listener: Callable[[Snapshot], None] | None = None
        self._count: JobCount | None = None
        self._lock = RLock()
        self._shown_at = 0.0
        self._shown = ""

    def tell(self, listener: Callable[[Snapshot], None]) -> None:
        """Tell somebody else the same numbers whenever the line is due, also when it is not shown."""
        self._listener = listener

    def start(
        self,
        shards_total: int,
        shards_done: int,
        rows_total: int | None,
        rows_done: int,
        errors_done: int = 0,
        workers: int | None = None,
    ) -> None:
        """Begin to count.

        Args:
            shards_total: Shards of the whole job.
            shards_done: Those that an earlier run committed.
            rows_total: Rows of the whole job, when they are known; without them the line counts shards.
            rows_done: Rows that an earlier run committed.
            errors_done: Those of them that are errors.
            workers: Workers that are to be started; None does not count them.
        """
        started = self._clock()
        self._count = JobCount(
            shards_total, shards_done, rows_total, rows_done, started, errors=errors_done, workers=workers
        )
        self._show()

    def began(self, seconds: float) -> None:
        """Count rates from so many seconds ago: when the first shard was begun, not while workers were started."""
        if self._count is not None:
            self._count.started = self._clock() - seconds

    @contextmanager
    def ticking(self) -> Iterator[None]:
        """Show the line from time to time while inside, also when no shard is finished: a long one is no standstill."""
        stopped = Event()

        def tick() -> None:
            while not stopped.wait(max(self._seconds, 1.0)):
                self._show_when_due()

        thread = Thread(target=tick, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stopped.set()
            thread.join()

    def update(self, receipt: Receipt, *, worker: str = "", seconds: float = 0.0) -> None:
        """Count one more shard that is done, and show it when it is time. Without `start` nothing is counted.

        Args:
            receipt: What the shard holds.
            worker: Who answered it.
            seconds: How long that took.
        """
        if self._count is None:
            return
        with self._lock:
            self._count.add(receipt, worker, seconds, self._clock())
        self._show_when_due()

    def close(self) -> None:
        """Show the final state and end the line. Nothing is shown afterwards."""
        if self._count is None:
            return
        self._show()
        if self._is_terminal:
            self._write("\n")
        self._count = None

    def _show_when_due(self) -> None:
        if self._clock() - self._shown_at >= self._seconds:
            self._show()

    def _show(self) -> None:
        with self._lock:
            self._draw()

    def _draw(self) -> None:
        if self._count is None or not (self._enabled or self._listener):
            return
        self._shown_at = self._clock()
        snapshot = self._count.snapshot(self._shown_at)
        if self._listener is not None:
            self._listener(snapshot)
        parts = _parts(snapshot)
        if self._is_terminal:
            line = _fit(parts, _columns(self._stream) - 1)
            self._write("\r" + line.ljust(len(self._shown)))
        else:
            line = _GAP.join(parts.values())
            if line != self._shown:
                self._write(line + "\n")
        self._shown = line

    def _write(self, text: str) -> None:
        if not self._enabled:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # the terminal is gone or the stream is closed: the job goes on without the line
            self._enabled = False


def _parts(now: Snapshot) -> dict[str, str]:
    """The parts of the line, by name, in order."""
    if now.rows_total is not None:
        parts = {"done": f"{now.rows_done:,}/{now.rows_total:,} rows"}
    else:
        parts = {"done": f"{now.shards_done:,}/{now.shards_total:,} shards", "rows": f"{now.rows_done:,} rows"}
    parts["percent"] = f"{100 * now.share:.1f}%"
    parts["rows_rate"] = f"{now.rows_per_second:,.1f} rows/s"
    parts["tokens_rate"] = f"{now.tokens_per_second:,.0f} tokens/s"
    parts["errors"] = f"{now.errors:,} error{'' if now.errors == 1 else 's'}"
    if now.workers is not None:
        parts["workers"] = f"{now.workers:,} worker{'' if now.workers == 1 else 's'}"
    parts["eta"] = f"ETA {'-' if now.seconds_left is None else _duration(now.seconds_left)}"
    return parts


@dataclass(frozen=True, kw_only=True, repr=False)
class BatchReport:
    """What a finished job did.

    Args:
        output: Where the answers are.
        rows: Rows of the whole job, every one answered.
        errors: Rows whose answer is an error.
        errors_by_code: The same, by the error's code.
        prompt_tokens: Tokens of all prompts.
        completion_tokens: Tokens generated.
        shards: Shards, and part files, of the whole job.
        rows_this_run: Rows answered by this run; the others were there already.
        rows_per_second: Of this run, while it answered rows.
        tokens_per_second: Generated tokens of this run, while it answered rows.
        seconds: Wall-clock seconds by phase (plan, start, run, commit) and in total.
        already_complete: The job was finished before; this run had nothing to do.
        page: Where `report.html` is; None when it could not be written.
        errors_file: Where every row with an error is listed.
    """

    output: str
    rows: int
    errors: int
    prompt_tokens: int
    completion_tokens: int
    shards: int
    rows_this_run: int
    rows_per_second: float
    tokens_per_second: float
    seconds: Mapping[str, float]
    already_complete: bool
    errors_by_code: Mapping[str, int] = field(default_factory=dict)
    page: str | None = None
    errors_file: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, ready for JSON."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}

    def __str__(self) -> str:
        state = " (already complete: nothing was left to do)" if self.already_complete else ""
        codes = ", ".join(f"{code} {count:,}" for code, count in sorted(self.errors_by_code.items()))
        listed = f", listed in {self.errors_file}" if self.errors and self.errors_file is not None else ""
        speed = f"{self.rows_per_second:,.1f} rows/s, {self.tokens_per_second:,.0f} generated tokens/s"
        seconds = ", ".join(f"{phase} {value:.1f}" for phase, value in self.seconds.items())
        table = {
            "output": f"{self.output}{state}",
            "rows": f"{self.rows:,} in {self.shards:,} shard{'' if self.shards == 1 else 's'}, "
            f"{self.rows_this_run:,} answered by this run",
            "errors": f"{self.errors:,}" + (f" ({codes})" if codes else "") + listed,
            "tokens": f"{self.prompt_tokens:,} prompt, {self.completion_tokens:,} generated",
            **({} if self.already_complete else {"speed": speed, "seconds": seconds}),
            **({} if self.page is None else {"report": self.page}),
        }
        return "\n".join(f"{name:<8} {value}" for name, value in table.items())

    __repr__ = __str__


class Phases:
    """A timer for the phases of a job.

    Args:
        clock: Seconds that never go back.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started = clock()
        self._seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Count the time inside the `with` block to a phase, whether it ends well or not; again adds up."""
        begun = self._clock()
        try:
            yield
        finally:
            self._seconds[name] += self._clock() - begun

    def move(self, seconds: float, source: Phase, target: Phase) -> None:
        """Count seconds to another phase than the one they were measured in, as far as that one has them."""
        moved = min(seconds, self._seconds[source])
        self._seconds[source] -= moved
        self._seconds[target] += moved

    def seconds(self) -> dict[str, float]:
        """Seconds so far by phase, and `total` since the timer was made."""
        return {**self._seconds, "total": self._clock() - self._started}


def _fit(parts: Mapping[str, str], columns: int) -> str:
    """The line, shortened to the terminal's width: rates go first, as a line that wraps cannot be drawn over."""
    kept = dict(parts)
    for name in ("workers", "tokens_rate", "rows_rate", "rows", "errors"):
        if len(_GAP.join(kept.values())) > columns:
            kept.pop(name, None)
    return _GAP.join(kept.values())[: max(columns, 0)]


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or _DEFAULT_COLUMNS
    except (OSError, ValueError):  # not a real terminal, so it has no size
        return _DEFAULT_COLUMNS


def _duration(seconds: float) -> str:
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
