"""pretrain.py: masks, targets, order, transfer, padding, determinism, a golden loss trajectory."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import make_golden
import numpy as np
import pytest
import torch

import lra_data
import pretrain
import run_folder
from config import Config
from pretrain import Resident

ROOT = Path(__file__).parent.parent
TINY = {"d_model": 16, "n_heads": 2, "d_ff": 32, "d_state": 8, "kernel_dim": 8, "device": "cpu"}
TINY |= {"batch_size": 8}


@pytest.fixture(scope="module")
def lattice():
    return lra_data.load("lattice", n_train=96, n_val=16, n_test=16)


@pytest.fixture
def small_lattice(monkeypatch, lattice):
    """train() on a lattice of 96 examples."""
    monkeypatch.setattr(lra_data, "load", lambda task, data_dir: lattice)


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


def batch_of(data, stage="pretrain", seed=0, **settings):
    config = Config(**(TINY | settings))
    resident = Resident(data.train, data, "cpu")
    generator = pretrain.seeded(config, seed)
    index = np.arange(len(resident))
    return config, pretrain.make_batch(resident, index, stage, config, generator)


# ------------------------------------------------------------------------------- corruption


@pytest.mark.parametrize("ffn", ["lowrank", "blockdense", "blockshuffle"])
def test_structured_ffns_stand_in_all_blocks_but_the_first(ffn):
    data = symbols([9, 9])
    sizes = {"d_model": 32, "d_ff": 128, "n_layers": 3}
    dense, model = (
        pretrain.build_model(Config(**(TINY | sizes), ffn=kind), data) for kind in ("dense", ffn)
    )
    count = [[sum(p.numel() for p in b.ffn.parameters()) for b in m.blocks] for m in (dense, model)]
    assert count[0][0] == count[1][0] and all(n < 0.5 * count[0][0] for n in count[1][1:])
    assert model(torch.zeros(2, 9, dtype=torch.long)).shape == (2, 9, 32)


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
def test_share_of_masked_positions(ratio):
    data = symbols([200] * 200)
    _, batch = batch_of(data, mask_ratio=ratio)
    share, sigma = batch.where.float().mean().item(), (ratio * (1 - ratio) / 40_000) ** 0.5
    assert abs(share - ratio) < 4 * sigma


def test_masked_positions_are_all_replaced_and_never_padding():
    data = symbols([5, 40, 23, 40])
    _, batch = batch_of(data, mask_ratio=0.5)
    lengths = torch.tensor([5, 40, 23, 40])
    real = torch.arange(40) < lengths[:, None]
    assert torch.equal(batch.x == data.vocab_size, batch.where)
    assert not (batch.where & ~real).any() and batch.where[:, :5].any()
    assert torch.equal(batch.keep, real)
    clean = torch.from_numpy(data.train.tokens).long()
    assert torch.equal(batch.target, clean)
    assert torch.equal(batch.x[~batch.where], clean[~batch.where])


def test_masks_are_drawn_anew_each_step_and_repeat_with_the_seed():
    data = symbols([50] * 8)
    first, second, again = (batch_of(data, seed=s)[1].where for s in (1, 2, 1))
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_masks_are_independent_of_each_other():
    """Neighbours, rows and halves: the share of pairs that are both masked is the square."""
    where = batch_of(symbols([200] * 200), mask_ratio=0.3)[1].where.float()
    for a, b in ((where[:, 1:], where[:, :-1]), (where[1:], where[:-1])):
        assert abs((a * b).mean().item() - 0.09) < 4 * (0.09 * 0.91 / 39_800) ** 0.5


def test_causal_target_is_the_next_real_token():
    data = symbols([3, 6, 1])
    _, batch = batch_of(data, objective="causal")
    tokens = data.train.tokens
    for row, length in enumerate([3, 6, 1]):
        assert batch.where[row].tolist() == [True] * (length - 1) + [False] * (7 - length)
        for t in range(length - 1):
            assert batch.target[row, t] == tokens[row, t + 1]
    assert torch.equal(batch.x, torch.from_numpy(tokens).long())


def test_values_are_normalised_flagged_and_hidden():
    data = numbers()
    _, batch = batch_of(data, task="image-real")
    clean = (torch.from_numpy(data.train.tokens).float() - 100) / 50
    assert batch.x.shape == (6, 20, 4)
    assert torch.equal(batch.x[..., 3] == 1, batch.where)
    assert (batch.x[batch.where][:, :3] == 0).all()
    assert torch.allclose(batch.x[~batch.where][:, :3], clean[~batch.where])
    assert torch.allclose(batch.target, clean)


def test_fine_tuning_inputs_hide_nothing():
    _, batch = batch_of(numbers(), "finetune", task="image-real")
    assert (batch.x[..., 3] == 0).all() and batch.where is None
    _, batch = batch_of(symbols([4, 9]), "finetune")
    assert (batch.x < 7).all()


def test_a_pair_is_two_documents():
    data = symbols([4, 9, 5, 7])
    split = lra_data.Split(
        data.train.tokens.reshape(2, 2, 9), np.array([0, 1]), data.train.lengths.reshape(2, 2)
    )
    pairs = replace(data, train=split, val=split, test=split)
    config, batch = batch_of(pairs, "finetune")
    assert batch.x.shape == (4, 9) and batch.target.tolist() == [0, 1]
    assert torch.equal(batch.x, torch.from_numpy(data.train.tokens).long())
    resident = Resident(split, pairs, "cpu")
    model = pretrain.build_model(config, pairs)
    head = pretrain.build_head("finetune", config, resident)
    assert pretrain.loss_sums(model, head, batch, config)[2] == 2
    single = resident.documents()
    assert len(single) == 4 and single.lengths.tolist() == [4, 9, 5, 7]


# ------------------------------------------------------------------------------------ order


def test_every_epoch_holds_every_example_once():
    lengths = np.random.RandomState(0).randint(1, 500, 1000)
    steps = -(-1000 // 8)
    batches = list(itertools.islice(pretrain.draw(lengths, 8, 3), 3 * steps))
    for epoch in range(3):
        seen = np.concatenate(batches[epoch * steps : (epoch + 1) * steps])
        assert np.array_equal(np.sort(seen), np.arange(1000))
    assert not np.array_equal(batches[0], batches[steps])


def test_bucketing_leaves_little_padding():
    lengths = np.random.RandomState(0).randint(500, 2000, 4096)
    batches = itertools.islice(pretrain.draw(lengths, 16, 0), 256)
    padded = sum(lengths[i].max() * len(i) for i in batches)
    assert padded < 1.05 * lengths.sum()


def test_subsets_are_nested():
    data = symbols(range(1, 33))
    resident = Resident(data.train, data, "cpu")
    small, large = resident.subset(5), resident.subset(20)
    assert np.array_equal(small.lengths, large.lengths[:5]) and len(set(large.lengths)) == 20
    with pytest.raises(ValueError, match=r"labels 33.* 32 examples"):
        resident.subset(33)


# ----------------------------------------------------------------------------- model and loss


@pytest.mark.parametrize("model", ["transformer", "s4", "s4d", "diagonal", "sgconv"])
@pytest.mark.parametrize("objective", ["masked", "causal"])
@pytest.mark.parametrize("pooling", ["mean", "max", "last"])
def test_a_batch_mate_never_changes_a_result(model, objective, pooling):
    data = symbols([5, 30, 12])
    config = Config(**TINY, model=model, objective=objective, pooling=pooling)
    torch.manual_seed(0)
    body = pretrain.build_model(config, data).double().eval()
    resident = Resident(data.train, data, "cpu")
    head = pretrain.build_head("finetune", config, resident).double()

    def logits(index):
        batch = pretrain.make_batch(resident, np.array(index), "finetune", config, None)
        return head(pretrain.pool(body(batch.x, batch.keep), batch.keep, pooling))

    together = logits([0, 1, 2])
    for i in range(3):
        alone = logits([i])[0]
        assert (together[i] - alone).abs().max() < 1e-12 * alone.abs().max()
    assert (together[0] - together[1]).abs().max() > 1e-6


def test_loss_counts_only_the_chosen_positions():
    """A body that gives nonsense elsewhere has the same loss."""
    data = symbols([8, 12, 12])
    config, batch = batch_of(data, mask_ratio=0.5)
    features = torch.randn(3, 12, 16)
    head = pretrain.build_head("pretrain", config, Resident(data.train, data, "cpu"))
    spoilt = torch.where(batch.where[..., None], features, torch.full_like(features, 1e3))
    a, b = (
        pretrain.loss_sums(lambda x, keep, h=h: h, head, batch, config) for h in (features, spoilt)
    )
    assert torch.equal(a[0], b[0]) and a[2] == int(batch.where.sum())
    by_hand = -torch.log_softmax(head(features), -1)
    by_hand = by_hand.gather(2, batch.target[..., None])[..., 0][batch.where].sum()
    assert torch.allclose(a[0], by_hand)


def test_schedule():
    values = [pretrain.schedule(s, 100, 0.1) for s in range(100)]
    assert values[0] == 0.1 and values[9] == 1.0 and values[10] == 1.0
    assert values[55] == pytest.approx(0.5) and 0 < values[99] < 0.001
    assert all(a >= b for a, b in itertools.pairwise(values[10:]))
    constant = [pretrain.schedule(s, 100, 0.1, "constant") for s in range(100)]
    assert constant[:10] == values[:10] and set(constant[10:]) == {1.0}


# ------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("model", ["transformer", "s4"])
def test_overfits_one_batch(model, lattice, tmp_path):
    part = lra_data.Split(*(a[:8] for a in vars(lattice.train).values()))
    data = replace(lattice, train=part, val=part, test=part)
    config = Config(**(TINY | {"d_model": 32}), model=model, finetune_steps=80, eval_every=80)
    config = replace(config, finetune_lr=1e-2, objective="none", out=str(tmp_path))
    torch.manual_seed(0)
    resident, body = Resident(part, data, "cpu"), pretrain.build_model(config, data)
    head = pretrain.build_head("finetune", config, resident)
    with run_folder.Run(tmp_path, {}) as run:
        score = pretrain.fit("finetune", body, head, resident, resident, config, run)
    assert score["accuracy"] == 1 and score["loss"] < 0.2


def run(tmp_path, name, **settings):
    settings = {"pretrain_steps": 12, "finetune_steps": 12, "eval_every": 6} | settings
    return pretrain.train(Config(**(TINY | settings), out=str(tmp_path / name)))


@pytest.mark.parametrize("model", ["transformer", "s4"])
def test_same_seed_same_bits(small_lattice, tmp_path, model):
    scores, weights = [], []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        result = run(tmp_path, name, model=model, seed=seed, dropout=0.1)
        assert result == json.loads((tmp_path / name / "result.json").read_text())
        assert result.keys() >= {"commit", "torch", "speed", "config"}
        scores.append([result[k] for k in ("pretrain", "finetune", "test")])
        weights.append(torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"])
    assert scores[0] == scores[1] != scores[2]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_body_carries_over_head_and_optimiser_do_not(small_lattice, tmp_path, monkeypatch):
    """What fine-tuning starts from is what pretraining left, bit for bit, under a new head."""
    start, fit = {}, pretrain.fit

    def spy(stage, model, head, *rest):
        start[stage] = ({k: v.clone() for k, v in model.state_dict().items()}, head)
        return fit(stage, model, head, *rest)

    monkeypatch.setattr(pretrain, "fit", spy)
    run(tmp_path, "a")
    pretrained = torch.load(tmp_path / "a" / "pretrained.pt", weights_only=True)
    body, head = start["finetune"]
    assert all(torch.equal(body[k], pretrained[k]) for k in body)
    assert any(not torch.equal(body[k], start["pretrain"][0][k]) for k in body)
    assert (head.out_features, start["pretrain"][1].out_features) == (2, 2)
    assert not torch.equal(head.weight, start["pretrain"][1].weight)
    start.clear()
    run(tmp_path, "b", pretrained=str(tmp_path / "a" / "pretrained.pt"))
    assert list(start) == ["finetune"]
    assert all(torch.equal(start["finetune"][0][k], pretrained[k]) for k in pretrained)


def test_weights_of_another_body_are_refused_and_never_overwritten(small_lattice, tmp_path):
    """A head count shows in no shape; the folder that holds the weights is not written to."""
    run(tmp_path, "a")
    weights = tmp_path / "a" / "pretrained.pt"
    with pytest.raises(ValueError, match=r"pretrained with n_heads 2, not 4"):
        run(tmp_path, "b", pretrained=str(weights), n_heads=4)
    with pytest.raises(ValueError, match="take another --out"):
        run(tmp_path, "a", pretrained=str(weights))
    assert weights.exists() and not (tmp_path / "b").exists()


def test_streams_of_different_steps_differ():
    """(seed,), (seed, 0) and (seed, 0, 0) too, of which numpy alone makes one."""
    config, seen = Config(**TINY), set()
    for numbers in ((3,), (3, 0), (3, 0, 0), (3, 0, 1), (3, 1, 0)):
        mask = torch.rand(3, generator=pretrain.seeded(config, *numbers))
        seen |= {tuple(mask.tolist()), tuple(torch.rand(2).tolist())}
    assert len(seen) == 10
    draws = []
    for own in (0, 1):  # processes that share the masks drop other units
        mask = torch.rand(3, generator=pretrain.seeded(config, 3, own=own))
        draws.append((mask, torch.rand(3)))
    assert torch.equal(draws[0][0], draws[1][0]) and not torch.equal(draws[0][1], draws[1][1])


def test_each_stage_has_its_own_batch_size(small_lattice, tmp_path, monkeypatch):
    sizes, make_batch = {"pretrain": set(), "finetune": set()}, pretrain.make_batch

    def spy(resident, index, stage, *rest):
        sizes[stage].add(len(index))
        return make_batch(resident, index, stage, *rest)

    monkeypatch.setattr(pretrain, "make_batch", spy)
    run(tmp_path, "a", pretrain_batch_size=12)
    assert max(sizes["pretrain"]) == 12 and max(sizes["finetune"]) == 8


def test_random_init_leaves_no_structure(lattice):
    config = Config(**(TINY | {"d_model": 64}), model="s4", random_init=True)
    model = pretrain.initial_model(config, lattice)
    values = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert abs(values.mean()) < 0.002 and abs(values.std() - 0.1) < 0.002
    assert all(p.std() > 0.02 for p in model.parameters())


@pytest.mark.parametrize("model", ["transformer", "s4"])
def test_a_compiled_model_trains_the_same(model, small_lattice, tmp_path, monkeypatch):
    """Traced by torch.compile, run as traced (no compiler is needed); the names stay."""
    compile, graphs = torch.nn.Module.compile, []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile(self, backend=backend))
    plain, traced = (
        run(tmp_path, name, model=model, compile=name == "b", precision="float64") for name in "ab"
    )
    assert graphs
    for stage in ("pretrain", "finetune", "test"):
        assert traced[stage]["loss"] == pytest.approx(plain[stage]["loss"], rel=1e-9)
    names = [torch.load(tmp_path / n / "pretrained.pt", weights_only=True).keys() for n in "ab"]
    assert names[0] == names[1]


@pytest.mark.parametrize("model", ["s4", "s4d", "diagonal", "sgconv"])
def test_a_convolution_is_not_compiled_for_every_length(model, monkeypatch, tmp_path):
    data = lra_data.load("listops-tiny", n_train=64, n_val=8, n_test=8)
    low, high = data.train.lengths.min(), data.train.lengths.max()
    monkeypatch.setattr(lra_data, "load", lambda task, data_dir: data)
    with pytest.raises(ValueError, match=f"'{model}'.*lengths {low} to {high}.*one length"):
        run(tmp_path, "a", task="listops-tiny", model=model, compile=True)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("model", ["transformer", "s4"])
def test_ten_step_trajectory_in_float64(model, tmp_path):
    """Golden losses: they move when the mathematics, the schedule or the optimiser does."""
    golden = json.loads((ROOT / "tests/golden/pretrain.json").read_text())
    losses = make_golden.pretrain_losses(model, tmp_path)
    assert losses == pytest.approx(golden[model], rel=1e-9)
    assert golden[model][-1] < golden[model][0]


def bits(folder):
    """What must not depend on interruptions: scores and every weight."""
    result = json.loads((folder / "result.json").read_text())
    scores = {k: result[k] for k in ("pretrain", "finetune", "test", "parameters")}
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    lines = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("tokens_per_s", None)
    return scores, {**state["model"], **state["head"]}, lines


def same(a, b):
    assert a[0] == b[0] and a[2] == b[2]
    assert a[1].keys() == b[1].keys() and all(torch.equal(a[1][k], b[1][k]) for k in a[1])


@pytest.mark.parametrize("stop", [("pretrain", 7), ("pretrain", 12), ("finetune", 3)])
def test_an_interrupted_run_continues_to_the_same_bits(small_lattice, tmp_path, monkeypatch, stop):
    """A kill after any step: what was written so far is all that the second process sees."""
    run(tmp_path, "whole", dropout=0.1)
    fit_log = run_folder.Run.log

    def kill(self, step, *rest):
        fit_log(self, step, *rest)
        if (self.stage, step + 1) == stop:
            raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.Run, "log", kill)
        with pytest.raises(RuntimeError, match="killed"):
            run(tmp_path, "cut", dropout=0.1)
    with pytest.raises(ValueError, match="unfinished run"):
        run(tmp_path, "cut", dropout=0.1)
    with pytest.raises(ValueError, match=r"other settings: seed 0 -> 1"):
        run(tmp_path, "cut", dropout=0.1, resume=True, seed=1)
    run(tmp_path, "cut", dropout=0.1, resume=True)
    same(bits(tmp_path / "whole"), bits(tmp_path / "cut"))


def test_ctrl_c_saves_where_it_is(small_lattice, tmp_path, monkeypatch):
    run(tmp_path, "whole")
    fit_log = run_folder.Run.log

    def press(self, step, *rest):
        fit_log(self, step, *rest)
        if (self.stage, step) == ("pretrain", 3):
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.Run, "log", press)
        with pytest.raises(KeyboardInterrupt, match="--resume continues"):
            run(tmp_path, "cut")
    assert torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)["step"] == 4
    run(tmp_path, "cut", resume=True)
    assert bits(tmp_path / "whole")[0] == bits(tmp_path / "cut")[0]


def test_a_broken_checkpoint_is_named_and_the_one_before_it_used(small_lattice, tmp_path, capsys):
    run(tmp_path, "whole")
    run(tmp_path, "cut")
    path = tmp_path / "cut" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-500])
    run(tmp_path, "cut", resume=True)
    assert f"{path} is not a file of weights" in capsys.readouterr().err
    same(bits(tmp_path / "whole"), bits(tmp_path / "cut"))


def test_nothing_is_lost_where_no_checkpoint_can_be_read(small_lattice, tmp_path, capsys):
    """Both damaged: refused and kept.  One damaged: set aside, so that it replaces no sound one."""
    run(tmp_path, "a")
    folder = tmp_path / "a"
    newest, before = folder / "checkpoint.pt", folder / "checkpoint.pt.previous"
    sound = before.read_bytes()
    newest.write_bytes(b"half")
    before.write_bytes(b"half")
    with pytest.raises(ValueError, match="no checkpoint can be read"):
        run(tmp_path, "a", resume=True)
    assert newest.read_bytes() == before.read_bytes() == b"half"
    before.write_bytes(sound)
    torch.save({"some": "weights"}, newest)
    with pytest.raises(ValueError, match="other settings: seed 0 -> 1"):
        run(tmp_path, "a", resume=True, seed=1)
    assert newest.exists()
    run(tmp_path, "a", resume=True)
    assert "is not a checkpoint: not used" in capsys.readouterr().err
    assert (folder / "checkpoint.pt.damaged").exists()
    assert run_folder.load(before)["settings"]["out"] == str(folder)


def test_an_unfinished_run_is_known_by_either_checkpoint(small_lattice, tmp_path):
    run(tmp_path, "a")
    (tmp_path / "a" / "result.json").unlink()
    (tmp_path / "a" / "checkpoint.pt").unlink()
    with pytest.raises(ValueError, match="unfinished run"):
        run(tmp_path, "a")
    assert (tmp_path / "a" / "checkpoint.pt.previous").exists()


def test_a_new_run_leaves_no_weights_of_the_old_one(small_lattice, tmp_path):
    run(tmp_path, "a")
    assert (tmp_path / "a" / "denoiser.pt").exists()
    run(tmp_path, "a", objective="none", seed=1)
    assert not (tmp_path / "a" / "pretrained.pt").exists()
    assert not (tmp_path / "a" / "denoiser.pt").exists()


def test_lost_metrics_are_not_filled_with_zeros(small_lattice, tmp_path):
    run(tmp_path, "a")
    (tmp_path / "a" / "metrics.jsonl").unlink()
    run(tmp_path, "a", resume=True)
    assert b"\0" not in (tmp_path / "a" / "metrics.jsonl").read_bytes()


def test_a_mask_that_hides_nothing_is_refused(small_lattice, tmp_path):
    with pytest.raises(ValueError, match="mask_ratio 1e-12: nothing to predict in 16 examples"):
        run(tmp_path, "a", mask_ratio=1e-12)


def test_validation_that_is_not_finite_stops_the_run(small_lattice, tmp_path, monkeypatch):
    """It would never be beaten, and the checkpoint would hold it."""
    monkeypatch.setattr(
        pretrain, "evaluate", lambda *_: {"loss": float("nan"), "accuracy": float("nan")}
    )
    with pytest.raises(FloatingPointError, match=r"a, pretrain: the loss of validation is nan"):
        run(tmp_path, "a")
    assert not (tmp_path / "a" / "checkpoint.pt").exists()


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    run_folder.save(path, {"step": 1})

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left.*the one before is intact"):
        run_folder.save(path, {"step": 2})
    assert run_folder.load(path) == {"step": 1} and len(list(tmp_path.iterdir())) == 1


def test_a_folder_in_use_is_refused(small_lattice, tmp_path):
    config = Config(**TINY, out=str(tmp_path))
    with run_folder.Run(tmp_path, {}):
        with pytest.raises(ValueError, match="in use by another run"):
            pretrain.train(config)


def test_accumulation_changes_nothing(small_lattice, tmp_path):
    results = [
        run(tmp_path, str(n), accumulate=n, precision="float64", labels=30) for n in (1, 3, 8)
    ]
    for result in results[1:]:
        for stage in ("pretrain", "finetune", "test"):
            assert result[stage]["loss"] == pytest.approx(results[0][stage]["loss"], rel=1e-10)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("model", ["transformer", "s4"])
def test_two_processes_are_one(tmp_path, model):
    """Data parallel: the losses of every step and the test score, to 1e-10 in float64."""
    steps = ["--pretrain-steps", "10", "--finetune-steps", "10", "--eval-every", "10"]
    small = [
        "--d-model",
        "8",
        "--n-heads",
        "2",
        "--d-ff",
        "8",
        "--d-state",
        "4",
        "--batch-size",
        "7",
    ]
    args = [*steps, *small, "--model", model, "--precision", "float64", "--device", "cpu"]
    lines = []
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, how in (("one", []), ("two", launch)):
        full = [sys.executable, *how, str(ROOT / "pretrain.py"), *args]
        full += ["--out", str(tmp_path / name)]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(full, capture_output=True, text=True, timeout=300, env=env)
        assert done.returncode == 0, done.stderr
        rows = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        lines.append([json.loads(row) for row in rows])
        lines[-1].append(json.loads((tmp_path / name / "result.json").read_text())["test"])
    assert len(lines[0]) == len(lines[1]) == 5
    for one, two in zip(*lines, strict=True):
        for key in one.keys() - {"stage", "tokens_per_s"}:
            assert two[key] == pytest.approx(one[key], rel=1e-10)


def test_a_loss_that_is_not_finite_stops_the_run(small_lattice, tmp_path, monkeypatch):
    steps, gradients = itertools.count(1), pretrain.gradients

    def spoilt(*args):
        loss, right, count = gradients(*args)
        return (float("nan") if next(steps) == 8 else loss), right, count

    monkeypatch.setattr(pretrain, "gradients", spoilt)
    message = r"a, pretrain: the loss is nan at step 8; the state before it is .*checkpoint.pt"
    with pytest.raises(FloatingPointError, match=message):
        run(tmp_path, "a", eval_every=3)
    assert run_folder.load(tmp_path / "a" / "checkpoint.pt")["step"] == 6
    assert not (tmp_path / "a" / "result.json").exists()


def test_evaluation_counts_every_example_once(lattice):
    config, resident = Config(**TINY), Resident(lattice.val, lattice, "cpu")
    seen = []

    class Body(torch.nn.Module):
        def forward(self, x, keep):
            seen.extend(x.tolist())
            return x[..., None].double().expand(-1, -1, 16)

    head = torch.nn.Linear(16, 2).double()
    score = pretrain.evaluate(Body(), head, resident, "finetune", replace(config, batch_size=7))
    assert sorted(seen) == sorted(lattice.val.tokens.tolist())
    logits = head(torch.tensor(lattice.val.tokens).double().mean(1, keepdim=True).expand(-1, 16))
    right = (logits.argmax(1).numpy() == lattice.val.labels).mean()
    assert score["accuracy"] == pytest.approx(right)


def test_the_commit_is_dirty_when_the_code_is(tmp_path, monkeypatch):
    """A benchmark writes into results/ as it goes: that alone does not make its commit dirty."""
    (tmp_path / "results").mkdir()
    files = code, _ = tmp_path / "run_folder.py", tmp_path / "results" / "a.json"
    for path in files:
        path.write_text("1")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "a"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(run_folder, "__file__", str(code))
    clean = run_folder.versions()["commit"]
    for path, suffix in zip(reversed(files), ("", "-dirty"), strict=True):
        path.write_text("2")
        assert run_folder.versions()["commit"] == clean + suffix
    monkeypatch.setattr(run_folder, "__file__", "/proc/nowhere/run_folder.py")
    assert run_folder.versions()["commit"] is None


# ------------------------------------------------------------- real processes, really killed

SMALL = ["--d-model", "8", "--n-heads", "2", "--d-ff", "8", "--d-state", "4", "--device", "cpu"]
LONG = [*SMALL, "--pretrain-steps", "40", "--finetune-steps", "40", "--eval-every", "5"]


def start_process(args, **environment):
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, ROOT / "pretrain.py", *args], env=environment, **pipes)


def progress(folder):
    """(stage, step) of the last whole line of the metrics, stages counted from 0."""
    path = folder / "metrics.jsonl"
    rows = path.read_text().splitlines() if path.exists() else []
    if not rows or not rows[-1].endswith("}"):
        return -1, 0
    last = json.loads(rows[-1])
    return pretrain.STAGES.index(last["stage"]), last.get("step", last.get("val_step"))


def kill(process, ready, wait=0.0):
    """SIGKILL `wait` seconds after `ready`; a run that ended before is a failure."""
    while not ready():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.001)
    time.sleep(wait)
    process.kill()
    process.communicate()


def newest_checkpoint(folder):
    """(stage, step) of checkpoint.pt, or of the one before if it cannot be read."""
    for name in ("checkpoint.pt", "checkpoint.pt.previous"):
        if (folder / name).exists():
            try:
                state = run_folder.load(folder / name)
            except ValueError:
                continue
            return pretrain.STAGES.index(state["stage"]), state["step"]
    return -1, 0


@pytest.mark.slow
def test_ten_kills_change_no_bit(tmp_path):
    """kill -9 of real processes, five in each stage, every second one amid writing a checkpoint."""
    rng, data = np.random.RandomState(0), ["--data-dir", str(tmp_path / "data")]
    whole, cut = (tmp_path / name for name in ("whole", "cut"))
    done = start_process([*LONG, *data, "--out", str(whole)])
    assert "result.json" in done.communicate(timeout=300)[0]
    moments = [(stage, step) for stage in (0, 1) for step in np.sort(rng.randint(15, 35, 5))]
    command = [*LONG, *data, "--out", str(cut)]
    for i, moment in enumerate(moments):
        process, new = start_process([*command, *["--resume"][:i]]), cut / "checkpoint.pt.new"
        if i % 2:
            kill(process, lambda m=moment, new=new: progress(cut) >= m and new.exists())
        else:
            kill(process, lambda m=moment: progress(cut) >= m, rng.uniform(0, 0.02))
        assert not (cut / "result.json").exists()
        stage, step = newest_checkpoint(cut)
        assert (stage, step + 10) >= moment, "a kill cost more than the steps since a validation"
    done = start_process([*command, "--resume"])
    assert "result.json" in done.communicate(timeout=300)[0]
    same(bits(whole), bits(cut))


@pytest.mark.slow
@pytest.mark.dist
def test_a_dead_rank_ends_the_other_and_the_run_goes_on(tmp_path):
    """Without torchrun's own watch: rank 1 is killed, rank 0 stops by itself and says why."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    out, data = str(tmp_path / "run"), ["--data-dir", str(tmp_path / "data")]
    group = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    both = [
        start_process([*LONG, *data, "--out", out], RANK=r, LOCAL_RANK=r, MASTER_PORT=port, **group)
        for r in "01"
    ]
    kill(both[1], lambda: progress(tmp_path / "run") >= (0, 10))
    text = both[0].communicate(timeout=100)[0]
    assert both[0].returncode == 1 and "another process was lost" in text, text
    assert "Traceback" not in text and not (tmp_path / "run" / "result.json").exists()
    alone = start_process([*LONG, *data, "--out", out, "--resume"])
    assert "result.json" in alone.communicate(timeout=300)[0]


