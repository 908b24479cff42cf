"""Exact multi-head attention and the Transformer: every token reads every other one, softly.

    out_i = sum_j softmax_j(q_i . k_j / sqrt(E)) v_j  Vaswani et al. 2017, arXiv:1706.03762v7, eq. 1
    q_i . k_j turned by angles i w and j w (RoPE)     Su et al. 2021, arXiv:2104.09864v5, eq. 34

    paper symbol      code name         shape
    Q, K, V           q, k, v           (B, H, L, E), (B, G, L, E), (B, G, L, E); G divides H
    d_model, h, d_k   d_model, n_heads, d_head
    mask              keep              (B, L) bool, True = a real token
    pos               positions         (L,) int64

Departures from the paper, marked on their lines: pre-norm, GELU, no dropout on the attention
weights (a fused kernel never holds them).
Not included: cross-attention layers, sliding windows, dropout on weights, sinks, paged caches.

    python attention.py            check table, demo, timing: 15 s on one core
    python attention.py --check    check table alone: 30 rows in 3 s, float64 errors below 1e-14
    demo: repeats 32 symbols seen once: 100.0% right after 200 steps
    forward and backward, L = 2048: the fused kernel 2.5 to 2.8 x as fast as the product
"""

import argparse
import math
import sys
import time
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------- reference: numpy, float64


def attention_ref(q, k, v, causal=False, keep=None, bias=None, rows=None):
    """Softmax attention of one head (arXiv:1706.03762v7, eq. 1). Returns (out, lse), lse natural.

    q: (Lq, E), k: (Lk, E), v: (Lk, Ev), keep: (Lk,) bool, bias: (Lq, Lk), added to the scores.
    causal: query i sees keys 0 .. i.  rows: compute these queries only, O(rows Lk) instead of
    O(Lq Lk).  A query that sees nothing gets out 0 and lse -inf.
    """
    rows = range(len(q)) if rows is None else rows
    out, lse = np.zeros((len(rows), v.shape[1])), np.full(len(rows), -np.inf)
    for n, i in enumerate(rows):
        visible = np.ones(len(k), bool) if keep is None else keep.copy()
        if causal:
            visible[i + 1 :] = False
        if not visible.any():
            continue
        scores = k[visible] @ q[i] / math.sqrt(q.shape[1])  # (keys, E) x (E,) -> (keys,)
        if bias is not None:
            scores = scores + bias[i, visible]
        largest = scores.max()
        weights = np.exp(scores - largest)  # the largest weight is 1: no overflow
        out[n] = weights @ v[visible] / weights.sum()
        lse[n] = largest + math.log(weights.sum())
    return out, lse


def sinusoidal_positions_ref(positions, d_model):
    """sin, cos of pos / 10000^(2i/D) in even, odd columns (arXiv:1706.03762v7, 3.5). (L, D)."""
    table = np.zeros((len(positions), d_model))
    for row, pos in enumerate(positions):
        for column in range(d_model):
            angle = pos / 10000 ** ((column - column % 2) / d_model)
            table[row, column] = math.cos(angle) if column % 2 else math.sin(angle)
    return table


def rope_ref(x, positions):
    """Turn the pairs (x_2i, x_2i+1) by pos / 10000^(2i/E) (arXiv:2104.09864v5, eq. 34). (L, E)."""
    out = np.zeros_like(x)
    for row, pos in enumerate(positions):
        for i in range(0, x.shape[1], 2):
            angle = pos / 10000 ** (i / x.shape[1])
            cos, sin = math.cos(angle), math.sin(angle)
            out[row, i : i + 2] = np.array([[cos, -sin], [sin, cos]]) @ x[row, i : i + 2]
    return out


# ---------------------------------------------------------------- fast: torch


