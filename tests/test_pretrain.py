"""pretrain.py: masks, targets, order, transfer, pooling, determinism, whole runs, real kills."""

import copy
import itertools
import json
import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import make_golden
import numpy as np
import pytest
import runs
import torch
from runs import TINY, bits, lattice, load_small, numbers, pairs, regression, run, same, symbols

import batches
import checkpoint
import pretrain
from batches import describe, draw
from gpu_kernels import JointS4Model
from settings import Config

ROOT = Path(__file__).parent.parent


@pytest.fixture
def small_lattice(monkeypatch):
    load_small(monkeypatch)


def resident(data, split="train"):
    return batches.resident(getattr(data, split), describe(data), "cpu")


def batch_of(data, stage="pretrain", seed=0, **settings):
    """All training examples as one batch."""
    config = Config(**(TINY | settings))
    split = resident(data)
    generator = pretrain.seeded(config, seed)
    index = np.arange(len(split))
    return config, pretrain.make_batch(split, index, stage, config, generator)


def body_and_head(stage, config, data):
    model = pretrain.initial_model(config, describe(data))
    return model, pretrain.initial_head(stage, model, config, describe(data))


# ------------------------------------------------------------------------------- corruption


@pytest.mark.parametrize("ratio", [0.1, 0.5])
def test_masks_have_their_ratio_and_are_independent_of_each_other(ratio):
    """Neighbors and rows: the share of pairs that are both masked is the square."""
    where = batch_of(symbols([200] * 200), mask_ratio=ratio)[1].where.float()
    assert abs(where.mean().item() - ratio) < 4 * (ratio * (1 - ratio) / 40_000) ** 0.5
    both = ratio**2
    for a, b in ((where[:, 1:], where[:, :-1]), (where[1:], where[:-1])):
        assert abs((a * b).mean().item() - both) < 4 * (both * (1 - both) / 39_800) ** 0.5


def test_masked_positions_are_all_replaced_never_padding_and_follow_the_seed():
    data = symbols([5, 40, 23, 40])
    _, batch = batch_of(data, mask_ratio=0.5)
    lengths = torch.tensor([5, 40, 23, 40])
    real = torch.arange(40) < lengths[:, None]
    assert torch.equal(batch.x == data.vocab_size, batch.where)
    assert not (batch.where & ~real).any()
    assert batch.where[:, :5].any() and batch.where[:, 23:].any()
    assert torch.equal(batch.keep, real)
    clean = torch.from_numpy(data.train.tokens).long()
    assert torch.equal(batch.target, clean)
    assert torch.equal(batch.x[~batch.where], clean[~batch.where])
    again, other = [batch_of(data, mask_ratio=0.5, seed=seed)[1].where for seed in (0, 1)]
    assert torch.equal(again, batch.where) and not torch.equal(other, batch.where)


def test_causal_target_is_the_next_real_token():
    data = symbols([3, 6, 1])
    _, batch = batch_of(data, objective="causal")
    tokens = data.train.tokens
    for row, length in enumerate([3, 6, 1]):
        assert batch.where[row].tolist() == [True] * (length - 1) + [False] * (7 - length)
        assert batch.target[row, : length - 1].tolist() == tokens[row, 1:length].tolist()
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


def test_fine_tuning_hides_nothing_and_a_pair_has_one_label():
    _, batch = batch_of(numbers(), "finetune", task="image-real")
    assert (batch.x[..., 3] == 0).all() and batch.where is None
    data = pairs([4, 9, 5, 7])
    config, batch = batch_of(data, "finetune")
    assert torch.equal(batch.x, torch.from_numpy(data.train.tokens.reshape(4, 9)).long())
    assert batch.target.tolist() == [0, 1]
    model, head = body_and_head("finetune", config, data)
    assert pretrain.loss_sums(model, head, batch, config)[1][1] == 2


def test_pretraining_takes_the_documents_of_pairs_one_by_one():
    data = pairs([4, 9, 5, 7])
    single = resident(data).documents()
    assert len(single) == 4 and single.lengths.tolist() == [4, 9, 5, 7]
    assert single.labels.tolist() == [0, 0, 1, 1]
    assert np.array_equal(single.tokens, data.train.tokens.reshape(4, 9))


@pytest.mark.parametrize(
    ("short", "long"),
    [
        (symbols([5, 9]), symbols([30, 12])),
        (pairs([5, 9]), pairs([30, 12])),
        (numbers(L=9), numbers(L=30)),
    ],
)
def test_sgconv_reaches_as_far_as_the_longest_split(short, long):
    data = replace(short, test=long.test)
    model = pretrain.build_model(Config(**TINY, model="sgconv"), describe(data))
    assert model.config.max_len == 30


