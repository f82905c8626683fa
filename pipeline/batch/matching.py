"""Whether an answer is right: the same text, or SQL that gives the same rows on databases made up for its schema.

A schema comes without rows, so rows are generated from it, with the constants of the expected query among their values:
a row just inside and one just outside a condition tell a wrong condition from the right one. Queries that agree on all
of them may still differ; those that do not agree do differ.

Source: R. Zhong, T. Yu, D. Klein, "Semantic Evaluation for Text-to-SQL with Distilled Test Suites", EMNLP 2020
(https://arxiv.org/abs/2010.02840), whose idea of fuzzing with the query's own constants this follows.
"""

import re
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from random import Random
from typing import Literal

from pipeline.batch.sealed_database import MAX_SQL_BYTES, MAX_VALUE_BYTES, Row, SealedDatabase, bound, with_limit

ROWS_PER_TABLE = 24
MAX_TABLES = 64
MAX_QUERY_CHARACTERS = 20_000
_MAX_STATEMENTS = 500
_TELLING_DATABASES = 2  # so many on which the expected query finds something decide
_MAX_DATABASES = 6
_BUILD_STEPS, _BUILD_SECONDS = 2_000_000, 5.0
_SIGNIFICANT_DIGITS = 9
_NULLS = 0.06  # of the values that may be null

_STRING = re.compile(r"'((?:[^']|'')*+)'")
_QUOTED = re.compile(r"'(?:[^']|'')*+'|\"(?:[^\"]|\"\")*+\"|`[^`]*`|--[^\n]*|/\*.*?\*/", re.DOTALL)
_NUMBER = re.compile(r"(?<![\w.])\d{1,15}(?:\.\d{1,15})?(?![\w.])")
_ORDER = re.compile(r"\border\s+by\b", re.IGNORECASE)
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_MAX_CONSTANTS = 32
_BUILDING = frozenset(
    {
        *(sqlite3.SQLITE_CREATE_TABLE, sqlite3.SQLITE_CREATE_INDEX, sqlite3.SQLITE_CREATE_VIEW),
        *(sqlite3.SQLITE_ALTER_TABLE, sqlite3.SQLITE_REINDEX, sqlite3.SQLITE_TRANSACTION),
        *(sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION),
    }
)
_WRITING = frozenset({sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE, sqlite3.SQLITE_DELETE})


@dataclass(frozen=True)
class _Constants:
    """What a query compares with."""

    numbers: tuple[float, ...]
    texts: tuple[str, ...]


_Kind = Literal["key", "reference", "boolean", "date", "whole", "decimal", "text"]
_KINDS: tuple[tuple[_Kind, tuple[str, ...]], ...] = (
    ("boolean", ("BOOL",)),
    ("date", ("DATE", "TIME")),
    ("whole", ("INT", "SERIAL", "YEAR")),
    ("decimal", ("REAL", "FLOA", "DOUB", "NUM", "DEC", "MONEY")),
)


@dataclass(frozen=True)
class _Column:
    name: str
    kind: _Kind
    is_required: bool


def exact_match(answer: str | None, expected: str) -> bool:
    """Whether the answer is the expected text, apart from white space around it."""
    return answer is not None and answer.strip() == expected.strip()


def execution_match(schema: str, answer: str | None, expected: str) -> bool | None:
    """Whether the answer gives the same rows as the expected query.

    Their order counts when the expected query asks for one; names of columns do not. All three texts are untrusted:
    the databases are in memory, may only be read, and every query is bounded in steps, time and size.

    Args:
        schema: `CREATE TABLE` statements; others, and those that SQLite does not know, are left out.
        answer: The model's SQL; None when there is none.
        expected: The right SQL.

    Returns:
        None when it cannot be judged: the expected query does not run in SQLite, or both find nothing in any database.
    """
    if len(expected) > MAX_QUERY_CHARACTERS:
        return None
    is_exact, ordered, telling = exact_match(answer, expected), is_ordered(expected), 0
    for seed in range(_MAX_DATABASES):
        database = _database(schema, expected, seed)
        if database is None:
            return None
        with database:
            wanted = database.query(expected)
            if wanted is None:
                return None
            found = wanted if is_exact else None if answer is None else database.query(answer)
            if not same_rows(wanted, found, ordered=ordered):
                return False
        telling += bool(wanted)
        if telling == (1 if is_exact else _TELLING_DATABASES):
            break
    return True if telling else None


def same_rows(wanted: Sequence[Row], found: Sequence[Row] | None, *, ordered: bool) -> bool:
    """Whether two results are the same, decimal fractions to nine digits.

    Args:
        wanted: The right one.
        found: The other; None for none.
        ordered: Whether the order of rows counts.
    """
    if found is None or len(found) != len(wanted):
        return False
    first, second = ([tuple(map(_comparable, row)) for row in rows] for rows in (wanted, found))
    return first == second if ordered else Counter(first) == Counter(second)


def is_ordered(sql: str) -> bool:
    """Whether a query, not just one inside it, asks for an order."""
    outside, depth = [], 0
    for part in re.split(r"([()])", _QUOTED.sub(" ", sql)):
        depth += (part == "(") - (part == ")")
        if depth == 0:
            outside.append(part)
    return _ORDER.search(" ".join(outside)) is not None


