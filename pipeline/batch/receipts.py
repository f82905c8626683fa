"""Receipts: what each committed part holds, a small file each; and packs of many, for a quick start of a long job."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from pipeline.batch.layout import PACKS, receipt_name
from pipeline.errors import OutputError
from pipeline.storage import Storage

PACK_RECEIPTS = 1000
_NUM_THREADS = 16
_CHUNK = 32
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
        """The receipt as JSON."""
        return json_bytes(asdict(self)).decode()

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
        return cls.from_values(values)

    @classmethod
    def from_values(cls, values: Any) -> "Receipt":
        """The receipt of parsed JSON.

        Raises:
            OutputError: The values are not a receipt.
        """
        if (
            not isinstance(values, dict)
            or values.keys() != _FIELDS.keys()
            or any(type(values[name]) is not kind for name, kind in _FIELDS.items())
        ):
            raise OutputError(
                "a receipt is damaged: its fields are other ones",
                hint="Delete the receipt, and run the same command again: it is made anew from the part.",
            )
        return cls(**values)


_FIELDS = {item.name: _KINDS.get(item.name, int) for item in fields(Receipt)}


def totals_of(receipts: Iterable[Receipt]) -> dict[str, Any]:
    """The counts of many receipts together: rows, errors, tokens, bytes, and errors by code."""
    names = ("rows", "errors", "prompt_tokens", "completion_tokens", "bytes")
    totals: dict[str, Any] = dict.fromkeys(names, 0)
    codes: dict[str, int] = {}
    for receipt in receipts:
        for name in names:
            totals[name] += getattr(receipt, name)
        for code, count in receipt.error_codes.items():
            codes[code] = codes.get(code, 0) + count
    return {**totals, "error_codes": codes}


def read_receipt(storage: Storage, shard: int) -> Receipt:
    """The receipt of a shard.

    Raises:
        OutputError: There is none, or it is damaged; names it.
    """
    name = receipt_name(shard)
    try:
        return Receipt.from_json(storage.read(name))
    except OutputError as error:
        raise OutputError(error.message, details=[name, *error.details], hint=error.hint) from error


def write_pack(storage: Storage, receipts: Sequence[Receipt]) -> None:
    """Write copies of many receipts as one file, which is read in place of theirs when the job is resumed.

    A pack is named by its content; the receipts' own files stay, and remain the truth.
    """
    lines = [json.dumps(asdict(receipt), separators=(",", ":"), sort_keys=True) for receipt in receipts]
    data = "\n".join(lines).encode() + b"\n"
    storage.create(f"{PACKS}/{hashlib.sha256(data).hexdigest()}.jsonl", data)


def read_packs(storage: Storage, names: Sequence[str]) -> dict[int, Receipt]:
    """The receipts of some packs, by shard.

    Raises:
        OutputError: A pack is damaged; names it.
    """

    def read(name: str) -> list[Receipt]:
        try:
            return [Receipt.from_json(line) for line in storage.read(name).splitlines()]
        except OutputError as error:
            raise OutputError(
                f"{name} is damaged",
                details=[error.message],
                hint=f"Delete the folder {PACKS}: what is in it are copies.",
            ) from error

    return {receipt.shard: receipt for pack in in_threads(read, names) for receipt in pack}


class Packer:
    """Packs the receipts of a run as they come, so that few have to be read one by one when it is continued.

    Args:
        storage: The output folder.
        size: Receipts in a pack.
    """

    def __init__(self, storage: Storage, *, size: int = PACK_RECEIPTS) -> None:
        self._storage = storage
        self._size = size
        self._waiting: list[Receipt] = []

    def add(self, receipt: Receipt) -> None:
        """Take one more receipt."""
        self._waiting.append(receipt)
        if len(self._waiting) >= self._size:
            write_pack(self._storage, self._waiting)
            self._waiting.clear()


def in_threads(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """A function's results for all items, in order; calls wait for storage side by side."""
    if len(items) < 2:
        return [function(item) for item in items]
    size = _CHUNK if len(items) > _CHUNK * _NUM_THREADS else 1
    chunks = [items[start : start + size] for start in range(0, len(items), size)]
    with ThreadPoolExecutor(min(_NUM_THREADS, len(chunks))) as pool:
        found = pool.map(lambda chunk: [function(item) for item in chunk], chunks)
        return [result for results in found for result in results]


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """JSON as this folder's files hold it: the same value gives the same bytes."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False).encode() + b"\n"