def attention_slow(q, k, v, causal=False, keep=None, bias=None):
    """The product written out: scores and weights exist, memory O(L^2). Shapes as `attention`."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))  # (B, G, L, E) -> (B, H, L, E)
    scores = q @ k.mT / math.sqrt(q.shape[-1])  # (B, H, Lq, E) x (B, H, E, Lk) -> (B, H, Lq, Lk)
    if bias is not None:
        scores = scores + bias
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    if keep is not None:
        scores = scores.masked_fill(~keep[:, None, None, :], -torch.inf)
    return scores.softmax(-1) @ v  # (B, H, Lq, Lk) x (B, H, Lk, E) -> (B, H, Lq, E)


def tiles(q, k, causal, bias, tile):
    """Yields (queries, keys, scores): slices, and (B, H, ., .) of equal heads, tile by tile.

    A tile that lies all in the future is left out.
    """
    for i in range(0, q.shape[2], tile[0]):
        for j in range(0, min(k.shape[2], i + tile[0]) if causal else k.shape[2], tile[1]):
            rows, cols = slice(i, i + tile[0]), slice(j, j + tile[1])
            scores = q[:, :, rows] @ k[:, :, cols].mT / math.sqrt(q.shape[-1])
            if bias is not None:  # (1 or B, 1 or H, 1 or Lq, Lk)
                scores = scores + bias.expand(-1, -1, q.shape[2], -1)[:, :, rows, cols]
            if causal and cols.stop > rows.start:  # else the tile lies all in the past
                future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
                scores = scores.masked_fill(future.triu(1 + rows.start - cols.start), -torch.inf)
            yield rows, cols, scores


def attention_online(q, k, v, causal=False, bias=None, tile=(256, 1024)):
    """Softmax over tiles of keys with a running maximum m and sum l, memory O(L E + tile).

    Milakov and Gimelshein 2018, arXiv:1805.02867v2, algorithm 3; Dao et al. 2022,
    arXiv:2205.14135v2, algorithm 1.  Shapes as `attention_block`.  Without autograd.
    """
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))  # (B, H, Lk, E)
    out = q.new_zeros(*q.shape[:3], v.shape[-1])
    m, l = q.new_full(q.shape[:3], -torch.inf), q.new_zeros(q.shape[:3])
    for rows, cols, scores in tiles(q, k, causal, bias, tile):
        m_new = torch.maximum(m[:, :, rows], scores.amax(-1))
        finite = m_new.masked_fill(m_new == -torch.inf, 0)  # -inf - -inf would be nan
        decay = (m[:, :, rows] - finite).exp()  # what was summed under the old maximum shrinks
        weights = (scores - finite[..., None]).exp()
        l[:, :, rows] = l[:, :, rows] * decay + weights.sum(-1)
        out[:, :, rows] = out[:, :, rows] * decay[..., None] + weights @ v[:, :, cols]
        m[:, :, rows] = m_new
    return out / l.masked_fill(l == 0, 1)[..., None], m + l.log()


def attention_online_grad(grad, q, k, v, out, lse, causal=False, bias=None, tile=(256, 1024)):
    """Gradients (dq, dk, dv) of `attention_online`: each tile of weights is computed again.

    Dao 2023, arXiv:2307.08691v1, algorithm 2.  out and lse may be those over more keys than k.
    """
    group, scale = q.shape[1] // k.shape[1], 1 / math.sqrt(q.shape[-1])
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))  # (B, G, Lk, E) -> (B, H, Lk, E)
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # a query that saw nothing has weights 0
    delta = (grad * out).sum(-1, keepdim=True)  # (B, H, Lq, 1): sum_j P_ij dP_ij
    for rows, cols, scores in tiles(q, k, causal, bias, tile):
        weights = (scores - lse[:, :, rows, None]).exp()
        dweights = grad[:, :, rows] @ v[:, :, cols].mT
        dscores = weights * (dweights - delta[:, :, rows]) * scale
        dv[:, :, cols] += weights.mT @ grad[:, :, rows]
        dk[:, :, cols] += dscores.mT @ q[:, :, rows]
        dq[:, :, rows] += dscores @ k[:, :, cols]
    return dq, *(x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))  # (B, H, ..) -> (B, G, ..)


def fused(q, k, v, causal, bias):
    """True when a kernel of this device that returns the log-sum-exp takes these arguments."""
    if q.shape[-1] != v.shape[-1] or not (q.numel() and k.numel()):  # they divide by the lengths
        return False
    if q.device.type == "cpu":
        has = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
        return has and not (causal and bias is not None)
    small = q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    square = not causal or q.shape[2] == k.shape[2]  # else flash counts back from the last key
    known = bias is None and small and square
    return q.device.type == "cuda" and q.dtype != torch.float64 and known


def fused_block(q, k, v, causal, bias):
    """(out, lse) by the kernel of this device, where `fused` says that there is one."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))  # else wrong numbers
    if q.device.type == "cpu":
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = kernel(q, k, v, 0.0, causal, attn_mask=bias)
        if bias is not None:  # the kernel says lse 0 where a query sees nothing
            lse = lse.masked_fill((bias == -torch.inf).all(-1), -torch.inf)
        return out, lse
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    if q.dtype == torch.float32:
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        out, lse = kernel(q, k, v, None, True, 0.0, causal)[:2]  # its lse is padded to 32 rows
    else:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention
        out, lse = kernel(q, k, v, 0.0, causal, False)[:2]
    return out.float(), lse[:, :, : q.shape[2]].contiguous()


