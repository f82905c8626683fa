"""Pack a directory into a `.expert` archive: the same input gives the same bytes."""

import hashlib
import io
import json
import os
import re
import tarfile
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO, cast

from pipeline.errors import ConfigError, ManifestError
from pipeline.package.adapter import locate_adapter
from pipeline.package.integrity import INTEGRITY_NAME, SIDECAR_SUFFIX, FileRecord, scan_directory
from pipeline.package.json_text import read_json
from pipeline.package.limits import ArchiveLimits
from pipeline.package.manifest import Manifest
from pipeline.package.manifest_reader import MANIFEST_NAME, MAX_MANIFEST_BYTES, read_manifest
from pipeline.package.opening import open_package
from pipeline.package.pickled_prompt import PICKLE_SUFFIXES, read_pickled_prompt
from pipeline.package.seal import SealedGzipWriter
from pipeline.package.signatures import sign_files

SUFFIX = ".expert"
COMPRESSION_LEVEL = 6
# What a trainer keeps to continue from a checkpoint: of no use for answers, and often larger than the adapter.
_LEFT_OUT = re.compile(
    r"(optimizer|scheduler|scaler)\.(pt|bin)|rng_state(_\d+)?\.pth|global_step\d+/.*|trainer_state\.json"
)


@dataclass(frozen=True)
class Packed:
    """A packed expert: its archive, and files of the directory that are of no use to anyone and were left out."""

    path: Path
    left_out: tuple[str, ...]


def pack(
    source_dir: Path, destination: Path, *, manifest: Mapping[str, Any] | None = None, key: Path | None = None
) -> Path:
    """Write a `.expert` archive and the `.sha256` file beside it; as `pack_files`, which says more."""
    return pack_files(source_dir, destination, manifest=manifest, key=key).path


def pack_files(
    source_dir: Path, destination: Path, *, manifest: Mapping[str, Any] | None = None, key: Path | None = None
) -> Packed:
    """Write a `.expert` archive and the `.sha256` file beside it.

    Every file of the directory is packed, but what a trainer keeps to continue (optimizer, scheduler, random state).
    In the manifest, each adapter gets the size and checksum of its weights. Soft prompts in PyTorch's form become
    safetensors. Each is read in a process of its own that may do nothing else.

    Args:
        source_dir: The output of PEFT's `save_pretrained`, or a trainer's checkpoint, with whatever else the expert
            needs: a tokenizer, a grammar, a README.
        destination: A file name that ends in `.expert`, or an existing directory, where the archive gets its standard
            name. An archive of that name is replaced.
        manifest: The manifest; when not given, `manifest.json` of the directory.
        key: A private key to sign with (`expert keygen`).

    Returns:
        The archive. It has been opened once, and is valid.

    Raises:
        ConfigError: The source, the destination or the key cannot be used; or the directory was signed, and packing
            would change what was signed.
        LoadError: What was packed is not a valid package; nothing is written.
    """
    source_dir, destination = Path(source_dir), Path(destination)
    if not source_dir.is_dir():
        raise ConfigError(f"{source_dir} is not a directory", hint="Name the directory that holds the adapter.")
    root = source_dir.resolve()
    found = scan_directory(root, ArchiveLimits())
    left_out = tuple(record.path for record in found if _LEFT_OUT.fullmatch(record.path))
    on_disk = {record.path: record for record in found if record.path not in left_out}
    made: dict[str, bytes] = {}
    made[MANIFEST_NAME], checked = _manifest(root, manifest, on_disk, made)
    records = {path: record for path, record in on_disk.items() if path not in made}
    records |= {path: _record(path, data) for path, data in made.items()}
    if key is not None:
        signature = sign_files(list(records.values()), checked, key)
        made |= signature
        records |= {path: _record(path, data) for path, data in signature.items()}
    elif INTEGRITY_NAME in on_disk and records != on_disk:
        raise ConfigError(
            f"{source_dir} is signed, and packing changes what was signed",
            details=[path for path in sorted(made) if records[path] != on_disk.get(path)],
            hint="Sign it with the archive: --key FILE (key=). Or remove integrity.json and signature.sig.",
        )
    target = _target(destination, checked)
    if target.resolve().is_relative_to(root):
        raise ConfigError(f"{target} lies inside the directory that is packed", hint="Choose another destination.")
    try:
        _write_package(root, records, made, target)
    except OSError as problem:
        raise ConfigError(
            f"{target} cannot be written: {problem.strerror or problem}", hint="Choose another destination."
        ) from problem
    return Packed(target, left_out)


