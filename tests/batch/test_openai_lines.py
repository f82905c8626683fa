"""Lines of OpenAI batch files: what is read from them, what parts and views are made of."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.batch.commit import JobOutput, Receipt
from pipeline.batch.diff import diff_outputs
from pipeline.batch.openai_lines import (
    ERRORS,
    PART_SCHEMA,
    RESULTS,
    LineIds,
    error_line,
    part_table,
    read_custom_id,
    read_request,
    result_line,
    write_views,
)
from pipeline.batch.overwrite import overwrite
from pipeline.batch.parts import PartCounts, count_part
from pipeline.batch.row_errors import row_errors
from pipeline.batch.rows import Row
from pipeline.batch.verify import verify
from pipeline.errors import ExpertError, InvalidRequestError, OutputError, UnknownRouteError
from pipeline.openai_api.http_errors import coded_error, http_error
from pipeline.storage.local import LocalStorage

BODY = {"model": "expert-sql", "messages": [{"role": "user", "content": "users?"}]}
LINE = {"custom_id": "request-1", "method": "POST", "url": "/v1/chat/completions", "body": BODY}
ANSWER = {
    "id": "chatcmpl-1",
    "choices": [],
    "usage": {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12},
}


def row(**changes: Any) -> Row:
    """A line; a change to `...` leaves a key out."""
    values = {name: value for name, value in {**LINE, **changes}.items() if value is not ...}
    return Row("in.jsonl@0", values, None)


def test_a_line_says_what_to_ask_and_how_to_call_the_answer() -> None:
    assert read_custom_id(row()) == "request-1"
    assert read_request(row()) == ("chat", BODY)
    assert read_request(row(url="/v1/completions")) == ("text", BODY)
    assert read_request(row(note="not of the format")) == ("chat", BODY)


@pytest.mark.parametrize(
    ("changes", "kind", "says"),
    [
        ({"custom_id": ...}, InvalidRequestError, "in.jsonl@0 has no custom_id"),
        ({"custom_id": None}, InvalidRequestError, "in.jsonl@0 has no custom_id"),
        ({"custom_id": 7}, InvalidRequestError, "custom_id of the line at in.jsonl@0 is not a text"),
        ({"custom_id": ""}, InvalidRequestError, "custom_id of the line at in.jsonl@0 is not a text, or empty"),
        ({"method": ...}, InvalidRequestError, "method is missing"),
        ({"method": "GET"}, InvalidRequestError, "method is 'GET'"),
        ({"method": ["POST"]}, InvalidRequestError, "method is not a text"),
        ({"url": ...}, UnknownRouteError, "url is missing"),
        ({"url": "/v1/embeddings"}, UnknownRouteError, "url is '/v1/embeddings'"),
        ({"url": "https://api.openai.com/v1/chat/completions"}, UnknownRouteError, "url is 'https://"),
        ({"url": {"a": 1}}, UnknownRouteError, "url is not a text"),
        ({"url": "x" * 10_000}, UnknownRouteError, "url is 'xxx"),
        ({"body": ...}, InvalidRequestError, "body is missing"),
        ({"body": None}, InvalidRequestError, "body is missing"),
        ({"body": json.dumps(BODY)}, InvalidRequestError, "body is missing, or is no object"),
    ],
)
def test_a_line_that_asks_nothing_says_why(changes: dict[str, Any], kind: type[ExpertError], says: str) -> None:
    with pytest.raises(kind) as caught:
        _ = read_custom_id(row(**changes)), read_request(row(**changes))
    assert says in caught.value.message
    assert len(caught.value.message) < 300


def test_a_line_is_always_called_the_same_and_no_other_is() -> None:
    ids = LineIds.of("f00", "in.jsonl@0")
    assert ids == LineIds.of("f00", "in.jsonl@0")
    assert (ids.line, ids.answer("chat"), ids.answer("text")) == (
        "batch_req_adc58be836fff8de82359d6e47df5bf0",
        "chatcmpl-adc58be836fff8de82359d6e47df5bf0",
        "cmpl-adc58be836fff8de82359d6e47df5bf0",
    )
    others = {LineIds.of(job, place).line for job in ("f00", "f01") for place in ("in.jsonl@0", "in.jsonl@1")}
    assert len(others) == 4


def answered(number: int) -> bytes:
    return result_line(LineIds.of("f00", str(number)), f"request-{number}", ANSWER)


def refused(number: int | None, code: str = "invalid_request") -> bytes:
    custom_id = None if number is None else f"request-{number}"
    return error_line(LineIds.of("f00", str(number)), custom_id, coded_error(code, "n is 0", "Give more."))


def test_result_and_error_lines_have_openais_shape() -> None:
    line = json.loads(answered(3))
    assert list(line) == ["id", "custom_id", "response", "error"]
    assert (line["custom_id"], line["error"]) == ("request-3", None)
    assert list(line["response"]) == ["status_code", "request_id", "body"]
    assert (line["response"]["status_code"], line["response"]["body"]) == (200, ANSWER)
    ids = LineIds.of("f00", "3")
    assert (line["id"], line["response"]["request_id"]) == (ids.line, ids.request)
    wrong = json.loads(error_line(ids, None, http_error(UnknownRouteError("no such url", hint="Give another."))))
    assert (wrong["custom_id"], wrong["error"], wrong["response"]["status_code"]) == (None, None, 404)
    assert wrong["response"]["body"] == {
        "error": {
            "message": "No such url. Give another.",
            "type": "not_found_error",
            "param": None,
            "code": "unknown_route",
        }
    }


def test_a_part_is_counted_and_read_as_a_table() -> None:
    part = answered(0) + refused(1) + answered(0) + refused(None, "prompt_too_long")
    assert count_part(part, "openai") == PartCounts(4, {"invalid_request": 1, "prompt_too_long": 1}, 14, 10)
    assert count_part(b"", "openai") == PartCounts(0, {}, 0, 0)
    table = part_table(part)
    assert table.schema == PART_SCHEMA
    assert table["custom_id"].to_pylist() == ["request-0", "request-1", "request-0", None]
    assert table["status_code"].to_pylist() == [200, 400, 200, 400]
    assert json.loads(table["body"][0].as_py()) == ANSWER
    assert part_table(b"").schema == PART_SCHEMA


@pytest.mark.parametrize("data", [b"x\n", b"{}\n", b"[]\n", b'{"response":{"status_code":200,"body":{}}}\n'])
def test_what_is_no_part_is_refused(data: bytes) -> None:
    with pytest.raises(OutputError, match="a part is damaged"):
        count_part(data, "openai")


@pytest.fixture
def output(tmp_path: Path) -> JobOutput:
    job = JobOutput(LocalStorage(str(tmp_path / "out")), {"seed": 0}, "openai", 4)
    job.begin()
    return job


PARTS = [answered(0) + answered(1), refused(2) + refused(None), answered(4) + refused(5) + answered(6), b""]


def test_a_finished_job_leaves_the_results_and_the_errors_in_order(output: JobOutput) -> None:
    receipts = [output.commit(shard, PARTS[shard]) for shard in (3, 1, 0, 2)]
    assert {receipt.path for receipt in receipts} == {f"part-{shard:05d}.jsonl" for shard in range(4)}
    assert not output.storage.exists(RESULTS)
    manifest = output.finish()
    assert (manifest["rows"], manifest["errors"], manifest["error_codes"]) == (7, 3, {"invalid_request": 3})
    assert output.storage.read(RESULTS) == answered(0) + answered(1) + answered(4) + answered(6)
    assert output.storage.read(ERRORS) == refused(2) + refused(None) + refused(5)
    assert output.is_complete()
    assert output.finish() == manifest


def test_views_come_before_success_and_are_those_of_the_parts(output: JobOutput, tmp_path: Path) -> None:
    """A driver that dies between the two views leaves one, perhaps of other parts; the next writes both."""
    for shard, part in enumerate(PARTS):
        output.commit(shard, part)
    output.finish()
    before = {name: output.storage.read(name) for name in output.storage.list()}
    for name in (ERRORS, "_SUCCESS", "_manifest.json"):
        (tmp_path / "out" / name).unlink()
    (tmp_path / "out" / RESULTS).write_bytes(answered(9))
    output.finish()
    assert {name: output.storage.read(name) for name in output.storage.list()} == before


def test_verify_counts_the_views_and_knows_them_in_such_an_output_alone(output: JobOutput, tmp_path: Path) -> None:
    for shard, part in enumerate(PARTS):
        output.commit(shard, part)
    output.finish()
    whole = verify(output.storage)
    assert whole.problems == ()
    assert (whole.rows, whole.errors) == (7, 3)
    (tmp_path / "out" / RESULTS).write_bytes(answered(0))
    (tmp_path / "out" / ERRORS).unlink()
    assert {(problem.where, problem.what.split()[0]) for problem in verify(output.storage).problems} == {
        (RESULTS, "has"),
        (ERRORS, "is"),
    }
    other = JobOutput(LocalStorage(str(tmp_path / "rows")), {}, "jsonl", 0)
    other.begin()
    other.finish()
    (tmp_path / "rows" / RESULTS).write_bytes(b"someone's own")
    assert [problem.where for problem in verify(other.storage).problems] == [RESULTS]
    with pytest.raises(OutputError, match="files that are not a job's"):
        overwrite(replace(other, fingerprint={"seed": 1}), lambda: None)


def test_overwriting_removes_the_views(output: JobOutput) -> None:
    output.commit(0, PARTS[0])
    write_views(output.storage, output.committed().values())
    assert overwrite(replace(output, fingerprint={"seed": 1}), lambda: None)
    assert list(output.storage.list()) == []


def test_errors_are_listed_under_their_custom_ids() -> None:
    found = row_errors(PARTS[1] + PARTS[2], "openai", 3, id_column=None)
    assert [(error.shard, error.row, error.id, error.code) for error in found] == [
        (3, 0, "request-2", "invalid_request"),
        (3, 1, None, "invalid_request"),
        (3, 3, "request-5", "invalid_request"),
    ]
    with pytest.raises(OutputError, match="a part is damaged"):
        row_errors(b"{}\n", "openai", 0, id_column=None)


def test_such_outputs_are_not_compared(output: JobOutput) -> None:
    for shard, part in enumerate(PARTS):
        output.commit(shard, part)
    output.finish()
    place = output.storage.url("")
    with pytest.raises(OutputError, match="answers OpenAI batch files"):
        diff_outputs(place, place)


def test_a_part_that_cannot_be_read_leaves_no_view(output: JobOutput, tmp_path: Path) -> None:
    for shard, part in enumerate(PARTS):
        output.commit(shard, part)
    (tmp_path / "out" / "part-00002.jsonl").write_bytes(b"x" * len(PARTS[2]))
    with pytest.raises(OutputError, match=r"part-00002\.jsonl is damaged"):
        output.finish()
    left = output.storage.list()
    assert RESULTS not in left
    assert "_SUCCESS" not in left
    assert [name for name in left if name.startswith("_attempts/") and not name.endswith(".probe")] == []


@given(st.lists(st.lists(st.booleans(), max_size=4), min_size=1, max_size=4))
@settings(max_examples=20)
def test_every_line_is_in_one_view_once(tmp_path_factory: pytest.TempPathFactory, shards: list[list[bool]]) -> None:
    storage = LocalStorage(str(tmp_path_factory.mktemp("views")))
    job = JobOutput(storage, {}, "openai", len(shards))
    job.begin()
    wanted: dict[bool, list[str]] = {True: [], False: []}
    for shard, answers in enumerate(shards):
        lines = [(number := shard * 10 + at, good) for at, good in enumerate(answers)]
        job.commit(shard, b"".join(answered(number) if good else refused(number) for number, good in lines))
        for number, good in lines:
            wanted[good].append(f"request-{number}")
    job.finish()
    assert {good: list(custom_ids(storage.read(name))) for good, name in ((True, RESULTS), (False, ERRORS))} == wanted


def custom_ids(view: bytes) -> Iterator[str]:
    for line in view.splitlines():
        yield json.loads(line)["custom_id"]


def test_receipts_of_openai_parts_are_made_from_the_parts(output: JobOutput, tmp_path: Path) -> None:
    receipt = output.commit(0, PARTS[2])
    (tmp_path / "out" / "_commits" / "00000.json").unlink()
    assert output.committed() == {0: receipt}
    assert receipt == Receipt(0, 3, {"invalid_request": 1}, 14, 10, len(PARTS[2]), "part-00000.jsonl", receipt.sha256)
