"""What a person wants to know of a package: its card, and what was verified of it."""

import math
from pathlib import Path
from typing import Any

from pipeline.errors import LoadError
from pipeline.package.adapter import locate_adapter
from pipeline.package.package import ExpertPackage
from pipeline.package.weights import read_safetensors_header


def package_card(package: ExpertPackage) -> dict[str, Any]:
    """What `expert inspect` shows of a package, as plain values."""
    manifest, adapter, decoding = package.manifest, package.adapter, package.manifest.decoding
    targets = adapter.target_modules
    return {
        "package": package.label,
        "description": manifest.description or "",
        "license": manifest.license or "",
        "digest": f"sha256:{package.digest}",
        "signature": package.signature.describe(),
        "base model": package.base.name,
        "adapter": f"{adapter.kind}, rank {adapter.r}" if adapter.kind != "ia3" else "ia3",
        "modules": targets if isinstance(targets, str) else ", ".join(sorted(targets or ())),
        "adapters": _adapters(package),
        "size": f"{sum(record.size for record in package.files):,} bytes in {len(package.files)} files",
        "tokenizer": "its own" if package.tokenizer_dir else "the base model's",
        "grammar": "none" if package.grammar is None else f"{len(package.grammar.encode()):,} bytes of GBNF",
        "soft prompts": [
            f"{prompt.name}: {prompt.tokens} positions, {prompt.path}" for prompt in manifest.soft_prompts
        ],
        "decoding": ", ".join(
            f"{name} {value}"
            for name, value in decoding.model_dump().items()
            if value not in (None, (), [], False) and name != "grammar_type"
        ),
        "requires": list(manifest.constraints.requires),
        "incompatible with": list(manifest.constraints.incompatible_with),
        "capabilities": list(manifest.capabilities),
        "warnings": list(package.warnings),
    }


def verification(package: ExpertPackage) -> dict[str, Any]:
    """What `expert verify` says: what was checked and what it showed, what nothing covers, and the warnings.

    Args:
        package: As `open_package` returned it; what is wrong has been an error there.
    """
    spec = package.base.adapters[0]
    tensors = read_safetensors_header(package.adapter_weights, source=package.label)
    sidecar = Path(f"{package.source}.sha256")
    listed = ["the adapter's weights, by adapters[].sha256"] if spec.sha256 else []
    signature = package.signature
    not_covered = list(signature.not_covered)
    if signature.state == "unsigned":
        not_covered = ["who made the package, and whether it is as they made it"]
    return {
        "package": package.label,
        "checked": {
            "package": f"{package.label}  sha256:{package.digest}",
            "archive": f"{len(package.files)} files, {sum(record.size for record in package.files):,} bytes",
            "manifest": f"schema {package.manifest.schema_version}, valid",
            "checksums": [*listed, *([sidecar.name] if sidecar.is_file() else [])] or "none are given",
            "weights": f"{len(tensors)} tensors as adapter_config.json says, all values finite",
            "tokenizer": "no code, no pattern or template that runs away"
            if package.tokenizer_dir
            else "the base model's",
            "signature": signature.describe(),
        },
        "not_covered": not_covered,
        "warnings": list(package.warnings),
    }


def _adapters(package: ExpertPackage) -> list[str]:
    lines = []
    for base in package.manifest.base_models:
        for spec in base.adapters:
            try:
                weights = locate_adapter(package.root, spec, source=package.label).weights
                tensors = read_safetensors_header(weights, source=package.label)
            except LoadError as problem:
                lines.append(f"{base.short_name}: {problem.message}")
                continue
            count = sum(math.prod(tensor.shape) for tensor in tensors)
            size = weights.stat().st_size
            lines.append(f"{base.short_name}: {spec.type}, {count:,} parameters, {size:,} bytes")
    return lines
