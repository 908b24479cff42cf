"""Four runs on the task `lattice`: what pretraining is worth.  `python pretrain.py` runs seed 0.

    python benchmarks/demo.py --seeds 0 1 2    mean and spread over seeds, results/demo.json
    python benchmarks/demo.py --grid           search the learning rates, one seed

Strict protocol: all runs see the same training examples and nothing else, and from-scratch runs
get as many steps as pretraining and fine-tuning together.  Learning rates are chosen on validation
(loss in pretraining, accuracy otherwise); the test split plays no part.  Finished runs are reused.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from compare import describe, job, print_rows, side_by_side, tuned
from measured import ROOT, provenance, save, usable_cpus

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
    """Train the four models, side by side on a CPU; print and return {arm: result}."""
    workers = 1 if DEMO.device == "cuda" else min(len(ARMS), usable_cpus())
    out = f"{out}/seed{seed}"
    print(f"training four models on `{DEMO.task}`, seed {seed}, results in {out}/", flush=True)
    if all(Path(folder(out, arm), "result.json").exists() for arm in ARMS):
        print(f"all four are finished already; delete {out}/ to train them again")
    configs = [replace(DEMO, seed=seed, out=folder(out, arm), **ARMS[arm]) for arm in ARMS]
    results = dict(zip(ARMS, side_by_side(configs, workers), strict=True))
    print("\n".join(table(results)))
    return results


def table(results):
    """{arm: result} -> lines of text: what each run reached, and the two gaps."""
    test = {arm: round(100 * result["test"]["accuracy"], 1) for arm, result in results.items()}
    yield f"{'':28}{'parameters':>10}{'steps':>14}{'test accuracy %':>18}"
    for arm, result in results.items():
        config = result["config"]
        steps = str(config["finetune_steps"])
        if config["objective"] != "none":
            steps = f"{config['pretrain_steps']} + {steps}"
        yield f"{arm:28}{result['parameters']:10,}{steps:>14}{test[arm]:18.1f}"

    def gap(transformer, s4):
        points = test[f"S4, {s4}"] - test[f"Transformer, {transformer}"]
        return f"{abs(points):.1f} points {'below' if points > 0 else 'above'} S4"

    yield f"From scratch, the Transformer is {gap('from scratch', 'from scratch')}."
    yield f"Pretrained on the same examples, it is {gap('pretrained', 'from scratch')}."


def grid(workers):
    """Search each arm's learning rates, one stage after the other."""
    found = {}
    for arm, own in ARMS.items():
        config = replace(DEMO, out=folder("runs/demo/grid", arm), **own)
        best, scores = tuned(config, GRID, workers)
        found[arm] = {}
        for stage, tried in scores.items():
            key = "validation loss" if stage == "pretrain" else "validation accuracy"
            found[arm][stage] = {"best": best[f"{stage}_lr"], key: tried}
    return {"grid": GRID, "arms": found}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--grid", action="store_true", help="search the learning rates")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds to run")
    parser.add_argument("--workers", type=int, default=2, help="parallel runs, with --grid")
    args = parser.parse_args()
    origin = provenance()
    if args.grid:
        save(ROOT / "results/demo_grid.json", {**origin, "seeds": [0], **grid(args.workers)})
        return
    results = [demo(seed) for seed in args.seeds]
    rows = {arm: describe([result[arm] for result in results]) for arm in ARMS}
    print_rows(rows)
    save(ROOT / "results/demo.json", {**origin, "seeds": args.seeds, "arms": rows})


if __name__ == "__main__":
    job(main, "demo.py")
