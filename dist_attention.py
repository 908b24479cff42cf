"""Exact attention over several processes (ranks), each of which holds a part of the sequence.

Softmax attention to all keys is merged from attention (out_b, lse_b) to the keys of each rank:

    lse' = log(e^lse + e^lse_b),  out' = out sigmoid(lse - lse_b) + out_b sigmoid(lse_b - lse)

A view of attention at a million tokens: He and Kabic 2023, arXiv:2302.06218v3 (abstract).  Ring:
Liu et al. 2023, arXiv:2310.01889v4.  All-to-all: Jacobs et al. 2023, arXiv:2309.14509v2 (Ulysses).

    symbol    code name     shape
    Q         q             (B, H, n, E), the n tokens of this rank
    K, V      k, v          (B, G, m, E), G divides H; on their way kv (2, B, G, m, E)
    W, rank   world, rank   number of processes, index of this one
    lse       lse           (B, H, n) natural log of the summed weights, at least float32
              layout        "contiguous" or "zigzag": which rank holds which tokens
              keep          (B, m) bool, True = real token

    schedule              bytes sent per rank: forward; backward        holds
    ring_attention        (W-1) 2BnGEe;  (W-1) 2BnGE (e + 4)            two shards of keys, values
    allgather_attention   (W-1) 2BnGEe;  the same                       all keys and values
    ulysses_attention     (W-1)/W BnE (2H + 2G) e;  the same            H/W heads of all tokens

e is the element size.  Inputs may be bfloat16: they are sent as such, while sums are kept (in the
ring: sent, too) in float32.  Results agree across numbers of ranks up to rounding.

To train a model whose blocks have a `mixer` (attention, S4, SGConv) on shards of its sequences:

    spread(model, "ring", layout)
    h = model(own_tokens(tokens, layout), positions=positions(L, rank, world, layout))  # (B, n, D)
    mean = SumOverRanks.apply(h.sum(1)) / L  # (B, D), the same on every rank
    loss.backward()  # a loss that all ranks have must count on one of them only
    sum_gradients(model.parameters())

Not included: dropout, windows, additive bias, packed sequences, gradients of lse.

    python dist_attention.py                                       one process, no communication
    torchrun --standalone --nproc-per-node 2 dist_attention.py     check table, 131,072 tokens
    torchrun --standalone --nproc-per-node 2 dist_attention.py --tokens 1000000
"""

import argparse
import contextlib
import copy
import json
import math
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.func import functional_call

# ---------------------------------------------------------------- reference: numpy, float64


def block_ref(q, k, v, q_at, k_at, causal):
    """(out, lse) of one head for one block of keys; q_at, k_at: positions of queries and keys."""
    scores = q @ k.T / math.sqrt(q.shape[1])  # (n, E) x (E, m) -> (n, m)
    if causal:
        scores = np.where(k_at[None, :] <= q_at[:, None], scores, -np.inf)
    largest = scores.max(1, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - np.where(np.isinf(largest), 0, largest))  # -inf - -inf: nan
    total = weights.sum(1, keepdims=True)
    out = weights @ v / np.where(total == 0, 1, total)
    with np.errstate(divide="ignore"):
        return out, (largest + np.log(total))[:, 0]


def ring_ref(q, k, v, q_at, k_at, causal=False):
    """The ring as a loop over ranks and steps, one head: q (Lq, E), k, v (Lk, E) -> out (Lq, E).

    q_at, k_at: for each rank, the positions of its queries and keys.  In step s rank r merges the
    keys of rank r - s (arXiv:2310.01889v4, algorithm 1).
    """
    world = len(q_at)
    whole = np.zeros((len(q), v.shape[1]))
    for rank, rows in enumerate(q_at):
        out = np.zeros((len(rows), v.shape[1]))
        lse = np.full(len(rows), -np.inf)
        for step in range(world):
            cols = k_at[(rank - step) % world]
            out_b, lse_b = block_ref(q[rows], k[cols], v[cols], rows, cols, causal)
            total = np.logaddexp(lse, lse_b)
            finite = np.where(np.isinf(total), 0, total)  # -inf: nothing seen yet
            out = out * np.exp(lse - finite)[:, None] + out_b * np.exp(lse_b - finite)[:, None]
            lse = total
        whole[rows] = out
    return whole


# ---------------------------------------------------------------- layouts


