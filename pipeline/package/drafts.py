"""Manifests for `pack`: read from a file, or drafted from what an adapter's directory says of itself."""

import re
from pathlib import Path
from typing import Any

from pipeline.errors import AdapterError, ConfigError, ManifestError
from pipeline.package.adapter import CONFIG_NAME, MAX_CONFIG_BYTES, read_adapter_config
from pipeline.package.json_text import read_json
from pipeline.package.manifest import is_name, is_version
from pipeline.package.manifest_reader import MAX_MANIFEST_BYTES


def read_manifest_file(path: Path) -> dict[str, Any]:
    """A manifest in a file of its own; it is checked when it is packed.

    Raises:
        ConfigError: The file cannot be read.
        ManifestError: It holds no JSON object.
    """
    return dict(read_json(_bytes(path), name=str(path), error=ManifestError, max_bytes=MAX_MANIFEST_BYTES).value)


def draft_manifest(
    directory: Path, *, name: str, version: str, base_model: str | None, description: str, licence: str
) -> dict[str, Any]:
    """A manifest of schema 2.0 for the adapter in a directory.

    Args:
        directory: Holds `adapter_config.json`.
        name: `expert-...`.
        version: A semantic version.
        base_model: What the adapter was trained over; None for what its config says.
        description, licence: For people; may be empty.

    Raises:
        AdapterError: The config cannot be used, or names no base model and none is given.
        ConfigError: There is none, or the name or version is not of the form that manifests have.
    """
    if not is_name(name):
        raise ConfigError(
            f"--name {name!r} is no name of an expert",
            hint="It begins with expert- and has small letters, digits and hyphens, such as "
            f"expert-{re.sub('[^a-z0-9]+', '-', name.lower().removeprefix('expert')).strip('-') or 'mine'}.",
        )
    if not is_version(version):
        raise ConfigError(f"--version {version!r} is no semantic version", hint="Write for example 0.3.0.")
    data = _bytes(directory / CONFIG_NAME)
    config, _ = read_adapter_config(data, source=directory.name)
    raw = read_json(data, name=CONFIG_NAME, error=AdapterError, max_bytes=MAX_CONFIG_BYTES).value
    base = base_model or raw.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise AdapterError(
            f"{CONFIG_NAME} in {directory.name} does not say what the adapter was trained over",
            hint="Give the base model's name: --base-model NAME (base_model=).",
        )
    if Path(base).is_absolute() or "\\" in base:  # a path of the machine it was trained on is of no use elsewhere
        base = base.replace("\\", "/").rstrip("/").rpartition("/")[2]
    adapter: dict[str, Any] = {"type": config.kind}
    if isinstance(config.target_modules, tuple):
        adapter["target_modules"] = list(config.target_modules)
    if config.peft_type in ("LORA", "ADALORA"):
        adapter |= {"r": config.r, "alpha": config.lora_alpha}
    return {
        "name": name,
        "version": version,
        "schema_version": "2.0",
        "description": description,
        "license": licence,
        "base_models": [{"name": base, "adapters": [adapter]}],
        "capabilities": [],
        "constraints": {"load_order": 0, "incompatible_with": [], "requires": []},
    }


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as problem:
        raise ConfigError(f"{path} cannot be read: {problem.strerror}", hint="Check the path.") from problem
