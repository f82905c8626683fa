"""The way through a job on a real Ray: several shards in a worker at a time, rows that end it, jobs that are wrong."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from pipeline import demo, run_batch
from pipeline.batch.answering import EngineJob, JobExpert, Loader, load_engine
from pipeline.batch.cluster import Cluster
from pipeline.batch.columns import resolve_columns
from pipeline.batch.config import BatchConfig, ColumnsConfig
from pipeline.batch.execute import answered_shards, execute, plan_reading, plan_workers, worker_job
from pipeline.batch.layout import JOB
from pipeline.batch.plan import open_experts, prepare
from pipeline.batch.progress import Phases, Progress
from pipeline.demo.questions import draw_questions
from pipeline.engine.types import Completion, Request
from pipeline.errors import ConfigError, DatasetError, TooManyErrorsError
from pipeline.package import open_package
from tests.batch.scripted import KILL, KILL_EARLY, load_deadly, load_marking, load_meeting, load_scripted

pytestmark = pytest.mark.usefixtures("cluster")


def run_scripted(folder: Path, prompts: list[Any], load: Loader, **options: Any) -> list[dict[str, Any]]:
    """Answer prompts by a script, in shards of 20: the rows of the output."""
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({"prompt": pa.array(prompts, pa.string())}), folder / "in.parquet")
    config = BatchConfig.from_options(
        dataset=str(folder / "in.parquet"),
        expert=demo.package("sql"),
        base_model=demo.BASE_MODEL,
        output=folder / "out",
        shard_rows=20,
        **options,
    )
    job = prepare(config, open_experts(config))
    is_resumed = job.output.storage.exists(JOB)
    job.output.begin()
    execute(job, job.output.committed(), Progress(enabled=False), Phases(), is_resumed=is_resumed, load=load)
    job.output.finish()
    return [row for part in sorted(folder.glob("out/part-*")) for row in pq.read_table(part).to_pylist()]


def test_the_engine_has_the_next_shard_before_one_is_answered(tmp_path: Path) -> None:
    prompts = [f"row {number}" for number in range(80)]
    rows = run_scripted(tmp_path / "job", prompts, load_meeting, shards_in_flight=2)
    assert [row["text"] for row in rows] == [f":{prompt.upper()}" for prompt in prompts]


@pytest.mark.timeout(240)
def test_a_row_that_kills_its_worker_is_an_error_row_and_the_job_ends(tmp_path: Path) -> None:
    prompts = [f"row {number}" for number in range(60)]
    prompts[33] = KILL
    rows = run_scripted(tmp_path / "job", prompts, load_deadly)
    assert [row["prompt"] for row in rows] == prompts
    assert [row["error"]["code"] for row in rows if row["error"]] == ["row_kills_worker"]
    assert rows[33]["text"] is None
    assert [row["text"] for row in rows if row["prompt"] != KILL] == [
        f":{prompt.upper()}" for prompt in prompts if prompt != KILL
    ]
    assert not (tmp_path / "job" / "out" / "_attempts").exists()


@pytest.mark.timeout(240)
def test_tasks_prepare_beside_workers_that_hold_every_core_and_a_row_that_kills_them_is_an_error_row(
    tmp_path: Path,
) -> None:
    prompts: list[Any] = [f"row {number}" for number in range(40)]
    prompts[7] = None
    num_cpus = ray.cluster_resources()["CPU"]
    rows = run_scripted(
        tmp_path / "job", [*prompts, KILL_EARLY], load_marking, prepare="tasks", num_cpus=num_cpus, num_workers=1
    )
    errors = [(at, row["error"]["code"]) for at, row in enumerate(rows) if row["error"]]
    assert errors == [(7, "invalid_request"), (40, "row_kills_worker")]
    # The worker would have put a star after what it prepared.
    assert [row["text"] for row in rows[:40]] == [
        None if prompt is None else f":{prompt.upper()}" for prompt in prompts
    ]


def test_a_job_that_is_plainly_wrong_stops_and_can_be_continued(tmp_path: Path) -> None:
    prompts: list[Any] = [f"row {number}" for number in range(400)]
    prompts[25:45] = [None] * 20
    options: dict[str, Any] = {"shards_in_flight": 1}
    with pytest.raises(TooManyErrorsError, match=r"more than max_errors \(5\)") as caught:
        run_scripted(tmp_path / "job", prompts, load_scripted, max_errors=5, **options)
    assert len(caught.value.details) == 1
    assert caught.value.details[0].startswith("invalid_request  ")
    assert "prompt is no text" in caught.value.details[0]
    assert not (tmp_path / "job" / "out" / "_SUCCESS").exists()
    with pytest.raises(TooManyErrorsError):
        run_scripted(tmp_path / "job", prompts, load_scripted, max_errors=5, **options)
    rows = run_scripted(tmp_path / "job", prompts, load_scripted, max_errors=20, **options)
    assert [row["prompt"] for row in rows] == prompts
    assert sum(row["error"] is not None for row in rows) == 20


@pytest.mark.parametrize("num_gpus", [1.0, 0.5])
def test_ray_data_takes_workers_with_gpus(tmp_path: Path, num_gpus: float) -> None:
    """It refuses some arguments only where there are GPUs; what would run is put together without any."""
    pq.write_table(pa.table({"prompt": ["a", "b"]}), tmp_path / "in.parquet")
    options = {"dataset": tmp_path / "in.parquet", "output": tmp_path / "out", "expert": demo.package("sql")}
    config = BatchConfig.from_options(base_model=demo.BASE_MODEL, num_gpus=num_gpus, **options)
    job, machine = prepare(config, open_experts(config)), Cluster(num_cpus=8, num_gpus=1, is_local=True)
    workers = plan_workers(config, machine, len(job.plan.shards))
    reading = plan_reading(config, machine, workers)
    told = worker_job(job, workers, is_resumed=False, load=load_scripted)
    assert (workers.num_gpus, reading.prepares) == (num_gpus, True)
    answered_shards(job, list(job.plan.shards), workers, told, reading)


def test_a_pool_that_may_grow_answers_every_row(tmp_path: Path) -> None:
    prompts = [f"row {number}" for number in range(400)]
    rows = run_scripted(tmp_path / "job", prompts, load_scripted, max_workers=2)
    assert [row["text"] for row in rows] == [f":{prompt.upper()}" for prompt in prompts]


PACKAGES = {task: demo.package(task) for task in demo.TASKS}


def questions(count: int) -> list[dict[str, Any]]:
    """Questions for the demo's experts in turn; `task` names the expert."""
    drawn = {task: list(draw_questions(task, count, seed=5)) for task in demo.TASKS}
    return [
        {"prompt": drawn[task][at].prompt, "schema": drawn[task][at].schema, "task": task}
        for at in range(count)
        for task in demo.TASKS
    ]


