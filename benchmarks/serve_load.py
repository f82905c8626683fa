"""Two ways to ask a server for much, and what comes out: so many clients that each wait for their answer, or arrivals
that wait for nobody."""

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.serve_client import NOT_FINISHED, Outcome

Send = Callable[[int], Awaitable[Outcome]]
PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Load:
    """What a server was asked for at one level, and what became of it.

    Args:
        outcomes: Of every request that was begun, in the order in which they ended; what was given up comes last.
        seconds: From the first request to the last end.
        lateness: The most that an arrival was behind its time, in seconds: how well the client kept up.
    """

    outcomes: tuple[Outcome, ...]
    seconds: float
    lateness: float = 0.0

    @property
    def finished(self) -> tuple[Outcome, ...]:
        """Those with a whole answer."""
        return tuple(one for one in self.outcomes if one.error is None)

    @property
    def num_given_up(self) -> int:
        """Those that the client stopped waiting for."""
        return sum(one.error == NOT_FINISHED for one in self.outcomes)


async def closed_loop(
    send: Send, concurrency: int, *, num_requests: int, first: int = 0, seconds: float = math.inf, patience: float
) -> Load:
    """So many clients, each with one request at a time: it sends the next one as soon as its answer is there.

    Args:
        send: Sends the request of a number.
        concurrency: How many clients.
        num_requests: How many requests all of them send together.
        first: Number of the first one.
        seconds: After so long no request is begun any more.
        patience: After so much longer those that have no answer are given up.
    """
    numbers = iter(range(first, first + num_requests))
    running = _Running(send)
    until = time.monotonic() + seconds

    async def client() -> None:
        for number in numbers:
            if time.monotonic() >= until:
                return
            await running.run(number)

    clients = [asyncio.ensure_future(client()) for _ in range(min(concurrency, num_requests))]
    await _finished(clients, None if seconds == math.inf else seconds + patience)
    return running.load()


async def open_loop(send: Send, arrivals: Sequence[float], *, first: int = 0, patience: float) -> Load:
    """Requests that come when they come, whether or not those before have an answer.

    Args:
        send: Sends the request of a number.
        arrivals: When each comes, in seconds from the start, in order.
        first: Number of the first one.
        patience: So long after the last arrival those that have no answer are given up.
    """
    running = _Running(send)
    started = time.monotonic()
    tasks: list[asyncio.Future[None]] = []
    lateness = 0.0
    for number, at in enumerate(arrivals, first):
        wait = started + at - time.monotonic()
        lateness = max(lateness, -wait)
        # Those that are due go at once; but what is under way has its turn, too.
        await asyncio.sleep(max(wait, 0.0))
        tasks.append(asyncio.ensure_future(running.run(number)))
    await _finished(tasks, patience)
    return running.load(lateness)


def poisson_arrivals(rate: float, seconds: float, *, seed: int = 0, most: int | None = None) -> list[float]:
    """The times of a Poisson process: arrivals that know nothing of each other.

    Args:
        rate: Arrivals a second, on average.
        seconds: How long they go on.
        seed: The same seed gives the same times.
        most: At most so many; None for no bound.

    Returns:
        Seconds from the start, rising.
    """
    draw = random.Random(seed)
    times: list[float] = []
    at = draw.expovariate(rate)
    while at < seconds and (most is None or len(times) < most):
        times.append(at)
        at += draw.expovariate(rate)
    return times


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that so much of all values does not exceed (the nearest rank).

    Args:
        values: At least one, in any order.
        share: In per cent, more than 0.
    """
    return sorted(values)[max(math.ceil(len(values) * share / 100), 1) - 1]


def summary(load: Load) -> dict[str, Any]:
    """A load in figures.

    Rates count whole answers alone. Times are those of the whole answers and of what was given up, which took at least
    as long as it was waited for; with any of those, `is_lower_bound` says that the percentiles may be higher.

    Returns:
        `requests`, `finished`, `seconds`, `requests_per_second`, `output_tokens_per_second`, `mean_output_tokens`,
        `first_ms` and `total_ms` (`p50`, `p95`, `p99`), `statuses` and `errors` (how many of each), `given_up`,
        `is_lower_bound`, `lateness_ms`.
    """
    finished = load.finished
    given_up = [one for one in load.outcomes if one.error == NOT_FINISHED]
    first = [one.first_seconds for one in finished if one.first_seconds is not None]
    first += [one.seconds if one.first_seconds is None else one.first_seconds for one in given_up]
    num_tokens = sum(one.output_tokens for one in finished)
    statuses = Counter("none" if one.status is None else str(one.status) for one in load.outcomes)
    errors = Counter(one.error for one in load.outcomes if one.error is not None)
    return {
        "requests": len(load.outcomes),
        "finished": len(finished),
        "seconds": load.seconds,
        "requests_per_second": len(finished) / load.seconds if load.seconds else 0.0,
        "output_tokens_per_second": num_tokens / load.seconds if load.seconds else 0.0,
        "mean_output_tokens": num_tokens / len(finished) if finished else 0.0,
        "first_ms": _percentiles(first),
        "total_ms": _percentiles([one.seconds for one in (*finished, *given_up)]),
        "statuses": dict(sorted(statuses.items())),
        "errors": dict(sorted(errors.items())),
        "given_up": len(given_up),
        "is_lower_bound": bool(given_up),
        "lateness_ms": load.lateness * 1e3,
    }


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    return {f"p{share}": percentile(seconds, share) * 1e3 for share in PERCENTILES} if seconds else {}


class _Running:
    """Takes note of what is begun and what becomes of it."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._outcomes: list[Outcome] = []
        self._given_up: list[Outcome] = []
        self._started = self._ended = time.monotonic()

    async def run(self, number: int) -> None:
        begun = time.monotonic()
        try:
            outcome = await self._send(number)
        except asyncio.CancelledError:
            self._given_up.append(Outcome(number, begun, time.monotonic() - begun, error=NOT_FINISHED))
            raise
        self._outcomes.append(outcome)
        self._ended = time.monotonic()

    def load(self, lateness: float = 0.0) -> Load:
        # Time that is only waited for those that are given up counts: the server had it.
        ended = time.monotonic() if self._given_up else self._ended
        return Load((*self._outcomes, *self._given_up), ended - self._started, lateness)


async def _finished(tasks: Sequence["asyncio.Future[None]"], seconds: float | None) -> None:
    """Wait for all, so long; give up the others. An error of ours is raised."""
    if not tasks:
        return
    _, late = await asyncio.wait(tasks, timeout=seconds)
    for task in late:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
            raise result
