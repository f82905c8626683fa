"""From packages and a base model to an engine that answers: the one place that knows which engines there are."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.engine.adapters import AdapterBank
from pipeline.engine.foreign import MEMORY_HINT, memory_told
from pipeline.engine.loader import load_base_model, load_tokenizer, merge_adapter
from pipeline.engine.packed import PackedEngine
from pipeline.engine.padded import PaddedEngine
from pipeline.engine.passing_thread import in_passing_thread
from pipeline.engine.quantization import check_quantization, quantize
from pipeline.engine.requests import RequestBuilder, request_defaults
from pipeline.engine.residents import ResidentExperts
from pipeline.engine.soft_prompts import load_soft_prompts
from pipeline.errors import AdapterError, ConfigError, TokenizerError
from pipeline.package import ExpertPackage

EngineName = Literal["packed", "padded"]
ENGINES: tuple[EngineName, ...] = ("packed", "padded")
NO_ROOM = "there is too little memory on the device for the engine"
ROOM_HINT = f"Lower kv_cache_bytes or batch_size. {MEMORY_HINT}"


@dataclass(frozen=True)
class LoadedExpert:
    """One expert on one device."""

    engine: PackedEngine | PaddedEngine
    requests: RequestBuilder
    device: str
    dtype: str


@dataclass(frozen=True)
class LoadedExperts:
    """Several experts over one base model on one device; `requests` builds those of each, by name."""

    engine: PackedEngine
    requests: Mapping[str, RequestBuilder]


@in_passing_thread
@memory_told(NO_ROOM, hint=ROOM_HINT)
def load_expert(
    package: ExpertPackage,
    base_path: Path,
    *,
    engine: EngineName = "packed",
    device: str | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
    batch_size: int | None = None,
    max_batch_tokens: int | None = None,
    kv_cache_bytes: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> LoadedExpert:
    """Load a package over its base model. Its adapter is merged, so that it runs at the base's speed.

    Args:
        package: The expert.
        base_path: The base model's directory.
        engine: `"packed"`, or `"padded"` for a model that the packed one refuses.
        device: `"cpu"`, `"cuda"`, `"cuda:1"`, `"mps"`, or None for the best there is.
        dtype: `"float32"`, `"bfloat16"`, `"float16"`, or None to choose by device and checkpoint.
        quantization: `"int8"`, `"int4"` or None, for the weights of the linear layers with the adapter merged in.
        batch_size: At most this many sequences are answered together; None for what suits the device.
        max_batch_tokens: At most this many tokens a step (packed) or batch (padded); None for what suits the engine.
        kv_cache_bytes: Memory for keys and values (packed); None for what the device has to spare.
        options: Options for every request; see `RequestBuilder`.

    Raises:
        LoadError: The package or the base model cannot be used, or not by this engine.
        ConfigError: The engine, device, dtype or quantization is unknown or not there.
        MissingDependencyError: torchao is not installed, and this quantization needs it.
        InvalidRequestError: An option has a wrong value.
        OutOfMemoryError: They do not fit the device's memory.
    """
    _check_engine(engine)
    kind = check_quantization(quantization)
    request_defaults(package, options or {})  # a mistake in them is told before the model is loaded
    soft_prompts = load_soft_prompts(package)
    if soft_prompts and engine == "padded":
        raise AdapterError(
            f"{package.label} has soft prompts, which the padded engine does not apply", hint='Use engine "packed".'
        )
    base = load_base_model(base_path, device=device, dtype=dtype)
    tokenizer = load_tokenizer(package, base_path)
    _check_tokenizer(tokenizer, package.label, int(base.model.config.get_text_config().vocab_size))
    base = quantize(merge_adapter(base, package), kind)
    made: PackedEngine | PaddedEngine
    positions: dict[str, tuple[int, ...]] = {}
    if engine == "packed":
        made = PackedEngine(
            base,
            tokenizer,
            batch_size=batch_size,
            max_batch_tokens=max_batch_tokens,
            kv_cache_bytes=kv_cache_bytes,
        )
        positions = {name: made.add_soft_prompt(prompt) for name, prompt in soft_prompts.items()}
    else:
        made = PaddedEngine(base, tokenizer, batch_size=batch_size, max_batch_tokens=max_batch_tokens or 16384)
    requests = RequestBuilder(package, tokenizer, base.context_length, options, soft_prompts=positions)
    if requests.grammar is not None:
        made.check_grammar(requests.grammar)
    return LoadedExpert(
        engine=made,
        requests=requests,
        device=str(base.device),
        dtype=str(base.dtype).removeprefix("torch."),
    )


def load_experts(
    packages: Mapping[str, ExpertPackage],
    base_path: Path,
    *,
    device: str | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
    batch_size: int | None = None,
    max_batch_tokens: int | None = None,
    kv_cache_bytes: int | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> LoadedExperts:
    """Load experts of any kinds over one base model, to be answered side by side in one batch.

    Args:
        packages: The experts, by the names they shall have.
        base_path: The base model's directory, with a tokenizer.
        device, dtype, quantization, batch_size, max_batch_tokens, kv_cache_bytes: As for `load_expert`.
        options: Options for every request of an expert, by its name; see `RequestBuilder`.

    Raises:
        As `load_expert`.
        TokenizerError: A package brings another vocabulary than the base model's.
    """
    experts = open_experts(
        packages,
        base_path,
        device=device,
        dtype=dtype,
        quantization=quantization,
        batch_size=batch_size,
        max_batch_tokens=max_batch_tokens,
        kv_cache_bytes=kv_cache_bytes,
        options=options,
    )
    requests = {name: experts.load(name) for name in packages}
    return LoadedExperts(experts.engine, requests)


def open_experts(
    packages: Mapping[str, ExpertPackage],
    base_path: Path,
    *,
    max_resident: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
    batch_size: int | None = None,
    max_batch_tokens: int | None = None,
    kv_cache_bytes: int | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> ResidentExperts:
    """Load a base model for experts that are themselves loaded when they are first asked.

    Args:
        packages: The experts, by the names they shall have.
        base_path: The base model's directory, with a tokenizer.
        max_resident: At most this many adapters are on the device at a time; None for all.
        device, dtype, quantization, batch_size, max_batch_tokens, kv_cache_bytes: As for `load_expert`.
        options: Options for every request of an expert, by its name; see `RequestBuilder`.

    Raises:
        As `load_expert`.
    """
    engine = load_engine(
        base_path,
        max_resident=max_resident,
        device=device,
        dtype=dtype,
        quantization=quantization,
        batch_size=batch_size,
        max_batch_tokens=max_batch_tokens,
        kv_cache_bytes=kv_cache_bytes,
    )
    if not isinstance(engine, PackedEngine):
        raise TypeError("experts side by side need the packed engine")
    return ResidentExperts(engine, packages, max_resident=max_resident, options=options)


@in_passing_thread
@memory_told(NO_ROOM, hint=ROOM_HINT)
def load_engine(
    base_path: Path,
    packages: Mapping[str, ExpertPackage] | None = None,
    *,
    engine: EngineName = "packed",
    max_resident: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
    batch_size: int | None = None,
    max_batch_tokens: int | None = None,
    kv_cache_bytes: int | None = None,
    use_triton: bool | None = None,
) -> PackedEngine | PaddedEngine:
    """Load a base model and any number of experts over it, side by side; a request names its expert.

    Args:
        base_path: The base model's directory, with a tokenizer.
        packages: The experts, by the names that requests give; a request without one gets the base model's answer.
        max_resident: At most this many adapters are on the device at a time; None for all.
        engine, device, dtype, quantization, batch_size, max_batch_tokens, kv_cache_bytes: As for `load_expert`.
        use_triton: On a GPU, whether to compute by kernels of Triton (packed); None for where they work.

    Raises:
        As `load_expert`; and ConfigError for experts over the padded engine, which holds one merged expert only.
    """
    _check_engine(engine)
    kind = check_quantization(quantization)
    base = quantize(load_base_model(base_path, device=device, dtype=dtype), kind)
    tokenizer = load_tokenizer(None, base_path)
    if engine == "padded":
        if packages:
            raise ConfigError("the padded engine holds no experts side by side", hint='Use engine "packed".')
        return PaddedEngine(base, tokenizer, batch_size=batch_size, max_batch_tokens=max_batch_tokens or 16384)
    made = PackedEngine(
        base,
        tokenizer,
        bank=AdapterBank(base, max_adapters=max_resident),
        batch_size=batch_size,
        max_batch_tokens=max_batch_tokens,
        kv_cache_bytes=kv_cache_bytes,
        use_triton=use_triton,
    )
    for name, package in (packages or {}).items():
        if made.bank is not None:
            made.bank.load(name, package)
    return made


def _check_engine(engine: str) -> None:
    if engine not in ENGINES:
        raise ConfigError(f"engine {engine!r} is unknown", hint=f"Use {' or '.join(ENGINES)}.")


def _check_tokenizer(tokenizer: Any, label: str, vocab_size: int) -> None:
    if len(tokenizer) > vocab_size:
        raise TokenizerError(
            f"the tokenizer of {label} has {len(tokenizer):,} tokens and the base model {vocab_size:,}",
            hint="Pack the tokenizer that belongs to the base model.",
        )
