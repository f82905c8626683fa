"""Drivers that come, die, stall and come back, and rows answered again: whenever an output is complete, it is whole."""

import json
import threading
from contextlib import ExitStack
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pipeline.batch.commit import JobOutput
from pipeline.batch.lease import Lease
from pipeline.batch.parts import encode_part
from pipeline.batch.receipts import Receipt, write_pack
from pipeline.batch.retry import RetryPlan, open_round, put_in_place, read_plan, round_output
from pipeline.batch.row_errors import mended_part, row_errors
from pipeline.batch.verify import verify
from pipeline.errors import LeaseLostError, OutputError
from pipeline.storage.local import LocalStorage
from tests.batch.outputs import FINGERPRINT, answered, form_of, memory_folder, part
from tests.batch.test_commit_machine import CrashError, MortalStorage
from tests.batch.test_lease import take

KIND = "jsonl"
NUM_SHARDS, NUM_ROWS = 2, 3


@dataclass
class Driver:
    """A driver and what it remembers, however old that is."""

    lease: Lease
    plan: RetryPlan | None = None
    known: dict[int, Receipt] = field(default_factory=dict)


class StallingStorage:
    """A storage whose process stops before its n-th operation, until it is woken."""

    def __init__(self, inner, operation, asleep, woken):
        self._inner, self._left, self._asleep, self._woken = inner, operation, asleep, woken

    def __getattr__(self, name):
        self._left -= 1
        if self._left == 0:
            self._asleep.set()
            self._woken.wait(60)
        return getattr(self._inner, name)


class Stalled:
    """An action that stands still at its n-th operation."""

    def __init__(self, storage, operation, action):
        self._asleep, self._woken = threading.Event(), threading.Event()
        stalling = StallingStorage(storage, operation, self._asleep, self._woken)
        self._thread = threading.Thread(target=self._run, args=(action, stalling))
        self._thread.start()
        while self._thread.is_alive() and not self._asleep.wait(0.001):
            pass

    def _run(self, action, storage):
        try:
            action(storage)
        except OutputError:
            pass
        finally:
            self._asleep.set()

    def wake(self):
        self._woken.set()
        self._thread.join()


numbers = st.integers(0, 20)
shards = st.integers(0, NUM_SHARDS - 1)
failing = st.sets(st.integers(0, NUM_ROWS - 1))
deaths = st.none() | st.tuples(st.integers(1, 25), st.sampled_from(["before", "after"]))


