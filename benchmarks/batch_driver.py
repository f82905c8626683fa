"""A driver of a batch job whose engine only echoes, as a program; it, or its workers, may be told when to die.

    python -m benchmarks.batch_driver OPTIONS_AS_JSON

Options: `job` (of the job, for `BatchConfig.from_options`), `seconds_per_row`, `deaths` (the numbers of the changes of
the disk before which a worker is killed, in turn: the first worker that comes to the first one dies, then the one in
its place at the second, and so on), `marks` (a folder, for who has died already) and `driver_death` (the end of the
name of a file: the driver is killed before it creates that one).
"""

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.batch.answering import EngineJob, LoadedEngine, Loader
from pipeline.batch.config import BatchConfig
from pipeline.batch.drive import drive
from pipeline.batch.echo import echo_preparers, load_echo
from pipeline.batch.execute import execute
from pipeline.batch.lease import hold
from pipeline.batch.plan import open_experts, prepare
from pipeline.batch.progress import Phases, Progress
from pipeline.batch.run_record import RunRecorder

CHANGES = ("os.link", "os.rename", "os.remove", "os.rmdir")


class DiesInTurn:
    """An audit hook: kills this process before one of its changes of the disk, if it is this process's turn.

    Args:
        folder: Where changes count.
        deaths: The numbers of the changes, from 0, in the order of those who die.
        marks: A folder with an empty file for each who has died.
    """

    def __init__(self, folder: str, deaths: list[int], marks: Path) -> None:
        self._folder = f"{folder}/"
        self._deaths = deaths
        self._marks = marks
        self._num_changes = 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """See `sys.addaudithook`."""
        if event not in CHANGES or not str(arguments[0]).startswith(self._folder):
            return
        turn = len(os.listdir(self._marks))  # noqa: PTH208 - Path would be audited, too
        if turn < len(self._deaths) and self._num_changes == self._deaths[turn]:
            mark = self._marks / f"{turn}"
            try:
                os.close(os.open(mark, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            except FileExistsError:  # another one has taken this turn
                return
            os.kill(os.getpid(), signal.SIGKILL)
        self._num_changes += 1


def load(job: EngineJob, *, seconds_per_row: float, folder: str, deaths: list[int], marks: str) -> LoadedEngine:
    """Come to an engine that only echoes, in a process that may be told to die."""
    if deaths:
        sys.addaudithook(DiesInTurn(folder, deaths, Path(marks)))
    return load_echo(job, seconds_per_row=seconds_per_row)


def main(options: dict[str, Any]) -> None:
    """Run or continue the job."""
    config = BatchConfig.from_options(**options["job"])
    job, phases = prepare(config, open_experts(config)), Phases()
    loader = partial(
        load,
        seconds_per_row=options.get("seconds_per_row", 0.0),
        folder=config.output,
        deaths=options.get("deaths", []),
        marks=options.get("marks", ""),
    )
    last = options.get("driver_death")

    def die(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.link" and last is not None and str(arguments[1]).endswith(last):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(die)
    recorder = RunRecorder(phases)
    with hold(job.output.storage, seconds=config.lease_seconds) as lease, recorder.recording(job.output.storage):
        drive(
            job,
            lease,
            Progress(enabled=False),
            phases,
            recorder,
            execute=partial(execute, load=Loader(loader, echo_preparers)),
        )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
