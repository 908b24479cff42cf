"""Scaled dot-product attention, multi-head, with RoPE and a KV cache; and the Transformer.

    out_i = sum_j softmax_j(q_i . k_j / sqrt(E)) v_j   Vaswani et al. 2017, arXiv:1706.03762v7
    RoPE rotates q_i by angles i w, k_j by j w         Su et al. 2021, arXiv:2104.09864v5
    w_n = 10000^(-2n/E)

    paper symbol      code name                  shape (B sequences of L tokens)
    Q                 q                          (B, H, Lq, E)
    K, V              k, v                       (B, G, Lk, E); G divides H
    d_model, h, d_k   d_model, n_heads, d_head   D, H, E
    mask              causal                     bool
    -                 keep                       (B, Lk) bool, False at padding
    pos               positions                  (L,) int64

Differences from Vaswani et al. are marked where they occur: pre-norm and a last norm, GELU,
embeddings without the factor sqrt(d_model), biases in the projections, fewer key and value heads
than query heads (arXiv:2305.13245).  Not included: cross-attention, sliding windows, paged caches,
an output layer (put one on the features), second derivatives (torch's fused kernels have none).

    python attention.py            checks and a demo
    python attention.py --check    checks only
"""

import argparse
import math
import sys
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# ---------------------------------------------------------------- reference: numpy, float64


def attention_ref(q, k, v, causal=False, keep=None):
    """Softmax attention (arXiv:1706.03762v7, eq. 1). Returns (out, log-sum-exp of the scores).

    q: (..., Lq, E); k: (..., Lk, E); v: (..., Lk, Ev); keep: (..., Lk) bool, True at real tokens.
    causal: query i sees keys 0 .. i.  nan where a query sees no key.
    """
    Lq, E = q.shape[-2:]
    Lk = k.shape[-2]
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(E)  # (..., Lq, Lk)
    if causal:
        past = np.tri(Lq, Lk, dtype=bool)
        scores = np.where(past, scores, -np.inf)
    if keep is not None:
        scores = np.where(keep[..., None, :], scores, -np.inf)
    largest = scores.max(-1, keepdims=True)
    weights = np.exp(scores - largest)  # at most 1: no overflow
    total = weights.sum(-1, keepdims=True)
    lse = largest + np.log(total)
    return weights @ v / total, lse[..., 0]


def rotate_ref(x, positions):
    """RoPE: rotate the pairs (x_2i, x_2i+1) by pos / 10000^(2i/E) (arXiv:2104.09864v5, eq. 34).

    x: (L, E), positions: (L,).  Returns (L, E).
    """
    E = x.shape[1]
    frequency = 10000.0 ** (-np.arange(0, E, 2) / E)  # (E/2,)
    angle = np.outer(positions, frequency)  # (L, E/2)
    pairs = x[:, 0::2] + 1j * x[:, 1::2]
    rotated = pairs * np.exp(1j * angle)
    return np.stack([rotated.real, rotated.imag], -1).reshape(x.shape)


# ---------------------------------------------------------------- torch: plain to fast


def attention_slow(q, k, v, causal=False, keep=None):
    """Softmax attention as in `attention_ref`, written out: all scores in memory.

    q: (B, H, Lq, E); k: (B, G, Lk, E); v: (B, G, Lk, Ev); G divides H.
    keep: (B, Lk) bool, False at padding.  causal: query i sees keys 0 .. i.
    Returns (B, H, Lq, Ev), nan where a query sees no key.
    """
    check_shapes(q, k, v, keep)
    k, v = repeat_heads(q, k, v)  # (B, G, Lk, E) -> (B, H, Lk, E)
    scores = q @ k.mT / math.sqrt(q.shape[-1])  # (B, H, Lq, E) x (B, H, E, Lk) -> (B, H, Lq, Lk)
    if causal:
        future = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)  # (Lq, Lk)
        scores = scores.masked_fill(future, -torch.inf)
    if keep is not None:
        scores = scores.masked_fill(~keep[:, None, None], -torch.inf)
    return scores.softmax(-1) @ v  # (B, H, Lq, Lk) x (B, H, Lk, E) -> (B, H, Lq, E)


