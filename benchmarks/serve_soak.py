"""Minutes of mixed load on `expert serve`, with a replica killed again and again: is every request answered or refused?

python -m benchmarks.serve_soak                          ten minutes, a replica killed every minute
python -m benchmarks.serve_soak --minutes 2 --kill-seconds 30 --clients 16 --replicas 2 --json out.json

The exit code is 1 when a request was neither answered nor refused cleanly, an answer was another one than before,
memory grew, or the service did not end as it should. Linux only: processes are found and measured through /proc.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe, one_line
from benchmarks.serve_soak_traffic import Tally, Traffic
from pipeline import demo

SAMPLE_SECONDS = 1.0
START_SECONDS = 180.0
END_SECONDS = 120.0
REQUEST_SECONDS = 120.0  # an answer that takes longer hangs
AGE_SECONDS = 20.0  # a process younger than this still grows
GROWTH = 0.10  # of a process's memory: what is called flat
GROWTH_BYTES = 24 << 20
GATEWAY = "gateway"  # the command's own process
ROLES: Mapping[str, str] = {  # of Ray's processes, by how their command lines begin
    "replica": "ray::ServeReplica:expert:ExpertReplica",
    "controller": "ray::ServeController",
}
_URL = re.compile(r"(http://\S+)  ")


@dataclass
class Life:
    """The memory of one process.

    Args:
        role: What it does.
        born: When it was first seen, in seconds since the load began.
        samples: Seconds since the load began, and resident bytes.
    """

    role: str
    born: float
    samples: list[tuple[float, int]] = field(default_factory=list)

    def grown(self) -> list[int]:
        """Its memory once it was no longer young."""
        return [size for at, size in self.samples if at - self.born >= AGE_SECONDS]


@dataclass(frozen=True)
class Verdict:
    """What the soak found.

    Args:
        problems: What should not have been; none of it for a pass.
        memory: A line for each role.
    """

    problems: Sequence[str]
    memory: Sequence[str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the soak that the arguments describe; 0 if all was as it should be, else 1."""
    options = _parser().parse_args(arguments)
    console = Console(width=140)
    console.print(one_line(describe()), highlight=False)
    with tempfile.TemporaryDirectory(prefix="expert-soak-") as folder:
        log = Path(folder) / "log"
        with log.open("wb") as output, _start(options, output) as process:
            try:
                url = _wait_for_url(process, log)
                soak = Soak(process.pid, url, options)
                asyncio.run(soak.run())
                ended = _end(process)
            finally:
                _kill_group(process)
        said = log.read_text(errors="replace")
    verdict = judge(soak, ended, said)
    _print(console, soak, verdict)
    if options.json is not None:
        options.json.write_text(json.dumps(_as_json(soak, verdict), indent=2) + "\n")
    return 1 if verdict.problems else 0


class Soak:
    """The load, the killing and the measuring.

    Args:
        pid: Of the command that serves.
        url: Where it answers.
        options: The command's.
    """

    def __init__(self, pid: int, url: str, options: argparse.Namespace) -> None:
        self.lives: dict[int, Life] = {}
        self.kills: list[float] = []
        self.recoveries: list[float] = []
        self.seconds = options.minutes * 60.0
        self.tally = Tally()
        self._pid = pid
        self._url = url
        self._options = options

    async def run(self) -> None:
        """Load the service for the time that was asked for."""
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=self._url, timeout=REQUEST_SECONDS, limits=limits, trust_env=False
        ) as client:
            traffic = Traffic(client, seed=self._options.seed)
            self.tally = traffic.tally
            started = time.monotonic()
            watching = [asyncio.create_task(self._sample(started)), asyncio.create_task(self._kill(started))]
            try:
                await traffic.run(self._options.clients, started + self.seconds)
            finally:
                for task in watching:
                    task.cancel()
                await asyncio.gather(*watching, return_exceptions=True)
            self.seconds = time.monotonic() - started

    async def _sample(self, started: float) -> None:
        while True:
            now = time.monotonic() - started
            for pid, role in await asyncio.to_thread(_processes, self._pid):
                with suppress(OSError):  # it ended while we looked
                    self.lives.setdefault(pid, Life(role, now)).samples.append((now, _resident(pid)))
            await asyncio.sleep(SAMPLE_SECONDS)

    async def _kill(self, started: float) -> None:
        """Kill a replica every so often; the oldest, so that each has its turn."""
        while True:
            due = started + self._options.kill_seconds * (len(self.kills) + 1)
            if due > started + self.seconds - self._options.kill_seconds / 2:
                return
            await asyncio.sleep(max(due - time.monotonic(), 0.0))
            replicas = [pid for pid, role in await asyncio.to_thread(_processes, self._pid) if role == "replica"]
            with suppress(ProcessLookupError):
                os.kill(
                    min(replicas, key=lambda pid: self.lives[pid].born if pid in self.lives else 1e9), signal.SIGKILL
                )
            killed = time.monotonic()
            self.kills.append(killed - started)
            before = sum(len(times) for times in self.tally.seconds.values())
            while sum(len(times) for times in self.tally.seconds.values()) < before + 2 * self._options.clients:
                await asyncio.sleep(0.1)
            self.recoveries.append(time.monotonic() - killed)


def judge(soak: Soak, ended: int | None, said: str) -> Verdict:
    """Say what should not have been.

    Args:
        soak: One that has run.
        ended: The exit code of the service; None where it had to be killed.
        said: What it printed.
    """
    problems = [f"{soak.tally.num_faults} requests were neither answered nor refused cleanly"] * bool(
        soak.tally.num_faults
    )
    memory: list[str] = []
    for role in (GATEWAY, *ROLES):
        lives = [life for life in soak.lives.values() if life.role == role]
        line, is_flat = _memory_of(role, lives)
        memory.append(line)
        if not is_flat:
            problems.append(f"memory of the {role} grew")
    if ended != 0:
        problems.append("the service did not end" if ended is None else f"the service ended with exit code {ended}")
    if "Traceback" in said:
        problems.append("the service printed a traceback: " + said.strip().splitlines()[-1][:200])
    return Verdict(problems, memory)