@pytest.mark.parametrize(
    ("task", "width", "decay"),
    [("pathfinder128", 64, "ramp_decay"), ("image-real", 32, "power_law_decay")],
)
def test_sgconv_has_the_published_kernel_of_its_task(task, width, decay):
    data = numbers(L=256, C=1) if task == "image-real" else symbols([256, 256])
    config = Config(**(TINY | {"kernel_dim": None}), model="sgconv", task=task)
    mixer = pretrain.build_model(config, describe(data)).blocks[0].mixer
    assert (mixer.w.shape[-1], mixer.decay.__name__) == (width, decay)


def test_own_data_are_denoised_as_their_kind_unless_settings_say_otherwise():
    for data, kind in ((symbols([9]), (0.15, "ce")), (numbers(), (0.5, "l1"))):
        config = batches.fitted(Config(task="own"), describe(data))
        assert (config.mask_ratio, config.loss) == kind
    gray = batches.fitted(Config(task="own", mask_ratio=0.3, loss="ce"), describe(numbers(C=1)))
    assert (gray.mask_ratio, gray.loss) == (0.3, "ce")


# ------------------------------------------------------------------------------------ order


def test_every_epoch_holds_every_example_once_with_little_padding():
    lengths = np.random.RandomState(0).randint(500, 2000, 4096)
    steps = 4096 // 16
    batches = list(itertools.islice(draw(lengths, 16, 3), 2 * steps))
    for epoch in (batches[:steps], batches[steps:]):
        assert np.array_equal(np.sort(np.concatenate(epoch)), np.arange(4096))
        assert sum(lengths[i].max() * len(i) for i in epoch) < 1.05 * lengths.sum()
    assert not np.array_equal(batches[0], batches[steps])


def test_batches_are_the_same_on_every_machine_also_where_lengths_are_equal():
    batches = list(itertools.islice(draw(np.tile([3, 1, 2], 400), 16, 3), 4))
    assert batches[0][:5].tolist() == [484, 775, 256, 1174, 964]
    assert np.concatenate(batches) @ np.arange(1, 65) == 997_835


def test_only_whole_batches_are_compiled(tmp_path, monkeypatch):
    """Each new size would be compiled, for half a minute."""
    stance, found = [], set()
    loss_sums = pretrain.loss_sums

    @contextmanager
    def set_stance(name):
        stance.append(name)
        yield
        stance.pop()

    def spy(model, head, batch, config):
        found.add((len(batch.target), stance[-1]))
        return loss_sums(model, head, batch, config)

    load_small(monkeypatch)
    monkeypatch.setattr(torch.compiler, "set_stance", set_stance)
    monkeypatch.setattr(pretrain, "loss_sums", spy)
    run(tmp_path, "a", batch_size=36, pretrain_steps=3, finetune_steps=3)
    assert found == {(36, "default"), (24, "force_eager"), (16, "force_eager")}


@pytest.mark.parametrize(
    ("device", "split", "joint"),
    [("cpu", None, False), ("cuda", None, True), ("cuda", "ring", False)],
)
def test_kernels_are_joint_on_a_gpu_unless_ranks_have_parts_of_them(device, split, joint):
    config = Config(model="s4", device=device, sequence_parallel=split)
    model = pretrain.build_model(config, describe(symbols([9])))
    assert isinstance(model, JointS4Model) == joint


def test_subsets_are_nested():
    split = resident(symbols(range(1, 33)))
    small, large = split.subset(5), split.subset(20)
    assert np.array_equal(small.lengths, large.lengths[:5]) and len(set(large.lengths)) == 20


# ----------------------------------------------------------------------------- model and loss


@pytest.mark.parametrize("ffn", ["lowrank", "blockdense", "blockshuffle"])
def test_structured_ffns_stand_in_all_blocks_but_the_first(ffn):
    data = symbols([9, 9])
    sizes = {"d_model": 32, "d_ff": 128, "n_layers": 3}
    dense = pretrain.build_model(Config(**(TINY | sizes)), describe(data))
    model = pretrain.build_model(Config(**(TINY | sizes), ffn=ffn), describe(data))
    count = [[sum(p.numel() for p in b.ffn.parameters()) for b in m.blocks] for m in (dense, model)]
    assert count[0][0] == count[1][0] and all(n < 0.5 * count[0][0] for n in count[1][1:])
    assert model(torch.zeros(2, 9, dtype=torch.long)).shape == (2, 9, 32)


