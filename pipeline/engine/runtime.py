"""An expert made ready to answer: its engine and the builder of its requests."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.engine.loader import load_base_model, load_tokenizer, merge_adapter
from pipeline.engine.padded import PaddedEngine
from pipeline.engine.requests import RequestBuilder
from pipeline.engine.types import Engine
from pipeline.errors import AdapterError, TokenizerError
from pipeline.package import ExpertPackage


@dataclass(frozen=True)
class LoadedExpert:
    """One expert on one device."""

    engine: Engine
    requests: RequestBuilder
    device: str
    dtype: str


def load_expert(
    package: ExpertPackage,
    base_path: Path,
    *,
    device: str | None = None,
    dtype: str | None = None,
    batch_size: int = 64,
    max_batch_tokens: int = 16384,
    options: Mapping[str, Any] | None = None,
) -> LoadedExpert:
    """Load a package over its base model.

    Args:
        package: The expert.
        base_path: The base model's directory.
        device: `"cpu"`, `"cuda"`, `"cuda:1"`, `"mps"`, or None for the best there is.
        dtype: `"float32"`, `"bfloat16"`, `"float16"`, or None to choose by device and checkpoint.
        batch_size: At most this many sequences are answered together.
        max_batch_tokens: At most this many tokens a batch.
        options: Options for every request; see `RequestBuilder`.

    Raises:
        LoadError: The package or the base model cannot be used.
        ConfigError: The device or dtype is unknown or not there.
        InvalidRequestError: An option has a wrong value.
    """
    if package.manifest.soft_prompts:
        raise AdapterError(
            f"{package.label} has soft prompts, which the engine does not apply yet",
            details=[f"soft_prompts[{at}]: {prompt.name}" for at, prompt in enumerate(package.manifest.soft_prompts)],
            hint="Pack the expert without soft prompts, if its adapter was trained to answer without them.",
        )
    base = load_base_model(base_path, device=device, dtype=dtype)
    tokenizer = load_tokenizer(package, base_path)
    vocab_size = int(base.model.config.vocab_size)
    if len(tokenizer) > vocab_size:
        raise TokenizerError(
            f"the tokenizer of {package.label} has {len(tokenizer):,} tokens and the base model {vocab_size:,}",
            hint="Pack the tokenizer that belongs to the base model.",
        )
    requests = RequestBuilder(package, tokenizer, base.context_length, options)
    base = merge_adapter(base, package)
    engine = PaddedEngine(base, tokenizer, batch_size=batch_size, max_batch_tokens=max_batch_tokens)
    if requests.grammar is not None:
        engine.check_grammar(requests.grammar)
    return LoadedExpert(
        engine=engine,
        requests=requests,
        device=str(base.device),
        dtype=str(base.dtype).removeprefix("torch."),
    )
