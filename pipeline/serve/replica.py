"""The Serve deployment that answers: one engine, and the experts over one base model."""

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ray import serve

from pipeline.errors import InferenceError
from pipeline.package import ExpertPackage, local_base_model, open_planned
from pipeline.ray_metrics import RayMetrics
from pipeline.serve.messages import Ask, Event
from pipeline.serve.replica_metrics import ReplicaMetrics
from pipeline.tracing import export_spans, flush_spans

if TYPE_CHECKING:
    from pipeline.engine.stats import EngineStats
    from pipeline.serve.local import LocalBackend

logger = logging.getLogger("ray.serve")  # the one that Serve writes to the replica's log file

GAUGE_SECONDS = 1.0
STALL_SECONDS = 300.0  # no step of any engine takes so long
WARM_UP = "Hello."


@dataclass(frozen=True)
class StagedExpert:
    """An expert as a replica opens it on its own machine.

    Args:
        name: The served name.
        package: Path or URL.
        sha256: The digest that the service was planned with.
        pin: Load it at the start, and keep it.
    """

    name: str
    package: str
    sha256: str
    pin: bool = False


@dataclass(frozen=True)
class ReplicaJob:
    """Everything a replica is told.

    Args:
        experts: Over one base model.
        base_place: That base model; see `local_base_model`.
        num_threads: Threads to compute with on a CPU; None for a share of the machine's cores.
        num_sharing: How many replicas may share them.
        max_resident: Experts on the device at once.
        max_prompt_tokens: Longer prompts are refused; None for what the model's context holds.
        cache_dir, device, dtype, quantization, batch_size, max_batch_tokens, kv_cache_bytes, storage_options: See
            `ServeConfig`.
    """

    experts: tuple[StagedExpert, ...]
    base_place: str
    cache_dir: str | None = None
    device: str | None = None
    dtype: str | None = None
    quantization: str = "none"
    num_threads: int | None = None
    num_sharing: int = 1
    batch_size: int | None = None
    max_batch_tokens: int | None = None
    kv_cache_bytes: int | None = None
    max_resident: int = 32
    max_prompt_tokens: int | None = None
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)


