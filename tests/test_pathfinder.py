"""pathfinder.py: the distribution of the published generator, its geometry, data sets on disk."""

import errno
import hashlib
import os
import subprocess
import sys
import time
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

import pathfinder

ROOT = Path(__file__).parent.parent

# Mean and standard error of the published generator (drewlinsley/pathfinder at commit 7b53886, with
# scipy 0.19's imresize and imsave written out for Pillow 13 and OpenCV 5; scipy 0.19.1, Pillow 5.1
# and OpenCV 3.4 draw the same segments and disks), contour 14.  empty, spread: share of empty
# pixels, its mean and standard deviation; parts: bright parts; down, right: how far the end of the
# first snake is from its start.
ORIGINAL = """
size            32                64               128               256
pictures        1700              63               267               800
empty           0.65938 0.00093   0.73296 0.0037   0.86291 0.00033   0.96116 0.000036
spread          0.03818 0.0006    0.02931 0.0026   0.005427 0.00024  0.001019 0.000029
mean            20.176 0.048      13.724 0.17      7.913 0.02        2.9504 0.0019
parts           15.852 0.077      26.921 0.83      57.858 0.14       55.731 0.025
distractors     1.1494 0.022      2.8889 0.13      7.7191 0.03       6.9875 0.0039
down            3.63 0.2          0.80952 2.7      -24.536 2.9       -5.5338 3.2
right           4.0329 0.2        0.55556 2.6      -26.618 2.8       -8.1862 3.2
"""


def count_parts(mask):
    """Number of 8-connected parts of a (side, side) bool picture."""
    todo = {tuple(pixel) for pixel in np.argwhere(mask)}
    count = 0
    while todo:
        count += 1
        edge = [todo.pop()]
        while edge:
            y, x = edge.pop()
            around = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & todo
            todo -= around
            edge += around
    return count


def measure(size, n):
    """The mean statistics of n pictures of ours, by the names of ORIGINAL."""
    rng = np.random.RandomState(0)
    found = {name: [] for name in ("empty", "mean", "parts", "distractors", "down", "right")}
    for brush, at, way in pathfinder.scenes(rng, size, 14, n):
        pictures, _, _ = pathfinder.paint(rng, brush, 14, at, way)
        bright = pictures > (100 if size == 32 else 80)
        drift = brush.where(at[:, 26]) - brush.where(at[:, 0])
        found["empty"].extend((pictures == 0).mean((1, 2)))
        found["mean"].extend(pictures.mean((1, 2)))
        found["parts"].extend(map(count_parts, bright))
        found["distractors"].extend((way[:, 28:] >= 0).sum(1) / 4)
        found["down"].extend(drift[:, 0])
        found["right"].extend(drift[:, 1])
    return {"spread": np.std(found["empty"])} | {name: np.mean(found[name]) for name in found}


@pytest.mark.parametrize(("size", "n"), [(32, 800), (64, 30), (128, 40), (256, 100)])
def test_statistics_agree_with_the_original_within_three_standard_errors(size, n):
    ours = measure(size, n)
    sizes, pictures, *table = [line.split() for line in ORIGINAL.strip().splitlines()]
    column = sizes[1:].index(str(size))
    for name, *numbers in table:
        expected, error = map(float, numbers[2 * column : 2 * column + 2])
        error *= (1 + int(pictures[1 + column]) / n) ** 0.5  # ours has the same spread, n pictures
        z = (ours[name] - expected) / error
        assert abs(z) < 3, f"{name}: {ours[name]:.5g}, original {expected}, z {z:.1f}"


