"""Exact attention over several processes (ranks), each of which holds a part of the sequence.

In the ring, a rank keeps its queries and meets the keys of all ranks, block after block.  What it
has seen so far, (out, lse), begins as (0, -inf), and attention (out_b, lse_b) to one more block
changes it to

    lse' = log(e^lse + e^lse_b),  out' = out e^(lse - lse') + out_b e^(lse_b - lse')

Motivation: He and Kabic 2023, arXiv:2302.06218v3, abstract (distributed attention for 10^6 tokens).
Algorithms: ring, Liu et al. 2023, arXiv:2310.01889v4; all-to-all, Jacobs et al. 2023,
arXiv:2309.14509v2 (Ulysses).


    paper  code     shape or meaning (B sequences, H heads of size E, e bytes per number)
    Q      q        (B, H, n, E), the n tokens of this rank
    K, V   k, v     (B, G, m, E), G divides H, the m keys of this rank; sent as kv (2, B, G, m, E)
    lse    lse      (B, H, n), log-sum-exp of the scores, at least float32
           rank     index of this process, one of W (world)
           layout   "contiguous" or "zigzag": which rank holds which tokens, as chunks (start, stop)
           keep     (B, m) bool, True = real token

    schedule              bytes sent per rank: forward; backward        holds in forward
    ring_attention        (W-1) 2BmGEe;  (W-1) 2BmGE (e + s)            three shards of keys, values
    allgather_attention   (W-1) 2BmGEe;  the same                       all keys and values
    ulysses_attention     (W-1)/W BE (2nH + 2mG) e;  the same           H/W heads of all tokens

bfloat16 inputs are sent as bfloat16.  Sums are at least float32, also those that travel in the
ring's backward pass (s bytes per number: 4, or 8 for float64).  Exception: the backward pass of
all-gather adds the W gradients of a shard in the dtype of k.  Results agree across numbers of ranks
up to rounding.

To train: `spread` lets a model read shards, each rank calls backward on its part of the loss, and
`sum_gradients` adds the gradients up; examples/ring_training.py is a whole script.  If all ranks
compute the same loss, from a mean over all tokens (`SumOverRanks`), it must be counted once: every
rank calls (loss * (rank == 0)).backward().

Not included: dropout, windows, additive bias, packed sequences, gradients of lse; second
derivatives raise ValueError.

    python dist_attention.py                                       one process, no communication
    torchrun --standalone --nproc-per-node 2 dist_attention.py     check table, 131,072 tokens
    torchrun --standalone --nproc-per-node 2 dist_attention.py --tokens 1048576
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
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.func import functional_call

# ---------------------------------------------------------------- reference: numpy, float64


def ring_ref(q, k, v, at, causal=False):
    """Ring attention as one loop over steps and ranks, one head: q, k, v (L, E) -> (L, E).

    at: for each rank, the positions of its tokens.  In step s, rank r attends to the keys of rank
    r - s (its own in step 0) and merges the result (arXiv:2310.01889v4, algorithm 1).
    """
    world = len(at)
    out = np.zeros((len(q), v.shape[1]))
    lse = np.full((len(q), 1), -np.inf)  # nothing seen yet
    for step in range(world):
        for rank, rows in enumerate(at):
            cols = at[(rank - step) % world]
            scores = q[rows] @ k[cols].T / math.sqrt(q.shape[1])  # (n, E) x (E, m) -> (n, m)
            if causal:
                scores = np.where(cols <= rows[:, None], scores, -np.inf)
            total = np.logaddexp(lse[rows], np.logaddexp.reduce(scores, 1, keepdims=True))
            out[rows] *= np.exp(lse[rows] - total)
            out[rows] += np.exp(scores - total) @ v[cols]
            lse[rows] = total
    return out


# ---------------------------------------------------------------- layouts


def require(ok, message):  # same as s4.py:require
    """Raise ValueError unless ok."""
    if not ok:
        raise ValueError(message)


def chunks_of(L, rank, world, layout="contiguous"):
    """The tokens of a rank: consecutive positions [(start, stop), ...].

    contiguous: chunk r of W.  zigzag: chunks r and 2W-1-r of 2W, which give every rank the same
    work under a causal mask: of 8 tokens, rank 0 of 2 has 0 1 6 7, and rank 1 has 2 3 4 5.
    """
    layouts = {"contiguous": [rank], "zigzag": [rank, 2 * world - 1 - rank]}
    require(layout in layouts, f"layout {layout!r}: expected 'contiguous' or 'zigzag'")
    mine = layouts[layout]
    count = world * len(mine)
    return [(L * c // count, L * (c + 1) // count) for c in mine]


def lengths_of(chunks_by_rank):
    """The number of tokens of each rank."""
    return [sum(stop - start for start, stop in chunks) for chunks in chunks_by_rank]


def tokens_of(chunks):
    """The positions in these chunks, one chunk after the other: (n,) int64."""
    return torch.cat([torch.arange(start, stop) for start, stop in chunks])


def positions(L, rank, world, layout="contiguous"):
    """Positions of a rank's tokens in the sequence, in local order: (n,) int64."""
    return tokens_of(chunks_of(L, rank, world, layout))


