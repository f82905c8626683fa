"""From the description of a service to a Serve application: what `serve run configs/serve.yaml` builds."""

import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import serve

from pipeline.engine.requests import request_defaults
from pipeline.errors import ConfigError
from pipeline.package import ExpertPackage, check_together, fitting_base_model, model_digest, open_package
from pipeline.package.download import is_url
from pipeline.serve.cards import model_card
from pipeline.serve.config import AUTO, ServeConfig, check_exposure
from pipeline.serve.gateway import DRAIN_LOOK_SECONDS, gateway_deployment
from pipeline.serve.messages import ModelCard
from pipeline.serve.replica import ExpertReplica, ReplicaJob, StagedExpert

HEALTH_SECONDS = 5.0
COUNTS_PER_LOOK_BACK = 3  # of what is under way, as Serve's own defaults have it
MOST_STARTS = 3  # of replicas that fail while they start: it is nearly always the configuration


@dataclass(frozen=True)
class ReplicaGroup:
    """The experts over one base model, and what answers for them.

    Args:
        name: Of the Serve deployment.
        job: What its replicas are told.
        num_cpus, num_gpus: What each reserves.
    """

    name: str
    job: ReplicaJob
    num_cpus: float
    num_gpus: float


@dataclass(frozen=True)
class ServicePlan:
    """A service whose packages are verified and whose base models are found; nothing is started."""

    config: ServeConfig
    cards: tuple[ModelCard, ...]
    groups: tuple[ReplicaGroup, ...]


def build(args: dict[str, Any]) -> serve.Application:
    """The application of a Serve config file.

    Args:
        args: The fields of `ServeConfig`.

    Raises:
        ConfigError: They are not valid.
        LoadError: A package or a base model cannot be used.
    """
    return build_application(plan_service(ServeConfig.from_options(args)))


def build_application(plan: ServicePlan) -> serve.Application:
    """Bind the deployments of a plan: a gateway, and for each base model its replicas."""
    check_exposure(_listening_host(plan.config.host), is_open=not plan.config.keys.load())
    replicas: dict[str, serve.Application] = {}
    for group in plan.groups:
        bound = replica_application(plan.config, group)
        replicas |= dict.fromkeys((expert.name for expert in group.job.experts), bound)
    return gateway_deployment(plan.config, plan.cards, replicas)


def replica_application(config: ServeConfig, group: ReplicaGroup) -> serve.Application:
    """The replicas of one base model."""
    replicas = config.replicas
    scale: dict[str, Any] = {"num_replicas": replicas.min}
    if replicas.min < replicas.max:
        scale = {
            "autoscaling_config": {
                "min_replicas": replicas.min,
                "max_replicas": replicas.max,
                "target_ongoing_requests": replicas.target_ongoing_requests,
                "upscale_delay_s": replicas.upscale_delay_seconds,
                "downscale_delay_s": replicas.downscale_delay_seconds,
                "look_back_period_s": replicas.look_back_seconds,
                "metrics_interval_s": replicas.look_back_seconds / COUNTS_PER_LOOK_BACK,
            }
        }
    deployed = serve.deployment(
        name=group.name,
        max_ongoing_requests=replicas.max_ongoing_requests,
        ray_actor_options={"num_cpus": group.num_cpus, "num_gpus": group.num_gpus},
        health_check_period_s=HEALTH_SECONDS,
        graceful_shutdown_timeout_s=replicas.drain_seconds,
        graceful_shutdown_wait_loop_s=DRAIN_LOOK_SECONDS,
        max_constructor_retry_count=MOST_STARTS,
        **scale,
    )
    return deployed(ExpertReplica).bind(group.job)


