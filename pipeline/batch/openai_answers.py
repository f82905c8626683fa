"""Answering the lines of OpenAI batch files: by the code that answers online, and in its words."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import pyarrow as pa

from pipeline.batch.answering import UNNAMED, Asked, Builder, Preparer
from pipeline.batch.openai_lines import LineIds, error_line, read_custom_id, read_request, result_line
from pipeline.batch.prepared import PreparedRow, Refusal
from pipeline.batch.rows import Row
from pipeline.batch.shard_stats import ShardStats, line_stats
from pipeline.engine.token_bytes import TokenBytes
from pipeline.engine.types import MAX_ANSWERS, Completion, Failure, Request
from pipeline.errors import ExpertError, InvalidRequestError, OutputError
from pipeline.openai_api.events import Ended
from pipeline.openai_api.http_errors import HttpError, coded_error
from pipeline.openai_api.protocol import Call, check_call, unknown_model
from pipeline.openai_api.responses import Answers
from pipeline.openai_api.token_texts import whole_text
from pipeline.package import Routing
from pipeline.routing import AUTO, Router

CREATED = 0
"""`created` of every answer: the time of an answer would make two runs of one job differ."""

_ANY_HINT = "Or set openai_models: any, and every model is answered by the job's expert."


@dataclass(frozen=True)
class BatchLimits:
    """What a body may ask for in a job: whatever there is, for nobody else waits."""

    max_tokens: int = 1 << 31
    max_answers: int = MAX_ANSWERS
    max_seconds: float = 86_400.0


@dataclass(frozen=True)
class OpenAIRules:
    """How the lines of a job are answered; the same on every worker.

    Args:
        models: From what a body's `model` may say to the expert that answers, by the engine's name for it.
        otherwise: The expert that answers any other `model`; None where that is an error.
        digests: The sha256 of each expert's package.
        fingerprint: The digest of the job's; the ids of answers are drawn from it.
        routings: What the manifests of named experts say of the prompts they are for, by name; `auto` chooses by them.
    """

    models: Mapping[str, str]
    otherwise: str | None
    digests: Mapping[str, str]
    fingerprint: str
    routings: Mapping[str, Routing] = field(default_factory=dict)

    @cached_property
    def router(self) -> Router:
        """Chooses the expert for a prompt, by the manifests."""
        return Router(self.routings)

    def expert(self, call: Call) -> str:
        """The expert that answers a call: the one of its model, or, for `auto`, the one that its prompt is for.

        Raises:
            UnknownModelError: None does.
            RoutingError: The prompt is for none.
        """
        model = call.model
        if model == AUTO and AUTO not in self.models and self.routings:
            return self.router.route(call.fields.get("prompt", call.fields.get("messages"))).expert
        name = self.models.get(model, self.otherwise)
        if name is None:
            raise unknown_model(model, self.models, hint=_ANY_HINT if UNNAMED in self.digests else "")
        return name


class LinePreparer:
    """Finds out what lines ask: in a worker, or in a task beside it.

    Args:
        rules: Of the job.
        preparers: Of the prompts of each expert, by the engine's name for it.
        seed_of: The seed of a row that brings none, by its identity.
    """

    def __init__(self, rules: OpenAIRules, preparers: Mapping[str, Preparer], seed_of: Callable[[str], int]) -> None:
        self._rules = rules
        self._preparers = preparers
        self._seed_of = seed_of

    def prepare(self, row: Row) -> PreparedRow:
        """What a line asks; a line that cannot be read asks nothing."""
        if row.failure is not None:
            return PreparedRow()
        try:
            custom_id = read_custom_id(row)
            call = read_line_call(row)
            expert = self._rules.expert(call)
            if call.model == AUTO and expert in self._rules.routings:
                call = replace(call, model=expert)  # the answer says who gave it
            options = {"seed": self._seed_of(f"id:{custom_id}"), **call.options}
            prompt = self._preparers[expert].prepare(**call.fields, options=options)
        except ExpertError as error:
            return PreparedRow(refusal=Refusal.of(error))
        return PreparedRow(expert, prompt, call=replace(call, fields={}, options={}))


class LineAnswers:
    """Answers lines by lines: a part is all lines of a shard, and the same rows give the same bytes.

    See `answering.AnswerForm`.

    Args:
        rules: Of the job.
        builders: Of the requests of each expert, by the engine's name for it.
        seed_of: The seed of a row that brings none, by its identity.
    """

    def __init__(
        self,
        rules: OpenAIRules,
        builders: Mapping[str, Builder],
        seed_of: Callable[[str], int],
    ) -> None:
        self._rules = rules
        self._builders = builders
        self._preparer = LinePreparer(rules, builders, seed_of)
        self._token_bytes = {name: TokenBytes(builder.tokenizer) for name, builder in builders.items()}

    def prepare(self, row: Row) -> PreparedRow:
        """What a line asks; see `LinePreparer.prepare`."""
        return self._preparer.prepare(row)

    def ask(self, request_id: str, row: Row, prepared: PreparedRow) -> Asked[bytes]:
        """What the engine is asked for a line; nothing where the line is refused.

        Args:
            request_id: For the engine.
            row: From a line of a batch file.
            prepared: What it asks.

        Its answer raises OutputError where the engine has lost one of several.
        """
        ids = LineIds.of(self._rules.fingerprint, row.identity)
        if row.failure is not None:
            return _refused(ids, None, coded_error(row.failure.code, row.failure.message, status=400))
        if prepared.refusal is not None:
            refusal = prepared.refusal
            return _refused(ids, _custom_id_of(row), _told(refusal.code, refusal.message, refusal.hint))
        if prepared.prompt is None or prepared.call is None or prepared.expert is None:
            raise TypeError(f"{row.identity} is prepared as no line is")
        request = self._builders[prepared.expert].request(request_id, prepared.prompt)
        line = _Line(ids, read_custom_id(row), prepared.call, prepared.expert, request)
        return Asked(request, partial(self._line, line))

    def fail(self, row: Row, failure: Failure) -> bytes:
        """The line of a row that is given up.

        Args:
            row: From a line of a batch file.
            failure: Why.
        """
        ids = LineIds.of(self._rules.fingerprint, row.identity)
        return error_line(ids, _custom_id_of(row), _told(failure.code, failure.message))

    def encode(self, answers: Sequence[bytes], table: pa.Table) -> bytes:  # noqa: ARG002 - lines do not repeat the rows
        """The part of a shard."""
        return b"".join(answers)

    def stats(self, rows: Sequence[Row], answers: Sequence[bytes], seconds: float) -> ShardStats:
        """How a shard was answered."""
        return line_stats(rows, answers, seconds)

    def _line(self, asked: "_Line", completions: Sequence[Completion]) -> bytes:
        answers = Answers(
            asked.call, asked.ids.answer(asked.call.kind), digest=self._rules.digests[asked.expert], created=CREATED
        )
        answers.prompt_tokens = len(asked.request.prompt_token_ids)
        for completion in sorted(completions, key=lambda completion: completion.index):
            if completion.failure is not None:
                failure = completion.failure
                return error_line(asked.ids, asked.custom_id, _told(failure.code, failure.message))
            answers.add(whole_text(completion, self._token_bytes[asked.expert]))
            answers.end(Ended(completion.finish_reason, completion.completion_tokens, completion.index))
        if answers.num_missing:
            raise OutputError(
                f"{asked.ids.line} has neither an answer nor a failure", hint="Report this: it is a mistake of ours."
            )
        return result_line(asked.ids, asked.custom_id, answers.content())


@dataclass(frozen=True)
class _Line:
    """A line whose request is on its way."""

    ids: LineIds
    custom_id: str
    call: Call
    expert: str
    request: Request


def _custom_id_of(row: Row) -> str | None:
    """What a line's answer shall be known by; None where it does not say so."""
    try:
        return read_custom_id(row)
    except InvalidRequestError:
        return None


def _refused(ids: LineIds, custom_id: str | None, error: HttpError) -> Asked[bytes]:
    line = error_line(ids, custom_id, error)
    return Asked(None, lambda _: line)


def read_line_call(row: Row) -> Call:
    """The checked body of a line.

    Raises:
        UnknownRouteError: Nothing is answered at the line's URL.
        InvalidRequestError: The line or its body is wrong, or asks for what only a service can give.
    """
    call = check_call(*read_request(row), BatchLimits())
    if call.is_streamed:
        raise InvalidRequestError(
            "stream is not supported in a batch file", hint="Leave it out; every answer comes whole."
        )
    if call.timeout is not None:
        raise InvalidRequestError(
            "timeout is not supported in a batch file", hint="Leave it out; nobody waits for a single answer."
        )
    return call


def _told(code: str, message: str, hint: str | None = None) -> HttpError:
    """An error in OpenAI's shape. The job's owner reads it: nothing is kept back, as it is from a service's clients."""
    return coded_error(code, message, hint, hides_inside=False)
