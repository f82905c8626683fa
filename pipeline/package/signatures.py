"""Who vouches for a package.

    integrity.json    name, version, base models, the signer's key, and every other file with its size and sha256
    signature.sig     the ed25519 signature over the exact bytes of integrity.json, as 128 hex digits and a newline

A file that integrity.json does not list, or lists otherwise, is refused; so is a signature without it.

The published tool signs otherwise: `path:sha256` lines of all files *before* it writes `integrity` into manifest.json.
That cannot cover the manifest that is delivered. It is read as `legacy`, for what it covers, with a key of the trust
store.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import IntegrityError, TrustError
from pipeline.package.integrity import INTEGRITY_NAME, SIGNATURE_NAME, FileRecord
from pipeline.package.json_text import read_json
from pipeline.package.keys import parse_public_key, public_key, read_private_key, trusted_keys
from pipeline.package.manifest import Manifest

MANIFEST_NAME = "manifest.json"
INTEGRITY_FORMAT = 1
MAX_INTEGRITY_BYTES = 8 << 20
_SIGNATURE = re.compile(r"[0-9a-f]{128}\n")
_LEGACY_SIGNATURE = re.compile(r"[0-9a-f]{128}")
_AGAIN = "Fetch the package again from where it was published, or have it signed again: expert sign."

TrustPolicy = Literal["any", "signed", "trusted"]
TRUST_POLICIES: tuple[TrustPolicy, ...] = ("any", "signed", "trusted")
State = Literal["unsigned", "signed", "trusted", "legacy"]


@dataclass(frozen=True)
class Signature:
    """What is known of who vouches for a package.

    Args:
        state: `trusted`: signed with a key of the trust store; `signed`: with another key, so that the package is as
            whoever that is has made it; `legacy`: signed as the published tool does; or `unsigned`.
        key: `ed25519:<hex>`, or None.
        signer: The trust store's name of that key, or None.
        not_covered: Files that the signature does not cover.
    """

    state: State = "unsigned"
    key: str | None = None
    signer: str | None = None
    not_covered: tuple[str, ...] = ()

    def describe(self) -> str:
        """One line for a person."""
        who = f" by {self.signer} ({self.key})" if self.signer else f" with the key {self.key}" if self.key else ""
        match self.state:
            case "trusted":
                return f"signed{who}, whom you trust"
            case "signed":
                return f"signed{who}, which is not in your trust store"
            case "legacy":
                return f"signed as the published tool does{who}: {', '.join(self.not_covered)} not covered"
        return "not signed"

    def warnings(self, label: str) -> tuple[str, ...]:
        """That the package is not signed, or covered in part."""
        return () if self.state in ("signed", "trusted") else (f"{label} is {self.describe()}",)


UNSIGNED = Signature()


def read_signature(root: Path, files: tuple[FileRecord, ...], manifest: Manifest, *, source: str) -> Signature:
    """Check the signature of a package, if it has one.

    Args:
        root: The unpacked package.
        files: Every file of it.
        manifest: What it says.
        source: The package, as messages name it.

    Raises:
        IntegrityError: A file is not the one that was signed, or is missing, or was added.
        TrustError: The signature is missing or wrong.
    """
    records = {record.path: record for record in files}
    if INTEGRITY_NAME in records:
        return _read(root, records, manifest, source)
    legacy = manifest.raw.get("integrity")
    if SIGNATURE_NAME in records or (isinstance(legacy, dict) and legacy.get("signature")):
        return _read_legacy(root, records, legacy if isinstance(legacy, dict) else {}, source)
    return UNSIGNED


def require(policy: TrustPolicy, signature: Signature, *, label: str) -> None:
    """Hold a package to a policy.

    Raises:
        TrustError: It is not signed as the policy asks.
    """
    allowed: dict[TrustPolicy, tuple[State, ...]] = {"signed": ("signed", "trusted"), "trusted": ("trusted",)}
    if policy != "any" and signature.state not in allowed[policy]:
        hint = "Ask for a package that is signed (expert sign), or load it with trust: any."
        if signature.state == "signed":
            hint = "When you know whose key it is, put it into the trust store: expert trust FILE.pub"
        raise TrustError(f"{label} is {signature.describe()}; trust is {policy!r}", hint=hint)


def sign_files(files: Sequence[FileRecord], manifest: Manifest, key_file: Path) -> dict[str, bytes]:
    """Sign a package.

    Args:
        files: Every file of it; a signature that is among them is left out.
        manifest: Its manifest.
        key_file: The private key.

    Returns:
        The bytes of `integrity.json` and `signature.sig`, by name.

    Raises:
        ConfigError: The key cannot be used.
    """
    private = read_private_key(key_file)
    key = public_key(private)
    document = {
        "format": INTEGRITY_FORMAT,
        "name": manifest.name,
        "version": manifest.version,
        "base_models": [base.name for base in manifest.base_models],
        "key": key.text,
        "files": [asdict(record) for record in sorted(_listed(files), key=lambda record: record.path)],
    }
    data = (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode()
    return {INTEGRITY_NAME: data, SIGNATURE_NAME: f"{private.sign(data).hex()}\n".encode()}


def _listed(files: Sequence[FileRecord]) -> list[FileRecord]:
    return [record for record in files if record.path not in (INTEGRITY_NAME, SIGNATURE_NAME)]


def _read(root: Path, records: Mapping[str, FileRecord], manifest: Manifest, source: str) -> Signature:
    if SIGNATURE_NAME not in records:
        raise TrustError(f"{source} holds {INTEGRITY_NAME} without {SIGNATURE_NAME}", hint=_AGAIN)
    data = (root / INTEGRITY_NAME).read_bytes()
    signature = _signature_text(root, _SIGNATURE, source)
    name = f"{INTEGRITY_NAME} in {source}"
    document = read_json(data, name=name, error=IntegrityError, max_bytes=MAX_INTEGRITY_BYTES)
    value: dict[str, Any] = document.value
    key = parse_public_key(value["key"]) if isinstance(value.get("key"), str) else None
    if document.problems or value.get("format") != INTEGRITY_FORMAT or key is None:
        raise IntegrityError(f"{name} is not in a form that is known", hint=_AGAIN)
    if not key.has_signed(data, bytes.fromhex(signature.strip())):
        raise TrustError(
            f"the signature of {source} is wrong: {INTEGRITY_NAME} has changed, or another key has signed",
            hint=_AGAIN,
            details=[f"it names the key {key.text}"],
        )
    listed = _listed_files(value.get("files"), name)
    there = {record.path: record for record in _listed(tuple(records.values()))}
    problems = [f"{path}: not listed" for path in sorted(there.keys() - listed.keys())]
    problems += [f"{path}: missing" for path in sorted(listed.keys() - there.keys())]
    problems += [
        f"{path}: signed with sha256 {listed[path].sha256}, has {record.sha256}"
        for path, record in sorted(there.items())
        if path in listed and listed[path] != record
    ]
    said = (value.get("name"), value.get("version"), value.get("base_models"))
    if said != (manifest.name, manifest.version, [base.name for base in manifest.base_models]):
        problems.append(f"it is for {said[0]}@{said[1]} over {said[2]}")
    if problems:
        raise IntegrityError(f"{source} is not what was signed", hint=_AGAIN, details=problems[:20])
    signer = trusted_keys().get(key)
    return Signature("signed" if signer is None else "trusted", key.text, signer)


def _listed_files(value: Any, name: str) -> dict[str, FileRecord]:
    found: dict[str, FileRecord] = {}
    for entry in value if isinstance(value, list) else [None]:
        fields = entry if isinstance(entry, dict) and entry.keys() == {"path", "size", "sha256"} else {}
        path, size, sha256 = fields.get("path"), fields.get("size"), fields.get("sha256")
        if not isinstance(path, str) or type(size) is not int or not isinstance(sha256, str) or path in found:
            raise IntegrityError(f"{name} is not in a form that is known", hint=_AGAIN, details=["files is not a list"])
        found[path] = FileRecord(path, size, sha256)
    return found


def _read_legacy(root: Path, records: Mapping[str, FileRecord], stated: dict[str, Any], source: str) -> Signature:
    """What the published tool has signed; the manifest it delivers is not among it."""
    files = stated.get("files")
    if not isinstance(files, dict) or not all(isinstance(sha256, str) for sha256 in files.values()):
        raise TrustError(
            f"{source} holds a signature, and nothing that says what was signed",
            hint=_AGAIN,
            details=[f"it has no {INTEGRITY_NAME}, and its manifest no integrity.files"],
        )
    ours = {path: record for path, record in records.items() if path not in (MANIFEST_NAME, SIGNATURE_NAME)}
    theirs = {path: sha256 for path, sha256 in files.items() if path not in (MANIFEST_NAME, SIGNATURE_NAME)}
    problems = [f"{path}: missing" for path in sorted(theirs.keys() - ours.keys())]
    problems += [
        f"{path}: signed with sha256 {theirs[path]}, has {record.sha256}"
        for path, record in sorted(ours.items())
        if path in theirs and theirs[path] != record.sha256
    ]
    if problems:
        raise IntegrityError(f"{source} is not what was signed", hint=_AGAIN, details=problems[:20])
    signature = (
        _signature_text(root, _LEGACY_SIGNATURE, source)
        if SIGNATURE_NAME in records
        else str(stated["signature"]).strip()
    )
    message = "\n".join(f"{path}:{files[path]}" for path in sorted(files, key=str.encode)).encode()
    if not _LEGACY_SIGNATURE.fullmatch(signature.strip()):
        raise TrustError(f"the signature of {source} is no ed25519 signature", hint=_AGAIN)
    mine = trusted_keys()
    signed_by = next((key for key in mine if key.has_signed(message, bytes.fromhex(signature.strip()))), None)
    claimed = parse_public_key(str(stated.get("pubkey")))
    if signed_by is None and claimed is not None and claimed in mine:
        raise TrustError(f"the signature of {source} is wrong: it is not of the key it names", hint=_AGAIN)
    not_covered = (MANIFEST_NAME, *sorted(ours.keys() - theirs.keys()))
    if signed_by is None:
        return Signature("legacy", None, None, (*not_covered, "and by whom it is signed"))
    return Signature("legacy", signed_by.text, mine[signed_by], not_covered)


def _signature_text(root: Path, form: re.Pattern[str], source: str) -> str:
    with (root / SIGNATURE_NAME).open("rb") as file:
        data = file.read(1024)
    text = data.decode("ascii", "replace")
    if not form.fullmatch(text if form is _SIGNATURE else text.strip()):
        raise TrustError(f"{SIGNATURE_NAME} in {source} is no ed25519 signature", hint=_AGAIN)
    return text
