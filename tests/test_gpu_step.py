"""CapturedStep without a GPU: a recorder that calls the step anew stands in for CUDA graphs."""

from typing import NamedTuple

import pytest
import torch
from torch import nn

from gpu_step import CapturedStep, Graphs, prepare, set_lr


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
        return function


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
