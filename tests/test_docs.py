"""The documentation is true: code runs or is typed, commands and configurations are accepted, links lead on."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from pipeline.batch.config import BatchConfig
from pipeline.cli import app
from pipeline.package.manifest_reader import read_manifest
from pipeline.serve.config import ServeConfig
from tests.documents import BLOCKS, PAGES, PROJECT, Block, commands, of_language

LANGUAGES = {"python", "py", "console", "sh", "yaml", "json"}
# What a page speaks of without making it.
GIVEN = """
from typing import Any
prompts: list[str] = []
schema = instructions = ""
"""


def at_place(block: Block) -> str:
    return f"{block.page}-{BLOCKS.index(block)}"


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    assert {block.language for block in BLOCKS} <= LANGUAGES
    assert len(of_language("python")) >= 6


@pytest.mark.parametrize("block", of_language("python"), ids=at_place)
def test_python_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "run_batch" not in block.code, "a block that starts Ray is `py`, or in the README"
    monkeypatch.chdir(tmp_path)
    exec(compile(block.code, block.page, "exec"), {"__name__": "__main__"})  # noqa: S102  # our own


def test_other_python_is_typed(tmp_path: Path) -> None:
    for number, block in enumerate(of_language("py")):
        (tmp_path / f"block_{number}.py").write_text(f"# {block.page}\n{GIVEN}{block.code}")
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", str(tmp_path)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("block", of_language("console"), ids=at_place)
def test_commands_are_accepted(block: Block) -> None:
    makefile = (PROJECT / "Makefile").read_text()
    for line in commands(block):
        for words in split_commands(line):
            if words[0] == "expert":
                parse(words[1:])
            elif words[0] == "make":
                assert f"\n{words[1]}:" in makefile
            elif words[:2] == ["python", "-m"]:
                assert (PROJECT / f"{words[2].replace('.', '/')}.py").exists()
            else:
                assert words[0] in ("ray", "serve", "export", "cp", "echo"), line
            for word in words:
                if re.match(r"(configs|jobs|tests|examples)/", word):
                    assert (PROJECT / word).exists(), word


def split_commands(line: str) -> list[list[str]]:
    """The commands of a line; a semicolon in quotes divides nothing."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";")
    lexer.whitespace_split = True
    lexer.commenters = ""
    parts: list[list[str]] = [[]]
    for word in lexer:
        if word == ";":
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def parse(words: list[str]) -> None:
    """Have Typer read a command line, without running it."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        assert words[0] in command.commands, words
        command, words = command.commands[words[0]], words[1:]
    command.make_context(command.name, [word for word in words if word != ">" and word != "/dev/null"])


@pytest.mark.parametrize("block", of_language("yaml"), ids=at_place)
def test_configurations_are_valid(block: Block) -> None:
    options = yaml.safe_load(block.code)
    if "dataset" in options:
        BatchConfig.from_options(**options)
    else:
        ServeConfig.from_options(**options)


@pytest.mark.parametrize("block", of_language("json"), ids=at_place)
def test_manifests_are_valid(block: Block) -> None:
    read = read_manifest(block.code.encode(), source=block.page)
    assert read.manifest.name == json.loads(block.code)["name"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_on_in_a_checkout_too(page: Path) -> None:
    """Not only on the site, which has pages that are made when it is built."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#:\s]+)[^)]*\)", text):
        if not target.startswith(("http", "mailto")):
            assert (page.parent / target).exists(), target


def test_the_site_is_built_and_no_link_is_broken(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.name: path.read_text() for path in (tmp_path / "site" / "reference").glob("*.html")}
    assert "--retry-errors" in pages["cli.html"]
    assert "progress_timeout" in pages["configuration.html"]
    assert "ExpertManager" in pages["api.html"]
    assert 'href="../reference/configuration.html#a-batch-job"' in (tmp_path / "site/guides/batch.html").read_text()
    outside = re.compile(r"""<(?:script|link|img)[^>]+(?:src|href)=["']?https?://""")
    for path in (tmp_path / "site").rglob("*.html"):
        assert not outside.search(path.read_text()), f"{path.name} loads something from elsewhere"
