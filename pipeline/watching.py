"""What is counted, measured and traced of a prompt: once, when it is over, whoever asked and however."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.engine.handle import Handle
from pipeline.engine.types import Completion
from pipeline.errors import ExpertError
from pipeline.metrics import AnswerMetrics, AnswerTimes
from pipeline.package import ExpertPackage
from pipeline.tracing import Span, begin_span

SPAN = "expert.generate"


@dataclass(frozen=True)
class Watch:
    """Takes note of one prompt.

    Args:
        expert: The expert's name.
        asked_at: When it was asked, by `time.monotonic()`.
        span: Its span.
        metrics: Takes note, too; None where nobody wants to know.
    """

    expert: str
    asked_at: float
    span: Span
    metrics: AnswerMetrics | None

    @classmethod
    def begin(cls, package: ExpertPackage, asked_at: float, now: float, metrics: AnswerMetrics | None) -> "Watch":
        """Begin to watch a prompt for an expert."""
        manifest = package.manifest
        about = {
            "gen_ai.operation.name": "chat",
            "gen_ai.request.model": manifest.name,
            "gen_ai.response.model": package.label,
            "expert.sha256": package.digest,
        }
        return cls(manifest.name, asked_at, begin_span(SPAN, about, seconds_ago=now - asked_at), metrics)

    @property
    def is_idle(self) -> bool:
        """Whether nobody wants to know."""
        return self.metrics is None and not self.span.is_recorded

    def follow(self, handle: Handle) -> None:
        """Take note of a request when it is over."""
        if not self.is_idle:
            handle.add_done_callback(self._note)

    def refuse(self, error: ExpertError, now: float) -> None:
        """Take note of a prompt that cannot be asked."""
        if self.metrics is not None:
            self.metrics.note(AnswerTimes(self.expert, self.asked_at, now, code=error.code))
        self.span.fail(error.code, error.message)
        self.span.end()

    def _note(self, handle: Handle) -> None:
        try:
            completions = handle.result()
        except ExpertError as error:
            self.refuse(error, handle.ended_at or self.asked_at)
            return
        times, first = self._times(handle, completions), completions[0]
        if self.metrics is not None:
            self.metrics.note(times)
        reasons = [one.finish_reason for one in completions]
        self.span.set(times.attributes() | {"gen_ai.response.finish_reasons": reasons})
        if first.failure is not None:
            self.span.fail(first.failure.code, first.failure.message)
        self.span.end()

    def _times(self, handle: Handle, completions: Sequence[Completion]) -> AnswerTimes:
        first = completions[0]
        return AnswerTimes(
            expert=self.expert,
            asked=self.asked_at,
            ended=handle.ended_at or self.asked_at,
            begun=handle.begun_at,
            first=handle.first_at,
            prompt_tokens=first.prompt_tokens,
            completion_tokens=sum(one.completion_tokens for one in completions),
            num_steps=max(one.completion_tokens for one in completions),
            finish_reason=first.finish_reason,
            code=None if first.failure is None else first.failure.code,
        )
