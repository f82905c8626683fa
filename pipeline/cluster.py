"""A Ray of this machine's own, which listens on loopback only and keeps quiet; batch and serve start theirs here."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from pipeline.errors import ClusterError

OWN_NAMESPACE = "expert-pipeline"
STDERR = 2


def takes_gpu(device: str | None) -> bool:
    """Whether an engine that is told this device uses a GPU where there is one."""
    return device in (None, "auto") or device.startswith("cuda")


def start_local(*, num_cpus: int | None = None) -> Path:
    """Start a Ray that ends with this process.

    Args:
        num_cpus: CPU cores it may hand out; None for all there are.

    Returns:
        The folder of its logs.

    Raises:
        ClusterError: Ray did not start.
    """
    # Ray would report its use to its makers; a job on a closed network must not try.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        with native_output_dropped(), loopback_only(), own_sigterm_kept():
            started: Any = ray.init(
                address="local",
                num_cpus=num_cpus,
                namespace=OWN_NAMESPACE,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _node_ip_address="127.0.0.1",
            )
    except Exception as error:  # Ray has no kind of its own for this
        ray.shutdown()  # what did start
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise ClusterError(
            "Ray did not start on this machine",
            details=lines[:3],
            hint="Run it again: a machine that is busy may need longer than Ray waits. If it happens each time, free "
            "memory, disk and /dev/shm, and see the newest folder in /tmp/ray for what Ray has logged.",
        ) from error
    return Path(started.address_info["session_dir"]) / "logs"


@contextmanager
def loopback_only() -> Iterator[None]:
    """Clusters started in here listen on loopback.

    On Linux Ray turns 127.0.0.1 into the machine's own address, and then listens on every interface, unless it is told
    that this is a platform for one machine only.
    """
    from ray._private import ray_constants

    name, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    kept = os.environ.get(name)
    os.environ[name] = "0"  # for the processes it starts
    ray_constants.ENABLE_RAY_CLUSTER = False  # for this one, which read it when Ray was imported
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        if kept is None:
            del os.environ[name]
        else:
            os.environ[name] = kept


@contextmanager
def own_sigterm_kept() -> Iterator[None]:
    """What this program does at SIGTERM stays: `ray.init` puts a handler of its own there, which prints C++ frames.

    Where the program has none, Ray's stays, as it ends what Ray has started.
    """
    before = signal.getsignal(signal.SIGTERM)
    yield
    if callable(before) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


@contextmanager
def native_output_dropped() -> Iterator[None]:
    """Ray's core says on standard error, past Python, how it will log: `ray.init` goes without standard error."""
    sys.stderr.flush()
    kept = os.dup(STDERR)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, STDERR)
        yield
    finally:
        os.dup2(kept, STDERR)
        os.close(kept)
        os.close(nowhere)


def silence() -> None:
    """Keep Ray's own lines out of this process's output; what it has to say of a failure comes back as an error."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    logging.getLogger("ray").setLevel(logging.ERROR)
