"""A YAML file and `key=value` overrides, read into a `BatchConfig`; each error says its line, column and key."""

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.batch.config import BatchConfig
from pipeline.config_problems import KeyPath, Problem, dotted, printable, problems_of, shortened
from pipeline.errors import ConfigError

MAX_FILE_BYTES = 64 * 1024
MAX_COMPLAINTS = 50  # shown; of more, only the number

_HINT = "correct the lines above; configs/batch.yaml in the project lists every key"
_OVERRIDE_HINT = "correct the overrides above; configs/batch.yaml in the project lists every key"
# Under these keys the names are a person's own and may hold dots themselves.
_FREE_KEYS = frozenset({"models", "experts"})
_SECRET_KEYS = frozenset({"storage_options", "package_storage_options"})
_STRING_TAG = "tag:yaml.org,2002:str"
_SCALAR_TAGS = frozenset(f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null"))
_CONTAINER_TAGS = frozenset(f"tag:yaml.org,2002:{name}" for name in ("map", "seq"))


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> BatchConfig:
    """Read a job description.

    Relative paths in it are kept as written (they are relative to the current directory), and environment variables are
    not expanded.

    Args:
        path: The YAML file.
        overrides: `key=value`, with dotted keys (`sampling.temperature=0.2`). The value is read as a YAML scalar, or as
            a list, a mapping or a quoted string when it begins like one. Each replaces what the file says; of two for
            one key the later counts.

    Raises:
        ConfigError: The file is missing or not YAML, or keys or values are wrong: all of them, each with its place.
    """
    name = printable(os.fspath(path))
    draft = _Draft()
    draft.read(_read_text(Path(path)), name)
    for override in overrides:
        draft.override(override)
    try:
        config = BatchConfig.model_validate(draft.values)
    except ValidationError as error:
        draft.add(problems_of(error, BatchConfig, draft.values))
        raise draft.error(name) from error
    if draft.complaints:
        raise draft.error(name)
    return config


class _Loader(yaml.SafeLoader):
    """YAML as a configuration needs it: `1e-3` is a number, a date is a string, and there are no aliases.

    Aliases let a small file stand for an endless one.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.events.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not supported", mark)
        return super().compose_node(parent, index)


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":float", ":value", ":merge"))
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"""[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?$
        | [-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$
        | [-+]?\.(inf|Inf|INF)$
        | \.(nan|NaN|NAN)$""",
        re.VERBOSE,
    ),
    list("-+0123456789."),
)


@dataclass(frozen=True)
class _Place:
    """Where a value was given: a line and a column of the file, or an override."""

    line: int
    column: int
    override: str | None = None

    def __str__(self) -> str:
        return f"line {self.line}, column {self.column}" if self.override is None else f"override {self.override}"


@dataclass(frozen=True)
class _Complaint:
    place: _Place
    text: str


class _Draft:
    """Values as they are being collected, with the place of each key and value, and what was wrong with them."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.complaints: list[_Complaint] = []
        self._places: dict[KeyPath, tuple[_Place, _Place]] = {(): (_Place(1, 1), _Place(1, 1))}  # path -> key, value
        self._unread: set[KeyPath] = set()

    def add(self, problems: Sequence[Problem]) -> None:
        """Take what validation found, but for values that could not be read in the first place."""
        for problem in problems:
            if not any(problem.path[:length] in self._unread for length in range(len(problem.path) + 1)):
                self.report(self.place_of(problem), problem.key, problem.message)

    def report(self, place: _Place, key: str, message: str) -> None:
        self.complaints.append(_Complaint(place, f"{key}: {message}" if key else message))

    def place_of(self, problem: Problem) -> _Place:
        """The place of a problem; of a missing key, the mapping that lacks it."""
        path = problem.path
        while path not in self._places:
            path = path[:-1]
        return self._places[path][0 if problem.at_key else 1]

    def error(self, name: str) -> ConfigError:
        """All complaints as one error, the file's in order of lines, then the overrides'."""
        ordered = sorted(self.complaints, key=_order)
        is_file = any(complaint.place.override is None for complaint in ordered)
        details = [f"{complaint.place}  {complaint.text}" for complaint in ordered[:MAX_COMPLAINTS]]
        if len(ordered) > MAX_COMPLAINTS:
            details.append(f"and {len(ordered) - MAX_COMPLAINTS} more")
        return ConfigError(
            f"{name} is not valid" if is_file else f"the overrides of {name} are not valid",
            details=details,
            hint=_HINT if is_file else _OVERRIDE_HINT,
        )

    def read(self, text: str, name: str) -> None:
        """Take the values of a YAML text; raises ConfigError where it is not YAML."""
        try:
            loader, node = _compose(text)
        except yaml.YAMLError as error:
            place, message = _syntax_problem(error, text)
            self.report(place, "", message)
            raise self.error(name) from error
        if node is None:
            return
        self._places[()] = (_place(node), _place(node))
        if isinstance(node, yaml.MappingNode):
            self.values = self._value(loader, node, ()) or {}
        else:
            self._unread.add(())
            self.report(_place(node), "", "expected keys and values, such as `dataset: questions.parquet`")

    def override(self, text: str) -> None:
        """Take one `key=value`."""
        key, equals, value_text = text.partition("=")
        path = _override_path(key)
        is_secret = path[0] in _SECRET_KEYS
        place = _Place(0, 0, printable(shortened(key + equals + ("..." if is_secret else value_text))))
        if not equals or not all(path):
            self.report(place, "", "expected key=value, such as sampling.temperature=0.2")
            return
        section = self.values
        for depth, part in enumerate(path[:-1], start=1):
            if section.get(part) is None:
                section[part] = {}
                self._places[path[:depth]] = (place, place)
            section = section[part]
            if not isinstance(section, dict):
                self.report(place, dotted(path), f"cannot be set, as `{printable(part)}` is not a mapping")
                return
        self._places = {known: at for known, at in self._places.items() if known[: len(path)] != path}
        self._places[path] = (place, place)
        self._unread.discard(path)
        try:
            section[path[-1]] = self._override_value(value_text, path, place)
        except yaml.YAMLError as error:
            section.pop(path[-1], None)
            self._unread.add(path)
            message = _syntax_problem(error, value_text)[1]
            self.report(place, dotted(path), f"{message}; to mean a string, put it in quotes inside the shell's")

    def _override_value(self, text: str, path: KeyPath, place: _Place) -> Any:
        if text.startswith(("[", "{", '"', "'")):
            return self._value(*_compose(text), path, place)
        loader = _Loader("")
        tag = loader.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
        return self._value(loader, yaml.ScalarNode(tag, text), path, place)

    def _value(self, loader: _Loader, node: yaml.Node | None, path: KeyPath, override: _Place | None = None) -> Any:
        """The plain value of a YAML node; remembers places and reports what is wrong inside it."""
        if node is None:
            return None
        place = override or _place(node)
        if path and path not in self._places:
            self._places[path] = (place, place)
        if node.tag not in (_SCALAR_TAGS if isinstance(node, yaml.ScalarNode) else _CONTAINER_TAGS):
            return self._skip(path, place, f"the tag {printable(node.tag)} is not supported")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(loader, node, path, override)
        if isinstance(node, yaml.SequenceNode):
            return [self._value(loader, item, (*path, index), override) for index, item in enumerate(node.value)]
        if not _is_text(node.value):
            return self._skip(path, place, "holds half of a character (a lone surrogate)")
        try:
            return loader.construct_object(node)
        except (yaml.YAMLError, ValueError):
            kind = node.tag.rpartition(":")[2]
            return self._skip(path, place, f"{printable(shortened(node.value))} cannot be read as {kind}")

    def _skip(self, path: KeyPath, place: _Place, message: str) -> None:
        self._unread.add(path)
        self.report(place, dotted(path), message)

    def _mapping(
        self, loader: _Loader, node: yaml.MappingNode, path: KeyPath, override: _Place | None
    ) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = override or _place(key_node)
            if key_node.tag != _STRING_TAG or not _is_text(key_node.value):
                name = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
                self.report(place, dotted((*path, name)), "expected a key that is a string; put it in quotes")
                continue
            inner = (*path, key_node.value)
            if key_node.value in values:
                first = self._places[inner][0]
                self.report(
                    place, dotted(inner), "given twice" if override else f"given twice; the first is on {first}"
                )
                continue
            self._places[inner] = (place, override or _place(value_node))
            values[key_node.value] = self._value(loader, value_node, inner, override)
        return values


def _read_text(path: Path) -> str:
    name = printable(os.fspath(path))
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError as error:
        raise _missing_file(path) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{name} cannot be read: {reason}", hint="name a YAML file that can be read") from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(
            f"{name} is larger than {MAX_FILE_BYTES // 1024} KiB", hint="name a job description; is this the dataset?"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8", "replace")
        line, column = _line_and_column(before, len(before))
        raise ConfigError(
            f"{name} is not valid",
            details=[f"line {line}, column {column}  not UTF-8 text"],
            hint="save the file as UTF-8",
        ) from error


def _missing_file(path: Path) -> ConfigError:
    parent = path.parent
    try:
        names = sorted(entry.name for entry in parent.iterdir() if entry.is_file() and not entry.name.startswith("."))
    except OSError:
        details = [f"there is no folder {printable(str(parent))}"]
    else:
        near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
        near = near or [name for name in names if name.endswith((".yaml", ".yml"))][:5]
        details = [f"near it: {printable(str(parent / name))}" for name in near]
    return ConfigError(
        f"{printable(str(path))} does not exist",
        details=details,
        hint="name a YAML file; relative paths start at the current directory",
    )


def _compose(text: str) -> tuple[_Loader, yaml.Node | None]:
    loader = _Loader(text)
    try:
        return loader, loader.get_single_node()
    except RecursionError as error:
        raise yaml.composer.ComposerError(None, None, "nested too deeply", loader.get_mark()) from error


def _syntax_problem(error: yaml.YAMLError, text: str) -> tuple[_Place, str]:
    """Where and why a text is not YAML."""
    if isinstance(error, yaml.reader.ReaderError):
        line, column = _line_and_column(text, int(error.position))
        return _Place(line, column), f"the character {printable(chr(error.character))} cannot stand in YAML"
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        message = "not valid YAML: " + ", ".join(printable(part) for part in (error.context, error.problem) if part)
        if "alias" in message:
            message += "; a value that begins with * must be in quotes"
        return (_Place(mark.line + 1, mark.column + 1) if mark is not None else _Place(1, 1)), message
    return _Place(1, 1), "not valid YAML"


def _line_and_column(text: str, position: int) -> tuple[int, int]:
    before = text[:position]
    return before.count("\n") + 1, position - (before.rfind("\n") + 1) + 1


def _place(node: yaml.Node) -> _Place:
    mark = node.start_mark
    return _Place(mark.line + 1, mark.column + 1)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and not any("\ud800" <= char <= "\udfff" for char in value)


def _override_path(key: str) -> tuple[str, ...]:
    section, dot, name = key.partition(".")
    return (section, name) if dot and section in _FREE_KEYS else tuple(key.split("."))


def _order(complaint: _Complaint) -> tuple[bool, int, int]:
    return complaint.place.override is not None, complaint.place.line, complaint.place.column
