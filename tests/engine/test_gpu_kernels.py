"""The Triton kernels against plain formulas: on a GPU where there is one, else by Triton's interpreter."""

import os
import subprocess
import sys
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from torch.nn import functional

from pipeline.engine.attention import kernels_for
from pipeline.engine.batched_attention import BatchedAttention
from pipeline.engine.kernels import KernelsUnavailableError
from pipeline.engine.paged_plan import places, plan_recorded, plan_step, units_of
from pipeline.engine.transfer import to_device
from pipeline.errors import ConfigError, MissingDependencyError
from tests.engine.test_batched_attention import LAYER, Batch, Case, cases, softcaps, windows

triton = pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # the interpreter multiplies no bfloat16
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if DEVICE.type == "cuda" or IS_INTERPRETED:
    from pipeline.engine.kernels.gpu import GpuKernels

computed = pytest.mark.skipif(
    DEVICE.type == "cpu" and not IS_INTERPRETED, reason="there is no GPU; the interpreter runs them in another process"
)

on_gpu = pytest.mark.skipif(DEVICE.type == "cpu", reason="there is no CUDA device")


@pytest.mark.skipif(DEVICE.type == "cuda" or IS_INTERPRETED, reason="they are run right here")
def test_the_kernels_are_right_by_tritons_interpreter() -> None:
    """In a process of its own: Triton looks at this variable when it is first imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout


def filled_up(batch: Batch) -> list[Any]:
    """The numbers of a step as it is recorded."""
    return plan_recorded([0] * sum(item.count for item in batch.items), batch.items, [0])


def attention_of(batch: Batch, kernels: Any, *, num_rows: int = 0) -> BatchedAttention:
    """A step's attention on the device, filled up as a recorded step is if `num_rows` says so."""
    batch.cache.pool = batch.cache.pool.to(DEVICE)
    batch.q, batch.k, batch.v = (one.to(DEVICE) for one in (batch.q, batch.k, batch.v))
    if num_rows:
        _, _, *arrays = filled_up(batch)
    else:
        arrays = [places(batch.items), *(array for units in plan_step(batch.items) for array in units.arrays())]
    own_places, *others = to_device(arrays, DEVICE)
    return BatchedAttention(batch.cache, own_places, units_of(others), kernels)


def check(case: Case, dtype: torch.dtype, window: int = 0, softcap: float = 0.0, *, is_filled_up: bool = False) -> None:
    """See that a step's attention is what the plain formula gives."""
    batch = Batch(case, dtype)
    expected = batch.expected(window, softcap)
    num_rows = len(filled_up(batch)[1]) if is_filled_up else 0
    found = batch.found(attention_of(batch, GpuKernels(dtype), num_rows=num_rows), window, softcap, num_rows)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1.2e-2
    torch.testing.assert_close(found.cpu().float(), expected, rtol=tolerance, atol=tolerance)


def test_kernels_are_for_gpus() -> None:
    with pytest.raises(ConfigError) as caught:
        kernels_for(torch.device("cpu"), torch.float32, use_triton=True)
    assert "use_triton" in str(caught.value.hint)


def test_without_triton_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pipeline.engine.kernels.gpu", None)
    with pytest.raises(MissingDependencyError) as caught:
        kernels_for(torch.device("cuda"), torch.float32, use_triton=True)
    assert "pip install triton" in str(caught.value.hint)
    assert kernels_for(torch.device("cuda"), torch.float32, use_triton=False) is None


@pytest.mark.skipif(DEVICE.type == "cuda" or IS_INTERPRETED, reason="Triton works here")
def test_where_triton_does_not_work_torch_computes_and_that_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from pipeline.engine.kernels import gpu

    with pytest.raises(KernelsUnavailableError) as caught:  # it finds no driver here, as it finds no compiler elsewhere
        gpu.GpuKernels(torch.float32).try_out(torch.device("cpu"))
    assert "Triton does not work: " in str(caught.value)
    works = Mock(side_effect=caught.value)
    monkeypatch.setattr(gpu.GpuKernels, "try_out", works)
    with caplog.at_level("WARNING", logger="pipeline"):
        assert kernels_for(torch.device("cuda"), torch.bfloat16) is None
    assert works.call_count == 1
    assert "no kernels on cuda" in caplog.text
    assert "Fix: Install a C compiler" in caplog.text


@on_gpu
def test_a_gpu_computes_by_triton_unless_told_otherwise() -> None:
    assert isinstance(kernels_for(DEVICE, torch.bfloat16), GpuKernels)


@computed
@pytest.mark.parametrize(("window", "softcap", "dtype"), [(0, 0.0, HALF), (7, 2.0, torch.float32)])
def test_a_mixed_step_equals_the_plain_formula(window: int, softcap: float, dtype: torch.dtype) -> None:
    check(Case(((1, 20, 0), (1, 140, -1), (5, 3, 0)), (33,)), dtype, window, softcap)


