"""Byte language model: dense against structured FFNs, and wide structured ones at equal FLOPs.

    python benchmarks/byte_lm.py                all missing runs, then table and plot (25 min)
    python benchmarks/byte_lm.py --max-runs 1   one run more (about 90 s on one core), resumable
    python benchmarks/byte_lm.py --guided       self-guided training at dense's FLOPs (20 min)
    python benchmarks/byte_lm.py --text FILE --out OTHER.json   other data

Data: the .py files of the running Python's standard library without its tests, every tenth file
held out.  All arms of a seed see the same batches.  Three seeds.  Writes results/byte_lm.json run
by run, and results/byte_lm.png; with --guided, results/byte_lm_guided.json and .png.
"""

import argparse
import json
import math
import sysconfig
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from measured import ROOT, provenance, pyplot, save

from structured_ffn import (
    LM,
    BlockShuffle,
    Guide,
    LMConfig,
    LowRank,
    count,
    guided_fraction,
)

# The wide arms are 80 wide with attention left at 64 (the paper narrows its attention too), so that
# their training FLOPs are those of dense to 0.2 %.
L, BATCH = 64, 16  # bytes a sequence, sequences a step
DENSE = LMConfig(d_model=64, n_layers=3, n_heads=4)
ARMS = {
    "dense": DENSE,
    "LowRank": LMConfig(64, 3, 4, linear=partial(LowRank, R=16)),
    "BlockShuffle": LMConfig(64, 3, 4, linear=partial(BlockShuffle, n_blocks=4)),
    "wide LowRank": LMConfig(80, 3, 4, d_head=16, d_ff=316, linear=partial(LowRank, R=20)),
    "wide BlockShuffle": LMConfig(
        80, 3, 4, d_head=16, d_ff=316, linear=partial(BlockShuffle, n_blocks=4)
    ),
}
GUIDED = ["dense"] + [
    f"{arm}, {how}" for arm in ("LowRank", "BlockShuffle") for how in ("longer", "self-guided")
]


def corpus(text=None):
    """Returns (train, held out), uint8 tensors. A file of its own is cut at 90 %."""
    if text:
        data = Path(text).read_bytes()
        cut = len(data) * 9 // 10
        parts = [data[:cut], data[cut:]]
    else:
        root = Path(sysconfig.get_path("stdlib"))
        skip = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
        files = [p for p in sorted(root.rglob("*.py")) if not skip & set(p.relative_to(root).parts)]
        held = set(files[::10])
        parts = [b"".join(p.read_bytes() for p in files if (p in held) == h) for h in (False, True)]
    return [torch.from_numpy(np.frombuffer(bytearray(part), dtype=np.uint8)) for part in parts]


def windows(data, starts):
    """Returns the L + 1 bytes from each start, (len(starts), L + 1) int64."""
    return data[starts[:, None] + torch.arange(L + 1)].long()


@torch.no_grad()
def held_out_loss(model, data, n=4096):
    """Nats a byte over n windows spread evenly over the held-out files, the same for every run."""
    starts = torch.linspace(0, len(data) - L - 1, n).long()
    model.eval()
    losses = []
    for part in starts.split(256):
        x = windows(data, part)
        losses.append(F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()))
    model.train()
    return float(torch.stack(losses).mean())


def plan(arm, steps):
    """Returns (config, optimiser steps, guided ones among them, training FLOPs a token).

    "longer" and "self-guided" spend what dense spends in `steps`: the first by more steps, the
    second by a guide in a share f of the steps, and f of them once more (section 4.4).
    """
    name, _, how = arm.partition(", ")
    flops, dense = (count(config, L)["flops"] for config in (ARMS[name], DENSE))
    if how == "longer":
        return ARMS[name], round(steps * dense / flops), 0, flops
    if how == "self-guided":
        f = guided_fraction(ARMS[name], DENSE, L)
        total = round((1 + f) * steps)
        return ARMS[name], total, round(f * steps), round(dense * steps / total)
    return ARMS[name], steps, 0, flops


