"""The rows of a dataset as requests, and their answers as rows: which expert, fields, options and seed."""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import pyarrow as pa

from pipeline.batch.answering import Asked, Builder, EngineJob, JobExpert, Preparer, engine_name, row_seed
from pipeline.batch.parts import AnsweredRow, PartFormat, encode_part
from pipeline.batch.prepared import PreparedRow, Refusal
from pipeline.batch.rows import Row
from pipeline.batch.shard_stats import ShardStats, shard_stats
from pipeline.batch.template import PromptTemplate
from pipeline.engine.requests import PreparedPrompt
from pipeline.engine.types import Completion, Failure
from pipeline.errors import ExpertError, InvalidRequestError, UnknownModelError
from pipeline.routing import AUTO, Router

FIELDS = ("prompt", "messages", "schema", "system", "dialect")


class RowPreparer:
    """Finds out what rows ask: in a worker, or in a task beside it.

    Args:
        job: How rows become requests.
        preparers: Of the rows of each expert, by the name that rows give.
        form: How answers are written, and so which rows can be.
    """

    def __init__(self, job: EngineJob, preparers: Mapping[str | None, Preparer], form: PartFormat) -> None:
        self._job = job
        self._preparers = preparers
        self._form = form
        self._template = None if job.prompt_template is None else PromptTemplate.parse(job.prompt_template)
        self._experts = {expert.name: expert for expert in job.experts}
        self._routings = {expert.name: expert.routing for expert in job.experts if expert.name is not None}

    def prepare(self, row: Row) -> PreparedRow:
        """What a row asks; nothing where its answer could not be written."""
        by = self.expert_of(row)
        name = None if by is None else engine_name(by.name)
        if row.failure is not None or self._form.misfit(row.values) is not None:
            return PreparedRow(name)
        try:
            return PreparedRow(name, self._prompt(row, by))
        except ExpertError as error:
            return PreparedRow(name, refusal=Refusal.of(error))

    def expert_of(self, row: Row) -> JobExpert | None:
        """The expert that a row names, or the one of rows that name none; None when there is no such expert.

        Of a row that says `auto`, where no expert is called so, the one that its prompt is for.
        """
        name = self._name(row)
        if name == AUTO and AUTO not in self._experts:
            try:
                name = self._route(row)
            except ExpertError:
                return None
        return self._experts.get(name) if name is None or isinstance(name, str) else None

    @cached_property
    def _router(self) -> Router:
        return Router(self._routings)

    def _route(self, row: Row) -> str:
        """The name of the expert that a row's prompt is for."""
        fields = self._fields(row)
        return self._router.route(fields.get("prompt") if fields.get("messages") is None else fields["messages"]).expert

    def _prompt(self, row: Row, expert: JobExpert | None) -> PreparedPrompt:
        columns = self._job.columns
        if expert is None and self._name(row) == AUTO:
            self._route(row)
        if expert is None:
            raise _unknown_expert(self._name(row), [name for name in self._experts if name is not None])
        fields = self._fields(row)
        identity = row.values.get(columns.id) if columns.id is not None else None
        seed = row_seed(self._job.seed, row.identity if identity is None else f"id:{identity}")
        own = {option: row.values.get(column) for option, column in columns.sampling.items()}
        options = {"seed": seed, **{option: value for option, value in own.items() if value is not None}}
        return self._preparers[expert.name].prepare(**fields, options=options)

    def _fields(self, row: Row) -> dict[str, Any]:
        columns = self._job.columns
        fields: dict[str, Any] = {
            name: row.values.get(column) for name in FIELDS if (column := getattr(columns, name)) is not None
        }
        if self._template is not None:
            fields["prompt"] = self._template.render(row.values)
        messages = fields.get("messages")
        if isinstance(messages, str):
            fields["messages"] = _messages_from_json(messages)
        return fields

    def _name(self, row: Row) -> Any:
        column = self._job.columns.expert
        return None if column is None else row.values.get(column)


class RowAnswers:
    """Answers rows by `AnsweredRow`s; see `answering.AnswerForm`.

    Args:
        job: How rows become requests.
        builders: Of the requests of each expert, by the name that rows give.
        form: How answers are written, and so which rows can be.
    """

    def __init__(self, job: EngineJob, builders: Mapping[str | None, Builder], form: PartFormat) -> None:
        self._preparer = RowPreparer(job, builders, form)
        self._form = form
        self._by_name = {
            engine_name(expert.name): (expert, builders[expert.name])
            for expert in job.experts
            if expert.name in builders
        }

    def prepare(self, row: Row) -> PreparedRow:
        """What a row asks; see `RowPreparer.prepare`."""
        return self._preparer.prepare(row)

    def ask(self, request_id: str, row: Row, prepared: PreparedRow) -> Asked[AnsweredRow]:
        """What the engine is asked for a row."""
        expert, builder = (None, None) if prepared.expert is None else self._by_name[prepared.expert]
        refusal = prepared.refusal
        if refusal is not None:
            refused = _failed(row, Failure(refusal.code, refusal.message), expert)
            return Asked(None, lambda _: refused)

        def answer(completions: Sequence[Completion]) -> AnsweredRow:
            return AnsweredRow(row, completions[0] if completions else None, expert)

        if prepared.prompt is None or builder is None:
            return Asked(None, answer)
        return Asked(builder.request(request_id, prepared.prompt), answer)

    def fail(self, row: Row, failure: Failure) -> AnsweredRow:
        """The answer to a row that is given up."""
        return _failed(row, failure, self._preparer.expert_of(row))

    def encode(self, answers: Sequence[AnsweredRow], table: pa.Table) -> bytes:
        """The part of a shard; see `parts.encode_part`."""
        return encode_part(answers, self._form, table)

    def stats(self, rows: Sequence[Row], answers: Sequence[AnsweredRow], seconds: float) -> ShardStats:  # noqa: ARG002
        """How a shard was answered."""
        return shard_stats(answers, self._form, seconds)


def _failed(row: Row, failure: Failure, by: JobExpert | None) -> AnsweredRow:
    return AnsweredRow(row, Completion(row.identity, "", "error", 0, 0, failure), by)


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
