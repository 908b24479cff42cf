"""Exact attention over many ranks: each holds a share of the tokens, none holds all the scores.

    out = softmax(Q K^T / sqrt(E)) V over keys that live on W ranks, merged by log-sum-exp:
    lse' = log(e^lse + e^lse_b),  out' = out sigmoid(lse - lse_b) + out_b sigmoid(lse_b - lse)

A view of attention at a million tokens: He and Kabic 2023, arXiv:2302.06218v3 (abstract).  Ring:
Liu et al. 2023, arXiv:2310.01889v4.  All-to-all: Jacobs et al. 2023, arXiv:2309.14509v2 (Ulysses).

    symbol    code name          shape
    Q, K, V   q, k, v            shards (B, H, n, E), (B, G, n, E), (B, G, n, E); G divides H
              segments           per rank: [(start, stop), ...] of global positions, in local order
    W, rank   world, rank        processes; their number and which one this is
    lse       lse                (B, H, n), float32 (float64 for float64), natural log
    chunk     (k, v), (k, v, keep)  one rank's keys as they travel; keep (B, 1, n) bool

    schedule              bytes a rank sends forward; backward          holds
    ring_attention        (W-1) 2BnGEe;  (W-1) 2BnGE (e + 4)            two shards of keys, values
    allgather_attention   (W-1) 2BnGEe;  (W-1) 2BnGE (e + 4)            all keys and values
    ulysses_attention     (W-1)/W BnE (2H + 2G) e;  the same            H/W whole heads

e is the size of an element; gradients of keys and values travel as float32 (float64 for float64).
Inputs may be bfloat16: they travel as such, and sums are kept in float32.  Another number of ranks
rounds otherwise, nothing more; the same run twice gives the same bits on a CPU.
`ulysses(mixer)` runs any channel-wise mixer (S4, S4D, SGConv) over shards of tokens likewise.
Not included: dropout, windows, additive bias, packed sequences, gradients of lse.

    python dist_attention.py                                       one process, no communication
    torchrun --standalone --nproc-per-node 2 dist_attention.py     check table, 131,072 tokens
    torchrun --standalone --nproc-per-node 2 dist_attention.py --tokens 1048576
    check: 28 rows, float64 errors of out and all gradients of all ranks below 2e-15
    131,072 tokens, 1 head of 64, causal, zigzag ring, 2 ranks of 1 threads, float32, cpu
      a rank: 15 s CPU, 33.6 MB sent in 1 messages; sampled rows against float64: 5e-07
"""

import argparse
import contextlib
import copy
import math
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------- layouts