class Drivers(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.ended = ExitStack()
        self.storage = LocalStorage(str(self.ended.enter_context(memory_folder()) / "out"))
        self.drivers = []
        self.stalled = []
        self.attempts = 0
        self.good = {}  # (shard, row) -> its line, since an output was complete in which it had no error

    def output(self, storage=None):
        return JobOutput(storage or self.storage, FINGERPRINT, KIND, NUM_SHARDS)

    def mortal(self, death):
        return self.output(None if death is None else MortalStorage(self.storage, *death))

    def some_driver(self, number):
        return self.drivers[number % len(self.drivers)]

    def try_to(self, action):
        try:
            return action()
        except (CrashError, OutputError):
            return None

    @initialize()
    def first_driver(self):
        self.output().begin()
        self.driver_starts()

    @rule()
    def driver_starts(self):
        """Whoever had the lease says nothing for its whole time to live."""
        self.drivers.append(Driver(take(self.storage)))

    @rule(number=numbers, death=deaths)
    def driver_looks(self, number, death):
        driver = self.some_driver(number)
        self.try_to(self.mortal(death).begin)
        driver.known = self.try_to(self.mortal(death).committed) or driver.known
        driver.plan = self.try_to(lambda: read_plan(self.storage))

    @rule(shard=shards, failed=failing)
    def attempt_commits(self, shard, failed):
        self.attempts += 1
        data = part(shard, KIND, failed=failed, rows=NUM_ROWS, by=f" by {self.attempts}")
        self.try_to(lambda: self.output().commit(shard, data))

    @rule(number=numbers, death=deaths)
    def round_is_opened(self, number, death):
        driver = self.some_driver(number)
        output = self.mortal(death)

        def begin():
            driver.lease.confirm()
            receipts = output.committed()
            if read_plan(output.storage) is not None and output.is_complete():
                output.finish()
            driver.plan = open_round(output.storage, receipts.values())

        self.try_to(begin)

    @rule(number=numbers, shard=shards, failed=failing, death=deaths)
    def attempt_mends(self, number, shard, failed, death):
        plan = self.some_driver(number).plan
        if plan is not None and shard in plan.shards:
            self.try_to(lambda: self.mend(round_output(self.mortal(death), plan), shard, failed))

    def mend(self, mending, shard, failed):
        self.attempts += 1
        old, form = mending.part_to_mend(shard), form_of(KIND)
        rows = [error.row for error in row_errors(old, KIND, shard, id_column=None)]
        new = [answered(shard, row, failed=row in failed, by=f" by {self.attempts}") for row in rows]
        mending.commit(shard, mended_part(old, encode_part(new, form), rows, form))

    @rule(number=numbers, death=deaths)
    def round_is_put_in_place(self, number, death):
        driver = self.some_driver(number)
        if driver.plan is not None:
            self.try_to(lambda: put_in_place(self.mortal(death), driver.plan, driver.lease.confirm))

    @rule(number=numbers, death=deaths, remembers=st.booleans())
    def driver_finishes(self, number, death, remembers):
        """Also one that has lost its lease, and does not look."""
        known = dict(self.some_driver(number).known) if remembers else None
        self.try_to(lambda: self.mortal(death).finish(known))

    @rule(operation=st.integers(1, 20))
    @precondition(lambda self: len(self.stalled) < 2)
    def driver_stalls_while_it_finishes(self, operation):
        self.stalled.append(Stalled(self.storage, operation, lambda storage: self.output(storage).finish()))

    @rule()
    @precondition(lambda self: self.stalled)
    def stalled_driver_wakes(self):
        self.stalled.pop(0).wake()

    @rule(number=numbers)
    def driver_packs_what_it_remembers(self, number):
        known = self.some_driver(number).known
        if known and not self.storage.exists("_retry/plan.json") and not self.storage.exists("_SUCCESS"):
            write_pack(self.storage, list(known.values()))

    @rule(failed=failing)
    def driver_runs_to_the_end(self, failed):
        self.driver_starts()
        self.run_to_the_end(failed)

    def run_to_the_end(self, failed, *, retry=True):
        driver, output = self.drivers[-1], self.output()
        output.begin()
        plan = read_plan(self.storage)
        if plan is not None and output.is_complete():
            output.finish()
            plan = None
        if plan is not None and set(plan.shards) <= round_output(output, plan).committed().keys():
            put_in_place(output, plan, driver.lease.confirm)
        done = output.committed()
        if plan is None and retry:
            plan = open_round(self.storage, done.values())
        for shard in set(range(NUM_SHARDS)) - done.keys():
            done[shard] = output.commit(shard, part(shard, KIND, failed=failed, rows=NUM_ROWS))
        if plan is not None:
            mending = round_output(output, plan)
            for shard in set(plan.shards) - mending.committed().keys():
                self.mend(mending, shard, failed)
            done.update(put_in_place(output, plan, driver.lease.confirm))
        driver.lease.confirm()
        manifest = output.finish(done)
        assert output.is_complete()
        return manifest

    @invariant()
    def one_driver_has_the_lease(self):
        for driver in self.drivers:
            try:
                driver.lease.confirm()
            except LeaseLostError:
                assert driver is not self.drivers[-1]
            else:
                assert driver is self.drivers[-1]

    @invariant()
    def what_is_complete_is_whole_and_good_answers_stay(self):
        if not self.storage.exists("_job.json") or not self.output().is_complete():
            return
        assert verify(self.storage).problems == ()
        for shard in range(NUM_SHARDS):
            lines = self.storage.read(f"part-{shard:05d}.{KIND}").splitlines()
            assert [json.loads(line)["key"] for line in lines] == [f"key {shard}/{row}" for row in range(NUM_ROWS)]
            for row, line in enumerate(lines):
                if json.loads(line)["error"] is None:
                    assert self.good.setdefault((shard, row), line) == line
                else:
                    assert (shard, row) not in self.good, "an answer is never lost again"

    def teardown(self):
        try:
            for stalled in self.stalled:
                stalled.wake()
            if self.drivers:
                self.driver_starts()
                self.finish_in_a_few_tries()
        finally:
            self.ended.close()

    def finish_in_a_few_tries(self):
        """At most one more run is needed than there are mistakes that someone left behind."""
        for _ in range(3):
            try:
                self.run_to_the_end(set())
                break
            except OutputError:
                continue
        manifest = self.run_to_the_end(set())
        assert manifest["errors"] == 0
        self.what_is_complete_is_whole_and_good_answers_stay()
        assert verify(self.storage).rows == NUM_SHARDS * NUM_ROWS
        assert not self.storage.list("_retry")


TestDrivers = Drivers.TestCase
TestDrivers.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
