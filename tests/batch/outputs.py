"""Finished and half finished outputs of jobs, made without an engine."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from pipeline.batch.commit import JobOutput
from pipeline.batch.layout import FINGERPRINT_METADATA
from pipeline.batch.parts import AnsweredRow, PartFormat, PartKind, encode_part
from pipeline.batch.plan import digest_of
from pipeline.batch.rows import Row
from pipeline.engine.types import Completion, Failure
from pipeline.storage import Storage
from pipeline.storage.local import LocalStorage

FINGERPRINT = {"expert_sha256": "ab", "seed": 0, "columns": {"prompt": "q", "id": "key"}}
FAILED = Failure("prompt_too_long", "the prompt has 9 tokens")


def form_of(kind: PartKind, fingerprint=FINGERPRINT) -> PartFormat:
    return PartFormat(
        kind=kind,
        inputs=pa.schema([("key", pa.string()), ("q", pa.string())]),
        is_loose=True,
        metadata={FINGERPRINT_METADATA: digest_of(fingerprint)},
    )


def answered(shard: int, row: int, *, failed: bool, by: str = "") -> AnsweredRow:
    identity = f"{shard}/{row}"
    values = {"key": f"key {identity}", "q": f"question {identity}"}
    if failed:
        return AnsweredRow(Row(identity, values, None), Completion(identity, "", "error", 0, 0, FAILED))
    return AnsweredRow(Row(identity, values, None), Completion(identity, f"answer {identity}{by}", "stop", 3, 4))


def part(shard: int, kind: PartKind, *, failed=(), rows: int = 4, by: str = "", fingerprint=FINGERPRINT) -> bytes:
    """A part of some rows, of which those numbered in `failed` have an error."""
    rows_of_it = [answered(shard, row, failed=row in failed, by=by) for row in range(rows)]
    return encode_part(rows_of_it, form_of(kind, fingerprint))


def make_output(
    storage: Storage, kind: PartKind, failed=({}, {1, 2}, {3}), *, finished: bool = True, fingerprint=FINGERPRINT
) -> JobOutput:
    """An output with a shard for each set of rows that failed."""
    output = JobOutput(storage, fingerprint, kind, len(failed))
    output.begin()
    for shard, numbers in enumerate(failed):
        output.commit(shard, part(shard, kind, failed=numbers, fingerprint=fingerprint))
    if finished:
        output.finish()
    return output


@contextmanager
def memory_folder() -> Iterator[Path]:
    """A folder in memory where the system has one: there flushing to the disk takes no time."""
    memory = Path("/dev/shm")  # noqa: S108 - the folder made in it is this test's own
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


def copy_of(output: JobOutput, folder: Path) -> JobOutput:
    """The same output in another folder of the disk."""
    shutil.copytree(output.storage.url(""), folder)
    return replace(output, storage=LocalStorage(str(folder)))


def contents(storage: Storage) -> dict[str, bytes]:
    """Every file but the lease's."""
    return {name: storage.read(name) for name in storage.list() if not name.startswith("_lease/")}