def visible_blocks(q_chunks, k_chunks, causal, longest):
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
    offset = 0
    for start, stop in chunks:
        for first in range(start, stop, longest):
            n = min(longest, stop - first)
            yield first, slice(offset, offset + n)
            offset += n


# ---------------------------------------------------------------- one block of queries and keys


def scores_of(q, k, causal, keep):
    """(B, H, n, E) x (B, H, m, E) -> (B, H, n, m); query i sees keys 0 .. i when causal."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if causal:
        future = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)  # (n, m)
        scores = scores.masked_fill(future, -torch.inf)
    if keep is not None:
        scores = scores.masked_fill(~keep[:, None, None, :], -torch.inf)
    return scores


def per_query_head(kv, q):
    """(2, B, G, m, E) -> (2, B, H, m, E)."""
    return kv.repeat_interleave(q.shape[1] // kv.shape[2], 2)


def attention_slow(q, k, v, causal=False, keep=None):
    """Attention on one process, all scores in memory: what the schedules must equal.

    nan where a query sees no key (the schedules give 0).
    """
    k, v = per_query_head(torch.stack([k, v]), q)  # (B, H, L, E) each
    return scores_of(q, k, causal, keep).softmax(-1) @ v


def attention_block(q, k, v, causal=False, keep=None):
    """Attention of queries to one block of keys, to be merged with other blocks.  No autograd.

    q: (B, H, n, E), k, v: (B, H, m, E), none empty; causal: query i sees keys 0 .. i, n == m.
    Returns out (B, H, n, E) and lse (B, H, n) in float32 (float64 for float64).
    """
    fused = has_kernel(q, keep)
    q, k, v = as_computed(fused, q, k, v)
    if fused:
        return fused_block(q, k, v, causal, keep)
    scores = scores_of(q, k, causal, keep)
    lse = scores.logsumexp(-1)
    finite = lse.masked_fill(lse == -torch.inf, 0)  # -inf - -inf would be nan
    return (scores - finite[..., None]).exp() @ v, lse


def attention_block_grad(grad, q, k, v, out, lse, causal=False, keep=None):
    """Gradients (dq, dk, dv) from one block.  out, lse: of the attention to all keys.

    The weights exp(scores - lse) are those of the whole softmax, so gradients of blocks add up.
    """
    fused = has_kernel(q, keep)
    grad, q, k, v, out = as_computed(fused, grad, q, k, v, out)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # a query that saw nothing has weights 0
    if fused:
        return fused_block_grad(grad, q, k, v, out, lse, causal, keep)
    scores = scores_of(q, k, causal, keep)
    weights = (scores - lse[..., None]).exp()  # P (B, H, n, m)
    mean = (grad * out).sum(-1, keepdim=True)  # sum_j P_j dP_j, over the keys of all ranks
    dscores = weights * (grad @ v.mT - mean)
    dqk = dscores / math.sqrt(q.shape[-1])  # of q @ k.mT
    return dqk @ k, dqk.mT @ q, weights.mT @ grad


def as_computed(fused, *tensors):
    """Tensors as a block computes with them: half precision in fused kernels of a GPU only."""
    if not (fused and tensors[0].is_cuda):
        tensors = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]
    return [x.contiguous() for x in tensors]  # the kernels silently assume stride 1


def has_kernel(q, keep):
    """True if PyTorch has a fused kernel for these inputs that also returns the log-sum-exp."""
    if q.is_cpu:
        return True
    fits = q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return keep is None and q.is_cuda and q.dtype != torch.float64 and fits


def padding_mask(keep, q):
    """What to add to the scores: 0 at real keys, -inf at padding; (B, 1, 1, m), or None."""
    if keep is None:
        return None
    mask = q.new_zeros(keep.shape).masked_fill(~keep, -torch.inf)
    return mask[:, None, None, :]


def fused_block(q, k, v, causal, keep):
    """(out, lse) by the kernel of this device."""
    aten = torch.ops.aten
    if q.is_cpu:
        kernel = aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = kernel(q, k, v, 0.0, causal, attn_mask=padding_mask(keep, q))
        if keep is not None:  # where a query sees no key, the kernel returns lse 0
            seen = keep.cumsum(1) if causal else keep.sum(1, keepdim=True)  # (B, n or 1)
            lse = lse.masked_fill(seen[:, None] == 0, -torch.inf)
        return out, lse
    if q.dtype == torch.float32:
        kernel = aten._scaled_dot_product_efficient_attention
        out, lse = kernel(q, k, v, None, True, 0.0, causal)[:2]
    else:
        kernel = aten._scaled_dot_product_flash_attention
        out, lse = kernel(q, k, v, 0.0, causal, False)[:2]
    # the efficient kernel pads lse to a multiple of 32 rows
    return out.float(), lse[:, :, : q.shape[2]].contiguous()


def fused_block_grad(grad, q, k, v, out, lse, causal, keep):
    """(dq, dk, dv) by the kernel of this device."""
    aten = torch.ops.aten
    if q.is_cpu:
        kernel = aten._scaled_dot_product_flash_attention_for_cpu_backward
        return kernel(grad, q, k, v, out, lse, 0.0, causal, attn_mask=padding_mask(keep, q))
    seed = torch.zeros(2, dtype=torch.int64, device=q.device)  # of dropout, whose rate is 0
    if q.dtype == torch.float32:
        kernel = aten._scaled_dot_product_efficient_attention_backward
        lse = F.pad(lse, (0, -lse.shape[2] % 32))
        wanted = [True, True, True, False]
        grads = kernel(grad, q, k, v, None, out, lse, seed[0], seed[1], 0.0, wanted, causal)
        return grads[:3]
    kernel = aten._scaled_dot_product_flash_attention_backward
    grad = grad.to(q.dtype)
    out = out.to(q.dtype)
    options = None, None, q.shape[2], k.shape[2], 0.0, causal
    state = seed.view(torch.uint64)
    return kernel(grad, q, k, v, out, lse, *options, state, seed[0])


def merge(out, lse, out_block, lse_block):  # same as attention.py:merge
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


# ---------------------------------------------------------------- the ring


@dataclass(frozen=True)
class Plan:
    """What all ranks agreed on."""

    ranks: "Ranks"  # the processes, and messages between them
    causal: bool
    q_chunks: list  # for each rank, its chunks
    k_chunks: list
    keep: torch.Tensor | None  # (B, L) bool, the padding mask of the whole sequence

    def blocks(self, q, owner):
        """Yield (rows, cols, diagonal, keep) wherever this rank's queries see keys of rank `owner`.

        rows: index of queries in (B, H, n, ...), cols: of keys in (2, B, G, m, E), keep: (B, m),
        None without padding.
        """
        if q.numel() == 0:  # no tokens or heads on this rank, or an empty batch
            return
        mine = self.q_chunks[self.ranks.rank]
        theirs = self.k_chunks[owner]
        longest = 1024  # without a fused kernel, the scores of a block are all in memory
        if has_kernel(q, self.keep):
            longest = 32768  # kernels add up keys one after the other, and their rounding grows
        keep = None
        for rows, cols, diagonal in visible_blocks(mine, theirs, self.causal, longest):
            if self.keep is not None:
                keep = self.keep[:, tokens_of(theirs)[cols]]
                keep = None if keep.all() else keep
            yield np.s_[:, :, rows], np.s_[:, :, :, cols], diagonal, keep


def around_the_ring(plan, kv, what):
    """In step s of W, yield (rank - s, its kv), which goes on to the next rank meanwhile.

    `ranks.shift` starts to send to the next rank and returns a function that waits for what the
    previous rank sent.  For None it sends nothing, and the wait returns 0.
    """
    ranks = plan.ranks
    for step in range(ranks.world):
        owner = (ranks.rank - step) % ranks.world
        going = kv if step < ranks.world - 1 else None  # the last ones have been everywhere
        next_tokens = lengths_of(plan.k_chunks)[owner - 1]  # of the next kv; -1 is the last rank
        arriving = ranks.shift(going, next_tokens, f"step {step} of {what}")
        yield owner, kv
        kv = arriving()


class RingAttention(torch.autograd.Function):
    """Queries stay; keys and values go round the ring of ranks."""

    @staticmethod
    def forward(ctx, plan, q, kv):
        """q (B, H, n, E), kv (2, B, G, m, E) -> out (B, H, n, E)."""
        out = torch.zeros_like(q, dtype=torch.promote_types(q.dtype, torch.float32))
        # nothing seen yet; float64, or the rounding of many merges would show at 10^6 keys
        lse = out.new_full(q.shape[:3], -torch.inf, dtype=torch.float64)
        for owner, part in around_the_ring(plan, kv, "the ring"):
            for rows, cols, diagonal, keep in plan.blocks(q, owner):
                k, v = per_query_head(part[cols], q)
                block = attention_block(q[rows], k, v, diagonal, keep)
                out[rows], lse[rows] = merge(out[rows], lse[rows], *block)
        lse = lse.to(out.dtype)
        out = out.to(q.dtype)
        ctx.plan = plan
        ctx.save_for_backward(q, kv, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad):
        """Keys and values go round again; the sums of their gradients follow one step behind.

        Each rank keeps the gradients of its own keys, and adds the sums at the end: one hop less.
        """
        require(not torch.is_grad_enabled(), "no second derivatives here (create_graph=True)")
        # read once: activation checkpointing allows no second access
        q, kv, out, lse = ctx.saved_tensors
        ranks = ctx.plan.ranks
        what = "the ring, backward"
        dq = torch.zeros_like(q, dtype=lse.dtype)
        sums = None  # gradients, summed so far, of the keys of the previous step
        for owner, part in around_the_ring(ctx.plan, kv, what):
            arriving = ranks.shift(sums, part.shape[3], what)
            dkv = torch.zeros_like(part, dtype=dq.dtype)
            for rows, cols, diagonal, keep in ctx.plan.blocks(q, owner):
                k, v = per_query_head(part[cols], q)
                saved = q[rows], k, v, out[rows], lse[rows]
                dq_b, dk_b, dv_b = attention_block_grad(grad[rows], *saved, diagonal, keep)
                dq[rows] += dq_b
                dkv_b = torch.stack([dk_b, dv_b])
                by_group = dkv_b.unflatten(2, (part.shape[2], -1))  # (2, B, G, H/G, m, E)
                dkv[cols] += by_group.sum(3, dtype=dq.dtype)
            dkv += arriving()
            if owner == ranks.rank:
                own_dkv = dkv
            else:
                sums = dkv
        own_dkv += ranks.shift(sums, kv.shape[3], what)()
        return None, dq.to(q.dtype), own_dkv.to(kv.dtype)


def ring_attention(q, k, v, causal=False, keep=None, *, group=None, layout="contiguous"):
    """Exact attention over shards, keys and values going round a ring (arXiv:2310.01889v4).

    q: (B, H, n, E), k, v: (B, G, m, E): the tokens that the layout gives to this rank (see
    `positions`), none if the sequence is too short.  keep: (B, m) bool.  causal: queries and keys
    are of the same tokens.  Returns (B, H, n, E) in the dtype of q, with gradients.  Every rank of
    the group must call it, forward and backward.  Raises ValueError on every rank if inputs do
    not fit together, RankLost if a rank died or is silent.
    """
    plan = agree_on_attention("ring", q, k, v, causal, keep, group, layout)
    return RingAttention.apply(plan, q, torch.stack([k, v]))


# ---------------------------------------------------------------- all-gather and all-to-all


def resized(x, dim, sizes):
    """Shapes like that of x but for the sizes of one axis: what comes from each rank."""
    return [(*x.shape[:dim], size, *x.shape[dim + 1 :]) for size in sizes]


class Swap(torch.autograd.Function):
    """Send parts[p] to rank p, receive shapes[p] from it; gradients go the other way."""

    @staticmethod
    def forward(ctx, ranks, what, shapes, *parts):
        ctx.arguments = ranks, f"{what}, backward", [part.shape for part in parts]
        return tuple(ranks.exchange(parts, shapes, what)())

    @staticmethod
    def backward(ctx, *grads):
        return None, None, None, *Swap.apply(*ctx.arguments, *grads)


def allgather_attention(q, k, v, causal=False, keep=None, *, group=None, layout="contiguous"):
    """Exact attention over shards, all keys and values on every rank.  As `ring_attention`."""
    plan = agree_on_attention("allgather", q, k, v, causal, keep, group, layout)
    ranks = plan.ranks
    kv = torch.stack([k, v])
    shapes = resized(kv, 3, lengths_of(plan.k_chunks))
    parts = Swap.apply(ranks, "the all-gather", shapes, *[kv] * ranks.world)
    own = plan.q_chunks[ranks.rank]
    everything = list(chain(*plan.k_chunks))
    # a ring of one rank: all keys are here
    alone = Plan(Ranks(), causal, [own], [everything], plan.keep)
    return RingAttention.apply(alone, q, torch.cat(parts, 3))


def to_channels(x, ranks, chunks, shares):
    """Own tokens of all channels to all tokens of own channels: (B, C, n, ...) -> (B, C_r, L, ...).

    Channels are axis 1; in attention these are heads.
    chunks: for each rank, the chunks that it holds.  shares: for each rank, its number of channels.
    """
    parts = x.split(shares, 1)
    shapes = resized(parts[ranks.rank], 2, lengths_of(chunks))
    parts = Swap.apply(ranks, "the all-to-all", shapes, *parts)
    return in_order(parts, chunks, 2)


def to_tokens(x, ranks, chunks, shares):
    """The inverse of `to_channels`: (B, C_r, L, ...) -> (B, C, n, ...)."""
    by_rank = x.index_select(2, tokens_of(chain(*chunks)).to(x.device))
    parts = by_rank.split(lengths_of(chunks), 2)
    shapes = resized(parts[ranks.rank], 1, shares)
    return torch.cat(Swap.apply(ranks, "the all-to-all", shapes, *parts), 1)


def even_shares(C, world):
    """How many of C channels each rank gets."""
    return lengths_of([chunks_of(C, rank, world) for rank in range(world)])


def ulysses_attention(q, k, v, causal=False, keep=None, *, group=None, layout="contiguous"):
    """Exact attention over shards: every rank gets all tokens of H/W heads (arXiv:2309.14509v2).

    As `ring_attention`.  A key head stays with its query heads; with fewer key heads than ranks
    some ranks have nothing to compute.
    """
    plan = agree_on_attention("ulysses", q, k, v, causal, keep, group, layout)
    ranks = plan.ranks
    heads_per_kv = q.shape[1] // k.shape[1]
    kv_shares = even_shares(k.shape[1], ranks.world)
    q_shares = [share * heads_per_kv for share in kv_shares]
    q = to_channels(q, ranks, plan.q_chunks, q_shares)  # (B, H_r, L, E)
    kv = to_channels(torch.cat([k, v]), ranks, plan.k_chunks, kv_shares)  # (2B, G_r, L, E)
    # a ring of one rank: all tokens are here
    alone = Plan(Ranks(), causal, [[(0, q.shape[2])]], [[(0, kv.shape[2])]], plan.keep)
    out = RingAttention.apply(alone, q, kv.unflatten(0, (2, -1)))
    return to_tokens(out, ranks, plan.q_chunks, q_shares)  # (B, H, n, E)


# ---------------------------------------------------------------- whole models over shards


def ulysses(mixer, group=None, layout="contiguous"):
    """Let a channel-wise mixer work on shards: each rank runs all tokens of D/W channels.  Exact.

    mixer: a module (B, L, D), keep -> (B, L, D) with `d_model` that does not mix channels, such as
    S4 or SGConv.  Its forward becomes x (B, n, D), keep (B, n) bool -> (B, n, D); returns the
    mixer.  Channels are axis 0 of its parameters and buffers, or as its class says in
    `channel_axes`; a rank gets the gradients of its own channels only (see `sum_gradients`).
    Errors as `ring_attention`.  Hooks run twice: for the tokens of this rank, and within it for
    its channels.
    """
    name = type(mixer).__name__
    plain = not hasattr(mixer, "parametrizations")
    require(plain, f"remove the parametrizations of this {name} first")
    nested = [type(part).__name__ for part in mixer.children() if hasattr(part, "d_model")]
    require(not nested, f"{name} contains {nested}: apply ulysses to that, before wrapping it")
    mixer.forward = partial(mix, mixer, group, layout)
    return mixer


def mix(mixer, group, layout, x, keep=None, **options):
    """Forward of a mixer over shards."""
    D = mixer.d_model
    fits = x.ndim == 3 and x.shape[2] == D
    require(fits, f"expected x (B, n, {D}), got {tuple(x.shape)}")
    ranks = ranks_of(group, x.device)
    chunks = agree(ranks, layout, {"x": (x, 1), "keep": (keep, 1)}, call="mixer")
    shares = even_shares(D, ranks.world)
    first = sum(shares[: ranks.rank])
    part = copy.copy(mixer)  # the channels of this rank
    part.__dict__.pop("forward", None)  # that is `mix`
    part.d_model = shares[ranks.rank]
    part.first_channel = first  # for layers that treat channels differently: SGConv
    views = {}
    for name, tensor in chain(mixer.named_parameters(), mixer.named_buffers()):
        axis = getattr(mixer, "channel_axes", {}).get(name, 0)
        shape = f"axis {axis} of {name} {tuple(tensor.shape)} is not d_model {D} long"
        fix = f"name its axis in {type(mixer).__name__}.channel_axes"
        sizes = tensor.shape or (None,)
        require(sizes[axis] == D, f"{shape}; {fix}")
        views[name] = tensor.narrow(axis, first, part.d_model)
    if keep is not None:
        keep = gather(ranks, keep, chunks["keep"], 1)  # (B, L)
    u = to_channels(x.mT, ranks, chunks["x"], shares).mT  # (B, L, D_r)
    y = functional_call(part, views, (u, keep), options)
    return to_tokens(y.mT, ranks, chunks["x"], shares).mT  # (B, n, D)


SCHEDULES = {
    "ring": ring_attention,
    "allgather": allgather_attention,
    "ulysses": ulysses_attention,
}


def spread(model, schedule, layout="contiguous"):
    """Let the mixers of model.blocks work on shards; parameters and their names stay the same.

    schedule: a key of SCHEDULES, for mixers with an attention function `attend`.  All other mixers
    are cut by channels (see `ulysses`).  Uses the default group.  Give the model the shards of x
    and keep, and a Transformer also positions=positions(L, rank, world, layout), as each rank
    counts from 0 itself.
    """
    require(schedule in SCHEDULES, f"schedule {schedule!r}: expected one of {list(SCHEDULES)}")
    for block in model.blocks:
        attentions = [m for m in block.mixer.modules() if "attend" in vars(m)]  # perhaps wrapped
        for module in attentions:
            module.attend = partial(SCHEDULES[schedule], layout=layout)
        if not attentions:
            ulysses(block.mixer, layout=layout)
    return model


def own_tokens(x, layout="contiguous", dim=1, group=None):
    """The tokens of this rank, out of the whole x with its tokens along `dim`."""
    ranks = ranks_of(group, x.device)
    at = positions(x.shape[dim], ranks.rank, ranks.world, layout)
    return x.index_select(dim, at.to(x.device))


class SumOverRanks(torch.autograd.Function):
    """Sum x over the ranks of the default group; the gradient is summed over the ranks too."""

    @staticmethod
    def forward(ctx, x):
        return all_reduce(x)

    @staticmethod
    def backward(ctx, grad):
        return SumOverRanks.apply(grad)


def all_reduce(x, op=dist.ReduceOp.SUM):
    """The sum of x over the ranks of the default group, or their maximum."""
    total = x.clone(memory_format=torch.contiguous_format)
    if dist.is_initialized():
        dist.all_reduce(total, op)
    return total


def sum_gradients(parameters):
    """Sum the gradients over ranks, each of which saw its own tokens or channels only."""
    for p in parameters:
        if p.requires_grad:
            own = torch.zeros_like(p) if p.grad is None else p.grad.to_dense()
            p.grad = all_reduce(own)


# ---------------------------------------------------------------- messages and handshake


class RankLost(RuntimeError):
    """Another rank died, or kept silent longer than the group's timeout."""