@pytest.mark.parametrize(
    ("how", "padded", "full"),
    [
        ("mean", [[2.0, 3.0], [2.0, 8.0]], [[2.0, 3.0], [4.0, 5.0]]),
        ("max", [[3.0, 4.0], [2.0, 8.0]], [[3.0, 4.0], [9.0, 8.0]]),
        ("last", [[2.0, 3.0], [2.0, 8.0]], [[2.0, 3.0], [1.0, 2.0]]),
    ],
)
def test_pooling_by_hand(how, padded, full):
    h = torch.tensor([[[1.0, 2], [3, 4], [2, 3]], [[2, 8], [9, 5], [1, 2]]])
    keep = torch.tensor([[True, True, True], [True, False, False]])
    assert pretrain.pool(h, keep, how).tolist() == padded
    assert pretrain.pool(h, None, how).tolist() == full


@pytest.mark.parametrize("model", ["transformer", "s4", "s4d", "diagonal", "sgconv"])
@pytest.mark.parametrize("objective", ["masked", "causal"])
@pytest.mark.parametrize("pooling", ["mean", "max", "last"])
def test_a_batch_mate_never_changes_a_result(model, objective, pooling):
    data = symbols([5, 30, 12])
    config = Config(**TINY, model=model, objective=objective, pooling=pooling)
    torch.manual_seed(0)
    body = pretrain.build_model(config, describe(data)).double().eval()
    head = pretrain.build_head("finetune", config, describe(data)).double()
    split = resident(data)

    def logits(index):
        batch = pretrain.make_batch(split, np.array(index), "finetune", config, None)
        return head(pretrain.pool(body(batch.x, batch.keep), batch.keep, pooling))

    together = logits([0, 1, 2])
    for i in range(3):
        alone = logits([i])[0]
        assert (together[i] - alone).abs().max() < 1e-12 * alone.abs().max()
    assert (together[0] - together[1]).abs().max() > 1e-6


def test_loss_counts_only_the_chosen_positions():
    """A body that returns nonsense elsewhere has the same loss."""
    data = symbols([8, 12, 12])
    config, batch = batch_of(data, mask_ratio=0.5)
    h = torch.randn(3, 12, 16)
    head = pretrain.build_head("pretrain", config, describe(data))
    spoiled = torch.where(batch.where[..., None], h, 1e3)
    loss, sums = pretrain.loss_sums(lambda x, keep: h, head, batch, config)
    assert torch.equal(loss, pretrain.loss_sums(lambda x, keep: spoiled, head, batch, config)[0])
    by_hand = -torch.log_softmax(head(h), -1)
    by_hand = by_hand.gather(2, batch.target[..., None])[..., 0][batch.where].sum()
    correct = (head(h).argmax(-1) == batch.target)[batch.where].sum()
    assert torch.allclose(loss, by_hand)
    assert torch.allclose(sums, torch.stack([by_hand, batch.where.sum(), correct]).double())


def test_an_absolute_error_has_no_accuracy():
    data = numbers(C=3)
    config, batch = batch_of(data, task="image-real")
    model, head = body_and_head("pretrain", config, data)
    loss, _ = pretrain.loss_sums(model, head, batch, config)
    error = (head(model(batch.x)) - batch.target).abs()[batch.where]
    assert loss.item() == pytest.approx(error.mean(-1).sum().item(), rel=1e-5)
    assert list(pretrain.evaluate(model, head, resident(data), "pretrain", config)) == ["loss"]


@pytest.mark.parametrize("target_loss", ["l2", "l1"])
def test_regression_learns_standardized_targets(target_loss):
    data = regression(symbols([9, 12, 7, 7]))
    config, batch = batch_of(data, "finetune", target_loss=target_loss)
    y = data.train.labels.astype(np.float64)
    assert np.allclose(batch.target, (y - y.mean(0)) / y.std(0), atol=1e-9)
    assert np.allclose(batches.in_units_of_y(batch.target, describe(data)), y, rtol=1e-9)
    model, head = body_and_head("finetune", config, data)
    loss, sums = pretrain.loss_sums(model, head, batch, config)
    error = head(pretrain.pool(model(batch.x, batch.keep), batch.keep, "mean")) - batch.target
    penalty = error.abs() if target_loss == "l1" else error**2
    assert loss.item() == pytest.approx(penalty.mean(1).sum().item(), rel=1e-9)
    assert sums[1] == 4 and sums[0] == loss.detach()


