"""The base model is found in the promised order, and every place that failed is told."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline.errors import BaseModelError
from pipeline.package import BaseModelSpec, model_digest, resolve_base_model, weights_digest


@pytest.fixture(autouse=True)
def no_models_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EXPERT_MODELS_DIR", raising=False)


def model(folder: Path, *shards: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    for number, name in enumerate(shards or ("model.safetensors",)):
        save_file({"w": np.full(2, number, np.float32)}, folder / name)
    return folder


def spec(name: str = "F:/models/Tiny-1B", sha256: str | None = None) -> BaseModelSpec:
    return BaseModelSpec.model_validate({"name": name, "sha256": sha256, "adapters": [{"type": "lora"}]})


def tried(base: BaseModelSpec, **more: object) -> tuple[str, ...]:
    with pytest.raises(BaseModelError) as caught:
        resolve_base_model(base, package="expert-a@1.0.0", **more)  # type: ignore[arg-type]
    assert base.name in caught.value.message
    return caught.value.details


def test_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = model(tmp_path / "exact" / "Tiny-1B")
    base = spec(str(exact))
    assert resolve_base_model(base) == exact
    in_dir = model(tmp_path / "models" / "Tiny-1B")
    monkeypatch.setenv("EXPERT_MODELS_DIR", str(tmp_path / "models"))
    assert resolve_base_model(base) == in_dir
    mapped = model(tmp_path / "mapped")
    assert resolve_base_model(base, models={"Tiny-1B": str(mapped)}) == mapped
    by_name = model(tmp_path / "by-name")
    assert resolve_base_model(base, models={"Tiny-1B": str(mapped), str(exact): str(by_name)}) == by_name
    named = model(tmp_path / "named")
    assert resolve_base_model(base, models={"Tiny-1B": str(mapped)}, base_model=named) == named


def test_the_last_part_of_a_windows_path_is_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = model(tmp_path / "Tiny-1B")
    monkeypatch.setenv("EXPERT_MODELS_DIR", str(tmp_path))
    assert resolve_base_model(spec("F:\\models\\Tiny-1B")) == found
    assert resolve_base_model(spec("../../Tiny-1B")) == found


@pytest.mark.parametrize("name", ["..", "/..", "a/.."])
def test_a_name_never_climbs_out_of_the_models_dir(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model(tmp_path)
    (tmp_path / "models").mkdir()
    monkeypatch.setenv("EXPERT_MODELS_DIR", str(tmp_path / "models"))
    monkeypatch.chdir("/")
    tried(spec(name))


def test_what_a_person_names_is_never_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model(tmp_path / "models" / "Tiny-1B")
    monkeypatch.setenv("EXPERT_MODELS_DIR", str(tmp_path / "models"))
    missing = tmp_path / "missing"
    assert tried(spec(), base_model=Path(__file__)) == (f"base_model= {__file__}: a file, not a directory",)
    assert tried(spec(), base_model=missing) == (f"base_model= {missing}: no such directory",)
    assert tried(spec(), models={"Tiny-1B": str(missing)}) == (f"models['Tiny-1B'] {missing}: no such directory",)


def test_every_place_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tried(spec()) == (
        "the manifest's name F:/models/Tiny-1B: no such directory",
        "$EXPERT_MODELS_DIR is not set",
    )
    (tmp_path / "Tiny-1B").mkdir()
    monkeypatch.setenv("EXPERT_MODELS_DIR", str(tmp_path))
    assert tried(spec())[0] == f"$EXPERT_MODELS_DIR {tmp_path}/Tiny-1B: holds no config.json"
    (tmp_path / "Tiny-1B" / "config.json").write_text("{}")
    (tmp_path / "Tiny-1B" / "pytorch_model.bin").write_bytes(b"")
    assert tried(spec())[0] == f"$EXPERT_MODELS_DIR {tmp_path}/Tiny-1B: holds no *.safetensors"


HUB_SCRIPT = """
import json, sys
from pipeline.errors import BaseModelError
from pipeline.package import BaseModelSpec, resolve_base_model
spec = BaseModelSpec.model_validate({"name": sys.argv[1], "adapters": [{"type": "lora"}]})
try:
    print(json.dumps(str(resolve_base_model(spec, base_model=sys.argv[2] or None))))