@contextlib.contextmanager
def lost(text):
    """Turn an error of the transport into a RankLost with one line."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        signs = ("gloo", "NCCL", "pair closure")
        known = isinstance(error, dist.DistError) or any(sign in reason for sign in signs)
        if not known or isinstance(error, RankLost):
            raise
        raise RankLost(f"{text}: {reason}") from error


traffic = Counter()  # "messages" and "bytes" of floating-point data that this process has sent


@dataclass(frozen=True)
class Ranks:
    """The processes of a group and messages between them; by default this process alone."""

    rank: int = 0
    world: int = 1
    group: dist.ProcessGroup | None = None
    staged: torch.device | str = "cpu"  # the device that holds messages in transit
    limit: timedelta = timedelta()  # of a wait; 0: the group's timeout

    def exchange(self, parts, shapes, what):
        """Start to send parts[p] to rank p and to receive shapes[p] from it, of the same dtype.

        Returns wait(), which returns what came: a list over ranks.  Nothing of size 0 is sent.
        """
        came = list(parts)
        ops = []
        for peer in range(self.world):
            if peer != self.rank:
                x = parts[peer].contiguous().to(self.staged)
                came[peer] = x.new_empty(shapes[peer])
                if x.numel():
                    ops.append(self.op(dist.isend, x, peer))
                if came[peer].numel():
                    ops.append(self.op(dist.irecv, came[peer], peer))
        if self.staged == "cpu":
            batches = [[op] for op in ops]  # one by one, so that an error names the lost rank
        else:
            batches = [ops] if ops else []  # NCCL needs all messages of a step together
        started = []
        for batch in batches:
            whom = " or ".join(sorted({f"rank {op.group_peer}" for op in batch}))
            text = f"rank {self.rank} of {self.world}: no answer from {whom} in {what}"
            with lost(text):
                started.append((text, dist.batch_isend_irecv(batch)))

        def wait():
            for text, works in started:
                with lost(text):
                    for work in works:
                        work.wait(self.limit)
            return [x.to(parts[0].device) for x in came]

        return wait

    def op(self, call, x, peer):
        if call is dist.isend and x.is_floating_point():
            traffic.update(messages=1, bytes=x.nbytes)
        # the size as tag, so that other sizes do not match: gloo aborts on longer messages, and
        # takes shorter ones silently
        tag = x.nbytes % 2**31
        return dist.P2POp(call, x, group=self.group, tag=tag, group_peer=peer)

    def shift(self, x, tokens, what):
        """Send x (2, B, G, m, E) to the next rank, receive `tokens` tokens from the previous one.

        Returns wait(), which returns what came.  x None: nothing is sent, 0 comes.
        """
        if x is None:
            return lambda: 0
        parts = [x.new_empty(0)] * self.world
        parts[(self.rank + 1) % self.world] = x
        shapes = [(0,)] * self.world
        shapes[self.rank - 1] = resized(x, 3, [tokens])[0]
        wait = self.exchange(parts, shapes, what)
        return lambda: wait()[self.rank - 1]

    def tell(self, facts, what):
        """What all ranks say: a list over ranks.  facts: numbers and text, below 4 KB."""
        text = json.dumps(facts).encode().ljust(4096)
        message = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        shapes = [message.shape] * self.world
        came = self.exchange([message] * self.world, shapes, what)()
        return [json.loads(bytes(x.tolist())) for x in came]


def ranks_of(group, device):
    """The Ranks of a group (None: of all processes), for tensors on this device."""
    if not dist.is_initialized():
        return Ranks()
    staged = "cpu" if dist.get_backend(group) == "gloo" else device
    return Ranks(dist.get_rank(group), dist.get_world_size(group), group, staged)


def in_order(parts, chunks, dim):
    """The whole sequence, from each rank's tokens along dim."""
    whole = torch.cat(parts, dim)
    order = tokens_of(chain(*chunks)).argsort()
    return whole.index_select(dim, order.to(whole.device))


