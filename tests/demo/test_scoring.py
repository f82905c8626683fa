"""Right and wrong answers, and hostile ones: an answer is somebody else's text."""

import pytest

from pipeline.demo.questions import draw_questions
from pipeline.demo.scoring import exact_match, execution_match

SCHEMA = "CREATE TABLE users (id INT, name TEXT, city TEXT, age INT);"


def test_every_expected_answer_matches_itself() -> None:
    for question in draw_questions("sql", 200):
        assert exact_match(question.expected, question.expected)
        assert execution_match(question.schema, question.expected, question.expected)


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        ("SELECT name FROM users WHERE age > 30", True),
        ("SELECT users.name FROM users WHERE users.age > 30", True),
        ("SELECT name FROM users WHERE age > 31", True),  # no generated age lies between
        ("SELECT name FROM users WHERE age > 20", False),
        ("SELECT city FROM users WHERE age > 30", False),
        ("SELECT name FROM nobody", False),
        ("not SQL", False),
        ("", False),
        (None, False),
        ("DROP TABLE users", False),
        ("ATTACH DATABASE 'x' AS y", False),
        ("PRAGMA writable_schema = 1", False),
        ("SELECT load_extension('x')", False),
        ("WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT COUNT(*) FROM n", False),
        ("SELECT name FROM users WHERE age > 30; SELECT 1", False),
    ],
)
def test_execution_match_compares_results(answer: str | None, same: bool) -> None:
    assert execution_match(SCHEMA, answer, "SELECT name FROM users WHERE age > 30") is same


def test_exact_match_forgives_white_space_alone() -> None:
    assert exact_match(" a b\n", "a b")
    assert not exact_match("a  b", "a b")
    assert not exact_match(None, "")
