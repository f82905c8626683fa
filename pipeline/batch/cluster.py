"""Joining a Ray cluster or starting one here, and keeping its noise out of a job's log."""

import logging
import os
import re
import socket
from dataclasses import dataclass

import ray
import ray.data  # sets up its own logging when imported

from pipeline.cluster import OWN_NAMESPACE, native_output_dropped, own_sigterm_kept, silence, start_local
from pipeline.errors import ClusterError

CONNECT_SECONDS = 2.0
RAY_CLIENT = "ray://"  # how the address of Ray's client server begins
RAY_DATA_CONSOLE = "console"  # its handler that writes on standard error
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
        ClusterError: An address is given, and no cluster answers there; or none starts here.
    """
    _silence()
    if not ray.is_initialized():
        named = address or os.environ.get("RAY_ADDRESS")
        wanted = named or _started_by_ray_start()
        if wanted in (None, "local"):
            start_local()
        else:
            _join(wanted, is_named=named is not None)
    resources = ray.cluster_resources()
    is_local = ray.get_runtime_context().namespace == OWN_NAMESPACE
    return Cluster(resources.get("CPU", 0.0), resources.get("GPU", 0.0), is_local)


def _join(address: str, *, is_named: bool) -> None:
    # Ray itself tries for half a minute (ray://) or for minutes to reach a cluster that is not there.
    place = address.removeprefix(RAY_CLIENT)
    if _HOST_AND_PORT.fullmatch(place) and not _listens(place):
        raise _no_cluster(address, "nothing listens there", is_named=is_named)
    if not is_named:
        _take_token()
    try:
        with native_output_dropped(), own_sigterm_kept():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise _no_cluster(address, why, is_named=is_named) from error


def _take_token() -> None:
    """Ask with this person's token, where there is one and RAY_AUTH_MODE says nothing.

    `ray start` does so, and `ray.init` for the address "auto", but not for the one that "auto" stands for.
    """
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def _no_cluster(address: str, why: str, *, is_named: bool) -> ClusterError:
    mode = os.environ.get("RAY_AUTH_MODE")
    token = (
        "If it was started with RAY_AUTH_MODE=token, set that here, too"
        if mode != "token"
        else "If it was started without RAY_AUTH_MODE=token, or for another token, unset it or take that token"
    )
    if is_named:
        message = f"no Ray cluster answers at {address}"
        hint = f"Start one with `ray start --head`, correct ray_address or RAY_ADDRESS, or leave both out. {token}."
    else:
        message = f"the Ray cluster that `ray start` began on this machine, at {address}, does not answer"
        hint = f"{token}. To do without that cluster: ray_address=local."
    return ClusterError(message, details=(why, f"RAY_AUTH_MODE is {'not set' if mode is None else mode}"), hint=hint)


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def _started_by_ray_start() -> str | None:
    """The address that `ray start` wrote down on this machine, if something still listens there.

    `ray.init(address="auto")` would also join a cluster that another program started for itself, and die with it.
    """
    from ray._private.utils import read_ray_address

    address = read_ray_address() or ""
    return address if _HOST_AND_PORT.fullmatch(address) and _listens(address) else None


def _silence() -> None:
    """A job has one progress line of its own; what Ray has to say of a failure comes back as the job's error."""
    silence()
    for handler in logging.getLogger("ray.data").handlers:
        if handler.name == RAY_DATA_CONSOLE:  # whoever added others wants to hear
            handler.setLevel(logging.CRITICAL)
