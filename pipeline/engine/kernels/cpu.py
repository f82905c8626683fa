"""The compiled kernels as functions over tensors: every argument is checked here, none in C."""

import ctypes
import functools
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.engine.kernels.build import KernelsUnavailableError, load_library
from pipeline.engine.kernels.plan import AttentionPlan, checked, positions, prefix_lengths, units
from pipeline.errors import ConfigError

logger = logging.getLogger(__name__)

_I, _P, _D, _INT = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double, ctypes.c_int
_SIGNATURES = {
    "expert_scratch_bytes": (_I, [_I]),
    "expert_rows": (_I, []),
    "expert_attention": (None, [_P, _I, _P, _I, _I, _P, _D, _I, _D, _INT, _INT]),
    "expert_store": (None, [_P, _I, _I, _P, _I, _I, _P, _I, _I, _INT, _INT]),
    "expert_has_linear": (_I, []),
    "expert_linear": (None, [_P, _I, _P, _P, _P, _I, _I, _I, _I, _INT]),
    "expert_rms_norm": (None, [_P, _I, _I, _P, _P, _I, _I, _I, _I, _I, _D, _INT, _INT, _INT]),
    "expert_rotary": (None, [_P, _I, _I, _P, _P, _P, _I, _I, _I, _I, _I, _I, _INT, _INT]),
    "expert_silu_mul": (None, [_P, _I, _P, _I, _P, _I, _I, _I, _INT, _INT]),
}
_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class PreparedAttention:
    """A plan laid out for the kernels, with the memory they work in: made once a step, used by one thread at a time."""

    num_tokens: int
    num_items: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    num_threads: int
    address: int
    keep: tuple[object, ...]  # what lies behind the addresses


