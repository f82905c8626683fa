"""The progress line on a terminal and in a log, the report of a job, and the timer of its phases."""

import fcntl
import io
import json
import os
import pty
import struct
import termios
import time
from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.batch.job_count import Snapshot
from pipeline.batch.progress import BatchReport, Phases, Progress


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream that says it is a terminal, of unknown width."""

    def isatty(self) -> bool:
        return True


class BrokenPipe(io.StringIO):
    """A stream whose reader is gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, f"Broken pipe: {text!r}")


@dataclass(frozen=True)
class Done:
    rows: int = 10
    errors: int = 0
    prompt_tokens: int = 1000
    completion_tokens: int = 50


def log_lines(work: Callable[[Progress, Clock], None], *, seconds: float = 5.0) -> list[str]:
    clock, stream = Clock(), io.StringIO()
    work(Progress(stream=stream, seconds=seconds, clock=clock), clock)
    return stream.getvalue().splitlines()


def test_log_gets_a_line_each_interval() -> None:
    def work(progress: Progress, clock: Clock) -> None:
        progress.start(10, 0, 100, 0)
        for _ in range(10):
            clock.now += 2.0
            progress.update(Done())
        progress.close()

    assert log_lines(work) == [
        "0/100 rows  0.0%  0.0 rows/s  0 tokens/s  0 errors  ETA -",
        "30/100 rows  30.0%  5.0 rows/s  25 tokens/s  0 errors  ETA 0:14",
        "60/100 rows  60.0%  5.0 rows/s  25 tokens/s  0 errors  ETA 0:08",
        "90/100 rows  90.0%  5.0 rows/s  25 tokens/s  0 errors  ETA 0:02",
        "100/100 rows  100.0%  5.0 rows/s  25 tokens/s  0 errors  ETA 0:00",
    ]


def test_interval_is_taken() -> None:
    def work(progress: Progress, clock: Clock) -> None:
        progress.start(10, 0, 100, 0)
        for _ in range(10):
            clock.now += 2.0
            progress.update(Done())
        progress.close()

    assert len(log_lines(work, seconds=1.0)) == 11
    assert len(log_lines(work, seconds=60.0)) == 2


def test_starting_the_workers_does_not_count_in_the_rate() -> None:
    def work(progress: Progress, clock: Clock) -> None:
        progress.start(10, 0, 100, 0)
        clock.now += 30.0
        progress.began(2.0)
        progress.update(Done(rows=10, completion_tokens=40))

    assert log_lines(work)[1] == "10/100 rows  10.0%  5.0 rows/s  20 tokens/s  0 errors  ETA 0:18"


def test_the_line_ticks_while_a_shard_is_being_answered() -> None:
    stream = io.StringIO()
    progress = Progress(stream=stream, seconds=1.0)
    with progress.ticking():
        progress.start(10, 0, 100, 0)
        deadline = time.monotonic() + 10
        progress.update(Done())
        while stream.getvalue().count("\n") < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
    assert stream.getvalue().count("\n") >= 2, "a second line came without a second update"


def test_workers_are_those_planned_until_each_must_have_been_heard_of() -> None:
    def work(progress: Progress, clock: Clock) -> None:
        progress.start(1000, 0, 10_000, 0, 0, 3)
        clock.now += 300.0  # nothing is done yet: they are being started
        progress.began(0.0)
        for _ in range(4):
            clock.now += 10.0
            for worker in ("a", "b", "c"):
                progress.update(Done(), worker=worker, seconds=10.0)
        for _ in range(12):  # c is gone; later d takes its place, and for a while both are known
            clock.now += 10.0
            for worker in ("a", "b"):
                progress.update(Done(), worker=worker, seconds=10.0)
        for _ in range(2):
            clock.now += 10.0
            for worker in ("a", "b", "d", "e"):
                progress.update(Done(), worker=worker, seconds=10.0)

    workers = [line.split("  ")[-2] for line in log_lines(work)]
    assert workers[:5] == ["3 workers"] * 5
    assert workers[5:-1] == ["3 workers"] * 6 + ["2 workers"] * 7
    assert workers[-1] == "3 workers", "never more than planned"


def test_a_long_shard_does_not_make_its_worker_look_lost() -> None:
    def work(progress: Progress, clock: Clock) -> None:
        progress.start(1000, 0, 10_000, 0, 0, 2)
        clock.now += 400.0
        for worker in ("a", "b"):
            progress.update(Done(), worker=worker, seconds=400.0)
        clock.now += 900.0
        progress.update(Done(), worker="a", seconds=400.0)

    assert "  2 workers  " in log_lines(work)[-1]


