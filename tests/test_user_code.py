"""Three lines say what thirty did; what users write runs; every example in a docstring does what it says."""

import asyncio
import doctest
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import pipeline
from pipeline import Expert, demo
from tests import user_code

WANTED = "SELECT city, COUNT(*) FROM users GROUP BY city"


@pytest.fixture(scope="module")
def expert() -> Iterator[Expert]:
    with Expert.load(demo.package("sql"), base_model=demo.BASE_MODEL, device="cpu") as loaded:
        yield loaded


def test_thirty_lines_and_three_say_the_same() -> None:
    asked = user_code.PROMPT, user_code.SCHEMA
    assert user_code.three_lines(*asked) == user_code.thirty_lines(*asked) == WANTED


def test_what_a_user_writes_runs(expert: Expert) -> None:
    told = user_code.with_results(expert)
    assert told["codes"] == [None, "invalid_request"]
    text, result = user_code.with_a_stream(expert)
    assert text == result.text == WANTED
    assert asyncio.run(user_code.with_tasks(expert)) == [WANTED] * 4
    assert user_code.with_errors(expert).startswith("invalid_request: temperature is -1 Give a number")
    assert user_code.with_several_experts() == ["sql dora 12", "json lora 16", "expert-sql", "expert-json"]


ROOT = Path(pipeline.__file__).parent
NEEDS_RAY = ("batch.run",)  # its examples are run beside a cluster, in tests/e2e
EXAMPLES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in ROOT.rglob("*.py")
    if ">>>" in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("module", [name for name in EXAMPLES if name not in NEEDS_RAY])
def test_the_examples_of_docstrings(module: str, expert: Expert, tmp_path: Path) -> None:
    """Found by looking at every file, so that none is forgotten."""
    tried = doctest.testmod(
        importlib.import_module(f"pipeline.{module}"), extraglobs={"expert": expert, "shared_folder": str(tmp_path)}
    )
    assert tried.attempted > 0
    assert tried.failed == 0


def test_what_needs_ray_has_examples() -> None:
    assert set(NEEDS_RAY) <= set(EXAMPLES)