except BaseModelError as error:
    print(json.dumps([*error.details, error.hint]))
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[tuple[str, list[str]]]:
    """A model hub of this machine that has nothing: its address, and the paths that it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the name of the base class
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


def from_hub(home: Path, hub: str, name: str, base_model: str = "") -> str | list[str]:
    """Resolve with a Hugging Face cache that was filled before, and a hub, in a process of its own."""
    environment = {**os.environ, "HF_HOME": str(home), "HF_ENDPOINT": hub, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment["HF_HUB_OFFLINE"] = "0"
    command = [sys.executable, "-c", HUB_SCRIPT, name, base_model]
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, check=True, timeout=120)
    found: str | list[str] = json.loads(done.stdout)
    return found


def test_a_manifest_finds_what_is_in_the_hubs_cache_and_downloads_nothing(
    tmp_path: Path, hub: tuple[str, list[str]]
) -> None:
    address, asked = hub
    repo = tmp_path / "hub" / "models--Qwen--Qwen9-Tiny"
    snapshot = model(repo / "snapshots" / ("a" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    for name in ("Qwen/Qwen9-Tiny", "Qwen9-Tiny"):
        assert from_hub(tmp_path, address, name) == str(snapshot)
    told = from_hub(tmp_path, address, "Qwen8-Tiny")
    assert told[1] == (
        "the manifest's name Hugging Face Qwen/Qwen8-Tiny: not in the cache of this machine; nothing is downloaded"
    )
    assert told[-1].endswith("To download it: base_model='Qwen/Qwen8-Tiny' (--base-model Qwen/Qwen8-Tiny).")
    assert not any("Hugging Face" in line or "download" in line for line in from_hub(tmp_path, address, "Tiny-1B"))
    assert asked == []


def test_what_a_person_names_is_asked_of_the_hub(tmp_path: Path, hub: tuple[str, list[str]]) -> None:
    address, asked = hub
    told = from_hub(tmp_path, address, "Tiny-1B", "org/Missing")
    assert told[0] == "base_model= org/Missing: no such directory"
    assert told[1].startswith("base_model= Hugging Face org/Missing: ")
    assert any("org/Missing" in path for path in asked)


def test_the_weights_digest(tmp_path: Path) -> None:
    one = model(tmp_path / "one")
    assert weights_digest(one) == hashlib.sha256((one / "model.safetensors").read_bytes()).hexdigest()
    two = model(tmp_path / "two", "b.safetensors", "a.safetensors")
    lines = "".join(
        f"{name}:{hashlib.sha256((two / name).read_bytes()).hexdigest()}\n"
        for name in ("a.safetensors", "b.safetensors")
    )
    assert weights_digest(two) == hashlib.sha256(lines.encode()).hexdigest()
    with pytest.raises(BaseModelError):
        weights_digest(tmp_path)


def test_a_checksum_of_the_manifest_is_compared(tmp_path: Path) -> None:
    found = model(tmp_path / "Tiny")
    assert resolve_base_model(spec(str(found), weights_digest(found).upper())) == found
    with pytest.raises(BaseModelError, match="is not the base model that expert-a was made for") as caught:
        resolve_base_model(spec(str(found), "0" * 64), package="expert-a")
    assert weights_digest(found) in caught.value.details[1]


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"])
def test_the_model_digest_covers_what_decides_an_answer(name: str, tmp_path: Path) -> None:
    found = model(tmp_path)
    before = model_digest(found)
    (found / "README.md").write_text("x")
    assert model_digest(found) == before
    (found / name).write_text('{"a": 1}')
    assert model_digest(found) != before


def test_the_model_digest_covers_the_weights(tmp_path: Path) -> None:
    assert model_digest(model(tmp_path / "a")) == model_digest(model(tmp_path / "b"))
    assert model_digest(model(tmp_path / "a")) != model_digest(model(tmp_path / "c", "other.safetensors"))
    with pytest.raises(BaseModelError):
        model_digest(tmp_path)