def chunks(L, rank, world, layout="contiguous"):
    """The tokens of a rank: consecutive positions [(start, stop), ...], without empty chunks.

    contiguous: chunk r of W.  zigzag: chunks r and 2W-1-r of 2W, which give every rank the same
    work under a causal mask.  Any other layout is a ValueError.
    """
    if layout == "contiguous":
        count = world
        mine = [rank]
    elif layout == "zigzag":
        count = 2 * world
        mine = [rank, 2 * world - 1 - rank]
    else:
        raise ValueError(f"layout {layout!r}: expected 'contiguous' or 'zigzag'")
    bounds = [(L * c // count, L * (c + 1) // count) for c in mine]
    return [(start, stop) for start, stop in bounds if start < stop]


def length(chunks):
    return sum(stop - start for start, stop in chunks)


def tokens_of(chunks):
    """The positions in these chunks, one chunk after the other: (n,) int64."""
    return torch.cat([torch.arange(0), *[torch.arange(start, stop) for start, stop in chunks]])


def positions(L, rank, world, layout="contiguous"):
    """Positions of a rank's tokens in the sequence, in local order: (n,) int64."""
    return tokens_of(chunks(L, rank, world, layout))


def shard(x, rank, world, dim=1, layout="contiguous"):
    """The tokens of a rank, out of the whole x with its tokens along `dim`."""
    return x.index_select(dim, positions(x.shape[dim], rank, world, layout).to(x.device))


def visible_blocks(q_chunks, k_chunks, causal, longest=sys.maxsize):
    """Yield (query slice, key slice, diagonal) in local order, wherever queries see keys.

    Chunks of one layout are equal or disjoint.  So under a causal mask a chunk sees earlier chunks
    fully, itself along the diagonal (query i sees keys 0 .. i), and later chunks not at all.
    longest: cut chunks into pieces of at most so many tokens, to which the same applies.
    """
    for q_start, rows in local_slices(q_chunks, longest):
        for k_start, cols in local_slices(k_chunks, longest):
            if not causal or k_start <= q_start:
                yield rows, cols, causal and k_start == q_start


def local_slices(chunks, longest):
    """Yield (position of the first token, slice in local order) of all pieces."""
    at = 0
    for start, stop in chunks:
        for first in range(start, stop, longest):
            n = min(longest, stop - first)
            yield first, slice(at, at + n)
            at += n


# ---------------------------------------------------------------- one block of queries and keys


def scores_of(q, k, causal, bias):
    """(B, H, n, E) x (B, H, E, m) -> (B, H, n, m); query i sees keys 0 .. i when causal."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    return scores if bias is None else scores + bias


def per_query_head(kv, q):
    """(2, B, G, m, E) -> (2, B, H, m, E)."""
    group = q.shape[1] // max(1, kv.shape[2])
    return kv[:, :, :, None].expand(-1, -1, -1, group, -1, -1).flatten(2, 3)


def attention_slow(q, k, v, causal=False, keep=None):
    """Attention on one process with all scores in memory: what everything else must equal."""
    k, v = per_query_head(torch.stack([k, v]), q)  # (B, H, L, E) each
    bias = None if keep is None else hide(keep, q.dtype)
    return scores_of(q, k, causal, bias).softmax(-1) @ v


def attention_block(q, k, v, causal=False, bias=None):
    """Attention of queries to one block of keys, to be merged with other blocks.  No autograd.

    q: (B, H, n, E), k, v: (B, H, m, E), none empty; causal: query i sees keys 0 .. i, n == m;
    bias: (B, 1, 1, m), -inf hides a key.  Returns out (B, H, n, E) and lse (B, H, n) in float32
    (float64 for float64).
    """
    fused = has_kernel(q, causal, bias)
    q = ready(q, fused)
    k = ready(k, fused)
    v = ready(v, fused)
    if fused:
        return fused_block(q, k, v, causal, bias)
    scores = scores_of(q, k, causal, bias)
    lse = scores.logsumexp(-1)
    finite = lse.masked_fill(lse == -torch.inf, 0)  # -inf - -inf would be nan
    return (scores - finite[..., None]).exp() @ v, lse


def attention_block_grad(grad, q, k, v, out, lse, causal=False, bias=None):
    """Gradients (dq, dk, dv) from one block.  out, lse: of the attention to all keys.

    The weights exp(scores - lse) are those of the whole softmax, so gradients of blocks add up.
    """
    fused = has_kernel(q, causal, bias)
    q = ready(q, fused)
    k = ready(k, fused)
    v = ready(v, fused)
    out = ready(out, fused)
    grad = ready(grad, fused)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # a query that saw nothing has weights 0
    if fused:
        return fused_block_grad(grad, q, k, v, out, lse, causal, bias)
    weights = (scores_of(q, k, causal, bias) - lse[..., None]).exp()  # P (B, H, n, m)
    mean = (grad * out).sum(-1, keepdim=True)  # sum_j P_j dP_j, over the keys of all ranks
    dscores = weights * (grad @ v.mT - mean) / math.sqrt(q.shape[-1])
    return dscores @ k, dscores.mT @ q, weights.mT @ grad


def at_least_float32(dtype):
    return torch.promote_types(dtype, torch.float32)


def ready(x, fused):
    """A tensor as a block computes with it: half precision in the fused kernels of a GPU only."""
    if x.is_cpu or not fused:
        x = x.to(at_least_float32(x.dtype))
    return x if x.stride(-1) == 1 else x.contiguous()  # the kernels silently assume stride 1


def has_kernel(q, causal, bias):
    """True if PyTorch has a fused kernel for these inputs that also returns the log-sum-exp."""
    if q.is_cpu:
        known = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
        return known and not (causal and bias is not None)
    size = q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return q.is_cuda and q.dtype != torch.float64 and size and bias is None


def fused_block(q, k, v, causal, bias):
    """(out, lse) by the kernel of this device."""
    aten = torch.ops.aten
    if q.is_cpu:
        kernel = aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = kernel(q, k, v, 0.0, causal, attn_mask=bias)
        if bias is not None:  # where a query sees no key this kernel returns lse 0
            lse = lse.masked_fill((bias == -torch.inf).all(-1), -torch.inf)
        return out, lse
    if q.dtype == torch.float32:
        kernel = aten._scaled_dot_product_efficient_attention
        out, lse = kernel(q, k, v, None, True, 0.0, causal)[:2]
    else:
        kernel = aten._scaled_dot_product_flash_attention
        out, lse = kernel(q, k, v, 0.0, causal, False)[:2]
    return out.float(), lse[:, :, : q.shape[2]].contiguous()  # lse is padded to 32 rows


def fused_block_grad(grad, q, k, v, out, lse, causal, bias):
    """(dq, dk, dv) by the kernel of this device."""
    aten = torch.ops.aten
    if q.is_cpu:
        kernel = aten._scaled_dot_product_flash_attention_for_cpu_backward
        return kernel(grad, q, k, v, out, lse, 0.0, causal, attn_mask=bias)
    seed = torch.zeros(2, dtype=torch.int64, device=q.device)  # for dropout, which is 0
    if q.dtype == torch.float32:
        kernel = aten._scaled_dot_product_efficient_attention_backward
        lse = F.pad(lse, (0, -lse.shape[2] % 32))
        wanted = [True, True, True, False]
        return kernel(grad, q, k, v, None, out, lse, seed[0], seed[1], 0.0, wanted, causal)[:3]
    kernel = aten._scaled_dot_product_flash_attention_backward
    sizes = None, None, q.shape[2], k.shape[2], 0.0, causal
    return kernel(grad, q, k, v, out, lse, *sizes, seed.view(torch.uint64), seed[0])


def merge(out, lse, out_block, lse_block):  # same as attention.py:merge
    """Combine attention over two disjoint sets of keys into attention over both. Exact.

    out, out_block: (B, H, Lq, E); lse, lse_block: (B, H, Lq), -inf where a query sees no key.
    """
    # e^(lse - total) would put the rounding of total into both weights; the difference does not
    difference = (lse_block - lse).masked_fill(lse_block == -torch.inf, -torch.inf)
    weight = torch.sigmoid(-difference)[..., None]
    weight_block = torch.sigmoid(difference)[..., None]
    out = out * weight + out_block * weight_block
    return out, torch.logaddexp(lse, lse_block)


def hide(keep, dtype):
    """Turn a padding mask (B, L) into a bias (B, 1, 1, L): 0 at real tokens, -inf at padding."""
    bias = torch.zeros(keep.shape, dtype=dtype, device=keep.device)
    return bias.masked_fill(~keep, -torch.inf)[:, None, None, :]


# ---------------------------------------------------------------- the ring


@dataclass(frozen=True)
class Plan:
    """What all ranks agreed on."""

    ranks: "Ranks"
    causal: bool
    q_chunks: list  # for each rank, its chunks
    k_chunks: list
    keep: list  # for each rank, (B, m) bool or None

    def blocks(self, q, owner):
        """Yield (query slice, key slice, diagonal, bias) for this rank's queries, a rank's keys."""
        keep = self.keep[owner]
        bias = None
        if keep is not None and not keep.all():
            bias = hide(keep, at_least_float32(q.dtype))
        longest = 32768  # kernels add up keys one after the other, and their rounding grows
        if not has_kernel(q, self.causal, bias):
            longest = 1024  # the scores of a block are all in memory
        mine = self.q_chunks[self.ranks.rank]
        theirs = self.k_chunks[owner]
        for rows, cols, diagonal in visible_blocks(mine, theirs, self.causal, longest):
            if q.numel():
                yield rows, cols, diagonal, None if bias is None else bias[..., cols]


def accumulate(out, lse, q, kv, plan, owner):
    """Merge attention to the keys of a rank into out (B, H, n, E) and lse (B, H, n), in place."""
    kv = per_query_head(kv, q)
    for rows, cols, diagonal, bias in plan.blocks(q, owner):
        k, v = kv[:, :, :, cols]
        block = attention_block(q[:, :, rows], k, v, diagonal, bias)
        merged = merge(out[:, :, rows], lse[:, :, rows], *block)
        out[:, :, rows], lse[:, :, rows] = merged


def accumulate_grad(dq, grad, q, kv, out, lse, plan, owner):
    """Add what the keys of a rank contribute to dq, in place; return dkv, (2, B, G, m, E)."""
    G = kv.shape[2]
    kv = per_query_head(kv, q)
    dkv = torch.zeros_like(kv, dtype=dq.dtype)
    for rows, cols, diagonal, bias in plan.blocks(q, owner):
        k, v = kv[:, :, :, cols]
        grad_rows = grad[:, :, rows]
        q_rows = q[:, :, rows]
        seen = out[:, :, rows], lse[:, :, rows]
        grads = attention_block_grad(grad_rows, q_rows, k, v, *seen, diagonal, bias)
        dq[:, :, rows] += grads[0]
        dkv[0, :, :, cols] += grads[1]
        dkv[1, :, :, cols] += grads[2]
    return dkv.unflatten(2, (G, q.shape[1] // max(1, G))).sum(3)


def around_the_ring(plan, kv, what):
    """Yield (rank, its kv) in W steps, rank - s in step s, while the next kv is on its way."""
    ranks = plan.ranks
    for step in range(ranks.world):
        owner = (ranks.rank - step) % ranks.world
        going = kv if step < ranks.world - 1 else None  # the last ones have been everywhere
        arriving = ranks.shift(going, length(plan.k_chunks[owner - 1]), f"step {step} of {what}")
        yield owner, kv
        kv = arriving()


class RingAttention(torch.autograd.Function):
    """Queries stay; keys and values go round the ring of ranks."""

    @staticmethod
    def forward(ctx, plan, q, kv):
        """q (B, H, n, E), kv (2, B, G, m, E) -> out (B, H, n, E)."""
        out = torch.zeros_like(q, dtype=at_least_float32(q.dtype))
        # nothing seen yet; float64, or the rounding of many merges would show at 10^6 keys
        lse = out.new_full(q.shape[:3], -torch.inf, dtype=torch.float64)
        for owner, part in around_the_ring(plan, kv, "the ring"):
            accumulate(out, lse, q, part, plan, owner)
        lse = lse.to(out.dtype)
        out = out.to(q.dtype)
        ctx.plan = plan
        ctx.save_for_backward(q, kv, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """Keys and values go round again; the sums of their gradients follow one step behind.

        Each rank keeps the gradients of its own keys, and adds the sums at the end: one hop less.
        """
        q, kv, out, lse = ctx.saved_tensors  # once: activation checkpointing forbids a second time
        plan = ctx.plan
        what = "the ring, backward"
        dq = torch.zeros_like(q, dtype=lse.dtype)
        own_dkv = None
        sums = None
        for owner, part in around_the_ring(plan, kv, what):
            arriving = plan.ranks.shift(sums, length(plan.k_chunks[owner]), what)
            dkv = accumulate_grad(dq, grad, q, part, out, lse, plan, owner)
            earlier = arriving()
            if own_dkv is None:
                own_dkv = dkv
            elif earlier is None:
                sums = dkv
            else:
                sums = dkv + earlier
        last = plan.ranks.shift(sums, kv.shape[3], what)()
        if last is not None:
            own_dkv += last
        return None, dq.to(q.dtype), own_dkv.to(q.dtype)


def ring_attention(q, k, v, causal=False, keep=None, *, group=None, layout="contiguous"):
    """Exact attention over shards, keys and values going round a ring (arXiv:2310.01889v4).

    q: (B, H, n, E), k, v: (B, G, m, E): this rank's tokens in the given layout; n and m may differ
    across ranks and be 0.  causal: queries and keys are of the same tokens.  keep: (B, m) bool.
    Returns (B, H, n, E) in the dtype of q, with gradients.  Every rank of the group must call it,
    forward and backward.  ValueError: ranks disagree (the same message on every rank).  RankLost: a
    rank died or is silent.
    """
    plan = agree_on_attention("ring", q, k, v, causal, keep, group, layout)
    return RingAttention.apply(plan, q, torch.stack([k, v]))


# ---------------------------------------------------------------- all-gather and all-to-all


class Swap(torch.autograd.Function):
    """Send parts[p] to rank p and receive one of shapes[p] from it; gradients go the other way."""

    @staticmethod
    def forward(ctx, ranks, what, shapes, *parts):
        ctx.arguments = ranks, f"{what}, backward", [part.shape for part in parts]
        return tuple(ranks.swap(parts, shapes, what))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        ranks, what, shapes = ctx.arguments
        return None, None, None, *ranks.swap(grads, shapes, what)


def allgather_attention(q, k, v, causal=False, keep=None, *, group=None, layout="contiguous"):
    """Exact attention over shards, all keys and values on every rank.  As `ring_attention`."""
    plan = agree_on_attention("allgather", q, k, v, causal, keep, group, layout)
    ranks = plan.ranks
    kv = torch.stack([k, v])
    shapes = [(*kv.shape[:3], length(chunks), kv.shape[4]) for chunks in plan.k_chunks]
    parts = Swap.apply(ranks, "the all-gather", shapes, *[kv] * ranks.world)
    if keep is not None:
        keep = torch.cat(plan.keep, 1)
    everything = list(chain(*plan.k_chunks))
    alone = Plan(Ranks(), causal, [plan.q_chunks[ranks.rank]], [everything], [keep])
    return RingAttention.apply(alone, q, torch.cat(parts, 3))


def to_channels(x, ranks, chunks, shares):
    """Own tokens of all channels to all tokens of own channels: (n, C, ...) -> (L, C_r, ...).

    chunks: for each rank, the chunks that it holds.  shares: for each rank, its number of channels.
    """
    shapes = [(length(own), shares[ranks.rank], *x.shape[2:]) for own in chunks]
    parts = Swap.apply(ranks, "the all-to-all", shapes, *x.split(shares, 1))
    return in_order(parts, chunks, 0)


def to_tokens(x, ranks, chunks, shares):
    """The inverse of `to_channels`: (L, C_r, ...) -> (n, C, ...)."""
    shapes = [(length(chunks[ranks.rank]), share, *x.shape[2:]) for share in shares]
    by_rank = x.index_select(0, tokens_of(chain(*chunks)).to(x.device))
    parts = by_rank.split([length(own) for own in chunks])
    return torch.cat(Swap.apply(ranks, "the all-to-all", shapes, *parts), 1)


def even_shares(C, world):
    """C channels over all ranks, as evenly as possible."""
    return [C * (r + 1) // world - C * r // world for r in range(world)]


def ulysses_attention(q, k, v, causal=False, keep=None, *, group=None, layout="contiguous"):
    """Exact attention over shards: every rank gets all tokens of H/W heads (arXiv:2309.14509v2).

    As `ring_attention`.  A key head stays with its query heads; with fewer key heads than ranks
    some ranks have nothing to compute.
    """
    plan = agree_on_attention("ulysses", q, k, v, causal, keep, group, layout)
    ranks = plan.ranks
    kv_shares = even_shares(k.shape[1], ranks.world)
    q_shares = [share * (q.shape[1] // k.shape[1]) for share in kv_shares]
    q = to_channels(q.permute(2, 1, 0, 3), ranks, plan.q_chunks, q_shares)  # (L, H_r, B, E)
    kv = torch.stack([k, v]).permute(3, 2, 0, 1, 4)
    kv = to_channels(kv, ranks, plan.k_chunks, kv_shares)  # (L, G_r, 2, B, E)
    if keep is not None:
        keep = in_order(plan.keep, plan.k_chunks, 1)  # (B, L)
    q = q.permute(2, 1, 0, 3)  # (B, H_r, L, E)
    kv = kv.permute(2, 3, 1, 0, 4)  # (2, B, G_r, L, E)
    Lq = q.shape[2]
    Lk = kv.shape[3]
    alone = Plan(Ranks(), causal, [[(0, Lq)]], [[(0, Lk)]], [keep])
    out = RingAttention.apply(alone, q, kv)
    out = to_tokens(out.permute(2, 1, 0, 3), ranks, plan.q_chunks, q_shares)  # (n, H, B, E)
    return out.permute(2, 1, 0, 3)


# ---------------------------------------------------------------- whole models over shards


def ulysses(mixer, group=None, layout="contiguous"):
    """Let a channel-wise mixer work on shards: each rank runs all tokens of D/W channels.  Exact.

    mixer: a module (B, L, D), keep -> (B, L, D) with `d_model`, whose channels never meet, such as
    S4 or SGConv.  Returns it with forward x (B, n, D), keep (B, n) bool -> (B, n, D).  Channels are
    axis 0 of its parameters and buffers, or as its class says in `channel_axes`; a rank gets the
    gradients of its own channels only (see `sum_gradients`).  Errors as `ring_attention`.
    """
    kind = type(mixer).__name__
    if list(mixer.children()):
        raise ValueError(f"{kind} has modules inside, whose channels may meet")
    for name, x, axis in channel_tensors(mixer):
        if not -x.ndim <= axis < x.ndim or x.shape[axis] != mixer.d_model:
            problem = f"{name} {tuple(x.shape)}: axis {axis} is not d_model {mixer.d_model} long"
            raise ValueError(f"{problem}; name the axis of its channels in {kind}.channel_axes")
    mixer.forward = partial(mix, mixer, group, layout)
    return mixer


def channel_tensors(mixer):
    """Yield (name, tensor, channel axis) of all parameters and buffers."""
    axes = getattr(mixer, "channel_axes", {})
    for name, x in [*mixer.named_parameters(), *mixer.named_buffers()]:
        yield name, x, axes.get(name, 0)


def mix(mixer, group, layout, x, keep=None):
    """Forward of a mixer over shards."""
    ranks = ranks_of(group, x.device)
    D = mixer.d_model
    problem = None
    if x.ndim != 3 or x.shape[2] != D:
        problem = f"expected x (B, n, {D}), got {tuple(x.shape)}"
    elif D < ranks.world:
        problem = f"{D} channels are fewer than {ranks.world} ranks"
    facts = {"batch B": len(x), "dtype": str(x.dtype), "keep": keep is not None}
    facts["gradient of x"] = needs_grad(x)
    (chunks,) = agree(ranks, layout, problem, facts, [x.shape[1]])
    if keep is not None:
        keep = in_order(ranks.gather(keep, chunks, 1), chunks, 1)  # (B, L)
    shares = even_shares(D, ranks.world)
    u = to_channels(x.permute(1, 2, 0), ranks, chunks, shares).permute(2, 0, 1)  # (B, L, D_r)

    part = copy.copy(mixer)
    part.__dict__.pop("forward", None)  # that is `mix`
    part.d_model = shares[ranks.rank]
    first = sum(shares[: ranks.rank])
    views = {}
    for name, tensor, axis in channel_tensors(mixer):
        views[name] = tensor.narrow(axis, first, part.d_model)
    y = functional_call(part, views, (u, keep))  # (B, L, D_r)
    return to_tokens(y.permute(1, 2, 0), ranks, chunks, shares).permute(2, 0, 1)


SCHEDULES = {
    "ring": ring_attention,
    "allgather": allgather_attention,
    "ulysses": ulysses_attention,
}


def spread(model, how, layout="contiguous"):
    """Let the mixers of model.blocks work on shards; parameters and their names stay the same.

    how: the schedule, a key of SCHEDULES, of mixers with an attention function `attend`.  All other
    mixers are cut by channels (see `ulysses`).
    """
    if how not in SCHEDULES:
        raise ValueError(f"schedule {how!r}: expected one of {', '.join(SCHEDULES)}")
    for block in model.blocks:
        if hasattr(block.mixer, "attend"):
            block.mixer.attend = partial(SCHEDULES[how], layout=layout)
        else:
            ulysses(block.mixer, layout=layout)
    return model


def own_tokens(x, layout="contiguous"):
    """The tokens of this rank of the default group: (B, L, ...) -> (B, n, ...)."""
    ranks = ranks_of(None, x.device)
    return shard(x, ranks.rank, ranks.world, 1, layout)


class SumOverRanks(torch.autograd.Function):
    """Sum x over the ranks of the default group; the gradient is summed over the ranks too."""

    @staticmethod
    def forward(ctx, x):
        return all_reduce(x)

    @staticmethod
    def backward(ctx, grad):
        return all_reduce(grad)


def all_reduce(x, group=None, op=dist.ReduceOp.SUM):
    """The sum of x over all ranks, or their maximum."""
    total = x.clone(memory_format=torch.contiguous_format)
    if dist.is_initialized():
        with lost("no answer from another rank in a sum over all ranks"):
            dist.all_reduce(total, op, group)
    return total


def sum_gradients(parameters, group=None):
    """Sum the gradients over ranks, each of which saw its own tokens or channels only."""
    parameters = list(parameters)
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    flat = torch.cat([p.grad.flatten() for p in parameters])
    totals = all_reduce(flat, group).split([p.numel() for p in parameters])
    for p, total in zip(parameters, totals, strict=True):
        p.grad.copy_(total.view_as(p))


# ---------------------------------------------------------------- messages


class RankLost(RuntimeError):
    """Another rank died, or kept silent longer than the group's timeout."""


@contextlib.contextmanager
def lost(text):
    """Turn an error of the transport into a RankLost with one line."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise RankLost(f"{text}: {reason}") from error


traffic = Counter()  # "messages" and "bytes" of floating-point data that this process has sent


@dataclass(frozen=True)
class Ranks:
    """The processes of a group and messages between them; by default this process alone."""

    rank: int = 0
    world: int = 1
    group: object = None
    staged: object = "cpu"  # the device where messages lie while they travel

    def exchange(self, sends, shapes, what):
        """Start sending {rank: tensor} and receiving a tensor of each {rank: shape}, of one dtype.

        Returns wait(), which returns {rank: tensor}.
        """
        like = next(iter(sends.values()))
        incoming = {}
        ops = []
        for peer, x in sends.items():
            x = x.contiguous().to(self.staged)
            ops.append(self.op(dist.isend, x, peer))
            if x.numel() and x.is_floating_point():
                traffic.update(messages=1, bytes=x.nbytes)
        for peer, shape in shapes.items():
            incoming[peer] = torch.empty(shape, dtype=like.dtype, device=self.staged)
            ops.append(self.op(dist.irecv, incoming[peer], peer))
        ops = [op for op in ops if op.tensor.numel()]
        batches = [ops] if ops else []  # NCCL needs all messages of a step together
        if self.staged == "cpu":
            batches = [[op] for op in ops]  # one by one, so that an error names the lost rank
        started = []
        for batch in batches:
            whom = " or ".join(f"rank {peer}" for peer in sorted({op.group_peer for op in batch}))
            text = f"rank {self.rank} of {self.world}: no answer from {whom} in {what}"
            with lost(text):
                started.append((text, batch, dist.batch_isend_irecv(batch)))

        def wait():
            for text, _, works in started:
                with lost(text):
                    for work in works:
                        work.wait()
            return {peer: x.to(like.device) for peer, x in incoming.items()}

        return wait

    def op(self, call, x, peer):
        # with its size as tag: gloo aborts on longer messages, and takes shorter ones silently
        return dist.P2POp(call, x, group=self.group, tag=x.nbytes % 2**31, group_peer=peer)

    def shift(self, x, tokens, what):
        """Send x (2, B, G, m, E) to the next rank, receive `tokens` tokens from the previous one.

        Returns wait(), which returns what came.  x None: nothing is sent, None comes.
        """
        if x is None:
            return lambda: None
        previous = (self.rank - 1) % self.world
        shape = (*x.shape[:3], tokens, x.shape[4])
        following = (self.rank + 1) % self.world
        wait = self.exchange({following: x}, {previous: shape}, what)
        return lambda: wait()[previous]

    def swap(self, parts, shapes, what):
        """Send parts[p] to rank p, receive a tensor of shapes[p] from it: a list over ranks."""
        others = [peer for peer in range(self.world) if peer != self.rank]
        came = {self.rank: parts[self.rank]}
        if others:
            sends = {peer: parts[peer] for peer in others}
            comes = {peer: shapes[peer] for peer in others}
            came.update(self.exchange(sends, comes, what)())
        return [came[peer] for peer in range(self.world)]

    def gather(self, x, chunks, dim):
        """Each rank's x, with its tokens along dim: a list over ranks."""
        shapes = [(*x.shape[:dim], length(own), *x.shape[dim + 1 :]) for own in chunks]
        return self.swap([x] * self.world, shapes, "a gather")


def ranks_of(group, device):
    """The Ranks of a group (None: of all processes), for tensors on this device."""
    if not dist.is_initialized():
        return Ranks()
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("this rank does not belong to the group")
    staged = "cpu" if dist.get_backend(group) == "gloo" else device
    return Ranks(rank, dist.get_world_size(group), group, staged)


def in_order(parts, chunks, dim):
    """The whole sequence, from each rank's tokens along dim."""
    whole = torch.cat(parts, dim)
    order = tokens_of(chain(*chunks)).argsort()
    return whole.index_select(dim, order.to(whole.device))


def unshard(x, dim=1, group=None, layout="contiguous"):
    """The whole sequence on every rank, from the shards x.  For inspection: no gradient."""
    ranks = ranks_of(group, x.device)
    x = x.detach().movedim(dim, 0)
    facts = {"call": "unshard", "dtype": str(x.dtype), "shape of a token": list(x.shape[1:])}
    (chunks,) = agree(ranks, layout, None, facts, [len(x)])
    return in_order(ranks.gather(x, chunks, 0), chunks, 0).movedim(0, dim)


# ---------------------------------------------------------------- the handshake before every call


def agree(ranks, layout, problem, facts, lengths):
    """Raise the same ValueError on all ranks unless all state the same facts, and no problem.

    lengths: numbers of tokens.  Returns for each of them the chunks of all ranks.  Mismatched sizes
    would corrupt or crash the transport, so every call starts with this.
    """
    chunks(0, 0, 1, layout)  # ValueError for an unknown layout
    text = json.dumps([problem, facts | {"layout": layout}, lengths]).encode()
    message = torch.frombuffer(bytearray(text.ljust(4096)), dtype=torch.uint8)
    shapes = [message.shape] * ranks.world
    came = ranks.swap([message] * ranks.world, shapes, "the handshake")
    problems, facts, lengths = zip(*[json.loads(bytes(x.tolist())) for x in came], strict=True)
    found = [f"rank {rank}: {problem}" for rank, problem in enumerate(problems) if problem]
    if found:
        raise ValueError("; ".join(found))
    for name in facts[0]:
        values = [str(stated.get(name)) for stated in facts]
        usual = Counter(values).most_common(1)[0][0]  # of a tie, that of the lower rank
        odd = [f"rank {rank} has {x}" for rank, x in enumerate(values) if x != usual]
        if odd:
            raise ValueError(f"{name}: {', '.join(odd)}, the others have {usual}")
    agreed = []
    for held in zip(*lengths, strict=True):
        agreed.append([chunks(sum(held), rank, ranks.world, layout) for rank in range(ranks.world)])
        given = [length(own) for own in agreed[-1]]
        if given != list(held):
            raise ValueError(f"ranks hold {list(held)} tokens; layout {layout} gives them {given}")
    return agreed


def agree_on_attention(schedule, q, k, v, causal, keep, group, layout):
    """Check the arguments on all ranks; return the Plan."""
    ranks = ranks_of(group, q.device)
    problem = find_problem(q, k, v, keep)
    facts = {}
    lengths = [0, 0]
    if problem is None:
        lengths = [q.shape[2], k.shape[2]]
        facts = {
            "schedule": schedule,
            "causal": bool(causal),
            "keep": keep is not None,
            "dtype": str(q.dtype),
            "batch B, query heads H, head size E": [q.shape[0], q.shape[1], q.shape[3]],
            "key heads G": k.shape[1],
            "gradients of q, k, v": [needs_grad(x) for x in (q, k, v)],
        }
    q_chunks, k_chunks = agree(ranks, layout, problem, facts, lengths)
    if causal and q_chunks != k_chunks:
        sizes = f"{length(chain(*q_chunks))} and {length(chain(*k_chunks))}"
        raise ValueError(f"a causal mask needs as many queries as keys, got {sizes}")
    keep = [None] * ranks.world if keep is None else ranks.gather(keep, k_chunks, 1)
    return Plan(ranks, causal, q_chunks, k_chunks, keep)


def find_problem(q, k, v, keep):
    """What is wrong with the arguments of this rank, or None."""
    same = q.ndim == k.ndim == 4 and k.shape == v.shape and q.shape[::3] == k.shape[::3]  # B, E
    if not same or q.shape[1] % max(1, k.shape[1]):
        got = f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        return f"expected q (B, H, n, E), k and v (B, G, m, E), G divides H, got {got}"
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        return f"expected one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}"
    if keep is not None and (keep.dtype != torch.bool or keep.shape != (len(k), k.shape[2])):
        return f"expected keep {(len(k), k.shape[2])} bool, got {tuple(keep.shape)} {keep.dtype}"
    return None


def needs_grad(x):
    """Whether backward will be called: ranks that differ would wait for each other there."""
    return x.requires_grad and torch.is_grad_enabled()


# ---------------------------------------------------------------- processes

long_waits = None  # the group of `wait_for_rank0`


@contextlib.contextmanager
def process_group(device="cpu", timeout=60.0):
    """Join the ranks that torchrun or a scheduler started; without them do nothing.

    NCCL if every rank has a GPU of its own, else gloo (through host memory).  timeout: seconds
    until a silent rank counts as lost.  Where ranks wait longer by design, see `wait_for_rank0`.
    Yields (rank, world, device of this rank).
    """
    global long_waits
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        yield 0, 1, torch.device(device)
        return
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", rank))  # without it: all on one machine
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    backend = "gloo"
    if device == "cuda":
        if torch.cuda.device_count() >= local_world:
            backend = "nccl"
        device = f"cuda:{local_rank % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    with lost(f"rank {rank} of {world}: could not join the others"):
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
        long_waits = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    try:
        yield rank, world, torch.device(device)
        wait_for_rank0()
    finally:
        dist.destroy_process_group()


def wait_for_rank0():
    """Wait until all ranks have called this, up to a day: for loading and saving on rank 0 alone.

    Any other message counts its sender as lost after the timeout of `process_group`.
    """
    if dist.is_initialized():
        with lost("another rank was lost while this one waited"):
            dist.barrier(long_waits)


# ---------------------------------------------------------------- self-check


def rel_err(a, b):
    """max|a - b| / max|b|, the only error measure in this file."""
    a = torch.as_tensor(a, dtype=torch.float64).detach().cpu()
    b = torch.as_tensor(b, dtype=torch.float64).detach().cpu()
    assert a.shape == b.shape and b.abs().max() > 0, (a.shape, b.shape)
    return float((a - b).abs().max() / b.abs().max())


def print_table(rows):
    """Print (name, error, limit) rows; return True if every error is within its limit."""
    ok = True
    for name, error, limit in rows:
        passed = error <= limit  # False for nan
        print(f"  {name:<50}{error:9.1e}{limit:9.0e}   {'ok' if passed else 'FAILED'}")
        ok = ok and passed
    return ok


def worst(errors, device):
    """The largest error of any rank; nan counts as infinite."""
    largest = max(math.inf if math.isnan(error) else error for error in errors)
    error = torch.tensor(largest, dtype=torch.float64, device=device)
    return all_reduce(error, op=dist.ReduceOp.MAX).item()


def check_case(attend, layout, causal, dtype, device, lengths=(45, 45), heads=(4, 2), padded=False):
    """Largest error of out, dq, dk, dv on any rank against one process, random output gradient."""
    ranks = ranks_of(None, device)
    random = np.random.RandomState(0)

    def draw(i):
        x = random.randn(2, heads[i], lengths[i], 16)
        return torch.from_numpy(x).to(device, dtype)

    q_k_v = [draw(0), draw(1), draw(1)]
    grad = draw(0)
    keep = None
    if padded:  # half of the second example
        keep = torch.ones(2, lengths[1], dtype=torch.bool, device=device)
        keep[1, lengths[1] // 2 :] = False
    exact = [x.double().requires_grad_() for x in q_k_v]
    out = attention_slow(*exact, causal, keep)
    expected = [out, *torch.autograd.grad(out, exact, grad.double())]

    def mine(x, dim=2):
        return shard(x.detach(), ranks.rank, ranks.world, dim, layout)

    own = [mine(x).requires_grad_() for x in q_k_v]
    own_keep = None if keep is None else mine(keep, 1)
    out = attend(*own, causal, own_keep, layout=layout)
    got = [out, *torch.autograd.grad(out, own, mine(grad))]
    errors = [0.0]
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == dtype and y.abs().max() > 0
        if x.numel():
            error = (x.detach() - mine(y)).abs().max() / y.detach().abs().max()
            errors.append(error.item())
    return worst(errors, device)


LIMITS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3}  # of relative errors


def self_check(dtype=torch.float64, device="cpu"):
    """Output and all gradients on every rank against one process: [(name, error, limit)].

    Every rank of the default group must call it; all get the same rows.
    """
    random = np.random.RandomState(0)
    q, k, v = random.randn(3, 29, 8)
    at = [positions(29, rank, 3, "zigzag").numpy() for rank in range(3)]
    everything = np.arange(29)
    whole, _ = block_ref(q, k, v, everything, everything, True)
    ring = ring_ref(q, k, v, at, at, True)
    rows = [("reference: ring of 3 ranks == one block", rel_err(ring, whole), 1e-12)]
    cases = [
        ("contiguous", "contiguous", False, {}),
        ("contiguous, causal", "contiguous", True, {}),
        ("zigzag", "zigzag", False, {}),
        ("zigzag, causal", "zigzag", True, {}),
        ("padded", "zigzag", False, {"padded": True}),
        ("padded, causal", "zigzag", True, {"padded": True}),
        ("fewer keys than queries", "zigzag", False, {"lengths": (45, 18)}),
        ("two tokens", "zigzag", True, {"lengths": (2, 2)}),
        ("one key head", "zigzag", True, {"heads": (3, 1)}),
    ]
    for schedule, attend in SCHEDULES.items():
        for name, layout, causal, options in cases:
            error = check_case(attend, layout, causal, dtype, device, **options)
            rows.append((f"{schedule}, {name}", error, LIMITS[dtype]))
    return rows


# ---------------------------------------------------------------- a long run


def random_tokens(seed, start, stop, heads, d_head, block=4096):
    """Tokens start .. stop of a random sequence: (1, heads, n, E), the same on any rank."""
    parts = []
    for b in range(start // block, -(-stop // block)):
        # numpy: torch's CPU generator keeps only 32 bits of its seed
        random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(b,)))
        x = random.standard_normal((heads, block, d_head), dtype=np.float32)
        parts.append(torch.from_numpy(x[:, max(0, start - b * block) : stop - b * block]))
    return torch.cat(parts, 1)[None]


def sampled_error(q, out, at, rows, part=65536):
    """Largest error of some rows of causal attention, against float64.

    at: the positions of q.  Keys and values are drawn again, part by part.
    """
    heads = q.shape[1]
    E = q.shape[3]
    starts = range(0, int(at[rows].max()) + 1, part)
    q_rows = q[0, :, rows].double().cpu() / math.sqrt(E)  # (H, R, E)
    scores = []
    for start in starts:
        k = random_tokens(1, start, start + part, heads, E)[0].double()
        future = torch.arange(start, start + part) > at[rows][:, None]
        scores.append((q_rows @ k.mT).masked_fill(future, -torch.inf))
    weights = torch.cat(scores, -1).softmax(-1).split(part, -1)  # (H, R, part) each
    expected = torch.zeros_like(q_rows)
    for start, weight in zip(starts, weights, strict=True):
        expected += weight @ random_tokens(2, start, start + part, heads, E)[0].double()
    return max(rel_err(out[0, :, row], expected[:, i]) for i, row in enumerate(rows))


def run(tokens, heads, d_head, device, rank, world):
    """Causal zigzag ring attention to random tokens, once; some rows are checked in float64."""
    own = chunks(tokens, rank, world, "zigzag")
    q_k_v = []
    for seed in (0, 1, 2):
        parts = [random_tokens(seed, start, stop, heads, d_head) for start, stop in own]
        q_k_v.append(torch.cat(parts, 2).to(device))
    traffic.clear()
    start = time.perf_counter()
    cpu = time.process_time()
    with torch.no_grad():
        out = ring_attention(*q_k_v, causal=True, layout="zigzag")
    if out.is_cuda:
        torch.cuda.synchronize()
    wall = time.perf_counter() - start
    cpu = time.process_time() - cpu
    at = tokens_of(own)
    rows = sorted({0, len(at) // 3, len(at) // 2, len(at) - 1})
    what = f"{tokens:,} tokens, {heads} head of {d_head}, causal, zigzag ring, {world} ranks of"
    return {
        "setting": f"{what} {torch.get_num_threads()} threads, float32, {out.device.type}",
        "wall": worst([wall], device),
        "cpu": worst([cpu], device),  # of one rank
        "flop": 2 * tokens * (tokens + 1) * heads * d_head,  # of all ranks
        "bytes": traffic["bytes"],
        "messages": traffic["messages"],
        "rows": len(rows),
        "error": worst([sampled_error(q_k_v[0], out, at, rows)], device),
    }


def print_run(row):
    """Print what `run` returned."""
    speed = row["flop"] / row["wall"] / 1e9
    sent = row["bytes"] / 1e6
    print(row["setting"])
    print(f"  {row['wall']:.2f} s wall, {speed:.1f} Gflop/s in all")
    print(f"  per rank: {row['cpu']:.2f} s CPU, {sent:.1f} MB sent in {row['messages']} messages")
    print(f"  {row['rows']} rows per rank against float64: {row['error']:.1e}", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="print the check table only")
    parser.add_argument("--tokens", type=int, default=131_072, help="length of the long run")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--timeout", type=float, default=60, help="seconds until a rank is lost")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device on this machine")
    if args.tokens < 2 * int(os.environ.get("WORLD_SIZE", 1)):
        parser.error(f"--tokens {args.tokens}: expected at least 2 per rank")
    with process_group(args.device, args.timeout) as (rank, world, device):
        rows = self_check(device=device)
        ok = all(error <= limit for _, error, limit in rows)
        if rank == 0:
            print(f"dist_attention.py  torch {torch.__version__}  {device}  {world} ranks")
            print_table(rows)
        if not args.check:
            row = run(args.tokens, 1, 64, device, rank, world)
            ok = ok and row["error"] <= LIMITS[torch.float32]
            if rank == 0:
                print_run(row)
    return 0 if ok else 1


def guarded(call, *args):
    """Return call(*args); if ranks disagree or one is lost, print one line and exit with 1."""
    try:
        return call(*args)
    except (ValueError, RankLost) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # threads of the transport may still wait for the lost rank


if __name__ == "__main__":
    sys.exit(guarded(main))