def train(config, data, seed, steps, lr, guided=0, warmup=0.05):
    """AdamW (weight decay 0.1, clip 1), linear warm-up, cosine to a tenth.

    guided: the first so many steps are under the stochastic guide.
    Returns (held-out loss in nats a byte, CPU seconds).
    """
    torch.manual_seed(seed)
    model = LM(config)
    guide = Guide(model, guided, stochastic=True, seed=seed) if guided else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)

    def factor(t):
        rise = min(1.0, (t + 1) / (warmup * steps))
        return rise * (0.55 + 0.45 * math.cos(math.pi * t / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    draws = torch.Generator().manual_seed(seed)
    start = time.process_time()
    for _ in range(steps):
        x = windows(data[0], torch.randint(len(data[0]) - L, (BATCH,), generator=draws))
        loss = F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if guide:
            guide.step(optimizer)
    return held_out_loss(model, data[1]), time.process_time() - start


def load(path):
    return json.loads(path.read_text()) if path.exists() else {"runs": []}


def complete(path, keys, measure, max_runs, settings):
    """Measure the runs that `path` lacks, at most max_runs; each is saved and printed.

    keys: one dict a run, which names it; measure(**key): dict of what came out.  Returns all.
    """
    origin, known = provenance(), load(path)["runs"]
    missing = [key for key in keys if not any(key.items() <= run.items() for run in known)]
    for key in missing[:max_runs]:
        made_by = {name: origin[name] for name in ("commit", "hardware")}
        run = key | measure(**key) | made_by
        result = load(path)
        result["runs"].append(run)
        save(path, result | settings | origin)
        print(*(v for k, v in run.items() if k not in made_by), flush=True)
    return load(path)


def summary(result, arms):
    """Returns {arm: mean and standard deviation of its seeds' losses, weights, training FLOPs}."""
    rows = {}
    for arm in arms:
        runs = [r for r in result["runs"] if r["arm"] == arm]
        if runs:
            loss, first = [r["loss"] for r in runs], runs[0]
            rows[arm] = {
                "loss": float(np.mean(loss)),
                "sd": float(np.std(loss, ddof=1)) if len(loss) > 1 else None,
                "seeds": len(loss),
                "params": first["params"],
                "steps": first["steps"],
                "training_flops": first["flops"] * first["steps"] * L * BATCH,
            }
            rows[arm]["flops_over_dense"] = (
                rows[arm]["training_flops"] / rows["dense"]["training_flops"]
            )
    return rows


def table(rows):
    lines = [
        "| arm | weights | steps | training FLOPs | / dense | held-out loss, nats a byte (± sd) |",
        "|---|---|---|---|---|---|",
    ]
    for arm, r in rows.items():
        cost = f"{r['steps']} | {r['training_flops']:.3g} | {r['flops_over_dense']:.3f}"
        spread = f" ± {r['sd']:.4f}" if r["seeds"] > 1 else ""
        loss = f"{r['loss']:.4f}{spread}, {r['seeds']} seeds"
        lines.append(f"| {arm} | {r['params']} | {cost} | {loss} |")
    return lines


def plot(result, path, arms):
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(7, 4))
    labels = []
    for i, arm in enumerate(arms):
        runs = [r for r in result["runs"] if r["arm"] == arm]
        if runs:
            loss = [r["loss"] for r in runs]
            ax.plot([i] * len(loss), loss, "o", alpha=0.8)
            ax.hlines(np.mean(loss), i - 0.25, i + 0.25, color="black", lw=1)
        labels.append(arm.replace(", ", "\n").replace("wide ", "wide\n"))
    ax.set_xticks(range(len(arms)), labels, fontsize=8)
    ax.set_ylabel("held-out loss (nats a byte), mean and seeds")
    ax.grid(alpha=0.3)
    fig.tight_layout()
    fig.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", help="a file to learn instead of the standard library's source")
    parser.add_argument("--steps", type=int, default=2000, help="steps of 16 x 64 bytes (2000)")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate (3e-3)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds an arm (3)")
    parser.add_argument("--guided", action="store_true", help="the arms of self-guided training")
    parser.add_argument("--max-runs", type=int, default=10**9, help="stop after so many runs")
    parser.add_argument("--out", type=Path, help="result file (results/byte_lm[_guided].json)")
    args = parser.parse_args()
    out = args.out or ROOT / f"results/byte_lm{'_guided' if args.guided else ''}.json"
    data, arms = corpus(args.text), GUIDED if args.guided else [*ARMS]

    def measure(arm, seed, steps, lr):
        config, _, guided, flops = plan(arm, args.steps)
        loss, cpu = train(config, data, seed, steps, lr, guided=guided)
        return {
            "loss": loss,
            "cpu_s": round(cpu, 1),
            "params": count(config, L)["params"],
            "flops": flops,
        }

    keys = [
        {"arm": arm, "seed": seed, "steps": plan(arm, args.steps)[1], "lr": args.lr}
        for seed in range(args.seeds)
        for arm in arms
    ]
    settings = {"L": L, "batch": BATCH, "bytes": [len(d) for d in data]}
    result = complete(out, keys, measure, args.max_runs, settings)
    rows = summary(result, arms)
    save(out, result | {"summary": rows})
    print("\n".join(table(rows)))
    plot(result, out.with_suffix(".png"), arms)


if __name__ == "__main__":
    main()
