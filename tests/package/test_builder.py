"""Packing: reproducible, valid, and the identity on every file."""

import gzip
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.errors import AdapterError, ConfigError, ManifestError
from pipeline.package import open_package, pack
from pipeline.package.builder import pack_files
from tests.package.expert_fixtures import expert_files, manifest, weights, write_files

PARTS = st.text(st.sampled_from("abcXYZ0-_. éß漢"), min_size=1, max_size=8).filter(lambda part: part.strip(".") == part)
EXTRAS = st.dictionaries(st.lists(PARTS, min_size=1, max_size=3).map("/".join), st.binary(max_size=300), max_size=5)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def test_a_packed_directory_opens(expert_dir: Callable[..., Path], out: Path, cache: Path) -> None:
    target = pack(expert_dir(), out)
    assert target == out / "expert-test-tiny-1-5b.v0.1.0.expert"
    assert sorted(path.name for path in out.iterdir()) == [target.name, f"{target.name}.sha256"]
    sha = hashlib.sha256(target.read_bytes()).hexdigest()
    assert (out / f"{target.name}.sha256").read_text() == f"{sha}  {target.name}\n"
    package = open_package(target, cache_dir=cache)
    spec = package.base.adapters[0]
    assert (spec.sha256, spec.size_bytes) == (hashlib.sha256(weights()).hexdigest(), len(weights()))
    assert package.warnings == ("expert-test@0.1.0 is not signed",)


def test_facts_of_every_adapter_are_filled_in_and_the_rest_is_kept(expert_dir: Callable[..., Path], out: Path) -> None:
    given_manifest = manifest(
        _note="größe",
        base_models=[
            {"name": "Tiny", "adapters": [{"type": "dora", "sha256": "0" * 64, "size_bytes": 3}]},
            {"name": "Other", "adapters": [{"type": "dora", "path": "other"}]},
        ],
    )
    root = expert_dir(**{"other/adapter_model.safetensors": weights(seed=1)})
    before = (root / "manifest.json").read_bytes()
    package = open_package(pack(root, out, manifest=given_manifest))
    first, second = (base["adapters"][0] for base in package.manifest.raw["base_models"])
    assert first["sha256"] == hashlib.sha256(weights()).hexdigest()
    assert second["sha256"] == hashlib.sha256(weights(seed=1)).hexdigest()
    assert list(package.manifest.raw) == list(given_manifest)
    assert package.manifest.raw["_note"] == "größe"
    assert (root / "manifest.json").read_bytes() == before
    assert given_manifest["base_models"][0]["adapters"][0]["size_bytes"] == 3


def test_schema_1_manifests_are_packed_too(expert_dir: Callable[..., Path], out: Path) -> None:
    old = manifest(schema_version="1.0", base_models=..., base_model="x/Tiny.V2", adapters=[{"type": "dora"}])
    target = pack(expert_dir(), out, manifest=old)
    assert target.name == "expert-test-tiny-v2.v0.1.0.expert"
    assert open_package(target).base.adapters[0].size_bytes == len(weights())


def test_the_bytes_depend_on_the_content_alone(tmp_path: Path) -> None:
    archives = []
    for number in (0, 1):
        files = expert_files()
        root = write_files(
            tmp_path / f"source{number}", {name: files[name] for name in sorted(files, reverse=bool(number))}
        )
        for path in root.rglob("*"):
            os.utime(path, (number * 1e9, number * 1e9))
            path.chmod(0o755 if number else 0o700)
        archives.append(pack(root, tmp_path / f"out{number}.expert").read_bytes())
    assert archives[0] == archives[1]


def test_soft_prompts_of_pytorch_become_safetensors(expert_dir: Callable[..., Path], out: Path) -> None:
    torch = pytest.importorskip("torch")
    prompt = torch.arange(8, dtype=torch.bfloat16).reshape(2, 4)
    data = io.BytesIO()
    torch.save({"prompt": prompt, "note": 1}, data)
    named = manifest(soft_prompts=[{"name": "style", "path": "soft/style.pt", "tokens": 2}])
    package = open_package(pack(expert_dir(**{"soft/style.pt": data.getvalue()}), out, manifest=named))
    assert [prompt.path for prompt in package.manifest.soft_prompts] == ["soft/style.safetensors"]
    assert not (package.root / "soft" / "style.pt").exists()
    from safetensors.torch import load_file

    assert torch.equal(load_file(package.root / "soft" / "style.safetensors")["prompt"], prompt)


