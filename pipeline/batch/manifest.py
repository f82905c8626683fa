"""The manifest, the list of all errors, `_SUCCESS` and what goes with them: how a job is finished and seen to be."""

import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.batch.layout import (
    ATTEMPTS,
    COMMITS,
    ERRORS,
    MANIFEST,
    PACKS,
    RETRY,
    ROW_ERRORS,
    SUCCESS,
    row_errors_name,
)
from pipeline.batch.openai_lines import write_views
from pipeline.batch.receipts import Receipt, in_threads, json_bytes, totals_of
from pipeline.batch.retry import PLAN, RetryPlan, read_plan, round_output
from pipeline.errors import OutputError
from pipeline.storage import Storage

if TYPE_CHECKING:
    from pipeline.batch.commit import JobOutput

_MAX_NAMED = 8
_ERRORS_AT_ONCE = 512  # lists of errors held in memory together
_ANEW = f"Delete {MANIFEST} and {SUCCESS}, and run the same command again: they are made anew."


def seal(output: "JobOutput", known: Mapping[int, Receipt] | None = None) -> dict[str, Any]:
    """Write the manifest, `_errors.jsonl` and `_SUCCESS` of a job whose shards are all committed.

    Of OpenAI batch files, the views are written as well.

    The manifest is created only once: a driver that is late, and has other receipts in mind, goes no further than that.

    Args:
        output: The job's output.
        known: Receipts that need not be read again.

    Returns:
        The manifest.

    Raises:
        OutputError: A shard is not committed, or another manifest is there.
    """
    receipts = output.committed(known)
    missing = [shard for shard in range(output.num_shards) if shard not in receipts]
    if missing:
        raise OutputError(
            f"{len(missing)} of {output.num_shards} shards are not committed",
            details=[f"shard {shard}" for shard in missing[:_MAX_NAMED]],
            hint="Run the same command again; it answers what is missing.",
        )
    plan = read_plan(output.storage)
    if plan is not None:
        _refuse_unmended(output, plan, receipts)
    ordered = [receipts[shard] for shard in range(output.num_shards)]
    manifest = manifest_of(output, ordered, plan)
    data = json_bytes(manifest)
    if not output.storage.create(MANIFEST, data) and output.storage.read(MANIFEST) != data:
        raise OutputError(f"{MANIFEST} does not go with the receipts", hint=_ANEW)
    _write_errors(output, ordered)
    if output.kind == "openai":
        write_views(output.storage, ordered)
    output.storage.create(SUCCESS, success_of(data))
    sealed_manifest(output.storage)
    return manifest


def manifest_of(output: "JobOutput", receipts: Sequence[Receipt], plan: RetryPlan | None = None) -> dict[str, Any]:
    """The manifest of a job with these receipts, in the order of shards.

    Args:
        output: The job's output.
        receipts: Of all shards.
        plan: The round that the job has just ended, if any.
    """
    fingerprint = json.loads(output.job())
    parts = [asdict(receipt) for receipt in receipts]
    retry = {"retry": plan.round} if plan is not None else {}
    return {"fingerprint": fingerprint, **totals_of(receipts), **retry, "parts": parts}


def sealed_manifest(storage: Storage) -> dict[str, Any]:
    """The manifest of a finished job.

    Raises:
        OutputError: It is not the one that `_SUCCESS` was written for.
    """
    data = storage.read(MANIFEST)
    if storage.read(SUCCESS) != success_of(data):
        raise OutputError(f"{MANIFEST} is not the one that {SUCCESS} was written for", hint=_ANEW)
    manifest: dict[str, Any] = json.loads(data)
    return manifest


def sweep(storage: Storage, manifest: Mapping[str, Any], names: Iterable[str]) -> None:
    """Remove what a finished job leaves behind.

    Args:
        storage: The output folder.
        manifest: The job's manifest.
        names: Lists of errors and files of rounds, as they were before the manifest was read.
    """
    wanted = {row_errors_name(part["shard"], part["sha256"]) for part in manifest["parts"] if part["error_codes"]}
    plan = read_plan(storage)
    if plan is not None and plan.round != manifest.get("retry"):
        wanted.add(PLAN)
        wanted.update(name for name in names if name.startswith(f"{plan.folder}/"))
    storage.remove(sorted(set(names) - wanted))
    for folder in (RETRY, ROW_ERRORS):
        if not storage.list(folder):
            storage.remove_tree(folder)  # the empty folders of a disk
    for folder in (PACKS, ATTEMPTS):
        storage.remove_tree(folder)


def check_parts(storage: Storage, manifest: Mapping[str, Any]) -> None:
    """See in one listing that the parts of the finished job are all there, with their sizes.

    Args:
        storage: The output folder.
        manifest: The job's manifest.

    Raises:
        OutputError: One is not; names some.
    """
    sizes = storage.list()
    wrong = [part["path"] for part in manifest["parts"] if sizes.get(part["path"]) != part["bytes"]]
    if wrong:
        raise OutputError(
            f"{len(wrong)} parts of the finished job are gone, or have another size",
            details=wrong[:_MAX_NAMED],
            hint=f"Put them back; or delete them, their receipts in {COMMITS}, {MANIFEST} and {SUCCESS}"
            ", and run the same command again: they are made anew.",
        )


def success_of(manifest: bytes) -> bytes:
    """What `_SUCCESS` says of a manifest."""
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n".encode()


def _refuse_unmended(output: "JobOutput", plan: RetryPlan, receipts: Mapping[int, Receipt]) -> None:
    mended = round_output(output, plan).committed()
    waiting = [shard for shard in plan.shards if mended.get(shard) != receipts[shard]]
    if waiting:
        raise OutputError(
            f"{len(waiting)} shards with errors are being answered again",
            details=[f"shard {shard}" for shard in waiting[:_MAX_NAMED]],
            hint="Run the same command again; it goes on with them.",
        )


def _write_errors(output: "JobOutput", receipts: Iterable[Receipt]) -> None:
    """All errors in one file; a window of them is in memory at a time."""
    failed = {row_errors_name(receipt.shard, receipt.sha256): receipt for receipt in receipts if receipt.errors}
    there = output.storage.list(ROW_ERRORS)
    output.storage.remove([ERRORS])

    def read(name: str) -> bytes:
        return output.storage.read(name) if name in there else output.write_row_errors(failed[name])

    names = list(failed)
    with tempfile.TemporaryDirectory(prefix="expert-errors-") as folder:
        path = Path(folder, ERRORS)
        with path.open("wb") as file:
            for start in range(0, len(names), _ERRORS_AT_ONCE):
                file.writelines(in_threads(read, names[start : start + _ERRORS_AT_ONCE]))
        output.storage.create_from_file(ERRORS, str(path))
