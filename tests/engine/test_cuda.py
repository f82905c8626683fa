"""The packed engine on a GPU: the oracles, recorded steps against eager ones, waiting, and memory."""

import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.engine import Request, SamplingParams
from pipeline.engine.loader import load_base_model, load_tokenizer
from pipeline.engine.memory import free_memory
from pipeline.engine.packed import PackedEngine
from pipeline.engine.runner import Runner
from pipeline.engine.runtime import load_engine
from pipeline.engine.sequence import start
from pipeline.engine.step_engine import StepEngine
from pipeline.engine.steps import Entry, Step
from pipeline.engine.stopping import StopRules
from pipeline.package import ExpertPackage, open_package
from tests import tiny
from tests.engine.test_decode_graphs import Refusing
from tests.engine.test_packed import EXPERTS, LIMITS, TIGHT, VOCAB, answers, mixed_requests, stepper, stock_tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

WORKSPACES = 128 << 20  # bytes that cuBLAS keeps, at most
POOL_BYTES = 256 << 20


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_base(tmp_path_factory.mktemp("base"), vocab_size=VOCAB)


@pytest.fixture(scope="module")
def packages(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ExpertPackage]:
    folder = tmp_path_factory.mktemp("packages")
    return {kind: open_package(tiny.make_package(kind, base, folder)[0]) for kind in tiny.ADAPTERS}


@pytest.fixture(scope="module")
def oracles(base: Path) -> dict[str | None, Any]:
    """The base, and each kind of adapter unmerged on it under PEFT."""
    adapted: dict[str | None, Any] = {kind: tiny.make_adapted(kind, base).to("cuda") for kind in tiny.ADAPTERS}
    return adapted | {None: AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval().to("cuda")}


@pytest.fixture(params=["torch", "triton"])
def load(request: pytest.FixtureRequest) -> Iterator[Callable[..., PackedEngine]]:
    """Loads packed engines, which are closed after the test."""
    use_triton = request.param == "triton"
    if use_triton:
        pytest.importorskip("triton", reason="Triton is not installed")
    loaded: list[PackedEngine] = []

    def load(path: Path, packages: dict[str, ExpertPackage] | None = None, **options: Any) -> PackedEngine:
        engine = load_engine(
            path, packages, device="cuda", use_triton=use_triton, **({"kv_cache_bytes": POOL_BYTES} | options)
        )
        assert isinstance(engine, PackedEngine)
        loaded.append(engine)
        return engine

    yield load
    for engine in loaded:
        engine.close()


def num_recorded(engine: PackedEngine) -> int:
    graphs = stepper(engine)._runner.graphs
    assert graphs is not None
    return graphs.num_recorded


@pytest.mark.parametrize("limits", LIMITS)
def test_experts_answer_as_each_does_alone_under_peft(
    load: Callable[..., PackedEngine],
    base: Path,
    packages: dict[str, ExpertPackage],
    oracles: dict[str | None, Any],
    limits: str,
) -> None:
    asked = mixed_requests(32, EXPERTS, seed=2)
    engine = load(base, packages, dtype="float32", **LIMITS[limits])
    wanted = {one.id: stock_tokens(oracles[one.expert], one) for one in asked}
    for _ in range(2):  # the second time more steps are replayed
        found = answers(engine, asked)
        assert {one.id: found[one.id].token_ids for one in asked} == wanted
    assert num_recorded(engine) > 0


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_every_architecture_answers_as_stock_generate(
    load: Callable[..., PackedEngine], architecture: str, tmp_path: Path
) -> None:
    path = tiny.make_model(tmp_path, architecture.split()[0], **tiny.ARCHITECTURES[architecture])
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval().to("cuda")
    asked = mixed_requests(14, [None])
    wanted = [stock_tokens(model, one) for one in asked]
    for limits in (LIMITS["roomy"], TIGHT):
        found = answers(load(path, dtype="float32", **limits), asked)
        assert [found[one.id].token_ids for one in asked] == wanted


