"""The kernels in plain torch, one sequence after another: the oracle of the compiled ones and of batched attention."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional


@dataclass(frozen=True)
class Item:
    """One sequence's tokens in a packed batch, and where its keys and values are.

    Args:
        start: Its first token in the batch.
        count: Its tokens in the batch, contiguous.
        past: Its own keys from before these tokens.
        keys: Its own keys, with room for the new ones. [num_kv_heads, capacity, head_dim]
        values: Its own values, as `keys`.
        prefix_keys: The keys it shares with others, which come before its own; None for none.
            [num_kv_heads, prefix_length, head_dim]
        prefix_values: The values it shares, as `prefix_keys`.
    """

    start: int
    count: int
    past: int
    keys: torch.Tensor
    values: torch.Tensor
    prefix_keys: torch.Tensor | None = None
    prefix_values: torch.Tensor | None = None


def store(items: Sequence[Item], k: torch.Tensor, v: torch.Tensor) -> None:
    """Put the new keys and values of every item at the end of its own.

    Args:
        items: The batch.
        k: The new keys. [num_tokens, num_kv_heads, head_dim]
        v: The new values, as `k`.
    """
    for item in items:
        tokens, place = slice(item.start, item.start + item.count), slice(item.past, item.past + item.count)
        item.keys[:, place] = k[tokens].transpose(0, 1)
        item.values[:, place] = v[tokens].transpose(0, 1)


def attention(
    items: Sequence[Item], q: torch.Tensor, *, scale: float, window: int = 0, softcap: float = 0.0
) -> torch.Tensor:
    """Causal attention of a packed batch over the items' prefixes and own keys, computed in float32.

    Args:
        items: The batch; the new keys and values are stored already.
        q: The queries. [num_tokens, num_q_heads, head_dim]
        scale: The scores are multiplied by this.
        window: A token sees this many keys, itself included; 0 for all.
        softcap: The scores are bent below this, `cap * tanh(score / cap)`; 0 for none.

    Returns:
        In the dtype of `q`; zero for tokens of no item. [num_tokens, num_q_heads, head_dim]
    """
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for item in items:
        tokens, length = slice(item.start, item.start + item.count), item.past + item.count
        keys, values = item.keys[:, :length], item.values[:, :length]
        prefix_length = 0
        if item.prefix_keys is not None and item.prefix_values is not None:
            prefix_length = item.prefix_keys.shape[1]
            keys = torch.cat([item.prefix_keys, keys], dim=1)
            values = torch.cat([item.prefix_values, values], dim=1)
        group = q.shape[1] // keys.shape[0]
        keys = keys.float().repeat_interleave(group, dim=0)  # [num_q_heads, num_keys, head_dim]
        values = values.float().repeat_interleave(group, dim=0)
        scores = scale * (q[tokens].float().transpose(0, 1) @ keys.transpose(1, 2))  # [num_q_heads, count, num_keys]
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        at = torch.arange(item.past, length, device=q.device)[:, None] + prefix_length  # [count, 1]
        key_at = torch.arange(length + prefix_length, device=q.device)  # [num_keys]
        hidden = key_at > at
        if window:
            hidden |= key_at <= at - window
        weights = scores.masked_fill(hidden, -math.inf).softmax(dim=-1)
        out[tokens] = (weights @ values).transpose(0, 1).to(q.dtype)
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, add_one: bool = False) -> torch.Tensor:
    """RMSNorm over the last dimension (Zhang and Sennrich, arXiv 1910.07467), rounded where transformers rounds.

    Args:
        x: [..., dim]
        weight: [dim]
        eps: Added to the mean square.
        add_one: Gemma's form: multiplied by `1 + weight` before it is rounded, not by `weight` after.
    """
    normal = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    if add_one:
        return (normal * (1.0 + weight.float())).to(x.dtype)
    return weight * normal.to(x.dtype)


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding in the form of two halves (Su et al., arXiv 2104.09864), as transformers applies it.

    Args:
        x: [num_tokens, num_heads, head_dim]
        cos: Of each token's angles; dimensions beyond `rotary_dim` stay. [num_tokens, rotary_dim]
        sin: As `cos`.
    """
    dim = cos.shape[-1]
    turned, rest = x[..., :dim], x[..., dim:]
    half = torch.cat([-turned[..., dim // 2 :], turned[..., : dim // 2]], dim=-1)
    return torch.cat([turned * cos[:, None] + half * sin[:, None], rest], dim=-1)


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:  # [..., dim]
    """`silu(gate) * up`, rounded after each."""
    return functional.silu(gate) * up