def _comparable(value: object) -> object:
    return float(f"{value:.{_SIGNIFICANT_DIGITS}g}") if isinstance(value, float) else value


def _database(schema: str, expected: str, seed: int) -> SealedDatabase | None:
    """A database of a schema; None when the schema has no table."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    try:
        tables = _build(connection, schema)
        rng = Random(f"{seed} {schema}")
        constants = _constants(expected)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)
        connection.execute("PRAGMA ignore_check_constraints = ON")
        for name, columns in tables.items():
            _fill(connection, name, columns, constants, rng)
    except (sqlite3.Error, ValueError):  # a schema that only seems to be one
        tables = {}
    if not tables:
        connection.close()
        return None
    return SealedDatabase(connection)


def _build(connection: sqlite3.Connection, schema: str) -> dict[str, list[_Column]]:
    """Make the tables of a schema, without rows; returns their columns."""
    bound(connection)
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_SQL_BYTES)
    connection.set_authorizer(_may_build)
    with_limit(connection, _BUILD_STEPS, _BUILD_SECONDS)
    for statement in _statements(schema[:MAX_SQL_BYTES]):
        with suppress(sqlite3.Error, sqlite3.Warning):  # SQLite does not know it; a query that needs it will fail
            connection.execute(statement)
    connection.set_authorizer(None)
    found = connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
    names = [name for (name,) in found.fetchmany(MAX_TABLES)]
    return {name: _columns(connection, name) for name in names}


def _statements(text: str) -> Iterator[str]:
    """The statements of a text, one by one."""
    statement = ""
    for part in text.split(";", _MAX_STATEMENTS):
        statement += part + ";"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def _columns(connection: sqlite3.Connection, table: str) -> list[_Column]:
    rows = connection.execute('SELECT name, type, pk, "notnull" FROM pragma_table_info(?)', (table,)).fetchall()
    return [
        _Column(name, _kind(name.lower(), kind.upper(), bool(key)), bool(key or need)) for name, kind, key, need in rows
    ]


def _kind(name: str, declared: str, is_key: bool) -> _Kind:
    """What a column holds, by its declared type and its name."""
    if name == "id" or (is_key and "INT" in declared):
        return "key"
    if name.endswith("_id"):
        return "reference"
    return next((kind for kind, parts in _KINDS if any(part in declared for part in parts)), "text")


def _fill(
    connection: sqlite3.Connection, table: str, columns: Sequence[_Column], constants: _Constants, rng: Random
) -> None:
    names, marks = ", ".join(_quote(column.name) for column in columns), ", ".join("?" * len(columns))
    rows = [[_value(column, number, constants, rng) for column in columns] for number in range(1, ROWS_PER_TABLE + 1)]
    into = f"INSERT OR IGNORE INTO {_quote(table)} ({names}) VALUES ({marks})"  # noqa: S608  # names are quoted
    connection.executemany(into, rows)


def _value(column: _Column, number: int, constants: _Constants, rng: Random) -> str | float | None:
    if column.kind == "key":
        return number
    if not column.is_required and rng.random() < _NULLS:
        return None
    match column.kind:
        case "reference":
            return rng.randint(1, ROWS_PER_TABLE)
        case "boolean":
            return rng.randint(0, 1)
        case "date":
            return _date(constants, rng)
        case "whole":
            return int(_number(constants, rng))
        case "decimal":
            return _number(constants, rng)
    if constants.texts and rng.random() < 0.5:
        return rng.choice(constants.texts)
    return f"{column.name} {rng.randint(1, 6)}"


def _number(constants: _Constants, rng: Random) -> float:
    if constants.numbers and rng.random() < 0.6:
        return rng.choice(constants.numbers) + rng.choice((-1, 0, 0, 1))
    return rng.randint(0, 100)


def _date(constants: _Constants, rng: Random) -> str:
    dates = [text for text in constants.texts if _DATE.match(text)]
    if dates and rng.random() < 0.5:
        return rng.choice(dates)
    return f"{rng.randint(2018, 2026)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"


def _constants(sql: str) -> _Constants:
    """The constants of a query; of a pattern of LIKE, texts that it finds."""
    texts = [text.replace("''", "'") for text in _STRING.findall(sql)[:_MAX_CONSTANTS]]
    found = [near for text in texts for near in _near(text)]
    numbers = [float(text) for text in _NUMBER.findall(_QUOTED.sub(" ", sql))[:_MAX_CONSTANTS]]
    return _Constants(tuple(numbers), tuple(dict.fromkeys(found)))


def _near(text: str) -> Iterator[str]:
    bare = text.strip("%")
    yield bare
    if bare != text:
        yield f"{bare} x"
        yield f"x {bare}"


def _quote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _may_build(action: int, table: str | None, *_: str | None) -> int:
    if action in _WRITING:  # SQLite's own tables, in which it keeps the schema
        return sqlite3.SQLITE_OK if (table or "").startswith("sqlite_") else sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK if action in _BUILDING else sqlite3.SQLITE_DENY
