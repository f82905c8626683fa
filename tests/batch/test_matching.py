"""Whether answers are right: queries that mean the same, queries that almost do, and schemas that are none."""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.batch.matching import MAX_QUERY_CHARACTERS, exact_match, execution_match, is_ordered, same_rows
from pipeline.demo.questions import draw_questions
from pipeline.demo.scoring import execution_match as demo_match

SHOP = """
CREATE TABLE users (id SERIAL PRIMARY KEY, name VARCHAR(20) NOT NULL, city TEXT, age INT CHECK (age > 18));
CREATE TABLE orders (
  id INT, user_id INT REFERENCES users(id), total DECIMAL(10, 2), paid BOOLEAN, ordered_at DATE, note TEXT,
  doubled REAL GENERATED ALWAYS AS (total * 2)
);
CREATE INDEX by_user ON orders (user_id); -- and a comment; with a semicolon
CREATE VIEW adults AS SELECT * FROM users;
"""


@pytest.mark.parametrize(
    ("expected", "answer", "same"),
    [
        ("SELECT name FROM users WHERE age > 30", "SELECT u.name FROM users u WHERE 30 < u.age", True),
        ("SELECT name FROM users WHERE age > 30", "SELECT name FROM users WHERE age >= 31", True),
        ("SELECT name FROM users WHERE age > 30", "SELECT name FROM users WHERE age >= 30", False),
        ("SELECT name FROM users WHERE age > 30", "SELECT name FROM users WHERE age > 31", False),
        ("SELECT name FROM users WHERE city = 'Lima'", "SELECT name FROM users WHERE city LIKE 'Lima'", True),
        ("SELECT name FROM users WHERE city = 'Lima'", "SELECT name FROM users WHERE city = 'Oslo'", False),
        ("SELECT name FROM users WHERE city LIKE 'L%'", "SELECT name FROM users WHERE city LIKE '%L%'", False),
        ("SELECT name FROM users WHERE city IS NULL", "SELECT name FROM users WHERE city = ''", False),
        ("SELECT COUNT(*) FROM users", "SELECT COUNT(id) FROM users", True),
        ("SELECT COUNT(*) FROM users", "SELECT COUNT(city) FROM users", False),
        ("SELECT city, COUNT(*) FROM users GROUP BY city", "SELECT city, COUNT(1) c FROM users GROUP BY 1", True),
        ("SELECT city FROM users", "SELECT DISTINCT city FROM users", False),
        ("SELECT id FROM users ORDER BY id", "SELECT id FROM users ORDER BY id DESC", False),
        ("SELECT id FROM users", "SELECT id FROM users ORDER BY id DESC", True),
        ("SELECT SUM(total) FROM orders", "SELECT SUM(total * 3) / 3 FROM orders", True),
        ("SELECT AVG(total) FROM orders", "SELECT SUM(total) FROM orders", False),
        ("SELECT total FROM orders WHERE doubled > 9", "SELECT total FROM orders WHERE total > 4.5", True),
        ("SELECT note FROM orders WHERE paid = 1", "SELECT note FROM orders WHERE paid", True),
        (
            "SELECT u.name FROM users u JOIN orders o ON o.user_id = u.id WHERE o.ordered_at > '2024-01-01'",
            "SELECT name FROM users, orders WHERE user_id = users.id AND ordered_at > '2024-01-01'",
            True,
        ),
        (
            "SELECT u.name FROM users u JOIN orders o ON o.user_id = u.id WHERE o.ordered_at > '2024-01-01'",
            "SELECT u.name FROM users u JOIN orders o ON o.id = u.id WHERE o.ordered_at > '2024-01-01'",
            False,
        ),
        ("SELECT name FROM users", "SELECT city FROM users", False),
        ("SELECT name FROM users", "SELECT name, name FROM users", False),
        ("SELECT name FROM users", "DROP TABLE users", False),
        ("SELECT name FROM users", "not SQL", False),
        ("SELECT name FROM users", None, False),
    ],
)
def test_queries_are_the_same_or_not(expected: str, answer: str | None, same: bool) -> None:
    assert execution_match(SHOP, answer, expected) is same


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (SHOP, "SELECT nobody FROM users"),
        (SHOP, "MATCH (n:User) RETURN n"),
        (SHOP, "SELECT name FROM users -- ".ljust(MAX_QUERY_CHARACTERS + 1, "x")),
        (SHOP, ""),
        ("", "SELECT 1"),
        ('{"city": "string"}', "SELECT 1"),
        ("CREATE TABLE t (x INT", "SELECT x FROM t"),
        ("CREATE TABLE t AS SELECT 1 x", "SELECT x FROM t"),
        ("ATTACH 'x' AS y; CREATE TABLE y.t (x INT);", "SELECT x FROM t"),
        ("CREATE TABLE \ud800 (x)", "SELECT 1"),
    ],
)
def test_what_cannot_be_judged_is_not(schema: str, expected: str) -> None:
    assert execution_match(schema, expected, expected) is None
    assert execution_match(schema, "SELECT 1", expected) is None


