"""Attempts, commits, the manifest and `_SUCCESS`: each shard's part is written once, whatever dies.

part-00000.parquet   the answers of shard 0, created once and whole
_job.json            the job's fingerprint, created before the first part
_commits/00000.json  the receipt of part 0: what it holds
_attempts/           unfinished attempts of a local disk
_input/              rows that came from memory, when they did
results.jsonl        of an OpenAI batch: the answers of all parts, in order; errors.jsonl: what was not answered
_manifest.json       all receipts, when every shard is committed
_SUCCESS             the manifest's SHA-256; the last file to appear
"""

import hashlib
import json
import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from pipeline.batch.openai_lines import write_views
from pipeline.batch.parts import PartKind, count_part
from pipeline.batch.storage import Storage
from pipeline.errors import FingerprintError, OutputError

JOB, MANIFEST, SUCCESS = "_job.json", "_manifest.json", "_SUCCESS"
COMMITS, ATTEMPTS, INPUT = "_commits", "_attempts", "_input"
_NUM_THREADS = 16
_MAX_NAMED = 8
_PART = re.compile(r"part-(\d{5,})\.(parquet|jsonl)")
_RECEIPT = re.compile(rf"{COMMITS}/(\d{{5,}})\.json")
_KINDS: dict[str, type] = {"path": str, "sha256": str, "error_codes": dict}
_Text = str | bytes
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Receipt:
    """What a committed part holds.

    Args:
        shard: The shard's index.
        rows: Rows in the part.
        error_codes: Rows with an error, by the error's code.
        prompt_tokens: Prompt tokens of all rows.
        completion_tokens: Generated tokens of all rows.
        bytes: The part's size.
        path: The part's name, relative to the output folder.
        sha256: The part's digest, in hex.
    """

    shard: int
    rows: int
    error_codes: dict[str, int] = field(hash=False)
    prompt_tokens: int
    completion_tokens: int
    bytes: int
    path: str
    sha256: str

    @property
    def errors(self) -> int:
        """Rows with an error."""
        return sum(self.error_codes.values())

    def to_json(self) -> str:
        """The receipt as one line of JSON."""
        return _json(asdict(self)).decode()

    @classmethod
    def from_json(cls, text: _Text) -> "Receipt":
        """The receipt that `to_json` wrote.

        Raises:
            OutputError: The text is not a receipt.
        """
        hint = "Delete the receipt, and run the same command again: it is made anew from the part."
        try:
            values = json.loads(text)
        except ValueError as error:
            raise OutputError(f"a receipt is damaged: {error}", hint=hint) from error
        kinds = {item.name: _KINDS.get(item.name, int) for item in fields(cls)}
        if (
            not isinstance(values, dict)
            or values.keys() != kinds.keys()
            or any(type(values[name]) is not kind for name, kind in kinds.items())
        ):
            raise OutputError("a receipt is damaged: its fields are other ones", hint=hint)
        return cls(**values)


def part_name(shard_index: int, kind: PartKind) -> str:
    """The name of a shard's part, e.g. `part-00000.parquet`."""
    return f"part-{shard_index:05d}.{'jsonl' if kind == 'openai' else kind}"


def receipt_name(shard_index: int) -> str:
    """The name of a shard's receipt, e.g. `_commits/00000.json`."""
    return f"{COMMITS}/{shard_index:05d}.json"


