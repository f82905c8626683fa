"""How much an archive may hold."""

from dataclasses import dataclass, fields

from pipeline.errors import ConfigError


@dataclass(frozen=True)
class ArchiveLimits:
    """Bounds on an archive, an unpacked directory or a download, counted while it is read.

    Args:
        total_bytes: The decompressed archive, headers included; also the compressed file itself.
        file_bytes: One file, in bytes.
        members: Files and directories together.
        path_length: One path inside the package, in bytes of UTF-8.
        depth: Parts of one path: `a/b/c` has three.
        ratio: Decompressed bytes for one compressed byte; counted from 16 MiB on, so that small text is never refused.

    Raises:
        ConfigError: A bound is not a whole number of at least 1.
    """

    total_bytes: int = 1 << 30
    file_bytes: int = 1 << 30
    members: int = 10_000
    path_length: int = 512
    depth: int = 16
    ratio: int = 200

    def __post_init__(self) -> None:
        for bound in fields(self):
            value = getattr(self, bound.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"ArchiveLimits.{bound.name} is {value!r}", hint="Give a whole number of at least 1.")
