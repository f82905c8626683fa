"""Who may ask: API keys, known by their hashes alone."""

import hashlib
import hmac
import os
import re
from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from pipeline.errors import ConfigError

DEFAULT_VARIABLE = "EXPERT_API_KEYS"
_HASH = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KeyName = Annotated[str, Field(pattern=f"^{_NAME.pattern}$")]
_KeyHash = Annotated[
    str,
    Field(
        pattern=f"^{_HASH.pattern}$",
        json_schema_extra={"expected": "the sha256 of an API key, 64 lower-case hex digits"},
    ),
]


class KeysConfig(BaseModel):
    """Where the hashes of the API keys are. Without any, the service is open, and only loopback may reach it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    hashes: dict[_KeyName, _KeyHash] = Field(
        default_factory=dict,
        description="From the name of a client to the sha256 of its key, as `printf %s KEY | sha256sum` prints it.",
    )
    variable: str = Field(
        DEFAULT_VARIABLE,
        min_length=1,
        description="Environment variable with more of them, as `name=sha256`, separated by commas.",
    )

    def load(self, environment: Mapping[str, str] = os.environ) -> "KeyRing":
        """Gather the keys of the configuration and of the environment variable.

        Raises:
            ConfigError: The variable is named and not set; or it holds what is no hash, or a name given before.
        """
        text = environment.get(self.variable)
        if text is None:
            if "variable" in self.model_fields_set:
                raise ConfigError(
                    f"keys.variable names {self.variable}, which is not set",
                    hint=f"Set {self.variable} to name=sha256, or leave keys.variable out.",
                )
            return KeyRing(self.hashes)
        found = dict(self.hashes)
        for place, entry in enumerate(filter(None, (part.strip() for part in text.split(","))), 1):
            name, _, digest = (part.strip() for part in entry.partition("="))
            # The entry itself is not shown: it may be a key that was put there by mistake.
            if not _NAME.fullmatch(name) or not _HASH.fullmatch(digest) or name in found:
                wrong = "a name that is given twice" if name in found else "not name=sha256"
                raise ConfigError(
                    f"entry {place} of {self.variable} is {wrong}",
                    hint="Give name=sha256 with 64 lower-case hex digits (printf %s KEY | sha256sum), by commas.",
                )
            found[name] = digest
        if not found:
            raise ConfigError(
                f"{self.variable} is set and holds no key", hint=f"Set {self.variable} to name=sha256, or unset it."
            )
        return KeyRing(found)


class KeyRing:
    """The clients that may ask.

    Args:
        hashes: From the name of a client to the sha256 of its key, in hex. Empty: everyone may ask.
    """

    def __init__(self, hashes: Mapping[str, str]) -> None:
        self._digests = {name: bytes.fromhex(digest) for name, digest in hashes.items()}

    def __bool__(self) -> bool:
        """Whether a key is needed."""
        return bool(self._digests)

    def client_of(self, key: str) -> str | None:
        """The name of the client whose key this is, or None. Takes as long whichever key is right, or none."""
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        found = None
        for name, known in self._digests.items():
            if hmac.compare_digest(digest, known):
                found = name
        return found


def key_hash(key: str) -> str:
    """What the configuration holds for an API key: its sha256, in hex."""
    return hashlib.sha256(key.encode()).hexdigest()
