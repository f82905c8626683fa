"""What is measured of one running server: levels of concurrency, Poisson arrivals, overload, what the gateway adds."""

import asyncio
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.work import cpu_seconds, own_processes
from benchmarks.registry import Peer, environment_of
from benchmarks.serve_client import Outcome, connected
from benchmarks.serve_load import Load, closed_loop, open_loop, poisson_arrivals, summary
from benchmarks.serve_peers.direct import MARK
from benchmarks.serve_requests import Scene
from benchmarks.serve_servers import LOOK_SECONDS, RunningServer, free_port, last_lines, running

GATEWAY_CONCURRENCY = (1, 32)
GATEWAY_ROUNDS = 4
OVERLOAD_FACTOR = 10.0
OVERLOAD_SECONDS = 5.0
MOST_ARRIVALS = 10_000
CALM_SECONDS = 30.0
Say = Callable[[str], None]


@dataclass(frozen=True)
class Bounds:
    """How much is asked at a level.

    Args:
        per_client: Requests for each client of a closed loop,
        least: but at least so many,
        most: and at most so many.
        seconds: After so long no request is begun any more.
        patience: After so much longer what has no answer is given up.
    """

    per_client: int = 8
    least: int = 32
    most: int = 1024
    seconds: float = 10.0
    patience: float = 60.0

    def num_requests(self, concurrency: int) -> int:
        """How many requests a level of a closed loop has, at most."""
        return max(min(max(self.per_client * concurrency, self.least), self.most), concurrency)


class Watch:
    """Who used the processors while something was measured.

    `shares` has `client_share` of one core, `others_share` of all, and `cpu_seconds` of the server's programs by title.
    """

    def __init__(self) -> None:
        self.shares: dict[str, Any] = {}

    @contextmanager
    def on(self) -> Iterator[None]:
        """Measure what happens inside."""
        programs_before = _cpu_by_program()
        before, all_before, own_before, client_before = time.monotonic(), *cpu_seconds(), time.process_time()
        yield
        seconds = time.monotonic() - before
        (all_after, own_after), client = cpu_seconds(), time.process_time() - client_before
        others = max(0.0, (all_after - all_before) - (own_after - own_before))
        self.shares = {
            "client_share": client / seconds,
            "others_share": others / (seconds * (os.cpu_count() or 1)),
            "cpu_seconds": {
                title: used
                for title, seconds in _cpu_by_program().items()
                if (used := round(seconds - programs_before.get(title, 0.0), 2)) > 0
            },
        }


def _cpu_by_program() -> dict[str, float]:
    """Processor time so far of what this process has started, by title, in seconds; nothing without /proc."""
    ticks = os.sysconf("SC_CLK_TCK")
    total: defaultdict[str, float] = defaultdict(float)
    for process in own_processes():
        with contextlib.suppress(OSError):  # it ended meanwhile
            words = (process / "cmdline").read_bytes().split(b"\0")
            fields = (process / "stat").read_text().rpartition(")")[2].split()
            if process.name != str(os.getpid()):
                title = words[0].decode(errors="replace").strip()
                total[title if title.startswith("ray::") else Path(title).name] += sum(map(int, fields[11:13])) / ticks
    return dict(total)


async def measure_closed(
    server: RunningServer, concurrency: int, *, first: int, bounds: Bounds, stream: bool
) -> tuple[dict[str, Any], Load]:
    """One level of a closed loop.

    Args:
        server: Who is asked.
        concurrency: How many clients.
        first: Number of the first request; equal for all servers, so that they are asked the same.
        bounds: How much is asked.
        stream: Whether answers are asked for as they are generated.

    Returns:
        The figures: `benchmarks.serve_load.summary`, `concurrency` and the shares of `Watch`; and what they are of.
    """
    watch = Watch()
    async with server.asked(stream=stream) as send:
        with watch.on():
            load = await closed_loop(
                send,
                concurrency,
                num_requests=bounds.num_requests(concurrency),
                first=first,
                seconds=bounds.seconds,
                patience=bounds.patience,
            )
    return {"concurrency": concurrency, **summary(load), **watch.shares}, load


async def measure_open(
    server: RunningServer, rate: float, *, first: int, bounds: Bounds, stream: bool, seed: int = 0
) -> dict[str, Any]:
    """Poisson arrivals at a rate, in requests a second; the arguments and figures are those of `measure_closed`."""
    watch = Watch()
    arrivals = poisson_arrivals(rate, bounds.seconds, seed=seed, most=MOST_ARRIVALS)
    async with server.asked(stream=stream) as send:
        with watch.on():
            load = await open_loop(send, arrivals, first=first, patience=bounds.patience)
    return {"rate": rate, **summary(load), **watch.shares}


async def measure_overload(server: RunningServer, capacity: float, *, first: int, stream: bool) -> dict[str, Any]:
    """Ten times the arrivals that the server can answer; then one more request, which must be answered.

    Args:
        server: Who is asked.
        capacity: Requests a second that it can answer.
        first: Number of the first request.
        stream: Whether answers are asked for as they are generated.

    Returns:
        Beside what `measure_open` gives, `server_errors` (responses of 500 and above, streams that ended with an error,
        broken connections), `refused` (429), and `calm_ms`: how long the request afterwards took, None if it failed.
    """
    bounds = Bounds(seconds=OVERLOAD_SECONDS, patience=2 * CALM_SECONDS)
    figures = await measure_open(server, OVERLOAD_FACTOR * capacity, first=first, bounds=bounds, stream=stream)
    refused = figures["statuses"].get("429", 0)
    other = figures["requests"] - figures["finished"] - refused
    async with server.asked(stream=stream) as send:
        after = await _patiently(send(first), CALM_SECONDS)
    calm = after.seconds * 1e3 if after is not None and after.error is None else None
    return {"capacity": capacity, **figures, "refused": refused, "server_errors": other, "calm_ms": calm}


