"""Errors of other libraries: ours say what to do, theirs is the cause. Ray's are in `e2e/test_cluster.py`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from pipeline import Expert, demo
from pipeline.batch.config import BatchConfig
from pipeline.batch.plan import open_experts, prepare
from pipeline.engine.runtime import load_engine
from pipeline.errors import BaseModelError, ClusterError, ConfigError, DatasetError, ExpertError, LoadError


def base_model(folder: Path, change: Callable[[Path], Any]) -> Path:
    copy = Path(shutil.copytree(demo.BASE_MODEL, folder / "base"))
    change(copy)
    return copy


def of_an_unknown_type(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "no_such_model"}))


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
    ("torch", lambda _: load_engine(demo.BASE_MODEL, device="abacus"), ConfigError, RuntimeError),
    ("transformers", lambda at: load_engine(base_model(at, of_an_unknown_type)), BaseModelError, ValueError),
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
