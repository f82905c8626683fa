"""`expert serve`: a Ray and a Serve of this machine's own, from the command to the last answer."""

import logging
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError, ServeError
from pipeline.serve.config import ServeConfig, check_exposure
from pipeline.tracing import exporters_asked

if TYPE_CHECKING:
    from pipeline.serve.app import ServicePlan

APPLICATION = "expert"
READY_SECONDS = 120.0
LOOK_SECONDS = 0.1
CALL_SECONDS = 10.0
# For Serve's processes: calls go straight from one to the next, and one event loop in each does everything.
SERVE_SETTINGS = {
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
}
ENDING = (signal.SIGINT, signal.SIGTERM)


class StartPhases:
    """How long each part of a start took, in seconds."""

    def __init__(self) -> None:
        self.started = self._last = time.monotonic()
        self.seconds: dict[str, float] = {}

    def done(self, name: str) -> None:
        """What was begun after the last phase is done."""
        now = time.monotonic()
        self.seconds[name] = now - self._last
        self._last = now

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())
        return f"{self._last - self.started:.1f} s: {parts}"


def run_service(config: ServeConfig, say: Callable[[str], None], phases: StartPhases | None = None) -> None:
    """Serve until SIGINT or SIGTERM; then finish what was begun, and end. Call it from the main thread.

    Args:
        config: What to serve. With port 0 a free one is taken.
        say: Is told the address when it answers, and when it ends.
        phases: Takes note of how long the start takes.

    Raises:
        ConfigError: The configuration cannot be served on this machine.
        LoadError: A package or a base model cannot be used.
        ServeError: The service did not come up; `details` has what its log says.
    """
    phases = phases or StartPhases()
    check_exposure(config.host, is_open=not config.keys.load())
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        raise ConfigError(
            "RAY_AUTH_MODE turns Ray's tokens off, and Serve's processes listen to each other on every interface",
            hint="Unset RAY_AUTH_MODE, so that they ask for a token.",
        )
    port = config.port or _free_port(config.host)
    _refuse_taken(config.host, port)
    with ThreadPoolExecutor(1) as pool:
        planned = pool.submit(_plan, config)  # the packages are read while Ray starts
        import ray
        import ray.serve  # reads the environment for this process, before what is for others is added to it

        from pipeline.cluster import native_output_dropped, silence, start_local

        phases.done("import Ray")
        for name, value in SERVE_SETTINGS.items():
            os.environ.setdefault(name, value)
        silence()
        try:
            start_local()
            phases.done("start Ray")
            plan = planned.result()
            _deploy(plan, port, phases)
            with _ended_by_signal() as is_ended:
                say(f"{_url(config.host, port)}  {', '.join(card.name for card in plan.cards)}  ({phases})")
                is_ended.wait()
            say("ending: what was begun is finished first; again to end at once")
            _drain(plan)
        finally:
            with native_output_dropped():
                ray.shutdown()


def _plan(config: ServeConfig) -> "ServicePlan":
    from pipeline.engine.devices import check_device
    from pipeline.serve.app import plan_service

    check_device(config.device)  # the replicas are on this machine; they would say it after half a minute
    return plan_service(config)


def _deploy(plan: "ServicePlan", port: int, phases: StartPhases) -> None:
    from ray import serve

    from pipeline.serve.app import build_application

    config = plan.config
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(proxy_location="HeadOnly", http_options={"host": config.host, "port": port})
    phases.done("start Serve")
    try:
        serve.run(build_application(plan), name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        raise _not_started(error) from error
    phases.done("start replicas")
    _wait_until_ready(config.host, port)
    phases.done("first response")
    for group in plan.groups:
        handle = serve.get_deployment_handle(group.name, APPLICATION)
        own = handle.phases.remote().result(timeout_s=CALL_SECONDS)
        phases.seconds |= {f"of a replica: {name}": seconds for name, seconds in own.items()}
        break


def _not_started(error: RuntimeError) -> ServeError:
    """What Serve says of deployments that failed: the last lines are those of our own error."""
    from ray import serve

    application = serve.status().applications.get(APPLICATION)
    deployments = application.deployments.values() if application is not None else ()
    messages = [deployment.message for deployment in deployments if deployment.message] or [str(error)]
    lines = [line for message in messages for line in message.splitlines() if line.strip()]
    return ServeError(
        "the service did not start",
        details=lines[-8:],
        hint="Correct what is said above; the log is in /tmp/ray/session_latest/logs/serve.",
    )


def _wait_until_ready(host: str, port: int) -> None:
    """Serve is up when its deployments are; its proxy knows of them a moment later."""
    until = time.monotonic() + READY_SECONDS
    while time.monotonic() < until:
        try:
            with urllib.request.urlopen(f"{_url(host, port)}/health", timeout=5.0):  # noqa: S310  # our own address
                return
        except (urllib.error.URLError, OSError):
            time.sleep(LOOK_SECONDS)
    raise ServeError("the service does not answer", hint="See /tmp/ray/session_latest/logs/serve.")


@contextmanager
def _ended_by_signal() -> Iterator[threading.Event]:
    """An event that is set at the first signal to end; the second one ends the process as it always does."""
    is_ended = threading.Event()

    def end(number: int, _: object) -> None:
        is_ended.set()
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, end) for number in ENDING}
    try:
        yield is_ended
    finally:
        for number, handler in before.items():
            if is_ended.is_set():
                continue
            signal.signal(number, handler)


def _drain(plan: "ServicePlan") -> None:
    """Refuse what comes from now on, and wait until what was begun is answered. Serve itself ends with Ray."""
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    from pipeline.serve.gateway import GATEWAY

    config = plan.config
    if config.gateways > 1:  # a call reaches one of them: Serve drains them, and its proxy has the words
        with suppress(TimeoutError):
            serve.delete(APPLICATION)
        return
    until = time.monotonic() + config.replicas.drain_seconds
    num_idle = 0
    with suppress(TimeoutError, RayError, RayServeException):  # a gateway that is gone has nothing to finish
        gateway = serve.get_app_handle(APPLICATION)
        gateway.close.remote().result(timeout_s=CALL_SECONDS)
        while num_idle < 2 and time.monotonic() < until:  # twice: the proxy passes the last bytes on after the gateway
            num_idle = 0 if gateway.num_in_flight.remote().result(timeout_s=CALL_SECONDS) else num_idle + 1
            time.sleep(LOOK_SECONDS)
        if exporters_asked(os.environ):  # Ray ends its processes without asking them
            for name in (GATEWAY, *(group.name for group in plan.groups)):
                serve.get_deployment_handle(name, APPLICATION).broadcast("flush").results(timeout_s=CALL_SECONDS)


def _url(host: str, port: int) -> str:
    shown = "127.0.0.1" if host in ("0.0.0.0", "localhost") else "[::1]" if host == "::" else host  # noqa: S104
    return f"http://[{shown}]:{port}" if ":" in shown and not shown.startswith("[") else f"http://{shown}:{port}"


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _free_port(host: str) -> int:
    with socket.socket(_family(host)) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _refuse_taken(host: str, port: int) -> None:
    """Say at once what Serve would say after a minute of trying."""
    with socket.socket(_family(host)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"port {port} of {host} cannot be listened on: {error.strerror or error}",
                hint="Choose another port with --port, or 0 for any that is free.",
            ) from error
