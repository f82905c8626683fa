"""The plan of a job: which rows of which file make up which shard."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import pyarrow as pa

from pipeline.batch.partitions import Partition
from pipeline.errors import DatasetError

Format = Literal["parquet", "jsonl", "csv", "arrow"]
FORMATS: tuple[str, ...] = get_args(Format)


@dataclass(frozen=True)
class FileSlice:
    """Rows of one file that follow each other.

    Args:
        path: Where to read from: an absolute local path, or a URL.
        name: The file's name relative to the dataset's root, with `/`; the same on every machine.
        start: The first row (Parquet, Arrow, CSV), or the byte from which lines may begin (JSONL).
        stop: One past the last row (Parquet, Arrow, CSV), or the byte at which no line of this slice may begin (JSONL).
            JSONL that is compressed is one slice a file, from 0 to its size.
        num_rows: Rows in the slice; None for JSONL, where only reading tells.
        file_bytes: The file's size when the job was planned; reading refuses a file of another size.
        max_bytes: What a compressed file may unpack to; reading refuses more. None for a file that is not compressed.
        partition: The columns that the file's directories tell, and their values.
    """

    path: str
    name: str
    start: int
    stop: int
    num_rows: int | None
    file_bytes: int
    max_bytes: int | None = None
    partition: Partition = ()


@dataclass(frozen=True)
class Shard:
    """A piece of the dataset, decided once, before any work: a slice of a file, or several small files as a whole.

    Args:
        index: The shard's number in the job, from 0; part `index` answers it.
        format: How its files are written.
        slices: What it is made of, in the order of its rows. The columns of several slices have the same types.
    """

    index: int
    format: Format
    slices: tuple[FileSlice, ...]

    @property
    def num_rows(self) -> int | None:
        """Its rows; None for JSONL, where only reading tells."""
        counts = [item.num_rows for item in self.slices if item.num_rows is not None]
        return sum(counts) if len(counts) == len(self.slices) else None

    @property
    def paths(self) -> tuple[str, ...]:
        """Its files."""
        return tuple(item.path for item in self.slices)

    def to_json(self) -> str:
        """The shard as one line of JSON."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Shard":
        """The shard that `to_json` wrote.

        Raises:
            DatasetError: The text is not such a shard.
        """
        hint = "Pass the text that Shard.to_json returned."
        try:
            values = json.loads(text)
        except ValueError as error:
            raise DatasetError(f"not a shard: {error}", hint=hint) from error
        if not _has_fields(values, cls) or not all(_has_fields(item, FileSlice) for item in values["slices"]):
            raise DatasetError("not a shard: its fields are other ones", hint=hint)
        slices = [{**item, "partition": tuple(map(tuple, item["partition"]))} for item in values["slices"]]
        return cls(values["index"], values["format"], tuple(FileSlice(**item) for item in slices))


def _has_fields(values: Any, kind: type) -> bool:
    return isinstance(values, dict) and values.keys() == {item.name for item in fields(kind)}


@dataclass(frozen=True)
class ShardPlan:
    """All shards of a job, and what is known of the input before reading it.

    Args:
        shards: In order; shard `i` has `index` i. Empty when the dataset has no rows.
        columns: The known input columns, partition columns last. For JSONL those of each file's first lines: later
            lines may have more.
        schema: The columns' types, every column nullable, dictionaries decoded. For JSONL what the first lines
            suggest; a column that holds any JSON is a string column with the field metadata `JSON_TEXT`.
        format: How the files are written.
        digest: SHA-256 over file names and sizes, row counts, columns and shard bounds; not over absolute paths or
            times, so that the same data gives the same digest on every machine.
        num_rows: Rows in all; None for JSONL.
        num_bytes: Size of all files.
    """

    shards: tuple[Shard, ...]
    columns: tuple[str, ...]
    schema: pa.Schema
    format: Format
    digest: str
    num_rows: int | None
    num_bytes: int


JSON_TEXT = {b"content": b"json"}
"""Field metadata of a string column whose values are JSON texts."""


def plan_digest(shards: Iterable[Shard], files: Iterable[tuple[str, int, int | None]], schema: pa.Schema) -> str:
    """SHA-256, in hex, over what a plan depends on.

    Args:
        shards: The plan's shards, in order.
        files: Name, size in bytes and number of rows (None when not known) of every file, in order.
        schema: The plan's schema.
    """
    digest = hashlib.sha256()
    columns = [[item.name, str(item.type), item.metadata == JSON_TEXT] for item in schema]
    for record in (
        ["columns", columns],
        *(["file", *file] for file in files),
        *(
            ["shard", shard.index, item.name, shard.format, item.start, item.stop]
            for shard in shards
            for item in shard.slices
        ),
    ):
        digest.update(json.dumps(record, separators=(",", ":")).encode())
        digest.update(b"\n")
    return digest.hexdigest()
