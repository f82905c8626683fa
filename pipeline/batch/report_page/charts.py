"""Charts as inline SVG. They hold numbers alone, no text of anybody; labels stand in the page around them.

A chart fills whatever box it is put in: it is drawn in a square of 100 by 100 units that is stretched.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from pipeline.batch.histogram import Histogram
from pipeline.batch.run_record import RunRecord

MAX_BARS = 28
MAX_RUNS_DRAWN = 12
_TAIL = 1.75  # an axis that would be this many times longer for one value in a hundred is cut
_TIME_STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10_800, 21_600, 43_200)
_DAY = 86_400
_QUARTERS = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)
_CLOSED = "</svg>"


@dataclass(frozen=True)
class Tick:
    """A mark on an axis.

    Args:
        percent: Where on the axis.
        value: What it stands for.
    """

    percent: float
    value: float


@dataclass(frozen=True)
class Chart:
    """A drawing and its axes.

    Args:
        svg: The drawing.
        x: Marks from left to right.
        y: Marks from the bottom up.
        beyond: Values that lie to the right of what is drawn.
        end: The value at the right edge.
    """

    svg: Markup
    x: Sequence[Tick]
    y: Sequence[Tick]
    beyond: int = 0
    end: float = 0.0


def histogram_chart(histogram: Histogram, label: str, show: Callable[[float], str]) -> Chart | None:
    """Bars of equal width; None for a histogram without values.

    Args:
        histogram: Of whole numbers.
        label: For who cannot see it.
        show: A value as a person reads it.
    """
    low, high, p99 = histogram.low, histogram.high, histogram.quantile(0.99)
    if low is None or high is None or p99 is None:
        return None
    end = p99 if high - low > _TAIL * max(p99 - low, 1) else float(high)
    width = nice((end + 1 - low) / MAX_BARS, whole=True)
    start = math.floor(low / width) * width
    count = max(1, math.ceil((end + 1 - start) / width))
    bars = [round(histogram.between(start + width * bar, start + width * (bar + 1))) for bar in range(count)]
    top = nice_top(max(bars))
    shapes = [
        f'<rect class="bar" x="{100 * bar / count:.3f}" width="{84 / count:.3f}" y="{100 - height:.2f}" '
        f'height="{height:.2f}"><title>{_span(start + width * bar, width, show)}: {rows:,}</title></rect>'
        for bar, rows in enumerate(bars)
        if (height := 100 * rows / top) > 0
    ]
    edge = start + width * count
    steps = [start + width * bar for bar in range(count + 1)]
    shown = [step for index, step in enumerate(steps) if index % max(1, math.ceil(count / 4)) == 0]
    ticks = [Tick(100 * (step - start) / (edge - start), step) for step in shown]
    beyond = histogram.count - round(histogram.between(0, edge))
    return Chart(_svg(shapes, label), ticks, _up(top), max(beyond, 0), edge)


def throughput_chart(runs: Sequence[RunRecord], what: str, label: str) -> Chart | None:
    """A value a second over the time of the runs, one beside the other; None when nothing was done.

    Args:
        runs: Those to draw, the oldest first.
        what: `rows` or `tokens`.
        label: For who cannot see it.
    """
    total = sum(run.total_seconds for run in runs)
    rates = [[value / run.timeline.step_seconds for value in getattr(run.timeline, what)] for run in runs]
    highest = max((rate for series in rates for rate in series), default=0.0)
    if not total or not highest:
        return None
    top = nice_top(highest)
    shapes, begun = [], 0.0
    for run, series in zip(runs, rates, strict=True):
        if begun:
            shapes.append(_line(100 * begun / total, "run-edge"))
        shapes += _area(run, series, begun, total, top)
        begun += run.total_seconds
    step = next((step for step in _TIME_STEPS if step >= total / 6), nice(total / 6 / _DAY) * _DAY)
    ticks = [Tick(100 * step * mark / total, step * mark) for mark in range(math.floor(total / step) + 1)]
    return Chart(_svg(shapes, label), ticks, _up(top), end=total)


def nice(value: float, *, whole: bool = False) -> float:
    """The next of 1, 2, 2.5 and 5 times a power of ten that is at least the value.

    Args:
        value: More than 0.
        whole: Only whole numbers.
    """
    if whole and value <= 1:
        return 1
    power = 10.0 ** math.floor(math.log10(value))
    steps = (1, 2, 5, 10) if whole and power < 10 else (1, 2, 2.5, 5, 10)
    return next(step * power for step in steps if step * power >= value * (1 - 1e-9))


def nice_top(value: float) -> float:
    """The top of an axis from 0 whose quarters are read easily."""
    quarter = max(value, 1e-9) / 4
    power = 10.0 ** math.floor(math.log10(quarter))
    return 4 * next(step * power for step in _QUARTERS if step * power >= quarter * (1 - 1e-9))


def _area(run: RunRecord, series: Sequence[float], begun: float, total: float, top: float) -> list[str]:
    """The area under one run's rates, and over each step something to point at."""
    width = run.timeline.step_seconds
    points, marks = [], []
    for step, rate in enumerate(series):
        left, right = step * width, min((step + 1) * width, run.total_seconds)
        if right <= left:
            break
        y = 100 - 100 * rate / top
        x, x_end = 100 * (begun + left) / total, 100 * (begun + right) / total
        points += [f"{x:.3f},{y:.2f}", f"{x_end:.3f},{y:.2f}"]
        marks.append(
            f'<rect class="mark" x="{x:.3f}" width="{x_end - x:.3f}" y="0" height="100"><title>{rate:,.1f}/s, '
            f"{begun + left:,.1f} s</title></rect>"
        )
    if not points:
        return []
    first, last = points[0].partition(",")[0], points[-1].partition(",")[0]
    line = " ".join(points)
    return [
        f'<polygon class="area" points="{first},100 {line} {last},100"/>',
        f'<polyline class="curve" points="{line}"/>',
        *marks,
    ]


def _svg(shapes: Sequence[str], label: str) -> Markup:
    grid = [f'<line class="grid" x1="0" x2="100" y1="{y}" y2="{y}"/>' for y in (0, 25, 50, 75)]
    opened = Markup('<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{}">').format(label)
    return opened + Markup("".join([*grid, *shapes])) + Markup(_CLOSED)  # noqa: S704  # made of numbers, above


def _line(x: float, name: str) -> str:
    return f'<line class="{name}" x1="{x:.3f}" x2="{x:.3f}" y1="0" y2="100"/>'


def _up(top: float) -> list[Tick]:
    return [Tick(percent, top * percent / 100) for percent in (0, 50, 100)]


def _span(start: float, width: float, show: Callable[[float], str]) -> str:
    return show(start) if width == 1 else f"{show(start)} to {show(start + width - 1)}"
