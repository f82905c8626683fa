"""Rows with an error answered again: exactly once, whatever dies, and the output is whole before and after."""

import io
from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from pipeline.batch.commit import JobOutput
from pipeline.batch.parts import encode_part
from pipeline.batch.retry import open_round, put_in_place, read_plan, round_output
from pipeline.batch.row_errors import mended_part, row_errors
from pipeline.batch.verify import verify
from pipeline.errors import OutputError
from pipeline.storage.local import LocalStorage
from tests.batch.outputs import FINGERPRINT, answered, contents, copy_of, form_of, make_output, memory_folder, part
from tests.batch.test_commit_machine import CrashError, MortalStorage

FAILED = ({}, {1, 2}, {3})
STILL = ({}, {2}, {})  # after the second try


def mend(output: JobOutput, shard: int, still_failing=STILL) -> None:
    """What a worker does: answer the rows with an error again, and commit the mended part."""
    old = output.part_to_mend(shard)
    assert old is not None
    form = form_of(output.kind)
    wanted = [error.row for error in row_errors(old, output.kind, shard, id_column=None)]
    new = [answered(shard, row, failed=row in still_failing[shard]) for row in wanted]
    output.commit(shard, mended_part(old, encode_part(new, form), wanted, form))


def retry(output: JobOutput, still_failing=STILL) -> dict:
    """What a driver does, from wherever an earlier one stopped."""
    output.begin()
    plan = read_plan(output.storage)
    if plan is not None and output.is_complete():
        return output.finish()
    if plan is None:
        plan = open_round(output.storage, output.committed().values())
    if plan is None:
        return output.finish()
    mending = round_output(output, plan)
    for shard in sorted(set(plan.shards) - mending.committed().keys()):
        mend(mending, shard, still_failing)
    put_in_place(output, plan, lambda: None)
    return output.finish()


@pytest.fixture(params=["jsonl", "parquet"])
def output(request, tmp_path):
    return make_output(LocalStorage(str(tmp_path / "out")), request.param)


def wanted_output(output: JobOutput, folder, failed=STILL) -> dict[str, bytes]:
    """The output of a job in which only these rows ever failed."""
    return contents(make_output(LocalStorage(str(folder)), output.kind, failed).storage)


def without_manifest(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name not in ("_manifest.json", "_SUCCESS")}


def test_only_rows_with_an_error_are_answered_again(output, tmp_path):
    manifest = retry(output)
    assert (manifest["rows"], manifest["errors"]) == (12, 1)
    assert verify(output.storage).problems == ()
    # The mended output is, byte for byte, that of a job in which those rows had never failed.
    assert without_manifest(contents(output.storage)) == without_manifest(wanted_output(output, tmp_path / "wanted"))
    assert output.is_complete()
    assert output.finish() == manifest


def test_again_and_again_until_nothing_fails(output, tmp_path):
    retry(output)
    manifest = retry(output, still_failing=({}, {}, {}))
    assert manifest["errors"] == 0
    assert verify(output.storage).ok
    assert retry(output) == manifest, "no row has an error: there is nothing to do"
    wanted = wanted_output(output, tmp_path / "wanted", ({}, {}, {}))
    assert without_manifest(contents(output.storage)) == without_manifest(wanted)
    assert output.storage.read("_errors.jsonl") == b""


def test_the_output_stays_whole_until_the_new_parts_are_there(output):
    before = contents(output.storage)
    plan = open_round(output.storage, output.committed().values())
    mend(round_output(output, plan), 1)
    now = {name: data for name, data in contents(output.storage).items() if not name.startswith("_retry/")}
    assert now == before, "a reader finds the complete output that there was"
    assert not output.is_complete(), "but the job goes on"
    with pytest.raises(OutputError, match="1 shards with errors are not answered again yet"):
        put_in_place(output, plan, lambda: None)
    with pytest.raises(OutputError, match="2 shards with errors are being answered again"):
        output.finish()
    assert now == before
    assert [str(problem) for problem in verify(output.storage).problems] == [
        "_retry  rows with an error are being answered again; run the job again"
    ]