def attention_online(q, k, v, causal=False, keep=None, tile=128):
    """Softmax over tiles of keys with a running maximum and sum (arXiv:1805.02867v2, algorithm 3;
    with values: arXiv:2112.05682).

    Arguments as attention_slow; memory O(L E + L tile) without gradients.  Returns (out
    (B, H, Lq, Ev), log-sum-exp (B, H, Lq)): 0 and -inf where a query sees no key.
    """
    check_shapes(q, k, v, keep)
    k, v = repeat_heads(q, k, v)  # (B, G, Lk, E) -> (B, H, Lk, E)
    B, H, Lq, E = q.shape
    Lk = k.shape[2]
    q = q / math.sqrt(E)
    out = q.new_zeros(B, H, Lq, v.shape[-1])  # sum of exp(score - largest) v
    total = q.new_zeros(B, H, Lq)  # sum of exp(score - largest)
    largest = q.new_full((B, H, Lq), -torch.inf)  # of the scores so far
    i = torch.arange(Lq, device=q.device)[:, None]  # (Lq, 1)
    for start in range(0, Lk, tile):
        stop = min(start + tile, Lk)
        j = torch.arange(start, stop, device=q.device)  # (tile,)
        scores = q @ k[:, :, j].mT  # (B, H, Lq, E) x (B, H, E, tile) -> (B, H, Lq, tile)
        if causal:
            scores = scores.masked_fill(j > i, -torch.inf)
        if keep is not None:
            scores = scores.masked_fill(~keep[:, None, None, j], -torch.inf)
        new_largest = torch.maximum(largest, scores.amax(-1))
        shift = new_largest.masked_fill(new_largest == -torch.inf, 0)  # -inf - -inf would be nan
        weights = torch.exp(scores - shift[..., None])
        decay = torch.exp(largest - shift)  # rescales what was summed under the old maximum
        out = out * decay[..., None] + weights @ v[:, :, j]
        total = total * decay + weights.sum(-1)
        largest = new_largest
    lse = largest + total.log()
    total = total.masked_fill(total == 0, 1)
    return out / total[..., None], lse


def merge(out, lse, out_block, lse_block):
    """Combine attention over two disjoint sets of keys into attention over both. Exact.

    out, out_block: (B, H, Lq, E); lse, lse_block: (B, H, Lq), -inf where a query sees no key.
    """
    if not (out.shape == out_block.shape and lse.shape == lse_block.shape == out.shape[:-1]):
        shapes = [tuple(x.shape) for x in (out, lse, out_block, lse_block)]
        raise ValueError(f"expected (B, H, Lq, E), (B, H, Lq), twice; got {shapes}")
    # Weights from the difference: exp(lse - new lse) would add the rounding error of the new lse.
    # Where both are -inf, the difference is nan; -inf makes the block weigh nothing.
    difference = (lse_block - lse).masked_fill(lse_block == -torch.inf, -torch.inf)
    weight = torch.sigmoid(-difference)[..., None]
    weight_block = torch.sigmoid(difference)[..., None]
    out = out * weight + out_block * weight_block
    return out, torch.logaddexp(lse, lse_block)


def attention(q, k, v, causal=False, keep=None):
    """Softmax attention by PyTorch's fused kernels: O(L E) memory, with the exceptions below.

    Arguments as attention_slow.  Returns (B, H, Lq, Ev), meaningless at padding.

    causal with keep builds a mask (B, 1, Lq, Lk).  If all padding is on the right, leave keep out:
    no real token sees what comes after it.  On CUDA, float64 and G < H in float32 store all scores,
    as does G < H with keep where Lk % 128 == 64.
    """
    check_shapes(q, k, v, keep)
    mask = None
    kernels = nullcontext()  # any
    if keep is not None:
        mask = keep[:, None, None]  # (B, 1, 1, Lk)
        if causal:  # the kernel takes a mask or is_causal, not both
            past = keep.new_ones(q.shape[2], k.shape[2]).tril()
            mask = mask & past  # (B, 1, Lq, Lk)
            causal = False
        if q.is_cuda and k.shape[2] % 128 == 64:
            # cuDNN's gradient of q can be nan there: github.com/pytorch/pytorch/issues/196678
            kernels = sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
    with kernels:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)


def repeat_heads(q, k, v):
    """Repeat each head of k and v for its H / G heads of q."""
    group = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(group, dim=1)
    v = v.repeat_interleave(group, dim=1)
    return k, v


