"""`expert serve`: a Ray and a Serve of this machine's own, from the command to the last answer."""

import asyncio
import errno
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError, ServeError
from pipeline.serve.config import ServeConfig, check_exposure
from pipeline.tracing import exporters_asked, flush_spans

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

    from pipeline.serve.app import ReplicaGroup, ServicePlan

APPLICATION = "expert"
CALL_SECONDS = 10.0
# For Serve's processes and this one: calls go straight from one to the next, and each does all in one event loop.
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
        say: Is told where the log is, the address when it answers, and when it ends.
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
    if config.gateways > 1:
        raise ConfigError(
            f"gateways is {config.gateways}, and this command speaks HTTP itself, in one process",
            hint="Leave gateways out, or deploy the service with `serve run`.",
        )
    for name, value in SERVE_SETTINGS.items():  # before Serve is imported, which reads them once
        os.environ.setdefault(name, value)
    with bound(config.host, config.port) as listening, ThreadPoolExecutor(1) as pool:
        planned = pool.submit(_plan, config)  # the packages are read while Ray starts
        import ray
        import ray.serve

        from pipeline.cluster import native_output_dropped, silence, start_local
        from pipeline.serve.front import logging_to, loop_factory

        phases.done("import Ray")
        silence()
        try:
            logs = start_local()
            phases.done("start Ray")
            plan = planned.result()
            with logging_to(logs / "serve") as log, asyncio.Runner(loop_factory=loop_factory()) as runner:
                say(f"log: {log}")
                deployed = _deploy(plan, log, phases)
                runner.run(_serve(plan, deployed, listening, say, phases))
        finally:
            with native_output_dropped():
                ray.shutdown()


def _plan(config: ServeConfig) -> "ServicePlan":
    from pipeline.engine.devices import check_device
    from pipeline.serve.app import plan_service

    check_device(config.device)  # the replicas are on this machine; they would say it after half a minute
    return plan_service(config)


def _deploy(plan: "ServicePlan", log: Path, phases: StartPhases) -> dict[str, "ReplicaGroup"]:
    """Start the replicas; for each application of Serve, what answers there."""
    from ray import serve

    from pipeline.serve.app import replica_application

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(proxy_location="Disabled")
    phases.done("start Serve")
    deployed = {_application(number): group for number, group in enumerate(plan.groups)}
    targets = [
        serve.RunTarget(replica_application(plan.config, group), name=name, route_prefix=None)
        for name, group in deployed.items()
    ]
    try:
        serve.run_many(targets)
    except RuntimeError as error:
        raise _not_started(error, log) from error
    phases.done("start replicas")
    return deployed


def _application(number: int) -> str:
    return APPLICATION if number == 0 else f"{APPLICATION}-{number + 1}"


async def _serve(
    plan: "ServicePlan",
    deployed: Mapping[str, "ReplicaGroup"],
    listening: socket.socket,
    say: Callable[[str], None],
    phases: StartPhases,
) -> None:
    """Answer until a signal comes."""
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    from pipeline.ray_metrics import RayMetrics
    from pipeline.serve.api import GatewayJob
    from pipeline.serve.front import Front
    from pipeline.serve.gateway import HandleBackend

    config = plan.config
    handles = {name: serve.get_deployment_handle(group.name, name) for name, group in deployed.items()}
    answering = {expert.name: handles[name] for name, group in deployed.items() for expert in group.job.experts}
    front = Front(GatewayJob.of(config, plan.cards), HandleBackend(answering), RayMetrics())
    port = listening.getsockname()[1]
    try:
        await front.start(listening)
    except OSError as error:
        raise _not_listening(config.host, port, error) from error
    phases.done("first call")
    with suppress(TimeoutError, RayError, RayServeException):  # it is for the reader of the line alone
        async with asyncio.timeout(CALL_SECONDS):
            own = await handles[APPLICATION].phases.remote()
        phases.seconds |= {f"of a replica: {name}": seconds for name, seconds in own.items()}
    with _ended_by_signal() as is_ended:
        say(f"{_url(config.host, port)}  {', '.join(card.name for card in plan.cards)}  ({phases})")
        waiting = {asyncio.ensure_future(one) for one in (is_ended.wait(), front.ended())}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for one in waiting:
            one.cancel()
        if not is_ended.is_set():
            raise ServeError("the HTTP server has stopped", hint="See the log that was named at the start.")
    say("ending: what was begun is finished first; again to end at once")
    await front.stop(config.replicas.drain_seconds)
    if exporters_asked(os.environ):
        await _flush(handles.values())


async def _flush(handles: Iterable["DeploymentHandle[Any]"]) -> None:
    """Export the spans that have ended: Ray ends its processes without asking them."""
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    await asyncio.to_thread(flush_spans)
    for handle in handles:
        with suppress(TimeoutError, RayError, RayServeException):  # replicas that are gone have exported what they had
            async with asyncio.timeout(CALL_SECONDS):
                await handle.broadcast("flush").results_async()


def _not_started(error: RuntimeError, log: Path) -> ServeError:
    """What Serve says of deployments that failed: the last lines are those of our own error."""
    from ray import serve

    deployments = [
        one for application in serve.status().applications.values() for one in application.deployments.values()
    ]
    messages = [deployment.message for deployment in deployments if deployment.message] or [str(error)]
    lines = [line for message in messages for line in message.splitlines() if line.strip()]
    return ServeError(
        "the service did not start",
        details=lines[-8:],
        hint=f"Correct what is said above; the logs are in {log.parent}.",
    )


@contextmanager
def _ended_by_signal() -> Iterator[asyncio.Event]:
    """An event that is set at the first signal to end; the second one ends the process as it always does."""
    is_ended = asyncio.Event()
    loop = asyncio.get_running_loop()

    def end() -> None:
        is_ended.set()
        for number in ENDING:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)

    before = {number: signal.getsignal(number) for number in ENDING}
    for number in ENDING:
        loop.add_signal_handler(number, end)
    try:
        yield is_ended
    finally:
        if not is_ended.is_set():
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)


@contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that has an address, and is not listened to yet.

    Args:
        host: Name or number of the address.
        port: With 0 a free one is taken.

    Raises:
        ConfigError: It cannot be had.
    """
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
        except OSError as error:
            raise _not_listening(host, port, error) from error
        yield listening


def _not_listening(host: str, port: int, error: OSError) -> ConfigError:
    hint = "Choose another port with --port, or 0 for any that is free."
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        hint = "Name an address of this machine with --host."
    return ConfigError(f"port {port} of {host} cannot be listened on: {error.strerror or error}", hint=hint)


def _url(host: str, port: int) -> str:
    shown = "127.0.0.1" if host in ("0.0.0.0", "localhost") else "[::1]" if host == "::" else host  # noqa: S104
    return f"http://[{shown}]:{port}" if ":" in shown and not shown.startswith("[") else f"http://{shown}:{port}"
