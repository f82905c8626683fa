"""The compiled kernels against the same in plain torch, and bit for bit against themselves in other company."""

import ctypes
import functools
import itertools
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engine.kernels import AttentionPlan, Kernels, Spans, build, cpu, load_kernels, reference
from pipeline.engine.kernels.reference import Item
from pipeline.errors import ConfigError


def has_compiler() -> bool:
    """Whether there is one: a compiler that fails on our source is a failure, no reason to skip."""
    try:
        build.find_toolchain()
    except build.KernelsUnavailableError:
        return False
    return True


pytestmark = pytest.mark.skipif(not has_compiler(), reason="no C compiler here")

DTYPES = [torch.float32, torch.bfloat16]
LAYERS = 2
LAYER = 1  # not the first, so that a wrong stride between layers shows


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Waiting threads on a busy machine would make these tests ten times slower; one test varies their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def kernels(dtype: torch.dtype) -> Kernels:
    found = load_kernels(dtype)
    assert found is not None
    return found


@dataclass(frozen=True)
class Shape:
    kv_heads: int
    group: int
    dim: int


@dataclass(frozen=True)
class Case:
    """Items as (tokens, own past, group), in the order of the batch; groups as prefix lengths, -1 for no group."""

    shape: Shape
    items: tuple[tuple[int, int, int], ...]
    prefixes: tuple[int, ...]
    dtype: torch.dtype
    seed: int = 0


@dataclass
class Batch:
    """Real memory behind a case: caches of every item and prefix, and this step's queries, keys and values."""

    case: Case
    own: list[torch.Tensor]  # each [2, layers, kv_heads, capacity, dim]
    shared: list[torch.Tensor]
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    @staticmethod
    def draw(case: Case) -> "Batch":
        random = torch.Generator().manual_seed(case.seed)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=random).to(case.dtype)

        shape, total = case.shape, sum(count for count, _, _ in case.items)
        own = [normal(2, LAYERS, shape.kv_heads, past + count + 3, shape.dim) for count, past, _ in case.items]
        shared = [normal(2, LAYERS, shape.kv_heads, length, shape.dim) for length in case.prefixes]
        heads = shape.kv_heads * shape.group
        # queries, keys and values as a model gives them: [1, heads, tokens, dim] seen as [tokens, heads, dim]
        q = normal(1, total, heads, shape.dim).transpose(1, 2)[0].transpose(0, 1)
        k = normal(1, shape.kv_heads, total, shape.dim)[0].transpose(0, 1)
        v = normal(1, shape.kv_heads, total, shape.dim)[0].transpose(0, 1)
        return Batch(case, own, shared, q, k, v)

    def only(self, which: int) -> "Batch":
        """One item alone, with its prefix if it has one."""
        count, past, group = self.case.items[which]
        start = sum(item[0] for item in self.case.items[:which])
        tokens = slice(start, start + count)
        prefixes, shared = ((self.case.prefixes[group],), [self.shared[group]]) if group >= 0 else ((), [])
        case = replace(self.case, items=((count, past, min(group, 0)),), prefixes=prefixes)
        return Batch(case, [self.own[which]], shared, self.q[tokens], self.k[tokens], self.v[tokens])

    def plan(self) -> AttentionPlan:
        starts = list(itertools.accumulate((count for count, _, _ in self.case.items), initial=0))
        rows = []
        for start, (count, past, _), cache in zip(starts, self.case.items, self.own, strict=False):
            rows.append((start, count, past, *addresses(cache)))
        groups = []
        for index, (length, cache) in enumerate(zip(self.case.prefixes, self.shared, strict=True)):
            members = [i for i, item in enumerate(self.case.items) if item[2] == index]
            if members:
                count = starts[members[-1] + 1] - starts[members[0]]
                groups.append((starts[members[0]], count, length, *addresses(cache)))
        return AttentionPlan(starts[-1], spans(rows), spans(groups))

    def twin_items(self) -> list[Item]:
        items, start = [], 0
        for (count, past, group), cache in zip(self.case.items, self.own, strict=True):
            prefix = self.shared[group][:, LAYER] if group >= 0 else (None, None)
            items.append(Item(start, count, past, cache[0, LAYER], cache[1, LAYER], prefix[0], prefix[1]))
            start += count
        return items

    def run(self, scale: float = 0.2, window: int = 0, softcap: float = 0.0) -> torch.Tensor:
        shape, ours = self.case.shape, kernels(self.case.dtype)
        prepared = ours.prepare(self.plan(), shape.kv_heads * shape.group, shape.kv_heads, shape.dim)
        ours.store_inplace(prepared, LAYER, self.k, self.v)
        return ours.attention(prepared, LAYER, self.q, scale=scale, window=window, softcap=softcap)


