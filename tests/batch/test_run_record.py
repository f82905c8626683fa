"""What a run did, written down when it ends, however it ends."""

import json
import logging
from pathlib import Path

import pytest

from pipeline.batch.histogram import Histogram
from pipeline.batch.progress import Phases
from pipeline.batch.receipts import Receipt
from pipeline.batch.run_record import MAX_CODES, RUNS, RunRecorder, read_records
from pipeline.batch.shard_stats import SAMPLES_PER_CODE, ErrorSample, ShardStats
from pipeline.errors import JobFailedError
from pipeline.storage.local import LocalStorage


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def receipt(shard: int, rows: int = 10, tokens: int = 70, **codes: int) -> Receipt:
    return Receipt(shard, rows, codes, 100, tokens, 1, f"part-{shard:05d}.jsonl", "0" * 64)


def lengths(*values: int) -> Histogram:
    made = Histogram()
    for value in values:
        made.add(value)
    return made


def stats(seconds: float, worker: str = "a:1", **samples: list[ErrorSample]) -> ShardStats:
    return ShardStats(seconds, worker, lengths(10, 20), lengths(7), {"stop": 9, "error": 1}, samples)


def test_a_run_is_written_down(tmp_path: Path) -> None:
    storage, clock = LocalStorage(str(tmp_path)), Clock()
    phases = Phases(clock=clock)
    recorder = RunRecorder(phases, price_per_hour=3.6)
    recorder.plan_workers(2)
    with recorder.recording(storage), phases.phase("run"):
        clock.now += 2.0
        recorder.add(receipt(0, invalid_row=1), stats(1.5, invalid_row=[ErrorSample("f@3", "not JSON")]))
        clock.now += 1.0
        recorder.add(receipt(4), stats(1.0, worker="b:2"))
    (record,) = read_records(storage)
    assert (
        json.loads((tmp_path / RUNS / f"{record.run_id}.json").read_text())["outcome"] == record.outcome == "complete"
    )
    assert (record.shards, record.rows, record.prompt_tokens, record.completion_tokens) == (2, 20, 200, 140)
    assert (record.workers, record.workers_seen, record.price_per_hour) == (2, 2, 3.6)
    assert record.seconds == {"plan": 0.0, "start": 0.0, "run": 3.0, "commit": 0.0, "total": 3.0}
    assert (record.error_codes, record.finish_reasons) == ({"invalid_row": 1}, {"stop": 18, "error": 2})
    assert [(item.row, item.message) for item in record.error_samples["invalid_row"]] == [("f@3", "not JSON")]
    assert record.shard_seconds == 2.5
    assert record.shard_milliseconds == lengths(1500, 1000).to_dict()
    assert record.prompt_lengths == lengths(10, 20, 10, 20).to_dict()
    assert sum(record.timeline.rows) == pytest.approx(20, abs=0.01)
    # the first shard lasted from 0.5 to 2, the second from 2 to 3
    assert record.timeline.rows[:3] == [0.0, 0.0, pytest.approx(10 / 6, abs=0.001)]
    assert record.timeline.rows[8] == 2.5


@pytest.mark.parametrize(
    ("ending", "outcome", "error"),
    [
        (JobFailedError("a worker could not load", hint="..."), "failed", "a worker could not load"),
        (ValueError("mine"), "failed", "ValueError"),
        (KeyboardInterrupt(), "interrupted", "KeyboardInterrupt"),
    ],
)
def test_a_run_that_fails_is_written_down_and_still_fails(
    tmp_path: Path, ending: BaseException, outcome: str, error: str
) -> None:
    storage = LocalStorage(str(tmp_path))
    recorder = RunRecorder(Phases())

    def fail() -> None:
        with recorder.recording(storage):
            recorder.add(receipt(0), stats(1.0))
            raise ending

    with pytest.raises(type(ending)):
        fail()
    (record,) = read_records(storage)
    assert (record.outcome, record.error, record.rows) == (outcome, error, 10)


def test_a_record_that_cannot_be_written_hides_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / RUNS).write_text("a file where the folder should be")
    recorder = RunRecorder(Phases())

    def fail() -> None:
        with recorder.recording(LocalStorage(str(tmp_path))):
            raise KeyError("the reason")

    with caplog.at_level(logging.WARNING), pytest.raises(KeyError, match="the reason"):
        fail()
    assert "cannot be written down" in caplog.text


def test_records_come_in_order_and_damaged_ones_are_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage = LocalStorage(str(tmp_path))
    texts = []
    for day in (3, 1, 2):
        record = RunRecorder(Phases()).record("complete").model_copy(update={"started_at": f"2026-01-0{day}T00:00:00"})
        texts.append(record.model_dump_json())
        storage.create(f"{RUNS}/{record.run_id}.json", texts[-1].encode())
    damaged = [
        b"",
        b"[]",
        texts[0][:-20].encode(),
        texts[0].replace('"rows":0', '"rows":-1', 1).encode(),
        texts[0].replace('"shard_milliseconds":{', '"shard_milliseconds":{"x":1},"y":{', 1).encode(),
    ]
    for number, data in enumerate(damaged):
        assert data.decode() not in texts
        storage.create(f"{RUNS}/damaged-{number}.json", data)
    with caplog.at_level(logging.WARNING):
        assert [record.started_at[:10] for record in read_records(storage)] == [
            "2026-01-01",
            "2026-01-02",
            "2026-01-03",
        ]
    assert caplog.text.count("damaged and passed over") == len(damaged)


def test_no_records_at_all(tmp_path: Path) -> None:
    assert read_records(LocalStorage(str(tmp_path))) == []


def test_its_size_does_not_grow_with_the_shards() -> None:
    def size(num_shards: int) -> int:
        clock = Clock()
        recorder = RunRecorder(Phases(clock=clock))
        for shard in range(num_shards):
            clock.now += 0.7
            sample = [ErrorSample(f"f@{shard}", "x" * 100)] * 3
            samples = {f"code_{number}": sample for number in range(MAX_CODES + 20)}
            recorder.add(receipt(shard), stats(1.0 + shard % 7, worker=f"w:{shard % 5}", **samples))
        record = recorder.record("complete")
        assert len(record.error_samples) == MAX_CODES
        assert all(len(found) == SAMPLES_PER_CODE for found in record.error_samples.values())
        assert record.workers_seen == min(num_shards, 5)
        return len(record.model_dump_json())

    assert size(3000) < size(300) * 1.1
