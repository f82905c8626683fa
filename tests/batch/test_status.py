"""How far a job is, from its files alone."""

import json
import os
from dataclasses import replace

import pytest

from pipeline.batch import receipts
from pipeline.batch.commit import JobOutput
from pipeline.batch.lease import LeaseRecord, acquire, lease_name, top_lease
from pipeline.batch.receipts import Packer
from pipeline.batch.retry import open_round, round_output
from pipeline.batch.status import LeaseStatus, output_status
from pipeline.errors import OutputError
from pipeline.storage.local import LocalStorage
from tests.batch.outputs import FINGERPRINT, make_output, part
from tests.batch.test_lease import FakeTime, move_elsewhere


@pytest.fixture
def storage(tmp_path):
    return LocalStorage(str(tmp_path / "out"))


def status_of(storage, faked=None):
    faked = faked or FakeTime()
    return output_status(storage, clock=faked.clock, sleep=faked.sleep)


def test_a_job_on_its_way(storage):
    output = JobOutput(storage, FINGERPRINT, "jsonl", 5)
    output.begin()
    assert status_of(storage).shards_done == 0
    for shard in (0, 3):
        output.commit(shard, part(shard, "jsonl", failed={1}))
    storage.create("part-00004.jsonl", part(4, "jsonl"))  # its writer has not written the receipt yet
    before = storage.list()
    found = status_of(storage)
    assert (found.shards, found.shards_done, found.rows, found.errors) == (5, 2, 8, 2)
    assert found.error_codes == {"prompt_too_long": 2}
    assert found.bytes == before["part-00000.jsonl"] + before["part-00003.jsonl"]
    assert not found.complete
    assert "2 of 5 (40.0%)" in str(found)
    assert "stopped; the same command continues" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["lease"]["state"] == "none"
    assert storage.list() == before, "nothing is written"


def test_a_finished_job(storage):
    make_output(storage, "parquet")
    found = status_of(storage)
    assert found.complete
    assert (found.shards_done, found.rows, found.errors) == (3, 12, 3)
    assert found.lease == LeaseStatus("none")


def test_whose_lease_it_is(storage):
    make_output(storage, "jsonl", finished=False)
    lease = acquire(storage)
    faked = FakeTime()
    faked.plans.append((1005.0, lease.renew))
    found = status_of(storage, faked)
    assert (found.lease.state, found.lease.pid) == ("alive", os.getpid())
    assert "running" in str(found)
    silent = FakeTime()
    found = status_of(storage, silent)
    assert found.lease.state == "stale"
    assert 10 <= silent.now - 1000 < 20, "two heartbeats are missed"
    number, data = top_lease(storage)
    gone = replace(LeaseRecord.from_json(data), process_start=1)
    storage.replace(lease_name(number), gone.to_json())
    at_once = FakeTime()
    assert status_of(storage, at_once).lease.state == "stale"
    assert at_once.now == 1000
    move_elsewhere(storage, released=True)
    found = status_of(storage)
    assert (found.lease.state, found.lease.host) == ("none", "other-host")


def test_rows_that_are_answered_again(storage):
    output = make_output(storage, "jsonl")
    plan = open_round(storage, output.committed().values())
    found = status_of(storage)
    assert (found.complete, found.retry_shards, found.retry_shards_done, found.rows) == (False, 2, 0, 12)
    round_output(output, plan).commit(1, part(1, "jsonl"))
    assert status_of(storage).retry_shards_done == 1
    assert "1 of 2 shards with errors answered again" in str(status_of(storage))


class Counting:
    """A storage that counts what is read from it."""

    def __init__(self, storage):
        self._storage = storage
        self.names = []

    def read(self, name):
        self.names.append(name)
        return self._storage.read(name)

    def __getattr__(self, name):
        return getattr(self._storage, name)


def test_packed_receipts_are_not_read_one_by_one(storage):
    output = JobOutput(storage, FINGERPRINT, "jsonl", 30)
    output.begin()
    packer = Packer(storage, size=10)
    for shard in range(25):
        packer.add(output.commit(shard, part(shard, "jsonl", failed={shard % 4})))
    counting = Counting(storage)
    found = status_of(counting)
    assert (found.shards_done, found.rows, found.errors) == (25, 100, 25)
    loose = [name for name in counting.names if name.startswith("_commits/")]
    assert sorted(loose) == [f"_commits/{shard:05d}.json" for shard in range(20, 25)]
    assert len([name for name in counting.names if name.startswith("_packs/")]) == 2
    reading = Counting(storage)
    resumed = replace(output, storage=reading).committed()
    assert resumed == output.committed()
    assert sorted(name for name in reading.names if name.startswith("_commits/")) == sorted(loose)


def test_resuming_packs_what_it_had_to_read(storage, monkeypatch):
    monkeypatch.setattr("pipeline.batch.commit.PACK_RECEIPTS", 4)
    output = make_output(storage, "jsonl", [{}] * 10, finished=False)
    before = output.committed()
    reading = Counting(storage)
    assert replace(output, storage=reading).committed() == before
    assert len([name for name in reading.names if name.startswith("_commits/")]) == 2
    output.finish()
    assert not storage.list("_packs"), "they are swept at the end"
    assert receipts.PACK_RECEIPTS > 4


def test_a_deleted_receipt_is_made_anew_though_it_was_packed(storage, monkeypatch):
    monkeypatch.setattr("pipeline.batch.commit.PACK_RECEIPTS", 4)
    output = make_output(storage, "jsonl", [{}] * 4, finished=False)
    output.committed()
    assert storage.list("_packs")
    changed = part(2, "jsonl", failed={0})
    storage.replace("part-00002.jsonl", changed)
    storage.remove(["_commits/00002.json"])
    assert output.committed()[2].errors == 1
    assert not storage.list("_packs")


def test_a_damaged_pack_is_named(storage, monkeypatch):
    monkeypatch.setattr("pipeline.batch.commit.PACK_RECEIPTS", 4)
    output = make_output(storage, "jsonl", [{}] * 4, finished=False)
    output.committed()
    (name,) = storage.list("_packs")
    storage.replace(name, b"{}\n")
    with pytest.raises(OutputError, match=r"_packs/\w+\.jsonl is damaged"):
        output.committed()
    storage.remove_tree("_packs")
    assert len(output.committed()) == 4