def fused_block_grad(grad, q, k, v, out, lse, causal, bias):
    """(dq, dk, dv) by the kernel of this device, where `fused` says that there is one."""
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # a query that saw nothing has weights 0
    grad, q, k, v, out = (x if x.stride(-1) == 1 else x.contiguous() for x in (grad, q, k, v, out))
    if q.device.type == "cpu":
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return kernel(grad, q, k, v, out, lse, 0.0, causal, attn_mask=bias)
    group, seed = q.shape[1] // k.shape[1], torch.zeros(2, dtype=torch.int64, device=q.device)
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    if q.dtype == torch.float32:
        lse = F.pad(lse, (0, -lse.shape[2] % 32))
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention_backward
        wanted = [True, True, True, False]
        dq, dk, dv, _ = kernel(grad, q, k, v, None, out, lse, seed[0], seed[1], 0.0, wanted, causal)
    else:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_backward
        lengths, rng = (q.shape[2], k.shape[2]), (seed.view(torch.uint64), seed[0])
        dq, dk, dv = kernel(grad, q, k, v, out, lse, None, None, *lengths, 0.0, causal, *rng)
    return dq, *(x.float().unflatten(1, (-1, group)).sum(2) for x in (dk, dv))


@torch.no_grad()
def attention_block(q, k, v, causal=False, bias=None):
    """(out, lse) of queries against one block of keys, to be merged with other blocks. No autograd.

    q: (B, H, Lq, E), k, v: (B, G, Lk, E), any lengths, 0 too; bias: (1 or B, 1 or H, 1 or Lq, Lk),
    -inf hides a key; causal: query i sees keys 0 .. i.  Returns out (B, H, Lq, E) and lse
    (B, H, Lq), the natural log of the summed weights, in float32 (float64 for float64).
    """
    has_kernel = fused(q, k, v, causal, bias)
    if q.device.type == "cpu" or not has_kernel:  # as fast there, and one rounding less
        q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
    return (fused_block if has_kernel else attention_online)(q, k, v, causal, bias)


@torch.no_grad()
def attention_block_grad(grad, q, k, v, out, lse, causal=False, bias=None):
    """(dq, dk, dv) of `attention_block`. out and lse: of the whole attention, not of this block.

    With P = exp(scores - lse), the weights of the whole softmax, the blocks' gradients add up.
    """
    has_kernel = fused(q, k, v, causal, bias)
    if q.device.type == "cpu" or not has_kernel:
        q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
    grad, out = grad.to(q.dtype), out.to(q.dtype)
    gradients = fused_block_grad if has_kernel else attention_online_grad
    return gradients(grad, q, k, v, out, lse, causal, bias)


def merge(out, lse, out_block, lse_block):
    """Softmax attention over two sets of keys from the attention over each: exact, associative.

    out, out_block: (B, H, Lq, E), lse, lse_block: (B, H, Lq).  lse -inf: nothing was seen there.
    """
    # not e^(lse - total): total has seven digits, and both shares would carry its rounding
    ahead = (lse_block - lse).masked_fill(lse_block == -torch.inf, -torch.inf)  # not -inf - -inf
    old, new = (-ahead).sigmoid()[..., None], ahead.sigmoid()[..., None]
    return out * old + out_block * new, torch.logaddexp(lse, lse_block)


def attention(q, k, v, causal=False, keep=None, bias=None):
    """Softmax attention through the fused kernel, memory O(L E) (arXiv:1706.03762v7, eq. 1).

    q: (B, H, Lq, E), k, v: (B, G, Lk, E), G divides H, keep: (B, Lk) bool, None = no padding,
    bias: floating, broadcasts to (B, H, Lq, Lk), added to the scores.  Returns (B, H, Lq, E).
    Padded keys have weight 0 (what stands there must be finite); what a padded query gets is of no
    use, but finite.  Memory O(Lq Lk) where causal meets a bias or padding on the left; causal with
    keep looks at keep's values, which torch.compile(fullgraph=True) and torch.vmap cannot.
    """
    if bias is not None and not bias.is_floating_point():
        raise ValueError(f"bias {bias.dtype}: expected floating, 0 and -inf for a mask")
    if bias is not None and bias.ndim < 4:
        bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
    if keep is not None and (keep.dtype != torch.bool or keep.shape != (len(q), k.shape[2])):
        text = f"{(len(q), k.shape[2])} bool, got {tuple(keep.shape)} {keep.dtype}"
        raise ValueError(f"expected keep {text}")
    square = q.shape[2] == k.shape[2]
    if keep is not None and not (causal and square and right_padded(keep)):
        bias = hide(keep, q.dtype) + (0 if bias is None else bias)
    if causal and bias is not None:  # the kernel takes one mask: write both into it, O(Lq Lk)
        bias = bias + q.new_full((q.shape[2], k.shape[2]), -torch.inf).triu(1)
        causal = False
    shared = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, bias, is_causal=causal, enable_gqa=shared)


