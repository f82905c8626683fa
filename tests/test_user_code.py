"""Three lines say what thirty did; what users write runs; every example in a docstring does what it says."""

import asyncio
import doctest
import importlib

import pytest

from pipeline import Expert, demo
from tests import user_code

WANTED = "SELECT city, COUNT(*) FROM users GROUP BY city"


def test_thirty_lines_and_three_say_the_same() -> None:
    prompts = [user_code.PROMPT, "List the name of all users.", "Which users have age over 30?"]
    for prompt in prompts:
        assert user_code.three_lines(prompt, user_code.SCHEMA) == user_code.thirty_lines(prompt, user_code.SCHEMA)


def test_what_a_user_writes_runs() -> None:
    with Expert.load(demo.package("sql"), base_model=demo.BASE_MODEL, device="cpu") as expert:
        told = user_code.with_results(expert)
        assert told["codes"] == [None, "invalid_request"]
        text, result = user_code.with_a_stream(expert)
        assert text == result.text == WANTED
        assert asyncio.run(user_code.with_tasks(expert)) == [WANTED] * 4
        assert user_code.with_errors(expert).startswith("invalid_request: temperature is -1 Give a number")
    assert user_code.with_several_experts() == ["sql dora 12", "json lora 8", "expert-sql", "expert-json"]


@pytest.mark.parametrize("module", ["expert", "manager", "routing"])
def test_the_examples_of_docstrings(module: str) -> None:
    tried = doctest.testmod(importlib.import_module(f"pipeline.{module}"), optionflags=doctest.ELLIPSIS)
    assert tried.attempted > 0
    assert tried.failed == 0