@pytest.mark.parametrize("target", ["classes", "values"])
def test_scores_are_those_of_all_examples_whatever_the_batches(target):
    """As numpy has them; those of a regression in the units of y. Only training has dropout."""
    data = symbols(range(2, 13))
    data = data if target == "classes" else regression(data)
    test = replace(data, train=data.test)
    config, batch = batch_of(test, "finetune", batch_size=4, dropout=0.5)
    model, head = body_and_head("finetune", config, data)
    found = pretrain.evaluate(model, head, resident(data, "test"), "finetune", config)
    assert model.training and head.training
    model.eval()
    h = pretrain.features(model, batch.x, batch.keep, config)
    out = head(pretrain.pool(h, batch.keep, config.pooling)).detach()
    y = data.test.labels.astype(np.float64)
    if target == "classes":
        loss = torch.nn.functional.cross_entropy(out, batch.target).item()
        right = (out.argmax(1) == batch.target).double().mean().item()
        assert found == pytest.approx({"loss": loss, "accuracy": right}, rel=1e-5)
        return
    assert found["loss"] == pytest.approx((out - batch.target).square().mean().item(), rel=1e-5)
    guess = batches.in_units_of_y(out, describe(data)).numpy()
    r2 = 1 - ((guess - y) ** 2).sum(0) / ((y - y.mean(0)) ** 2).sum(0)
    assert found["r2"] == pytest.approx(r2.mean(), rel=1e-5)
    assert found["mae"] == pytest.approx(abs(guess - y).mean(), rel=1e-5)
    assert found.keys() == {"loss", "r2", "mae"}


@pytest.mark.parametrize("constant", [2.0, 0.1, 0.3])
def test_r2_of_a_constant_target_is_0(constant):
    """-inf is no number of JSON, and rounding is no variance."""
    y = torch.full((37,), constant, dtype=torch.float64)
    n = len(y)
    sums = torch.tensor([n, n, torch.nan, n, n, y.sum(), y.square().sum()], dtype=torch.float64)
    assert pretrain.regression_score(sums, [1.0]) == {"r2": 0, "mae": 1}


@pytest.mark.parametrize("data", [symbols([8, 12, 12]), pairs([8, 12, 12, 9, 7, 7])])
def test_the_parts_of_a_batch_are_the_batch(data):
    """Also more parts than examples: the empty ones weigh nothing."""
    _, batch = batch_of(data, "finetune")
    for n in (1, 2, 3, 5):
        parts = [batches.part(batch, i, n) for i in range(n)]
        real = [piece for piece, weight in parts if weight]
        assert all(len(piece.target) >= 1 for piece, _ in parts)
        assert len(real) == min(n, 3)
        for whole, pieces in zip(batch, zip(*real, strict=True), strict=True):
            assert whole is None or torch.equal(torch.cat(pieces), whole)


def test_schedule():
    values = [pretrain.schedule(s, 100, 0.1) for s in range(100)]
    assert values[0] == 0.1 and values[9] == 1.0 and values[10] == 1.0
    assert values[55] == pytest.approx(0.5) and 0 < values[99] < 0.001
    assert all(a >= b for a, b in itertools.pairwise(values[10:]))
    constant = [pretrain.schedule(s, 100, 0.1, "constant") for s in range(100)]
    assert constant[:10] == values[:10] and set(constant[10:]) == {1.0}


# ------------------------------------------------------------------------------- whole runs


STORY = {"labels": 30, "pretrain_batch_size": 12}


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """A run of both stages, then one from its pretrained weights: what the stages began with."""
    root = tmp_path_factory.mktemp("story")
    seen = SimpleNamespace(root=root, batches={"pretrain": [], "finetune": []}, start=[], events=[])
    make_batch, fit, save = pretrain.make_batch, pretrain.fit, checkpoint.save

    def spy_batch(split, index, stage, *rest):
        if len(split) != 16:  # not validation or test
            seen.batches[stage].append(index)
        return make_batch(split, index, stage, *rest)

    def spy_fit(stage, model, head, *rest):
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        seen.start.append((stage, weights, head.weight.clone()))
        return fit(stage, model, head, *rest)

    def spy_save(path, state):
        seen.events.append(path.stem)
        save(path, state)

    with pytest.MonkeyPatch.context() as patch:
        load_small(patch)
        patch.setattr(pretrain, "make_batch", spy_batch)
        patch.setattr(pretrain, "fit", spy_fit)
        patch.setattr(checkpoint, "save", spy_save)
        patch.setattr(pretrain, "wait_for_all_ranks", lambda: seen.events.append("wait"))
        run(root, "a", **STORY)
        seen.weights = root / "a" / "pretrained.pt"
        run(root, "b", **STORY, pretrained=str(root / "a"))
    return seen