def right_padded(keep):
    """True when all real tokens come first: then no real causal query sees padding, maskless."""
    return not bool((keep[:, 1:] & ~keep[:, :-1]).any())


def hide(keep, dtype):
    """(B, L) bool -> bias (B, 1, 1, L): 0 for a real token, -inf for padding."""
    bias = torch.zeros(keep.shape, dtype=dtype, device=keep.device).masked_fill(~keep, -torch.inf)
    return bias[:, None, None, :]


def sinusoidal_positions(positions, d_model):
    """(L,) int64 -> (L, D) float64: near position 10^6 float32 angles lose all but a digit."""
    i = torch.arange(0, d_model, 2, dtype=torch.float64, device=positions.device)
    angle = positions.double()[:, None] / 10000 ** (i / d_model)  # (L, 1) x (D/2,) -> (L, D/2)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :d_model]  # (L, D/2, 2)


def rope(x, positions):
    """Rotary embedding (arXiv:2104.09864v5, eq. 34). x: (B, H, L, E), E even, positions: (L,)."""
    table = sinusoidal_positions(positions, x.shape[-1]).to(x.dtype)
    sin, cos = table[:, 0::2], table[:, 1::2]  # (L, E/2)
    even, odd = x[..., 0::2], x[..., 1::2]  # (B, H, L, E/2)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


# ---------------------------------------------------------------- layer and model


@dataclass
class Cache:
    """Keys and values of the tokens so far: the first `length` of (B, G, capacity, E)."""

    k: torch.Tensor
    v: torch.Tensor
    length: int = 0

    def append(self, k, v):
        """Write k, v (B, G, n, E) after the last ones; a full cache doubles. Returns all."""
        if len(k) != len(self.k):
            raise ValueError(f"expected the state's batch {len(self.k)}, got {len(k)}")
        end = self.length + k.shape[2]
        if end > self.k.shape[2]:
            more = max(end, 2 * self.k.shape[2]) - self.k.shape[2]
            self.k, self.v = (F.pad(x, (0, 0, 0, more)) for x in (self.k, self.v))
        self.k[:, :, self.length : end], self.v[:, :, self.length : end] = k, v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]


class Attention(nn.Module):
    """Multi-head attention with its projections (arXiv:1706.03762v7, 3.2.2). (B, L, D) -> same.

    n_kv_heads = G < n_heads shares each key/value head between n_heads / G query heads.
    attend(q, k, v, causal, keep) on (B, H, L, E) is the product itself, open to replacement.
    """

    def __init__(
        self, d_model, n_heads, causal=False, n_kv_heads=None, rope=False, attend=attention
    ):
        super().__init__()
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        if min(d_model, n_heads, n_kv_heads) < 1:
            sizes = f"{d_model}, {n_heads}, {n_kv_heads}"
            raise ValueError(f"expected d_model, n_heads, n_kv_heads >= 1, got {sizes}")
        if d_model % n_heads:
            raise ValueError(f"d_model {d_model} is not divisible by n_heads {n_heads}")
        if n_heads % n_kv_heads:
            raise ValueError(f"n_heads {n_heads} is not divisible by n_kv_heads {n_kv_heads}")
        d_head = d_model // n_heads
        if rope and d_head % 2:
            raise ValueError(f"RoPE needs an even head size, got {d_model} / {n_heads} = {d_head}")
        self.n_heads, self.n_kv_heads, self.d_head = n_heads, n_kv_heads, d_head
        self.causal, self.rope, self.attend = causal, rope, attend
        self.qkv = nn.Linear(d_model, (n_heads + 2 * n_kv_heads) * self.d_head)
        self.out = nn.Linear(d_model, d_model)

    def project(self, x, positions):
        """(B, L, D) -> q (B, H, L, E), k and v (B, G, L, E); RoPE turns q and k."""
        heads = self.qkv(x).unflatten(-1, (-1, self.d_head)).transpose(1, 2)  # (B, H + 2G, L, E)
        q, k, v = heads.split([self.n_heads, self.n_kv_heads, self.n_kv_heads], dim=1)
        if self.rope:
            q, k = rope(q, positions), rope(k, positions)
        return q, k, v

    def forward(self, x, keep=None, positions=None):
        """x: (B, L, D), keep: (B, L) bool, positions: (L,) int64, 0 .. L-1 by default."""
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)
        q, k, v = self.project(x, positions)
        out = self.attend(q, k, v, self.causal, keep)  # (B, H, L, E)
        return self.out(out.transpose(1, 2).flatten(2))  # (B, H, L, E) -> (B, L, D)

    def initial_state(self, batch, capacity=256):
        """An empty cache with room for `capacity` tokens; it grows when it must."""
        if not self.causal:
            raise ValueError("step mode needs causal=True: a later token would change earlier ones")
        empty = self.qkv.weight.new_zeros(batch, self.n_kv_heads, capacity, self.d_head)
        return Cache(empty, empty.clone())

    @torch.no_grad()
    def prefill(self, x, state):
        """Append x (B, L, D) to what was seen. Returns (y (B, L, D), state); state is changed."""
        past, L = state.length, x.shape[1]
        q, k, v = self.project(x, torch.arange(past, past + L, device=x.device))
        keys, values = state.append(k, v)
        if L == 1:
            out = attention(q, keys, values)  # the newest token sees all
        else:
            out, lse = attention_block(q, k, v, causal=True)
            before = attention_block(q, keys[:, :, :past], values[:, :, :past])
            out = merge(out, lse, *before)[0].to(x.dtype)
        return self.out(out.transpose(1, 2).flatten(2)), state  # (B, H, L, E) -> (B, L, D)

    def step(self, x_t, state):
        """One token x_t (B, D), O(length). Returns (y_t (B, D), state); state is changed."""
        y, state = self.prefill(x_t[:, None], state)
        return y[:, 0], state


