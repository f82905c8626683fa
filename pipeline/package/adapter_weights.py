"""Whether the tensors of an adapter are those its config speaks of, and fit its base model: by names and shapes alone.

Source: the state dicts of PEFT 0.21.2.
"""

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import AdapterError, BaseModelError
from pipeline.package.adapter import AdapterConfig
from pipeline.package.adapter_shapes import PREFIX, Shapes, adapter_parts, rank_options, shape_problems
from pipeline.package.weights import TensorInfo, read_safetensors_header

MAX_PROBLEMS = 8
_IN_A_LAYER = re.compile(r"\.\d+\.")
_FLOATS = {"F16", "BF16", "F32", "F64"}
_MAGNITUDE = "lora_magnitude_vector"
_PARTS = frozenset({"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", _MAGNITUDE})
_OF_THE_BASE = re.compile(r".+\.base_layer\.weight")


def check_adapter_weights(tensors: Sequence[TensorInfo], config: AdapterConfig, *, source: str) -> None:
    """Compare an adapter's tensors with its config.

    Args:
        tensors: What the file's header says.
        config: Its `adapter_config.json`.
        source: The file, as messages name it.

    Raises:
        AdapterError: A tensor is missing, left over, of a type that is no floating-point one, or of a shape that the
            config does not give it.
    """
    problems = [f"{tensor.name}: dtype {tensor.dtype}" for tensor in tensors if tensor.dtype not in _FLOATS]
    may_hold_more = bool(config.modules_to_save) or config.bias != "none"
    if config.peft_type != "LORA":
        parts, left = adapter_parts(tensors, config)
        problems += [line for module, shapes in parts.items() for line in shape_problems(module, shapes, config)]
    else:
        parts, left = lora_parts(tensors)
        problems += _lora_problems(parts, config)
        if any("lora_embedding_A" in shapes for shapes in parts.values()):
            # PEFT saves the base's own embedding and head beside an adapter that changes an embedding.
            left = [name for name in left if not _OF_THE_BASE.fullmatch(name)]
    if not parts:
        problems.append(f"it holds no tensor of a {config.kind} adapter")
    if not may_hold_more:
        problems += [f"{name}: not a tensor of a {config.kind} adapter" for name in left]
    if problems:
        raise AdapterError(
            f"{source} is not the adapter that adapter_config.json describes",
            hint="Save the adapter again with PEFT's save_pretrained, and pack both files of it.",
            details=shortened(problems),
        )


def lora_parts(tensors: Sequence[TensorInfo]) -> tuple[dict[str, Shapes], list[str]]:
    """The shapes of a LoRA adapter's tensors, by module and part, and the names of those that are none of it.

    Returns:
        `{"...q_proj": {"lora_A": (r, in), "lora_B": (out, r)}}`; a bias is a part `lora_B.bias`.
    """
    found: dict[str, Shapes] = defaultdict(dict)
    others = []
    for tensor in tensors:
        name, suffix = tensor.name.removesuffix(".weight"), ""
        if name.endswith(".bias"):
            name, suffix = name.removesuffix(".bias"), ".bias"
        module, _, part = name.rpartition(".")
        if module and part in _PARTS:
            found[module][part + suffix] = tensor.shape
        else:
            others.append(tensor.name)
    return dict(found), others


def _lora_problems(parts: dict[str, Shapes], config: AdapterConfig) -> list[str]:
    problems: list[str] = []
    for module, shapes in parts.items():
        first, second = _pair(shapes)
        missing = [part for part in (first, second) if part not in shapes]
        if config.use_dora and _MAGNITUDE not in shapes:
            missing.append(_MAGNITUDE)
        problems += [f"{module}.{part}: missing" for part in missing]
        if _MAGNITUDE in shapes and not config.use_dora:
            problems.append(f"{module}.{_MAGNITUDE}: of a DoRA adapter, and use_dora is false")
        if first not in shapes or second not in shapes:
            continue
        down, up = shapes[first], shapes[second]
        ranks = rank_options(module, config)
        if len(down) != 2 or len(up) != 2 or down[0] != up[1]:
            problems.append(f"{module}: shapes {list(down)} and {list(up)} do not belong together")
        elif down[0] not in ranks:
            problems.append(f"{module}: rank {down[0]}, adapter_config.json says {sorted(ranks)}")
        else:
            problems += [
                f"{module}.{part}: shape {list(shapes[part])}, {[up[0]]} is wanted"
                for part in (_MAGNITUDE, f"{second}.bias")
                if part in shapes and shapes[part] != (up[0],)
            ]
    return problems


