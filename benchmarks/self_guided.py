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

import judges
import torch
import torch.nn.functional as F
from measured import ROOT, complete, select
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
    found = [*itertools.product(TEACHERS, RATES, ("plain", "self-guided", "stochastic"))]
    found += [(teacher, 4e-3, "dense") for teacher in TEACHERS]
    found += [("dense, LowRank R 16 student", 4e-3, arm) for arm in ("plain", "self-guided")]
    runs = []
    for seed, (teacher, lr, arm) in itertools.product(range(seeds), found):
        runs.append({"teacher": teacher, "arm": arm, "lr": lr, "seed": seed, "steps": steps})
    return runs


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


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps per run (1500)")
    parser.add_argument("--seeds", type=int, default=2, help="seeds (2)")
    args = parser.parse_args()
    out = ROOT / "results/self_guided.json"
    runs = complete(out, cells(args.seeds, args.steps), run, {})["runs"]
    for teacher, arm in dict.fromkeys((run["teacher"], run["arm"]) for run in runs):
        best = judges.best_arm(select(runs, teacher=teacher, arm=arm))
        print(f"{teacher:30}{arm:14}{judges.arm(best, 4)}")


if __name__ == "__main__":
    main()
