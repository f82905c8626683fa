"""The lease on an output: one driver at a time; it goes on when its owner is gone, and no clocks are compared."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.batch.lease import LeaseRecord, acquire, hold, lease_name, process_start, top_lease
from pipeline.errors import LeaseLostError, OutputError, OutputInUseError
from pipeline.storage.local import LocalStorage

ELSEWHERE = "another boot pid:[1]"


class FakeTime:
    """A clock that goes on when someone sleeps; what is planned for a moment happens then."""

    def __init__(self):
        self.now = 1000.0
        self.plans = deque()

    def clock(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        while self.plans and self.plans[0][0] <= self.now:
            self.plans.popleft()[1]()


@pytest.fixture(params=[True, False], ids=["links", "claims"])
def storage(request, tmp_path):
    return LocalStorage(str(tmp_path / "out"), hard_links=request.param)


def take(storage, faked=None, **options):
    faked = faked or FakeTime()
    return acquire(storage, clock=faked.clock, sleep=faked.sleep, **options)


def move_elsewhere(storage, *, seconds=60.0, **changes):
    """As if the lease were of a driver on another machine, whose process nobody here can look at."""
    number, data = top_lease(storage)
    record = replace(LeaseRecord.from_json(data), machine=ELSEWHERE, host="other-host", seconds=seconds, **changes)
    storage.replace(lease_name(number), record.to_json())
    return record


def numbers(storage):
    return sorted(int(name[7:13]) for name in storage.list("_lease"))


def test_a_lease_is_taken_given_back_and_taken_again(storage):
    for number in (1, 2, 3):
        with hold(storage) as lease:
            assert lease.number == number
            lease.confirm()
            assert numbers(storage) == [number], "older ones are removed"
        assert LeaseRecord.from_json(top_lease(storage)[1]).released


def test_it_is_given_back_when_the_job_fails(storage):
    with pytest.raises(ZeroDivisionError), hold(storage):
        raise ZeroDivisionError
    assert take(storage).number == 2


def test_a_second_driver_is_refused_as_soon_as_it_sees_a_heartbeat(storage):
    first = take(storage)
    faked = FakeTime()
    faked.plans.append((1005.0, first.renew))
    with pytest.raises(OutputInUseError, match="another driver is writing to") as caught:
        take(storage, faked)
    assert 1005 <= faked.now < 1010
    assert caught.value.details[0].startswith(f"it is process {os.getpid()} on ")
    assert "the same command continues" in caught.value.hint
    first.confirm()


def test_a_second_driver_is_refused_by_a_first_that_beats_in_its_thread(storage):
    with hold(storage, seconds=2.4), pytest.raises(OutputInUseError):
        acquire(storage, seconds=2.4)


def test_who_is_silent_for_its_whole_life_is_replaced(storage, caplog):
    first = take(storage)
    move_elsewhere(storage, seconds=60.0)
    faked = FakeTime()
    second = take(storage, faked)
    assert second.number == 2
    assert 60 <= faked.now - 1000 < 63
    assert "waiting to see whether it is alive" in caplog.text
    for act in (first.renew, first.confirm, first.check):
        with pytest.raises(LeaseLostError, match="another driver has taken over") as caught:
            act()
    assert f"it is process {os.getpid()} on " in caught.value.details[0]
    first.release()
    second.confirm()
    assert not LeaseRecord.from_json(top_lease(storage)[1]).released, "a lost lease is not given back"


def test_clocks_that_disagree_by_years_do_not_matter(storage):
    first = take(storage)
    for since in ("1970-01-01T00:00:00+00:00", "2999-01-01T00:00:00+00:00"):
        faked = FakeTime()
        faked.now = 5.0 if since < "2" else 1e9
        record = move_elsewhere(storage, since=since)
        assert record.since == since
        faked.plans.append((faked.now + 40, first.renew))
        with pytest.raises(OutputInUseError):
            take(storage, faked)


def test_a_heartbeat_that_is_late_but_in_time_counts(storage):
    first = take(storage)
    move_elsewhere(storage, seconds=60.0)
    faked = FakeTime()
    faked.plans.append((1058.0, first.renew))
    with pytest.raises(OutputInUseError):
        take(storage, faked)


def test_the_time_to_live_is_the_owners_own(storage):
    take(storage)
    move_elsewhere(storage, seconds=5.0)
    faked = FakeTime()
    take(storage, faked, seconds=600)
    assert faked.now - 1000 < 7


CHILD = """
import sys, time
from pipeline.batch.lease import hold
from pipeline.storage.local import LocalStorage
with hold(LocalStorage(sys.argv[1], hard_links=sys.argv[2] == "True"), seconds=3600):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_driver_killed_on_this_machine_is_replaced_at_once(storage):
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, storage.root, str(storage.hard_links)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        assert not LeaseRecord.from_json(top_lease(storage)[1]).is_gone()
        process.send_signal(signal.SIGKILL)
    lease = acquire(storage, sleep=lambda _: pytest.fail("there is nothing to wait for"))
    assert lease.number == 2