def check_shapes(q, k, v, keep):
    """Refuse shapes that would broadcast by accident."""
    expected = "q (B, H, Lq, E), k and v (B, G, Lk, E), G divides H"
    expect(q.ndim == k.ndim == 4, expected, q, k, v)
    B, H, _, E = q.shape
    G, Lk = k.shape[1:3]
    fits = k.shape == (B, G, Lk, E) and v.shape[:-1] == (B, G, Lk)
    expect(fits and H % G == 0, expected, q, k, v)
    if keep is not None:
        fits = keep.shape == (B, Lk) and keep.dtype == torch.bool
        expect(fits, "k (B, G, Lk, E), bool keep (B, Lk)", k, keep)


def require(ok, message):  # same as s4.py:require
    """Raise ValueError unless ok."""
    if not ok:
        raise ValueError(message)


def expect(condition, expected, *tensors):
    """Raise ValueError, with what was expected and the tensors' shapes, unless condition."""
    if not condition:
        got = [f"{tuple(x.shape)} {x.dtype}" for x in tensors]
        raise ValueError(f"expected {expected}; got {', '.join(got)}")


# ---------------------------------------------------------------- positions


def angles(x, positions=None):
    """Return pos / 10000^(2i/D) (L, ceil(D/2)) in float64. x: (..., L, D); positions: (L,) int64.

    D: d_model, or E for queries and keys.  float64, because in float32 angles near 10^6 are off by
    several hundredths.
    """
    L, D = x.shape[-2:]
    if positions is None:
        positions = torch.arange(L, device=x.device)
    ok = positions.shape == (L,) and x.is_floating_point()  # a single position would broadcast
    expect(ok, "float x (..., L, D), positions (L,)", x, positions)
    even = torch.arange(0, D, 2, dtype=torch.float64, device=x.device)
    return positions[:, None] * 10000.0 ** (-even / D)


def sinusoids(x, positions=None):
    """sin and cos of the angles, interleaved (arXiv:1706.03762v7, 3.5). Returns (L, D)."""
    angle = angles(x, positions)
    pairs = [angle.sin(), angle.cos()]
    table = torch.stack(pairs, -1).flatten(1)
    return table[:, : x.shape[-1]].to(x.dtype)  # without the last cosine if D is odd


def rotate(x, positions=None):
    """RoPE, as `rotate_ref`. x: queries or keys (B, H, L, E), E even; positions: (L,) int64."""
    angle = angles(x, positions)  # (L, E/2)
    cos = angle.cos().to(x.dtype)
    sin = angle.sin().to(x.dtype)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)  # (B, H, L, E/2)
    rotated = [a * cos - b * sin, a * sin + b * cos]
    return torch.stack(rotated, -1).flatten(-2)


# ---------------------------------------------------------------- KV cache


def attention_newest(q, k, v, chunk=256):
    """Causal attention of the newest queries to all keys, in chunks: O(Lk (E + chunk)) memory.

    q: (B, H, Lq, E); k, v: (B, G, Lk, E); query i sees keys 0 .. Lk - Lq + i.
    Returns (B, H, Lq, E).
    """
    before = k.shape[2] - q.shape[2]  # keys that precede the chunk
    if before == 0:
        return attention(q, k, v, causal=True)
    outs = []
    for queries in q.split(chunk, dim=2):
        n = queries.shape[2]
        end = before + n
        past = q.new_ones(n, end, dtype=torch.bool).tril(before)
        seen = k[:, :, :end], v[:, :, :end]
        outs.append(F.scaled_dot_product_attention(queries, *seen, past, enable_gqa=True))
        before = end
    return torch.cat(outs, dim=2)


@dataclass
class Cache:
    """Keys and values of the first `length` tokens, in buffers of (B, G, capacity, E).

    To reorder for beam search, for the cache c of each block: Cache(c.k[idx], c.v[idx], c.length).
    """

    k: torch.Tensor
    v: torch.Tensor
    length: int = 0

    def append(self, k, v):
        """Write k, v (B, G, n, E) in place. Returns all keys, all values and the longer cache.

        This cache cannot be used afterwards.
        """
        usable = self.k is not None
        how = "use the longer cache, or deepcopy this one before"
        require(usable, f"a cache of {self.length} tokens was already continued: {how}")
        expect(len(k) == len(self.k), "keys of the cache's batch size", self.k, k)
        end = self.length + k.shape[2]
        capacity = self.k.shape[2]
        if end > capacity:
            more = max(capacity, end - capacity)
            self.k = F.pad(self.k, (0, 0, 0, more))
            self.v = F.pad(self.v, (0, 0, 0, more))
        self.k[:, :, self.length : end] = k
        self.v[:, :, self.length : end] = v
        longer = Cache(self.k, self.v, end)
        self.k = self.v = None  # the buffers belong to the longer cache now
        return longer.k[:, :, :end], longer.v[:, :, :end], longer


