"""The demonstration of pretrain.py over several seeds, and the grid its learning rates come from.

    python benchmarks/demo.py --grid           one seed, every rate of GRID for every arm and stage
    python benchmarks/demo.py --seeds 0 1 2    the table of the README, mean and spread

Rates are chosen on validation: pretraining by its loss, fine-tuning and from-scratch training by
accuracy. The test split is read by neither choice. Runs that are finished are not repeated.
"""

import argparse
import json
import os
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pretrain  # noqa: E402

GRID = (3e-4, 1e-3, 3e-3)


def run(config):
    """The result of one run, from its folder when it is there already."""
    finished = Path(config.out) / "result.json"
    return json.loads(finished.read_text()) if finished.exists() else pretrain.train(config)


def best_rate(pool, config, stage):
    """Train at every rate of the grid; -> the best rate, {rate: score}, the folder of the best."""
    arms = [
        replace(config, **{f"{stage}_lr": lr}, out=f"{config.out}-{stage}-{lr:g}") for lr in GRID
    ]
    results = list(pool.map(run, arms))
    key = "loss" if stage == "pretrain" else "accuracy"
    scores = {lr: result[stage][key] for lr, result in zip(GRID, results, strict=True)}
    best = (min if stage == "pretrain" else max)(scores, key=scores.get)
    print(f"{config.out} {stage}: {key} {scores}  best {best:g}", flush=True)
    return best, scores, f"{config.out}-{stage}-{best:g}"


def grid(pool, out):
    """Each arm's rates, one stage after the other."""
    table = {}
    for arm, settings in pretrain.ARMS.items():
        name = "-".join(arm).lower().replace(" ", "-")
        config = replace(pretrain.DEMO, out=f"{out}/{name}", **settings)
        table[", ".join(arm)] = {}
        if config.objective != "none":
            short = replace(config, finetune_steps=1)
            lr, scores, folder = best_rate(pool, short, "pretrain")
            table[", ".join(arm)]["pretrain"] = {"best": lr, "validation loss": scores}
            config = replace(config, pretrained=f"{folder}/pretrained.pt")
        lr, scores, _ = best_rate(pool, config, "finetune")
        table[", ".join(arm)]["finetune"] = {"best": lr, "validation accuracy": scores}
    return table


def seeds(numbers, out):
    """The demonstration with each seed -> per arm: test and validation in percent, seconds."""
    arms = {}
    for seed in numbers:
        folders = {
            arm: Path(out, f"seed{seed}", "-".join(arm).lower().replace(" ", "-"), "result.json")
            for arm in pretrain.ARMS
        }
        if all(path.exists() for path in folders.values()):
            results = {arm: json.loads(path.read_text()) for arm, path in folders.items()}
            print("\n".join(pretrain.table(results)))
        else:
            results = pretrain.demo(seed, f"{out}/seed{seed}")
        for arm, result in results.items():
            row = arms.setdefault(", ".join(arm), {"test": [], "validation": [], "seconds": []})
            row["test"].append(round(100 * result["test"]["accuracy"], 2))
            row["validation"].append(round(100 * result["finetune"]["accuracy"], 2))
            row["seconds"].append(result["speed"]["seconds"])
    for row in arms.values():
        row["mean"] = round(float(np.mean(row["test"])), 2)
        row["spread"] = round(float(np.std(row["test"], ddof=1)), 2) if len(numbers) > 1 else None
    return {"seeds": numbers, "arms": arms}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--grid", action="store_true", help="search the learning rates")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds to run")
    parser.add_argument("--out", default="runs/demo", help="folder of the runs")
    parser.add_argument("--workers", type=int, default=2, help="runs side by side in the grid")
    args = parser.parse_args()
    if args.grid:
        context = get_context("spawn")
        start = pretrain.one_thread, (context.RLock(),)
        with ProcessPoolExecutor(args.workers, context, *start) as pool:
            result = {"grid": GRID, "arms": grid(pool, f"{args.out}/grid")}
    else:
        result = seeds(args.seeds, args.out)
        for arm, row in result["arms"].items():
            print(f"{arm:28} {row['mean']} +- {row['spread']}  {row['test']}")
    result |= {
        "command": "python " + " ".join(["benchmarks/demo.py"] + sys.argv[1:]),
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "date": time.strftime("%Y-%m-%d"),
        **pretrain.versions(),
    }
    path = ROOT / "results" / ("demo_grid.json" if args.grid else "demo.json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
