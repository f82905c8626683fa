"""Soft prompts against PEFT's prompt tuning: beside other rows, with experts, cut into chunks, shared as prefixes."""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.engine import Request, SamplingParams
from pipeline.engine.packed import PackedEngine
from pipeline.engine.runtime import load_engine
from pipeline.engine.sampling import penalise_repetition_
from pipeline.engine.soft_prompts import SoftPrompts
from pipeline.errors import AdapterError, InvalidRequestError
from pipeline.package import open_package
from tests import tiny

VOCAB = len(tiny.tokenizer())
HIDDEN = 64
GREEDY = SamplingParams(max_tokens=10, ignore_eos=True)


def embeddings(seed: int, count: int) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed)) * 0.4


def random_tokens(seed: int, count: int) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(5, VOCAB) for _ in range(count))


def stock_tokens(model: Any, soft: torch.Tensor, token_ids: tuple[int, ...], count: int = 10) -> tuple[int, ...]:
    """What transformers makes of embeddings and tokens, computed anew for every token."""
    found: list[int] = []
    with torch.inference_mode():
        for _ in range(count):
            tokens = torch.tensor([[*token_ids, *found]])
            whole = torch.cat([soft[None], model.get_input_embeddings()(tokens)], dim=1)
            found.append(int(model(inputs_embeds=whole).logits[0, -1].argmax()))
    return tuple(found)


def answers(engine: PackedEngine, asked: list[Request]) -> dict[str, tuple[int, ...]]:
    found = list(engine.generate(asked))
    assert [one.failure for one in found] == [None] * len(asked)
    return {one.request_id: one.token_ids for one in found}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_base(tmp_path_factory.mktemp("base"), vocab_size=VOCAB)


@pytest.fixture
def load(base: Path) -> Iterator[Callable[..., PackedEngine]]:
    loaded: list[PackedEngine] = []

    def load(path: Path = base, packages: Any = None, **options: int) -> PackedEngine:
        engine = load_engine(path, packages, device="cpu", dtype="float32", **options)
        assert isinstance(engine, PackedEngine)
        loaded.append(engine)
        return engine

    yield load
    for engine in loaded:
        engine.close()


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")  # of PEFT's oracle
@pytest.mark.parametrize("model_type", ["qwen3", "gemma", "gemma3_text"])  # Gemma scales embeddings, each its own way
def test_an_answer_is_that_of_prompt_tuning(load: Callable[..., PackedEngine], model_type: str, tmp_path: Path) -> None:
    path = tiny.make_model(tmp_path, model_type)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tuned = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6)).eval()
    with torch.no_grad():
        tuned.prompt_encoder["default"].embedding.weight.copy_(embeddings(1, 6))
    engine = load(path)
    soft = engine.add_soft_prompt(tuned.get_prompt_embedding_to_save("default"))
    token_ids = random_tokens(1, 20)
    prompt = torch.tensor([token_ids])
    with torch.inference_mode():
        output = tuned.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=10,
            min_new_tokens=10,
            do_sample=False,
            eos_token_id=None,
        )
    wanted = tuple(output[0, -10:].tolist())
    found = answers(engine, [Request("soft", soft + token_ids, GREEDY), Request("plain", token_ids, GREEDY)])
    assert found["soft"] == wanted
    assert found["plain"] != wanted, "the soft prompt must change the answer"