def test_a_listener_is_told_what_the_line_says_even_when_none_is_shown() -> None:
    clock, told = Clock(), list[Snapshot]()
    progress = Progress(enabled=False, stream=io.StringIO(), clock=clock)
    progress.tell(told.append)
    progress.start(10, 2, 100, 20, 1, 4)
    clock.now += 10.0
    progress.update(Done(rows=10, errors=1, completion_tokens=200))
    progress.close()
    assert told[0] == Snapshot(2, 10, 20, 100, 0.2, 1, 0.0, 0.0, 4, None)
    assert told[1] == told[2] == Snapshot(3, 10, 30, 100, 0.3, 2, 1.0, 20.0, 4, 70.0)


def test_committed_rows_count_in_the_total_but_not_in_the_rate() -> None:
    def work(progress: Progress, clock: Clock) -> None:
        progress.start(100, 50, 1000, 500)
        clock.now += 10.0
        progress.update(Done(rows=10, errors=1, completion_tokens=200))

    assert log_lines(work) == [
        "500/1,000 rows  50.0%  0.0 rows/s  0 tokens/s  0 errors  ETA -",
        "510/1,000 rows  51.0%  1.0 rows/s  20 tokens/s  1 error  ETA 8:10",
    ]


def test_shards_are_counted_when_the_rows_are_not_known() -> None:
    def work(progress: Progress, clock: Clock) -> None:
        progress.start(8, 2, None, 300)
        clock.now += 1800.0
        progress.update(Done(rows=900, errors=2))

    assert log_lines(work)[-1] == "3/8 shards  1,200 rows  37.5%  0.5 rows/s  0 tokens/s  2 errors  ETA 2:30:00"


def test_job_without_rows_is_complete() -> None:
    def work(progress: Progress, clock: Clock) -> None:
        progress.start(0, 0, 0, 0)
        progress.close()

    assert log_lines(work) == ["0/0 rows  100.0%  0.0 rows/s  0 tokens/s  0 errors  ETA 0:00"]


def test_log_does_not_repeat_a_line_and_close_can_be_called_again() -> None:
    def work(progress: Progress, clock: Clock) -> None:
        progress.start(1, 0, 10, 0)
        clock.now += 5.0
        progress.update(Done())
        progress.close()
        progress.close()
        progress.update(Done())

    assert [line.partition("  ")[0] for line in log_lines(work)] == ["0/10 rows", "10/10 rows"]


def test_terminal_line_is_drawn_in_its_place() -> None:
    clock, stream = Clock(), Terminal()
    progress = Progress(stream=stream, clock=clock)
    progress.start(2, 0, 1000, 0)
    clock.now += 0.05
    progress.update(Done(rows=500))  # too soon to draw again
    assert stream.getvalue().count("\r") == 1
    clock.now += 9.95
    progress.update(Done(rows=500))
    progress.close()
    frames = stream.getvalue().split("\r")[1:]
    assert "\n" not in "".join(frames[:-1])
    assert frames[-1].rstrip(" \n") == "1,000/1,000 rows  100.0%  100.0 rows/s  10 tokens/s  0 errors  ETA 0:00"
    assert frames[-1].endswith("\n")


def test_a_shorter_terminal_line_wipes_the_longer_one() -> None:
    clock, stream = Clock(), Terminal()
    progress = Progress(stream=stream, clock=clock)
    progress.start(2, 0, 10, 0)
    clock.now += 0.5
    progress.update(Done(rows=5, completion_tokens=10_000_000))
    clock.now += 1000.0
    progress.update(Done(rows=5, completion_tokens=0))
    _, _, longer, shorter = stream.getvalue().split("\r")
    assert len(shorter) == len(longer)
    assert len(shorter.rstrip()) < len(longer)


def test_terminal_line_never_wraps() -> None:
    clock, stream = Clock(), Terminal()
    progress = Progress(stream=stream, clock=clock)
    progress.start(40_000, 0, 10_000_000, 0)
    clock.now += 1000.0
    progress.update(Done(rows=4_000_000, errors=123_456, completion_tokens=400_000_000))
    frames = stream.getvalue().split("\r")
    assert all(len(frame) < 80 for frame in frames)
    assert frames[-1] == "4,000,000/10,000,000 rows  40.0%  4,000.0 rows/s  123,456 errors  ETA 25:00"


def test_terminal_width_is_asked_for() -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as stream:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 30, 0, 0))
        progress = Progress(stream=stream, clock=Clock())
        progress.start(4, 1, 100, 25)
        shown = os.read(ours, 1000).decode()
    os.close(ours)
    assert shown == "\r25/100 rows  25.0%  ETA -"


