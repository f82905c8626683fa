"""What clients are told of an expert."""

from pipeline.engine.chat import DIALECTS
from pipeline.package import ExpertPackage
from pipeline.serve.messages import ModelCard


def model_card(name: str, package: ExpertPackage) -> ModelCard:
    """The card of an expert.

    Args:
        name: The served name.
        package: The expert.
    """
    capabilities = package.manifest.capabilities
    return ModelCard(
        name=name,
        base=package.base.short_name,
        version=package.manifest.version,
        digest=package.digest,
        kind=package.adapter.kind,
        description=package.manifest.description or None,
        takes_schema=any(name.startswith("database:") or name == "task:extraction" for name in capabilities),
        dialects=tuple(dict.fromkeys(DIALECTS[capability] for capability in capabilities if capability in DIALECTS)),
    )