@pytest.mark.parametrize("limits", [{}, {"batch_size": 3, "max_batch_tokens": 7}])  # chunks end within a soft prompt
def test_soft_prompts_mix_with_other_rows_and_experts(
    load: Callable[..., PackedEngine], base: Path, tmp_path: Path, limits: dict[str, int]
) -> None:
    kinds: list[str | None] = [None, "lora", "dora"]
    packages = {kind: open_package(tiny.make_package(kind, base, tmp_path)[0]) for kind in kinds if kind}
    oracles: dict[str | None, Any] = {kind: tiny.make_adapted(kind, base) for kind in packages}
    oracles[None] = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    engine = load(base, packages, **limits)
    prompts = [embeddings(2, 5), embeddings(3, 30), torch.empty(0, HIDDEN)]
    ids = [engine.add_soft_prompt(one) if len(one) else () for one in prompts]
    asked, wanted = [], {}
    for at in range(18):
        expert, which = kinds[at % 3], (at // 3) % 3
        token_ids = random_tokens(at, 3 + at)
        asked.append(Request(str(at), ids[which] + token_ids, GREEDY, expert=expert))
        wanted[str(at)] = stock_tokens(oracles[expert], prompts[which], token_ids)
    assert answers(engine, random.Random(1).sample(asked, len(asked))) == wanted
    assert len(set(wanted.values())) == len(asked)


def test_a_soft_prompt_is_computed_once_for_rows_that_share_it(load: Callable[..., PackedEngine]) -> None:
    engine = load()
    soft = engine.add_soft_prompt(embeddings(4, 30))
    asked = [Request(str(at), soft + random_tokens(at, 8), replace(GREEDY, max_tokens=1)) for at in range(5)]
    answers(engine, asked)
    assert engine._loop is not None
    assert engine._loop.num_tokens_computed == 30 + 5 * 8


def test_different_soft_prompts_of_the_same_length_are_kept_apart(
    load: Callable[..., PackedEngine], base: Path
) -> None:
    engine = load()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    token_ids = random_tokens(7, 12)
    for seed in (5, 6):  # the first one's prefix is kept when the second one comes
        soft = embeddings(seed, 20)
        request = Request("a", engine.add_soft_prompt(soft) + token_ids, GREEDY, prefix_length=20)
        assert answers(engine, [request])["a"] == stock_tokens(model, soft, token_ids)


def test_penalties_know_the_tokens_and_not_the_soft_prompt(load: Callable[..., PackedEngine], base: Path) -> None:
    engine = load()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    soft, token_ids, found = embeddings(8, 4), random_tokens(8, 40), list[int]()
    with torch.inference_mode():
        for _ in range(10):
            tokens = torch.tensor([[*token_ids, *found]])
            scores = model(inputs_embeds=torch.cat([soft[None], model.get_input_embeddings()(tokens)], dim=1)).logits
            seen = tokens[0].unique()
            last = scores[0, -1:].clone()
            penalise_repetition_(last, torch.zeros_like(seen), seen, torch.full(seen.shape, 3.0))
            found.append(int(last.argmax()))
    params = replace(GREEDY, repetition_penalty=3.0)
    request = Request("a", engine.add_soft_prompt(soft) + token_ids, params)
    assert answers(engine, [request])["a"] == tuple(found)


def test_the_same_embeddings_have_the_same_ids() -> None:
    table = SoftPrompts(100, HIDDEN, torch.device("cpu"), torch.float32)
    first, second = table.add(embeddings(1, 3)), table.add(embeddings(2, 2))
    assert (first, second) == ((100, 101, 102), (103, 104))
    assert table.add(embeddings(1, 3)) == first
    assert table.is_known([5, 104])
    assert not table.is_known([5, 105])
    embedding = torch.nn.Embedding(100, HIDDEN)
    embedded = table.embed(torch.tensor([[102, 7, 103]]), embedding)
    torch.testing.assert_close(
        embedded[0].detach(), torch.stack([embeddings(1, 3)[2], embedding.weight[7].detach(), embeddings(2, 2)[0]])
    )


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(3, HIDDEN + 1),
        torch.zeros(HIDDEN),
        torch.zeros(1, 3, HIDDEN),
        torch.zeros(0, HIDDEN),
        torch.full((2, HIDDEN), torch.nan),
        torch.full((2, HIDDEN), torch.inf),
    ],
)
def test_what_is_no_soft_prompt_of_this_model_is_refused(wrong: torch.Tensor) -> None:
    table = SoftPrompts(100, HIDDEN, torch.device("cpu"), torch.float32)
    with pytest.raises(AdapterError, match="shape"):
        table.add(wrong)
    assert not table.is_known([100])


def test_ids_of_no_soft_prompt_fail_their_row_alone(load: Callable[..., PackedEngine]) -> None:
    engine = load()
    soft = engine.add_soft_prompt(embeddings(1, 2))
    asked = [Request("good", (*soft, 7), GREEDY), Request("bad", (soft[-1] + 1, 7), GREEDY)]
    found = {one.request_id: one for one in engine.generate(asked)}
    assert found["good"].failure is None
    assert found["bad"].failure is not None
    assert found["bad"].failure.code == InvalidRequestError.code
