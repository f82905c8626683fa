"""From directories to ready modules: base model, adapter, tokenizer, on the right device in the right dtype."""

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from pipeline.engine.devices import choose_device
from pipeline.engine.foreign import foreign_errors_as
from pipeline.engine.memory import page_out
from pipeline.errors import AdapterError, BaseModelError, ConfigError, TokenizerError
from pipeline.package import ExpertPackage
from pipeline.package.base_model import TOKENIZER_FILES

logger = logging.getLogger(__name__)

BYTES_PER_THREAD = 16 << 20  # of weights: with less, a thread waits for the others longer than it computes
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class BaseModel:
    """A causal language model on its device, ready for inference."""

    model: Any
    device: torch.device
    dtype: torch.dtype
    eos_token_ids: frozenset[int]
    context_length: int
    quantization: str | None = None  # of the linear layers' weights


def choose_dtype(device: torch.device, dtype: str | None, stored: torch.dtype) -> torch.dtype:
    """The dtype asked for; else the checkpoint's own where the device computes fast in it; else float32.

    Args:
        device: Where the model will run.
        dtype: `"float32"`, `"bfloat16"`, `"float16"`, or None to choose.
        stored: The dtype of the checkpoint. Unasked it is never changed to another half-precision one.

    Raises:
        ConfigError: The name is unknown.
    """
    if dtype is not None:
        if dtype not in DTYPES:
            raise ConfigError(f"dtype {dtype!r} is unknown", hint=f"Use {', '.join(DTYPES)}.")
        return DTYPES[dtype]
    return stored if _is_fast(device, stored) else torch.float32


