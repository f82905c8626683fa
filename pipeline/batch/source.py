"""Files -> deterministic shards -> rows: the input side of a batch job."""

import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import Any, BinaryIO, cast

import pyarrow as pa

from pipeline.batch import arrow_files, csv_files, jsonl_files, parquet_files
from pipeline.batch.column_types import plain_schema, unified_schema
from pipeline.batch.compression import MAX_DECOMPRESSED_BYTES, DecompressedFile, split_codec
from pipeline.batch.files import TEXT_FORMATS, DataFile, Dataset, file_format, find_files
from pipeline.batch.partitions import Partition, add_columns, read_partitions
from pipeline.batch.shards import FileSlice, Format, Shard, ShardPlan, plan_digest
from pipeline.errors import ConfigError, DatasetError
from pipeline.storage.filesystems import open_filesystem, translated

DEFAULT_SHARD_ROWS = 256
MAX_SLICES = 1_000_000
_MAX_GROUP = 256  # files in a shard, which are opened one after the other
_NUM_READERS = 16
_READERS: Mapping[Format, Callable[[BinaryIO, str, int, int, Sequence[str] | None], pa.Table]] = {
    "parquet": parquet_files.read_rows,
    "arrow": arrow_files.read_rows,
    "csv": csv_files.read_records,
}


@dataclass(frozen=True)
class _Survey:
    """What planning learns of one file.

    Args:
        file: The file.
        size: How much it counts towards a shard: its rows, or for JSONL its bytes; None where only reading tells.
        schema: Its columns; None for JSONL and for an empty file.
        kinds: Of JSONL, what its first lines hold; see `jsonl_files.head_kinds`.
        step: Of JSONL, the bytes of a shard by its first lines; None when it has none.
        max_bytes: What it may unpack to; None when it is not compressed.
    """

    file: DataFile
    size: int | None = 0
    schema: pa.Schema | None = None
    kinds: Mapping[str, frozenset[str]] = field(default_factory=dict)
    step: int | None = None
    max_bytes: int | None = None

    @property
    def num_rows(self) -> int | None:
        """Its rows; None for JSONL and for an empty file."""
        return None if self.schema is None else self.size

    @cached_property
    def types(self) -> tuple[tuple[str, pa.DataType], ...] | None:
        """Names and types of its columns; None for JSONL."""
        return None if self.schema is None else tuple((item.name, item.type) for item in self.schema)


def plan_shards(
    dataset: Dataset,
    *,
    format: str | None = None,  # noqa: A002 - the name a person writes in a config
    shard_rows: int = DEFAULT_SHARD_ROWS,
    max_decompressed_bytes: int = MAX_DECOMPRESSED_BYTES,
    hive_partitions: bool = True,
    storage_options: Mapping[str, Any] | None = None,
) -> ShardPlan:
    """Decide which rows make up which shard, from names, sizes, footers and first lines alone (CSV is read once).

    The same files give the same plan on every machine; the order is that of file names. Files that hold more than a
    shard are cut, and small ones that follow each other and have the same columns are put together to one. A file of
    JSON lines that is compressed is never cut, for only reading it would tell where.

    Args:
        dataset: A path, a glob, a directory, any fsspec URL, or a list of them; see `files.find_files`.
        format: `parquet`, `jsonl`, `csv` or `arrow`; None to go by the file extensions.
        shard_rows: Rows in a shard; for JSONL about so many, by the mean length of the first lines.
        max_decompressed_bytes: What a file of text compressed by gzip or zstd may unpack to.
        hive_partitions: Whether directories named `key=value` below the dataset's root become columns.
        storage_options: Passed to the file system.

    Raises:
        DatasetError: Nothing is found, formats or columns do not fit together, or a file is damaged; names it.
        ConfigError: `format` or `shard_rows` is not valid.
        MissingDependencyError: The package of the file system is not installed.
    """
    if not isinstance(shard_rows, int) or isinstance(shard_rows, bool) or shard_rows < 1:
        raise ConfigError(f"shard_rows is {shard_rows!r}", hint="Give a whole number of at least 1.")
    files = find_files(dataset, storage_options)
    found = file_format(files, format)
    partitions = read_partitions([file.name for file in files] if hive_partitions else [])
    surveys = _survey_all(files, found, shard_rows, max_decompressed_bytes, storage_options)
    if found == "jsonl":
        schema = jsonl_files.sampled_schema(item.kinds for item in surveys)
        step = next((item.step for item in surveys if item.step is not None), 1)
        num_rows = None
    else:
        schema = unified_schema(
            (item.file.name, plain_schema(item.schema)) for item in surveys if item.schema is not None
        )
        step = shard_rows
        num_rows = sum(item.num_rows or 0 for item in surveys)
    partitions.refuse_collisions(schema.names)
    schema = pa.schema([*schema, *partitions.schema])
    _refuse_too_many(surveys, found, step)
    shards = tuple(_cut(surveys, found, step, partitions.of_files or ((),) * len(files)))
    return ShardPlan(
        shards=shards,
        columns=tuple(schema.names),
        schema=schema,
        format=found,
        digest=plan_digest(shards, ((item.file.name, item.file.size, item.num_rows) for item in surveys), schema),
        num_rows=num_rows,
        num_bytes=sum(file.size for file in files),
    )


