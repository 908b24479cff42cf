"""lra_data.py: what is generated (lattice, ListOps), the cache, the summary, the command line."""

import errno
import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

import lra_data

SMALL = dict(n_train=900, n_val=50, n_test=50)


# ----------------------------------------------------------------------------------------- lattice


def test_lattice_couples_the_distance_of_its_class():
    data = lra_data.load("lattice", n_train=2000)
    spins = data.train.tokens.reshape(-1, 8, 8).astype(float) * 2 - 1
    for label, distance in [(0, 1), (1, 3)]:
        own = spins[data.train.labels == label]
        coupled = [(own * np.roll(own, step, 2)).mean() for step in (1, 2, 3, 4)]
        assert np.argmax(coupled) + 1 == distance
        assert abs(own.mean()) < 0.06, "the mean tells the class"


@pytest.mark.parametrize("distance", [1, 2])  # on a torus of 3, the neighbors are the same
def test_lattice_sampler_agrees_with_enumeration(distance):
    """The mean product of coupled sites of a 3 x 3 torus, 512 states, exact and sampled."""
    states = np.array(list(product([-1, 1], repeat=9))).reshape(-1, 3, 3)
    bonds = sum((states * np.roll(states, 1, axis)).sum((1, 2)) for axis in (1, 2))
    weight = np.exp(0.2 * bonds)
    exact = (weight * bonds).sum() / weight.sum() / 18
    sample = lra_data.gibbs(np.random.RandomState(0), 20_000, 3, distance, 0.2, 30)
    sample = sample.reshape(-1, 3, 3)
    products = sum((sample * np.roll(sample, 1, axis)).mean() for axis in (1, 2)) / 2
    assert exact > 0.2
    assert abs(products - exact) < 0.01


# ----------------------------------------------------------------------------------------- listops


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("[MED 9 0 4 ]", 4),
        ("[SM [MAX 1 [MED 2 5 ] ] [MIN 8 9 ] 0 ]", 1),
    ],
)
def test_listops_value_by_hand(text, value):
    tokens = [lra_data.LISTOPS_VOCAB.index(word) for word in text.split()]
    assert lra_data.evaluate_ref(tokens) == value


def test_listops_labels_are_the_values_of_different_trees(tmp_path):
    data = lra_data.load("listops-tiny", tmp_path, **SMALL)
    trees = set()
    for split in (data.train, data.val, data.test):
        for row, label, length in zip(split.tokens, split.labels, split.lengths, strict=True):
            assert 16 < length < 128
            assert (row[length:] == 0).all()
            assert label == lra_data.evaluate_ref(row[:length])
            trees.add(row[:length].tobytes())
    assert len(trees) == 1000


def test_listops_statistics(tmp_path):
    """Full size: mean length 1035, most frequent answer 17 %, by root operator 36 %."""
    data = lra_data.load("listops", tmp_path, n_train=4000, n_val=10, n_test=10)
    golden = "6e8ecbb50c57715d"  # of several chunks of trees
    assert lra_data.checksum(data).startswith(golden)
    tokens, labels, lengths = data.train.tokens, data.train.labels, data.train.lengths
    assert lengths.min() > 500 and lengths.max() < 2000
    assert abs(lengths.mean() - 1040) < 30
    assert abs((labels == 0).mean() - 0.17) < 0.02 and abs((labels == 9).mean() - 0.17) < 0.02
    by_root = [np.bincount(labels[tokens[:, 0] == op], minlength=10) for op in range(10, 14)]
    assert abs(sum(counts.max() for counts in by_root) / 4000 - 0.365) < 0.02
    opened = (tokens >= lra_data.MIN) & (tokens < lra_data.CLOSE)
    depth = np.cumsum(opened.astype(int) - (tokens == lra_data.CLOSE), 1)
    assert depth.max() == 9, "operators stand at depths 1 .. 9"
    assert abs(opened.sum(1).mean() - 147) < 5


def test_limits_are_exclusive(tmp_path, monkeypatch):
    monkeypatch.setitem(lra_data.LIMITS, "listops", (1, 6, 10))
    data = lra_data.load("listops", tmp_path, n_train=300, n_val=9, n_test=9)
    assert sorted(set(data.train.lengths)) == [4, 5]


# ------------------------------------------------------------------------------------ load, cache


@pytest.mark.parametrize(
    ("task", "sha256"),
    [
        ("lattice", "213d12bd9941e504b05cafd781b3cb6e45e229609a668b14ddb8dcff96110155"),
        ("listops-tiny", "c05863506976f269f0f94ab5c2746c34a94a43d6a5a0ef51e990ce357ef6955d"),
    ],
)
def test_the_bytes_depend_on_the_seed_alone(task, sha256, tmp_path):
    """Results of different days and machines are about the same examples."""
    assert lra_data.checksum(lra_data.load(task, tmp_path, **SMALL)) == sha256
    assert lra_data.checksum(lra_data.load(task, tmp_path, seed=4, **SMALL)) != sha256


