"""From a configuration to a job that is ready to run: package, shards, columns, fingerprint, output."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.batch.answering import UNNAMED, JobExpert, engine_name
from pipeline.batch.columns import ResolvedColumns, resolve_columns
from pipeline.batch.commit import JobOutput
from pipeline.batch.config import BatchConfig
from pipeline.batch.files import is_hidden
from pipeline.batch.layout import FINGERPRINT_METADATA
from pipeline.batch.openai_answers import OpenAIRules
from pipeline.batch.parts import PartFormat, plan_part_format
from pipeline.batch.shards import ShardPlan
from pipeline.batch.source import plan_shards
from pipeline.batch.template import PromptTemplate
from pipeline.engine.requests import GRAMMAR_KINDS, request_defaults
from pipeline.engine.types import Grammar
from pipeline.errors import BaseModelError, ConfigError, DatasetError
from pipeline.package import ExpertPackage, check_together, fitting_base_model, model_digest, open_package
from pipeline.package.download import is_url
from pipeline.storage import open_storage
from pipeline.storage.filesystems import protocol_of
from pipeline.version import __version__

FINGERPRINT_VERSION = 3


@dataclass(frozen=True)
class OpenExpert:
    """A package that is verified, and what its answers are held to, if anything.

    `name` is what rows call it; None for the one that answers rows which name none.
    """

    name: str | None
    location: str
    package: ExpertPackage
    grammar: Grammar | None


@dataclass(frozen=True)
class OpenExperts:
    """The experts of a job, the directory of the base model that they share, and what workers find that by."""

    experts: tuple[OpenExpert, ...]
    base_path: Path
    base_place: str

    @property
    def default(self) -> OpenExpert | None:
        """The one that answers rows which name none."""
        return next((expert for expert in self.experts if expert.name is None), None)


@dataclass(frozen=True)
class PreparedJob:
    """A job that is ready to run.

    Args:
        config: What was asked for.
        experts: Who answers.
        base_place: Their base model: what `local_base_model` finds on any machine.
        plan: The shards.
        columns: Which column plays which role.
        part_format: How parts are written.
        output: Where they are committed.
        openai: How lines of OpenAI batch files are answered; None where the rows are others.
        kept: The columns that are read and carried along; None for all.
    """

    config: BatchConfig
    experts: tuple[JobExpert, ...]
    base_place: str
    plan: ShardPlan
    columns: ResolvedColumns
    part_format: PartFormat
    output: JobOutput
    openai: OpenAIRules | None = None
    kept: tuple[str, ...] | None = None


def prepare(config: BatchConfig, opened: OpenExperts) -> PreparedJob:
    """Plan the shards and draw up the job's fingerprint. Nothing is written.

    Raises:
        ConfigError: The output lies in the dataset, or a column names experts and there are none.
        DatasetError: The dataset cannot be found or read, or lacks a column.
        OutputError: The output is at a place that cannot hold one.
    """
    is_openai = config.format == "openai"
    plan = plan_shards(
        config.dataset,
        format="jsonl" if config.format == "openai" else config.format,  # lines like any others; workers read on
        shard_rows=config.shard_rows,
        max_decompressed_bytes=config.max_decompressed_bytes,
        hive_partitions=config.hive_partitions and not is_openai,
        storage_options=config.storage_options,
    )
    refuse_nested(config, plan)
    columns = ResolvedColumns() if is_openai else _columns(config, plan)
    kept = _kept(config, plan, columns)
    if kept is not None:
        plan = replace(plan, columns=kept, schema=pa.schema([plan.schema.field(name) for name in kept]))
    experts = tuple(_job_expert(config, expert) for expert in opened.experts)
    fingerprint = job_fingerprint(config, opened, plan, columns)
    openai: OpenAIRules | None = None
    if is_openai:
        part_format = PartFormat(kind="openai", inputs=plan.schema, is_loose=True)
        openai = openai_rules(config, opened, digest_of(fingerprint))
    else:
        part_format = _table_format(config, plan, experts, digest_of(fingerprint))
    output = JobOutput(
        storage=open_storage(config.output, config.storage_options),
        fingerprint=fingerprint,
        kind=part_format.kind,
        num_shards=len(plan.shards),
        prefix=config.output_prefix,
    )
    return PreparedJob(config, experts, opened.base_place, plan, columns, part_format, output, openai, kept)


def _table_format(config: BatchConfig, plan: ShardPlan, experts: Sequence[JobExpert], fingerprint: str) -> PartFormat:
    alone = experts[0] if not config.experts else None
    return plan_part_format(
        plan,
        kind=config.output_format,
        output_prefix=config.output_prefix,
        expert=alone.label if alone else None,
        expert_sha256=alone.sha256 if alone else None,
        metadata={
            FINGERPRINT_METADATA: fingerprint,
            "expert_pipeline.version": __version__,
            "expert_pipeline.expert": ", ".join(expert.label for expert in experts),
            "expert_pipeline.expert_sha256": ", ".join(expert.sha256 for expert in experts),
        },
        compression=config.parquet_compression,
        row_group_rows=config.parquet_row_group_rows,
    )


def openai_rules(config: BatchConfig, opened: OpenExperts, fingerprint: str) -> OpenAIRules:
    """How the lines of OpenAI batch files are answered.

    Args:
        config: The job.
        opened: Its experts. A line's `model` says the name of one of `experts`, or that of the package of `expert`,
            with its version or without.
        fingerprint: The digest of the job's.
    """
    models: dict[str, str] = {}
    default = opened.default
    if default is not None:
        models = dict.fromkeys((default.package.manifest.name, default.package.label), UNNAMED)
    models |= {expert.name: expert.name for expert in opened.experts if expert.name is not None}
    return OpenAIRules(
        models=models,
        otherwise=UNNAMED if config.openai_models == "any" else None,
        digests={engine_name(expert.name): expert.package.digest for expert in opened.experts},
        fingerprint=fingerprint,
        routings={expert.name: expert.package.manifest.routing for expert in opened.experts if expert.name is not None},
    )


def open_experts(config: BatchConfig) -> OpenExperts:
    """Open the packages, find the base model that they share, and check the sampling options.

    Raises:
        ConfigError: The engine holds no experts side by side, or the experts do not go together.
        LoadError: A package or its base model cannot be used, or the base models are several.
        InferenceError: A sampling option cannot be honoured.
    """
    if config.experts and config.engine != "packed":
        raise ConfigError(
            f"the {config.engine} engine holds no experts side by side",
            hint="Leave engine out, or run a job for each expert.",
        )
    cache_dir = None if config.cache_dir is None else Path(config.cache_dir)
    given: dict[str | None, str] = {} if config.expert is None else {None: config.expert}
    opened, bases = [], []
    base_url = next((place for place in (config.base_model, *config.models.values()) if place and is_url(place)), "")
    for name, place in (given | config.experts).items():
        location = absolute(place)
        package = open_package(
            location,
            cache_dir=cache_dir,
            trust=config.trust,
            allow_rollback=config.allow_rollback,
            storage_options=config.storage_options_of(location),
        )
        base = fitting_base_model(
            package,
            base_model=config.base_model,
            models=config.models,
            cache_dir=cache_dir,
            storage_options=config.storage_options_of(base_url),
        )
        bases.append(base)
        _, grammar = request_defaults(package, sampling_options(config))
        opened.append(OpenExpert(name, location, package, grammar))
    if len({base.path.resolve() for base in bases}) > 1:
        raise BaseModelError(
            "the experts of the job are over several base models",
            details=[
                f"{_named(expert)}: {expert.package.label} over {expert.package.base.name}, {base.place}"
                for expert, base in zip(opened, bases, strict=True)
            ],
            hint="Run a job for each base model; experts are answered side by side over one.",
        )
    check_together([expert.package.manifest for expert in opened])
    return OpenExperts(tuple(opened), bases[0].path, bases[0].place)


def _named(expert: OpenExpert) -> str:
    return "expert" if expert.name is None else f"experts.{expert.name}"


def _job_expert(config: BatchConfig, expert: OpenExpert) -> JobExpert:
    options = sampling_options(config) | _grammar_option(config, expert)
    package = expert.package
    return JobExpert(
        expert.name, expert.location, package.digest, package.label, options, routing=package.manifest.routing
    )


def _grammar_option(config: BatchConfig, expert: OpenExpert) -> dict[str, bool]:
    """Whether a grammar is applied, said outright, where no other one is given."""
    if any(name in sampling_options(config) for name in GRAMMAR_KINDS):
        return {}
    return {"use_grammar": expert.grammar is not None}


def _columns(config: BatchConfig, plan: ShardPlan) -> ResolvedColumns:
    template = None if config.prompt_template is None else PromptTemplate.parse(config.prompt_template)
    columns = resolve_columns(config.columns, plan.columns, template)
    if config.experts and columns.expert is None:
        raise DatasetError(
            "experts are given, and the dataset has no column that says which of them answers a row",
            details=[f"its columns are: {', '.join(plan.columns)}"],
            hint="Name the column: columns.expert. Where one expert answers all rows, give it as `expert` alone.",
        )
    if not config.experts and config.columns.expert is not None:
        raise ConfigError(
            f"columns.expert is {config.columns.expert!r}, and there are no experts to choose from",
            hint="Give them by their names: experts: {sql: PACKAGE, ...}.",
        )
    return columns if config.experts else replace(columns, expert=None)


def _kept(config: BatchConfig, plan: ShardPlan, columns: ResolvedColumns) -> tuple[str, ...] | None:
    if config.keep_columns is None:
        return None
    missing = [name for name in config.keep_columns if name not in plan.columns]
    if missing:
        raise DatasetError(
            f"the dataset has no column {', '.join(map(repr, missing))}",
            details=[f"keep_columns: {missing}"],
            hint=f"Name columns that the dataset has: {', '.join(plan.columns[:40])}.",
        )
    template = None if config.prompt_template is None else PromptTemplate.parse(config.prompt_template)
    wanted = columns.names.union(config.keep_columns, template.columns if template is not None else ())
    return tuple(name for name in plan.columns if name in wanted)


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
        path
        for shard in plan.shards
        for path in shard.paths
        if path.startswith(output) and not is_hidden(path.removeprefix(output))
    ]
    if around or inside:
        raise ConfigError(
            f"the output {config.output} lies inside the dataset",
            details=[f"dataset: {place}" for place in (around or inside)[:3]],
            hint="Name an output folder outside the dataset, or one whose name begins with an underscore.",
        )


def job_fingerprint(
    config: BatchConfig, opened: OpenExperts, plan: ShardPlan, columns: ResolvedColumns
) -> dict[str, Any]:
    """Everything the answers depend on, and nothing else: no paths, no times, no number of workers.

    Returns:
        Field to value; the output folder keeps it, and refuses a job with another.
    """
    default = opened.default
    options = sampling_options(config)
    named = {}
    for expert in opened.experts:
        if expert.name is not None:
            described = {"expert": expert.package.label, "expert_sha256": expert.package.digest}
            named[expert.name] = described | _grammar_option(config, expert)
    return {
        **({"openai_models": config.openai_models} if config.format == "openai" else {}),
        "fingerprint_version": FINGERPRINT_VERSION,
        "expert": None if default is None else default.package.label,
        "expert_sha256": None if default is None else default.package.digest,
        **({"experts": named} if named else {}),
        "base_model": ", ".join(sorted({expert.package.base.name for expert in opened.experts})),
        "base_model_sha256": model_digest(opened.base_path),
        "engine": config.engine,
        "dtype": config.dtype or "auto",
        "quantization": config.quantization,
        "columns": {role: name for role, name in asdict(columns).items() if name and role != "expected"},
        **({} if config.keep_columns is None else {"keep_columns": sorted(set(config.keep_columns))}),
        **({} if config.prompt_template is None else {"prompt_template": config.prompt_template}),
        "sampling": options if default is None else options | _grammar_option(config, default),
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
