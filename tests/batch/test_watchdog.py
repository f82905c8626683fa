"""The watchdog, in processes of its own: one that hangs is ended and says why, one that works or idles is not."""

import subprocess
import sys

import pytest

from pipeline.batch.watchdog import EXIT_STALLED

PROGRAM = """
import time
from pipeline.batch.watchdog import Watchdog
count = 0
def progress():
    global count
    count += 1
    return {progress}
Watchdog(progress, 0.2, last_words=lambda reason: print("last words:", reason, flush=True))
def stuck():
    time.sleep({seconds})
stuck()
print("alive", flush=True)
"""


@pytest.mark.parametrize("progress", ["count", "None"])
def test_who_works_or_has_nothing_to_do_lives(progress: str) -> None:
    program = PROGRAM.format(progress=progress, seconds=1)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


def test_who_does_nothing_is_ended_and_says_why() -> None:
    program = PROGRAM.format(progress="'always the same'", seconds=60)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == EXIT_STALLED
    assert "last words: the engine has rows to answer and has done nothing for" in done.stdout
    assert "progress_timeout is 0.2" in done.stderr
    assert "in stuck" in done.stderr, "the stacks of the threads say where"
