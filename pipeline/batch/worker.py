"""The actor of a batch job: it holds one engine and answers shards."""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline.batch.commit import JobOutput, Receipt
from pipeline.batch.config import ResolvedColumns
from pipeline.batch.openai_answers import LineAnswers, OpenAIRules
from pipeline.batch.parts import AnsweredRow, PartFormat, encode_part
from pipeline.batch.rows import Row, iter_rows
from pipeline.batch.shards import Shard
from pipeline.engine.types import Completion, Failure, Request
from pipeline.errors import ExpertError, IntegrityError, InvalidRequestError
from pipeline.package import open_package

if TYPE_CHECKING:
    from pipeline.engine.runtime import EngineName, LoadedExpert


@dataclass(frozen=True)
class WorkerJob:
    """Everything a worker is told; it travels to every actor once."""

    package: str
    package_sha256: str
    base_path: str
    cache_dir: str | None
    device: str | None
    dtype: str | None
    quantization: str
    num_threads: int | None
    engine: "EngineName"
    batch_size: int
    max_batch_tokens: int | None
    kv_cache_bytes: int | None
    options: Mapping[str, Any]
    columns: ResolvedColumns
    seed: int
    output: JobOutput
    part_format: PartFormat
    openai: OpenAIRules | None = None


class ShardWorker:
    """Answers one shard a call and commits it; only the receipt goes back.

    Args:
        job: What to answer with, and where to write.
    """

    def __init__(self, job: WorkerJob) -> None:
        self._job = job
        # Ray reports an actor that cannot be made without its reason; so this one is made, and its first shard says it.
        self._failure: ExpertError | None = None
        try:
            self._expert = _load(job)
            self._lines = None if job.openai is None else _line_answers(job, job.openai, self._expert)
        except ExpertError as error:
            self._failure = error

    def __call__(self, block: pa.Table) -> pa.Table:
        """Answer the shards of a block; see `blocks.shard_block` for its form.

        Returns:
            A row a shard: `receipt` (JSON) and `seconds` (of work).

        Raises:
            ExpertError: The expert cannot be loaded on this machine, or a part cannot be written.
        """
        if self._failure is not None:
            raise self._failure
        receipts, seconds = [], []
        for text, rows in zip(block["shard"].to_pylist(), block["rows"].to_pylist(), strict=True):
            started = time.monotonic()
            shard = Shard.from_json(text)
            with pa.ipc.open_stream(rows) as reader:
                table = reader.read_all()
            receipts.append(self._answer(shard, table).to_json())
            seconds.append(time.monotonic() - started)
        return pa.table({"receipt": receipts, "seconds": seconds})

    def _answer(self, shard: Shard, table: pa.Table) -> Receipt:
        form = self._job.part_format
        rows = list(iter_rows(shard, table))
        if self._lines is not None:
            return self._job.output.commit(shard.index, b"".join(self._lines.answer(rows)))
        answers: dict[str, Completion] = {}
        requests: list[Request] = []
        for position, row in enumerate(rows):
            if row.failure is not None or form.misfit(row.values) is not None:
                continue
            try:
                requests.append(self._request(str(position), row))
            except ExpertError as error:
                answers[str(position)] = _failed(str(position), error)
        answers |= {completion.request_id: completion for completion in self._expert.engine.generate(requests)}
        answered = [AnsweredRow(row, answers.get(str(position))) for position, row in enumerate(rows)]
        return self._job.output.commit(shard.index, encode_part(answered, form, table))

    def _request(self, request_id: str, row: Row) -> Request:
        columns = self._job.columns
        fields = {
            field: row.values.get(column)
            for field, column in vars(columns).items()
            if column is not None and field in ("prompt", "messages", "schema", "system", "dialect")
        }
        messages = fields.get("messages")
        if isinstance(messages, str):
            fields["messages"] = _messages_from_json(messages)
        identity = row.values.get(columns.id) if columns.id is not None else None
        seed = row_seed(self._job.seed, row.identity if identity is None else f"id:{identity}")
        own = {option: row.values.get(column) for option, column in columns.sampling.items()}
        options = {"seed": seed, **{option: value for option, value in own.items() if value is not None}}
        return self._expert.requests.build(request_id, **fields, options=options)


def _load(job: WorkerJob) -> "LoadedExpert":
    import torch

    from pipeline.engine.runtime import load_expert

    if job.num_threads is not None:
        torch.set_num_threads(min(job.num_threads, os.cpu_count() or 1))
    package = open_package(job.package, cache_dir=None if job.cache_dir is None else Path(job.cache_dir))
    if package.digest != job.package_sha256:
        raise IntegrityError(
            f"{job.package} is not the package the job was planned with",
            details=(f"there {package.digest}, planned {job.package_sha256}",),
            hint="Do not replace a package while a job runs; start the job again in another output folder.",
        )
    return load_expert(
        package,
        Path(job.base_path),
        device=job.device,
        dtype=job.dtype,
        quantization=job.quantization,
        engine=job.engine,
        batch_size=job.batch_size,
        max_batch_tokens=job.max_batch_tokens,
        kv_cache_bytes=job.kv_cache_bytes,
        options=job.options,
    )


def _line_answers(job: WorkerJob, rules: OpenAIRules, expert: "LoadedExpert") -> LineAnswers:
    builders = dict.fromkeys(rules.digests, expert.requests)  # one name: a job has one expert
    return LineAnswers(rules, expert.engine, builders, partial(row_seed, job.seed))


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


def _messages_from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidRequestError(
            f"messages is text that is not JSON: {error}", hint="Give a list of {role, content}, or that list as JSON."
        ) from error


def _failed(request_id: str, error: ExpertError) -> Completion:
    return Completion(request_id, "", "error", 0, 0, Failure(error.code, error.message))
