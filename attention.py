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

    python attention.py            check table, demo, timing
    python attention.py --check    check table alone
"""

import argparse
import math
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------- reference: numpy, float64


def attention_ref(q, k, v, causal=False, keep=None):
    """Softmax attention, one head (Vaswani et al. 2017, arXiv:1706.03762v7, eq. 1).

    q: (Lq, E), k: (Lk, E), v: (Lk, Ev), keep: (Lk,) bool, True = visible.  Returns (Lq, Ev).
    causal: query i sees keys 0 .. i.  A query that sees nothing gets zeros.
    """
    out = np.zeros((q.shape[0], v.shape[1]))
    for i, q_i in enumerate(q):
        visible = np.ones(len(k), bool) if keep is None else keep.copy()
        if causal:
            visible[i + 1 :] = False
        if not visible.any():
            continue
        scores = k[visible] @ q_i / math.sqrt(q.shape[1])  # (keys,)
        weights = np.exp(scores - scores.max())  # the largest is 1: no overflow
        out[i] = weights @ v[visible] / weights.sum()
    return out


def sinusoidal_positions_ref(positions, d_model):
    """sin, cos of pos / 10000^(2i/D) in even, odd columns (arXiv:1706.03762v7, 3.5). (L, D)."""
    table = np.zeros((len(positions), d_model))
    for row, pos in enumerate(positions):
        for i in range(0, d_model, 2):
            angle = pos / 10000 ** (i / d_model)
            table[row, i] = math.sin(angle)
            if i + 1 < d_model:
                table[row, i + 1] = math.cos(angle)
    return table


def rope_ref(x, positions):
    """Turn the pairs (x_2i, x_2i+1) by pos / 10000^(2i/E) (arXiv:2104.09864v5, eq. 34). (L, E)."""
    out = np.zeros_like(x)
    for row, pos in enumerate(positions):
        for i in range(0, x.shape[1], 2):
            angle = pos / 10000 ** (i / x.shape[1])
            turn = np.array(
                [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
            )
            out[row, i : i + 2] = turn @ x[row, i : i + 2]
    return out


# ---------------------------------------------------------------- fast: torch


def attention_slow(q, k, v, causal=False, keep=None):
    """The product written out: scores and weights exist, memory O(L^2). Shapes as `attention`."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))  # (B, G, L, E) -> (B, H, L, E)
    scores = (
        q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    )  # (B, H, Lq, E) x (B, H, E, Lk) -> (B, H, Lq, Lk)
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    if keep is not None:
        scores = scores.masked_fill(~keep[:, None, None, :], -torch.inf)
    return scores.softmax(-1) @ v  # (B, H, Lq, Lk) x (B, H, Lk, E) -> (B, H, Lq, E)


def attention(q, k, v, causal=False, keep=None):
    """Softmax attention through the fused kernel: O(L E) memory (arXiv:1706.03762v7, eq. 1).

    q: (B, H, L, E), k, v: (B, G, L, E), G divides H, keep: (B, L) bool, None = no padding.
    Returns (B, H, L, E).  A real query never reads a padded key; what a padded query gets is
    finite and of no use.
    """
    mask = None
    if keep is not None and not (causal and right_padded(keep)):
        mask = keep[:, None, None, :]  # (B, L) -> (B, 1, 1, L)
        if causal:  # holes in the middle: the kernel takes one mask, so write both into it
            L = keep.shape[1]
            mask = (
                mask & torch.ones(L, L, dtype=torch.bool, device=keep.device).tril()
            )  # (B, 1, L, L)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=causal and mask is None,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def right_padded(keep):
    """True when all real tokens come first: then no real causal query sees padding, maskless."""
    return not bool((keep[:, 1:] & ~keep[:, :-1]).any())


def sinusoidal_positions(positions, d_model):
    """(L,) int64 -> (L, D) float64: near position 10^6 float32 angles lose all but a digit."""
    i = torch.arange(0, d_model, 2, dtype=torch.float64, device=positions.device)
    angle = positions.double()[:, None] * 10000 ** (-i / d_model)  # (L, 1) x (D/2,) -> (L, D/2)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[
        :, :d_model
    ]  # (L, D/2, 2) -> (L, D)


def rope(x, positions):
    """Rotary embedding (arXiv:2104.09864v5, eq. 34). x: (B, H, L, E), E even, positions: (L,)."""
    table = sinusoidal_positions(positions, x.shape[-1]).to(x.dtype)
    sin, cos = table[:, 0::2], table[:, 1::2]  # (L, E/2)
    even, odd = x[..., 0::2], x[..., 1::2]  # (B, H, L, E/2)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


