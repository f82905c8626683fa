"""The page `report.html`: one file, without a script and without anything from elsewhere.

The template escapes whatever it is given; only the charts, which hold numbers alone, are markup.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline.batch.progress import PHASES
from pipeline.batch.report_page.charts import MAX_RUNS_DRAWN, Chart, histogram_chart, throughput_chart

if TYPE_CHECKING:
    from pipeline.batch.report import JobReport
    from pipeline.batch.run_record import RunRecord

_FOLDER = Path(__file__).parent
_MAX_RUNS_LISTED = 50
_MAX_FACT_CHARACTERS = 2000


def render_page(report: "JobReport") -> str:
    """The page of a report.

    Args:
        report: What it shows.
    """
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(count=count_text, brief=brief, duration=duration, price=price)
    drawn = report.runs[-MAX_RUNS_DRAWN:]
    return environment.get_template(
        "page.html"
    ).render(
        report=report,
        style=Markup((_FOLDER / "style.css").read_text(encoding="utf-8")),  # noqa: S704  # our own file
        totals=report.manifest,
        cost=report.cost,
        phases=PHASES,
        rows_chart=throughput_chart(drawn, "rows", "Rows a second over time"),
        tokens_chart=throughput_chart(drawn, "tokens", "Generated tokens a second over time"),
        num_drawn=len(drawn),
        histograms=_histograms(report),
        duration_text=duration,
        brief_text=brief,
        runs=[_run(run) for run in report.runs[-_MAX_RUNS_LISTED:]],
        facts=_facts(report.fingerprint),
    )


def count_text(value: float) -> str:
    """A whole number with its thousands apart."""
    return f"{value:,.0f}"


def brief(value: float) -> str:
    """A number in at most four digits: `0.25`, `12.5`, `1,250`, `12.5k`, `3.2M`."""
    units = ((1e4, 1.0, ""), (1e6, 1e3, "k"), (1e9, 1e6, "M"), (math.inf, 1e9, "G"))
    divisor, unit = next((divisor, unit) for limit, divisor, unit in units if abs(value) < limit)
    scaled = value / divisor
    digits = 0 if abs(scaled) >= 100 else 1 if abs(scaled) >= 10 else 2
    text = f"{scaled:,.{digits}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text) + unit


def duration(seconds: float) -> str:
    """Seconds as a person says them: `0.4 s`, `10 min`, `1:05 min`, `2:30 h`, `3 d 4 h`."""
    if seconds < 60:
        return f"{brief(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h" if hours else f"{days} d"
    if hours:
        return f"{hours}:{minutes:02} h" if minutes else f"{hours} h"
    return f"{minutes}:{rest:02} min" if rest else f"{minutes} min"


def price(value: float) -> str:
    """An amount of money: two digits after the point, or two that count."""
    return f"{value:,.2f}" if value >= 1 or not value else f"{value:.2g}"


def _histograms(report: "JobReport") -> list[dict[str, Any]]:
    shown = []
    for title, name, unit, divisor in (
        ("Prompt length", "prompt_lengths", "tokens", 1),
        ("Answer length", "completion_lengths", "tokens", 1),
        ("Time of a shard", "shard_milliseconds", "seconds", 1000),
    ):
        histogram = report.histogram(name)

        def show(value: float, divisor: int = divisor) -> str:
            return brief(value / divisor)

        chart: Chart | None = histogram_chart(histogram, f"{title}, {unit}", show)
        quantiles = {label: histogram.quantile(share) for label, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))}
        facts = {"mean": histogram.mean, **quantiles, "max": histogram.high}
        shown.append(
            {
                "title": title,
                "unit": unit,
                "chart": chart,
                "show": show,
                "facts": {label: show(value) for label, value in facts.items() if value is not None},
            }
        )
    return shown


def _run(run: "RunRecord") -> dict[str, Any]:
    total = run.total_seconds
    known = sum(run.seconds.get(phase, 0.0) for phase in PHASES)
    seconds = {**{phase: run.seconds.get(phase, 0.0) for phase in PHASES}, "other": max(total - known, 0.0)}
    running = seconds["run"]
    return {
        "record": run,
        "started": run.started_at.replace("T", " ").removesuffix("+00:00"),
        "phases": [(name, value, 100 * value / total) for name, value in seconds.items() if total and value > 0],
        "rows_per_second": run.rows / running if running else 0.0,
        "in_flight": run.shard_seconds / running if running else 0.0,
    }


def _facts(fingerprint: Mapping[str, Any]) -> dict[str, str]:
    """The fingerprint, each value as text."""
    shown = {}
    for name, value in fingerprint.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        shown[name.replace("_", " ")] = text[:_MAX_FACT_CHARACTERS] or "-"
    return shown
