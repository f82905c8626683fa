"""The Serve deployment that speaks HTTP, and the way from it to the replicas."""

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException

from pipeline.errors import ExpertError, OverloadedError, ReplicaLostError, ServeError
from pipeline.ray_metrics import RayMetrics
from pipeline.serve.api import GatewayJob, gateway_api
from pipeline.serve.config import ServeConfig
from pipeline.serve.messages import Ask, Delta, Ended, Event, ModelCard
from pipeline.tracing import export_spans, flush_spans

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve.handle import DeploymentHandle

logger = logging.getLogger(__name__)
GATEWAY = "Gateway"  # the name of its deployment
MAX_ATTEMPTS = 5
RETRY_SECONDS = 0.1  # before the second attempt; twice as long before each further one
READY_SECONDS = 2.0
DRAIN_LOOK_SECONDS = 0.25
MAX_ONGOING_REQUESTS = 100_000  # more than ever come: what is too much the gateway refuses itself, in its own words


class HandleBackend:
    """Answers from replicas, through Serve; see `pipeline.serve.messages.Backend`.

    A request whose replica is lost is asked of another one, unless a part of its answer was passed on.

    Args:
        handles: The deployment of replicas that answers, for each expert.
    """

    def __init__(self, handles: Mapping[str, "DeploymentHandle[Any]"]) -> None:
        self._deployments = list({handle.deployment_name: handle for handle in handles.values()}.values())
        # A stream costs two or three messages more: where the client waits for the whole, so does the gateway.
        self._streams = calls(handles, "ask_gathered", stream=True)
        self._wholes = calls(handles, "ask_whole", stream=False)

    async def ask(self, ask: Ask) -> AsyncGenerator[Event, None]:
        """Answer one request.

        Raises:
            ReplicaLostError: Its replica is gone, and it cannot be asked again.
            ServeError: The replica failed by a mistake of its own.
            OverloadedError: Too many requests wait for a replica.
        """
        until = None if ask.deadline is None else time.monotonic() + ask.deadline
        for attempt in range(1, MAX_ATTEMPTS + 1):
            left = None if until is None else max(until - time.monotonic(), 0.0)
            has_text = has_ended = False
            try:
                async with aclosing(self._arriving(replace(ask, deadline=left))) as arriving:
                    async for events in arriving:
                        for event in events:
                            has_text = has_text or isinstance(event, Delta | Ended)
                            has_ended = has_ended or isinstance(event, Ended)
                            yield event
            except BackPressureError as error:
                raise OverloadedError("too many requests wait for a replica", hint="Ask again in a moment.") from error
            except (ExpertError, RayError, RayServeException) as error:
                if has_ended:  # a replica tells all ends together, and last: nothing of the answer is lost
                    return
                if _is_own_mistake(error):
                    raise ServeError(f"the replica failed: {error}", hint="See its log.") from error
                if has_text or attempt == MAX_ATTEMPTS:
                    raise ReplicaLostError("the replica that was answering is lost", hint="Ask again.") from error
                logger.warning(
                    "request %s lost its replica at attempt %d: %s", ask.request_id, attempt, type(error).__name__
                )
            else:
                return
            await asyncio.sleep(RETRY_SECONDS * 2 ** (attempt - 1))

    async def _arriving(self, ask: Ask) -> AsyncGenerator[list[Event], None]:
        """What a replica answers; closed before its end, the replica is told to stop."""
        called = (self._streams if ask.is_streamed else self._wholes)[ask.expert].remote(ask)
        try:
            if ask.is_streamed:
                async for events in called:
                    yield events
            else:
                yield await called
        except BaseException:
            called.cancel()
            raise

    async def warm_up(self) -> None:
        """Wait for a replica of every base model, so that no client pays for the first call."""
        try:
            await self._stats()
        except (RayError, RayServeException) as error:
            logger.warning("warm-up: %s: %s", type(error).__name__, error)

    async def is_ready(self) -> bool:
        """Whether a replica of every base model answers."""
        try:
            async with asyncio.timeout(READY_SECONDS):
                await self._stats()
        except (TimeoutError, RayError, RayServeException) as error:
            logger.warning("not ready: %s: %s", type(error).__name__, error)
            return False
        return True

    async def _stats(self) -> None:
        await asyncio.gather(*(handle.options(method_name="stats").remote() for handle in self._deployments))


def gateway_deployment(
    config: ServeConfig, models: Iterable[ModelCard], replicas: Mapping[str, serve.Application]
) -> serve.Application:
    """The gateway of a service.

    Args:
        config: Of the service.
        models: The experts that may be asked for.
        replicas: What answers, for each expert.

    Raises:
        ConfigError: The keys cannot be read.
    """
    job = GatewayJob.of(config, models)
    deployment: serve.Deployment = serve.deployment(  # type: ignore[assignment]  # typed as the decorator that it also is
        Gateway,
        name=GATEWAY,
        num_replicas=config.gateways,
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=config.replicas.drain_seconds,  # as long as what it passes on may take
        graceful_shutdown_wait_loop_s=DRAIN_LOOK_SECONDS,
    )
    return deployment.bind(job, dict(replicas))


@serve.ingress()
class Gateway:
    """The HTTP side of the service: keys, limits, checks and shapes, in a process of its own.

    Args:
        job: What it is told.
        handles: The deployment of replicas that answers, for each expert.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it: there is an event loop from the beginning
        self, job: GatewayJob, handles: Mapping[str, "DeploymentHandle[Any]"]
    ) -> None:
        _log_with_serve()
        export_spans(os.environ)
        self._job = job
        self._backend = HandleBackend(handles)
        # The first call of a handle takes seconds; they pass while the replicas are loading.
        self._warming = asyncio.create_task(self._backend.warm_up())

    def __serve_build_asgi_app__(self) -> "FastAPI":
        """The application; Serve asks for it once, by this name."""
        # Serve's proxy tells clients the request's id.
        return gateway_api(self._job, self._backend, RayMetrics(), echoes_request_id=False)

    async def __del__(self) -> None:
        """Serve calls this once, when nothing is to be answered any more: spans that have ended are exported."""
        await asyncio.to_thread(flush_spans)


def calls(handles: Mapping[str, "DeploymentHandle[Any]"], method: str, *, stream: bool) -> dict[str, Any]:
    """For each expert, what calls a method of a replica, if possible of one that holds that expert.

    Args:
        handles: The deployment of replicas that answers, for each expert.
        method: Of `pipeline.serve.replica.ExpertReplica`.
        stream: Whether it answers piece by piece.
    """
    return {
        name: handle.options(method_name=method, stream=stream, multiplexed_model_id=name)
        for name, handle in handles.items()
    }


def _is_own_mistake(error: Exception) -> bool:
    """Whether a replica lives, and failed for a reason that it would fail for again."""
    return isinstance(error, RayTaskError) and not isinstance(error, ExpertError)


def _log_with_serve() -> None:
    """Have our log lines written where Serve writes its own: the replica's log file."""
    own = logging.getLogger("pipeline.serve")
    own.setLevel(logging.INFO)
    own.propagate = False
    for handler in logging.getLogger("ray.serve").handlers:
        own.addHandler(handler)
