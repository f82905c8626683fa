"""Whether an answer is right: the same text, or, for SQL, the same result on a small generated database."""

import re
import sqlite3
from collections.abc import Sequence
from random import Random

from pipeline.batch.matching import exact_match
from pipeline.batch.sealed_database import SealedDatabase
from pipeline.demo.world import NUMBER_COLUMNS, TEXT_COLUMNS

__all__ = ["exact_match", "execution_match"]

ROWS_PER_TABLE = 40
_TABLE = re.compile(r"CREATE TABLE (\w+) \(([^)]*)\);")


def execution_match(schema: str, answer: str | None, expected: str) -> bool:
    """Whether both queries give the same rows, in the same order, on a database generated for the schema.

    The demo's databases hold the values of its closed world, so they tell more than those of
    `batch.matching`, which knows a schema alone.

    Args:
        schema: The demo's `CREATE TABLE` statements.
        answer: The model's SQL.
        expected: The right SQL.
    """
    if answer is None:
        return False
    with SealedDatabase(_database(schema)) as database:
        wanted, given = database.query(expected), database.query(answer)
    return wanted is not None and given == wanted


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
