"""The output folder of a job: whose it is, what is committed, and when it is complete."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.batch.commit import JobOutput, refuse_foreign
from pipeline.batch.layout import part_name, receipt_name, row_errors_name
from pipeline.batch.parts import AnsweredRow, PartFormat, encode_part
from pipeline.batch.receipts import Receipt
from pipeline.batch.rows import Row
from pipeline.engine.types import Completion, Failure
from pipeline.errors import FingerprintError, OutputError
from pipeline.storage.local import LocalStorage

FINGERPRINT = {"expert_sha256": "ab", "seed": 0, "sampling": {"temperature": 0.0, "stop": ("x",)}}


def part(text: str, kind: str = "jsonl", *, rows: int = 2) -> bytes:
    """A part whose last row failed."""
    form = PartFormat(kind=kind, inputs=pa.schema([("q", pa.string())]), is_loose=True)
    good = [
        AnsweredRow(Row(f"x#{i}", {"q": text}, None), Completion(str(i), text, "stop", 3, 4)) for i in range(rows - 1)
    ]
    return encode_part([*good, AnsweredRow(Row("x#9", {}, Failure("invalid_row", "bad")), None)], form)


@pytest.fixture(params=["jsonl", "parquet"])
def output(request, tmp_path):
    return JobOutput(LocalStorage(str(tmp_path / "out")), FINGERPRINT, request.param, 3)


def test_a_job_from_begin_to_success(output):
    output.begin()
    assert output.committed() == {}
    receipts = [output.commit(shard, part(f"answer {shard}", output.kind)) for shard in (2, 0, 1)]
    first = receipts[1]
    assert (first.shard, first.rows, first.errors, first.prompt_tokens, first.completion_tokens) == (0, 2, 1, 3, 4)
    assert first.path == f"part-00000.{output.kind}"
    assert output.committed() == {receipt.shard: receipt for receipt in receipts}
    assert not output.is_complete()
    manifest = output.finish()
    assert output.is_complete()
    assert (manifest["rows"], manifest["errors"], manifest["completion_tokens"]) == (6, 3, 12)
    assert [item["shard"] for item in manifest["parts"]] == [0, 1, 2]
    assert json.loads(output.storage.read("_manifest.json")) == manifest
    assert sorted(output.storage.list()) == sorted(
        ["_job.json", "_manifest.json", "_SUCCESS", "_errors.jsonl", *map(receipt_name, range(3))]
        + [row_errors_name(receipt.shard, receipt.sha256) for receipt in receipts]
        + [part_name(shard, output.kind) for shard in range(3)]
    )
    assert output.finish() == manifest
    output.begin()


def test_a_job_without_shards_is_complete_at_once(output):
    output = replace(output, num_shards=0)
    output.begin()
    assert output.finish()["parts"] == []
    assert output.is_complete()


def test_the_same_work_leaves_the_same_bytes(tmp_path):
    folders = []
    for name in ("one", "two"):
        output = JobOutput(LocalStorage(str(tmp_path / name)), FINGERPRINT, "parquet", 2)
        output.begin()
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda shard, to=output: to.commit(shard, part(str(shard), "parquet")), range(2)))
        output.finish()
        folders.append({name: output.storage.read(name) for name in output.storage.list()})
    assert folders[0] == folders[1]


def test_another_job_is_refused_field_by_field(output):
    output.begin()
    other = {"seed": 7, "sampling": {"temperature": 0.0, "stop": ["x"]}, "grammar": None}
    with pytest.raises(FingerprintError) as early:
        replace(output, fingerprint=other, num_shards=4).begin()
    assert early.value.hint.startswith("Nothing is answered there yet: take it for this job with --overwrite")
    output.commit(0, part("0", output.kind))
    with pytest.raises(FingerprintError) as caught:
        replace(output, fingerprint=other, num_shards=4).begin()
    assert str(caught.value) == (
        f"{output.storage.url('')} belongs to another job\n"
        '  expert_sha256: there "ab", now nothing\n'
        "  grammar: there nothing, now null\n"
        "  num_shards: there 3, now 4\n"
        "  seed: there 0, now 7\n"
        "  Fix: Run the command that wrote it, name another output folder, or replace it: --overwrite."
    )
    output.begin()


def test_two_drivers_may_begin_the_same_job_at_once(output):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: output.begin(), range(8)))
    assert json.loads(output.storage.read("_job.json"))["seed"] == 0


def test_foreign_files_are_never_mixed_with(output):
    output.storage.create("holiday.jpg", b"x")
    for check in (output.begin, lambda: refuse_foreign(output.storage)):
        with pytest.raises(OutputError, match="it is not the output of a job") as caught:
            check()
        assert caught.value.details == ("holiday.jpg",)
    assert output.storage.list() == {"holiday.jpg": 1}


def test_what_an_attempt_left_is_not_foreign(output):
    output.storage.create("_attempts/left-behind", b"x")
    output.storage.create("_input/rows.jsonl", b"x")
    output.begin()


def test_the_first_attempt_wins_and_the_second_is_told(output):
    output.begin()
    first = output.commit(0, part("first", output.kind))
    assert output.commit(0, part("second", output.kind)) == first
    assert output.storage.read(first.path) == part("first", output.kind)


def test_a_zombie_that_commits_after_the_end_changes_nothing(output):
    output.begin()
    for shard in range(3):
        output.commit(shard, part("in time", output.kind))
    output.finish()
    before = {name: output.storage.read(name) for name in output.storage.list()}
    assert output.commit(1, part("late", output.kind)) == output.committed()[1]
    after = {name: output.storage.read(name) for name in output.storage.list() if not name.startswith("_attempts")}
    assert after == before
    assert output.is_complete()


@pytest.mark.parametrize("how", ["committed", "commit", "finish"])
def test_a_part_whose_writer_died_before_the_receipt_gets_one(output, how):
    output.begin()
    receipts = {shard: output.commit(shard, part(f"{shard}", output.kind)) for shard in range(3)}
    written = output.storage.read(receipt_name(1))
    output.storage.remove_tree("_commits")
    if how == "committed":
        assert output.committed() == receipts
    elif how == "commit":
        assert output.commit(1, part("other", output.kind)) == receipts[1]
    else:
        output.finish()
    assert output.storage.read(receipt_name(1)) == written


def test_an_unfinished_job_does_not_finish(output):
    output.begin()
    output.commit(1, part("x", output.kind))
    with pytest.raises(OutputError, match="2 of 3 shards are not committed") as caught:
        output.finish()
    assert caught.value.details == ("shard 0", "shard 2")
    assert not output.storage.exists("_SUCCESS")


def test_a_deleted_part_is_noticed(output):
    output.begin()
    output.commit(0, part("x", output.kind))
    Path(output.storage.url(part_name(0, output.kind))).unlink()
    with pytest.raises(OutputError, match="receipts without their parts") as caught:
        output.committed()
    assert caught.value.details == (f"_commits/00000.json  no part-00000.{output.kind}",)


def test_a_part_of_another_size_is_noticed(output):
    output.begin()
    output.commit(0, part("x", output.kind))
    path = Path(output.storage.url(part_name(0, output.kind)))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(OutputError, match="receipt of shard 0 does not go with its part"):
        output.committed()


@pytest.mark.parametrize("text", [b"", b"{}", b"[]", b"\xff", b'{"shard": "0"}'])
def test_a_damaged_receipt_is_noticed(output, text):
    output.begin()
    output.commit(0, part("x", output.kind))
    Path(output.storage.url(receipt_name(0))).write_bytes(text)
    with pytest.raises(OutputError, match="a receipt is damaged"):
        output.committed()


def test_a_receipt_of_another_shard_is_noticed(output):
    output.begin()
    for shard in range(2):
        output.commit(shard, part(f"{shard}", output.kind))
    Path(output.storage.url(receipt_name(1))).write_bytes(output.storage.read(receipt_name(0)))
    with pytest.raises(OutputError, match="receipt of shard 1"):
        output.committed()


def test_parts_that_do_not_belong_are_named(output):
    output.begin()
    other = "parquet" if output.kind == "jsonl" else "jsonl"
    for name in (part_name(7, output.kind), part_name(0, other)):
        output.storage.create(name, part("x", output.kind))
        with pytest.raises(OutputError, match="do not belong to this job") as caught:
            output.committed()
        assert caught.value.details == (name,)
        Path(output.storage.url(name)).unlink()


def test_a_manifest_that_was_changed_is_noticed(output):
    output.begin()
    for shard in range(3):
        output.commit(shard, part("x", output.kind))
    output.finish()
    Path(output.storage.url("_manifest.json")).write_bytes(b"{}")
    with pytest.raises(OutputError, match=r"_manifest\.json is not the one"):
        output.is_complete()
    with pytest.raises(OutputError, match=r"_manifest\.json is not the one"):
        output.finish()
    output.storage.remove(["_SUCCESS"])
    with pytest.raises(OutputError, match=r"_manifest\.json does not go with"):
        output.finish()


def test_a_damaged_part_is_not_committed(output):
    output.begin()
    with pytest.raises(OutputError, match="a part is damaged"):
        output.commit(0, b"half a par")
    assert output.committed() == {}


def test_a_receipt_travels_as_json():
    receipt = Receipt(1, 2, {}, 3, 4, 5, "part-00001.jsonl", "ab")
    assert Receipt.from_json(receipt.to_json()) == receipt
