"""Which experts may be loaded together: `constraints.requires` and `constraints.incompatible_with`."""

from collections.abc import Sequence

from pipeline.errors import ConfigError
from pipeline.package.manifest import Manifest
from pipeline.package.version_ranges import parse_pattern


def check_together(manifests: Sequence[Manifest]) -> None:
    """See that several experts may be loaded together. One alone always may.

    Args:
        manifests: Of all of them; their patterns have been read before.

    Raises:
        ConfigError: One needs an expert that is not among them, or does not go with one that is.
    """
    if len(manifests) < 2:
        return
    problems = []
    for mine in manifests:
        others = [other for other in manifests if other is not mine]
        label = f"{mine.name}@{mine.version}"
        for pattern in map(parse_pattern, mine.constraints.requires):
            if not any(pattern.matches(other.name, other.version) for other in others):
                problems += [f"{label} requires {pattern.text}"]
        for pattern in map(parse_pattern, mine.constraints.incompatible_with):
            problems += [
                f"{label} is incompatible with {other.name}@{other.version} ({pattern.text})"
                for other in others
                if pattern.matches(other.name, other.version)
            ]
    if problems:
        raise ConfigError(
            "these experts do not go together", details=problems, hint="Load them apart, or in other versions."
        )
