"""Ablation of SGConv's two principles (2210.09298): few parameters, and decay with the lag.

    python benchmarks/sgconv_ablation.py    all missing runs and the table

    as published                 4 parameters per scale, each scale damped by another 1/2
    without decay                4 parameters per scale, no damping
    dense                        one parameter per lag, damped as published
    dense, without decay         one parameter per lag, no damping: a free kernel

Two bidirectional layers of width 64 are trained from scratch on `lattice`.  The learning rate is
chosen on validation for the published kernel with seed 0; all arms use it.  Writes
results/sgconv_ablation.json run by run.
"""

import math
import time
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from measured import ROOT, complete, over_seeds, save, select, takes_no_arguments
from torch import nn

import lra_data
from sgconv import SGConvConfig, SGConvModel, constant_decay

KERNEL_DIM = 4  # parameters per scale
RATES = (1e-3, 3e-3)
STEPS = 800  # of 32 examples
SEEDS = 3


def no_decay(scale, lags, d_model):
    return 1.0


def decay_by_lag(scale, lags, d_model):
    """The damping of constant_decay with scales of KERNEL_DIM, for a kernel of one scale.

    Lags 0 .. 3: 1, 4 .. 7: 1/2, 8 .. 15: 1/4, 16 .. 31: 1/8 and so on.
    """
    scales = torch.floor(torch.log2(lags.clamp(min=1) / KERNEL_DIM)) + 1  # (lags,)
    return 0.5 ** scales.clamp(min=0)


ARMS = {  # parameters per scale (None: one scale as long as the sequence), damping
    "as published": (KERNEL_DIM, constant_decay),
    "without decay": (KERNEL_DIM, no_decay),
    "dense": (None, decay_by_lag),
    "dense, without decay": (None, no_decay),
}


class Classifier(nn.Module):
    """SGConvModel, mean over the positions, linear: tokens (B, L) -> logits (B, classes)."""

    def __init__(self, data, arm):
        super().__init__()
        L = data.train.tokens.shape[1]
        kernel_dim, decay = ARMS[arm]
        sizes = {"vocab_size": data.vocab_size, "kernel_dim": kernel_dim or L, "decay": decay}
        self.body = SGConvModel(SGConvConfig(64, 2, L, **sizes))
        self.head = nn.Linear(64, data.n_classes)

    def forward(self, tokens):
        return self.head(self.body(tokens).mean(1))


def tensors(split):
    """tokens (n, L) and labels (n,) of a split; in `lattice` all examples have the same length."""
    return torch.from_numpy(split.tokens).long(), torch.from_numpy(split.labels).long()


@torch.no_grad()
def accuracy(net, split):
    tokens, labels = tensors(split)
    guess = torch.cat([net(part).argmax(-1) for part in tokens.split(250)])
    return (guess == labels).double().mean().item()


def measure(data, arm, seed, lr, steps):
    """Train one arm.  Returns accuracies and sizes, for the results file."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    net = Classifier(data, arm)
    head = {"params": list(net.head.parameters()), "lr": lr}
    optimizer = torch.optim.AdamW([*net.body.param_groups(lr, 0.01), head])

    def factor(step):
        rise = min(1, (step + 1) / (0.1 * steps))
        return rise * math.cos(math.pi * step / steps / 2)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    tokens, labels = tensors(data.train)
    start = time.process_time()
    losses = []
    for _ in range(steps):
        index = rng.integers(len(tokens), size=32)
        loss = F.cross_entropy(net(tokens[index]), labels[index])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return {
        "train_loss": round(float(np.mean(losses[-50:])), 4),
        "validation": accuracy(net, data.val),
        "test": accuracy(net, data.test),
        "kernel_parameters": net.body.blocks[0].mixer.w[:, 0, 0].numel(),  # per channel, direction
        "cpu_s": round(time.process_time() - start, 1),
    }


def best_rate(runs):
    """The learning rate with the best validation accuracy of the published kernel at seed 0."""
    tried = select(runs, arm="as published", seed=0)
    return max(tried, key=lambda run: run["validation"])["lr"]


def main():
    torch.set_num_threads(1)
    data = lra_data.load("lattice")
    out = ROOT / "results/sgconv_ablation.json"
    settings = {"task": "lattice", "L": data.train.tokens.shape[1], "width": 64, "layers": 2}

    def run(keys):
        keys = [{"arm": arm, "seed": seed, "lr": lr, "steps": STEPS} for arm, seed, lr in keys]
        return complete(out, keys, partial(measure, data), settings)

    rates = run([("as published", 0, lr) for lr in RATES])
    lr = best_rate(rates["runs"])
    result = run([(arm, seed, lr) for seed in range(SEEDS) for arm in ARMS])
    rows = {}
    for arm in ARMS:
        mine = select(result["runs"], arm=arm, lr=lr)
        rows[arm] = over_seeds([100 * run["test"] for run in mine])
        rows[arm]["train_loss"] = [run["train_loss"] for run in mine]
        rows[arm]["kernel_parameters"] = mine[0]["kernel_parameters"]
        rows[arm]["lr"] = lr
        print(f"{arm:22} {rows[arm]['mean']:.2f} +- {rows[arm]['spread']}   {rows[arm]['test']}")
    save(out, {**result, "arms": rows})


if __name__ == "__main__":
    takes_no_arguments(__doc__)
    main()
