"""A `.expert` file -> a verified, unpacked `ExpertPackage`. This room knows neither torch nor Ray."""

from pipeline.package.adapter import AdapterConfig
from pipeline.package.base_model import model_digest, resolve_base_model, weights_digest
from pipeline.package.builder import pack, standard_file_name
from pipeline.package.integrity import FileRecord
from pipeline.package.limits import ArchiveLimits
from pipeline.package.manifest import (
    AdapterSpec,
    BaseModelSpec,
    Constraints,
    Decoding,
    Manifest,
    Routing,
    SoftPrompt,
)
from pipeline.package.package import ExpertPackage, open_package, open_planned

__all__ = [
    "AdapterConfig",
    "AdapterSpec",
    "ArchiveLimits",
    "BaseModelSpec",
    "Constraints",
    "Decoding",
    "ExpertPackage",
    "FileRecord",
    "Manifest",
    "Routing",
    "SoftPrompt",
    "model_digest",
    "open_package",
    "open_planned",
    "pack",
    "resolve_base_model",
    "standard_file_name",
    "weights_digest",
]
