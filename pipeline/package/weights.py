"""Check the header of a safetensors file before any library reads it.

Source: the safetensors format, https://github.com/huggingface/safetensors#format.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pipeline.errors import AdapterError

MAX_HEADER_BYTES = 32 << 20
MAX_DIMENSIONS = 8
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

_FINITE_CHUNK = 8 << 20
# dtype -> the unsigned integer of its width, its bits without the sign, and the first pattern that is not finite
_NOT_FINITE = {
    "F64": ("<u8", 0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7FFF_FFFF, 0x7F80_0000),
    "F16": ("<u2", 0x7FFF, 0x7C00),
    "BF16": ("<u2", 0x7FFF, 0x7F80),
    "F8_E4M3": ("u1", 0x7F, 0x7F),
    "F8_E5M2": ("u1", 0x7F, 0x7C),
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: name, element type as safetensors spells it, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def read_safetensors_header(path: Path, *, source: str) -> tuple[TensorInfo, ...]:
    """The tensors of a safetensors file, in the order of their bytes.

    Args:
        path: The file.
        source: The package, as messages name it.

    Raises:
        AdapterError: The header is longer than the file or no JSON, names a tensor twice, or its tensors overlap, leave
            a hole, or do not fill the file exactly.
    """

    def refuse(detail: str) -> NoReturn:
        raise AdapterError(
            f"{path.name} in {source} is not a valid safetensors file",
            hint="Save the adapter again with safe_serialization=True and pack it.",
            details=[detail],
        )

    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            refuse(f"its header claims {length:,} bytes, the file has {size:,}")
        data = file.read(length)
    try:
        header = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as problem:
        refuse(f"its header is not valid JSON: {problem}")
    if not isinstance(header, dict):
        refuse("its header is not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        refuse("__metadata__ is not an object of strings")
    try:
        placed = sorted((_tensor(name, entry) for name, entry in header.items()), key=lambda item: item[0])
    except ValueError as problem:
        refuse(str(problem))
    end = 0
    for (begin, stop), tensor in placed:
        if begin != end:
            refuse(f"tensor {tensor.name!r} begins at byte {begin:,}, the one before ends at {end:,}")
        end = stop
    if end != size - 8 - length:
        refuse(f"its tensors have {end:,} bytes, the file holds {size - 8 - length:,}")
    return tuple(tensor for _, tensor in placed)


def _tensor(name: str, entry: Any) -> tuple[tuple[int, int], TensorInfo]:
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS:
        raise ValueError(f"tensor {name!r} does not have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"tensor {name!r} has the unknown dtype {dtype!r}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"tensor {name!r} has the shape {str(shape)[:100]}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"tensor {name!r} has the data_offsets {str(offsets)[:100]}")
    if math.prod(shape) * _BITS[dtype] != (offsets[1] - offsets[0]) * 8:
        raise ValueError(f"tensor {name!r}: its shape and dtype do not fit its {offsets[1] - offsets[0]:,} bytes")
    return (offsets[0], offsets[1]), TensorInfo(name, dtype, tuple(shape))


def _are_sizes(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    for item in value:  # noqa: SIM110  # a file has thousands of them: a generator takes twice as long
        if type(item) is not int or not 0 <= item < 1 << 63:
            return False
    return True


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a JSON number")


def check_finite(path: Path, tensors: tuple[TensorInfo, ...], *, source: str) -> None:
    """Read all values of a safetensors file.

    Args:
        path: The file.
        tensors: What `read_safetensors_header` said of it.
        source: The package, as messages name it.

    Raises:
        AdapterError: A tensor holds NaN or infinity.
    """
    import numpy as np

    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        for tensor in tensors:
            left = math.prod(tensor.shape) * _BITS[tensor.dtype] // 8
            kind, mask, first = _NOT_FINITE.get(tensor.dtype, ("u1", 0, 1))
            while left:
                data = file.read(min(left, _FINITE_CHUNK))
                if not data:
                    raise AdapterError(f"{path.name} in {source} has become shorter", hint="Load it again.")
                left -= len(data)
                bits = np.frombuffer(data, kind)
                if mask and int((bits & bits.dtype.type(mask)).max()) >= first:
                    raise AdapterError(
                        f"{path.name} in {source} holds numbers that are not finite",
                        hint="Train or export the adapter again.",
                        details=[f"{tensor.name}: NaN or infinity"],
                    )