def gather(ranks, x, chunks, dim):
    """The whole sequence on every rank, from each rank's x with its tokens along dim."""
    shapes = resized(x, dim, lengths_of(chunks))
    parts = ranks.exchange([x] * ranks.world, shapes, "a gather")()
    return in_order(parts, chunks, dim)


def unshard(x, dim=1, group=None, layout="contiguous"):
    """The whole sequence on every rank, without gradients: the inverse of `own_tokens`."""
    x = x.detach()
    dim %= x.ndim
    ranks = ranks_of(group, x.device)
    chunks = agree(ranks, layout, {"x": (x, dim)}, call="unshard")
    return gather(ranks, x, chunks["x"], dim)


def agree(ranks, layout, tensors, **facts):
    """Raise the same ValueError on all ranks unless they state the same facts and sizes.

    tensors: {name: (tensor or None, its axis of tokens)}.  Returns {name: chunks of all ranks}.
    Mismatched sizes would corrupt or crash the transport, so attention, mixers over shards and
    `unshard` start with this.
    """
    facts["layout"] = str(layout)
    lengths = {}
    for name, (x, dim) in tensors.items():
        facts[name] = None
        if x is not None:
            lengths[name] = x.shape[dim]
            sizes = list(x.shape)
            sizes[dim] = "n"
            # ranks that differ in this would wait for each other in backward
            gradient = x.requires_grad and torch.is_grad_enabled()
            facts[name] = f"{x.dtype} ({', '.join(map(str, sizes))}), gradient {gradient}"
    stated = ranks.tell({"facts": facts, "lengths": lengths}, "the handshake")
    for name in stated[0]["facts"]:
        values = [own["facts"].get(name) for own in stated]
        same = all(value == values[0] for value in values)
        require(same, f"{name}: ranks differ, they have {values}")
    chunks = {}
    for name in lengths:
        held = [own["lengths"][name] for own in stated]
        L = sum(held)
        chunks[name] = []
        for rank in range(ranks.world):
            chunks[name].append(chunks_of(L, rank, ranks.world, layout))
        given = lengths_of(chunks[name])
        text = f"{name}: ranks hold {held} tokens; layout {layout} gives them {given}"
        require(held == given, text)
    return chunks