def test_each_stage_sees_its_own_examples_in_its_own_batches(story):
    """Pretraining all of them, fine-tuning the labeled ones alone."""
    for stage, size, examples in (("pretrain", 12, 96), ("finetune", 8, 30)):
        assert max(len(index) for index in story.batches[stage]) == size
        assert len(set(np.concatenate(story.batches[stage]))) == examples


def test_body_carries_over_head_and_optimizer_do_not(story):
    """What fine-tuning starts from is what pretraining left, bit for bit, under a new head."""
    pretrained = checkpoint.load(story.weights)["model"]
    stages, bodies, heads = zip(*story.start, strict=True)
    assert stages == ("pretrain", "finetune", "finetune")
    for body in bodies[1:]:
        assert all(torch.equal(body[name], pretrained[name]) for name in pretrained)
    assert any(not torch.equal(bodies[0][name], pretrained[name]) for name in pretrained)
    assert not torch.equal(heads[0], heads[1])


def test_ranks_wait_for_every_file_that_rank_0_writes(story):
    stage = "wait checkpoint wait wait checkpoint wait"  # it also waits before it adds up scores
    tuned = f"wait wait wait {stage} wait model wait"
    first = tuned.replace(stage, f"{stage} pretrained wait {stage}")
    assert " ".join(story.events) == f"{first} {tuned}"


@pytest.mark.parametrize(
    ("stage", "name", "best"),
    [("pretrain", "accuracy", 4), ("finetune", "accuracy", 8), ("finetune", "r2", 4)],
)
def test_classes_are_judged_by_accuracy_all_else_by_loss_and_the_best_weights_are_kept(
    stage, name, best, tmp_path, monkeypatch
):
    load_small(monkeypatch, lattice() if name == "accuracy" else regression(lattice()))
    scores = {2: (0.5, 0.6), 4: (0.1, 0.3), 6: (0.3, 0.6), 8: (0.9, 0.7), 10: (0.8, 0.7)}
    weights = {}

    def judge(model, head, split, asked, config):
        if asked != stage or len(weights) == 5:  # the last is the test
            return {"loss": 1.0, name: 0.5}
        step = list(scores)[len(weights)]
        weights[step] = copy.deepcopy(model.state_dict())
        return {"loss": scores[step][0], name: scores[step][1]}

    monkeypatch.setattr(pretrain, "evaluate", judge)
    result = run(tmp_path, "a", pretrain_steps=10, finetune_steps=10, eval_every=2)
    assert result[stage]["loss"] == scores[best][0] and result[stage]["step"] == best
    file = "pretrained.pt" if stage == "pretrain" else "model.pt"
    kept = checkpoint.load(tmp_path / "a" / file)["model"]
    assert all(torch.equal(kept[name], weights[best][name]) for name in kept)
    assert any(not torch.equal(kept[name], weights[10][name]) for name in kept)


def test_same_seed_same_bits(small_lattice, tmp_path):
    options = {"model": "s4", "dropout": 0.1, "pretrain_steps": 3, "finetune_steps": 3}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        result = run(tmp_path, name, seed=seed, **options)
        assert result == json.loads((tmp_path / name / "result.json").read_text())
        assert result.keys() >= {"commit", "torch", "speed", "config", "data"}
    first, again, other = [bits(tmp_path / name) for name in "abc"]
    same(first, again)
    assert first[0][:3] != other[0][:3]


def test_weights_of_another_body_are_refused_and_never_overwritten(story, small_lattice, tmp_path):
    """n_heads shows in no shape; the folder that holds the weights is not written to."""
    before = story.weights.read_bytes()
    checkpoint.save(tmp_path / "other.pt", {"weight": torch.ones(3)})
    checkpoint.save(tmp_path / "early.pt", {"model": {}, "optimizer": {}, "stage": "pretrain"})
    bad = [story.root / "a/checkpoint.pt", story.root / "a/model.pt"]
    bad += [tmp_path / "other.pt", tmp_path / "early.pt"]
    for path in bad:
        with pytest.raises(ValueError, match=f"{path} is not what pretraining left: pass the pre"):
            run(tmp_path, "b", pretrained=str(path))
    with pytest.raises(ValueError, match="other settings or data: n_heads 2 -> 4"):
        run(tmp_path, "b", pretrained=str(story.weights), n_heads=4)
    for path in (story.weights, story.root / "a"):
        with pytest.raises(ValueError, match="choose another"):
            run(story.root, "a", pretrained=str(path), overwrite=True)
    assert story.weights.read_bytes() == before and not (tmp_path / "b").exists()


