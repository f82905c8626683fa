"""From the rows of a shard to requests and back: which expert, which fields, which options, which seed."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.batch.config import ResolvedColumns
from pipeline.batch.parts import PartFormat
from pipeline.batch.rows import Row
from pipeline.engine.types import Completion, Engine, Failure, Request
from pipeline.errors import ExpertError, IntegrityError, InvalidRequestError, UnknownModelError
from pipeline.package import open_package

if TYPE_CHECKING:
    from pipeline.engine.runtime import EngineName
    from pipeline.package import ExpertPackage

FIELDS = ("prompt", "messages", "schema", "system", "dialect")
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
    """

    name: str | None
    package: str
    sha256: str
    label: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class EngineJob:
    """What a worker loads, and how it makes requests of rows.

    Args:
        experts: Over one base model; those with a name are held side by side.
        base_path: The base model's directory.
        num_threads: Threads to compute with on a CPU; None for torch's own number.
        columns, seed: As the job's.
        cache_dir, device, dtype, quantization, engine, batch_size, max_batch_tokens, kv_cache_bytes: See `BatchConfig`.
    """

    experts: tuple[JobExpert, ...]
    base_path: str
    columns: ResolvedColumns
    seed: int = 0
    cache_dir: str | None = None
    device: str | None = None
    dtype: str | None = None
    quantization: str = "none"
    num_threads: int | None = None
    engine: "EngineName" = "packed"
    batch_size: int = 128
    max_batch_tokens: int | None = None
    kv_cache_bytes: int | None = None


class Builder(Protocol):
    """Makes the requests of one expert; `pipeline.engine.requests.RequestBuilder` is one."""

    def build(
        self,
        request_id: str,
        *,
        prompt: Any = None,
        messages: Any = None,
        schema: Any = None,
        dialect: str | None = None,
        system: Any = None,
        options: Mapping[str, Any] | None = None,
    ) -> Request:
        """Check, template and tokenise one row; raises ExpertError where it cannot be asked."""
        ...


@dataclass(frozen=True)
class LoadedEngine:
    """An engine that is ready, and what makes requests for it, by the name that rows give."""

    engine: Engine
    builders: Mapping[str | None, Builder]


Loader = Callable[[EngineJob], LoadedEngine]
"""How a worker comes to its engine: the seam for one that computes nothing."""


