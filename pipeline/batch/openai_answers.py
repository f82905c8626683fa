"""Answering the lines of OpenAI batch files: by the code that answers online, and in its words."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from pipeline.batch.openai_lines import LineIds, error_line, read_custom_id, read_request, result_line
from pipeline.batch.rows import Row
from pipeline.engine.requests import RequestBuilder
from pipeline.engine.token_bytes import TokenBytes
from pipeline.engine.types import MAX_ANSWERS, Completion, Engine, Failure, Request
from pipeline.errors import ExpertError, InvalidRequestError, OutputError
from pipeline.openai_api.events import Ended
from pipeline.openai_api.http_errors import HttpError, coded_error
from pipeline.openai_api.protocol import Call, check_call, unknown_model
from pipeline.openai_api.responses import Answers
from pipeline.openai_api.token_texts import whole_text

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
        models: From what a body's `model` may say to the expert that answers, by its name in the job.
        otherwise: The expert that answers any other `model`; None where that is an error.
        digests: The sha256 of each expert's package.
        fingerprint: The digest of the job's; the ids of answers are drawn from it.
    """

    models: Mapping[str, str]
    otherwise: str | None
    digests: Mapping[str, str]
    fingerprint: str

    def expert(self, model: str) -> str:
        """The expert that answers for a model.

        Raises:
            UnknownModelError: None does.
        """
        name = self.models.get(model, self.otherwise)
        if name is None:
            raise unknown_model(model, self.models, hint=_ANY_HINT if len(self.digests) == 1 else "")
        return name


class LineAnswers:
    """Answers lines.

    Args:
        rules: Of the job.
        engine: Computes.
        builders: Of the requests of each expert, by its name in the job.
        seed_of: The seed of a row that brings none, by its identity.
    """

    def __init__(
        self,
        rules: OpenAIRules,
        engine: Engine,
        builders: Mapping[str, RequestBuilder],
        seed_of: Callable[[str], int],
    ) -> None:
        self._rules = rules
        self._engine = engine
        self._builders = builders
        self._seed_of = seed_of
        self._token_bytes = {name: TokenBytes(builder.tokenizer) for name, builder in builders.items()}

    def answer(self, rows: Sequence[Row]) -> list[bytes]:
        """The line of each row, in order: a part is all lines of a shard. The same rows give the same bytes.

        Args:
            rows: Rows of a shard, each from a line of a batch file.

        Raises:
            InferenceError: The engine has died; nothing of the shard is lost but time.
            OutputError: The engine lost an answer.
        """
        asked = [self._ask(str(position), row) for position, row in enumerate(rows)]
        requests = [one.request for one in asked if isinstance(one, _Asked)]
        completions: dict[str, list[Completion]] = defaultdict(list)
        for completion in self._engine.generate(requests):
            completions[completion.request_id].append(completion)
        return [self._line(one, completions) for one in asked]

    def fail(self, row: Row, failure: Failure) -> bytes:
        """The line of a row that is given up.

        Args:
            row: From a line of a batch file.
            failure: Why.
        """
        custom_id: str | None = None
        with suppress(InvalidRequestError):
            custom_id = read_custom_id(row)
        ids = LineIds.of(self._rules.fingerprint, row.identity)
        return error_line(ids, custom_id, _told(failure.code, failure.message))

    def _ask(self, request_id: str, row: Row) -> "_Asked | _Refused":
        ids = LineIds.of(self._rules.fingerprint, row.identity)
        if row.failure is not None:
            return _Refused(ids, None, coded_error(row.failure.code, row.failure.message, status=400))
        custom_id: str | None = None
        try:
            custom_id = read_custom_id(row)
            call = read_line_call(row)
            expert = self._rules.expert(call.model)
            options = {"seed": self._seed_of(f"id:{custom_id}"), **call.options}
            request = self._builders[expert].build(request_id, **call.fields, options=options)
        except ExpertError as error:
            return _Refused(ids, custom_id, _told(error.code, error.message, error.hint))
        return _Asked(ids, custom_id, call, expert, request)

    def _line(self, one: "_Asked | _Refused", completions: Mapping[str, Sequence[Completion]]) -> bytes:
        if isinstance(one, _Refused):
            return error_line(one.ids, one.custom_id, one.error)
        answers = Answers(
            one.call, one.ids.answer(one.call.kind), digest=self._rules.digests[one.expert], created=CREATED
        )
        answers.prompt_tokens = len(one.request.prompt_token_ids)
        for completion in sorted(completions.get(one.request.id, ()), key=lambda completion: completion.index):
            if completion.failure is not None:
                failure = completion.failure
                return error_line(one.ids, one.custom_id, _told(failure.code, failure.message))
            answers.add(whole_text(completion, self._token_bytes[one.expert]))
            answers.end(Ended(completion.finish_reason, completion.completion_tokens, completion.index))
        if answers.num_missing:
            raise OutputError(
                f"{one.ids.line} has neither an answer nor a failure", hint="Report this: it is a mistake of ours."
            )
        return result_line(one.ids, one.custom_id, answers.content())


@dataclass(frozen=True)
class _Asked:
    """A line whose request is on its way."""

    ids: LineIds
    custom_id: str
    call: Call
    expert: str
    request: Request


@dataclass(frozen=True)
class _Refused:
    """A line that is not answered."""

    ids: LineIds
    custom_id: str | None
    error: HttpError


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
