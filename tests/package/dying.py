"""Processes that die on the way: at a chosen flush to the disk, without a word."""

import multiprocessing
import os
from collections.abc import Callable

FORK = multiprocessing.get_context("fork")  # a new interpreter each would take seconds, and test the same


def dying_at(step: int, work: Callable[[], object]) -> int:
    """Run `work` in a process that is gone at its n-th flush to the disk, without a word; its exit code."""

    def run() -> None:
        flush, count = os.fsync, 0

        def counted(handle: int) -> None:
            nonlocal count
            count += 1
            if count == step:
                os._exit(9)
            flush(handle)

        os.fsync = counted
        work()
        os._exit(0)

    child = FORK.Process(target=run)
    child.start()
    child.join(60)
    code = child.exitcode
    assert code is not None
    return code
