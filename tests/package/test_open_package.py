"""Opening a package by path, directory or URL, and what it then says of itself."""

import hashlib
import json
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from safetensors.numpy import save

from pipeline.errors import (
    ArchiveError,
    BaseModelError,
    GrammarError,
    IntegrityError,
    LoadError,
    ManifestError,
    MissingDependencyError,
    PackageNotFoundError,
)
from pipeline.package import ArchiveLimits, open_package
from tests.package.expert_fixtures import ADAPTER_CONFIG, archive, expert_files, manifest, weights, write_archive
from tests.web import serving_files


def decoding(**fields: Any) -> bytes:
    return json.dumps(manifest(training={"dataset": {}, "config": {}, "decoding": fields})).encode()


def test_what_a_package_says(expert_file: Path, cache: Path) -> None:
    package = open_package(expert_file, cache_dir=cache)
    assert package.label == "expert-test@0.1.0"
    assert package.source == str(expert_file)
    assert package.base == package.manifest.base_models[0]
    assert package.adapter.kind == "dora"
    assert package.adapter_weights.read_bytes() == weights()
    assert package.tokenizer_dir == package.root
    assert package.grammar == 'root ::= "a"\n'
    assert [record.path for record in package.files] == sorted(expert_files())
    assert package.warnings == ("expert-test@0.1.0 is not signed",)
    assert pickle.loads(pickle.dumps(package)) == package  # noqa: S301  # our own object: Ray sends it to workers


def test_archive_and_directory_have_one_digest(expert_file: Path, expert_dir: Callable[..., Path], cache: Path) -> None:
    root = expert_dir()
    from_archive, from_directory = open_package(expert_file, cache_dir=cache), open_package(str(root))
    assert from_archive.digest == from_directory.digest
    assert from_directory.root == root
    assert open_package(from_archive.root).digest == from_archive.digest


def test_nothing_is_there(tmp_path: Path) -> None:
    with pytest.raises(PackageNotFoundError, match="nothing is at"):
        open_package(tmp_path / "missing.expert")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_either_tokenizer_file_makes_a_tokenizer(name: str, expert_dir: Callable[..., Path]) -> None:
    root = expert_dir(tokenizer__json=None, tokenizer_config__json=None)
    assert open_package(root).tokenizer_dir is None
    (root / name).write_text("{}")
    assert open_package(root).tokenizer_dir == root


def test_grammars(expert_dir: Callable[..., Path]) -> None:
    assert open_package(expert_dir(manifest__json=decoding(grammar_file="g.txt"), g__txt=b"named")).grammar == "named"
    assert open_package(expert_dir(manifest__json=decoding())).grammar == 'root ::= "a"\n'
    with pytest.raises(ManifestError) as caught:
        open_package(expert_dir(manifest__json=decoding(grammar_file="gone.gbnf")))
    assert caught.value.details[0].endswith("training.decoding.grammar_file: 'gone.gbnf' is not in the package")
    with pytest.raises(GrammarError, match="not UTF-8"):
        open_package(expert_dir(grammar__gbnf=b"\xff"))


def test_no_grammar(expert_dir: Callable[..., Path]) -> None:
    assert open_package(expert_dir(grammar__gbnf=None)).grammar is None


def test_a_soft_prompt_that_is_not_there_is_an_error(expert_dir: Callable[..., Path]) -> None:
    prompt = {"name": "style", "path": "soft_prompts/style.safetensors", "tokens": 4}
    named = json.dumps(manifest(soft_prompts=[prompt])).encode()
    with pytest.raises(ManifestError, match=r"'soft_prompts/style\.safetensors' is not in the package"):
        open_package(expert_dir(manifest__json=named))
    package = open_package(
        expert_dir(manifest__json=named, **{"soft_prompts/style.safetensors": save({"prompt": np.zeros((4, 8), "f4")})})
    )
    assert package.manifest.soft_prompts[0].tokens == 4