@pytest.mark.parametrize(
    ("size", "n", "sha256"),
    [
        (32, 40, "d85b0ae826ea6f4d"),
        (64, 4, "1e80b98e7d570fd8"),
        (128, 4, "1f32e1f01466f61f"),
        (256, 8, "d57b543f311707e0"),
    ],
)
def test_the_pictures_depend_on_the_seed_alone(size, n, sha256, monkeypatch):
    """Results of different days and machines are about the same pictures.

    Processors with AVX-512 round numpy's functions otherwise: here they are off by up to 2 ulp.
    """

    def inexact(function, *args):
        y = function(*args)
        return y + np.spacing(y) * noise.integers(-2, 3, np.shape(y))

    noise = np.random.default_rng(0)
    for name in ("sin", "cos", "arctan2", "sinc", "hypot"):
        monkeypatch.setattr(np, name, partial(inexact, getattr(np, name)))
    pathfinder.make_brush.cache_clear()
    arrays = pathfinder.draw_pictures(np.random.RandomState(0), size, 9, n)
    pathfinder.make_brush.cache_clear()
    content = b"".join(array.astype(np.int64).tobytes() for array in arrays)
    assert hashlib.sha256(content).hexdigest()[:16] == sha256


def test_a_shard_has_a_random_stream_of_its_own():
    shard = pathfinder.draw_shard(504, 32, 6, seed=7, i=1)  # shards of 500
    pictures, labels, _ = pathfinder.draw_pictures(np.random.RandomState([7, 3, 1]), 32, 6, 4)
    assert (shard[0] == pictures).all() and (shard[1] == labels).all()


def test_a_first_segment_finds_the_few_free_places_or_none():
    brush = pathfinder.make_brush(32, 1)
    taken = np.full((300, brush.side**2), 255, brush.blank.dtype)
    taken[:, brush.window[500] + brush.seed.flatten()] = 0
    found = pathfinder.free_starts(np.random.RandomState(0), brush, taken)
    angle = np.random.RandomState(0).randint(0, 360, 300)
    usable = np.flatnonzero(brush.usable[angle])
    assert (found[1] == angle[usable]).all() and (found[2] == usable).all()
    for start, turn in zip(found[0], found[1], strict=True):
        place = brush.window[(brush.where(brush.window) == start).all(1)]
        assert (taken[0, place + brush.seed[turn]] == 0).all()
    taken[:] = 255
    assert not len(pathfinder.free_starts(np.random.RandomState(0), brush, taken)[0])


def test_pairs_get_stuck_as_often_as_in_the_original():
    """Size 32: 325.3 attempts per pair, standard error 7.8, over 1700 pictures."""
    brush = pathfinder.make_brush(32, 1)
    rng = np.random.RandomState(0)
    n = 20_000
    start, way = pathfinder.first_segments(rng, brush, n)
    _, way = pathfinder.grow(rng, brush, np.tile(brush.blank, (n, 1)), start, way, 14)
    count = (way[:, -1] >= 0).sum()
    attempts = n / count / brush.usable.mean()  # unusable angles get stuck at once
    assert abs(attempts - 325.3) < 3 * np.hypot(7.8, attempts / count**0.5)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_bars_have_the_pixels_of_pillow(width):
    for y, x in product(range(-7, 8), repeat=2):
        if (y, x) != (0, 0):
            image = Image.new("1", (23, 23))
            ImageDraw.Draw(image).line([11, 11, 11 + x, 11 + y], 1, width)
            assert (np.array(image) == pathfinder.bar(23, np.array([y, x]), width)).all(), (y, x)


@pytest.mark.parametrize("side", [5, 13, 27])
def test_pictures_shrink_as_in_pillow(side):
    rng = np.random.default_rng(0)
    for _ in range(100):
        image = rng.random((2 * side, 2 * side)) < 0.5
        expected = Image.fromarray(255 * image.astype(np.uint8)).resize((side, side), 1)  # Lanczos
        assert (np.array(expected) == pathfinder.shrink(image, side)).all()


def test_angles_contrasts_and_markers_are_those_of_the_original():
    margins = {32: 1, 64: 1, 128: 3, 256: 3}
    brushes = [pathfinder.make_brush(*each) for each in margins.items()]
    assert [brush.usable.sum() for brush in brushes] == [30, 95, 360, 360]
    small, brush, *_ = brushes
    assert np.allclose(np.rad2deg(pathfinder.FREE_ANGLES[small.usable]), np.arange(-150, -120))
    assert np.allclose(small.distractor_line[1], 4 / 3 * small.line[1])
    assert np.allclose(brush.distractor_line[1], brush.line[1])
    assert brush.line[1].max() == pytest.approx(0.8 * 255, rel=0.01)
    offsets, values = brush.dot
    where = brush.where(brush.window[0] + offsets[0])
    assert np.average(where, axis=0, weights=values[0]) == pytest.approx([-0.25, -0.25], abs=0.02)


