"""What is fuzzed: each target may raise an error of ours and nothing else, and leaves nothing outside its folder."""

import gzip
import io
import json
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from pipeline.errors import LoadError
from pipeline.package.adapter import read_adapter_config
from pipeline.package.adapter_weights import check_adapter_weights
from pipeline.package.archive import unpack
from pipeline.package.limits import ArchiveLimits
from pipeline.package.manifest_reader import read_manifest
from pipeline.package.template_trial import try_template
from pipeline.package.weights import TensorInfo, read_safetensors_header
from tests.package.expert_fixtures import ADAPTER_CONFIG, expert_files, tar, tensors, weights
from tests.package.hostile_archives import ARCHIVES, ZIPS, zipped, zst
from tests.package.hostile_packages import PACKAGES
from tests.package.template_texts import HOSTILE, SANE

LIMITS = ArchiveLimits(total_bytes=1 << 20, file_bytes=1 << 20, members=100, path_length=200, depth=8)
_GZIP, _PLAIN = b"\x1f\x8b", b"tar:"
_HOME = Path(tempfile.mkdtemp(prefix="fuzz-"))


def archive(data: bytes) -> None:
    """An archive of any kind; what begins with `tar:` is gzipped first, for the fuzzer cannot make its checksum."""
    if data.startswith(_PLAIN):
        data = gzip.compress(data[len(_PLAIN) :], 1, mtime=0)
    folder = _HOME / "unpacked"
    folder.mkdir()
    try:
        with suppress(LoadError):
            unpack(io.BytesIO(data), folder, LIMITS, source="x")
        if {path.name for path in _HOME.iterdir()} != {"unpacked"}:
            raise AssertionError("something was written beside the destination")
        for path in folder.rglob("*"):
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise AssertionError(f"{path} is neither a file nor a directory")
    finally:
        shutil.rmtree(folder)


def manifest(data: bytes) -> None:
    """A manifest; what is read must be what json reads."""
    with suppress(LoadError):
        found = read_manifest(data, source="x").manifest
        if found.raw != json.loads(data):
            raise AssertionError("read otherwise than json reads it")


def safetensors(data: bytes) -> None:
    """A safetensors file; one that is taken must hold exactly its tensors' bytes."""
    path = _HOME / "x.safetensors"
    path.write_bytes(data)
    with suppress(LoadError):
        read_safetensors_header(path, source="x")
    path.unlink()


def adapter(data: bytes) -> None:
    """An adapter's config, a NUL, and the names and shapes of its tensors as JSON."""
    config_text, _, shapes = data.partition(b"\0")
    with suppress(LoadError):
        config, _ = read_adapter_config(config_text, source="x")
        with suppress(ValueError, RecursionError):
            listed = json.loads(shapes)
            tensors = [
                TensorInfo(str(name), "F32", tuple(size for size in shape if type(size) is int and size >= 0))
                for name, shape in (listed.items() if isinstance(listed, dict) else ())
                if isinstance(shape, list)
            ]
            check_adapter_weights(tensors, config, source="x")


def template(data: bytes) -> None:
    """A chat template: whatever it tries, it is rendered or refused, in time and in memory that libFuzzer bounds."""
    try_template(data.decode("utf-8", "replace"))


TARGETS: dict[str, Callable[[bytes], None]] = {
    "archive": archive,
    "manifest": manifest,
    "safetensors": safetensors,
    "adapter": adapter,
    "template": template,
}


def seeds(target: str) -> Iterator[bytes]:
    """What the fuzzer begins with: the table of hostile packages, and a good one."""
    if target == "archive":
        yield zipped()
        yield zst(tar())
        for _, build, _ in (*ARCHIVES, *ZIPS):
            data = build()
            yield data
            if data.startswith(_GZIP):
                with suppress(OSError, EOFError, zlib.error):
                    yield _PLAIN + gzip.decompress(data)
        return
    if target == "template":
        yield from (text.encode() for text in (*SANE, *HOSTILE))
        return
    if target == "adapter":
        shapes = {name: list(value.shape) for name, value in tensors().items()}
        yield json.dumps(ADAPTER_CONFIG).encode() + b"\0" + json.dumps(shapes).encode()
    name = {"adapter": "adapter_config.json", "manifest": "manifest.json", "safetensors": "adapter_model.safetensors"}[
        target
    ]
    yield weights() if target == "safetensors" else expert_files()[name]
    for _, make, _, _ in PACKAGES:
        files = make()
        if name in files:
            yield files[name] + (_shapes(files) if target == "adapter" else b"")


def _shapes(files: Mapping[str, bytes]) -> bytes:
    """The names and shapes of an adapter's tensors, after a NUL; nothing where they cannot be read."""
    path = _HOME / "seed.safetensors"
    path.write_bytes(files.get("adapter_model.safetensors", b""))
    try:
        found = read_safetensors_header(path, source="x")
    except LoadError:
        return b""
    finally:
        path.unlink()
    return b"\0" + json.dumps({tensor.name: list(tensor.shape) for tensor in found}).encode()
