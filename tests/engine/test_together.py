"""How much is computed together where nobody says: the table, and that both engines and every way to them go by it."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.engine import load_expert, load_experts
from pipeline.engine.loader import load_base_model, load_tokenizer
from pipeline.engine.packed import PackedEngine
from pipeline.engine.padded import PaddedEngine
from pipeline.engine.runtime import load_engine, open_experts
from pipeline.engine.together import default_batch_size, default_step_tokens
from pipeline.package import ExpertPackage, open_package
from tests import tiny
from tests.engine.test_packed import stepper

CPU: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
GIVEN = {"batch_size": 3, "max_batch_tokens": 7}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_base(tmp_path_factory.mktemp("base"), vocab_size=len(tiny.tokenizer()))


@pytest.fixture(scope="module")
def package(base: Path, tmp_path_factory: pytest.TempPathFactory) -> ExpertPackage:
    return open_package(tiny.make_package("lora", base, tmp_path_factory.mktemp("packages"))[0])


@pytest.mark.parametrize(("kind", "sizes"), [("cpu", (128, 1024)), ("mps", (128, 1024)), ("cuda", (256, 8192))])
def test_what_suits_a_device(kind: str, sizes: tuple[int, int]) -> None:
    assert (default_batch_size(kind), default_step_tokens(kind)) == sizes


def packed_engines(base: Path, package: ExpertPackage, **options: int) -> Iterator[PackedEngine]:
    """An engine by every way there is."""
    alone = load_expert(package, base, **CPU, **options).engine
    assert isinstance(alone, PackedEngine)
    yield alone
    yield load_experts({"a": package}, base, **CPU, **options).engine
    yield open_experts({}, base, **CPU, **options).engine
    bare = load_engine(base, **CPU, **options)
    assert isinstance(bare, PackedEngine)
    yield bare


def test_a_packed_engine_takes_what_suits_its_device_or_what_is_given(base: Path, package: ExpertPackage) -> None:
    for options, wanted in (({}, (128, 1024)), (GIVEN, (3, 7))):
        for engine in packed_engines(base, package, **options):
            scheduler = stepper(engine).scheduler
            assert (scheduler.max_running, scheduler.max_step_tokens) == wanted
            engine.close()


def test_a_padded_engine_takes_what_suits_its_device_or_what_is_given(base: Path, package: ExpertPackage) -> None:
    for options, wanted in (({}, (128, 16384)), (GIVEN, (3, 7))):
        for engine in (
            load_expert(package, base, engine="padded", **CPU, **options).engine,
            load_engine(base, engine="padded", **CPU, **options),
        ):
            assert isinstance(engine, PaddedEngine)
            assert (engine._batch_size, engine._max_batch_tokens) == wanted


def test_a_padded_engine_on_a_gpu_takes_more(base: Path) -> None:
    on_gpu = replace(load_base_model(base, **CPU), device=torch.device("cuda:1"))  # what is not computed is not there
    assert PaddedEngine(on_gpu, load_tokenizer(None, base))._batch_size == 256
