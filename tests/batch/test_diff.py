"""Two outputs compared: other shards, other formats, errors on one side, and outputs that are none."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.batch.commit import JobOutput
from pipeline.batch.diff import diff_outputs
from pipeline.batch.parts import AnsweredRow, PartFormat, PartKind, encode_part
from pipeline.batch.rows import Row
from pipeline.engine.types import Completion, Failure
from pipeline.errors import OutputError
from pipeline.storage.local import LocalStorage

ASKED = pa.schema([("id", pa.int64()), ("q", pa.string())])


def write(
    folder: Path,
    answers: list[str | None],
    *,
    shard_rows: int = 3,
    kind: PartKind = "parquet",
    prefix: str = "",
    **job: Any,
) -> str:
    """The output of a job; an answer of None is an error, one like `!code` an error of that code."""
    form = PartFormat(kind, ASKED, is_loose=kind == "jsonl", prefix=prefix)
    shards = [answers[start : start + shard_rows] for start in range(0, len(answers), shard_rows)]
    fingerprint = {"columns": {"id": "id", "prompt": "q"}, "expert": "sql@1", **job}
    output = JobOutput(LocalStorage(str(folder)), fingerprint, kind, len(shards), prefix)
    output.begin()
    number = 0
    for index, shard in enumerate(shards):
        rows = []
        for text in shard:
            row = Row(f"f#{number}", {"id": number, "q": f"question {number}"}, None)
            code = "invalid_request" if text is None else text[1:] if text.startswith("!") else None
            failure = None if code is None else Failure(code, "no")
            rows.append(AnsweredRow(row, Completion(str(number), text or "", "stop", 1, 1, failure)))
            number += 1
        output.commit(index, encode_part(rows, form))
    output.finish()
    return str(folder)


def test_rows_are_compared_one_by_one_whatever_the_shards(tmp_path: Path) -> None:
    first = write(tmp_path / "a", ["x", "y", "z", None, None, "v", "!slow"], shard_rows=3)
    second = write(
        tmp_path / "b",
        ["x", "Y", "z", None, "u", None, "!lost"],
        shard_rows=2,
        kind="jsonl",
        prefix="my_",
        expert="sql@2",
    )
    found = diff_outputs(first, second)
    assert (found.rows, found.same, found.different, found.errors) == (7, 3, 1, (1, 1, 2))
    assert [(item.row, item.question, item.answers, item.errors) for item in found.samples] == [
        (1, "question 1", ("y", "Y"), (None, None)),
        (4, "question 4", (None, "u"), ("invalid_request", None)),
        (5, "question 5", ("v", None), (None, "invalid_request")),
        (6, "question 6", (None, None), ("slow", "lost")),
    ]
    assert found.fields["expert"] == ('"sql@1"', '"sql@2"')
    assert "columns" not in found.fields
    assert json.loads(json.dumps(found.to_dict()))["same"] == 3


def test_an_output_equals_itself(tmp_path: Path) -> None:
    first = write(tmp_path / "a", ["x", None, "z"])
    found = diff_outputs(first, first)
    assert (found.same, found.different, found.errors, found.fields, found.samples) == (3, 0, (0, 0, 1), {}, ())


def test_samples_are_kept_up_to_a_number(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", ["x"] * 20), write(tmp_path / "b", ["y"] * 20)
    assert len(diff_outputs(first, second, max_samples=4).samples) == 4
    assert diff_outputs(first, second, max_samples=0).different == 20


def test_outputs_of_other_questions_are_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "a", ["x", "y", "z"])
    with pytest.raises(OutputError, match="other questions") as caught:
        diff_outputs(first, write(tmp_path / "b", ["x", "y"]))
    assert any("no such row" in detail for detail in caught.value.details)
    other = write(tmp_path / "c", ["x", "y", "z"], columns={"prompt": "q", "id": "q"})
    with pytest.raises(OutputError, match="other questions"):
        diff_outputs(first, other)


def test_what_only_one_job_knows_of_a_row_is_not_compared(tmp_path: Path) -> None:
    first = write(tmp_path / "a", ["x"])
    assert diff_outputs(first, write(tmp_path / "b", ["x"], columns={"prompt": "q"})).same == 1


def test_what_is_no_output_is_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "a", ["x", "y", "z"])
    with pytest.raises(OutputError, match="not the output of a finished job"):
        diff_outputs(first, str(tmp_path / "nowhere"))
    second = Path(write(tmp_path / "b", ["x", "y", "z"]))
    (second / "part-00000.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(OutputError, match="damaged"):
        diff_outputs(first, str(second))
    (second / "_manifest.json").write_text("{")
    with pytest.raises(OutputError, match="damaged"):
        diff_outputs(first, str(second))