def test_weights_of_another_length_are_refused_in_one_line(tmp_path):
    path = tmp_path / "pretrained.pt"
    config = Config(model="sgconv", pretrained=str(path))
    about = describe(lattice())
    longer = pretrain.build_model(config, {**about, "max_len": 128})
    checkpoint.save(path, {"model": longer.state_dict(), "settings": vars(config), "data": about})
    with pytest.raises(ValueError, match=r"pretrained.pt does not fit this model: .*mixer.w"):
        pretrain.initial_model(config, about)


def test_values_are_normalized_as_in_pretraining(monkeypatch, tmp_path):
    """Fine-tuning may see other examples, with other means."""
    load_small(monkeypatch, numbers())
    own = {"task": "own", "pretrain_steps": 1, "finetune_steps": 1}
    run(tmp_path, "a", **own)
    other = replace(numbers(seed=1), mean=(7.0,) * 3, std=(9.0,) * 3)
    load_small(monkeypatch, other)
    own["pretrained"] = str(tmp_path / "a" / "pretrained.pt")
    run(tmp_path, "b", **own)
    about = checkpoint.load(tmp_path / "b" / "model.pt")["data"]
    assert about["mean"] == numbers().mean and about["std"] == numbers().std
    load_small(monkeypatch, replace(numbers(C=2), mean=(7.0,) * 2, std=(9.0,) * 2))
    with pytest.raises(ValueError, match="n_channels 3 -> 2"):
        run(tmp_path, "c", **own)


def test_other_data_are_refused_by_name(story, monkeypatch, tmp_path):
    """What the run learned of "0" is not true of "u"; fine-tuning may see other examples."""
    stored = json.loads((story.root / "a" / "config.json").read_text())["data"]
    assert stored["name"] == "lattice" and stored["train"] == [96, 64] and stored["checksum"]
    load_small(monkeypatch, replace(lattice(), symbols=("u", "v")))
    with pytest.raises(ValueError, match=r"other data: symbols .* -> \('u', 'v'\)"):
        run(story.root, "a", **STORY, resume=True)
    with pytest.raises(ValueError, match=r"other settings or data: symbols .*'u', 'v'"):
        run(tmp_path, "b", pretrained=str(story.weights))
    train = lattice().train
    tokens = train.tokens.copy()
    tokens[3, 5] ^= 1
    load_small(monkeypatch, replace(lattice(), train=replace(train, tokens=tokens)))
    with pytest.raises(ValueError, match="other data: checksum"):
        run(story.root, "a", **STORY, resume=True)
    run(tmp_path, "b", pretrained=str(story.weights), finetune_steps=1)


def test_steps_have_different_streams_and_processes_share_the_masks_alone():
    """(seed,), (seed, 0) and (seed, 0, 0) differ too, of which numpy alone makes one."""
    seen = []
    for entropy in ((3,), (3, 0), (3, 0, 0), (3, 0, 1), (3, 1, 0)):
        mask = torch.rand(3, generator=pretrain.seeded(Config(**TINY), *entropy))
        seen += [tuple(mask.tolist()), tuple(torch.rand(2).tolist())]
    assert len(set(seen)) == 10
    mask = torch.rand(3, generator=pretrain.seeded(Config(**TINY), 3, rank=1))
    assert tuple(mask.tolist()) == seen[0] and tuple(torch.rand(2).tolist()) != seen[1]


def test_random_init_leaves_no_structure():
    config = Config(**(TINY | {"d_model": 64}), model="s4")
    plain = pretrain.initial_model(config, describe(lattice()))
    assert min(p.std() for p in plain.parameters()) == 0
    model = pretrain.initial_model(replace(config, random_init=True), describe(lattice()))
    values = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert abs(values.mean()) < 0.002 and abs(values.std() - 0.1) < 0.002
    assert min(p.std() for p in model.parameters()) > 0.02


def test_a_compiled_model_trains_the_same(small_lattice, tmp_path, monkeypatch):
    """Traced by torch.compile, run as traced (no compiler is needed); the names stay."""
    compile, graphs = torch.nn.Module.compile, []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile(self, backend=backend))
    options = {"precision": "float64", "n_layers": 1, "pretrain_steps": 4, "finetune_steps": 4}
    plain = run(tmp_path, "a", **options)
    traced = run(tmp_path, "b", **options, compile=True)
    assert graphs
    for stage in ("pretrain", "finetune", "test"):
        assert traced[stage]["loss"] == pytest.approx(plain[stage]["loss"], rel=1e-9)
    names = [checkpoint.load(tmp_path / n / "pretrained.pt")["model"].keys() for n in "ab"]
    assert names[0] == names[1]