def from_multihead(mha, causal=False):
    """An `Attention` with the weights of an nn.MultiheadAttention, whose softmax it repeats.

    On (B, L, D), whatever batch_first says.  ValueError for what `Attention` has not: other
    key/value widths, bias_k, add_zero_attn, dropout.
    """
    odd = {
        "kdim or vdim": not mha._qkv_same_embed_dim,
        "add_bias_kv": mha.bias_k is not None,
        "add_zero_attn": mha.add_zero_attn,
        "dropout": mha.dropout > 0,
    }
    if any(odd.values()):
        raise ValueError(f"Attention has no {', '.join(name for name in odd if odd[name])}")
    layer = Attention(mha.embed_dim, mha.num_heads, causal).to(mha.in_proj_weight)
    with torch.no_grad():
        layer.qkv.weight.copy_(mha.in_proj_weight)  # both are q, k, v on top of each other
        layer.out.weight.copy_(mha.out_proj.weight)
        for ours, theirs in ((layer.qkv, mha.in_proj_bias), (layer.out, mha.out_proj.bias)):
            ours.bias.copy_(torch.zeros_like(ours.bias) if theirs is None else theirs)
    return layer


class FeedForward(nn.Module):
    """D -> d_ff -> GELU -> D. `linear(d_in, d_out)` builds both matrices."""

    def __init__(self, d_model, d_ff, linear=nn.Linear):
        super().__init__()
        self.up, self.down = linear(d_model, d_ff), linear(d_ff, d_model)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))  # differs from the paper: GELU, not ReLU


@dataclass(frozen=True)
class TransformerConfig:
    """One of vocab_size (tokens) and n_channels (real values) is set. d_ff: default 4 d_model."""

    d_model: int = 64
    n_layers: int = 2
    n_heads: int = 4
    d_ff: int | None = None
    vocab_size: int | None = None
    n_channels: int | None = None
    causal: bool = False
    rope: bool = False
    dropout: float = 0.0
    n_kv_heads: int | None = None

    def __post_init__(self):
        if (self.vocab_size is None) == (self.n_channels is None):
            both = f"vocab_size ({self.vocab_size}) and n_channels ({self.n_channels})"
            raise ValueError(f"set one of {both}")


