"""Does longer context help?  One byte model, the same bytes to predict, the context cut short.

    python benchmarks/context.py               three seeds, table, picture (6 min of one core)
    python benchmarks/context.py --max-runs 1  one seed more (2 min), resumable

arXiv:2302.06218 says that longer context performs better, depending on the application.  Here: the
Transformer and the data of byte_lm.py (Python source, every tenth file held out), trained on
windows of 512 bytes.  Afterwards it predicts the same held-out bytes from the last 1, 2, 4 ... 512
bytes before each.  In training, too, a byte near the beginning of its window has few bytes before
it, so no context here is strange to the model.  Writes results/context.json and context.png.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from byte_lm import LM, LMConfig, complete, corpus, count
from measured import ROOT, pyplot

L, BATCH = 512, 4  # bytes a window, windows a step
CONTEXTS = [2**k for k in range(10)]  # 1 ... 512
CONFIG = LMConfig(d_model=64, n_layers=2, n_heads=4)


def train(data, seed, steps, lr, warmup=0.05):
    """AdamW (weight decay 0.1, clip 1), linear warm-up, cosine to a tenth.  Returns the model."""
    torch.manual_seed(seed)
    model, draws = LM(CONFIG), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    for step in range(steps):
        rise = min(1.0, (step + 1) / (warmup * steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * rise * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        starts = torch.randint(len(data) - L, (BATCH,), generator=draws)
        x = data[starts[:, None] + torch.arange(L + 1)].long()  # (BATCH, L + 1)
        loss = F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def losses(model, data, context, n):
    """Nats of n bytes spread evenly over `data`, each predicted from the `context` bytes before it.

    The bytes are the same for every context up to L.  Returns (n,).
    """
    targets = torch.linspace(L, len(data) - 1, n, dtype=torch.float64).long()
    windows = data[targets[:, None] + torch.arange(-context, 1)].long()  # (n, context + 1)
    parts = [
        F.cross_entropy(model(part[:, :-1])[:, -1], part[:, -1], reduction="none")
        for part in windows.split(max(1, 2**14 // context))
    ]
    return torch.cat(parts)


def measure(data, seed, steps, lr, n):
    """Trains one seed and returns its losses, for the result file."""
    start = time.process_time()
    model = train(data[0], seed, steps, lr)
    spent = time.process_time() - start
    nats = torch.stack([losses(model, data[1], context, n) for context in CONTEXTS])  # (10, n)
    gain = nats[:-1] - nats[1:]  # of each doubling, byte by byte
    return {
        "loss": nats.mean(1).tolist(),
        "gain": gain.mean(1).tolist(),
        "gain_error": (gain.std(1) / n**0.5).tolist(),  # standard error over the bytes
        "cpu_s": round(spent, 1),
    }


def plot(runs, path):
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(6.5, 4), layout="constrained")
    loss = np.array([run["loss"] for run in runs])  # (seeds, contexts)
    ax.plot(CONTEXTS, loss.T, "o", mfc="none", color="C0", ms=4)
    ax.plot(CONTEXTS, loss.mean(0), "-", color="C0", label="mean; circles: seeds")
    ax.set_xscale("log", base=2)
    ax.set_xticks(CONTEXTS, [str(c) for c in CONTEXTS])
    ax.set_xlabel("context the model is given (bytes)")
    ax.set_ylabel("held-out loss (nats a byte)")
    ax.grid(alpha=0.3)
    ax.legend()
    fig.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--steps", type=int, default=500, help="optimiser steps of 4 x 512 bytes (500)")
    add("--lr", type=float, default=3e-3, help="peak learning rate (3e-3)")
    add("--seeds", type=int, default=3, help="seeds (3)")
    add("--targets", type=int, default=1024, help="held-out bytes to predict (1024)")
    add("--max-runs", type=int, default=10**9, help="stop after so many seeds")
    add("--out", type=Path, default=ROOT / "results" / "context.json", help="result file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = corpus()
    keys = [
        {"seed": seed, "steps": args.steps, "lr": args.lr, "n": args.targets}
        for seed in range(args.seeds)
    ]
    settings = {"contexts": CONTEXTS, "L": L, "batch": BATCH, "bytes": [len(d) for d in data]}
    settings["params"] = count(CONFIG, L)["params"]
    result = complete(args.out, keys, lambda **key: measure(data, **key), args.max_runs, settings)
    runs = result["runs"]
    loss = np.array([run["loss"] for run in runs])
    for i, context in enumerate(CONTEXTS):
        gain = [run["gain"][i - 1] for run in runs] if i else []
        print(f"{context:5}  {loss[:, i].mean():.4f}  gain of doubling {np.round(gain, 4)}")
    plot(runs, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
