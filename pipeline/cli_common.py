"""What the commands share: how an error of ours ends the process, and options of several of them."""

import signal
import threading
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from pipeline.errors import ConfigError, ExpertError, GrammarError, InvalidRequestError

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
USAGE: tuple[type[ExpertError], ...] = (ConfigError, InvalidRequestError)
USAGE_OF_GRAMMARS = (*USAGE, GrammarError)
"""Of commands that are told what answers are held to; elsewhere it is a package whose grammar is wrong."""


class Trust(StrEnum):
    """What is asked of a signature."""

    any = "any"
    signed = "signed"
    trusted = "trusted"


TrustOption = Annotated[
    Trust,
    typer.Option(help="What is asked of the signature: nothing, that there is one, or that you trust the signer."),
]
RollbackOption = Annotated[bool, typer.Option("--allow-rollback", help="Take an older version than was opened before.")]

PackageArgument = Annotated[
    str, typer.Argument(help="A .expert file, an unpacked directory, a URL, or what `expert stage` printed.")
]
BaseModelOption = Annotated[
    str | None,
    typer.Option(
        help="The base model's directory or Hugging Face id; looked for here by the manifest's name if left out."
    ),
]
StorageOption = Annotated[
    list[str] | None,
    typer.Option("--storage-option", metavar="KEY=VALUE", help="An option of the storage (fsspec); may be repeated."),
]


@contextmanager
def errors_on_exit(
    interrupted: str = "interrupted; what is committed stays, and the same command continues",
    *,
    usage: tuple[type[ExpertError], ...] = USAGE,
) -> Iterator[None]:
    """Print an error of ours without a traceback, and end the process with an exit code; SIGTERM is Ctrl-C, too.

    Args:
        interrupted: Printed after Ctrl-C.
        usage: Errors that mean the command was called wrongly.
    """
    try:
        with _sigterm_interrupts():
            yield
    except ExpertError as error:
        console = Console(stderr=True, soft_wrap=True)
        console.print(f"[bold red]{type(error).__name__}:[/bold red] {escape(str(error))}", highlight=False)
        raise typer.Exit(EXIT_USAGE if isinstance(error, usage) else EXIT_FAILED) from error
    except KeyboardInterrupt as error:
        typer.echo(interrupted, err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from error


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """What a system sends to end a job is to end it as a person would, and not half way."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def storage_options(given: list[str] | None) -> dict[str, Any]:
    """Storage options as a config file would give them: `client_kwargs.endpoint_url=http://...` nests."""
    options: dict[str, Any] = {}
    for item in given or []:
        name, separator, value = item.partition("=")
        if not name or not separator:
            raise ConfigError(f"--storage-option {item!r} is not KEY=VALUE", hint="Write for example anon=true.")
        *folders, last = name.split(".")
        place = options
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = {"true": True, "false": False}.get(value, value)
    return options


def text_or_file(value: str | None) -> str | None:
    """An option's text; of one that begins with `@`, what the file of that name holds.

    Raises:
        ConfigError: The file cannot be read.
    """
    if value is None or not value.startswith("@"):
        return value
    try:
        return Path(value[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{value[1:]} cannot be read: {error}", hint="Name a text file after @, or give the text itself."
        ) from error


def printable(text: str) -> str:
    """A text without what a terminal would obey: an answer is nobody's trusted text."""
    return "".join(letter for letter in text if letter in "\n\t" or unicodedata.category(letter) != "Cc")
