"""A database that answers untrusted queries: what it answers, what it refuses, and what it stops."""

import sqlite3
import time
from pathlib import Path

import pytest

from pipeline.batch.sealed_database import MAX_ROWS, MAX_SQL_BYTES, SealedDatabase


def sealed(**limits: float) -> SealedDatabase:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.execute("CREATE TABLE users (id INT, name TEXT)")
    connection.executemany("INSERT INTO users VALUES (?, ?)", [(number, f"n{number}") for number in range(200)])
    return SealedDatabase(connection, **limits)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sql", "rows"),
    [
        ("SELECT COUNT(*) FROM users", [(200,)]),
        ("SELECT name FROM users WHERE id = 7;", [("n7",)]),
        ("SELECT upper(name), id * 1.5 FROM users WHERE name LIKE 'n19_' ORDER BY id DESC LIMIT 1", [("N199", 298.5)]),
        ("WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < 9) SELECT SUM(x) FROM n", [(45,)]),
        ("SELECT 1 WHERE FALSE", []),
        ("SELECT printf('%1000000s', 'x')", [(None,)]),
    ],
)
def test_it_answers_queries(sql: str, rows: list[tuple[object, ...]]) -> None:
    with sealed() as database:
        assert database.query(sql) == rows


@pytest.mark.parametrize(
    "sql",
    [
        "",
        ";",
        "not SQL",
        "SELECT 1; SELECT 2",
        "SELECT nothing FROM users",
        "SELECT * FROM nobody",
        "DROP TABLE users",
        "DELETE FROM users",
        "UPDATE users SET id = 0",
        "INSERT INTO users VALUES (1, 'x')",
        "CREATE TABLE t (x)",
        "CREATE TEMP TABLE t AS SELECT * FROM users",
        "CREATE VIRTUAL TABLE t USING fts5(x)",
        "ATTACH DATABASE '{folder}/new.db' AS x",
        "VACUUM INTO '{folder}/new.db'",
        "PRAGMA writable_schema = 1",
        "PRAGMA database_list",
        "BEGIN",
        "SAVEPOINT s",
        "ANALYZE",
        "EXPLAIN SELECT 1 FROM (SELECT load_extension('x'))",
        "SELECT load_extension('x')",
        "SELECT LOAD_EXTENSION('x', 'y')",
        "SELECT random()",
        "SELECT length(zeroblob(1000000000))",
        "SELECT randomblob(10)",
        "-- a comment",
        "SELECT replace(hex(printf('%2000s', 'x')), '2', printf('%2000s', 'y'))",
        "SELECT 1 WHERE 'x' LIKE '" + "%a" * 400 + "'",
        "SELECT " + "(" * 2000 + "1" + ")" * 2000,
        "SELECT " + " + ".join("1" * 1000),
        " UNION ALL ".join(["SELECT 1"] * 1000),
        "SELECT '" + "x" * MAX_SQL_BYTES + "'",
        "SELECT '\0'",
        "SELECT '\ud800'",
    ],
)
def test_it_refuses_what_is_no_query_or_reaches_too_far(sql: str, tmp_path: Path) -> None:
    with sealed() as database:
        assert database.query(sql.replace("{folder}", str(tmp_path))) is None
        assert database.query("SELECT COUNT(*) FROM users") == [(200,)], "it is as it was"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "sql",
    [
        "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT COUNT(*) FROM n",
        "SELECT COUNT(*) FROM users a, users b, users c, users d",
        "SELECT * FROM users a, users b ORDER BY a.name || b.name || printf('%900s', 'x')",
    ],
)
def test_it_stops_what_takes_too_many_steps(sql: str) -> None:
    with sealed(max_seconds=1e9) as database:
        assert database.query(sql) is None
        assert database.query("SELECT 1") == [(1,)], "each query has its own limit"
    with sealed(max_steps=10**12, max_seconds=0.05) as database:
        started = time.monotonic()
        assert database.query(sql) is None
        assert time.monotonic() - started < 30, "it was stopped by the time that it took"


def test_it_gives_no_endless_results() -> None:
    with sealed(max_steps=10**9) as database:
        assert database.query("SELECT 1 FROM users a, users b") is None
        some = database.query("SELECT 1 FROM users a, users b LIMIT 10000")
    assert some is not None
    assert len(some) == MAX_ROWS == 10_000
