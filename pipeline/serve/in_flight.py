"""How many requests there are at once, of all clients and of each."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.errors import OverloadedError, ShuttingDownError, TooManyRequestsError
from pipeline.serve.limits import LimitsConfig


class InFlight:
    """Counts requests from their first byte to their last, and lets no more in when it is told so.

    Args:
        limits: Its `max_requests` and `max_requests_per_key`.
    """

    def __init__(self, limits: LimitsConfig) -> None:
        self.total = 0
        self._of_client: Counter[str] = Counter()
        self._limits = limits
        self._is_closed = False
        self.is_cut_off = False
        self._tasks: set[asyncio.Task[Any]] = set()

    def close(self) -> None:
        """Let nobody else in; those there are stay."""
        self._is_closed = True

    def cut_off(self) -> None:
        """Let nobody else in, and cancel those there are: `is_cut_off` says that it was not their clients who left."""
        self._is_closed = self.is_cut_off = True
        for task in self._tasks:
            task.cancel()

    @contextmanager
    def entered(self, client: str | None) -> Iterator[None]:
        """Count a request while it lasts; the task that enters is what `cut_off` cancels.

        Args:
            client: The client's name; None where no key is needed, and only the total counts.

        Raises:
            ShuttingDownError: Nobody is let in any more.
            OverloadedError: There are too many.
            TooManyRequestsError: This client has too many.
        """
        if self._is_closed:
            raise ShuttingDownError("the service is ending", hint="Ask again in a moment, or another one.")
        if client is not None and self._of_client[client] >= self._limits.max_requests_per_key:
            raise TooManyRequestsError(
                f"{self._limits.max_requests_per_key} requests of this API key are running and waiting",
                hint="Wait for one to be answered, and ask again.",
            )
        if self.total >= self._limits.max_requests:
            raise OverloadedError(
                f"{self._limits.max_requests} requests are running and waiting", hint="Ask again in a moment."
            )
        self.total += 1
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
        if client is not None:
            self._of_client[client] += 1
        try:
            yield
        finally:
            self.total -= 1
            if task is not None:
                self._tasks.discard(task)
            if client is not None:
                self._of_client[client] -= 1
                if not self._of_client[client]:
                    del self._of_client[client]
