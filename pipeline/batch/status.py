"""How far a job is, from the files of its output alone, while it runs or after it died."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pipeline.batch.commit import JobOutput, stored_output
from pipeline.batch.layout import part_name, shard_of
from pipeline.batch.lease import Clock, LeaseRecord, LeaseWatch, Sleep, top_lease
from pipeline.batch.receipts import Receipt, in_threads, read_receipt, totals_of
from pipeline.batch.retry import read_plan, round_output
from pipeline.storage import Storage

LeaseState = Literal["alive", "stale", "none"]
_BEATS_WAITED = 2.5


@dataclass(frozen=True)
class LeaseStatus:
    """Who drives the job.

    Args:
        state: `alive`; `stale`, when the last driver shows no sign of life; `none`, when nobody does.
        host: The machine of the driver, or of the last one; None when there has never been one.
        pid: Its process.
        since: When it took the output, by its own clock.
    """

    state: LeaseState
    host: str | None = None
    pid: int | None = None
    since: str | None = None

    def __str__(self) -> str:
        if self.host is None:
            return self.state
        last = "" if self.state == "alive" else "; the last driver was "
        return f"{self.state}{last or ': '}process {self.pid} on {self.host}, since {self.since}"


@dataclass(frozen=True)
class OutputStatus:
    """How far a job is.

    Args:
        output: The folder.
        complete: The job is finished.
        shards: Shards of the job.
        shards_done: Those that are committed.
        rows: Rows in the committed parts.
        errors: Those of them with an error.
        error_codes: The same, by the error's code.
        prompt_tokens: Prompt tokens of these rows.
        completion_tokens: Generated tokens of these rows.
        bytes: Size of the committed parts.
        retry_shards: Shards whose errors are being answered again; 0 when there are none.
        retry_shards_done: Those of them that are.
        lease: Who drives the job.
    """

    output: str
    complete: bool
    shards: int
    shards_done: int
    rows: int
    errors: int
    error_codes: Mapping[str, int]
    prompt_tokens: int
    completion_tokens: int
    bytes: int
    retry_shards: int
    retry_shards_done: int
    lease: LeaseStatus

    def to_dict(self) -> dict[str, Any]:
        """The status as plain values, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        is_running = self.lease.state == "alive"
        state = "complete" if self.complete else "running" if is_running else "stopped; the same command continues"
        percent = 100 * self.shards_done / self.shards if self.shards else 100.0
        codes = ", ".join(f"{code} {count:,}" for code, count in sorted(self.error_codes.items()))
        table = {
            "output": self.output,
            "state": state,
            "shards": f"{self.shards_done:,} of {self.shards:,} ({percent:.1f}%)",
            "rows": f"{self.rows:,}, {self.bytes:,} bytes",
            "errors": f"{self.errors:,}" + (f" ({codes})" if codes else ""),
            "tokens": f"{self.prompt_tokens:,} prompt, {self.completion_tokens:,} generated",
            "driver": str(self.lease),
        }
        if self.retry_shards:
            table["retry"] = f"{self.retry_shards_done:,} of {self.retry_shards:,} shards with errors answered again"
        return "\n".join(f"{name:<8} {value}" for name, value in table.items())


def output_status(storage: Storage, *, clock: Clock = time.monotonic, sleep: Sleep = time.sleep) -> OutputStatus:
    """How far a job is, from the files of its output alone. Nothing is written.

    One listing, the packs of receipts, and those receipts that are not packed yet are read. Whether the driver lives is
    seen by waiting for its heartbeat, a few seconds, unless the job is complete or its process is known to be gone.

    Args:
        storage: The output folder.
        clock: Seconds that never go back.
        sleep: Waits so many seconds.

    Raises:
        OutputError: The folder is not the output of a job, or a receipt is damaged.
    """
    output = stored_output(storage)
    manifest = output.sealed()
    plan = read_plan(storage) if manifest is None else None
    receipts = _receipts(output) if manifest is None else [Receipt.from_values(part) for part in manifest["parts"]]
    retried = 0 if plan is None else len(_receipts(round_output(output, plan)))
    return OutputStatus(
        output=storage.url(""),
        complete=manifest is not None,
        shards=output.num_shards,
        shards_done=len(receipts),
        **totals_of(receipts),
        retry_shards=0 if plan is None else len(plan.shards),
        retry_shards_done=retried,
        lease=_lease(storage, clock, sleep, is_complete=manifest is not None),
    )


def _receipts(output: JobOutput) -> list[Receipt]:
    storage = output.storage
    sizes = storage.list()
    shards = {shard for name in sizes if (shard := shard_of(name, "receipt")) is not None}
    there = [shard for shard in sorted(shards) if part_name(shard, output.kind) in sizes]
    copies = output.copies(sizes)
    loose = in_threads(lambda shard: read_receipt(storage, shard), [shard for shard in there if shard not in copies])
    return [*(copies[shard] for shard in there if shard in copies), *loose]


def _lease(storage: Storage, clock: Clock, sleep: Sleep, *, is_complete: bool) -> LeaseStatus:
    watch = LeaseWatch(clock)
    while True:
        found = top_lease(storage)
        if found is None:
            return LeaseStatus("none")
        record = LeaseRecord.from_json(found[1])
        if record is None:
            return LeaseStatus("stale")
        if record.released:
            return _of(record, "none")
        state = watch.look(*found)
        if state == "alive":
            return _of(record, "alive")
        if state == "dead" or is_complete or watch.watched > _BEATS_WAITED * watch.beat_seconds:
            return _of(record, "stale")
        sleep(watch.pause)


def _of(record: LeaseRecord, state: LeaseState) -> LeaseStatus:
    return LeaseStatus(state, host=record.host, pid=record.pid, since=record.since)