def load_engine(job: EngineJob) -> LoadedEngine:
    """Load the job's experts on this machine: one alone is merged into the base model, several stand side by side.

    Raises:
        IntegrityError: A package is not the one that the job was planned with.
        LoadError: A package or the base model cannot be used.
    """
    import torch

    from pipeline.engine.runtime import load_expert, load_experts

    if job.num_threads is not None:
        torch.set_num_threads(min(job.num_threads, os.cpu_count() or 1))
    packages = [_open(expert, job.cache_dir) for expert in job.experts]
    if [expert.name for expert in job.experts] == [None]:
        loaded = load_expert(
            packages[0],
            Path(job.base_path),
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
    names = [UNNAMED if expert.name is None else expert.name for expert in job.experts]
    beside = load_experts(
        dict(zip(names, packages, strict=True)),
        Path(job.base_path),
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


def _open(expert: JobExpert, cache_dir: str | None) -> "ExpertPackage":
    package = open_package(expert.package, cache_dir=None if cache_dir is None else Path(cache_dir))
    if package.digest != expert.sha256:
        raise IntegrityError(
            f"{expert.package} is not the package the job was planned with",
            details=(f"there {package.digest}, planned {expert.sha256}",),
            hint="Do not replace a package while a job runs; start the job again in another output folder.",
        )
    return package


class EngineFailedError(Exception):
    """The engine raised, rather than to answer: it can do no more. Not an error for a user; the worker ends itself."""


class Answering:
    """Answers rows with a loaded engine, from any number of threads at a time.

    Args:
        job: How rows become requests.
        loaded: Who answers.
        form: Which rows can be written.
    """

    def __init__(self, job: EngineJob, loaded: LoadedEngine, form: PartFormat) -> None:
        self._job = job
        self._loaded = loaded
        self._form = form
        self._experts = {expert.name: expert for expert in job.experts}
        self._building = Lock()  # tokenizers are not made for several threads
        self._counting = Lock()
        self._num_busy = 0
        self._num_done = 0

    def answer(self, rows: Sequence[Row]) -> list[Completion | None]:
        """The answer to each row, in order; None where the row itself has a failure.

        Raises:
            EngineFailedError: The engine can do no more.
        """
        self._count(busy=1)
        try:
            return self._answer(rows)
        finally:
            self._count(busy=-1)

    def expert_of(self, row: Row) -> JobExpert | None:
        """The expert that a row names, or the one of rows that name none; None when there is no such expert."""
        name = self._name(row)
        return self._experts.get(name) if name is None or isinstance(name, str) else None

    def progress(self) -> tuple[int, int] | None:
        """Something that changes with each step, each row and each answer; None when there is nothing to answer."""
        return (self._loaded.engine.stats().num_steps, self._num_done) if self._num_busy else None

    def _answer(self, rows: Sequence[Row]) -> list[Completion | None]:
        answers: dict[str, Completion] = {}
        requests: list[Request] = []
        with self._building:
            for place, row in enumerate(rows):
                if row.failure is not None or self._form.misfit(row.values) is not None:
                    continue
                try:
                    requests.append(self._request(str(place), row))
                except ExpertError as error:
                    answers[str(place)] = failed(str(place), error)
                self._count()
        # Neighbours share what they can: an expert, and the beginning of their prompts.
        requests.sort(key=lambda request: (request.expert or "", request.prompt_token_ids))
        try:
            for completion in self._loaded.engine.generate(requests):
                answers[completion.request_id] = completion
                self._count()
        except Exception as error:  # whatever an engine raises, it was to answer each row, or to fail that row
            raise EngineFailedError(f"the engine stopped: {type(error).__name__}: {error}") from error
        return [answers.get(str(place)) for place in range(len(rows))]

    def _request(self, request_id: str, row: Row) -> Request:
        columns = self._job.columns
        expert = self.expert_of(row)
        if expert is None:
            raise _unknown_expert(self._name(row), [name for name in self._experts if name is not None])
        fields: dict[str, Any] = {
            name: row.values.get(column) for name in FIELDS if (column := getattr(columns, name)) is not None
        }
        messages = fields.get("messages")
        if isinstance(messages, str):
            fields["messages"] = _messages_from_json(messages)
        identity = row.values.get(columns.id) if columns.id is not None else None
        seed = row_seed(self._job.seed, row.identity if identity is None else f"id:{identity}")
        own = {option: row.values.get(column) for option, column in columns.sampling.items()}
        options = {"seed": seed, **{option: value for option, value in own.items() if value is not None}}
        return self._loaded.builders[expert.name].build(request_id, **fields, options=options)

    def _name(self, row: Row) -> Any:
        column = self._job.columns.expert
        return None if column is None else row.values.get(column)

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


def failed(request_id: str, error: ExpertError) -> Completion:
    """The answer to a row that cannot be asked."""
    return Completion(request_id, "", "error", 0, 0, Failure(error.code, error.message))


def _unknown_expert(name: Any, names: Sequence[str]) -> ExpertError:
    if name is None:
        return InvalidRequestError(
            "the row names no expert", hint="Name one, or give `expert` for the rows that name none."
        )
    hint = f"There are: {', '.join(names) or 'none'}."
    if not isinstance(name, str):
        return InvalidRequestError(f"the expert's name is a {type(name).__name__}, not text", hint=hint)
    return UnknownModelError(f"there is no expert {name[:80]!r} in this job", hint=hint)


def _messages_from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidRequestError(
            f"messages is text that is not JSON: {error}", hint="Give a list of {role, content}, or that list as JSON."
        ) from error
