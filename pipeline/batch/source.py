"""Files -> deterministic shards -> rows: the input side of a batch job."""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import pyarrow as pa

from pipeline.batch import csv_files, jsonl_files, parquet_files
from pipeline.batch.column_types import plain_schema, unified_schema
from pipeline.batch.files import DataFile, Dataset, file_format, find_files
from pipeline.batch.filesystems import open_filesystem, translated
from pipeline.batch.shards import Format, Shard, ShardPlan, plan_digest
from pipeline.errors import ConfigError, DatasetError

DEFAULT_SHARD_ROWS = 256
_NUM_READERS = 16


@dataclass(frozen=True)
class _Survey:
    """What planning learns of one file."""

    file: DataFile
    schema: pa.Schema | None = None
    num_rows: int | None = None
    head: bytes = b""


def plan_shards(
    dataset: Dataset,
    *,
    format: str | None = None,  # noqa: A002 - the name a person writes in a config
    shard_rows: int = DEFAULT_SHARD_ROWS,
    storage_options: Mapping[str, Any] | None = None,
) -> ShardPlan:
    """Decide which rows make up which shard, from names, sizes, footers and first lines alone (CSV is read once).

    The same files give the same plan on every machine. A shard never crosses a file; the order is that of file names.

    Args:
        dataset: A path, a glob, a directory, any fsspec URL, or a list of them; see `files.find_files`.
        format: `parquet`, `jsonl` or `csv`; None to go by the file extensions.
        shard_rows: Rows in a shard; for JSONL about so many, by the mean length of the first lines.
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
    surveys = _survey_all(files, found, storage_options)
    if found == "jsonl":
        schema = jsonl_files.sampled_schema((item.head, len(item.head) == item.file.size) for item in surveys)
        step = next((jsonl_files.shard_bytes(item.head, shard_rows) for item in surveys if item.head), 1)
        num_rows = None
    else:
        schema = unified_schema((item.file.name, item.schema) for item in surveys if item.schema is not None)
        step = shard_rows
        num_rows = sum(item.num_rows or 0 for item in surveys)
    shards = tuple(_cut(surveys, found, step))
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
        The columns of the file with the file's own types (CSV: strings); for JSONL `line` and `offset`, see
        `jsonl_files.read_lines`. `rows.iter_rows` turns the table into rows.

    Raises:
        DatasetError: The file is gone, damaged, or not the one the plan was made for; names it.
    """
    with _opened(shard.path, shard.name, shard.format, storage_options) as file:
        size = file.seek(0, io.SEEK_END)
        if size != shard.file_bytes:
            raise DatasetError(
                f"{shard.name} has {size} bytes now, and had {shard.file_bytes} when the job was planned",
                hint="Do not change input files while a job runs; start the job again in another output folder.",
            )
        if shard.format == "jsonl":
            return jsonl_files.read_lines(file, shard.start, shard.stop)
        read = parquet_files.read_rows if shard.format == "parquet" else csv_files.read_records
        return read(file, shard.name, shard.start, shard.stop, columns)


def _survey_all(files: Sequence[DataFile], found: Format, options: Mapping[str, Any] | None) -> list[_Survey]:
    survey = {"parquet": _survey_parquet, "csv": _survey_csv, "jsonl": _survey_jsonl}[found]

    def survey_one(file: DataFile) -> _Survey:
        if file.size == 0:
            return _Survey(file)
        with _opened(file.path, file.name, found, options) as opened:
            return survey(file, opened)

    return _in_threads(survey_one, files)


def _survey_parquet(file: DataFile, opened: BinaryIO) -> _Survey:
    footer = parquet_files.read_footer(opened, file.name)
    return _Survey(file, plain_schema(footer.schema), footer.metadata.num_rows)


def _survey_csv(file: DataFile, opened: BinaryIO) -> _Survey:
    return _Survey(file, *csv_files.survey(opened, file.name))


def _survey_jsonl(file: DataFile, opened: BinaryIO) -> _Survey:
    return _Survey(file, head=jsonl_files.read_head(opened, file.name))


def _in_threads(survey: Callable[[DataFile], _Survey], files: Sequence[DataFile]) -> list[_Survey]:
    with ThreadPoolExecutor(min(_NUM_READERS, len(files))) as pool:
        return list(pool.map(survey, files))


def _cut(surveys: Sequence[_Survey], found: Format, step: int) -> Iterator[Shard]:
    index = 0
    for item in surveys:
        end = item.file.size if found == "jsonl" else item.num_rows or 0
        for start in range(0, end, step):
            stop = min(start + step, end)
            num_rows = None if found == "jsonl" else stop - start
            yield Shard(index, item.file.path, item.file.name, found, start, stop, num_rows, item.file.size)
            index += 1


@contextmanager
def _opened(path: str, name: str, found: Format, options: Mapping[str, Any] | None) -> Iterator[BinaryIO]:
    is_streamed = found == "csv"  # the others ask for just the ranges they need
    filesystem, inner = open_filesystem(path, options, DatasetError)
    hint = "Check that it exists, may be read and is whole."
    with (
        translated(f"{name} cannot be read", DatasetError, hint=hint),
        filesystem.open(inner, "rb", cache_type="readahead" if is_streamed else "none") as file,
    ):
        yield cast(BinaryIO, file)