# ---------------------------------------------------------------------- settings, command line


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"model": "rnn"}, "model 'rnn'.*transformer"),
        ({"mask_ratio": 1.5}, "mask_ratio 1.5"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"finetune_lr": -1.0}, "finetune_lr -1.0"),
        ({"causal": True}, "looks both ways"),
        ({"d_model": 30, "n_heads": 4}, "30.*4"),
        ({"labels": 0}, "labels 0: expected a positive number"),
        ({"labels": 97}, "labels 97.*96"),
        ({"pretrained": "nowhere.pt"}, "nowhere.pt"),
        ({"pictures": 5}, "lattice does not take pictures"),
        ({"dropout": float("nan")}, "dropout nan: expected 0 or more below 1"),
        ({"warmup": float("inf")}, "warmup inf"),
        ({"weight_decay": -1.0}, "weight_decay -1.0"),
        ({"n_layers": 0}, "n_layers 0: expected a positive number"),
        ({"d_model": 10**20}, "d_model 1000.*1,048,576"),
        ({"accumulate": 9}, "accumulate 9.*batch_size 8"),
        ({"out": ""}, "out: expected a value"),
        ({"loss": "l1"}, "'l1' does not fit symbols"),
        ({"model": "s4", "rope": True}, "'s4' has no rope"),
    ],
)
def test_bad_settings_are_refused_with_their_numbers(small_lattice, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        pretrain.train(Config(**({"out": str(tmp_path)} | TINY | settings)))
    assert not list(tmp_path.iterdir())


def test_a_flag_goes_before_a_file_before_a_default(tmp_path, capsys):
    path = tmp_path / "a.json"
    values = {"model": "s4", "d_model": 32, "clip": 2}
    path.write_text(json.dumps({"settings": values, "sources": {"model": "table 5"}}))
    pretrain.main(["--settings", str(path), "--d-model", "48", "--print-config"])
    shown = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    for name, value, origin in (
        ("model", "s4", f"{path}: table 5"),
        ("d_model", "48", "command line"),
        ("clip", "2", f"{path}: no source"),
        ("batch_size", "64", "default"),
    ):
        assert shown[name].split(None, 2) == [name, value, origin]
    for content, message in (
        ("{", "not a file of settings"),
        ('{"settings": {"d_modle": 3}}', "no setting is called d_modle"),
        ('{"settings": {"d_model": "wide"}}', "d_model 'wide': expected int"),
        ('{"settings": {"d_model": true}}', "d_model True: expected int"),
        ('{"settings": {"seed": null}}', "seed None: expected int"),
        ('{"settings": {"labels": "x"}}', "labels 'x': expected int"),
        ('{"settings": {}, "sources": [1]}', "not a file of settings"),
        ("[]", "not a file of settings"),
    ):
        path.write_text(content)
        with pytest.raises(SystemExit, match=message):
            pretrain.main(["--settings", str(path)])
    pretrain.main(["--device", "cuda", "--print-config"])  # for another machine
    assert "cuda" in capsys.readouterr().out


def command(*args):
    return subprocess.run(
        [sys.executable, ROOT / "pretrain.py", *args], capture_output=True, text=True, timeout=120
    )


def test_command_line(tmp_path, capsys):
    steps = ["--pretrain-steps", "10", "--finetune-steps", "10", "--d-model", "16"]
    done = command(*steps, "--out", str(tmp_path / "y"))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "y" / "result.json").read_text())
    assert 0 <= result["test"]["accuracy"] <= 1 and result["config"]["pretrain_steps"] == 10
    bad = command("--task", "nosuch", "--out", str(tmp_path / "x"))
    assert bad.returncode == 1 and "nosuch" in bad.stderr and "Traceback" not in bad.stderr
    assert not (tmp_path / "x").exists()
    with pytest.raises(SystemExit) as stop:
        pretrain.main(["--check"])
    assert stop.value.code == 0 and "FAILED" not in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        pretrain.main(["--model", "rnn"])
    assert stop.value.code == 2 and "invalid choice: 'rnn'" in capsys.readouterr().err
    (tmp_path / "cut.pt").write_bytes(b"hello world")
    for flags, message in (
        (["--device", "meta"], "device 'meta'"),
        (["--resume"], "holds no run"),
        (["--pretrained", str(tmp_path / "cut.pt")], "cut.pt is not a file of weights"),
    ):
        with pytest.raises(SystemExit, match=message):
            pretrain.main([*flags, "--out", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()
