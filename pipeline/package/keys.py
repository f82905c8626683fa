"""Ed25519 keys: of those who sign packages, and of those whom a person trusts.

A public key is the text `ed25519:<64 hex digits>`, as the published tool writes it; a private key is PKCS #8 in PEM, or
the 32 raw bytes of the published tool.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

TRUST_DIR_VARIABLE = "EXPERT_TRUST_DIR"
MAX_KEY_BYTES = 4096
_PUBLIC = re.compile(r"ed25519:([0-9a-f]{64})")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,100}")


@dataclass(frozen=True)
class PublicKey:
    """Whose signatures can be checked: `ed25519:<hex>`."""

    text: str

    @property
    def short(self) -> str:
        """Enough of it for a table."""
        return self.text[: len("ed25519:") + 16]

    def has_signed(self, message: bytes, signature: bytes) -> bool:
        """Whether a signature over a message was made with the private key of this one.

        Raises:
            MissingDependencyError: `cryptography` is not installed.
        """
        try:
            from cryptography.exceptions import InvalidSignature
            from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        except ImportError as problem:
            raise _no_cryptography() from problem
        try:
            Ed25519PublicKey.from_public_bytes(bytes.fromhex(self.text.removeprefix("ed25519:"))).verify(
                signature, message
            )
        except (InvalidSignature, ValueError):
            return False
        return True


def parse_public_key(text: str) -> PublicKey | None:
    """The key that a text spells, exactly; None where it spells none."""
    return PublicKey(text) if _PUBLIC.fullmatch(text) else None


def trust_dir() -> Path:
    """`$EXPERT_TRUST_DIR`, or `~/.config/expert/trusted`."""
    named = os.environ.get(TRUST_DIR_VARIABLE)
    return Path(named).expanduser() if named else Path.home() / ".config" / "expert" / "trusted"


def trusted_keys() -> dict[PublicKey, str]:
    """The keys of the trust store, `*.pub`, and the names of their files; none where there is no such directory.

    Raises:
        ConfigError: A file holds no key.
    """
    found: dict[PublicKey, str] = {}
    for path in sorted(trust_dir().glob("*.pub")):
        try:
            with path.open("rb") as file:
                key = parse_public_key(file.read(MAX_KEY_BYTES).decode().strip())
        except (OSError, UnicodeDecodeError):
            key = None
        if key is None:
            raise ConfigError(f"{path} holds no public key", hint="It should hold ed25519:<64 hex digits>; remove it.")
        found.setdefault(key, path.stem)
    return found


def generate_key(name: str, folder: Path) -> tuple[Path, Path]:
    """Make a pair of keys: `<name>.key`, to be kept secret, and `<name>.pub`.

    Returns:
        The two files, the private one first; only its owner may read it.

    Raises:
        ConfigError: The name is none for a file, a file is there already, or cannot be written.
        MissingDependencyError: `cryptography` is not installed.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} is no name for a key", hint="Use letters, digits, '.', '_', '@' and '-'.")
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    except ImportError as problem:
        raise _no_cryptography() from problem
    made = Ed25519PrivateKey.generate()
    private = made.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    places = folder / f"{name}.key", folder / f"{name}.pub"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for place, data, mode in (
            (places[0], private, 0o600),
            (places[1], f"{public_key(made).text}\n".encode(), 0o644),
        ):
            handle = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
    except OSError as problem:
        raise ConfigError(
            f"{problem.filename or folder} cannot be written: {problem.strerror}",
            hint="A key is never replaced: choose another name or folder.",
        ) from problem
    return places


def read_private_key(path: Path) -> "Ed25519PrivateKey":
    """The private key in a file.

    Raises:
        ConfigError: It cannot be read, or holds no such key.
        MissingDependencyError: `cryptography` is not installed.
    """
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    except ImportError as problem:
        raise _no_cryptography() from problem
    try:
        with path.open("rb") as file:
            data = file.read(MAX_KEY_BYTES)
        key = (
            Ed25519PrivateKey.from_private_bytes(data) if len(data) == 32 else load_pem_private_key(data, password=None)
        )
    except OSError as problem:
        raise ConfigError(f"{path} cannot be read: {problem.strerror}", hint="Name the .key file.") from problem
    except (ValueError, TypeError, UnsupportedAlgorithm) as problem:
        raise ConfigError(f"{path} holds no private key", hint="Name the .key file of `expert keygen`.") from problem
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path} is no ed25519 key", hint="Make one: expert keygen NAME.")
    return key


def public_key(private: "Ed25519PrivateKey") -> PublicKey:
    """The public half of a key."""
    return PublicKey(f"ed25519:{private.public_key().public_bytes_raw().hex()}")


def _no_cryptography() -> MissingDependencyError:
    return MissingDependencyError(
        "signatures need the package cryptography, which is not installed", hint="pip install cryptography"
    )


def add_trusted_key(path: Path, name: str | None = None) -> Path:
    """Put a public key into the trust store.

    Args:
        path: `NAME.pub`.
        name: Whose it is; the file's name when not given.

    Returns:
        The file in the trust store.

    Raises:
        ConfigError: The file holds no public key, the name is none, or another key is trusted under it.
    """
    try:
        with path.open("rb") as file:
            key = parse_public_key(file.read(MAX_KEY_BYTES).decode().strip())
    except (OSError, UnicodeDecodeError) as problem:
        raise ConfigError(f"{path} cannot be read: {problem}", hint="Name a .pub file.") from problem
    if key is None:
        raise ConfigError(f"{path} holds no public key", hint="It should hold ed25519:<64 hex digits>.")
    chosen = name or path.stem
    if not _NAME.fullmatch(chosen):
        raise ConfigError(f"{chosen!r} is no name for a key", hint="Use letters, digits, '.', '_', '@' and '-'.")
    place = trust_dir() / f"{chosen}.pub"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.open("x", encoding="ascii") as file:
            file.write(f"{key.text}\n")
    except FileExistsError as problem:
        if place.read_text(encoding="ascii").strip() != key.text:
            raise ConfigError(
                f"another key is trusted as {chosen}", hint=f"Choose another --name, or remove {place} first."
            ) from problem
    except OSError as problem:
        raise ConfigError(
            f"{place} cannot be written: {problem.strerror}", hint="Set EXPERT_TRUST_DIR to a folder of yours."
        ) from problem
    return place
