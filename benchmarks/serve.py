"""Servers side by side: the same requests, one server after another, each in a process of its own, asked from this one.

python -m benchmarks.serve                                                   the demo, all measurements
python -m benchmarks.serve --model qwen3-0.6b --concurrency 1,4,32 --servers expert-serve,thirty-lines
python -m benchmarks.serve --peer vllm=build/peers/bin/python --measure closed --json out.json
"""

import argparse
import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.machine import describe, one_line
from benchmarks.report import write_json
from benchmarks.serve_load import Load
from benchmarks.serve_measure import Bounds, measure_closed, measure_gateway, measure_open, measure_overload
from benchmarks.serve_report import (
    print_closed,
    print_gateway,
    print_open,
    print_overload,
    print_starts,
    print_targets,
    with_ratios,
)
from benchmarks.serve_requests import MODELS, Scene, make_scene
from benchmarks.serve_servers import (
    OURS,
    SERVERS,
    RunningServer,
    ServerFailedError,
    ServerKind,
    interpreter_of,
    started,
)

CONCURRENCY = "1,4,16,32,64,256"
RATES = "0.5,0.8"
MEASUREMENTS = ("closed", "open", "overload", "gateway")
DEFAULT_SERVERS = "expert-serve,thirty-lines,transformers-serve"
GATEWAY_REQUESTS = 256
_SPARE_REQUESTS = 4096