class Block(nn.Module):
    """norm, mixer, residual, norm, FFN, residual. (B, L, D) -> (B, L, D)."""

    def __init__(self, config, mixer, ffn):
        super().__init__()
        self.norm_mixer, self.mixer = nn.LayerNorm(config.d_model), mixer
        self.norm_ffn, self.ffn = nn.LayerNorm(config.d_model), ffn
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, keep, positions):
        u = self.norm_mixer(x)  # differs from the paper: the norm stands before the sublayer
        # a mixer with RoPE must know where its tokens stand; any other takes (x, keep)
        where = (positions,) if getattr(self.mixer, "rope", False) else ()
        # differs from the paper: dropout on the sublayers' outputs, not on the attention weights
        x = x + self.dropout(self.mixer(u, keep, *where))
        return x + self.dropout(self.ffn(self.norm_ffn(x)))

    def prefill(self, x, state):
        """Step mode: (B, L, D) -> (y (B, L, D), state), the mixer's own state."""
        mixed, state = self.mixer.prefill(self.norm_mixer(x), state)
        x = x + mixed
        return x + self.ffn(self.norm_ffn(x)), state


class Transformer(nn.Module):
    """Embedding, blocks, norm: tokens (B, L) int64 or values (B, L, C) -> features (B, L, D).

    mixer(config, i) and ffn(config, i) build the sublayers of block i: an Attention and a
    FeedForward unless given.  Without RoPE, sinusoids are added to the embedding.
    """

    def __init__(self, config, mixer=None, ffn=None):
        super().__init__()
        self.config = config
        mixer = mixer or (
            lambda c, i: Attention(c.d_model, c.n_heads, c.causal, c.n_kv_heads, c.rope)
        )
        ffn = ffn or (lambda c, i: FeedForward(c.d_model, c.d_ff or 4 * c.d_model))
        if config.vocab_size is not None:
            self.embed = nn.Embedding(config.vocab_size, config.d_model)
        else:
            self.embed = nn.Linear(config.n_channels, config.d_model)
        self.blocks = nn.ModuleList(
            Block(config, mixer(config, i), ffn(config, i)) for i in range(config.n_layers)
        )
        self.norm = nn.LayerNorm(config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, keep=None, positions=None):
        """positions: (L,) int64, where these tokens stand in the sequence; 0 .. L-1 by default."""
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)
        x = self.dropout(self.add_positions(self.embed(x), positions))  # (B, L) -> (B, L, D)
        for block in self.blocks:
            x = block(x, keep, positions)
        return self.norm(x)

    def add_positions(self, x, positions):
        """(B, L, D) + (L, D), unless RoPE tells the layers where tokens stand."""
        if self.config.rope:
            return x
        return x + sinusoidal_positions(positions, self.config.d_model).to(x.dtype)

    def initial_state(self, batch):
        """What step mode carries: the blocks' own states and the number of tokens so far."""
        return [block.mixer.initial_state(batch) for block in self.blocks], 0

    @torch.no_grad()
    def prefill(self, x, state):
        """Further tokens x (B, L) or (B, L, C). Returns (features (B, L, D), state).

        The state given is changed: copy.deepcopy it to go on from it twice.  ValueError if it was
        continued before, or is of another batch.
        """
        states, past = state
        if any(getattr(s, "length", past) != past for s in states):
            raise ValueError(f"the state of token {past} was continued before: deepcopy it first")
        positions = torch.arange(past, past + x.shape[1], device=x.device)
        x = self.add_positions(self.embed(x), positions)
        for i, block in enumerate(self.blocks):
            x, states[i] = block.prefill(x, states[i])
        return self.norm(x), (states, past + len(positions))

    def step(self, x_t, state):
        """One token x_t (B,) or (B, C). Returns (features (B, D), state)."""
        y, state = self.prefill(x_t[:, None], state)
        return y[:, 0], state

    def param_groups(self, lr, weight_decay):
        """Groups for AdamW: matrices decay, biases and norms do not.

        The parameters of a convolutional mixer (one with a `kernel`) learn at min(lr, 1e-3), as
        those of state spaces do, without decay.
        """
        kernels = {id(p) for m in self.modules() if hasattr(m, "kernel") for p in m.parameters()}
        plain = [p for p in self.parameters() if id(p) not in kernels]
        slow = [p for p in self.parameters() if id(p) in kernels]
        return [
            {"params": [p for p in plain if p.ndim >= 2], "lr": lr, "weight_decay": weight_decay},
            {"params": [p for p in plain if p.ndim < 2], "lr": lr, "weight_decay": 0.0},
            {"params": slow, "lr": min(lr, 1e-3), "weight_decay": 0.0},
        ]


# ---------------------------------------------------------------- self-check


def rel_err(a, b):
    """max|a - b| / max|b|, with max|b| > 0."""
    a, b = (torch.as_tensor(x).detach().double().cpu() for x in (a, b))
    scale = b.abs().max().item()
    assert a.shape == b.shape and scale > 0, f"{tuple(a.shape)} {tuple(b.shape)}, largest {scale}"
    return (a - b).abs().max().item() / scale