def addresses(cache: torch.Tensor) -> tuple[int, int, int, int]:
    return cache[0].data_ptr(), cache[1].data_ptr(), cache.stride(2), cache.stride(1)


def spans(rows: list[tuple[int, ...]]) -> Spans:
    return Spans(*np.array(rows, np.int64).T) if rows else Spans.none()


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shape = Shape(draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 4, 8, 12])), draw(st.sampled_from(DIMS)))
    prefixes = tuple(draw(st.lists(st.sampled_from([1, 17, 64, 65, 150]), max_size=2)))
    owner = [-1, *range(len(prefixes)), -1]
    items = tuple(
        (draw(st.sampled_from([1, 1, 1, 2, 9, 40, 130])), draw(st.sampled_from([0, 0, 1, 5, 63, 64, 100])), group)
        for group in owner
        for _ in range(draw(st.integers(1 if group >= 0 else 0, 3)))
    )
    return Case(shape, items or ((1, 0, -1),), prefixes, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 99)))


DIMS = [8, 16, 20, 33, 64, 80, 128, 256]


@settings(max_examples=80)
@given(case=cases(), window=st.sampled_from([0, 0, 1, 7, 70]), softcap=st.sampled_from([0.0, 0.0, 2.0, 50.0]))
def test_attention_equals_the_plain_formula(case: Case, window: int, softcap: float) -> None:
    batch = Batch.draw(case)
    expected_caches = [cache.clone() for cache in batch.own]
    found = batch.run(0.2, window, softcap)
    for cache, item in zip(expected_caches, batch.twin_items(), strict=True):
        reference.store([replace(item, keys=cache[0, LAYER], values=cache[1, LAYER])], batch.k, batch.v)
    for cache, expected_cache in zip(batch.own, expected_caches, strict=True):
        assert torch.equal(cache, expected_cache)
    expected = reference.attention(batch.twin_items(), batch.q.float(), scale=0.2, window=window, softcap=softcap)
    tolerance = 1e-5 if case.dtype == torch.float32 else 1.2e-2
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)


