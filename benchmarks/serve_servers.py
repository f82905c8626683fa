"""The servers that can be asked, by name, and how one is started, watched and ended."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.measure import ERROR_LINES
from benchmarks.registry import Peer, environment_of
from benchmarks.serve_client import Outcome, connected
from benchmarks.serve_load import Send
from benchmarks.serve_requests import Scene, merged_models

LOOK_SECONDS = 0.1
START_SECONDS = 600.0
END_SECONDS = 60.0
_NOT_OURS = ("RAY_ADDRESS", "RAY_JOB_ID", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "EXPERT_API_KEYS")
_CB_BLOCK, _CB_SEQUENCES, _CB_TOKENS = 32, 64, 1024  # nothing of it is inferred on a CPU


class ServerFailedError(Exception):
    """A server did not start; its last lines are the message."""


@dataclass(frozen=True)
class Setup:
    """What a server is started with.

    Args:
        scene: What it serves.
        dtype: `"bfloat16"` or `"float32"`.
        python: The interpreter that runs it.
        port: Where it shall listen.
        folder: For files that it reads.
    """

    scene: Scene
    dtype: str
    python: Path
    port: int
    folder: Path


@dataclass(frozen=True)
class Launch:
    """How a server is started, and what it calls things.

    Args:
        command: The program.
        models: What it calls each expert, by number.
        more: Fields that its requests have beside the common ones.
    """

    command: Sequence[str]
    models: Sequence[str]
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ServerKind:
    """One kind of server.

    Args:
        about: What it is, for the table's reader.
        launch: How it is started.
        streams: Whether it can send an answer as it is generated.
        counts_if_asked: Whether it counts a streamed answer's tokens only where the request says so.
        interpreter: Its name as given with `--peer NAME=PYTHON`; None for the one that measures.
    """

    about: str
    launch: Callable[[Setup], Launch]
    streams: bool = True
    counts_if_asked: bool = False
    interpreter: str | None = None


@dataclass(frozen=True)
class RunningServer:
    """A server that answers.

    Args:
        kind: What it is.
        launch: How it was started.
        scene: What it serves.
        url: Where.
        start_seconds: From the command to the first answer.
        log: What it has written so far.
        process: It.
    """

    kind: ServerKind
    launch: Launch
    scene: Scene
    url: str
    start_seconds: float
    log: Path
    process: subprocess.Popen[str]

    def body(self, number: int, *, stream: bool) -> dict[str, Any]:
        """The body of a request, in this server's words."""
        expert = self.scene.requests[number % len(self.scene.requests)].expert
        stream = stream and self.kind.streams
        counts = {"stream_options": {"include_usage": True}} if stream and self.kind.counts_if_asked else {}
        return self.scene.body(
            number, model=self.launch.models[expert], stream=stream, more={**self.launch.more, **counts}
        )

    @asynccontextmanager
    async def asked(self, *, stream: bool) -> AsyncIterator[Send]:
        """What sends it requests by their number."""
        async with connected(self.url) as client:

            async def send(number: int) -> Outcome:
                return await client.send(number, self.body(number, stream=stream))

            yield send


def _expert_serve(setup: Setup) -> Launch:
    experts = setup.scene.experts
    packages = [str(expert.package) for expert in experts]
    command = [str(setup.python.with_name("expert")), "serve", *packages]
    return Launch(
        [*command, "--port", str(setup.port), "--base-model", str(setup.scene.base)],
        [expert.name for expert in experts],
        {"ignore_eos": True},
    )


def _thirty_lines(setup: Setup, *, merge: bool) -> Launch:
    experts = {expert.name: str(expert.folder) for expert in setup.scene.experts}
    job = {
        "base": str(setup.scene.base),
        "experts": experts,
        "dtype": setup.dtype,
        "port": setup.port,
        "merge": merge,
    }
    path = setup.folder / "job.json"
    path.write_text(json.dumps(job))
    return Launch([str(setup.python), "-m", "benchmarks.serve_peers.thirty_lines", str(path)], list(experts))


def _transformers_serve(setup: Setup, options: Sequence[str] = ()) -> Launch:
    merged = merged_models(setup.scene, range(len(setup.scene.experts)), setup.dtype)
    command = [str(setup.python.with_name("transformers")), "serve", "--host", "127.0.0.1", "--port", str(setup.port)]
    return Launch(
        [*command, "--dtype", setup.dtype, "--reasoning", "off", *options], [str(path.resolve()) for path in merged]
    )


