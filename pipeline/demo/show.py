"""`expert demo`: a real job from beginning to end, and whether its answers are right."""

from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline import demo
from pipeline.batch import BatchResult, run_batch
from pipeline.batch.cluster import connect
from pipeline.demo.questions import write_questions
from pipeline.demo.scoring import exact_match, execution_match

SAMPLES = 8
MAX_WORKERS = 4  # the demo model is too small to use more than one core a worker


def run_demo(folder: Path, rows: int, console: Console) -> BatchResult:
    """Make questions, answer them with the SQL expert through `run_batch`, and print how it went.

    Args:
        folder: Receives `questions-<rows>.parquet` and `answers-<rows>/`. Run again, the job is found complete.
        rows: How many questions.
        console: Where to print.
    """
    questions, answers = folder / f"questions-{rows}.parquet", folder / f"answers-{rows}"
    if not questions.exists():
        _say(console, f"Making {rows:,} questions that the demo model has never seen ...")
        write_questions(questions, rows, task="sql")
    # Only a job that is still to be run needs a cluster to be asked how large it is.
    is_done = (answers / "_SUCCESS").exists()
    num_workers = 1 if is_done else max(1, min(MAX_WORKERS, int(connect().num_cpus)))
    _say(console, f"Answering {escape(str(questions))} with {escape(demo.package('sql').name)} on Ray ...")
    result = run_batch(
        str(questions),
        demo.package("sql"),
        base_model=demo.BASE_MODEL,
        output=answers,
        num_workers=num_workers,
    )
    frame = result.to_pandas()
    console.print(_samples(frame))
    report = result.report
    if report.already_complete:
        _say(console, "[bold]The job was already complete[/bold]; nothing was computed again.")
    exact = [exact_match(answer, expected) for answer, expected in zip(frame["text"], frame["expected"], strict=True)]
    executed = [
        execution_match(schema, answer, expected)
        for schema, answer, expected in zip(frame["schema"], frame["text"], frame["expected"], strict=True)
    ]
    _say(console, f"exact match      {sum(exact) / rows:.1%} of {rows:,}")
    _say(console, f"execution match  {sum(executed) / rows:.1%} (both queries run in SQLite give the same rows)")
    _say(console, escape(str(report)))
    return result


def _say(console: Console, text: str) -> None:
    """Lines as they are, however narrow the terminal: a path that is wrapped cannot be copied."""
    console.print(text, highlight=False, soft_wrap=True)


def _samples(frame: pd.DataFrame) -> Table:
    table = Table(title=f"{SAMPLES} of {len(frame):,} answers", title_justify="left")
    for name in ("question", "answer", ""):
        table.add_column(name, overflow="fold")
    step = max(1, len(frame) // SAMPLES)
    for _, row in frame.iloc[::step].head(SAMPLES).iterrows():
        right = exact_match(row["text"], row["expected"])
        verdict = "[green]right[/green]" if right else "[red]wrong[/red]"
        table.add_row(escape(str(row["prompt"])), escape(str(row["text"])), verdict)
    return table
