"""Which column of a dataset plays which role."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

from pipeline.batch.config import ColumnsConfig
from pipeline.batch.template import PromptTemplate
from pipeline.config_problems import nearest, printable
from pipeline.errors import ConfigError, DatasetError


@dataclass(frozen=True)
class ResolvedColumns:
    """The dataset's column for each role; None where it has none.

    One of prompt and messages at least is there, and neither where the job has a `prompt_template` or answers the lines
    of OpenAI batch files, which have no columns.
    """

    prompt: str | None = None
    messages: str | None = None
    id: str | None = None
    schema: str | None = None
    system: str | None = None
    dialect: str | None = None
    expected: str | None = None
    expert: str | None = None
    sampling: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> frozenset[str]:
        """The columns that play a role."""
        roles = (getattr(self, item.name) for item in fields(self) if item.name != "sampling")
        return frozenset(name for name in (*roles, *self.sampling.values()) if name is not None)


_BATCH_FILE_KEYS = {"custom_id", "url", "body"}
_BATCH_FILE_HINT = "these look like lines of an OpenAI batch file: set format: openai"
_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}
_SEPARATOR_HINT = "its only column looks like a header with {}: write the CSV with commas between values"
_PROMPT_HINT = "say which column holds the prompts: columns.prompt or columns.messages"


def resolve_columns(
    columns: ColumnsConfig, available: Sequence[str], template: PromptTemplate | None = None
) -> ResolvedColumns:
    """Find the column for each role.

    A role without a name takes the column of its own name, if there is one; a sampling option takes none. When only
    one of prompt and messages is named, the other takes none: the named one is meant.

    Args:
        columns: The names a person gave.
        available: The names of the dataset's columns.
        template: What prompts are made of, in place of a column.

    Raises:
        ConfigError: There is a template, and a column of prompts or messages is named as well.
        DatasetError: A named column is not in the dataset, or there is neither a prompt nor a messages column,
            or no column at all.
    """
    if not available:
        raise DatasetError(
            "the dataset is empty: it has no columns",
            hint="Name files with rows, or look at what should have filled them.",
        )
    named: Mapping[str, str | None] = columns.model_dump(by_alias=True, exclude={"sampling"})
    options: dict[str, str] = columns.sampling.model_dump(exclude_none=True)
    wanted = [(f"columns.{role}", name) for role, name in named.items()]
    wanted += [(f"columns.sampling.{option}", name) for option, name in options.items()]
    wanted += [("prompt_template", name) for name in (template.columns if template is not None else ())]
    missing = [(key, name) for key, name in wanted if name is not None and name not in available]
    if missing:
        raise DatasetError(
            f"the dataset has no column {', '.join(repr(name) for _, name in missing)}",
            details=[f"{key}: {_no_column(name, available)}" for key, name in missing],
            hint=f"name columns that the dataset has: {_listed(available)}",
        )
    found = {role: name or (role if role in available else None) for role, name in named.items()}
    if template is not None:
        return ResolvedColumns(**_without_prompts(named, found), sampling=options)
    for role, other in (("prompt", "messages"), ("messages", "prompt")):
        if named[role] is not None and named[other] is None:
            found[other] = None
    if found["prompt"] is None and found["messages"] is None:
        raise DatasetError(
            "the dataset has neither a column `prompt` nor a column `messages`",
            details=[f"its columns are: {_listed(available)}"],
            hint=_hint_without_prompts(available),
        )
    return ResolvedColumns(**found, sampling=options)


def _hint_without_prompts(available: Sequence[str]) -> str:
    if set(available) >= _BATCH_FILE_KEYS:
        return _BATCH_FILE_HINT
    separator = next((sign for sign in _SEPARATORS if len(available) == 1 and sign in available[0]), None)
    return _PROMPT_HINT if separator is None else _SEPARATOR_HINT.format(_SEPARATORS[separator])


def _without_prompts(named: Mapping[str, str | None], found: Mapping[str, str | None]) -> dict[str, str | None]:
    given = [f"columns.{role}" for role in ("prompt", "messages") if named[role] is not None]
    if given:
        raise ConfigError(
            f"prompt_template and {' and '.join(given)} are given", hint="Give one of them: each says what is asked."
        )
    return {**found, "prompt": None, "messages": None}


def _no_column(name: str, available: Sequence[str]) -> str:
    match = nearest(name, available)
    near = f"; did you mean {match!r}?" if match is not None else ""
    return f"no column {name!r}{near}"


def _listed(names: Sequence[str], most: int = 40) -> str:
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return ", ".join([*(printable(name) for name in names[:most]), *more]) or "none"