def test_another_base_of_the_same_package(expert_dir: Callable[..., Path], cache: Path, tmp_path: Path) -> None:
    bases = [
        {"name": "F:/models/Tiny", "adapters": [{"type": "dora", "path": "tiny"}]},
        {"name": "Other", "adapters": [{"type": "lora", "path": "other", "size_bytes": 7}]},
        {"name": "Third", "adapters": [{"type": "lora", "path": "third"}]},
    ]
    plain = json.dumps(ADAPTER_CONFIG | {"use_dora": False}).encode()
    files = expert_files(manifest__json=json.dumps(manifest(base_models=bases)).encode()) | {
        "tiny/adapter_model.safetensors": weights(1),
        "other/adapter_model.safetensors": weights(2),
        "third/adapter_model.safetensors": weights(3, dora=False),
        "third/adapter_config.json": plain,
    }
    package = open_package(write_archive(tmp_path / "x.expert", files), cache_dir=cache)
    assert package.adapter_weights.read_bytes() == weights(1)
    third = package.for_base("Third")
    assert (third.base.name, third.adapter.kind, third.digest) == ("Third", "lora", package.digest)
    assert third.adapter_weights.read_bytes() == weights(3, dora=False)
    assert third.for_base("Tiny") == package.for_base("F:/models/Tiny") == package
    with pytest.raises(IntegrityError):
        package.for_base("Other")
    with pytest.raises(BaseModelError, match="no adapter for the base model 'Nope'") as caught:
        package.for_base("Nope")
    assert caught.value.details == ("F:/models/Tiny", "Other", "Third")


@pytest.fixture
def memory() -> Iterator[Any]:
    file_system = fsspec.filesystem("memory")
    yield file_system
    file_system.store.clear()


def test_a_package_behind_a_url(memory: Any, expert_file: Path, cache: Path) -> None:
    memory.pipe_file("/bucket/test.expert", expert_file.read_bytes())
    package = open_package("memory://bucket/test.expert", cache_dir=cache)
    assert package.source == "memory://bucket/test.expert"
    assert package.digest == open_package(expert_file, cache_dir=cache).digest
    assert list((cache / "downloads").iterdir()) == []


def test_the_sidecar_of_a_url_is_checked(memory: Any, expert_file: Path, cache: Path) -> None:
    memory.pipe_file("/b/test.expert", expert_file.read_bytes())
    sha = hashlib.sha256(expert_file.read_bytes()).hexdigest()
    memory.pipe_file("/b/test.expert.sha256", f"{sha}  test.expert\n".encode())
    open_package("memory://b/test.expert", cache_dir=cache)
    memory.pipe_file("/b/test.expert.sha256", f"{'0' * 64}  test.expert\n".encode())
    with pytest.raises(IntegrityError, match=r"test\.expert differs"):
        open_package("memory://b/test.expert", cache_dir=cache)


def test_urls_that_fail(memory: Any, cache: Path) -> None:
    with pytest.raises(PackageNotFoundError, match=r"memory://b/none\.expert"):
        open_package("memory://b/none.expert", cache_dir=cache)
    memory.pipe_file("/b/big.expert", archive(b"") + bytes(5000))
    with pytest.raises(ArchiveError, match="more than 1,000 bytes"):
        open_package("memory://b/big.expert", cache_dir=cache, limits=ArchiveLimits(total_bytes=1000))
    with pytest.raises(LoadError, match="cannot be fetched"):
        open_package("nosuchprotocol://user:secret@host/x.expert?sig=1", cache_dir=cache)
    assert list((cache / "downloads").iterdir()) == []


def test_credentials_of_a_url_are_not_told(cache: Path) -> None:
    with pytest.raises(LoadError) as caught:
        open_package("nosuchprotocol://user:secret@host/x.expert?signature=hidden", cache_dir=cache)
    assert "secret" not in caught.value.message
    assert "hidden" not in caught.value.message


@pytest.mark.usefixtures("without_gcsfs")
def test_a_missing_file_system_package(cache: Path) -> None:
    with pytest.raises(MissingDependencyError, match=r"gs://bucket/x\.expert needs a package"):
        open_package("gs://bucket/x.expert", cache_dir=cache)


def test_a_package_over_http(expert_file: Path, cache: Path) -> None:
    with serving_files(expert_file.parent) as address:
        package = open_package(f"{address}/test.expert", cache_dir=cache)
        assert package.digest == open_package(expert_file, cache_dir=cache).digest
        with pytest.raises(PackageNotFoundError):
            open_package(f"{address}/missing.expert", cache_dir=cache)


def test_importing_the_room_needs_neither_torch_nor_ray() -> None:
    import subprocess

    script = "import sys, pipeline.package; print(sorted({'torch', 'ray', 'transformers', 'peft'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "[]\n"