class Kernels:
    """The compiled kernels for one number format.

    Each runs on `torch.get_num_threads()` threads of torch's own pool. A row's result is the same bit for bit whatever
    the other rows and the number of threads.

    Args:
        library: The compiled library.
        dtype: float32 or bfloat16; sums are float32 in both.

    Raises:
        ValueError: (All methods) An argument has a shape, dtype, device or layout the kernel does not take.
    """

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        if dtype not in _DTYPES:
            raise ValueError(f"no kernels for {dtype}")
        self.dtype = dtype
        self._is_bfloat16 = int(dtype == torch.bfloat16)
        self._functions = {}
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
            self._functions[name] = function
        self._attention = self._functions["expert_attention"]
        self._store = self._functions["expert_store"]
        self._linear = self._functions["expert_linear"]
        self._rms_norm = self._functions["expert_rms_norm"]
        self._rotary = self._functions["expert_rotary"]
        self._silu_mul = self._functions["expert_silu_mul"]
        self._rows = int(self._functions["expert_rows"]())
        self.has_linear = dtype == torch.bfloat16 and bool(self._functions["expert_has_linear"]())

    def prepare(self, plan: AttentionPlan, num_q_heads: int, num_kv_heads: int, head_dim: int) -> PreparedAttention:
        """Lay out a plan for `store` and `attention` of all layers of one step.

        Args:
            plan: The batch. The memory behind its addresses must live as long as the result is used.
            num_q_heads: Query heads; query head `h` uses key head `h * num_kv_heads // num_q_heads`.
            num_kv_heads: Key and value heads.
            head_dim: Numbers in a head's query, key or value.
        """
        if min(num_q_heads, num_kv_heads, head_dim) < 1 or num_q_heads % num_kv_heads:
            raise ValueError(f"{num_q_heads} query heads over {num_kv_heads} key heads of {head_dim}")
        items, groups = checked(plan.items, plan.num_tokens), checked(plan.groups, plan.num_tokens)
        before = prefix_lengths(items, groups)
        position = positions(plan.num_tokens, items, before)
        heads = num_q_heads // num_kv_heads
        own_units = units(items.count, items.length + items.count, heads, num_kv_heads, self._rows)
        prefix_units = units(groups.count, groups.length, heads, num_kv_heads, self._rows)
        num_threads = torch.get_num_threads()
        scratch_bytes = int(self._functions["expert_scratch_bytes"](head_dim))
        scratch = torch.empty(num_threads * scratch_bytes + 64, dtype=torch.uint8)
        partial_rows = plan.num_tokens * num_q_heads if len(groups.start) else 0
        partial = torch.empty(partial_rows * (-(-head_dim // 32) * 32 + 2), dtype=torch.float32)
        sums = partial.data_ptr() + 4 * (partial.numel() - partial_rows)
        arrays = [position]
        arrays += [items.start, items.count, items.length, items.keys, items.values, items.head_stride]
        arrays += [items.layer_stride, before]
        arrays += [groups.start, groups.count, groups.length, groups.keys, groups.values, groups.head_stride]
        arrays += [groups.layer_stride, own_units, prefix_units]
        head = [num_q_heads, num_kv_heads, head_dim, len(own_units), len(prefix_units), scratch_bytes]
        head += [array.ctypes.data for array in arrays]
        head += [partial.data_ptr(), sums - 4 * partial_rows, sums, -(-scratch.data_ptr() // 64) * 64]
        table = np.array(head, np.int64)
        return PreparedAttention(
            num_tokens=plan.num_tokens,
            num_items=len(items.start),
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=self.dtype,
            num_threads=num_threads,
            address=table.ctypes.data,
            keep=(table, arrays, partial, scratch),
        )

    def store_inplace(self, prepared: PreparedAttention, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Put the new keys and values of every item at the end of its own.

        Args:
            prepared: The step's plan.
            layer: Which layer's keys and values.
            k: The new keys; rows may lie apart. [num_tokens, num_kv_heads, head_dim]
            v: The new values, as `k`.
        """
        shape = (prepared.num_tokens, prepared.num_kv_heads, prepared.head_dim)
        if prepared.dtype != self.dtype:
            raise ValueError(f"prepared for {prepared.dtype}, not {self.dtype}")
        self._check("k", k, shape)
        self._check("v", v, shape)
        (k_token, k_head, _), (v_token, v_head, _) = k.stride(), v.stride()
        self._store(
            *(prepared.address, prepared.num_items, layer),
            *(k.data_ptr(), k_token, k_head, v.data_ptr(), v_token, v_head),
            *(self._is_bfloat16, prepared.num_threads),
        )

    def attention(
        self,
        prepared: PreparedAttention,
        layer: int,
        q: torch.Tensor,
        *,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Causal attention of a packed batch over the items' prefixes and own keys; store the new ones first.

        Args:
            prepared: The step's plan.
            layer: Which layer's keys and values.
            q: The queries; rows may lie apart. [num_tokens, num_q_heads, head_dim]
            scale: The scores are multiplied by this.
            window: A token sees this many keys, itself included; 0 for all.
            softcap: The scores are bent below this, `cap * tanh(score / cap)`; 0 for none.
            out: Where the result goes; new memory if None. Contiguous.

        Returns:
            Undefined for tokens of no item. [num_tokens, num_q_heads, head_dim]
        """
        shape = (prepared.num_tokens, prepared.num_q_heads, prepared.head_dim)
        if prepared.dtype != self.dtype:
            raise ValueError(f"prepared for {prepared.dtype}, not {self.dtype}")
        self._check("q", q, shape)
        if out is None:
            out = torch.empty(shape, dtype=self.dtype)
        else:
            self._check("out", out, shape)
            if not out.is_contiguous():
                raise ValueError("out is not contiguous")
        token_stride, head_stride, _ = q.stride()
        self._attention(
            *(prepared.address, layer, q.data_ptr(), token_stride, head_stride, out.data_ptr()),
            *(scale, window, softcap, self._is_bfloat16, prepared.num_threads),
        )
        return out

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Rows times a transposed weight; only where `has_linear` says so: bfloat16, with instructions for it.

        Args:
            x: [..., inputs]
            weight: In the layout of `torch.nn.Linear`, contiguous. [outputs, inputs]
            bias: Added before the sum is rounded. [outputs]

        Returns:
            [..., outputs]
        """
        outputs, inputs = weight.shape
        x = x.contiguous()
        if not self.has_linear:
            raise ValueError("this machine has no kernel for linear layers")
        self._check("x", x, (*x.shape[:-1], inputs))
        self._check("weight", weight, (outputs, inputs))
        if not weight.is_contiguous():
            raise ValueError("weight is not contiguous")
        if bias is not None:
            self._check("bias", bias, (outputs,))
        out = torch.empty((*x.shape[:-1], outputs), dtype=self.dtype)
        self._linear(
            *(x.data_ptr(), inputs, weight.data_ptr(), None if bias is None else bias.data_ptr()),
            *(out.data_ptr(), outputs, x.numel() // max(inputs, 1), inputs, outputs, torch.get_num_threads()),
        )
        return out

    def rms_norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        *,
        add_one: bool = False,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """RMSNorm over the last dimension, rounded where transformers rounds.

        Args:
            x: Up to three dimensions beside those of size one; rows may lie apart. [..., dim]
            weight: [dim]
            eps: Added to the mean square.
            add_one: Gemma's form: multiplied by `1 + weight` before it is rounded, not by `weight` after.
            out: Where the result goes, `x` itself if wanted; new memory if None. The shape of `x`.
        """
        dim = x.shape[-1]
        self._check("weight", weight, (dim,))
        if out is None and x.is_contiguous():  # as it mostly is
            self._check("x", x, x.shape)
            out = torch.empty(x.shape, dtype=self.dtype)
            outer, inner, x_outer, x_inner, out_outer, out_inner = x.numel() // max(dim, 1), 1, dim, dim, dim, dim
        else:
            out = torch.empty(x.shape, dtype=self.dtype) if out is None else out
            if out.shape != x.shape:
                raise ValueError(f"out is {tuple(out.shape)}, x {tuple(x.shape)}")
            outer, inner, x_outer, x_inner = self._rows_of("x", x)
            _, _, out_outer, out_inner = self._rows_of("out", out)
        self._rms_norm(
            *(x.data_ptr(), x_outer, x_inner, weight.data_ptr(), out.data_ptr(), out_outer, out_inner),
            *(outer, inner, dim, eps, add_one, self._is_bfloat16, torch.get_num_threads()),
        )
        return out

    def rotary(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Rotary position embedding in the form of two halves, rounded where transformers rounds.

        Args:
            x: Queries or keys; rows may lie apart. [num_tokens, num_heads, head_dim]
            cos: Of each token's angles; dimensions beyond `rotary_dim`, which is even, stay. [num_tokens, rotary_dim]
            sin: As `cos`.
            out: Where the result goes, `x` itself if wanted; new memory if None. The shape of `x`.
        """
        if x.dim() != 3 or cos.dim() != 2 or cos.shape[1] % 2 or cos.shape[1] > x.shape[2]:
            raise ValueError(f"x is {tuple(x.shape)}, cos {tuple(cos.shape)}")
        tokens, heads, dim = x.shape
        out = torch.empty(x.shape, dtype=self.dtype) if out is None else out
        self._check("x", x, (tokens, heads, dim))
        self._check("out", out, (tokens, heads, dim))
        for name, table in (("cos", cos), ("sin", sin)):
            self._check(name, table, (tokens, cos.shape[1]))
            if not table.is_contiguous():
                raise ValueError(f"{name} is not contiguous")
        self._rotary(
            *(x.data_ptr(), x.stride(0), x.stride(1), cos.data_ptr(), sin.data_ptr()),
            *(out.data_ptr(), out.stride(0), out.stride(1), tokens, heads, dim, cos.shape[1]),
            *(self._is_bfloat16, torch.get_num_threads()),
        )
        return out

    def silu_mul(self, gate: torch.Tensor, up: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """`silu(gate) * up`, rounded after each.

        Args:
            gate: Rows may lie apart, evenly. [..., dim]
            up: The shape of `gate`.
            out: Where the result goes, `gate` or `up` if wanted; new memory if None. The shape of `gate`.
        """
        out = torch.empty(gate.shape, dtype=self.dtype) if out is None else out
        if gate.shape != up.shape or out.shape != gate.shape:
            raise ValueError(f"gate is {tuple(gate.shape)}, up {tuple(up.shape)}, out {tuple(out.shape)}")
        rows, strides = 1, []
        for name, tensor in (("gate", gate), ("up", up), ("out", out)):
            outer, inner, outer_stride, stride = self._rows_of(name, tensor)
            if inner > 1 and outer > 1 and outer_stride != inner * stride:
                raise ValueError(f"the rows of {name} do not lie evenly")
            rows = outer * inner
            strides.append(stride if inner > 1 else outer_stride)
        self._silu_mul(
            *(gate.data_ptr(), strides[0], up.data_ptr(), strides[1], out.data_ptr(), strides[2]),
            *(rows, gate.shape[-1], self._is_bfloat16, torch.get_num_threads()),
        )
        return out

    def _check(self, name: str, tensor: torch.Tensor, shape: Sequence[int]) -> None:
        if tensor.shape != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, not {shape}")
        if tensor.dtype != self.dtype or not tensor.is_cpu:
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}, not {self.dtype} on the CPU")
        if tensor.stride(-1) != 1 and shape[-1] != 1:
            raise ValueError(f"the last dimension of {name} is not contiguous")

    def _rows_of(self, name: str, tensor: torch.Tensor) -> tuple[int, int, int, int]:
        """Rows as [outer, inner], with their strides; the same rows for tensors of one shape."""
        self._check(name, tensor, tuple(tensor.shape))
        dim = tensor.shape[-1]
        rows = [(size, step) for size, step in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True) if size != 1]
        inner = rows[-1][0] if len(rows) > 1 else 1
        if tensor.is_contiguous():
            return tensor.numel() // max(dim * inner, 1), inner, inner * dim, dim
        if len(rows) > 2:
            raise ValueError(f"{name} has more than two dimensions of rows, and they lie apart: {tuple(tensor.shape)}")
        rows = (rows + [(1, 0)] * 2)[:2]
        return rows[0][0], rows[1][0], rows[0][1], rows[1][1]


def load_kernels(dtype: torch.dtype = torch.bfloat16) -> Kernels | None:
    """The compiled kernels, or None where there are none: then `reference` gives the same answers, slower.

    The first call on a machine compiles for about 3 s. A process says once why it has no kernels: as a warning, or as
    information where `EXPERT_KERNELS=off` asks for none.

    Args:
        dtype: The number format of keys, values and hidden states.

    Raises:
        ConfigError: `EXPERT_KERNELS` is neither `on` nor `off`.
    """
    library = _library(os.environ.get("EXPERT_KERNELS", "on"))
    if library is None:
        return None
    if dtype not in _DTYPES:
        _warn_dtype(dtype)
        return None
    return Kernels(library, dtype)


@functools.cache
def _library(wanted: str) -> ctypes.CDLL | None:
    if wanted not in {"on", "off"}:
        raise ConfigError(f"EXPERT_KERNELS is {wanted!r}", hint="Set it to on or off, or not at all.")
    if wanted == "off":
        logger.info(
            "CPU kernels are off (EXPERT_KERNELS=off): attention and norms run in plain torch, several times slower"
        )
        return None
    try:
        return load_library()
    except KernelsUnavailableError as problem:
        logger.warning(
            "no CPU kernels: attention and norms run in plain torch, several times slower\n  %s\n  Fix: %s",
            problem,
            problem.hint,
        )
        return None


@functools.cache
def _warn_dtype(dtype: torch.dtype) -> None:
    logger.warning(
        "no CPU kernels for %s: attention and norms run in plain torch, several times slower\n"
        "  Fix: load the model in bfloat16 or float32.",
        dtype,
    )