def read_shard(
    shard: Shard, columns: Sequence[str] | None = None, storage_options: Mapping[str, Any] | None = None
) -> pa.Table:
    """The rows of one shard, in file order.

    Args:
        shard: One of a plan's shards.
        columns: Those to read, as far as the file has them; None for all. Not for JSONL.
        storage_options: Passed to the file system.

    Returns:
        The columns of the file with the file's own types (CSV: strings), then those of its directories; for JSONL
        `line` and `offset`, see `jsonl_files.read_lines`, and `slice`, the number of the slice that each line is of.
        `rows.iter_rows` turns the table into rows.

    Raises:
        DatasetError: The file is gone, damaged, too large when it is decompressed, or not the one the plan was made
            for; names it.
    """
    tables = [_read_slice(item, shard.format, columns, storage_options) for item in shard.slices]
    if shard.format == "jsonl":
        tables = [
            table.append_column("slice", pa.repeat(pa.scalar(number, pa.int32()), table.num_rows))
            for number, table in enumerate(tables)
        ]
    return pa.concat_tables(tables, promote_options="default") if len(tables) > 1 else tables[0]


def read_shards(
    shards: Sequence[Shard], columns: Sequence[str] | None = None, storage_options: Mapping[str, Any] | None = None
) -> Iterator[pa.Table]:
    """The rows of several shards, a table each; see `read_shard`.

    A Parquet file is opened once for all shards that follow each other in it, and no row of it is decoded twice.

    Raises:
        DatasetError: As `read_shard`.
    """
    for path, group in groupby(shards, key=_shared_file):
        if path is None:
            for shard in group:
                yield read_shard(shard, columns, storage_options)
        else:
            yield from _read_parquet([shard.slices[0] for shard in group], columns, storage_options)


def _shared_file(shard: Shard) -> str | None:
    """The file that a shard may share with its neighbours; None where each is read by itself."""
    return shard.paths[0] if shard.format == "parquet" and len(shard.slices) == 1 else None


def _read_parquet(
    items: Sequence[FileSlice], columns: Sequence[str] | None, options: Mapping[str, Any] | None
) -> Iterator[pa.Table]:
    first = items[0]
    with _opened(first.path, first.name, "parquet", options) as file:
        _check_size(file, first)
        tables = parquet_files.read_ranges(file, first.name, [(item.start, item.stop) for item in items], columns)
        for table in tables:
            yield add_columns(table, first.partition, columns)


def _read_slice(
    item: FileSlice, found: Format, columns: Sequence[str] | None, options: Mapping[str, Any] | None
) -> pa.Table:
    with _opened(item.path, item.name, found, options) as file:
        _check_size(file, item)
        text = _text_of(file, item.name, item.max_bytes)
        if found == "jsonl":
            return _read_lines(text, item)
        table = _READERS[found](text, item.name, item.start, item.stop, columns)
    return add_columns(table, item.partition, columns)


def _check_size(file: BinaryIO, item: FileSlice) -> None:
    size = file.seek(0, io.SEEK_END)
    if size != item.file_bytes:
        raise DatasetError(
            f"{item.name} has {size} bytes now, and had {item.file_bytes} when the job was planned",
            hint="Do not change input files while a job runs; start the job again in another output folder.",
        )


def _read_lines(file: BinaryIO, item: FileSlice) -> pa.Table:
    if item.max_bytes is None:
        return jsonl_files.read_lines(file, item.start, item.stop)
    data = file.read()
    return jsonl_files.read_lines(io.BytesIO(data), 0, len(data))


def _text_of(file: BinaryIO, name: str, max_bytes: int | None) -> BinaryIO:
    """The file, or what it unpacks to when it is a compressed one, which `max_bytes` tells."""
    codec = split_codec(name)[1]
    if codec is None or max_bytes is None:
        return file
    return cast(BinaryIO, DecompressedFile(file, name, codec, max_bytes))


