"""Attempts, commits, the manifest and `_SUCCESS`: each shard's part is written once, whatever dies.

part-00000.parquet   the answers of shard 0, created once and whole
_job.json            the job's fingerprint, created before the first part
_commits/00000.json  the receipt of part 0: what it holds
_errors/             the rows of each part that have an error, when there are any; written before the receipt
_packs/              copies of many receipts, while the job runs
_attempts/           unfinished attempts of a local disk
_input/              rows that came from memory, when they did
_lease/              who drives the job, see `lease`
_retry/              rows with an error that are being answered again, see `retry`
results.jsonl        of OpenAI batch files: the answers of all parts, in order; errors.jsonl: what was not answered
_errors.jsonl        all rows that have an error, when every shard is committed
_manifest.json       all receipts
_SUCCESS             the manifest's SHA-256; the last file of the answers to appear
_runs/<uuid>.json    what each run did, see `run_record`
_report/             report.json and report.html, made from the manifest and _runs, see `report`
"""

import hashlib
import json
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.batch.layout import (
    ATTEMPTS,
    INPUT,
    JOB,
    LEASE,
    PACKS,
    RETRY,
    ROW_ERRORS,
    SUCCESS,
    part_name,
    receipt_name,
    row_errors_name,
    shard_of,
)
from pipeline.batch.manifest import seal, sealed_manifest, sweep
from pipeline.batch.parts import PartKind, count_part
from pipeline.batch.receipts import (
    PACK_RECEIPTS,
    Receipt,
    in_threads,
    json_bytes,
    read_packs,
    read_receipt,
    write_pack,
)
from pipeline.batch.retry import PLAN, read_plan
from pipeline.batch.row_errors import row_errors, row_errors_bytes
from pipeline.errors import FingerprintError, OutputError
from pipeline.storage import Storage

_MAX_NAMED = 8
_OURS = ("output_format", "output_prefix", "num_shards")


def refuse_foreign(storage: Storage) -> None:
    """Refuse a folder that holds files and is not the output of a job.

    Raises:
        OutputError: There are such files; names some.
    """
    own = (f"{ATTEMPTS}/", f"{INPUT}/", f"{LEASE}/")
    names = [name for name in storage.list() if not name.startswith(own)]
    if names and JOB not in names and not storage.exists(JOB):
        raise OutputError(
            f"{storage.url('')} holds files, and no {JOB}: it is not the output of a job",
            details=names[:_MAX_NAMED],
            hint="Name an empty folder, or one that does not exist.",
        )


