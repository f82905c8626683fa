"""Joining a Ray cluster or starting one here, and keeping its noise out of a job's log."""

import logging
import os
from dataclasses import dataclass

import ray
import ray.data  # sets up its own logging when imported

from pipeline.errors import BatchError

QUIET_LOGGERS = ("ray", "ray.data")


@dataclass(frozen=True)
class Cluster:
    """What the cluster has to give.

    Args:
        num_cpus: CPU cores of all nodes.
        num_gpus: GPUs of all nodes.
        is_local: This process started it; it ends with this process.
    """

    num_cpus: float
    num_gpus: float
    is_local: bool


def connect(address: str | None = None) -> Cluster:
    """Join the cluster at `address`, or of RAY_ADDRESS, or one that runs on this machine; else start one here.

    A cluster that is started here listens on loopback only and ends with this process. A process that is connected
    already stays so.

    Raises:
        BatchError: An address is given, and no cluster answers there.
    """
    # Ray's core prints its own findings straight to the terminal, whatever Python's logging says.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    is_local = False
    if not ray.is_initialized():
        wanted = address or os.environ.get("RAY_ADDRESS")
        try:
            ray.init(address=wanted or "auto", log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            if wanted is not None and wanted != "local":
                raise BatchError(
                    f"no Ray cluster answers at {wanted}",
                    details=(f"{type(error).__name__}: {str(error).splitlines()[0]}",),
                    hint="Start one with `ray start --head`, correct ray_address or RAY_ADDRESS, or leave both out.",
                ) from error
            _start_local()
            is_local = True
    resources = ray.cluster_resources()
    return Cluster(resources.get("CPU", 0.0), resources.get("GPU", 0.0), is_local)


def _start_local() -> None:
    # Ray would report its use to its makers; a batch job on a closed network must not try.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _node_ip_address="127.0.0.1",
    )