def _memory_of(role: str, lives: Iterable[Life]) -> tuple[str, bool]:
    """Whether the memory of the processes of a role is flat: within a life, and from one life to the next."""
    grown = [sizes for life in sorted(lives, key=lambda life: life.born) if len(sizes := life.grown()) >= 8]
    if not grown:
        return f"{role}: none lived for longer than {AGE_SECONDS:.0f} s", True
    within = [(_median(sizes[: len(sizes) // 4]), _median(sizes[-(len(sizes) // 4) :])) for sizes in grown]
    across = (max(grown[0]), max(grown[-1]))
    is_flat = all(_is_flat(*pair) for pair in (*within, across))
    first, last = max(within, key=lambda pair: pair[1] - pair[0])
    text = f"{role}: {len(grown)} measured, most growth in one life {_mib(first)} -> {_mib(last)} MiB"
    if len(grown) > 1:
        text += f", peak of the first {_mib(across[0])} and of the last {_mib(across[1])} MiB"
    return f"{text}: {'flat' if is_flat else 'NOT FLAT'}", is_flat


def _is_flat(first: float, last: float) -> bool:
    return last - first <= max(GROWTH * first, GROWTH_BYTES)


def _median(sizes: Sequence[int]) -> float:
    return statistics.median(sizes)


def _mib(size: float) -> str:
    return f"{size / (1 << 20):.0f}"


def _print(console: Console, soak: Soak, verdict: Verdict) -> None:
    outcomes = sorted({outcome for _, outcome in soak.tally.counts})
    table = Table(title=f"{soak.tally.total:,} requests in {soak.seconds:.0f} s, {len(soak.kills)} replicas killed")
    for name in ("kind", *outcomes, "p50 s", "p99 s", "most s"):
        table.add_column(name, justify="left" if name == "kind" else "right")
    for kind in sorted({kind for kind, _ in soak.tally.counts}):
        times = sorted(soak.tally.seconds.get(kind, []))
        shown = [f"{times[int(share * (len(times) - 1))]:.2f}" for share in (0.5, 0.99, 1.0)] if times else [""] * 3
        table.add_row(kind, *(str(soak.tally.counts[kind, outcome] or "") for outcome in outcomes), *shown)
    console.print(table)
    lines = [
        f"codes: {', '.join(f'{code} {count}' for code, count in soak.tally.codes.most_common())}",
        f"from each kill to two answers a client: {', '.join(f'{seconds:.1f} s' for seconds in soak.recoveries)}",
        *verdict.memory,
        *soak.tally.faults,
        *(f"PROBLEM: {problem}" for problem in verdict.problems),
        "FAIL" if verdict.problems else "PASS: every request was answered or refused cleanly, and memory was flat",
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False)


def _as_json(soak: Soak, verdict: Verdict) -> dict[str, Any]:
    return {
        "machine": describe(),
        "seconds": soak.seconds,
        "kills": soak.kills,
        "recoveries": soak.recoveries,
        "counts": [
            {"kind": kind, "outcome": name, "count": count} for (kind, name), count in soak.tally.counts.items()
        ],
        "codes": dict(soak.tally.codes),
        "faults": soak.tally.faults,
        "memory": [vars(life) for life in soak.lives.values()],
        "problems": list(verdict.problems),
    }


def _start(options: argparse.Namespace, output: Any) -> subprocess.Popen[bytes]:
    packages = [str(demo.package(task)) for task in demo.TASKS]
    command = [sys.executable, "-m", "pipeline.cli", "serve", *packages, "--base-model", str(demo.BASE_MODEL)]
    command += ["--port", "0", "--replicas", str(options.replicas)]
    dropped = ("RAY_ADDRESS", "RAY_JOB_ID", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "EXPERT_API_KEYS")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    return subprocess.Popen(  # noqa: S603  # our own command
        command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
    )


def _wait_for_url(process: subprocess.Popen[bytes], log: Path) -> str:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        found = _URL.search(log.read_text(errors="replace"))
        if found is not None:
            return found[1]
        time.sleep(0.1)
    raise SystemExit(f"the service did not start:\n{log.read_text(errors='replace')}")


def _end(process: subprocess.Popen[bytes]) -> int | None:
    process.send_signal(signal.SIGTERM)
    try:
        return process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        return None


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _processes(root: int) -> list[tuple[int, str]]:
    """The processes below one that have a role, and which."""
    parents: dict[int, int] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError):  # it ended while we looked
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
    below = {root}
    for _ in range(8):  # generations
        below |= {pid for pid, parent in parents.items() if parent in below}
    found = [(root, GATEWAY)]
    for pid in below - {root}:
        with suppress(OSError):
            line = Path(f"/proc/{pid}/cmdline").read_text()
            found += [(pid, role) for role, start in ROLES.items() if line.startswith(start)]
    return found


def _resident(pid: int) -> int:
    """Bytes of its own that a process has in memory."""
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serve_soak", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="how long")
    parser.add_argument("--clients", type=int, default=12, help="requests at once")
    parser.add_argument("--replicas", type=int, default=1, help="replicas there are")
    parser.add_argument("--kill-seconds", type=float, default=60.0, help="a replica is killed this often")
    parser.add_argument("--seed", type=int, default=1, help="of what is asked in which order")
    parser.add_argument("--json", type=Path, default=None, help="where everything is written to")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
