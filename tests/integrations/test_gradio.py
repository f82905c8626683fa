"""Gradio leaves loops and sockets to the garbage collector, for which other tests would be blamed: its own process."""

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).with_name("gradio_page.py")


def test_a_page_to_talk_with_an_expert() -> None:
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", "-W", "ignore", str(PAGE)]
    done = subprocess.run(command, cwd=PAGE.parents[2], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout
    assert re.search(r"^4 passed in", done.stdout, re.MULTILINE), done.stdout
