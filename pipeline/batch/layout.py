"""What stands where in the output folder of a job: the names of its files, and whose a name is."""

import re
from typing import Literal

from pipeline.batch.openai_lines import ERRORS as LINE_ERRORS
from pipeline.batch.openai_lines import RESULTS
from pipeline.batch.parts import PartKind

JOB, MANIFEST, SUCCESS, ERRORS = "_job.json", "_manifest.json", "_SUCCESS", "_errors.jsonl"
COMMITS, ROW_ERRORS, PACKS = "_commits", "_errors", "_packs"
ATTEMPTS, INPUT, LEASE, RETRY = "_attempts", "_input", "_lease", "_retry"
RUNS, REPORT = "_runs", "_report"

FINGERPRINT_METADATA = "expert_pipeline.fingerprint"
"""The key in the footer of a Parquet part under which the digest of the job's fingerprint stands."""

NameKind = Literal[
    "part", "view", "receipt", "row errors", "job", "pack", "attempt", "input", "lease", "retry", "report"
]
VIEWS = (RESULTS, LINE_ERRORS)
"""What a finished job of OpenAI batch files leaves beside its parts; in any other output they are no files of a job."""

_PART = re.compile(r"part-(\d{5,})\.(parquet|jsonl)")
_RECEIPT = re.compile(rf"{COMMITS}/(\d{{5,}})\.json")
_ROW_ERRORS = re.compile(rf"{ROW_ERRORS}/(\d{{5,}})-[0-9a-f]{{16}}\.jsonl")
_FOLDERS: dict[str, NameKind] = {
    PACKS: "pack",
    ATTEMPTS: "attempt",
    INPUT: "input",
    LEASE: "lease",
    RETRY: "retry",
    RUNS: "report",
    REPORT: "report",
}


def part_name(shard_index: int, kind: PartKind) -> str:
    """The name of a shard's part, e.g. `part-00000.parquet`."""
    return f"part-{shard_index:05d}.{'jsonl' if kind == 'openai' else kind}"


def receipt_name(shard_index: int) -> str:
    """The name of a shard's receipt, e.g. `_commits/00000.json`."""
    return f"{COMMITS}/{shard_index:05d}.json"


def row_errors_name(shard_index: int, part_sha256: str) -> str:
    """The name of the list of a part's rows with an error, e.g. `_errors/00000-0123456789abcdef.jsonl`.

    It carries the part's digest, so that the list of one part is never taken for that of another.
    """
    return f"{ROW_ERRORS}/{shard_index:05d}-{part_sha256[:16]}.jsonl"


def shard_of(name: str, kind: NameKind) -> int | None:
    """The shard whose part, receipt or row errors have that name; None when they do not."""
    pattern = {"part": _PART, "receipt": _RECEIPT, "row errors": _ROW_ERRORS}.get(kind)
    match = pattern.fullmatch(name) if pattern is not None else None
    return int(match[1]) if match else None


def kind_of(name: str) -> NameKind | None:
    """What a file of an output folder is, by its name; None when it is none of a job's files.

    Args:
        name: Relative to the folder, with `/`.
    """
    if name in (JOB, MANIFEST, SUCCESS, ERRORS):
        return "job"
    if name in VIEWS:
        return "view"
    kinds: tuple[NameKind, ...] = ("part", "receipt", "row errors")
    for kind in kinds:
        if shard_of(name, kind) is not None:
            return kind
    folder, separator, _ = name.partition("/")
    return _FOLDERS.get(folder) if separator else None
