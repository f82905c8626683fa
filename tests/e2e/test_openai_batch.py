"""OpenAI batch files on a real Ray: as they are in, results and errors out, each line once and in order."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from pipeline import BatchResult, demo, run_batch
from pipeline.batch import run_config
from pipeline.batch.config import BatchConfig
from pipeline.batch.config_file import load_config
from pipeline.batch.evaluate import evaluate_job
from pipeline.batch.layout import kind_of
from pipeline.demo.questions import draw_questions, write_questions
from pipeline.demo.scoring import exact_match
from pipeline.errors import ConfigError, DatasetError, FingerprintError

pytestmark = pytest.mark.usefixtures("cluster")
PROJECT = Path(__file__).parents[2]
ROWS = 40
# As vLLM's documentation of `vllm run-batch` shows it.
VLLM_EXAMPLE = """\
{"custom_id": "request-1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "meta-llama/Meta-Llama-3-8B-Instruct", "messages": [{"role": "system", "content": "You are a helpful assistant."},{"role": "user", "content": "Hello world!"}],"max_completion_tokens": 1000}}
{"custom_id": "request-2", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "meta-llama/Meta-Llama-3-8B-Instruct", "messages": [{"role": "system", "content": "You are an unhelpful assistant."},{"role": "user", "content": "Hello world!"}],"max_completion_tokens": 1000}}
"""  # noqa: E501


SCHEMA = "CREATE TABLE users (id INT, name TEXT, city TEXT);"
DRAWN = {"temperature": 8.0, "use_grammar": False, "max_tokens": 16}


def line(custom_id: str | None, *, url: str = "/v1/completions", **fields: Any) -> str:
    body = {"model": "expert-sql@0.1.0", "prompt": "List the name of all users.", "schema": SCHEMA, **fields}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


OTHERS = [
    line("greedy"),
    line("drawn", **DRAWN),
    line("drawn", **DRAWN),  # a custom_id that is given twice is answered twice
    line("three", **DRAWN, n=3, seed=7, logprobs=2),
]
# Lines that cannot be answered, with the status and code of their errors.
BAD: list[tuple[str, int, str]] = [
    ("not JSON", 400, "invalid_row"),
    (line(None), 400, "invalid_request"),
    (line("unknown model", model="gpt-4o-mini"), 404, "model_not_found"),
    (line("embedding", url="/v1/embeddings"), 404, "unknown_route"),
    (line("stream", stream=True), 400, "invalid_request"),
]


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A batch file of questions, with other and broken lines among them."""
    path = write_questions(tmp_path_factory.mktemp("requests") / "requests.jsonl", ROWS, file_format="openai")
    lines = path.read_text().splitlines()
    for place, other in zip((0, 5, 11, 12, 37), [bad for bad, _, _ in BAD], strict=True):
        lines.insert(place, other)
    for place, other in zip((3, 20, 30, 44), OTHERS, strict=True):
        lines.insert(place, other)
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def answered(requests: Path, tmp_path_factory: pytest.TempPathFactory) -> BatchResult:
    """The job of the shipped configuration, on this file."""
    return run_config(load_config(PROJECT / "configs" / "openai-batch.yaml", overrides(requests, tmp_path_factory)))


