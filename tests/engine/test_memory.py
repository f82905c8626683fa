"""Memory that is given back keeps what it held, and work in a passing thread leaves no thread behind."""

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.engine.memory import page_out
from pipeline.engine.passing_thread import in_passing_thread
from pipeline.engine.runtime import load_engine
from pipeline.errors import BaseModelError
from tests import tiny

NUM_MIB = 64
SECONDS = 2.0
linux = pytest.mark.skipif(sys.platform != "linux", reason="counts pages and threads in /proc")


def mib_of_files() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssFile:"))


@linux
def test_a_mapped_tensor_gives_its_memory_back_and_keeps_its_values(tmp_path: Path) -> None:
    size = NUM_MIB << 18
    torch.arange(size, dtype=torch.int32).numpy().tofile(tmp_path / "weights")
    mapped = torch.from_file(str(tmp_path / "weights"), shared=False, size=size, dtype=torch.int32)
    total, before = int(mapped.sum()), mib_of_files()
    page_out(mapped)
    assert before - mib_of_files() > NUM_MIB - 1
    assert int(mapped.sum()) == total


def test_memory_that_is_no_file_keeps_its_values() -> None:
    values = torch.arange(1 << 20)
    page_out(values)
    page_out(values.view(1024, 1024).t())  # not contiguous: left alone
    page_out(values[:3])  # less than a page
    assert torch.equal(values, torch.arange(1 << 20))


def test_a_passing_thread_returns_and_raises_what_its_function_does() -> None:
    def name_of_thread(number: int, *, add: int) -> tuple[int, str]:
        return number + add, threading.current_thread().name

    number, name = in_passing_thread(name_of_thread)(1, add=2)
    assert number == 3
    assert name != threading.current_thread().name
    with pytest.raises(ZeroDivisionError):
        in_passing_thread(lambda: 1 / 0)()


def num_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def leaves_threads(work: Callable[[], object]) -> bool:
    """Whether there are more threads of the system after work in a new thread that still lives."""
    ready, done = threading.Event(), threading.Event()

    def run() -> None:
        torch.set_num_threads(2)
        work()
        ready.set()
        done.wait()

    before = num_threads()
    thread = threading.Thread(target=run)
    thread.start()
    ready.wait()
    until = time.monotonic() + SECONDS
    while num_threads() > before + 1 and time.monotonic() < until:  # helpers end a moment after their thread
        time.sleep(0.01)
    left = num_threads() - before - 1  # without the thread itself
    done.set()
    thread.join()
    return left > 0


@linux
def test_loading_leaves_no_team_of_threads_in_the_caller(tmp_path: Path) -> None:
    wanted = torch.get_num_threads()
    big = torch.ones(1 << 20)
    base = tiny.make_base(tmp_path, vocab_size=4096)
    try:
        assert leaves_threads(lambda: big * 2)  # what the thread itself computes leaves its helper
        assert not leaves_threads(lambda: load_engine(base, device="cpu", dtype="float32", kv_cache_bytes=1 << 20))
    finally:
        torch.set_num_threads(wanted)


def test_what_loading_raises_reaches_the_caller(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="cannot be loaded"):
        load_engine(tmp_path)