# ---------------------------------------------------------------- layer and model


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
        if d_model % n_heads:
            raise ValueError(f"d_model {d_model} is not divisible by n_heads {n_heads}")
        if n_heads % n_kv_heads:
            raise ValueError(f"n_heads {n_heads} is not divisible by n_kv_heads {n_kv_heads}")
        if rope and (d_model // n_heads) % 2:
            raise ValueError(
                f"RoPE needs an even head size, got {d_model} / {n_heads} = {d_model // n_heads}"
            )
        self.n_heads, self.n_kv_heads, self.d_head = n_heads, n_kv_heads, d_model // n_heads
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
            raise ValueError(
                f"set one of vocab_size ({self.vocab_size}) and n_channels ({self.n_channels})"
            )
        if self.d_ff is None:
            object.__setattr__(self, "d_ff", 4 * self.d_model)


def default_mixer(config, i):
    """The token mixer of block i."""
    return Attention(config.d_model, config.n_heads, config.causal, config.n_kv_heads, config.rope)


def default_ffn(config, i):
    """The FFN of block i."""
    return FeedForward(config.d_model, config.d_ff)


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
        mixed = (
            self.mixer(u, keep, positions)
            if getattr(self.mixer, "rope", False)
            else self.mixer(u, keep)
        )
        x = x + self.dropout(mixed)
        return x + self.dropout(self.ffn(self.norm_ffn(x)))


class Transformer(nn.Module):
    """Embedding, blocks, norm: tokens (B, L) int64 or values (B, L, C) -> features (B, L, D).

    mixer(config, i) and ffn(config, i) build the sublayers of block i.  Without RoPE, sinusoids
    are added to the embedding.
    """

    def __init__(self, config, mixer=None, ffn=None):
        super().__init__()
        self.config = config
        mixer, ffn = mixer or default_mixer, ffn or default_ffn
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
        x = self.embed(x)  # (B, L) or (B, L, C) -> (B, L, D)
        if not self.config.rope:
            x = x + sinusoidal_positions(positions, self.config.d_model).to(
                x.dtype
            )  # (B, L, D) + (L, D)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, keep, positions)
        return self.norm(x)

    def param_groups(self, lr, weight_decay):
        """Groups for AdamW: matrices decay, biases and norms do not."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        return [
            {
                "params": [p for p in parameters if p.ndim >= 2],
                "lr": lr,
                "weight_decay": weight_decay,
            },
            {"params": [p for p in parameters if p.ndim < 2], "lr": lr, "weight_decay": 0.0},
        ]


# ---------------------------------------------------------------- self-check


def rel_err(a, b):
    """max|a - b| / max|b|, with max|b| > 0."""
    a, b = (torch.as_tensor(x, dtype=torch.float64).cpu() for x in (a, b))
    scale = b.abs().max().item()
    assert a.shape == b.shape and scale > 0, (
        f"shapes {tuple(a.shape)} {tuple(b.shape)}, largest {scale}"
    )
    return (a - b).abs().max().item() / scale


def self_check(dtype=torch.float64, device="cpu"):
    """Each rung against the slower one before it. Returns [(name, error, limit)]."""
    limit = 1e-12 if dtype == torch.float64 else 1e-5
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 33, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    q, k, v = (x.to(device, dtype) for x in (q, k[:, :2], v[:, :2]))
    keep = torch.arange(33, device=device)[None] < torch.tensor([[33], [20]], device=device)
    rows = []
    for causal in (False, True):
        ref = torch.stack(
            [
                torch.stack(
                    [
                        torch.from_numpy(
                            attention_ref(
                                *(
                                    x[b, h // s].double().cpu().numpy()
                                    for x, s in ((q, 1), (k, 2), (v, 2))
                                ),
                                causal,
                                keep[b].cpu().numpy(),
                            )
                        )
                        for h in range(4)
                    ]
                )
                for b in range(2)
            ]
        )
        slow, fast = (f(q, k, v, causal, keep) for f in (attention_slow, attention))
        name = "causal" if causal else "full"
        rows.append((f"attention {name}: product == definition", rel_err(slow, ref), limit))
        real = keep[:, None, :, None]  # what padded queries get is nobody's business
        rows.append(
            (f"attention {name}: fused == product", rel_err(fast * real, slow * real), limit)
        )
    return rows


def print_table(rows):
    """Print a check table. Returns True when every error is within its limit."""
    print(f"{'check':<56}{'error':>9}{'limit':>9}")
    for name, error, limit in rows:
        print(f"  {name:<54}{error:9.1e}{limit:9.0e}   {'ok' if error <= limit else 'FAIL'}")
    return all(error <= limit for _, error, limit in rows)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="print the check table and stop")
    parser.add_argument("--device", default="cpu", help="torch device (default cpu)")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    print(f"attention.py  torch {torch.__version__}  device {args.device}  seed 0")
    start = time.perf_counter()
    ok = print_table(self_check(device=args.device))
    print(f"checked in {time.perf_counter() - start:.1f} s")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