@dataclass(frozen=True)
class JobOutput:
    """The output folder of one job; the driver and every worker have their own copy.

    Args:
        storage: The folder.
        fingerprint: What makes the job this job, field by field: values that JSON can hold, and no times.
        kind: How parts are written.
        num_shards: Shards of the job.
        prefix: Stands before the names of our columns in the parts.
        mends: Of a round that answers rows with an error again: the output whose rows they are; see `retry`.
    """

    storage: Storage
    fingerprint: Mapping[str, Any]
    kind: PartKind
    num_shards: int
    prefix: str = ""
    mends: Storage | None = None

    @property
    def id_column(self) -> str | None:
        """The column that holds a row's identity, if the job has one."""
        columns = self.fingerprint.get("columns")
        name = columns.get("id") if isinstance(columns, Mapping) else None
        return name if isinstance(name, str) else None

    def is_taken(self) -> bool:
        """Whether the folder is this job's already. Nothing is written.

        Raises:
            FingerprintError: The folder belongs to another job; names each field that differs.
            OutputError: The folder holds something else.
        """
        if not self.storage.exists(JOB):
            refuse_foreign(self.storage)
            return False
        self._compare_job()
        return True

    def begin(self) -> None:
        """Take the folder for this job, or find that it is this job's already. Call it once, before any commit.

        Raises:
            FingerprintError: The folder belongs to another job; names each field that differs.
            OutputError: The folder holds something else, cannot be written to, or does not keep the first of two
                files of one name.
        """
        if not self.is_taken():
            self._check_create_only()
            if not self.storage.create(JOB, self.job()):
                self._compare_job()

    def committed(self, known: Mapping[int, Receipt] | None = None) -> dict[int, Receipt]:
        """The receipts of all committed shards, by shard.

        A part without a receipt, whose writer died between the two, is given one. Receipts that are packed, or in the
        manifest of a finished job, are not read one by one.

        Args:
            known: Receipts that need not be read again, as they came from `commit` or this method before.

        Raises:
            OutputError: A receipt is damaged, or does not go with its part; says what to delete.
        """
        sizes = self.storage.list()
        parts = {shard: name for name in sizes if (shard := shard_of(name, "part")) is not None}
        receipts = {shard for name in sizes if (shard := shard_of(name, "receipt")) is not None}
        self._refuse_strange(parts, receipts)
        copies = dict(known) if known is not None else self.copies(sizes)
        if copies.keys() - receipts:  # someone deleted a receipt, so that it is made anew
            self.storage.remove_tree(PACKS)
            copies = {shard: copies[shard] for shard in copies.keys() & receipts}
        loose = [shard for shard in sorted(parts) if shard not in copies]
        found = in_threads(lambda shard: self._receipt(shard, exists=shard in receipts), loose)
        if known is None and SUCCESS not in sizes and PLAN not in sizes:
            for start in range(0, len(found) - PACK_RECEIPTS + 1, PACK_RECEIPTS):
                write_pack(self.storage, found[start : start + PACK_RECEIPTS])
        copies.update((receipt.shard, receipt) for receipt in found)
        for shard, name in parts.items():
            if copies[shard].bytes != sizes[name]:
                raise _disagreement(shard)
        return {shard: copies[shard] for shard in sorted(parts)}

    def commit(self, shard_index: int, data: bytes) -> Receipt:
        """Commit a shard's part, unless another attempt did so first.

        Args:
            shard_index: The shard.
            data: The whole part.

        Returns:
            The receipt of the part that is in the folder now: this one, or the one that came first.

        Raises:
            OutputError: The part cannot be written; the shard can be tried again.
        """
        self._compare_job()  # a worker that outlived its job must not write among the parts of the next one
        receipt = self.receipt_of(shard_index, data)
        if self.storage.create(receipt.path, data):
            return self._write_receipt(receipt, data)
        return self._receipt(shard_index, exists=self.storage.exists(receipt_name(shard_index)))

    def part_to_mend(self, shard_index: int) -> bytes | None:
        """The part whose rows with an error are to be answered again, in a round that does so; else None."""
        return None if self.mends is None else self.mends.read(part_name(shard_index, self.kind))

    def is_complete(self) -> bool:
        """Whether the job has finished; see `sealed`."""
        return self.sealed() is not None

    def sealed(self) -> dict[str, Any] | None:
        """The manifest of the finished job; None while it is not finished, or rows with an error are answered again.

        Raises:
            OutputError: `_SUCCESS` is there, and the manifest is not the one it was written for.
        """
        if not self.storage.exists(SUCCESS):
            return None
        manifest = sealed_manifest(self.storage)
        plan = read_plan(self.storage)
        return manifest if plan is None or manifest.get("retry") == plan.round else None

    def finish(self, known: Mapping[int, Receipt] | None = None) -> dict[str, Any]:
        """Write the manifest, `_errors.jsonl` and `_SUCCESS`, and remove what attempts left. May be called again.

        Args:
            known: Receipts that need not be read again.

        Returns:
            The manifest: the fingerprint, the counts of all parts together, and every receipt.

        Raises:
            OutputError: A shard is not committed, or another manifest is there.
        """
        # Listed before the manifest is read: what another driver may write after it is not in these lists.
        swept = [*self.storage.list(ROW_ERRORS), *self.storage.list(RETRY)]
        manifest = self.sealed() or seal(self, known)
        sweep(self.storage, manifest, swept)
        return manifest

    def write_row_errors(self, receipt: Receipt, data: bytes | None = None) -> bytes:
        """Write the list of a part's rows with an error.

        Args:
            receipt: The part's.
            data: The part; read if None.

        Returns:
            The list, as JSON lines.
        """
        part = self.storage.read(receipt.path) if data is None else data
        found = row_errors(part, self.kind, receipt.shard, prefix=self.prefix, id_column=self.id_column)
        content = row_errors_bytes(found)
        self.storage.create(row_errors_name(receipt.shard, receipt.sha256), content)
        return content

    def copies(self, sizes: Mapping[str, int]) -> dict[int, Receipt]:
        """Receipts that can be had without reading their own files, by shard.

        Args:
            sizes: The listing of the folder.

        Raises:
            OutputError: A pack or the manifest is damaged.
        """
        plan = read_plan(self.storage) if PLAN in sizes else None
        if SUCCESS in sizes:
            values = sealed_manifest(self.storage).get("parts", [])
            copies = {item.shard: item for item in map(Receipt.from_values, values)}
        elif plan is None:
            copies = read_packs(self.storage, [name for name in sizes if name.startswith(f"{PACKS}/")])
        else:
            copies = {}
        return {shard: copies[shard] for shard in copies.keys() - (set(plan.shards) if plan is not None else set())}

    def job(self) -> bytes:
        """What `_job.json` holds."""
        ours = dict(zip(_OURS, (self.kind, self.prefix, self.num_shards), strict=True))
        return json_bytes({**self.fingerprint, **ours})

    def _compare_job(self) -> None:
        here = json.loads(self.job())
        there = _job_values(self.storage if self.mends is None else self.mends)
        if there == here:
            return
        differing = [
            f"{name}: there {_shown(there, name)}, now {_shown(here, name)}"
            for name in sorted(there.keys() | here.keys())
            if _shown(there, name) != _shown(here, name)
        ]
        raise FingerprintError(
            f"{self.storage.url('')} belongs to another job",
            details=differing,
            hint="Run the command that wrote it, name another output folder, or replace it: --overwrite."
            if any(shard_of(name, "part") is not None for name in self.storage.list())
            else "Nothing is answered there yet: take it for this job with --overwrite, or name another output folder.",
        )

    def _check_create_only(self) -> None:
        name = f"{ATTEMPTS}/{uuid.uuid4()}.probe"
        first, second = self.storage.create(name, b"1"), self.storage.create(name, b"2")
        if not first or second:
            raise OutputError(
                f"{self.storage.url('')} lets a second writer replace the first one's file",
                hint="Use a store that honours conditional writes (If-None-Match), or a local folder.",
            )

    def _refuse_strange(self, parts: Mapping[int, str], receipts: Iterable[int]) -> None:
        lost = sorted(set(receipts) - parts.keys())
        if lost:
            raise OutputError(
                "receipts without their parts: the parts were deleted",
                details=[f"{receipt_name(shard)}  no {part_name(shard, self.kind)}" for shard in lost[:_MAX_NAMED]],
                hint="Put the parts back, or delete these receipts and run the same command again.",
            )
        expected = {shard: part_name(shard, self.kind) for shard in parts}
        strange = [name for shard, name in parts.items() if shard >= self.num_shards or name != expected[shard]]
        if strange:
            raise OutputError(
                "parts that do not belong to this job", details=strange[:_MAX_NAMED], hint="Move them elsewhere."
            )

    def _receipt(self, shard: int, *, exists: bool) -> Receipt:
        """The receipt of a part that is there; written now when there is none."""
        if not exists:
            data = self.storage.read(part_name(shard, self.kind))
            return self._write_receipt(self.receipt_of(shard, data), data)
        receipt = read_receipt(self.storage, shard)
        if receipt.shard != shard or receipt.path != part_name(shard, self.kind):
            raise _disagreement(shard)
        return receipt

    def receipt_of(self, shard: int, data: bytes) -> Receipt:
        """The receipt that goes with a part.

        Args:
            shard: The shard.
            data: The whole part.

        Raises:
            OutputError: The bytes are not a part.
        """
        counts = count_part(data, self.kind, self.prefix)
        return Receipt(
            shard=shard,
            rows=counts.rows,
            error_codes=counts.error_codes,
            prompt_tokens=counts.prompt_tokens,
            completion_tokens=counts.completion_tokens,
            bytes=len(data),
            path=part_name(shard, self.kind),
            sha256=hashlib.sha256(data).hexdigest(),
        )

    def _write_receipt(self, receipt: Receipt, data: bytes) -> Receipt:
        if receipt.errors:
            self.write_row_errors(receipt, data)
        if not self.storage.create(receipt_name(receipt.shard), json_bytes(asdict(receipt))):
            written = read_receipt(self.storage, receipt.shard)
            if written != receipt:
                raise _disagreement(receipt.shard)
        return receipt


