"""Many experts over one base model, against PEFT alone on each row."""

import copy
import gc
import json
import random
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PhiConfig,
    PhiForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pipeline.engine.adapted_modules import AdaptedModule
from pipeline.engine.adapter_step import Form, StepRows
from pipeline.engine.adapters import AdapterBank, Slice
from pipeline.engine.linear import PackedLinear, can_pack, dense_weight
from pipeline.engine.loader import BaseModel, load_base_model, merge_adapter
from pipeline.errors import AdapterError
from pipeline.package import ExpertPackage, open_package
from tests import tiny

LORA = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
KINDS: dict[str, Any] = {
    **tiny.ADAPTERS,
    "dora-patterns": peft.LoraConfig(
        **LORA, target_modules="all-linear", use_dora=True, use_rslora=True, rank_pattern={"up_proj": 20}
    ),
    "rslora-patterns": peft.LoraConfig(
        **LORA,
        target_modules="all-linear",
        use_rslora=True,
        rank_pattern={"q_proj": 9, "layers.1.mlp.down_proj": 1},
        alpha_pattern={"k_proj": 3, "up_proj": 32},
    ),
    "lora-bias": peft.LoraConfig(**LORA, target_modules=["q_proj", "v_proj", "up_proj"], lora_bias=True),
    "trained-biases": peft.LoraConfig(**LORA, target_modules=["q_proj", "up_proj"], bias="lora_only"),
    "all-biases": peft.LoraConfig(**LORA, target_modules=["q_proj", "up_proj"], bias="all"),
    "dora-biases": peft.LoraConfig(**LORA, target_modules=["q_proj", "v_proj"], use_dora=True, bias="all"),
    "ia3-outputs": peft.IA3Config(
        target_modules=["q_proj", "o_proj", "gate_proj"], feedforward_modules=[], task_type="CAUSAL_LM"
    ),
    "lokr-both": peft.LoKrConfig(
        r=2, alpha=4, target_modules=["q_proj", "gate_proj"], decompose_both=True, task_type="CAUSAL_LM"
    ),
    "pruned": peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], total_step=10, task_type="CAUSAL_LM"
    ),
    "head": peft.LoraConfig(**LORA, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "saved": peft.LoraConfig(
        **LORA,
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens", "model.norm", "post_attention_layernorm", "layers.1.mlp"],
    ),
    "embedding": peft.LoraConfig(**LORA, target_modules=["embed_tokens", "lm_head", "q_proj"]),
    "own-embedding": peft.LoraConfig(**LORA, target_modules=["embed_tokens", "lm_head"], use_dora=True),
    "tall": peft.LoraConfig(r=8, target_modules=tiny.TARGETS, task_type="CAUSAL_LM"),
    "dora-embedding": peft.LoraConfig(**LORA, target_modules=["embed_tokens", "lm_head"], use_dora=True),
}
PRUNED = {
    f"model.layers.{layer}.self_attn.{name}.lora_E": kept
    for layer in (0, 1)
    for name, kept in (("q_proj", [True, False, True, False]), ("v_proj", [False] * 4))
}
OWN = ("embed_tokens.base_layer.weight", "lm_head.base_layer.weight")  # PEFT saves them where they are adapted
FORMS: tuple[Form | None, ...] = (None, "slices", "batch", "wide")
VOCAB = 96


class Expert(NamedTuple):
    package: ExpertPackage
    oracle: peft.PeftModel


Make = Callable[[str], Expert]


def make_base(folder: Path) -> Path:
    """A random Qwen3 whose attention has biases."""
    torch.manual_seed(1)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=128,
            tie_word_embeddings=False,
            attention_bias=True,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            value.data.normal_()
    model.save_pretrained(folder / "base")
    return folder / "base"


def make_expert(name: str, config: Any, model: nn.Module, folder: Path) -> Expert:
    """A package with random weights of that kind, and the same adapter under PEFT; the model is used up."""
    source = folder / name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice about merging and saving
        adapted = _randomised(name, peft.get_peft_model(model, copy.deepcopy(config)))  # PEFT writes into its config
        adapted.save_pretrained(str(source))
    if name == "pruned":
        adapted.base_model.resize_modules_by_rank_pattern(PRUNED, "default")
    manifest = {
        "name": f"expert-{name}",
        "version": "1.0.0",
        "schema_version": "2.0",
        "description": "random weights",
        "capabilities": ["database:sql"],
        "base_models": [{"name": "base", "adapters": [{"type": "lora"}]}],
    }
    (source / "manifest.json").write_text(json.dumps(manifest))
    return Expert(open_package(source), adapted.eval())


