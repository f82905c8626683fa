"""Tables that commands print, and what `expert eval` and `expert diff` say."""

import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from pipeline.batch.diff import OutputDiff
    from pipeline.batch.evaluate import ExpertScore

_MAX_QUESTION_CHARACTERS = 200
_WIDE = 1000  # columns: nothing that is printed for a pipe or a file is cut or wrapped


def table_console() -> Console:
    """Where tables are printed: as wide as the terminal, or as they are where there is none."""
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _WIDE)


def print_table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], console: Console, *, words: Sequence[str] = ()
) -> None:
    """A table without lines; numbers stand to the right.

    Args:
        headings: Of the columns.
        rows: Their cells, as plain text.
        console: Where to print.
        words: The columns that hold words, and stand to the left.
    """
    table = Table(box=None, padding=(0, 3, 0, 0))
    for heading in headings:
        table.add_column(heading, justify="left" if heading in words else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


def print_scores(scores: Sequence["ExpertScore"], samples: int, console: Console) -> None:
    """A table with a line for each expert, and one for all together when there are several; then wrong answers.

    Args:
        scores: By expert.
        samples: So many wrong answers of each expert.
        console: Where to print.
    """
    from pipeline.batch.evaluate import total_score

    rows = [
        (
            score.expert,
            f"{score.rows:,}",
            f"{score.errors:,}",
            _rate(score.exact_rate, score.judged, score.rows),
            _rate(score.execution_rate, score.executable, score.rows),
            "-" if score.mean_tokens is None else f"{score.mean_tokens:.1f}",
        )
        for score in [*scores, *([total_score(scores)] if len(scores) > 1 else [])]
    ]
    print_table(("expert", "rows", "errors", "exact", "execution", "mean tokens"), rows, console, words=("expert",))
    for score in scores:
        for wrong in score.wrong[:samples]:
            _line(console, f"[bold]{escape(score.expert)}[/bold] row {wrong.row}")
            _line(console, f"  expected  {escape(wrong.expected)}")
            _line(console, f"  answer    {'-' if wrong.answer is None else escape(wrong.answer)}")


def print_diff(found: "OutputDiff", console: Console) -> None:
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
