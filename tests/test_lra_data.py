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
        ("pathfinder32", dict(size=33)),
        ("pathfinder32", dict(contour=7)),
        ("pathfinder32", dict(n=9)),
        ("speech", dict(rate=44_100)),
    ],
)
def test_bad_options_are_refused_with_their_numbers(task, options, tmp_path):
    with pytest.raises(ValueError, match=r"expected .*"):
        lra_data.load(task, tmp_path, **options)


# --------------------------------------------------------------------------------------- pathfinder


def blobs(mask):
    """Sizes of the 8-connected blobs of a picture, by flood fill."""
    left, sizes = set(map(tuple, np.argwhere(mask))), []
    while left:
        edge, size = [left.pop()], 1
        while edge:
            y, x = edge.pop()
            around = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= around
            size += len(around)
            edge += around
        sizes.append(size)
    return sizes


@pytest.mark.parametrize(
    ("size", "n", "zeros", "mean"),
    [(32, 300, 0.66, 20), (64, 24, 0.74, 13), (128, 20, 0.86, 8), (256, 40, 0.96, 3)],
)
def test_pathfinder_looks_like_the_original(size, n, zeros, mean):
    """Share of empty pixels and mean of the published generator, measured, within 10 %."""
    pictures, labels, markers = lra_data.draw_pictures(np.random.RandomState(0), size, 14, n)
    assert pictures.shape == (n, size, size) and pictures.dtype == np.uint8
    assert abs((pictures == 0).mean() / zeros - 1) < 0.1
    assert abs(pictures.mean() / mean - 1) < 0.1
    assert (pictures.max((1, 2)) == 255).all()
    assert abs(labels.mean() - 0.5) < 2 / n**0.5
    at_marker = pictures[np.arange(n)[:, None], markers[..., 0], markers[..., 1]]
    assert at_marker.min() > 160, "no disk where the marker should be"


def test_pathfinder_segments_and_markers_are_counted():
    """128 pixels without distractors: 2 disks, brighter than all else, and 2 snakes of 14 bars."""
    brush = lra_data.make_brush(128, 3)
    rng = np.random.RandomState(0)
    for _, at, way in lra_data.snake_pairs(rng, brush, 14, 8):
        pictures, _, markers = lra_data.paint(rng, brush, 14, at, way)
        for picture, marker in zip(pictures, markers, strict=True):
            disks = blobs(picture > 240)
            if np.abs(marker[0] - marker[1]).max() > 10:
                assert len(disks) == 2 and min(disks) > 20
            parts = len(blobs(picture > 80))
            assert 22 <= parts <= 28, "28 bars; a disk covers one, and the two snakes may meet"


def test_pathfinder_label_says_whose_ends_are_marked():
    """The label against the geometry, and the geometry: steps of one bar and one gap."""
    brush = lra_data.make_brush(64, 1)
    rng = np.random.RandomState(0)
    for _, at, way in lra_data.snake_pairs(rng, brush, 6, 64):
        _, labels, markers = lra_data.paint(rng, brush, 6, at, way)
        places = np.stack(np.divmod(at, brush.side), -1) - brush.rim  # (n, 12, 2)
        for place, label, (first, last) in zip(places, labels, markers, strict=True):
            start = [s for s in (0, 1) if (place[s] == first).all()]
            end = [s for s in (0, 1) if (place[10 + s] == last).all()]
            assert len(start) == len(end) == 1
            assert label == (start == end)
        steps = np.linalg.norm(np.diff(places[:, 2:].reshape(-1, 5, 2, 2), axis=1), axis=-1)
        assert 4 < steps.min() and steps.max() < 11, "bars of 5 pixels and gaps of about 2"
        assert places.min() >= 1 and places.max() <= 62


