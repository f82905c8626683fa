"""Programs of ours that a test starts, watches and ends by their process id."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

BIN = Path(sys.executable).parent
PROJECT = Path(__file__).parents[2]
# As `/proc/net/tcp` writes the addresses that only this machine reaches.
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's, without a cluster to join or a token of one, and with everything quiet."""
    dropped = ("RAY_ADDRESS", "RAY_JOB_ID", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, **(more or {}), "RAY_USAGE_STATS_ENABLED": "0", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


def run(
    arguments: Sequence[str | Path], *, seconds: float = 180, more: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end."""
    return subprocess.run(
        list(map(str, arguments)),
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
        cwd=PROJECT,
        env=environment(more),
    )


@contextmanager
def running(
    arguments: Sequence[str | Path], log: Path, *, more: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A program in a process group of its own; the whole group is ended on leaving."""
    with (
        log.open("wb") as output,
        subprocess.Popen(
            list(map(str, arguments)),
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=PROJECT,
            env=environment(more),
            start_new_session=True,
            preexec_fn=_heed_interrupts,
        ) as process,
    ):
        try:
            yield process
        finally:
            end_group(process)


def _heed_interrupts() -> None:
    """A shell has what it runs in the background ignore them, and so would all that this starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ask the group to end, and make it end when it does not."""
    for sent, seconds in ((signal.SIGTERM, 15.0), (signal.SIGKILL, 15.0)):
        try:
            os.killpg(process.pid, sent)
        except ProcessLookupError:
            break
        if wait_until(lambda: process.poll() is not None, seconds=seconds):
            break


def wait_until(condition: Callable[[], bool], *, seconds: float) -> bool:
    """Whether the condition came true in time; it is looked at ten times a second."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return condition()


def descendants(pid: int, name: str) -> list[int]:
    """Processes below `pid` whose command line begins with `name`."""
    parents: dict[int, int] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):  # it ended while we looked
            continue

    def is_below(child: int) -> bool:
        for _ in range(20):
            child = parents.get(child, 0)
            if child == pid:
                return True
        return False

    return [child for child in parents if is_below(child) and _command_line(child).startswith(name)]


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def listening_addresses(pids: Iterable[int]) -> set[str]:
    """The addresses on which these processes listen, as `/proc/net/tcp` writes them."""
    inodes = set()
    for pid in pids:
        for handle in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                inodes.add(str(handle.readlink()))
            except OSError:  # closed, or the process ended, while we looked
                continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            columns = line.split()
            is_listening = columns[3] == "0A"
            if is_listening and f"socket:[{columns[9]}]" in inodes:
                found.add(columns[1].partition(":")[0])
    return found