def _transformers_serve_cb(setup: Setup) -> Launch:
    longest = max(
        sum(len(message["content"]) for message in request.messages) // 2 + request.max_tokens
        for request in setup.scene.requests[:200]
    )
    blocks = _CB_SEQUENCES * -(-longest // _CB_BLOCK)
    options = {"block-size": _CB_BLOCK, "num-blocks": blocks, "max-batch-tokens": _CB_TOKENS}
    given = [text for name, value in options.items() for text in (f"--cb-{name}", str(value))]
    return _transformers_serve(setup, ["--continuous-batching", *given])


def _vllm_serve(setup: Setup) -> Launch:
    """One merged expert answers all: vLLM's LoRA knows no DoRA.

    The module is what `vllm serve` runs; the command itself fails in the build for CPUs, whose package is named
    otherwise than the command expects.
    """
    (merged,) = merged_models(setup.scene, [0], setup.dtype)
    name = setup.scene.experts[0].name
    command = [str(setup.python), "-m", "vllm.entrypoints.openai.api_server"]
    options = {
        "model": merged.resolve(),
        "served-model-name": name,
        "host": "127.0.0.1",
        "port": setup.port,
        "dtype": setup.dtype,
    }
    given = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    return Launch([*command, *given], [name] * len(setup.scene.experts), {"ignore_eos": True})


OURS, BASELINE = "expert-serve", "thirty-lines"
SERVERS: dict[str, ServerKind] = {
    OURS: ServerKind("`expert serve`, all experts in one engine", _expert_serve, counts_if_asked=True),
    BASELINE: ServerKind(
        "generate behind FastAPI with a lock, a merged model for each expert",
        lambda setup: _thirty_lines(setup, merge=True),
        streams=False,
    ),
    "thirty-lines-peft": ServerKind(
        "the same, one model whose PEFT adapters are switched",
        lambda setup: _thirty_lines(setup, merge=False),
        streams=False,
    ),
    "transformers-serve": ServerKind("`transformers serve`, a merged model for each expert", _transformers_serve),
    "transformers-serve-cb": ServerKind("the same with --continuous-batching", _transformers_serve_cb),
    "vllm": ServerKind(
        "`vllm serve`, one merged expert for all requests", _vllm_serve, counts_if_asked=True, interpreter="vllm"
    ),
}


@asynccontextmanager
async def started(kind: ServerKind, scene: Scene, *, dtype: str, python: Path) -> AsyncIterator[RunningServer]:
    """Start a server; it has answered a request to each expert when this yields, and is gone when it is left.

    Args:
        kind: What to start.
        scene: What it serves.
        dtype: `"bfloat16"` or `"float32"`.
        python: The interpreter that runs it.

    Raises:
        ServerFailedError: It ended, or did not answer in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        launch = kind.launch(Setup(scene, dtype, python, port, Path(folder)))
        environment = environment_of(Peer("serve", "", interpreter=kind.interpreter), python)
        async with running(launch.command, environment, Path(folder) / "log") as (process, log):
            server = RunningServer(kind, launch, scene, f"http://127.0.0.1:{port}", 0.0, log, process)
            before = time.monotonic()
            await _answers(server, 0, before)
            seconds = time.monotonic() - before
            for number in range(1, len(scene.experts)):
                await _answers(server, number, time.monotonic())
            yield RunningServer(kind, launch, scene, server.url, seconds, log, process)


@asynccontextmanager
async def running(
    command: Sequence[str], environment: Mapping[str, str], log: Path, *, talks: bool = False
) -> AsyncIterator[tuple[subprocess.Popen[str], Path]]:
    """A program in a process group of its own; on leaving it is asked to end, and then ended.

    Args:
        command: The program.
        environment: Its environment; a cluster or keys of the caller's are left out.
        log: Where its output goes.
        talks: Whether it is spoken to: standard input is a pipe then.
    """
    kept = {name: value for name, value in environment.items() if name not in _NOT_OURS}
    with log.open("w") as output:
        process = subprocess.Popen(  # noqa: S603 - our own programs, in interpreters the user names
            command,
            cwd=Path(__file__).parent.parent,
            env=kept,
            stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    try:
        yield process, log
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_SECONDS):
                while process.poll() is None:
                    await asyncio.sleep(LOOK_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


async def _answers(server: RunningServer, number: int, since: float) -> None:
    """Wait until a request is answered."""
    outcome: Outcome | None = None
    async with server.asked(stream=False) as send:
        while time.monotonic() - since < START_SECONDS:
            if server.process.poll() is not None:
                raise ServerFailedError(f"ended with {server.process.returncode}\n{last_lines(server.log)}")
            outcome = await send(number)
            if outcome.error is None:
                return
            await asyncio.sleep(LOOK_SECONDS)
    why = f"no answer within {START_SECONDS:g} s: {outcome.error if outcome else ''}"
    raise ServerFailedError(f"{why}\n{last_lines(server.log)}")


def last_lines(log: Path) -> str:
    """The end of what a server has written."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-ERROR_LINES:])


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def interpreter_of(kind: ServerKind, interpreters: Mapping[str, Path]) -> Path | None:
    """The Python that runs a server, or None where none was given for it."""
    return Path(sys.executable) if kind.interpreter is None else interpreters.get(kind.interpreter)
