"""CapturedStep without a GPU: a tape of operations stands in for CUDA graphs (see tape.py)."""

from dataclasses import replace
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import runs
import tape
import torch
import torch.nn.functional as F
from torch import nn

import batches
import gpu_step
import pretrain
from gpu_step import CapturedStep, Graphs, prepare_optimizer, set_lr
from s4 import rel_err
from settings import Config


class Batch(NamedTuple):
    x: torch.Tensor
    keep: torch.Tensor | None


def prepare_as_on_a_gpu(optimizer, *_):
    """On a CPU, fused AdamW does not want to be capturable, but is."""
    for group in optimizer.param_groups:
        group["fused"] = True
        group["lr"] = torch.tensor(float(group["lr"]))


def training(captured):
    """Ten steps with batches of two shapes; returns losses, weights, optimizer state, recorder."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.LayerNorm(8), nn.Linear(8, 1))
    model.double()
    model[2].bias.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    prepare_as_on_a_gpu(optimizer)
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
        return loss.detach()

    graphs = tape.Tape()
    step = CapturedStep(take_step, model, optimizer, graphs) if captured else take_step
    losses = []
    for i, batch in enumerate(batches):
        torch.manual_seed(i)
        for group in optimizer.param_groups:
            set_lr(group, 0.1 / (i + 1))
        losses.append(step(batch))
    tensors = [*losses, *model.parameters(), *[batch.x for batch in batches]]
    for state in optimizer.state.values():
        tensors += state.values()
    return tensors, graphs.captured


def test_captured_steps_equal_plain_steps_to_the_bit():
    """Also the batches are the same: buffers are the graph's, not the caller's."""
    plain, _ = training(captured=False)
    captured, graphs = training(captured=True)
    assert graphs == 4  # two lengths, with a mask and without
    for a, b in zip(plain, captured, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("step", [
    lambda batch: batch.x[batch.keep], lambda batch: batch.x * batch.x.sum().item(),
])  # fmt: skip
def test_the_tape_refuses_what_waits_for_the_gpu(step):
    model = nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    step = CapturedStep(step, model, optimizer, tape.Tape())
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        step(Batch(torch.ones(2), torch.tensor([True, False])))


def test_graphs_use_a_stream_of_their_own_on_the_device_of_the_model(monkeypatch):
    with pytest.raises(ValueError, match="need a model on a CUDA device, not on cpu"):
        CapturedStep(None, nn.Linear(1, 1), None)
    cuda = mock.MagicMock()
    monkeypatch.setattr(torch, "cuda", cuda)
    graphs = Graphs("cuda:1")
    graphs.warm_up(cuda.function)
    replay = graphs.capture(cuda.function)
    assert replay() is cuda.function.return_value
    names = [name for name, _, _ in cuda.mock_calls]
    assert names == [
        "graph_pool_handle", "Stream", "current_stream",
        "Stream().wait_stream", "stream", "stream().__enter__", "function", "stream().__exit__",
        "current_stream().wait_stream",
        "CUDAGraph", "graph", "graph().__enter__", "function", "graph().__exit__",
        "CUDAGraph().replay",
    ]  # fmt: skip
    stream = cuda.Stream.return_value
    cuda.Stream.assert_called_with("cuda:1")
    cuda.current_stream.assert_called_with(stream.device)
    cuda.stream.assert_called_with(stream)
    cuda.graph.assert_called_with(cuda.CUDAGraph.return_value, pool=graphs.pool, stream=stream)


def test_an_optimizer_saved_on_a_gpu_continues_on_a_cpu():
    model = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group.update(fused=True, capturable=True, lr=torch.tensor(0.1))
    optimizer.load_state_dict(state)
    prepare_optimizer(optimizer, "cpu", graphs=False)
    (group,) = optimizer.param_groups
    assert type(group["lr"]) is float and not group["fused"] and not group["capturable"]
    optimizer.step()
    set_lr(group, 0.25)
    assert group["lr"] == 0.25
    group["lr"] = lr = torch.tensor(0.1)  # which a graph reads
    set_lr(group, 0.25)
    assert group["lr"] is lr and lr.item() == 0.25


# ---------------------------------------------------------------- in pretrain.py

SYMBOLS = runs.symbols([5, 9, 9, 7])
DATA = {
    "symbols": (SYMBOLS, "pretrain", {}),
    "one step later": (SYMBOLS, "pretrain", {"objective": "causal"}),
    "values": (runs.numbers(4, 9), "pretrain", {"loss": "l1", "mask_ratio": 0.5}),
    "classes of pairs": (runs.pairs([5, 9, 9, 7]), "finetune", {}),
    "targets": (runs.regression(SYMBOLS), "finetune", {}),
}
MODELS = ["transformer", "s4", "s4d", "diagonal", "sgconv"]


def loss_and_gradients(name, model, **settings):
    """Sums, gradients and batch of one step in float64, without dropout."""
    data, stage, options = DATA[name]
    about = {**batches.describe(data), "max_len": 64}
    config = Config(model=model, precision="float64", **runs.TINY, **options, **settings)
    config = batches.fitted(config, about)
    body = pretrain.initial_model(config, about)
    head = pretrain.initial_head(stage, body, config, about)
    split = batches.resident(data.train, about, "cpu")
    positions = (0, 0, 0, 20) if data.mean else (0, 20)
    split = replace(split, tokens=F.pad(split.tokens, positions))  # as if others were longer
    if stage == "pretrain":
        split = split.documents()
    generator = pretrain.seeded(config, 1)
    batch = pretrain.make_batch(split, np.arange(len(split)), stage, config, generator)
    loss, sums = pretrain.LossModule(body, head, config)(batch)
    loss.backward()
    gradients = [p.grad.flatten() for p in [*body.parameters(), *head.parameters()]]
    return sums, torch.cat(gradients), batch


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", DATA)
def test_padding_and_fixed_shapes_change_rounding_only(name, model, monkeypatch):
    sums, gradients, batch = loss_and_gradients(name, model)
    padded_sums, padded_gradients, padded = loss_and_gradients(name, model, pad_to=16)
    assert batch.x.shape[1] == 9 and padded.x.shape[1] == 16 and not padded.keep[:, 9:].any()
    if batch.where is not None:
        assert 0 < batch.where.sum() < batch.where.numel()
        assert torch.equal(padded.where[:, :9], batch.where)  # the masks of the unpadded batch
    assert torch.allclose(padded_sums, sums, rtol=1e-11, atol=0, equal_nan=True)
    assert rel_err(padded_gradients, gradients) < 1e-10
    monkeypatch.setattr(pretrain, "uses_graphs", lambda config: True)
    fixed_sums, fixed_gradients, _ = loss_and_gradients(name, model, pad_to=16)
    assert torch.allclose(fixed_sums, padded_sums, rtol=1e-14, atol=0, equal_nan=True)
    assert rel_err(fixed_gradients, padded_gradients) < 1e-13


def test_batches_are_padded_to_multiples_but_not_beyond_the_longest_example():
    for stored, multiple, width in [(1000, 64, 128), (110, 64, 110), (1000, 50, 100)]:
        raw, keep = batches.trim(torch.ones(2, stored), np.array([100, 100]), multiple)
        assert raw.shape == (2, width)
        assert keep is None if width == 100 else (keep.sum(1) == 100).all()


@pytest.mark.parametrize(("device", "eager", "graphs", "multiple"), [
    ("cuda", False, True, 128), ("cuda:1", False, True, 128), ("cuda", True, False, 128),
    ("cpu", False, False, 1),
])  # fmt: skip
def test_graphs_are_for_one_gpu_unless_eager(device, eager, graphs, multiple):
    config = Config(device=device, eager=eager)
    assert pretrain.uses_graphs(config) is graphs
    assert not pretrain.uses_graphs(replace(config, sequence_parallel="ring"))
    assert config.multiple() == multiple
    assert replace(config, pad_to=8).multiple() == 8


@pytest.mark.parametrize("model", MODELS)
def test_a_run_with_captured_steps_is_the_run_without_also_resumed(model, tmp_path, monkeypatch):
    """20 examples of length 7, 8 and 9; all batches of 8 have a graph, which are two lengths."""
    runs.load_small(monkeypatch, runs.symbols(np.arange(20) % 3 + 7))
    recorders = []

    def new(device):
        recorders.append(tape.Tape())
        return recorders[-1]

    def stop(run, step, parts, best):
        save(run, step, parts, best)
        if run.stage == "finetune":
            raise KeyboardInterrupt

    monkeypatch.setattr(gpu_step, "Graphs", new)
    monkeypatch.setattr(gpu_step, "prepare_optimizer", prepare_as_on_a_gpu)
    monkeypatch.setattr(pretrain, "uses_graphs", lambda config: not config.eager)
    options = {"dropout": 0.1, "accumulate": 2, "precision": "float64", "model": model}
    options |= {"pretrain_steps": 6, "finetune_steps": 6, "eval_every": 3}
    captured = runs.run(tmp_path, "captured", **options)
    assert [recorder.captured for recorder in recorders] == [2, 2]
    eager = runs.run(tmp_path, "eager", eager=True, **options)
    assert len(recorders) == 2
    for stage in ("pretrain", "finetune", "test"):
        assert captured[stage]["loss"] == pytest.approx(eager[stage]["loss"], rel=1e-9)
    save = pretrain.Run.save
    monkeypatch.setattr(pretrain.Run, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        runs.run(tmp_path, "cut", **options)
    monkeypatch.setattr(pretrain.Run, "save", save)
    runs.run(tmp_path, "cut", resume=True, **options)
    runs.same(runs.bits(tmp_path / "captured"), runs.bits(tmp_path / "cut"))
