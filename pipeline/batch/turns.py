"""Who may use the engine beside whom."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition


class Turns:
    """Many at a time, or one alone; who wants to be alone waits for those inside, and nobody enters before it."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._num_together = 0
        self._num_waiting = 0  # to be alone
        self._is_alone = False

    @contextmanager
    def together(self) -> Iterator[None]:
        """Inside beside any number of others."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._is_alone or self._num_waiting))
            self._num_together += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_together -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside with nobody else."""
        with self._changed:
            self._num_waiting += 1
            self._changed.wait_for(lambda: not (self._is_alone or self._num_together))
            self._num_waiting -= 1
            self._is_alone = True
        try:
            yield
        finally:
            with self._changed:
                self._is_alone = False
                self._changed.notify_all()
