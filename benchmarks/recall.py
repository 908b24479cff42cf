"""Delayed recall over up to 16k steps: S4 against a Transformer of equal size and training time.

    python benchmarks/recall.py                  run what is missing in results/recall.json
    python benchmarks/recall.py --extra          also the Transformer with S4's steps, 1,024 tokens

A sequence shows four symbols, each for L / 32 steps, then blanks; at the last step the model names
all four (chance 0.25).  Both models are causal, of width 32, with two layers.  Equal training time
means equal CPU seconds on one thread, without evaluation; the learning rate follows a cosine over
that time.  The learning rate and, for the Transformer, the kind of positions are chosen on
validation at 1,024 tokens with seed 0; then three seeds are tested at each length.  S4's dt starts
between 1 / L and 100 / L.
"""

import argparse
import itertools
import math
import time

import torch
import torch.nn.functional as F
from measured import ROOT, complete, load, over_seeds, save, select
from torch import nn

from attention import Transformer, TransformerConfig
from s4 import S4Config, S4Model

KINDS = 4  # of symbols
SYMBOLS = 4  # per sequence
SECONDS = {1024: 12, 4096: 25, 16384: 60}  # CPU seconds of training, by length
SHORTEST = min(SECONDS)
SEEDS = 3
SETTINGS = {  # (positions, learning rate) to choose from
    "S4": [("", 3e-3), ("", 1e-2)],
    "Transformer": list(itertools.product(("RoPE", "sinusoids"), (3e-3, 1e-2))),
}
VALIDATION = 10_001  # seeds of the sequences
TEST = 10_002


def sequences(n, L, generator):
    """Returns tokens (n, L) and the symbols shown (n, SYMBOLS), int64; a blank is KINDS."""
    shown = torch.randint(KINDS, (n, SYMBOLS), generator=generator)
    tokens = torch.full((n, L), KINDS)
    tokens[:, : L // 8] = shown.repeat_interleave(L // (8 * SYMBOLS), 1)
    return tokens, shown


class Recall(nn.Module):
    """A causal model and a head on its last position: tokens (B, L) -> (B, SYMBOLS, KINDS)."""

    def __init__(self, model, positions, L):
        super().__init__()
        sizes = dict(d_model=32, n_layers=2, vocab_size=KINDS + 1, causal=True)
        if model == "S4":
            self.body = S4Model(S4Config(**sizes, d_state=64, dt_min=1 / L, dt_max=100 / L))
        else:
            rope = positions == "RoPE"
            self.body = Transformer(TransformerConfig(**sizes, n_heads=2, d_ff=96, rope=rope))
        self.head = nn.Linear(32, SYMBOLS * KINDS)

    def forward(self, tokens):
        return self.head(self.body(tokens)[:, -1]).unflatten(-1, (SYMBOLS, KINDS))


@torch.no_grad()
def accuracy(net, L, seed, n):
    """Share of symbols named correctly in n sequences."""
    tokens, shown = sequences(n, L, torch.Generator().manual_seed(seed))
    parts = tokens.split(max(1, 2**15 // L))
    named = torch.cat([net(part).argmax(-1) for part in parts])
    return (named == shown).double().mean().item()


def train(model, L, positions, lr, seed, seconds=math.inf, steps=math.inf):
    """Train for a number of CPU seconds or steps; return the row for the results file."""
    torch.manual_seed(seed)
    draws = torch.Generator().manual_seed(seed)
    net = Recall(model, positions, L)
    head = {"params": list(net.head.parameters()), "lr": lr}
    optimizer = torch.optim.AdamW([*net.body.param_groups(lr, 0.01), head])
    peak = [group["lr"] for group in optimizer.param_groups]
    start = time.process_time()
    spent = 0.0
    step = 0
    while spent < seconds and step < steps:
        done = max(spent / seconds, step / steps)
        factor = min(1, 10 * done + 0.1) * (0.55 + 0.45 * math.cos(math.pi * done))
        for group, rate in zip(optimizer.param_groups, peak, strict=True):
            group["lr"] = rate * factor
        tokens, shown = sequences(max(2, 8192 // L), L, draws)
        loss = F.cross_entropy(net(tokens).flatten(0, 1), shown.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        step += 1
        spent = time.process_time() - start
    return {
        "steps": step,
        "cpu_s": round(spent, 1),
        "loss": round(loss.item(), 4),
        "validation": accuracy(net, L, VALIDATION, 2**18 // L) if L == SHORTEST else None,
        "test": accuracy(net, L, TEST, 2**19 // L),
        "params": sum(p.numel() for p in net.parameters()),
    }


def key(model, L, setting, seed, budget="seconds"):
    """What names a run in the results file."""
    positions, lr = setting
    named = {"model": model, "L": L, "positions": positions, "lr": lr}
    return {**named, "seed": seed, "budget": budget}


def best_setting(runs, model):
    """The setting with the best validation accuracy, at the shortest length with seed 0."""
    tried = select(runs, model=model, L=SHORTEST, budget="seconds", seed=0)
    best = max(tried, key=lambda run: run["validation"])
    return best["positions"], best["lr"]


def table(runs):
    """One row per length and model: mean and standard deviation of the accuracy over seeds."""
    rows = []
    for L, model, budget in itertools.product(SECONDS, SETTINGS, ("seconds", "steps")):
        positions, lr = best_setting(runs, model)
        row = {"L": L, "model": model, "budget": budget, "positions": positions, "lr": lr}
        mine = select(runs, **row)
        if mine:
            row.update(over_seeds([run["test"] for run in mine], digits=4))
            row["steps"] = [run["steps"] for run in mine]
            row["cpu_s"] = [run["cpu_s"] for run in mine]
            rows.append(row)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--lengths", type=int, nargs="+", default=[*SECONDS], choices=[*SECONDS], help="tokens")
    add("--extra", action="store_true", help="also the Transformer for S4's steps, at 1,024 tokens")
    args = parser.parse_args()
    torch.set_num_threads(1)
    out = ROOT / "results/recall.json"

    def measure(model, L, positions, lr, seed, budget):
        if budget == "seconds":
            return train(model, L, positions, lr, seed, seconds=SECONDS[L])
        s4 = select(table(load(out)["runs"]), L=L, model="S4")[0]
        return train(model, L, positions, lr, seed, steps=s4["steps"][seed])

    def run(keys):
        return complete(out, keys, measure, {"seconds": SECONDS})

    for model in SETTINGS:
        result = run([key(model, SHORTEST, setting, 0) for setting in SETTINGS[model]])
    best = {model: best_setting(result["runs"], model) for model in SETTINGS}
    for L, seed in itertools.product(args.lengths, range(SEEDS)):
        result = run([key(model, L, best[model], seed) for model in SETTINGS])
        if args.extra and L == SHORTEST:
            result = run([key("Transformer", L, best["Transformer"], seed, "steps")])
    rows = table(result["runs"])
    save(out, {**result, "rows": rows})
    for row in rows:
        print(*row.values())


if __name__ == "__main__":
    main()
