"""What was done when, in a fixed number of steps, however long it takes."""

from collections.abc import Sequence
from dataclasses import dataclass

MAX_STEPS = 160
_FIRST_WIDTH = 0.25  # seconds


@dataclass(frozen=True)
class Series:
    """A finished timeline.

    Args:
        step_seconds: The length of a step; the first begins at 0.
        rows: Rows answered in each step. What a shard did is spread evenly over the time that it took.
        tokens: Tokens generated in each step, likewise.
    """

    step_seconds: float
    rows: Sequence[float]
    tokens: Sequence[float]


class Timeline:
    """Adds up work over time; when the time grows beyond the steps there are, they become twice as long."""

    def __init__(self) -> None:
        self._width = _FIRST_WIDTH
        self._rows: list[float] = []
        self._tokens: list[float] = []

    def add(self, begun: float, ended: float, rows: int, tokens: int) -> None:
        """Count work that was done at an even pace.

        Args:
            begun: Seconds since the timeline's beginning.
            ended: The same; at least `begun`.
            rows: Rows that were answered.
            tokens: Tokens that were generated.
        """
        begun, ended = max(begun, 0.0), max(ended, 0.0)
        while ended >= self._width * MAX_STEPS:
            self._halve()
        first, last = int(begun / self._width), int(ended / self._width)
        missing = last + 1 - len(self._rows)
        self._rows += [0.0] * missing
        self._tokens += [0.0] * missing
        for step in range(first, last + 1):
            share = self._share(step, begun, ended)
            self._rows[step] += rows * share
            self._tokens[step] += tokens * share

    def series(self) -> Series:
        """What was added so far."""
        rows, tokens = ([round(value, 3) for value in values] for values in (self._rows, self._tokens))
        return Series(self._width, rows, tokens)

    def _share(self, step: int, begun: float, ended: float) -> float:
        """How much of the time from `begun` to `ended` lies in a step."""
        if ended <= begun:
            return 1.0
        inside = min(ended, (step + 1) * self._width) - max(begun, step * self._width)
        return max(inside, 0.0) / (ended - begun)

    def _halve(self) -> None:
        self._width *= 2
        for values in (self._rows, self._tokens):
            values[:] = [sum(values[start : start + 2]) for start in range(0, len(values), 2)]