def test_pathfinder_segments_keep_clear_of_older_ones():
    """A new segment and the older ones nowhere fill a pixel 1.8 times; the last two are exempt."""
    brush = lra_data.make_brush(64, 1)
    offsets, values = brush.mask
    rng = np.random.RandomState(0)
    tightest = 0
    for _, at, way in lra_data.snake_pairs(rng, brush, 9, 32):
        for place, turn in zip(at, way, strict=True):
            shapes = np.zeros((18, brush.side**2), int)
            for shape, p, t in zip(shapes, place, turn, strict=True):
                shape[p + offsets[t]] = values[t]
            both = [(shapes[i] + shapes[: i - 2].max(0)).max() for i in range(3, 18)]
            tightest = max(tightest, *both)
    assert 400 < tightest < 1.8 * 255


def test_pathfinder_markers_alone_say_nothing():
    """Least squares on the positions, distances and squares of the two markers: chance."""
    n = 1200
    _, labels, markers = lra_data.draw_pictures(np.random.RandomState(2), 32, 14, n)
    places = markers.reshape(n, 4) / 32 - 0.5
    apart = np.linalg.norm(places[:, :2] - places[:, 2:], axis=1)
    features = np.stack([*places.T, *places.T**2, apart, apart**2, np.ones(n)], 1)
    half = n // 2
    weights = np.linalg.lstsq(features[:half], labels[:half] * 2.0 - 1, rcond=None)[0]
    score = ((features[half:] @ weights > 0) == labels[half:]).mean()
    assert abs(score - 0.5) < 0.06, score


