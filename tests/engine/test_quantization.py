"""Quantised layers against the product with the weight they stand for, and quantised experts against unquantised."""

import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline import Expert, demo
from pipeline.batch.config import BatchConfig
from pipeline.batch.plan import open_experts, prepare
from pipeline.demo.questions import draw_questions, write_questions
from pipeline.demo.scoring import exact_match
from pipeline.demo.tasks import DIALECTS
from pipeline.engine.adapters import AdapterBank, Slice
from pipeline.engine.linear import FrozenLinear, Int4Linear, Int8Linear, Int8WeightLinear, dense_weight
from pipeline.engine.loader import BaseModel, load_base_model
from pipeline.engine.quantization import (
    GROUP_SIZE,
    QUANTIZATIONS,
    Quantization,
    check_quantization,
    has_int8_products,
    quantize,
    torchao_method,
)
from pipeline.engine.runtime import load_experts
from pipeline.errors import AdapterError, ConfigError, MissingDependencyError
from pipeline.package import open_package
from tests import tiny

Method = Callable[[nn.Linear], FrozenLinear]
int8_products = pytest.mark.skipif(not has_int8_products(), reason="this CPU has no products of 8-bit numbers")
METHODS = [
    pytest.param(Int8Linear, id="int8", marks=int8_products),
    pytest.param(Int8WeightLinear, id="int8-weights"),
    pytest.param(lambda linear: Int4Linear(linear, 32), id="int4-32"),
    pytest.param(lambda linear: Int4Linear(linear, 64), id="int4-64"),
]


def layer(dtype: torch.dtype = torch.float32, *, bias: bool = False, inputs: int = 192, outputs: int = 80) -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        linear.weight.mul_(torch.rand(outputs, 1) * 8)  # outputs differ in size, as those of models do
    return linear.to(dtype).requires_grad_(False)


def rounded(rows: torch.Tensor) -> torch.Tensor:
    """Rows of 8-bit numbers, each by its own scale, by the plain formula."""
    scale = rows.float().abs().amax(dim=1, keepdim=True) / 127
    return (rows.float() / scale).round() * scale


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_rows", [1, 7, 70])
def test_a_quantised_layer_multiplies_with_its_dequantised_weight(
    method: Method, dtype: torch.dtype, bias: bool, num_rows: int
) -> None:
    linear = layer(dtype, bias=bias)
    quantised = method(linear)
    hidden = torch.randn(num_rows, 192).to(dtype)
    inputs = rounded(hidden) if isinstance(quantised, Int8Linear) else hidden.float()
    wanted = inputs @ dense_weight(quantised).float().T + (linear.bias.float() if bias else 0)
    found = quantised(hidden[None])
    assert found.shape == (1, num_rows, 80)
    assert found.dtype == dtype
    is_rounded = dtype == torch.bfloat16 or isinstance(quantised, Int4Linear)
    assert distance(found[0], wanted) < (5e-3 if is_rounded else 1e-5)
    assert distance(found[0], linear(hidden)) < (0.02 if "int8" in type(quantised).__name__.lower() else 0.2)


@pytest.mark.parametrize("method", METHODS)
def test_no_weight_moves_by_more_than_half_a_step(method: Method) -> None:
    linear = layer()
    quantised = method(linear)
    weight = linear.weight
    if isinstance(quantised, Int4Linear):
        groups = weight.unflatten(1, (-1, quantised._group_size))
        spread = groups.amax(dim=2, keepdim=True) - groups.amin(dim=2, keepdim=True)
        step = (spread / 15).expand_as(groups).flatten(1) * 1.1  # bfloat16 rounds the step and the offset
    else:
        step = weight.abs().amax(dim=1, keepdim=True) / 127
    moved = (dense_weight(quantised) - weight).abs()
    assert (moved <= step * 0.5001 + 1e-6).all()
    assert (moved > step * 0.3).any()  # it is quantised


