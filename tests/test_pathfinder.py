"""pathfinder.py: the distribution of the published generator, its geometry, data sets on disk."""

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

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
    """The statistics of ORIGINAL but spread, one value for each of n pictures of ours."""
    rng = np.random.RandomState(0)
    batches = []
    for brush, at, way in pathfinder.scenes(rng, size, 14, n):
        pictures, _, _ = pathfinder.paint(rng, brush, 14, at, way)
        bright = pictures > (100 if size == 32 else 80)
        drift = brush.where(at[:, 26]) - brush.where(at[:, 0])
        batch = {
            "empty": (pictures == 0).mean((1, 2)),
            "mean": pictures.mean((1, 2)),
            "parts": np.array([count_parts(picture) for picture in bright]),
            "distractors": (way[:, 28:] >= 0).sum(1) / 4,
            "down": drift[:, 0],
            "right": drift[:, 1],
        }
        batches.append(batch)
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batch}


@pytest.mark.parametrize(("size", "n"), [(32, 800), (64, 30), (128, 40), (256, 100)])
def test_statistics_agree_with_the_original_within_three_standard_errors(size, n):
    ours = measure(size, n)
    ours["spread"] = ours["empty"].std()
    sizes, pictures, *table = [line.split() for line in ORIGINAL.strip().splitlines()]
    column = sizes[1:].index(str(size))
    for name, *numbers in table:
        expected, error = map(float, numbers[2 * column : 2 * column + 2])
        error *= (1 + int(pictures[1 + column]) / n) ** 0.5  # ours has the same spread, n pictures
        z = (ours[name].mean() - expected) / error
        assert abs(z) < 3, f"{name}: {ours[name].mean():.5g}, original {expected}, z {z:.1f}"


@pytest.mark.parametrize(
    ("size", "n", "sha256"),
    [
        (32, 40, "d85b0ae826ea6f4d"),
        (64, 4, "b2725084ecb40db2"),
        (128, 4, "f1de812a4bf2a2c1"),
        (256, 8, "e06d2e0c7a395e4e"),
    ],
)
def test_the_pictures_depend_on_the_seed_alone(size, n, sha256):
    """Results of different days and machines are about the same pictures."""
    found = []
    for seed in (0, 0, 1):
        arrays = pathfinder.draw_pictures(np.random.RandomState(seed), size, 9, n)
        content = b"".join(array.astype(np.int64).tobytes() for array in arrays)
        found.append(hashlib.sha256(content).hexdigest()[:16])
    assert found[0] == found[1] == sha256
    assert found[0] != found[2]


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


@pytest.mark.parametrize(
    ("end", "width", "rows"),
    [
        ((-1, 4), 1, "..### ##..."),
        ((3, 4), 1, "#.... .#... ..##. ....#"),
        ((4, -7), 2, ".......# .....### ....##.. ..##.... ###..... #......."),
        ((-6, 3), 3, "...### ...##. ..###. ..##.. .###.. .##... ###..."),
        ((-4, -2), 4, "...#.. ####.. .####. .####. ..#### ..#..."),
    ],
)
def test_bars_have_the_pixels_of_pillow(end, width, rows):
    image = pathfinder.bar(23, np.array(end), width)
    y, x = np.nonzero(image)
    drawn = np.array([".", "#"])[1 * image[y.min() : y.max() + 1, x.min() : x.max() + 1]]
    assert " ".join("".join(row) for row in drawn) == rows


@pytest.mark.parametrize(("size", "count"), [(32, 30), (64, 95), (128, 360), (256, 360)])
def test_first_segments_have_the_angles_of_the_original(size, count):
    brush = pathfinder.make_brush(size, pathfinder.SHEETS[size].margins[-1])
    angles = np.rad2deg(pathfinder.FREE_ANGLES[brush.usable])
    assert len(angles) == count
    if size == 32:
        assert np.allclose(angles, np.arange(-150, -120))


def test_contrasts_are_those_of_the_original():
    """Size 32: distractors are 4/3 as bright as the snakes.  Size 64: all have 0.8."""
    for size, ratio in ((32, 4 / 3), (64, 1)):
        brush = pathfinder.make_brush(size, 1)
        assert np.allclose(brush.distractor_line[1], ratio * brush.line[1])
    assert brush.line[1].max() == pytest.approx(0.8 * 255, rel=0.01)


def test_markers_sit_a_quarter_of_a_pixel_up_and_left():
    brush = pathfinder.make_brush(64, 1)
    offsets, values = brush.dot
    where = brush.where(brush.window[0] + offsets[0])
    assert np.average(where, axis=0, weights=values[0]) == pytest.approx([-0.25, -0.25], abs=0.02)


def pairs(size, margin, contour, n):
    """n pairs of snakes without distractors: brush, at, way."""
    brush = pathfinder.make_brush(size, margin)
    parts = pathfinder.snake_pairs(np.random.RandomState(0), brush, contour, n)
    _, at, way = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
    return brush, at, way


def test_label_says_whose_ends_are_marked():
    brush, at, way = pairs(64, 1, 6, 64)
    _, labels, markers = pathfinder.paint(np.random.RandomState(0), brush, 6, at, way)
    assert 0 < labels.sum() < 64
    for place, label, (first, last) in zip(brush.where(at), labels, markers, strict=True):
        start = [snake for snake in (0, 1) if (place[snake] == first).all()]
        end = [snake for snake in (0, 1) if (place[10 + snake] == last).all()]
        assert len(start) == len(end) == 1
        assert label == (start == end)


