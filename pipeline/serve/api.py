"""The HTTP application: which routes there are, over any backend."""

import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Self

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from pipeline.errors import ReplicaLostError, ServeError, UnknownRouteError
from pipeline.metrics import Metrics
from pipeline.openai_api.http_errors import HttpError, http_error
from pipeline.openai_api.protocol import ROUTES
from pipeline.openai_api.responses import json_bytes
from pipeline.serve.cards import model_body
from pipeline.serve.config import ServeConfig
from pipeline.serve.exchange import CompletionsRoute, RequestMetrics, Service
from pipeline.serve.guard import HEALTH_PATH, Guard
from pipeline.serve.in_flight import InFlight
from pipeline.serve.keys import KeyRing
from pipeline.serve.limits import LimitsConfig
from pipeline.serve.messages import Backend, ModelCard, ReplicaBackend
from pipeline.serve.metrics import GatewayMetrics
from pipeline.serve.playground import HEADERS, StaticFile, static_files

Endpoint = Callable[[Request], Awaitable[Response]]


def make_api(
    backend: Backend,
    models: Iterable[ModelCard],
    *,
    limits: LimitsConfig | None = None,
    keys: KeyRing | None = None,
    log_prompts: bool = False,
    playground: bool = True,
    metrics: RequestMetrics | None = None,
    is_ready: Callable[[], Awaitable[bool]] | None = None,
    echoes_request_id: bool = True,
    in_flight: InFlight | None = None,
) -> FastAPI:
    """Make the application.

    Args:
        backend: Answers.
        models: The experts that may be asked for.
        limits: Bounds on requests; None for the defaults.
        keys: Who may ask; None for everyone.
        log_prompts: Whether bodies and answers are written to the log.
        playground: Whether there is a page to try the experts at `/`.
        metrics: Takes note of every request that asks an expert.
        is_ready: Whether the backend can answer now, for `GET /ready`; None where it always can.
        echoes_request_id: Whether responses carry `x-request-id`; not where the server in front adds it.
        in_flight: Counts requests; None for a counter of the application's own.
    """
    limits = limits or LimitsConfig()
    service = Service(
        backend=backend,
        models={card.name: card for card in models},
        limits=limits,
        in_flight=in_flight or InFlight(limits),
        metrics=metrics,
        log_prompts=log_prompts,
    )
    files = static_files() if playground else {}
    routes: list[BaseRoute] = [
        *(Route(path, CompletionsRoute(kind, service), methods=["POST"]) for path, kind in ROUTES.items()),
        *_model_routes(service),
        Route(HEALTH_PATH, _health, methods=["GET"]),
        Route("/ready", _ready(is_ready), methods=["GET"]),
        *(Route(path, _file(file), methods=["GET"]) for path, file in files.items()),
    ]
    # No pages about the API: they would load scripts from elsewhere. And no redirects: they would repeat the Host.
    app = FastAPI(
        title="expert-pipeline", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False, routes=routes
    )
    app.add_exception_handler(HTTPException, _unknown_route)
    app.add_middleware(
        Guard, keys=keys or KeyRing({}), limits=limits, open_paths=tuple(files), echoes_request_id=echoes_request_id
    )
    return app


@dataclass(frozen=True)
class GatewayJob:
    """Everything a gateway is told.

    Args:
        models: The experts that may be asked for.
        limits: Bounds on requests.
        keys: Who may ask.
        log_prompts: Whether bodies and answers are written to the log.
        playground: Whether there is a page to try the experts at `/`.
    """

    models: tuple[ModelCard, ...]
    limits: LimitsConfig
    keys: KeyRing
    log_prompts: bool = False
    playground: bool = True

    @classmethod
    def of(cls, config: ServeConfig, models: Iterable[ModelCard]) -> Self:
        """Of a service.

        Args:
            config: Of the service.
            models: The experts that may be asked for.

        Raises:
            ConfigError: The keys cannot be read.
        """
        return cls(tuple(models), config.limits, config.keys.load(), config.log_prompts, config.playground)


def gateway_api(
    job: GatewayJob,
    backend: ReplicaBackend,
    metrics: Metrics,
    *,
    echoes_request_id: bool = True,
    in_flight: InFlight | None = None,
) -> FastAPI:
    """The application of a gateway, wherever it runs.

    Args:
        job: What it is told.
        backend: Answers.
        metrics: Makes what requests are counted and measured with.
        echoes_request_id, in_flight: As for `make_api`.
    """
    return make_api(
        backend,
        job.models,
        limits=job.limits,
        keys=job.keys,
        log_prompts=job.log_prompts,
        playground=job.playground,
        metrics=GatewayMetrics(metrics),
        is_ready=backend.is_ready,
        echoes_request_id=echoes_request_id,
        in_flight=in_flight,
    )


def _model_routes(service: Service) -> list[BaseRoute]:
    created = int(time.time())
    bodies = {name: model_body(card, created) for name, card in sorted(service.models.items())}
    listed = json_bytes({"object": "list", "data": list(bodies.values())})

    async def list_models(_: Request) -> Response:
        return _json(listed)

    async def show_model(request: Request) -> Response:
        return _json(json_bytes(bodies[service.card(request.path_params["name"]).name]))

    return [
        Route("/v1/models", list_models, methods=["GET"]),
        Route("/v1/models/{name:path}", show_model, methods=["GET"]),
    ]


async def _health(_: Request) -> Response:
    return _json(b'{"status":"ok"}')


def _ready(is_ready: Callable[[], Awaitable[bool]] | None) -> Endpoint:
    async def ready(_: Request) -> Response:
        if is_ready is not None and not await is_ready():
            raise ReplicaLostError("no replica answers at the moment", hint="Ask again in a moment.")
        return _json(b'{"status":"ready"}')

    return ready


def _file(file: StaticFile) -> Endpoint:
    async def send_file(_: Request) -> Response:
        return Response(file.content, media_type=file.media_type, headers=dict(HEADERS))

    return send_file


async def _unknown_route(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    method, path = request.method[:20], request.url.path[:100]
    if status == 405:
        told = UnknownRouteError(f"{path} is not served to {method}", hint="Use another method; Allow lists them.")
    elif status == 404:
        told = UnknownRouteError(f"nothing is served under {path}", hint="The API begins with /v1.")
    else:
        return _error(http_error(ServeError("the request failed", hint="See the log.")))
    return _error(http_error(told, status=status), dict(getattr(error, "headers", None) or {}))


def _error(error: HttpError, headers: dict[str, str] | None = None) -> Response:
    return Response(
        error.body, error.status, {**error.headers, **(headers or {}), "Cache-Control": "no-store"}, "application/json"
    )


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json", headers={"Cache-Control": "no-store"})
