"""One sequence over several processes: a whole model trains on tokens that are shared out.

Each process holds n of the L tokens of every example. Embedding, norms, FFN and loss look at one
token at a time and need nothing; the token mixers meet through dist_attention.py: a Transformer's
attention by ring or all-to-all, S4, S4D and SGConv by the all-to-all over channels. Exact, forward
and backward: the losses of a training run are those of one process (to 1e-10 in float64).

    model = spread(model, "ring", layout)               # the same parameters under the same names
    x = own(x, layout)                                   # (B, L, ...) -> (B, n, ...)
    h = model(x, keep, positions=own_positions(L, layout, x.device))    # (B, n, D)
    mean = SumOverRanks.apply(h.sum(1)) / L              # (B, D), the same on every process

Gradients of parameters are added over the processes by the caller, as in data parallelism; a loss
that every process has (of a pooled sequence) must be counted by one of them alone.
Not included: dropout, pooling other than the mean.
"""

from functools import partial

import torch
import torch.distributed as dist

import dist_attention
from attention import Attention
from sgconv import SGConv


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
        axes = {"C": 1}  # of S4 and S4D; every other parameter counts channels first
        if isinstance(mixer, SGConv):
            axes = {"w": mixer.w.ndim - 2, "norm": mixer.norm.ndim - 2}
        dist_attention.check_channels(mixer, axes)
        mixer.forward = partial(dist_attention.mix, mixer, axes=axes, layout=layout)
    return model


def own(x, layout):
    """This process's tokens: x (B, L, ...) -> (B, n, ...)."""
    return dist_attention.shard(x, dist.get_rank(), dist.get_world_size(), 1, layout)


def own_positions(L, layout, device):
    """The places of this process's tokens in the sequence: (n,)."""
    rank, world = dist.get_rank(), dist.get_world_size()
    return dist_attention.positions(L, rank, world, layout).to(device)


class SumOverRanks(torch.autograd.Function):
    """Adds over the processes; its gradient does so too, for one process alone has the loss."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return SumOverRanks.forward(ctx, grad)