def test_label_says_whose_ends_are_marked():
    brush, at, way = next(pathfinder.scenes(np.random.RandomState(0), 64, 6, 64))
    _, labels, markers = pathfinder.paint(np.random.RandomState(0), brush, 6, at, way)
    seen = set()
    for place, label, (first, last) in zip(brush.where(at), labels, markers, strict=True):
        start = [snake for snake in (0, 1) if (place[snake] == first).all()]
        end = [snake for snake in (0, 1) if (place[10 + snake] == last).all()]
        assert len(start) == len(end) == 1
        assert label == (start == end)
        seen.add((label, *start))
    assert len(seen) == 4, "the label follows from the snake that is marked first"


def test_segments_keep_clear_of_older_ones():
    """A new segment and the older ones nowhere fill a pixel 1.8 times; the last two are exempt."""
    brush, at, way = next(pathfinder.scenes(np.random.RandomState(0), 64, 9, 32))
    offsets, values = brush.mask
    tightest = 0
    for place, turn in zip(at[:, :18], way[:, :18], strict=True):
        shapes = np.zeros((18, brush.side**2), int)
        for shape, p, t in zip(shapes, place, turn, strict=True):
            shape[p + offsets[t]] = values[t]
        both = [(shapes[i] + shapes[: i - 2].max(0)).max() for i in range(3, 18)]
        tightest = max(tightest, *both)
    assert 400 < tightest < 1.8 * 255


# ------------------------------------------------------------------------------ data sets on disk


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """1100 pictures, three shards, drawn in one go by this process."""
    return pathfinder.load(tmp_path_factory.mktemp("whole"), 1100, contour=6, processes=1)


def same(ours, theirs):
    return all((a == b).all() for a, b in zip(ours, theirs, strict=True))


def test_after_a_full_disk_the_run_goes_on(whole, tmp_path, monkeypatch):
    drawn = []
    saved = []
    draw_shard = pathfinder.draw_shard

    def draw(*job):
        drawn.append(job[-1])
        return draw_shard(*job)

    def fail_in_the_second_shard(_):
        saved.append(1)
        if len(saved) == 3:
            raise OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr(pathfinder, "draw_shard", draw)
    with monkeypatch.context() as patch:
        patch.setattr(pathfinder.os, "fsync", fail_in_the_second_shard)
        with pytest.raises(OSError, match=r"-seed0-v3/images\.npy: .*No space left"):
            pathfinder.load(tmp_path, 1100, contour=6, processes=1)
    assert same(pathfinder.load(tmp_path, 1100, contour=6, processes=1), whole)
    assert drawn == [0, 1, 1, 2], "the finished shard is drawn again, or another is not"
    assert len({image.tobytes() for image in whole[0]}) == 1100, "shards hold the same pictures"
    (folder,) = tmp_path.iterdir()
    assert folder.name == "pathfinder32-6-1100-seed0-v3", "named by the version of the generator"
    assert sorted(path.name for path in folder.iterdir()) == ["images.npy", "labels.npy"]


@pytest.mark.dist
def test_two_scripts_without_a_guard_may_draw_the_same_pictures_at_once(whole, tmp_path):
    script = tmp_path / "script.py"
    code = "import pathfinder; print('once'); pathfinder.load('data', 1100, 32, 6, processes=2)"
    script.write_text(code)
    options = dict(cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    command = [sys.executable, script]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, **options) for _ in "ab"]
    for process in both:
        assert process.communicate()[0].split() == [b"once"], "a drawing process ran the script"
    assert same(pathfinder.load(tmp_path / "data", 1100, contour=6, processes=1), whole)
    assert len(list((tmp_path / "data").iterdir())) == 1


