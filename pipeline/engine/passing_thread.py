"""Work that computes once, in a thread that ends with it."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def in_passing_thread(function: Callable[P, R]) -> Callable[P, R]:
    """Have a function run in a new thread that ends with it, while the caller waits.

    OpenMP gives each thread that computes a team of its own, and keeps it as long as the thread lives. Where two teams
    have more threads together than there are cores, neither waits actively for its next piece of work any more, and
    each of the hundreds of pieces of a step begins late: on two cores, a token of the 0.6B shape took 130 ms in the
    engine's thread after the main thread had loaded the model, and 73 ms without a team there. So whatever computes
    outside of the engine's thread and is done once, as loading is, runs in a thread whose team goes with it.

    Args:
        function: What is run; what it raises, the caller gets.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        name = f"{threading.current_thread().name}-{function.__name__}"
        with ThreadPoolExecutor(1, thread_name_prefix=name) as executor:
            return executor.submit(function, *args, **kwargs).result()

    return run
