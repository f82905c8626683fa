"""What a shard ended its worker with: notes of the rows that a worker is about to try, and what follows from them.

A worker that is ended by a row (a crash of native code, too much memory, a hang) leaves no word of it. So a worker that
was started again, or belongs to a job that was, writes down which rows it tries before it tries them: a note that is
there when the shard comes again, and no part, means that these rows, or somebody, ended the process. Such a shard is
tried alone, then in ever smaller ranges, until the row is found that does it each time. A shard that is answered at
once by a worker that was never lost has no notes at all.

_attempts/shards/00012/0003.json   {"start", "stop": the rows; "alone": nothing else ran; "deaths": ranges tried before}
_attempts/shards/00012/0003.txt    why the process ended itself, when it knew
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import NamedTuple

from pipeline.batch.layout import ATTEMPTS
from pipeline.errors import OutputError, WorkerLostError
from pipeline.storage import Storage

ROW_KILLS_WORKER = "row_kills_worker"
FOLDER = f"{ATTEMPTS}/shards"
NUM_PIECES = 16  # a worker's death costs far more than a note, so that a range is cut into many pieces, not two
DEATHS_TO_BLAME = 2  # so often a row must have ended its worker, with no other row beside it
MAX_DEATHS = 24  # of one shard; then it is not a row that does it


class Range(NamedTuple):
    """Rows of a shard, from `start` up to `stop`."""

    start: int
    stop: int

    def pieces(self) -> "list[Range]":
        """The range cut into at most `NUM_PIECES` ranges; one of a single row stays as it is."""
        size = max(1, -(-(self.stop - self.start) // NUM_PIECES))
        return [Range(at, min(at + size, self.stop)) for at in range(self.start, self.stop, size)]


@dataclass(frozen=True)
class History:
    """What the notes of a shard say.

    Args:
        num_notes: How many there are.
        deaths: The ranges that were tried alone when the process ended, in order.
        reason: Why a process ended itself the last time it said so.
    """

    num_notes: int = 0
    deaths: tuple[Range, ...] = ()
    reason: str | None = None

    @property
    def is_suspect(self) -> bool:
        """Whether a worker ended while it was answering this shard."""
        return self.num_notes > 0


@dataclass(frozen=True)
class TrialPlan:
    """How a suspect shard is answered: `ranges` one by one, in order, and `killers` not at all."""

    ranges: tuple[Range, ...]
    killers: tuple[int, ...]


def plan_trials(num_rows: int, deaths: Sequence[Range]) -> TrialPlan:
    """Cut a shard so that what ended a worker is tried in smaller ranges.

    Args:
        num_rows: Rows in the shard.
        deaths: The ranges that were tried alone when a worker ended; from this function.
    """
    ranges = [Range(0, num_rows)] if num_rows else []
    for death in deaths:
        at = next((place for place, one in enumerate(ranges) if one == death), None)
        if at is not None:
            ranges[at : at + 1] = death.pieces()
    blamed = {one for one, times in Counter(deaths).items() if one.stop - one.start == 1 and times >= DEATHS_TO_BLAME}
    return TrialPlan(
        tuple(one for one in ranges if one not in blamed),
        tuple(sorted(one.start for one in blamed)),
    )


class Trials:
    """The notes of a job's shards, on its storage; the workers' own, from any thread.

    Args:
        storage: The output folder.
        is_noting: Whether ranges are noted before they are tried; False where no worker was ever lost.
    """

    def __init__(self, storage: Storage, *, is_noting: bool) -> None:
        self._storage = storage
        self._is_noting = is_noting
        self._open: set[str] = set()  # notes of what is being tried in this process
        self._lock = Lock()

    def history(self, shard: int) -> History:
        """What is known of a shard.

        Raises:
            OutputError: A note is damaged.
            WorkerLostError: The shard has ended so many workers that no row of it can be to blame.
        """
        if not self._is_noting:
            return History()
        names = list(self._storage.list(_folder(shard)))
        notes = [name for name in names if name.endswith(".json")]
        if not notes:
            return History()
        reasons = [name for name in names if name.endswith(".txt")]
        reason = self._storage.read(reasons[-1]).decode(errors="replace") if reasons else None
        tried, is_alone, deaths = self._read(notes[-1])
        history = History(len(notes), (*deaths, tried) if is_alone else deaths, reason)
        if len(history.deaths) > MAX_DEATHS:
            raise WorkerLostError(
                f"shard {shard} has ended {len(history.deaths)} workers, whichever of its rows they answered",
                details=[reason] if reason else [],
                hint="Look into the workers' logs (ray logs). To try the shard again, delete "
                f"{self._storage.url(_folder(shard))} and run the same command.",
            )
        return history

    def begin(self, shard: int, rows: Range, history: History, *, is_alone: bool) -> History:
        """Note that a range is about to be tried; `end` when it is answered.

        Args:
            shard: The shard.
            rows: The range.
            history: What was known before.
            is_alone: Whether this worker answers nothing else meanwhile.

        Returns:
            The history for the next range.

        Raises:
            OutputError: The note cannot be written.
        """
        if not self._is_noting:
            return history
        note = {"start": rows.start, "stop": rows.stop, "alone": is_alone, "deaths": history.deaths}
        data = json.dumps(note).encode()
        number = history.num_notes
        while not self._storage.create(name := f"{_folder(shard)}/{number:04d}.json", data):
            number += 1  # another process answers the same shard
        with self._lock:
            self._open.add(name)
        return replace(history, num_notes=number + 1)

    def end(self, shard: int) -> None:
        """Forget what is being tried of a shard: this process has survived it."""
        prefix = f"{_folder(shard)}/"
        with self._lock:
            self._open = {name for name in self._open if not name.startswith(prefix)}

    def explain(self, reason: str) -> None:
        """Write why this process is about to end itself beside the notes of what it tries."""
        with self._lock:
            names = sorted(self._open)
        for name in names:
            self._storage.create(name.removesuffix(".json") + ".txt", reason.encode(errors="replace"))

    def _read(self, name: str) -> tuple[Range, bool, tuple[Range, ...]]:
        try:
            note = json.loads(self._storage.read(name))
            return Range(note["start"], note["stop"]), bool(note["alone"]), _ranges(note["deaths"])
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(
                f"{self._storage.url(name)} is damaged: {error!r}",
                hint="Delete its folder, and run the same command again.",
            ) from error


def _ranges(values: Iterable[tuple[int, int]]) -> tuple[Range, ...]:
    return tuple(Range(start, stop) for start, stop in values)


def _folder(shard: int) -> str:
    return f"{FOLDER}/{shard:05d}"
