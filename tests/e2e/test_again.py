"""A job run again on a real Ray: beside another driver, over another job's output, and for the rows that failed."""

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import BatchResult, run_batch
from pipeline.batch.config import BatchConfig
from pipeline.batch.lease import hold
from pipeline.batch.parts import PartFormat, write_parquet
from pipeline.batch.plan import open_experts, prepare
from pipeline.batch.row_errors import mended_part
from pipeline.demo.questions import write_questions
from pipeline.errors import FingerprintError, OutputInUseError
from pipeline.storage.local import LocalStorage

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture(scope="module")
def options(job_options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A job of four shards."""
    dataset = write_questions(tmp_path_factory.mktemp("few") / "questions.parquet", 30)
    return {**job_options, "dataset": str(dataset), "shard_rows": 8}


@pytest.fixture(scope="module")
def answered(options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> BatchResult:
    return run_batch(**options, output=tmp_path_factory.mktemp("answers") / "out")


def with_errors(data: bytes, rows: list[int], form: PartFormat) -> bytes:
    """The part as it were if these rows had failed."""
    failed = pq.read_table(io.BytesIO(data), schema=form.schema).take(rows)
    ours = {
        "text": pa.nulls(len(rows), pa.string()),
        "finish_reason": pa.array(["error"] * len(rows)),
        "prompt_tokens": pa.array([0] * len(rows)),
        "completion_tokens": pa.array([0] * len(rows)),
        "error": pa.array(
            [{"code": "out_of_memory", "message": "too little"}] * len(rows), form.schema.field("error").type
        ),
    }
    for name, column in ours.items():
        failed = failed.set_column(failed.schema.get_field_index(name), form.schema.field(name), column)
    return mended_part(data, write_parquet(failed, form), rows, form)


def test_a_finished_output_verifies(answered: BatchResult) -> None:
    found = answered.verify()
    assert found.problems == ()
    assert (found.rows, found.parts, found.duplicate_ids) == (30, 4, 0)
    assert found.completion_tokens == answered.report.completion_tokens
    assert list(answered.errors) == []
    # Readers of Parquet folders leave out what begins with an underscore.
    assert pq.read_table(answered.output).num_rows == 30
    metadata = pq.read_metadata(answered.parts[0]).metadata
    assert metadata[b"expert_pipeline.expert_sha256"].decode() == answered.manifest["fingerprint"]["expert_sha256"]


def test_rows_with_errors_are_answered_again_and_only_those(
    answered: BatchResult, options: dict[str, Any], tmp_path: Path
) -> None:
    failed = {1: [0, 5], 3: [2]}
    config = BatchConfig.from_options(
        **{name: value for name, value in options.items() if name != "progress"}, output=tmp_path / "out"
    )
    job = prepare(config, open_experts(config))
    job.output.begin()
    for shard, path in enumerate(answered.parts):
        data = Path(path).read_bytes()
        job.output.commit(shard, with_errors(data, failed[shard], job.part_format) if shard in failed else data)
    job.output.finish()

    plain = run_batch(**options, output=tmp_path / "out")
    assert plain.report.already_complete
    assert [(error.shard, error.row, error.code) for error in plain.errors] == [
        (1, 0, "out_of_memory"),
        (1, 5, "out_of_memory"),
        (3, 2, "out_of_memory"),
    ]
    ids = plain.to_pandas()["id"]
    assert [error.id for error in plain.errors] == [ids[8], ids[13], ids[26]]

    again = run_batch(**options, output=tmp_path / "out", retry_errors=True)
    assert not again.report.already_complete
    assert (again.report.rows_this_run, again.report.errors) == (3, 0)
    for path, wanted in zip(again.parts, answered.parts, strict=True):
        assert Path(path).read_bytes() == Path(wanted).read_bytes(), "as if no row had ever failed"
    assert again.verify().problems == ()
    assert list(again.errors) == []
    once_more = run_batch(**options, output=tmp_path / "out", retry_errors=True)
    assert once_more.report.already_complete


def test_a_second_driver_is_refused_while_the_first_lives(options: dict[str, Any], tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path / "out"))
    with hold(storage, seconds=1.2), pytest.raises(OutputInUseError, match="another driver is writing"):
        run_batch(**options, output=tmp_path / "out")
    assert [name for name in storage.list() if not name.startswith("_lease/")] == []


def test_an_output_of_another_job_is_replaced_when_asked(options: dict[str, Any], tmp_path: Path) -> None:
    options = {name: value for name, value in options.items() if name != "dataset"}
    rows = [{"prompt": "List the name of all users.", "schema": "CREATE TABLE users (name TEXT);"}]
    run_batch(rows, **options, output=tmp_path / "out")
    with pytest.raises(FingerprintError, match="--overwrite"):
        run_batch(rows * 2, **options, output=tmp_path / "out")
    result = run_batch(rows * 2, **options, output=tmp_path / "out", overwrite=True)
    assert (result.report.rows, result.report.rows_this_run) == (2, 2)
    assert result.verify().problems == ()
    assert run_batch(rows * 2, **options, output=tmp_path / "out", overwrite=True).report.already_complete
