"""Untrusted SQL, run in SQLite where it can do no harm: it may only read, and only so much."""

import sqlite3
import time
from collections.abc import Callable
from types import TracebackType

MAX_STEPS = 300_000  # of SQLite's virtual machine, for one query
MAX_SECONDS = 2.0
MAX_ROWS = 10_000
MAX_VALUE_BYTES = 4096  # of one value or row: what a query can hold is at most this, a few times for each row it makes
MAX_SQL_BYTES = 100_000
_STEPS_BETWEEN_LOOKS = 1000
_READING = frozenset({sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE})
# They reach outside the database, make much of nothing, or give another result each time.
_DENIED_FUNCTIONS = frozenset(
    {"load_extension", "readfile", "writefile", "edit", "fts3_tokenizer", "zeroblob", "randomblob", "random"}
)
_LIMITS = {
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: MAX_SQL_BYTES,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_COLUMN: 500,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 100,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 200,
    sqlite3.SQLITE_LIMIT_FUNCTION_ARG: 64,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 500,
    sqlite3.SQLITE_LIMIT_VDBE_OP: 100_000,
    sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
}

Row = tuple[object, ...]


class SealedDatabase:
    """An in-memory database that answers queries of anybody.

    Args:
        connection: The database, filled by whoever made it; it is closed with this object. From now on it may only be
            read: an authorizer allows reading and functions, and refuses everything else.
        max_steps: Of SQLite's virtual machine, for one query.
        max_seconds: For one query.
        max_rows: Of a result.
    """

    def __init__(
        self,
        connection: sqlite3.Connection,
        *,
        max_steps: int = MAX_STEPS,
        max_seconds: float = MAX_SECONDS,
        max_rows: int = MAX_ROWS,
    ) -> None:
        self._connection = connection
        self._max_steps = max_steps
        self._max_seconds = max_seconds
        self._max_rows = max_rows
        connection.execute("PRAGMA trusted_schema = OFF")
        connection.execute("PRAGMA temp_store = MEMORY")
        bound(connection)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)
        connection.set_authorizer(_may_only_read)

    def query(self, sql: str) -> list[Row] | None:
        """The rows that one query gives.

        Args:
            sql: Anything.

        Returns:
            None when it is no single query that may be run, or goes beyond a limit.
        """
        with_limit(self._connection, self._max_steps, self._max_seconds)
        try:
            cursor = self._connection.execute(sql)
            rows: list[Row] = cursor.fetchmany(self._max_rows + 1)
        except (sqlite3.Error, sqlite3.Warning, ValueError):  # ValueError: what is no text for SQLite, such as NUL
            return None
        is_query = cursor.description is not None  # nothing at all, or a comment, is none
        return rows if is_query and len(rows) <= self._max_rows else None

    def close(self) -> None:
        """Forget the database."""
        self._connection.close()

    def __enter__(self) -> "SealedDatabase":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def bound(connection: sqlite3.Connection) -> None:
    """Set SQLite's own limits for statements that are not trusted."""
    for category, limit in _LIMITS.items():
        connection.setlimit(category, limit)


def with_limit(connection: sqlite3.Connection, max_steps: int, max_seconds: float) -> None:
    """Stop what the connection does next when it takes too many steps or too long."""
    connection.set_progress_handler(_limit(max_steps, max_seconds), _STEPS_BETWEEN_LOOKS)


def _limit(max_steps: int, max_seconds: float) -> Callable[[], int]:
    steps, deadline = 0, time.monotonic() + max_seconds

    def is_over() -> int:
        nonlocal steps
        steps += _STEPS_BETWEEN_LOOKS
        return int(steps > max_steps or time.monotonic() > deadline)

    return is_over


def _may_only_read(action: int, _: str | None, name: str | None, *__: str | None) -> int:
    denied = action == sqlite3.SQLITE_FUNCTION and (name or "").lower() in _DENIED_FUNCTIONS
    return sqlite3.SQLITE_OK if action in _READING and not denied else sqlite3.SQLITE_DENY