def contiguous(L, world):
    """Rank r holds one run of tokens. Returns per rank a list of segments (start, stop)."""
    return [[(L * r // world, L * (r + 1) // world)] for r in range(world)]


def zigzag(L, world):
    """Rank r holds chunks r and 2W-1-r of 2W: under a causal mask every rank has the same work."""
    cut = [L * c // (2 * world) for c in range(2 * world + 1)]
    pairs = [((cut[r], cut[r + 1]), (cut[-2 - r], cut[-1 - r])) for r in range(world)]
    return [[(a[0], b[1])] if a[1] == b[0] else [a, b] for a, b in pairs]  # neighbours are one


def size(segments):
    """Number of tokens in a list of segments."""
    return sum(stop - start for start, stop in segments)


def positions(L, rank, world, layout=contiguous):
    """Where the tokens of a rank stand in the sequence, in local order: (n,) int64. For RoPE."""
    return torch.cat([torch.arange(a, b) for a, b in layout(L, world)[rank]])


def shard(x, rank, world, dim=1, layout=contiguous):
    """The tokens of a rank, out of the whole x, whose dimension `dim` counts tokens."""
    return x.index_select(dim, positions(x.shape[dim], rank, world, layout).to(x.device))


def pick(whole, segments, dim):
    """The tokens of one rank, in local order, out of the whole."""
    return torch.cat([whole.narrow(dim, a, b - a) for a, b in segments], dim)


def join(parts, segments, dim):
    """The whole, in global order, from one part a rank: the reverse of `pick`."""
    runs = []
    for part, own in zip(parts, segments, strict=True):
        runs += zip(own, part.split([b - a for a, b in own], dim), strict=True)
    return torch.cat([tokens for _, tokens in sorted(runs, key=lambda run: run[0])], dim)


# ---------------------------------------------------------------- reference: numpy, float64


def block_ref(q, k, v, q_at, k_at, causal):
    """One head, one block: out and lse of queries at positions q_at, keys at k_at. O(Lq Lk)."""
    scores = q @ k.T / math.sqrt(q.shape[1])  # (n, E) x (E, m) -> (n, m)
    if causal:
        scores = np.where(k_at[None, :] <= q_at[:, None], scores, -np.inf)
    largest = scores.max(1, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - np.where(np.isinf(largest), 0, largest))
    total = weights.sum(1, keepdims=True)
    with np.errstate(divide="ignore"):
        return weights @ v / np.where(total == 0, 1, total), (largest + np.log(total))[:, 0]


def ring_ref(q, k, v, world, causal=False, layout=contiguous):
    """The ring as a loop over ranks and steps, one head: q (Lq, E), k, v (Lk, E) -> out (Lq, E).

    Rank r merges the chunks r, r-1, .. of keys as they come by (arXiv:2310.01889v4, algorithm 1).
    """
    whole = np.zeros((len(q), v.shape[1]))
    at = [[positions(len(x), r, world, layout).numpy() for r in range(world)] for x in (q, k)]
    for rank, q_at in enumerate(at[0]):
        out, lse = np.zeros((len(q_at), v.shape[1])), np.full(len(q_at), -np.inf)
        for step in range(world):
            k_at = at[1][(rank - step) % world]
            out_b, lse_b = block_ref(q[q_at], k[k_at], v[k_at], q_at, k_at, causal)
            total = np.logaddexp(lse, lse_b)
            finite = np.where(np.isinf(total), 0, total)  # nothing seen yet: -inf
            old, new = np.exp(lse - finite)[:, None], np.exp(lse_b - finite)[:, None]
            out, lse = out * old + out_b * new, total
        whole[q_at] = out
    return whole


# ---------------------------------------------------------------- one block of queries and keys


def spread(q, *tensors):
    """Key heads as many as query heads: (B, G, m, E) -> (B, H, m, E) each."""
    return (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in tensors)


def scores_of(q, k, causal, bias):
    """(B, H, n, E) x (B, H, E, m) -> (B, H, n, m); query i sees keys 0 .. i when causal."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    return scores if bias is None else scores + bias


def product(q, k, v, causal=False, keep=None):
    """The whole attention in one process, written out, O(L^2) memory: what all else must equal."""
    k, v = spread(q, k, v)
    return scores_of(q, k, causal, None if keep is None else hide(keep, q.dtype)).softmax(-1) @ v


def slow_block(q, k, v, causal, bias):
    """(out, lse) written out, O(n m) memory."""
    k, v = spread(q, k, v)
    scores = scores_of(q, k, causal, bias)
    lse = scores.logsumexp(-1)
    finite = lse.masked_fill(lse == -torch.inf, 0)  # -inf - -inf would be nan
    return (scores - finite[..., None]).exp() @ v, lse


def slow_block_grad(grad, q, k, v, out, lse, causal, bias):
    """(dq, dk, dv) written out: P = exp(scores - lse), dS = P (dP - sum_j P_j dP_j)."""
    group = q.shape[1] // k.shape[1]
    k, v = spread(q, k, v)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # a query that saw nothing has weights 0
    weights = (scores_of(q, k, causal, bias) - lse[..., None]).exp()
    dscores = weights * (grad @ v.mT - (grad * out).sum(-1, keepdim=True)) / math.sqrt(q.shape[-1])
    dk, dv = dscores.mT @ q, weights.mT @ grad  # (B, H, m, E) -> (B, G, m, E)
    return dscores @ k, *(x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))


def fused(q, k, v, causal, bias):  # same as attention.py:fused
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


def fused_block(q, k, v, causal, bias):  # same as attention.py:fused_block
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


# same as attention.py:fused_block_grad
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


def nothing_seen(q):
    """(out, lse) before the first block: zeros and -inf, in float32 (float64 for float64)."""
    out = torch.zeros_like(q, dtype=torch.promote_types(q.dtype, torch.float32))
    return out, out.new_full(q.shape[:3], -torch.inf)


def merge_(out, lse, out_block, lse_block):
    """Take a further block of keys into out (B, H, n, E) and lse (B, H, n), in place."""
    # not e^(lse - lse'): lse' has seven digits, and both shares would carry its rounding
    ahead = (lse_block - lse).masked_fill_(lse_block == -torch.inf, -torch.inf)  # not -inf - -inf
    out_block.mul_(ahead.sigmoid()[..., None])
    out.mul_(ahead.neg_().sigmoid_()[..., None]).add_(out_block)
    torch.logaddexp(lse, lse_block, out=lse)


def attention_block(q, k, v, causal=False, bias=None):
    """(out, lse) of queries against one block of keys, to be merged with other blocks. No autograd.

    q: (B, H, n, E), k, v: (B, G, m, E), none empty; causal: query i sees keys 0 .. i; bias:
    (B, 1, 1, m), -inf hides a key.  Returns out (B, H, n, E) and lse (B, H, n), the natural log of
    the summed weights, in float32 (float64 for float64).
    """
    has_kernel = fused(q, k, v, causal, bias)
    if q.device.type == "cpu" or not has_kernel:  # as fast there, and one rounding less
        q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
    return (fused_block if has_kernel else slow_block)(q, k, v, causal, bias)


def attention_block_grad(grad, q, k, v, out, lse, causal=False, bias=None):
    """(dq, dk, dv) of `attention_block`. out and lse: of the whole attention, not of this block.

    With P = exp(scores - lse), the weights of the whole softmax, the blocks' gradients add up.
    """
    has_kernel = fused(q, k, v, causal, bias)
    if q.device.type == "cpu" or not has_kernel:
        q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
    gradients = fused_block_grad if has_kernel else slow_block_grad
    return gradients(grad.to(q.dtype), q, k, v, out.to(q.dtype), lse, causal, bias)


def hide(keep, dtype):  # same as attention.py:hide
    """(B, L) bool -> bias (B, 1, 1, L): 0 for a real token, -inf for padding."""
    bias = torch.zeros(keep.shape, dtype=dtype, device=keep.device).masked_fill(~keep, -torch.inf)
    return bias[:, None, None, :]


def visible_blocks(q_segments, k_segments, causal):
    """Which local queries meet which local keys: [(query slice, key slice, diagonal)].

    Keys before a run of queries are seen by all of it, keys inside it along the diagonal and by
    the queries after them, keys behind it by none.  Diagonal: query i of the slice sees keys 0..i.
    """
    if not causal:
        return [(slice(0, size(q_segments)), slice(0, size(k_segments)), False)]
    blocks = []
    for a, b, to_row in runs(q_segments):
        for s, t, to_col in runs(k_segments):
            x, y = max(s, a), min(t, b)  # keys x .. y lie inside this run of queries
            for i, j, m, n, diagonal in (
                (a, b, s, min(t, a), False),
                (x, y, x, y, True),
                (y, b, x, y, False),
            ):
                if i < j and m < n:
                    rows, cols = slice(i + to_row, j + to_row), slice(m + to_col, n + to_col)
                    blocks.append((rows, cols, diagonal))
    return blocks


def runs(segments):
    """(start, stop, what leads from a global position to the local index) of every segment."""
    at = 0
    for start, stop in segments:
        yield start, stop, at - start
        at += stop - start


def squares(blocks, side=1024):
    """The same blocks in squares of a side: few scores to write out, few keys to add up at once."""
    for rows, cols, diagonal in blocks:
        for i in range(rows.start, rows.stop, side):
            seen = cols.start + i - rows.start + 1 if diagonal else cols.stop
            for j in range(cols.start, seen, side):
                there = slice(i, min(i + side, rows.stop)), slice(j, min(j + side, cols.stop))
                yield *there, diagonal and j + side >= seen


def masked_blocks(q, chunk, blocks):
    """Yields (queries, keys, (diagonal, bias)) as the kernels take them."""
    k, v, *keep = chunk
    if not (q.numel() and k.numel()):
        return
    bias = None
    if keep and not keep[0].all():
        bias = hide(keep[0][:, 0], torch.promote_types(q.dtype, torch.float32))
    if not fused(q, k, v, True, bias):
        blocks = squares(blocks)
    elif q.is_cuda:  # its kernels add up keys tile after tile: the more, the more they round
        blocks = squares(blocks, side=32768)
    for rows, cols, diagonal in blocks:
        yield rows, cols, (diagonal, None if bias is None else bias[..., cols])


def accumulate(out, lse, q, chunk, blocks):
    """Merge the blocks of a chunk of keys into out and lse, in place.

    chunk: (k, v), each (B, G, n, E), or (k, v, keep), keep (B, 1, n) bool: tokens on axis 2.
    """
    for rows, cols, mask in masked_blocks(q, chunk, blocks):
        k, v = (x[:, :, cols] for x in chunk[:2])
        merge_(out[:, :, rows], lse[:, :, rows], *attention_block(q[:, :, rows], k, v, *mask))


def accumulate_grad(dq, q, chunk, blocks, grad, out, lse):
    """Add what a chunk gives to dq, in place; return the (dk, dv) it gets. out, lse: global."""
    dk, dv = (torch.zeros_like(x, dtype=dq.dtype) for x in chunk[:2])
    for rows, cols, mask in masked_blocks(q, chunk, blocks):
        k, v = (x[:, :, cols] for x in chunk[:2])
        g, q_rows, out_rows, lse_rows = (x[:, :, rows] for x in (grad, q, out, lse))
        parts = attention_block_grad(g, q_rows, k, v, out_rows, lse_rows, *mask)
        add((dq[:, :, rows], dk[:, :, cols], dv[:, :, cols]), parts)
    return dk, dv


def add(totals, parts):
    """Add parts to totals, in place."""
    for total, part in zip(totals, parts, strict=True):
        total += part


# ---------------------------------------------------------------- messages


class RankLost(RuntimeError):
    """Another rank died, or kept silent longer than the group's timeout."""


traffic = Counter()  # "messages" and "bytes" this process has sent


def pack(tensors, device):
    """Tensors as one flat message of bytes, in order of falling element size (for alignment)."""
    nothing = torch.empty(0, dtype=torch.uint8, device=device)
    return torch.cat([nothing, *(x.contiguous().view(torch.uint8).flatten() for x in tensors)])


def unpack(message, spec):
    """The tensors of a message. spec: [(dtype, shape), ...]."""
    tensors, at = [], 0
    for dtype, shape in spec:
        stop = at + math.prod(shape) * dtype.itemsize
        tensors.append(message[at:stop].view(dtype).view(shape))
        at = stop
    return tensors


class Link:
    """The ranks of a group and messages between them. Without a process group: world 1, none.

    A message is a list of tensors; who receives it knows its spec [(dtype, shape), ...] beforehand.
    device: where the tensors live.
    """

    def __init__(self, group=None, device="cpu", alone=False):
        self.group, self.world, self.rank, self.device = group, 1, 0, device
        self.staged = device  # where messages lie while they travel
        if dist.is_initialized() and not alone:
            self.world, self.rank = dist.get_world_size(group), dist.get_rank(group)
            self.staged = "cpu" if dist.get_backend(group) == "gloo" else device
        if self.rank < 0:
            raise ValueError("this rank does not belong to the group")
        self.others = [peer for peer in range(self.world) if peer != self.rank]

    def post(self, sends, spec, what):
        """Start to send {rank: tensors} and to receive {rank: spec}. Returns wait().

        wait() returns {rank: tensors}.  Nothing of size 0 is sent.  RankLost names what and whom.
        The size of a message is its tag too: a longer one would end the process, a shorter one
        would leave a stale tail; now neither is taken, and the time runs out.
        """
        outgoing = {p: pack(x, self.device).to(self.staged) for p, x in sends.items()}
        sizes = {p: sum(math.prod(s) * d.itemsize for d, s in x) for p, x in spec.items()}
        options = {"dtype": torch.uint8, "device": self.staged}
        incoming = {p: torch.empty(n, **options) for p, n in sizes.items()}
        ops = []
        for start, buffers in ((dist.isend, outgoing), (dist.irecv, incoming)):
            for peer, x in buffers.items():
                if x.numel():
                    to = dist.get_global_rank(self.group, peer) if self.group else peer
                    op = dist.P2POp(start, x, to, self.group, tag=x.numel() % 2**31)
                    ops.append((peer, op))
        traffic["messages"] += sum(x.numel() > 0 for x in outgoing.values())
        traffic["bytes"] += sum(x.numel() for x in outgoing.values())
        # NCCL wants the messages of a step together; otherwise one by one, to know who is lost
        batches, works = [[op] for op in ops] if self.staged == "cpu" else [ops], []
        for batch in filter(None, batches):
            peers = sorted({peer for peer, _ in batch})
            with self.named(peers, what):
                started = dist.batch_isend_irecv([op for _, op in batch])
            works += [(peers, work) for work in started]

        def wait():
            for peers, work in works:
                with self.named(peers, what):
                    work.wait()
            outgoing.clear()  # what is sent must live until here
            return {p: unpack(x.to(self.device), spec[p]) for p, x in incoming.items()}

        return wait

    @contextlib.contextmanager
    def named(self, peers, what):
        """Turn an error of the transport into one that says who waited for whom, and where."""
        try:
            yield
        except RuntimeError as error:
            whom = " and ".join(f"rank {peer}" for peer in peers)
            reason = str(error).strip().splitlines()[0]
            me = f"rank {self.rank} of {self.world}"
            raise RankLost(f"{me}: no answer from {whom} in {what}: {reason}") from error

    def shift(self, tensors, spec, what):
        """One step of the ring: tensors go to the next rank, those of spec come from the last."""
        there, back = (self.rank + 1) % self.world, (self.rank - 1) % self.world
        wait = self.post({there: tensors}, {back: spec}, what)
        return lambda: wait()[back]

    def swap(self, messages, specs, what):
        """Send messages[p] to rank p, get what specs[p] says from it: a list over ranks."""
        sends, coming = ({p: x[p] for p in self.others} for x in (messages, specs))
        came = self.post(sends, coming, what)()
        return [came.get(peer, messages[self.rank]) for peer in range(self.world)]


def collect(link, x, segments, dim, what):
    """The whole of x in global order, on every rank, from every rank's own tokens along dim."""
    specs = [[(x.dtype, (*x.shape[:dim], size(s), *x.shape[dim + 1 :]))] for s in segments]
    parts = link.swap([[x]] * link.world, specs, what)
    return join([part for (part,) in parts], segments, dim)


# ---------------------------------------------------------------- handshake


def agree(link, problem, lengths=(), **facts):
    """Raise the same ValueError on every rank unless all state the same facts and no problem.

    lengths: what may differ.  Returns the lengths of all ranks.  Sizes that differ are silently
    wrong, or fatal, in the transport: no other message goes before this.
    """
    stated = [(problem, facts, lengths)] * link.world
    if link.world > 1:
        with link.named(link.others, "the handshake"):
            dist.all_gather_object(stated, stated[0], group=link.group)
    problems = [f"rank {r}: {x[0]}" for r, x in enumerate(stated) if x[0]]
    if problems:
        raise ValueError("; ".join(problems))
    for name in stated[0][1]:
        values = [str(x[1].get(name)).removeprefix("torch.") for x in stated]
        usual = Counter(values).most_common(1)[0][0]  # of a tie, that of the lower rank
        odd = [f"rank {r} has {x}" for r, x in enumerate(values) if x != usual]
        if odd:
            raise ValueError(f"{name}: {', '.join(odd)}, the others have {usual}")
    return [x[2] for x in stated]


def check_layout(layout, lengths, world):
    """Segments of all ranks. ValueError when a rank's length is not what the layout gives it."""
    segments = layout(sum(lengths), world)
    given = [size(own) for own in segments]
    if given != lengths:
        held, given = (", ".join(map(str, x)) for x in (lengths, given))
        name = layout.__name__
        raise ValueError(f"the ranks hold {held} tokens; layout {name} gives them {given}")
    return segments


def unshard(x, dim=1, group=None, layout=contiguous):
    """The whole sequence, on every rank, from the shards x. For looking at: carries no gradient."""
    link, x = Link(group, x.device), x.detach().movedim(dim, 0)  # (n, ...)
    facts = {"dimensions": x.ndim, "shape of a token": tuple(x.shape[1:]), "dtype": x.dtype}
    lengths = agree(link, None, [len(x)], call="unshard", **facts)
    segments = check_layout(layout, [n for (n,) in lengths], link.world)
    return collect(link, x, segments, 0, "unshard").movedim(0, dim)


def find_problem(q, k, v, keep, refused):
    """What is wrong with the arguments of this rank, as text, or None."""
    asked = [name for name, value in refused.items() if torch.is_tensor(value) or value]
    if asked:
        return f"not implemented: {', '.join(asked)}"
    same = q.ndim == k.ndim == 4 and k.shape == v.shape and q.shape[::3] == k.shape[::3]  # B, E
    if not same or q.shape[1] % max(1, k.shape[1]):
        return f"expected q (B, H, n, E), k and v (B, G, n, E), G divides H, got {shapes(q, k, v)}"
    if len({x.dtype for x in (q, k, v)}) > 1 or not q.is_floating_point():
        return f"expected one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}"
    if keep is not None and (keep.dtype != torch.bool or keep.shape != (len(k), k.shape[2])):
        return f"expected keep {(len(k), k.shape[2])} bool, got {tuple(keep.shape)} {keep.dtype}"
    return None


def shapes(*tensors):
    return ", ".join(str(tuple(x.shape)) for x in tensors)


def wanted(*tensors):
    """Whose gradients autograd will ask for: where ranks differ, one would wait in backward."""
    return [x.requires_grad and torch.is_grad_enabled() for x in tensors]


@dataclass(frozen=True)
class Plan:
    """What all ranks agreed on: the ranks, the mask, and who holds which queries and keys."""

    link: Link
    causal: bool
    q_segments: list
    k_segments: list

    def spec(self, owner, tensors):
        """The [(dtype, shape)] of such tensors, (B, G, n, E) each, for the keys of a rank."""
        n = size(self.k_segments[owner])
        return [(x.dtype, (*x.shape[:2], n, *x.shape[3:])) for x in tensors]

    def blocks(self, owner):
        """Blocks of this rank's queries with the keys of a rank."""
        mine, theirs = self.q_segments[self.link.rank], self.k_segments[owner]
        return visible_blocks(mine, theirs, self.causal)


def handshake(schedule, q, k, v, causal, group, layout, keep, refused):
    """Check the arguments on all ranks.  Returns the Plan and the chunk (k, v) or (k, v, keep).

    ValueError, the same on all ranks.
    """
    link, facts, lengths = Link(group, q.device), {}, ()
    problem = find_problem(q, k, v, keep, refused)
    if problem is None:
        (B, H, n, E), (_, G, m, _) = q.shape, k.shape
        lengths = n, m
        facts = {"dtype": q.dtype, "batch B": B, "query heads H": H, "key heads G": G}
        facts |= {"head size E": E, "causal": int(causal), "layout": layout.__name__}
        facts |= {"schedule": schedule, "keep": int(keep is not None)}
        facts |= {"gradients of q, k, v": wanted(q, k, v)}
    lengths = agree(link, problem, lengths, **facts)
    q_lengths, k_lengths = ([*x] for x in zip(*lengths, strict=True))
    Lq, Lk = sum(q_lengths), sum(k_lengths)
    if causal and Lq != Lk:
        raise ValueError(f"a causal mask needs as many queries as keys, got {Lq} and {Lk}")
    segments = [check_layout(layout, x, link.world) for x in (q_lengths, k_lengths)]
    return Plan(link, causal, *segments), (k, v) if keep is None else (k, v, keep[:, None])


# ---------------------------------------------------------------- the ring


class RingAttention(torch.autograd.Function):
    """Queries stay; chunks of keys and values go round: in step s a rank has that of rank - s."""

    @staticmethod
    def forward(ctx, plan, q, *chunk):
        ctx.plan, link, W = plan, plan.link, plan.link.world
        own, (out, lse) = chunk, nothing_seen(q)
        for step in range(W):
            owner, following = (link.rank - step) % W, (link.rank - step - 1) % W
            going = chunk if step < W - 1 else ()  # the last chunk has been everywhere
            wait = link.shift(going, plan.spec(following, going), f"step {step} of the ring")
            accumulate(out, lse, q, chunk, plan.blocks(owner))  # while the next chunk travels
            chunk = wait()
        out = out.to(q.dtype)
        ctx.save_for_backward(q, out, lse, *own)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        """The chunks go round again.  What a chunk's gradients are so far follows a step behind it.

        They set out from the rank after the owner, which adds its own share when they come home:
        a hop less.  One message a step holds both: sums of the chunk here, then the next chunk.
        """
        q, out, lse, *chunk = ctx.saved_tensors
        plan, link, W = ctx.plan, ctx.plan.link, ctx.plan.link.world
        dq, sums = torch.zeros_like(q, dtype=lse.dtype), ()
        for step in range(W):
            owner, following = (link.rank - step) % W, (link.rank - step - 1) % W
            going = chunk if step < W - 1 else ()
            spec = plan.spec(owner, sums) + plan.spec(following, going)
            wait = link.shift((*sums, *going), spec, f"step {step} of the ring, backward")
            dkv = accumulate_grad(dq, q, chunk, plan.blocks(owner), grad, out, lse)
            came = wait()
            add(dkv[: len(sums)], came[: len(sums)])
            chunk = came[len(sums) :]
            if step == 0:
                home = dkv
            else:
                sums = dkv
        came = link.shift(sums, plan.spec(link.rank, sums), "the last hop of the ring, backward")()
        add(home[: len(sums)], came)
        return None, *as_inputs(ctx, dq, *home)


def as_inputs(ctx, *grads):
    """Gradients of q, k, v in the dtype of these, and None for keep if there is one."""
    q, _, _, *chunk = ctx.saved_tensors
    return *(g.to(q.dtype) for g in grads), *[None] * (len(chunk) - 2)


def ring_attention(q, k, v, causal=False, group=None, layout=contiguous, keep=None, *,
                   dropout=0.0, window=None, bias=None):  # fmt: skip
    """Exact attention over shards, keys and values passing round a ring (arXiv:2310.01889v4).

    q: (B, H, n, E), k, v: (B, G, m, E), this rank's tokens as layout(L, W) gives them; n and m may
    differ from rank to rank and be 0.  causal needs the same tokens in q and k.  keep: (B, m) bool.
    Returns (B, H, n, E) in the dtype of q, with gradients.  Every rank of the group must call it,
    forward and backward.  ValueError, the same on every rank, names who disagrees; RankLost, a peer
    that died or is silent.  dropout, window and bias are not implemented, and refused likewise.
    """
    refused = {"dropout": dropout, "window": window, "bias": bias}
    plan, chunk = handshake("ring", q, k, v, causal, group, layout, keep, refused)
    return RingAttention.apply(plan, q, *chunk)


# ---------------------------------------------------------------- all-gather


class AllGatherAttention(torch.autograd.Function):
    """Every rank collects all keys and values; gradients go back to their owners, and are added."""

    @staticmethod
    def gathered(plan, chunk):
        """All keys in global order, (B, G, L, E) each, and the blocks of own queries with them."""
        specs = [plan.spec(owner, chunk) for owner in range(plan.link.world)]
        came = plan.link.swap([chunk] * plan.link.world, specs, "the all-gather")
        whole = [join(parts, plan.k_segments, 2) for parts in zip(*came, strict=True)]
        mine, all_keys = plan.q_segments[plan.link.rank], [(0, whole[0].shape[2])]
        return whole, visible_blocks(mine, all_keys, plan.causal)

    @staticmethod
    def forward(ctx, plan, q, *chunk):
        ctx.plan, (out, lse) = plan, nothing_seen(q)
        accumulate(out, lse, q, *AllGatherAttention.gathered(plan, chunk))
        out = out.to(q.dtype)
        ctx.save_for_backward(q, out, lse, *chunk)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        """All keys are collected again, not kept; their gradients are added up by their owners."""
        q, out, lse, *chunk = ctx.saved_tensors
        plan, link = ctx.plan, ctx.plan.link
        dq = torch.zeros_like(q, dtype=lse.dtype)
        whole, blocks = AllGatherAttention.gathered(plan, chunk)
        dkv = accumulate_grad(dq, q, whole, blocks, grad, out, lse)
        parts = [[pick(x, s, 2) for x in dkv] for s in plan.k_segments]
        own = plan.spec(link.rank, dkv)
        came = link.swap(parts, [own] * link.world, "the reduce-scatter")
        dk, dv = (sum(x) for x in zip(*came, strict=True))  # in order of rank
        return None, *as_inputs(ctx, dq, dk, dv)


def allgather_attention(q, k, v, causal=False, group=None, layout=contiguous, keep=None, *,
                        dropout=0.0, window=None, bias=None):  # fmt: skip
    """Exact attention over shards, all keys and values on every rank. As `ring_attention`."""
    refused = {"dropout": dropout, "window": window, "bias": bias}
    plan, chunk = handshake("allgather", q, k, v, causal, group, layout, keep, refused)
    return AllGatherAttention.apply(plan, q, *chunk)


# ---------------------------------------------------------------- all-to-all


def shares(C, world, unit=1):
    """C channels in whole units, as evenly as they go: per rank a slice."""
    cut = [C // unit * r // world * unit for r in range(world + 1)]
    return [slice(a, b) for a, b in pairwise(cut)]


class Exchange(torch.autograd.Function):
    """Tokens for channels: (B, C, n, E), a share of the tokens, -> (B, C_r, L, E), of the channels.

    segments: per rank, its tokens; cut: per rank, the slice of its channels.  back: the other way.
    """

    @staticmethod
    def forward(ctx, x, link, segments, cut, back=False):
        ctx.args, ctx.back = (link, segments, cut), back
        return (to_tokens if back else to_channels)(x, *ctx.args)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        """The exchange the other way."""
        return (to_channels if ctx.back else to_tokens)(grad, *ctx.args), None, None, None, None


def to_channels(x, link, segments, cut):
    """(B, C, n, E) -> (B, C_r, L, E)."""
    B, mine, E = len(x), cut[link.rank], x.shape[3]
    specs = [[(x.dtype, (B, mine.stop - mine.start, size(s), E))] for s in segments]
    parts = link.swap([[x[:, theirs]] for theirs in cut], specs, "the all-to-all")
    return join([part for (part,) in parts], segments, 2)


def to_tokens(x, link, segments, cut):
    """(B, C_r, L, E) -> (B, C, n, E): the reverse of `to_channels`."""
    B, n, E = len(x), size(segments[link.rank]), x.shape[3]
    specs = [[(x.dtype, (B, theirs.stop - theirs.start, n, E))] for theirs in cut]
    parts = link.swap([[pick(x, s, 2)] for s in segments], specs, "the all-to-all")
    return torch.cat([part for (part,) in parts], 1)


def ulysses_attention(q, k, v, causal=False, group=None, layout=contiguous, keep=None, *,
                      dropout=0.0, window=None, bias=None):  # fmt: skip
    """Exact attention over shards: a rank gets whole sequences of H/W heads (arXiv:2309.14509v2).

    As `ring_attention`.  Key heads are dealt out whole with their query heads, as evenly as they
    go; with fewer key heads than ranks some ranks have nothing to compute.
    """
    refused = {"dropout": dropout, "window": window, "bias": bias}
    plan, (k, v, *keep) = handshake("ulysses", q, k, v, causal, group, layout, keep, refused)
    link, H, G = plan.link, q.shape[1], k.shape[1]
    q_cut, k_cut = shares(H, link.world, H // G), shares(G, link.world)
    q = Exchange.apply(q, link, plan.q_segments, q_cut)  # (B, H, n, E) -> (B, H_r, L, E)
    kv = Exchange.apply(torch.cat([k, v], 3), link, plan.k_segments, k_cut)  # one message for both
    keep = [collect(link, x, plan.k_segments, 2, "the gather of keep") for x in keep]
    alone = Link(device=q.device, alone=True)
    local = Plan(alone, causal, [[(0, q.shape[2])]], [[(0, kv.shape[2])]])
    out = RingAttention.apply(local, q, *kv.chunk(2, 3), *keep)  # (B, H_r, L, E)
    return Exchange.apply(out, link, plan.q_segments, q_cut, True)


class ulysses(nn.Module):
    """A channel-wise mixer over shards of tokens: each rank runs whole sequences of D/W channels.

        mixer = ulysses(S4(d_model), axes={"C": 1})      x (B, n, D), keep (B, n) -> (B, n, D)

    Arguments and errors: `mix`.  `sum_gradients` adds up the ranks' parameter gradients.
    """

    def __init__(self, mixer, axes=None, group=None, layout=contiguous):
        super().__init__()
        self.mixer, self.options = mixer, (axes, group, layout)
        check_channels(mixer, axes or {})

    def forward(self, x, keep=None):
        return mix(self.mixer, x, keep, *self.options)


def check_channels(mixer, axes):
    """ValueError unless the mixer can be cut into channels along these axes."""
    if list(mixer.children()):
        raise ValueError(f"{type(mixer).__name__} has modules inside, whose channels may meet")
    for name, x in [*mixer.named_parameters(), *mixer.named_buffers()]:
        axis = axes.get(name, 0)
        if x.ndim <= axis or x.shape[axis] != mixer.d_model:
            raise ValueError(
                f"{name} {tuple(x.shape)}: axis {axis} is not d_model {mixer.d_model} long, name "
                f"the axis of its channels in axes"
            )


def some_channels(mixer, axes, channels):
    """The mixer of a slice of the channels, made of views of the parameters of the whole one."""
    part, n = copy.copy(mixer), channels.stop - channels.start
    part.__dict__.pop("forward", None)  # where `mix` stands in for the mixer's own
    for kind in ("_parameters", "_buffers"):
        whole = getattr(mixer, kind).items()
        views = {name: x.narrow(axes.get(name, 0), channels.start, n) for name, x in whole}
        setattr(part, kind, views)
    part.d_model = n
    return part


def mix(mixer, x, keep=None, axes=None, group=None, layout=contiguous):
    """A channel-wise mixer over shards: x (B, n, D), keep (B, n) bool -> (B, n, D).

    Exact, forward and backward, for any module (B, L, D), keep -> (B, L, D) with `d_model` whose
    channels do not meet.  axes: which axis of a parameter or buffer counts channels, where it is
    not axis 0.  A rank computes the parameter gradients of its channels alone.
    ValueError, on every rank: other shapes or dtypes somewhere, fewer channels than ranks.
    """
    link, D, axes = Link(group, x.device), mixer.d_model, axes or {}
    problem = f"{D} channels are fewer than {link.world} ranks" if link.world > D else None
    if x.ndim != 3 or x.shape[2] != D:
        problem = f"expected x (B, n, {D}), got {shapes(x)}"
    facts = {"batch B": len(x), "dtype": x.dtype, "layout": layout.__name__}
    facts |= {"keep": int(keep is not None), "gradient": wanted(x)}
    lengths = agree(link, problem, [x.shape[1]], **facts)
    segments = check_layout(layout, [n for (n,) in lengths], link.world)
    cut = shares(D, link.world)
    if keep is not None:
        keep = collect(link, keep, segments, 1, "the gather of keep")  # (B, n) -> (B, L)
    u = Exchange.apply(x.mT[..., None], link, segments, cut)  # (B, D, n, 1) -> (B, D_r, L, 1)
    y = some_channels(mixer, axes, cut[link.rank])(u[..., 0].mT, keep)  # (B, L, D_r)
    return Exchange.apply(y.mT[..., None], link, segments, cut, True)[..., 0].mT  # (B, n, D)


def sum_gradients(parameters, group=None):
    """Add up the gradients of all ranks, each of which saw its own tokens or channels alone."""
    link, parameters = Link(group), list(parameters)
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if link.world == 1 or not parameters:
        return
    flat = torch.cat([p.grad.flatten() for p in parameters])
    with link.named(link.others, "the sum of gradients"):
        dist.all_reduce(flat, group=group)
    for p, total in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad.copy_(total.view_as(p))


@contextlib.contextmanager
def process_group(device="cpu", timeout=60.0):
    """Join the ranks that torchrun started, leave them at the end; without torchrun do nothing.

    NCCL when every rank has a GPU of its own, else gloo (through host memory).  timeout: seconds
    after which a silent rank counts as lost.  Yields (rank, world, device of this rank).
    """
    if "WORLD_SIZE" not in os.environ:
        yield 0, 1, torch.device(device)
        return
    local, local_world = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    backend = "gloo"
    if device == "cuda":
        backend = "nccl" if torch.cuda.device_count() >= local_world else "gloo"
        device = f"cuda:{local % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    try:
        yield dist.get_rank(), dist.get_world_size(), torch.device(device)
        dist.barrier()
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------- self-check


def rel_err(a, b):
    """max|a - b| / max|b|, with max|b| > 0."""
    scale = b.abs().max().item()
    assert a.shape == b.shape and scale > 0, f"{shapes(a, b)}, largest {scale}"
    return (a - b).abs().max().item() / scale


def worst(errors, device):
    """The largest error of any rank; what is not a number counts as infinite."""
    largest = max(math.inf if math.isnan(e) else e for e in errors)
    error = torch.tensor(largest, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(error, op=dist.ReduceOp.MAX)
    return error.item()


def check_case(attend, layout, causal, dtype, device, lengths=(45, 45), heads=(4, 2), padded=False):
    """Largest error of out, dq, dk, dv of any rank against one process, random output gradient."""
    link, generator = Link(), torch.Generator().manual_seed(0)
    sizes = ((2, heads[i], lengths[i], 16) for i in (0, 0, 1, 1))
    draws = (torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes)
    q, grad, k, v = (x.to(dtype).to(device) for x in draws)
    at = torch.arange(lengths[1], device=device)  # the second example is half padding
    keep = torch.stack([at >= 0, at < lengths[1] // 2]) if padded else None
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    whole = product(*leaves, causal, keep)
    expected = [whole.detach(), *torch.autograd.grad(whole, leaves, grad.double())]

    def mine(x, dim=2):
        return None if x is None else shard(x, link.rank, link.world, dim, layout)

    own, errors = [mine(x).requires_grad_() for x in (q, k, v)], [0.0]
    out = attend(*own, causal=causal, layout=layout, keep=mine(keep, 1))
    got = [out.detach(), *torch.autograd.grad(out, own, mine(grad))]
    for x, y in zip(got, expected, strict=True):
        scale = y.abs().max().item()
        assert x.dtype == dtype and scale > 0
        if x.numel():
            errors.append((x.double() - mine(y)).abs().max().item() / scale)
    return worst(errors, device)


SCHEDULES = ring_attention, allgather_attention, ulysses_attention
LIMITS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3}  # of relative errors


def self_check(dtype=torch.float64, device="cpu"):
    """Forward and all gradients of every rank against one process. Returns [(name, error, limit)].

    Every rank of the default group must call it; all get the same rows.
    """
    limit = LIMITS[dtype]
    generator, at = np.random.RandomState(0), np.arange(29)
    q, k, v = (generator.randn(29, 8) for _ in range(3))
    whole = torch.from_numpy(block_ref(q, k, v, at, at, True)[0])
    ring = torch.from_numpy(ring_ref(q, k, v, max(Link().world, 3), True, zigzag))
    rows = [("reference: ring of ranks == one block", rel_err(ring, whole), 1e-12)]
    cases = [
        ("contiguous, full", contiguous, False, {}),
        ("contiguous, causal", contiguous, True, {}),
        ("zigzag, full", zigzag, False, {}),
        ("zigzag, causal", zigzag, True, {}),
        ("padded", zigzag, False, {"padded": True}),
        ("padded, causal", zigzag, True, {"padded": True}),
        ("other keys than queries", zigzag, False, {"lengths": (45, 18)}),
        ("two tokens", zigzag, True, {"lengths": (2, 2)}),
        ("one key head", zigzag, True, {"heads": (3, 1)}),
    ]
    for attend in SCHEDULES:
        for name, layout, causal, options in cases:
            error = check_case(attend, layout, causal, dtype, device, **options)
            rows.append((f"{attend.__name__.split('_')[0]}, {name}", error, limit))
    return rows


def print_table(rows):
    """Print a check table."""
    print(f"{'check: out, dq, dk, dv on all ranks':<42}{'error':>9}{'limit':>9}")
    for name, error, limit in rows:
        print(f"  {name:<40}{error:9.1e}{limit:9.0e}   {'ok' if error <= limit else 'FAIL'}")


# ---------------------------------------------------------------- the run


def random_tokens(seed, start, stop, heads, d_head, block=4096):
    """Tokens start .. stop of a random sequence: (1, heads, n, E). Any rank can make any part."""
    parts = []
    for b in range(start // block, -(-stop // block)):
        generator = torch.Generator().manual_seed(seed * 2**32 + b)
        x = torch.randn(heads, block, d_head, generator=generator)
        parts.append(x[:, max(0, start - b * block) : stop - b * block])
    return torch.cat(parts, 1)[None]


def sampled_error(q, out, at, rows, part=65536):
    """Errors of sampled rows against float64, over keys and values that are made again by parts."""
    (_, heads, _, E), errors = q.shape, []
    for row in rows:
        stop = int(at[row]) + 1  # keys 0 .. stop - 1 are seen
        q_row = q[0, :, row, :, None].double().cpu() / math.sqrt(E)  # (H, E, 1)
        cuts = [*range(0, stop, part), stop]
        keys = (random_tokens(1, *cut, heads, E)[0].double() for cut in pairwise(cuts))
        weights = torch.cat([k @ q_row for k in keys], 1).softmax(1).split(part, 1)  # (H, part, 1)
        values = (random_tokens(2, *cut, heads, E)[0].double() for cut in pairwise(cuts))
        expected = sum((w * v).sum(1) for w, v in zip(weights, values, strict=True))  # (H, E)
        errors.append(rel_err(out[0, :, row].double().cpu(), expected))
    return errors


def run(tokens, heads, d_head, device, rank, world):
    """Causal zigzag ring attention over `tokens` tokens, once; some rows against float64."""
    segments = zigzag(tokens, world)[rank]
    q, k, v = (
        torch.cat([random_tokens(s, a, b, heads, d_head) for a, b in segments], 2).to(device)
        for s in (0, 1, 2)
    )
    traffic.clear()
    start, cpu = time.perf_counter(), time.process_time()
    with torch.no_grad():
        out = ring_attention(q, k, v, causal=True, layout=zigzag)
    if out.is_cuda:
        torch.cuda.synchronize()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    at = positions(tokens, rank, world, zigzag)
    rows = sorted({0, len(at) // 3, len(at) // 2, len(at) - 1})
    setting = f"{tokens:,} tokens, {heads} head of {d_head}, causal, zigzag ring, {world} ranks of "
    return {
        "setting": f"{setting}{torch.get_num_threads()} threads, float32, {device.type}",
        "wall": worst([seconds], device),
        "cpu": worst([cpu], device),  # of one rank
        "flop": 2 * tokens * (tokens + 1) * heads * d_head,  # of all ranks
        "bytes": traffic["bytes"],
        "messages": traffic["messages"],
        "rows": len(rows),
        "error": worst(sampled_error(q, out, at, rows), device),
    }


def print_run(row):
    """Print what `run` measured."""
    speed, sent = row["flop"] / row["wall"] / 1e9, row["bytes"] / 1e6
    print(
        f"{row['setting']}\n"
        f"  {row['wall']:.2f} s wall, {speed:.1f} Gflop/s in all; a rank: {row['cpu']:.2f} s CPU, "
        f"{sent:.1f} MB sent in {row['messages']} messages\n"
        f"  {row['rows']} rows a rank against float64: {row['error']:.1e}, "
        f"limit {LIMITS[torch.float32]:.0e}",
        flush=True,
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="check table alone")
    parser.add_argument("--tokens", type=int, default=131_072, help="length of the timed run")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--timeout", type=float, default=60, help="seconds till a rank is lost")
    args = parser.parse_args(argv)
    if args.tokens < 1:
        parser.error(f"--tokens {args.tokens}: expected at least 1")
    with process_group(args.device, args.timeout) as (rank, world, device):
        if rank == 0:
            print(f"dist_attention.py  torch {torch.__version__}  {device}  {world} ranks  seed 0")
        rows = self_check(device=device)
        if rank == 0:
            print_table(rows)
        ok = all(error <= limit for _, error, limit in rows)
        if not args.check:
            row = run(args.tokens, 1, 64, device, rank, world)
            ok = ok and row["error"] <= LIMITS[torch.float32]
            if rank == 0:
                print_run(row)
    return 0 if ok else 1


def guarded(call, *args):
    """call(*args); when ranks disagree or one is lost, a message and exit status 1 instead."""
    try:
        return call(*args)
    except (ValueError, RankLost) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # the transport's threads may still wait for the lost rank


if __name__ == "__main__":
    sys.exit(guarded(main))
