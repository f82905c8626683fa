"""Answering again the rows that have an error: a round of new parts, which then take the place of the old ones.

_retry/plan.json         which shards have rows with an error; there while a round is open
_retry/<round>/          an output of its own: the new parts and their receipts, created once

While a round is open, the output stays what it was. When the new parts are all there, `_SUCCESS`, the manifest and
`_errors.jsonl` are removed, each old part and its receipt is replaced by the new one, and the job is finished as
ever. A driver that dies in between leaves a round that the next one finds whole, and puts in place again: that gives
the same files. An attempt that comes late finds the name taken, or writes into the folder of a round nobody reads.
"""

import json
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipeline.batch.layout import ERRORS, MANIFEST, PACKS, RETRY, SUCCESS, receipt_name, row_errors_name
from pipeline.batch.receipts import Receipt, in_threads, json_bytes
from pipeline.errors import OutputError
from pipeline.storage import Storage

if TYPE_CHECKING:
    from pipeline.batch.commit import JobOutput

PLAN = f"{RETRY}/plan.json"


@dataclass(frozen=True)
class RetryPlan:
    """An open round.

    Args:
        round: A random name.
        shards: Those with rows that are answered again.
    """

    round: str
    shards: tuple[int, ...]

    @property
    def folder(self) -> str:
        """The subfolder of the round's new parts."""
        return f"{RETRY}/{self.round}"


def read_plan(storage: Storage) -> RetryPlan | None:
    """The open round of an output; None when there is none.

    Raises:
        OutputError: Its plan is damaged.
    """
    if not storage.exists(PLAN):
        return None
    try:
        values = json.loads(storage.read(PLAN))
        plan = RetryPlan(str(uuid.UUID(values["round"])), tuple(int(shard) for shard in values["shards"]))
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"{PLAN} is damaged: {error!r:.200}",
            hint=f"Delete the folder {RETRY}, and run the same command again.",
        ) from error
    return plan


def open_round(storage: Storage, receipts: Iterable[Receipt]) -> RetryPlan | None:
    """Begin a round for the shards that have rows with an error, or go on with the one that is open.

    Args:
        storage: The output folder.
        receipts: Of all committed parts.

    Returns:
        The round; None when no row has an error.

    Raises:
        OutputError: The plan cannot be written.
    """
    found = read_plan(storage)
    shards = sorted(receipt.shard for receipt in receipts if receipt.errors)
    if found is not None or not shards:
        return found
    storage.create(PLAN, json_bytes({"round": str(uuid.uuid4()), "shards": shards}))
    return read_plan(storage)


def round_output(output: "JobOutput", plan: RetryPlan) -> "JobOutput":
    """Where the new parts of a round are committed: an output below the job's own."""
    return replace(output, storage=output.storage.subfolder(plan.folder), mends=output.storage)


def put_in_place(output: "JobOutput", plan: RetryPlan, confirm: Callable[[], None]) -> Mapping[int, Receipt]:
    """Put the new parts of a round in the place of the old ones. May be called again, also after a crash half way.

    Args:
        output: The job's output.
        plan: The round; every shard of it is committed there.
        confirm: Raises when this driver has lost the lease; called before each step that replaces something.

    Returns:
        The receipts of the new parts, by shard.

    Raises:
        OutputError: A new part is missing or cannot be put in place; the same command goes on.
    """
    source, target = output.storage.subfolder(plan.folder), output.storage
    receipts = round_output(output, plan).committed()
    missing = sorted(set(plan.shards) - receipts.keys())
    if missing:
        raise OutputError(
            f"{len(missing)} shards with errors are not answered again yet",
            details=[f"shard {shard}" for shard in missing[:8]],
            hint="Run the same command again; it answers what is missing.",
        )
    confirm()
    target.remove([SUCCESS, MANIFEST, ERRORS])
    target.remove_tree(PACKS)

    def move(shard: int) -> None:
        receipt = receipts[shard]
        if receipt.errors:
            name = row_errors_name(shard, receipt.sha256)
            target.create(name, source.read(name))
        for name in (receipt.path, receipt_name(shard)):
            content = source.read(name)
            confirm()
            target.replace(name, content)

    in_threads(move, plan.shards)
    return {shard: receipts[shard] for shard in plan.shards}
