"""Recounting an output: a whole one is whole, and anything that is changed in it is found and named."""

import json
from pathlib import Path

import pytest

from pipeline.batch.commit import JobOutput
from pipeline.batch.layout import row_errors_name
from pipeline.batch.row_errors import RowError
from pipeline.batch.verify import verify
from pipeline.errors import OutputError
from pipeline.storage.local import LocalStorage
from tests.batch.outputs import FINGERPRINT, make_output, part


@pytest.fixture(params=["jsonl", "parquet"])
def output(request, tmp_path):
    return make_output(LocalStorage(str(tmp_path / "out")), request.param)


def path_of(output: JobOutput, name: str) -> Path:
    return Path(output.storage.url(name))


def problems(output: JobOutput) -> list[str]:
    found = verify(output.storage)
    assert found.ok is False
    return [str(problem) for problem in found.problems]


def test_a_whole_output_is_whole(output):
    before = output.storage.list()
    found = verify(output.storage)
    assert found.problems == ()
    assert (found.parts, found.rows, found.errors, found.duplicate_ids) == (3, 12, 3, 0)
    assert found.error_codes == {"prompt_too_long": 3}
    assert (found.prompt_tokens, found.completion_tokens) == (27, 36)
    assert found.bytes == sum(size for name, size in before.items() if name.startswith("part-"))
    assert output.storage.list() == before, "nothing is written"
    assert "verified yes" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["ok"] is True


def test_the_errors_are_listed_row_by_row(output):
    lines = path_of(output, "_errors.jsonl").read_bytes().splitlines()
    assert [RowError.from_json(line) for line in lines] == [
        RowError(shard, row, f"key {shard}/{row}", "prompt_too_long", "the prompt has 9 tokens")
        for shard, row in ((1, 1), (1, 2), (2, 3))
    ]


@pytest.mark.parametrize("name", ["part", "_commits/00001.json", "_manifest.json", "_SUCCESS", "_errors.jsonl", "list"])
@pytest.mark.parametrize("how", ["gone", "cut", "changed"])
def test_whatever_is_gone_or_changed_is_named(output, name, how):
    if name == "part":
        name = f"part-00001.{output.kind}"
    elif name == "list":
        name = row_errors_name(1, output.committed()[1].sha256)
    path = path_of(output, name)
    data = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(data[:-2])
    else:
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    if how == "cut" and name in ("_manifest.json", "_SUCCESS"):
        name = "_SUCCESS"  # either the one or the other: they do not go together
    assert any(name in problem or "shards are not there" in problem for problem in problems(output))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("rows", 5), ("error_codes", {}), ("prompt_tokens", 1), ("completion_tokens", 1), ("bytes", 1)),
        *(("shard", 2), ("path", "part-00002.jsonl"), ("sha256", "00")),
    ],
)
def test_each_field_of_a_receipt_is_checked(output, field, value):
    path = path_of(output, "_commits/00001.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    assert [line for line in problems(output) if line.startswith(f"_commits/00001.json  says {field} ")]


@pytest.mark.parametrize(
    "field", ["rows", "errors", "prompt_tokens", "completion_tokens", "bytes", "error_codes", "parts", "fingerprint"]
)
def test_each_field_of_the_manifest_is_checked(output, field):
    path = path_of(output, "_manifest.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), field: 7}))
    found = problems(output)
    assert any(line.startswith("_manifest.json") and (field in line or field == "parts") for line in found)
    assert "_SUCCESS  was not written for this _manifest.json" in found


def test_strange_files_are_named(output):
    other = "parquet" if output.kind == "jsonl" else "jsonl"
    for name in ("notes.txt", f"part-00000.{other}", f"part-00007.{output.kind}", "_commits/00009.json", "deep/a/b"):
        output.storage.create(name, b"x")
        assert any(line.startswith(f"{name}  ") for line in problems(output)), name
        path_of(output, name).unlink()
    for name in ("_lease/000001.json", "_attempts/left", "_input/rows.jsonl", "_report/report.html"):
        output.storage.create(name, b"x")
    assert verify(output.storage).ok


def test_a_part_of_another_job_is_named(tmp_path):
    """As a zombie of an overwritten job could leave it: it counts well, and has a receipt."""
    output = JobOutput(LocalStorage(str(tmp_path)), FINGERPRINT, "parquet", 2)
    output.begin()
    output.commit(0, part(0, "parquet"))
    output.commit(1, part(1, "parquet", fingerprint={**FINGERPRINT, "seed": 9}))
    output.finish()
    found = problems(output)
    assert len(found) == 1
    assert found[0].startswith("part-00001.parquet  was written by a job with the fingerprint ")


def test_repeated_ids_are_told_and_no_problem(tmp_path):
    for kind in ("jsonl", "parquet"):
        output = JobOutput(LocalStorage(str(tmp_path / kind)), FINGERPRINT, kind, 2)
        output.begin()
        for shard in range(2):
            output.commit(shard, part(7, kind))
        output.finish()
        found = verify(output.storage)
        assert found.ok
        assert found.duplicate_ids == 4
        assert "4 repeated" in str(found)


def test_an_unfinished_output_is_a_problem(tmp_path):
    output = JobOutput(LocalStorage(str(tmp_path)), FINGERPRINT, "jsonl", 3)
    output.begin()
    output.commit(1, part(1, "jsonl"))
    found = problems(output)
    assert "2 of 3 shards are not there: 0, 2; run the job again" in found[0]
    assert [line.split()[0] for line in found[1:]] == ["_manifest.json", "_SUCCESS", "_errors.jsonl"]


def test_what_is_no_output_is_refused(tmp_path):
    with pytest.raises(OutputError, match="is not the output of a job"):
        verify(LocalStorage(str(tmp_path)))
    (tmp_path / "_job.json").write_text("[]")
    with pytest.raises(OutputError, match=r"_job\.json is damaged"):
        verify(LocalStorage(str(tmp_path)))
    (tmp_path / "_job.json").write_text('{"num_shards": "3"}')
    with pytest.raises(OutputError, match=r"_job\.json is damaged"):
        verify(LocalStorage(str(tmp_path)))
