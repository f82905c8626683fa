"""Errors of other libraries: ours say what to do, theirs is the cause. Ray's are in `e2e/test_cluster.py`."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipeline import Expert, demo
from pipeline.batch.config import BatchConfig
from pipeline.batch.plan import open_experts, prepare
from pipeline.engine.foreign import is_out_of_memory
from pipeline.engine.packed import PackedEngine
from pipeline.engine.runtime import load_engine, load_expert
from pipeline.errors import (
    AdapterError,
    BaseModelError,
    ClusterError,
    DatasetError,
    ExpertError,
    LoadError,
    OutOfMemoryError,
    TokenizerError,
)
from pipeline.package import ExpertPackage, open_package


def base_model(folder: Path, change: Callable[[Path], Any]) -> Path:
    copy = Path(shutil.copytree(demo.BASE_MODEL, folder / "base"))
    change(copy)
    return copy


def with_config(**changes: Any) -> Callable[[Path], None]:
    """Writes these values into the model's config.json."""
    return lambda model: change_json(model / "config.json", **changes)


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def with_tokenizer_config(model: Path) -> None:
    (model / "tokenizer_config.json").write_text('{"added_tokens_decoder": 5}')


def without_weights_of_a_size_that_no_machine_has(model: Path) -> None:
    change_json(model / "config.json", vocab_size=10**12, tie_word_embeddings=False)
    weights = load_file(model / "model.safetensors")
    save_file({name: value for name, value in weights.items() if "embed" not in name}, model / "model.safetensors")


def adapter(folder: Path, task: demo.Task, **changes: Any) -> ExpertPackage:
    """A demo expert, unpacked, whose adapter is of another configuration."""
    copy = Path(shutil.copytree(open_package(demo.package(task)).root, folder / "expert"))
    (copy / "integrity.json").unlink(missing_ok=True)
    change_json(copy / "manifest.json", integrity=None)
    change_json(copy / "adapter_config.json", **changes)
    return open_package(copy)


def too_large_to_merge(folder: Path) -> ExpertPackage:
    """Each weight is a number, and what they add to the base model's is none that it can hold."""
    package = adapter(folder, "cypher")
    weights = load_file(package.adapter_weights)
    large = {name: torch.full_like(value, 1e30) for name, value in weights.items()}
    save_file(large, package.adapter_weights)
    return package


def cut_off_since_it_was_opened(folder: Path) -> ExpertPackage:
    package = adapter(folder, "cypher")
    package.adapter_weights.write_bytes(package.adapter_weights.read_bytes()[:1000])
    return package


def load(folder: Path, change: Callable[[Path], Any]) -> None:
    load_engine(base_model(folder, change), device="cpu")


def cut_off(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])


def plan(folder: Path, dataset: str, **options: Any) -> None:
    given = {"expert": str(demo.package("sql")), "base_model": str(demo.BASE_MODEL), "output": str(folder / "out")}
    config = BatchConfig.from_options(dataset=dataset, **given, **options)
    prepare(config, open_experts(config))


def no_parquet(folder: Path) -> None:
    (folder / "x.parquet").write_bytes(b"PAR1" + bytes(range(64)) + (64).to_bytes(4, "little") + b"PAR1")
    plan(folder, str(folder / "x.parquet"))


CASES: list[tuple[str, Callable[[Path], Any], type[ExpertError], type[BaseException]]] = [
    ("torch", lambda at: load(at, with_config(intermediate_size=-1)), BaseModelError, RuntimeError),
    ("torch, an index", lambda at: load(at, with_config(vocab_size=0)), BaseModelError, IndexError),
    (
        "torch, memory",
        lambda at: load(at, without_weights_of_a_size_that_no_machine_has),
        OutOfMemoryError,
        RuntimeError,
    ),
    ("transformers", lambda at: load(at, with_config(model_type="no_such_model")), BaseModelError, ValueError),
    ("transformers, a type", lambda at: load(at, with_config(model_type=[])), BaseModelError, TypeError),
    ("transformers, a check", lambda at: load(at, with_config(pad_token_id=10**6)), BaseModelError, AssertionError),
    (
        "huggingface_hub, a field",
        lambda at: load(at, with_config(hidden_size="wide")),
        BaseModelError,
        StrictDataclassFieldValidationError,
    ),
    ("transformers, a tokenizer", lambda at: load(at, with_tokenizer_config), TokenizerError, AttributeError),
    ("safetensors", lambda at: load_engine(base_model(at, cut_off)), BaseModelError, SafetensorError),
    ("pyarrow", no_parquet, DatasetError, OSError),
    ("fsspec, a package", lambda _: Expert.load("abacus://bucket/x.expert"), LoadError, ValueError),
    ("fsspec, a dataset", lambda at: plan(at, "abacus://bucket/x.parquet"), DatasetError, ValueError),
    ("http", lambda _: Expert.load("http://127.0.0.1:9/x.expert"), LoadError, OSError),
]


