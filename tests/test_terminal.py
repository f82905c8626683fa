"""`expert chat` in a real terminal: what is typed, what is shown, and what the keys do."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest

from pipeline import demo
from pipeline.demo.questions import draw_questions
from tests.tiny import make_base, make_package, tokenizer

QUESTION = next(iter(draw_questions("sql", 1)))
PROMPT = r">[^\n]*\x1b\[\?25h"  # drawn, and the cursor is shown


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base model, and an expert over it whose answers take many seconds."""
    folder = tmp_path_factory.mktemp("endless")
    base = make_base(folder, vocab_size=len(tokenizer()), context=32_000)
    package, _ = make_package("lora", base, folder, max_new_tokens=30_000)
    return base, package


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Any]:
    """Starts `expert chat` in a terminal of its own, and ends it."""
    begun: list[pexpect.spawn] = []

    def start(base: Path, *arguments: str) -> pexpect.spawn:
        command = ["-m", "pipeline.cli", "chat", *arguments, "--base-model", str(base), "--device", "cpu"]
        environment = {**os.environ, "TERM": "xterm", "NO_COLOR": "1", "PROMPT_TOOLKIT_NO_CPR": "1"}
        child = pexpect.spawn(
            sys.executable, command, env=environment, encoding="utf-8", timeout=25, dimensions=(50, 400)
        )
        begun.append(child)
        return child

    yield start
    for child in begun:
        child.close(force=True)


def test_a_conversation_in_a_terminal(terminal: Any, tmp_path: Path) -> None:
    (tmp_path / "schema.sql").write_text(QUESTION.schema)
    history = tmp_path / "history"
    child = terminal(demo.BASE_MODEL, str(demo.package("sql")), str(demo.package("json")), "--history", str(history))
    child.expect_exact("expert-json is loaded")
    child.expect(PROMPT)
    child.send(f"/schema {tmp_path / 'schema.sql'}\r")
    child.expect_exact("schema: ")
    child.send(f"{QUESTION.prompt}\r")
    child.expect(r"SELECT [^\r\n]+\r?\n")
    child.send("/expert json\r")
    child.expect_exact("expert: expert-json")
    child.send("/expert nobody\r")
    child.expect_exact("there is no expert 'nobody'")
    child.send("\x1b[A\x1b[A\r")  # the line before the last one, again
    child.expect_exact("expert: expert-json")
    child.send("wrong\x03")  # Ctrl-C drops the line
    child.send("\x04")  # Ctrl-D leaves
    child.expect(pexpect.EOF)
    child.wait()
    assert child.exitstatus == 0
    kept = [line[1:] for line in history.read_text().splitlines() if line.startswith("+")]
    assert kept[-1] == "/expert json"
    assert QUESTION.prompt in kept
    assert "wrong" not in kept


def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on(terminal: Any, endless: tuple[Path, Path]) -> None:
    base, package = endless
    child = terminal(base, str(package))
    child.expect_exact("is loaded")
    child.expect(PROMPT)
    child.send("Who?\r")
    child.expect_exact("Who?")
    child.expect(r"\w{20}")  # it comes as it is made
    child.sendintr()
    child.expect_exact("(stopped)")
    child.send("/help\r")
    child.expect_exact("/schema FILE")
    child.send("/quit\r")
    child.expect(pexpect.EOF)
    child.wait()
    assert child.exitstatus == 0
