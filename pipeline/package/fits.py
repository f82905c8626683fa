"""The base model that a package fits."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import AdapterError
from pipeline.package.adapter_weights import check_fits_base, config_number
from pipeline.package.base_model import FoundBaseModel, find_base_model
from pipeline.package.package import ExpertPackage
from pipeline.package.pickled_prompt import prompt_width
from pipeline.package.tokenizer import check_fits_vocabulary


def fitting_base_model(
    package: ExpertPackage,
    *,
    base_model: str | os.PathLike[str] | None = None,
    models: Mapping[str, str] | None = None,
    cache_dir: Path | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> FoundBaseModel:
    """Find the base model of a package, as `find_base_model` does, and compare the two, by their headers alone.

    Raises:
        AdapterError: The adapter is for another base model.
        BaseModelError: The base model was not found, or is not the one that the manifest's checksum names.
        TokenizerError: The package's tokenizer is for another base model.
    """
    found = find_base_model(
        package.base,
        base_model=base_model,
        models=models,
        package=package.label,
        cache_dir=cache_dir,
        storage_options=storage_options,
    )
    check_fits_base(package.adapter_weights, package.adapter, found.path, label=package.label)
    hidden_size = config_number(found.path, "hidden_size")
    for prompt in package.manifest.soft_prompts:
        if hidden_size is None or not prompt.path.endswith(".safetensors"):
            continue
        width = prompt_width(package.root / prompt.path, prompt.tokens, source=package.label)
        if width != hidden_size:
            raise AdapterError(
                f"the soft prompt {prompt.name!r} of {package.label} is not for the base model in {found.path}",
                hint="Check that base_model is the one the expert was trained on.",
                details=[f"it has embeddings of {width}, the base model has embeddings of {hidden_size}"],
            )
    if package.tokenizer_dir is not None:
        check_fits_vocabulary(package.tokenizer_dir, found.path, label=package.label)
    return found