def agree_on_attention(schedule, q, k, v, causal, keep, group, layout):
    """Check the arguments on all ranks; return the Plan."""
    ranks = ranks_of(group, q.device)
    tensors = {"q": (q, -2), "k": (k, -2), "v": (v, -2), "keep": (keep, -1)}
    chunks = agree(ranks, layout, tensors, call=schedule, causal=bool(causal))
    fits = q.ndim == k.ndim == 4 and k.shape == v.shape
    fits = fits and q.is_floating_point() and q.dtype == k.dtype == v.dtype
    fits = fits and q.shape[::3] == k.shape[::3]  # B and E
    fits = fits and q.shape[1] % k.shape[1] == 0
    if causal:
        fits = fits and chunks["q"] == chunks["k"]
    if keep is not None:
        fits = fits and keep.dtype == torch.bool and keep.shape == (len(k), k.shape[2])
        fits = fits and chunks["keep"] == chunks["k"]  # the same on all ranks
    expected = "float q (B, H, n, E), k and v (B, G, m, E) alike, G divides H, n == m if causal"
    got = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in (q, k, v, keep) if x is not None)
    require(fits, f"expected {expected}, bool keep (B, m) or None; got {got}")
    if keep is not None:
        keep = gather(ranks, keep, chunks["keep"], 1)
    return Plan(ranks, causal, chunks["q"], chunks["k"], keep)