def sign(package: str | os.PathLike[str], key: Path, destination: Path | None = None) -> Path:
    """Sign a package, in place of the signature it has, if any.

    Args:
        package: A `.expert` file, which is packed again, or an unpacked directory.
        key: The private key (`expert keygen`).
        destination: Where the signed archive goes; the same file when not given. Not for a directory.

    Returns:
        The archive, or the directory.

    Raises:
        ConfigError: The key or the destination cannot be used.
        LoadError: The package cannot be used.
    """
    place = Path(package)
    opened = open_package(place)
    if not place.is_dir():
        return pack(opened.root, destination or place, key=key)
    if destination is not None:
        raise ConfigError(f"{place} is a directory", hint="Pack it to an archive: expert pack DIR -o FILE --key KEY.")
    for name, data in sign_files(opened.files, opened.manifest, key).items():
        (place / name).write_bytes(data)
    return place


def standard_file_name(manifest: Manifest) -> str:
    """`<name>-<base model, lower case, dots to dashes>.v<version>.expert`, for the first base model."""
    base = re.sub(r"[^a-z0-9_-]", "-", manifest.base_models[0].short_name.lower())
    return f"{manifest.name}-{base}.v{manifest.version}{SUFFIX}"


def _manifest(
    root: Path, given: Mapping[str, Any] | None, records: dict[str, FileRecord], made: dict[str, bytes]
) -> tuple[bytes, Manifest]:
    """The manifest to pack, with the adapters' facts filled in, as text and checked; soft prompts go to `made`."""
    if given is not None:
        draft = _to_json(given)
    elif MANIFEST_NAME in records:
        draft = (root / MANIFEST_NAME).read_bytes()
    else:
        raise ManifestError(
            f"{root.name} holds no {MANIFEST_NAME}",
            hint="Write one, or give manifest= (--manifest FILE, or --name, --version and --base-model).",
        )
    source = root.name
    checked = read_manifest(draft, source=source).manifest
    filled = read_json(draft, name=MANIFEST_NAME, error=ManifestError, max_bytes=MAX_MANIFEST_BYTES).value
    before = json.dumps(filled)
    for index, base in enumerate(checked.base_models):
        listed = filled["base_models"][index]["adapters"] if "base_models" in filled else filled["adapters"]
        for spec, entry in zip(base.adapters, listed, strict=True):
            weights = locate_adapter(root, spec, source=source).weights.relative_to(root).as_posix()
            entry["size_bytes"], entry["sha256"] = records[weights].size, records[weights].sha256
    for prompt, entry in zip(checked.soft_prompts, filled.get("soft_prompts") or (), strict=True):
        if Path(prompt.path).suffix in PICKLE_SUFFIXES and prompt.path in records:
            entry["path"] = str(PurePosixPath(prompt.path).with_suffix(".safetensors"))
            made[entry["path"]] = read_pickled_prompt(root / prompt.path, prompt.tokens, source=source)
            del records[prompt.path]
    text = draft if given is None and json.dumps(filled) == before else _to_json(filled)
    return text, read_manifest(text, source=source).manifest


def _record(path: str, data: bytes) -> FileRecord:
    return FileRecord(path, len(data), hashlib.sha256(data).hexdigest())


def _to_json(value: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as problem:
        raise ManifestError(
            f"the manifest cannot be written as JSON: {problem}", hint="Use only what JSON can say."
        ) from problem


def _target(destination: Path, manifest: Manifest) -> Path:
    if destination.is_dir():
        return destination / standard_file_name(manifest)
    if destination.suffix != SUFFIX or not destination.parent.is_dir():
        raise ConfigError(
            f"{destination} is neither a directory nor a file name ending in {SUFFIX}",
            hint=f"Name an existing directory, or a {SUFFIX} file in one.",
        )
    return destination


def _write_package(root: Path, records: Mapping[str, FileRecord], made: Mapping[str, bytes], target: Path) -> None:
    sidecar = target.with_name(target.name + SIDECAR_SUFFIX)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".pack-") as scratch:
        fresh = Path(scratch) / target.name
        with fresh.open("xb") as file:
            _write_archive(root, records, made, file)
            file.flush()
            os.fsync(file.fileno())
        with fresh.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        fresh_sidecar = fresh.with_name(sidecar.name)
        fresh_sidecar.write_text(f"{sha256}  {target.name}\n", encoding="utf-8")
        open_package(fresh, cache_dir=Path(scratch) / "cache")
        with suppress(FileNotFoundError):
            sidecar.unlink()  # first, so that no archive ever stands beside the checksum of another
        fresh.replace(target)
        fresh_sidecar.replace(sidecar)


def _write_archive(root: Path, records: Mapping[str, FileRecord], made: Mapping[str, bytes], file: BinaryIO) -> None:
    """Sorted members, no times, owners or names of the machine; the manifest comes first, to be read early."""
    with (
        SealedGzipWriter(file, COMPRESSION_LEVEL) as packed,
        tarfile.open(mode="w", fileobj=cast("IO[bytes]", packed), format=tarfile.PAX_FORMAT) as archive,
    ):
        for path in sorted(records, key=lambda path: (path != MANIFEST_NAME, path)):
            with io.BytesIO(made[path]) if path in made else (root / path).open("rb") as content:
                archive.addfile(_member(path, records[path].size), content)


def _member(path: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(path)
    member.size = size
    member.mode = 0o644
    return member