def _randomised(name: str, adapted: Any) -> Any:
    config = adapted.peft_config["default"]
    torch.manual_seed(sum(name.encode()))
    biases = {"all": "bias", "lora_only": "base_layer.bias"}.get(getattr(config, "bias", "none"), "no such")
    with torch.no_grad():
        for key, value in adapted.named_parameters():
            if "ia3_" in key or "magnitude" in key:
                value.mul_(0.5 + torch.rand_like(value))
            elif "modules_to_save" in key or key.endswith(biases) or (name == "own-embedding" and key.endswith(OWN)):
                value.add_(torch.randn_like(value) * 0.2)
            elif "lora_" in key or "lokr_" in key:
                value.copy_(torch.randn_like(value) * 0.2)
    if name == "pruned":
        adapted.peft_config["default"].rank_pattern = dict(PRUNED)
    return adapted


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models as small as these only wait for a second thread."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def make(base_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    folder = tmp_path_factory.mktemp("experts")
    made: dict[str, Expert] = {}

    def expert(kind: str) -> Expert:
        if kind not in made:
            model = Qwen3ForCausalLM.from_pretrained(base_path, dtype=torch.float32)
            made[kind] = make_expert(kind, KINDS[kind], model, folder)
        return made[kind]

    return expert


@pytest.fixture
def base(base_path: Path) -> BaseModel:
    return load_base_model(base_path, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def full(base_path: Path, make: Make) -> Iterator[tuple[BaseModel, AdapterBank]]:
    """A bank that holds every kind."""
    base = load_base_model(base_path, device="cpu", dtype="float32")
    bank = AdapterBank(base)
    for kind in KINDS:
        bank.load(kind, make(kind).package)
    yield base, bank
    bank.close()


def ids_of(seed: int, length: int = 12) -> torch.Tensor:  # [1, length]
    return torch.randint(3, VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(base: BaseModel, bank: AdapterBank, ids: torch.Tensor, expert: str | None) -> torch.Tensor:
    everything = [Slice(0, ids.shape[1], expert)]
    bank.begin(everything, everything)
    logits: torch.Tensor = base.model(input_ids=ids).logits[0]
    return logits


@torch.no_grad()
def oracle_logits(expert: Expert, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = expert.oracle(input_ids=ids).logits[0]
    return logits


@torch.no_grad()
def greedy(answer: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor, num_tokens: int = 6) -> list[int]:
    for _ in range(num_tokens):
        ids = torch.cat([ids, answer(ids)[-1].argmax().view(1, 1)], dim=1)
    return ids[0, -num_tokens:].tolist()


@pytest.mark.parametrize("kind", list(KINDS))
def test_each_kind_answers_as_peft_alone(full: tuple[BaseModel, AdapterBank], make: Make, kind: str) -> None:
    base, bank = full
    ids = ids_of(3)
    ours = logits_of(base, bank, ids, kind)
    torch.testing.assert_close(ours, oracle_logits(make(kind), ids), atol=1e-4, rtol=0)
    assert (ours - logits_of(base, bank, ids, None)).abs().max() > 0.05
    mine = greedy(lambda ids: logits_of(base, bank, ids, kind), ids)
    assert mine == greedy(lambda ids: oracle_logits(make(kind), ids), ids)


def packed(lengths: list[int]) -> dict[str, torch.Tensor]:
    """The positions and the block-diagonal causal mask that let a stock model run sequences side by side."""
    owners = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    seen = (owners[:, None] == owners[None, :]).tril()
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    positions = torch.cat([torch.arange(length) for length in lengths])
    return {"position_ids": positions[None], "attention_mask": mask[None, None]}


@pytest.mark.parametrize("seed", [0, 1])
def test_all_kinds_side_by_side_answer_as_each_alone(
    full: tuple[BaseModel, AdapterBank], make: Make, seed: int
) -> None:
    base, bank = full
    order: list[str | None] = [*KINDS, None, None, "dora"]
    random.Random(seed).shuffle(order)
    lengths = [random.Random(seed + place).choice([1, 2, 3, 17]) for place in range(len(order))]
    sequences = [ids_of(place, length) for place, length in enumerate(lengths)]
    alone = [
        logits_of(base, bank, ids, None)[-1] if expert is None else oracle_logits(make(expert), ids)[-1]
        for expert, ids in zip(order, sequences, strict=True)
    ]
    ends = torch.tensor(lengths).cumsum(0)
    tokens = [
        Slice(int(end) - length, int(end), expert) for end, length, expert in zip(ends, lengths, order, strict=True)
    ]
    rows = [Slice(place, place + 1, expert) for place, expert in enumerate(order)]
    for form in FORMS:
        bank.begin(tokens, rows, form=form)
        with torch.no_grad():
            out = base.model(input_ids=torch.cat(sequences, dim=1), logits_to_keep=ends - 1, **packed(lengths))
        for expert, mixed, expected in zip(order, out.logits[0], alone, strict=True):
            torch.testing.assert_close(
                mixed, expected, atol=1e-4, rtol=0, msg=lambda why, at=(form, expert): f"{at}: {why}"
            )


@given(data=st.data())
def test_every_form_computes_the_same_for_any_slices(full: tuple[BaseModel, AdapterBank], data: st.DataObject) -> None:
    base, bank = full
    names: list[str | None] = [None, *KINDS]
    parts = data.draw(st.lists(st.tuples(st.sampled_from(names), st.integers(0, 40)), min_size=1, max_size=12))
    slices: list[Slice] = []
    for expert, length in parts:
        start = slices[-1].stop if slices else 0
        slices.append(Slice(start, start + length, expert))
    path = data.draw(st.sampled_from(["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head"]))
    module = base.model.get_submodule(path)
    hidden = torch.randn(1, slices[-1].stop, module.in_features)
    answers = []
    for form in FORMS:
        bank.begin(slices, slices, form=form)
        answers.append(module(hidden))
    for answer in answers[1:]:
        torch.testing.assert_close(answer, answers[0], atol=1e-5, rtol=1e-4)
    plain = module.plain(hidden)
    for part in slices:
        if part.expert is None:
            assert torch.equal(answers[0][0, part.start : part.stop], plain[0, part.start : part.stop])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_the_base_alone_are_exactly_the_base_s(base_path: Path, make: Make, dtype: torch.dtype) -> None:
    base = load_base_model(base_path, device="cpu", dtype=str(dtype).removeprefix("torch."))
    bank = AdapterBank(base)
    for kind in KINDS:
        bank.load(kind, make(kind).package)
    slices = [
        Slice(0, 3, "dora-biases"),
        Slice(3, 6, None),
        Slice(6, 8, "ia3"),
        Slice(8, 9, "lokr"),
        Slice(9, 11, None),
    ]
    for path, module in base.model.named_modules():
        if isinstance(module, AdaptedModule) and isinstance(module.plain, nn.Linear):
            hidden = torch.randn(1, 11, module.plain.in_features, dtype=dtype)
            plain = module.plain(hidden)[0]
            for form in FORMS:
                bank.begin(slices, slices, form=form)
                mixed = module(hidden)[0]
                assert torch.equal(mixed[3:6], plain[3:6]), (path, form)
                assert torch.equal(mixed[9:], plain[9:]), (path, form)


@pytest.mark.parametrize("kind", list(tiny.ADAPTERS))
def test_unmerged_answers_as_merged(base: BaseModel, base_path: Path, make: Make, kind: str) -> None:
    bank = AdapterBank(base)
    package = make(kind).package
    bank.load(kind, package)
    ids = ids_of(5)
    merged = merge_adapter(load_base_model(base_path, device="cpu", dtype="float32"), package)
    with torch.no_grad():
        torch.testing.assert_close(
            logits_of(base, bank, ids, kind), merged.model(input_ids=ids).logits[0], atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("kind", ["head", "embedding", "dora-embedding", "saved"])
def test_a_tied_head_stays_the_base_s(tmp_path: Path, base_path: Path, kind: str) -> None:
    """PEFT changes one of two tied matrices, and so do we."""
    config = Qwen3Config.from_pretrained(base_path, tie_word_embeddings=True)
    torch.manual_seed(4)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "tied")
    change = copy.deepcopy(KINDS[kind])
    if "embedding" in kind:
        change.target_modules = ["embed_tokens", "q_proj"]
    model = Qwen3ForCausalLM.from_pretrained(tmp_path / "tied", dtype=torch.float32)
    expert = make_expert(kind, change, model, tmp_path)
    base = load_base_model(tmp_path / "tied", device="cpu", dtype="float32")
    bank = AdapterBank(base)
    bank.load(kind, expert.package)
    ids = ids_of(7)
    torch.testing.assert_close(logits_of(base, bank, ids, kind), oracle_logits(expert, ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["embedding", "dora-embedding", "saved", "dora"])
def test_an_embedding_that_scales_what_it_looks_up(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(4)
    Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            tie_word_embeddings=False,
        )
    ).save_pretrained(tmp_path / "gemma")
    model = Gemma3ForCausalLM.from_pretrained(tmp_path / "gemma", dtype=torch.float32)
    expert = make_expert(kind, KINDS[kind], model, tmp_path)
    base = load_base_model(tmp_path / "gemma", device="cpu", dtype="float32")
    bank = AdapterBank(base)
    bank.load(kind, expert.package)
    ids = ids_of(7)
    torch.testing.assert_close(logits_of(base, bank, ids, kind), oracle_logits(expert, ids), atol=1e-4, rtol=0)


def test_packed_weights_keep_their_adapters(base_path: Path, make: Make) -> None:
    if not can_pack():
        pytest.skip("this CPU has no AVX-512")
    answers = []
    for is_packed in (False, True):
        base = load_base_model(base_path, device="cpu", dtype="bfloat16")
        for path, linear in list(base.model.named_modules()):
            if is_packed and isinstance(linear, nn.Linear):
                parent, _, name = path.rpartition(".")
                setattr(base.model.get_submodule(parent), name, PackedLinear(linear))
        bank = AdapterBank(base)
        bank.load("dora", make("dora").package)
        answers.append(logits_of(base, bank, ids_of(9), "dora"))
        bank.begin([], [])
        answers.append(base.model(input_ids=ids_of(9)).logits[0])
    plain, plain_base, packed_one, packed_base = (answer.float().detach() for answer in answers)
    noise = (plain_base - packed_base).abs().max()
    assert (plain - packed_one).abs().max() <= 4 * noise + 0.1
    assert (packed_one - packed_base).abs().max() > 1


def test_the_least_recently_used_goes_first(base: BaseModel, make: Make) -> None:
    bank = AdapterBank(base, max_adapters=3)
    for kind in ("lora", "dora", "ia3"):
        bank.load(kind, make(kind).package)
    bank.load("lora", make("lora").package)  # a load of a resident one counts as a use
    bank.begin([Slice(0, 2, "dora")], [])  # and so does a step
    bank.load("lokr", make("lokr").package)
    assert bank.names() == ("lora", "dora", "lokr")
    assert "ia3" not in bank
    assert bank.info("lokr").last_used > bank.info("dora").last_used > bank.info("lora").last_used
    ids = ids_of(1)
    expected = oracle_logits(make("lokr"), ids)
    torch.testing.assert_close(logits_of(base, bank, ids, "lokr"), expected, atol=1e-4, rtol=0)


def test_pinned_and_used_adapters_stay(base: BaseModel, make: Make) -> None:
    bank = AdapterBank(base, max_adapters=2)
    bank.load("lora", make("lora").package, pin=True)
    bank.load("dora", make("dora").package)
    bank.acquire("dora")
    assert (bank.info("lora").is_pinned, bank.info("dora").is_in_use) == (True, True)
    with pytest.raises(AdapterError, match=r"no room for the adapter ia3[\s\S]*lora: pinned[\s\S]*dora: in use"):
        bank.load("ia3", make("ia3").package)
    assert bank.names() == ("lora", "dora")
    with pytest.raises(AdapterError, match="dora is in use by 1 sequences"):
        bank.unload("dora")
    bank.unpin("lora")
    bank.load("ia3", make("ia3").package)
    assert bank.names() == ("dora", "ia3")
    bank.release("dora")
    bank.unload("dora")
    assert bank.names() == ("ia3",)


def test_bytes_are_a_limit_too(base: BaseModel, make: Make) -> None:
    probe = AdapterBank(base)
    sizes = {kind: probe.load(kind, make(kind).package).num_bytes for kind in ("lora", "dora", "saved")}
    probe.close()
    bank = AdapterBank(base, max_bytes=sizes["lora"] + sizes["dora"])
    bank.load("lora", make("lora").package)
    bank.load("dora", make("dora").package)
    with pytest.raises(AdapterError, match="no room for the adapter saved"):
        bank.load("saved", make("saved").package)  # larger than all: nothing is evicted in vain
    assert bank.names() == ("lora", "dora")
    bank.load("rslora", make("rslora").package)
    assert bank.names() == ("dora", "rslora")


def test_a_name_belongs_to_one_package(base: BaseModel, make: Make) -> None:
    bank = AdapterBank(base)
    bank.load("sql", make("lora").package)
    with pytest.raises(AdapterError, match="the name sql is taken by another package"):
        bank.load("sql", make("dora").package)
    bank.unload("sql")
    assert bank.load("sql", make("dora").package).kind == "dora"


def test_what_is_known_of_an_adapter(base: BaseModel, make: Make) -> None:
    bank = AdapterBank(base)
    infos = {kind: bank.load(kind, make(kind).package) for kind in ("dora-patterns", "ia3", "lokr", "adalora")}
    assert {kind: info.rank for kind, info in infos.items()} == {
        "dora-patterns": 20,
        "ia3": None,
        "lokr": None,
        "adalora": 4,
    }
    assert infos["dora-patterns"].kind == "dora"
    for unknown in (bank.info, bank.unload, bank.pin, bank.unpin, bank.acquire, bank.release):
        with pytest.raises(AdapterError, match="the adapter nobody is not loaded"):
            unknown("nobody")
    with pytest.raises(AdapterError, match="released more often"):
        bank.release("ia3")


# What the package's own check says comes first; what it cannot know, the comparison with the model finds.
DAMAGES: dict[str, tuple[Callable[[dict[str, torch.Tensor], str], Any], str]] = {
    "missing": (lambda weights, key: weights.pop(key), "missing"),
    "left over": (
        lambda weights, key: weights.update({f"{key}.more": torch.ones(1)}),
        "not in this base model: |not a tensor of a",
    ),
    "shape": (lambda weights, key: weights.update({key: weights[key][:-1].clone()}), "wanted|shapes|says"),
    "nan": (lambda weights, key: weights[key].view(-1)[0].fill_(float("nan")), "NaN or infinity"),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
@pytest.mark.parametrize("kind", ["dora", "ia3", "lokr", "adalora", "head", "trained-biases", "pruned"])
def test_a_damaged_adapter_is_refused(base: BaseModel, make: Make, tmp_path: Path, kind: str, damage: str) -> None:
    package = make(kind).package
    weights = load_file(package.adapter_weights)
    key = max(name for name, value in weights.items() if value.numel())
    spoil, complaint = DAMAGES[damage]
    spoil(weights, key)
    for file in package.root.iterdir():
        if file.name != package.adapter_weights.name and file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(weights, tmp_path / package.adapter_weights.name)
    bank = AdapterBank(base)
    with pytest.raises(AdapterError) as caught:
        bank.load(kind, open_package(tmp_path))
    assert re.search(complaint, str(caught.value))
    assert key.removesuffix(".weight") in str(caught.value)
    assert bank.names() == ()
    assert not any(isinstance(module, AdaptedModule) for module in base.model.modules())


def test_an_adapter_of_another_base_is_refused(make: Make, tmp_path: Path) -> None:
    base = load_base_model(tiny.make_base(tmp_path, vocab_size=1024), device="cpu", dtype="float32")
    bank = AdapterBank(base)
    with pytest.raises(AdapterError, match="does not fit the base model"):
        bank.load("head", make("head").package)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=2))
    other = BaseModel(model, torch.device("cpu"), torch.float32, frozenset(), 128)
    with pytest.raises(AdapterError, match=r"does not fit the base model[\s\S]*q_proj"):
        AdapterBank(other).load("lora", make("lora").package)


@pytest.mark.parametrize("name", ["conv", "norm bias", "saved conv", "head norm"])
def test_what_cannot_be_applied_per_row_is_refused(name: str, base_path: Path, tmp_path: Path) -> None:
    qwen = Qwen3ForCausalLM.from_pretrained(base_path, dtype=torch.float32)
    torch.manual_seed(4)
    phi = PhiForCausalLM(
        PhiConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    )
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=2))
    model, config, complaint = {
        "conv": (gpt, peft.LoraConfig(**LORA, target_modules=["c_attn"], fan_in_fan_out=True), "Conv1D cannot be"),
        "norm bias": (phi, peft.LoraConfig(**LORA, target_modules=["q_proj"], bias="all"), "layernorm.*LayerNorm"),
        "saved conv": (
            gpt,
            peft.LoraConfig(**LORA, target_modules=["lm_head"], modules_to_save=["c_fc"]),
            "Conv1D cannot",
        ),
        "head norm": (
            qwen,
            peft.LoraConfig(**LORA, target_modules=["q_proj"], modules_to_save=["q_norm"]),
            "attention",
        ),
    }[name]
    base = BaseModel(copy.deepcopy(model), torch.device("cpu"), torch.float32, frozenset(), 128)
    package, _ = make_expert(name.replace(" ", "-"), config, model, tmp_path)
    with pytest.raises(AdapterError, match=rf"cannot run beside others\n.*{complaint}"):
        AdapterBank(base).load("x", package)


