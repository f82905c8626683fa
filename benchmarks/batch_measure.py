"""One measurement of `benchmarks.batch`, as a program: `python -m benchmarks.batch_measure PEER OPTIONS_AS_JSON`."""

import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.peers.ray_data import answer_all
from benchmarks.scale_measure import tree_cpu_seconds
from pipeline import demo, run_batch
from pipeline.batch.answering import EXPERTS, Answering, load_engine
from pipeline.batch.cluster import connect
from pipeline.batch.config import BatchConfig
from pipeline.batch.execute import plan_workers, worker_job
from pipeline.batch.plan import PreparedJob, open_experts, prepare
from pipeline.batch.row_answers import RowAnswers
from pipeline.batch.rows import iter_rows
from pipeline.batch.shards import Shard
from pipeline.batch.source import read_shard
from pipeline.demo.questions import write_questions
from pipeline.demo.tasks import TERMINATORS
from pipeline.package import open_package

Figures = dict[str, Any]


def job_options(folder: Path, rows: int) -> dict[str, Any]:
    """What the job is told; the others answer the same questions in the same way."""
    dataset = folder / f"questions-{rows}.parquet"
    if not dataset.exists():
        write_questions(dataset, rows)
    return {
        "dataset": str(dataset),
        "expert": demo.package("sql"),
        "base_model": demo.BASE_MODEL,
        "output": folder / "output",
        "sampling": {"temperature": 0, "use_grammar": False, "max_tokens": 64},
        "ray_address": "local",
    }


def measure_job(folder: Path, rows: int) -> Figures:
    """The batch job."""
    options = job_options(folder, rows)
    shutil.rmtree(options["output"], ignore_errors=True)
    result = run_batch(**options, progress=False)
    seconds = result.report.seconds
    table = result.to_pandas()
    return {
        "start_seconds": seconds["plan"] + seconds["start"],
        "run_seconds": seconds["run"] + seconds["commit"],
        "right": float((table["text"] == table["expected"]).mean()),
    }


def measure_engine(folder: Path, rows: int) -> Figures:
    """The job's engine in one process: rows are read at once, asked at once, and written at once."""
    started = time.perf_counter()
    config = BatchConfig.from_options(**job_options(folder, rows))
    job = prepare(config, open_experts(config))
    answering = _answering(job)
    loaded = time.perf_counter()
    tables = [read_shard(shard) for shard in job.plan.shards]
    asked = [row for shard, table in zip(job.plan.shards, tables, strict=True) for row in iter_rows(shard, table)]
    answers = answering.answer(asked)
    part = answering.form.encode(answers, pa.concat_tables(tables))
    (folder / "engine.parquet").write_bytes(part)
    ended = time.perf_counter()
    table = pq.read_table(folder / "engine.parquet").to_pandas()
    return {
        "start_seconds": loaded - started,
        "run_seconds": ended - loaded,
        "right": float((table["text"] == table["expected"]).mean()),
    }


def _answering(job: PreparedJob) -> Answering[Any]:
    workers = plan_workers(job.config, connect("local"), 1)
    engine = worker_job(job, workers, is_resumed=False, load=EXPERTS).engine
    loaded = load_engine(engine)
    return Answering(loaded.engine, RowAnswers(engine, loaded.builders, job.part_format))


def measure_ray_data(folder: Path, rows: int) -> Figures:
    """Ray Data, with the thirty lines in a callable."""
    options = job_options(folder, rows)
    config = BatchConfig.from_options(**options)
    job = prepare(config, open_experts(config))
    package = open_package(str(options["expert"]))
    # They are given the prompts as our own builder makes them, as tokens.
    engine = worker_job(job, plan_workers(config, connect("local"), 1), is_resumed=False, load=EXPERTS).engine
    loaded = load_engine(engine)
    form = RowAnswers(engine, loaded.builders, job.part_format)
    expected, prompts = [], []
    for row in _rows(job):
        request = form.ask(row.identity, row, form.prepare(row)).request
        if request is None:
            raise RuntimeError(f"{row.identity} cannot be asked")
        expected.append(row.values["expected"])
        prompts.append(list(request.prompt_token_ids))
    tokenizer = loaded.builders[None].tokenizer
    loaded.engine.close()
    prompted = folder / "prompted.parquet"
    pq.write_table(pa.table({"prompt": prompts, "expected": expected}), prompted)
    began = time.time()
    answered = answer_all(prompted, folder / "ray-data", Path(demo.BASE_MODEL), package.root)
    ended = time.time()
    first = min(answered["began"])
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in answered["tokens"]]
    # Our packages stop before the terminator; the thirty lines write it.
    said = [text.strip().removesuffix(TERMINATORS["sql"]) for text in texts]
    right = sum(text == wanted for text, wanted in zip(said, answered["expected"], strict=True))
    return {"start_seconds": first - began, "run_seconds": ended - first, "right": right / len(texts)}


def _rows(job: PreparedJob) -> Any:
    def rows_of(shard: Shard) -> Any:
        return iter_rows(shard, read_shard(shard))

    return (row for shard in job.plan.shards for row in rows_of(shard))


PEERS: Mapping[str, Callable[[Path, int], Figures]] = {
    "job": measure_job,
    "engine": measure_engine,
    "ray-data": measure_ray_data,
}


if __name__ == "__main__":
    peer, told = sys.argv[1], json.loads(sys.argv[2])
    begun = time.perf_counter()
    connect("local")
    ray_seconds, cpu = time.perf_counter() - begun, tree_cpu_seconds()
    Path(told["folder"]).mkdir(parents=True, exist_ok=True)
    figures = PEERS[peer](Path(told["folder"]), told["rows"])
    if peer != "engine":
        figures["start_seconds"] += ray_seconds
    figures |= {"cpu_seconds": tree_cpu_seconds() - cpu, "rows_per_second": told["rows"] / figures["run_seconds"]}
    print(json.dumps({"peer": peer, "rows": told["rows"], **figures}))  # noqa: T201 - the result