@pytest.mark.parametrize("model", ["transformer", "s4"])
def test_ten_step_trajectory_in_float64(model, tmp_path):
    """Golden losses: they move when the mathematics, the schedule or the optimizer does."""
    golden = json.loads((ROOT / "tests/golden/pretrain.json").read_text())
    losses = make_golden.pretrain_losses(model, tmp_path)
    assert losses == pytest.approx(golden[model], rel=1e-9)
    assert golden[model][-1] < golden[model][0]


# ------------------------------------------------------------- real processes, really killed


@pytest.mark.slow
def test_ten_kills_change_no_bit(tmp_path):
    """kill -9 of real processes, five in each stage, every second one amid writing a checkpoint."""
    rng = np.random.RandomState(0)
    log = tmp_path / "log"
    cut = tmp_path / "cut"
    runs.finish([*runs.LONG, "--out", str(tmp_path / "whole")], log)
    log.unlink()
    moments = [(stage, step) for stage in (0, 1) for step in np.sort(rng.randint(10, 20, 5))]
    for i, moment in enumerate(moments):
        process = runs.start([*runs.LONG, "--out", str(cut), *["--resume"][:i]], log)
        writing = i % 2 == 1

        def ready(moment=moment, writing=writing):
            saves = not writing or (cut / "checkpoint.pt.new").exists()
            return runs.progress(cut) >= moment and saves

        runs.kill(process, log, ready, 0 if writing else rng.uniform(0, 0.02))
        assert not (cut / "result.json").exists()
    runs.finish([*runs.LONG, "--out", str(cut), "--resume"], log)
    runs.same(runs.bits(tmp_path / "whole"), runs.bits(cut))


@pytest.mark.slow
@pytest.mark.dist
def test_a_dead_rank_ends_the_other_and_the_run_goes_on(tmp_path):
    """Without torchrun's own watch: rank 1 is killed, rank 0 stops by itself.

    Both ranks agree on a new folder, and --resume finds it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    folder = tmp_path / "runs" / "lattice-transformer-1"
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    logs = [tmp_path / "0", tmp_path / "1"]
    both = [runs.start(runs.LONG, log, RANK=log.name, **group) for log in logs]
    runs.kill(both[1], logs[1], lambda: runs.progress(folder) >= (0, 10))
    both[0].join(300)
    assert both[0].exitcode == 1 and not (folder / "result.json").exists()
    runs.finish([*runs.LONG, "--resume"], logs[0])
    assert (folder / "result.json").exists() and len(list(folder.parent.iterdir())) == 2


DIES_ONCE = """
import os, signal
import checkpoint, pretrain

save = checkpoint.Run.save

def save_and_die(run, *state):
    save(run, *state)
    if os.environ["TORCHELASTIC_RESTART_COUNT"] + os.environ["RANK"] == "01":
        os.kill(os.getpid(), signal.SIGKILL)