def test_close_puts_the_base_back(base: BaseModel, make: Make) -> None:
    ids = ids_of(2)
    with torch.no_grad():
        before = base.model(input_ids=ids).logits[0]
    modules = dict(base.model.named_modules())
    bank = AdapterBank(base)
    for kind in KINDS:
        bank.load(kind, make(kind).package)
    assert torch.equal(logits_of(base, bank, ids, None), before)
    assert not torch.equal(logits_of(base, bank, ids, "dora"), before)
    bank.close()
    assert dict(base.model.named_modules()) == modules
    with torch.no_grad():
        assert torch.equal(base.model(input_ids=ids).logits[0], before)
    assert bank.names() == ()


def held_bytes() -> int:
    gc.collect()
    storages = {
        thing.untyped_storage().data_ptr(): thing.untyped_storage().nbytes()
        for thing in gc.get_objects()
        if type(thing) in (torch.Tensor, nn.Parameter) and thing.device.type == "cpu"
    }
    return sum(storages.values())


def test_memory_holds_the_adapters_and_no_second_base(base: BaseModel, base_path: Path, tmp_path: Path) -> None:
    experts = []
    for name in ("one", "two", "three"):
        config = peft.LoraConfig(r=8, target_modules=tiny.TARGETS, use_dora=True, task_type="CAUSAL_LM")
        model = Qwen3ForCausalLM.from_pretrained(base_path, dtype=torch.float32)
        experts.append((name, make_expert(name, config, model, tmp_path).package))
        del model
    bank = AdapterBank(base)
    before = held_bytes()
    held = sum(bank.load(name, package).num_bytes for name, package in experts)
    added = held_bytes() - before
    assert held <= added <= held * 1.15
    bank.unload("two")
    assert held_bytes() - before < added
    bank.close()
    assert held_bytes() - before < 0.01 * held