@pytest.mark.dist
def test_drawing_processes_end_with_their_parent(tmp_path):
    command = [sys.executable, "pathfinder.py", "256", "--n", "100000", "--processes", "2"]
    command += ["--data-dir", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not list(tmp_path.glob("*/labels.npy")):
        time.sleep(0.1)
    time.sleep(1)  # until they draw
    process.kill()
    process.communicate(timeout=30)  # waits for all processes that hold the pipes


def test_another_process_may_be_faster(tmp_path):
    """What it made stays; otherwise, a part that cannot be renamed is an error."""
    path = tmp_path / "x"
    with pathfinder.appearing(path) as part:
        part.mkdir()
        path.mkdir()
        (path / "whole").touch()
    assert (path / "whole").exists()
    with pytest.raises(FileNotFoundError), pathfinder.appearing(tmp_path / "y"):
        pass


def test_every_seed_gives_other_pictures(tmp_path):
    sets = [pathfinder.load(tmp_path, 20, seed=seed) for seed in (0, 1, 2**32 - 1)]
    assert len({images.tobytes() for images, _ in sets}) == 3
    assert (sets[0][0].dtype, sets[0][1].dtype) == (np.uint8, np.int64)
    assert (tmp_path / "pathfinder32-14-20-seed0-v3").exists(), "contour 14, if none is given"


def test_large_data_sets_are_memory_mapped(tmp_path):
    n = 2**14 + 1  # sparse: a GiB that takes no space
    np.lib.format.open_memmap(tmp_path / "images.npy", "w+", np.uint8, (n, 256, 256))
    np.save(tmp_path / "labels.npy", np.zeros(n, np.int64))
    images, labels = pathfinder.cached(tmp_path, n, 256, None)
    assert isinstance(images, np.memmap) and len(labels) == n
    assert not isinstance(pathfinder.load(tmp_path, 10, processes=1)[0], np.memmap)


@pytest.mark.parametrize(
    ("name", "content"),
    [("images", np.zeros((9, 32, 32), np.uint8)), ("labels", np.zeros(9)), ("images", None)],
)
def test_damaged_folders_are_named(name, content, tmp_path):
    pathfinder.load(tmp_path, 10, processes=1)
    path = next(tmp_path.glob(f"*/{name}.npy"))
    path.write_bytes(path.read_bytes()[:-1])
    if content is not None:
        np.save(path, content)
    with pytest.raises(ValueError, match=f"{path.parent}: damaged .* delete it"):
        pathfinder.load(tmp_path, 10, processes=1)


@pytest.mark.parametrize(
    "option", "size=33 contour=13 n=0 n=100000001 seed=-1 seed=4294967296 processes=0".split()
)
def test_options_out_of_range_are_refused(option, tmp_path):
    name, value = option.split("=")
    with pytest.raises(ValueError, match=f"{name} {value}.*expected a size of"):
        pathfinder.load(tmp_path, **{"n": 10, name: int(value)})
    assert not list(tmp_path.iterdir())


def test_processes_are_limited_to_the_cpus_one_may_use(monkeypatch):
    monkeypatch.setattr(pathfinder.os, "sched_getaffinity", lambda pid: range(99), raising=False)
    assert pathfinder.usable_cpus() == 99
    monkeypatch.delattr(pathfinder.os, "sched_getaffinity")
    monkeypatch.setattr(pathfinder.os, "cpu_count", lambda: None)
    assert pathfinder.usable_cpus() == 1


def test_command_line_draws_and_checks(tmp_path, capsys):
    assert pathfinder.main(["32", "--n", "20", "--data-dir", str(tmp_path)]) == 0
    assert "(20, 32, 32)" in capsys.readouterr().out
    assert pathfinder.main([]) == 0
    out = capsys.readouterr().out
    assert out.count(" ok\n") == 4
    *rows, last = out.splitlines()[4:]
    assert len(rows) == 32 and len(set(rows)) > 20 and "the ends of" in last


def test_command_line_says_what_is_wrong_in_one_line():
    with pytest.raises(SystemExit, match=r"^pathfinder.py: size 32, contour 14, n 0, .*\Z"):
        pathfinder.main(["32", "--n", "0"])
