"""Data in memory -> files a job can read from everywhere, and find again under the same name."""

import hashlib
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.batch.column_types import check_columns, plain_schema
from pipeline.batch.json_rows import MAX_DEPTH, is_utf8
from pipeline.batch.jsonl_files import MAX_LINE_BYTES, json_text
from pipeline.errors import DatasetError
from pipeline.storage import Storage, open_storage

FILE_BYTES = 64 * 1024 * 1024
_HINT = (
    "Give a list of prompts (str), a list of rows (dict) of JSON values, a pandas DataFrame, or a Dataset of Ray or "
    "Hugging Face."
)
_HUGGING_FACE_ROWS = 1024


def stage_in_memory(dataset: Any, folder: str, storage_options: Mapping[str, Any] | None = None) -> str:
    """Write data that is in memory to one file of a folder, so that every machine of a job can read it.

    The file's name carries the content's SHA-256: the same data is the same file.

    Args:
        dataset: A list of prompts (each becomes `{"prompt": ...}`), a list of dicts, or a pandas DataFrame (without its
            index). Lists become JSON lines, for their types may differ from row to row; a DataFrame becomes Parquet.
        folder: Where to write: a local path or URL that all machines see; see `open_storage`.
        storage_options: Passed to the file system.

    Returns:
        The file's path or URL.

    Raises:
        DatasetError: An item is neither str nor dict, or holds what JSON cannot hold, or the DataFrame does not become
            a table; names the position or the column.
        OutputError: The file cannot be written.
    """
    storage = open_storage(folder, storage_options)
    if isinstance(dataset, Sequence) and not isinstance(dataset, str | bytes):
        return _store(storage, "rows", b"".join(_line(item, index) for index, item in enumerate(dataset)), "jsonl")
    return _store(storage, "rows", _parquet(_frame_table(dataset)), "parquet")


def stage_tables(
    tables: Iterable[pa.Table],
    folder: str,
    storage_options: Mapping[str, Any] | None = None,
    *,
    file_bytes: int = FILE_BYTES,
) -> list[str]:
    """Write a stream of tables to Parquet files of bounded size, in order, holding one file's rows at a time.

    A name carries the file's number and its content's SHA-256: the same stream gives the same files.

    Args:
        tables: In order; each may be of any size, and their columns may differ.
        folder: Where to write: a local path or URL that all machines see; see `open_storage`.
        storage_options: Passed to the file system.
        file_bytes: About so many bytes in memory make one file.

    Returns:
        The files' paths or URLs, in order; one empty file when there are no tables.

    Raises:
        DatasetError: A column has a type that is not supported.
        OutputError: A file cannot be written.
    """
    storage = open_storage(folder, storage_options)
    paths = [
        _store(storage, f"table-{index:05d}", _parquet(table), "parquet")
        for index, table in enumerate(_files(tables, file_bytes))
    ]
    return paths or [_store(storage, "table-00000", _parquet(pa.table({})), "parquet")]


def is_hugging_face(dataset: Any) -> bool:
    """Whether it is of Hugging Face `datasets`, which need not be installed here."""
    return type(dataset).__module__.partition(".")[0] == "datasets"


def hugging_face_tables(dataset: Any) -> Iterator[pa.Table]:
    """The rows of a Hugging Face `Dataset` or `IterableDataset` as Arrow tables, in order.

    Raises:
        DatasetError: It is not one of the two, but several under names, most likely.
    """
    if not hasattr(dataset, "with_format") or not hasattr(dataset, "iter"):
        names = [repr(name) for name in dataset] if isinstance(dataset, Mapping) else []
        raise DatasetError(
            f"the dataset is a {type(dataset).__name__}",
            details=[f"it has  {name}" for name in names],
            hint='Choose one split, such as dataset["train"].',
        )
    yield from dataset.with_format("arrow").iter(batch_size=_HUGGING_FACE_ROWS)


def _store(storage: Storage, stem: str, data: bytes, extension: str) -> str:
    name = f"{stem}-{hashlib.sha256(data).hexdigest()}.{extension}"
    storage.create(name, data)
    return storage.url(name)


