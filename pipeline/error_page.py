"""The page `docs/errors.md`, drawn from the tree of errors: `python -m pipeline.error_page > docs/errors.md`.

Each error has an entry here, with what to do about it in general; its `hint` says what to do in the case at hand.
"""

import inspect
import re
import sys

from pipeline import errors
from pipeline.errors import ExpertError

ADVICE: dict[str, str] = {
    "ExpertError": "Catch it to catch every error of this project; `code`, `message`, `details` and `hint` tell more.",
    "ConfigError": "Correct the option or the line that is named; `configs/` shows every key.",
    "MissingDependencyError": "Install the extra that the hint names.",
    "LoadError": "Look at the package with `expert inspect` and `expert verify`.",
    "PackageNotFoundError": "Check the path or the URL, and who may read it.",
    "ArchiveError": "Fetch or pack the package again; nothing of it was used.",
    "ManifestError": "Correct `manifest.json` at the places that are named, and pack the expert again.",
    "IntegrityError": "Fetch the package again from where it was published.",
    "TrustError": "Ask the publisher for a signed package, or tell `expert trust` whose signature you trust.",
    "StoreError": "Check that the store or the cache can be reached and written; the same command can be run again.",
    "AdapterError": "Check that the base model is the one the expert was trained on, or export the adapter again.",
    "TokenizerError": "Pack the tokenizer the expert was trained with, with its chat template.",
    "BaseModelError": "Name the base model's directory (`base_model=`), or set `EXPERT_MODELS_DIR`.",
    "InferenceError": "Read the message; a closed or dead engine is loaded again by a new `Expert` or process.",
    "InvalidRequestError": "Correct the field or option that is named.",
    "PromptTooLongError": "Shorten the prompt or the schema, or set `truncate`.",
    "RoutingError": "Name the expert instead of `auto`, or give the manifests keywords that such prompts have.",
    "GrammarError": "Correct the grammar, JSON schema or regular expression at the place that is named.",
    "OutOfMemoryError": "Lower `max_tokens`, `batch_size` or `kv_cache_bytes`, quantise, or use a larger device.",
    "DeadlineError": "Ask for fewer tokens or a longer timeout, or again when there is less to do.",
    "ClusterError": "Run it again, free memory and disk, or correct the address; `/tmp/ray` has Ray's logs.",
    "BatchError": "Read the message; what is committed stays, and the same command continues.",
    "DatasetError": "Check the path, the format and the columns that are named.",
    "OutputError": "Check that the output can be written, and that it is the output of a job.",
    "FingerprintError": "Name another output, or `--overwrite` this one; the fields that differ are listed.",
    "OutputInUseError": "Wait for the other driver, or end it.",
    "LeaseLostError": "Let the driver that took over finish; this one has ended.",
    "JobFailedError": "Read the workers' errors, mend the cause, and run the same command: it continues.",
    "TooManyErrorsError": "Look at the errors in the sample, mend the cause or raise the bound, and run it again.",
    "WorkerLostError": "Give workers more memory, or smaller shards; the log of the last one says how it ended.",
    "ServeError": "Read the message; the service answers others meanwhile.",
    "AuthenticationError": "Send `Authorization: Bearer KEY`, with a key that the service knows.",
    "UnknownRouteError": "Use a path and method of docs/guides/online.md; `GET /v1/models` is one.",
    "UnknownModelError": "Use one of the names in the hint, or of `GET /v1/models`.",
    "BodyTooLargeError": "Send less, or raise the limit in the configuration.",
    "SlowClientError": "Send the body at once, and read the answer as it comes.",
    "TooManyRequestsError": "Wait for some of your requests to finish; `Retry-After` says how long.",
    "OverloadedError": "Ask again later; more replicas, or `max_loaded_experts`, make more room.",
    "ReplicaLostError": "Ask again; another replica answers.",
    "ShuttingDownError": "Ask again when the service is back.",
}
_INTRODUCTION = """\
# Errors

Every error that a user can meet is an `ExpertError`. It has a `message` (what is wrong), `details` (where, one place a
line), a `hint` (what to do next) and a `code`, which stays the same: it stands in a batch row's `error`, in the answer
of the service, and here. Errors of libraries (torch, transformers, pyarrow, fsspec, ...) are translated where they are
met, and are the `__cause__` of ours.

This page is made by `python -m pipeline.error_page > docs/errors.md`.

```
"""


def kinds() -> list[type[ExpertError]]:
    """Every error, in the order in which the tree draws them."""
    known = {name: kind for name, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, ExpertError)}
    return [known[name] for name in re.findall(r"^ {4}[│├└─ ]*(\w+Error)\b", errors.__doc__ or "", re.MULTILINE)]


def page() -> str:
    """The page, as Markdown."""
    tree = re.findall(r"^ {4}(.*Error\b.*)$", errors.__doc__ or "", re.MULTILINE)
    lines = [_INTRODUCTION + "\n".join(line.rstrip() for line in tree), "```", ""]
    lines += ["| error | code | what it means | what to do |", "|---|---|---|---|"]
    for kind in kinds():
        meaning = " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())
        lines.append(f"| `{kind.__name__}` | `{kind.code}` | {meaning} | {ADVICE[kind.__name__]} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
