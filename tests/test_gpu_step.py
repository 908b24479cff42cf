"""CapturedStep without a GPU: a recorder that calls the step anew stands in for CUDA graphs."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import runs
import torch
from torch import nn

import batches
import gpu_step
import pretrain
from gpu_step import CapturedStep, Graphs, prepare, set_lr
from s4 import rel_err
from settings import Config


class Batch(NamedTuple):
    x: torch.Tensor
    keep: torch.Tensor | None


class Again:
    """In place of Graphs: calls the function whenever a graph would be replayed."""

    def __init__(self):
        self.recorded = 0

    def rehearse(self, function):
        function()

    def record(self, function):
        self.recorded += 1
        return lambda: function().clone()


def training(captured):
    """Ten steps with batches of two shapes; returns losses, weights and optimizer state."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.LayerNorm(8), nn.Linear(8, 1))
    model.double()
    model[2].bias.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    batches = []
    for i in range(10):
        x = torch.randn(3 + i % 2, 4, dtype=torch.float64)
        batches.append(Batch(x, None if i % 3 else torch.rand(len(x)) < 0.5))

    def take_step(batch):
        weight = 1 if batch.keep is None else batch.keep[:, None]
        loss = (model(batch.x) * weight).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach().clone()

    graphs = Again()
    step = CapturedStep(take_step, model, optimizer, graphs) if captured else take_step
    losses = []
    for i, batch in enumerate(batches):
        torch.manual_seed(i)
        for group in optimizer.param_groups:
            set_lr(group, 0.1 / (i + 1))
        losses.append(step(batch))
    states = [optimizer.state[p] for p in model.parameters() if p in optimizer.state]
    tensors = [*losses, *model.parameters()]
    for state in states:
        tensors += state.values()
    return tensors, graphs.recorded


def test_captured_steps_equal_plain_steps_to_the_bit():
    plain, _ = training(captured=False)
    captured, recorded = training(captured=True)
    assert recorded == 4  # two lengths, with a mask and without
    assert len(plain) == len(captured)
    for a, b in zip(plain, captured, strict=True):
        assert torch.equal(a, b)


def test_a_replay_reads_the_buffers_not_the_batch_that_was_recorded():
    seen = []
    model = nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    step = CapturedStep(lambda batch: seen.append(batch) or batch.x + 0, model, optimizer, Again())
    first = torch.tensor([1.0])
    second = torch.tensor([2.0])
    step(Batch(first, None))
    assert step(Batch(second, None)).item() == 2.0
    assert seen[-1].x is seen[0].x
    assert (first.item(), second.item()) == (1.0, 2.0)  # the caller's own stay as they were


def test_without_a_gpu_graphs_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="need a CUDA device"):
        Graphs()
    with pytest.raises(ValueError, match="need a CUDA device"):
        CapturedStep(None, None, None)


def test_an_optimizer_saved_on_a_gpu_continues_on_a_cpu():
    model = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group.update(fused=True, capturable=True, lr=torch.tensor(0.1))
    optimizer.load_state_dict(state)
    prepare(optimizer, "cpu", graphs=False)
    (group,) = optimizer.param_groups
    assert type(group["lr"]) is float and not group["fused"] and not group["capturable"]
    optimizer.step()


def test_set_lr_keeps_a_tensor_which_a_graph_reads():
    lr = torch.tensor(0.1)
    group = {"lr": lr}
    set_lr(group, 0.25)
    assert group["lr"] is lr and lr.item() == 0.25
    group = {"lr": 0.1}
    set_lr(group, 0.25)
    assert group["lr"] == 0.25


# ---------------------------------------------------------------- in pretrain.py

DATA = {
    "symbols": (lambda: runs.symbols([5, 9, 9, 7]), {}),
    "one step later": (lambda: runs.symbols([5, 9, 9, 7]), {"objective": "causal"}),
    "values": (lambda: runs.numbers(4, 9), {"loss": "l1", "mask_ratio": 0.5}),
    "classes of pairs": (lambda: runs.pairs([5, 9, 9, 7]), {"stage": "finetune"}),
    "targets": (lambda: runs.regression(runs.symbols([5, 9, 9, 7])), {"stage": "finetune"}),
}
MODELS = ["transformer", "s4", "s4d", "diagonal", "sgconv"]


def loss_and_gradients(name, model, **settings):
    """Sums, gradients and batch of one step in float64, without dropout."""
    make, options = DATA[name]
    options = {**runs.TINY, **options, **settings}
    stage = options.pop("stage", "pretrain")
    data = make()
    about = {**batches.identity(data), "max_len": 64}
    config = Config(model=model, precision="float64", **options)
    config = batches.fitted(config, about)
    body = pretrain.initial_model(config, about)
    head = pretrain.initial_head(stage, body, config, about)
    split = batches.resident(data.train, about, "cpu")
    if stage == "pretrain":
        split = split.documents()
    generator = pretrain.seeded(config, 1)
    batch = pretrain.make_batch(split, np.arange(len(split)), stage, config, generator)
    loss, sums = pretrain.Objective(body, head, config)(batch)
    loss.backward()
    gradients = [p.grad.flatten() for p in [*body.parameters(), *head.parameters()]]
    return sums, torch.cat(gradients), batch


