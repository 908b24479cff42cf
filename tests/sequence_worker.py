"""One process of tests/test_sequence_parallel.py: torchrun ... sequence_worker.py FOLDER."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from runs import regression

import dist_attention
import lra_data
import pretrain
from settings import Config

SMALL = {"d_model": 8, "n_heads": 2, "d_ff": 8, "d_state": 4, "kernel_dim": 8, "batch_size": 7}
SMALL |= {"precision": "float64", "device": "cpu", "eval_every": 3}
SMALL |= {"pretrain_steps": 6, "finetune_steps": 6, "pretrain_lr": 1e-2, "finetune_lr": 1e-2}
RING = {"sequence_parallel": "ring"}
ULYSSES = {"sequence_parallel": "ulysses"}
CAUSAL = {"objective": "causal"}
CASES = {
    "transformer, ring": RING,
    "transformer, causal, RoPE, ring": {**RING, **CAUSAL, "rope": True},
    "transformer, ulysses": ULYSSES,
    "s4, ulysses": {**ULYSSES, "model": "s4"},
    "sgconv, causal, ulysses": {**ULYSSES, **CAUSAL, "model": "sgconv"},
    "transformer, data": {"accumulate": 2},  # the last batch of an epoch has parts without examples
    "s4, data": {"model": "s4"},
    "diagonal, causal, max, data": {**CAUSAL, "model": "diagonal", "pooling": "max"},
    "sgconv, data": {"model": "sgconv"},
    "s4, regression, data": {"model": "s4", "task": "regression", "loss": "ce"},
    "transformer, regression, ring": {**RING, "task": "regression", "loss": "ce"},
}


class Recorder(pretrain.Run):
    """Collects loss, count and correct of every step, summed over the processes."""

    seen = ()
    kill_at = None  # (stage, step)

    def log(self, step, sums, tokens):
        super().log(step, sums, tokens)
        Recorder.seen.extend(dist_attention.SumOverRanks.apply(sums).tolist())
        if (self.stage, step) == self.kill_at:
            raise ValueError("killed")


def trajectory(folder, options):
    """All sums of six steps per stage and all scores of a run."""
    Recorder.seen = []
    result = pretrain.train(Config(**(SMALL | options), out=str(folder)))
    scores = []
    for stage in ("pretrain", "finetune", "test"):
        scores += [value for name, value in result[stage].items() if name != "step"]
    return Recorder.seen + scores


def prepare():
    """Train on 33 examples, half of them padded; record every step."""
    data = lra_data.load("lattice", n_train=33, n_val=8, n_test=10)
    shorter = np.where(np.arange(33) % 2, data.train.lengths, data.train.lengths * 2 // 3)
    data = replace(data, train=replace(data.train, lengths=shorter))
    tasks = {"lattice": data, "regression": regression(data)}
    lra_data.load = lambda task, data_dir: tasks[task]
    pretrain.Run = Recorder


def resumed(folder):
    """Is a run that was killed in either stage, and went on, the uninterrupted one, bit for bit?"""
    options = {"dropout": 0.1, "precision": "float32"}
    whole = trajectory(folder / "whole", options)
    for kill_at, resume in ((("pretrain", 4), False), (("finetune", 4), True)):
        Recorder.kill_at = kill_at
        try:
            trajectory(folder / "cut", {**options, "resume": resume})
        except ValueError as error:
            assert str(error) == "killed", error
    Recorder.kill_at = None
    cut = trajectory(folder / "cut", {**options, "resume": True})
    weights = []
    for name in ("whole", "cut"):
        state = torch.load(folder / name / "checkpoint.pt", weights_only=True)
        weights.append({**state["model"], **state["head"]})
    same = all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    return same and whole[-15:] == cut  # from the last validation


def main(folder):
    folder = Path(folder)
    torch.set_num_threads(1)
    prepare()
    with dist_attention.process_group(timeout=120) as (rank, _, _):
        seen = {name: trajectory(folder / name, options) for name, options in CASES.items()}
        seen["resumed"] = resumed(folder)
        (folder / f"seen.{rank}").write_text(json.dumps(seen))


if __name__ == "__main__":
    dist_attention.guarded(main, *sys.argv[1:])
