"""Which column types a dataset may have, and how the types of its files become one schema."""

from collections.abc import Iterable

import pyarrow as pa
import pyarrow.types as types

from pipeline.errors import DatasetError

_PLAIN = (
    types.is_null,
    types.is_boolean,
    types.is_integer,
    types.is_floating,
    types.is_string,
    types.is_large_string,
    types.is_binary,
    types.is_large_binary,
    types.is_fixed_size_binary,
    types.is_date,
    types.is_time,
    types.is_timestamp,
    types.is_duration,
    types.is_decimal,
)
_SCALARS = (
    types.is_boolean,
    types.is_integer,
    types.is_floating,
    types.is_date,
    types.is_time,
    types.is_timestamp,
    types.is_decimal,
)
_LISTS = (types.is_list, types.is_large_list, types.is_fixed_size_list)
_MAX_DEPTH = 64


def check_columns(schema: pa.Schema, name: str) -> None:
    """Refuse columns that occur twice, and types outside the allow-list.

    Allowed are null, bool, integers, floats, strings, binary, dates, times, durations, decimals, and lists, structs,
    maps and dictionaries of them. Extension types are not: reading one runs the code registered for it.

    Args:
        schema: The schema of one file.
        name: The file, for the message.

    Raises:
        DatasetError: Names the column and its type.
    """
    names = schema.names
    if len(set(names)) != len(names):
        twice = sorted({column for column in names if names.count(column) > 1})
        raise DatasetError(f"{name} has two columns of one name", details=twice, hint="Rename one of them.")
    for field in schema:
        _check_type(field.type, name, field.name, 0)


def _check_type(kind: pa.DataType, name: str, column: str, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise DatasetError(
            f"{name} nests column {column!r} more than {_MAX_DEPTH} levels deep", hint="Store the column as JSON text."
        )
    if isinstance(kind, pa.BaseExtensionType) or not _is_allowed(kind):
        raise DatasetError(
            f"{name} has a column of a type that is not supported",
            details=[f"column {column!r}  {kind}"],
            hint="Cast the column to text, numbers, or lists and structs of them, or leave it out.",
        )
    for inner in _inner_types(kind):
        _check_type(inner, name, column, depth + 1)


def _is_allowed(kind: pa.DataType) -> bool:
    nested = (*_LISTS, types.is_struct, types.is_map, types.is_dictionary)
    return any(check(kind) for check in (*_PLAIN, *nested))


def _inner_types(kind: pa.DataType) -> list[pa.DataType]:
    if types.is_dictionary(kind):
        return [kind.value_type]
    if types.is_map(kind):
        return [kind.key_type, kind.item_type]
    if types.is_struct(kind):
        return [field.type for field in kind]
    return [kind.value_type] if any(check(kind) for check in _LISTS) else []


def plain_schema(schema: pa.Schema) -> pa.Schema:
    """The schema without metadata, with every column nullable and dictionaries as the values they stand for."""
    return pa.schema(
        [
            pa.field(field.name, field.type.value_type if types.is_dictionary(field.type) else field.type)
            for field in schema
        ]
    )


def unified_schema(schemas: Iterable[tuple[str, pa.Schema]]) -> pa.Schema:
    """One schema that holds the columns of all files.

    A missing column is null, numbers widen, and what is text in one file and a number, truth value or date in another
    is text. (A value that the common type cannot hold, a whole number above 2**53 in a column of floats, is found when
    it is written, and is its row's failure.)

    Args:
        schemas: File name and plain schema of every file, in order.

    Raises:
        DatasetError: Two files give one column types that have nothing in common; names the file, column and types.
    """
    merged: dict[str, pa.Field] = {}
    seen: set[pa.Schema] = set()
    for name, schema in schemas:
        if schema in seen:
            continue
        seen.add(schema)
        differing = []
        for field in schema:
            before = merged.get(field.name)
            common = field if before is None else _common(before, field)
            if before is not None and common is None:
                differing.append(f"column {field.name!r}  {before.type} before, {field.type} here")
            merged[field.name] = common or field
        if differing:
            raise DatasetError(
                f"{name} does not fit the files before it",
                details=differing,
                hint="Give the column one type in all files, or run one job for each.",
            )
    return pa.schema(list(merged.values()))


def _common(before: pa.Field, here: pa.Field) -> pa.Field | None:
    """A field that holds the values of both, or None."""
    if before.type == here.type:
        return before
    try:
        return pa.unify_schemas([pa.schema([before]), pa.schema([here])], promote_options="permissive").field(0)
    except pa.ArrowException:
        return pa.field(here.name, pa.string()) if _is_textual(before.type, here.type) else None


def _is_textual(first: pa.DataType, second: pa.DataType) -> bool:
    """Whether one is text and the other has a plain text for every value."""
    for text, other in ((first, second), (second, first)):
        if types.is_string(text) or types.is_large_string(text):
            return any(check(other) for check in _SCALARS)
    return False