def test_segments_keep_clear_of_older_ones():
    """A new segment and the older ones nowhere fill a pixel 1.8 times; the last two are exempt."""
    brush, at, way = pairs(64, 1, 9, 32)
    offsets, values = brush.mask
    tightest = 0
    for place, turn in zip(at, way, strict=True):
        shapes = np.zeros((18, brush.side**2), int)
        for shape, p, t in zip(shapes, place, turn, strict=True):
            shape[p + offsets[t]] = values[t]
        both = [(shapes[i] + shapes[: i - 2].max(0)).max() for i in range(3, 18)]
        tightest = max(tightest, *both)
    assert 400 < tightest < 1.8 * 255


def test_markers_alone_say_nothing():
    """Least squares on positions, distance and squares of the two markers: near chance."""
    _, labels, markers = pathfinder.draw_pictures(np.random.RandomState(2), 32, 14, 1200)
    places = markers.reshape(-1, 4) / 32 - 0.5
    apart = np.linalg.norm(places[:, :2] - places[:, 2:], axis=1)
    features = np.column_stack([places, places**2, apart, apart**2, np.ones(1200)])
    weights = np.linalg.lstsq(features[:600], labels[:600] * 2.0 - 1, rcond=None)[0]
    score = ((features[600:] @ weights > 0) == labels[600:]).mean()
    assert score < 0.6


def test_a_killed_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    whole = pathfinder.load(tmp_path / "a", 1100, contour=6, processes=1)
    fill, calls = pathfinder.fill, []

    def killed(*job):
        calls.append(job)
        if len(calls) == 2:
            raise KeyboardInterrupt
        fill(*job)

    monkeypatch.setattr(pathfinder, "fill", killed)
    with pytest.raises(KeyboardInterrupt):
        pathfinder.load(tmp_path / "b", 1100, contour=6, processes=1)
    again = pathfinder.load(tmp_path / "b", 1100, contour=6, processes=1)
    assert len(calls) == 4, "the finished shard is drawn again, or another is not"
    for ours, theirs in zip(again, whole, strict=True):
        assert (ours == theirs).all()
    assert len({image.tobytes() for image in again[0]}) == 1100, "two shards hold the same pictures"
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("b/*/*"))
    folder = "b/pathfinder32-6-1100-seed0-v2"  # named by the version of the generator
    assert names == [f"{folder}/images.npy", f"{folder}/labels.npy"]


def test_every_seed_gives_other_pictures(tmp_path):
    sets = [pathfinder.load(tmp_path, 20, seed=seed) for seed in (0, 1, 2**32 - 1)]
    assert len({images.tobytes() for images, _ in sets}) == 3
    assert all(images.dtype == np.uint8 and labels.dtype == np.int64 for images, labels in sets)
    assert (tmp_path / "pathfinder32-14-20-seed0-v2").exists(), "contour 14, if none is given"


@pytest.mark.dist
def test_a_script_without_a_guard_gets_the_same_pictures_from_two_processes(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import pathfinder\n"
        "print('once')\n"
        "pathfinder.load('two', 600, contour=6, seed=5, processes=2)\n"
    )
    path = {**os.environ, "PYTHONPATH": str(ROOT)}
    output = subprocess.check_output([sys.executable, script], cwd=tmp_path, env=path)
    assert output.split() == [b"once"], "the drawing processes run the script again"
    one, _ = pathfinder.load(tmp_path / "one", 600, contour=6, seed=5, processes=1)
    two, _ = pathfinder.load(tmp_path / "two", 600, contour=6, seed=5, processes=1)
    assert (one == two).all()


@pytest.mark.dist
def test_two_processes_may_make_the_same_pictures_at_once(tmp_path):
    code = "import pathfinder, sys; x, y = pathfinder.load(sys.argv[1], 600, processes=1); "
    code += "print(x.sum(), y.sum(), y.min())"
    command = [sys.executable, "-c", code, str(tmp_path)]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in "ab"]
    outputs = [process.communicate(timeout=300)[0] for process in both]
    assert outputs[0] == outputs[1] and outputs[0].split()[2] == "0"
    assert len(list(tmp_path.iterdir())) == 1


def test_after_a_full_disk_the_run_goes_on(tmp_path, monkeypatch):
    whole = pathfinder.load(tmp_path / "a", 600, contour=6, processes=1)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pathfinder.os, "fsync", full)
        with pytest.raises(OSError, match=r"-v2/images\.npy: .*No space left"):
            pathfinder.load(tmp_path / "b", 600, contour=6, processes=1)
    again = pathfinder.load(tmp_path / "b", 600, contour=6, processes=1)
    assert all((ours == theirs).all() for ours, theirs in zip(again, whole, strict=True))


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
    "option",
    [
        "size 33",
        "contour 13",
        "n 0",
        "n 10000000000000",
        "seed -1",
        "seed 4294967296",
        "processes 0",
    ],
)
def test_options_out_of_range_are_refused(option, tmp_path):
    name, value = option.split()
    with pytest.raises(ValueError, match=f"{option}.*expected a size of"):
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


@pytest.mark.parametrize("option", ["--n 0", "--seed -1", "--processes 0", "--data-dir FILE"])
def test_command_line_says_what_is_wrong_in_one_line(option, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stopped:
        pathfinder.main(["32", *option.replace("FILE", f"{tmp_path}/file").split()])
    assert stopped.value.code.startswith("pathfinder.py: ")
    assert "\n" not in stopped.value.code
