"""A service on the tests' own cluster: deployed, looked into, asked, and kept busy."""

import asyncio
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import httpx

from benchmarks.replies import MalformedReplyError, Reply, ask
from pipeline import demo
from tests.e2e.processes import wait_until

SCHEMA = "CREATE TABLE users (id INT, name TEXT, city TEXT);"
SECONDS = 120.0  # more than anything takes, on two slow cores
LONG: dict[str, Any] = {"max_tokens": 900, "ignore_eos": True, "use_grammar": False, "stop": ["\0"]}


def free_port() -> int:
    """A port of loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def options(**changes: Any) -> dict[str, Any]:
    """The fields of a `ServeConfig` for the demo's three experts."""
    experts = [{"package": str(demo.package(task)), "name": task, "pin": True} for task in demo.TASKS]
    return {"experts": experts, "base_model": str(demo.BASE_MODEL), "dtype": "float32", **changes}


# Of three experts two are held at a time, and one of them always.
FEW_RESIDENT = options(
    experts=[{**expert, "pin": expert["name"] == "sql"} for expert in options()["experts"]],
    max_resident_experts=2,
    replicas={"num_cpus": 0.5},
)


class Service:
    """An application of this process's Serve.

    Args:
        port: That Serve listens on.
        name: The application's.
    """

    def __init__(self, port: int, name: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._port = port
        self._name = name
        self._deployment = ""
        self._fields: dict[str, Any] = {}

    def deploy(self, fields: Mapping[str, Any]) -> None:
        """Deploy, or deploy again; returns when it runs.

        Args:
            fields: Of a `ServeConfig`.
        """
        from ray import serve

        from pipeline.serve.app import build_application, plan_service
        from pipeline.serve.config import ServeConfig

        plan = plan_service(ServeConfig.from_options({**fields, "port": self._port}))
        serve.run(build_application(plan), name=self._name, route_prefix="/")
        self._deployment = plan.groups[0].name
        self._fields = dict(fields)

    def offer(self, fields: Mapping[str, Any]) -> None:
        """Deploy, unless that is what runs."""
        if fields != self._fields:
            self.deploy(fields)

    @property
    def handle(self) -> Any:
        """Of the deployment of replicas."""
        from ray import serve

        return serve.get_deployment_handle(self._deployment, self._name)

    @property
    def replica_title(self) -> str:
        """How the processes of the replicas are called."""
        return f"ray::ServeReplica:{self._name}:ExpertReplica"

    def pids(self) -> dict[str, int]:
        """The processes of the replicas that run, by the replica's id, as each has told Serve."""
        from ray.serve.context import _get_global_client

        client = _get_global_client()
        assert client is not None
        deployments = client.get_serve_details()["applications"][self._name]["deployments"]
        replicas = deployments[self._deployment]["replicas"]
        return {one["replica_id"]: one["pid"] for one in replicas if one["state"] == "RUNNING"}

    def pid(self) -> int:
        """The process of the only replica."""
        (pid,) = self.pids().values()
        return pid

    def stats(self) -> Any:
        """What the engine of a replica is doing."""
        return self.handle.stats.remote().result(timeout_s=SECONDS)

    def is_idle(self) -> bool:
        """Whether the engine has nothing to do."""
        stats = self.stats()
        return not (stats.num_running or stats.num_waiting)

    def client(self, **settings: Any) -> httpx.AsyncClient:
        """A client with as many connections as it needs."""
        limits = httpx.Limits(max_connections=None)
        return httpx.AsyncClient(base_url=self.url, timeout=SECONDS, limits=limits, trust_env=False, **settings)

    def ask_all(self, bodies: Sequence[Mapping[str, Any]]) -> list[Reply]:
        """Ask everything at once."""

        async def all_of_them() -> list[Reply]:
            async with self.client() as client:
                return list(await asyncio.gather(*(ask(client, body) for body in bodies)))

        return asyncio.run(all_of_them())


@contextmanager
def serving(name: str) -> Iterator[Service]:
    """A Serve for one application, ended on leaving; the cluster stays."""
    from ray import serve

    port = free_port()
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    try:
        yield Service(port, name)
    finally:
        serve.shutdown()


class Load:
    """Clients in a thread that ask again and again; started and ended as a context.

    Args:
        service: What is asked.
        bodies: What for, in turn.
        wanted: The text of each.
        clients: How many ask at once.
    """

    def __init__(
        self, service: Service, bodies: Sequence[Mapping[str, Any]], wanted: Sequence[str], *, clients: int
    ) -> None:
        self.num_answered = 0
        self.failures: list[str] = []
        self._service = service
        self._work = list(zip(bodies, wanted, strict=True))
        self._clients = clients
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join(SECONDS)

    def wait_for_more(self, count: int) -> None:
        """Wait until so many more are answered."""
        until = self.num_answered + count
        assert wait_until(lambda: self.num_answered >= until or bool(self.failures), seconds=SECONDS)

    async def _run(self) -> None:
        async with self._service.client() as client:
            await asyncio.gather(*(self._ask_on(client, number) for number in range(self._clients)))

    async def _ask_on(self, client: httpx.AsyncClient, number: int) -> None:
        while not self._is_over.is_set():
            body, wanted = self._work[number % len(self._work)]
            number += 1
            try:
                reply = await ask(client, body)
            except (httpx.HTTPError, MalformedReplyError) as error:
                self.failures.append(f"{type(error).__name__}: {error}")
                continue
            if reply.is_answered and reply.texts[0] == wanted:
                self.num_answered += 1
            else:
                self.failures.append(f"{reply.status} {reply.error} {reply.texts}")