@pytest.mark.parametrize("name", ["symbols", "one step later", "values"])
def test_a_loss_of_fixed_shape_is_the_loss_over_the_positions_that_count(name, monkeypatch):
    sums, gradients, batch = loss_and_gradients(name, "s4")
    assert 0 < batch.where.sum() < batch.where.numel()
    monkeypatch.setattr(pretrain, "uses_graphs", lambda config: True)
    fixed_sums, fixed_gradients, _ = loss_and_gradients(name, "s4")
    assert torch.allclose(fixed_sums, sums, rtol=1e-14, atol=0, equal_nan=True)
    assert rel_err(fixed_gradients, gradients) < 1e-13


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", DATA)
def test_padding_to_a_multiple_changes_rounding_only(name, model):
    sums, gradients, batch = loss_and_gradients(name, model)
    padded_sums, padded_gradients, padded = loss_and_gradients(name, model, pad_to=16)
    assert batch.x.shape[1] == 9 and padded.x.shape[1] == 16 and not padded.keep[:, 9:].any()
    if batch.where is not None:
        assert torch.equal(padded.where[:, :9], batch.where)  # the masks of the unpadded batch
    assert torch.allclose(padded_sums, sums, rtol=1e-11, atol=0, equal_nan=True)
    assert rel_err(padded_gradients, gradients) < 1e-10


def test_batches_are_padded_to_multiples_but_not_beyond_the_longest_example():
    batch = pretrain.Batch(torch.zeros(2, 100), None, None, torch.zeros(2))
    assert pretrain.pad_batch(batch, 64, 1000).x.shape == (2, 128)
    assert pretrain.pad_batch(batch, 64, 110).x.shape == (2, 110)
    assert pretrain.pad_batch(batch, 50, 1000) is batch
    config = Config(device="cpu")
    assert config.multiple() == 1
    assert replace(config, device="cuda:1").multiple() == 64
    assert replace(config, device="cuda", pad_to=8).multiple() == 8


@pytest.mark.parametrize(("device", "eager", "graphs"), [
    ("cuda", False, True), ("cuda:0", False, True), ("cuda", True, False), ("cpu", False, False),
])  # fmt: skip
def test_graphs_are_for_one_gpu_unless_eager(device, eager, graphs):
    config = Config(device=device, eager=eager)
    assert pretrain.uses_graphs(config) is graphs
    assert not pretrain.uses_graphs(replace(config, sequence_parallel="ring"))


def pretend(monkeypatch):
    """Let runs on a CPU go the way of graphs."""
    recorders = []

    def new():
        recorders.append(Again())
        return recorders[-1]

    monkeypatch.setattr(gpu_step, "Graphs", new)
    monkeypatch.setattr(pretrain, "uses_graphs", lambda config: not config.eager)
    prepare = gpu_step.prepare
    monkeypatch.setattr(gpu_step, "prepare", lambda optimizer, *_: prepare(optimizer, "cpu", False))
    return recorders


def test_a_run_with_captured_steps_is_the_run_without(tmp_path, monkeypatch):
    runs.load_small(monkeypatch, runs.symbols(np.arange(20) % 3 + 7))
    recorders = pretend(monkeypatch)
    options = {"dropout": 0.1, "accumulate": 2, "precision": "float64", "model": "s4"}
    captured = runs.run(tmp_path, "captured", **options)
    assert [recorder.recorded for recorder in recorders] == [2, 2]  # lengths 8 and 9, full batches
    eager = runs.run(tmp_path, "eager", eager=True, **options)
    assert len(recorders) == 2
    for stage in ("pretrain", "finetune", "test"):
        assert captured[stage]["loss"] == pytest.approx(eager[stage]["loss"], rel=1e-9)


def test_a_resumed_run_with_captured_steps_ends_in_the_same_bits(tmp_path, monkeypatch):
    runs.load_small(monkeypatch, runs.symbols(np.arange(20) % 3 + 7))
    pretend(monkeypatch)
    options = {"dropout": 0.1, "model": "s4"}
    runs.run(tmp_path, "whole", **options)
    save = pretrain.Run.save

    def stop(run, step, parts, best):
        save(run, step, parts, best)
        if run.stage == "finetune":
            raise KeyboardInterrupt

    monkeypatch.setattr(pretrain.Run, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        runs.run(tmp_path, "cut", **options)
    monkeypatch.setattr(pretrain.Run, "save", save)
    runs.run(tmp_path, "cut", resume=True, **options)
    runs.same(runs.bits(tmp_path / "whole"), runs.bits(tmp_path / "cut"))
