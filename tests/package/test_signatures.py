"""Signatures: who vouches for a package, what that covers, and that not a byte of it can change."""

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pipeline.errors import ConfigError, ExpertError, IntegrityError, LoadError, TrustError
from pipeline.package import open_package, pack
from pipeline.package.builder import sign
from pipeline.package.keys import add_trusted_key, generate_key, trusted_keys
from tests.package.expert_fixtures import expert_files, manifest, write_archive, write_files

MUTATIONS = 1000


@pytest.fixture(autouse=True)
def trust_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EXPERT_TRUST_DIR", str(tmp_path / "trusted"))
    return tmp_path / "trusted"


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return generate_key("alice", tmp_path / "keys")


@pytest.fixture
def signed(expert_dir: Callable[..., Path], keys: tuple[Path, Path], tmp_path: Path) -> Path:
    """An archive, without the checksum file beside it."""
    target = pack(expert_dir(), tmp_path / "signed.expert", key=keys[0])
    target.with_name("signed.expert.sha256").unlink()
    return target


def test_what_each_policy_takes(signed: Path, expert_file: Path, keys: tuple[Path, Path]) -> None:
    assert open_package(signed).signature.state == "signed"
    assert open_package(signed, trust="signed").warnings == ()
    for package, policy in ((signed, "trusted"), (expert_file, "signed"), (expert_file, "trusted")):
        with pytest.raises(TrustError, match="trust is"):
            open_package(package, trust=policy)
    place = add_trusted_key(keys[1])
    assert add_trusted_key(keys[1]) == place
    opened = open_package(signed, trust="trusted")
    assert (opened.signature.state, opened.signature.signer) == ("trusted", "alice")
    assert opened.signature.describe().endswith("whom you trust")
    assert open_package(opened.root, trust="trusted").digest == opened.digest
    assert open_package(expert_file).warnings == ("expert-test@0.1.0 is not signed",)


def test_any_changed_byte_is_refused(signed: Path, tmp_path: Path) -> None:
    whole = signed.read_bytes()
    draw = random.Random(6)
    places = [*range(90), *range(len(whole) - 16, len(whole))]
    places += [draw.randrange(len(whole)) for _ in range(MUTATIONS - len(places))]
    changed, accepted = tmp_path / "changed.expert", []
    for at in places:
        changed.write_bytes(whole[:at] + bytes([whole[at] ^ draw.randrange(1, 256)]) + whole[at + 1 :])
        try:
            open_package(changed)
        except LoadError:
            continue
        accepted.append(at)
    assert accepted == []
    assert len(places) == MUTATIONS


def test_any_changed_byte_of_the_unpacked_files_is_refused(signed: Path, tmp_path: Path) -> None:
    files = {record.path: record.size for record in open_package(signed).files}
    root = write_files(tmp_path / "copy", {path: (open_package(signed).root / path).read_bytes() for path in files})
    draw, accepted = random.Random(7), []
    for path, size in files.items():
        for at in {0, size - 1, *(draw.randrange(size) for _ in range(8))}:
            data = (root / path).read_bytes()
            (root / path).write_bytes(data[:at] + bytes([data[at] ^ draw.randrange(1, 256)]) + data[at + 1 :])
            try:
                open_package(root)
            except ExpertError:
                continue
            finally:
                (root / path).write_bytes(data)
            accepted.append((path, at))
    assert accepted == []
    assert open_package(root, trust="signed")


def unpacked(signed: Path, tmp_path: Path) -> Path:
    package = open_package(signed)
    return write_files(
        tmp_path / "unpacked", {record.path: (package.root / record.path).read_bytes() for record in package.files}
    )


def test_added_and_missing_files_are_refused(signed: Path, tmp_path: Path) -> None:
    root = unpacked(signed, tmp_path)
    (root / "extra").write_bytes(b"")
    with pytest.raises(IntegrityError, match="not what was signed") as caught:
        open_package(root)
    assert caught.value.details == ("extra: not listed",)
    (root / "extra").unlink()
    (root / "grammar.gbnf").unlink()
    with pytest.raises(IntegrityError) as caught:
        open_package(root)
    assert caught.value.details == ("grammar.gbnf: missing",)


