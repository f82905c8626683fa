"""Attempts, crashes at every step, retries, zombies and reruns: at the end each shard is committed once."""

import json
import shutil
import tempfile
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pipeline.batch.commit import JobOutput
from pipeline.batch.layout import part_name, receipt_name
from pipeline.errors import FingerprintError, OutputError
from pipeline.storage import Storage
from pipeline.storage.local import LocalStorage


class CrashError(Exception):
    """The process died."""


class MortalStorage:
    """A storage whose process dies at its n-th operation: before it, in the midst of it, or after it."""

    def __init__(self, inner: Storage, operation: int, moment: str, life: dict | None = None) -> None:
        self._inner = inner
        self._life = {"left": operation, "lock": threading.Lock()} if life is None else life
        self._moment = moment

    def _run(self, operation, *arguments):
        with self._life["lock"]:
            self._life["left"] -= 1
            left = self._life["left"]
        if left < 0:
            raise CrashError  # the dead do nothing more
        if left == 0 and self._moment != "after":
            if self._moment == "midst":
                self._inner.create(f"_attempts/{uuid.uuid4()}", b"half of what was")
            raise CrashError
        result = getattr(self._inner, operation)(*arguments)
        if left == 0:
            raise CrashError
        return result

    def create(self, name, data):
        return self._run("create", name, data)

    def create_from_file(self, name, path):
        return self._run("create_from_file", name, path)

    def replace(self, name, data):
        self._run("replace", name, data)

    def read(self, name):
        return self._run("read", name)

    def exists(self, name):
        return self._run("exists", name)

    def list(self, prefix=""):
        return self._run("list", prefix)

    def remove(self, names):
        for name in names:
            self._run("remove", [name])

    def remove_tree(self, prefix):
        self._run("remove_tree", prefix)

    def subfolder(self, prefix):
        return MortalStorage(self._inner.subfolder(prefix), 0, self._moment, self._life)

    def url(self, name):
        return self._inner.url(name)


def part(shard: int, attempt: int) -> bytes:
    answer = {"text": f"{shard} {attempt}", "prompt_tokens": shard, "completion_tokens": attempt, "error": None}
    return (json.dumps(answer) + "\n").encode() * (shard + 1)


deaths = st.tuples(st.integers(1, 12), st.sampled_from(["before", "midst", "after"]))
shards = st.integers(0, 2)
attempts = st.integers(0, 3)