def plan_service(config: ServeConfig) -> ServicePlan:
    """Open and verify the packages, find their base models, and share the experts out among them.

    Raises:
        ConfigError: Two experts have one name, or they do not go together.
        LoadError: A package or a base model cannot be used.
        InvalidRequestError: A manifest's defaults cannot be honoured.
    """
    cache_dir = None if config.cache_dir is None else Path(config.cache_dir)
    packages: dict[str, ExpertPackage] = {}
    bases: dict[Path, list[StagedExpert]] = defaultdict(list)
    base_places: dict[Path, str] = {}
    for expert in config.experts:
        place = expert.package if is_url(expert.package) else os.path.abspath(expert.package)  # noqa: PTH100
        package = open_package(
            place,
            cache_dir=cache_dir,
            trust=config.trust,
            allow_rollback=config.allow_rollback,
            storage_options=config.storage_options,
        )
        name = expert.name or package.manifest.name
        if name in packages or name == AUTO:
            raise ConfigError(
                f"two experts are named {name}" if name != AUTO else f"an expert is named {AUTO}",
                details=[entry.package for entry in config.experts if entry.name in (name, None)],
                hint="Leave one out, or give it another name in a configuration: experts[].name.",
            )
        request_defaults(package, {})
        base = fitting_base_model(
            package,
            base_model=config.base_model,
            models=config.models,
            cache_dir=cache_dir,
            storage_options=config.storage_options,
        )
        packages[name] = package
        base_places[base.path.resolve()] = base.place
        bases[base.path.resolve()].append(StagedExpert(name, place, package.digest, expert.pin))
    check_together([package.manifest for package in packages.values()])
    cards = tuple(model_card(name, package) for name, package in packages.items())
    return ServicePlan(config, cards, tuple(_groups(config, merge_bases(bases), base_places)))


def merge_bases(bases: Mapping[Path, list[StagedExpert]]) -> dict[Path, list[StagedExpert]]:
    """One entry for each base model, though it may lie at several places: the first of them stands for all."""
    if len(bases) == 1:
        return dict(bases)
    places: dict[str, Path] = {}
    merged: dict[Path, list[StagedExpert]] = defaultdict(list)
    for path, experts in bases.items():
        merged[places.setdefault(model_digest(path), path)] += experts
    return merged


def _groups(
    config: ServeConfig, bases: Mapping[Path, list[StagedExpert]], base_places: Mapping[Path, str]
) -> list[ReplicaGroup]:
    num_gpus = _num_gpus(config)
    num_cpus = 1.0 if config.replicas.num_cpus is None else config.replicas.num_cpus
    groups: list[ReplicaGroup] = []
    for path, experts in bases.items():
        job = ReplicaJob(
            experts=tuple(experts),
            base_place=base_places[path],
            cache_dir=config.cache_dir,
            device=config.device,
            dtype=config.dtype,
            quantization=config.quantization,
            num_threads=config.num_threads or (max(1, int(num_cpus)) if config.replicas.num_cpus is not None else None),
            num_sharing=config.replicas.max * len(bases),
            batch_size=config.batch_size,
            max_batch_tokens=config.max_batch_tokens,
            kv_cache_bytes=config.kv_cache_bytes,
            max_resident=config.max_resident_experts,
            max_prompt_tokens=config.limits.max_prompt_tokens,
            storage_options=config.storage_options,
        )
        taken = {group.name for group in groups}
        name = f"ExpertReplica-{Path(base_places[path]).name[:40]}"
        groups.append(ReplicaGroup(name if name not in taken else f"{name}-{len(groups)}", job, num_cpus, num_gpus))
    return groups


def _num_gpus(config: ServeConfig) -> float:
    """The GPUs of each replica: what is asked for, or one where the cluster has some."""
    if config.replicas.num_gpus is not None:
        return config.replicas.num_gpus
    import ray

    from pipeline.cluster import takes_gpu

    return (
        1.0
        if takes_gpu(config.device) and ray.is_initialized() and ray.cluster_resources().get("GPU", 0.0) >= 1
        else 0.0
    )


def _listening_host(planned: str) -> str:
    """The address that Serve's proxies listen on: of the Serve that runs, whatever our own part of the file says."""
    import ray
    from ray.serve.context import _get_global_client

    if not ray.is_initialized():
        return planned
    client = _get_global_client(raise_if_no_controller_running=False)
    return planned if client is None else str(client.http_config.host or planned)
