"""What every test gets: no network, a cache of its own, and the demo experts."""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.profiles import load_profile
from tests.raised_errors import RaisedErrors

END_TO_END = Path(__file__).parent / "e2e"
HOSTILE = "tests/package/test_hostile.py::test_a_hostile_package_"

load_profile()

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's workers would wait for every other program
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # the matrices of tests are small: a second thread waits longer than it works
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# gcsfs would ask over gRPC, for a minute, what kind of bucket it is; it reads this when it is first imported.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")


def pytest_configure(config: pytest.Config) -> None:
    """Take note of the errors that are made from here on."""
    raised = RaisedErrors(config)
    config.pluginmanager.register(raised, "raised-errors")
    raised.watch()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of several processes one starts a cluster: the tests that need it come first, and stay together.

    The others stay together by file, as they share what a file loads.
    """
    for item in items:
        item.add_marker(pytest.mark.xdist_group("e2e" if END_TO_END in item.path.parents else str(item.path)))
    items.sort(key=lambda item: END_TO_END not in item.path.parents)


def pytest_collection_finish() -> None:
    """What is imported by now stays: collecting garbage need not look through it each time."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many hostile packages were seen to be refused, or to be harmless."""
    counts = {
        outcome: sum(HOSTILE in report.nodeid for report in terminalreporter.getreports(outcome))
        for outcome in ("passed", "failed")
    }
    if any(counts.values()):
        told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        terminalreporter.write_line(f"hostile packages: {told}")


def pytest_unconfigure() -> None:
    """As at any end of a program."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def package_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Packages are unpacked into a folder of this test run, never into the user's cache."""
    folder = tmp_path_factory.mktemp("expert-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXPERT_CACHE_DIR", str(folder))
        yield folder


@pytest.fixture
def without_gcsfs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if gcsfs was not installed, and had never been asked for."""
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    for protocol in ("gs", "gcs"):
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, protocol, raising=False)