# ---------------------------------------------------------------- layer


class Attention(nn.Module):
    """Multi-head attention with projections (arXiv:1706.03762v7, 3.2.2): (B, L, D) -> (B, L, D).

    n_kv_heads: G; differs from the paper: each key and value head serves H / G query heads.
    attend(q, k, v, causal, keep): what forward calls, `attention` or one like it, finite also where
    a query sees no key.  prefill and step always use `attention_newest`.
    """

    def __init__(
        self, d_model, n_heads, causal=False, n_kv_heads=None, rope=False, attend=attention
    ):
        super().__init__()
        if n_kv_heads is None:
            n_kv_heads = n_heads
        sizes = d_model, n_heads, n_kv_heads
        fits = min(sizes) >= 1 and d_model % n_heads == 0 and n_heads % n_kv_heads == 0
        names = "d_model, n_heads, n_kv_heads"
        require(fits, f"{names} must be positive, each divisible by the next; got {sizes}")
        odd = d_model // n_heads % 2
        require(not (rope and odd), f"rope needs an even d_model / n_heads; got {sizes}")
        self.n_heads = n_heads
        self.n_kv_heads = n_kv_heads
        self.d_head = d_model // n_heads
        self.causal = causal
        self.rope = rope
        self.attend = attend
        # differs from the paper: biases
        self.qkv = nn.Linear(d_model, (n_heads + 2 * n_kv_heads) * self.d_head)
        self.out = nn.Linear(d_model, d_model)

    def project(self, x, positions):
        """(B, L, D) -> q (B, H, L, E), k and v (B, G, L, E), with RoPE."""
        d_model = self.n_heads * self.d_head
        fits = x.ndim == 3 and x.shape[2] == d_model and x.is_floating_point()
        expect(fits, f"float x (B, L, {d_model})", x)
        heads = self.qkv(x).unflatten(-1, (-1, self.d_head))  # (B, L, H + 2G, E)
        counts = [self.n_heads, self.n_kv_heads, self.n_kv_heads]
        q, k, v = heads.transpose(1, 2).split(counts, dim=1)
        if self.rope:
            q = rotate(q, positions)
            k = rotate(k, positions)
        return q, k, v

    def forward(self, x, keep=None, positions=None):
        """x: (B, L, D); keep: (B, L) bool; positions: (L,) int64, for RoPE, default 0 .. L-1."""
        q, k, v = self.project(x, positions)
        out = self.attend(q, k, v, self.causal, keep)  # (B, H, L, E)
        return self.out(out.transpose(1, 2).flatten(2))  # (B, L, D)

    def initial_state(self, batch, capacity=256):
        """An empty KV cache for `capacity` tokens; it doubles when full."""
        require(self.causal, "a KV cache needs causal=True, or new tokens change old outputs")
        shape = (batch, self.n_kv_heads, capacity, self.d_head)
        # dtype and device of any float parameter: an adapter may wrap qkv, or it may be quantized
        floats = [p for p in self.parameters() if p.is_floating_point()]
        like = floats[0] if floats else torch.empty(0)
        return Cache(like.new_zeros(shape), like.new_zeros(shape))

    @torch.no_grad()
    def prefill(self, x, state):
        """Append x (B, L, D); memory is linear in the number of tokens. Returns (y, state).

        No gradients.
        """
        positions = state.length + torch.arange(x.shape[1], device=x.device)
        q, k, v = self.project(x, positions)
        k, v, state = state.append(k, v)
        out = attention_newest(q, k, v)  # (B, H, L, E)
        return self.out(out.transpose(1, 2).flatten(2)), state

    def step(self, x_t, state):
        """Append one token x_t (B, D) in O(length). Returns (y_t (B, D), state)."""
        y, state = self.prefill(x_t[:, None], state)
        return y[:, 0], state


# ---------------------------------------------------------------- model


