"""lra_data.py: what is generated (lattice, ListOps, Pathfinder), the cache, the command line."""

import itertools
import math
import re
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import lra_data

ROOT = Path(__file__).parent.parent
TINY = dict(n_train=900, n_val=50, n_test=50)


def as_text(row):
    return " ".join(lra_data.LISTOPS_VOCAB[token] for token in row)


def value_of_text(text):
    """Evaluates a tree by replacing innermost lists until a number is left."""
    rules = {
        "MIN": min,
        "MAX": max,
        "MED": lambda args: math.floor(statistics.median(args)),
        "SM": lambda args: sum(args) % 10,
    }
    while "[" in text:
        text = re.sub(
            r"\[(MIN|MAX|MED|SM)((?: \d)+) \]",
            lambda found: str(rules[found[1]]([int(d) for d in found[2].split()])),
            text,
        )
    return int(text)


# ------------------------------------------------------------------------------------------ lattice


def test_lattice_couples_the_distance_of_its_class():
    data = lra_data.load("lattice", n_train=2000, distances=(1, 2))
    spins = data.train.tokens.reshape(-1, 8, 8).astype(float) * 2 - 1
    for label, distance in [(0, 1), (1, 2)]:
        own = spins[data.train.labels == label]
        by_distance = [(own * np.roll(own, step, 2)).mean() for step in range(1, 5)]
        assert int(np.argmax(by_distance)) + 1 == distance
        assert abs(own.mean()) < 0.06, "the mean tells the class"
    assert set(np.unique(data.train.tokens)) == {0, 1}
    assert abs(data.train.labels.mean() - 0.5) < 0.05


def test_lattice_sampler_agrees_with_enumeration():
    """3 x 3 torus, 512 states: the mean product of coupled sites, exact and sampled."""
    side, beta = 3, 0.2
    states = np.array(list(itertools.product([-1, 1], repeat=9))).reshape(-1, 3, 3)
    bonds = sum((states * np.roll(states, 1, axis)).sum((1, 2)) for axis in (1, 2))
    weight = np.exp(beta * bonds)
    exact = (weight * bonds).sum() / weight.sum() / 18
    sample = lra_data.gibbs(np.random.RandomState(0), 20_000, side, 1, beta, 30).reshape(-1, 3, 3)
    products = sum((sample * np.roll(sample, 1, axis)).mean() for axis in (1, 2)) / 2
    assert exact > 0.2
    assert abs(products - exact) < 0.01


# ------------------------------------------------------------------------------------------ listops


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("[MIN 3 2 9 ]", 2),
        ("[MAX 3 2 9 ]", 9),
        ("[MED 1 2 ]", 1),
        ("[MED 9 0 4 ]", 4),
        ("[MED 1 8 3 6 ]", 4),
        ("[SM 9 9 9 ]", 7),
        ("[SM [MAX 1 [MED 2 5 ] ] [MIN 8 9 ] 0 ]", 1),
    ],
)
def test_listops_value_by_hand(text, value):
    row = [lra_data.LISTOPS_VOCAB.index(word) for word in text.split()]
    assert lra_data.listops_value(row) == value == value_of_text(text)


@pytest.mark.parametrize(
    "text", ["", "]", "1 2", "[MIN ]", "[MIN 1", "[MIN 1 ] ]", "[MAX [MIN 1 ]"]
)
def test_listops_value_refuses_what_is_no_tree(text):
    row = [lra_data.LISTOPS_VOCAB.index(word) for word in text.split()]
    with pytest.raises(ValueError, match=r"token \d+|left open"):
        lra_data.listops_value(row)


def test_listops_labels_are_the_values_of_the_trees(tmp_path):
    data = lra_data.load("listops-tiny", tmp_path, **TINY)
    for split in (data.train, data.val, data.test):
        for row, label, length in zip(split.tokens, split.labels, split.lengths, strict=True):
            assert 16 < length < 128
            assert (row[length:] == 0).all()
            assert (
                lra_data.listops_value(row[:length])
                == label
                == value_of_text(as_text(row[:length]))
            )


