"""The notes of lost workers: whatever row ends a worker is found, after few deaths, and no other row is blamed."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.batch.trials import MAX_DEATHS, History, Range, Trials, plan_trials
from pipeline.errors import OutputError, WorkerLostError
from pipeline.storage.local import LocalStorage


@dataclass
class Notes:
    """A storage in memory: what `Trials` needs of one, without waiting for a disk."""

    files: dict[str, bytes] = field(default_factory=dict)

    def create(self, name: str, data: bytes) -> bool:
        return self.files.setdefault(name, data) is data

    def read(self, name: str) -> bytes:
        return self.files[name]

    def list(self, prefix: str = "") -> dict[str, int]:
        return {name: len(data) for name, data in sorted(self.files.items()) if name.startswith(f"{prefix}/")}

    def exists(self, name: str) -> bool:
        return name in self.files

    def remove_tree(self, prefix: str) -> None:
        self.files = {name: data for name, data in self.files.items() if not name.startswith(f"{prefix}/")}

    def url(self, name: str) -> str:
        return f"memory:{name}"


def live(trials: Trials, num_rows: int, killers: Iterable[int]) -> tuple[int, ...] | None:
    """One life of a worker with shard 3: the rows it blames when it has answered all others; None when it dies."""
    history = trials.history(3)
    if not history.is_suspect:
        trials.begin(3, Range(0, num_rows), history, is_alone=False)
        return None if set(killers) & set(range(num_rows)) else ()
    plan = plan_trials(num_rows, history.deaths)
    for rows in plan.ranges:
        history = trials.begin(3, rows, history, is_alone=True)
        if set(killers) & set(range(*rows)):
            return None
        trials.end(3)
    return plan.killers


@given(st.data())
def test_the_rows_that_end_workers_are_found_and_no_others(data: st.DataObject) -> None:
    num_rows = data.draw(st.integers(1, 600))
    killers = data.draw(st.sets(st.integers(0, num_rows - 1), max_size=3))
    storage = Notes()
    deaths = 0
    while (blamed := live(Trials(storage, is_noting=True), num_rows, killers)) is None:
        deaths += 1
    assert blamed == tuple(sorted(killers))
    # once in company, once with the whole shard, then for each killer a range of 256 and of 16 rows, and twice alone
    assert deaths <= (2 + 4 * len(killers) if killers else 0)


@given(st.integers(0, 5000), st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 5000)), max_size=5))
def test_every_row_is_tried_or_blamed_exactly_once(num_rows: int, odd: list[tuple[int, int]]) -> None:
    whole = Range(0, num_rows)
    deaths = [whole, *whole.pieces()[-1:], *(Range(at, at + size) for at, size in odd)]
    plan = plan_trials(num_rows, deaths)
    rows = [row for one in plan.ranges for row in range(*one)]
    assert sorted([*rows, *plan.killers]) == list(range(num_rows))
    assert rows == sorted(rows)


def test_a_death_in_company_blames_nobody(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path))
    first = Trials(storage, is_noting=True)
    first.begin(3, Range(0, 1), first.history(3), is_alone=False)
    again = Trials(storage, is_noting=True).history(3)
    assert again == History(num_notes=1)
    assert plan_trials(1, again.deaths).ranges == (Range(0, 1),)


def test_a_worker_that_knows_why_it_ends_says_so(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path))
    trials = Trials(storage, is_noting=True)
    history = trials.begin(3, Range(0, 4), trials.history(3), is_alone=True)
    trials.end(3)
    trials.begin(3, Range(4, 8), history, is_alone=True)
    trials.explain("out of luck")
    again = Trials(storage, is_noting=True).history(3)
    assert again == History(num_notes=2, deaths=(Range(4, 8),), reason="out of luck")
    assert Trials(storage, is_noting=True).history(4) == History()


def test_where_no_worker_was_lost_nothing_is_written(tmp_path: Path) -> None:
    trials = Trials(LocalStorage(str(tmp_path)), is_noting=False)
    trials.begin(3, Range(0, 9), trials.history(3), is_alone=False)
    trials.end(3)
    trials.explain("nothing")
    assert list(tmp_path.rglob("*")) == []


def test_a_shard_whose_every_row_ends_workers_is_given_up(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path))
    for _ in range(MAX_DEATHS + 2):  # one in company, and the last that is too many
        assert live(Trials(storage, is_noting=True), 256, range(256)) is None
    with pytest.raises(WorkerLostError, match="shard 3"):
        live(Trials(storage, is_noting=True), 256, range(256))


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"start": 0, "stop": 1, "alone": true, "deaths": [3]}'])
def test_a_damaged_note_is_named(tmp_path: Path, text: str) -> None:
    storage = LocalStorage(str(tmp_path))
    storage.create("_attempts/shards/00003/0000.json", text.encode())
    with pytest.raises(OutputError, match=r"00003/0000\.json is damaged"):
        Trials(storage, is_noting=True).history(3)