@dataclass(frozen=True)
class TransformerConfig:
    """Set vocab_size for tokens or n_channels for real values. d_ff is 4 d_model by default."""

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


class FeedForward(nn.Module):
    """Linear map to d_ff, GELU, linear map back. (B, L, D) -> (B, L, D)."""

    def __init__(self, d_model, d_ff):
        super().__init__()
        self.up = nn.Linear(d_model, d_ff)
        self.down = nn.Linear(d_ff, d_model)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))  # differs from the paper: GELU, not ReLU


class Block(nn.Module):
    """Norm, mixer, residual, norm, FFN, residual. (B, L, D) -> (B, L, D).

    mixer: an Attention, or another layer that mixes tokens, such as S4.  One with an attribute
    `rope` is called with positions, as Attention is.
    """

    def __init__(self, mixer, ffn, d_model, dropout):
        super().__init__()
        self.norm_mixer = nn.LayerNorm(d_model)
        self.mixer = mixer
        self.norm_ffn = nn.LayerNorm(d_model)
        self.ffn = ffn
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, keep=None, positions=None):
        h = self.norm_mixer(x)  # differs from the paper: norm before the sublayer, not after it
        if hasattr(self.mixer, "rope"):  # an Attention, perhaps wrapped
            mixed = self.mixer(h, keep, positions)
        else:
            mixed = self.mixer(h, keep)
        x = x + self.dropout(mixed)
        return x + self.dropout(self.ffn(self.norm_ffn(x)))


