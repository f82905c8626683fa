"""Regular expressions that strangers write: which of them could take time without end.

They are run by others (PEFT matches those of an adapter with every module's name, a tokenizer splits texts by its own),
so what is run is looked at before, by its form alone.
"""

import re

MAX_OPEN_REPEATS = 4  # one after the other: on a name of 100 characters, some millions of steps
_MANY = 8  # a repetition of up to so many is no open one
# escapes and classes, in which nothing is syntax
_NO_SYNTAX = re.compile(r"\\[pPxu]\{[^}]*\}|\\.|\[\^?\]?(?:\\.|\[:\w+:\]|[^\]\\])*\]", re.DOTALL)
_REPEAT = re.compile(r"[*+]|\{(\d*),(\d*)\}|\{(\d+)\}")
_SYNTAX = re.compile(r"[()|]|[*+]|\{\d*,?\d*\}|(?<![(*+?}])\?")


def runs_away(pattern: str, *, is_strict: bool = False) -> bool:
    """Whether a pattern has the shape of one that backtracks without end.

    That is an open repetition, of any number, in a group that is repeated so itself, as in `(a+)+`. Groups that give
    nothing back, `(?>...)`, are no exception: no published tokenizer repeats one.

    Args:
        pattern: A regular expression that compiles.
        is_strict: Refuse a repeated group with choices, `(a|b)*` or `(a?b)*`, as well, and more than `MAX_OPEN_REPEATS`
            open repetitions one after the other: what no name of modules needs.
    """
    plain = _NO_SYNTAX.sub("x", pattern)
    groups = [_Group()]
    for token in _SYNTAX.finditer(plain):
        text = token.group()
        if text == "(":
            groups.append(_Group())
        elif text == "|":
            groups[-1].next_alternative()
        elif text == "?":
            groups[-1].has_choices = True
        elif text == ")":
            inner = groups.pop() if len(groups) > 1 else _Group()
            repeats = _is_open(plain, token.end())
            if repeats and (inner.most or (is_strict and inner.has_choices)):
                return True
            groups[-1].add(inner.most)
        elif _is_open(plain, token.start()):
            groups[-1].add(1)
    while len(groups) > 1:
        groups[-2].add(groups.pop().most)
    return is_strict and groups[0].most > MAX_OPEN_REPEATS


class _Group:
    """The open repetitions in a group, one after the other in the worst of its alternatives."""

    def __init__(self) -> None:
        self.has_choices = False
        self._before = self._count = 0

    @property
    def most(self) -> int:
        return max(self._before, self._count)

    def add(self, count: int) -> None:
        self._count += count

    def next_alternative(self) -> None:
        self.has_choices = True
        self._before, self._count = self.most, 0


def _is_open(plain: str, at: int) -> bool:
    """Whether a repetition of any number, or of many, stands at a place."""
    match = _REPEAT.match(plain, at)
    if match is None:
        return False
    _, last, exact = match.groups()
    if match.group() in "*+" or last == "":
        return True
    return int(last or exact) > _MANY