class Benchmark:
    """One run over several servers.

    Args:
        scene: What they serve.
        options: The command's.
        console: Where it is told.
        dtype: Of the peers' weights: what ours chooses for itself.
    """

    def __init__(self, scene: Scene, options: argparse.Namespace, console: Console, dtype: str) -> None:
        self._scene = scene
        self._options = options
        self._console = console
        self._dtype = dtype
        self._stream: bool = options.stream
        self._interpreters = dict(options.peer)
        self._bounds = Bounds(options.per_client, options.least, options.most, options.seconds, options.patience)
        self._answers: dict[int, str] = {}  # of the first server that was measured
        self.report: dict[str, Any] = {"starts": {}, "closed": [], "open": []}
        self.has_failed = False

    async def run(self, names: Sequence[str]) -> None:
        """Measure the servers of these names, and what the gateway adds; the report is complete after every part."""
        wanted = self._options.measure
        for name in names:
            if not {"closed", "open", "overload"} & set(wanted):
                break
            await self._one_server(name)
        if "gateway" in wanted and OURS in names:
            try:
                self.report["gateway"] = await measure_gateway(
                    self._scene,
                    num_requests=min(self._options.gateway_requests, len(self._scene.requests)),
                    stream=self._stream,
                    say=self._say,
                )
            except RuntimeError as error:
                self._failed("gateway", str(error))
        self._keep()

    async def _one_server(self, name: str) -> None:
        kind = SERVERS[name]
        python = interpreter_of(kind, self._interpreters)
        if python is None:
            self._failed(name, f"give its interpreter with --peer {kind.interpreter}=PATH/python")
            return
        levels = list(self._options.concurrency)
        best = 0.0
        while True:  # a server that is left with unanswered requests is started anew for what remains
            self._say(f"{name} ...")
            try:
                async with started(kind, self._scene, dtype=self._dtype, python=python) as server:
                    while levels:
                        row = await self._level(name, server, levels.pop(0))
                        best = max(best, row["requests_per_second"])
                        if row["given_up"]:
                            break
                    else:
                        await self._arrivals(name, server, best)
                    self._note_start(name, server)
                if not levels:
                    return
            except ServerFailedError as error:
                self._failed(name, str(error))
                return

    async def _level(self, name: str, server: RunningServer, concurrency: int) -> dict[str, Any]:
        wanted = self._options.concurrency
        at = wanted.index(concurrency)
        first = sum(self._bounds.num_requests(level) for level in wanted[:at])
        figures, load = await measure_closed(server, concurrency, first=first, bounds=self._bounds, stream=self._stream)
        row = {"server": name, "is_streamed": self._stream and server.kind.streams, **figures}
        row |= self._agreement(server.kind, load)
        self._say(
            f"{name}, {concurrency} clients: {row['finished']} of {row['requests']} requests answered, "
            f"{row['requests_per_second']:.1f}/s, p99 {row['total_ms'].get('p99', float('nan')):,.0f} ms"
        )
        self.report["closed"].append(row)
        self._keep()
        return row

    async def _arrivals(self, name: str, server: RunningServer, best: float) -> None:
        """Poisson arrivals, and for our own server too many of them."""
        options = self._options
        first = sum(self._bounds.num_requests(level) for level in options.concurrency)
        if "open" in options.measure and best:
            for share in options.rates:
                rate = share if options.absolute_rates else share * best
                figures = await measure_open(
                    server, rate, first=first, bounds=self._bounds, stream=self._stream, seed=options.seed
                )
                is_streamed = self._stream and server.kind.streams
                self.report["open"].append({"server": name, "is_streamed": is_streamed, **figures})
                self._say(f"{name}, {rate:.1f} arrivals a second: p99 {figures['total_ms'].get('p99', 0.0):,.0f} ms")
                self._keep()
                if figures["given_up"]:
                    return
        if "overload" in options.measure and name == OURS and best:
            self.report["overload"] = await measure_overload(server, best, first=first, stream=self._stream)
            self._keep()

    def _agreement(self, kind: ServerKind, load: Load) -> dict[str, float]:
        """The share of answers that are those of the first server, where both have answered the same request.

        The semicolon at the end of an SQL query is left out: the demo's package says to stop before it, and only our
        server reads packages.
        """
        own = {one.number: one.text.strip().removesuffix(";") for one in load.finished}
        if kind.interpreter is not None:  # it answers all with one expert
            return {}
        both = own.keys() & self._answers.keys()
        self._answers = own | self._answers
        return {"same_answers": sum(own[at] == self._answers[at] for at in both) / len(both)} if both else {}

    def _note_start(self, name: str, server: RunningServer) -> None:
        phases = [line.strip() for line in server.log.read_text(errors="replace").splitlines() if " s: " in line]
        start: dict[str, Any] = {"seconds": server.start_seconds, "about": server.kind.about}
        if name == OURS and phases:
            start["phases"] = phases[0].rpartition("(")[2].rstrip(")")
        self.report["starts"].setdefault(name, start)

    def _failed(self, name: str, why: str) -> None:
        self.has_failed = True
        self.report.setdefault("failed", {})[name] = why
        self._console.print(f"{name}: {why}", markup=False, highlight=False)

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False)

    def _keep(self) -> None:
        if self._options.json:
            self.report["closed"] = with_ratios(self.report["closed"], "concurrency")
            write_json(self._options.json, self.report)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the arguments ask for; 0 if every server was measured, 1 if one failed."""
    console = Console(width=190)
    options = _parser().parse_args(arguments)
    names = list(options.servers)
    names += [name for name in dict(options.peer) if name not in names]
    asked = sum(Bounds(options.per_client, options.least, options.most).num_requests(n) for n in options.concurrency)
    scene = make_scene(options.model, num_requests=asked + _SPARE_REQUESTS, seed=options.seed)
    dtype = own_dtype(scene)
    benchmark = Benchmark(scene, options, console, dtype)
    machine = describe(dict(options.peer))
    benchmark.report |= {"machine": machine, "model": options.model, "dtype": dtype, "stream": options.stream}
    asyncio.run(benchmark.run(names))
    _print(benchmark.report, f"{options.model}, {dtype}; {one_line(machine)}", console)
    return int(benchmark.has_failed)


def _print(report: Mapping[str, Any], about: str, console: Console) -> None:
    closed = sorted(with_ratios(report["closed"], "concurrency"), key=lambda row: row["concurrency"])
    if report["starts"]:
        print_starts(report["starts"], console)
    if closed:
        print_closed(closed, about, console)
    if report["open"]:
        print_open(report["open"], about, console)
    if "overload" in report:
        print_overload(report["overload"], console)
    if "gateway" in report:
        print_gateway(report["gateway"], console)
    print_targets({**report, "closed": closed}, console)


def own_dtype(scene: Scene) -> str:
    """The format of weights that our engine chooses on this machine."""
    import torch
    from transformers import AutoConfig

    from pipeline.engine.devices import choose_device
    from pipeline.engine.loader import choose_dtype

    stored: torch.dtype = AutoConfig.from_pretrained(scene.base).dtype or torch.float32
    return str(choose_dtype(choose_device(), None, stored)).removeprefix("torch.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description="Compare servers on one machine.")
    parser.add_argument("--model", default="tiny-demo", choices=MODELS)
    parser.add_argument(
        "--measure", type=_choices(MEASUREMENTS), default=list(MEASUREMENTS), help=f"of {', '.join(MEASUREMENTS)}"
    )
    parser.add_argument(
        "--servers",
        type=_choices(SERVERS),
        default=DEFAULT_SERVERS.split(","),
        help=f"of {', '.join(SERVERS)}; left out: {DEFAULT_SERVERS}",
    )
    parser.add_argument(
        "--peer", action="append", default=[], type=_interpreter, metavar="NAME=PYTHON", help="vllm=PATH/bin/python"
    )
    parser.add_argument("--concurrency", type=_numbers(int), default=CONCURRENCY, help="clients of the closed loop")
    parser.add_argument(
        "--rates", type=_numbers(float), default=RATES, help="of the open loop: shares of a server's own best rate"
    )
    parser.add_argument("--absolute-rates", action="store_true", help="--rates are requests a second")
    parser.add_argument("--per-client", type=int, default=8, help="requests of each client at a level")
    parser.add_argument("--least", type=int, default=32, help="requests at a level, at least")
    parser.add_argument("--most", type=int, default=1024, help="requests at a level, at most")
    parser.add_argument("--seconds", type=float, default=10.0, help="no request is begun later at a level")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds after which requests are given up then")
    parser.add_argument("--gateway-requests", type=int, default=GATEWAY_REQUESTS, help="of a round through each way")
    parser.add_argument("--no-stream", dest="stream", action="store_false", help="ask for whole answers")
    parser.add_argument("--seed", type=int, default=0, help="of questions and arrivals")
    parser.add_argument("--json", type=Path, help="write the measurements and the machine here")
    return parser


def _numbers(kind: type) -> Any:
    def read(text: str) -> list[Any]:
        values = [kind(part) for part in text.split(",") if part]
        if not values or min(values) <= 0:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers above 0, by commas")
        return sorted(values)

    return read


def _choices(known: Sequence[str] | Mapping[str, Any]) -> Any:
    def read(text: str) -> list[str]:
        values = [part for part in text.split(",") if part]
        unknown = [value for value in values if value not in known]
        if unknown or not values:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown) or text!r}; known: {', '.join(known)}")
        return values

    return read


def _interpreter(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    # absolute, but not resolved: a virtual environment's python is a link, and must be called by its own name
    python = Path(path).absolute()
    if name not in {kind.interpreter for kind in SERVERS.values()} or not python.is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is not vllm=PATH of a Python")
    return name, python


if __name__ == "__main__":
    raise SystemExit(main())