# ---------------------------------------------------------------- processes

long_waits = None  # the group of `wait_for_all_ranks`


@contextlib.contextmanager
def process_group(device="cpu", timeout=60.0):
    """Join the ranks that torchrun or a scheduler started; without them do nothing.

    NCCL if every rank has a GPU of its own, else gloo (through host memory).  timeout: seconds
    until a rank that does not join or keeps silent counts as lost (RankLost).  Where ranks wait
    longer by design, see `wait_for_all_ranks`, which also ends the block.  Yields (rank, world,
    device of this rank).
    """
    global long_waits
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        yield 0, 1, torch.device(device)
        return
    rank = int(os.environ.get("RANK", 0))  # if it is missing, the rendezvous below says so
    local_rank = int(os.environ.get("LOCAL_RANK", rank))  # without it: all on one machine
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    backend = "gloo"
    if device == "cuda":
        gpus = torch.cuda.device_count()
        if gpus >= local_world:
            backend = "nccl"
        device = f"cuda:{local_rank % gpus}"
        torch.cuda.set_device(device)
    limit = timedelta(seconds=timeout)
    # torchrun --max-restarts keeps its store, with the addresses of the processes that have died
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    with lost(f"rank {rank} of {world}: could not join the others"):
        store, rank, world = next(dist.rendezvous("env://", timeout=limit))
        store = dist.PrefixStore(f"attempt {attempt}", store)
        dist.init_process_group(backend, timeout=limit, world_size=world, rank=rank, store=store)
        long_waits = dist.new_group(backend="gloo", timeout=limit)
    try:
        with lost(f"rank {rank} of {world}: another rank was lost"):
            yield rank, world, torch.device(device)
            wait_for_all_ranks()
    finally:
        long_waits = None
        dist.destroy_process_group()