async def _patiently(asking: Any, seconds: float) -> Outcome | None:
    try:
        async with asyncio.timeout(seconds):
            outcome: Outcome = await asking
            return outcome
    except TimeoutError:
        return None


async def measure_gateway(scene: Scene, *, num_requests: int, stream: bool, say: Say) -> dict[str, Any]:
    """What the gateway adds: the same requests to one service, over HTTP and by its replica's handle, in turn.

    Every request is asked once before, and each way goes first as often as the other.

    Args:
        scene: What is served.
        num_requests: How many requests a round has.
        stream: Whether answers are asked for as they are generated.
        say: Is told what goes on.

    Returns:
        For each concurrency `gateway` and `handle`, the medians of the rounds (`total_p50_ms`, `first_p50_ms`,
        `requests_per_second`), and `added_ms`, `added_first_ms` and `lost_share` of the throughput; `rounds`, all.

    Raises:
        RuntimeError: The service did not start, or did not answer everything.
    """
    names = [expert.name for expert in scene.experts]
    more = {"ignore_eos": True, **({"stream_options": {"include_usage": True}} if stream else {})}
    bodies = [
        scene.body(number, model=names[scene.requests[number].expert], stream=stream, more=more)
        for number in range(num_requests)
    ]
    port = free_port()
    options = {
        "experts": [{"package": str(expert.package), "pin": True} for expert in scene.experts],
        "base_model": str(scene.base.absolute()),
        "port": port,
    }
    python = Path(sys.executable)
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.json"
        job.write_text(json.dumps({"options": options, "bodies": bodies}))
        command = [str(python), "-m", "benchmarks.serve_peers.direct", str(job)]
        environment = environment_of(Peer("serve", ""), python)
        async with running(command, environment, Path(folder) / "log", talks=True) as (process, log):
            direct = _Direct(process, log)
            await direct.line("http", 120.0)
            async with connected(f"http://127.0.0.1:{port}") as client:

                async def by_http(number: int) -> Outcome:
                    return await client.send(number, bodies[number])

                async def gateway(concurrency: int, last: int) -> dict[str, Any]:
                    return summary(await closed_loop(by_http, concurrency, num_requests=last, patience=CALM_SECONDS))

                ways = {"gateway": gateway, "handle": direct.measure}
                for way in ways.values():
                    await way(GATEWAY_CONCURRENCY[-1], num_requests)
                levels = []
                for concurrency in GATEWAY_CONCURRENCY:
                    last = num_requests if concurrency > 1 else max(num_requests // 8, 16)
                    rounds: list[dict[str, Any]] = []
                    for at in range(GATEWAY_ROUNDS):
                        turn = list(ways) if at % 2 == 0 else list(ways)[::-1]
                        rounds.append({name: await ways[name](concurrency, last) for name in turn})
                    levels.append(compare_ways(concurrency, rounds))
                    say(f"gateway against handle, {concurrency} at once: {levels[-1]['added_ms']:+.1f} ms")
                return {"levels": levels}


class _Direct:
    """The program of `benchmarks.serve_peers.direct`."""

    def __init__(self, process: Any, log: Path) -> None:
        self._process = process
        self._log = log
        self._num_read = 0

    async def measure(self, concurrency: int, last: int) -> dict[str, Any]:
        self._process.stdin.write(json.dumps({"concurrency": concurrency, "numbers": [0, last]}) + "\n")
        self._process.stdin.flush()
        figures: dict[str, Any] = json.loads((await self.line(MARK, 300.0)).removeprefix(MARK))
        return figures

    async def line(self, start: str, seconds: float) -> str:
        """The next line of its output that starts so."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            # What is not yet a whole line is read again.
            lines = self._log.read_text(errors="replace").splitlines(keepends=True)
            for number, line in enumerate(lines[self._num_read :], self._num_read + 1):
                if line.startswith(start) and line.endswith("\n"):
                    self._num_read = number
                    return line.strip()
            if self._process.poll() is not None:
                break
            await asyncio.sleep(LOOK_SECONDS)
        raise RuntimeError(f"the service said nothing that begins with {start!r}\n{last_lines(self._log)}")


def compare_ways(concurrency: int, rounds: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """The medians of the rounds, and how they differ; see `measure_gateway`.

    Raises:
        RuntimeError: A request was not answered.
    """
    failed = [dict(one["errors"]) for both in rounds for one in both.values() if one["errors"]]
    if failed:
        raise RuntimeError(f"not everything was answered: {failed}")
    medians = {
        name: {
            "total_p50_ms": statistics.median(both[name]["total_ms"]["p50"] for both in rounds),
            "first_p50_ms": statistics.median(both[name]["first_ms"].get("p50", 0.0) for both in rounds),
            "requests_per_second": statistics.median(both[name]["requests_per_second"] for both in rounds),
        }
        for name in ("gateway", "handle")
    }
    gateway, handle = medians["gateway"], medians["handle"]
    return {
        "concurrency": concurrency,
        **medians,
        "added_ms": gateway["total_p50_ms"] - handle["total_p50_ms"],
        "added_first_ms": gateway["first_p50_ms"] - handle["first_p50_ms"],
        "lost_share": 1.0 - gateway["requests_per_second"] / handle["requests_per_second"],
        "rounds": [dict(both) for both in rounds],
    }
