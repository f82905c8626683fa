"""Loading the engine of a worker, and answering rows with it, whatever they ask and whatever answers look like."""

import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from threading import Lock
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import pyarrow as pa

from pipeline.batch.columns import ResolvedColumns
from pipeline.batch.prepared import PreparedRow
from pipeline.batch.rows import Row
from pipeline.batch.shard_stats import ShardStats
from pipeline.engine.types import Completion, Engine, Failure, Request
from pipeline.package import Routing, local_base_model, open_planned

if TYPE_CHECKING:
    from pipeline.engine.requests import PreparedPrompt
    from pipeline.engine.runtime import EngineName
    from pipeline.package import ExpertPackage

UNNAMED = ""  # how the engine calls the expert of rows that name none, beside others; no name that rows give is empty


@dataclass(frozen=True)
class JobExpert:
    """An expert of a job, as every process opens it for itself.

    Args:
        name: What rows call it; None for the one that answers rows which name none.
        package: Path or URL.
        sha256: The package's digest.
        label: Its name and version, `name@version`.
        options: Sampling options that go before its manifest's; whether a grammar is applied is always among them, so
            that a worker which cannot apply it fails.
        routing: What its manifest says of the prompts it is for; see `pipeline.routing`.
    """

    name: str | None
    package: str
    sha256: str
    label: str
    options: Mapping[str, Any]
    routing: Routing = field(default_factory=Routing)


@dataclass(frozen=True)
class EngineJob:
    """What a worker loads, and how it makes requests of rows.

    Args:
        experts: Over one base model; those with a name are held side by side.
        base_place: The base model; see `local_base_model`.
        num_threads: Threads to compute with on a CPU; None for torch's own number.
        columns, prompt_template, seed: As the job's.
        cache_dir, device, dtype, quantization, engine, batch_size, max_batch_tokens, kv_cache_bytes: See `BatchConfig`.
        storage_options: Of the file system that each package, or the base model, is read from, by its place.
    """

    experts: tuple[JobExpert, ...]
    base_place: str
    columns: ResolvedColumns
    prompt_template: str | None = None
    seed: int = 0
    cache_dir: str | None = None
    device: str | None = None
    dtype: str | None = None
    quantization: str = "none"
    num_threads: int | None = None
    engine: "EngineName" = "packed"
    batch_size: int | None = None
    max_batch_tokens: int | None = None
    kv_cache_bytes: int | None = None
    storage_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)


class Preparer(Protocol):
    """Prepares the rows of one expert; `pipeline.engine.requests.PromptPreparer` is one."""

    def prepare(
        self,
        *,
        prompt: Any = None,
        messages: Any = None,
        schema: Any = None,
        dialect: str | None = None,
        system: Any = None,
        options: Mapping[str, Any] | None = None,
    ) -> "PreparedPrompt":
        """Check, template and tokenise one row; raises ExpertError where it cannot be asked."""
        ...


class Builder(Preparer, Protocol):
    """Makes the requests of one expert; `pipeline.engine.requests.RequestBuilder` is one."""

    @property
    def tokenizer(self) -> Any:
        """The expert's tokenizer."""
        ...

    def request(self, request_id: str, prepared: "PreparedPrompt") -> Request:
        """The request of a prompt that is prepared."""
        ...


@dataclass(frozen=True)
class LoadedEngine:
    """An engine that is ready, and what makes requests for it, by the name that rows give."""

    engine: Engine
    builders: Mapping[str | None, Builder]


@dataclass(frozen=True)
class Loader:
    """How the processes of a job come to what they work with: the seam for an engine that computes nothing.

    Args:
        engine: How a worker comes to its engine.
        preparers: How a process that prepares rows for workers comes to what it does so with, by the names that rows
            give; what they prepare, the builders of the engine take.
    """

    engine: Callable[[EngineJob], LoadedEngine]
    preparers: Callable[[EngineJob], Mapping[str | None, Preparer]]


def load_engine(job: EngineJob) -> LoadedEngine:
    """Load the job's experts on this machine: one alone is merged into the base model, several stand side by side.

    Raises:
        IntegrityError: A package is not the one that the job was planned with.
        LoadError: A package or the base model cannot be used.
    """
    import torch

    from pipeline.engine.loader import useful_threads
    from pipeline.engine.runtime import load_expert, load_experts

    base_path = local_base_model(job.base_place, job.cache_dir, job.storage_options.get(job.base_place))
    if job.num_threads is not None:
        torch.set_num_threads(useful_threads(base_path, min(job.num_threads, os.cpu_count() or 1)))
    packages = [_open(expert, job) for expert in job.experts]
    if [expert.name for expert in job.experts] == [None]:
        loaded = load_expert(
            packages[0],
            base_path,
            device=job.device,
            dtype=job.dtype,
            quantization=job.quantization,
            engine=job.engine,
            batch_size=job.batch_size,
            max_batch_tokens=job.max_batch_tokens,
            kv_cache_bytes=job.kv_cache_bytes,
            options=job.experts[0].options,
        )
        return LoadedEngine(loaded.engine, {None: loaded.requests})
    names = [engine_name(expert.name) for expert in job.experts]
    beside = load_experts(
        dict(zip(names, packages, strict=True)),
        base_path,
        device=job.device,
        dtype=job.dtype,
        quantization=job.quantization,
        batch_size=job.batch_size,
        max_batch_tokens=job.max_batch_tokens,
        kv_cache_bytes=job.kv_cache_bytes,
        options={name: expert.options for name, expert in zip(names, job.experts, strict=True)},
    )
    for builder in beside.requests.values():
        if builder.grammar is not None:
            beside.engine.check_grammar(builder.grammar)
    return LoadedEngine(
        beside.engine,
        {expert.name: beside.requests[name] for name, expert in zip(names, job.experts, strict=True)},
    )


