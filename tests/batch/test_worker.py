"""The worker without Ray: rows to a part, by engines that compute nothing, in processes that may end."""

import json
import multiprocessing
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.batch.answering import UNNAMED, Answering, EngineJob, JobExpert, LoadedEngine, Loader
from pipeline.batch.blocks import run_blocks
from pipeline.batch.columns import ResolvedColumns, resolve_columns
from pipeline.batch.commit import JobOutput
from pipeline.batch.config import ColumnsConfig
from pipeline.batch.openai_answers import OpenAIRules
from pipeline.batch.parts import PartFormat, plan_part_format
from pipeline.batch.receipts import Receipt
from pipeline.batch.row_answers import RowAnswers
from pipeline.batch.rows import Row
from pipeline.batch.shards import ShardPlan
from pipeline.batch.source import plan_shards
from pipeline.batch.worker import ShardWorker, WorkerJob
from pipeline.package import Routing
from pipeline.storage.local import LocalStorage
from tests.batch.scripted import (
    HANG,
    KILL,
    RAISE,
    MeetingEngine,
    ScriptedBuilder,
    ScriptedEngine,
    load_deadly,
    load_scripted,
    scripted_preparers,
)

MOST_LIVES = 10


def expert(name: str | None) -> JobExpert:
    routing = Routing(keywords=() if name is None else (name,))
    return JobExpert(name, f"{name}.expert", f"sha-{name}", f"expert-{name}@1", {}, routing)


@dataclass(frozen=True)
class Job:
    """A small job on a disk."""

    plan: ShardPlan
    told: WorkerJob

    def blocks(self) -> list[pa.Table]:
        """Its shards, as Ray Data hands them to a worker."""
        return list(run_blocks(self.plan.shards, {}))

    def rows(self, shard: int) -> list[dict[str, Any]]:
        """The rows of a committed part."""
        data = self.told.output.storage.read(f"part-{shard:05d}.parquet")
        rows: list[dict[str, Any]] = pq.read_table(pa.BufferReader(data)).to_pylist()
        return rows


def make_job(
    folder: Path,
    columns: Mapping[str, Sequence[Any]],
    *,
    load: Loader,
    names: Sequence[str | None] = (None,),
    prefix: str = "",
) -> Job:
    """A job over a Parquet file in shards of 40 rows."""
    pq.write_table(pa.table(dict(columns)), folder / "in.parquet")
    plan = plan_shards(str(folder / "in.parquet"), shard_rows=40)
    form = plan_part_format(plan, output_prefix=prefix)
    resolved = resolve_columns(ColumnsConfig(), plan.columns)
    engine = EngineJob(tuple(expert(name) for name in names), "base", resolved)
    output = JobOutput(LocalStorage(str(folder / "out")), {}, "parquet", len(plan.shards), prefix)
    output.begin()
    return Job(plan, WorkerJob(engine, output, form, progress_timeout=0.5, is_resumed=True, load=load))


def _live(told: WorkerJob, blocks: list[pa.Table]) -> None:
    worker = ShardWorker(told)
    for block in blocks:
        worker(block)


