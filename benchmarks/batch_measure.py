"""One measurement of `benchmarks.batch`, as a program: `python -m benchmarks.batch_measure PEER OPTIONS_AS_JSON`."""

import json
import os
import shutil
import subprocess
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
from pipeline.batch.answering import Answering, load_engine, load_preparers
from pipeline.batch.cluster import connect
from pipeline.batch.config import BatchConfig
from pipeline.batch.execute import engine_job, plan_workers
from pipeline.batch.plan import PreparedJob, open_experts, prepare
from pipeline.batch.row_answers import RowAnswers, RowPreparer
from pipeline.batch.rows import iter_rows
from pipeline.batch.shards import Shard
from pipeline.batch.source import read_shard
from pipeline.demo.questions import write_questions
from pipeline.demo.tasks import TERMINATORS
from pipeline.engine.loader import load_tokenizer
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
    engine = engine_job(job, plan_workers(job.config, connect("local"), 1).num_threads)
    loaded = load_engine(engine)
    return Answering(loaded.engine, RowAnswers(engine, loaded.builders, job.part_format))


def measure_ray_data(folder: Path, rows: int) -> Figures:
    """Ray Data, with the thirty lines in a callable."""
    prompted = write_prompted(folder, rows)
    package = open_package(demo.package("sql"))
    began = time.time()
    answered = answer_all(prompted, folder / "ray-data", Path(demo.BASE_MODEL), package.root)
    ended = time.time()
    first = min(answered["began"])
    tokenizer = load_tokenizer(package, Path(demo.BASE_MODEL))
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in answered["tokens"]]
    return {"start_seconds": first - began, "run_seconds": ended - first, "right": _share_right(texts, answered)}


def measure_ray_data_llm(folder: Path, rows: int, python: str) -> Figures:
    """Ray Data LLM with vLLM, in another interpreter, over the base model with the adapter merged: it knows no DoRA."""
    asked = {
        "model": str(write_merged(folder / "merged")),
        "dataset": str(write_prompted(folder, rows)),
        "output": str(folder / "ray-data-llm"),
        "rows": rows,
        "cores": len(os.sched_getaffinity(0)),
    }
    program = Path(__file__).parent / "peers" / "ray_data_llm.py"
    began = time.time()
    command = [python, "-P", str(program), json.dumps(asked)]  # its folder has a module of the name of one of Python's
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603 - our own program
    told = json.loads(done.stdout.strip().splitlines()[-1])
    answered = pq.read_table(folder / "ray-data-llm").to_pydict()
    return {
        "start_seconds": told["began"] - began,
        "run_seconds": told["ended"] - told["began"],
        "right": _share_right(answered["text"], answered),
    }


def write_prompted(folder: Path, rows: int) -> Path:
    """The job's prompts as our own builder makes them, as tokens, with the right answers: `tokens`, `expected`."""
    config = BatchConfig.from_options(**job_options(folder, rows))
    job = prepare(config, open_experts(config))
    engine = engine_job(job, num_threads=1)
    preparer = RowPreparer(engine, load_preparers(engine), job.part_format)
    table: dict[str, list[Any]] = {"tokens": [], "expected": []}
    for row in _rows(job):
        prompt = preparer.prepare(row).prompt
        if prompt is None:
            raise RuntimeError(f"{row.identity} cannot be asked")
        table["tokens"].append(list(prompt.token_ids))
        table["expected"].append(row.values["expected"])
    prompted = folder / "prompted.parquet"
    pq.write_table(pa.table(table), prompted)
    return prompted


def write_merged(folder: Path) -> Path:
    """The demo's base model with the SQL expert merged into it, as a checkpoint of its own."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    package = open_package(demo.package("sql"))
    model: Any = AutoModelForCausalLM.from_pretrained(demo.BASE_MODEL, dtype="float32")
    PeftModel.from_pretrained(model, package.root).merge_and_unload().save_pretrained(folder)
    load_tokenizer(package, Path(demo.BASE_MODEL)).save_pretrained(folder)
    return folder


def _share_right(texts: list[str], answered: Mapping[str, list[Any]]) -> float:
    """The share of right answers. Our packages stop before the terminator; others write it."""
    said = [text.strip().removesuffix(TERMINATORS["sql"]) for text in texts]
    num_right = sum(map(str.__eq__, said, answered["expected"]))
    return num_right / len(texts)


def _rows(job: PreparedJob) -> Any:
    def rows_of(shard: Shard) -> Any:
        return iter_rows(shard, read_shard(shard))

    return (row for shard in job.plan.shards for row in rows_of(shard))


PEERS: Mapping[str, Callable[..., Figures]] = {
    "job": measure_job,
    "engine": measure_engine,
    "ray-data": measure_ray_data,
    "ray-data-llm": measure_ray_data_llm,
}
STARTS_ITSELF = ("ray-data-llm",)  # with a Ray of its own


if __name__ == "__main__":
    peer, told = sys.argv[1], json.loads(sys.argv[2])
    begun, folder = time.perf_counter(), Path(told.pop("folder"))
    if peer not in STARTS_ITSELF:
        connect("local")
    ray_seconds, cpu = time.perf_counter() - begun, tree_cpu_seconds()
    folder.mkdir(parents=True, exist_ok=True)
    figures = PEERS[peer](folder, **told)
    if peer != "engine":
        figures["start_seconds"] += ray_seconds
    if peer not in STARTS_ITSELF:  # whose processes have ended, and count no more
        figures["cpu_seconds"] = tree_cpu_seconds() - cpu
    figures["rows_per_second"] = told["rows"] / figures["run_seconds"]
    print(json.dumps({"peer": peer, "rows": told["rows"], **figures}))  # noqa: T201 - the result
