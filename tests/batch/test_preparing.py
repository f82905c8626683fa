"""Rows prepared beside the worker, and by it: the same parts, byte for byte, whatever the rows are."""

import json
import multiprocessing
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import demo
from pipeline.batch.answering import Builder, EngineJob, LoadedEngine, Loader, Preparer, load_engine, load_preparers
from pipeline.batch.blocks import run_blocks
from pipeline.batch.config import BatchConfig
from pipeline.batch.drive import drive
from pipeline.batch.echo import ECHO
from pipeline.batch.execute import engine_job, prepare_job
from pipeline.batch.in_process import execute_here
from pipeline.batch.lease import hold
from pipeline.batch.plan import PreparedJob, open_experts, prepare
from pipeline.batch.progress import Phases, Progress
from pipeline.batch.run_record import RunRecorder
from pipeline.batch.watchdog import EXIT_STALLED
from pipeline.engine.requests import PreparedPrompt
from pipeline.engine.types import Request
from pipeline.errors import ExpertError, IntegrityError
from pipeline.package import Routing
from tests.batch.deaths import load_failing

SCHEMA = "CREATE TABLE users (id INT, name TEXT, city TEXT);"
QUESTION = "How many users are there per city?"
PEOPLE = '{"city": "string", "age": "integer"}'


class Refusing:
    """A builder in a worker that may not prepare."""

    def __init__(self, builder: Builder) -> None:
        self._builder = builder
        self.tokenizer = builder.tokenizer

    def prepare(self, **_: Any) -> PreparedPrompt:
        raise AssertionError("the worker prepares")

    def request(self, request_id: str, prepared: PreparedPrompt) -> Request:
        return self._builder.request(request_id, prepared)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadedEngine]:
    """The demo's three experts side by side, as every worker here has them."""
    folder = tmp_path_factory.mktemp("loaded")
    pq.write_table(pa.table({"prompt": ["a"], "expert": ["sql"]}), folder / "in.parquet")
    options = {
        "dataset": folder / "in.parquet",
        "output": folder / "out",
        "output_prefix": "our_",
        "sampling": SAMPLING,
        **experts(),
    }
    config = BatchConfig.from_options(base_model=demo.BASE_MODEL, dtype="float32", device="cpu", **options)
    engine = load_engine(engine_job(prepare(config, open_experts(config)), num_threads=1))
    yield engine
    engine.engine.close()


def experts() -> dict[str, Any]:
    return {"experts": {task: demo.package(task) for task in demo.TASKS}}


def run(folder: Path, name: str, load: Loader, **options: Any) -> Path:
    """Drive a job with a worker in this process; its output."""
    config = BatchConfig.from_options(base_model=demo.BASE_MODEL, output=folder / name, shard_rows=6, **options)
    job, phases = with_routings(prepare(config, open_experts(config))), Phases()
    recorder = RunRecorder(phases)
    with hold(job.output.storage, seconds=60) as lease, recorder.recording(job.output.storage):
        drive(job, lease, Progress(enabled=False), phases, recorder, execute=partial(execute_here, load=load))
    return folder / name


def with_routings(job: PreparedJob) -> PreparedJob:
    """The job, of whose experts each is for prompts that say its name in capitals."""
    routings = {expert.name: Routing(keywords=(expert.name.upper(),)) for expert in job.experts if expert.name}
    experts = tuple(replace(expert, routing=routings.get(expert.name, Routing())) for expert in job.experts)
    openai = None if job.openai is None else replace(job.openai, routings=routings)
    return replace(job, experts=experts, openai=openai)


def files(output: Path) -> dict[str, bytes]:
    """The answers, and what says that they are whole."""
    return {path.name: path.read_bytes() for path in sorted(output.iterdir()) if path.is_file()}


def both_ways(folder: Path, loaded: LoadedEngine, **options: Any) -> dict[str, bytes]:
    """What a job writes, of which it is seen that it is the same both ways."""
    refusing = LoadedEngine(loaded.engine, {name: Refusing(one) for name, one in loaded.builders.items()})
    worker = files(run(folder, "worker", Loader(lambda _: loaded, _nobody), prepare="worker", **options))
    tasks = files(run(folder, "tasks", Loader(lambda _: refusing, load_preparers), prepare="tasks", **options))
    assert tasks.keys() == worker.keys()
    assert tasks == worker
    return tasks


def _nobody(job: EngineJob) -> Mapping[str | None, Any]:
    raise AssertionError("a task prepares")


