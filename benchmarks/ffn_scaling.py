"""Loss against training FLOPs over four widths, dense against structured FFNs, with fitted powers.

    python benchmarks/ffn_scaling.py                all missing runs, then powers and plot (12 min)
    python benchmarks/ffn_scaling.py --max-runs 1   one run more, resumable

Byte language model of byte_lm.py, three layers, 10 bytes per weight of the dense model of each
width; the structured model of a width sees the same bytes.  loss = constant / FLOPs^power is fitted
by least squares of the logarithms.  Writes results/ffn_scaling.json run by run, and a plot.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from byte_lm import BATCH, L, LMConfig, complete, corpus, count, train
from measured import ROOT, pyplot, save

from structured_ffn import match

WIDTHS = (32, 48, 64, 80)
KINDS = ("dense", "lowrank", "blockshuffle")


def cell(width, kind, bytes_a_weight):
    """Return (config, optimizer steps, training FLOPs)."""
    dense = LMConfig(width, n_layers=3, n_heads=4)
    config = replace(dense, linear=match(width, 4 * width, kind, 0.3125))
    steps = round(bytes_a_weight * count(dense, L)["params"] / (BATCH * L))
    return config, steps, count(config, L)["flops"] * steps * BATCH * L


def fit(runs):
    """Return (power, constant): log loss = constant - power log FLOPs, by least squares."""
    flops = np.log([r["flops"] for r in runs])
    loss = np.log([r["loss"] for r in runs])
    slope, constant = np.polyfit(flops, loss, 1)
    return float(-slope), float(constant)


def powers(result):
    """Return {kind: power} of the kinds with two widths or more."""
    found = {}
    for kind in KINDS:
        runs = [r for r in result["runs"] if r["kind"] == kind]
        if len({r["width"] for r in runs}) > 1:
            found[kind], _ = fit(runs)
    return found


def plot(result, path):
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(6.4, 4))
    for kind, mark in zip(KINDS, "os^", strict=True):
        runs = [r for r in result["runs"] if r["kind"] == kind]
        if kind in result["powers"]:
            power, constant = fit(runs)
            x = [r["flops"] for r in runs]
            y = [r["loss"] for r in runs]
            (points,) = ax.loglog(x, y, mark, label=f"{kind}, power {power:.3f}")
            line = np.geomspace(min(x), max(x), 20)
            ax.loglog(line, np.exp(constant) * line**-power, "--", color=points.get_color(), lw=1)
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("{x:g}")
    ax.set_xlabel("training FLOPs")
    ax.set_ylabel("held-out loss (nats per byte)")
    ax.grid(alpha=0.3, which="both")
    ax.legend()
    fig.tight_layout()
    fig.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bytes-a-weight", type=float, default=10, help="length of training (10)")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate (3e-3)")
    parser.add_argument("--seeds", type=int, default=1, help="seeds per cell (1)")
    parser.add_argument("--max-runs", type=int, default=10**9, help="stop after this many runs")
    out = ROOT / "results/ffn_scaling.json"
    parser.add_argument("--out", type=Path, default=out, help="result file")
    args = parser.parse_args()
    data = corpus()

    def measure(kind, width, seed, steps, lr):
        config, _, flops = cell(width, kind, args.bytes_a_weight)
        loss, cpu = train(config, data, seed, steps, lr)
        params = count(config, L)["params"]
        return {"loss": loss, "flops": flops, "params": params, "cpu_s": round(cpu, 1)}

    keys = []
    for seed in range(args.seeds):
        for width in WIDTHS:
            for kind in KINDS:
                _, steps, _ = cell(width, kind, args.bytes_a_weight)
                key = {"kind": kind, "width": width, "seed": seed, "steps": steps, "lr": args.lr}
                keys.append(key)
    result = complete(args.out, keys, measure, args.max_runs, {"L": L, "batch": BATCH})
    result["powers"] = powers(result)
    save(args.out, result)
    for kind, power in result["powers"].items():
        print(f"{kind}: loss falls with training FLOPs to the power {power:.4f}")
    plot(result, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
