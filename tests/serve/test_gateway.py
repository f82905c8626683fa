"""What the gateway makes of replicas that are lost, at each point of an answer."""

import asyncio
from collections.abc import AsyncIterator, Generator, Sequence
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from pipeline.errors import ReplicaLostError
from pipeline.serve.gateway import HandleBackend
from pipeline.serve.messages import Ask, Delta, Ended, Event, Started

STARTED, TEXT, END = Started(3), Delta("a"), Ended("stop", 1)


class Call:
    """A call that brings events, one after another or all together, and then a dead replica, or its end."""

    def __init__(self, events: Sequence[Event], *, dies: bool) -> None:
        self._events = events
        self._dies = dies

    async def __aiter__(self) -> AsyncIterator[list[Event]]:
        for event in self._events:
            yield [event]
        if self._dies:
            raise ActorDiedError

    def __await__(self) -> Generator[Any, None, list[Event]]:
        return self._whole().__await__()

    async def _whole(self) -> list[Event]:
        return [event async for events in self for event in events]

    def cancel(self) -> None:
        """Nothing goes on."""


class Handle:
    """A deployment's handle, with one script for each call."""

    deployment_name = "replicas"

    def __init__(self, *calls: Call) -> None:
        self.calls = list(calls)

    def options(self, **_: Any) -> "Handle":
        return self

    def remote(self, _: Ask) -> Call:
        return self.calls.pop(0)


def events_of(handle: Handle, *, is_streamed: bool = True) -> list[Event]:
    backend = HandleBackend({"sql": handle})  # type: ignore[dict-item]

    async def gather() -> list[Event]:
        return [event async for event in backend.ask(Ask("1", "sql", {}, is_streamed=is_streamed))]

    return asyncio.run(gather())


def test_a_request_is_asked_again_when_nothing_was_sent() -> None:
    handle = Handle(Call([], dies=True), Call([STARTED], dies=True), Call([STARTED, TEXT, END], dies=False))
    assert events_of(handle)[-2:] == [TEXT, END]
    assert handle.calls == []


def test_an_answer_that_has_begun_is_lost() -> None:
    handle = Handle(Call([STARTED, TEXT], dies=True), Call([STARTED, TEXT, END], dies=False))
    with pytest.raises(ReplicaLostError):
        events_of(handle)
    assert len(handle.calls) == 1


def test_an_answer_that_has_ended_is_whole_though_its_replica_dies() -> None:
    assert events_of(Handle(Call([STARTED, TEXT, END], dies=True))) == [STARTED, TEXT, END]


def test_an_answer_that_was_to_come_whole_is_asked_again_wherever_its_replica_dies() -> None:
    handle = Handle(Call([STARTED, TEXT], dies=True), Call([STARTED, TEXT, END], dies=False))
    assert events_of(handle, is_streamed=False) == [STARTED, TEXT, END]
    assert handle.calls == []
