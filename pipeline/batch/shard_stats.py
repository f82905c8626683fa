"""What a worker tells the driver of a shard beside its receipt: not what is in the part, but how it came to be.

It is small whatever the number of rows, so a report needs no second look at the parts.
"""

import json
import os
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from pipeline.batch.histogram import Histogram
from pipeline.batch.openai_lines import line_counts, line_finish_reason
from pipeline.batch.parts import AnsweredRow, PartFormat, failure_of
from pipeline.batch.rows import Row
from pipeline.engine.types import Failure

SAMPLES_PER_CODE = 3
MAX_SAMPLE_CHARACTERS = 300


@dataclass(frozen=True)
class ErrorSample:
    """One row that could not be answered.

    Args:
        row: Its identity: its place in its file.
        message: Why; the beginning of a long text.
    """

    row: str
    message: str


@dataclass(frozen=True)
class ShardStats:
    """How a shard was answered.

    Args:
        seconds: From its first row to its commit.
        worker: What tells its worker from the others: host and process.
        prompt_tokens: Lengths of the prompts of rows that were answered.
        completion_tokens: Lengths of their answers.
        finish_reasons: Rows by the reason why their answer ended.
        error_samples: Some rows of each error code.
    """

    seconds: float
    worker: str = ""
    prompt_tokens: Histogram = field(default_factory=Histogram)
    completion_tokens: Histogram = field(default_factory=Histogram)
    finish_reasons: Mapping[str, int] = field(default_factory=dict)
    error_samples: Mapping[str, Sequence[ErrorSample]] = field(default_factory=dict)

    def to_json(self) -> str:
        """One line of JSON."""
        samples = {
            code: [[sample.row, sample.message] for sample in found] for code, found in self.error_samples.items()
        }
        values = {
            "seconds": self.seconds,
            "worker": self.worker,
            "prompt_tokens": self.prompt_tokens.to_dict(),
            "completion_tokens": self.completion_tokens.to_dict(),
            "finish_reasons": dict(self.finish_reasons),
            "error_samples": samples,
        }
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str) -> "ShardStats":
        """What `to_json` wrote."""
        values: dict[str, Any] = json.loads(text)
        return cls(
            seconds=values["seconds"],
            worker=values["worker"],
            prompt_tokens=Histogram.from_dict(values["prompt_tokens"]),
            completion_tokens=Histogram.from_dict(values["completion_tokens"]),
            finish_reasons=values["finish_reasons"],
            error_samples={
                code: [ErrorSample(row, message) for row, message in found]
                for code, found in values["error_samples"].items()
            },
        )


def shard_stats(rows: Sequence[AnsweredRow], form: PartFormat, seconds: float) -> ShardStats:
    """What there is to tell of a shard.

    Args:
        rows: All its rows, answered.
        form: How the job's parts are written.
        seconds: How long it took.
    """
    tally = _Tally()
    for row in rows:
        failure, completion = failure_of(row, form), row.completion
        if completion is not None and failure is None:
            tally.answered(completion.finish_reason, completion.prompt_tokens, completion.completion_tokens)
        else:
            tally.failed(row.row, failure)
    return tally.stats(seconds)


def line_stats(rows: Sequence[Row], lines: Sequence[bytes], seconds: float) -> ShardStats:
    """What there is to tell of a shard of an OpenAI batch file.

    Args:
        rows: All its rows.
        lines: Their answers; of one with several choices, the first tells the reason why it ended.
        seconds: How long it took.
    """
    tally = _Tally()
    for row, line in zip(rows, lines, strict=True):
        error, prompt_tokens, completion_tokens = line_counts(line)
        if error is None:
            tally.answered(line_finish_reason(line), prompt_tokens, completion_tokens)
        else:
            tally.failed(row, Failure(error["code"], error["message"]))
    return tally.stats(seconds)


class _Tally:
    """Stats that are being counted."""

    def __init__(self) -> None:
        self._prompts, self._completions = Histogram(), Histogram()
        self._reasons = Counter[str]()
        self._samples: dict[str, list[ErrorSample]] = {}

    def answered(self, finish_reason: str, prompt_tokens: int, completion_tokens: int) -> None:
        self._reasons[finish_reason] += 1
        self._prompts.add(prompt_tokens)
        self._completions.add(completion_tokens)

    def failed(self, row: Row, failure: Failure | None) -> None:
        self._reasons["error"] += 1
        if failure is not None:
            found = self._samples.setdefault(failure.code, [])
            if len(found) < SAMPLES_PER_CODE:
                found.append(ErrorSample(_shortened(row.identity), _shortened(failure.message)))

    def stats(self, seconds: float) -> ShardStats:
        return ShardStats(seconds, _this_worker(), self._prompts, self._completions, dict(self._reasons), self._samples)


@cache
def _this_worker() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"


def _shortened(text: str) -> str:
    """The beginning of a text, as UTF-8 can hold it."""
    return text[:MAX_SAMPLE_CHARACTERS].encode(errors="replace").decode()