def test_bfloat16_seldom_chooses_another_token_than_stock_generate(
    load: Callable[..., PackedEngine], base: Path, record_property: Callable[[str, object], None]
) -> None:
    """Where two scores are nearly equal, rounding decides; how often, is reported."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval().to("cuda")
    asked = mixed_requests(64, [None], seed=3)
    found = answers(load(base, dtype="bfloat16"), asked)
    num_flips = num_compared = 0
    for one in asked:
        wanted = stock_tokens(model, one)
        same = [ours == theirs for ours, theirs in zip(found[one.id].token_ids, wanted, strict=True)]
        num_compared += same.index(False) + 1 if False in same else len(same)  # after a flip the texts differ
        num_flips += False in same
    record_property("flip_rate", num_flips / num_compared)
    logging.getLogger(__name__).warning("%d of %d tokens differ in bfloat16", num_flips, num_compared)
    assert num_flips <= 0.05 * num_compared


def test_bfloat16_answers_everything(
    load: Callable[..., PackedEngine], base: Path, packages: dict[str, ExpertPackage]
) -> None:
    engine = load(base, packages, dtype="bfloat16", batch_size=8, max_batch_tokens=32)
    for one in answers(engine, mixed_requests(32, EXPERTS, seed=2, temperature=0.8)).values():
        assert one.failure is None
        assert one.finish_reason == "length"


def test_what_is_computed_together_suits_a_gpu(load: Callable[..., PackedEngine], base: Path) -> None:
    scheduler = stepper(load(base)).scheduler
    assert (scheduler.max_running, scheduler.max_step_tokens) == (256, 8192)


# --- recorded steps --------------------------------------------------------------------------------------------------


class Watched(Runner):
    """A runner on the GPU whose forward may not wait for the device while `is_strict`."""

    is_strict = False

    def run(self, step: Step) -> torch.Tensor:
        if not self.is_strict:
            return super().run(step)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
            try:
                return super().run(step)
            finally:
                torch.cuda.set_sync_debug_mode("default")


def stepping(base: Path, dtype: str, record: Any = None) -> tuple[Watched, StepEngine]:
    runner = Watched(load_base_model(base, device="cuda", dtype=dtype), kv_cache_bytes=POOL_BYTES, record=record)
    return runner, StepEngine(runner, 512, max_running=16, max_step_tokens=256)


def run_all(base: Path, engine: StepEngine, asked: list[Request]) -> list[list[int]]:
    rules = StopRules(load_tokenizer(None, base), frozenset({2}))
    sequences = [sequence for request in asked for sequence in start(request, rules)]
    assert engine.add(sequences) == []
    while engine.has_work:
        engine.step()
    return [sequence.token_ids for sequence in sequences]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recorded_steps_compute_what_the_same_steps_do_eagerly(base: Path, dtype: str) -> None:
    asked = mixed_requests(32, [None], seed=4)
    eager, recorded = stepping(base, dtype, Refusing()), stepping(base, dtype)
    for _ in range(3):
        assert run_all(base, recorded[1], asked) == run_all(base, eager[1], asked)
    assert recorded[0].graphs is not None
    assert recorded[0].graphs.num_recorded > 0


@pytest.mark.parametrize("is_recorded", [True, False])
def test_a_forward_never_waits_for_the_device(base: Path, is_recorded: bool) -> None:
    runner, engine = stepping(base, "float32", None if is_recorded else Refusing())
    asked = mixed_requests(16, [None], seed=5)
    wanted = run_all(base, engine, asked)
    for _ in range(2):  # what is recorded is recorded now
        run_all(base, engine, asked)
    runner.is_strict = True
    assert run_all(base, engine, asked) == wanted


def test_a_greedy_decode_step_waits_once(base: Path) -> None:
    _, engine = stepping(base, "float32")
    asked = [Request(str(at), (5 + at,) * 9, SamplingParams(max_tokens=40, ignore_eos=True)) for at in range(8)]
    rules = StopRules(load_tokenizer(None, base), frozenset({2}))
    engine.add([sequence for request in asked for sequence in start(request, rules)])
    for _ in range(8):  # the prompts, and the shapes of the steps after them
        engine.step()
    assert all(isinstance(entry, Entry) and entry.num_generated for entry in engine.scheduler.running)
    for _ in range(10):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                engine.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits = [one for one in caught if "synchronizing CUDA operation" in str(one.message)]
        assert len(waits) == 1, [str(one.message) for one in waits]


def test_memory_is_where_it_was_after_closing(base: Path, packages: dict[str, ExpertPackage]) -> None:
    held = [torch.cuda.memory_reserved()]
    for _ in range(4):
        engine = load_engine(base, packages, device="cuda", dtype="bfloat16", kv_cache_bytes=POOL_BYTES)
        assert isinstance(engine, PackedEngine)
        for _ in range(2):
            answers(engine, mixed_requests(16, EXPERTS, seed=6))
        assert torch.cuda.memory_allocated() > POOL_BYTES
        engine.close()
        del engine
        free_memory()
        held.append(torch.cuda.memory_reserved())
    assert held[1] - held[0] < WORKSPACES
    assert held[-1] <= held[1]
