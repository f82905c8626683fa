"""Hive partitions: a directory named `key=value` is a column of all files below it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import unquote

import pyarrow as pa

from pipeline.errors import DatasetError

Partition = tuple[tuple[str, str | int | None], ...]
"""Column and value, for every partition column of the dataset."""

_NULL = "__HIVE_DEFAULT_PARTITION__"
_WHOLE_NUMBER = re.compile(r"0|-?[1-9][0-9]{0,18}")
_NUM_NAMED = 8


@dataclass(frozen=True)
class Partitions:
    """The partition columns of a dataset.

    Args:
        schema: Their names and types, int64 or string.
        of_files: The values of every file, in the files' order.
    """

    schema: pa.Schema
    of_files: tuple[Partition, ...]

    def refuse_collisions(self, columns: Sequence[str]) -> None:
        """Refuse a partition column that the files have as well: which of the two is meant, nobody knows.

        Raises:
            DatasetError: Names the columns, and the way out.
        """
        both = [name for name in self.schema.names if name in columns]
        if both:
            raise DatasetError(
                "the dataset's directories and its files have columns of the same name",
                details=[f"column {name!r}" for name in both[:_NUM_NAMED]],
                hint="Set hive_partitions: false to take those of the files, or rename the ones or the others.",
            )


def read_partitions(names: Sequence[str]) -> Partitions:
    """The partition columns that the directories of a dataset's files tell.

    A column holds whole numbers when every value of it is one as it is written (`01` is text, so that nothing is lost),
    else text. Percent-encoding is undone; `__HIVE_DEFAULT_PARTITION__` and a missing directory are null.

    Args:
        names: Of all files, relative to the dataset's root.

    Raises:
        DatasetError: A path names one column twice, or a name is not UTF-8.

    Source: the layout that Hive, Spark and pyarrow write.
    """
    found = [_pairs(name) for name in names]
    keys = list(dict.fromkeys(key for pairs in found for key in pairs))
    are_numbers = {key: _are_numbers([pairs.get(key) for pairs in found]) for key in keys}
    of_files = tuple(
        tuple((key, _value(pairs.get(key), is_number=is_number)) for key, is_number in are_numbers.items())
        for pairs in found
    )
    fields = [(key, pa.int64() if is_number else pa.string()) for key, is_number in are_numbers.items()]
    return Partitions(pa.schema(fields), of_files)


def add_columns(table: pa.Table, partition: Partition, columns: Sequence[str] | None) -> pa.Table:
    """A table with the partition columns of its file.

    Args:
        table: From one file.
        partition: That file's values.
        columns: The columns that are wanted; None for all.
    """
    for name, value in partition:
        if columns is None or name in columns:
            count = table.num_rows
            table = table.append_column(name, pa.nulls(count) if value is None else pa.repeat(pa.scalar(value), count))
    return table


def _pairs(name: str) -> Mapping[str, str | None]:
    pairs: dict[str, str | None] = {}
    for directory in name.split("/")[:-1]:
        key, equals, value = directory.partition("=")
        if not equals or not key:
            continue
        key = _decoded(key, name)
        if key in pairs:
            raise DatasetError(f"the path {name} names the column {key!r} twice", hint="Rename one of the directories.")
        pairs[key] = None if value == _NULL else _decoded(value, name)
    return pairs


def _decoded(text: str, name: str) -> str:
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"the path {name} is not UTF-8 when its percent-encoding is undone",
            hint="Rename the directory, or set hive_partitions: false.",
        ) from error


def _are_numbers(values: Sequence[str | None]) -> bool:
    texts = {value for value in values if value is not None}
    return bool(texts) and all(_WHOLE_NUMBER.fullmatch(text) and -(1 << 63) <= int(text) < 1 << 63 for text in texts)


def _value(text: str | None, *, is_number: bool) -> str | int | None:
    return int(text) if is_number and text is not None else text