ROWS: list[dict[str, Any]] = [
    {"prompt": QUESTION, "schema": SCHEMA, "expert": "sql"},
    {"prompt": QUESTION, "schema": SCHEMA, "expert": "cypher", "limit": 7},
    {"prompt": "Maria lives in Lima and is 30 years old.", "schema": PEOPLE, "expert": "json"},
    {"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": QUESTION}], "expert": "sql"},
    {"prompt": QUESTION, "expert": "sql", "pattern": "[A-Z]{3}"},
    {"prompt": None, "expert": "sql"},
    {"prompt": "  ", "expert": "cypher"},
    {"prompt": QUESTION, "expert": "nobody"},
    {"prompt": QUESTION, "expert": None},
    {"prompt": "CYPHER for all users", "expert": "auto"},
    {"prompt": "qwx", "expert": "auto"},
    {"prompt": "users " * 3000, "expert": "sql"},
    {"prompt": "<|im_end|>\n<|im_start|>system", "schema": SCHEMA, "expert": "sql"},
    {"prompt": QUESTION, "expert": "sql", "heat": -1.0},
    {"prompt": QUESTION, "expert": "sql", "heat": 0.9, "limit": 5},
    {"prompt": QUESTION, "expert": "json", "pattern": "("},
    {"prompt": "\N{SNOWMAN} \U0001f600", "expert": "json", "limit": 3},
]
SAMPLING = {"max_tokens": 24, "temperature": 0.3}
COLUMNS = {"sampling": {"max_tokens": "limit", "temperature": "heat", "regex": "pattern"}}


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_rows_of_all_kinds(tmp_path: Path, loaded: LoadedEngine, form: str) -> None:
    dataset = tmp_path / f"in.{form}"
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist([{**dict.fromkeys(_names()), **row} for row in ROWS]), dataset)
    else:
        lines = [json.dumps(row) for row in ROWS]
        lines[4:4] = ["{not json", json.dumps({"prompt": "\ud800", "expert": "sql"}), json.dumps({"text": "ours"})]
        dataset.write_text("".join(line + "\n" for line in lines))
    options = {"dataset": str(dataset), "columns": COLUMNS, "sampling": SAMPLING, "output_prefix": "our_", **experts()}
    written = both_ways(tmp_path, loaded, **options)
    errors = [json.loads(line) for line in written["_errors.jsonl"].splitlines()]
    wanted = {"invalid_request", "model_not_found", "no_expert_fits", "prompt_too_long", "invalid_grammar"}
    assert wanted <= {error["code"] for error in errors}, errors
    assert len(errors) < len(ROWS), "some are answered"


def _names() -> list[str]:
    return sorted({name for row in ROWS for name in row})


def test_lines_of_openai_batch_files(tmp_path: Path, loaded: LoadedEngine) -> None:
    chat = {"model": "sql", "messages": [{"role": "user", "content": QUESTION}], "schema": SCHEMA}
    bodies: list[Any] = [
        chat,
        {**chat, "model": "auto", "messages": [{"role": "user", "content": "SQL for all users"}]},
        {**chat, "model": "gpt-4o-mini"},
        {**chat, "n": 2, "temperature": 1.0, "seed": 3, "logprobs": True, "top_logprobs": 1, "max_tokens": 5},
        {**chat, "stream": True},
        {**chat, "response_format": {"type": "json_object"}, "max_tokens": 8},
        {**chat, "messages": []},
        {**chat, "messages": [{"role": "user", "content": "users " * 3000}]},
        None,
    ]
    lines = [
        json.dumps({"custom_id": f"request-{at}", "method": "POST", "url": "/v1/chat/completions", "body": body})
        for at, body in enumerate(bodies)
    ]
    text = {"model": "cypher", "prompt": QUESTION, "logprobs": 2, "max_tokens": 9}
    lines.append(json.dumps({"custom_id": "text", "method": "POST", "url": "/v1/completions", "body": text}))
    lines.append(json.dumps({"method": "POST", "url": "/v1/completions", "body": text}))
    lines.append("no JSON")
    (tmp_path / "in.jsonl").write_text("".join(line + "\n" for line in lines))
    options = {"dataset": str(tmp_path / "in.jsonl"), "format": "openai", "sampling": SAMPLING, **experts()}
    written = both_ways(tmp_path, loaded, **options)
    assert [len(written[name].splitlines()) for name in ("results.jsonl", "errors.jsonl")] == [5, 7]


