"""The program that reads a PyTorch file in a process of its own; see `pickled_prompt`.

It knows the standard library alone. The pickle in the file may name a few things, and gets stand-ins of this file for
them; no function of another module is ever called. What goes out is one dense tensor as safetensors.

Source: PyTorch's zip format, torch/serialization.py: <name>/data.pkl, and <name>/data/<key> for each storage.
"""

import io
import json
import pickle
import resource
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

MEMORY_BYTES = 1 << 30
CPU_SECONDS = 10
MAX_PICKLE_BYTES = 1 << 20
_STORAGES = {
    "FloatStorage": ("F32", 4),
    "HalfStorage": ("F16", 2),
    "BFloat16Storage": ("BF16", 2),
    "DoubleStorage": ("F64", 8),
}


class RefusedError(Exception):
    """The file holds something other than one dense tensor."""


class StorageType(NamedTuple):
    """Stands for a class such as torch.FloatStorage."""

    dtype: str
    width: int


class Storage(NamedTuple):
    """One storage of the file."""

    kind: StorageType
    key: str
    length: int


class Tensor(NamedTuple):
    """Stands for a tensor."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> Tensor:
    """In place of torch._utils._rebuild_tensor_v2."""
    whole = isinstance(storage, Storage) and isinstance(offset, int) and offset >= 0
    sizes = isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride) <= 4
    if not whole or not sizes or not all(isinstance(size, int) and 0 <= size < 1 << 40 for size in (*shape, *stride)):
        raise RefusedError("a tensor is described in a way that is not known")
    return Tensor(storage, offset, shape, stride)


def rebuild_parameter(data: Any, *_: Any) -> Any:
    """In place of torch._utils._rebuild_parameter."""
    return data


def ordered_dict(*_: Any) -> dict[Any, Any]:
    """In place of collections.OrderedDict; backward hooks are one, and empty."""
    return {}


class Reader(pickle.Unpickler):
    """Reads a pickle in which only stand-ins can be called."""

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in for what the pickle names."""
        if module == "torch" and name in _STORAGES:
            return StorageType(*_STORAGES[name])
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): rebuild_parameter,
            ("collections", "OrderedDict"): ordered_dict,
        }
        if (module, name) not in known:
            raise RefusedError(f"it names {module[:60]}.{name[:60]}, which is not part of a dense tensor")
        return known[module, name]

    def persistent_load(self, reference: Any) -> Storage:
        """A storage of the file, by its reference."""
        if not isinstance(reference, tuple) or len(reference) != 5 or reference[0] != "storage":
            raise RefusedError("a storage is described in a way that is not known")
        _, kind, key, _, count = reference
        if not isinstance(kind, StorageType) or not isinstance(key, str) or not isinstance(count, int):
            raise RefusedError("a storage is described in a way that is not known")
        return Storage(kind, key, count)


def convert(path: Path) -> bytes:
    """The one tensor of a PyTorch file, as safetensors.

    Raises:
        RefusedError: It holds something else.
    """
    with zipfile.ZipFile(path) as archive:
        pickles = [info for info in archive.infolist() if info.filename.endswith("/data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE_BYTES:
            raise RefusedError("it is not a file of torch.save")
        with archive.open(pickles[0]) as stream:
            value = Reader(io.BytesIO(stream.read(MAX_PICKLE_BYTES))).load()
        found = [value] if isinstance(value, Tensor) else []
        if isinstance(value, dict):
            found = [item for item in value.values() if isinstance(item, Tensor)]
        if len(found) != 1:
            raise RefusedError(f"it holds {len(found)} tensors; one is expected")
        tensor = found[0]
        rows, width = tensor.shape if len(tensor.shape) == 2 else (0, 0)
        if rows < 1 or width < 1 or (tensor.stride != (width, 1) and rows > 1):
            raise RefusedError(f"its tensor has shape {list(tensor.shape)} and strides {list(tensor.stride)}")
        dtype, size = tensor.storage.kind
        member = archive.getinfo(f"{pickles[0].filename.removesuffix('data.pkl')}data/{tensor.storage.key}")
        begin, length = tensor.offset * size, rows * width * size
        if member.file_size != tensor.storage.length * size or begin + length > member.file_size:
            raise RefusedError("its tensor is larger than its storage")
        with archive.open(member) as stream:
            data = stream.read()[begin : begin + length]
    if len(data) != length:
        raise RefusedError("its tensor is cut short")
    header = json.dumps({"prompt": {"dtype": dtype, "shape": [rows, width], "data_offsets": [0, length]}}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data


def main() -> int:
    """Convert the file that is named, and write the result, or why there is none."""
    for limit, value in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 16),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    try:
        data = convert(Path(sys.argv[1]))
    except Exception as problem:  # noqa: BLE001  # whatever a stranger's file makes the standard library raise
        sys.stderr.write(f"{type(problem).__name__}: {problem}"[:500])
        return 1
    sys.stdout.buffer.write(data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
