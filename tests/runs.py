"""Tiny runs of pretrain.py, shared by its tests."""

import functools
import json
import multiprocessing
import os
import sys
import time
from dataclasses import replace

import numpy as np
import torch

import checkpoint
import lra_data
import pretrain
from settings import Config

TINY = {"d_model": 16, "n_heads": 2, "d_ff": 32, "d_state": 8, "kernel_dim": 8, "device": "cpu"}
TINY |= {"batch_size": 8}


@functools.cache
def lattice():
    """96 examples to train on."""
    return lra_data.load("lattice", n_train=96, n_val=16, n_test=16)


def symbols(lengths, vocab=7, seed=0):
    """A task of symbols with the given lengths, zero padded."""
    rng = np.random.RandomState(seed)
    lengths = np.array(lengths, np.int32)
    tokens = rng.randint(0, vocab, (len(lengths), lengths.max())).astype(np.uint8)
    tokens[np.arange(lengths.max()) >= lengths[:, None]] = 0
    split = lra_data.Split(tokens, rng.randint(0, 2, len(lengths)).astype(np.int64), lengths)
    return lra_data.Data("symbols", split, split, split, vocab, 2)


def numbers(n=6, L=20, C=3, seed=0):
    """A task of real values in C channels."""
    rng = np.random.RandomState(seed)
    tokens = rng.randint(0, 256, (n, L, C)).astype(np.uint8)
    split = lra_data.Split(tokens, np.zeros(n, np.int64), np.full(n, L, np.int32))
    return lra_data.Data("image", split, split, split, 256, 2, (100.0,) * C, (50.0,) * C)


def pairs(lengths):
    """Pairs of documents: `symbols`, two by two, with labels 0, 1, 0, ..."""
    data = symbols(lengths)
    tokens = data.train.tokens.reshape(len(lengths) // 2, 2, -1)
    labels = np.arange(len(tokens)) % 2
    split = lra_data.Split(tokens, labels, data.train.lengths.reshape(-1, 2))
    return replace(data, train=split, val=split, test=split)


def regression(data):
    """The same inputs with two targets, of other units."""
    rng = np.random.RandomState(1)
    splits = {}
    for name in ("train", "val", "test"):
        labels = rng.randn(len(getattr(data, name)), 2) * [3, 0.1] + [500, -2]
        splits[name] = replace(getattr(data, name), labels=labels.astype(np.float32))
    y = splits["train"].labels.astype(np.float64)
    moments = {"y_mean": tuple(y.mean(0).tolist()), "y_std": tuple(y.std(0).tolist())}
    return replace(data, **splits, **moments, n_classes=None)


def load_small(monkeypatch, data=None):
    """Let train() load `data`, or the small lattice, whatever the task."""
    data = data or lattice()
    monkeypatch.setattr(lra_data, "load", lambda task, data_dir: data)


def run(tmp_path, name, **settings):
    """Train twice twelve steps in tmp_path/name."""
    settings = {"pretrain_steps": 12, "finetune_steps": 12, "eval_every": 6} | settings
    return pretrain.train(Config(**(TINY | settings), out=str(tmp_path / name)))


def die():
    raise RuntimeError("killed")


def after_step(monkeypatch, stage, step, act):
    """Let act() follow this step of a run."""
    log = checkpoint.Run.log

    def spy(self, now, *rest):
        log(self, now, *rest)
        if (self.stage, now + 1) == (stage, step):
            act()

    monkeypatch.setattr(checkpoint.Run, "log", spy)


def bits(folder):
    """What must not depend on interruptions: scores, every weight, every line of metrics."""
    result = json.loads((folder / "result.json").read_text())
    scores = [result[key] for key in ("pretrain", "finetune", "test", "parameters")]
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    weights = {**state["model"], **state["head"]}
    return scores, (folder / "metrics.jsonl").read_text(), weights


def same(a, b):
    """Assert that two runs ended in the same bits."""
    assert a[:2] == b[:2] and a[2].keys() == b[2].keys()
    assert all(torch.equal(a[2][name], b[2][name]) for name in a[2])


# One server imports pretrain.py, and what torch imports at the first step, once and forks every
# process from there: as real as any, but soon.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pretrain", "torch._dynamo"])


def start(args, log, **environment):
    """`python pretrain.py ARGS` on the small lattice, as a process of its own; prints into log."""
    process = PROCESSES.Process(target=main, args=(args, log, environment))
    process.start()
    return process


def main(args, log, environment):
    os.environ.update(environment)
    os.chdir(log.parent)
    sys.stdout = sys.stderr = open(log, "a", 1)
    torch.set_num_threads(1)
    data = lattice()
    lra_data.load = lambda task, data_dir: data
    fsync = os.fsync

    def slow(file):  # so that a kill can hit the writing of a checkpoint
        fsync(file)
        time.sleep(0.02)

    checkpoint.os.fsync = slow
    pretrain.main(args)


SMALL = ["--d-model", "8", "--n-heads", "2", "--d-ff", "8", "--d-state", "4", "--device", "cpu"]
LONG = [*SMALL, "--batch-size", "8", "--pretrain-steps", "24", "--finetune-steps", "24"]
LONG += ["--eval-every", "5"]


def finish(args, log):
    """Run to the end, which must be a result."""
    process = start(args, log)
    process.join(300)
    assert "result.json" in log.read_text()


def progress(folder):
    """(stage, step) of the last whole line of the metrics, stages counted from 0."""
    path = folder / "metrics.jsonl"
    rows = path.read_text().splitlines() if path.exists() else []
    if not rows or not rows[-1].endswith("}"):
        return -1, 0
    last = json.loads(rows[-1])
    return pretrain.STAGES.index(last["stage"]), last.get("step", last.get("val_step"))


def kill(process, log, ready, wait=0.0):
    """SIGKILL `wait` seconds after `ready`; a run that ended before is a failure."""
    while not ready():
        assert process.is_alive(), log.read_text()
        time.sleep(0.001)
    time.sleep(wait)
    process.kill()
    process.join()