def _pair(shapes: Shapes) -> tuple[str, str]:
    of_a_table = ("lora_embedding_A", "lora_embedding_B")
    return of_a_table if any(part in shapes for part in of_a_table) else ("lora_A", "lora_B")


def check_fits_base(weights: Path, config: AdapterConfig, base_path: Path, *, label: str) -> None:
    """Compare an adapter's shapes with the modules of the base model that it changes.

    Modules whose weights the checkpoint names or stores otherwise (fused experts, packed integers) are left to the
    engine, which compares with the loaded model.

    Args:
        weights: The adapter's safetensors file.
        config: Its config.
        base_path: The base model's directory.
        label: The package, as messages name it.

    Raises:
        AdapterError: It is the adapter of another base model.
        BaseModelError: The base model's files are not valid safetensors.
    """
    if config.fan_in_fan_out:
        return
    known = _base_shapes(base_path)
    tensors = read_safetensors_header(weights, source=label)
    parts, _ = lora_parts(tensors) if config.peft_type == "LORA" else adapter_parts(tensors, config)
    problems, missing, matched = [], [], 0
    for name, shapes in parts.items():
        module = name.removeprefix(PREFIX)
        shape = known.get(f"{module}.weight", known.get(f"{module.removeprefix('model.')}.weight"))
        if shape is None:
            if _IN_A_LAYER.search(module):  # not so a tied output layer, which no checkpoint holds
                missing.append(f"{module}: not in the base model")
            continue
        matched += 1
        if len(shape) == 2:
            problems += _base_problems(name, shapes, config, (shape[0], shape[1]))
    problems += missing if matched else []
    if problems:
        raise AdapterError(
            f"the adapter of {label} is not for the base model in {base_path}",
            hint="Check that base_model is the one the expert was trained on.",
            details=shortened(problems),
        )


def _base_problems(name: str, shapes: Shapes, config: AdapterConfig, layer: tuple[int, int]) -> list[str]:
    if config.peft_type != "LORA":
        return shape_problems(name, shapes, config, layer)
    first, second = _pair(shapes)
    if first not in shapes or second not in shapes:
        return []
    adapter = (shapes[second][0], shapes[first][1])
    if first == "lora_embedding_A":  # a table is looked up by row: [num_embeddings, embedding_dim]
        adapter = adapter[::-1]
    module = name.removeprefix(PREFIX)
    if adapter == layer:
        return []
    return [f"{module}: the adapter is for {list(adapter)}, the base model has {list(layer)}"]


def _base_shapes(base_path: Path) -> Shapes:
    try:
        return {
            tensor.name: tensor.shape
            for path in sorted(base_path.glob("*.safetensors"))
            for tensor in read_safetensors_header(path, source=str(base_path))
            if tensor.dtype in _FLOATS
        }
    except AdapterError as problem:
        raise BaseModelError(
            f"the base model in {base_path} is damaged", hint="Fetch the model again.", details=problem.details
        ) from problem


def config_number(base_path: Path, name: str) -> int | None:
    """A size that the base model's config.json gives, such as `vocab_size`; None where it does not say."""
    try:
        value = json.loads((base_path / "config.json").read_bytes()).get(name)
    except (OSError, ValueError, AttributeError):
        return None
    return value if type(value) is int and value > 0 else None


def shortened(problems: list[str]) -> list[str]:
    """The first of several lines, and how many more there are."""
    more = len(problems) - MAX_PROBLEMS
    return [*problems[:MAX_PROBLEMS], *([f"and {more} more"] if more > 0 else [])]