class Job(RuleBasedStateMachine):
    num_shards = 3
    hard_links = True

    def __init__(self):
        super().__init__()
        self.folder = tempfile.mkdtemp()
        self.storage = LocalStorage(f"{self.folder}/out", hard_links=self.hard_links)
        self.offered = {shard: set() for shard in range(self.num_shards)}
        self.committed_bytes = {}
        self.receipts = {}

    def output(self, storage=None):
        return JobOutput(storage or self.storage, {"seed": 1}, "jsonl", self.num_shards)

    def mortal(self, death):
        return self.output(MortalStorage(self.storage, *death))

    @initialize(deaths=st.lists(deaths, max_size=3))
    def begin(self, deaths):
        for death in deaths:
            self.survive(self.mortal(death).begin)
        self.output().begin()

    @rule(shard=shards, attempt=attempts)
    def attempt_lives(self, shard, attempt):
        self.offered[shard].add(part(shard, attempt))
        self.told(self.output().commit(shard, part(shard, attempt)))

    @rule(shard=shards, attempt=attempts, death=deaths)
    def attempt_dies(self, shard, attempt, death):
        self.offered[shard].add(part(shard, attempt))
        receipt = self.survive(lambda: self.mortal(death).commit(shard, part(shard, attempt)))
        if receipt:
            self.told(receipt)

    @rule(shard=shards)
    def attempts_race(self, shard):
        offers = [part(shard, attempt) for attempt in range(4)]
        self.offered[shard].update(offers)
        with ThreadPoolExecutor(4) as pool:
            receipts = list(pool.map(lambda data: self.output().commit(shard, data), offers))
        assert len(set(receipts)) == 1
        self.told(receipts[0])

    @rule(death=deaths)
    def driver_dies(self, death):
        mortal = self.mortal(death)
        self.survive(mortal.begin)
        for receipt in (self.survive(mortal.committed) or {}).values():
            self.told(receipt)

    @rule(death=deaths)
    def finishing_dies(self, death):
        try:
            self.survive(self.mortal(death).finish)
        except OutputError as error:
            assert "not committed" in str(error)  # noqa: PT017 - only unfinished jobs refuse

    @rule()
    def rerun(self):
        output = self.output()
        output.begin()
        for receipt in output.committed().values():
            self.told(receipt)
        if len(output.committed()) == self.num_shards:
            output.finish()

    @rule()
    def another_job(self):
        with pytest.raises(FingerprintError, match="seed: there 1, now 2"):
            JobOutput(self.storage, {"seed": 2}, "jsonl", self.num_shards).begin()

    @staticmethod
    def survive(action):
        try:
            return action()
        except CrashError:
            return None

    def told(self, receipt):
        """Whoever asks is told the same for ever."""
        assert self.receipts.setdefault(receipt.shard, receipt) == receipt

    @invariant()
    def parts_are_one_attempts_and_stay(self):
        for name in self.storage.list():
            if name.startswith("part-"):
                data = self.storage.read(name)
                shard = int(name[5:10])
                assert data in self.offered[shard]
                assert self.committed_bytes.setdefault(name, data) == data

    @invariant()
    def receipts_agree_with_parts(self):
        for name in self.storage.list("_commits"):
            receipt = json.loads(self.storage.read(name))
            data = self.storage.read(receipt["path"])
            assert name == receipt_name(receipt["shard"])
            assert (receipt["sha256"], receipt["bytes"]) == (sha256(data).hexdigest(), len(data))
            assert receipt["rows"] == receipt["shard"] + 1

    @invariant()
    def success_comes_last(self):
        if self.storage.exists("_SUCCESS"):
            assert self.output().is_complete()
            assert len(self.storage.list("_commits")) == self.num_shards
            parts = json.loads(self.storage.read("_manifest.json"))["parts"]
            assert [item["shard"] for item in parts] == list(range(self.num_shards))

    def teardown(self):
        try:
            if self.storage.exists("_job.json"):
                self.complete()
        finally:
            shutil.rmtree(self.folder)

    def complete(self):
        output = self.output()
        output.begin()
        for shard in set(range(self.num_shards)) - output.committed().keys():
            self.offered[shard].add(part(shard, 9))
            output.commit(shard, part(shard, 9))
        manifest = output.finish()
        assert output.is_complete()
        self.parts_are_one_attempts_and_stay()
        self.receipts_agree_with_parts()
        names = {"_job.json", "_manifest.json", "_SUCCESS", "_errors.jsonl"}
        names |= {part_name(shard, "jsonl") for shard in range(self.num_shards)}
        names |= {receipt_name(shard) for shard in range(self.num_shards)}
        assert set(self.storage.list()) == names, "nothing of the attempts stays"
        assert manifest["rows"] == sum(range(1, self.num_shards + 1))


class JobWithoutLinks(Job):
    hard_links = False


TestJob = Job.TestCase
TestJob.settings = settings(max_examples=60, stateful_step_count=15, deadline=None)
TestJobWithoutLinks = JobWithoutLinks.TestCase
TestJobWithoutLinks.settings = settings(max_examples=30, stateful_step_count=15, deadline=None)


@pytest.mark.parametrize("moment", ["before", "midst", "after"])
@pytest.mark.parametrize("operation", range(1, 42))
def test_the_whole_job_dies_at_each_operation_and_is_run_again(tmp_path, operation, moment):
    storage = LocalStorage(str(tmp_path / "out"))

    def job(to: Storage, attempt: int) -> dict:
        output = JobOutput(to, {"seed": 1}, "jsonl", 2)
        output.begin()
        done = output.committed()
        for shard in {0, 1} - done.keys():
            output.commit(shard, part(shard, attempt))
        return output.finish()

    try:
        job(MortalStorage(storage, operation, moment), 1)
    except CrashError:
        died = True
    else:
        died = False
    kept = {name: storage.read(name) for name in storage.list() if not name.startswith("_attempts")}
    manifest = job(storage, 2)
    assert {name: storage.read(name) for name in kept} == kept, "what was committed stays"
    assert manifest == json.loads(storage.read("_manifest.json"))
    assert len(storage.list()) == 8
    assert died or kept.keys() == storage.list().keys()