def _is_fast(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type == "cuda":
        return dtype == torch.float16 or (dtype == torch.bfloat16 and torch.cuda.is_bf16_supported(False))
    if device.type == "cpu" and dtype == torch.bfloat16:
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return False


def useful_threads(base_path: Path, most: int) -> int:
    """How many threads of a CPU a model is computed with: those of a small one wait longer than they compute.

    Measured on two cores with the demo's 8 MB: 165 rows a second with one thread, 143 with two.

    Args:
        base_path: The model's directory.
        most: The cores there are for it.
    """
    num_bytes = sum(file.stat().st_size for file in base_path.glob("*.safetensors"))
    return max(1, min(most, num_bytes // BYTES_PER_THREAD))


def placement(path: Path, *, device: str | None = None, dtype: str | None = None) -> tuple[str, str]:
    """The device and the dtype that `load_base_model` would choose, by name.

    Raises:
        As `load_base_model`, where the configuration says it.
    """
    chosen = choose_device(device)
    precision = choose_dtype(chosen, dtype, _stored_dtype(_read_config(path)))
    index = "" if chosen.type != "cuda" else f":{chosen.index or 0}"
    return f"{chosen.type}{index}", str(precision).removeprefix("torch.")


def _read_config(path: Path) -> Any:
    from transformers import AutoConfig

    with _loading(path):
        return AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)


def _stored_dtype(config: Any) -> torch.dtype:
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def _loading(path: Path) -> AbstractContextManager[None]:
    return foreign_errors_as(
        BaseModelError,
        f"the base model in {path} cannot be loaded",
        hint="Use a directory that AutoModelForCausalLM loads: config.json and safetensors, no custom code.",
    )


def load_base_model(path: Path, *, device: str | None = None, dtype: str | None = None) -> BaseModel:
    """Load a base model from its directory. No code from it is run, and no pickle is opened.

    Raises:
        BaseModelError: The directory does not hold a causal language model that transformers can load.
        OutOfMemoryError: It does not fit the device's memory.
        ConfigError: The device or dtype is unknown or not there.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    chosen = choose_device(device)
    config = _read_config(path)
    precision = choose_dtype(chosen, dtype, _stored_dtype(config))
    with _loading(path), _quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=precision,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        # transformers would draw these weights at random and go on.
        raise BaseModelError(
            f"the base model in {path} lacks weights",
            details=[*missing[:8], *([f"and {len(missing) - 8} more"] if len(missing) > 8 else [])],
            hint="Fetch the model again: a safetensors file is missing or is another model's.",
        )
    context_length = _context_length(config, path)
    eos = model.generation_config.eos_token_id
    eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    # The checkpoint's generation settings (Qwen3's draw at temperature 0.6) are not the expert's.
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=model.generation_config.pad_token_id)
    with _loading(path):
        model.eval().requires_grad_(False).to(chosen)
    logger.info("loaded %s on %s in %s", path.name, chosen, precision)
    return BaseModel(model, chosen, precision, frozenset(eos_ids), context_length)


def read_context_length(path: Path) -> int:
    """Tokens that a base model's context holds, from its directory alone.

    Raises:
        BaseModelError: The directory holds no model's configuration, or one that does not say it.
    """
    return _context_length(_read_config(path), path)


def _context_length(config: Any, path: Path) -> int:
    context_length = getattr(config, "max_position_embeddings", None)
    if not isinstance(context_length, int):
        raise BaseModelError(
            f"config.json in {path} does not say how long a context the model has",
            hint="Add max_position_embeddings to it.",
        )
    return context_length


def merge_adapter(base: BaseModel, package: ExpertPackage) -> BaseModel:
    """Merge a package's adapter into the base model's weights, so that it runs at the base's speed.

    The base is changed in place; use the returned model from then on.

    Raises:
        AdapterError: The adapter does not fit the base: keys missing or left over, shapes or values wrong.
    """
    with _quiet():
        adapted = with_peft(base.model, package)
    _load_weights(adapted, package)
    _page_out_when_merged(adapted)
    with foreign_errors_as(
        AdapterError,
        f"the adapter of {package.label} cannot be merged into the base model",
        hint="Train or export the adapter again: with it the weights of the model are not finite, or of another shape.",
    ):
        merged = adapted.merge_and_unload(safe_merge=True)
    merged.eval().requires_grad_(False)
    return replace(base, model=merged)


def _page_out_when_merged(adapted: Any) -> None:
    """Give a layer's old weight back as soon as there is the merged one, so that they are never all there twice."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in adapted.modules():
        weight = getattr(layer.get_base_layer(), "weight", None) if isinstance(layer, BaseTunerLayer) else None
        if isinstance(weight, torch.Tensor):
            page_out(weight)  # the making of the layer has read it
            layer.merge = _then_page_out(layer, weight.data)


def _then_page_out(layer: Any, weight: torch.Tensor) -> Callable[..., None]:
    def run(*args: Any, **kwargs: Any) -> None:
        del layer.merge  # this function, of the object; the class's comes forth
        layer.merge(*args, **kwargs)
        page_out(weight)

    return run


def peft_config(package: ExpertPackage) -> Any:
    """The PEFT configuration of a package's adapter, built from checked fields only."""
    import peft

    kinds = {
        "lora": peft.LoraConfig,
        "dora": peft.LoraConfig,
        "ia3": peft.IA3Config,
        "lokr": peft.LoKrConfig,
        "adalora": peft.AdaLoraConfig,
    }
    adapter = package.adapter
    with foreign_errors_as(
        AdapterError,
        f"adapter_config.json of {package.label} is refused by PEFT",
        hint="Export the adapter again with the installed version of PEFT.",
    ):
        return kinds[adapter.kind](inference_mode=True, task_type="CAUSAL_LM", **adapter.to_peft_kwargs())


def with_peft(model: Any, package: ExpertPackage, **options: Any) -> Any:
    """The model with PEFT's layers for a package's adapter put into it, in place.

    Args:
        model: A causal language model.
        package: Whose adapter it gets.
        options: For `peft.get_peft_model`.

    Raises:
        AdapterError: The model has no module that the adapter changes, or one that PEFT cannot adapt.
    """
    from peft import get_peft_model

    with _fitting(package):
        return get_peft_model(model, peft_config(package), **options)


def _fitting(package: ExpertPackage) -> AbstractContextManager[None]:
    return foreign_errors_as(
        AdapterError,
        f"the adapter of {package.label} does not fit the base model",
        hint="Check that base_model is the one the expert was trained on.",
    )


def load_tokenizer(package: ExpertPackage | None, base_path: Path) -> Any:
    """The package's own tokenizer, or the base model's where the package brings none.

    Raises:
        TokenizerError: It cannot be loaded, or has no chat template.
    """
    from transformers import AutoTokenizer

    source = (None if package is None else package.tokenizer_dir) or base_path
    with foreign_errors_as(
        TokenizerError,
        f"the tokenizer in {source} cannot be loaded",
        hint="The package or the base model needs tokenizer.json and tokenizer_config.json, without custom code.",
    ):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=True)
    if not tokenizer.chat_template:
        raise TokenizerError(
            f"the tokenizer in {source} has no chat template",
            hint="Add chat_template to tokenizer_config.json, or pack the tokenizer the expert was trained with.",
        )
    tokenizer.model_max_length = sys.maxsize  # a prompt is held to the model's context; transformers would warn, too
    return tokenizer


def tokenizer_key(package: ExpertPackage) -> tuple[str, ...]:
    """What two packages have in common whose tokenizers are the same; empty for the base model's."""
    if package.tokenizer_dir is None:
        return ()
    return tuple(sorted(f"{file.path}:{file.sha256}" for file in package.files if file.path in TOKENIZER_FILES))


def _load_weights(adapted: Any, package: ExpertPackage) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    with _fitting(package):
        wanted = {name: tuple(value.shape) for name, value in get_peft_model_state_dict(adapted).items()}
        set_peft_model_state_dict(adapted, read_adapter_weights(package, wanted))


def read_adapter_weights(package: ExpertPackage, wanted: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The tensors of a package's adapter, by their names in the file.

    Args:
        package: Whose adapter is read.
        wanted: The shape that each tensor must have; exactly these must be there.

    Raises:
        AdapterError: Tensors are missing or left over, or have a wrong shape or values that are not finite.
    """
    with foreign_errors_as(
        AdapterError,
        f"the adapter of {package.label} cannot be read",
        hint="Was the package changed since it was opened? Open it again, from its .expert file.",
    ):
        weights = load_file(package.adapter_weights)
    problems = [f"missing: {name}" for name in sorted(set(wanted) - set(weights))]
    problems += [f"not in this base model: {name}" for name in sorted(set(weights) - set(wanted))]
    problems += [
        f"{name}: shape {list(weights[name].shape)}, wanted {list(shape)}"
        for name, shape in wanted.items()
        if name in weights and tuple(weights[name].shape) != shape
    ]
    problems += [f"{name}: holds NaN or infinity" for name, value in weights.items() if not value.isfinite().all()]
    if problems:
        more = len(problems) - 8
        raise AdapterError(
            f"the adapter of {package.label} does not fit the base model",
            details=(*problems[:8], *([f"and {more} more"] if more > 0 else [])),
            hint="Check that base_model is the one the expert was trained on.",
        )
    return weights


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, and none of the warnings that two libraries have about each other's versions."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # PEFT 0.21 reads an attribute that transformers 5.23 has renamed; it still works.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
