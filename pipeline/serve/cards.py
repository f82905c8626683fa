"""What clients are told of an expert."""

from typing import Any

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
        routing=package.manifest.routing,
    )


def model_body(card: ModelCard, created: int) -> dict[str, Any]:
    """An expert as `GET /v1/models/{name}` shows it.

    Args:
        card: The expert.
        created: When the service came to know it, in seconds since 1970.
    """
    return {
        "id": card.name,
        "object": "model",
        "created": created,
        "owned_by": "expert-pipeline",
        "base": card.base,
        "version": card.version,
        "digest": card.digest,
        "kind": card.kind,
        "description": card.description,
        "takes_schema": card.takes_schema,
        "dialects": list(card.dialects),
    }
