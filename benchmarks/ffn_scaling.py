"""Loss against training FLOPs over four widths, dense against structured FFNs, with fitted powers.

    python benchmarks/ffn_scaling.py    all missing runs, then powers and plot (12 min)

Byte language model of byte_lm.py, three layers, 10 bytes per weight of the dense model of each
width; the structured model of a width sees the same bytes.  loss = constant / FLOPs^power is fitted
by least squares of the logarithms.  Writes results/ffn_scaling.json run by run, and a plot.
"""

import argparse
import itertools
from dataclasses import replace

import numpy as np
from byte_lm import BATCH, L, LMConfig, corpus, count, held_out_loss, train
from judges import power
from measured import ROOT, complete, draw_curves, save, select

from structured_ffn import plan_linear

WIDTHS = (32, 48, 64, 80)
KINDS = ("dense", "lowrank", "blockshuffle")


def cell(width, kind, bytes_a_weight):
    """Return (config, optimizer steps, training FLOPs)."""
    dense = LMConfig(width, n_layers=3, n_heads=4)
    config = replace(dense, linear=plan_linear(width, 4 * width, kind, 0.3125))
    steps = round(bytes_a_weight * count(dense, L)["params"] / (BATCH * L))
    return config, steps, count(config, L)["flops"] * steps * BATCH * L


def plot(runs, powers, path):
    curves = {}
    for kind in KINDS:
        curves[kind] = []
        mine = select(runs, kind=kind)
        for flops in {run["flops"] for run in mine}:
            losses = [run["loss"] for run in select(mine, flops=flops)]
            curves[kind].append({"flops": flops, "loss": np.mean(losses)})
    fitted = ", ".join(f"{kind} {p:.3f}" for kind, p in powers.items())
    labels = {"loss": "held-out loss (nats per byte)"}
    draw_curves(path, f"Fitted powers: {fitted}", curves, "flops", labels, "training FLOPs")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bytes-a-weight", type=float, default=10, help="length of training (10)")
    parser.add_argument("--seeds", type=int, default=1, help="seeds per cell (1)")
    args = parser.parse_args()
    data, held_out = corpus()

    def measure(kind, width, seed, steps, lr):
        config, _, flops = cell(width, kind, args.bytes_a_weight)
        model, cpu = train(config, data, seed, steps, lr)
        loss = held_out_loss(model, held_out)
        params = count(config, L)["params"]
        return {"loss": loss, "flops": flops, "params": params, "cpu_s": round(cpu, 1)}

    keys = []
    for seed, width, kind in itertools.product(range(args.seeds), WIDTHS, KINDS):
        _, steps, _ = cell(width, kind, args.bytes_a_weight)
        keys.append({"kind": kind, "width": width, "seed": seed, "steps": steps, "lr": 3e-3})
    out = ROOT / "results/ffn_scaling.json"
    result = complete(out, keys, measure, {"L": L, "batch": BATCH})
    runs = result["runs"]
    powers = {kind: power(select(runs, kind=kind)) for kind in KINDS}
    save(out, result | {"powers": powers})
    for kind, p in powers.items():
        print(f"{kind}: loss falls with training FLOPs to the power {p:.4f}")
    plot(runs, powers, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