def stored_output(storage: Storage) -> JobOutput:
    """The output of whatever job wrote a folder, from its files alone.

    Raises:
        OutputError: The folder is not the output of a job.
    """
    if not storage.exists(JOB):
        raise OutputError(
            f"{storage.url('')} is not the output of a job: it has no {JOB}",
            hint="Name the folder that a job was told as its output.",
        )
    values = _job_values(storage)
    kind, prefix, num_shards = (values.pop(name, None) for name in _OURS)
    if kind not in ("parquet", "jsonl", "openai") or not isinstance(prefix, str) or not isinstance(num_shards, int):
        raise OutputError(f"{JOB} is damaged: a field is missing", hint="Write to another folder, or delete this one.")
    return JobOutput(storage, values, kind, num_shards, prefix)


def _job_values(storage: Storage) -> dict[str, Any]:
    hint = "Write to another folder, or delete this one."
    try:
        values = json.loads(storage.read(JOB))
    except ValueError as error:
        raise OutputError(f"{JOB} is damaged: {error}", hint=hint) from error
    if not isinstance(values, dict):
        raise OutputError(f"{JOB} is damaged: it is not an object", hint=hint)
    return values


def _shown(values: Mapping[str, Any], name: str) -> str:
    return json.dumps(values[name], ensure_ascii=False, sort_keys=True) if name in values else "nothing"


def _disagreement(shard: int) -> OutputError:
    return OutputError(
        f"the receipt of shard {shard} does not go with its part",
        details=[receipt_name(shard)],
        hint="Delete this receipt, and its part when it was changed, and run the same command again.",
    )
