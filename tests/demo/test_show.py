"""What `expert demo` prints, of a job that is complete: nothing is started for it."""

import io
from pathlib import Path

from rich.console import Console

from pipeline import demo
from pipeline.batch.config import BatchConfig
from pipeline.batch.drive import drive
from pipeline.batch.in_process import execute_here
from pipeline.batch.lease import hold
from pipeline.batch.plan import open_experts, prepare
from pipeline.batch.progress import Phases, Progress
from pipeline.batch.run_record import RunRecorder
from pipeline.demo.questions import write_questions
from pipeline.demo.show import run_demo

ROWS = 8


def answer(questions: Path, answers: Path) -> None:
    """The demo's job, without Ray."""
    config = BatchConfig.from_options(
        dataset=str(questions), expert=demo.package("sql"), base_model=demo.BASE_MODEL, output=answers
    )
    job, phases = prepare(config, open_experts(config)), Phases()
    recorder = RunRecorder(phases)
    with hold(job.output.storage, seconds=60) as lease, recorder.recording(job.output.storage):
        drive(job, lease, Progress(enabled=False), phases, recorder, execute=execute_here)


def test_paths_are_printed_as_they_are_however_narrow_the_terminal(tmp_path: Path) -> None:
    folder = tmp_path / "a folder whose name has [red] brackets" / ("and is long " * 8).strip()
    folder.mkdir(parents=True)
    questions = write_questions(folder / f"questions-{ROWS}.parquet", ROWS, task="sql")
    answer(questions, folder / f"answers-{ROWS}")
    shown = io.StringIO()
    run_demo(folder, ROWS, Console(file=shown, width=80))
    lines = shown.getvalue().splitlines()
    assert f"Answering {questions} with {demo.package('sql').name} on Ray ..." in lines
    answers = folder / f"answers-{ROWS}"
    assert f"output   {answers} (already complete: nothing was left to do)" in lines
    assert f"report   {answers}/_report/report.html" in lines
    assert "The job was already complete; nothing was computed again." in lines