def wait_for_all_ranks():
    """Wait until all ranks have called this, up to a day: after loading, saving or evaluating."""
    ranks = replace(ranks_of(long_waits, "cpu"), limit=timedelta(days=1))
    ranks.tell("done", "a wait for all ranks")


# ---------------------------------------------------------------- self-check, and a long run


def rel_err(a, b):
    """max|a - b| / max|b|."""
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


def check_case(attend, layout, causal, dtype, device, lengths=(45, 45), heads=(4, 2), padded=False):
    """Largest error of out, dq, dk, dv of all ranks against one process, random output gradient."""
    generator = torch.Generator().manual_seed(0)
    whole = []  # q, k, v and the gradient of the output
    for i in (0, 1, 1, 0):  # 0: of the size of queries, 1: of keys
        x = torch.randn(2, heads[i], lengths[i], 16, dtype=torch.float64, generator=generator)
        whole.append(x.to(device, dtype))
    keep = None
    own_keep = None
    if padded:  # half of the second example
        keep = torch.ones(2, lengths[1], dtype=torch.bool, device=device)
        keep[1, lengths[1] // 2 :] = False
        own_keep = own_tokens(keep, layout)
    *q_k_v, grad = [x.double().requires_grad_() for x in whole]
    out = attention_slow(*q_k_v, causal, keep)
    expected = [out, *torch.autograd.grad(out, q_k_v, grad)]
    *q_k_v, grad = [own_tokens(x, layout, 2).requires_grad_() for x in whole]
    out = attend(*q_k_v, causal, own_keep, layout=layout)
    got = [out, *torch.autograd.grad(out, q_k_v, grad)]
    return largest([unshard(x, 2, layout=layout) for x in got], expected)


def largest(got, expected):
    """The largest of the errors; infinite if one is nan, which max() would pass over."""
    errors = [rel_err(a, b) for a, b in zip(got, expected, strict=True)]
    return max(math.inf if math.isnan(error) else error for error in errors)


LIMITS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3}  # of relative errors


