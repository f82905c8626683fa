"""A worker that ends while it loads is started again a few times, and then the job is told."""

from pathlib import Path

import pytest

from pipeline.batch.loads import MAX_LOADS, LoadNotes
from pipeline.errors import WorkerLostError
from pipeline.storage.local import LocalStorage


def test_a_worker_that_dies_at_each_load_gives_up(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path))
    LoadNotes(storage, None).begin()
    assert storage.list() == {}, "a first load leaves no note"
    for _ in range(MAX_LOADS - 1):
        LoadNotes(storage, "a").begin()  # and dies
    with pytest.raises(WorkerLostError, match=f"ended {MAX_LOADS} times while it loaded"):
        LoadNotes(storage, "a").begin()
    LoadNotes(storage, "b").begin()


def test_a_load_that_succeeds_is_a_new_beginning(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path))
    for _ in range(3 * MAX_LOADS):
        notes = LoadNotes(storage, "a")
        notes.begin()
        notes.end()
    assert storage.list() == {}
