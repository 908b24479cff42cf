"""Ring attention in your own training loop: a causal Transformer on sequences split over processes.

Any number of processes prints the same losses, up to rounding:
    torchrun --standalone --nproc-per-node 2 examples/ring_training.py
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dist_attention as da
from attention import Transformer, TransformerConfig

argparse.ArgumentParser(description=__doc__).parse_args()  # no options
LAYOUT = "zigzag"  # gives all ranks the same work under a causal mask
L = 301  # tokens per sequence, any number
with da.process_group() as (rank, world, device):
    torch.manual_seed(0)  # the same weights on every rank
    model = Transformer(TransformerConfig(d_model=32, n_heads=4, vocab_size=10, causal=True))
    head = torch.nn.Linear(32, 10)
    da.spread(model, "ring", LAYOUT)
    for block in model.blocks:  # keep only the input of a block, compute the rest again in backward
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    at = da.positions(L, rank, world, LAYOUT)  # (n,), of this rank's tokens
    for step in range(20):
        tokens = (torch.randint(10, (8, 1)) + torch.arange(L)) % 10  # (B, L), the same on all ranks
        labels = F.pad(tokens[:, 1:], (0, 1), value=-100)  # shift before sharding; -100: no label
        count = (labels != -100).sum()  # of all ranks
        x = da.own_tokens(tokens, LAYOUT)  # (B, n)
        y = da.own_tokens(labels, LAYOUT)
        logits = head(model(x, positions=at))  # (B, n, 10)
        loss = F.cross_entropy(logits.mT, y, reduction="sum") / count  # this rank's part
        loss.backward()
        da.sum_gradients(parameters)
        optimizer.step()
        optimizer.zero_grad()
        mean = da.all_reduce(loss.detach())
        if rank == 0:
            print(f"step {step}  loss {mean:.6f}")