def test_a_process_id_that_was_given_out_again_is_not_the_driver(storage):
    record = LeaseRecord.mine(60)
    assert not record.is_gone()
    assert replace(record, process_start=record.process_start - 1).is_gone()
    assert not replace(record, machine=ELSEWHERE, process_start=1).is_gone(), "other machines cannot be looked into"
    assert process_start(2**22 + 1) is None


def test_racing_drivers_have_one_winner(storage):
    take(storage).release()
    outcomes = []

    def race():
        try:
            outcomes.append(acquire(storage, seconds=1.2).number)
        except OutputInUseError:
            outcomes.append("refused")

    # The winner keeps its lease alive, so that the others see it beat.
    stop = threading.Event()

    def beat():
        while not stop.wait(0.05):
            data = top_lease(storage)
            record = LeaseRecord.from_json(data[1])
            if not record.released:
                storage.replace(lease_name(data[0]), replace(record, beat=record.beat + 1).to_json())

    threads = [threading.Thread(target=race) for _ in range(6)]
    beater = threading.Thread(target=beat)
    beater.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    beater.join()
    assert sorted(outcomes, key=str) == [2, *["refused"] * 5]


def test_a_slow_newcomer_that_creates_an_old_number_does_not_hold_it(storage):
    """It saw lease 1 dead, and slept while others took 2 and 3 and removed 1 and 2."""

    class Slow:
        """The storage, in which others come and go just before the newcomer creates its file."""

        def __init__(self):
            self.is_first = True

        def create(self, name, data):
            if self.is_first:
                self.is_first = False
                for _ in range(2):
                    take(storage).release()
                take(storage)
                storage.remove_tree("_attempts")
            return storage.create(name, data)

        def __getattr__(self, name):
            return getattr(storage, name)

    take(storage).release()
    faked = FakeTime()
    lease = take(Slow(), faked)
    assert lease.number == 5
    assert faked.now - 1000 >= 60, "it waited for the one that came before it"


@pytest.mark.parametrize("data", [b"", b"{}", b"null", b"\xff", b'{"owner": 1}'])
def test_a_damaged_lease_is_replaced_when_it_does_not_change(storage, data):
    storage.create(lease_name(7), data)
    faked = FakeTime()
    assert take(storage, faked).number == 8
    assert faked.now - 1000 >= 60


def test_a_storage_that_fails_for_a_while_does_not_end_the_lease(storage, caplog):
    class Flaky:
        broken = True

        def replace(self, name, data):
            if self.broken:
                raise OutputError("the network is down", hint="wait")
            storage.replace(name, data)

        def __getattr__(self, name):
            return getattr(storage, name)

    flaky = Flaky()
    with hold(flaky, seconds=1.2) as lease:
        deadline = time.monotonic() + 10
        while "cannot be renewed now: the network is down" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
        lease.check()
        flaky.broken = False
        before = top_lease(storage)
        while top_lease(storage) == before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert LeaseRecord.from_json(top_lease(storage)[1]).beat > 0
    assert LeaseRecord.from_json(top_lease(storage)[1]).released


def test_giving_it_back_leaves_nothing_of_attempts(tmp_path):
    storage = LocalStorage(str(tmp_path))
    with hold(storage):
        storage.remove_tree("_attempts")
    assert [path.name for path in tmp_path.iterdir()] == ["_lease"]


def test_the_file_tells_people_who_it_is(tmp_path):
    storage = LocalStorage(str(tmp_path))
    with hold(storage):
        text = Path(storage.url("_lease/000001.json")).read_text()
    for words in ('"host"', '"pid"', '"since"', str(os.getpid())):
        assert words in text