def _line(item: Any, index: int) -> bytes:
    row = {"prompt": item} if isinstance(item, str) else item
    if not isinstance(row, dict):
        raise DatasetError(f"item {index} of the dataset is a {type(item).__name__}", hint=_HINT)
    problem = next(_problems(row, "", 0), None)
    if problem:
        raise DatasetError(f"item {index} of the dataset holds what JSON cannot hold", details=[problem], hint=_HINT)
    line = json_text(row).encode()
    if len(line) > MAX_LINE_BYTES:
        raise DatasetError(f"item {index} of the dataset has {len(line)} bytes", hint=f"Stay below {MAX_LINE_BYTES}.")
    return line + b"\n"


def _problems(value: Any, where: str, depth: int) -> Iterator[str]:
    """Each place below a value that JSON cannot hold, and why."""
    if depth > MAX_DEPTH:
        yield f"{where[:40]}...  nested more than {MAX_DEPTH} levels deep"
    elif isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                yield f"{where or 'the row'}  the key {key!r} is a {type(key).__name__}"
            else:
                yield from _problems(key, f"{where}[{key!r}]", depth + 1)
                yield from _problems(inner, f"{where}[{key!r}]", depth + 1)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _problems(inner, f"{where}[{index}]", depth + 1)
    elif isinstance(value, str):
        if not is_utf8(value):
            yield f"{where}  half a surrogate pair, which UTF-8 cannot hold"
    elif isinstance(value, float):
        if not math.isfinite(value):
            yield f"{where}  {value}"
    elif isinstance(value, int):
        if value.bit_length() > 10_000:
            yield f"{where}  a number of {value.bit_length()} bits"
    elif value is not None:
        yield f"{where}  a {type(value).__name__}"


def _frame_table(dataset: Any) -> pa.Table:
    import pandas as pd  # takes a second to import

    if not isinstance(dataset, pd.DataFrame):
        raise DatasetError(f"the dataset is a {type(dataset).__name__}", hint=_HINT)
    names = [name for name in dataset.columns if not isinstance(name, str)]
    if names:
        raise DatasetError(
            "the DataFrame has column names that are not text",
            details=[repr(name) for name in names[:8]],
            hint="Rename them: frame.columns = [str(name) for name in frame.columns].",
        )
    twice = sorted(set(dataset.columns[dataset.columns.duplicated()]))
    if twice:
        raise DatasetError("the DataFrame has two columns of one name", details=twice, hint="Rename one of them.")
    try:
        return pa.Table.from_pandas(dataset, preserve_index=False)
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise DatasetError(
            f"the DataFrame does not become a table: {' '.join(str(part) for part in error.args)}",
            hint="Give each column values of one type, or pass a list of dicts.",
        ) from error


def _parquet(table: pa.Table) -> bytes:
    check_columns(table.schema, "the dataset")
    sink = io.BytesIO()
    pq.write_table(table.cast(plain_schema(table.schema)), sink, compression="zstd", version="2.6")
    return sink.getvalue()


def _files(tables: Iterable[pa.Table], file_bytes: int) -> Iterator[pa.Table]:
    """The same rows in tables of about `file_bytes`, each with one schema."""
    waiting: list[pa.Table] = []
    size = 0
    for table in tables:
        if waiting and waiting[0].schema != table.schema:
            yield pa.concat_tables(waiting)
            waiting, size = [], 0
        for piece in _pieces(table, file_bytes):
            waiting.append(piece)
            size += piece.nbytes
            if size >= file_bytes:
                yield pa.concat_tables(waiting)
                waiting, size = [], 0
    if waiting:
        yield pa.concat_tables(waiting)


def _pieces(table: pa.Table, file_bytes: int) -> Iterator[pa.Table]:
    rows = max(1, math.ceil(table.num_rows * file_bytes / max(1, table.nbytes)))
    for start in range(0, max(1, table.num_rows), rows):
        yield table.slice(start, rows)
