"""The page of errors is current, and every error on it is met by a test."""

import re
from pathlib import Path

import pytest

from pipeline import errors
from pipeline.error_page import ADVICE, kinds, page

PROJECT = Path(__file__).parents[1]
TESTS = "\n".join(
    path.read_text(encoding="utf-8")
    for path in sorted((PROJECT / "tests").rglob("*.py"))
    if path.name not in ("test_errors.py", "test_error_page.py")
)


def test_the_page_is_current() -> None:
    written = (PROJECT / "docs" / "errors.md").read_text(encoding="utf-8")
    assert written == page(), "run: python -m pipeline.error_page > docs/errors.md"


def test_every_error_has_advice_and_nothing_else_has() -> None:
    assert list(ADVICE) == [kind.__name__ for kind in kinds()]


@pytest.mark.parametrize("kind", [kind for kind in kinds() if not kind.__subclasses__()])
def test_every_error_is_met_by_some_test(kind: type[errors.ExpertError]) -> None:
    assert re.search(rf"\b({kind.__name__}|{kind.code})\b", TESTS)
