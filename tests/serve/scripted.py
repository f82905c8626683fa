"""What the tests of the gateway stand on: a backend that answers by a script, and a real server."""

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from pipeline.package import Routing
from pipeline.serve.messages import Ask, Delta, Ended, Event, ModelCard, Started

CARDS = tuple(
    ModelCard(
        name=name,
        base="tiny",
        version="1.2.0",
        digest=digit * 64,
        kind="lora",
        takes_schema=name == "sql",
        routing=Routing(keywords=(name,)),
    )
    for name, digit in (("sql", "a"), ("cypher", "b"))
)
WORDS = ("SELECT", " *", " FROM", " users")

Script = Callable[[Ask], AsyncIterator[Event]]


async def words(ask: Ask) -> AsyncIterator[Event]:
    """Every answer is `WORDS`, a word at a time; not streamed, at once."""
    yield Started(prompt_tokens=7)
    for index in range(int(ask.options.get("n", 1))):
        for text in WORDS if ask.is_streamed else ("".join(WORDS),):
            yield Delta(text, index)
        yield Ended("stop", len(WORDS) + 1, index)


async def endless(ask: Ask) -> AsyncIterator[Event]:
    """Writes until it is closed."""
    yield Started(prompt_tokens=7)
    while True:
        yield Delta("more ")
        await asyncio.sleep(0.001)


async def silent(ask: Ask) -> AsyncIterator[Event]:
    """Begins, and never writes."""
    yield Started(prompt_tokens=7)
    await asyncio.sleep(3600)


class ScriptedBackend:
    """Answers as its script says, and remembers what it was asked.

    Args:
        script: What each request is answered with.
    """

    def __init__(self, script: Script = words) -> None:
        self.script = script
        self.asks: list[Ask] = []
        self.num_open = 0
        self.num_events = 0

    async def ask(self, ask: Ask) -> AsyncIterator[Event]:
        self.asks.append(ask)
        self.num_open += 1
        try:
            async for event in self.script(ask):
                self.num_events += 1
                yield event
        finally:
            self.num_open -= 1


@contextmanager
def serving(app: ASGIApp, **options: object) -> Iterator[str]:
    """A real HTTP server on a free port of this machine; its address."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_level="critical", lifespan="off", **options)  # type: ignore[arg-type]
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        wait_until(lambda: server.started)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = server.force_exit = True
            thread.join(10)
            assert not thread.is_alive()


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Return as soon as something is so; fail when it is not in time."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not become so in time"
        time.sleep(0.005)