def lives_until_done(job: Job) -> int:
    """Give the shards to one process after another, as Ray does, until one has answered all: how many died."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    for life in range(MOST_LIVES):
        process = context.Process(target=_live, args=(job.told, job.blocks()))
        process.start()
        process.join(60)
        if process.exitcode == 0:
            return life
    raise AssertionError("it does not end")


@pytest.mark.parametrize(
    ("fate", "says"),
    [
        (KILL, "each process that answered this row ended"),
        (RAISE, "the engine stopped: RuntimeError: CUDA error: an illegal memory access was encountered"),
        (HANG, "has done nothing for"),
    ],
)
def test_a_row_that_ends_its_worker_becomes_an_error_row(tmp_path: Path, fate: str, says: str) -> None:
    prompts = [f"row {number}" for number in range(80)]
    prompts[53] = fate
    job = make_job(tmp_path, {"prompt": prompts}, load=load_deadly)
    # in company, alone, in a range of three, and twice by itself
    assert lives_until_done(job) == 5
    rows = [*job.rows(0), *job.rows(1)]
    assert [row["prompt"] for row in rows] == prompts
    error = rows[53]["error"]
    assert error["code"] == "row_kills_worker"
    assert says in error["message"]
    assert rows[53]["text"] is None
    others = [row for row in rows if row["prompt"] != fate]
    assert [row["text"] for row in others] == [f":{row['prompt'].upper()}" for row in others]
    assert {row["error"] for row in others} == {None}
    assert {row["expert"] for row in rows} == {"expert-None@1"}


def test_a_line_that_ends_its_worker_becomes_an_error_line(tmp_path: Path) -> None:
    lines = [
        {
            "custom_id": f"request-{number}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": "any", "prompt": KILL if number == 7 else f"row {number}"},
        }
        for number in range(20)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plan = plan_shards(str(tmp_path / "in.jsonl"), shard_rows=40)
    output = JobOutput(LocalStorage(str(tmp_path / "out")), {}, "openai", len(plan.shards))
    output.begin()
    engine = EngineJob((expert(None),), "base", ResolvedColumns())
    form = PartFormat("openai", plan.schema, is_loose=True)
    rules = OpenAIRules({}, UNNAMED, {UNNAMED: "sha"}, "f00")
    job = Job(plan, WorkerJob(engine, output, form, is_resumed=True, load=load_deadly, openai=rules))
    assert lives_until_done(job) == 5
    answers = [json.loads(line) for line in output.storage.read("part-00000.jsonl").splitlines()]
    assert [answer["custom_id"] for answer in answers] == [line["custom_id"] for line in lines]
    assert answers[7]["response"]["status_code"] == 500
    assert answers[7]["response"]["body"]["error"]["code"] == "row_kills_worker"
    others = [answer for answer in answers if answer is not answers[7]]
    assert {answer["response"]["status_code"] for answer in others} == {200}
    assert others[7]["response"]["body"]["choices"][0]["text"] == ":ROW 8"


def test_a_worker_lost_by_chance_costs_no_row(tmp_path: Path) -> None:
    """A note of another life, as a machine that was taken away leaves it: the shard is tried alone, and answered."""
    job = make_job(tmp_path, {"prompt": ["a", "b"]}, load=load_scripted)
    note = {"start": 0, "stop": 2, "alone": False, "deaths": []}
    job.told.output.storage.create("_attempts/shards/00000/0000.json", json.dumps(note).encode())
    _live(job.told, job.blocks())
    assert [row["text"] for row in job.rows(0)] == [":A", ":B"]
    assert sorted(job.told.output.storage.list("_attempts/shards")) == [
        "_attempts/shards/00000/0000.json",
        "_attempts/shards/00000/0001.json",
    ]


def test_a_first_run_leaves_no_notes(tmp_path: Path) -> None:
    job = make_job(tmp_path, {"prompt": ["a", "b"]}, load=load_scripted)
    _live(replace(job.told, is_resumed=False), job.blocks())
    assert [row["text"] for row in job.rows(0)] == [":A", ":B"]
    assert job.told.output.storage.list("_attempts/shards") == {}


def test_shards_meet_in_the_engine(tmp_path: Path) -> None:
    """Two threads, two shards: the engine has the rows of both before it has answered one of either."""
    engine = MeetingEngine()
    job = make_job(
        tmp_path,
        {"prompt": [f"row {number}" for number in range(80)]},
        load=Loader(lambda _: LoadedEngine(engine, {None: ScriptedBuilder()}), scripted_preparers),
    )
    worker = ShardWorker(job.told)
    receipts: list[Receipt] = []

    def answer(block: pa.Table) -> None:
        receipts.extend(Receipt.from_json(text) for text in worker(block)["receipt"].to_pylist())

    threads = [threading.Thread(target=answer, args=(block,)) for block in job.blocks()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert sorted(receipt.shard for receipt in receipts) == [0, 1]
    assert [len(call) for call in engine.calls] == [40, 40]


def answer(
    columns: Mapping[str, Sequence[Any]], names: Sequence[str | None], folder: Path
) -> tuple[list[dict[str, Any]], ScriptedEngine]:
    """The part of one shard, and the engine that answered it."""
    engine = ScriptedEngine()
    job = make_job(
        folder,
        columns,
        names=names,
        prefix="our_",
        load=Loader(
            lambda _: LoadedEngine(engine, {name: ScriptedBuilder(name) for name in names}), scripted_preparers
        ),
    )
    _live(job.told, job.blocks())
    return job.rows(0), engine


def test_each_row_is_answered_by_the_expert_that_it_names(tmp_path: Path) -> None:
    columns: dict[str, Sequence[Any]] = {
        "prompt": ["d", "b", "c", "a", "e"],
        "expert": ["sql", "cypher", "sql", "nobody", None],
    }
    rows, engine = answer(columns, ("sql", "cypher"), tmp_path)
    assert [row["our_text"] for row in rows] == ["sql:D", "cypher:B", "sql:C", None, None]
    assert [row["our_expert"] for row in rows] == ["expert-sql@1", "expert-cypher@1", "expert-sql@1", None, None]
    assert [row["our_expert_sha256"] for row in rows] == ["sha-sql", "sha-cypher", "sha-sql", None, None]
    assert [row["our_error"] and row["our_error"]["code"] for row in rows] == [
        *(None, None, None),
        *("model_not_found", "invalid_request"),
    ]
    assert engine.calls == [["b", "c", "d"]], "neighbours share an expert, and the beginning of their prompts"


def test_rows_that_name_none_are_answered_by_the_one_without_a_name(tmp_path: Path) -> None:
    rows, _ = answer({"prompt": ["a", "b", "c"], "expert": [None, "sql", "x"]}, (None, "sql"), tmp_path)
    assert [row["our_text"] for row in rows] == [":A", "sql:B", None]
    assert [row["our_expert"] for row in rows] == ["expert-None@1", "expert-sql@1", None]


def test_auto_asks_the_expert_that_the_prompt_is_for(tmp_path: Path) -> None:
    columns: dict[str, Sequence[Any]] = {"prompt": ["a cypher", "sql b", "c"], "expert": ["auto"] * 3}
    rows, _ = answer(columns, ("sql", "cypher"), tmp_path)
    assert [row["our_text"] for row in rows] == ["cypher:A CYPHER", "sql:SQL B", None]
    assert [row["our_expert"] for row in rows] == ["expert-cypher@1", "expert-sql@1", None]
    assert rows[2]["our_error"]["code"] == "no_expert_fits"


def test_there_is_progress_only_while_rows_are_answered(tmp_path: Path) -> None:
    seen: list[object] = []

    class Watched(ScriptedEngine):
        def _begin(self, _: list[str]) -> None:
            seen.append(answering.progress())

    job = make_job(tmp_path, {"prompt": ["a"]}, load=load_scripted)
    form = RowAnswers(job.told.engine, {None: ScriptedBuilder()}, job.told.part_format)
    answering = Answering(Watched(), form)
    rows = [Row(f"x#{number}", {"prompt": prompt}, None) for number, prompt in enumerate(["a", 5])]
    completions = [answered.completion for answered in answering.answer(rows)]
    assert [one.finish_reason for one in completions if one is not None] == ["stop", "error"]
    assert seen[0] is not None
    assert answering.progress() is None