@int8_products
def test_a_row_does_not_depend_on_its_neighbours() -> None:
    quantised = Int8Linear(layer())
    rows = torch.randn(40, 192)
    alone = torch.cat([quantised(row[None]) for row in rows])
    assert distance(quantised(rows), alone) < 1e-6
    loud = torch.cat([rows, 1e4 * torch.randn(1, 192)])
    assert distance(quantised(loud)[:40], alone) < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_zeros_give_the_bias_and_broken_rows_stay_alone(method: Method) -> None:
    linear = layer(bias=True)
    quantised = method(linear)
    assert torch.allclose(quantised(torch.zeros(2, 192)), linear.bias.expand(2, -1), atol=1e-6)
    rows = torch.randn(3, 192)
    broken = rows.clone()
    broken[1, 5] = float("nan")
    found = quantised(broken)
    assert not found[1].isfinite().any()
    assert torch.allclose(found[[0, 2]], quantised(rows)[[0, 2]], rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_base(tmp_path_factory.mktemp("base"), vocab_size=len(tiny.tokenizer()))


def load(path: Path, quantization: Quantization | None) -> BaseModel:
    return quantize(load_base_model(path, device="cpu", dtype="float32"), quantization)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_all_linear_layers_are_quantised(tiny_base: Path, quantization: Quantization) -> None:
    base = load(tiny_base, quantization)
    kinds = {path: type(module) for path, module in base.model.named_modules() if "proj" in path or "head" in path}
    layers = {kind for path, kind in kinds.items() if "head" not in path}
    assert len(kinds) == 2 * 7 + 1
    assert layers == ({Int4Linear} if quantization == "int4" else {kinds["lm_head"]})
    assert kinds["lm_head"] in {Int8Linear, Int8WeightLinear}
    assert type(base.model.get_input_embeddings()) is nn.Embedding
    assert base.quantization == quantization


def test_a_layer_that_does_not_fit_stays_and_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tiny.make_model(tmp_path, "llama", intermediate_size=GROUP_SIZE + 16)
    with caplog.at_level(logging.WARNING):
        base = load(path, "int4")
    kinds = {name: type(module) for name, module in base.model.named_modules() if "_proj" in name}
    assert {name for name, kind in kinds.items() if kind is nn.Linear} == {
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
    }
    told = [record.getMessage() for record in caplog.records if "shape" in record.getMessage()]
    assert told == [
        "2 of 15 linear layers have a shape that int4 cannot take, and stay in float32; "
        "the first is model.layers.0.mlp.down_proj"
    ]


def test_what_cannot_be_done_is_an_error(tiny_base: Path) -> None:
    assert check_quantization("none") is None
    with pytest.raises(ConfigError, match="'int3' is unknown"):
        Expert.load(demo.package("sql"), base_model=demo.BASE_MODEL, quantization="int3").generate("hello")
    with pytest.raises(ConfigError, match="quantization"):
        BatchConfig.from_options(dataset="a.parquet", expert="b.expert", output="c", quantization="int3")
    elsewhere = replace(load(tiny_base, None), device=torch.device("mps"))
    with pytest.raises(ConfigError, match="not available on mps"):
        quantize(elsewhere, "int8")


def test_without_torchao_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(MissingDependencyError, match="pip install"):
        torchao_method("int8")


def test_a_layer_with_weights_of_torchao() -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    linear = layer()
    before = linear.weight.clone()
    hidden = torch.randn(20, 192)
    made = torchao_method("int8")(linear)
    assert made is linear
    weight = dense_weight(made)
    assert type(weight) is torch.Tensor
    assert 1e-4 < distance(weight, before) < 0.02
    assert distance(linear(hidden), hidden @ weight.T) < 0.015  # it rounds inputs to 256 steps, not to 255


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_mixed_experts_over_a_quantised_base_equal_peft_over_the_dequantised(
    tiny_base: Path, tmp_path: Path, quantization: Quantization
) -> None:
    kinds = ["lora", "dora", "ia3", "rslora"]
    made = {kind: tiny.make_package(kind, tiny_base, tmp_path) for kind in kinds}
    base = load(tiny_base, quantization)
    weights = {path: dense_weight(m) for path, m in base.model.named_modules() if isinstance(m, FrozenLinear)}
    bank = AdapterBank(base)
    for kind, (path, _) in made.items():
        bank.load(kind, open_package(path, cache_dir=tmp_path / "cache"))
    prompts = torch.randint(10, 2000, (len(kinds), 9), generator=torch.Generator().manual_seed(5))
    slices = [Slice(9 * at, 9 * at + 9, kind) for at, kind in enumerate(kinds)]
    with torch.inference_mode():
        bank.begin(slices, slices)
        found = base.model.model(input_ids=prompts).last_hidden_state
        for at, kind in enumerate(kinds):
            adapted = made[kind][1]
            replaced = 0
            for path, module in adapted.base_model.model.named_modules():
                own = path.removesuffix(".base_layer")
                if isinstance(module, nn.Linear) and own in weights:
                    module.weight.copy_(weights[own])
                    if quantization == "int8" and has_int8_products():
                        module.register_forward_pre_hook(lambda _, args: (rounded(args[0][0])[None],))
                    replaced += 1
            assert replaced == len(weights)
            wanted = adapted.base_model.model.model(input_ids=prompts[at : at + 1]).last_hidden_state[0]
            # a last bit decides to which step an input is rounded, and random layers amplify it
            assert distance(found[at], wanted) < 0.02, kind
    bank.close()


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_packed_and_padded_answer_the_same(quantization: Quantization) -> None:
    questions = list(draw_questions("cypher", 8, seed=3))
    prompts = [{"prompt": question.prompt, "schema": question.schema} for question in questions]
    answers = []
    for engine in ("packed", "padded"):
        with Expert.load(
            demo.package("cypher"), base_model=demo.BASE_MODEL, device="cpu", quantization=quantization, engine=engine
        ) as expert:
            answers.append([result.text for result in expert.generate_batch(prompts)])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_the_demo_experts_stay_right(quantization: Quantization) -> None:
    packages = {task: open_package(demo.package(task)) for task in demo.TASKS}
    loaded = load_experts(packages, demo.BASE_MODEL, device="cpu", quantization=quantization, kv_cache_bytes=1 << 28)
    asked = {question.id: (task, question) for task in demo.TASKS for question in draw_questions(task, 20, seed=4)}
    requests = [
        loaded.requests[task].build(name, prompt=one.prompt, schema=one.schema, dialect=DIALECTS[task] or "")
        for name, (task, one) in asked.items()
    ]
    right = dict.fromkeys(demo.TASKS, 0)
    for completion in loaded.engine.generate(requests):
        task, question = asked[completion.request_id]
        right[task] += exact_match(completion.text, question.expected)
    loaded.engine.close()
    assert min(right.values()) >= 19, right  # of 20, unquantised


def test_a_job_of_another_quantisation_is_another_job(tmp_path: Path) -> None:
    dataset = write_questions(tmp_path / "questions.parquet", 4)
    prints = {}
    for quantization in ("none", "int8"):
        config = BatchConfig.from_options(
            dataset=dataset,
            expert=demo.package("sql"),
            base_model=demo.BASE_MODEL,
            output=tmp_path / "answers",
            quantization=quantization,
        )
        prints[quantization] = prepare(config, open_experts(config)).output.fingerprint
    assert {name for name in prints["none"] if prints["none"][name] != prints["int8"][name]} == {"quantization"}


def test_a_quantised_base_is_not_merged_into(tiny_base: Path, tmp_path: Path) -> None:
    from pipeline.engine.loader import merge_adapter

    path, _ = tiny.make_package("lora", tiny_base, tmp_path)
    with pytest.raises(AdapterError, match="does not fit"):
        merge_adapter(load(tiny_base, "int8"), open_package(path, cache_dir=tmp_path / "cache"))