def test_a_step_must_fit(base: BaseModel, make: Make) -> None:
    bank = AdapterBank(base)
    bank.load("lora", make("lora").package)
    with pytest.raises(AdapterError, match="the adapter dora is not loaded"):
        bank.begin([Slice(0, 3, "dora")], [])
    for slices in (
        [Slice(1, 3, "lora")],
        [Slice(0, 2, None), Slice(3, 4, "lora")],
        [Slice(0, 2, None), Slice(1, 4, "lora")],
    ):
        with pytest.raises(AdapterError, match="no partition"):
            bank.begin(slices, [])
    bank.begin([Slice(0, 3, "lora")], [])
    with pytest.raises(AdapterError, match="told of 3 rows, and 12 came"):
        base.model(input_ids=ids_of(1))
    bank.begin([Slice(0, 12, "lora")], [])
    bank.unload("lora")
    bank.load("dora", make("dora").package)
    with pytest.raises(AdapterError, match="unloaded while its rows were computed"):
        base.model(input_ids=ids_of(1))


def test_a_slot_that_was_freed_answers_for_its_new_adapter_alone(base: BaseModel, make: Make) -> None:
    bank = AdapterBank(base)
    for number in range(6):
        bank.load(str(number), make("dora" if number % 2 else "tall").package)
    for name in ("0", "4"):
        bank.unload(name)
    bank.load("new", make("lora").package)
    bank.load("other", make("dora").package)
    ids = ids_of(6)
    for name, kind in {"new": "lora", "other": "dora", "3": "dora", "2": "tall", "5": "dora"}.items():
        expected = oracle_logits(make(kind), ids)
        torch.testing.assert_close(logits_of(base, bank, ids, name), expected, atol=1e-4, rtol=0)


