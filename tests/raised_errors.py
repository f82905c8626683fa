"""Which errors the product made while the tests ran: when all of them ran, every leaf of the tree is among them.

What counts is an error that a module of `pipeline` makes in one of the tests' own processes; those that a test makes
for itself do not, nor do copies that came from another process.
"""

import sys
from functools import wraps
from typing import Any

import pytest

from pipeline import errors

SENT = "raised_errors"  # what a process of pytest-xdist hands over at its end
OWN_MODULE = errors.__name__


class RaisedErrors:
    """A plugin that takes note of errors, and fails a whole run that saw too few."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._seen: set[str] = set()
        self._init = errors.ExpertError.__init__

    def watch(self) -> None:
        """Begin."""
        plain, seen = self._init, self._seen

        @wraps(plain)
        def noting(error: errors.ExpertError, *args: Any, **kwargs: Any) -> None:
            maker = sys._getframe(1).f_globals.get("__name__", "")
            if maker.startswith("pipeline.") and maker != OWN_MODULE:
                seen.add(type(error).__name__)
            plain(error, *args, **kwargs)

        errors.ExpertError.__init__ = noting  # type: ignore[method-assign]

    def pytest_testnodedown(self, node: Any) -> None:
        """A process of pytest-xdist has ended."""
        self._seen.update(getattr(node, "workeroutput", {}).get(SENT, ()))

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Say what was never made, where everything was tested."""
        errors.ExpertError.__init__ = self._init  # type: ignore[method-assign]
        output = getattr(self._config, "workeroutput", None)
        if output is not None:
            output[SENT] = sorted(self._seen)
        elif is_whole(self._config) and exitstatus == pytest.ExitCode.OK and self.missing():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Name them."""
        if is_whole(self._config) and (missing := self.missing()):
            terminalreporter.section("errors that no test provokes", red=True)
            terminalreporter.line(", ".join(missing))

    def missing(self) -> list[str]:
        """The leaves of the tree that nobody made; what has kinds below it may be a name for them all."""
        kinds, leaves = [errors.ExpertError], set[str]()
        while kinds:
            kind = kinds.pop()
            below = [one for one in kind.__subclasses__() if one.__module__ == OWN_MODULE]
            kinds += below
            if not below:
                leaves.add(kind.__name__)
        return sorted(leaves - self._seen)


def is_whole(config: pytest.Config) -> bool:
    """Whether all tests were asked for."""
    return config.args_source is pytest.Config.ArgsSource.TESTPATHS and not (
        config.option.keyword or config.option.markexpr or config.option.lf or config.option.collectonly
    )
