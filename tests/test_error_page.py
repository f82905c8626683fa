"""The page of errors is current. That each is met by a test is seen by `raised_errors.py`, of a whole run."""

from pathlib import Path

import pytest

from pipeline import errors
from pipeline.engine.devices import check_device
from pipeline.error_page import ADVICE, kinds, page
from tests.raised_errors import RaisedErrors

PROJECT = Path(__file__).parents[1]


def test_the_page_is_current() -> None:
    written = (PROJECT / "docs" / "errors.md").read_text(encoding="utf-8")
    assert written == page(), "run: python -m pipeline.error_page > docs/errors.md"


def test_every_error_has_advice_and_nothing_else_has() -> None:
    assert list(ADVICE) == [kind.__name__ for kind in kinds()]


def test_an_error_counts_as_met_when_the_product_makes_it(
    pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errors.ExpertError, "__init__", errors.ExpertError.__init__)  # to be put back
    raised = RaisedErrors(pytestconfig)
    raised.watch()
    leaves = {kind.__name__ for kind in kinds() if not kind.__subclasses__()}
    assert set(raised.missing()) == leaves
    errors.ConfigError("a test's own", hint="-")
    assert "ConfigError" in raised.missing()
    with pytest.raises(errors.ConfigError):
        check_device("abacus")
    assert set(raised.missing()) == leaves - {"ConfigError"}
