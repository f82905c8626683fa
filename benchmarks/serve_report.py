"""The tables of `benchmarks.serve`, and whether the targets are met."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.serve_servers import BASELINE, OURS

TARGET_CONCURRENCY = 32
TARGET_TIMES = 5.0
TARGET_GATEWAY_MS = 5.0
TARGET_GATEWAY_SHARE = 0.10
Row = Mapping[str, Any]


def with_ratios(rows: Sequence[Row], level: str) -> list[dict[str, Any]]:
    """The rows, each with its throughput and its p99 as multiples of the thirty lines' at the same level.

    Args:
        rows: With `server` and the figures of `benchmarks.serve_load.summary`.
        level: The field that says which rows belong together.

    Returns:
        With `times_rate` and `times_p99` where there is something to compare with.
    """
    base = {row[level]: row for row in rows if row["server"] == BASELINE}
    compared = []
    for row in rows:
        new, other = dict(row), base.get(row[level])
        if other is not None and other["requests_per_second"] and row["total_ms"] and other["total_ms"]:
            new["times_rate"] = row["requests_per_second"] / other["requests_per_second"]
            new["times_p99"] = row["total_ms"]["p99"] / other["total_ms"]["p99"]
        compared.append(new)
    return compared


def print_closed(rows: Sequence[Row], about: str, console: Console) -> None:
    """Print the levels of the closed loop."""
    table = _table(f"closed loop: so many clients, each with one request at a time\n{about}", "clients")
    for row in rows:
        table.add_row(str(row["concurrency"]), *_figures(row), end_section=_is_last(row, rows, "concurrency"))
    console.print(table)


def print_open(rows: Sequence[Row], about: str, console: Console) -> None:
    """Print the rates of the open loop."""
    table = _table(f"open loop: Poisson arrivals\n{about}", "arrivals/s")
    for row in rows:
        table.add_row(f"{row['rate']:.1f}", *_figures(row))
    console.print(table)


def print_starts(starts: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """Print how long servers took from the command to their first answer."""
    table = Table(title="cold start: from the command to the first answer", title_justify="left")
    table.add_column("server")
    table.add_column("s", justify="right")
    table.add_column("what it says itself")
    for name, start in starts.items():
        table.add_row(name, f"{start['seconds']:.1f}" if "seconds" in start else "-", start.get("phases", ""))
    console.print(table)


def print_gateway(gateway: Mapping[str, Any], console: Console) -> None:
    """Print what the gateway adds to a call of the replica's handle."""
    table = Table(title="the gateway over calling the replica's handle, the same requests", title_justify="left")
    for column in ("clients", "way", "req/s", "first p50 ms", "total p50 ms", "adds ms", "loses"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for level in gateway["levels"]:
        for way in ("handle", "gateway"):
            one = level[way]
            added = (f"{level['added_ms']:+.1f}", f"{level['lost_share']:.1%}") if way == "gateway" else ("", "")
            table.add_row(
                str(level["concurrency"]),
                way,
                f"{one['requests_per_second']:.1f}",
                f"{one['first_p50_ms']:.1f}",
                f"{one['total_p50_ms']:.1f}",
                *added,
                end_section=way == "gateway",
            )
    console.print(table)


def print_overload(overload: Row, console: Console) -> None:
    """Print what became of ten times too many requests."""
    table = Table(title="overload: ten times the arrivals that it can answer", title_justify="left")
    for column in ("can req/s", "arrivals/s", "requests", "answered", "refused (429)", "other errors", "late ms"):
        table.add_column(column, justify="right")
    table.add_column("first p50/p99 ms of the answered")
    table.add_column("afterwards ms", justify="right")
    first = overload["first_ms"]
    table.add_row(
        f"{overload['capacity']:.1f}",
        f"{overload['rate']:.0f}",
        f"{overload['requests']:,}",
        f"{overload['finished']:,}",
        f"{overload['refused']:,}",
        f"{overload['server_errors']:,}",
        f"{overload['lateness_ms']:.0f}",
        f"{first['p50']:,.0f} / {first['p99']:,.0f}" if first else "",
        "-" if overload["calm_ms"] is None else f"{overload['calm_ms']:.0f}",
    )
    console.print(table)


def targets(report: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """What is wanted, with what was measured, and whether it is met; what was not measured is left out."""
    found: list[tuple[str, bool]] = []
    for row in report.get("closed", ()):
        if row["server"] == OURS and row["concurrency"] == TARGET_CONCURRENCY and "times_rate" in row:
            times, p99 = row["times_rate"], row["times_p99"]
            found.append(
                (
                    f"{TARGET_CONCURRENCY} clients: {times:.1f} x the requests per second of {BASELINE} (at least "
                    f"{TARGET_TIMES:g}) at {p99:.2f} x its p99 (at most 1)",
                    times >= TARGET_TIMES and p99 <= 1,
                )
            )
    for level in report.get("gateway", {}).get("levels", ()):
        if level["concurrency"] == 1:
            text = f"the gateway adds {level['added_ms']:.1f} ms at p50 (less than {TARGET_GATEWAY_MS:g})"
            found.append((text, level["added_ms"] < TARGET_GATEWAY_MS))
        else:
            share = f"{level['lost_share']:.1%} of the throughput with {level['concurrency']} clients"
            text = f"the gateway costs {share} (less than {TARGET_GATEWAY_SHARE:.0%})"
            found.append((text, level["lost_share"] < TARGET_GATEWAY_SHARE))
    overload = report.get("overload")
    if overload:
        text = (
            f"overload: {overload['server_errors']} of {overload['requests']:,} requests failed otherwise than by 429"
        )
        found.append((f"{text} (none)", not overload["server_errors"] and overload["calm_ms"] is not None))
    return found


def print_targets(report: Mapping[str, Any], console: Console) -> None:
    """Print what is wanted and whether it is met."""
    for text, is_met in targets(report):
        console.print(f"[{'green' if is_met else 'red'}]{'met' if is_met else 'missed'}[/]  {text}", highlight=False)


def errors_text(row: Row) -> str:
    """The errors of a row by status and code, or nothing."""
    parts = [f"{status}: {count}" for status, count in row["statuses"].items() if status != "200"]
    parts += [f"{code}: {count}" for code, count in row["errors"].items()]
    return ", ".join(parts)


def _table(title: str, level: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(level, justify="right")
    table.add_column("server")
    columns = ("req/s", f"x {BASELINE}", "out tok/s", "first p50", "p95", "p99 ms", "total p50", "p95", "p99 ms")
    for column in (*columns, "x p99", "same answers", "client", "others"):
        table.add_column(column, justify="right")
    table.add_column("errors")
    return table


def _figures(row: Row) -> list[str]:
    more = "≥ " if row["is_lower_bound"] else ""

    def times(name: str) -> list[str]:
        return [f"{more}{row[name][p]:,.0f}" for p in ("p50", "p95", "p99")] if row[name] else ["", "", ""]

    return [
        row["server"],
        f"{row['requests_per_second']:.1f}",
        f"{row['times_rate']:.1f}" if "times_rate" in row else "",
        f"{row['output_tokens_per_second']:.0f}",
        *(times("first_ms") if row.get("is_streamed") else ["", "", ""]),
        *times("total_ms"),
        f"{row['times_p99']:.2f}" if "times_p99" in row else "",
        f"{row['same_answers']:.0%}" if "same_answers" in row else "",
        f"{row['client_share']:.0%}",
        f"{row['others_share']:.0%}",
        errors_text(row),
    ]


def _is_last(row: Row, rows: Sequence[Row], level: str) -> bool:
    following = rows[rows.index(row) + 1 :]
    return not following or following[0][level] != row[level]
