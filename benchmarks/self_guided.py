"""Does self-guided training help?  Teacher-student regression, learning-rate sweep in every arm.

    python benchmarks/self_guided.py    all missing runs, then the errors (8 min)

A frozen random network of three structured FFNs (d_model 64) is fitted by one of the same shape:
plain, self-guided in both forms over the first half, and dense.  One more row has a dense teacher,
which the factors cannot equal.  Writes results/self_guided.json run by run.
"""

import argparse
import itertools
import time
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from measured import ROOT, complete, save
from torch import nn

from structured_ffn import BlockShuffle, Grid, Guide, LowRank, StructuredFFN

TEACHERS = {
    "LowRank R 16": partial(LowRank, R=16),
    "BlockShuffle 4 x 4": partial(BlockShuffle, n_blocks=4),
}
ARMS = {"dense": None, "plain": None, "self-guided": "deterministic", "stochastic": "stochastic"}
RATES = (2e-3, 4e-3, 8e-3, 16e-3)


class Residual(nn.Module):
    """x + FFN(norm(x)), shape (T, D)."""

    def __init__(self, d_model, linear):
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.ffn = StructuredFFN(d_model, 4 * d_model, linear)

    def forward(self, x):
        return x + self.ffn(self.norm(x))


def unit_gain(model):
    """Draw every matrix so that a unit input leaves it as a unit output."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        if isinstance(layer, Grid):
            n_in, _, c, P = layer.V.shape
            nn.init.normal_(layer.V, std=P**-0.5)
            nn.init.normal_(layer.U, std=(n_in * c) ** -0.5)


def teacher_student(linear, teacher, guide, lr, steps, seed):
    """Fit a frozen random network of three FFNs; return the test error over the variance it adds.

    linear, teacher: builders of the student's and the teacher's matrices.  guide: None,
    "deterministic" (eq. 1) or "stochastic" (eq. 2), during the first half of the steps.
    """
    torch.manual_seed(seed)
    target = nn.Sequential(*[Residual(64, teacher) for _ in range(3)])
    student = nn.Sequential(*[Residual(64, linear) for _ in range(3)])
    unit_gain(target.requires_grad_(False))
    if guide:
        guide = Guide(student, steps // 2, guide == "stochastic", seed)
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x = torch.randn(128, 64)
        loss = F.mse_loss(student(x), target(x))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if guide:
            guide.step(optimizer)
    with torch.no_grad():
        x = torch.randn(8192, 64)
        y = target(x)
        return float(F.mse_loss(student.eval()(x), y) / (y - x).var())


def cells(seeds, steps):
    """Return the runs, each as its name in the result file, the most telling first."""
    found = []

    def add(teacher, arm, lr, seed):
        found.append({"teacher": teacher, "arm": arm, "lr": lr, "seed": seed, "steps": steps})

    for seed, teacher, lr in itertools.product(range(seeds), TEACHERS, RATES):
        for arm in ("plain", "self-guided", "stochastic"):
            add(teacher, arm, lr, seed)
    for seed in range(seeds):
        for teacher in TEACHERS:
            add(teacher, "dense", 4e-3, seed)
        for arm in ("plain", "self-guided"):
            add("dense, LowRank R 16 student", arm, 4e-3, seed)
    return found


def run(teacher, arm, lr, seed, steps):
    """Return the normalized test error and the CPU seconds."""
    start = time.process_time()
    if teacher.startswith("dense"):
        target = nn.Linear
        linear = TEACHERS["LowRank R 16"]
    else:
        target = TEACHERS[teacher]
        linear = nn.Linear if arm == "dense" else target
    error = teacher_student(linear, target, ARMS[arm], lr, steps, seed)
    return {"error": error, "cpu_s": round(time.process_time() - start, 1)}


def means(runs):
    """Return {teacher: {arm: {lr: mean error over the seeds, "best": the least of them}}}."""
    rows = {}
    for run in runs:
        errors = rows.setdefault(run["teacher"], {}).setdefault(run["arm"], {})
        errors.setdefault(f"{run['lr']:g}", []).append(run["error"])
    for arms in rows.values():
        for arm, errors in arms.items():
            mean = {lr: float(np.mean(e)) for lr, e in errors.items()}
            arms[arm] = mean | {"best": min(mean.values())}
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps per run (1500)")
    parser.add_argument("--seeds", type=int, default=2, help="seeds (2)")
    args = parser.parse_args()
    out = ROOT / "results/self_guided.json"
    result = complete(out, cells(args.seeds, args.steps), run, {})
    rows = means(result["runs"])
    save(out, result | {"means": rows})
    for teacher, arms in rows.items():
        for arm, errors in arms.items():
            rates = ", ".join(f"{name} {error:.4f}" for name, error in errors.items())
            print(f"{teacher:30}{arm:14}{rates}")


if __name__ == "__main__":
    main()
