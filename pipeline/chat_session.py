"""A conversation with experts, line by line: what `expert chat` does, without the terminal."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError, ExpertError, MissingDependencyError, UnknownModelError
from pipeline.routing import AUTO

if TYPE_CHECKING:
    from pipeline.manager import ExpertManager

HELP = """\
/expert NAME   ask another expert; auto lets each prompt decide; without a name, list them
/schema FILE   put this file's schema before each prompt; without a file, none
/clear         begin a new conversation
/help          show this
/quit          end (or Ctrl-D); Ctrl-C stops an answer
"""


class ChatSession:
    """Answers lines, and remembers what was said.

    Args:
        manager: Its experts may be asked; the first one is asked until another is chosen. The session closes nothing.
        schema: The schema before each prompt.
        max_tokens: At most this many tokens an answer; None for what the expert's manifest says.
    """

    def __init__(self, manager: "ExpertManager", *, schema: str | None = None, max_tokens: int | None = None) -> None:
        self.manager = manager
        self.schema = schema
        self.expert = manager.experts[0]
        self.messages: list[dict[str, str]] = []
        self.is_over = False
        self._max_tokens = max_tokens

    def answer(self, line: str) -> Iterator[str]:
        """What is shown for a line: the answer as it comes, or what a command has to say.

        An answer that is given up midway (the iterator is closed) is cancelled, and forgotten with its prompt.

        Raises:
            ExpertError: The line cannot be answered; the conversation is as before.
        """
        if not line.strip():
            return
        if line.startswith("/"):
            command, _, argument = line.strip().partition(" ")
            yield self._command(command, argument.strip())
            return
        asked = [*self.messages, {"role": "user", "content": line}]
        options: dict[str, Any] = {"messages": asked, "schema": self.schema, "max_tokens": self._max_tokens}
        stream = self.manager.generate_stream(self.expert, **options)
        try:
            yield from stream
        finally:
            stream.close()
        if stream.result.text.strip():
            self.messages = [*asked, {"role": "assistant", "content": stream.result.text}]
        yield "\n"

    def _command(self, command: str, argument: str) -> str:
        if command == "/expert":
            return self._choose(argument)
        if command == "/schema":
            self.schema = _read(argument) if argument else None
            return f"schema: {argument or 'none'}\n"
        if command == "/clear":
            self.messages = []
            return "a new conversation\n"
        if command in ("/quit", "/exit"):
            self.is_over = True
            return ""
        if command == "/help":
            return HELP
        raise ConfigError(f"there is no command {command}", hint="/help lists them; begin a prompt without a slash.")

    def _choose(self, name: str) -> str:
        """Ask another expert from now on; the conversation with the last one is over."""
        names = self.manager.experts
        if not name:
            return "".join(f"{'*' if one == self.expert else ' '} {one}\n" for one in (*names, AUTO))
        found = next((one for one in (*names, AUTO) if name in (one, one.removeprefix("expert-"))), None)
        if found is None:
            raise UnknownModelError(f"there is no expert {name!r}", hint=f"There are: {', '.join(names)}, {AUTO}.")
        if found != self.expert:
            self.expert, self.messages = found, []
        return f"expert: {found}\n"


def converse(session: ChatSession, lines: Iterable[str], show: Callable[[str], None]) -> None:
    """Answer lines until there are no more, or the session is over.

    An error is shown, and the next line is answered. Ctrl-C stops an answer.

    Args:
        session: Answers.
        lines: What is typed.
        show: Is given what is to be shown, as it comes.
    """
    for line in lines:
        answer = session.answer(line)
        try:
            for piece in answer:
                show(piece)
        except ExpertError as error:
            show(f"{type(error).__name__}: {error}\n")
        except KeyboardInterrupt:
            show("\n(stopped)\n")
        if session.is_over:
            return


def typed_lines(history: Path | None = None) -> Iterator[str]:
    """The lines that a person types, with editing and history, until Ctrl-D; Ctrl-C begins the line again.

    Args:
        history: Where the lines are kept; None for this conversation only.

    Raises:
        MissingDependencyError: prompt_toolkit is not installed.
    """
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory, InMemoryHistory
    except ImportError as error:
        raise MissingDependencyError(
            "prompt_toolkit is not installed", hint='Install it: pip install "expert-pipeline[chat]"'
        ) from error
    kept = InMemoryHistory() if history is None else FileHistory(str(history))
    return _typed(PromptSession(history=kept))


def _typed(session: Any) -> Iterator[str]:
    while True:
        try:
            yield session.prompt("> ")
        except KeyboardInterrupt:
            continue
        except EOFError:
            return


def _read(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", hint="Name a text file.") from error
