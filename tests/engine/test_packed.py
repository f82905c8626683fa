"""The packed engine against stock transformers, PEFT and the padded engine: whatever shares its batch, the same."""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.engine import Request, SamplingParams, load_expert
from pipeline.engine.loader import load_base_model, load_tokenizer
from pipeline.engine.packed import PackedEngine
from pipeline.engine.runner import Runner
from pipeline.engine.runtime import load_engine
from pipeline.engine.sequence import start
from pipeline.engine.step_engine import StepEngine
from pipeline.engine.steps import Step
from pipeline.engine.stopping import StopRules
from pipeline.engine.types import Completion, Grammar
from pipeline.errors import AdapterError, BaseModelError, InvalidRequestError, OutOfMemoryError, PromptTooLongError
from pipeline.package import ExpertPackage, open_package
from tests import tiny

TOKENIZER = tiny.tokenizer()
VOCAB = len(TOKENIZER)
TOKEN_BYTES = 2 * 2 * 2 * 16 * 4  # keys and values of a token: 2 layers, 2 heads, 16 numbers of float32
TIGHT = {"batch_size": 5, "max_batch_tokens": 16, "kv_cache_bytes": 250 * TOKEN_BYTES}  # chunks, preemption
LIMITS: dict[str, dict[str, int]] = {
    "roomy": {},
    "tight": TIGHT,
    "one by one": {"batch_size": 1, "max_batch_tokens": 7},
}
KERNELS = ["on", "off"]
EXPERTS = [None, *tiny.ADAPTERS]


def random_tokens(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(5, VOCAB) for _ in range(count))


def mixed_requests(number: int, experts: list[str | None], *, seed: int = 1, **options: Any) -> list[Request]:
    """Requests of all lengths in any order, some of which share their first 20 or 40 tokens."""
    rng = random.Random(seed)
    shared = [random_tokens(rng, 40) for _ in range(3)]
    return [
        Request(
            str(at),
            rng.choice(shared)[: rng.choice([0, 20, 40])] + random_tokens(rng, rng.randrange(1, 30)),
            SamplingParams(max_tokens=rng.randrange(1, 24), ignore_eos=True, **options),
            expert=rng.choice(experts),
        )
        for at in range(number)
    ]


def answers(engine: Any, asked: list[Request]) -> dict[str, Completion]:
    found = {one.request_id: one for one in engine.generate(asked)}
    assert set(found) == {request.id for request in asked}
    return found


@lru_cache(maxsize=2048)  # tests that ask the same differ in how it is computed here
def stock_tokens(model: Any, request: Request) -> tuple[int, ...]:
    """What transformers answers to one prompt alone."""
    prompt = torch.tensor([request.prompt_token_ids], device=model.device)
    count = request.params.max_tokens
    with torch.inference_mode():
        output = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
        )
    return tuple(output[0, prompt.shape[1] :].tolist())


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
    adapted: dict[str | None, Any] = {kind: tiny.make_adapted(kind, base) for kind in tiny.ADAPTERS}
    return adapted | {None: AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()}


@pytest.fixture
def load(base: Path) -> Iterator[Callable[..., PackedEngine]]:
    """Loads packed engines, which are closed after the test."""
    loaded: list[PackedEngine] = []

    def load(packages: dict[str, ExpertPackage] | None = None, **options: Any) -> PackedEngine:
        engine = load_engine(base, packages, **({"device": "cpu", "dtype": "float32"} | options))
        assert isinstance(engine, PackedEngine)
        loaded.append(engine)
        return engine

    yield load
    for engine in loaded:
        engine.close()


def stepper(engine: PackedEngine) -> StepEngine:
    assert engine._loop is not None
    return engine._loop


# --- architectures ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=tiny.ARCHITECTURES)
def architecture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list, list]:
    """A model of that kind, requests, and what stock `generate` answers."""
    path = tiny.make_model(
        tmp_path_factory.mktemp("model"), request.param.split()[0], **tiny.ARCHITECTURES[request.param]
    )
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    asked = mixed_requests(14, [None])
    return path, asked, [stock_tokens(model, one) for one in asked]