def test_pathfinder_goes_on_after_a_kill(tmp_path, monkeypatch):
    whole = lra_data.load("pathfinder32-easy", tmp_path / "a", n=1100, processes=1)
    draw, calls = lra_data.pathfinder_shard, []

    def killed(job):
        calls.append(job)
        if len(calls) == 2:
            raise KeyboardInterrupt
        draw(job)

    monkeypatch.setattr(lra_data, "pathfinder_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        lra_data.load("pathfinder32-easy", tmp_path / "b", n=1100, processes=1)
    assert not list(tmp_path.glob("b/*/images.npy"))
    again = lra_data.load("pathfinder32-easy", tmp_path / "b", n=1100, processes=1)
    assert len(calls) == 4, "the finished shard is drawn again, or another is not"
    assert lra_data.checksum(again) == lra_data.checksum(whole)
    names = sorted(path.name for path in tmp_path.glob("b/*/*"))
    assert names == ["images.npy", "labels.npy"]
    assert [len(split) for split in (whole.train, whole.val, whole.test)] == [880, 110, 110]
    rows = {row.tobytes() for s in (whole.train, whole.val, whole.test) for row in s.tokens}
    assert len(rows) == 1100, "two shards hold the same pictures"


@pytest.mark.dist
def test_pathfinder_is_the_same_with_any_number_of_processes(tmp_path):
    options = dict(n=600, seed=5)
    one = lra_data.load("pathfinder32-easy", tmp_path / "1", processes=1, **options)
    two = lra_data.load("pathfinder32-easy", tmp_path / "2", processes=2, **options)
    assert lra_data.checksum(one) == lra_data.checksum(two)


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


@pytest.mark.parametrize(
    ("task", "sha256"),
    [
        ("lattice", "213d12bd9941e504b05cafd781b3cb6e45e229609a668b14ddb8dcff96110155"),
        ("listops-tiny", "c05863506976f269f0f94ab5c2746c34a94a43d6a5a0ef51e990ce357ef6955d"),
    ],
)
def test_the_bytes_never_change(task, sha256, tmp_path):
    """Frozen: results of different days and machines are about the same examples."""
    assert lra_data.checksum(lra_data.load(task, tmp_path, **TINY)) == sha256


def test_the_cache_gives_back_what_was_made(tmp_path):
    made = lra_data.load("listops-tiny", tmp_path, **TINY)
    read = lra_data.load("listops-tiny", tmp_path, **TINY)
    assert lra_data.checksum(made) == lra_data.checksum(read)
    assert len(list(tmp_path.iterdir())) == 1, "another folder than the cache is left behind"


def test_two_processes_may_make_the_same_cache(tmp_path):
    """The slower one finds the folder of the faster one and reads it."""
    folder = tmp_path / "cache"
    split = lra_data.load("lattice", n_train=9).train

    def make():
        if not folder.exists():
            lra_data.cached(folder, make_now)
        return make_now()

    def make_now():
        return [split] * 3

    again = lra_data.cached(folder, make)
    assert (again[0].tokens == split.tokens).all()
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


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


def test_self_check_holds_and_can_fail(monkeypatch, capsys):
    assert lra_data.print_table(lra_data.self_check())
    monkeypatch.setattr(lra_data, "evaluate_trees", lambda levels: levels[0][0] * 0)
    monkeypatch.setattr(lra_data, "unfilter", lambda lines: lines[:, :, 1:] // 2)
    assert not lra_data.print_table(lra_data.self_check())
    assert capsys.readouterr().out.count("FAIL") == 2


def test_command_line_says_what_is_wrong(tmp_path):
    command = [sys.executable, str(ROOT / "lra_data.py"), "image", "--data-dir", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.startswith(f"lra_data.py: {tmp_path}: expected one of cifar-10-batches-bin/")


@pytest.mark.parametrize("task", ["lattice", "listops-tiny", "pathfinder32"])
def test_show_writes_a_picture_or_examples(task, tmp_path):
    options = dict(n=40, processes=1) if task == "pathfinder32" else TINY
    said = lra_data.show(lra_data.load(task, tmp_path, **options), tmp_path)
    if task == "listops-tiny":
        assert said.count("label") == 3
        for line in said.splitlines():
            assert value_of_text(line.split(": ")[1]) == int(line.split()[1][:-1])
    else:
        side = {"lattice": 8, "pathfinder32": 32}[task]
        head = (tmp_path / f"{task}.png").read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n"
        assert (head[16:20], head[20:24]) == tuple(
            n.to_bytes(4, "big") for n in (8 * side, 4 * side)
        )


def test_the_list_names_every_task_and_what_is_on_disk(tmp_path):
    lra_data.load("listops-tiny", tmp_path, **TINY)
    lines = {line.split()[0]: line for line in lra_data.listing(tmp_path).splitlines()}
    assert set(lines) == set(lra_data.TASKS)
    assert "  0.1 MB  generated" in lines["listops-tiny"] and "  0.0 MB" in lines["listops"]
    assert "https://" in lines["text"]


@pytest.mark.parametrize("distances", [(1, 7), (3, 5), (1, 3, 3), (1, 4), (2, 2)])
def test_distances_that_are_the_same_on_the_torus_are_refused(distances):
    with pytest.raises(ValueError, match="expected two different ones"):
        lra_data.load("lattice", distances=distances)


@pytest.mark.dist
def test_two_processes_may_make_the_same_pictures_at_once(tmp_path):
    """One makes them, the other waits and reads; neither sees half of them."""
    code = "import lra_data as l, sys; d = l.load('pathfinder32', sys.argv[1], n=1500, processes=1)"
    code += (
        "; print(l.checksum(d), int((d.train.tokens.reshape(len(d.train), -1).max(1) == 0).sum()))"
    )
    start = [sys.executable, "-c", code, str(tmp_path)]
    both = [subprocess.Popen(start, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0].split() for process in both]
    assert outputs[0] == outputs[1] and outputs[0][1] == "0"
    assert not list(tmp_path.glob("*.lock"))


def test_a_data_dir_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for task, *flags in (("pathfinder32", "--n", "20"), ("listops-tiny",), ("lattice", "--show")):
        command = [
            sys.executable,
            "lra_data.py",
            task,
            *flags,
            "--data-dir",
            str(tmp_path / "file"),
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.startswith("lra_data.py: ")
        assert "Traceback" not in done.stderr
