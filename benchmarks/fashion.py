"""When does pretraining begin to pay?  Fashion-MNIST, 14 x 14 pixels, a Transformer and S4.

    python benchmarks/fashion.py    the four published files are in --folder

1x is 2,400 steps of 16 pictures: 1,600 of denoising (half of the pixels, L1) and 800 of
fine-tuning, or all of them on the labels.  5,000 pictures train, 6,000 validate, the published
10,000 test.  Learning rates are chosen on validation in runs of half the length.  Finished runs
are kept and results/fashion_mnist.json is written after each part: the same command continues.
"""

import argparse
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from compare import compare, job, print_rows, tuned
from measured import ROOT, provenance, save

from settings import Config

RUNS = "runs/fashion_mnist"
FOLDER = Path("/usr/share/datasets/fashion-mnist")  # Debian: apt install dataset-fashion-mnist
RATES = (1e-3, 3e-3)
MODELS = {"Transformer": "transformer", "S4": "s4"}
HOWS = ("from scratch", "pretrained")
LABELS = 500
BASE = Config(
    task="data/fashion_mnist_14.npz",
    loss="l1",
    mask_ratio=0.5,
    d_ff=128,
    d_state=16,
    batch_size=16,
    device="cpu",
)


def write_pictures(folder, path, size, n_train):
    """Write size x size pictures as an .npz file of sequences, or end with the reason in a line."""
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_suffix(".new.npz")
    words = [folder, "--size", size, "--train", n_train, "--out", unfinished]
    words = [sys.executable, ROOT / "examples/fashion_mnist.py", *words]
    if subprocess.run([str(word) for word in words]).returncode:
        sys.exit(1)
    unfinished.replace(path)


def arm(model, how, budget, **own):
    """One arm; budget 1: 2,400 steps."""
    plan = {"pretrain_steps": round(1600 * budget), "finetune_steps": round(800 * budget)}
    if how == "from scratch":
        plan = {"objective": "none", "finetune_steps": round(2400 * budget)}
    every = round(400 * budget)
    return replace(BASE, model=MODELS[model], eval_every=every, **plan, **own)


def parts(rates):
    """Yield (arms, seeds) to train, short ones first.  rates: learning rates of (model, how)."""

    def arms(budget, text, **own):
        found = {}
        for (model, how), best in rates.items():
            found[f"{model}, {how}, {text}"] = arm(model, how, budget, **best, **own)
        return found

    yield arms(1, "1x"), [0, 1, 2]
    few = arms(1, f"1x and {LABELS} labels", labels=LABELS)
    for model in MODELS:
        name = f"{model}, pretrained, 1x"
        weights = f"{RUNS}/{name.replace(',', '').replace(' ', '-')}-{{seed}}/pretrained.pt"
        few[f"{name} and {LABELS} labels"].pretrained = weights
    yield few, [0, 1, 2]
    yield arms(3, "3x"), [0, 1, 2]
    yield arms(10, "10x"), [0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="folder of the four IDX files")
    parser.add_argument("--workers", type=int, default=2, help="parallel runs, one thread each")
    args = parser.parse_args()
    origin = provenance()
    path = Path(BASE.task)

    def run():
        if not path.exists():
            write_pictures(args.folder, path, 14, 5000)
        rates = {}
        for model in MODELS:
            for how in HOWS:
                short = arm(model, how, 0.5, out=f"{RUNS}/rates/{model}-{how}".replace(" ", "-"))
                rates[model, how], _ = tuned(short, RATES, args.workers)
        rows = {}
        for arms, seeds in parts(rates):
            rows.update(compare(arms, seeds, RUNS, args.workers))
            save(ROOT / "results/fashion_mnist.json", {**origin, "seeds": [0, 1, 2], "arms": rows})
        return rows

    print_rows(job(run, "fashion.py"))


if __name__ == "__main__":
    main()