class Trap:
    """What a pickle would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/trapped",)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"a": 1}, "it holds 0 tensors"),
        (Trap(), "it names posix.system"),
        ("sparse", "it names torch._utils._rebuild_sparse_tensor"),
        ("flat", "its tensor has shape [8]"),
        ("transposed", "its tensor has shape [2, 4] and strides [1, 2]"),
        ("infinite", "not finite"),
        ("long", "the manifest says 2 tokens"),
    ],
)
def test_other_pickles_are_refused(value: Any, says: str, expert_dir: Callable[..., Path], out: Path) -> None:
    torch = pytest.importorskip("torch")
    tensors = {
        "sparse": torch.eye(2).to_sparse(),
        "flat": torch.zeros(8),
        "transposed": torch.zeros(4, 2).t(),
        "infinite": torch.full((2, 4), torch.inf),
        "long": torch.zeros(3, 4),
    }
    data = io.BytesIO()
    torch.save(tensors.get(value, value) if isinstance(value, str) else value, data)
    named = manifest(soft_prompts=[{"name": "style", "path": "style.pt", "tokens": 2}])
    root = expert_dir(**{"style.pt": data.getvalue(), "manifest.json": json.dumps(named).encode()})
    with pytest.raises(AdapterError) as caught:
        open_package(root)
    assert says in str(caught.value)
    assert list(out.iterdir()) == []


def test_what_a_trainer_keeps_to_continue_is_left_out(expert_dir: Callable[..., Path], out: Path) -> None:
    root = expert_dir(**{"optimizer.pt": b"large", "rng_state_0.pth": b"x", "trainer_state.json": b"{}"})
    packed = pack_files(root, out)
    assert packed.left_out == ("optimizer.pt", "rng_state_0.pth", "trainer_state.json")
    assert not {"optimizer.pt", "trainer_state.json"} & {file.path for file in open_package(packed.path).files}


def test_nothing_of_the_machine_is_in_the_archive(expert_dir: Callable[..., Path], tmp_path: Path) -> None:
    target = pack(expert_dir(), tmp_path / "x.expert")
    assert target.read_bytes()[3:9] == b"\x10" + bytes(5)  # gzip: a comment (the seal), no name, no time
    with tarfile.open(target) as packed:
        members = packed.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
    names = [m.name for m in members]
    assert names == ["manifest.json", *sorted(name for name in names if name != "manifest.json")]
    assert str(tmp_path).encode() not in gzip.decompress(target.read_bytes())


@settings(max_examples=15, deadline=None)
@given(extras=EXTRAS)
def test_pack_then_open_is_the_identity(tmp_path_factory: pytest.TempPathFactory, extras: dict[str, bytes]) -> None:
    base = tmp_path_factory.mktemp("pack")
    files = expert_files() | extras
    assume(not any(other.startswith(f"{name}/") for name in files for other in files))
    root = write_files(base / "source", files)
    target = pack(root, base / "x.expert")
    package = open_package(target, cache_dir=base / "cache")
    for path in root.rglob("*"):
        if path.is_file() and path.name != "manifest.json":
            assert (package.root / path.relative_to(root)).read_bytes() == path.read_bytes()
    packed = {record.path for record in package.files}
    assert packed == {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert open_package(package.root).digest == package.digest
    assert pack(package.root, base / "again.expert").read_bytes() == target.read_bytes()


@pytest.mark.parametrize(
    ("changes", "arguments", "error"),
    [
        ({"manifest__json": None}, {}, ManifestError),
        ({}, {"manifest": {"name": "expert-a"}}, ManifestError),
        ({}, {"manifest": manifest(perf=float("nan"))}, ManifestError),
        ({}, {"manifest": manifest(perf=object())}, ManifestError),
        ({"adapter_model__safetensors": None}, {}, AdapterError),
        ({"adapter_model__safetensors": b"not safetensors"}, {}, AdapterError),
        ({"adapter_config__json": b'{"peft_type": "LORA", "auto_map": {"a": "b"}}'}, {}, AdapterError),
    ],
)
def test_what_is_not_valid_is_not_written(
    changes: dict[str, Any],
    arguments: dict[str, Any],
    error: type[Exception],
    expert_dir: Callable[..., Path],
    out: Path,
) -> None:
    with pytest.raises(error):
        pack(expert_dir(**changes), out, **arguments)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("destination", ["missing/x.expert", "x.tar.gz", "expert/x.expert", "expert"])
def test_destinations_that_cannot_be(destination: str, expert_dir: Callable[..., Path], tmp_path: Path) -> None:
    root = expert_dir()
    with pytest.raises(ConfigError):
        pack(root, tmp_path / destination)
    with pytest.raises(ConfigError, match="is not a directory"):
        pack(tmp_path / "nothing", tmp_path / "x.expert")
    assert len(list(root.rglob("*.expert"))) == 0


def test_packing_again_replaces_archive_and_checksum(expert_dir: Callable[..., Path], out: Path, cache: Path) -> None:
    first = pack(expert_dir(), out / "x.expert").read_bytes()
    target = pack(expert_dir(grammar__gbnf=b'root ::= "b"'), out / "x.expert")
    assert target.read_bytes() != first
    assert open_package(target, cache_dir=cache).grammar == 'root ::= "b"'


def test_manifest_text_is_readable(expert_dir: Callable[..., Path], tmp_path: Path, cache: Path) -> None:
    package = open_package(pack(expert_dir(), tmp_path / "x.expert"), cache_dir=cache)
    text = (package.root / "manifest.json").read_text()
    assert "Größe: ñ" in text
    assert json.loads(text) == package.manifest.raw
