"""Tiny runs of pretrain.py, shared by its tests."""

import functools
import json
import multiprocessing
import os
import sys
import time

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


def load_small(monkeypatch, data=None):
    """Let train() load `data`, or the small lattice, whatever the task."""
    data = data or lattice()
    monkeypatch.setattr(lra_data, "load", lambda task, data_dir: data)


def run(tmp_path, name, **settings):
    """Train twice twelve steps in tmp_path/name."""
    settings = {"pretrain_steps": 12, "finetune_steps": 12, "eval_every": 6} | settings
    return pretrain.train(Config(**(TINY | settings), out=str(tmp_path / name)))


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


# One server imports pretrain.py once and forks every process from there: as real as any, but soon.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pretrain"])


def start(args, log, **environment):
    """`python pretrain.py ARGS` on the small lattice, as a process of its own; prints into log."""
    process = PROCESSES.Process(target=main, args=(args, log, environment))
    process.start()
    return process


def main(args, log, environment):
    os.environ.update(environment)
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