def self_check(dtype=torch.float64, device="cpu"):
    """The reference, one process, then each schedule over ranks: [(name, error, limit)].

    Every rank of the default group must call it; all get the same rows.
    """
    q_k_v = np.random.RandomState(0).randn(3, 29, 8)
    whole = ring_ref(*q_k_v, [np.arange(29)], causal=True)
    at = [positions(29, rank, 3, "zigzag").numpy() for rank in range(3)]
    ring = ring_ref(*q_k_v, at, causal=True)
    one_head = torch.from_numpy(q_k_v)[:, None, None].to(device, dtype)
    slow = attention_slow(*one_head, causal=True)[0, 0]
    rows = [
        ("ring_ref: 3 ranks == 1 rank", rel_err(ring, whole), 1e-12),
        ("attention_slow == ring_ref", rel_err(slow, whole), LIMITS[dtype]),
    ]
    cases = [
        ("contiguous", "contiguous", False, {}),
        ("zigzag, causal, padded", "zigzag", True, {"padded": True}),
        ("zigzag, fewer keys than queries", "zigzag", False, {"lengths": (45, 18)}),
    ]
    for schedule, attend in SCHEDULES.items():
        for name, layout, causal, options in cases:
            error = check_case(attend, layout, causal, dtype, device, **options)
            rows.append((f"{schedule}: {name}", error, LIMITS[dtype]))
    return rows


def sampled_error(q, k, v, out, at):
    """Largest error of three rows per rank of causal attention, against float64.

    Every rank adds up what its own keys contribute to the rows of all ranks.  at: the positions of
    this rank's tokens.
    """
    n = q.shape[2]
    rows = [0, n // 2, n - 1]
    at = at.to(q.device)
    q_rows = unshard(q[:, :, rows], 2).double()  # (B, H, 3 W, E)
    scores = q_rows @ k.double().mT / math.sqrt(q.shape[-1])  # (B, H, 3 W, n)
    visible = at <= unshard(at[rows], 0)[:, None]
    weights = scores.exp() * visible  # scores of random tokens are small
    weighted = all_reduce(weights @ v.double())
    total = all_reduce(weights.sum(-1, keepdim=True))
    expected = own_tokens(weighted / total, dim=2)
    return largest(out[:, :, rows].unbind(2), expected.unbind(2))


def run(tokens, heads, d_head, device, rank, world):
    """Causal zigzag ring attention to random tokens, once; some rows are checked in float64."""
    at = positions(tokens, rank, world, "zigzag")
    generator = torch.Generator().manual_seed(rank)
    q, k, v = torch.randn(3, 1, heads, len(at), d_head, generator=generator).to(device)
    traffic.clear()
    started = time.perf_counter()
    with torch.no_grad():
        out = ring_attention(q, k, v, causal=True, layout="zigzag").cpu()
    wall = time.perf_counter() - started
    sent = dict(traffic)
    error = sampled_error(q, k, v, out, at)
    worst = torch.tensor([wall, error], dtype=torch.float64, device=device)
    wall, error = all_reduce(worst, op=dist.ReduceOp.MAX).tolist()
    what = f"{tokens:,} tokens, {heads} head of {d_head}, causal, zigzag ring, {world} ranks of"
    return {
        "setting": f"{what} {torch.get_num_threads()} threads, float32, {device}",
        "wall": wall,
        "flop": 2 * tokens * (tokens + 1) * heads * d_head,  # of all ranks
        "bytes": sent.get("bytes", 0),
        "messages": sent.get("messages", 0),
        "error": error,
    }


def print_run(row):
    """Print what `run` returned."""
    print(row["setting"])
    print(f"  {row['wall']:.2f} s, {row['flop'] / row['wall'] / 1e9:.1f} Gflop/s in all")
    print(f"  {row['bytes'] / 1e6:.1f} MB sent per rank, in {row['messages']} messages")
    print(f"  three rows per rank against float64: {row['error']:.1e}", flush=True)


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
    """Return call(*args); on a ValueError or RankLost, print one line and exit with 1."""

    try:
        return call(*args)
    except (ValueError, RankLost) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # threads of the transport may still wait for the lost rank


if __name__ == "__main__":
    sys.exit(guarded(main))
