"""The validated job description: everything a batch job is told, checked once, before anything starts."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from pipeline.batch.compression import MAX_DECOMPRESSED_BYTES
from pipeline.batch.sampling_config import SamplingColumnsConfig, SamplingConfig
from pipeline.batch.template import PromptTemplate
from pipeline.config_fields import (
    STRICT,
    DeviceName,
    DtypeName,
    PathText,
    RayQuantity,
    Text,
    check_gpu_number,
    path_text,
    section,
)
from pipeline.config_problems import problems_of
from pipeline.errors import ConfigError
from pipeline.package.download import same_protocol

MAX_SEED = (1 << 64) - 1


def _path_texts(value: Any) -> Any:
    return [path_text(item) for item in value] if isinstance(value, list | tuple) else path_text(value)


def _checked_template(value: str) -> str:
    try:
        PromptTemplate.parse(value)
    except ConfigError as error:
        raise PydanticCustomError(
            "prompt_template", "{problem}", {"problem": f"{error.message}; {error.hint}"}
        ) from error
    return value


PromptText = Annotated[str, AfterValidator(_checked_template)]


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
    expert: Text | None = Field(None, description="Column with the name of the expert, of `experts`, that answers.")
    sampling: Annotated[SamplingColumnsConfig, BeforeValidator(section)] = Field(
        default_factory=SamplingColumnsConfig, description="Columns with a row's own sampling options."
    )


_OPENAI_TAKES: Mapping[str, tuple[Any, ...]] = {
    "prompt_template": (None,),
    "keep_columns": (None,),
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
    format: Literal["parquet", "jsonl", "csv", "arrow", "openai"] | None = Field(
        None,
        description="Format of the input files; left out, their file names tell. openai: batch files of OpenAI's API.",
    )
    hive_partitions: bool = Field(
        True, description="Whether directories named key=value below the dataset's root become columns."
    )
    max_decompressed_bytes: int = Field(
        MAX_DECOMPRESSED_BYTES,
        ge=1,
        description="What one JSONL or CSV file that is compressed by gzip or zstd may unpack to.",
    )
    prompt_template: PromptText | None = Field(
        None,
        description="The prompt, with names of columns in braces, in place of a prompt column: 'Q: {question}'.",
        json_schema_extra={"expected": "a text with names of columns in braces"},
    )
    keep_columns: list[Text] | None = Field(
        None, description="Columns carried to the answers beside those with a role, and read at all; left out, all."
    )
    experts: Annotated[dict[Text, PathText], BeforeValidator(section)] = Field(
        default_factory=dict,
        description="Experts that rows name in a column, over one base model: from the name to a path or URL.",
    )
    expert: PathText | None = Field(
        None,
        validate_default=True,
        description="Path or URL of the expert package; beside `experts`, that of the rows that name none.",
        json_schema_extra={"expected": "a path or URL of a package"},
    )
    trust: Literal["any", "signed", "trusted"] = Field(
        "any",
        description="What is asked of a package's signature: nothing, that it has one, or that you trust who signed.",
    )
    allow_rollback: bool = Field(
        False, description="With trust: trusted, take an older version of a package than was opened before."
    )
    base_model: PathText | None = Field(
        None,
        description="Path, staged URL or Hugging Face id of the base model; left out, the package's manifest names it.",
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
        description="Which `model` the lines of an OpenAI batch file may name: an expert's, or any: `expert` answers.",
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
    max_workers: int | None = Field(
        None, ge=1, description="Workers are added up to this many while shards wait; left out, there are num_workers."
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
    batch_size: int | None = Field(
        None,
        ge=1,
        description="At most this many sequences are answered together; left out, 128 on a CPU and 256 on a GPU.",
    )
    shards_in_flight: int | None = Field(
        None,
        ge=1,
        le=64,
        description="Shards that a worker answers at a time; left out, 2 to 8, as many as keep its batch full.",
    )
    prepare: Literal["auto", "tasks", "worker"] = Field(
        "auto",
        description="Who templates and tokenises rows: tasks beside the workers, or the worker; auto: tasks where "
        "workers have GPUs.",
    )
    max_batch_tokens: int | None = Field(
        None,
        ge=1,
        description="At most this many tokens a step (packed) or batch (padded); left out, what suits the engine.",
    )
    kv_cache_bytes: int | None = Field(
        None, ge=1, description="Memory for keys and values (packed); left out, what the device has to spare."
    )
    device: DeviceName | None = Field(
        None, description="Device of each worker: cpu, cuda, mps; left out, or auto, the best there is."
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
    package_storage_options: dict[str, Any] | None = Field(
        None,
        description="The same for the storage of packages and the base model; left out, storage_options, where its URL "
        "has the protocol of the dataset or the output.",
    )
    ray_address: Text | None = Field(
        None,
        description="Ray cluster to join; left out, that of RAY_ADDRESS or a running one, else one is started here.",
    )
    overwrite: bool = Field(
        False, description="Replace an output that belongs to another job; one of this job is continued all the same."
    )
    retry_errors: bool = Field(
        False, description="Answer again the rows of the output that have an error. Not for format openai."
    )
    lease_seconds: float = Field(
        60.0,
        ge=1,
        le=3600,
        allow_inf_nan=False,
        description="A driver that shows no sign of life for so many seconds may be replaced by another.",
    )
    parquet_compression: Literal["zstd", "snappy", "gzip", "lz4", "none"] = Field(
        "zstd", description="Compression of Parquet answers."
    )
    parquet_row_group_rows: int | None = Field(
        None, ge=1, description="Rows in a row group of Parquet answers; left out, all rows of a shard."
    )
    progress_seconds: float = Field(
        5.0, gt=0, allow_inf_nan=False, description="Seconds between two progress lines in a log."
    )
    price_per_hour: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="What the job's machines cost an hour, together; for the report."
    )
    max_errors: int | None = Field(
        None, ge=0, description="The job stops when more rows than this have errors; left out, it never does."
    )
    max_error_rate: float | None = Field(
        None,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="The job stops when more than this share of the rows has errors, judged from 100 rows on.",
    )
    progress_timeout: float = Field(
        600.0,
        gt=0,
        allow_inf_nan=False,
        description="A worker that has rows to answer and does nothing for so many seconds is ended and replaced.",
    )

    def storage_options_of(self, place: str) -> dict[str, Any]:
        """The options for a package, or a base model, at some place."""
        if self.package_storage_options is not None:
            return self.package_storage_options
        known = [self.output, *([self.dataset] if isinstance(self.dataset, str) else self.dataset)]
        return self.storage_options if any(same_protocol(place, other) for other in known) else {}

    @field_validator("expert")
    @classmethod
    def _some_expert(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None and info.data.get("experts") == {}:
            raise PydanticCustomError("missing", "Field required")
        return value

    @field_validator("max_workers")
    @classmethod
    def _not_fewer(cls, value: int | None, info: ValidationInfo) -> int | None:
        fewest = info.data.get("num_workers") or 1
        if value is not None and value < fewest:
            raise PydanticCustomError("max_workers", f"expected at least num_workers, which is {fewest}, got {value}")
        return value

    @field_validator("prompt_template", "keep_columns", "output_format", "output_prefix", "columns")
    @classmethod
    def _fits_batch_files(cls, value: Any, info: ValidationInfo) -> Any:
        if info.data.get("format") == "openai" and value not in _OPENAI_TAKES[str(info.field_name)]:
            raise PydanticCustomError("format", "not for format openai, whose lines have a form of their own")
        return value

    @field_validator("retry_errors")
    @classmethod
    def _not_of_batch_files(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("format") == "openai":
            raise PydanticCustomError(
                "format", "not for format openai: give the lines to be asked again in a file of their own"
            )
        return value

    @field_validator("device")
    @classmethod
    def _is_a_workers_own(cls, value: str | None, info: ValidationInfo) -> str | None:
        check_gpu_number(value, info.data.get("num_gpus"))
        return value

    @field_validator("openai_models")
    @classmethod
    def _some_expert_answers_any(cls, value: str, info: ValidationInfo) -> str:
        if value == "any" and info.data.get("expert", "") is None:
            raise PydanticCustomError("openai_models", "any needs `expert`, which answers for the other models")
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