class Transformer(nn.Module):
    """Embedding, blocks, norm: integer tokens (B, L) or values (B, L, C) -> features (B, L, D).

    ffn(d_model, d_ff) builds the FFN of a block, FeedForward by default; mixer(config, i) builds
    the mixer of block i, by default an Attention whose forward calls `attend`.
    Without RoPE, sinusoids are added to the embedding.
    """

    def __init__(self, config, ffn=None, mixer=None, attend=attention):
        super().__init__()
        c = config
        d_ff = 4 * c.d_model if c.d_ff is None else c.d_ff
        inputs = [n for n in (c.vocab_size, c.n_channels) if n is not None]
        sizes = [*inputs, c.d_model, c.n_layers, d_ff]
        rule = "set exactly one of vocab_size and n_channels, and sizes of at least 1"
        require(len(inputs) == 1 and min(sizes) >= 1, f"{rule}; got {c}")
        if ffn is None:
            ffn = FeedForward
        self.config = c
        if c.vocab_size is None:
            self.embed = nn.Linear(c.n_channels, c.d_model)
        else:
            self.embed = nn.Embedding(c.vocab_size, c.d_model)
        self.blocks = nn.ModuleList()
        for i in range(c.n_layers):
            if mixer is None:
                mix = Attention(c.d_model, c.n_heads, c.causal, c.n_kv_heads, c.rope, attend)
            else:
                mix = mixer(c, i)
            self.blocks.append(Block(mix, ffn(c.d_model, d_ff), c.d_model, c.dropout))
        self.norm = nn.LayerNorm(c.d_model)  # differs from the paper: pre-norm needs a last norm
        self.dropout = nn.Dropout(c.dropout)

    def embed_at(self, x, positions):
        """Tokens or values -> (B, L, D). With RoPE, attention applies the positions."""
        if self.config.vocab_size is None:
            expect(x.ndim == 3 and x.is_floating_point(), "float values x (B, L, n_channels)", x)
        else:
            expect(x.ndim == 2 and not x.is_floating_point(), "integer tokens x (B, L)", x)
            x = x.long()  # nn.Embedding takes no uint8
        x = self.embed(x)  # differs from the paper: no factor sqrt(d_model)
        if self.config.rope:
            return x
        return x + sinusoids(x, positions)

    def forward(self, x, keep=None, positions=None):
        """keep: (B, L) bool, False at padding; positions: (L,) int64, 0 .. L-1 by default.

        All sequences share the positions, so pad on the right: padding on the left shifts the
        sinusoids of what follows.  With RoPE attention only distances count: either side will do.
        """
        x = self.dropout(self.embed_at(x, positions))
        for block in self.blocks:
            x = block(x, keep, positions)
        return self.norm(x)

    def initial_state(self, batch):
        """The state before the first token: (one state per block, number of tokens so far)."""
        return [block.mixer.initial_state(batch) for block in self.blocks], 0

    @torch.no_grad()
    def prefill(self, x, state):
        """Append tokens x (B, L) or values (B, L, C). Returns (features, state).

        No gradients, no dropout of its own (if ffn or mixer have some, call eval() first).
        KV caches are written in place: a state that was continued raises ValueError when it is
        used again, so deepcopy it to branch.
        """
        states, n_past = state
        positions = n_past + torch.arange(x.shape[1], device=x.device)
        h = self.embed_at(x, positions)
        new_states = []
        for block, block_state in zip(self.blocks, states, strict=True):
            mixed, block_state = block.mixer.prefill(block.norm_mixer(h), block_state)
            h = h + mixed  # as Block.forward
            h = h + block.ffn(block.norm_ffn(h))
            new_states.append(block_state)
        return self.norm(h), (new_states, n_past + x.shape[1])

    def step(self, x_t, state):
        """Append one token x_t (B,) or (B, C). Returns (features (B, D), state)."""
        y, state = self.prefill(x_t[:, None], state)
        return y[:, 0], state

    @torch.no_grad()
    def generate(self, prompt, n, head, temperature=0.0, lengths=None):
        """Return n tokens (B, n) that follow prompt (B, L); temperature 0 takes the likeliest.

        head: features (B, D) -> logits (B, vocab_size).  Call eval() first on parts with dropout.
        lengths: (B,) real tokens per prompt; padding is on the right.  Each row continues as if
        alone (with temperature, in distribution): the longer prompts are read on, token by token,
        while the shorter ones already continue.
        """
        expect(prompt.ndim == 2 and len(prompt) > 0, "prompt (B, L), B at least 1", prompt)
        B, L = prompt.shape
        if lengths is None:
            lengths = [L] * B
        lengths = torch.as_tensor(lengths, device=prompt.device)
        shortest = int(lengths.min())
        longest = int(lengths.max())
        fits = lengths.shape == (B,) and 1 <= shortest and longest <= L
        expected = f"{B} lengths of 1 to L = {L} tokens, temperature of at least 0"
        got = f"{lengths.tolist()}, {temperature}"
        require(fits and temperature >= 0, f"expected {expected}; got {got}")
        h, state = self.prefill(prompt[:, :shortest], self.initial_state(B))
        h = h[:, -1]  # (B, D)
        tokens = F.pad(prompt.long(), (0, n))  # (B, L + n)
        for t in range(shortest, longest + n):
            if t > shortest:
                h, state = self.step(tokens[:, t - 1], state)
            logits = head(h)  # (B, vocab_size)
            if temperature > 0:
                p = (logits / temperature).softmax(-1)
                token = torch.multinomial(p, 1)[:, 0]
            else:
                token = logits.argmax(-1)
            in_prompt = t < lengths
            tokens[:, t] = torch.where(in_prompt, tokens[:, t], token)
        new = lengths[:, None] + torch.arange(n, device=prompt.device)  # (B, n)
        return tokens.gather(1, new)

    def param_groups(self, lr, weight_decay):  # same as s4.py:S4Model.param_groups
        """Return AdamW groups.  Weight decay: of linear maps and embeddings only.

        The kernels of S4 and SGConv mixers have a learning rate of at most 1e-3.
        """
        in_mixers = set()
        for module in self.modules():
            if hasattr(module, "kernel"):
                in_mixers.update(module.parameters())
        groups = [
            {"params": [], "lr": min(lr, 1e-3), "weight_decay": 0.0},  # kernels
            {"params": [], "lr": lr, "weight_decay": 0.0},  # C and D of S4, biases, norms
            {"params": [], "lr": lr, "weight_decay": weight_decay},  # linear maps, embeddings
        ]
        for name, p in self.named_parameters():
            if p in in_mixers and not name.endswith((".C", ".D_skip")):
                group = 0
            elif p in in_mixers or p.ndim < 2:
                group = 1
            else:
                group = 2
            groups[group]["params"].append(p)
        return groups


# ---------------------------------------------------------------- self-check


def rel_err(a, b):
    """max|a - b| / max|b|."""
    a = torch.as_tensor(a, dtype=torch.float64).detach().cpu()
    b = torch.as_tensor(b, dtype=torch.float64).detach().cpu()
    assert a.shape == b.shape and b.abs().max() > 0, (a.shape, b.shape)
    return float((a - b).abs().max() / b.abs().max())