def test_loads_in_other_threads_change_no_answer(base: BaseModel, make: Make) -> None:
    bank = AdapterBank(base, max_adapters=3)
    bank.load("dora", make("dora").package)
    bank.acquire("dora")
    packages = {kind: make(kind).package for kind in ("lora", "ia3", "lokr", "rslora", "adalora")}
    problems: list[BaseException] = []
    is_done = threading.Event()

    def churn(kinds: list[str]) -> None:
        try:
            for _ in range(6):
                for kind in kinds:
                    bank.load(kind, packages[kind])
                    bank.names()
        except BaseException as problem:  # noqa: BLE001  # a thread's error must fail the test
            problems.append(problem)

    threads = [
        threading.Thread(target=churn, args=(kinds,)) for kinds in (["lora", "ia3", "lokr"], ["rslora", "adalora"])
    ]
    ids = ids_of(8)
    expected = logits_of(base, bank, ids, "dora")
    for thread in threads:
        thread.start()
    watcher = threading.Thread(target=lambda: ([thread.join() for thread in threads], is_done.set()))
    watcher.start()
    num_steps = 0
    while not is_done.is_set():
        torch.testing.assert_close(logits_of(base, bank, ids, "dora"), expected, atol=1e-5, rtol=0)
        num_steps += 1
    watcher.join()
    assert problems == []
    assert num_steps > 2
    assert len(bank.names()) == 3