def load_preparers(job: EngineJob) -> Mapping[str | None, Preparer]:
    """Load what prepares rows for the job's workers: the packages' manifests and tokenizers, no weights.

    Raises:
        IntegrityError: A package is not the one that the job was planned with.
        LoadError: A package cannot be used, or the base model cannot be brought here.
    """
    from pipeline.engine.preparing import load_preparers

    options = job.storage_options.get(job.base_place)
    base_path = local_base_model(job.base_place, job.cache_dir, options, weights=False)
    packages = {expert.name: _open(expert, job) for expert in job.experts}
    return load_preparers(packages, base_path, {expert.name: expert.options for expert in job.experts})


EXPERTS = Loader(load_engine, load_preparers)
"""The job's own experts."""


def _open(expert: JobExpert, job: EngineJob) -> "ExpertPackage":
    return open_planned(
        expert.package,
        expert.sha256,
        planned="the job",
        hint="Do not replace a package while a job runs; start the job again in another output folder.",
        cache_dir=job.cache_dir,
        storage_options=job.storage_options.get(expert.package),
    )


class EngineFailedError(Exception):
    """The engine raised, rather than to answer: it can do no more. Not an error for a user; the worker ends itself."""


Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Asked(Generic[Answer]):
    """A row as the engine is asked it.

    Args:
        request: For the engine; None where the row cannot be asked.
        answer: From what the engine gave for it, in any order, to the row's answer.
    """

    request: Request | None
    answer: Callable[[Sequence[Completion]], Answer]


class AnswerForm(Protocol[Answer]):
    """What the rows of a job ask, and what their answers look like; `AnsweredRow`s are one form, lines another."""

    def prepare(self, row: Row) -> PreparedRow:
        """What a row asks, without the engine."""
        ...

    def ask(self, request_id: str, row: Row, prepared: PreparedRow) -> Asked[Answer]:
        """What the engine is asked for a row; a row that cannot be asked has its answer all the same."""
        ...

    def fail(self, row: Row, failure: Failure) -> Answer:
        """The answer to a row that is given up."""
        ...

    def encode(self, answers: Sequence[Answer], table: pa.Table) -> bytes:
        """The part of a shard: the answers to its rows, in order, and the rows as they were read."""
        ...

    def stats(self, rows: Sequence[Row], answers: Sequence[Answer], seconds: float) -> ShardStats:
        """How a shard was answered."""
        ...


class Answering(Generic[Answer]):
    """Answers rows with an engine, from any number of threads at a time.

    Args:
        engine: Who answers.
        form: How rows become requests, and completions answers.
    """

    def __init__(self, engine: Engine, form: AnswerForm[Answer]) -> None:
        self.form = form
        self._engine = engine
        self._tokenizing = Lock()  # tokenizers are not made for several threads
        self._counting = Lock()
        self._num_busy = 0
        self._num_done = 0

    def answer(self, rows: Sequence[Row], prepared: Sequence[PreparedRow] | None = None) -> list[Answer]:
        """The answer to each row, in order.

        Args:
            rows: The rows.
            prepared: What they ask, where another process has found that out.

        Raises:
            EngineFailedError: The engine can do no more.
            OutputError: The engine lost an answer.
        """
        self._count(busy=1)
        try:
            return self._answer(rows, prepared)
        finally:
            self._count(busy=-1)

    def progress(self) -> tuple[int, int] | None:
        """Something that changes with each step, each row and each answer; None when there is nothing to answer."""
        return (self._engine.stats().num_steps, self._num_done) if self._num_busy else None

    def _answer(self, rows: Sequence[Row], prepared: Sequence[PreparedRow] | None) -> list[Answer]:
        asked: list[Asked[Answer]] = []
        with self._tokenizing:
            for place, row in enumerate(rows):
                ready = self.form.prepare(row) if prepared is None else prepared[place]
                asked.append(self.form.ask(str(place), row, ready))
                self._count()
        # Neighbours share what they can: an expert, and the beginning of their prompts.
        requests = [one.request for one in asked if one.request is not None]
        requests.sort(key=lambda request: (request.expert or "", request.prompt_token_ids))
        completions: dict[str, list[Completion]] = defaultdict(list)
        try:
            for completion in self._engine.generate(requests):
                completions[completion.request_id].append(completion)
                self._count()
        except Exception as error:  # whatever an engine raises, it was to answer each row, or to fail that row
            raise EngineFailedError(f"the engine stopped: {type(error).__name__}: {error}") from error
        answers: list[Answer] = []
        with self._tokenizing:
            for place, one in enumerate(asked):
                answers.append(one.answer(completions[str(place)]))
                self._count()
        return answers

    def _count(self, *, busy: int = 0) -> None:
        with self._counting:
            self._num_busy += busy
            self._num_done += 1


def row_seed(job_seed: int, identity: str) -> int:
    """The seed of a row's draws: it depends on the job's seed and the row alone.

    Args:
        job_seed: From the job's configuration.
        identity: The row's id, or its place in its file.

    Returns:
        A whole number below 2**64.
    """
    digest = blake2b(identity.encode(), key=job_seed.to_bytes(8, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def engine_name(name: str | None) -> str:
    """How the engine calls the expert that rows call `name`."""
    return UNNAMED if name is None else name
