"""What "Never Train from Scratch" (arXiv:2310.02980v4) claims, at laptop size, a question a name.

    python benchmarks/pretraining.py objectives    scratch, masked, causal: four architectures
    python benchmarks/pretraining.py causal        causal pretraining against causal scratch
    python benchmarks/pretraining.py share         how much of a fixed number of steps to pretrain
    python benchmarks/pretraining.py labels        few labels, all inputs
    python benchmarks/pretraining.py init          is structured initialisation redundant?
    python benchmarks/pretraining.py listops       the same gap on `listops-tiny`

On `lattice` unless said otherwise. Protocol and rates are those of benchmarks/demo.py: all arms see
the same training examples, a from-scratch arm takes as many steps as its twin in both stages. The
rates were searched for the Transformer and S4 on `lattice`; SGConv, the plain recurrence and S4 at
random take those of S4; from scratch on ListOps S4 takes that of listops_tiny_rates.json.
Writes results/pretraining_NAME.json; finished runs are read from their folders.
"""

import argparse
from dataclasses import replace

from compare import compare
from demo import ARMS, DEMO, PRETRAINED, SCRATCH
from measured import ROOT, provenance, save

STEPS = 4400  # of a Transformer, both stages
RUNS, MASKED = "runs/pretraining", "Transformer-masked"
CONVOLUTIONS = {"S4": {}, "SGConv": {"model": "sgconv"}, "diagonal": {"model": "diagonal"}}


def arm(name, **settings):
    return replace(DEMO, **ARMS[name] | settings)


def objectives():
    """Each architecture from scratch, after masked and after causal pretraining."""
    arms = {}
    for model, own in {"Transformer": {}, **CONVOLUTIONS}.items():
        like = "Transformer" if model == "Transformer" else "S4"
        arms[f"{model}-scratch"] = arm(f"{like}, from scratch", **own)
        for objective in ("masked", "causal"):
            arms[f"{model}-{objective}"] = arm(f"{like}, pretrained", **own, objective=objective)
    return arms


def causal():
    """Left-to-right models, pretrained by the next token and not: alike in all else."""
    arms = {}
    for model, own in {"Transformer": {}, **CONVOLUTIONS}.items():
        like = "Transformer" if model == "Transformer" else "S4"
        arms[f"{model}, from scratch"] = arm(f"{like}, from scratch", **own, causal=True)
        arms[f"{model}, pretrained"] = arm(f"{like}, pretrained", **own, objective="causal")
    return arms


def share():
    """The Transformer: steps of pretraining out of STEPS."""
    arms = {"0 %": replace(DEMO, **SCRATCH, finetune_steps=STEPS)}
    for percent in (25, 50, 75, 95):
        first = STEPS * percent // 100
        steps = {"pretrain_steps": first, "finetune_steps": STEPS - first}
        arms[f"{percent} %"] = replace(DEMO, **PRETRAINED | steps)
    return arms


def labels():
    """The Transformer with n labels: from scratch, or from weights that have seen all inputs."""
    weights, arms = f"{RUNS}/objectives/{MASKED}-{{seed}}/pretrained.pt", {}
    for n in (100, 400, 1000):
        arms[f"{n} labels, from scratch"] = arm("Transformer, from scratch", labels=n)
        arms[f"{n} labels, pretrained"] = arm(
            "Transformer, pretrained", labels=n, pretrained=weights
        )
    return arms


def init():
    """S4 whose every parameter starts from N(0, 0.1^2); the plain recurrence is in `objectives`."""
    return {
        f"S4 at random, {way}": arm(f"S4, {way}", random_init=True)
        for way in ("from scratch", "pretrained")
    }


def listops():
    """Transformer and S4 on ListOps below 128 tokens; each arm takes 2,000 steps of 32 trees."""
    task = {"task": "listops-tiny", "mask_ratio": None, "eval_every": 250}
    arms = {}
    for model, own, rate in (("Transformer", {}, 1e-3), ("S4", {"model": "s4"}, 3e-3)):
        rates = {"pretrain_lr": 3e-3, "finetune_lr": rate} | own | task
        scratch = {"objective": "none", "finetune_steps": 2000}
        both = {"objective": "masked", "pretrain_steps": 1200, "finetune_steps": 800}
        arms[f"{model}, from scratch"] = replace(DEMO, **rates | scratch)
        arms[f"{model}, pretrained"] = replace(DEMO, **rates | both)
    return arms


QUESTIONS = {f.__name__: f for f in (objectives, causal, share, labels, init, listops)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=QUESTIONS, help="which question")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of each arm")
    parser.add_argument("--workers", type=int, default=2, help="runs side by side, a thread each")
    args = parser.parse_args()
    origin = provenance() | {"seeds": args.seeds}
    if args.name == "labels":  # whose arms start from these weights
        before = {MASKED: objectives()[MASKED]}
        compare(before, args.seeds, f"{RUNS}/objectives", args.workers)
    rows = compare(QUESTIONS[args.name](), args.seeds, f"{RUNS}/{args.name}", args.workers)
    for name, row in rows.items():
        print(f"{name:28}{row['mean']:6.2f} +- {row['spread']}   {row['test']}")
    path = ROOT / "results" / f"pretraining_{args.name}.json"
    save(path, origin | {"arms": rows})
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