checkpoint.Run.save = save_and_die
pretrain.main()
"""


@pytest.mark.slow
@pytest.mark.dist
def test_torchrun_restarts_a_run_where_it_was(tmp_path):
    script = tmp_path / "dies_once.py"
    script.write_text(DIES_ONCE)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "2", "--max-restarts", "1"]
    args = ["--pretrain-steps", "2", "--finetune-steps", "2", "--eval-every", "2", "--out", "a"]
    path = {"PYTHONPATH": str(Path(pretrain.__file__).parent)}
    command = [*torchrun, str(script), *runs.SMALL, *args]
    subprocess.run(command, cwd=tmp_path, env=os.environ | path, check=True, timeout=300)
    assert (tmp_path / "a" / "result.json").exists()


# ------------------------------------------------------------------------------ command line


UNEVEN = replace(symbols([30]), val=symbols([5, 30]).val)


def test_precision_does_not_follow_the_callers_default(tmp_path, monkeypatch):
    load_small(monkeypatch, lattice())
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        run(tmp_path, "a", objective="none", finetune_steps=1)
    finally:
        torch.set_default_dtype(default)
    weights = checkpoint.load(tmp_path / "a" / "model.pt")["model"]
    assert {w.dtype for w in weights.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("data", "bad", "message"),
    [
        (lattice(), {"d_model": 30, "n_heads": 4}, "30.*4"),
        (lattice(), {"labels": 97}, "labels 97.*96"),
        (lattice(), {"pictures": 5}, "task lattice does not take all of: pictures"),
        (lattice(), {"loss": "l1"}, "'l1' does not fit task lattice"),
        (UNEVEN, {"model": "s4", "compile": True}, "s4 would be compiled .* length from 5 to 30"),
        (
            symbols([5] * 8),
            {"mask_ratio": 1e-6},
            "no position of the 8 validation examples.*--mask-ratio",
        ),
        (symbols([1] * 8), {"objective": "causal"}, "no position of the 8 validation .* next one"),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_their_numbers(
    data, bad, message, tmp_path, monkeypatch
):
    load_small(monkeypatch, data)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, "a", **bad)
    assert not (tmp_path / "a").exists()  # so that nothing that --overwrite names is lost


def exit_of(capsys, *args):
    """Exit status and what was printed."""
    with pytest.raises(SystemExit) as stop:
        pretrain.main([str(arg) for arg in args])
    return stop.value.code, capsys.readouterr()


def test_mistakes_on_the_command_line_get_one_line(tmp_path, capsys, monkeypatch):
    out = ["--out", tmp_path / "x"]
    cut = tmp_path / "cut.pt"
    cut.write_bytes(b"hello world")
    for options, message in (
        (["--task", "nosuch"], "unknown task 'nosuch'"),
        (["--resume"], "contains no run"),
        (["--pretrained", cut], f"{cut} is not a file of weights"),
        (["--out", cut], f"A file, not the folder of a run: '{cut}'"),
    ):
        assert message in exit_of(capsys, *out, *options)[0]
    code, shown = exit_of(capsys, "--model", "rnn")
    assert code == 2 and "invalid choice: 'rnn'" in shown.err
    assert not (tmp_path / "x").exists()

    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, "run_command", interrupted)
    assert exit_of(capsys, *out)[0] == "pretrain.py: interrupted"


def test_a_run_from_the_command_line(small_lattice, monkeypatch, tmp_path, capsys):
    """As one process of a cluster's job, whose scheduler sets no LOCAL_RANK."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    steps = ["--pretrain-steps", "2", "--finetune-steps", "2"]
    before = torch.get_rng_state()
    pretrain.main([*runs.SMALL, *steps, "--out", str(tmp_path)])
    assert torch.equal(torch.get_rng_state(), before), "the caller's random numbers go on"
    result = json.loads((tmp_path / "result.json").read_text())
    assert 0 <= result["test"]["accuracy"] <= 1 and result["config"]["pretrain_steps"] == 2
    shown = capsys.readouterr().out
    assert shown.startswith("d_state has no effect in this run\npretrain ")
    assert "accuracy" in shown and "tokens_per_s" in shown and f"{tmp_path}/result.json" in shown
    pretrain.main(["--resume", "--out", str(tmp_path)])  # with the settings of the run
    assert json.loads((tmp_path / "result.json").read_text())["test"] == result["test"]
    message, _ = exit_of(capsys, *runs.SMALL, *steps, "--out", tmp_path)
    assert message.startswith("pretrain.py: ") and "pass --overwrite to replace it" in message


@pytest.mark.parametrize(
    ("spoiled", "bad"),
    [(None, []), ("draw", [0]), ("x", [1, 2, 4]), ("where", [2]), ("target", [3, 4])],
)
def test_the_check_notices_what_is_wrong(spoiled, bad, monkeypatch, capsys):
    make_batch = pretrain.make_batch

    def spoil(*args):
        batch = make_batch(*args)
        if spoiled in batch._fields:
            batch = batch._replace(**{spoiled: getattr(batch, spoiled).logical_not()})
        return batch

    monkeypatch.setattr(pretrain, "make_batch", spoil)
    if spoiled == "draw":
        monkeypatch.setattr(pretrain, "draw", lambda *args: itertools.repeat(np.arange(8)))
    rows = pretrain.self_check()
    assert [i for i, row in enumerate(rows) if row[1] > row[2]] == bad
    assert [row[2] for row in rows] == [0, 0.03, 0, 0, 0]
    code, shown = exit_of(capsys, "--check", "--device", "cpu")
    assert code == bool(bad) and rows[0][0] in shown.out


@pytest.mark.parametrize(("rank", "order"), [(0, "work wait wait"), (1, "wait work wait")])
def test_ranks_wait_for_the_data_however_long(rank, order, monkeypatch):
    """By `wait_for_all_ranks`, which has no timeout of a minute: retrieval takes longer to load."""
    events = []
    monkeypatch.setattr(pretrain, "ranks", lambda: (rank, 2))
    monkeypatch.setattr(pretrain, "wait_for_all_ranks", lambda: events.append("wait"))
    pretrain.rank0_first(events.append, "work")
    assert " ".join(events) == order
