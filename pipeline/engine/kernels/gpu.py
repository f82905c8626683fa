"""Triton kernels of the packed engine on a GPU, as functions over tensors.

They compute what `pipeline.engine.batched_attention` computes in torch operations, in a few launches instead of
dozens: a decode step of a small model waits for launches longer than it computes. All of them may be recorded in a CUDA
graph: their grids depend on shapes alone, and what a step needs besides is read from tensors.

Sources: Hydragen (arXiv 2402.05099) and FlashDecoding (https://pytorch.org/blog/flash-decoding/) for partial answers
that are put together by log-sum-exp; the online softmax is FlashAttention's (arXiv 2205.14135).
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# Triton reads the annotations of a kernel's arguments: those that it knows are at most `tl.constexpr`.

from subprocess import SubprocessError

import torch
import triton
import triton.language as tl
from triton.runtime.errors import TritonError

from pipeline.engine.kernels.build import KernelsUnavailableError
from pipeline.engine.paged_plan import PAGE, Units

HOW_TO_COMPILE = "Install a C compiler and Python's headers: apt-get install gcc python3-dev."
MOST_ROWS = 64  # of a program: queries of a unit that are multiplied together
_BLOCK_BYTES = 16 << 10  # of the keys that are multiplied together
_NORM_NUMBERS = 2048  # of a program: several rows where rows are short
_SILU_NUMBERS = 1024  # of a program
_OPTIONS = {"enable_fp_fusion": False}  # said, because its default differs between releases of Triton

# Triton compiles a kernel anew for arguments that are 1 or divisible by 16; what changes from step to step may not.
_STEP_ARGUMENTS = ["width", "span_pages", "most_parts", "num_rows", "num_numbers"]


@triton.jit(do_not_specialize=_STEP_ARGUMENTS)
def _attend_units(
    queries,
    keys,
    values,
    lanes,
    positions,
    pages,
    first,
    count,
    sums,
    mass,
    peak,
    width,
    span_pages,
    token_stride,
    head_stride,
    num_kv_heads,
    scale,
    softcap,
    window,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    IS_CAPPED: tl.constexpr,
    IS_WINDOWED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The partial answers of some rows of one unit and one key head: sums of values, and their mass at a peak."""
    unit = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    row = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    is_row = row < GROUP * width
    is_dim = dim < HEAD_DIM
    token = tl.load(lanes + unit * width + row % width, mask=is_row, other=0)
    token_at = tl.load(positions + token, mask=is_row, other=0)
    q_head = head * GROUP + row // width
    query = tl.load(
        queries + token[:, None] * token_stride + q_head[:, None] * head_stride + dim[None, :],
        mask=is_row[:, None] & is_dim[None, :],
        other=0.0,
    )
    first_at = tl.load(first + unit)
    num_keys = tl.load(count + unit)
    most = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    found = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, num_keys, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        is_key = key < num_keys
        page = tl.load(pages + unit * span_pages + key // PAGE_SIZE, mask=is_key, other=0)
        at = ((page * num_kv_heads + head) * PAGE_SIZE + key % PAGE_SIZE)[:, None] * HEAD_DIM + dim[None, :]
        is_number = is_key[:, None] & is_dim[None, :]
        key_rows = tl.load(keys + at, mask=is_number, other=0.0)
        value_rows = tl.load(values + at, mask=is_number, other=0.0)
        scores = tl.dot(query, tl.trans(key_rows), input_precision="ieee") * scale
        if IS_CAPPED:
            scores = softcap * (1 - 2 / (tl.exp(2 * scores / softcap) + 1))  # softcap * tanh(scores / softcap)
        key_at = first_at + key
        is_seen = is_key[None, :] & (key_at[None, :] <= token_at[:, None])
        if IS_WINDOWED:
            is_seen = is_seen & (key_at[None, :] > token_at[:, None] - window)
        scores = tl.where(is_seen, scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        kept = tl.exp(most - higher)
        total = total * kept + tl.sum(weights, 1)
        found = found * kept[:, None] + tl.dot(weights.to(value_rows.dtype), value_rows, input_precision="ieee")
        most = higher
    out = (unit * num_kv_heads + head) * GROUP * width + row
    tl.store(sums + out[:, None] * HEAD_DIM + dim[None, :], found, mask=is_row[:, None] & is_dim[None, :])
    tl.store(mass + out, total, mask=is_row)
    tl.store(peak + out, most, mask=is_row)


@triton.jit(do_not_specialize=_STEP_ARGUMENTS)
def _put_together(
    sums,
    mass,
    peak,
    parts,
    num_parts,
    out,
    width,
    most_parts,
    num_kv_heads,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The answer of one token and one query head from those of its units."""
    token = tl.program_id(0).to(tl.int64)
    q_head = tl.program_id(1)
    dim = tl.arange(0, BLOCK_D)
    is_dim = dim < HEAD_DIM
    most = tl.full([], -1e30, tl.float32)
    total = tl.zeros([], tl.float32)
    found = tl.zeros([BLOCK_D], tl.float32)
    for number in range(tl.load(num_parts + token)):
        part = tl.load(parts + token * most_parts + number)
        at = ((part // width * num_kv_heads + q_head // GROUP) * GROUP + q_head % GROUP) * width + part % width
        own = tl.load(peak + at)
        higher = tl.maximum(most, own)
        kept, share = tl.exp(most - higher), tl.exp(own - higher)
        total = total * kept + tl.load(mass + at) * share
        found = found * kept + tl.load(sums + at * HEAD_DIM + dim, mask=is_dim, other=0.0) * share
        most = higher
    answer = found / tl.maximum(total, 1e-30)
    at = (token * num_kv_heads * GROUP + q_head) * HEAD_DIM + dim
    tl.store(out + at, answer.to(out.dtype.element_ty), mask=is_dim)


@triton.jit
def _store(
    new_keys,
    new_values,
    keys,
    values,
    places,
    key_token,
    key_head,
    value_token,
    value_head,
    num_kv_heads,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Put the new key and value of one token and one head where they belong."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dim = tl.arange(0, BLOCK_D)
    is_dim = dim < HEAD_DIM
    place = tl.load(places + token)
    at = ((place // PAGE_SIZE * num_kv_heads + head) * PAGE_SIZE + place % PAGE_SIZE) * HEAD_DIM + dim
    tl.store(keys + at, tl.load(new_keys + token * key_token + head * key_head + dim, mask=is_dim), mask=is_dim)
    tl.store(values + at, tl.load(new_values + token * value_token + head * value_head + dim, mask=is_dim), mask=is_dim)


@triton.jit(do_not_specialize=_STEP_ARGUMENTS)
def _rms_norm(
    hidden,
    weight,
    out,
    num_rows,
    eps,
    SIZE: tl.constexpr,
    ADD_ONE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    dim = tl.arange(0, BLOCK)
    is_number = (row < num_rows)[:, None] & (dim < SIZE)[None, :]
    at = row[:, None] * SIZE + dim[None, :]
    given = tl.load(hidden + at, mask=is_number, other=0.0).to(tl.float32)
    factor = tl.load(weight + dim, mask=dim < SIZE, other=0.0)
    normed = given * tl.rsqrt(tl.sum(given * given, 1) / SIZE + eps)[:, None]
    kind = out.dtype.element_ty
    if ADD_ONE:
        answer = (normed * (1.0 + factor.to(tl.float32))[None, :]).to(kind)
    else:  # rounded before the weight is applied, as the stock modules do
        answer = (normed.to(kind) * factor[None, :]).to(kind)
    tl.store(out + at, answer, mask=is_number)


@triton.jit(do_not_specialize=_STEP_ARGUMENTS)
def _silu_mul(gate, up, out, num_numbers, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_number = at < num_numbers
    given = tl.load(gate + at, mask=is_number, other=0.0).to(tl.float32)
    kind = out.dtype.element_ty
    activated = (given / (1 + tl.exp(-given))).to(kind)
    tl.store(out + at, activated * tl.load(up + at, mask=is_number, other=0.0), mask=is_number)


class GpuKernels:
    """The kernels for one number format.

    Args:
        dtype: float32, bfloat16 or float16; sums are float32 in all.
    """

    # A recorded step has room for so many units, and so many of a token: empty ones cost next to nothing, and few
    # shapes are to be recorded.
    least_sizes = (256, 16)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def try_out(self, device: torch.device) -> None:
        """Compute something small.

        Raises:
            KernelsUnavailableError: Triton cannot compile or launch here: it finds no C compiler, or no driver.
        """
        ones = torch.ones(1, 16, dtype=self.dtype, device=device)
        try:
            self.silu_mul(ones, ones).sum().item()
        except (RuntimeError, OSError, SubprocessError, TritonError) as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise KernelsUnavailableError(f"Triton does not work: {reason}", hint=HOW_TO_COMPILE) from error

    def store(self, keys: torch.Tensor, values: torch.Tensor, pool: torch.Tensor, places: torch.Tensor) -> None:
        """Put new keys and values into pages.

        Args:
            keys: The new ones; tokens and heads may lie apart. [num_tokens, num_kv_heads, head_dim]
            values: As `keys`.
            pool: A layer's pages. [2, num_pages, num_kv_heads, PAGE, head_dim]
            places: Where each token's go; see `paged_plan.places`. [num_tokens]
        """
        num_tokens, num_kv_heads, head_dim = keys.shape
        if keys.stride(2) != 1 or values.stride(2) != 1:
            keys, values = keys.contiguous(), values.contiguous()
        _store[num_tokens, num_kv_heads](
            keys,
            values,
            pool[0],
            pool[1],
            places,
            keys.stride(0),
            keys.stride(1),
            values.stride(0),
            values.stride(1),
            num_kv_heads,
            HEAD_DIM=head_dim,
            PAGE_SIZE=PAGE,
            BLOCK_D=triton.next_power_of_2(head_dim),
            **_OPTIONS,
        )

    def attention(
        self,
        queries: torch.Tensor,
        pool: torch.Tensor,
        units: Units[torch.Tensor],
        *,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
    ) -> torch.Tensor:
        """Attention of some tokens over the pages of their units.

        Args:
            queries: Theirs; tokens and heads may lie apart. [num_tokens, num_q_heads, head_dim]
            pool: A layer's pages. [2, num_pages, num_kv_heads, PAGE, head_dim]
            units: Which keys each token sees.
            scale: Of the scores.
            window: A token sees so many tokens, its own included; 0 for all before it.
            softcap: Scores stay within it; 0 for no limit.

        Returns:
            As `queries`, contiguous.
        """
        num_tokens, num_q_heads, head_dim = queries.shape
        num_kv_heads = pool.shape[2]
        group = num_q_heads // num_kv_heads
        num_units, width = units.lanes.shape
        if queries.stride(2) != 1:
            queries = queries.contiguous()
        rows = group * width
        block_d = max(triton.next_power_of_2(head_dim), 16)
        block_m = 16 if rows <= 16 else MOST_ROWS
        partial = torch.empty((num_units, num_q_heads, width, head_dim), dtype=torch.float32, device=queries.device)
        mass, peak = torch.empty((2, *partial.shape[:3]), dtype=torch.float32, device=queries.device)
        _attend_units[num_units, num_kv_heads, triton.cdiv(rows, block_m)](
            queries,
            pool[0],
            pool[1],
            units.lanes,
            units.positions,
            units.pages,
            units.first,
            units.count,
            partial,
            mass,
            peak,
            width,
            units.pages.shape[1],
            queries.stride(0),
            queries.stride(1),
            num_kv_heads,
            scale,
            softcap,
            window,
            GROUP=group,
            HEAD_DIM=head_dim,
            PAGE_SIZE=PAGE,
            IS_CAPPED=bool(softcap),
            IS_WINDOWED=bool(window),
            BLOCK_M=block_m,
            BLOCK_N=max(16, min(64, _BLOCK_BYTES // (block_d * queries.element_size()))),
            BLOCK_D=block_d,
            num_warps=4,
            num_stages=2,
            **_OPTIONS,
        )
        out = torch.empty((num_tokens, num_q_heads, head_dim), dtype=queries.dtype, device=queries.device)
        _put_together[num_tokens, num_q_heads](
            partial,
            mass,
            peak,
            units.parts,
            units.num_parts,
            out,
            width,
            units.parts.shape[1],
            num_kv_heads,
            GROUP=group,
            HEAD_DIM=head_dim,
            BLOCK_D=triton.next_power_of_2(head_dim),
            num_warps=2,
            **_OPTIONS,
        )
        return out

    def rms_norm(
        self, hidden: torch.Tensor, weight: torch.Tensor, eps: float, *, add_one: bool = False
    ) -> torch.Tensor:
        """`hidden` divided by its root mean square, times `weight`.

        Args:
            hidden: [..., size]
            weight: [size]
            eps: Added to the mean square.
            add_one: Multiply with one more than `weight`.

        Returns:
            As `hidden`.
        """
        size = weight.shape[0]
        given = hidden.contiguous()
        out = torch.empty_like(given)
        num_rows = given.numel() // size
        block = triton.next_power_of_2(size)
        block_rows = max(1, _NORM_NUMBERS // block)
        _rms_norm[(triton.cdiv(num_rows, block_rows),)](
            given,
            weight,
            out,
            num_rows,
            eps,
            SIZE=size,
            ADD_ONE=add_one,
            BLOCK_ROWS=block_rows,
            BLOCK=block,
            num_warps=4 if block <= _NORM_NUMBERS else 8,
            **_OPTIONS,
        )
        return out

    def silu_mul(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """`silu(gate) * up`, number by number; both have one shape."""
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        _silu_mul[(triton.cdiv(gate.numel(), _SILU_NUMBERS),)](
            gate, up, out, gate.numel(), BLOCK=_SILU_NUMBERS, **_OPTIONS
        )
        return out
