"""Processes that drive a job, and are killed at a chosen step: before the n-th change of the disk, or within a write.

`python -m tests.batch.deaths` is a server: it imports once, and forks a process for each line it reads. A process sees
its own changes of the disk by Python's audit events, so that nothing of the code under test is replaced: SIGKILL comes
before the n-th `open` for writing, `link`, `rename`, `remove` or `rmdir` in the job's folder. In the middle of a write
it is the kernel that ends it, at a limit of the file's size.
"""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from pipeline.batch.answering import EngineJob, LoadedEngine, Loader
from pipeline.batch.config import BatchConfig
from pipeline.batch.drive import drive
from pipeline.batch.echo import ECHO, EchoBuilder, EchoEngine
from pipeline.batch.in_process import execute_here
from pipeline.batch.lease import hold
from pipeline.batch.plan import PreparedJob, open_experts, prepare
from pipeline.batch.progress import Phases, Progress
from pipeline.batch.run_record import RunRecorder
from pipeline.engine.requests import PreparedPrompt
from pipeline.errors import InvalidRequestError

Moment = Literal["before", "within"]
EVENTS = ("open", "os.link", "os.rename", "os.remove", "os.rmdir")
TORN_BYTES = 20  # what is written of a file when its writer dies


@dataclass(frozen=True)
class Death:
    """When a process dies.

    Args:
        at: The number of the step, from 0; of `before` among all changes, of `within` among writes.
        moment: Before the step, or within it.
    """

    at: int
    moment: Moment = "before"


@dataclass(frozen=True)
class Life:
    """How a process ended: the signal, if one ended it, and the steps that it took."""

    signal: int
    steps: tuple[str, ...]


class Steps:
    """Counts the changes of the disk below a folder, and kills this process at one of them."""

    def __init__(self, folder: Path, death: Death | None, told: int) -> None:
        self._folder = f"{folder}/"
        self._death = death
        self._told = told
        self._num_steps = self._num_writes = 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit hook."""
        if event not in EVENTS:
            return
        path = os.fspath(arguments[1] if event == "os.link" else arguments[0])
        if not isinstance(path, str) or not path.startswith(self._folder):
            return
        if event == "open":
            if not arguments[2] & (os.O_WRONLY | os.O_RDWR):
                return
            if self._death == Death(self._num_writes, "within"):
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
                resource.setrlimit(resource.RLIMIT_FSIZE, (TORN_BYTES, TORN_BYTES))
            self._num_writes += 1
        if self._death == Death(self._num_steps, "before"):
            os.kill(os.getpid(), signal.SIGKILL)
        os.write(self._told, f"{event} {path.removeprefix(self._folder)}\n".encode())
        self._num_steps += 1


class Drivers:
    """The server's other end.

    Args:
        process: The server.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, options: dict[str, Any], *, death: Death | None = None, mended: bool = False) -> Life:
        """Drive a job in a process of its own.

        Args:
            options: Of the job, for `BatchConfig.from_options`.
            death: When it dies; None for not at all.
            mended: Whether prompts that begin with `fail` are answered, too.
        """
        asked = {"options": options, "death": None if death is None else asdict(death), "mended": mended}
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("the server has no pipes")
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        told = json.loads(self._process.stdout.readline())
        return Life(told["signal"], tuple(told["steps"]))


@contextmanager
def drivers() -> Iterator[Drivers]:
    """A server, which ends with the context."""
    command = [sys.executable, "-m", __name__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Drivers(process)
        finally:
            if process.stdin is not None:
                process.stdin.close()


def _serve() -> None:
    for line in sys.stdin:
        asked = json.loads(line)
        job = _prepared(json.dumps(asked["options"]))
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            death = None if asked["death"] is None else Death(**asked["death"])
            sys.addaudithook(Steps(Path(job.config.output), death, writing))
            drive_here(job, mended=asked["mended"])
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as steps:
            told = steps.read().splitlines()
        status = os.waitpid(pid, 0)[1]
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
            raise SystemExit("a driver failed; see above")
        ended = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        sys.stdout.write(json.dumps({"signal": ended, "steps": told}) + "\n")
        sys.stdout.flush()


@cache
def _prepared(options: str) -> PreparedJob:
    config = BatchConfig.from_options(**json.loads(options))
    return prepare(config, open_experts(config))


def drive_here(job: PreparedJob, *, mended: bool) -> None:
    """Drive a job in this process; see `Drivers.run`."""
    phases = Phases()
    recorder = RunRecorder(phases)
    execute = partial(execute_here, load=ECHO if mended else load_failing)
    with hold(job.output.storage, seconds=job.config.lease_seconds) as lease, recorder.recording(job.output.storage):
        drive(job, lease, Progress(enabled=False), phases, recorder, execute=execute)


class FailingBuilder(EchoBuilder):
    """Refuses prompts that begin with `fail`."""

    def prepare(self, **fields: Any) -> PreparedPrompt:
        """What a prompt asks."""
        if str(fields["prompt"]).startswith("fail"):
            raise InvalidRequestError("not today", hint="Ask again tomorrow.")
        return super().prepare(**fields)


def _failing_builders(job: EngineJob) -> dict[str | None, FailingBuilder]:
    return {expert.name: FailingBuilder(expert.name) for expert in job.experts}


def _failing_engine(job: EngineJob) -> LoadedEngine:
    return LoadedEngine(EchoEngine(), _failing_builders(job))


load_failing = Loader(_failing_engine, _failing_builders)
"""A loader whose builder is `FailingBuilder`."""


def labels(steps: Sequence[str]) -> list[str]:
    """Steps as a person names them: random names are left out."""
    return ["/".join("*" if len(part) > 30 else part for part in step.split("/")) for step in steps]


if __name__ == "__main__":
    _serve()
