"""Joining a Ray cluster or starting one here, and keeping its noise out of a job's log."""

import logging
import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray
import ray.data  # sets up its own logging when imported

from pipeline.errors import BatchError

OWN_NAMESPACE = "expert-pipeline"
STDERR = 2
CONNECT_SECONDS = 2.0
_HOST_AND_PORT = re.compile(r"[^/]+:\d{1,5}")


@dataclass(frozen=True)
class Cluster:
    """What the cluster has to give.

    Args:
        num_cpus: CPU cores of all nodes.
        num_gpus: GPUs of all nodes.
        is_local: This process started it; it cannot grow, and ends with this process.
    """

    num_cpus: float
    num_gpus: float
    is_local: bool


def connect(address: str | None = None) -> Cluster:
    """Join the cluster at `address`, or of RAY_ADDRESS, or that `ray start` began on this machine; else start one here.

    A cluster that is started here listens on loopback only and ends with this process; `"local"` always starts one. A
    process that is connected already stays so.

    Raises:
        BatchError: An address is given, and no cluster answers there.
    """
    _silence()
    if not ray.is_initialized():
        wanted = address or os.environ.get("RAY_ADDRESS") or _started_by_ray_start()
        if wanted in (None, "local"):
            _start_local()
        else:
            _join(wanted)
    resources = ray.cluster_resources()
    is_local = ray.get_runtime_context().namespace == OWN_NAMESPACE
    return Cluster(resources.get("CPU", 0.0), resources.get("GPU", 0.0), is_local)


def _join(address: str) -> None:
    # Ray itself tries for minutes to reach a cluster that is not there.
    if _HOST_AND_PORT.fullmatch(address) and not _listens(address):
        raise _no_cluster(address, "nothing listens there")
    try:
        with _native_output_dropped():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise _no_cluster(address, why) from error


def _no_cluster(address: str, why: str) -> BatchError:
    return BatchError(
        f"no Ray cluster answers at {address}",
        details=(why,),
        hint="Start one with `ray start --head`, correct ray_address or RAY_ADDRESS, or leave both out; "
        "if the cluster asks for a token, as Ray's do unless told otherwise, set RAY_AUTH_MODE=token.",
    )


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def _start_local() -> None:
    # Ray would report its use to its makers; a batch job on a closed network must not try.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with _native_output_dropped(), _loopback_only():
        ray.init(
            address="local",
            namespace=OWN_NAMESPACE,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address="127.0.0.1",
        )


def _started_by_ray_start() -> str | None:
    """The address that `ray start` wrote down on this machine, if something still listens there.

    `ray.init(address="auto")` would also join a cluster that another program started for itself, and die with it.
    """
    from ray._private.utils import read_ray_address

    address = read_ray_address() or ""
    return address if _HOST_AND_PORT.fullmatch(address) and _listens(address) else None


@contextmanager
def _loopback_only() -> Iterator[None]:
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
def _native_output_dropped() -> Iterator[None]:
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


def _silence() -> None:
    """A job has one progress line of its own; what Ray has to say of a failure comes back as the job's error."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    logging.getLogger("ray").setLevel(logging.ERROR)
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.CRITICAL)
