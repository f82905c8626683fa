"""The README is true: what it names is there. That its code runs is tested in `e2e`."""

import re

import pytest

from tests.documents import PROJECT
from tests.readme import CONSOLE, PYTHON, README


def test_it_has_code_to_run() -> None:
    assert len(PYTHON) >= 2
    assert len(PYTHON[0].splitlines()) <= 14


@pytest.mark.parametrize(
    "target", sorted(set(re.findall(r"\(([^)#:]+)\)", " ".join(re.findall(r"\]\([^)]+\)", README)))))
)
def test_its_links_lead_somewhere(target: str) -> None:
    assert (PROJECT / target).exists()


def test_its_commands_exist() -> None:
    makefile = (PROJECT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake (\w+)", CONSOLE)):
        assert f"\n{target}:" in makefile
    for path in set(re.findall(r"\b(?:configs|jobs)/[\w.-]*\w", README)):
        assert (PROJECT / path).exists()
