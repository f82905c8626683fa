"""The service of `expert serve`, and a caller that asks its replica's handle directly, past the gateway.

The argument is a JSON file: `options`, the service's configuration, and `bodies`, requests of `/v1/chat/completions` by
number. A line on standard input, `{"concurrency": 32, "numbers": [0, 64]}`, has that range of them asked by so many
clients; a line on standard output, a `benchmarks.serve_load.summary` as JSON after `MARK`, says how it went.
"""

import asyncio
import json
import logging
import sys
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.serve_client import CUT_OFF, Outcome
from benchmarks.serve_load import closed_loop, summary
from pipeline.openai_api.protocol import read_call
from pipeline.serve.config import ServeConfig
from pipeline.serve.limits import LimitsConfig
from pipeline.serve.messages import Ask, Delta, Ended, Event, Refused
from pipeline.serve.run import APPLICATION, run_service

MARK = "measured: "
PATIENCE = 120.0


class Caller:
    """Asks a replica through its deployment's handle, from the event loop that it is made in.

    Args:
        asks: What to ask, by number.
    """

    def __init__(self, asks: Sequence[Ask]) -> None:
        from ray import serve

        from pipeline.serve.gateway import calls

        (name,) = serve.status().applications[APPLICATION].deployments
        handle = serve.get_deployment_handle(name, APPLICATION)
        experts = {ask.expert for ask in asks}
        self._streams = calls(dict.fromkeys(experts, handle), "ask_gathered", stream=True)
        self._wholes = calls(dict.fromkeys(experts, handle), "ask_whole", stream=False)
        self._asks = asks

    async def send(self, number: int) -> Outcome:
        """Ask, and take the answer to its end."""
        ask = self._asks[number]
        begun = time.monotonic()
        first: float | None = None
        error: str | None = CUT_OFF
        output_tokens = 0
        async for events in self._arriving(ask):
            for event in events:
                match event:
                    case Delta(text=text) if text and first is None:
                        first = time.monotonic() - begun
                    case Ended(completion_tokens=completion_tokens, code=code):
                        error, output_tokens = code, completion_tokens
                    case Refused(code=code):
                        error = code
        return Outcome(number, begun, time.monotonic() - begun, first, None, error, output_tokens)

    async def _arriving(self, ask: Ask) -> AsyncIterator[list[Event]]:
        if ask.is_streamed:
            async for events in self._streams[ask.expert].remote(ask):
                yield events
        else:
            yield await self._wholes[ask.expert].remote(ask)


def as_ask(number: int, body: Mapping[str, Any]) -> Ask:
    """What the gateway makes of a body."""
    limits = LimitsConfig()
    call = read_call("chat", json.dumps(body).encode(), limits)
    return Ask(f"direct-{number}", call.model, call.fields, call.options, call.is_streamed, limits.max_seconds)


def measure(asks: Sequence[Ask], loop: asyncio.AbstractEventLoop) -> None:
    """Do what the lines on standard input say.

    Args:
        asks: What to ask, by number.
        loop: That of the service: a deployment's handle belongs to the event loop of its first call.
    """
    caller = asyncio.run_coroutine_threadsafe(_caller(asks), loop).result()
    for line in sys.stdin:
        wanted = json.loads(line)
        first, last = wanted["numbers"]
        load = closed_loop(
            caller.send, wanted["concurrency"], num_requests=last - first, first=first, patience=PATIENCE
        )
        _tell(MARK + json.dumps(summary(asyncio.run_coroutine_threadsafe(load, loop).result())))


async def _caller(asks: Sequence[Ask]) -> Caller:
    return Caller(asks)


def main() -> None:
    """Serve; ask when told to."""
    job = json.loads(Path(sys.argv[1]).read_text())
    asks = [as_ask(number, body) for number, body in enumerate(job["bodies"])]
    logging.getLogger("ray.serve").setLevel(logging.ERROR)

    def say(line: str) -> None:
        _tell(line)
        if line.startswith("http"):
            told = [asks, asyncio.get_running_loop()]
            threading.Thread(target=measure, args=told, daemon=True).start()

    run_service(ServeConfig.from_options(job["options"]), say)


def _tell(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - the lines are this program's result


if __name__ == "__main__":
    main()
