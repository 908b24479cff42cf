"""Four arms on `lattice`: what pretraining is worth.  `python pretrain.py` runs it with seed 0.

    python benchmarks/demo.py --grid           one seed, every rate of GRID for every arm and stage
    python benchmarks/demo.py --seeds 0 1 2    the table of the README, mean and spread

Strict protocol: every arm sees the same training examples and nothing else; a from-scratch arm
takes as many steps as its twin for both stages. Rates are chosen on validation: pretraining by its
loss, fine-tuning and from-scratch training by accuracy. The test split is read by neither choice.
Runs that are finished are not repeated.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from compare import describe, side_by_side
from measured import ROOT, provenance, save

from settings import Config

DEMO = Config(task="lattice", d_ff=128, d_state=16, batch_size=32, eval_every=200)
SCRATCH = {"objective": "none", "finetune_lr": 1e-3}
PRETRAINED = {"objective": "masked", "pretrain_lr": 3e-3, "finetune_lr": 3e-3}
ARMS = {
    "Transformer, from scratch": SCRATCH | {"finetune_steps": 4400},
    "Transformer, pretrained": PRETRAINED | {"pretrain_steps": 3600, "finetune_steps": 800},
    "S4, from scratch": SCRATCH | {"model": "s4", "finetune_steps": 1600},
    "S4, pretrained": PRETRAINED | {"model": "s4", "pretrain_steps": 1200, "finetune_steps": 400},
}
GRID = (3e-4, 1e-3, 3e-3)


def folder(out, arm):
    return f"{out}/{arm.lower().replace(', ', '-').replace(' ', '-')}"


def demo(seed=0, out="runs/demo"):
    """Train the four arms, side by side on a CPU, print what they reached.  -> {arm: result}."""
    workers = 1 if DEMO.device == "cuda" else min(len(ARMS), os.cpu_count() or 1)
    out = f"{out}/seed{seed}"
    print(f"four arms on `{DEMO.task}`, seed {seed}, {workers} at a time, into {out}/", flush=True)
    if all(Path(folder(out, arm), "result.json").exists() for arm in ARMS):
        print(f"all four were finished before; without {out}/ they are trained anew")
    arms = {arm: replace(DEMO, seed=seed, out=folder(out, arm), **ARMS[arm]) for arm in ARMS}
    results = dict(zip(arms, side_by_side(list(arms.values()), workers), strict=True))
    print("\n".join(table(results)))
    return results


def table(arms):
    """{arm: result} -> lines of text: what each arm reached, and the two gaps."""
    yield f"{'':26}{'parameters':>12}{'steps':>13}{'validation %':>14}{'test %':>8}{'seconds':>9}"
    test = {arm: 100 * result["test"]["accuracy"] for arm, result in arms.items()}
    for arm, result in arms.items():
        config, val = result["config"], 100 * result["finetune"]["accuracy"]
        steps = f"{config['pretrain_steps']} + " if config["objective"] != "none" else ""
        steps += str(config["finetune_steps"])
        yield (
            f"{arm:26}{result['parameters']:12,}{steps:>13}{val:14.1f}"
            f"{test[arm]:8.1f}{result['speed']['seconds']:9.0f}"
        )

    def against(way, other):
        gap = test[f"S4, {other}"] - test[f"Transformer, {way}"]
        return f"{abs(gap):.1f} points {'below' if gap > 0 else 'above'}"

    yield f"From scratch, the Transformer is {against('from scratch', 'from scratch')} S4."
    yield (
        f"Pretrained on the same examples, it is {against('pretrained', 'from scratch')} that S4 "
        f"and {against('pretrained', 'pretrained')} a pretrained S4."
    )


def best_rate(workers, config, stage):
    """Train at every rate of the grid; -> the best rate, {rate: score}, the folder of the best."""
    arms = [
        replace(config, **{f"{stage}_lr": lr}, out=f"{config.out}-{stage}-{lr:g}") for lr in GRID
    ]
    key = "loss" if stage == "pretrain" else "accuracy"
    results = side_by_side(arms, workers)
    scores = {lr: result[stage][key] for lr, result in zip(GRID, results, strict=True)}
    best = (min if stage == "pretrain" else max)(scores, key=scores.get)
    print(f"{config.out} {stage}: {key} {scores}  best {best:g}", flush=True)
    return best, scores, f"{config.out}-{stage}-{best:g}"


def grid(workers, out):
    """Each arm's rates, one stage after the other."""
    found = {}
    for arm, own in ARMS.items():
        config = replace(DEMO, out=folder(f"{out}/grid", arm), **own)
        found[arm] = {}
        if config.objective != "none":
            short = replace(config, finetune_steps=1)
            lr, scores, best = best_rate(workers, short, "pretrain")
            found[arm]["pretrain"] = {"best": lr, "validation loss": scores}
            config = replace(config, pretrained=f"{best}/pretrained.pt")
        lr, scores, _ = best_rate(workers, config, "finetune")
        found[arm]["finetune"] = {"best": lr, "validation accuracy": scores}
    return {"grid": GRID, "arms": found}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--grid", action="store_true", help="search the learning rates")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds to run")
    parser.add_argument("--out", default="runs/demo", help="folder of the runs")
    parser.add_argument("--workers", type=int, default=2, help="runs side by side, with --grid")
    args = parser.parse_args()
    seeds = [0] if args.grid else args.seeds
    origin = provenance() | {"seeds": seeds}
    if args.grid:
        result = grid(args.workers, args.out)
    else:
        results = [demo(seed, args.out) for seed in seeds]
        result = {"arms": {arm: describe([r[arm] for r in results]) for arm in ARMS}}
        for arm, row in result["arms"].items():
            print(f"{arm:28} {row['mean']} +- {row['spread']}  {row['test']}")
    path = ROOT / "results" / ("demo_grid.json" if args.grid else "demo.json")
    save(path, origin | result)
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("demo.py: interrupted; the same command continues")
