"""Whether an answer is right: the same text, or, for SQL, the same result on a small generated database."""

import re
import sqlite3
from collections.abc import Sequence
from random import Random

from pipeline.demo.world import NUMBER_COLUMNS, TEXT_COLUMNS

ROWS_PER_TABLE = 40
MAX_SQLITE_STEPS = 200_000
_TABLE = re.compile(r"CREATE TABLE (\w+) \(([^)]*)\);")


def exact_match(answer: str | None, expected: str) -> bool:
    """Whether the answer is the expected text, apart from white space around it."""
    return answer is not None and answer.strip() == expected.strip()


def execution_match(schema: str, answer: str | None, expected: str) -> bool:
    """Whether both queries give the same rows, in the same order, on a database generated for the schema.

    The answer is untrusted: it runs on an in-memory database, may only read, and is stopped after a bounded number of
    steps.

    Args:
        schema: The demo's `CREATE TABLE` statements.
        answer: The model's SQL.
        expected: The right SQL.
    """
    if answer is None:
        return False
    database = _database(schema)
    try:
        wanted = database.execute(expected).fetchall()
        try:
            return database.execute(answer).fetchall() == wanted
        except (sqlite3.Error, sqlite3.Warning):
            return False
    finally:
        database.close()


def _database(schema: str) -> sqlite3.Connection:
    rng = Random(schema)
    database = sqlite3.connect(":memory:")
    for name, columns in _TABLE.findall(schema):
        names = [column.split()[0] for column in columns.split(", ")]
        quoted = ", ".join(f'"{column}"' for column in names)
        database.execute(f'CREATE TABLE "{name}" ({quoted})')
        marks = ", ".join("?" * len(names))
        rows = [_row(rng, names, number) for number in range(1, ROWS_PER_TABLE + 1)]
        database.executemany(f'INSERT INTO "{name}" VALUES ({marks})', rows)  # noqa: S608  # names matched as \w+
    database.commit()
    database.set_authorizer(_may_only_read)
    database.set_progress_handler(lambda: 1, MAX_SQLITE_STEPS)
    return database


def _row(rng: Random, columns: Sequence[str], number: int) -> list[str | int]:
    return [_value(rng, column, number) for column in columns]


def _value(rng: Random, column: str, number: int) -> str | int:
    if column == "id":
        return number
    if column in TEXT_COLUMNS:
        return rng.choice(TEXT_COLUMNS[column])
    if column in NUMBER_COLUMNS:
        return rng.choice(NUMBER_COLUMNS[column])
    if column.endswith("_id"):
        return rng.randint(1, ROWS_PER_TABLE)
    return f"{column} {number}"


def _may_only_read(action: int, *_: str | None) -> int:
    allowed = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION)
    return sqlite3.SQLITE_OK if action in allowed else sqlite3.SQLITE_DENY