def test_the_wide_form_keeps_its_addresses() -> None:
    """A captured CUDA graph reads the same tensors in every step, filled before it is replayed."""
    device, slots = torch.device("cpu"), ("a", None, "b")
    buffers: dict[Any, torch.Tensor] = {}
    first = StepRows([Slice(0, 2, "a"), Slice(2, 3, None)], device, form="wide", buffers=buffers)
    mask, index = first.mask(slots, 2, torch.float32), first.index(slots)
    assert mask.tolist() == [[1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]
    assert index.tolist() == [1, 1, 0]
    second = StepRows([Slice(0, 1, "b"), Slice(1, 3, "a")], device, form="wide", buffers=buffers)
    assert mask.tolist() == [[0, 0, 0, 0, 1, 1], [1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]]
    assert index.tolist() == [3, 1, 1]
    assert second.mask(slots, 2, torch.float32).data_ptr() == mask.data_ptr()


def test_long_slices_are_computed_alone_and_short_ones_together() -> None:
    device, slots = torch.device("cpu"), tuple("abcdefghij")
    decode = [Slice(512 + place, 513 + place, name) for place, name in enumerate("bcdefghij")]
    plan = StepRows([Slice(0, 512, "a"), *decode], device).plan(slots)
    assert plan.slices == ((0, 512, 0),)
    assert plan.batch is not None
    assert (plan.batch.first, plan.batch.last, plan.batch.height) == (1, 10, 1)
    assert plan.batch.gather.tolist() == list(range(512, 521))


def test_neighbours_of_one_expert_are_one_slice() -> None:
    parts = [Slice(0, 2, "a"), Slice(2, 2, "b"), Slice(2, 5, "a"), Slice(5, 6, None), Slice(6, 7, "a")]
    assert StepRows(parts, torch.device("cpu")).slices == ((0, 5, "a"), (6, 7, "a"))


def test_the_norm_of_a_packed_weight_is_read_from_it() -> None:
    if not can_pack():
        pytest.skip("this CPU has no AVX-512")
    linear = nn.Linear(32, 48).to(torch.bfloat16)
    assert torch.equal(dense_weight(PackedLinear(linear)), linear.weight)
