"""The lease on an output folder: one driver at a time, on storage alone.

A lease is a small file `_lease/000001.json`. It is created, never replaced by another driver; the one with the highest
number counts. Its owner rewrites it every few seconds: the heartbeat. Who finds a lease looks whether it changes; when
it does, its owner lives, and the newcomer is refused. When it has not changed for the lease's whole time to live, on
the newcomer's own clock, or its owner gave it back, or ran on this machine and is gone, then the newcomer creates the
file with the next number. No two clocks are compared.

A driver that was only slow finds the higher number at its next heartbeat and stops. What it did in between is
harmless, because parts, receipts and the manifest are created only once.
"""

import json
import logging
import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Thread
from typing import Literal

from pipeline.batch.layout import LEASE
from pipeline.errors import LeaseLostError, OutputError, OutputInUseError
from pipeline.storage import Storage

logger = logging.getLogger(__name__)

LEASE_SECONDS = 60.0
BEATS_PER_LIFE = 12  # heartbeats in a lease's time to live
MAX_SECONDS = 3600.0
_NAME = re.compile(rf"{LEASE}/(\d{{6,}})\.json")

Liveness = Literal["alive", "dead", "unknown"]
Clock = Callable[[], float]
Sleep = Callable[[float], None]


@dataclass(frozen=True)
class LeaseRecord:
    """What a lease's file says.

    Args:
        owner: A random name of this holding of the lease.
        host: The machine's name, for people.
        machine: The boot of the machine and its process namespace; empty when the system does not tell.
        pid: The driver's process.
        process_start: When the process began, in the system's ticks: a process id may be given out again.
        since: When the lease was taken, by the owner's clock, for people.
        seconds: The time to live.
        beat: Counts the heartbeats.
        released: The owner gave it back.
    """

    owner: str
    host: str
    machine: str
    pid: int
    process_start: int
    since: str
    seconds: float
    beat: int = 0
    released: bool = False

    @classmethod
    def mine(cls, seconds: float) -> "LeaseRecord":
        """A new record of this process."""
        return cls(
            owner=str(uuid.uuid4()),
            host=socket.gethostname(),
            machine=this_machine(),
            pid=os.getpid(),
            process_start=process_start(os.getpid()) or 0,
            since=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=float(seconds),
        )

    @classmethod
    def from_json(cls, data: bytes) -> "LeaseRecord | None":
        """The record of a lease's file; None when the file says something else."""
        try:
            values = json.loads(data)
        except ValueError:
            return None
        kinds = {item.name: item.type for item in fields(cls)}
        if not isinstance(values, dict) or values.keys() != kinds.keys():
            return None
        if any(type(value) is not kinds[name] for name, value in values.items()):
            return None
        is_sane = 0 < values["seconds"] <= MAX_SECONDS and values["pid"] > 0
        return cls(**values) if is_sane else None

    def to_json(self) -> bytes:
        """The record as the file holds it."""
        return json.dumps(asdict(self), indent=1).encode() + b"\n"

    def is_gone(self) -> bool:
        """Whether the owner is known not to run any more: it ran on this machine, and its process has ended."""
        if not self.machine or self.machine != this_machine():
            return False
        try:
            os.kill(self.pid, 0)  # no signal: it only asks
        except ProcessLookupError:
            return True
        except PermissionError:  # another user's: when it began may be hidden, too
            return False
        return process_start(self.pid) != self.process_start

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class Lease:
    """The right to drive one job in one output folder, while it lasts. `hold` makes one.

    Args:
        storage: The output folder.
        number: The lease's number.
        record: What its file says.
    """

    def __init__(self, storage: Storage, number: int, record: LeaseRecord) -> None:
        self._storage = storage
        self._record = record
        self._lost_to: str | None = None
        self.number = number

    def check(self) -> None:
        """Go on only while no other driver is known to have taken over; looks at nothing but this process's memory.

        Raises:
            LeaseLostError: Another has.
        """
        if self._lost_to is not None:
            raise LeaseLostError(
                f"another driver has taken over {self._storage.url('')}",
                details=[f"it is {self._lost_to}", f"this one was {self._record}"],
                hint="Nothing is lost: let the other one finish. This one did not renew its lease in time; "
                "a higher lease_seconds bears longer pauses.",
            )

    def confirm(self) -> None:
        """Look at the storage, and go on only if no other driver has taken over.

        Raises:
            LeaseLostError: Another has.
        """
        if any(number > self.number for number in _numbers(self._storage)):
            found = top_lease(self._storage)
            record = LeaseRecord.from_json(found[1]) if found is not None else None
            self._lost_to = str(record or "not known any more")
        self.check()

    def renew(self) -> None:
        """Write the next heartbeat.

        Raises:
            LeaseLostError: Another driver has taken over.
            OutputError: It cannot be written.
        """
        self.confirm()
        self._record = replace(self._record, beat=self._record.beat + 1)
        self._storage.replace(lease_name(self.number), self._record.to_json())

    def release(self) -> None:
        """Give the lease back, so that the next driver need not wait. Nothing when it is lost."""
        try:
            self.confirm()
            self._record = replace(self._record, released=True)
            self._storage.replace(lease_name(self.number), self._record.to_json())
        except LeaseLostError:
            return
        except OutputError as error:
            logger.warning(
                "the lease cannot be given back (%s); the next driver waits %g s", error.message, self._record.seconds
            )

    @contextmanager
    def kept_alive(self) -> Iterator[None]:
        """Renew the lease in a thread while inside."""
        stopped = Event()
        thread = Thread(target=self._beat, args=(stopped,), name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stopped.set()
            thread.join()

    def _beat(self, stopped: Event) -> None:
        while not stopped.wait(self._record.seconds / BEATS_PER_LIFE):
            try:
                self.renew()
            except LeaseLostError as error:
                logger.warning("%s", error.message)
                return
            except OutputError as error:
                logger.warning("the lease cannot be renewed now: %s", error.message)


@contextmanager
def hold(storage: Storage, *, seconds: float = LEASE_SECONDS) -> Iterator[Lease]:
    """Hold the lease on an output folder while inside; it is given back at the end, whatever the end is.

    Args:
        storage: The output folder.
        seconds: A driver that shows no sign of life for so long may be replaced by another.

    Raises:
        OutputInUseError: Another driver holds it and is alive.
        OutputError: The folder cannot be read or written.
    """
    lease = acquire(storage, seconds=seconds)
    try:
        with lease.kept_alive():
            yield lease
    finally:
        lease.release()


def acquire(
    storage: Storage, *, seconds: float = LEASE_SECONDS, clock: Clock = time.monotonic, sleep: Sleep = time.sleep
) -> Lease:
    """Take the lease on an output folder; waits as long as it takes to see whether its owner is alive.

    Args:
        storage: The output folder.
        seconds: The time to live of the lease that is taken.
        clock: Seconds that never go back.
        sleep: Waits so many seconds.

    Raises:
        OutputInUseError: Another driver holds it and is alive.
        OutputError: The folder cannot be read or written.
    """
    watch = LeaseWatch(clock)
    is_told = False
    while True:
        found = top_lease(storage)
        number = 1
        if found is not None:
            state = watch.look(*found)
            if state == "alive":
                raise _in_use(storage, LeaseRecord.from_json(found[1]))
            if state == "unknown":
                if not is_told:
                    holder = LeaseRecord.from_json(found[1]) or "an unknown driver"
                    logger.warning("the output is held by %s; waiting to see whether it is alive", holder)
                    is_told = True
                sleep(watch.pause)
                continue
            number = found[0] + 1
        record = LeaseRecord.mine(seconds)
        if not storage.create(lease_name(number), record.to_json()):
            continue
        numbers = _numbers(storage)
        if max(numbers) == number:  # else this one was slow: others came and went since it looked
            storage.remove([lease_name(lower) for lower in numbers if lower < number])
            return Lease(storage, number, record)


class LeaseWatch:
    """Tells whether the owner of a lease lives, by looking at its file again and again.

    Args:
        clock: Seconds that never go back; this process's own.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._seen: tuple[int, bytes] | None = None
        self._since = 0.0
        self._seconds = LEASE_SECONDS

    @property
    def pause(self) -> float:
        """Seconds until the next look."""
        return min(1.0, self._seconds / BEATS_PER_LIFE / 2)

    @property
    def watched(self) -> float:
        """Seconds for which the file has not changed."""
        return self._clock() - self._since

    @property
    def beat_seconds(self) -> float:
        """Seconds between two heartbeats of the owner."""
        return self._seconds / BEATS_PER_LIFE

    def look(self, number: int, data: bytes) -> Liveness:
        """What is known of a lease now: `alive`, `dead` (may be taken over) or `unknown` (look again).

        Args:
            number: The lease's number.
            data: Its file's content now.
        """
        record = LeaseRecord.from_json(data)
        if record is not None and (record.released or record.is_gone()):
            return "dead"
        if self._seen != (number, data):
            has_changed = self._seen is not None and self._seen[0] == number
            self._seen, self._since = (number, data), self._clock()
            self._seconds = record.seconds if record is not None else LEASE_SECONDS
            return "alive" if has_changed else "unknown"
        return "dead" if self.watched >= self._seconds else "unknown"


def top_lease(storage: Storage) -> tuple[int, bytes] | None:
    """Number and content of the lease that counts; None when there has never been one."""
    numbers = _numbers(storage)
    while numbers:
        number = max(numbers)
        try:
            return number, storage.read(lease_name(number))
        except OutputError:
            numbers = _numbers(storage)  # gone, because a higher one has come since
            if not numbers or max(numbers) == number:
                raise
    return None


def lease_name(number: int) -> str:
    """The name of a lease's file, e.g. `_lease/000001.json`."""
    return f"{LEASE}/{number:06d}.json"


def this_machine() -> str:
    """What tells this machine, since it was started, and this process namespace from all others; empty if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def process_start(pid: int) -> int | None:
    """When a process of this machine began, in ticks since the machine started; None when it has ended."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if after_name[0] in "ZX" else int(after_name[19])


def _numbers(storage: Storage) -> list[int]:
    return [int(match[1]) for name in storage.list(LEASE) if (match := _NAME.fullmatch(name))]


def _in_use(storage: Storage, record: LeaseRecord | None) -> OutputInUseError:
    return OutputInUseError(
        f"another driver is writing to {storage.url('')}",
        details=[f"it is {record}"] if record is not None else [],
        hint="Wait until it ends, end it, or name another output folder; when it ends, the same command continues.",
    )
