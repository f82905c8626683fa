"""`run_batch`: a dataset and an expert in, an answered dataset out."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pyarrow as pa

from pipeline.batch.cluster import connect
from pipeline.batch.commit import INPUT, refuse_foreign
from pipeline.batch.config import BatchConfig
from pipeline.batch.execute import RunCounts, execute, quiet
from pipeline.batch.job_count import per_second
from pipeline.batch.plan import OpenExpert, open_expert, prepare
from pipeline.batch.progress import BatchReport, Phases, Progress
from pipeline.batch.report import write_report
from pipeline.batch.result import BatchResult
from pipeline.batch.run_record import RunRecorder
from pipeline.batch.staging import stage_in_memory, stage_tables
from pipeline.batch.storage import open_storage

DATA_EXTENSIONS = (".parquet", ".jsonl", ".ndjson", ".json", ".csv")


def run_batch(
    dataset: Any,
    expert: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **options: Any,
) -> BatchResult:
    """Answer every row of a dataset with an expert, on Ray.

    The same call again continues where it stopped: shards that are committed are not computed again, and a finished
    job is not run at all.

    Args:
        dataset: A path, glob or URL of Parquet, JSONL or CSV files, or a list of them; or rows in memory: a list of
            prompts or dicts, a pandas DataFrame, a `ray.data.Dataset`. Rows in memory are first written to the output
            folder. A list of `Path`s or of strings that all end like data files
            (`.parquet`, `.jsonl`, ...) is taken as files, any other list of strings as prompts.
        expert: Path or URL of the package.
        output: Folder or URL for the answers; a new temporary folder if None.
        progress: Show the progress line on standard error.
        options: Any other field of `BatchConfig`, e.g. `base_model`, `columns`, `sampling`, `num_workers`, `num_gpus`.

    Returns:
        The answers and the report.

    Raises:
        ConfigError: An option is unknown or wrong.
        LoadError: The package or its base model cannot be used.
        DatasetError: The dataset cannot be found or read.
        OutputError: The output cannot be written, or belongs to another job.
        JobFailedError: Workers failed; the same call continues.

    Example:
        >>> from pipeline import demo, run_batch
        >>> schema = "CREATE TABLE users (id INT, name TEXT, city TEXT);"
        >>> rows = [{"prompt": "How many users are there per city?", "schema": schema}]
        >>> run_batch(rows, demo.package("sql"), base_model=demo.BASE_MODEL).to_pandas()["text"][0]
        'SELECT city, COUNT(*) FROM users GROUP BY city'
    """
    target = os.fspath(output) if output is not None else tempfile.mkdtemp(prefix="expert-batch-")
    given = {"expert": expert, "output": target, **options}
    if not _is_in_memory(dataset):
        return run_config(BatchConfig.from_options(dataset=dataset, **given), progress=progress)
    # Everything that can be wrong without the rows is found before they are written.
    config = BatchConfig.from_options(dataset=target, **given)
    phases = Phases()
    with phases.phase("plan"):
        opened = open_expert(config)
        refuse_foreign(open_storage(config.output, config.storage_options))
        staged = _stage(dataset, config)
    return _run(BatchConfig.from_options(dataset=staged, **given), opened, phases, progress=progress)


def run_config(config: BatchConfig, *, progress: bool = True) -> BatchResult:
    """Run the job that a configuration describes; see `run_batch`.

    Args:
        config: The job.
        progress: Show the progress line on standard error.
    """
    phases = Phases()
    with phases.phase("plan"):
        opened = open_expert(config)
    return _run(config, opened, phases, progress=progress)


def _run(config: BatchConfig, opened: OpenExpert, phases: Phases, *, progress: bool) -> BatchResult:
    with phases.phase("plan"):
        job = prepare(config, opened)
        job.output.begin()
        was_complete = job.output.is_complete()
        done = {} if was_complete else job.output.committed()
    counts = RunCounts()
    recorder = RunRecorder(phases, price_per_hour=config.price_per_hour)
    with nullcontext() if was_complete else recorder.recording(job.output.storage):
        if not was_complete:
            line = Progress(enabled=progress, seconds=config.progress_seconds)
            counts = execute(job, done, line, phases, recorder)
        with phases.phase("commit"):
            manifest = job.output.finish()
    seconds = phases.seconds()
    report = BatchReport(
        output=job.output.storage.url(""),
        rows=manifest["rows"],
        errors=manifest["errors"],
        errors_by_code=manifest["error_codes"],
        prompt_tokens=manifest["prompt_tokens"],
        completion_tokens=manifest["completion_tokens"],
        shards=len(job.plan.shards),
        rows_this_run=counts.rows,
        rows_per_second=per_second(counts.rows, seconds["run"]),
        tokens_per_second=per_second(counts.completion_tokens, seconds["run"]),
        seconds=seconds,
        already_complete=was_complete,
        page=write_report(job.output, manifest, anew=not was_complete),
    )
    return BatchResult(job, manifest, report)


def _is_in_memory(dataset: Any) -> bool:
    if isinstance(dataset, str | os.PathLike):
        return False
    if isinstance(dataset, list | tuple) and dataset and all(isinstance(item, str | os.PathLike) for item in dataset):
        return not all(isinstance(item, os.PathLike) or item.lower().endswith(DATA_EXTENSIONS) for item in dataset)
    return True


def _stage(dataset: Any, config: BatchConfig) -> str | list[str]:
    """Write rows that are in memory where every worker can read them; the same rows are the same files."""
    folder = f"{config.output.rstrip('/')}/{INPUT}"
    if type(dataset).__module__.startswith("ray.data"):
        return stage_tables(_tables_in_order(dataset, config), folder, config.storage_options)
    return stage_in_memory(dataset, folder, config.storage_options)


def _tables_in_order(dataset: Any, config: BatchConfig) -> Iterator[pa.Table]:
    """A Ray Dataset's rows, block by block, in an order that is the same every time it is read."""
    connect(config.ray_address)
    with quiet():
        ordered = dataset.map_batches(_as_is, batch_size=None, batch_format="pyarrow")
    ordered.context.execution_options.preserve_order = True
    yield from ordered.iter_batches(batch_size=None, batch_format="pyarrow")


def _as_is(table: pa.Table) -> pa.Table:
    return table