def test_a_signature_of_another_package_or_key_is_refused(
    signed: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    root = unpacked(signed, tmp_path)
    other = expert_files(manifest__json=json.dumps(manifest(name="expert-other")).encode())
    foreign = open_package(pack(write_files(tmp_path / "other", other), tmp_path / "other.expert", key=keys[0])).root
    for name in ("integrity.json", "signature.sig"):
        (root / name).write_bytes((foreign / name).read_bytes())
    with pytest.raises(IntegrityError) as caught:
        open_package(root)
    assert "it is for expert-other@0.1.0 over ['Tiny-1.5B']" in caught.value.details
    mallory, _ = generate_key("mallory", tmp_path / "keys")
    root = sign(write_files(tmp_path / "again", expert_files()), mallory)
    listed = (root / "integrity.json").read_bytes()
    sign(root, keys[0])
    (root / "integrity.json").write_bytes(listed)
    with pytest.raises(TrustError, match="the signature of again is wrong"):
        open_package(root)


def test_an_older_version_is_refused_unless_asked_for(keys: tuple[Path, Path], tmp_path: Path) -> None:
    add_trusted_key(keys[1])
    packages = {}
    for version in ("0.9.0", "0.10.0-rc.1", "0.10.0"):
        files = expert_files(manifest__json=json.dumps(manifest(version=version)).encode())
        packages[version] = pack(write_files(tmp_path / version, files), tmp_path / f"{version}.expert", key=keys[0])
    open_package(packages["0.10.0-rc.1"], trust="trusted")
    open_package(packages["0.10.0"], trust="trusted")
    for older in ("0.9.0", "0.10.0-rc.1"):
        with pytest.raises(TrustError, match=r"older than expert-test@0\.10\.0"):
            open_package(packages[older], trust="trusted")
        assert open_package(packages[older], trust="trusted", allow_rollback=True)
        assert open_package(packages[older], trust="signed")
    assert open_package(packages["0.10.0"], trust="trusted")


def legacy(key: Ed25519PrivateKey, **extra: bytes) -> dict[str, bytes]:
    """A package as the published tool signs it: the manifest that is delivered is not the one that was signed."""
    files = expert_files()
    hashes = {path: hashlib.sha256(data).hexdigest() for path, data in files.items()}
    signature = key.sign("\n".join(f"{path}:{hashes[path]}" for path in sorted(hashes)).encode()).hex()
    public = f"ed25519:{key.public_key().public_bytes_raw().hex()}"
    stated = {"pubkey": public, "signature_algorithm": "ed25519", "signature": signature, "files": hashes}
    files["manifest.json"] = json.dumps(manifest(integrity=stated)).encode()
    return files | {"signature.sig": signature.encode()} | extra


def test_a_legacy_signature_is_read_for_what_it_covers(trust_store: Path, tmp_path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    package = write_archive(tmp_path / "legacy.expert", legacy(key, **{"later.txt": b"added"}))
    unknown = open_package(package)
    assert unknown.signature.state == "legacy"
    assert unknown.signature.signer is None
    trust_store.mkdir()
    (trust_store / "tool.pub").write_text(f"ed25519:{key.public_key().public_bytes_raw().hex()}")
    known = open_package(package)
    assert (known.signature.signer, known.signature.not_covered) == ("tool", ("manifest.json", "later.txt"))
    assert "manifest.json, later.txt not covered" in known.warnings[-1]
    with pytest.raises(TrustError):
        open_package(package, trust="signed")


def test_a_legacy_package_that_was_changed_is_refused(trust_store: Path, tmp_path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    changed = write_archive(tmp_path / "changed.expert", legacy(key, **{"grammar.gbnf": b'root ::= "b"'}))
    with pytest.raises(IntegrityError, match="not what was signed"):
        open_package(changed)
    trust_store.mkdir()
    (trust_store / "tool.pub").write_text(f"ed25519:{key.public_key().public_bytes_raw().hex()}")
    files = legacy(key)
    forged = json.loads(files["manifest.json"])
    forged["integrity"]["files"]["new.txt"] = hashlib.sha256(b"x").hexdigest()
    files |= {"manifest.json": json.dumps(forged).encode(), "new.txt": b"x"}
    with pytest.raises(TrustError, match="it is not of the key it names"):
        open_package(write_archive(tmp_path / "forged.expert", files))


def test_packing_what_is_signed_keeps_the_signature_or_says_so(
    signed: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    root = unpacked(signed, tmp_path)
    assert pack(root, tmp_path / "again.expert").read_bytes() == signed.read_bytes()
    (root / "manifest.json").write_text(json.dumps(manifest(description="Another.")))
    with pytest.raises(ConfigError, match="is signed, and packing changes"):
        pack(root, tmp_path / "again.expert")
    assert open_package(pack(root, tmp_path / "again.expert", key=keys[0]), trust="signed")


def test_signing_an_archive_is_signing_its_content(signed: Path, expert_file: Path, keys: tuple[Path, Path]) -> None:
    assert sign(expert_file, keys[0]) == expert_file
    assert open_package(expert_file, trust="signed").digest == open_package(signed).digest


def test_keys_are_told_apart_and_never_replaced(keys: tuple[Path, Path], tmp_path: Path, trust_store: Path) -> None:
    assert keys[0].stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="cannot be written: File exists"):
        generate_key("alice", tmp_path / "keys")
    with pytest.raises(ConfigError, match="no name for a key"):
        generate_key("../alice", tmp_path / "keys")
    with pytest.raises(ConfigError, match="holds no public key"):
        add_trusted_key(keys[0])
    add_trusted_key(keys[1])
    _, other = generate_key("bob", tmp_path / "keys")
    with pytest.raises(ConfigError, match="another key is trusted as alice"):
        add_trusted_key(other, "alice")
    assert list(trusted_keys().values()) == ["alice"]
    (trust_store / "broken.pub").write_text("ed25519:zz")
    with pytest.raises(ConfigError, match=r"broken\.pub holds no public key"):
        trusted_keys()
    with pytest.raises(ConfigError, match="holds no private key"):
        sign(write_files(tmp_path / "x", expert_files()), keys[1])
