"""From a configuration to a job that is ready to run: package, shards, columns, fingerprint, output."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.batch.commit import JobOutput
from pipeline.batch.config import BatchConfig, ResolvedColumns, resolve_columns
from pipeline.batch.files import is_hidden
from pipeline.batch.filesystems import protocol_of
from pipeline.batch.openai_answers import OpenAIRules
from pipeline.batch.parts import PartFormat, plan_part_format
from pipeline.batch.shards import ShardPlan
from pipeline.batch.source import plan_shards
from pipeline.batch.storage import open_storage
from pipeline.engine.requests import GRAMMAR_KINDS, request_defaults
from pipeline.engine.types import Grammar
from pipeline.errors import ConfigError
from pipeline.package import ExpertPackage, model_digest, open_package, resolve_base_model

FINGERPRINT_VERSION = 3


@dataclass(frozen=True)
class OpenExpert:
    """A package that is verified, its base model's directory, and what answers are held to, if anything."""

    package: ExpertPackage
    base_path: Path
    grammar: Grammar | None


@dataclass(frozen=True)
class PreparedJob:
    """A job that is ready to run.

    Args:
        config: What was asked for.
        package: The expert, verified.
        base_path: Its base model's directory.
        plan: The shards.
        columns: Which column plays which role.
        options: Sampling options that go before the manifest's; whether a grammar is applied is always among them, so
            that a worker which cannot apply it fails.
        part_format: How parts are written.
        output: Where they are committed.
        openai: How lines of OpenAI batch files are answered; None where the rows are others.
    """

    config: BatchConfig
    package: ExpertPackage
    base_path: Path
    plan: ShardPlan
    columns: ResolvedColumns
    options: Mapping[str, Any]
    part_format: PartFormat
    output: JobOutput
    openai: OpenAIRules | None = None


def prepare(config: BatchConfig, expert: OpenExpert) -> PreparedJob:
    """Plan the shards and draw up the job's fingerprint. Nothing is written.

    Raises:
        DatasetError: The dataset cannot be found or read, or lacks a column.
        OutputError: The output is at a place that cannot hold one.
    """
    package, base_path = expert.package, expert.base_path
    is_openai = config.format == "openai"
    plan = plan_shards(
        config.dataset,
        format="jsonl" if is_openai else config.format,  # lines like any others; what they say is read by the worker
        shard_rows=config.shard_rows,
        storage_options=config.storage_options,
    )
    refuse_nested(config, plan)
    columns = ResolvedColumns() if is_openai else resolve_columns(config.columns, plan.columns)
    options = sampling_options(config)
    if not any(name in options for name in GRAMMAR_KINDS):
        options["use_grammar"] = expert.grammar is not None
    fingerprint = job_fingerprint(config, package, base_path, plan, columns, options)
    openai: OpenAIRules | None = None
    if is_openai:
        part_format = PartFormat(kind="openai", inputs=plan.schema, is_loose=True)
        openai = openai_rules(config, package, digest_of(fingerprint))
    else:
        part_format = plan_part_format(
            plan,
            kind=config.output_format,
            output_prefix=config.output_prefix,
            expert=package.label,
            expert_sha256=package.digest,
            metadata={"expert_pipeline.fingerprint": digest_of(fingerprint)},
        )
    output = JobOutput(
        storage=open_storage(config.output, config.storage_options),
        fingerprint=fingerprint,
        kind=part_format.kind,
        num_shards=len(plan.shards),
        prefix=config.output_prefix,
    )
    return PreparedJob(config, package, base_path.resolve(), plan, columns, options, part_format, output, openai)


def openai_rules(config: BatchConfig, package: ExpertPackage, fingerprint: str) -> OpenAIRules:
    """How the lines of an OpenAI batch file are answered by the job's one expert.

    Args:
        config: The job.
        package: Its expert; a line's `model` says its name, or its name and version.
        fingerprint: The digest of the job's.
    """
    name = package.manifest.name
    return OpenAIRules(
        models={name: name, package.label: name},
        otherwise=name if config.openai_models == "any" else None,
        digests={name: package.digest},
        fingerprint=fingerprint,
    )


def open_expert(config: BatchConfig) -> OpenExpert:
    """Open the package, find its base model and check the sampling options.

    Raises:
        LoadError: The package or its base model cannot be used.
        InferenceError: A sampling option cannot be honoured.
    """
    cache_dir = None if config.cache_dir is None else Path(config.cache_dir)
    package = open_package(absolute(config.expert), cache_dir=cache_dir)
    base_path = resolve_base_model(
        package.base, base_model=config.base_model, models=config.models, package=package.label
    )
    _, grammar = request_defaults(package, sampling_options(config))
    return OpenExpert(package, base_path, grammar)


def refuse_nested(config: BatchConfig, plan: ShardPlan) -> None:
    """Refuse an output inside the dataset: the answers would be questions the next time.

    Raises:
        ConfigError: The output folder lies in a folder of the dataset, or holds files of it.
    """
    output = absolute(config.output).rstrip("/") + "/"
    items = [config.dataset] if isinstance(config.dataset, str) else config.dataset
    folders = [folder for folder in (absolute(item).rstrip("/") + "/" for item in items) if output.startswith(folder)]
    around = [folder for folder in folders if not is_hidden(output.removeprefix(folder))]
    inside = [
        shard.path
        for shard in plan.shards
        if shard.path.startswith(output) and not is_hidden(shard.path.removeprefix(output))
    ]
    if around or inside:
        raise ConfigError(
            f"the output {config.output} lies inside the dataset",
            details=[f"dataset: {place}" for place in (around or inside)[:3]],
            hint="Name an output folder outside the dataset, or one whose name begins with an underscore.",
        )


def job_fingerprint(
    config: BatchConfig,
    package: ExpertPackage,
    base_path: Path,
    plan: ShardPlan,
    columns: ResolvedColumns,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything the answers depend on, and nothing else: no paths, no times, no number of workers.

    Returns:
        Field to value; the output folder keeps it, and refuses a job with another.
    """
    own = {"openai_models": config.openai_models} if config.format == "openai" else {}
    return {
        **own,
        "fingerprint_version": FINGERPRINT_VERSION,
        "expert": package.label,
        "expert_sha256": package.digest,
        "base_model": package.base.name,
        "base_model_sha256": model_digest(base_path),
        "engine": config.engine,
        "dtype": config.dtype or "auto",
        "quantization": config.quantization,
        "columns": {role: name for role, name in asdict(columns).items() if name and role != "expected"},
        "sampling": dict(options),
        "seed": config.seed,
        "dataset_sha256": plan.digest,
        "shard_rows": config.shard_rows,
    }


def sampling_options(config: BatchConfig) -> dict[str, Any]:
    """The sampling options a configuration sets, as plain values."""
    given = config.sampling.model_dump(exclude_none=True)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}


def digest_of(fingerprint: Mapping[str, Any]) -> str:
    """SHA-256 of a fingerprint, in hex."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()


def absolute(path: str) -> str:
    """The path from the root, for processes with another working directory; a URL stays as it is."""
    return path if protocol_of(path) != "file" else os.path.abspath(path)  # noqa: PTH100  # Path.resolve follows links
