"""Pack a directory into a `.expert` archive: the same input gives the same bytes."""

import gzip
import hashlib
import io
import json
import os
import re
import tarfile
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.errors import ConfigError, ManifestError
from pipeline.package.adapter import locate_adapter
from pipeline.package.integrity import SIDECAR_SUFFIX, FileRecord, scan_directory
from pipeline.package.json_text import read_json
from pipeline.package.limits import ArchiveLimits
from pipeline.package.manifest import Manifest
from pipeline.package.manifest_reader import MANIFEST_NAME, MAX_MANIFEST_BYTES, read_manifest
from pipeline.package.opening import open_package

SUFFIX = ".expert"
COMPRESSION_LEVEL = 6


def pack(source_dir: Path, destination: Path, *, manifest: Mapping[str, Any] | None = None) -> Path:
    """Write a `.expert` archive and the `.sha256` file beside it.

    Every file of the directory is packed. In the manifest, each adapter gets the size and checksum of its weights.

    Args:
        source_dir: The output of PEFT's `save_pretrained`, with whatever else the expert needs: a tokenizer, a grammar,
            a README.
        destination: A file name that ends in `.expert`, or an existing directory, where the archive gets its standard
            name. An archive of that name is replaced.
        manifest: The manifest; when not given, `manifest.json` of the directory.

    Returns:
        The archive. It has been opened once, and is valid.

    Raises:
        ConfigError: The source or the destination cannot be used.
        LoadError: What was packed is not a valid package; nothing is written.
    """
    source_dir, destination = Path(source_dir), Path(destination)
    if not source_dir.is_dir():
        raise ConfigError(f"{source_dir} is not a directory", hint="Name the directory that holds the adapter.")
    root = source_dir.resolve()
    records = scan_directory(root, ArchiveLimits())
    text, checked = _manifest(root, manifest, {record.path: record for record in records})
    target = _target(destination, checked)
    if target.resolve().is_relative_to(root):
        raise ConfigError(f"{target} lies inside the directory that is packed", hint="Choose another destination.")
    try:
        _write_package(root, records, text, target)
    except OSError as problem:
        raise ConfigError(
            f"{target} cannot be written: {problem.strerror or problem}", hint="Choose another destination."
        ) from problem
    return target


def standard_file_name(manifest: Manifest) -> str:
    """`<name>-<base model, lower case, dots to dashes>.v<version>.expert`, for the first base model."""
    base = re.sub(r"[^a-z0-9_-]", "-", manifest.base_models[0].short_name.lower())
    return f"{manifest.name}-{base}.v{manifest.version}{SUFFIX}"


def _manifest(root: Path, given: Mapping[str, Any] | None, records: Mapping[str, FileRecord]) -> tuple[bytes, Manifest]:
    """The manifest to pack, with the facts of the adapters filled in, as text and checked."""
    if given is not None:
        draft = _to_json(given)
    elif MANIFEST_NAME in records:
        draft = (root / MANIFEST_NAME).read_bytes()
    else:
        raise ManifestError(f"{root.name} holds no {MANIFEST_NAME}", hint="Write one, or give manifest=.")
    source = root.name
    checked = read_manifest(draft, source=source).manifest
    filled = read_json(draft, name=MANIFEST_NAME, error=ManifestError, max_bytes=MAX_MANIFEST_BYTES).value
    for index, base in enumerate(checked.base_models):
        listed = filled["base_models"][index]["adapters"] if "base_models" in filled else filled["adapters"]
        for spec, entry in zip(base.adapters, listed, strict=True):
            weights = locate_adapter(root, spec, source=source).weights.relative_to(root).as_posix()
            entry["size_bytes"], entry["sha256"] = records[weights].size, records[weights].sha256
    text = _to_json(filled)
    return text, read_manifest(text, source=source).manifest


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


def _write_package(root: Path, records: tuple[FileRecord, ...], manifest: bytes, target: Path) -> None:
    sidecar = target.with_name(target.name + SIDECAR_SUFFIX)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".pack-") as scratch:
        fresh = Path(scratch) / target.name
        with fresh.open("xb") as file:
            _write_archive(root, records, manifest, file)
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


def _write_archive(root: Path, records: tuple[FileRecord, ...], manifest: bytes, file: BinaryIO) -> None:
    """Sorted members, no times, owners or names of the machine; the manifest comes first, to be read early."""
    with (
        gzip.GzipFile(filename="", mode="wb", compresslevel=COMPRESSION_LEVEL, fileobj=file, mtime=0) as packed,
        tarfile.open(mode="w", fileobj=packed, format=tarfile.PAX_FORMAT) as archive,
    ):
        archive.addfile(_member(MANIFEST_NAME, len(manifest)), io.BytesIO(manifest))
        for record in records:
            if record.path != MANIFEST_NAME:
                with (root / record.path).open("rb") as content:
                    archive.addfile(_member(record.path, record.size), content)


def _member(path: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(path)
    member.size = size
    member.mode = 0o644
    return member
