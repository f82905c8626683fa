"""Gradio leaves loops and sockets to the garbage collector, for which other tests would be blamed: its own process."""

import re
import subprocess
import sys
from pathlib import Path

from tests.documents import of_language

PAGE = Path(__file__).with_name("gradio_page.py")


def test_the_guide_has_the_examples_lines_which_are_run_here() -> None:
    (block,) = (block for block in of_language("py") if "to_gradio" in block.code)
    example = (PAGE.parents[2] / "examples" / "gradio_page.py").read_text()
    lines = iter([line.strip() for line in example.splitlines()])
    assert all(line.strip() in lines for line in block.code.splitlines()), "in this order, within what handles errors"


def test_a_page_to_talk_with_an_expert() -> None:
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", "-W", "ignore", str(PAGE)]
    done = subprocess.run(command, cwd=PAGE.parents[2], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout
    assert re.search(r"^4 passed in", done.stdout, re.MULTILINE), done.stdout
