"""Decode steps recorded once and replayed: without a GPU, what is recorded is a list of every torch operation.

It holds the operations, their order and the tensors they touch, and nothing of the Python that chose them: what a CUDA
graph holds. So a generation that is replayed from it shows that a step depends on nothing but its buffers. What only a
GPU can show, that `CudaRecorder` captures the same, is in `test_cuda`.
"""

import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.engine import Request, SamplingParams
from pipeline.engine.adapters import AdapterBank
from pipeline.engine.attention import NAME
from pipeline.engine.batched_attention import _product
from pipeline.engine.decode_graphs import MOST_GRAPHS, DecodeGraphs
from pipeline.engine.kv_cache import PagedCache
from pipeline.engine.loader import load_base_model, load_tokenizer
from pipeline.engine.packed import PackedEngine
from pipeline.engine.paged_plan import Item, Keys, plan_recorded, rounded_up
from pipeline.engine.runner import Runner, step_scores
from pipeline.engine.sequence import start
from pipeline.engine.step_engine import StepEngine
from pipeline.engine.stopping import StopRules
from pipeline.errors import AdapterError, InferenceError
from pipeline.package import ExpertPackage, open_package
from tests import tiny
from tests.engine.test_packed import mixed_requests, random_tokens

VOCAB = len(tiny.tokenizer())
KV_BYTES = 4 << 20


class Tape(TorchDispatchMode):
    """Notes each torch operation and the tensors it touches; a step that looks at a value is refused, as by CUDA."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a step that is recorded looks at a value")
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        """Do the same operations again: on what they yield now, where they took what others yielded."""
        now: dict[int, torch.Tensor] = {}  # by the tensor's place when it was noted

        def current(leaf: Any) -> Any:
            return now.get(id(leaf), leaf) if isinstance(leaf, torch.Tensor) else leaf

        for func, args, kwargs, noted in self.operations:
            out = func(*tree_map(current, args), **tree_map(current, kwargs))
            for old, new in zip(tree_leaves(noted), tree_leaves(out), strict=True):
                if isinstance(old, torch.Tensor):
                    now[id(old)] = new


class Tracer:
    """Records work on a tape."""

    def __init__(self) -> None:
        self.num_replays = 0

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        with Tape() as tape:
            work()
        assert len(tape.operations) > 100

        def replay() -> None:
            self.num_replays += 1
            tape.replay()

        return replay


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device that the compiled kernels do not run on."""
    monkeypatch.setenv("EXPERT_KERNELS", "off")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_base(tmp_path_factory.mktemp("base"), vocab_size=VOCAB)


@pytest.fixture(scope="module")
def packages(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ExpertPackage]:
    folder = tmp_path_factory.mktemp("packages")
    return {kind: open_package(tiny.make_package(kind, base, folder)[0]) for kind in tiny.ADAPTERS}


class Generation:
    """One engine over a model, its steps recorded or not."""

    def __init__(
        self, path: Path, record: Any = None, packages: dict[str, ExpertPackage] | None = None, **limits: int
    ) -> None:
        model = load_base_model(path, device="cpu", dtype="float32")
        self.bank = AdapterBank(model) if packages is not None else None
        self.runner = Runner(model, kv_cache_bytes=KV_BYTES, record=record)
        self.engine = StepEngine(
            self.runner, 512, bank=self.bank, **({"max_running": 64, "max_step_tokens": 256} | limits)
        )
        self._rules = StopRules(load_tokenizer(None, path), frozenset({2}))
        for name, package in (packages or {}).items():
            assert self.bank is not None
            self.bank.load(name, package)

    def answers(self, asked: list[Request]) -> list[list[int]]:
        sequences = [sequence for request in asked for sequence in start(request, self._rules)]
        assert self.engine.add(sequences) == []
        while self.engine.has_work:
            self.engine.step()
        assert all(sequence.failure is None for sequence in sequences)
        return [sequence.token_ids for sequence in sequences]


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_replayed_generation_is_the_eager_one(architecture: str, tmp_path: Path) -> None:
    path = tiny.make_model(tmp_path, architecture.split()[0], **tiny.ARCHITECTURES[architecture])
    asked = mixed_requests(14, [None])
    wanted = Generation(path, max_running=6).answers(asked)
    tracer = Tracer()
    recorded = Generation(path, tracer, max_running=6)  # sequences come and go, slots grow, prefixes are shared
    assert recorded.answers(asked) == wanted
    first = tracer.num_replays
    assert recorded.answers(asked[::-1]) == wanted[::-1]
    assert tracer.num_replays > first > 5
    assert len({token for row in wanted for token in row}) > len(asked)


