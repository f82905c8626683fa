"""`ray start --head`: a cluster of its own on this machine, for what is submitted and deployed from outside."""

import secrets
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from tests.e2e.processes import BIN, running, wait_until
from tests.e2e.serving import free_port


@dataclass(frozen=True)
class Head:
    """A running head node.

    Args:
        dashboard: The address that jobs are submitted to and services deployed at.
        address: What `RAY_ADDRESS` is for whoever joins.
        token: The environment of whoever may use it.
    """

    dashboard: str
    address: str
    token: Mapping[str, str]


@contextmanager
def ray_head(folder: Path) -> Iterator[Head]:
    """Start a head node of two cores; it is ended on leaving.

    Args:
        folder: Where its output goes.
    """
    session = tempfile.mkdtemp(prefix="ray-")  # sockets lie in it: a path of pytest's would be too long for them
    port, dashboard_port = free_port(), free_port()
    command = [
        *(BIN / "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"),
        *(f"--port={port}", f"--dashboard-port={dashboard_port}", "--num-cpus=2", "--disable-usage-stats"),
        f"--temp-dir={session}",  # where it writes down its address, too
        f"--dashboard-agent-listen-port={free_port()}",  # another cluster of these tests has the usual one
    ]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    head = Head(f"http://127.0.0.1:{dashboard_port}", f"127.0.0.1:{port}", token)
    log = folder / "head.log"
    try:
        with running(command, log, more=token):
            if not wait_until(lambda: _answers(head.dashboard), seconds=180):
                raise RuntimeError(log.read_text())
            yield head
    finally:
        shutil.rmtree(session, ignore_errors=True)


def _answers(address: str) -> bool:
    """Whether the dashboard is up; that it asks for a token is an answer too, and what follows has one."""
    try:
        with urllib.request.urlopen(f"{address}/api/version", timeout=2):  # noqa: S310  # loopback
            return True
    except urllib.error.HTTPError as error:
        return error.code == HTTPStatus.UNAUTHORIZED
    except OSError:
        return False