def self_check(dtype=torch.float64, device="cpu"):
    """Compare attention, RoPE and the cache with slower forms. Returns [(name, error, limit)]."""
    limit = 1e-12 if dtype == torch.float64 else 1e-5
    torch.manual_seed(0)
    like = {"dtype": dtype, "device": device}
    q = torch.randn(2, 4, 33, 8, **like)
    k = torch.randn(2, 1, 33, 8, **like)  # one head for all heads of q
    v = torch.randn(2, 1, 33, 8, **like)
    keep = torch.ones(2, 33, dtype=torch.bool, device=device)
    keep[1, 20:] = False  # so this sequence sees none of keys 25 .. 32, the second block below
    arrays = [x.double().cpu().numpy() for x in (q, k, v)]
    keep_ref = keep[:, None].cpu().numpy()  # (B, 1, L), for all heads
    pairs = {}
    for kind in ("full", "causal"):
        causal = kind == "causal"
        out, lse = attention_ref(*arrays, causal, keep_ref)
        slow = attention_slow(q, k, v, causal, keep)
        online, online_lse = attention_online(q, k, v, causal, keep, tile=7)
        fused = attention(q, k, v, causal, keep)
        pairs[f"{kind}: written out == definition"] = slow, out
        pairs[f"{kind}: online softmax == definition"] = online, out
        pairs[f"{kind}: log-sum-exp == definition"] = online_lse, lse
        pairs[f"{kind}: fused kernel == definition"] = fused, out

    k1, k2 = k.split([25, 8], dim=2)
    v1, v2 = v.split([25, 8], dim=2)
    keep1, keep2 = keep.split([25, 8], dim=1)
    near = attention_online(q, k1, v1, keep=keep1)
    far = attention_online(q, k2, v2, keep=keep2)
    merged, _ = merge(*near, *far)
    pairs["merged blocks of keys == all keys"] = merged, attention_slow(q, k, v, keep=keep)

    x = torch.randn(2, 33, 16, **like)
    positions = torch.arange(1000, 1033, device=device)
    rotated = rotate(x[:, None], positions)  # (B, 1, 33, 16)
    array = x[0].double().cpu().numpy()
    pairs["RoPE == definition"] = rotated[0, 0], rotate_ref(array, positions.tolist())
    layer = Attention(16, 4, causal=True, n_kv_heads=2, rope=True).to(x)
    y = layer(x)
    state = layer.initial_state(2, capacity=4)
    _, state = layer.prefill(x[:, :9], state)
    y_prefill, state = layer.prefill(x[:, 9:32], state)
    y_step, state = layer.step(x[:, 32], state)
    pairs["prefill == forward"] = y_prefill, y[:, 9:32]
    pairs["step == forward"] = y_step, y[:, 32]
    return [(name, rel_err(*pair), limit) for name, pair in pairs.items()]


def print_table(rows):
    """Print (name, error, limit) rows; return True if every error is within its limit."""
    ok = True
    for name, error, limit in rows:
        passed = error <= limit  # False for nan
        print(f"  {name:<50}{error:9.1e}{limit:9.0e}   {'ok' if passed else 'FAILED'}")
        ok = ok and passed
    return ok


# ---------------------------------------------------------------- demo, command line


def demo(device, L=64, steps=200):
    """Learn to repeat a word of L/2 random symbols; chance is 1/16."""
    torch.manual_seed(0)
    config = TransformerConfig(d_model=32, n_heads=2, vocab_size=16, causal=True, rope=True)
    model = Transformer(config).to(device)
    head = nn.Linear(32, 16).to(device)
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    for _ in range(steps):
        word = torch.randint(16, (32, L // 2), device=device)
        features = model(torch.cat([word, word], 1))  # (B, L, D)
        logits = head(features[:, L // 2 - 1 : -1])  # (B, L/2, 16), for the repetition
        loss = F.cross_entropy(logits.mT, word)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = (logits.argmax(-1) == word).double().mean().item()
    print(f"demo: {steps} steps; {right:.1%} of {L // 2} symbols seen once are repeated correctly")

    return right >= 0.99


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="run the checks only")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device on this machine")
    print(f"attention.py  torch {torch.__version__}  device {args.device}")
    ok = print_table(self_check(torch.float64, args.device))
    if not args.check:
        ok = demo(args.device) and ok
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
