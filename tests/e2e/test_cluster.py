"""The cluster that a job starts for itself: on loopback, and only when there is none to join."""

import logging
import os
import signal
import socket

import pytest

from pipeline.batch.cluster import RAY_DATA_CONSOLE, _join, connect
from pipeline.errors import ClusterError
from tests.e2e.conftest import end_tests
from tests.e2e.processes import BIN, LOOPBACK, descendants, listening_addresses, run


@pytest.mark.usefixtures("cluster")
def test_it_listens_on_loopback_only() -> None:
    pids = descendants(os.getpid(), "")
    addresses = listening_addresses(pids)
    assert len(pids) >= 3, "the cluster's processes are below this one"
    assert addresses
    assert addresses <= LOOPBACK
    assert connect().is_local
    assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in os.environ, "what it changed to start is changed back"


@pytest.mark.usefixtures("cluster")
def test_what_a_program_does_at_sigterm_stays() -> None:
    assert signal.getsignal(signal.SIGTERM) is end_tests


@pytest.mark.usefixtures("cluster")
def test_only_rays_own_lines_are_kept_from_standard_error(caplog: pytest.LogCaptureFixture) -> None:
    """A handler that somebody else added hears all that it wants to; pytest's are such, too."""
    logger, mine = logging.getLogger("ray.data"), logging.StreamHandler()
    logger.addHandler(mine)
    try:
        connect()
    finally:
        logger.removeHandler(mine)
    assert mine.level == caplog.handler.level == logging.NOTSET
    assert [handler.level for handler in logger.handlers if handler.name == RAY_DATA_CONSOLE] == [logging.CRITICAL]


def test_a_cluster_that_is_asked_for_and_gone_is_an_error() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = f"from pipeline.batch.cluster import connect; connect('127.0.0.1:{port}')"
    done = run([BIN / "python", "-c", code], seconds=180)
    assert done.returncode != 0
    assert "ClusterError: no Ray cluster answers at" in done.stderr
    assert "Start one with `ray start --head`" in done.stderr


@pytest.mark.parametrize("form", ["{}", "ray://{}"])
def test_nothing_is_waited_for_where_nothing_listens(form: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = form.format(f"127.0.0.1:{probe.getsockname()[1]}")
    with pytest.raises(ClusterError, match=f"no Ray cluster answers at {address}") as caught:
        _join(address, is_named=True)
    assert caught.value.details[0] == "nothing listens there"


def test_a_cluster_that_is_found_and_does_not_answer_is_not_called_one_that_was_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with pytest.raises(ClusterError, match="the Ray cluster that `ray start` began on this machine") as found:
        _join(address, is_named=False)
    assert found.value.details == ("nothing listens there", "RAY_AUTH_MODE is not set")
    assert "with RAY_AUTH_MODE=token, set that here, too" in found.value.hint
    assert "ray_address=local" in found.value.hint
    assert "leave both out" not in found.value.hint
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(ClusterError) as asked:
        _join(address, is_named=False)
    assert "started without RAY_AUTH_MODE=token, or for another token" in asked.value.hint