def test_a_cache_gives_back_what_was_made_or_is_called_damaged(tmp_path, monkeypatch):
    made = lra_data.load("listops-tiny", tmp_path, **SMALL)
    (path,) = tmp_path.iterdir()
    assert path.suffix == ".npz"
    monkeypatch.setattr(lra_data, "make_listops", lambda *_: pytest.fail("made again"))
    read = lra_data.load("listops-tiny", tmp_path, **SMALL)
    assert lra_data.checksum(made) == lra_data.checksum(read)
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([255 - content[middle]]) + content[middle + 1 :]
    for damaged in (flipped, content[:-100], b"", b"not a zip"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"\.npz: .*expected an undamaged cache .delete it"):
            lra_data.load("listops-tiny", tmp_path, **SMALL)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "disk full"), r"listops.*\.npz: .*disk full"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_a_full_disk_or_ctrl_c_leaves_nothing_behind(error, line, tmp_path, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(lra_data, "make_listops", lambda *_: [])
    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(SystemExit, match=f"^lra_data.py: .*{line}$"):
        lra_data.main(["listops", "--data-dir", str(tmp_path)])
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------- summary, main, check


def test_an_empty_input_is_named():
    data = lra_data.load("lattice", n_train=4, n_val=4, n_test=4)
    lengths = np.array([64, 0, 64, 64])
    with pytest.raises(ValueError, match=r"lattice: val, example \[\[1\]\] .* has length 0"):
        lra_data.check(replace(data, val=replace(data.val, lengths=lengths)))


@pytest.mark.parametrize(
    ("n_classes", "label", "expected"),
    [
        (3, -1, r"labels 0 \.\. 2"),
        (3, 3, r"labels 0 \.\. 2"),
        (None, np.nan, "finite targets"),
        (None, np.inf, "finite targets"),
    ],
)
def test_labels_that_a_task_cannot_have_are_named(n_classes, label, expected):
    good = lra_data.Split(np.zeros((2, 2)), np.array([0, 2]), np.array([2, 2]))
    bad = replace(good, labels=np.array([0, label]))
    data = lra_data.Data("hand", good, good, good, 20, n_classes)
    lra_data.check(data)
    with pytest.raises(ValueError, match=f"hand: test has 2 .*{label}.*{expected}"):
        lra_data.check(replace(data, test=bad))


def test_command_line_lists_every_task_without_arguments(capsys):
    assert lra_data.main([]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert set(lines) == set(lra_data.TASKS)
    assert lines["listops-tiny"].endswith("generated")
    assert lines["image"].endswith(lra_data.CIFAR)
    pictures = [("pathx", 128, 14), ("pathx256", 256, 14), ("pathfinder64-medium", 64, 9)]
    for name, size, contour in pictures:
        assert lra_data.TASKS[name].options == dict(size=size, contour=contour)


def test_command_line_prints_the_summary(tmp_path, capsys):
    assert lra_data.main(["lattice", "--data-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "lattice: 2 classes, 2 symbols" in out
    assert "train   4,000 examples, length 64 .. 64 .. 64" in out
    assert "trivial baseline, most frequent label: 49.2 %" in out
    assert lra_data.checksum(lra_data.load("lattice")) in out


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ("image", "{folder}: expected cifar-10-batches-bin/.* https"),
        ("listops --n 5", "task listops does not take all of: n"),
        ("pathfinder32 --n 5", r"pathfinder32: val has 0 examples with labels \[\]; expected at"),
        ("image --download --data-dir {folder}/file", ".*(Not a dir|exists)"),
        ("image --source {folder}/file", "{folder}/file: .*expected a whole tar"),
        ("text --max-len 0", "text: max_len is 0, expected 1 or more"),
        ("pathfinder32 --n 5 --source {folder}", "pathfinder32: n and pictures are for drawing"),
        ("lattice --download", "--download: no published archive of lattice"),
        ("lattices", "unknown task 'lattices': expected one of .*lattice"),
    ],
)
def test_command_line_says_what_is_wrong_in_one_line(args, line, tmp_path):
    (tmp_path / "file").write_text("")
    args = [arg.format(folder=tmp_path) for arg in ("--data-dir {folder} " + args).split()]
    with pytest.raises(SystemExit) as stopped:
        lra_data.main(args)
    assert re.match("lra_data.py: " + line.format(folder=tmp_path), stopped.value.code)
    assert "\n" not in stopped.value.code


def test_a_pipe_that_is_closed_ends_without_a_traceback():
    command = [sys.executable, lra_data.__file__]
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_self_check_holds_and_can_fail(monkeypatch, capsys):
    assert lra_data.main(["--check"]) == 0
    monkeypatch.setattr(lra_data, "evaluate_trees", lambda levels: levels[0][0] * 0)
    assert lra_data.main(["--check"]) == 1
    assert capsys.readouterr().out.count("FAILED") == 1