def test_quiet_progress_shows_nothing() -> None:
    stream = Terminal()
    progress = Progress(enabled=False, stream=stream, clock=Clock())
    progress.start(1, 0, 10, 0)
    progress.update(Done())
    progress.close()
    assert stream.getvalue() == ""


def test_job_outlives_its_terminal() -> None:
    closed = io.StringIO()
    closed_progress = Progress(stream=closed, clock=Clock())
    closed.close()
    for progress in (closed_progress, Progress(stream=BrokenPipe(), clock=Clock())):
        progress.start(1, 0, 10, 0)
        progress.update(Done())
        progress.close()


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 9), st.floats(0.0, 100.0)), max_size=20), st.booleans())
def test_final_line_tells_all_that_was_done(shards: list[tuple[int, int, float]], know_rows: bool) -> None:
    clock, stream = Clock(), io.StringIO()
    progress = Progress(stream=stream, clock=clock)
    rows = sum(item[0] for item in shards)
    errors = sum(item[1] for item in shards)
    progress.start(len(shards), 0, rows if know_rows else None, 0)
    for shard_rows, shard_errors, seconds in shards:
        clock.now += seconds
        progress.update(Done(rows=shard_rows, errors=shard_errors))
    progress.close()
    last = stream.getvalue().splitlines()[-1]
    done = f"{rows:,}/{rows:,} rows" if know_rows else f"{len(shards)}/{len(shards)} shards  {rows:,} rows"
    assert last.startswith(f"{done}  100.0%  ")
    assert f"  {errors} error" in last
    assert last.endswith("ETA 0:00")


REPORT = BatchReport(
    output="answers/",
    rows=1200,
    errors=3,
    prompt_tokens=45_000,
    completion_tokens=6_700,
    shards=5,
    rows_this_run=240,
    rows_per_second=12.34,
    tokens_per_second=567.8,
    seconds={"plan": 0.5, "start": 2.0, "run": 19.44, "commit": 0.1, "total": 22.04},
    already_complete=False,
    errors_by_code={"prompt_too_long": 2, "invalid_request": 1},
)


def test_report_reads_as_a_table() -> None:
    assert str(REPORT) == repr(REPORT)
    assert str(REPORT).splitlines() == [
        "output   answers/",
        "rows     1,200 in 5 shards, 240 answered by this run",
        "errors   3 (invalid_request 1, prompt_too_long 2)",
        "tokens   45,000 prompt, 6,700 generated",
        "speed    12.3 rows/s, 568 generated tokens/s",
        "seconds  plan 0.5, start 2.0, run 19.4, commit 0.1, total 22.0",
    ]


def test_report_of_a_finished_job_says_so() -> None:
    again = replace(REPORT, already_complete=True, rows_this_run=0, errors=0, errors_by_code={})
    assert str(again).splitlines()[0] == "output   answers/ (already complete: nothing was left to do)"
    assert str(again).splitlines()[2] == "errors   0"
    assert not any(line.startswith(("speed", "seconds")) for line in str(again).splitlines()), "nothing was measured"


def test_report_says_where_rows_with_errors_are_listed() -> None:
    listed = replace(REPORT, errors_file="answers/_errors.jsonl")
    assert str(listed).splitlines()[2] == (
        "errors   3 (invalid_request 1, prompt_too_long 2), listed in answers/_errors.jsonl"
    )
    assert "listed" not in str(replace(listed, errors=0, errors_by_code={}))


def test_report_says_where_its_page_is() -> None:
    assert str(replace(REPORT, page="answers/_report/report.html")).splitlines()[-1] == (
        "report   answers/_report/report.html"
    )


def test_report_survives_json(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(REPORT.to_dict()))
    assert BatchReport(**json.loads(path.read_text())) == REPORT


def test_report_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        REPORT.rows = 1  # type: ignore[misc]


def test_phases_add_up() -> None:
    clock = Clock()
    phases = Phases(clock=clock)
    with phases.phase("plan"):
        clock.now += 1.0
    clock.now += 0.5  # between two phases
    for _ in range(2):
        with phases.phase("run"):
            clock.now += 3.0
    assert phases.seconds() == {"plan": 1.0, "start": 0.0, "run": 6.0, "commit": 0.0, "total": 7.5}


def test_phase_counts_when_it_fails() -> None:
    clock = Clock()
    phases = Phases(clock=clock)

    def commit() -> None:
        with phases.phase("commit"):
            clock.now += 2.0
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk"):
        commit()
    assert phases.seconds()["commit"] == 2.0
