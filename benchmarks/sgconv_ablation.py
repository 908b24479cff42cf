"""SGConv's two principles (2210.09298), each taken away: few parameters, and decay with the lag.

    python benchmarks/sgconv_ablation.py               all missing runs and the table (6 min)
    python benchmarks/sgconv_ablation.py --max-runs 1  one run more (25 s of one core), resumable
    python benchmarks/sgconv_ablation.py --task listops-tiny --steps 2000     the other small task

    as published                 4 numbers a scale, each scale damped by another 1/2
    without decay                4 numbers a scale, no damping
    dense                        one number a lag, damped as published lag by lag
    dense, without decay         one number a lag, no damping: a free kernel

Two bidirectional layers of width 64 from scratch, AdamW, one cosine, mean over positions.  The rate
is chosen on validation for the published kernel with seed 0 and is the same for all arms (kernels
learn at most at 1e-3, as SGConvModel.param_groups says); seeds 0, 1, 2.  Writes
results/sgconv_ablation.json run by run.
"""

import argparse
import math
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from byte_lm import complete, load
from measured import ROOT, save
from torch import nn

import lra_data
from sgconv import SGConv, SGConvConfig, SGConvModel, constant_decay

KERNEL_DIM = 4  # numbers a scale


def no_decay(scale, lags, d_model):
    return 1.0


def decay_by_lag(scale, lags, d_model):
    """The damping of constant_decay with scales of KERNEL_DIM, for a kernel of one scale.

    Lags 0 .. 3: 1, 4 .. 7: 1/2, 8 .. 15: 1/4, 16 .. 31: 1/8 and so on.
    """
    scales = torch.floor(torch.log2(lags.clamp(min=1) / KERNEL_DIM)) + 1  # (lags,)
    return 0.5 ** scales.clamp(min=0)


ARMS = {  # a scale as long as the sequence is a dense kernel
    "as published": lambda L: dict(kernel_dim=KERNEL_DIM, decay=constant_decay),
    "without decay": lambda L: dict(kernel_dim=KERNEL_DIM, decay=no_decay),
    "dense": lambda L: dict(kernel_dim=L, decay=decay_by_lag),
    "dense, without decay": lambda L: dict(kernel_dim=L, decay=no_decay),
}
RATES = (1e-3, 3e-3)


class Classifier(nn.Module):
    """SGConvModel, mean over real tokens, linear: tokens, keep (B, L) -> logits (B, classes)."""

    def __init__(self, data, variant):
        super().__init__()
        L = data.train.tokens.shape[1]
        config = SGConvConfig(64, 2, L, vocab_size=data.vocab_size, **variant(L))
        self.body, self.head = SGConvModel(config), nn.Linear(64, data.n_classes)

    def forward(self, tokens, keep):
        h = self.body(tokens, keep) * keep[..., None]  # (B, L, D)
        return self.head(h.sum(1) / keep.sum(1, keepdim=True))

    def kernel_parameters(self):
        """Kernel numbers a channel and direction, of one layer."""
        return next(m for m in self.modules() if isinstance(m, SGConv)).w[:, 0, 0].numel()


def batch(split, index):
    """tokens (B, L) int64, keep (B, L) bool, labels (B,) of these examples, L their longest."""
    lengths = torch.from_numpy(np.asarray(split.lengths)[index]).long()
    L = int(lengths.max())
    tokens = torch.from_numpy(split.tokens[index, :L]).long()
    keep = torch.arange(L) < lengths[:, None]
    return tokens, keep, torch.from_numpy(split.labels[index]).long()


@torch.no_grad()
def accuracy(net, split):
    parts = np.array_split(np.arange(len(split.labels)), max(1, len(split.labels) // 250))
    right = 0
    for index in parts:
        tokens, keep, labels = batch(split, index)
        right += int((net(tokens, keep).argmax(-1) == labels).sum())
    return right / len(split.labels)


def measure(data, arm, seed, lr, steps):
    """Trains one arm.  Returns accuracies and sizes, for the result file."""
    torch.manual_seed(seed)
    net, rng = Classifier(data, ARMS[arm]), np.random.default_rng(seed)
    head = {"params": list(net.head.parameters()), "lr": lr}
    optimizer = torch.optim.AdamW([*net.body.param_groups(lr, 0.01), head])
    cosine = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min(1, (t + 1) / (0.1 * steps)) * math.cos(math.pi * t / steps / 2)
    )
    start, losses = time.process_time(), []
    for _ in range(steps):
        tokens, keep, labels = batch(data.train, rng.integers(len(data.train.labels), size=32))
        loss = F.cross_entropy(net(tokens, keep), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        cosine.step()
        losses.append(loss.item())
    return {
        "train_loss": round(float(np.mean(losses[-50:])), 4),
        "validation": accuracy(net, data.val),
        "test": accuracy(net, data.test),
        "kernel_parameters": net.kernel_parameters(),
        "cpu_s": round(time.process_time() - start, 1),
    }


def chosen(runs):
    """The rate with the best validation accuracy of the published kernel at seed 0."""
    tried = [r for r in runs if (r["arm"], r["seed"]) == ("as published", 0)]
    return max(tried, key=lambda r: r["validation"])["lr"]


def summary(runs):
    """{arm: test accuracies of its seeds at the chosen rate, percent, with mean and spread}."""
    out, lr = {}, chosen(runs)
    for arm in ARMS:
        mine = [r for r in runs if (r["arm"], r["lr"]) == (arm, lr)]
        if not mine:
            continue
        test = 100 * np.array([r["test"] for r in mine])
        out[arm] = {
            "test": test.round(2).tolist(),
            "mean": float(test.mean().round(2)),
            "spread": round(float(test.std(ddof=1)), 2) if len(test) > 1 else None,
            "train_loss": [r["train_loss"] for r in mine],
            "kernel_parameters": mine[0]["kernel_parameters"],
            "lr": lr,
        }
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--task", default="lattice", choices=("lattice", "listops-tiny"), help="(lattice)")
    add("--steps", type=int, default=800, help="optimiser steps of 32 examples (800)")
    add("--seeds", type=int, default=3, help="seeds of each arm (3)")
    add("--max-runs", type=int, default=10**9, help="stop after so many runs")
    add("--out", type=Path, help="result file (results/sgconv_ablation.json; other tasks: _TASK)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    suffix = "" if args.task == "lattice" else f"_{args.task.replace('-', '_')}"
    out = args.out or ROOT / f"results/sgconv_ablation{suffix}.json"
    data = lra_data.load(args.task)
    settings = {"task": args.task, "L": data.train.tokens.shape[1], "width": 64, "layers": 2}

    def run(arms, seeds, rates):
        keys = [
            {"arm": arm, "seed": seed, "lr": lr, "steps": args.steps}
            for seed in seeds
            for arm in arms
            for lr in rates
        ]
        before = len(load(out)["runs"])
        runs = complete(out, keys, partial(measure, data), args.max_runs, settings)["runs"]
        args.max_runs -= len(runs) - before
        return runs

    runs = run(["as published"], [0], RATES)
    if args.max_runs > 0:
        runs = run(ARMS, range(args.seeds), [chosen(runs)])
    arms = summary(runs)
    save(out, load(out) | {"arms": arms})
    for arm, row in arms.items():
        print(f"{arm:22}", *row.values())


if __name__ == "__main__":
    main()
