"""When does pretraining begin to pay?  Fashion-MNIST, 14 x 14 pixels, a Transformer and S4.

    python benchmarks/fashion.py    the four published files are in --folder

1x is 2,400 steps of 32 pictures: 1,600 of denoising (half of the pixels, L1) and 800 of
fine-tuning, or all of them on the labels.  5,000 pictures train, 1,000 validate, the published
10,000 test.  Learning rates are chosen on validation in runs of half the length.  Finished runs
are kept and results/fashion_mnist.json is written after each part: the same command continues.
"""

import argparse
import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
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
    batch_size=32,
    device="cpu",
)


def read(path):
    """A published IDX file: labels (n,) or pixels (n, 28, 28), uint8."""
    raw = gzip.decompress(path.read_bytes())
    axes = raw[3]
    shape = np.frombuffer(raw, ">i4", axes, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)


def write_pictures(folder, path, size, n_train, n_val):
    """Write pictures of size x size pixels as sequences of real values, in the published order."""
    x = []
    y = []
    for name, n in (("train", n_train + n_val), ("t10k", 10_000)):
        pixels = read(folder / f"{name}-images-idx3-ubyte.gz")[:n]
        k = 28 // size
        means = pixels.reshape(n, size, k, size, k).mean((2, 4), dtype=np.float32)
        x.append(means.reshape(n, size * size) / 255)
        y.append(read(folder / f"{name}-labels-idx1-ubyte.gz")[:n])
    split = ["train"] * n_train + ["val"] * n_val + ["test"] * 10_000
    path.parent.mkdir(exist_ok=True)
    np.savez(path, x=np.concatenate(x), y=np.concatenate(y).astype(np.int64), split=split)


def arm(model, how, budget, **own):
    """One arm; budget 1: 2,400 steps."""
    plan = {"pretrain_steps": round(1600 * budget), "finetune_steps": round(800 * budget)}
    if how == "from scratch":
        plan = {"objective": "none", "finetune_steps": round(2400 * budget)}
    every = round(200 * budget)
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
            write_pictures(args.folder, path, 14, 5000, 1000)
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
