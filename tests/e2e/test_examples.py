"""The example of a batch: a CSV file in, answers out, and the second run has nothing to do."""

from pathlib import Path

import pandas as pd
import pytest

from tests.test_examples import ANSWER, QUESTION, example

SCHEMA = "CREATE TABLE users (id INT, name TEXT, city TEXT, age INT);"


def test_the_batch_script(cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {"prompt": [QUESTION, "x " * 4000, *[QUESTION] * 18], "schema": SCHEMA, "team": range(20)}
    pd.DataFrame(rows).to_csv(tmp_path / "questions.csv", index=False)
    script = example("batch_script")
    for _ in range(2):
        assert script.main(str(tmp_path / "questions.csv"), str(tmp_path / "answers")) == 0
        assert "prompt_too_long" in capsys.readouterr().err
    (part,) = (tmp_path / "answers").glob("part-*.parquet")
    answers = pd.read_parquet(part)
    assert list(answers["team"]) == [str(number) for number in range(20)]  # as CSV has it
    assert list(answers["text"].drop(1).unique()) == [ANSWER]
