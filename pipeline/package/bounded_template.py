"""A chat template that is rendered within bounds: on its steps, its time, and the length of every text it makes.

A template is a foreign program. Jinja's sandbox keeps it from reaching anything; the bounds keep it from running on and
on, or making a gigabyte, of any input. A template that stays within them gives what jinja gives without them.
"""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial, reduce
from types import GeneratorType, NoneType
from typing import Any

from jinja2 import Environment, nodes, pass_context
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from pipeline.package.template_nodes import BoundError, Counted

MAX_STEPS = 200_000
MAX_SECONDS = 2.0
MAX_CHARACTERS = 1 << 20  # of any one text, beside 8 for each character of the input
MAX_MADE = 1 << 29  # of all texts together, beside 1,000 for each character of the input
MAX_WIDTH = 10_000
_STEPS_A_LOOK = 16  # at the clock
_WIDTH = re.compile(r"\d{5,}")
_ASKED_WIDTH = re.compile(r"%[^a-zA-Z%]*\*|\{[^{}]*\{")  # a width that stands in an argument
_PADDING_METHODS = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "to_bytes"})
_PADDING_FILTERS = frozenset({"center", "indent", "batch", "slice", "wordwrap", "tojson"})
_CHECKED_FILTERS = _PADDING_FILTERS | {"format", "replace", "join", "sum"}
_NO_METHODS = frozenset({"encode", "decode", "translate"})  # some codecs take time without end
_TEXT = (str, bytes)
_OWNERS = (str, bytes, int, float)
_LISTS = (list, tuple)
_SIZED = (str, bytes, list, tuple, dict)
_MEASURED = (list, tuple, dict, Namespace)


class _Budget:
    """What one rendering may use, and has used."""

    __slots__ = ("deadline", "made", "most_characters", "most_made", "most_steps", "steps")

    def __init__(self, characters: int) -> None:
        self.steps = self.made = 0
        self.most_steps = MAX_STEPS + 20 * characters
        self.most_characters = MAX_CHARACTERS + 8 * characters
        self.most_made = MAX_MADE + 1000 * characters
        self.deadline = time.thread_time() + MAX_SECONDS


