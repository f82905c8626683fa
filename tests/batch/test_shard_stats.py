"""What a worker tells of a shard beside its receipt."""

import pyarrow as pa

from pipeline.batch.histogram import Histogram
from pipeline.batch.parts import AnsweredRow, PartFormat
from pipeline.batch.rows import Row
from pipeline.batch.shard_stats import MAX_SAMPLE_CHARACTERS, SAMPLES_PER_CODE, ShardStats, shard_stats
from pipeline.engine.types import Completion, Failure

FORM = PartFormat("jsonl", pa.schema([]), is_loose=True)


def answered(number: int) -> AnsweredRow:
    row = Row(f"q.jsonl@{number}", {"prompt": "p"}, None)
    return AnsweredRow(row, Completion(row.identity, "a", "stop" if number % 3 else "length", 10 + number, number))


def test_it_counts_what_is_in_the_part() -> None:
    unread = AnsweredRow(Row("q.jsonl@900", {}, Failure("invalid_row", "not JSON")), None)
    misfit = AnsweredRow(Row("q.jsonl@901", {"text": 1}, None), Completion("x", "a", "stop", 5, 6))
    refused = AnsweredRow(
        Row("q.jsonl@902", {"prompt": ""}, None),
        Completion("y", "", "error", 0, 0, Failure("invalid_request", "the prompt is empty")),
    )
    stats = shard_stats([*map(answered, range(30)), unread, misfit, refused], FORM, 1.5)
    assert stats.seconds == 1.5
    assert stats.finish_reasons == {"length": 10, "stop": 20, "error": 3}
    lengths = Histogram()
    for number in range(30):
        lengths.add(number)
    assert stats.completion_tokens.to_dict() == lengths.to_dict(), "rows with an error have no length"
    assert (stats.prompt_tokens.low, stats.prompt_tokens.high) == (10, 39)
    samples = {code: [(item.row, item.message) for item in found] for code, found in stats.error_samples.items()}
    assert samples["invalid_row"] == [("q.jsonl@900", "not JSON")]
    assert samples["invalid_request"] == [("q.jsonl@902", "the prompt is empty")]
    assert [row for row, _ in samples["schema_drift"]] == ["q.jsonl@901"]


def test_it_stays_small_whatever_the_rows() -> None:
    bad = [
        AnsweredRow(Row(f"f@{row}", {}, Failure("invalid_row", "x" * 10_000 + "\ud800")), None) for row in range(500)
    ]
    few = shard_stats([*bad[:SAMPLES_PER_CODE], *map(answered, range(50))], FORM, 1.0).to_json()
    many = shard_stats([*bad, *[answered(number % 50) for number in range(10_000)]], FORM, 1.0).to_json()
    assert len(many) < len(few) + 600
    assert len(few) < 5 * MAX_SAMPLE_CHARACTERS * SAMPLES_PER_CODE


def test_it_survives_the_way_to_the_driver() -> None:
    bad = AnsweredRow(Row("f@1", {}, Failure("invalid_row", "a\ud800b")), None)
    stats = shard_stats([bad, answered(3)], FORM, 0.25)
    again = ShardStats.from_json(stats.to_json())
    assert again.to_json() == stats.to_json()
    assert again.error_samples == stats.error_samples
    assert again.error_samples["invalid_row"][0].message == "a?b"
    assert again.worker == stats.worker != ""