class ExpertReplica:
    """Answers requests from one engine; `pipeline.serve.local.LocalBackend` in a process of its own.

    Serve asks it for its health, sends it requests up to `max_ongoing_requests`, and lets it finish them before it ends
    it.

    Args:
        job: What to answer with.

    Raises:
        LoadError: The base model, or an expert that is pinned, cannot be used on this machine.
    """

    async def __init__(self, job: ReplicaJob) -> None:  # type: ignore[misc]  # Serve awaits it
        export_spans(os.environ)
        self._phases: dict[str, float] = {}
        self._progress = (time.monotonic(), -1)  # when the engine last did a step, and how many it had done
        self._backend = await asyncio.to_thread(self._load, job)
        self._metrics = ReplicaMetrics(RayMetrics())
        self._backend.watch = self._metrics.answers.note
        # Serve's router prefers replicas that say they have a model; the engine's own set decides what is loaded.
        self._announce = serve.multiplexed(max_num_models_per_replica=job.max_resident)(_the_same)
        await self._warm_up(job)
        self._gauges = asyncio.create_task(self._set_gauges())
        logger.info("ready: %s", ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self._phases.items()))

    async def ask(self, ask: Ask) -> AsyncGenerator[Event, None]:
        """Answer one request; see `pipeline.serve.messages.Backend`."""
        async with aclosing(self.ask_gathered(ask)) as gathered:
            async for events in gathered:
                for event in events:
                    yield event

    async def ask_gathered(self, ask: Ask) -> AsyncGenerator[list[Event], None]:
        """As `ask`, each time with all events there are: every trip between two processes has its price."""
        if ask.expert in self._backend.experts.packages:
            await self._announce(ask.expert)
        async with aclosing(self._backend.ask_gathered(ask)) as gathered:
            async for events in gathered:
                yield events

    async def ask_whole(self, ask: Ask) -> list[Event]:
        """As `ask`, all events at the end: one message, for a client that waits for the whole answer."""
        async with aclosing(self.ask(ask)) as events:
            return [event async for event in events]

    async def stats(self) -> "EngineStats":
        """What the engine is doing."""
        return self._backend.experts.engine.stats()

    async def resident(self) -> tuple[str, ...]:
        """The experts on the device."""
        return self._backend.experts.resident()

    async def phases(self) -> dict[str, float]:
        """How long each part of the start took, in seconds."""
        return dict(self._phases)

    async def flush(self) -> None:
        """Export the spans that have ended; see `pipeline.tracing`."""
        await asyncio.to_thread(flush_spans)

    async def check_health(self) -> None:
        """Tell Serve whether to replace this replica.

        Raises:
            InferenceError: The engine has died, or is stuck in a step.
        """
        engine = self._backend.experts.engine
        if not engine.is_alive:
            raise InferenceError("the engine has stopped", hint="Serve replaces the replica; see its log.")
        stats, now = engine.stats(), time.monotonic()
        at, num_steps = self._progress
        if stats.num_steps != num_steps or not (stats.num_running or stats.num_waiting):
            self._progress = (now, stats.num_steps)
        elif now - at > STALL_SECONDS:
            raise InferenceError(
                f"the engine has done no step for {now - at:.0f} seconds", hint="Serve replaces the replica."
            )

    async def __del__(self) -> None:
        """Serve calls this once, when nothing is to be answered any more."""
        backend: LocalBackend | None = getattr(self, "_backend", None)
        if backend is not None:
            self._gauges.cancel()
            await asyncio.to_thread(backend.close)
        await self.flush()

    def _load(self, job: ReplicaJob) -> "LocalBackend":
        started = time.monotonic()
        import torch

        from pipeline.engine.loader import useful_threads
        from pipeline.engine.runtime import open_experts
        from pipeline.serve.local import LocalBackend

        started = self._note("imports", started)
        base_path = local_base_model(job.base_place, job.cache_dir, job.storage_options)
        num_cores = os.cpu_count() or 1
        # Ray tells the libraries to use the cores that an actor reserves, one unless told otherwise.
        share = useful_threads(base_path, max(1, num_cores // job.num_sharing))
        torch.set_num_threads(min(job.num_threads or share, num_cores))
        packages = {expert.name: open_staged(expert, job.cache_dir, job.storage_options) for expert in job.experts}
        started = self._note("packages", started)
        experts = open_experts(
            packages,
            base_path,
            max_resident=job.max_resident,
            device=job.device,
            dtype=job.dtype,
            quantization=job.quantization,
            batch_size=job.batch_size,
            max_batch_tokens=job.max_batch_tokens,
            kv_cache_bytes=job.kv_cache_bytes,
        )
        started = self._note("engine", started)
        for expert in job.experts:
            if expert.pin:
                experts.load(expert.name, pin=True)
        self._note("experts", started)
        return LocalBackend(experts, max_prompt_tokens=job.max_prompt_tokens)

    def _note(self, phase: str, started: float) -> float:
        now = time.monotonic()
        self._phases[phase] = now - started
        return now

    async def _warm_up(self, job: ReplicaJob) -> None:
        """Answer something, so that no client waits for what is made at the first step, or at the first of its size."""
        started = time.monotonic()
        pinned = [expert.name for expert in job.experts if expert.pin]
        for name in pinned:
            await self._announce(name)
        for name in pinned[:1]:
            ask = Ask("warm-up", name, {"prompt": WARM_UP}, {"max_tokens": 2})
            async with aclosing(self._backend.ask_gathered(ask)) as gathered:
                async for _ in gathered:
                    pass
        engine = self._backend.experts.engine
        replayable = [name for name in pinned if engine.bank is not None and engine.bank.is_replayable({name})]
        await asyncio.to_thread(engine.warm_up, replayable[0] if replayable else None)
        self._note("warm-up", started)

    async def _set_gauges(self) -> None:
        experts = self._backend.experts
        while experts.engine.is_alive:
            self._metrics.set_gauges(experts.engine.stats(), experts.loads)
            await asyncio.sleep(GAUGE_SECONDS)


def open_staged(
    expert: StagedExpert, cache_dir: str | None, storage_options: Mapping[str, Any] | None = None
) -> ExpertPackage:
    """Open an expert's package, and see that it is the one that the service was planned with.

    Raises:
        LoadError: It cannot be used; IntegrityError where it is another.
    """
    hint = "Do not replace a package while a service runs; deploy the service again."
    return open_planned(
        expert.package,
        expert.sha256,
        planned="the service",
        hint=hint,
        cache_dir=cache_dir,
        storage_options=storage_options,
    )


async def _the_same(name: str) -> str:
    return name
