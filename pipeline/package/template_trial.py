"""A trial of a chat template, with bounds on what it computes: steps, time, and the length of every text.

A template is a foreign program. Jinja's sandbox keeps it from reaching anything; this finds one that runs on and on, or
makes a gigabyte, of an ordinary conversation.
"""

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_STEPS = 200_000
MAX_SECONDS = 5.0
MAX_CHARACTERS = 1 << 20
MAX_WIDTH = 10_000
_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")  # marks of transformers, which jinja does not know
_WIDTH = re.compile(r"\d{5,}")
_PADS = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map"})
_SYSTEM, _USER = {"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "How many are there?"}
_CONVERSATIONS = (
    [_USER],
    [_SYSTEM, _USER],
    [_SYSTEM, _USER, {"role": "assistant", "content": "Three."}, {"role": "user", "content": "And now?"}],
)


class BoundError(Exception):
    """The template has used up what it may use."""


def try_template(text: str) -> str | None:
    """Render a chat template for a few ordinary conversations.

    Args:
        text: The template.

    Returns:
        What is wrong with it, or None. That it does not take a conversation, and says so, is nothing wrong.
    """
    environment = _Bounded()
    try:
        template = environment.from_string(_GENERATION.sub("", text))
    except TemplateSyntaxError as problem:
        return f"line {problem.lineno}: {problem.message}"
    except (BoundError, SecurityError, RecursionError) as problem:
        return str(problem) or "it is nested too deep"
    for messages in _CONVERSATIONS:
        try:
            _render(template.generate(**_variables(messages)))
        except (BoundError, SecurityError) as problem:
            return str(problem)
        except (RecursionError, MemoryError) as problem:
            return f"it calls itself without end ({type(problem).__name__})"
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError):
            continue
    return None


def _variables(messages: list[dict[str, str]]) -> dict[str, Any]:
    tokens = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<s>")
    return tokens | {
        "messages": [dict(message) for message in messages],
        "tools": None,
        "documents": None,
        "add_generation_prompt": True,
        "enable_thinking": False,
    }


def _render(pieces: Iterator[str]) -> None:
    length = 0
    for piece in pieces:
        length += len(piece)
        if length > MAX_CHARACTERS:
            raise BoundError(f"it makes more than {MAX_CHARACTERS:,} characters of a short conversation")


class _Counted(NodeTransformer):
    """Puts a step into every loop, and lets joined texts be measured."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802  # jinja's name
        self.generic_visit(node)
        node.body.insert(0, nodes.Output([_call("_step", [])]))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802  # jinja's name
        self.generic_visit(node)
        return _call("_joined", node.nodes)

    def visit_Include(self, node: nodes.Include) -> nodes.Node:  # noqa: N802  # jinja's name
        raise BoundError(f"line {node.lineno}: it takes in another template")

    visit_Import = visit_FromImport = visit_Extends = visit_Include  # noqa: N815  # jinja's names


def _call(name: str, arguments: list[nodes.Expr]) -> nodes.Call:
    return nodes.Call(nodes.Name(name, "load"), arguments, [], None, None)


class _Bounded(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with a count of its steps."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], cache_size=0)
        self._steps = 0
        self._deadline = time.thread_time() + MAX_SECONDS
        self.globals |= {
            "_step": self._step,
            "_joined": lambda *parts: self._short("".join(self._short(str(part)) for part in parts)),
            "raise_exception": _refuse,
            "strftime_now": lambda _: "2025-01-01",
        }
        self.filters = {name: self._measured(filter_) for name, filter_ in self.filters.items()}
        self.filters["tojson"] = self._measured(lambda value, **_: json.dumps(value, ensure_ascii=False))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _Counted().visit(tree)
        tree.set_environment(self)
        return tree

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805  # as in jinja
        __self._step()
        name, owner = getattr(__obj, "__name__", ""), getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            __self._check_text_method(name, owner, args)
        return __self._short(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self._step()
        sizes = [value for value in (left, right) if isinstance(value, str | list | tuple)]
        counts = [value for value in (left, right) if isinstance(value, int)]
        if operator == "%" and isinstance(left, str):
            self._check_widths(left)
        if (operator == "*" and sizes and counts and len(sizes[0]) * counts[0] > MAX_CHARACTERS) or (
            operator == "**" and any(abs(count) > 64 for count in counts)
        ):
            raise BoundError(f"it makes more than {MAX_CHARACTERS:,} characters, or numbers without bound")
        return self._short(super().call_binop(context, operator, left, right))

    def _step(self) -> str:
        self._steps += 1
        if self._steps > MAX_STEPS or time.thread_time() > self._deadline:
            raise BoundError(f"it takes more than {MAX_STEPS:,} steps, or {MAX_SECONDS:.0f} seconds")
        return ""

    def _short(self, value: Any) -> Any:
        if isinstance(value, str | list | tuple) and len(value) > MAX_CHARACTERS:
            raise BoundError(f"it makes a text of more than {MAX_CHARACTERS:,} characters")
        if isinstance(value, int) and value.bit_length() > 4096:
            raise BoundError("it makes numbers without bound")
        return value

    def _check_widths(self, text: str) -> None:
        if _WIDTH.search(text):
            raise BoundError(f"it pads a text to more than {MAX_WIDTH:,} characters")

    def _check_text_method(self, name: str, text: str, arguments: tuple[Any, ...]) -> None:
        if name in _PADS:
            self._check_widths(f"{text} {arguments}")
        if name == "replace" and len(arguments) > 1 and (len(text) + 1) * len(str(arguments[1])) > MAX_CHARACTERS:
            raise BoundError(f"it makes a text of more than {MAX_CHARACTERS:,} characters")
        if name == "join" and arguments:
            with suppress(TypeError):
                self._short("".join(str(part)[:MAX_CHARACTERS] for part in list(arguments[0])[:MAX_WIDTH]))

    def _measured(self, filter_: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that counts as a step, and whose numbers and texts are bounded."""

        def measured(*args: Any, **kwargs: Any) -> Any:
            self._step()
            numbers = [value for value in (*args, *kwargs.values()) if isinstance(value, int)]
            texts = [value for value in (*args, *kwargs.values()) if isinstance(value, str)]
            if any(abs(number) > MAX_WIDTH for number in numbers):
                raise BoundError(f"it pads or splits a text to more than {MAX_WIDTH:,} parts")
            if len(texts) > 2 and (len(texts[0]) + 1) * max(len(text) for text in texts[1:]) > MAX_CHARACTERS:
                raise BoundError(f"it makes a text of more than {MAX_CHARACTERS:,} characters")
            for text in texts if getattr(filter_, "__name__", "") == "do_format" else ():
                self._check_widths(text)
            return self._short(filter_(*args, **kwargs))

        for mark in ("jinja_pass_arg",):
            if hasattr(filter_, mark):
                setattr(measured, mark, getattr(filter_, mark))
        return measured


def _refuse(message: str) -> None:
    raise ValueError(message)
