"""`run_batch`: a dataset and an expert in, an answered dataset out."""

import os
import tempfile
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from pipeline.batch.cluster import connect
from pipeline.batch.commit import refuse_foreign
from pipeline.batch.config import BatchConfig
from pipeline.batch.drive import drive
from pipeline.batch.execute import RunCounts, quiet
from pipeline.batch.files import format_of
from pipeline.batch.job_count import per_second
from pipeline.batch.layout import ERRORS, INPUT, VIEWS
from pipeline.batch.lease import hold
from pipeline.batch.manifest import check_parts
from pipeline.batch.plan import OpenExperts, PreparedJob, open_experts, prepare
from pipeline.batch.progress import BatchReport, Phases, Progress
from pipeline.batch.report import write_report
from pipeline.batch.result import BatchResult
from pipeline.batch.run_record import RunRecorder
from pipeline.batch.staging import hugging_face_tables, is_hugging_face, stage_in_memory, stage_tables
from pipeline.errors import FingerprintError
from pipeline.storage import open_storage


def run_batch(
    dataset: Any,
    expert: str | os.PathLike[str] | None = None,
    *,
    output: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **options: Any,
) -> BatchResult:
    """Answer every row of a dataset with an expert, or each with the one that it names, on Ray.

    The same call again continues where it stopped: shards that are committed are not computed again, and a finished
    job is not run at all.

    Args:
        dataset: A path, glob or URL of Parquet, JSONL, CSV or Arrow files, or a list of them; or rows in memory: a
            list of prompts or dicts, a pandas DataFrame, a `ray.data.Dataset`, a Hugging Face `datasets.Dataset`. Rows
            in memory are first written to the output folder. A list of `Path`s or of strings that all end like data
            files (`.parquet`, `.jsonl`, ...) is taken as files, any other list of strings as prompts.
        expert: Path or URL of the package. With `experts` (a mapping from the names in the rows' column `expert` to
            packages over one base model), that of the rows that name none; it may then be left out.
        output: Folder or URL for the answers; a new temporary folder if None.
        progress: Show the progress line on standard error.
        options: Any other field of `BatchConfig`, e.g. `experts`, `base_model`, `columns`, `sampling`, `num_workers`,
            `num_gpus`.

    Returns:
        The answers and the report.

    Raises:
        ConfigError: An option is unknown or wrong.
        LoadError: The package or its base model cannot be used.
        DatasetError: The dataset cannot be found or read.
        OutputError: The output cannot be written, or belongs to another job.
        OutputInUseError: Another driver is writing to the output.
        JobFailedError: Workers failed; the same call continues.
        TooManyErrorsError: More rows have errors than `max_errors` or `max_error_rate` allow.

    Examples:
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
        opened = open_experts(config)
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
        opened = open_experts(config)
    return _run(config, opened, phases, progress=progress)


def _run(config: BatchConfig, opened: OpenExperts, phases: Phases, *, progress: bool) -> BatchResult:
    with phases.phase("plan"):
        job = prepare(config, opened)
        manifest = _already_complete(job)
    answered: RunCounts | None = None
    page: str | None = None
    if manifest is None:
        shown = Progress(enabled=progress, seconds=config.progress_seconds)
        recorder = RunRecorder(phases, price_per_hour=config.price_per_hour)
        with hold(job.output.storage, seconds=config.lease_seconds) as lease:
            with recorder.recording(job.output.storage):
                manifest, answered = drive(job, lease, shown, phases, recorder)
            page = write_report(job.output, manifest, anew=answered is not None)
    else:
        page = write_report(job.output, manifest, anew=False)
    counts = answered or RunCounts()
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
        already_complete=answered is None,
        page=page,
        errors_file=job.output.storage.url(VIEWS[1] if config.format == "openai" else ERRORS),
    )
    return BatchResult(job, manifest, report)


def _already_complete(job: PreparedJob) -> dict[str, Any] | None:
    """The manifest of a job that leaves nothing to do. Nothing is written, and no other driver is in the way."""
    try:
        is_taken = job.output.is_taken()
    except FingerprintError:
        if job.config.overwrite:
            return None
        raise
    manifest = job.output.sealed() if is_taken and not job.config.retry_errors else None
    if manifest is not None:
        check_parts(job.output.storage, manifest)
    return manifest


def _is_in_memory(dataset: Any) -> bool:
    if isinstance(dataset, str | os.PathLike):
        return False
    if isinstance(dataset, list | tuple) and dataset and all(isinstance(item, str | os.PathLike) for item in dataset):
        return not all(isinstance(item, os.PathLike) or format_of(item) is not None for item in dataset)
    return True


def _stage(dataset: Any, config: BatchConfig) -> str | list[str]:
    """Write rows that are in memory where every worker can read them; the same rows are the same files."""
    folder = f"{config.output.rstrip('/')}/{INPUT}"
    if type(dataset).__module__.startswith("ray.data"):
        return stage_tables(_tables_in_order(dataset, config), folder, config.storage_options)
    if is_hugging_face(dataset):
        return stage_tables(hugging_face_tables(dataset), folder, config.storage_options)
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