@settings(max_examples=40)
@given(case=cases(), window=st.sampled_from([0, 0, 7, 70]))
def test_a_row_is_the_same_bit_for_bit_alone_and_in_company(case: Case, window: int) -> None:
    batch = Batch.draw(case)
    together = batch.run(window=window)
    start = 0
    for which, (count, _, _) in enumerate(case.items):
        assert torch.equal(together[start : start + count], batch.only(which).run(window=window))
        start += count


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    case = Case(Shape(2, 2, 64), ((1, 90, 0), (1, 3, 0), (200, 0, -1), (30, 80, -1)), (300,), dtype)
    batch, before = Batch.draw(case), torch.get_num_threads()
    x = torch.randn(600, 256).to(dtype)
    results = []
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            results.append((batch.run(), kernels(dtype).rms_norm(x, x[0], 1e-6), kernels(dtype).silu_mul(x, x)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_prompt_in_chunks_gives_the_same_bits(dtype: torch.dtype) -> None:
    shape = Shape(2, 2, 64)
    whole = Batch.draw(Case(shape, ((150, 0, -1),), (), dtype))
    expected = whole.run()
    found, past = [], 0
    for count in (70, 2, 78):
        tokens = slice(past, past + count)
        case = Case(shape, ((count, past, -1),), (), dtype)
        found.append(Batch(case, whole.own, [], whole.q[tokens], whole.k[tokens], whole.v[tokens]).run())
        past += count
    assert torch.equal(torch.cat(found), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_do_not_overflow(dtype: torch.dtype) -> None:
    batch = Batch.draw(Case(Shape(1, 2, 64), ((1, 70, 0), (80, 0, 0)), (100,), dtype))
    found = batch.run(scale=300.0)
    expected = reference.attention(batch.twin_items(), batch.q.float(), scale=300.0)
    assert torch.isfinite(found).all()
    assert ((found.float() - expected).abs() < 2e-2).float().mean() > 0.99  # a near tie may fall to the other side


def close_in_ulps(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for a last digit here and there."""
    if found.dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        return
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-6)
    assert (found == expected).float().mean() > 0.98


sizes = st.tuples(st.sampled_from([1, 3, 70]), st.sampled_from([1, 4]), st.sampled_from([2, 8, 40, 64, 80, 128, 1024]))


@settings(max_examples=40)
@given(size=sizes, dtype=st.sampled_from(DTYPES), add_one=st.booleans(), swap=st.booleans(), seed=st.integers(0, 99))
def test_rms_norm_equals_the_plain_formula(
    size: tuple[int, int, int], dtype: torch.dtype, add_one: bool, swap: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    x = (5 * torch.randn(size)).to(dtype)
    x = x.transpose(0, 1)[None] if swap else x
    weight = torch.randn(size[-1]).to(dtype)
    expected = reference.rms_norm(x, weight, 1e-6, add_one=add_one)
    close_in_ulps(kernels(dtype).rms_norm(x, weight, 1e-6, add_one=add_one), expected)
    kernels(dtype).rms_norm(x, weight, 1e-6, add_one=add_one, out=x)
    close_in_ulps(x, expected)


@settings(max_examples=40)
@given(size=sizes, dtype=st.sampled_from(DTYPES), part=st.sampled_from([1.0, 0.5]), seed=st.integers(0, 99))
def test_rotary_equals_the_plain_formula(
    size: tuple[int, int, int], dtype: torch.dtype, part: float, seed: int
) -> None:
    torch.manual_seed(seed)
    tokens, heads, dim = size
    x = torch.randn(1, heads, tokens, dim).to(dtype)[0].transpose(0, 1)
    angles = torch.randn(tokens, max(2, int(dim * part) // 2 * 2))
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    expected = reference.rotary(x, cos, sin)
    for out in (None, x):
        found = kernels(dtype).rotary(x, cos, sin, out=out)
        if dtype == torch.float32:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(found, expected)


@settings(max_examples=40)
@given(size=sizes, dtype=st.sampled_from(DTYPES), halves=st.booleans(), seed=st.integers(0, 99))
def test_silu_mul_equals_torch(size: tuple[int, int, int], dtype: torch.dtype, halves: bool, seed: int) -> None:
    torch.manual_seed(seed)
    both = (20 * torch.randn(size[0], 2 * size[2])).to(dtype)
    gate, up = both.chunk(2, dim=1) if halves else (both[:, ::1], both.flip(1))
    close_in_ulps(kernels(dtype).silu_mul(gate, up), reference.silu_mul(gate, up))


def test_silu_of_extremes() -> None:
    gate = torch.tensor([[-1e30, -200.0, -90.0, -0.0, 0.0, 90.0, 1e30, torch.inf]])
    found = kernels(torch.float32).silu_mul(gate, torch.ones_like(gate))
    torch.testing.assert_close(found, torch.nn.functional.silu(gate), rtol=1e-5, atol=1e-30)


@settings(max_examples=60)
@given(
    rows=st.sampled_from([0, 1, 2, 3, 4, 7, 8, 9, 11, 16, 21, 70]),
    inputs=st.sampled_from([1, 31, 32, 33, 64, 257, 1024]),
    outputs=st.sampled_from([1, 3, 4, 15, 16, 17, 37, 130]),
    with_bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_linear_equals_the_plain_formula_and_keeps_each_rows_bits(
    rows: int, inputs: int, outputs: int, with_bias: bool, seed: int
) -> None:
    ours = kernels(torch.bfloat16)
    if not ours.has_linear:
        pytest.skip("this CPU has no instructions for products of bfloat16")
    random = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(size, inputs, generator=random).bfloat16() for size in (rows, outputs))
    bias = torch.randn(outputs, generator=random).bfloat16() if with_bias else None
    found = ours.linear(x, weight, bias)
    wanted = x.double() @ weight.double().T + (bias.double() if bias is not None else 0)
    size = x.double().abs() @ weight.double().abs().T + 1
    assert found.shape == (rows, outputs)
    assert ((found.double() - wanted).abs() <= 2**-8 * wanted.abs() + 1e-5 * size).all()
    alone = [ours.linear(x[row : row + 1], weight, bias) for row in range(rows)]
    assert torch.equal(torch.cat([*alone, found[:0]]), found)


def test_linear_takes_what_linear_layers_take_and_refuses_the_rest() -> None:
    ours = kernels(torch.bfloat16)
    if not ours.has_linear:
        pytest.skip("this CPU has no instructions for products of bfloat16")
    x, weight = torch.randn(2, 5, 64).bfloat16(), torch.randn(24, 64).bfloat16()
    assert torch.equal(ours.linear(x.transpose(0, 1), weight), ours.linear(x, weight).transpose(0, 1))
    for wrong in (x[..., :63], x.float(), x.to("meta")):
        with pytest.raises(ValueError, match="x is"):
            ours.linear(wrong, weight)
    with pytest.raises(ValueError, match="weight is not contiguous"):
        ours.linear(x[..., :24], weight.T)
    with pytest.raises(ValueError, match="bias is"):
        ours.linear(x, weight, torch.zeros(23, dtype=torch.bfloat16))
    assert not kernels(torch.float32).has_linear
    with pytest.raises(ValueError, match="no kernel"):
        kernels(torch.float32).linear(x, weight)


def test_wrong_arguments_are_refused() -> None:
    ours, batch = kernels(torch.float32), Batch.draw(Case(Shape(2, 2, 16), ((2, 0, 0), (3, 0, 0)), (10,), DTYPES[0]))
    plan = batch.plan()
    prepared = ours.prepare(plan, 4, 2, 16)
    q = batch.q
    with pytest.raises(ValueError, match="prepared for"):
        kernels(torch.bfloat16).attention(prepared, 0, q, scale=1.0)
    for wrong in (q[:4], q[:, :2], q.bfloat16(), q.transpose(1, 2).contiguous().transpose(1, 2), q.to("meta")):
        with pytest.raises(ValueError, match=r"q is|last dimension of q"):
            ours.attention(prepared, 0, wrong, scale=1.0)
    with pytest.raises(ValueError, match="k is"):
        ours.store_inplace(prepared, 0, q, batch.v)
    with pytest.raises(ValueError, match="query heads"):
        ours.prepare(plan, 3, 2, 16)
    for items, message in [
        (replace(plan.items, start=np.array([0, 1])), "order of the batch"),
        (replace(plan.items, start=np.array([0])), "differ in length"),
        (replace(plan.items, count=np.array([2, 4])), "order of the batch"),
        (replace(plan.items, length=np.array([0, -1])), "order of the batch"),
    ]:
        with pytest.raises(ValueError, match=message):
            ours.prepare(replace(plan, items=items), 4, 2, 16)
    for count, message in [(4, "partly in a group"), (2, None), (1, "partly in a group")]:
        changed = replace(plan, groups=replace(plan.groups, count=np.array([count])))
        if message is None:
            ours.prepare(changed, 4, 2, 16)
        else:
            with pytest.raises(ValueError, match=message):
                ours.prepare(changed, 4, 2, 16)
    with pytest.raises(ValueError, match="tokens of no item"):
        ours.prepare(replace(plan, num_tokens=6, groups=replace(plan.groups, count=np.array([6]))), 4, 2, 16)


@pytest.fixture
def first_time(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process that has not asked for kernels yet, and that shows warnings, whatever ran in it before."""
    cpu._library.cache_clear()
    cpu._warn_dtype.cache_clear()
    monkeypatch.setattr(cpu.logger, "disabled", False)  # a library's logging configuration disables loggers that exist
    caplog.set_level("WARNING")
    yield
    cpu._library.cache_clear()


@pytest.mark.usefixtures("first_time")
@pytest.mark.parametrize("hidden", [{"CC": "/nonexistent"}, {"PATH": ""}])
def test_without_a_compiler_a_warning_says_once_what_is_lost(
    hidden: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in hidden.items():
        monkeypatch.setenv(name, value)
    assert load_kernels() is None
    assert load_kernels() is None
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    for words in ("no CPU kernels", "several times slower", "no C compiler found", "Install gcc"):
        assert words in record.getMessage()


@pytest.mark.usefixtures("first_time")
def test_a_failing_compiler_is_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo 1.0 && exit 0\necho "error: no such flag" >&2; exit 1\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("EXPERT_CACHE_DIR", str(tmp_path / "cache"))
    assert load_kernels() is None
    assert "failed: error: no such flag" in caplog.records[-1].getMessage()
    assert not list((tmp_path / "cache" / "kernels").iterdir())


@pytest.mark.usefixtures("first_time")
def test_switched_off_is_information_and_nonsense_is_an_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("EXPERT_KERNELS", "off")
    with caplog.at_level("INFO"):
        assert load_kernels() is None
    assert [record.levelname for record in caplog.records] == ["INFO"]
    monkeypatch.setenv("EXPERT_KERNELS", "maybe")
    with pytest.raises(ConfigError, match="EXPERT_KERNELS"):
        load_kernels()


@pytest.mark.usefixtures("first_time")
def test_other_number_formats_have_no_kernels(caplog: pytest.LogCaptureFixture) -> None:
    assert load_kernels(torch.float16) is None
    assert load_kernels(torch.float16) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "torch.float16" in caplog.text


def test_many_build_at_once_and_share_torchs_threads(tmp_path: Path) -> None:
    code = """
import re
from pathlib import Path
import torch
from pipeline.engine.kernels import load_kernels
x = torch.ones(2, 64, dtype=torch.bfloat16)
print(load_kernels().silu_mul(x, x).float().sum().item() > 0)
maps = Path("/proc/self/maps")
loaded = {line.split()[-1] for line in maps.read_text().splitlines()} if maps.exists() else {"/libomp.dylib"}
print(sum(re.search(r"/lib(gomp|omp|iomp5)\\b", path) is not None for path in loaded) == 1)
"""
    environment = {**os.environ, "EXPERT_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", code]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    for process in running:
        assert process.communicate(timeout=250)[0].split() == ["True", "True"]
    folder = tmp_path / "kernels"
    assert [path.suffix for path in folder.iterdir()] == [".so"]
    assert folder.stat().st_mode & 0o777 == 0o700


def sources() -> dict[str, bytes]:
    folder = Path(build.__file__).parent
    return {name: (folder / name).read_bytes() for name in build.SOURCES}


def test_a_damaged_library_is_built_again(tmp_path: Path) -> None:
    place = tmp_path / "kernels" / f"{build.digest(sources(), build.find_toolchain())}.so"
    place.parent.mkdir(mode=0o700)
    place.write_bytes(b"not a library")
    library = build.load_library(tmp_path)
    assert place.stat().st_size > 1000
    assert Kernels(library, torch.float32).dtype == torch.float32


@pytest.mark.skipif(platform.machine() != "x86_64", reason="narrower instruction sets of x86-64")
@pytest.mark.parametrize("march", ["x86-64-v2", "x86-64-v3", "x86-64-v4"])
def test_other_instruction_sets_give_the_plain_formula_too(march: str, tmp_path: Path) -> None:
    features = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    if {"x86-64-v3": "avx2", "x86-64-v4": "avx512bw"}.get(march, "") not in features:
        pytest.skip(f"this CPU is not {march}")
    toolchain = build.find_toolchain()
    build.compile_library(sources(), replace(toolchain, flags=(*toolchain.flags, f"-march={march}")), tmp_path / "a.so")
    library = ctypes.CDLL(str(tmp_path / "a.so"))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1.2e-2)):
        other, x = Kernels(library, dtype), torch.randn(9, 200).to(dtype)
        close_in_ulps(other.silu_mul(x, x), reference.silu_mul(x, x))
        close_in_ulps(other.rms_norm(x, x[0], 1e-6), reference.rms_norm(x, x[0], 1e-6))
        batch = Batch.draw(Case(Shape(2, 2, 80), ((1, 90, 0), (1, 3, 0), (70, 0, -1), (30, 80, -1)), (150,), dtype))
        prepared = other.prepare(batch.plan(), 4, 2, 80)
        other.store_inplace(prepared, LAYER, batch.k, batch.v)
        for window in (0, 50):
            found = other.attention(prepared, LAYER, batch.q, scale=0.2, window=window)
            expected = reference.attention(batch.twin_items(), batch.q.float(), scale=0.2, window=window)
            torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)


def test_a_folder_that_others_may_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels").chmod(0o777)
    with pytest.raises(build.KernelsUnavailableError, match="written by others"):
        build.load_library(tmp_path)


def test_a_cache_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "kernels").write_text("a file")
    with pytest.raises(build.KernelsUnavailableError, match="cannot be made"):
        build.load_library(tmp_path)


def test_the_digest_covers_sources_flags_and_compiler() -> None:
    toolchain = build.find_toolchain()
    names = {
        build.digest(content, chain)
        for content in (sources(), {**sources(), "vectors.h": b"other"})
        for chain in (
            toolchain,
            replace(toolchain, flags=(*toolchain.flags, "-g")),
            replace(toolchain, version="other"),
            replace(toolchain, command=("other",)),
            replace(toolchain, link=("/elsewhere/libother.so",)),
        )
    }
    assert len(names) == 10
