"""The table of hostile and broken packages: each is made at test time, and refused by name or taken for what it is.

The numbers are those of the project's list of hostile inputs: 1 to 33 archives, 34 to 49 manifests and signatures, 50
to 63 weights, 64 to 70 tokenizers and templates. Each number has a case at least.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.numpy import save

from pipeline.package import ArchiveLimits
from pipeline.package.builder import sign
from pipeline.package.signatures import TrustPolicy
from tests.package.expert_fixtures import archive, expert_files, manifest, member, weights, write_files
from tests.package.hostile_archives import ARCHIVES, GOOD, ZIPS
from tests.package.hostile_packages import PACKAGES, files, manifest_text, one_base

NUMBERS = range(1, 71)
SMALL = ArchiveLimits(total_bytes=64 << 20, file_bytes=32 << 20, members=200, path_length=200, depth=8)
ALICE, MALLORY = bytes([1]) * 32, bytes([2]) * 32  # private keys; Alice's public key is in the trust store
Built = bytes | dict[str, bytes]
Build = Callable[[], Built]


@dataclass(frozen=True)
class Case:
    """One hostile package.

    Args:
        name: Its number in the list, and what it is.
        build: Makes the bytes of the file, or the files of a package that is otherwise whole.
        error: The name of the error's class; empty where the package must open.
        says: A part of its text; of one that opens, of its warnings and of the names and modes of its files.
        trust: The policy it is opened with.
        before: Makes a package that is opened first.
        base_model: The base model that a person names, below the working directory; None when they name none.
    """

    name: str
    build: Build
    error: str
    says: str
    trust: TrustPolicy = "any"
    before: Build | None = None
    base_model: str | None = "base"


def public_key(private: bytes) -> str:
    """The text of a key that a trust store holds."""
    return f"ed25519:{Ed25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw().hex()}"


def signed(key: bytes = ALICE, **changes: object) -> dict[str, bytes]:
    """The files of a package that is signed; keywords change its manifest."""
    with tempfile.TemporaryDirectory() as folder:
        root = write_files(Path(folder) / "x", expert_files(manifest__json=json.dumps(manifest(**changes)).encode()))
        key_file = Path(folder) / "key"
        key_file.write_bytes(key)
        sign(root, key_file)
        return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def with_signature(of: dict[str, bytes], *names: str) -> dict[str, bytes]:
    """A signed package with files of another one's signature."""
    return signed() | {name: of[name] for name in names}


def without(built: dict[str, bytes], name: str) -> dict[str, bytes]:
    return {path: data for path, data in built.items() if path != name}


def named(name: str) -> Build:
    """A package that names its base model so."""
    return files(manifest__json=manifest(base_models=[{"name": name, "adapters": [{"type": "dora"}]}]))


SIGNED = [
    Case("45 member not in integrity.json", lambda: signed() | {"x": b""}, "IntegrityError", "x: not listed"),
    Case(
        "45 member that is gone", lambda: without(signed(), "grammar.gbnf"), "IntegrityError", "grammar.gbnf: missing"
    ),
    Case("45 member of other bytes", lambda: signed() | {"grammar.gbnf": b""}, "IntegrityError", "signed with sha256"),
    Case("47 no signature, one is asked for", expert_files, "TrustError", "is not signed; trust is", trust="signed"),
    Case("47 no signature, a known one is asked for", expert_files, "TrustError", "is not signed", trust="trusted"),
    Case(
        "47 signature that is no signature",
        lambda: signed() | {"signature.sig": b"0" * 127 + b"\n"},
        "TrustError",
        "no ed25519 signature",
    ),
    Case("47 key of a stranger", lambda: signed(MALLORY), "TrustError", "not in your trust store", trust="trusted"),
    Case(
        "47 signature by another key than it names",
        lambda: with_signature(signed(MALLORY), "signature.sig"),
        "TrustError",
        "another key has signed",
    ),
    Case(
        "47 signature of another package",
        lambda: with_signature(signed(name="expert-other"), "integrity.json", "signature.sig"),
        "IntegrityError",
        "it is for expert-other@0.1.0",
    ),
    Case(
        "48 older than the one opened before",
        lambda: signed(version="0.9.0"),
        "TrustError",
        "expert-test@0.9.0 is older than expert-test@0.10.0",
        trust="trusted",
        before=lambda: signed(version="0.10.0"),
    ),
]
BASES = [
    Case("61 base in a directory above", named("../outside"), "BaseModelError", "is not followed", base_model=None),
    Case("61 base on a path that climbs", named("base/../base"), "BaseModelError", "not followed", base_model=None),
    Case("61 base behind backslashes", named("..\\outside"), "BaseModelError", "not followed", base_model=None),
    Case("61 base at a URL", named("https://host/x"), "BaseModelError", "a URL, which is not", base_model=None),
    Case("61 base at a file URL", named("file:///etc"), "BaseModelError", "a URL, which is not", base_model=None),
]
SHA256 = hashlib.sha256(weights()).hexdigest()
HARMLESS = [
    Case("16 nested archive stays closed", lambda: archive(GOOD, member("a.expert", archive(GOOD))), "", "a.expert"),
    Case("31 setuid mode is dropped", lambda: archive(GOOD, member("x", mode=b"0006777\0")), "", "x 0644"),
    Case("43 unknown field", manifest_text('"license"', '"licence": 1, "license"'), "", "licence: unknown field"),
    Case("46 sha256 in upper case", files(manifest__json=one_base(sha256=SHA256.upper())), "", "is not signed"),
    Case("46 sha256 absent", files(manifest__json=one_base(sha256="", size_bytes=0)), "", "is not signed"),
    Case("59 pickle beside safetensors", files(adapter_model__bin=b"\x80\x04"), "", "is a pickle; it is never opened"),
    Case("61 base at a URL, one is named", named("https://host/x"), "", "made on; read as 'x'"),
    Case("61 base above, one is named", named("../x"), "", "made on; read as 'x'"),
]
CASES = [
    *(Case(name, build, "ArchiveError", says) for name, build, says in (*ARCHIVES, *ZIPS)),
    *(Case(*case) for case in PACKAGES),
    *SIGNED,
    *BASES,
    *HARMLESS,
]
BASE_FILES = {
    "config.json": json.dumps({"vocab_size": 32, "hidden_size": 8}).encode(),
    "model.safetensors": save({"model.layers.0.self_attn.q_proj.weight": np.zeros((8, 8), np.float32)}),
    "tokenizer.json": json.dumps({"added_tokens": [{"id": 31, "content": "<end>"}]}).encode(),
}