def reference(q, k, v, causal, keep):
    """attention_ref over batch and heads. Returns (out, lse) as float64 tensors."""
    q, k, v, keep = (x.detach().double().cpu().numpy() for x in (q, k, v, keep))
    group = q.shape[1] // k.shape[1]
    heads = [
        attention_ref(q[b, h], k[b, h // group], v[b, h // group], causal, keep[b] > 0)
        for b, h in np.ndindex(q.shape[:2])
    ]
    both = (torch.from_numpy(np.stack(x)) for x in zip(*heads, strict=True))
    return [x.unflatten(0, q.shape[:2]) for x in both]


def random_grad(q):
    """An output gradient; the same for the same shape."""
    return torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(q)


def check_kernels(q, k, v, causal, keep, limit):
    """The ladder definition, product, tiles, fused kernel: outputs and gradients."""
    name, real = "causal" if causal else "full", keep[:, None, :, None]
    grad, leaves = random_grad(q) * real, [x.clone().requires_grad_() for x in (q, k, v)]
    ref, lse_ref = reference(q, k, v, causal, keep)
    slow, fast = (attend(*leaves, causal, keep) for attend in (attention_slow, attention))
    grads, fast_grads = (torch.autograd.grad(x, leaves, grad) for x in (slow, fast))
    mask = causal, hide(keep, q.dtype)
    out, lse = attention_online(q, k, v, *mask, tile=(5, 7))
    online_grads = attention_online_grad(grad, q, k, v, out, lse, *mask, tile=(5, 7))
    rows = [
        (f"{name}: product == definition", rel_err(slow, ref), limit),
        (f"{name}: tiles == definition", rel_err(out, ref), limit),
        (f"{name}: log-sum-exp of the tiles", rel_err(lse, lse_ref), limit),
        (f"{name}: fused == definition", rel_err(fast * real, ref * real.cpu()), limit),
    ]
    for x, of_slow, of_fast, of_online in zip("qkv", grads, fast_grads, online_grads, strict=True):
        rows.append((f"{name}: d{x} of tiles == product", rel_err(of_online, of_slow), limit))
        rows.append((f"{name}: d{x} of fused == product", rel_err(of_fast, of_slow), limit))
    return rows


def check_blocks(q, k, v, keep, limit):
    """Blocks of keys, each by the kernel that returns lse, add up to the whole, and so do grads."""
    grad, bias, cuts = random_grad(q), hide(keep, q.dtype), (0, 0, 1, 12, 12, k.shape[2])
    blocks = [(k[:, :, a:b], v[:, :, a:b], False, bias[..., a:b]) for a, b in pairwise(cuts)]
    out, lse = attention_block(q, *blocks[0])
    for block in blocks[1:]:
        out, lse = merge(out, lse, *attention_block(q, *block))
    parts = [attention_block_grad(grad, q, *x[:2], out, lse, *x[2:]) for x in blocks]
    dqs, dks, dvs = zip(*parts, strict=True)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    whole = attention_slow(*leaves, keep=keep)
    dq, dk, dv = torch.autograd.grad(whole, leaves, grad)
    return [
        ("merged blocks == product", rel_err(out, whole), limit),
        ("dq of blocks == product", rel_err(sum(dqs), dq), limit),
        ("dk of blocks == product", rel_err(torch.cat(dks, 2), dk), limit),
        ("dv of blocks == product", rel_err(torch.cat(dvs, 2), dv), limit),
    ]


def check_layers(dtype, device, limit):
    """Positions, step mode, and PyTorch's own layer."""
    torch.manual_seed(0)
    at = torch.tensor([0, 1, 7, 1000], device=device)
    x = torch.randn(4, 8, dtype=dtype, device=device)
    turned, moved = rope(x[None, None], at)[0, 0], rope(x[None, None], at + 5)[0, 0]
    table_ref = sinusoidal_positions_ref(at.tolist(), 7)
    turned_ref = rope_ref(x.double().cpu().numpy(), at.tolist())
    layer = Attention(16, 4, causal=True, n_kv_heads=2, rope=True).to(device, dtype)
    u = torch.randn(2, 21, 16, dtype=dtype, device=device)
    y, state = layer.prefill(u[:, :9], layer.initial_state(2, capacity=4))
    more, state = layer.prefill(u[:, 9:15], state)
    ys = [y, more] + [layer.step(u[:, t], state)[0][:, None] for t in range(15, 21)]
    mha = nn.MultiheadAttention(16, 4, batch_first=True).to(device, dtype)
    theirs = mha(u, u, u, need_weights=False)[0]
    return [
        ("sinusoids == definition", rel_err(sinusoidal_positions(at, 7), table_ref), limit),
        ("RoPE == definition", rel_err(turned, turned_ref), limit),
        ("RoPE: products depend on distance", rel_err(moved @ moved.T, turned @ turned.T), limit),
        ("prefill and step == forward", rel_err(torch.cat(ys, 1), layer(u)), limit),
        ("weights of nn.MultiheadAttention", rel_err(from_multihead(mha)(u), theirs), limit),
    ]


def self_check(dtype=torch.float64, device="cpu"):
    """Each rung against the slower one before it. Returns [(name, error, limit)]."""
    limit = {torch.float64: 1e-12, torch.float32: 1e-5}[dtype]
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 33, 8, generator=rng, dtype=torch.float64) for h in (4, 2, 2))
    q, k, v = (x.to(device, dtype) for x in (q, k, v))
    keep = torch.arange(33, device=device) < torch.tensor([[33], [20]], device=device)
    rows = [row for c in (False, True) for row in check_kernels(q, k, v, c, keep, limit)]
    rows += check_blocks(q, k, v, keep, limit) + check_layers(dtype, device, limit)
    q, k, v = (torch.randn(1, 1, 4096, 64, generator=rng) for _ in range(3))
    some, full = [0, 1, 2047, 4095], (x[0, 0].double().numpy() for x in (q, k, v))
    ref = attention_ref(*full, causal=True, rows=some)[0]
    fast = attention(*(x.to(device) for x in (q, k, v)), causal=True)[0, 0, some]
    return rows + [("float32, L = 4096, sampled rows", rel_err(fast, ref), 1e-5)]


