"""What is looked at once, when a package comes to this machine: everything that takes reading all of it."""

from pathlib import Path

from pipeline.errors import LoadError
from pipeline.package.adapter import locate_adapter
from pipeline.package.package import ExpertPackage
from pipeline.package.pickled_prompt import PICKLE_SUFFIXES, prompt_width, read_pickled_prompt
from pipeline.package.tokenizer import check_chat_templates, check_tokenizer
from pipeline.package.weights import check_finite, read_safetensors_header


def check_values(package: ExpertPackage) -> None:
    """Check the values of all tensors that are used, the tokenizer's rules and its chat template.

    Args:
        package: As `read_package` found it.

    Raises:
        AdapterError: An adapter or a soft prompt holds NaN or infinity, or is not valid safetensors; or a soft prompt
            is not one tensor of the shape that the manifest says.
        TokenizerError: The tokenizer or its template could run away.
    """
    name = Path(package.source).name or package.source
    for path in sorted(_tensor_files(package)):
        check_finite(path, read_safetensors_header(path, source=name), source=name)
    for prompt in package.manifest.soft_prompts:
        if prompt.path.endswith(PICKLE_SUFFIXES):
            read_pickled_prompt(package.root / prompt.path, prompt.tokens, source=name)
        else:
            prompt_width(package.root / prompt.path, prompt.tokens, source=name)
    records = {record.path: record for record in package.files}
    check_tokenizer(package.root, records, source=name)
    check_chat_templates(package.root, records, source=name)


def _tensor_files(package: ExpertPackage) -> set[Path]:
    found = {package.adapter_weights}
    for base in package.manifest.base_models:
        for spec in base.adapters:
            try:
                found.add(locate_adapter(package.root, spec, source=package.label).weights)
            except LoadError:  # for another base than the one asked for: `for_base` says so
                continue
    found |= {package.root / prompt.path for prompt in package.manifest.soft_prompts}
    return {path for path in found if path.suffix == ".safetensors"}
