"""What `expert eval` and `expert diff` print."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.batch.diff import OutputDiff
from pipeline.batch.evaluate import ExpertScore, total_score

_MAX_QUESTION_CHARACTERS = 200


def print_scores(scores: Sequence[ExpertScore], samples: int, console: Console) -> None:
    """A table with a line for each expert, and one for all together when there are several; then wrong answers.

    Args:
        scores: By expert.
        samples: So many wrong answers of each expert.
        console: Where to print.
    """
    table = Table(box=None, padding=(0, 3, 0, 0))
    for name in ("expert", "rows", "errors", "exact", "execution", "mean tokens"):
        table.add_column(name, justify="left" if name == "expert" else "right", no_wrap=True)
    for score in [*scores, *([total_score(scores)] if len(scores) > 1 else [])]:
        table.add_row(
            escape(score.expert),
            f"{score.rows:,}",
            f"{score.errors:,}",
            _rate(score.exact_rate, score.judged, score.rows),
            _rate(score.execution_rate, score.executable, score.rows),
            "-" if score.mean_tokens is None else f"{score.mean_tokens:.1f}",
        )
    console.print(table)
    for score in scores:
        for wrong in score.wrong[:samples]:
            _line(console, f"[bold]{escape(score.expert)}[/bold] row {wrong.row}")
            _line(console, f"  expected  {escape(wrong.expected)}")
            _line(console, f"  answer    {'-' if wrong.answer is None else escape(wrong.answer)}")


def print_diff(found: OutputDiff, console: Console) -> None:
    """What is different about the jobs, some rows that differ, and the counts.

    Args:
        found: The comparison.
        console: Where to print.
    """
    for name, (one, other) in found.fields.items():
        _line(console, f"[dim]{escape(name)}: {escape(one)} | {escape(other)}[/dim]")
    for sample in found.samples:
        _line(console, f"[bold]row {sample.row}[/bold]  {escape(sample.question[:_MAX_QUESTION_CHARACTERS])}")
        for sign, answer, code in zip("<>", sample.answers, sample.errors, strict=True):
            _line(console, f"  {sign} {escape(str(answer) if code is None else f'error {code}')}")
    first, second, both = found.errors
    errors = f"errors: first {first:,}, second {second:,}, both {both:,}"
    _line(console, f"rows {found.rows:,}  same {found.same:,}  different {found.different:,}  {errors}")


def _line(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)


def _rate(rate: float | None, judged: int, rows: int) -> str:
    """A share in percent, and of how many rows when not of all."""
    if rate is None:
        return "-"
    return f"{rate:.1%}" + ("" if judged == rows else f" of {judged:,}")