@pytest.fixture
def memory():
    with memory_folder() as folder:
        yield folder


def test_it_dies_after_each_operation_and_goes_on(memory):
    template, operation, died = make_output(LocalStorage(str(memory / "0")), "jsonl"), 0, True
    while died:
        operation += 1
        output = copy_of(template, memory / str(operation))
        try:
            retry(replace(output, storage=MortalStorage(output.storage, operation, "after")))
        except CrashError:
            died = True
        else:
            died = False
        manifest = retry(output) if died else output.finish()
        # Whoever dies after the end, but before the sweep, has finished: the next one tries what still fails.
        if manifest["errors"] == 1:
            assert verify(output.storage).problems == (), operation
            assert manifest["rows"] == 12
            assert read_plan(output.storage) is None
            assert not output.storage.list("_retry")
        else:
            pytest.fail(f"{manifest['errors']} errors after operation {operation}")
    assert operation > 40, "it died at every step"


def test_an_attempt_of_the_first_run_that_comes_late_changes_nothing(output):
    late = [part(shard, output.kind, failed=FAILED[shard]) for shard in range(3)]
    retry(output)
    before = contents(output.storage)
    for shard in range(3):
        receipt = output.commit(shard, late[shard])
        assert receipt == output.committed()[shard]
    after = {name: data for name, data in contents(output.storage).items() if not name.startswith("_attempts/")}
    assert after == before
    assert verify(output.storage).ok


def test_an_attempt_of_the_round_that_comes_late_changes_nothing(output):
    plan = open_round(output.storage, output.committed().values())
    old = round_output(output, plan).part_to_mend(1)
    manifest = retry(output)
    round_output(output, plan).commit(1, part(1, output.kind, failed={0, 1, 2, 3}))
    assert old is not None
    assert verify(output.storage).ok
    assert output.finish() == manifest
    assert not output.storage.list("_retry"), "what it left is swept the next time"


def test_a_driver_that_lost_its_lease_puts_nothing_in_place(output):
    plan = open_round(output.storage, output.committed().values())
    mending = round_output(output, plan)
    for shard in (1, 2):
        mend(mending, shard)
    before = contents(output.storage)

    def lost() -> None:
        raise OutputError("lost", hint="stop")

    with pytest.raises(OutputError, match="lost"):
        put_in_place(output, plan, lost)
    assert contents(output.storage) == before


def test_a_job_that_is_not_finished_can_be_mended_and_continued(tmp_path):
    output = JobOutput(LocalStorage(str(tmp_path)), FINGERPRINT, "jsonl", 3)
    output.begin()
    output.commit(1, part(1, "jsonl", failed=FAILED[1]))
    plan = open_round(output.storage, output.committed().values())
    assert plan.shards == (1,)
    output.commit(0, part(0, "jsonl"))
    mend(round_output(output, plan), 1)
    put_in_place(output, plan, lambda: None)
    with pytest.raises(OutputError, match="1 of 3 shards are not committed"):
        output.finish()
    output.commit(2, part(2, "jsonl", failed={0}))
    assert output.finish()["errors"] == 2
    assert verify(output.storage).ok


def test_a_damaged_plan_is_named(output):
    output.storage.create("_retry/plan.json", b'{"round": "../x", "shards": [1]}')
    with pytest.raises(OutputError, match=r"_retry/plan\.json is damaged"):
        output.is_complete()


def test_a_mended_parquet_part_keeps_its_columns_and_metadata():
    form = form_of("parquet")
    old, new = part(1, "parquet", failed={1, 2}), encode_part([answered(1, 2, failed=False)], form)
    mended = mended_part(old, new, [2], form)
    assert pq.read_schema(io.BytesIO(mended)) == pq.read_schema(io.BytesIO(old))
    assert pq.read_metadata(io.BytesIO(mended)).metadata == pq.read_metadata(io.BytesIO(old)).metadata
    assert mended == part(1, "parquet", failed={1})
    with pytest.raises(OutputError, match="1 rows were answered again in place of 2"):
        mended_part(old, new, [1, 2], form)
