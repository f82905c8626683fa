"""The shapes that PEFT gives the tensors of IA3, LoKr and AdaLoRA adapters, from its config and the layer it changes.

A layer is `[out_features, in_features]`, as its weight is. Patterns of a stranger's config are never run here: where
one decides a shape, every shape that it could give is taken; the engine, which has the model, compares again.

Source: the layers of PEFT 0.21.2 (`tuners/ia3`, `tuners/lokr`, `tuners/adalora`).
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from math import isqrt, prod

from pipeline.package.adapter import AdapterConfig
from pipeline.package.weights import TensorInfo

PREFIX = "base_model.model."
MAX_FEATURES = 1 << 26
Shapes = dict[str, tuple[int, ...]]
Layer = tuple[int, int]
_PARTS = {
    "IA3": ("ia3_l",),
    "LOKR": ("lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    "ADALORA": ("lora_A", "lora_B", "lora_E", "ranknum"),
}
_COUNTER = "ranknum"  # of AdaLoRA, in files of older versions; it computes nothing
_PLAIN = re.compile(r"\w+(\.\w+)*", re.ASCII)


def adapter_parts(tensors: Sequence[TensorInfo], config: AdapterConfig) -> tuple[dict[str, Shapes], list[str]]:
    """The shapes of an adapter's tensors, by module and part, and the names of those that are none of its method.

    Returns:
        `{"...q_proj": {"ia3_l": (out_features, 1)}}`, and names.
    """
    known = _PARTS[config.peft_type]
    found: dict[str, Shapes] = defaultdict(dict)
    others = []
    for tensor in tensors:
        module, _, part = tensor.name.removesuffix(".weight").rpartition(".")
        if module and part in known and part not in found.get(module, ()):
            found[module][part] = tensor.shape
        else:
            others.append(tensor.name)
    return dict(found), others


def shape_problems(module: str, shapes: Shapes, config: AdapterConfig, layer: Layer | None = None) -> list[str]:
    """What is wrong with the tensors of one module; nothing where they are as PEFT would make them.

    Args:
        module: Its name in the file.
        shapes: Of its parts, from `adapter_parts`.
        config: The adapter's config.
        layer: The base model's layer; None where it is not known: then the tensors say for which one they are, and are
            compared with the config and with each other.

    Returns:
        A sentence for each tensor, with the shape it has and the shape it should have.
    """
    shapes = {part: shape for part, shape in shapes.items() if part != _COUNTER}
    flat = [part for part, shape in shapes.items() if len(shape) != 2]
    if flat:
        return [f"{module}.{part}: shape {list(shapes[part])}, a matrix is wanted" for part in flat]
    half = [part for part in shapes if part[-2:] in ("_a", "_b") and _other_half(part) not in shapes]
    if half:
        return [f"{module}.{_other_half(part)}: missing" for part in half]
    of_layer = layer or _layer_of(shapes, config)
    if not all(0 < size <= MAX_FEATURES for size in of_layer):
        return [f"{module}: its tensors are for a layer of {list(of_layer)}"]
    kept = _kept(module, config)
    if kept and len(kept) != config.init_r:
        return [f"{module}: rank_pattern tells of {len(kept)} ranks, init_r is {config.init_r}"]
    options = list(_wanted(module, config, of_layer))
    if shapes in options:
        return []
    wanted = options[0]
    missing = [f"{module}.{part}: missing" for part in wanted if part not in shapes]
    by = "adapter_config.json says" if layer is None else f"for the base model's {list(layer)} it would be"
    return missing or [
        f"{module}.{part}: shape {list(shape)}, {by} {list(wanted[part])}"
        if part in wanted
        else f"{module}.{part}: shape {list(shape)}, {by} that there is none"
        for part, shape in shapes.items()
        if shape != wanted.get(part)
    ]


def rank_options(module: str, config: AdapterConfig) -> tuple[int, ...]:
    """The ranks that `r` and `rank_pattern` give a module: one, or several where a pattern would have to be run."""
    name, others = module.removeprefix(PREFIX), set()
    for pattern, rank in config.rank_pattern.items():
        if not isinstance(rank, int):
            continue
        if not _PLAIN.fullmatch(pattern):
            others.add(rank)
        elif f".{name}".endswith(f".{pattern}"):
            return (rank, *sorted(others - {rank}))
    return (config.r, *sorted(others - {config.r}))


def _other_half(part: str) -> str:
    """Of a matrix that LoKr holds as a product of two."""
    return part[:-1] + ("b" if part.endswith("a") else "a")


def _layer_of(shapes: Shapes, config: AdapterConfig) -> Layer:
    """The layer that the tensors of a module are for, as far as they tell."""

    def size(part: str, axis: int) -> int:
        return shapes[part][axis] if part in shapes else 1

    match config.peft_type:
        case "IA3":
            return (prod(shapes["ia3_l"]),) * 2  # of one of both sides it says nothing
        case "ADALORA":
            return size("lora_B", 0), size("lora_A", 1)
    whole = {number: f"lokr_w{number}" in shapes for number in (1, 2)}
    rows = [size(f"lokr_w{number}" if whole[number] else f"lokr_w{number}_a", 0) for number in (1, 2)]
    columns = [size(f"lokr_w{number}" if whole[number] else f"lokr_w{number}_b", 1) for number in (1, 2)]
    return prod(rows), prod(columns)


def _wanted(module: str, config: AdapterConfig, layer: Layer) -> Iterator[Shapes]:
    """The shapes that the parts of a module should have, in each way that is possible."""
    out_features, in_features = layer
    match config.peft_type:
        case "IA3":
            is_input = _is_feedforward(module, config)
            if is_input is not True:
                yield {"ia3_l": (out_features, 1)}
            if is_input is not False:
                yield {"ia3_l": (1, in_features)}
        case "ADALORA":
            rank = sum(_kept(module, config) or [True] * config.init_r)
            yield {"lora_A": (rank, in_features), "lora_B": (out_features, rank), "lora_E": (rank, 1)}
        case "LOKR":
            for rank in rank_options(module, config):
                yield _wanted_of_lokr(rank, config, layer)


def _wanted_of_lokr(rank: int, config: AdapterConfig, layer: Layer) -> Shapes:
    """Two matrices whose Kronecker product is the change; each whole, or of a low rank where that is smaller."""
    (rows_1, rows_2), (columns_1, columns_2) = (_factors(size, config.decompose_factor) for size in layer)
    wanted: Shapes = {}
    for name, rows, columns, may_be_low in (
        ("lokr_w1", rows_1, columns_1, config.decompose_both),
        ("lokr_w2", rows_2, columns_2, True),
    ):
        if may_be_low and rank < max(rows, columns) / 2:
            wanted |= {f"{name}_a": (rows, rank), f"{name}_b": (rank, columns)}
        else:
            wanted[name] = (rows, columns)
    return wanted


def _factors(size: int, factor: int) -> tuple[int, int]:
    """`size` as a product of two numbers, the smaller one first and at most `factor` where that is not -1."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = isqrt(size) if factor == -1 else min(factor, isqrt(size))
    first = next((number for number in range(most, 1, -1) if size % number == 0), 1)
    return first, size // first


def _kept(module: str, config: AdapterConfig) -> tuple[bool, ...]:
    """Which ranks AdaLoRA's pruning has left; nothing where it has not pruned."""
    name = f"{module.removeprefix(PREFIX)}.lora_E"
    kept = config.rank_pattern.get(name, config.rank_pattern.get(f"{name}.default", ()))
    return kept if isinstance(kept, tuple) else ()


def _is_feedforward(module: str, config: AdapterConfig) -> bool | None:
    """Whether IA3 scales the input of a module, rather than its output; None where a pattern would have to be run."""
    named = config.feedforward_modules
    if named is None or isinstance(named, str):
        return None
    return module.endswith(named)
