"""The validated job description: everything a batch job is told, checked once, before anything starts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from pipeline.batch.sampling_config import SamplingColumnsConfig, SamplingConfig
from pipeline.config_fields import STRICT, DtypeName, PathText, RayQuantity, Text, path_text, section
from pipeline.config_problems import nearest, printable, problems_of
from pipeline.errors import ConfigError, DatasetError

MAX_SEED = (1 << 64) - 1


def _path_texts(value: Any) -> Any:
    return [path_text(item) for item in value] if isinstance(value, list | tuple) else path_text(value)


class ColumnsConfig(BaseModel):
    """Which column of the dataset plays which role.

    A role that is left out takes the column of its own name, when the dataset has one.
    """

    model_config = STRICT

    prompt: Text | None = Field(None, description="Column with the prompt, a string.")
    messages: Text | None = Field(
        None, description="Column with a chat: a list of {role, content}, or that list as JSON."
    )
    id: Text | None = Field(
        None, description="Column with the row's identity; without it, the row's place in the dataset."
    )
    schema_: Text | None = Field(
        None, alias="schema", description="Column with a database schema for the system message."
    )
    system: Text | None = Field(None, description="Column with the system message.")
    dialect: Text | None = Field(
        None, description="Column with the dialect that goes with the schema, such as postgres."
    )
    expected: Text | None = Field(None, description="Column with the right answer, to be compared with the given one.")
    sampling: Annotated[SamplingColumnsConfig, BeforeValidator(section)] = Field(
        default_factory=SamplingColumnsConfig, description="Columns with a row's own sampling options."
    )


_OPENAI_TAKES: Mapping[str, tuple[Any, ...]] = {
    "output_format": (None, "openai"),
    "output_prefix": ("",),
    "columns": (ColumnsConfig(),),
}


class BatchConfig(BaseModel):
    """A batch job: which rows, which expert, where to, and how.

    Frozen. `from_options` and `config_file.load_config` make one and raise `ConfigError`; the plain constructor raises
    pydantic's own error.
    """

    model_config = STRICT

    dataset: PathText | Annotated[list[PathText], Field(min_length=1), BeforeValidator(_path_texts)] = Field(
        description="Path, glob pattern or URL of the input files, or a list of them.",
        json_schema_extra={"expected": "a path, glob pattern or URL, or a list of them"},
    )
    format: Literal["parquet", "jsonl", "csv", "openai"] | None = Field(
        None,
        description="Format of the input files; left out, their file names tell. openai: batch files of OpenAI's API.",
    )
    expert: PathText = Field(
        description="Path or URL of the expert package.", json_schema_extra={"expected": "a path or URL of a package"}
    )
    base_model: PathText | None = Field(
        None, description="Path or Hugging Face id of the base model; left out, the package's manifest names it."
    )
    models: Annotated[dict[str, PathText], BeforeValidator(section)] = Field(
        default_factory=dict,
        description="Where base models are: from the name in a manifest to a path or Hugging Face id.",
    )
    output: PathText = Field(
        description="Folder or URL that receives the answers.", json_schema_extra={"expected": "a folder or URL"}
    )
    output_format: Literal["parquet", "jsonl", "openai"] | None = Field(
        None, description="Format of the answers; left out, that of the input (Parquet for CSV)."
    )
    openai_models: Literal["named", "any"] = Field(
        "named",
        description="Which `model` the lines of an OpenAI batch file may name: the expert, or any, which it answers.",
    )
    output_prefix: str = Field(
        "",
        max_length=100,
        pattern=r"^([A-Za-z0-9_][A-Za-z0-9._-]*)?$",
        description="Put before the names of the columns we add, when the dataset has columns of those names.",
        json_schema_extra={
            "expected": "a string of at most 100 letters, digits, '.', '_' and '-', the first no '.' or '-'"
        },
    )
    columns: Annotated[ColumnsConfig, BeforeValidator(section)] = Field(
        default_factory=ColumnsConfig, description="Which column of the dataset plays which role."
    )
    sampling: Annotated[SamplingConfig, BeforeValidator(section)] = Field(
        default_factory=SamplingConfig, description="How tokens are chosen; what is left out, the package decides."
    )
    seed: int = Field(
        0, ge=0, le=MAX_SEED, description="Seed of the job; a row's draws depend on it and on the row alone."
    )
    shard_rows: int = Field(
        256, ge=1, le=1_000_000, description="Rows in a shard: the unit that is retried, and one file of the output."
    )
    num_workers: int | None = Field(
        None, ge=1, description="Workers; left out, one for each GPU of the cluster, or one where there is none."
    )
    num_gpus: RayQuantity | None = Field(
        None,
        description="GPUs of each worker, a fraction to share one; left out, 1 where the cluster has GPUs, else 0.",
    )
    num_cpus: RayQuantity | None = Field(
        None, description="CPU cores reserved for each worker; left out, Ray's own default."
    )
    engine: Literal["packed", "padded"] = Field(
        "packed", description="What computes: packed is fast; padded runs models that packed refuses."
    )
    batch_size: int = Field(128, ge=1, description="At most this many sequences are answered together.")
    max_batch_tokens: int | None = Field(
        None,
        ge=1,
        description="At most this many tokens a step (packed) or batch (padded); left out, what suits the engine.",
    )
    kv_cache_bytes: int | None = Field(
        None, ge=1, description="Memory for keys and values (packed); left out, what the device has to spare."
    )
    device: Text | None = Field(
        None, description="Device of each worker, such as cuda or cpu; left out, the best there is."
    )
    dtype: DtypeName | None = Field(None, description="Number format of the weights; left out, what suits the device.")
    quantization: Literal["int8", "int4", "none"] = Field(
        "none", description="Weights of the linear layers in 8 or 4 bits: less memory; answers may differ a little."
    )
    cache_dir: PathText | None = Field(
        None,
        description="Folder on each machine for unpacked packages and downloads; left out, the user's cache folder.",
    )
    storage_options: Annotated[dict[str, Any], BeforeValidator(section)] = Field(
        default_factory=dict,
        description="Options of the storage (fsspec), such as an endpoint. Not for secrets: the environment is.",
    )
    ray_address: Text | None = Field(
        None,
        description="Ray cluster to join; left out, that of RAY_ADDRESS or a running one, else one is started here.",
    )
    progress_seconds: float = Field(
        5.0, gt=0, allow_inf_nan=False, description="Seconds between two progress lines in a log."
    )

    @field_validator("output_format", "output_prefix", "columns")
    @classmethod
    def _fits_batch_files(cls, value: Any, info: ValidationInfo) -> Any:
        if info.data.get("format") == "openai" and value not in _OPENAI_TAKES[str(info.field_name)]:
            raise PydanticCustomError("format", "not for format openai, whose lines have a form of their own")
        return value

    @field_validator("output_format", "openai_models")
    @classmethod
    def _needs_batch_files(cls, value: Any, info: ValidationInfo) -> Any:
        if info.data.get("format", "openai") != "openai" and value in ("openai", "any"):
            raise PydanticCustomError("format", "only for format openai")
        return value

    @classmethod
    def from_options(cls, **options: Any) -> Self:
        """Make a configuration from keyword arguments.

        Args:
            options: The fields by name; `columns` and `sampling` as mappings or objects, paths as strings or `Path`s.

        Raises:
            ConfigError: An option is unknown, missing or wrong; every one is named, with what was expected.
        """
        try:
            return cls.model_validate(options)
        except ValidationError as error:
            problems = problems_of(error, cls, options)
            raise ConfigError(
                "the options of the batch job are not valid",
                details=[f"{problem.key}: {problem.message}" for problem in problems],
                hint="correct the options above; configs/batch.yaml in the project lists every one",
            ) from error


@dataclass(frozen=True)
class ResolvedColumns:
    """The dataset's column for each role; None where it has none.

    At least one of prompt and messages is there, but for the lines of OpenAI batch files, which have no columns.
    """

    prompt: str | None = None
    messages: str | None = None
    id: str | None = None
    schema: str | None = None
    system: str | None = None
    dialect: str | None = None
    expected: str | None = None
    sampling: Mapping[str, str] = field(default_factory=dict)


_BATCH_FILE_KEYS = {"custom_id", "url", "body"}
_BATCH_FILE_HINT = "these look like lines of an OpenAI batch file: set format: openai"
_PROMPT_HINT = "say which column holds the prompts: columns.prompt or columns.messages"


def resolve_columns(columns: ColumnsConfig, available: Sequence[str]) -> ResolvedColumns:
    """Find the column for each role.

    A role without a name takes the column of its own name, if there is one; a sampling option takes none. When only
    one of prompt and messages is named, the other takes none: the named one is meant.

    Args:
        columns: The names a person gave.
        available: The names of the dataset's columns.

    Raises:
        DatasetError: A named column is not in the dataset, or there is neither a prompt nor a messages column.
    """
    named: Mapping[str, str | None] = columns.model_dump(by_alias=True, exclude={"sampling"})
    options: dict[str, str] = columns.sampling.model_dump(exclude_none=True)
    wanted = [*named.items(), *((f"sampling.{option}", name) for option, name in options.items())]
    missing = [(role, name) for role, name in wanted if name is not None and name not in available]
    if missing:
        raise DatasetError(
            f"the dataset has no column {', '.join(repr(name) for _, name in missing)}",
            details=[f"columns.{role}: {_no_column(name, available)}" for role, name in missing],
            hint=f"name columns that the dataset has: {_listed(available)}",
        )
    found = {role: name or (role if role in available else None) for role, name in named.items()}
    for role, other in (("prompt", "messages"), ("messages", "prompt")):
        if named[role] is not None and named[other] is None:
            found[other] = None
    if found["prompt"] is None and found["messages"] is None:
        raise DatasetError(
            "the dataset has neither a column `prompt` nor a column `messages`",
            details=[f"its columns are: {_listed(available)}"],
            hint=_BATCH_FILE_HINT if set(available) >= _BATCH_FILE_KEYS else _PROMPT_HINT,
        )
    return ResolvedColumns(**found, sampling=options)


def _no_column(name: str, available: Sequence[str]) -> str:
    match = nearest(name, available)
    near = f"; did you mean {match!r}?" if match is not None else ""
    return f"no column {name!r}{near}"


def _listed(names: Sequence[str], most: int = 40) -> str:
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return ", ".join([*(printable(name) for name in names[:most]), *more]) or "none"
