"""Delayed recall over up to 16k steps: S4 against a Transformer, equal size and training time.

    python benchmarks/recall.py                  run what is missing in results/recall.json
    python benchmarks/recall.py --lengths 1024   the shortest length alone
    python benchmarks/recall.py --extra          also: the Transformer with S4's steps, 1,024 tokens

A sequence shows four symbols, each for L / 32 steps, then blanks; at the last step the model names
all four (chance 0.25).  Both models are causal, of width 32, with two layers.  Equal training time
means equal CPU seconds on one thread, without evaluation; the learning rate follows a cosine over
that time.  Learning rate and (for the Transformer) the kind of positions are chosen on validation
at 1,024 tokens with seed 0, then three seeds are tested at each length.  S4's dt starts between
1 / L and 100 / L.
"""

import argparse
import itertools
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from byte_lm import complete, load
from measured import ROOT, save
from torch import nn

from attention import Transformer, TransformerConfig
from s4 import S4Config, S4Model

KINDS = SYMBOLS = 4
SECONDS = {1024: 12, 4096: 25, 16384: 60}  # CPU seconds of training, by length
CHOICE = {  # settings tried on validation
    "S4": [("", 3e-3), ("", 1e-2)],
    "Transformer": [(p, lr) for p in ("RoPE", "sinusoids") for lr in (3e-3, 1e-2)],
}
VALIDATION, TEST = 10_001, 10_002  # seeds of their sequences


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
        common = dict(d_model=32, n_layers=2, vocab_size=KINDS + 1, causal=True)
        if model == "S4":
            self.body = S4Model(S4Config(**common, d_state=64, dt_min=1 / L, dt_max=100 / L))
        else:
            config = TransformerConfig(**common, n_heads=2, d_ff=96, rope=positions == "RoPE")
            self.body = Transformer(config)
        self.head = nn.Linear(32, SYMBOLS * KINDS)

    def forward(self, tokens):
        return self.head(self.body(tokens)[:, -1]).unflatten(-1, (SYMBOLS, KINDS))

    def optimizer(self, lr):
        head = {"params": list(self.head.parameters()), "lr": lr}
        return torch.optim.AdamW([*self.body.param_groups(lr, 0.01), head])


@torch.no_grad()
def accuracy(model, L, seed, n):
    """Share of symbols named correctly in n sequences."""
    tokens, shown = sequences(n, L, torch.Generator().manual_seed(seed))
    named = torch.cat([model(part).argmax(-1) for part in tokens.split(max(1, 2**15 // L))])
    return (named == shown).double().mean().item()


def train(model, L, positions, lr, seed, seconds=math.inf, steps=math.inf):
    """Train for a number of CPU seconds or steps; return the row for the results file."""
    torch.manual_seed(seed)
    net, draws = Recall(model, positions, L), torch.Generator().manual_seed(seed)
    optimizer = net.optimizer(lr)
    highest = [group["lr"] for group in optimizer.param_groups]
    start, step = time.process_time(), 0
    while (done := max((time.process_time() - start) / seconds, step / steps)) < 1:
        factor = min(1, 10 * done + 0.1) * (0.55 + 0.45 * math.cos(math.pi * done))
        for group, rate in zip(optimizer.param_groups, highest, strict=True):
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
        "validation": accuracy(net, L, VALIDATION, 2**18 // L) if L == min(SECONDS) else None,
        "test": accuracy(net, L, TEST, 2**19 // L),
        "params": sum(p.numel() for p in net.parameters()),
    }


def key(model, L, setting, seed, budget):
    return dict(model=model, L=L, positions=setting[0], lr=setting[1], seed=seed, budget=budget)


def chosen(runs, model):
    """The setting with the best validation accuracy, at the shortest length with seed 0."""
    ours = dict(model=model, L=min(SECONDS), seed=0, budget="seconds")
    best = max((r for r in runs if ours.items() <= r.items()), key=lambda r: r["validation"])
    return best["positions"], best["lr"]


def rows(runs):
    """One row per length and model: mean and spread of the test accuracy over seeds."""
    out = []
    for L, model, budget in itertools.product(SECONDS, CHOICE, ("seconds", "steps")):
        mine = [r for r in runs if (r["L"], r["model"], r["budget"]) == (L, model, budget)]
        if not mine:
            continue
        setting = chosen(runs, model)
        mine = [r for r in mine if (r["positions"], r["lr"]) == setting]
        test = np.array([r["test"] for r in mine])
        out.append(
            dict(L=L, model=model, budget=budget, positions=setting[0], lr=setting[1])
            | {
                "test": [round(float(t), 4) for t in test],
                "mean": round(float(test.mean()), 4),
                "spread": round(float(test.std(ddof=1)), 4) if len(test) > 1 else None,
                "steps": [r["steps"] for r in mine],
                "cpu_s": [r["cpu_s"] for r in mine],
            }
        )
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--lengths", type=int, nargs="+", default=[*SECONDS], choices=[*SECONDS], help="tokens")
    add("--seeds", type=int, default=3, help="seeds of each arm (3)")
    add("--share", type=float, default=1.0, help="of the CPU seconds, to try it out (1)")
    add("--extra", action="store_true", help="also the Transformer for S4's steps, at 1,024 tokens")
    add("--max-runs", type=int, default=10**9, help="stop after so many runs")
    add("--out", type=Path, default=ROOT / "results" / "recall.json", help="result file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"seconds": SECONDS, "share": args.share, "clock": "CPU seconds, shared machine"}

    def measure(model, L, positions, lr, seed, budget):
        if budget == "seconds":
            return train(model, L, positions, lr, seed, seconds=args.share * SECONDS[L])
        s4 = next(r for r in rows(load(args.out)["runs"]) if (r["L"], r["model"]) == (L, "S4"))
        return train(model, L, positions, lr, seed, steps=s4["steps"][seed])

    def run(keys):
        left = args.max_runs - (len(load(args.out)["runs"]) - before)
        complete(args.out, keys, measure, max(0, left), settings)

    before = len(load(args.out)["runs"])
    for model, choice in CHOICE.items():
        run([key(model, min(SECONDS), setting, 0, "seconds") for setting in choice])
    best = {model: chosen(load(args.out)["runs"], model) for model in CHOICE}
    for L, seed in itertools.product(args.lengths, range(args.seeds)):
        run([key(model, L, best[model], seed, "seconds") for model in CHOICE])
        if args.extra and L == min(SECONDS):
            run([key("Transformer", L, best["Transformer"], seed, "steps")])
    table = rows(load(args.out)["runs"])
    save(args.out, load(args.out) | {"rows": table})
    for row in table:
        print(*row.values())


if __name__ == "__main__":
    main()
