"""Every error a user can meet.

    ExpertError
    ├── ConfigError                     a configuration file, option or argument is wrong
    ├── MissingDependencyError          an optional package is not installed
    ├── LoadError                       a package or a model cannot be used
    │   ├── PackageNotFoundError        nothing at that path
    │   ├── ArchiveError                the archive is damaged or unsafe
    │   ├── ManifestError               manifest.json is not valid
    │   ├── IntegrityError              content differs from its checksum
    │   ├── TrustError                  the signature is missing, wrong or not of someone trusted
    │   ├── StoreError                  the store of packages cannot be read or written
    │   ├── AdapterError                the adapter's files or shapes are wrong
    │   ├── TokenizerError              the tokenizer or its chat template cannot be used
    │   └── BaseModelError              the base model is missing, or is another one
    ├── InferenceError                  a request could not be answered
    │   ├── InvalidRequestError         the prompt or an option has a wrong type or value
    │   ├── PromptTooLongError          the prompt does not fit the model's context
    │   ├── RoutingError                no expert fits the prompt
    │   ├── GrammarError                a grammar is wrong, or cannot be honoured
    │   ├── OutOfMemoryError            the device has too little memory
    │   └── DeadlineError               the answer was not finished in time
    ├── ClusterError                    Ray does not start here, or no cluster answers
    ├── BatchError                      a batch job cannot run or did not finish
    │   ├── DatasetError                the dataset cannot be found or read
    │   ├── OutputError                 the output cannot be written
    │   │   ├── FingerprintError        the output belongs to a job with another configuration
    │   │   ├── OutputInUseError        another driver is writing to the output
    │   │   └── LeaseLostError          another driver has taken the output over
    │   ├── JobFailedError              workers failed; what is committed stays
    │   ├── TooManyErrorsError          more rows have errors than the job allows
    │   └── WorkerLostError             a shard, or loading, ends workers again and again
    └── ServeError                      an online request is refused, or its answer is lost
        ├── AuthenticationError         no API key, or one that is not known
        ├── UnknownRouteError           nothing is served there, or not to that method
        ├── UnknownModelError           no expert of that name is served
        ├── BodyTooLargeError           the body of a request is too large
        ├── SlowClientError             a client sends its request, or takes its answer, too slowly
        ├── TooManyRequestsError        a client has too many requests running
        ├── OverloadedError             the service has too many requests waiting
        ├── ReplicaLostError            the process that was answering has died
        └── ShuttingDownError           the service is ending, and takes no more requests

Each says what is wrong, where (`details`, one place a line) and what to do next (`hint`), and carries a stable `code`
for programs: the same code stands in a batch row's `error` and in an online response.
"""

from collections.abc import Sequence
from typing import ClassVar


class ExpertError(Exception):
    """The root of all errors of this project.

    Args:
        message: What is wrong, in one sentence.
        hint: What to do next.
        details: Where, one place a line, e.g. `"line 12, column 5  base_models: Field required"`.
    """

    code: ClassVar[str] = "expert_error"

    def __init__(self, message: str, *, hint: str, details: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = tuple(details)

    def __str__(self) -> str:
        lines = [self.message, *(f"  {detail}" for detail in self.details), f"  Fix: {self.hint}"]
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.hint, self.details)


def _rebuild(kind: type[ExpertError], message: str, hint: str, details: tuple[str, ...]) -> ExpertError:
    return kind(message, hint=hint, details=details)


class ConfigError(ExpertError):
    """A configuration file, option or argument is wrong."""

    code = "invalid_config"


class MissingDependencyError(ExpertError):
    """An optional package is not installed."""

    code = "missing_dependency"


class LoadError(ExpertError):
    """A package or a model cannot be used."""

    code = "load_failed"


class PackageNotFoundError(LoadError):
    """Nothing is at that path."""

    code = "package_not_found"


class ArchiveError(LoadError):
    """The archive is damaged or unsafe."""

    code = "invalid_archive"


