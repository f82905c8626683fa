"""A `.expert` file -> a verified, unpacked `ExpertPackage`. This room knows neither torch nor Ray."""

from pipeline.package.adapter import AdapterConfig
from pipeline.package.base_model import (
    FoundBaseModel,
    find_base_model,
    local_base_model,
    model_digest,
    resolve_base_model,
    weights_digest,
)
from pipeline.package.builder import pack, standard_file_name
from pipeline.package.constraints import check_together
from pipeline.package.fits import fitting_base_model
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
from pipeline.package.opening import open_package, open_planned
from pipeline.package.package import ExpertPackage
from pipeline.package.signatures import Signature, TrustPolicy
from pipeline.package.store import PackageStore, StagedPackage

__all__ = [
    "AdapterConfig",
    "AdapterSpec",
    "ArchiveLimits",
    "BaseModelSpec",
    "Constraints",
    "Decoding",
    "ExpertPackage",
    "FileRecord",
    "FoundBaseModel",
    "Manifest",
    "PackageStore",
    "Routing",
    "Signature",
    "SoftPrompt",
    "StagedPackage",
    "TrustPolicy",
    "check_together",
    "find_base_model",
    "fitting_base_model",
    "local_base_model",
    "model_digest",
    "open_package",
    "open_planned",
    "pack",
    "resolve_base_model",
    "standard_file_name",
    "weights_digest",
]
