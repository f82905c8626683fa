"""The end of a process that has work and does nothing."""

import faulthandler
import logging
import os
import threading
import time
from collections.abc import Callable, Hashable

logger = logging.getLogger(__name__)

EXIT_STALLED = 86
STDERR = 2
_LAST_WORDS_SECONDS = 10.0


class Watchdog:
    """Ends this process when what it watches has work and makes no progress for too long.

    The stacks of all threads go to standard error first. A process that is stuck inside native code, where no Python
    thread can run, is ended as well, later and without a word of its own.

    Args:
        progress: Something that changes with every bit of work, or None where there is nothing to do. Asked from a
            thread of the watchdog's.
        seconds: For how long it may stay the same.
        last_words: Told why, before the process ends; it gets ten seconds.
        what: What is watched, for the log.
    """

    def __init__(
        self,
        progress: Callable[[], Hashable | None],
        seconds: float,
        *,
        last_words: Callable[[str], None] = lambda _: None,
        what: str = "the engine",
    ) -> None:
        self._progress = progress
        self._seconds = seconds
        self._last_words = last_words
        self._what = what
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def _watch(self) -> None:
        seen: Hashable | None = None
        since = time.monotonic()
        while True:
            now, current = time.monotonic(), self._progress()
            if current is None or current != seen:
                seen, since = current, now
                faulthandler.dump_traceback_later(2 * self._seconds + 60, exit=True, file=STDERR)
            elif now - since > self._seconds:
                end_process(
                    f"{self._what} has rows to answer and has done nothing for {now - since:.0f} seconds "
                    f"(progress_timeout is {self._seconds:g})",
                    self._last_words,
                )
            time.sleep(min(self._seconds / 10, 5.0))


def end_process(reason: str, last_words: Callable[[str], None] = lambda _: None) -> None:
    """End this process at once, as one that can do no more: whoever started it starts another.

    Args:
        reason: Why, for the log.
        last_words: Told the reason first; it gets ten seconds.
    """
    logger.critical("%s: this process ends now, and its work is done by another", reason)
    faulthandler.dump_traceback(file=STDERR, all_threads=True)
    telling = threading.Thread(target=last_words, args=(reason,), daemon=True)
    telling.start()
    telling.join(_LAST_WORDS_SECONDS)
    os._exit(EXIT_STALLED)