@pytest.mark.parametrize("kernels", KERNELS)
def test_greedy_tokens_are_those_of_stock_generate(
    architecture: tuple[Path, list, list], kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, asked, wanted = architecture
    monkeypatch.setenv("EXPERT_KERNELS", kernels)
    engine = load_engine(path, device="cpu", dtype="float32", **TIGHT)
    assert isinstance(engine, PackedEngine)
    try:
        found = answers(engine, asked)
        computed = stepper(engine).num_tokens_computed
    finally:
        engine.close()
    assert [found[one.id].token_ids for one in asked] == wanted
    assert len({token for row in wanted for token in row}) > len(asked), (
        "different prompts must get different answers for this to say anything"
    )
    once = sum(len(one.prompt_token_ids) + one.params.max_tokens - 1 for one in asked)
    assert computed != once, "prefixes must be shared and sequences preempted for this to say anything"


@pytest.mark.parametrize(
    ("model_type", "options", "says"),
    [
        ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1}, "s_aux"),  # attention sinks
        ("mamba", {"state_size": 8}, "computes something else"),  # no attention at all
        (
            "deepseek_v3",  # latent attention
            {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
            | {"num_key_value_heads": 4, "n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
            | {"first_k_dense_replace": 2},
            "cannot be run packed",
        ),
        (
            "qwen3_next",  # linear attention in some layers
            {"layer_types": ["linear_attention", "full_attention"], "num_experts": 2, "num_experts_per_tok": 1}
            | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "linear_num_key_heads": 2}
            | {"linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
            "cannot be run packed",
        ),
        (
            "llama4_text",
            {"attention_chunk_size": 32, "num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 32},
            "pieces of 32 tokens",
        ),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        (
            "phi3",
            {"original_max_position_embeddings": 32}
            | {"rope_scaling": {"type": "longrope", "long_factor": [4.0] * 8, "short_factor": [1.0] * 8}},
            "longrope",
        ),
    ],
)
def test_a_model_that_cannot_be_run_packed_is_refused(
    model_type: str, options: dict[str, Any], says: str, tmp_path: Path
) -> None:
    path = tiny.make_model(tmp_path, model_type, **options)
    with pytest.raises(BaseModelError, match=says) as caught:
        load_engine(path, device="cpu", dtype="float32")
    assert '"padded"' in caught.value.hint


@pytest.mark.parametrize("model_type", ["mixtral", "gpt2"])
def test_models_with_modules_of_other_kinds_run(model_type: str, tmp_path: Path) -> None:
    """Mixtures of experts, and positions that are learned."""
    own = {"mixtral": {"num_local_experts": 4}, "gpt2": {"num_key_value_heads": 4}}[model_type]
    path = tiny.make_model(tmp_path, model_type, **own)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    asked = mixed_requests(6, [None])
    engine = load_engine(path, device="cpu", dtype="float32", batch_size=4, max_batch_tokens=16)
    found = answers(engine, asked)
    engine.close()
    assert [found[one.id].token_ids for one in asked] == [stock_tokens(model, one) for one in asked]


# --- experts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "kernels"), [("roomy", "on"), ("roomy", "off"), ("tight", "on"), ("tight", "off"), ("one by one", "on")]
)
def test_experts_mixed_in_one_batch_answer_as_each_does_alone_under_peft(
    load: Callable[..., PackedEngine],
    packages: dict[str, ExpertPackage],
    oracles: dict[str | None, Any],
    limits: str,
    kernels: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EXPERT_KERNELS", kernels)
    engine = load(packages, **LIMITS[limits])
    asked = mixed_requests(32, EXPERTS, seed=2, logprobs=0)
    found = answers(engine, asked)
    unlike_base = 0
    for request in asked:
        answer = found[request.id]
        wanted = stock_tokens(oracles[request.expert], request)
        assert answer.token_ids == wanted, request.expert
        whole = torch.tensor([[*request.prompt_token_ids, *wanted]])
        with torch.inference_mode():
            scores = oracles[request.expert](whole).logits[0, len(request.prompt_token_ids) - 1 : -1]
        logprobs = scores.log_softmax(dim=-1)[torch.arange(len(wanted)), torch.tensor(wanted)]
        assert answer.logprobs is not None
        torch.testing.assert_close(
            torch.tensor([one.logprob for one in answer.logprobs]), logprobs, atol=1e-4, rtol=0.0
        )
        unlike_base += request.expert is not None and wanted != stock_tokens(oracles[None], request)
    assert unlike_base >= 10, "the adapters must change answers for this to say anything"


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_a_merged_expert_answers_as_the_unmerged_one(
    load: Callable[..., PackedEngine], packages: dict[str, ExpertPackage], base: Path, kind: str
) -> None:
    asked = mixed_requests(12, [None], seed=3)
    merged = load_expert(packages[kind], base, device="cpu", dtype="float32", engine="packed")
    found = answers(merged.engine, asked)
    merged.engine.close()
    unmerged = answers(load({kind: packages[kind]}), [replace(one, expert=kind) for one in asked])
    assert {one.id: found[one.id].token_ids for one in asked} == {one.id: unmerged[one.id].token_ids for one in asked}


def test_an_expert_that_is_not_loaded_fails_its_row_alone(
    load: Callable[..., PackedEngine], packages: dict[str, ExpertPackage]
) -> None:
    engine = load({"sql": packages["lora"]})
    good = Request("good", (7, 8, 9), SamplingParams(max_tokens=3), expert="sql")
    found = answers(engine, [replace(good, id="bad", expert="law"), good])
    assert found["good"].failure is None
    failure = found["bad"].failure
    assert failure is not None
    assert failure.code == AdapterError.code
    assert "law" in failure.message


def test_a_name_that_comes_to_mean_another_expert_answers_as_that_one(
    load: Callable[..., PackedEngine], packages: dict[str, ExpertPackage], oracles: dict[str | None, Any]
) -> None:
    """The keys and values of a prefix that the first one computed are not read by the second."""
    engine = load({"sql": packages["lora"]})
    request = Request(
        "a", random_tokens(random.Random(5), 60), SamplingParams(max_tokens=8, ignore_eos=True), None, "sql", 50
    )
    for kind in ("lora", "dora"):
        if kind == "dora":
            assert engine.bank is not None
            engine.bank.unload("sql")
            engine.bank.load("sql", packages["dora"])
        assert answers(engine, [request])["a"].token_ids == stock_tokens(oracles[kind], request)


# --- the same as padded, in any batch --------------------------------------------------------------------------------


def requests_with_every_option() -> list[Request]:
    rng = random.Random(4)
    # Few tokens to draw from: scores differ in their last digits, and a draw that falls between two tokens would too.
    own: list[dict[str, Any]] = [
        {"temperature": 0.3, "top_p": 0.9},
        {"temperature": 1.2, "top_k": 20, "min_p": 0.02},
        {"temperature": 1.0, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.4},
        {"temperature": 1.5, "n": 3, "logprobs": 2},
        {"logprobs": 4, "repetition_penalty": 1.2, "frequency_penalty": 0.5},
        {"temperature": 2.0, "min_tokens": 6, "stop": ["e", "a"]},
        {"temperature": 3.0, "ignore_eos": True, "stop_token_ids": tuple(range(100, 164))},
        {"temperature": 1.0, "stop": ["the", "s"]},
    ]
    grammars = [
        None,
        None,
        Grammar("regex", "[a-c]+;?[0-9]{2}"),
        Grammar("gbnf", 'root ::= my_sum\nmy_sum ::= my_sum "+" digit | digit\ndigit ::= [0-9]\n'),
        Grammar("json_schema", '{"type": "object", "properties": {"b": {"type": "integer"}}, "required": ["b"]}'),
    ]
    pytest.importorskip("xgrammar", reason="the extra `grammar` is not installed")
    shared = random_tokens(rng, 30)
    return [
        Request(
            str(at),
            shared[: rng.choice([0, 30])] + random_tokens(rng, rng.randrange(1, 25)),
            SamplingParams(**({"top_k": 30} | own[at % len(own)] | {"max_tokens": 16, "seed": at})),
            grammar=grammars[at % len(grammars)],
        )
        for at in range(40)
    ]


def everything(engine: Any, asked: list[Request]) -> dict[tuple[str, int], Completion]:
    return {(one.request_id, one.index): one for one in engine.generate(asked)}


def assert_same(found: dict[tuple[str, int], Completion], wanted: dict[tuple[str, int], Completion]) -> None:
    """The same in everything, the log probabilities within 1e-4."""

    def numbers(answer: Completion) -> list[float]:
        told = answer.logprobs or ()
        return [value for one in told for value in (one.logprob, *(logprob for _, logprob in one.top))]

    def others(answer: Completion) -> Any:
        told = answer.logprobs and [(one.token_id, [token_id for token_id, _ in one.top]) for one in answer.logprobs]
        return replace(answer, logprobs=None), told

    assert {key: others(one) for key, one in found.items()} == {key: others(one) for key, one in wanted.items()}
    for key, one in wanted.items():
        assert numbers(found[key]) == pytest.approx(numbers(one), abs=1e-4)


@pytest.fixture(scope="module")
def padded(base: Path) -> tuple[list[Request], dict[tuple[str, int], Completion]]:
    asked = requests_with_every_option()
    engine = load_engine(base, engine="padded", device="cpu", dtype="float32")
    return asked, everything(engine, asked)


@pytest.mark.parametrize("limits", LIMITS)
def test_every_option_gives_what_the_padded_engine_gives(
    load: Callable[..., PackedEngine], padded: tuple[list[Request], dict[tuple[str, int], Completion]], limits: str
) -> None:
    asked, wanted = padded
    engine = load(**LIMITS[limits])
    assert_same(everything(engine, asked), wanted)
    assert_same(everything(engine, random.Random(1).sample(asked, len(asked))), wanted)
    assert {answer.finish_reason for answer in wanted.values()} == {"stop", "length"}
    assert len(wanted) == len(asked) + 2 * sum(one.params.n == 3 for one in asked)


# --- prefixes and duplicates -----------------------------------------------------------------------------------------


def test_answers_do_not_depend_on_prefix_hints(
    load: Callable[..., PackedEngine], packages: dict[str, ExpertPackage]
) -> None:
    rng = random.Random(6)
    asked = mixed_requests(20, [None, "lora", "dora"], seed=6)
    found = answers(load(packages, **TIGHT), asked)
    hinted = [replace(one, prefix_length=rng.choice([0, 17, 20, 40, 1000])) for one in asked]
    engine = load(packages, **TIGHT)
    for again in (hinted, hinted[::-1]):  # the second time some prefixes are kept
        others = answers(engine, again)
        assert {key: one.token_ids for key, one in others.items()} == {key: one.token_ids for key, one in found.items()}


@pytest.mark.parametrize("hint", [0, 40])
def test_a_prefix_is_computed_once_while_rows_share_it(load: Callable[..., PackedEngine], hint: int) -> None:
    rng = random.Random(7)
    prefix = random_tokens(rng, 40)
    asked = [
        Request(str(at), prefix + random_tokens(rng, 10), SamplingParams(max_tokens=1), prefix_length=hint)
        for at in range(12)
    ]
    engine = load()
    answers(engine, asked)
    assert stepper(engine).num_tokens_computed == 40 + 12 * 10
    if hint:  # and it is kept for those that come later
        answers(engine, [replace(asked[0], prompt_token_ids=prefix + random_tokens(rng, 9))])
        assert stepper(engine).num_tokens_computed == 40 + 12 * 10 + 9


def test_two_experts_never_share_a_prefix(
    load: Callable[..., PackedEngine], packages: dict[str, ExpertPackage]
) -> None:
    rng = random.Random(8)
    prefix = random_tokens(rng, 40)
    engine = load({"a": packages["lora"], "b": packages["dora"]})
    asked = [
        Request(f"{expert}{at}", prefix + random_tokens(rng, 10), SamplingParams(max_tokens=1), None, expert, 40)
        for at in range(3)
        for expert in ("a", "b", None)
    ]
    answers(engine, asked)
    assert stepper(engine).num_tokens_computed == 3 * 40 + 9 * 10
    assert {kept.expert for kept in stepper(engine).scheduler.prefixes} == {"a", "b", None}


def test_identical_greedy_requests_are_computed_once(load: Callable[..., PackedEngine]) -> None:
    engine = load()
    one = Request("0", random_tokens(random.Random(9), 20), SamplingParams(max_tokens=6, ignore_eos=True))
    same = [replace(one, id=str(at), params=replace(one.params, seed=at)) for at in range(8)]
    found = answers(engine, [*same, replace(one, id="other", params=replace(one.params, max_tokens=3))])
    assert {found[request.id].text for request in same} == {found["0"].text}
    assert found["other"].token_ids == found["0"].token_ids[:3]
    # Once 20 prompt tokens and 5 generated ones for the same, and at most 20 + 2 for the other one.
    assert stepper(engine).num_tokens_computed <= 20 + 5 + 20 + 2


def test_identical_sampled_requests_with_their_own_seeds_are_not_merged(load: Callable[..., PackedEngine]) -> None:
    prompt = random_tokens(random.Random(9), 20)
    asked = [Request(str(at), prompt, SamplingParams(max_tokens=6, temperature=3.0, seed=at)) for at in range(6)]
    assert len({one.token_ids for one in answers(load(), asked).values()}) > 1


# --- what does not fit -----------------------------------------------------------------------------------------------


def test_what_cannot_be_answered_fails_its_row_alone(load: Callable[..., PackedEngine]) -> None:
    good = Request("good", (7, 8, 9), SamplingParams(max_tokens=5, ignore_eos=True))
    long = replace(good, id="long", prompt_token_ids=(7,) * 508)
    fits = replace(good, id="fits", prompt_token_ids=(7,) * 507)
    unknown = replace(good, id="unknown", prompt_token_ids=(VOCAB + 5, 7))
    empty = replace(good, id="empty", prompt_token_ids=())
    found = answers(load(), [long, unknown, good, empty, fits])
    assert found["good"].completion_tokens == found["fits"].completion_tokens == 5
    for name, code, says in (
        ("long", PromptTooLongError.code, "508 tokens"),
        ("unknown", InvalidRequestError.code, "neither a token"),
        ("empty", InvalidRequestError.code, "no tokens"),
    ):
        failure = found[name].failure
        assert failure is not None
        assert (failure.code, found[name].finish_reason) == (code, "error")
        assert says in failure.message


@pytest.mark.parametrize(("prompt", "count"), [(200, 4), (70, 100)])  # too large at once, or while it grows
def test_a_sequence_larger_than_the_memory_fails_alone(
    load: Callable[..., PackedEngine], oracles: dict[str | None, Any], prompt: int, count: int
) -> None:
    engine = load(kv_cache_bytes=128 * TOKEN_BYTES)
    asked = [replace(one, params=replace(one.params, max_tokens=8)) for one in mixed_requests(8, [None], seed=10)]
    large = Request("large", (9, 8) * (prompt // 2), SamplingParams(max_tokens=count, ignore_eos=True))
    found = answers(engine, [*asked[:4], large, *asked[4:]])
    failure = found["large"].failure
    assert failure is not None
    assert failure.code == OutOfMemoryError.code
    assert "128 tokens" in failure.message
    assert f"{TOKEN_BYTES:,} bytes" in failure.message
    assert [found[one.id].token_ids for one in asked] == [stock_tokens(oracles[None], one) for one in asked]


class SmallDevice(Runner):
    """Runs out of memory on steps of more tokens, or of more sequences, than it can hold, and counts its tries."""

    max_tokens = 1 << 30
    failing_runs: tuple[int, ...] = ()
    num_runs = num_failed = 0
    error: Exception = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def run(self, step: Step) -> torch.Tensor:
        self.num_runs += 1
        if sum(chunk.count for chunk in step.chunks) > self.max_tokens or self.num_runs in self.failing_runs:
            self.num_failed += 1
            raise self.error
        return super().run(step)


NO_MEMORY = [  # as torch says it on a GPU and on a CPU, and Python itself
    (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB."),
    (RuntimeError, "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you ..."),
    (MemoryError, ""),
]


def run_on_small_device(
    base: Path, max_tokens: int, asked: list[Request], *failing_runs: int, error: Exception | None = None
) -> tuple[dict[str, Completion], StepEngine]:
    runner = SmallDevice(load_base_model(base, device="cpu", dtype="float32"), kv_cache_bytes=600 * TOKEN_BYTES)
    runner.max_tokens, runner.failing_runs = max_tokens, failing_runs
    runner.error = error or runner.error
    engine = StepEngine(runner, 512, max_running=64, max_step_tokens=1024)
    rules = StopRules(load_tokenizer(None, base), frozenset({2}))
    sequences = [sequence for request in asked for sequence in start(request, rules)]
    assert engine.add(sequences) == []
    for _ in range(5000):
        if not engine.has_work:
            break
        engine.step()
    return {one.request.id: one.completion() for one in sequences}, engine


@pytest.mark.parametrize(("kind", "says"), NO_MEMORY, ids=["GPU", "CPU", "Python"])
def test_a_device_that_runs_out_of_memory_gets_smaller_steps(
    base: Path, oracles: dict[str | None, Any], kind: type[Exception], says: str
) -> None:
    asked = mixed_requests(12, [None], seed=11)
    found, engine = run_on_small_device(base, 20, asked, error=kind(says))
    assert [found[one.id].token_ids for one in asked] == [stock_tokens(oracles[None], one) for one in asked]
    assert engine.scheduler.max_step_tokens == 16
    assert 0 < engine._runner.num_failed <= 6  # type: ignore[attr-defined]


def test_steps_that_fail_half_way_leave_no_tensor_behind(base: Path, oracles: dict[str | None, Any]) -> None:
    asked = mixed_requests(12, [None], seed=11)
    found, engine = run_on_small_device(base, 1 << 30, asked, *range(4, 20, 3))  # when some are finished
    assert [found[one.id].token_ids for one in asked] == [stock_tokens(oracles[None], one) for one in asked]
    engine._runner.cache.free(engine.scheduler.slots.take_freed())
    held = {slot.number for slot in engine._runner.cache.slots}
    assert held == {kept.slot.number for kept in engine.scheduler.prefixes if kept.slot is not None}


def test_a_device_with_room_for_nothing_fails_every_row_and_ends(base: Path) -> None:
    found, engine = run_on_small_device(base, 0, mixed_requests(5, [None], seed=12))
    assert {one.failure and one.failure.code for one in found.values()} == {OutOfMemoryError.code}
    assert engine.scheduler.slots.num_used == 0


def test_an_error_that_is_not_of_memory_is_not_swallowed(base: Path) -> None:
    class Broken(SmallDevice):
        def run(self, _: Step) -> torch.Tensor:
            raise RuntimeError("expected all tensors on one device")

    runner = Broken(load_base_model(base, device="cpu", dtype="float32"), kv_cache_bytes=600 * TOKEN_BYTES)
    engine = StepEngine(runner, 512, max_running=4, max_step_tokens=64)
    engine.add(start(Request("a", (7, 8)), StopRules(load_tokenizer(None, base), frozenset({2}))))
    with pytest.raises(RuntimeError, match="one device"):
        engine.step()