def overrides(requests: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    output = tmp_path_factory.mktemp("answers") / "out"
    return [
        f"dataset={requests}",
        f"output={output}",
        f"expert={demo.package('sql')}",
        f"base_model={demo.BASE_MODEL}",
        "shard_rows=12",
        "progress_seconds=1000",
    ]


def lines_of(path: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def custom_ids(requests: Path) -> Iterator[str | None]:
    for line in requests.read_text().splitlines():
        try:
            yield json.loads(line).get("custom_id")
        except ValueError:
            yield None


def test_every_line_is_in_one_of_the_two_files_in_order(answered: BatchResult, requests: Path) -> None:
    asked = list(custom_ids(requests))
    written = [line for part in answered.parts for line in lines_of(part)]
    assert [line["custom_id"] for line in written] == asked
    results, errors = (lines_of(Path(answered.output) / name) for name in ("results.jsonl", "errors.jsonl"))
    assert results == [line for line in written if line["response"]["status_code"] == 200]
    assert errors == [line for line in written if line["response"]["status_code"] != 200]
    assert len({line["id"] for line in written}) == len(asked) == ROWS + len(BAD) + len(OTHERS)
    assert len(answered.parts) > 3
    report = answered.report
    assert (report.rows, report.errors) == (len(asked), len(BAD))
    assert report.completion_tokens == sum(line["response"]["body"]["usage"]["completion_tokens"] for line in results)


def test_openais_own_types_read_the_answers(answered: BatchResult) -> None:
    results = lines_of(Path(answered.output) / "results.jsonl")
    chats = {
        line["custom_id"]: ChatCompletion.model_validate(line["response"]["body"], strict=True)
        for line in results
        if line["response"]["body"]["object"] == "chat.completion"
    }
    expected = {question.id: question.expected for question in draw_questions("sql", ROWS)}
    assert chats.keys() == expected.keys()
    right = [exact_match(chat.choices[0].message.content or "", expected[name]) for name, chat in chats.items()]
    assert sum(right) >= 0.95 * ROWS
    others = [
        (line["custom_id"], Completion.model_validate(line["response"]["body"], strict=True))
        for line in results
        if line["response"]["body"]["object"] == "text_completion"
    ]
    assert [name for name, _ in others] == ["greedy", "drawn", "drawn", "three"]
    greedy, drawn, again, three = (completion for _, completion in others)
    assert greedy.choices[0].text == "SELECT name FROM users"
    assert greedy.model == "expert-sql@0.1.0"
    assert drawn.choices == again.choices
    assert drawn.id != again.id
    assert len({choice.text for choice in three.choices}) == 3
    assert three.choices[0].logprobs is not None
    assert three.usage is not None
    assert three.usage.completion_tokens > three.usage.prompt_tokens / 10


def test_errors_have_the_statuses_of_the_service(answered: BatchResult) -> None:
    errors = lines_of(Path(answered.output) / "errors.jsonl")
    told = [(line["response"]["status_code"], line["response"]["body"]["error"]["code"]) for line in errors]
    assert told == [(status, code) for _, status, code in BAD]
    assert {line["error"] for line in errors} == {None}
    assert answered.report.errors_by_code == {
        "invalid_request": 2,
        "invalid_row": 1,
        "model_not_found": 1,
        "unknown_route": 1,
    }


def test_the_answers_are_a_table_too(answered: BatchResult, requests: Path) -> None:
    frame = answered.to_pandas()
    assert list(frame.columns) == ["id", "custom_id", "status_code", "body"]
    rows = answered.dataset.take_all()
    assert [row["custom_id"] for row in rows] == list(custom_ids(requests))
    assert [row["id"] for row in rows] == frame["id"].tolist()


def test_a_resumed_job_leaves_the_bytes_of_an_undisturbed_one(
    answered: BatchResult, requests: Path, tmp_path: Path
) -> None:
    """A driver that died before the end: two parts, a receipt and everything after them are not there yet.

    The part with logprobs is: the last digits of scores depend on what else is in the batch.
    """
    folder = tmp_path / "out"
    shutil.copytree(answered.output, folder)
    lost = ("part-00001.jsonl", "_commits/00001.json", "part-00002.jsonl", "_commits/00002.json", "_commits/00000.json")
    for name in (*lost, "results.jsonl", "errors.jsonl", "_manifest.json", "_SUCCESS"):
        (folder / name).unlink()
    options: dict[str, Any] = {"base_model": demo.BASE_MODEL, "shard_rows": 12, "format": "openai", "progress": False}
    with pytest.raises(FingerprintError) as caught:
        run_batch(requests, demo.package("sql"), output=folder, openai_models="any", **options)
    assert caught.value.details == ('openai_models: there "named", now "any"',)
    again = run_batch(requests, demo.package("sql"), output=folder, output_format="openai", **options)
    assert 0 < again.report.rows_this_run < again.report.rows
    there = Path(answered.output)
    names = answer_files(there)
    assert names == answer_files(folder)
    for name in names:
        assert (folder / name).read_bytes() == (there / name).read_bytes(), name


def answer_files(folder: Path) -> list[str]:
    """All files of an output but those that say who wrote it, and when."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return [name for name in names if kind_of(name) not in ("lease", "report")]


def test_the_output_is_verified(answered: BatchResult) -> None:
    found = answered.verify()
    assert found.problems == ()
    assert (found.rows, found.errors) == (answered.report.rows, len(BAD))
    assert [(error.id, error.code) for error in answered.errors] == [
        (None if code == "invalid_row" else json.loads(text)["custom_id"], code) for text, _, code in BAD
    ]


def test_a_line_chooses_among_several_experts(tmp_path: Path) -> None:
    """The expert of the job by its package's name, one of `experts` by the name that it has there."""
    path = tmp_path / "requests.jsonl"
    models = ("expert-sql", "graph", "expert-cypher", "expert-sql@0.1.0")
    path.write_text("".join(line(f"{place}", model=model) + "\n" for place, model in enumerate(models)))
    options: dict[str, Any] = {"base_model": demo.BASE_MODEL, "format": "openai", "progress": False}
    experts = {"graph": demo.package("cypher")}
    result = run_batch(path, demo.package("sql"), experts=experts, output=tmp_path / "out", **options)
    assert result.report.errors_by_code == {"model_not_found": 1}
    bodies = [line["response"]["body"] for line in lines_of(tmp_path / "out" / "results.jsonl")]
    assert [body["model"] for body in bodies] == ["expert-sql", "graph", "expert-sql@0.1.0"]
    texts = [body["choices"][0]["text"] for body in bodies]
    assert texts[0] == texts[2] == "SELECT name FROM users"
    assert texts[1].startswith("MATCH")
    assert len({body["system_fingerprint"] for body in bodies}) == 2


def test_a_job_of_batch_files_is_not_judged(requests: Path, tmp_path: Path) -> None:
    config = BatchConfig.from_options(
        dataset=requests, expert=demo.package("sql"), output=tmp_path / "out", format="openai"
    )
    with pytest.raises(ConfigError, match="no column of right answers"):
        evaluate_job(config)
    assert not (tmp_path / "out").exists()


def test_a_file_for_vllm_runs_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "openai_example_batch.jsonl"
    path.write_text(VLLM_EXAMPLE)
    options: dict[str, Any] = {"base_model": demo.BASE_MODEL, "output": tmp_path / "out", "progress": False}
    with pytest.raises(DatasetError, match="neither a column") as caught:
        run_batch(path, demo.package("sql"), **options)
    assert "format: openai" in caught.value.hint
    result = run_batch(path, demo.package("sql"), format="openai", openai_models="any", **options)
    assert result.report.errors == 0
    lines = lines_of(tmp_path / "out" / "results.jsonl")
    assert [line["custom_id"] for line in lines] == ["request-1", "request-2"]
    for line in lines:
        answer = ChatCompletion.model_validate(line["response"]["body"], strict=True)
        assert answer.model == "meta-llama/Meta-Llama-3-8B-Instruct"
        assert answer.choices[0].message.role == "assistant"
    assert (tmp_path / "out" / "errors.jsonl").read_bytes() == b""