def print_table(rows):
    """Print a check table. Returns True when every error is within its limit."""
    print(f"{'check':<40}{'error':>9}{'limit':>9}")
    for name, error, limit in rows:
        print(f"  {name:<38}{error:9.1e}{limit:9.0e}   {'ok' if error <= limit else 'FAIL'}")
    return all(error <= limit for _, error, limit in rows)


# ---------------------------------------------------------------- demo, timing, command line


def demo(device, L=64, steps=200):
    """Repeat a random word: L/2 random symbols, then the same again. Chance is 1/16."""
    torch.manual_seed(0)
    config = TransformerConfig(d_model=32, n_heads=2, vocab_size=16, causal=True, rope=True)
    model, head = Transformer(config).to(device), nn.Linear(32, 16).to(device)
    groups = model.param_groups(3e-3, 0.01) + [{"params": list(head.parameters())}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3)
    for _ in range(steps):
        word = torch.randint(16, (32, L // 2), device=device)
        tokens = torch.cat([word, word], 1)  # (B, L)
        logits = head(model(tokens))[:, L // 2 - 1 : -1]  # (B, L/2, 16): those that can be known
        loss = F.cross_entropy(logits.flatten(0, 1), word.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    share = (logits.argmax(-1) == word).float().mean().item()
    print(f"demo: repeats {L // 2} symbols seen once: {share:.1%} right after {steps} steps")
    return share >= 0.99


def timing(device, L=2048):
    """Forward and backward of the written-out product, of the tiles, of the fused kernel."""
    q, k, v = (torch.randn(1, 4, L, 64, device=device, requires_grad=True) for _ in range(3))

    @torch.no_grad()
    def tiles():
        out, lse = attention_online(q, k, v)
        attention_online_grad(out, q, k, v, out, lse)

    runs = {
        "product": lambda: attention_slow(q, k, v).sum().backward(),
        "tiles": tiles,
        "fused": lambda: attention(q, k, v).sum().backward(),
    }
    best = dict.fromkeys(runs, math.inf)
    for _ in range(3):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if q.is_cuda:
                torch.cuda.synchronize()
            best[name] = min(best[name], time.perf_counter() - start)
    threads = torch.get_num_threads()
    print(f"forward and backward, 4 heads of 64, L = {L}, float32, {threads} threads")
    for name, seconds in best.items():
        print(f"  {name:<8}{1e3 * seconds:8.1f} ms  {best['product'] / seconds:5.1f} x the product")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="print the check table and stop")
    parser.add_argument("--device", default="cpu", help="torch device (default cpu)")
    parser.add_argument("--dtype", choices=["float64", "float32"], default="float64")
    args = parser.parse_args(argv)
    print(f"attention.py  torch {torch.__version__}  device {args.device}  seed 0")
    ok = print_table(self_check(getattr(torch, args.dtype), args.device))
    if not args.check:
        ok = demo(args.device) and ok
        timing(args.device)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