def test_listops_statistics(tmp_path):
    """Full size: lengths 1035 on average, constant answer 17 %, root operator alone 36 %."""
    data = lra_data.load("listops", tmp_path, n_train=4000, n_val=10, n_test=10)
    lengths, labels = data.train.lengths, data.train.labels
    assert lengths.min() > 500 and lengths.max() < 2000
    assert abs(lengths.mean() - 1040) < 30
    assert abs((labels == 0).mean() - 0.17) < 0.02 and abs((labels == 9).mean() - 0.17) < 0.02
    roots = data.train.tokens[:, 0]
    by_root = [np.bincount(labels[roots == op], minlength=10) for op in range(10, 14)]
    assert abs(sum(counts.max() for counts in by_root) / 4000 - 0.365) < 0.02
    assert [counts.argmax() for counts in by_root[:3]] == [0, 9, 5]
    opened = (data.train.tokens >= lra_data.MIN) & (data.train.tokens < lra_data.CLOSE)
    depth = np.cumsum(opened.astype(int) - (data.train.tokens == lra_data.CLOSE), 1)
    assert depth.max() == 9, "operators stand at depths 1 .. 9"
    assert abs(opened.sum(1).mean() - 147) < 5


def test_listops_splits_are_disjoint(tmp_path):
    data = lra_data.load("listops-tiny", tmp_path, **TINY)
    rows = [
        row.tobytes() for split in (data.train, data.val, data.test) for row in pad_to_128(split)
    ]
    assert len(set(rows)) == len(rows) == 1000


def pad_to_128(split):
    return np.pad(split.tokens, [(0, 0), (0, 128 - split.tokens.shape[1])], constant_values=99)


def test_listops_gives_up_when_too_few_trees_fit(tmp_path):
    with pytest.raises(ValueError, match="wider limits"):
        lra_data.load("listops", tmp_path, above=3, below=5, n_train=2000)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("listops", dict(above=10, below=11)),
        ("listops", dict(max_depth=1)),
        ("listops", dict(max_args=1)),
        ("listops", dict(n_val=0)),
        ("lattice", dict(distances=(1, 1))),
        ("lattice", dict(distances=(1, 8))),
        ("lattice", dict(n_train=0)),
        ("lattice", dict(sweeps=-1)),
    ],
)
def test_bad_options_are_refused_with_their_numbers(task, options, tmp_path):
    with pytest.raises(ValueError, match=r"expected .*"):
        lra_data.load(task, tmp_path, **options)


# ---------------------------------------------------------------------------------- load and cache


def test_load_refuses_unknown_tasks_and_seeds(tmp_path):
    with pytest.raises(ValueError, match=r"unknown task 'listop': expected one of .*listops"):
        lra_data.load("listop", tmp_path)
    with pytest.raises(ValueError, match="seed -1"):
        lra_data.load("lattice", tmp_path, seed=-1)
    with pytest.raises(TypeError, match="sides"):
        lra_data.load("lattice", tmp_path, sides=8)


@pytest.mark.parametrize("task", ["lattice", "listops-tiny"])
def test_same_seed_same_bytes(task, tmp_path):
    first = lra_data.checksum(lra_data.load(task, tmp_path / "a", seed=3, **TINY))
    assert first == lra_data.checksum(lra_data.load(task, tmp_path / "b", seed=3, **TINY))
    assert first != lra_data.checksum(lra_data.load(task, tmp_path / "c", seed=4, **TINY))


def test_the_cache_gives_back_what_was_made(tmp_path):
    made = lra_data.load("listops-tiny", tmp_path, **TINY)
    read = lra_data.load("listops-tiny", tmp_path, **TINY)
    assert lra_data.checksum(made) == lra_data.checksum(read)
    assert len(list(tmp_path.iterdir())) == 1, "another folder than the cache is left behind"


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "gone", "other"])
def test_a_damaged_cache_is_named(damage, tmp_path):
    lra_data.load("listops-tiny", tmp_path, **TINY)
    path = next(tmp_path.glob("*/val.npz"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    other = {"cut": content[:-100], "flip": content, "empty": b"", "other": b"not a zip"}
    path.unlink()
    if damage != "gone":
        path.write_bytes(other[damage])
    with pytest.raises(ValueError, match=r"val\.npz: damaged .*delete its folder"):
        lra_data.load("listops-tiny", tmp_path, **TINY)


# ------------------------------------------------------------------------------------ command line


def test_command_line_prints_the_summary(tmp_path):
    command = [sys.executable, str(ROOT / "lra_data.py"), "lattice", "--data-dir", str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "examples, length 64 .. 64 .. 64" in out
    assert lra_data.checksum(lra_data.load("lattice", tmp_path)) in out