class BoundedTemplate:
    """One template, for any number of threads; `literals` are the texts that it holds itself.

    Args:
        text: Its source.
        like: An environment whose extensions, filters, tests and globals it uses; jinja's own where none is given.
        functions: What it may call beside them, by name.

    Raises:
        BoundError: It takes in another template, or computes too much before it is rendered.
        jinja2.TemplateError: It is no template.
        RecursionError: It is nested too deep.
    """

    def __init__(
        self, text: str, *, like: Environment | None = None, functions: Mapping[str, Callable[..., Any]] | None = None
    ) -> None:
        self._environment = _Bounded(like)
        self._environment.globals |= functions or {}
        with self._environment.within(0):
            self._template = self._environment.from_string(text)
            tree = self._environment.parse(text)
        self.literals = frozenset(
            [node.data for node in tree.find_all(nodes.TemplateData)]
            + [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
        )

    def render(self, variables: Mapping[str, Any], characters: int = 0) -> str:
        """The text that it makes.

        Args:
            variables: What it sees.
            characters: How many characters the texts of a person among them have: the bounds grow with them.

        Raises:
            BoundError: It takes too many steps, too long, or makes too much.
            Exception: What else a foreign program raises.
        """
        with self._environment.within(characters) as budget:
            pieces, length = [], 0
            for piece in self._template.root_render_func(self._template.new_context(dict(variables))):
                length += len(piece)
                if length > budget.most_characters:
                    raise _too_long(budget)
                pieces.append(piece)
            return "".join(pieces)


class _Within:
    """The time in which a thread renders with a budget; one rendering may stand within another."""

    def __init__(self, local: threading.local, characters: int) -> None:
        self._local, self._budget = local, _Budget(characters)

    def __enter__(self) -> _Budget:
        self._before = getattr(self._local, "budget", None)
        self._local.budget = self._budget
        return self._budget

    def __exit__(self, *_: object) -> None:
        self._local.budget = self._before


class _Bounded(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with a count of its steps and a measure for what it makes."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self, like: Environment | None) -> None:
        extensions = ["jinja2.ext.loopcontrols"] if like is None else [type(one) for one in like.extensions.values()]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, cache_size=0, finalize=self.kept)
        self._local = threading.local()
        if like is not None:
            self.filters, self.tests, self.globals = dict(like.filters), dict(like.tests), dict(like.globals)
        self.globals["lipsum"] = _no_lipsum
        self.filters["tojson"] = self._to_json
        self.filters = {name: self._measured(name, filter_) for name, filter_ in self.filters.items()}
        for name, hook in (
            ("_step", self.step),
            ("_tested", self._tested),
            ("_added", self._added),
            ("_joined", self._joined),
            ("_kept", self.kept),
        ):
            self.filters[name] = pass_context(partial(_without_context, hook))  # so that it is no constant

    def within(self, characters: int) -> _Within:
        """A budget for what this thread renders in a `with`."""
        return _Within(self._local, characters)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        Counted().visit(tree)
        tree.set_environment(self)
        return tree

    def step(self, literals: int = 0) -> str:
        """Count a step; one that writes so many characters of the template itself."""
        budget: _Budget = self._local.budget
        budget.steps += 1
        budget.made += literals
        if budget.steps > budget.most_steps or (
            not budget.steps % _STEPS_A_LOOK and time.thread_time() > budget.deadline
        ):
            raise BoundError(f"it takes more than {budget.most_steps:,} steps, or {MAX_SECONDS:.0f} seconds")
        if budget.made > budget.most_made:
            raise _too_long(budget)
        return ""

    def kept(self, value: Any) -> Any:
        """The same value, which has been measured."""
        if type(value) is str or isinstance(value, _TEXT):
            size = len(value)
        elif isinstance(value, int):
            if value.bit_length() > 4096:
                raise BoundError("it makes numbers without bound")
            return value
        elif isinstance(value, _MEASURED):
            size = _weight(value, self._local.budget.most_characters)
        else:
            return value
        budget: _Budget = self._local.budget
        budget.made += size
        if size > budget.most_characters or budget.made > budget.most_made:
            raise _too_long(budget)
        return value

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805  # as in jinja
        __self.step()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, _OWNERS):
            __self._check_method(__obj.__name__, owner, args, kwargs)
            args = tuple(__self._each(value) if type(value) is GeneratorType else value for value in args)
        return __self.kept(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.step()
        if operator == "%" and isinstance(left, _TEXT):
            self._check_format(left, (right,))
        elif operator == "*":
            for many, count in ((left, right), (right, left)):
                if isinstance(many, _SIZED) and isinstance(count, int):
                    self._check_length(_weight(many, self._local.budget.most_characters) * max(count, 0))
        elif operator == "**" and (abs(left) > 1 << 64 or abs(right) > 64):
            raise BoundError("it makes numbers without bound")
        return self.kept(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """As in jinja, where `str.format` is looked up; what it would make is measured first."""
        made = super().wrap_str_format(value)
        if made is None:
            return None

        def measured(*args: Any, **kwargs: Any) -> str:
            self._check_format(value.__self__, (*args, *kwargs.values()))
            return made(*args, **kwargs)

        return measured

    def _check_length(self, length: int) -> None:
        budget: _Budget = self._local.budget
        if length > budget.most_characters:
            raise _too_long(budget)

    def _check_format(self, form: str | bytes, arguments: tuple[Any, ...]) -> None:
        """See that a text that is formatted pads to no great width, in any of its places."""
        text = form.decode("latin-1") if isinstance(form, bytes) else form
        if _WIDTH.search(text) or _ASKED_WIDTH.search(text):
            raise BoundError(f"it pads a text to more than {MAX_WIDTH:,} characters, or to a width it computes")
        widest = max((_weight(value, self._local.budget.most_characters) for value in arguments), default=0)
        places = text.count("{") + text.count("%")
        widths = [int(digits) for digits in re.findall(r"\d+", text)] if places else []
        self._check_length(len(text) + places * (widest if places > 1 else 0) + sum(widths) + widest)

    def _check_method(self, name: str, owner: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        values = (*args, *kwargs.values()) if kwargs else args
        if name in _NO_METHODS:
            raise BoundError(f"it calls {name}(), which is not bounded")
        if name in _PADDING_METHODS:
            _check_widths(values)
            if name == "expandtabs":
                width = next((value for value in values if isinstance(value, int)), 8)
                self._check_length(len(owner) + owner.count("\t" if isinstance(owner, str) else b"\t") * max(width, 0))
        elif name == "replace" and len(values) > 1:
            self._check_replacement(owner, values[0], values[1])
        elif name == "join" and values:
            items = values[0]
            separators = len(items) if isinstance(items, _SIZED) else MAX_STEPS
            self._check_length(len(owner) * separators)

    def _check_replacement(self, text: Any, old: Any, new: Any) -> None:
        if isinstance(text, _TEXT) and isinstance(old, type(text)) and isinstance(new, type(text)):
            self._check_length(len(text) + text.count(old) * len(new))  # type: ignore[arg-type]  # one type, not two

    def _tested(self, value: Any) -> Any:
        self.step()
        return value

    def _added(self, parts: list[Any]) -> Any:
        if {type(part) for part in parts} == {str}:
            return self.kept("".join(parts))
        return reduce(lambda left, right: self.kept(left + right), parts)

    def _joined(self, parts: list[Any]) -> Any:
        return self.kept("".join([str(self.kept(part)) for part in parts]))

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """As transformers has it, which escapes no HTML."""
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        if indent is None:
            return encoder.encode(value)
        pieces, length = [], 0
        for piece in encoder.iterencode(value):
            length += len(piece)
            self._check_length(length)
            pieces.append(piece)
        return "".join(pieces)

    def _each(self, values: Iterator[Any]) -> Iterator[Any]:
        """What a filter takes from another one, as it comes."""
        for value in values:
            self.step()
            yield self.kept(value)

    def _measured(self, name: str, filter_: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that counts as a step, and whose numbers and texts are bounded."""
        first = 1 if hasattr(filter_, "jinja_pass_arg") else 0  # before it jinja passes something of its own

        is_checked = name in _CHECKED_FILTERS

        def measured(*args: Any, **kwargs: Any) -> Any:
            self.step()
            if args and type(args[first]) is GeneratorType:
                args = (*args[:first], self._each(args[first]), *args[first + 1 :])
            if is_checked:
                self._check_filter(name, [*args[first:], *kwargs.values()])
            return self.kept(filter_(*args, **kwargs))

        if first:
            measured.jinja_pass_arg = filter_.jinja_pass_arg  # type: ignore[attr-defined]  # jinja's mark
        return measured

    def _check_filter(self, name: str, values: list[Any]) -> None:
        text, others = values[0], values[1:]
        if name in _PADDING_FILTERS:
            _check_widths(others)
        if name == "format" and isinstance(text, _TEXT):
            self._check_format(text, tuple(others))
        elif name == "replace" and len(others) > 1:
            self._check_replacement(str(text), str(others[0]), str(others[1]))
        elif name in ("indent", "wordwrap") and isinstance(text, str):
            longest = max((len(value) for value in others if isinstance(value, str)), default=0)
            widths = [value for value in others if isinstance(value, int) and not isinstance(value, bool)]
            lines = text.count("\n") + 1 if name == "indent" else len(text)
            added = max([longest, *widths], default=0) if name == "indent" else longest
            self._check_length(len(text) + lines * added)
        elif name == "join":
            separator = max((len(value) for value in others if isinstance(value, str)), default=0)
            self._check_length(separator * (len(text) if isinstance(text, _SIZED) else MAX_STEPS))
        elif name == "sum" and any(not isinstance(value, (int, float, str, NoneType)) for value in others):
            raise BoundError("it adds up what are no numbers")


def _check_widths(values: Any) -> None:
    if any(isinstance(value, int) and abs(value) > MAX_WIDTH for value in values):
        raise BoundError(f"it pads or splits a text to more than {MAX_WIDTH:,} characters")


def _weight(value: Any, most: int) -> int:
    """About how many characters a value has when it is written out; of more than `most` only that it is more."""
    total, left = 0, [value]
    while left and total <= most:
        item = left.pop()
        total += 1
        if isinstance(item, _TEXT):
            total += len(item) - 1 if item else 0
        elif isinstance(item, _LISTS):
            left.extend(item)
        elif isinstance(item, dict):
            left.extend(item)
            left.extend(item.values())
        elif isinstance(item, Namespace):
            left.append(item._Namespace__attrs)  # what its text shows
    return total


def _too_long(budget: _Budget) -> BoundError:
    return BoundError(f"it makes a text of more than {budget.most_characters:,} characters")


def _without_context(hook: Callable[[Any], Any], _: Context, value: Any) -> Any:
    return hook(value)


def _no_lipsum(*_: Any, **__: Any) -> str:
    raise BoundError("it calls lipsum(), which is not bounded")