@pytest.mark.parametrize(("meet", "kind", "cause"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_foreign_error_is_ours_and_its_cause_is_kept(
    tmp_path: Path, meet: Callable[[Path], Any], kind: type[ExpertError], cause: type[BaseException]
) -> None:
    with pytest.raises(kind) as caught:
        meet(tmp_path)
    assert isinstance(caught.value.__cause__, cause)
    assert caught.value.hint


ADAPTERS: list[tuple[str, Callable[[Path], ExpertPackage], str, type[BaseException]]] = [
    ("PEFT, a pair", lambda at: adapter(at, "sql", lora_bias=True), "is refused by PEFT", ValueError),
    ("PEFT, a lack", lambda at: adapter(at, "cypher", layers_pattern="x"), "is refused by PEFT", ValueError),
    ("PEFT, a module", lambda at: adapter(at, "cypher", target_modules=["norm"]), "does not fit the base", ValueError),
    ("PEFT, no module", lambda at: adapter(at, "cypher", target_modules=["x"]), "does not fit the base", ValueError),
    ("safetensors, an adapter", cut_off_since_it_was_opened, "cannot be read", SafetensorError),
]


@pytest.mark.parametrize("beside", [False, True], ids=["merged", "beside"])
@pytest.mark.parametrize(("make", "says", "cause"), [case[1:] for case in ADAPTERS], ids=[case[0] for case in ADAPTERS])
def test_an_adapter_that_a_library_refuses(
    tmp_path: Path, make: Callable[[Path], ExpertPackage], says: str, cause: type[BaseException], beside: bool
) -> None:
    package = make(tmp_path)
    merged, others = partial(load_expert, package), partial(load_engine, packages={"one": package})
    with pytest.raises(AdapterError, match=says) as caught:
        (others if beside else merged)(base_path=demo.BASE_MODEL, device="cpu")
    assert isinstance(caught.value.__cause__, cause)
    assert caught.value.details[0].startswith(type(caught.value.__cause__).__name__)
    assert caught.value.hint


def test_an_adapter_that_cannot_be_merged(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="cannot be merged into the base model") as caught:
        load_expert(too_large_to_merge(tmp_path), demo.BASE_MODEL, device="cpu", dtype="float32")
    assert isinstance(caught.value.__cause__, ValueError)
    assert "NaNs detected" in caught.value.details[0]
    assert "not finite" in caught.value.hint


def test_too_little_memory_is_known_by_its_kind_or_its_words() -> None:
    with pytest.raises(RuntimeError) as real:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert type(real.value) is RuntimeError, "torch has no kind for it on a CPU"
    told = [
        real.value,
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."),
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
    ]
    assert [is_out_of_memory(error) for error in told] == [True] * len(told)
    others = [RuntimeError("expected all tensors on one device"), ValueError("memory"), OSError(2, "No such file")]
    assert [is_out_of_memory(error) for error in others] == [False] * len(others)


def test_a_gpu_that_is_too_small_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are read into the machine's memory first: torch says it when they go to the device."""

    def no_room(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.\nGPU 0 has 0 bytes free.")

    monkeypatch.setattr(torch.nn.Module, "to", no_room)
    with pytest.raises(OutOfMemoryError, match="there is too little memory") as caught:
        load_engine(demo.BASE_MODEL, device="cpu")
    assert caught.value.details == (
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 MiB.",
        "GPU 0 has 0 bytes free.",
    )


def test_a_device_without_room_for_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torch.empty

    def no_room(*size: Any, **options: Any) -> torch.Tensor:
        if isinstance(size[0], tuple) and len(size[0]) == 5:  # of keys and values
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(*size, **options)

    monkeypatch.setattr(torch, "empty", no_room)
    for load_one in (
        lambda: load_engine(demo.BASE_MODEL, device="cpu"),
        lambda: load_expert(open_package(demo.package("sql")), demo.BASE_MODEL, device="cpu"),
    ):
        with pytest.raises(OutOfMemoryError, match="too little memory on the device for the engine") as caught:
            load_one()
        assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
        assert "kv_cache_bytes" in caught.value.hint


def test_a_device_without_room_for_one_more_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load_engine(demo.BASE_MODEL, {"sql": open_package(demo.package("sql"))}, device="cpu")
    assert isinstance(engine, PackedEngine)
    assert engine.bank is not None

    def no_room(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", no_room)
        with pytest.raises(OutOfMemoryError, match="one more adapter") as caught:
            engine.bank.load("json", open_package(demo.package("json")))
    assert "max_loaded_experts" in caught.value.hint
    assert engine.bank.names() == ("sql",)
    engine.bank.load("json", open_package(demo.package("json")))
    assert engine.bank.names() == ("sql", "json"), "it may be tried again"
    engine.close()


def test_a_ray_that_does_not_start_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray says it with an error of no kind; whether it shuts down what did start is seen, and not done."""
    ray = pytest.importorskip("ray")
    from pipeline.cluster import start_local

    shut_down: list[bool] = []

    def init(**_: Any) -> None:
        raise Exception("The current node timed out during startup.\n\nLook at the logs.")  # noqa: TRY002  # as Ray does

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: shut_down.append(True))
    with pytest.raises(ClusterError, match="Ray did not start on this machine") as caught:
        start_local()
    assert caught.value.details == ("The current node timed out during startup.", "Look at the logs.")
    assert "Run it again" in caught.value.hint
    assert shut_down == [True]
