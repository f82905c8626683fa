"""The validated description of a service: everything it is told, checked once, before anything starts."""

import ipaddress
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from pipeline.config_fields import (
    STRICT,
    DeviceName,
    DtypeName,
    PathText,
    RayQuantity,
    Text,
    check_gpu_number,
    section,
)
from pipeline.config_problems import problems_of
from pipeline.errors import ConfigError
from pipeline.serve.keys import KeysConfig
from pipeline.serve.limits import LimitsConfig

CONFIG_FILE = "configs/serve.yaml"
AUTO = "auto"  # a request's `model` that leaves the choice to us
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._:@/-]{0,127}$"
_HINT = f"correct the keys above; {CONFIG_FILE} in the project lists every one"


class ExpertConfig(BaseModel):
    """One expert of a service."""

    model_config = STRICT

    package: PathText = Field(
        description="Path or URL of the expert package.", json_schema_extra={"expected": "a path or URL of a package"}
    )
    name: Text | None = Field(
        None,
        pattern=_NAME,
        description="What clients call it (`model`); left out, the manifest's name.",
        json_schema_extra={"expected": "at most 128 letters, digits and '._:@/-', the first a letter or digit"},
    )
    pin: bool = Field(False, description="Whether it is loaded at the start and never unloaded.")


class ReplicasConfig(BaseModel):
    """The processes that answer, for each base model."""

    model_config = STRICT

    min: int = Field(1, ge=1, le=1024, description="Replicas there always are.")
    max: int = Field(1, ge=1, le=1024, description="Replicas there are at most, when there is more to do.")
    target_ongoing_requests: float = Field(
        64.0,
        gt=0,
        allow_inf_nan=False,
        description="Requests a replica should have at once; more of them ask for more.",
    )
    max_ongoing_requests: int = Field(
        256, ge=1, description="Requests a replica takes at once; further ones wait at the gateway."
    )
    num_cpus: RayQuantity | None = Field(
        None,
        description="CPU cores reserved for each; left out, 1, and the threads of all cores are shared among them.",
    )
    num_gpus: RayQuantity | None = Field(
        None, description="GPUs of each, a fraction to share one; left out, 1 where the cluster has GPUs, else 0."
    )
    upscale_delay_seconds: float = Field(
        10.0, ge=0, allow_inf_nan=False, description="How long there is too much to do before one is added."
    )
    downscale_delay_seconds: float = Field(
        120.0, ge=0, allow_inf_nan=False, description="How long there is too little to do before one is taken away."
    )
    look_back_seconds: float = Field(
        30.0,
        gt=0,
        allow_inf_nan=False,
        description="Over how long the load is averaged; it is counted three times in that time.",
    )
    drain_seconds: float = Field(
        60.0, ge=0, allow_inf_nan=False, description="How long one that is to end may go on with what it has begun."
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise PydanticCustomError("order", "min is {min} and max is {max}; max is at least min", vars(self))
        return self


class ServeConfig(BaseModel):
    """A service: which experts, where, and what clients may ask for.

    Frozen. `from_options` makes one and raises `ConfigError`; the plain constructor raises pydantic's own error.
    """

    model_config = STRICT

    experts: Annotated[list[ExpertConfig], Field(min_length=1)] = Field(
        description="The experts; those over one base model are answered together in one batch.",
        json_schema_extra={"expected": "a non-empty list of experts, such as `- package: expert-sql.expert`"},
    )
    trust: Literal["any", "signed", "trusted"] = Field(
        "any",
        description="What is asked of a package's signature: nothing, that it has one, or that you trust who signed.",
    )
    allow_rollback: bool = Field(
        False, description="With trust: trusted, take an older version of a package than was opened before."
    )
    base_model: PathText | None = Field(
        None, description="Path, staged URL or Hugging Face id of the base model; left out, the manifests name it."
    )
    models: Annotated[dict[str, PathText], BeforeValidator(section)] = Field(
        default_factory=dict,
        description="Where base models are: from the name in a manifest to a path or Hugging Face id.",
    )
    cache_dir: PathText | None = Field(
        None, description="Folder on each machine for unpacked packages; left out, the user's cache folder."
    )
    storage_options: Annotated[dict[str, Any], BeforeValidator(section)] = Field(
        default_factory=dict,
        description="Options of the storage (fsspec) of packages and base models that are named by a URL, such as an "
        "endpoint. Not for secrets: the environment is.",
    )
    device: DeviceName | None = Field(
        None, description="Device of each replica: cpu, cuda, mps; left out, or auto, the best there is."
    )
    dtype: DtypeName | None = Field(None, description="Number format of the weights; left out, what suits the device.")
    quantization: Literal["int8", "int4", "none"] = Field(
        "none",
        description="Weights of the linear layers in 8 or 4 bits: less memory, and answers that differ a little.",
    )
    num_threads: int | None = Field(
        None, ge=1, description="Threads that a replica computes with on a CPU; left out, its share of the cores."
    )
    batch_size: int | None = Field(
        None,
        ge=1,
        description="At most this many sequences are answered together; left out, 128 on a CPU and 256 on a GPU.",
    )
    max_batch_tokens: int | None = Field(
        None, ge=1, description="At most this many tokens a step; left out, what suits the engine."
    )
    kv_cache_bytes: int | None = Field(
        None, ge=1, description="Memory for keys and values; left out, what the device has to spare."
    )
    max_resident_experts: int = Field(
        32, ge=1, description="Experts whose adapters a replica holds at once; the one not asked for longest goes."
    )
    replicas: Annotated[ReplicasConfig, BeforeValidator(section)] = Field(
        default_factory=ReplicasConfig, description="The processes that answer, for each base model."
    )
    gateways: int = Field(1, ge=1, le=1024, description="Processes that speak HTTP; the limits are those of each.")
    limits: Annotated[LimitsConfig, BeforeValidator(section)] = Field(
        default_factory=LimitsConfig, description="Bounds on requests."
    )
    keys: Annotated[KeysConfig, BeforeValidator(section)] = Field(
        default_factory=KeysConfig, description="Who may ask."
    )
    host: Text = Field("127.0.0.1", description="Address to listen on; beyond this machine only with keys.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 for any free one.")
    log_prompts: bool = Field(False, description="Whether prompts and answers are written to the log.")
    playground: bool = Field(True, description="Whether there is a page to try the experts at /.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_gpu_number(self.device, self.replicas.num_gpus)
        names = Counter(expert.name for expert in self.experts if expert.name is not None)
        twice = [name for name, count in names.items() if count > 1]
        if twice:
            raise PydanticCustomError("names", "two experts are named {names}", {"names": ", ".join(twice)})
        if AUTO in names:
            raise PydanticCustomError("names", "an expert is named {name}, which means any of them", {"name": AUTO})
        num_pinned = sum(expert.pin for expert in self.experts)
        if num_pinned > self.max_resident_experts or (
            num_pinned == self.max_resident_experts and num_pinned < len(self.experts)
        ):
            raise PydanticCustomError(
                "pins",
                "{pinned} experts are pinned, and max_resident_experts {most} leaves no room for the others",
                {"pinned": num_pinned, "most": self.max_resident_experts},
            )
        return self

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Make a configuration from plain values, such as the `args` of a Serve config file.

        Args:
            options: The fields by name.

        Raises:
            ConfigError: An option is unknown, missing or wrong, every one named with what was expected; or the service
                would be open to others than this machine.
        """
        try:
            config = cls.model_validate(options)
        except ValidationError as error:
            problems = problems_of(error, cls, options)
            raise ConfigError(
                "the description of the service is not valid",
                details=[
                    f"{problem.key}: {problem.message}" if problem.key else problem.message for problem in problems
                ],
                hint=_HINT,
            ) from error
        check_exposure(config.host, is_open=not config.keys.load())
        return config


def check_exposure(host: str, *, is_open: bool) -> None:
    """Refuse to listen where others than this machine can ask, without keys.

    Args:
        host: The address to listen on.
        is_open: Whether no key is needed.

    Raises:
        ConfigError: It would.
    """
    if is_open and not is_loopback(host):
        raise ConfigError(
            f"host {host} lets other machines ask, and there are no API keys",
            hint="Set EXPERT_API_KEYS to name=sha256 (or keys.hashes in a configuration), or listen on 127.0.0.1.",
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