def test_experts_change_within_one_recorded_shape(base: Path, packages: dict[str, ExpertPackage]) -> None:
    replayable = [name for name in packages if name != "lokr"]
    own = {name: packages[name] for name in replayable}
    asked = mixed_requests(24, [None, *replayable], seed=2)
    wanted = Generation(base, None, own, max_running=8).answers(asked)
    tracer = Tracer()
    recorded = Generation(base, tracer, own, max_running=8)
    assert recorded.answers(asked) == wanted
    before, num_recorded = tracer.num_replays, recorded.runner.graphs.num_recorded  # type: ignore[union-attr]
    order = random.Random(3).sample(range(len(asked)), len(asked))  # other experts in each row
    assert recorded.answers([asked[at] for at in order]) == [wanted[at] for at in order]
    assert tracer.num_replays - before > 2 * (recorded.runner.graphs.num_recorded - num_recorded)  # type: ignore[union-attr]


def test_steps_with_prompts_in_them_are_replayed_and_long_ones_are_not(
    base: Path, packages: dict[str, ExpertPackage], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    own = {name: packages[name] for name in ("lora", "dora")}

    def asked(length: int) -> list[Request]:
        """Prompts alone, an answer of one token each: a step has nothing else."""
        draw, params = random.Random(length), SamplingParams(max_tokens=1, ignore_eos=True)
        return [Request(str(at), random_tokens(draw, length), params, expert=name) for at, name in enumerate(own)]

    tracer = Tracer()
    recorded, plain = Generation(base, tracer, own, max_step_tokens=1024), Generation(base, None, own)
    for num_replays in (0, 1, 2):
        assert recorded.answers(asked(20)) == plain.answers(asked(20))
        assert tracer.num_replays == num_replays
    assert not any("eagerly" in record.getMessage() for record in caplog.records)
    for _ in range(3):
        assert recorded.answers(asked(300)) == plain.answers(asked(300))
    assert tracer.num_replays == 2
    assert sum("more than 512 tokens" in record.getMessage() for record in caplog.records) == 1


def test_steps_in_which_an_expert_is_not_scored_are_others_than_those_in_which_it_is(
    base: Path, packages: dict[str, ExpertPackage]
) -> None:
    """What an adapter of the head computes is part of the record, or not."""
    own = {"lora": packages["lora"]}
    tracer = Tracer()
    recorded, plain = Generation(base, tracer, own, max_step_tokens=64), Generation(base, None, own, max_step_tokens=64)
    draw, params = random.Random(4), SamplingParams(max_tokens=1, ignore_eos=True)
    for length in (190, 190, 64, 64, 64):
        asked = [Request(str(length), random_tokens(draw, length), params, expert="lora")]
        assert recorded.answers(asked) == plain.answers(asked)
    assert recorded.runner.graphs is not None
    keys = {key for key, shapes in recorded.runner.graphs._graphs if shapes[1] == (64,)}
    assert keys == {(True, False), (True, True)}
    assert tracer.num_replays > 4


def test_steps_recorded_for_the_base_alone_are_not_replayed_for_an_expert(
    base: Path, packages: dict[str, ExpertPackage]
) -> None:
    own = {"lora": packages["lora"]}
    recorded = Generation(base, Tracer(), own)
    for expert in (None, "lora", None):
        asked = mixed_requests(6, [expert], seed=8)
        wanted = Generation(base, None, own).answers(asked)
        assert [recorded.answers(asked) for _ in range(2)] == [wanted] * 2


def test_a_warm_up_has_every_size_recorded(
    base: Path, packages: dict[str, ExpertPackage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.engine.runner.recorder_for", lambda _: Tracer())
    model = load_base_model(base, device="cpu", dtype="float32")
    bank = AdapterBank(model)
    engine = PackedEngine(model, load_tokenizer(None, base), bank=bank, batch_size=6, kv_cache_bytes=KV_BYTES)
    bank.load("dora", packages["dora"])
    engine.warm_up("dora")
    assert engine._loop is not None
    graphs = engine._loop._runner.graphs
    assert graphs is not None
    found = {shapes[1][0]: graph.replay for (key, shapes), graph in graphs._graphs.items() if key == (True, True)}
    assert sorted(found) == sorted({rounded_up(number) for number in range(1, 513)})
    assert all(found.values()), "recorded, not only met"
    with pytest.raises(AdapterError, match="nosuch"):
        engine.warm_up("nosuch")
    engine.close()
    with pytest.raises(InferenceError, match="closed"):
        engine.warm_up("dora")


def test_a_warm_up_is_nothing_where_nothing_is_recorded(base: Path) -> None:
    engine = PackedEngine(load_base_model(base, device="cpu"), load_tokenizer(None, base), kv_cache_bytes=KV_BYTES)
    engine.warm_up()
    assert engine.stats().num_steps == 0
    engine.close()


def test_an_expert_that_changes_whole_modules_runs_eagerly_and_says_so(
    base: Path, packages: dict[str, ExpertPackage], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    asked = mixed_requests(6, ["lokr"], seed=5)
    wanted = Generation(base, None, packages).answers(asked)
    tracer = Tracer()
    caplog.clear()
    assert Generation(base, tracer, packages).answers(asked) == wanted
    assert tracer.num_replays == 0
    told = [record.getMessage() for record in caplog.records if "run eagerly" in record.getMessage()]
    assert len(told) == 1, "once"
    assert "whole modules" in told[0]


def test_steps_recorded_before_an_adapter_came_are_not_replayed_after(
    base: Path, packages: dict[str, ExpertPackage]
) -> None:
    asked = mixed_requests(8, ["a"], seed=6)
    recorded = Generation(base, Tracer(), {"a": packages["lora"]})
    assert recorded.bank is not None
    for kind in ("lora", "dora", "ia3"):
        recorded.bank.unload("a")
        recorded.bank.load("a", packages[kind])
        for _ in range(2):  # the second time from a recorded step
            assert recorded.answers(asked) == Generation(base, None, {"a": packages[kind]}).answers(asked)


def test_a_soft_prompt_runs_eagerly(base: Path) -> None:
    tracer = Tracer()
    recorded, plain = Generation(base, tracer), Generation(base)
    torch.manual_seed(1)
    prompt = torch.randn(3, 64)
    asked = []
    for generation in (recorded, plain):
        soft = generation.runner.soft_prompts.add(prompt)
        params = SamplingParams(max_tokens=12, ignore_eos=True)
        tokens = random_tokens(random.Random(1), 5)
        asked = [Request("a", (*soft, *tokens), params), Request("b", tokens, params), Request("c", soft[:1], params)]
    assert recorded.answers(asked) == plain.answers(asked)
    assert tracer.num_replays > 0


class Refusing:
    """As a device on which a step cannot be captured."""

    num_asked = 0

    def __call__(self, _: Callable[[], None]) -> Callable[[], None]:
        self.num_asked += 1
        raise RuntimeError("operation not permitted when stream is capturing")


def test_a_model_that_cannot_be_recorded_runs_eagerly_with_one_warning(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = mixed_requests(8, [None], seed=7)
    refusing = Refusing()
    found = Generation(base, refusing).answers(asked)
    assert found == Generation(base).answers(asked)
    assert refusing.num_asked == 1
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == 1
    assert "stream is capturing" in told[0]


def test_a_step_that_looks_at_a_value_is_refused_by_the_tape() -> None:
    """Else a record would prove nothing."""
    numbers = torch.tensor([1, 2])
    with pytest.raises(RuntimeError, match="looks at a value"), Tape():
        numbers.mul_(2).sum().item()


def test_a_tape_computes_from_what_its_buffers_hold_now() -> None:
    numbers, doubled = torch.tensor([1.0, 2.0]), torch.empty(2)
    with Tape() as tape:
        doubled.copy_((numbers * 2).view(2, 1).add_(1).squeeze(1))
    numbers.copy_(torch.tensor([5.0, 6.0]))
    tape.replay()
    assert doubled.tolist() == [11.0, 13.0]


def test_memory_that_runs_out_while_a_step_is_recorded_is_given_back() -> None:
    def record(_: Callable[[], None]) -> Callable[[], None]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    graphs = DecodeGraphs(lambda numbers: numbers[0][:, None].float(), record, torch.device("cpu"))
    arrays = [np.array([3, 4])]
    assert graphs.run(arrays, key=0).tolist() == [[3.0], [4.0]]
    with pytest.raises(torch.OutOfMemoryError):
        graphs.run(arrays, key=0)
    assert not graphs._graphs
    assert not graphs._scores


def test_the_shapes_used_last_are_kept() -> None:
    def record(work: Callable[[], None]) -> Callable[[], None]:
        return work

    graphs = DecodeGraphs(lambda numbers: numbers[0][:, None].float(), record, torch.device("cpu"))
    for key in (*range(2 * MOST_GRAPHS), *range(MOST_GRAPHS, 2 * MOST_GRAPHS)):
        graphs.run([np.array([key])], key=key)
    assert graphs.num_recorded == MOST_GRAPHS


# --- what a GPU would see, on tensors without values -----------------------------------------------------------------


class OneDevice(TorchDispatchMode):
    """Sees that nothing goes between host and device: a capture would refuse it, or wait."""

    def __init__(self) -> None:
        super().__init__()
        self.num_operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.num_operations += 1
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        # A number on the host may be a factor of a product on the device: it goes along as an argument.
        assert all(tensor.device.type == "meta" or tensor.ndim == 0 for tensor in tensors), f"{func} on the host"
        if "copy" in str(func):
            assert len({tensor.device.type for tensor in tensors}) <= 1, f"{func} between host and device"
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_decode_step_stays_on_the_device_and_asks_for_no_value(architecture: str, dtype: torch.dtype) -> None:
    options = tiny.SHAPE | {"vocab_size": VOCAB} | tiny.ARCHITECTURES[architecture]
    config = AutoConfig.for_model(architecture.split()[0], **options)
    items = [Item(at, 1, Keys(np.arange(2 + at, 3 + at), 5 + at), None) for at in range(3)]
    arrays = plan_recorded([7, 8, 9], items, [0, 1, 2])
    device = torch.device("meta")
    with torch.inference_mode():
        with device:
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
            cache = PagedCache((2, 2, 2, 16), dtype=dtype, device=device, num_bytes=1 << 20)
            numbers = [torch.empty(array.shape, dtype=torch.long) for array in arrays]
        model.set_attn_implementation(NAME)
        with OneDevice() as watched:
            scores = step_scores(model, cache, numbers)
    assert scores.shape == (3, VOCAB)
    assert (scores.device, scores.dtype) == (device, dtype)
    assert watched.num_operations > 100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_on_cuda_take_halves_and_give_float32(dtype: torch.dtype) -> None:
    with FakeTensorMode():
        left = torch.empty(6, 4, 16, dtype=dtype, device="cuda")
        right = torch.empty(6, 32, 16, dtype=dtype, device="cuda")
        product = _product(left, right.transpose(1, 2))
    assert (product.shape, product.dtype, product.device.type) == ((6, 4, 32), torch.float32, "cuda")