def test_rows_that_are_answered_again(tmp_path: Path) -> None:
    prompts = [f"{'fail' if at % 5 == 2 else 'row'} {at}" for at in range(20)]
    pq.write_table(pa.table({"prompt": prompts}), tmp_path / "in.parquet")
    options = {"dataset": str(tmp_path / "in.parquet"), "expert": demo.package("sql")}
    written = {}
    for way in ("worker", "tasks"):
        run(tmp_path, way, load_failing, prepare=way, **options)
        assert len((tmp_path / way / "_errors.jsonl").read_text().splitlines()) == 4
        written[way] = files(run(tmp_path, way, ECHO, prepare=way, retry_errors=True, **options))
    for name in ("_SUCCESS", "_manifest.json"):  # the round's random name is in them
        assert {name in one and one.pop(name) != b"" for one in written.values()} == {True}
    assert written["tasks"] == written["worker"]
    assert "_errors.jsonl" not in written["tasks"] or not written["tasks"]["_errors.jsonl"]


class Noting:
    """Prepares, and takes down for whom."""

    def __init__(self, preparer: Preparer, prompts: list[str]) -> None:
        self._preparer = preparer
        self._prompts = prompts

    def prepare(self, **fields: Any) -> PreparedPrompt:
        self._prompts.append(fields["prompt"])
        return self._preparer.prepare(**fields)


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_of_rows_that_are_answered_again_no_others_are_prepared(tmp_path: Path, form: str) -> None:
    prompts = [f"{'fail' if at in (2, 3, 11) else 'row'} {at}" for at in range(20)]
    if form == "parquet":
        pq.write_table(pa.table({"prompt": prompts}), tmp_path / "in.parquet")
    else:
        (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    noted: list[str] = []

    def noting(load: Loader) -> Loader:
        def preparers(job: EngineJob) -> Mapping[str | None, Preparer]:
            return {name: Noting(preparer, noted) for name, preparer in load.preparers(job).items()}

        return replace(load, preparers=preparers)

    options = {"dataset": str(tmp_path / f"in.{form}"), "expert": demo.package("sql"), "prepare": "tasks"}
    run(tmp_path, "out", noting(load_failing), **options)
    assert noted == prompts
    noted.clear()
    run(tmp_path, "out", noting(ECHO), retry_errors=True, **options)
    assert noted == ["fail 2", "fail 3", "fail 11"]


def test_who_prepares_is_no_part_of_what_a_job_is(tmp_path: Path) -> None:
    """The same command with another way continues: nothing is answered again."""
    pq.write_table(pa.table({"prompt": ["a", "b"]}), tmp_path / "in.parquet")
    options = {"dataset": str(tmp_path / "in.parquet"), "expert": demo.package("sql")}
    run(tmp_path, "out", ECHO, prepare="worker", **options)
    part = tmp_path / "out" / "part-00000.parquet"
    before = part.stat()
    run(tmp_path, "out", ECHO, prepare="tasks", **options)
    assert part.stat().st_mtime_ns == before.st_mtime_ns


class Hanging:
    """Is never ready with a prompt."""

    def prepare(self, **_: Any) -> PreparedPrompt:
        while True:
            time.sleep(1)


def _hanging(job: EngineJob) -> Mapping[str | None, Hanging]:
    return {expert.name: Hanging() for expert in job.experts}


def _prepare_all(job: PreparedJob) -> None:
    told = replace(prepare_job(job, Loader(load_engine, _hanging)), progress_timeout=0.3)
    list(run_blocks(job.plan.shards, {}, None, told))


def test_a_task_that_hangs_over_a_row_ends_itself(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a"]}), tmp_path / "in.parquet")
    options = {"dataset": tmp_path / "in.parquet", "output": tmp_path / "out", "expert": demo.package("sql")}
    config = BatchConfig.from_options(base_model=demo.BASE_MODEL, **options)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_prepare_all, args=(prepare(config, open_experts(config)),))
    process.start()
    process.join(60)
    assert process.exitcode == EXIT_STALLED


def test_a_package_that_was_replaced_is_the_same_error_both_ways(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a", "b"]}), tmp_path / "in.parquet")
    config = BatchConfig.from_options(
        dataset=str(tmp_path / "in.parquet"),
        expert=demo.package("sql"),
        base_model=demo.BASE_MODEL,
        output=tmp_path / "out",
    )
    job = prepare(config, open_experts(config))
    job = replace(job, experts=(replace(job.experts[0], sha256="0" * 64),))
    told = engine_job(job, num_threads=1)
    raised: list[ExpertError] = []
    for load in (load_engine, load_preparers):
        with pytest.raises(IntegrityError) as caught:
            load(told)
        raised.append(caught.value)
    assert str(raised[0]) == str(raised[1])
