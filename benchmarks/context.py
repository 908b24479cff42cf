"""Does longer context help?  Predict the same bytes from contexts of 1 to 512 bytes.

    python benchmarks/context.py               three seeds, results/context.json
    python benchmarks/context.py --max-runs 1  one more seed

The Transformer and the data of byte_lm.py (Python source, every tenth file held out), trained on
windows of 512 bytes.  Bytes near the start of a training window have a short context too, so short
contexts are not new to the model.  arXiv:2302.06218 says that longer contexts perform better,
depending on the application.
"""

import argparse
import math
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from byte_lm import LM, LMConfig, complete, corpus, count
from measured import ROOT

L = 512  # bytes per window
BATCH = 4  # windows per step
CONTEXTS = [2**k for k in range(10)]  # 1 ... 512
CONFIG = LMConfig(d_model=64, n_layers=2, n_heads=4)


def train(data, seed, steps, lr, warmup=0.05):
    """Train with AdamW, linear warmup and a cosine schedule to a tenth.  Returns the model."""
    torch.manual_seed(seed)
    model = LM(CONFIG)
    draws = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    for step in range(steps):
        rise = min(1.0, (step + 1) / (warmup * steps))
        cosine = 0.55 + 0.45 * math.cos(math.pi * step / steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * rise * cosine
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
    """Loss in nats of n evenly spread bytes, each predicted from the `context` bytes before it.

    The bytes are the same for every context up to L.  Returns (n,).
    """
    targets = torch.linspace(L, len(data) - 1, n, dtype=torch.float64).long()
    windows = data[targets[:, None] + torch.arange(-context, 1)].long()  # (n, context + 1)
    parts = []
    for part in windows.split(max(1, 2**14 // context)):
        last = model(part[:, :-1])[:, -1]  # (n, vocab)
        parts.append(F.cross_entropy(last, part[:, -1], reduction="none"))
    return torch.cat(parts)


def measure(data, seed, steps, lr, n):
    """Train one seed and predict n held-out bytes; return the losses for the results file."""
    start = time.process_time()
    model = train(data[0], seed, steps, lr)
    seconds = time.process_time() - start
    nats = torch.stack([losses(model, data[1], context, n) for context in CONTEXTS])  # (10, n)
    gain = nats[:-1] - nats[1:]  # of each doubling, byte by byte
    return {
        "loss": nats.mean(1).tolist(),
        "gain": gain.mean(1).tolist(),
        "gain_error": (gain.std(1) / n**0.5).tolist(),  # standard error over the bytes
        "cpu_s": round(seconds, 1),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--max-runs", type=int, default=10**9, help="stop after this many seeds")
    add("--out", type=Path, default=ROOT / "results" / "context.json", help="results file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = corpus()
    keys = [{"seed": seed, "steps": 500, "lr": 3e-3, "n": 1024} for seed in range(3)]
    settings = {"contexts": CONTEXTS, "L": L, "batch": BATCH, "bytes": [len(d) for d in data]}
    settings["params"] = count(CONFIG, L)["params"]
    runs = complete(args.out, keys, partial(measure, data), args.max_runs, settings)["runs"]
    print("context  nats per byte")
    for context, loss in zip(CONTEXTS, np.mean([run["loss"] for run in runs], 0), strict=True):
        print(f"{context:7}  {loss:.4f}")


if __name__ == "__main__":
    main()