def test_where_the_right_answer_finds_nothing_only_a_difference_is_told() -> None:
    expected = "SELECT name FROM users WHERE 1 = 2"
    assert execution_match(SHOP, expected, expected) is None
    assert execution_match(SHOP, "SELECT name FROM users WHERE 2 = 1", expected) is None
    assert execution_match(SHOP, "SELECT name FROM users", expected) is False


def test_a_schema_writes_no_rows_and_no_files(tmp_path: Path) -> None:
    hostile = """
        CREATE TABLE t (x INT); INSERT INTO t VALUES (12345); INSERT INTO t SELECT * FROM t;
        ATTACH '{folder}/x.db' AS y; VACUUM INTO '{folder}/z.db'; PRAGMA writable_schema = 1;
        CREATE TRIGGER g AFTER INSERT ON t BEGIN INSERT INTO t SELECT x FROM t; END;
    """.replace("{folder}", str(tmp_path))
    assert execution_match(hostile, "SELECT 24 FROM t LIMIT 1", "SELECT COUNT(*) FROM t") is True
    assert not list(tmp_path.iterdir())


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet="SELECTFROMWHEREabxt ()',;\"`-*/%=<>1", max_size=60), st.text(max_size=30))
def test_no_text_is_too_odd(one: str, other: str) -> None:
    schema = "CREATE TABLE t (a INT, b TEXT, x REAL);"
    for schema_text, answer, expected in ((schema, one, "SELECT a FROM t"), (schema, one, other), (one, other, one)):
        assert execution_match(schema_text, answer, expected) in (True, False, None)


def test_it_judges_as_the_demo_does_where_the_demo_can_tell() -> None:
    questions = list(draw_questions("sql", 60))
    for question, other in pairwise(questions):
        assert execution_match(question.schema, question.expected, question.expected) is True
        if not demo_match(question.schema, other.expected, question.expected):
            assert execution_match(question.schema, other.expected, question.expected) is False


@pytest.mark.parametrize(
    ("sql", "ordered"),
    [
        ("SELECT a FROM t ORDER BY a", True),
        ("select a from t order\n by a limit 3", True),
        ("SELECT a FROM (SELECT a FROM t ORDER BY a LIMIT 3)", False),
        ("SELECT a, row_number() OVER (ORDER BY a) FROM t", False),
        ("SELECT 'order by' FROM t", False),
        ("SELECT a FROM t -- order by a", False),
    ],
)
def test_an_order_counts_when_it_is_asked_for(sql: str, ordered: bool) -> None:
    assert is_ordered(sql) is ordered


def test_rows_are_the_same_to_nine_digits() -> None:
    assert same_rows([(0.1 + 0.2,)], [(0.3,)], ordered=True)
    assert not same_rows([(0.3,)], [(0.3001,)], ordered=True)
    assert same_rows([(1,), (2,)], [(2,), (1,)], ordered=False)
    assert not same_rows([(1,), (2,)], [(2,), (1,)], ordered=True)
    assert not same_rows([(1,), (1,), (2,)], [(1,), (2,), (2,)], ordered=False)
    assert not same_rows([], None, ordered=False)


def test_exact_match_forgives_white_space_alone() -> None:
    assert exact_match(" a b\n", "a b")
    assert not exact_match("a  b", "a b")
    assert not exact_match(None, "")
