"""Several processes, one training run: they share the examples, or the tokens of each example.

Sharing examples is what everybody knows as data parallelism: each process takes some of a batch,
`total` adds the gradients. Sharing tokens lets one sequence be longer than a device can hold: each
process has n of the L tokens of every example. Embedding, norms, FFN and loss look at one token at
a time and need nothing; the token mixers meet through dist_attention.py: a Transformer's attention
by ring or all-to-all, S4, S4D and SGConv by the all-to-all over channels. Both ways are exact: the
losses are those of one process (to 1e-10 in float64, without dropout).

    layout = token_layout(model, causal)
    model = spread(model, "ring", layout)                  # same parameters, same names
    x = own(x, layout)                                     # (B, L, ...) -> (B, n, ...)
    h = model(x, keep, positions=own_positions(L, layout, x.device))    # (B, n, D)
    mean = SumOverRanks.apply(h.sum(1)) / L                # (B, D), the same on every process

A loss that every process has (of a pooled sequence) must be counted by one of them alone.
Not included: dropout over shared tokens, pooling other than the mean.
"""

from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from textwrap import shorten

import torch
import torch.distributed as dist

import dist_attention
from attention import Attention, Transformer
from sgconv import SGConv

# ------------------------------------------------------------------------- processes, examples


def ranks():
    """This process's number and how many there are: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextmanager
def together():
    """What fails because another process is gone becomes a RankLost with one line."""
    try:
        yield
    except RuntimeError as error:
        reason = shorten(str(error), 200)
        raise dist_attention.RankLost(f"another process was lost: {reason}") from error


def share_of_examples(tokens):
    """(rank, world): this process takes part `rank` of `world`; all when they share the tokens."""
    return (0, 1) if tokens else ranks()


def part(batch, i, n):
    """The i-th of n parts of a batch, by examples; None when it is empty.

    batch: a NamedTuple x, keep, where, target, each (B, ...) or None; target has (B / 2,) of pairs.
    """
    examples = len(batch.target)
    low, high = examples * i // n, examples * (i + 1) // n
    rows = len(batch.x) // examples  # 2 of a pair
    cut = [None if t is None else t[low * rows : high * rows] for t in batch[:3]]
    return type(batch)(*cut, batch.target[low:high]) if high > low else None


def total(tensors):
    """Sums each tensor over the processes, in place, in one message."""
    if ranks()[1] > 1:
        flat = torch.cat([t.reshape(-1) for t in tensors])
        with together():
            dist.all_reduce(flat)
        for t, piece in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.copy_(piece.view_as(t))


def leader_first(work):
    """-> work(), done by the first process before the others, which find what it has cached."""
    rank, world = ranks()
    if world == 1:
        return work()
    # gloo: its barrier waits on the host, however long; NCCL's would time out on the device
    patient = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    if rank > 0:
        with together():
            dist.barrier(patient)
        return work()
    result = work()
    with together():
        dist.barrier(patient)
    return result


# -------------------------------------------------------------------------------------- tokens


def token_layout(model, causal):
    """Which process holds which tokens: zigzag balances the work of a causal Transformer."""
    zigzag = causal and isinstance(model.blocks[0].mixer, Attention)
    return dist_attention.zigzag if zigzag else dist_attention.contiguous


def spread(model, how, layout):
    """Lets the mixers of a model work on shards of tokens.  how: "ring" or "ulysses"."""
    product = getattr(dist_attention, f"{how}_attention")

    def attend(q, k, v, causal, keep):
        return product(q, k, v, causal, layout=layout, keep=keep)

    for block in model.blocks:
        mixer = block.mixer
        if isinstance(mixer, Attention):
            mixer.attend = attend
            continue
        axes = {"C": 1}  # of S4, (directions, D, ..); every other parameter counts channels first
        if isinstance(mixer, SGConv):
            axes = {"w": mixer.w.ndim - 2, "norm": mixer.norm.ndim - 2}
        dist_attention.check_channels(mixer, axes)
        mixer.forward = partial(dist_attention.mix, mixer, axes=axes, layout=layout)
    return model


def own(x, layout):
    """This process's tokens: x (B, L, ...) -> (B, n, ...)."""
    return dist_attention.shard(x, dist.get_rank(), dist.get_world_size(), 1, layout)


def own_tokens(model, batch, causal):
    """This process's tokens of a batch, and what the model has to know besides."""
    layout = token_layout(model, causal)
    # all but the labels, (B,)
    mine = type(batch)(*(t if t is None or t.ndim == 1 else own(t, layout) for t in batch))
    if not isinstance(model, Transformer):
        return mine, {}
    return mine, {"positions": own_positions(batch.x.shape[1], layout, batch.x.device)}


def own_positions(L, layout, device):
    """The places of this process's tokens in the sequence: (n,)."""
    rank, world = dist.get_rank(), dist.get_world_size()
    return dist_attention.positions(L, rank, world, layout).to(device)


class SumOverRanks(torch.autograd.Function):
    """Adds over the processes; its gradient does so too, for one process alone has the loss."""

    @staticmethod
    def forward(ctx, x):
        """x -> its sum over the processes."""
        x = x.clone()
        with together():
            dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        """The sum of the gradients."""
        return SumOverRanks.forward(ctx, grad)
