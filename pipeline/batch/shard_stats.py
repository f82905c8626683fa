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
from pipeline.batch.parts import AnsweredRow, PartFormat, failure_of

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
    prompts, completions, reasons = Histogram(), Histogram(), Counter[str]()
    samples: dict[str, list[ErrorSample]] = {}
    for row in rows:
        failure, completion = failure_of(row, form), row.completion
        if failure is not None or completion is None:
            reasons["error"] += 1
            if failure is not None:
                found = samples.setdefault(failure.code, [])
                if len(found) < SAMPLES_PER_CODE:
                    found.append(ErrorSample(_shortened(row.row.identity), _shortened(failure.message)))
            continue
        reasons[completion.finish_reason] += 1
        prompts.add(completion.prompt_tokens)
        completions.add(completion.completion_tokens)
    return ShardStats(seconds, _this_worker(), prompts, completions, dict(reasons), samples)


@cache
def _this_worker() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"


def _shortened(text: str) -> str:
    """The beginning of a text, as UTF-8 can hold it."""
    return text[:MAX_SAMPLE_CHARACTERS].encode(errors="replace").decode()
