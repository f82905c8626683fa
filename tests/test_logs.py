"""`EXPERT_LOG` asks for a log; without it there is none."""

import logging
from collections.abc import Iterator

import pytest

from pipeline import logs


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    handlers, level = list(logs.logger.handlers), logs.logger.level
    yield logs.logger
    logs.logger.handlers, logs.logger.level = handlers, level


def test_it_is_quiet_unless_asked(
    logger: logging.Logger, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    before = list(logger.handlers)
    logs.set_up({})
    assert logger.handlers == before
    logs.set_up({"EXPERT_LOG": "loud"})
    assert logger.handlers == before
    assert "EXPERT_LOG=loud is none of debug" in caplog.text
    logs.set_up({"EXPERT_LOG": "Debug"})
    logging.getLogger("pipeline.engine.loader").debug("loaded")
    assert "DEBUG pipeline.engine.loader: loaded" in capsys.readouterr().err