def test_no_expert_answers_as_the_base_model_does() -> None:
    experts = []
    for task, place in PACKAGES.items():
        package = open_package(place)
        experts.append(JobExpert(task, str(place), package.digest, package.label, {}))
    columns = resolve_columns(ColumnsConfig(expert="task"), ("prompt", "schema", "task"))
    loaded = load_engine(EngineJob(tuple(experts), str(demo.BASE_MODEL), columns, device="cpu", dtype="float32"))
    asked = []
    for at, row in enumerate(questions(5)):
        builder = loaded.builders[row["task"]]
        prepared = builder.prepare(prompt=row["prompt"], schema=row["schema"], options={"use_grammar": False})
        asked.append(builder.request(f"{at}", prepared))
    base = [Request(one.id, one.prompt_token_ids, one.params) for one in asked]

    def texts(requests: list[Request]) -> dict[str, str]:
        def text(completion: Completion) -> str:
            return completion.text

        return {one.request_id: text(one) for one in loaded.engine.generate(requests)}

    with_expert, without = texts(asked), texts(base)
    loaded.engine.close()
    assert [place for place in with_expert if with_expert[place] == without[place]] == []


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        ({"columns": {}}, DatasetError, "no column that says"),
        ({"columns": {"expert": "tsk"}}, DatasetError, "tsk"),
        ({"experts": {}, "expert": PACKAGES["sql"]}, ConfigError, "no experts to choose from"),
        ({"engine": "padded"}, ConfigError, "side by side"),
    ],
)
def test_a_mistake_about_experts_is_told_before_anything_runs(
    tmp_path: Path, change: dict[str, Any], kind: type[Exception], says: str
) -> None:
    options: dict[str, Any] = {"experts": PACKAGES, "columns": {"expert": "task"}, **change}
    with pytest.raises(kind, match=says):
        run_batch(questions(1), base_model=demo.BASE_MODEL, output=tmp_path / "out", **options)
    assert not list(tmp_path.glob("out/part-*"))
