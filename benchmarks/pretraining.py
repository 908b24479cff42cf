"""What "Never Train from Scratch" (arXiv:2310.02980v4) claims, at laptop size: one question each.

    python benchmarks/pretraining.py objectives    scratch, masked, causal: four architectures
    python benchmarks/pretraining.py causal        causal models, pretrained and from scratch
    python benchmarks/pretraining.py share         share of pretraining in a fixed number of steps
    python benchmarks/pretraining.py labels        few labels, all inputs
    python benchmarks/pretraining.py init          is structured initialization redundant?
    python benchmarks/pretraining.py listops       the same gap on `listops-tiny`

The task is `lattice` unless noted.  Protocol and learning rates are those of benchmarks/demo.py:
all arms see the same training examples, and from-scratch runs get as many steps as pretraining and
fine-tuning together.  Rates were searched for the Transformer and S4 on `lattice`; the other
architectures use those of S4.  From scratch on ListOps, S4 uses that of listops_tiny_rates.json.
Writes results/pretraining_NAME.json; finished runs are read from their folders.
"""

import argparse
from dataclasses import replace

from compare import compare, job, print_rows
from demo import ARMS, DEMO, PRETRAINED, SCRATCH
from measured import ROOT, provenance, save

STEPS = 4400  # of a Transformer, both stages together
RUNS = "runs/pretraining"
MASKED = "Transformer-masked"
MODELS = {  # name: (whose steps and learning rates, other settings)
    "Transformer": ("Transformer", {}),
    "S4": ("S4", {}),
    "SGConv": ("S4", {"model": "sgconv"}),
    "diagonal": ("S4", {"model": "diagonal"}),
}


def arm(name, **settings):
    """An arm of benchmarks/demo.py with other settings."""
    return replace(DEMO, **{**ARMS[name], **settings})


def objectives():
    """Each architecture from scratch, after masked and after causal pretraining."""
    arms = {}
    for model, (like, own) in MODELS.items():
        arms[f"{model}-scratch"] = arm(f"{like}, from scratch", **own)
        for objective in ("masked", "causal"):
            arms[f"{model}-{objective}"] = arm(f"{like}, pretrained", **own, objective=objective)
    return arms


def causal():
    """Causal models, pretrained on next-token prediction and not; otherwise the same."""
    arms = {}
    for model, (like, own) in MODELS.items():
        arms[f"{model}, from scratch"] = arm(f"{like}, from scratch", **own, causal=True)
        arms[f"{model}, pretrained"] = arm(f"{like}, pretrained", **own, objective="causal")
    return arms


def share():
    """The Transformer with STEPS steps, of which a share is pretraining."""
    arms = {"0 %": replace(DEMO, **SCRATCH, finetune_steps=STEPS)}
    for percent in (25, 50, 75, 95):
        first = STEPS * percent // 100
        steps = {"pretrain_steps": first, "finetune_steps": STEPS - first}
        arms[f"{percent} %"] = replace(DEMO, **PRETRAINED, **steps)
    return arms


def labels():
    """The Transformer with n labels: from scratch, or from weights that have seen all inputs."""
    weights = f"{RUNS}/objectives/{MASKED}-{{seed}}/pretrained.pt"
    arms = {}
    for n in (100, 400, 1000):
        scratch = arm("Transformer, from scratch", labels=n)
        arms[f"{n} labels, from scratch"] = scratch
        pretrained = arm("Transformer, pretrained", labels=n, pretrained=weights)
        arms[f"{n} labels, pretrained"] = pretrained
    return arms


def init():
    """S4 with every parameter from N(0, 0.1^2); `objectives` has the plain recurrence."""
    arms = {}
    for how in ("from scratch", "pretrained"):
        arms[f"S4 at random, {how}"] = arm(f"S4, {how}", random_init=True)
    return arms


def listops():
    """Transformer and S4 on ListOps below 128 tokens; each arm takes 2,000 steps of 32 trees."""
    task = replace(DEMO, task="listops-tiny", mask_ratio=None, eval_every=250, pretrain_lr=3e-3)
    models = {
        "Transformer": replace(task, finetune_lr=1e-3),
        "S4": replace(task, model="s4", finetune_lr=3e-3),
    }
    arms = {}
    for name, config in models.items():
        scratch = replace(config, objective="none", finetune_steps=2000)
        arms[f"{name}, from scratch"] = scratch
        both = replace(config, objective="masked", pretrain_steps=1200, finetune_steps=800)
        arms[f"{name}, pretrained"] = both
    return arms


QUESTIONS = {f.__name__: f for f in (objectives, causal, share, labels, init, listops)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=QUESTIONS, help="question")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds per arm")
    parser.add_argument("--workers", type=int, default=2, help="parallel runs, one thread each")
    args = parser.parse_args()
    origin = provenance()

    def run():
        if args.name == "labels":  # its arms start from these weights
            before = {MASKED: objectives()[MASKED]}
            compare(before, args.seeds, f"{RUNS}/objectives", args.workers)
        return compare(QUESTIONS[args.name](), args.seeds, f"{RUNS}/{args.name}", args.workers)

    rows = job(run, "pretraining.py")
    print_rows(rows)
    path = ROOT / f"results/pretraining_{args.name}.json"
    save(path, {**origin, "seeds": args.seeds, "arms": rows})


if __name__ == "__main__":
    main()
