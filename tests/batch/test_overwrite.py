"""An output taken from another job: only one of ours, under the lease, and whatever dies on the way."""

from dataclasses import replace

import pytest

from pipeline.batch.overwrite import overwrite
from pipeline.batch.verify import verify
from pipeline.errors import FingerprintError, OutputError
from pipeline.storage.local import LocalStorage
from tests.batch.outputs import FINGERPRINT, contents, copy_of, make_output, part
from tests.batch.test_commit_machine import CrashError, MortalStorage

OTHER = {**FINGERPRINT, "seed": 9}


def nothing() -> None:
    """The lease is held."""


@pytest.fixture
def output(tmp_path):
    return make_output(LocalStorage(str(tmp_path / "out")), "jsonl")


def run(output) -> None:
    overwrite(output, nothing)
    output.begin()
    for shard in range(3):
        output.commit(shard, part(shard, "jsonl", fingerprint=OTHER))
    output.finish()


def test_another_job_takes_the_folder(output, tmp_path):
    output.storage.create("_input/rows-old.jsonl", b"old")
    output.storage.create("_input/rows-new.jsonl", b"new")
    output.storage.create("_report/report.html", b"old")
    other = replace(output, fingerprint=OTHER)
    with pytest.raises(FingerprintError, match="or replace it: --overwrite"):
        other.begin()
    assert overwrite(other, nothing, keep=[output.storage.url("_input/rows-new.jsonl")])
    assert set(output.storage.list()) == {"_input/rows-new.jsonl"}
    run(other)
    assert verify(output.storage).ok
    with pytest.raises(FingerprintError):
        output.begin()


def test_ones_own_output_and_an_empty_folder_are_left_alone(output, tmp_path):
    before = contents(output.storage)
    assert not overwrite(output, nothing)
    assert contents(output.storage) == before
    assert not overwrite(replace(output, storage=LocalStorage(str(tmp_path / "none"))), nothing)


def test_what_is_not_a_jobs_is_never_removed(output, tmp_path):
    other = replace(output, fingerprint=OTHER)
    output.storage.create("deep/notes.txt", b"mine")
    before = contents(output.storage)
    with pytest.raises(OutputError, match="nothing is removed") as caught:
        overwrite(other, nothing)
    assert caught.value.details == ("deep/notes.txt",)
    assert contents(output.storage) == before
    foreign = LocalStorage(str(tmp_path / "photos"))
    foreign.create("part-00000.jsonl", b"mine, too")
    with pytest.raises(OutputError, match="it is not the output of a job"):
        overwrite(replace(other, storage=foreign), nothing)
    assert foreign.list() == {"part-00000.jsonl": 9}


def test_without_the_lease_nothing_is_removed(output):
    before = contents(output.storage)

    def lost() -> None:
        raise OutputError("lost", hint="stop")

    with pytest.raises(OutputError, match="lost"):
        overwrite(replace(output, fingerprint=OTHER), lost)
    assert contents(output.storage) == before


def test_it_dies_after_each_operation_and_goes_on(output, tmp_path):
    template, operation, died = output, 0, True
    while died:
        operation += 1
        output = copy_of(template, tmp_path / str(operation))
        other = replace(output, fingerprint=OTHER)
        try:
            overwrite(replace(other, storage=MortalStorage(output.storage, operation, "after")), nothing)
        except CrashError:
            died = True
        else:
            died = False
        if output.storage.exists("_SUCCESS"):
            assert verify(output.storage).ok, "complete, and so whole"
        elif died and output.storage.exists("_job.json"):
            with pytest.raises(FingerprintError):
                other.begin()
        run(other)
        assert verify(output.storage).problems == ()
        assert not output.storage.list("_errors")
    assert operation > 8, "it died at every step"


def test_a_worker_of_the_other_job_that_comes_late_is_refused(output):
    other = replace(output, fingerprint=OTHER)
    overwrite(other, nothing)
    other.begin()
    with pytest.raises(FingerprintError, match="belongs to another job"):
        output.commit(0, part(0, "jsonl"))
    assert other.committed() == {}


def test_what_the_other_job_commits_at_the_last_moment_is_removed_too(output):
    """It looked at `_job.json` before that was removed, and wrote its part after the others were."""

    class Late:
        def remove(self, names):
            output.storage.remove(names)
            if "_job.json" in names:
                output.storage.create("part-00001.jsonl", part(1, "jsonl"))

        def __getattr__(self, name):
            return getattr(output.storage, name)

    assert overwrite(replace(output, fingerprint=OTHER, storage=Late()), nothing)
    assert output.storage.list() == {}