def refuse_foreign(storage: Storage) -> None:
    """Refuse a folder that holds files and is not the output of a job.

    Raises:
        OutputError: There are such files; names some.
    """
    own = (f"{ATTEMPTS}/", f"{INPUT}/")
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
    """

    storage: Storage
    fingerprint: Mapping[str, Any]
    kind: PartKind
    num_shards: int
    prefix: str = ""

    def begin(self) -> None:
        """Take the folder for this job, or find that it is this job's already. Call it once, before any commit.

        Raises:
            FingerprintError: The folder belongs to another job; names each field that differs.
            OutputError: The folder holds something else, cannot be written to, or does not keep the first of two
                files of one name.
        """
        if not self.storage.exists(JOB):
            refuse_foreign(self.storage)
            self._check_create_only()
            if self.storage.create(JOB, self._job()):
                return
        self._compare_job()

    def committed(self) -> dict[int, Receipt]:
        """The receipts of all committed shards, by shard.

        A part without a receipt, whose writer died between the two, is given one.

        Raises:
            OutputError: A receipt is damaged, or does not go with its part; says what to delete.
        """
        sizes = self.storage.list()
        parts = {int(match[1]): name for name in sizes if (match := _PART.fullmatch(name))}
        receipts = {int(match[1]) for name in sizes if (match := _RECEIPT.fullmatch(name))}
        self._refuse_strange(parts, receipts)
        found = _in_threads(lambda shard: self._receipt(shard, exists=shard in receipts), sorted(parts))
        for receipt in found:
            _check_size(receipt, sizes[parts[receipt.shard]])
        return {receipt.shard: receipt for receipt in found}

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
        receipt = self._receipt_of(shard_index, data)
        if self.storage.create(receipt.path, data):
            return self._write_receipt(receipt)
        return self._receipt(shard_index, exists=self.storage.exists(receipt_name(shard_index)))

    def is_complete(self) -> bool:
        """Whether the job has finished: `_SUCCESS` is there and goes with the manifest.

        Raises:
            OutputError: `_SUCCESS` is there, and the manifest is not the one it was written for.
        """
        if not self.storage.exists(SUCCESS):
            return False
        if self.storage.read(SUCCESS) != _success(self.storage.read(MANIFEST)):
            raise OutputError(
                f"{MANIFEST} is not the one that {SUCCESS} was written for",
                hint=f"Delete {MANIFEST} and {SUCCESS}, and run the same command again: they are made anew.",
            )
        return True

    def finish(self) -> dict[str, Any]:
        """Write the views (of an OpenAI batch), the manifest and `_SUCCESS`, and remove what attempts left behind.

        May be called again.

        Returns:
            The manifest: the fingerprint, the counts of all parts together, and every receipt.

        Raises:
            OutputError: A shard is not committed, or another manifest is there.
        """
        receipts = self.committed()
        missing = [shard for shard in range(self.num_shards) if shard not in receipts]
        if missing:
            raise OutputError(
                f"{len(missing)} of {self.num_shards} shards are not committed",
                details=[f"shard {shard}" for shard in missing[:_MAX_NAMED]],
                hint="Run the same command again; it answers what is missing.",
            )
        ordered = [receipts[shard] for shard in range(self.num_shards)]
        if self.kind == "openai":
            write_views(self.storage, ordered)
        manifest = self._manifest(ordered)
        data = _json(manifest)
        if not self.storage.create(MANIFEST, data) and self.storage.read(MANIFEST) != data:
            raise OutputError(
                f"{MANIFEST} does not go with the receipts",
                hint=f"Delete {MANIFEST} and {SUCCESS}, and run the same command again: they are made anew.",
            )
        self.storage.create(SUCCESS, _success(data))
        self.is_complete()
        self.storage.remove_tree(ATTEMPTS)
        return manifest

    def _job(self) -> bytes:
        return _json(self._fields())

    def _fields(self) -> dict[str, Any]:
        ours = {"output_format": self.kind, "output_prefix": self.prefix, "num_shards": self.num_shards}
        return {**self.fingerprint, **ours}

    def _compare_job(self) -> None:
        here = json.loads(self._job())
        try:
            there = json.loads(self.storage.read(JOB))
        except ValueError as error:
            raise OutputError(
                f"{JOB} is damaged: {error}", hint="Write to another folder, or delete this one."
            ) from error
        if there == here:
            return
        known = there if isinstance(there, dict) else {}
        differing = [
            f"{name}: there {_shown(known, name)}, now {_shown(here, name)}"
            for name in sorted(known.keys() | here.keys())
            if _shown(known, name) != _shown(here, name)
        ]
        raise FingerprintError(
            f"{self.storage.url('')} belongs to another job",
            details=differing,
            hint="Run the command that wrote it, name another output folder, or delete this one.",
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
            return self._write_receipt(self._receipt_of(shard, self.storage.read(part_name(shard, self.kind))))
        receipt = Receipt.from_json(self.storage.read(receipt_name(shard)))
        if receipt.shard != shard or receipt.path != part_name(shard, self.kind):
            raise _disagreement(shard)
        return receipt

    def _receipt_of(self, shard: int, data: bytes) -> Receipt:
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

    def _write_receipt(self, receipt: Receipt) -> Receipt:
        name = receipt_name(receipt.shard)
        if not self.storage.create(name, _json(asdict(receipt))):
            written = Receipt.from_json(self.storage.read(name))
            if written != receipt:
                raise _disagreement(receipt.shard)
        return receipt

    def _manifest(self, receipts: list[Receipt]) -> dict[str, Any]:
        names = ("rows", "errors", "prompt_tokens", "completion_tokens", "bytes")
        totals: dict[str, Any] = {name: sum(getattr(receipt, name) for receipt in receipts) for name in names}
        codes = Counter[str]()
        for receipt in receipts:
            codes.update(receipt.error_codes)
        totals["error_codes"] = dict(codes)
        fingerprint = json.loads(self._job())
        return {"fingerprint": fingerprint, **totals, "parts": [asdict(receipt) for receipt in receipts]}


def _in_threads(function: Callable[[_Item], _Result], items: list[_Item]) -> list[_Result]:
    if len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(min(_NUM_THREADS, len(items))) as pool:
        return list(pool.map(function, items))


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _success(manifest: bytes) -> bytes:
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n".encode()


def _shown(values: Mapping[str, Any], name: str) -> str:
    return json.dumps(values[name], ensure_ascii=False, sort_keys=True) if name in values else "nothing"


def _check_size(receipt: Receipt, size: int) -> None:
    if receipt.bytes != size:
        raise _disagreement(receipt.shard)


def _disagreement(shard: int) -> OutputError:
    return OutputError(
        f"the receipt of shard {shard} does not go with its part",
        details=[receipt_name(shard)],
        hint="Delete this receipt, and its part when it was changed, and run the same command again.",
    )
