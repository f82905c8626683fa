"""Scores by expert, counted by hand."""

import pyarrow as pa
import pytest

from pipeline.batch.columns import ResolvedColumns
from pipeline.batch.evaluate import MAX_SAMPLES, NO_EXPERT, ExpertScore, score_tables, total_score

SCHEMA = "CREATE TABLE t (id INT, a INT);"
COLUMNS = ResolvedColumns("q", None, None, "ddl", None, None, "gold", None)
ERROR = {"code": "prompt_too_long", "message": "..."}


def table(*rows: tuple[str | None, str | None, str | None, str | None]) -> pa.Table:
    """Rows of expert, answer, right answer and schema; an answer of None is an error."""
    return pa.Table.from_pylist(
        [
            {
                "gold": gold,
                "ddl": schema,
                "my_expert": expert,
                "my_text": text,
                "my_error": ERROR if text is None else None,
                "my_completion_tokens": 0 if text is None else 4,
            }
            for expert, text, gold, schema in rows
        ]
    )


def test_every_expert_is_scored() -> None:
    tables = [
        table(
            ("sql", "SELECT a FROM t", "SELECT a FROM t", SCHEMA),
            ("sql", "SELECT t.a FROM t", "SELECT a FROM t", SCHEMA),
            ("json", " {} ", "{}", '{"x": 1}'),
        ),
        table(
            ("sql", "SELECT id FROM t", "SELECT a FROM t", SCHEMA),
            ("sql", None, "SELECT a FROM t", SCHEMA),
            ("sql", "SELECT a FROM t", None, SCHEMA),
            ("json", "{}", '{"x": 2}', None),
            (None, "x", "x", None),
        ),
    ]
    nobody, json_expert, sql = scores = score_tables(tables, COLUMNS, prefix="my_")
    assert (nobody.expert, nobody.rows, nobody.exact, nobody.execution_rate) == (NO_EXPERT, 1, 1, None)
    assert (json_expert.expert, json_expert.rows, json_expert.judged, json_expert.exact) == ("json", 2, 2, 1)
    assert json_expert.execution_rate is None
    assert (sql.rows, sql.errors, sql.judged, sql.exact) == (5, 1, 4, 1)
    assert (sql.executable, sql.executed) == (4, 2)
    assert (sql.exact_rate, sql.execution_rate, sql.mean_tokens) == (0.25, 0.5, 4.0)
    assert [(item.row, item.answer, item.same_rows) for item in sql.wrong] == [
        (1, "SELECT t.a FROM t", True),
        (3, "SELECT id FROM t", False),
        (4, None, False),
    ]
    together = total_score(scores)
    assert (together.rows, together.judged, together.exact, together.executed) == (8, 7, 3, 2)


def test_without_right_answers_nothing_is_judged() -> None:
    (score,) = score_tables(
        [table(("sql", "a", "a", None))], ResolvedColumns("q", None, None, None, None, None, None, None), prefix="my_"
    )
    assert (score.rows, score.judged, score.exact_rate, score.execution_rate) == (1, 0, None, None)
    assert ExpertScore("x").mean_tokens is None


def test_wrong_answers_are_kept_up_to_a_number() -> None:
    rows = [("sql", "wrong", "right", None)] * 40
    (score,) = score_tables([table(*rows)], COLUMNS, prefix="my_")
    assert len(score.wrong) == MAX_SAMPLES
    assert len(score.to_dict()["wrong"]) == MAX_SAMPLES
    assert score.to_dict()["exact_rate"] == 0


@pytest.mark.parametrize(("gold", "answer"), [(12, "12"), ({"a": 1}, '{"a":1}')])
def test_a_right_answer_that_is_no_text_is_compared_as_json(gold: object, answer: str) -> None:
    rows = table(("json", answer, None, None)).drop_columns("gold").append_column("gold", pa.array([gold]))
    (score,) = score_tables([rows], COLUMNS, prefix="my_")
    assert score.exact == 1