@computed
def test_a_decode_step_that_is_filled_up_equals_the_plain_formula() -> None:
    check(Case(((1, 20, 0), (1, 140, 0), (1, 0, 0), (1, 3, -1), (1, 0, -1)), (17,)), torch.float32, is_filled_up=True)


@pytest.mark.gpu
@on_gpu
@settings(max_examples=100)
@given(case=cases(), window=windows, softcap=softcaps)
def test_attention_equals_the_plain_formula(case: Case, window: int, softcap: float) -> None:
    check(case, torch.float32, window, softcap)


@pytest.mark.gpu
@on_gpu
@settings(max_examples=40)
@given(case=cases(), window=windows)
def test_attention_in_half_precision_is_computed_in_float32(case: Case, window: int) -> None:
    check(case, torch.bfloat16, window)


@pytest.mark.gpu
@on_gpu
@settings(max_examples=100)
@given(case=cases(most_tokens=1), window=windows)
def test_any_decode_step_that_is_filled_up_is_the_same(case: Case, window: int) -> None:
    check(case, torch.float32, window, is_filled_up=True)


@computed
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_new_keys_and_values_lie_where_torch_puts_them(dtype: torch.dtype) -> None:
    case = Case(((3, 20, 0), (1, 5, -1), (40, 0, 0)), (17,), seed=1)
    ours, stock = Batch(case, dtype), Batch(case, dtype)
    stock.attention().store(LAYER, stock.k, stock.v)
    attention = attention_of(ours, GpuKernels(dtype))
    apart = [torch.stack([one, one.neg()], dim=2)[:, :, 0] for one in (ours.k, ours.v)]  # a token's heads lie apart
    attention.store(LAYER, *apart)
    assert torch.equal(ours.cache.pool.cpu(), stock.cache.pool)


@computed
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("add_one", [False, True])
@pytest.mark.parametrize("shape", [(1, 3, 2, 8), (2, 1000)])
def test_a_norm_is_rounded_where_the_stock_modules_round(
    shape: tuple[int, ...], add_one: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(shape).to(DEVICE, dtype), torch.randn(shape[-1]).to(DEVICE, dtype)
    normed = hidden.float() * torch.rsqrt(hidden.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    expected = (normed * (1 + weight.float())).to(dtype) if add_one else normed.to(dtype) * weight
    found = GpuKernels(dtype).rms_norm(hidden, weight, 1e-6, add_one=add_one)
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 8e-3, "atol": 1e-6}
    torch.testing.assert_close(found, expected, **close)


@computed
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_a_gate_is_what_torch_computes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate, up = torch.randn(2, 3, 700).to(DEVICE, dtype) * 4, torch.randn(2, 3, 700).to(DEVICE, dtype)
    found = GpuKernels(dtype).silu_mul(gate, up)
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1.6e-2, "atol": 1e-6}
    torch.testing.assert_close(found, functional.silu(gate) * up, **close)


@computed
def test_empty_units_and_rows_that_nobody_asked_give_no_numbers_that_are_none() -> None:
    batch = Batch(Case(((1, 5, -1), (1, 130, -1), (1, 0, -1), (1, 0, -1), (1, 300, -1)), ()))
    num_rows = len(filled_up(batch)[1])
    attention = attention_of(batch, GpuKernels(torch.float32), num_rows=num_rows)
    queries = torch.ones(num_rows, *batch.q.shape[1:], device=DEVICE)
    assert bool(attention.attend(LAYER, queries, 0.3, 0, 0.0).isfinite().all())


@pytest.mark.skipif(IS_INTERPRETED, reason="an interpreter compiles nothing")
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_attention_kernel_compiles_for_a_gpu(dtype: str) -> None:
    """Without one: what Triton refuses in a kernel's text, its interpreter accepts."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pipeline.engine.kernels import gpu

    kinds = {"queries": dtype, "keys": dtype, "values": dtype, "sums": "fp32", "mass": "fp32", "peak": "fp32"}
    kinds |= dict.fromkeys(("lanes", "positions", "pages", "first", "count"), "i64")
    signature = {name: f"*{kind}" for name, kind in kinds.items()} | {"scale": "fp32", "softcap": "fp32"}
    known = {"GROUP": 2, "HEAD_DIM": 128, "PAGE_SIZE": 16, "IS_CAPPED": True, "IS_WINDOWED": True}
    known |= {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_D": 128}
    names = gpu._attend_units.arg_names
    source = ASTSource(
        fn=gpu._attend_units,
        signature={name: "constexpr" if name in known else signature.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in known.items()},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
    assert "cubin" in compiled.asm