def _survey_all(
    files: Sequence[DataFile], found: Format, shard_rows: int, max_bytes: int, options: Mapping[str, Any] | None
) -> list[_Survey]:
    head_bytes = jsonl_files.head_bytes(len(files))

    def survey_one(file: DataFile) -> _Survey:
        is_compressed = found in TEXT_FORMATS and split_codec(file.name)[1] is not None
        survey = _Survey(file, max_bytes=max_bytes if is_compressed else None)
        if file.size == 0:
            return survey
        with _opened(file.path, file.name, found, options) as opened:
            text = _text_of(opened, file.name, survey.max_bytes)
            if found == "jsonl":
                head = jsonl_files.read_head(text, file.name, head_bytes)
                kinds = jsonl_files.head_kinds(head, is_whole=len(head) < head_bytes)
                step = jsonl_files.shard_bytes(head, shard_rows) if head else None
                size = file.size if not is_compressed else len(head) if len(head) < head_bytes else None
                return replace(survey, size=size, kinds=kinds, step=step)
            schema, num_rows = _SURVEYS[found](text, file.name)
            return replace(survey, size=num_rows, schema=schema.remove_metadata())

    with ThreadPoolExecutor(min(_NUM_READERS, len(files))) as pool:
        return list(pool.map(survey_one, files))


def _survey_parquet(file: BinaryIO, name: str) -> tuple[pa.Schema, int]:
    footer = parquet_files.read_footer(file, name)
    return footer.schema, footer.metadata.num_rows


_SURVEYS: Mapping[Format, Callable[[BinaryIO, str], tuple[pa.Schema, int]]] = {
    "parquet": _survey_parquet,
    "arrow": arrow_files.survey,
    "csv": csv_files.survey,
}


def _cut(surveys: Sequence[_Survey], found: Format, step: int, partitions: Sequence[Partition]) -> Iterator[Shard]:
    pieces = [
        (item, FileSlice(item.file.path, item.file.name, *bounds, item.file.size, item.max_bytes, partition))
        for item, partition in zip(surveys, partitions, strict=True)
        for bounds in _bounds(item, found, step)
    ]
    return (Shard(index, found, slices) for index, slices in enumerate(_grouped(pieces, step)))


def _bounds(item: _Survey, found: Format, step: int) -> Iterator[tuple[int, int, int | None]]:
    """First and last row or byte of each slice of a file, and the number of its rows where it is known."""
    end, size = _extent(item, found, step)
    for start in range(0, end, size):
        stop = min(start + size, end)
        yield start, stop, None if found == "jsonl" else stop - start


def _grouped(pieces: Iterable[tuple[_Survey, FileSlice]], step: int) -> Iterator[tuple[FileSlice, ...]]:
    """The slices of each shard: small files that follow each other, while they fit, and everything else by itself."""
    group: list[FileSlice] = []
    size, types = 0, None
    for item, piece in pieces:
        if item.size is None or item.size > step - size or item.types != types or len(group) == _MAX_GROUP:
            if group:
                yield tuple(group)
            group, size, types = [], 0, item.types
        group.append(piece)
        size += step if item.size is None else item.size
    if group:
        yield tuple(group)


def _extent(item: _Survey, found: Format, step: int) -> tuple[int, int]:
    """Where a file ends, and how much of it is a shard: in bytes for JSONL, else in rows."""
    if found != "jsonl":
        return item.num_rows or 0, step
    return item.file.size, step if item.max_bytes is None else max(1, item.file.size)


def _refuse_too_many(surveys: Sequence[_Survey], found: Format, step: int) -> None:
    count = sum(math.ceil(end / size) for end, size in (_extent(item, found, step) for item in surveys))
    if count > MAX_SLICES:
        raise DatasetError(
            f"the dataset would be cut into {count} pieces, and a job has at most {MAX_SLICES}",
            hint="Raise shard_rows, or write fewer and larger files.",
        )


@contextmanager
def _opened(path: str, name: str, found: Format, options: Mapping[str, Any] | None) -> Iterator[BinaryIO]:
    is_streamed = found == "csv" or split_codec(name)[1] is not None  # the others ask for just the ranges they need
    filesystem, inner = open_filesystem(path, options, DatasetError)
    hint = "Check that it exists, may be read and is whole."
    with (
        translated(f"{name} cannot be read", DatasetError, hint=hint),
        filesystem.open(inner, "rb", cache_type="readahead" if is_streamed else "none") as file,
    ):
        yield cast(BinaryIO, file)