class ManifestError(LoadError):
    """`manifest.json` is not valid."""

    code = "invalid_manifest"


class IntegrityError(LoadError):
    """Content differs from its checksum."""

    code = "integrity_failed"


class TrustError(LoadError):
    """The package's signature is missing, wrong, or not of someone trusted; or the package is an old version."""

    code = "not_trusted"


class StoreError(LoadError):
    """The store of packages, or the cache on this machine, cannot be read or written."""

    code = "store_failed"


class AdapterError(LoadError):
    """The adapter's files or shapes are wrong."""

    code = "invalid_adapter"


class TokenizerError(LoadError):
    """The tokenizer or its chat template cannot be used."""

    code = "invalid_tokenizer"


class BaseModelError(LoadError):
    """The base model is missing, or is another one than the package was made for."""

    code = "base_model_unavailable"


class InferenceError(ExpertError):
    """A request could not be answered."""

    code = "inference_failed"


class InvalidRequestError(InferenceError):
    """The prompt or an option has a wrong type or value."""

    code = "invalid_request"


class PromptTooLongError(InferenceError):
    """The prompt does not fit the model's context."""

    code = "prompt_too_long"


class RoutingError(InferenceError):
    """No expert fits the prompt."""

    code = "no_expert_fits"


class GrammarError(InferenceError):
    """A grammar is wrong, or cannot be honoured."""

    code = "invalid_grammar"


class OutOfMemoryError(InferenceError):
    """The device has too little memory."""

    code = "out_of_memory"


class DeadlineError(InferenceError):
    """The answer was not finished in time."""

    code = "deadline_exceeded"


class ClusterError(ExpertError):
    """Ray does not start on this machine, or no cluster answers at an address."""

    code = "no_cluster"


class BatchError(ExpertError):
    """A batch job cannot run or did not finish."""

    code = "batch_failed"


class DatasetError(BatchError):
    """The dataset cannot be found or read."""

    code = "dataset_unreadable"


class OutputError(BatchError):
    """The output cannot be written."""

    code = "output_unwritable"


class FingerprintError(OutputError):
    """The output belongs to a job with another configuration."""

    code = "fingerprint_mismatch"


class OutputInUseError(OutputError):
    """Another driver is writing to the output, and is alive."""

    code = "output_in_use"


class LeaseLostError(OutputError):
    """Another driver has taken the output over, because this one gave no sign of life for too long."""

    code = "lease_lost"


class JobFailedError(BatchError):
    """Workers failed; what is committed stays, and the same command continues."""

    code = "job_failed"


class TooManyErrorsError(BatchError):
    """More rows have errors than the job allows; what is committed stays."""

    code = "too_many_errors"


class WorkerLostError(BatchError):
    """A shard ends its workers again and again, whichever of its rows they answer; or one ends each time it loads."""

    code = "worker_lost"


class ServeError(ExpertError):
    """An online request is refused, or its answer is lost."""

    code = "serve_failed"


class AuthenticationError(ServeError):
    """No API key is given, or one that is not known."""

    code = "invalid_api_key"


class UnknownRouteError(ServeError):
    """Nothing is served under that path, or not to that method."""

    code = "unknown_route"


class UnknownModelError(ServeError):
    """No expert of that name is served."""

    code = "model_not_found"


class BodyTooLargeError(ServeError):
    """The body of a request is too large."""

    code = "body_too_large"


class SlowClientError(ServeError):
    """A client sends its request, or takes its answer, too slowly."""

    code = "slow_client"


class TooManyRequestsError(ServeError):
    """A client has too many requests running and waiting."""

    code = "too_many_requests"


class OverloadedError(ServeError):
    """The service has too many requests running and waiting."""

    code = "overloaded"


class ReplicaLostError(ServeError):
    """The process that was answering has died."""

    code = "replica_lost"


class ShuttingDownError(ServeError):
    """The service is ending: what was begun is finished, and nothing more is taken."""

    code = "shutting_down"
