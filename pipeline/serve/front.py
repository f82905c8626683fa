"""The gateway of `expert serve`: HTTP in the command's own process, which calls the replicas by their handles.

On a cluster a gateway is a deployment behind Serve's proxies (`pipeline.serve.gateway`). On one machine both would be
processes on every request's way that only pass it on, on the cores that also compute.
"""

import asyncio
import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging.handlers import RotatingFileHandler
from pathlib import Path

import uvicorn

from pipeline.metrics import Metrics
from pipeline.serve.api import GatewayJob, gateway_api
from pipeline.serve.heads import BoundedHeads
from pipeline.serve.in_flight import InFlight
from pipeline.serve.messages import ReplicaBackend

LOOK_SECONDS = 0.05
KEEP_ALIVE_SECONDS = 75  # longer than clients keep a connection that they do not use, so that they close it
LAST_BYTES_SECONDS = 5
LOG_FILE = "gateway.log"
LOG_BYTES, LOG_FILES = 100 << 20, 5
LOGGERS = ("pipeline.serve", "uvicorn.error")


class Front:
    """Speaks HTTP for a service whose replicas run. It belongs to the event loop that it is made in.

    Args:
        job: What it is told.
        backend: Answers.
        metrics: Makes what requests are counted and measured with.
    """

    def __init__(self, job: GatewayJob, backend: ReplicaBackend, metrics: Metrics) -> None:
        self._backend = backend
        self._in_flight = InFlight(job.limits)
        api = gateway_api(job, backend, metrics, in_flight=self._in_flight)
        self._server = _Server(
            uvicorn.Config(
                api,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                http=BoundedHeads,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=LAST_BYTES_SECONDS,
            )
        )
        self._serving: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def num_in_flight(self) -> int:
        """How many requests are not answered yet."""
        return self._in_flight.total

    async def start(self, listening: socket.socket) -> None:
        """Answer what comes to a socket; returns when it is listened to.

        Args:
            listening: A bound socket; see `pipeline.serve.run.bound`.

        Raises:
            OSError: Another process listens there by now.
        """
        await self._backend.warm_up()  # the first call of a handle takes seconds, which no client shall wait for
        self._serving = asyncio.create_task(self._server.serve(sockets=[listening]))
        while not self._server.started and not self._serving.done():
            await asyncio.sleep(LOOK_SECONDS)
        if self._serving.done():
            await self._serving

    async def ended(self) -> None:
        """Returns when nothing is listened to any more."""
        await asyncio.wait({self._serving})

    async def stop(self, seconds: float) -> None:
        """Refuse what comes from now on, finish what was begun, and listen no longer.

        Args:
            seconds: What is not finished after so long is cut off.
        """
        self._in_flight.close()
        if not self._server.started:
            return
        try:
            async with asyncio.timeout(seconds):
                while self._in_flight.total:
                    await asyncio.sleep(LOOK_SECONDS)
        except TimeoutError:
            self._in_flight.cut_off()
        self._server.should_exit = True  # last bytes are still fetched
        await self._serving


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """What makes the event loop to run a `Front` in: uvloop's where it is installed; None for asyncio's own."""
    return uvicorn.Config("", loop="auto", log_config=None).get_loop_factory()


class _Server(uvicorn.Server):
    """A server that leaves signals to the program."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


@contextmanager
def logging_to(folder: Path) -> Iterator[Path]:
    """The log of the gateway is a file beside those of Serve's own processes.

    Args:
        folder: Where they are.

    Returns:
        The file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOG_FILE
    handler = RotatingFileHandler(path, maxBytes=LOG_BYTES, backupCount=LOG_FILES)
    handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s %(name)s -- %(message)s"))
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [own.level for own in loggers]
    for own in loggers:
        own.addHandler(handler)
        own.setLevel(min(own.getEffectiveLevel(), logging.INFO))
    try:
        yield path
    finally:
        for own, level in zip(loggers, before, strict=True):
            own.removeHandler(handler)
            own.setLevel(level)
        handler.close()
