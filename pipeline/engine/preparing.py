"""What prepares the prompts of experts in a process without an engine: tokenizers and manifests, no weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pipeline.engine.loader import load_tokenizer, read_context_length, tokenizer_key
from pipeline.engine.requests import PromptPreparer
from pipeline.package import ExpertPackage

Name = TypeVar("Name")


def load_preparers(
    packages: Mapping[Name, ExpertPackage],
    base_path: Path,
    options: Mapping[Name, Mapping[str, Any]],
) -> dict[Name, PromptPreparer]:
    """Make ready to prepare prompts as the engines of `load_expert` and `load_experts` would be asked them.

    Args:
        packages: The experts, by any names.
        base_path: The base model's directory; its weights are not read.
        options: Options for every prompt of an expert, by its name; see `PromptPreparer`.

    Raises:
        LoadError: A tokenizer or the configuration of the base model cannot be used.
        InferenceError: An option has a wrong value, or a grammar is asked for that there is not.
    """
    context_length = read_context_length(base_path)
    tokenizers: dict[tuple[str, ...], Any] = {}  # packages with the same files share one
    made: dict[Name, PromptPreparer] = {}
    for name, package in packages.items():
        key = tokenizer_key(package)
        if key not in tokenizers:
            tokenizers[key] = load_tokenizer(package, base_path)
        made[name] = PromptPreparer(package, tokenizers[key], context_length, options.get(name))
    return made
