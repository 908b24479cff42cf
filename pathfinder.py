"""Pathfinder pictures: do the two disks sit on the ends of one dashed snake, or of two?

Linsley et al. 2018, "Learning long-range spatial dependencies with horizontal gated recurrent
units", arXiv:1805.08315, with the parameters of the Long Range Arena, arXiv:2011.04006v1:
32 and 64 pixels, 128 (Path-X), 256 (PathX-256).

Two dashed snakes of `contour` segments start near the middle of the picture and grow in turn
without touching older segments; short snakes distract.  One disk sits on the start of a snake,
the other on the end of the same snake (label 1) or of the other one (label 0).

    pictures that grow in lock-step    lanes      rows of every array below
    a segment: its tip, its direction  at, way    (lanes, segments): place on a map, index in Brush
    what is occupied, 0 .. 255         taken      (lanes * side^2,): the picture inside a rim
    where no tip may lie               near       (lanes * side^2,): taken, dilated by the margin

    python pathfinder.py 32 --n 1000    writes pathfinder32.npz: images (n, 32, 32), labels (n,)
    python pathfinder.py --check        the check table
    python pathfinder.py                the check table and a picture
"""

import argparse
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.lib.format import open_memmap as open_npy
from tqdm import tqdm

VERSION = "v1"  # of the generator: pictures of different versions are different data sets
CONTOURS = (6, 9, 14)  # segments per snake: easy, intermediate, hard (the Long Range Arena)
SHARD = 500  # pictures drawn from one seed
LANES = 256  # pictures that grow in lock-step
SCALE = 2  # shapes are drawn this much larger, then shrunk


class Sheet(NamedTuple):
    """The published parameters of one picture size, in pixels."""

    border: int  # nothing is drawn this close to the edge
    length: int  # of a segment ("paddle")
    thickness: float  # of a segment
    margins: tuple[int, ...]  # half the gap between segments; drawn per picture
    seed_distance: int  # between the starts of the two snakes
    marker: float  # radius of the disks
    stiffness: float  # "continuity": a segment bends by at most 90 degrees / stiffness
    paddles: int  # segments of all distractor snakes together
    contrast: float  # of the segments; disks have 1


SHEETS = {
    32: Sheet(1, 2, 0.5, (1,), 7, 1.5, 1.0, 20, 1.5),
    64: Sheet(1, 5, 1.0, (1,), 12, 2.5, 1.8, 22, 0.6),
    128: Sheet(1, 5, 1.5, (2, 3), 20, 3.0, 1.8, 35, 0.9),
    256: Sheet(22, 5, 2.0, (3,), 27, 5.0, 1.8, 30, 1.0),
}


# ------------------------------------------------------------------------------- shapes and stamps


def unit(angle):
    """(sin, cos): a step of length 1 as (row, column)."""
    return np.stack([np.sin(angle), np.cos(angle)], -1)


def shrink(image, side):
    """Lanczos resampling of a square image of 0 .. 255, rounded to 8 bits after each axis."""
    n = len(image)
    scale = n / side
    x = (np.arange(n) + 0.5) / scale - (np.arange(side)[:, None] + 0.5)
    weight = np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)
    weight /= weight.sum(1, keepdims=True)
    across = np.clip(np.round(image @ weight.T), 0, 255)
    return np.clip(np.round(weight @ across), 0, 255).astype(np.uint8)


def dilate(images, radius):
    """The maximum over a disk around every pixel of (..., side, side)."""
    side = images.shape[-1]
    padding = [(0, 0)] * (images.ndim - 2) + [(radius, radius)] * 2
    around = np.pad(images, padding)
    out = images.copy()
    for y in range(-radius, radius + 1):
        for x in range(-radius, radius + 1):
            if y * y + x * x <= radius * radius:
                rows = slice(radius + y, radius + y + side)
                columns = slice(radius + x, radius + x + side)
                np.maximum(out, around[..., rows, columns], out=out)
    return out


class Brush:
    """Everything that can be stamped on a picture of one size and margin, by direction.

    A direction is an index: 0 .. n_ring - 1 for the places of the ring around a pivot, where a
    next segment ends, then 360 for the free angles of first segments.  Places are flat indices
    into a map of `side` rows, the picture inside a rim that is wide enough for every stamp.
    A stamp is a row of offsets and a row of values; short rows repeat an entry.

    ring    (n_ring,) places around a pivot      weight  (ways, n_ring), how likely each is next
    step    (ways,) from a pivot to the next     pivot   (360,) from the start of a first segment
    line    stamp: what is seen of a segment     mask    stamp: what it occupies
    wide    stamp: where no tip may lie          room    how full the pixels of mask may be before
    dot     stamp: a marker                      blank   (2, side^2) maps of an empty picture
    """

    def __init__(self, size, margin):
        self.sheet = SHEETS[size]
        self.size = size
        self.margin = margin
        self.reach = self.sheet.length + margin  # from a pivot to the tip of its segment
        self.radius = self.reach + int(np.ceil(self.sheet.thickness))  # of a stamp
        self.rim = self.radius + 2 * margin + 3
        self.side = size + 2 * self.rim
        self.free_angle = np.deg2rad(np.arange(360))
        self.make_ring()
        self.make_stamps()
        self.make_borders()

    def flat(self, steps):
        """Rows and columns (n, 2) as flat offsets (n,)."""
        return steps.astype(np.int64) @ [self.side, 1]

    def make_ring(self):
        """Where segments can end, how likely that is, and where the next pivot lies."""
        turns = np.arange(0, 2 * np.pi, 1 / self.reach)  # one pixel of arc
        ring = np.unique(np.floor(self.reach * unit(turns) + 1e-9).astype(int), axis=0)
        self.n_ring = len(ring)
        self.ring = self.flat(ring)
        self.ring_angle = np.arctan2(ring[:, 0], ring[:, 1])
        angle = np.concatenate([self.ring_angle, self.free_angle])
        bend = np.abs((angle[:, None] - self.ring_angle + np.pi) % (2 * np.pi) - np.pi)
        bend = np.minimum(self.sheet.stiffness * bend, np.pi / 2)
        self.weight = np.cos(bend) ** 2
        self.step = self.flat(np.ceil((self.reach + self.margin) * unit(angle) - 1e-9))
        forward = np.ceil(self.sheet.length * unit(self.free_angle))
        back = np.ceil(-self.reach * unit(self.free_angle))
        self.pivot = self.flat(forward + back)

    def make_stamps(self):
        """A segment at each angle, what it covers with its margin, and the disk of a marker."""
        angles = np.concatenate([self.ring_angle + np.pi, self.free_angle])
        large = np.stack([self.segment(angle) for angle in angles])
        lines = self.shrink_all(large)
        masks = self.shrink_all(dilate(large, self.margin * SCALE))
        padding = [(0, 0), (self.margin, self.margin), (self.margin, self.margin)]
        wide = dilate(np.pad(masks, padding), self.margin)
        self.line = self.sparse(lines)
        self.mask = self.sparse(masks)
        self.wide = self.sparse(wide)
        # a segment hits what is there where old + new >= 1.8 of full, that is old > room
        self.room = np.clip(458 - self.mask[1].astype(int), 0, 255).astype(np.uint8)
        self.dot = self.sparse(self.disk()[None])

    def shrink_all(self, images):
        return np.stack([shrink(image, 2 * self.radius + 1) for image in images])

    def segment(self, angle):
        """One enlarged segment that starts in the middle of a square: 0 or 255."""
        reach = self.radius * SCALE
        y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
        sin, cos = unit(angle)
        along = sin * y + cos * x
        across = sin * x - cos * y
        width = max(1, round(self.sheet.thickness * SCALE))
        half = width / 2
        end = self.sheet.length * SCALE + 1e-9
        if width == 1:  # no double pixels
            half *= max(abs(sin), abs(cos))
            end += 0.5 - 1e-9
        inside = (across > 1e-9 - half) & (across < half + 1e-9) & (along > -1e-9) & (along < end)
        return (255 * inside).astype(np.uint8)

    def disk(self):
        radius = int(np.ceil(self.sheet.marker)) + 1
        y, x = np.mgrid[-radius * SCALE : radius * SCALE + 1, -radius * SCALE : radius * SCALE + 1]
        large = 255 * (y * y + x * x <= (self.sheet.marker * SCALE) ** 2)
        return shrink(large, 2 * radius + 1)

    def sparse(self, images):
        """Offsets (n, most) and values (n, most) uint8 of the pixels that are not 0."""
        middle = images.shape[-1] // 2
        most = np.arange((images > 0).sum((1, 2)).max())
        offsets = np.zeros((len(images), len(most)), np.int64)
        values = np.zeros(offsets.shape, np.uint8)
        for i, image in enumerate(images):
            y, x = np.nonzero(image)
            chosen = most % len(y)
            offsets[i] = ((y - middle) * self.side + x - middle)[chosen]
            values[i] = image[y, x][chosen]
        return offsets, values

    def frame(self, border):
        """A map (side, side) that is 255 in the rim and this close to the edge."""
        inside = np.zeros((self.size - 2 * border,) * 2, np.uint8)
        return np.pad(inside, self.rim + border, constant_values=255)

    def make_borders(self):
        """Maps of what is occupied from the start, and where first segments may lie."""
        edge = self.frame(self.sheet.border)
        self.blank = np.stack([edge.ravel(), dilate(edge, self.margin).ravel()])
        self.edge = self.frame(self.sheet.border + 1).ravel()
        self.places = np.flatnonzero(self.edge == 0)
        # the two snakes start in the middle, 2 seed_distance away from all edges
        middle = 2 * self.sheet.seed_distance
        end = np.round(self.sheet.length * unit(self.free_angle)).astype(int)
        self.home = middle - np.minimum(0, end)  # (360, 2) first row and column
        self.home_span = self.size - 2 * middle - np.abs(end)


make_brush = cache(Brush)


# ------------------------------------------------------------------------------------------ growth


class Scene:
    """Maps (2, n, side^2) of n pictures: what is `taken` and, dilated, where no tip may lie."""

    def __init__(self, brush, maps):
        self.brush = brush
        self.maps = np.ascontiguousarray(maps)
        self.taken = self.maps[0].reshape(-1)  # flat views of the same memory
        self.near = self.maps[1].reshape(-1)
        self.base = np.arange(maps.shape[1]) * brush.side**2

    def occupy(self, lanes, at, way):
        """Add the segments of direction `way` at `at` to the pictures `lanes`."""
        press(self.taken, self.base[lanes] + at, self.brush.mask, way)
        press(self.near, self.base[lanes] + at, self.brush.wide, way)


def press(maps, at, stamps, which):
    """Put stamps on flat maps: the larger value wins."""
    offsets, values = stamps
    pixels = at[:, None] + offsets[which]
    maps[pixels] = np.maximum(maps[pixels], values[which])


def snake_pairs(rng, brush, contour, n):
    """Grow n pairs of snakes; yield batches (Scene, at, way), at and way (batch, 2 contour).

    Segment 2 i + s is the i-th of snake s; `at` is its tip (of a first segment the start).
    All lanes take one step at a time; a lane whose snake is stuck starts anew, a finished one is
    handed out and starts anew.  Every pair takes the same number of steps, so there is no
    selection in who finishes first.
    """
    last = 2 * contour
    scene = Scene(brush, np.repeat(brush.blank[:, None], LANES, 1))
    at = np.zeros((LANES, last), np.int64)
    way = np.zeros((LANES, last), np.int64)
    pivot = np.zeros((LANES, 2), np.int64)
    step = np.full(LANES, last)  # "finished": all lanes start below
    lane = np.arange(LANES)
    batch = []
    while n > 0:
        anew = np.flatnonzero(step == last)
        scene.maps[:, anew] = brush.blank[:, None]
        at[anew, :2], way[anew, :2] = first_segments(rng, brush, len(anew))
        pivot[anew] = at[anew, :2] + brush.pivot[way[anew, :2] - brush.n_ring]
        step[anew] = 2

        snake = step % 2
        tip, turn, ahead = extend(rng, scene, lane, pivot[lane, snake], way[lane, step - 2])
        step[turn < 0] = last
        ok = np.flatnonzero(turn >= 0)
        now = step[ok]
        # only now does the segment before count: neighbors in a snake may touch
        scene.occupy(ok, at[ok, now - 2], way[ok, now - 2])
        at[ok, now] = tip[ok]
        way[ok, now] = turn[ok]
        pivot[ok, snake[ok]] = ahead[ok]
        step[ok] += 1

        done = ok[step[ok] == last][:n]
        if len(done) == 0:
            continue
        n -= len(done)
        # as published, the last segment of the second snake counts, that of the first does not
        scene.occupy(done, at[done, last - 1], way[done, last - 1])
        batch.append((scene.maps[:, done], at[done], way[done]))
        if n == 0 or sum(len(ats) for _, ats, _ in batch) >= LANES // 4:
            maps, ats, ways = zip(*batch, strict=True)
            yield Scene(brush, np.concatenate(maps, 1)), np.concatenate(ats), np.concatenate(ways)
            batch = []


def first_segments(rng, brush, n):
    """Starts and directions of the first segments of n pairs, (n, 2) each."""
    angle = rng.randint(0, 360, (n, 2))
    start = brush.home[angle[:, 0]] + (rng.random_sample((n, 2)) * brush.home_span[angle[:, 0]])
    away = brush.sheet.seed_distance * unit(np.deg2rad(rng.randint(0, 360, n)))
    start = brush.rim + start.astype(np.int64)  # (n, 2) row and column
    places = [brush.flat(start), brush.flat(start + np.round(away))]
    return np.stack(places, 1), brush.n_ring + angle


def extend(rng, scene, lanes, pivot, way, tries=3):
    """One more segment in each of the lanes: tip, direction (-1 if none fits), next pivot.

    The pivot moves one segment and gap straight on.  The tip is drawn from the ring around it,
    with probability cos^2(stiffness x bend) where `near` is free, and refused if the segment,
    which runs back from the tip, hits one that is there.
    """
    brush = scene.brush
    ahead = pivot + brush.step[way]
    base = scene.base[lanes] + ahead
    free = 255 - scene.near[base[:, None] + brush.ring]  # (lanes, n_ring)
    weight = np.cumsum(brush.weight[way] * free, 1)
    total = weight[:, -1]
    turn = np.full(len(pivot), -1)
    todo = np.flatnonzero(total > 255e-4)
    for _ in range(tries):
        drawn = rng.random_sample(len(todo)) * total[todo]
        choice = (weight[todo] <= drawn[:, None]).sum(1)
        corner = base[todo] + brush.ring[choice]
        pixels = corner[:, None] + brush.mask[0][choice]
        good = (scene.taken[pixels] <= brush.room[choice]).all(1)
        turn[todo[good]] = choice[good]
        todo = todo[~good]
    return ahead + brush.ring[turn], turn, ahead


def distract(rng, scene, length):
    """Add short snakes: at and way (pictures, snakes x length), way -1 where there is none.

    Each has 5 attempts; where they fail, the picture gets no more.
    """
    n = len(scene.base)
    count = scene.brush.sheet.paddles // length
    at = np.zeros((n, count, length), np.int64)
    way = np.full((n, count, length), -1)
    alive = np.arange(n)
    for snake in range(count):
        todo = alive
        for _ in range(5):
            saved = scene.maps[:, todo]
            at[todo, snake], way[todo, snake] = grow_one(rng, scene, todo, length)
            failed = way[todo, snake, -1] < 0
            scene.maps[:, todo[failed]] = saved[:, failed]
            todo = todo[failed & (at[todo, snake, 0] >= 0)]
        grown = way[alive, snake, -1] >= 0
        way[alive[~grown], snake] = -1
        alive = alive[grown]
    return at.reshape(n, -1), way.reshape(n, -1)


def grow_one(rng, scene, lanes, length):
    """One short snake in each lane: at and way (lanes, length), way -1 from a failure on."""
    brush = scene.brush
    at = np.zeros((len(lanes), length), np.int64)
    way = np.full((len(lanes), length), -1)
    angle = rng.randint(0, 360, len(lanes))
    at[:, 0] = free_places(rng, scene, lanes, angle)
    row = np.flatnonzero(at[:, 0] >= 0)
    way[row, 0] = brush.n_ring + angle[row]
    pivot = at[:, 0] + brush.pivot[angle]
    for i in range(1, length):
        tip, turn, ahead = extend(rng, scene, lanes[row], pivot[row], way[row, i - 1], 1)
        good = turn >= 0
        row = row[good]
        at[row, i] = tip[good]
        way[row, i] = turn[good]
        pivot[row] = ahead[good]
        scene.occupy(lanes[row], at[row, i - 1], way[row, i - 1])
    scene.occupy(lanes[row], at[row, -1], way[row, -1])
    return at, way


def free_places(rng, scene, lanes, angle):
    """A uniform free place for a first segment in each lane, -1 where 100 probes find none."""
    brush = scene.brush
    place = np.full(len(lanes), -1)
    todo = np.arange(len(lanes))
    for _ in range(10):
        probe = brush.places[rng.randint(0, len(brush.places), (len(todo), 10))]
        pixels = probe[:, :, None] + brush.wide[0][brush.n_ring + angle[todo], None]
        base = scene.base[lanes[todo], None, None]
        free = ~(scene.taken[base + pixels] | brush.edge[pixels]).any(2)
        good = free.any(1)
        place[todo[good]] = probe[good, free[good].argmax(1)]
        todo = todo[~good]
    return place


# ---------------------------------------------------------------------------------------- pictures


def paint(rng, brush, contour, at, way):
    """Pictures (n, size, size) uint8, labels (n,), markers (n, 2, 2) of finished scenes."""
    n = len(at)
    row = np.arange(n)
    base = row * brush.side**2
    lines = np.zeros(n * brush.side**2, np.uint8)
    dots = np.zeros(n * brush.side**2, np.uint8)
    for i in range(at.shape[1]):
        there = np.flatnonzero(way[:, i] >= 0)
        press(lines, base[there] + at[there, i], brush.line, way[there, i])
    labels, snake = rng.randint(0, 2, (2, n))
    end = 2 * contour - 2 + np.where(labels == 1, snake, 1 - snake)
    marks = np.stack([at[row, snake], at[row, end]], 1)  # (n, 2) flat
    for mark in marks.T:
        press(dots, base + mark, brush.dot, np.zeros(n, np.int64))
    pictures = np.maximum(lines * brush.sheet.contrast, dots).reshape(n, brush.side, brush.side)
    pictures = np.round(pictures * (255 / pictures.max((1, 2), keepdims=True))).astype(np.uint8)
    inside = slice(brush.rim, -brush.rim)
    markers = np.stack(np.divmod(marks, brush.side), -1) - brush.rim
    return pictures[:, inside, inside], labels, markers


def draw_pictures(rng, size, contour, n):
    """n pictures (n, size, size) uint8, labels (n,), row and column of the markers (n, 2, 2)."""
    margins = SHEETS[size].margins
    counts = np.bincount(rng.randint(0, len(margins), n), minlength=len(margins))
    parts = []
    for margin, count in zip(margins, counts, strict=True):
        brush = make_brush(size, margin)
        for scene, at, way in snake_pairs(rng, brush, contour, count):
            more_at, more_way = distract(rng, scene, contour // 3)
            at = np.concatenate([at, more_at], 1)
            way = np.concatenate([way, more_way], 1)
            parts.append(paint(rng, brush, contour, at, way))
    order = rng.permutation(n)
    pictures, labels, markers = zip(*parts, strict=True)
    return [np.concatenate(part)[order] for part in (pictures, labels, markers)]


# ------------------------------------------------------------------------- data sets, kept on disk


def generate(n, size=32, contour=14, seed=0, processes=None):
    """Draw n pictures: images (n, size, size) uint8, labels (n,) int64.

    The same bytes for any number of processes (default: one per usable CPU).  They are spawned:
    a script that calls this needs `if __name__ == "__main__":`.
    Raises ValueError for an unknown size or contour, or n < 1.
    """
    check(n, size, contour)
    draw = partial(draw_shard, n, size, contour, seed)
    shards = list(run_all(draw, range(n_shards(n)), processes, f"pathfinder{size}"))
    images, labels = zip(*shards, strict=True)
    return np.concatenate(images), np.concatenate(labels)


def load(data_dir, n, size=32, contour=14, seed=0, processes=None):
    """The same as `generate`, kept in a folder of data_dir; see `cached`."""
    check(n, size, contour)
    folder = Path(data_dir) / f"pathfinder{size}-{contour}-{n}-seed{seed}-{VERSION}"
    draw = partial(draw_shard, n, size, contour, seed)
    return cached(folder, n, size, draw, processes)


def cached(folder, n, size, make, processes=None):
    """Images (n, size, size) uint8 and labels (n,) from a folder, made there if missing.

    make(i) returns the pictures and labels of shard i; it must be picklable and deterministic.
    A killed run goes on where it stopped.  More than 1 GiB stays on disk, memory-mapped.
    """
    folder = Path(folder)
    if not folder.exists():
        create(folder, n, size)
    done = np.load(folder / "labels.npy").reshape(-1) >= 0
    missing = [i for i in range(n_shards(n)) if not done[i * SHARD : (i + 1) * SHARD].all()]
    for _ in run_all(partial(fill, folder, make), missing, processes, folder.name):
        pass
    images = np.load(folder / "images.npy", mmap_mode="r")
    labels = np.load(folder / "labels.npy")
    if images.shape != (n, size, size) or labels.shape != (n,):
        raise ValueError(f"{folder}: holds other pictures {images.shape}: delete it and try again")
    if images.nbytes <= 2**30:
        images = np.array(images)
    return images, labels


def create(folder, n, size):
    """An empty data set.  Label -1: not drawn yet."""
    part = folder.with_name(f"{folder.name}.part{os.getpid()}")
    part.mkdir(parents=True)
    open_npy(part / "images.npy", "w+", np.uint8, (n, size, size)).flush()
    open_npy(part / "labels.npy", "w+", np.int64, (n,))[:] = -1
    part.rename(folder)


def fill(folder, make, i):
    """Write shard i to its place, the labels last: they say that it is done.

    No lock: two processes that draw the same shard write the same bytes.
    """
    pictures, labels = make(i)
    rows = slice(i * SHARD, i * SHARD + len(labels))
    images = open_npy(folder / "images.npy", "r+")
    images[rows] = pictures
    images.flush()
    open_npy(folder / "labels.npy", "r+")[rows] = labels


def draw_shard(n, size, contour, seed, i):
    """The pictures and labels of shard i."""
    rng = np.random.RandomState([seed, 3, i])
    pictures, labels, _ = draw_pictures(rng, size, contour, min(SHARD, n - i * SHARD))
    return pictures, labels


def n_shards(n):
    return -(-n // SHARD)


def check(n, size, contour):
    if size not in SHEETS or contour not in CONTOURS or n < 1:
        raise ValueError(
            f"size {size}, contour {contour}, n {n}: size must be one of {list(SHEETS)}, "
            f"contour one of {CONTOURS}, n at least 1"
        )


def usable_cpus():
    """How many processes may run at once: the CPUs this process may use, at most 61 (Windows)."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    return min(count, 61)


def run_all(function, jobs, processes, name):
    """Yield function(job) of every job in order, on several processes, with a progress bar."""
    processes = min(processes or usable_cpus(), len(jobs))
    bar = partial(tqdm, desc=name, total=len(jobs), unit=" shards", disable=None)
    if processes <= 1:
        yield from bar(map(function, jobs))
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn) as pool:
        yield from bar(pool.map(function, jobs))


# -------------------------------------------------------------------------------- check and command


def self_check():
    """(name, error, limit): what the published pictures look like, and label 1 as often as 0."""
    pictures, labels, markers = draw_pictures(np.random.RandomState(0), 32, 14, 300)
    row = np.arange(len(labels))[:, None]
    at_marker = pictures[row, markers[..., 0], markers[..., 1]]
    again, _ = generate(300, processes=1)
    twice, _ = generate(300, processes=1)
    return [
        ("empty pixels / .66 - 1", abs((pictures == 0).mean() / 0.66 - 1), 0.1),
        ("mean pixel / 20 - 1", abs(pictures.mean() / 20 - 1), 0.1),
        ("share of label 1 - 1/2", abs(labels.mean() - 0.5), 0.1),
        ("share of markers without a disk", (at_marker < 160).mean(), 0.0),
        ("same seed, same pictures: share that differs", (again != twice).mean(), 0.0),
    ]


def print_table(rows):
    """Print (name, error, limit) rows; return True if every error is within its limit."""
    ok = True
    for name, error, limit in rows:
        passed = error <= limit  # False for nan
        print(f"  {name:<50}{error:9.1e}{limit:9.0e}   {'ok' if passed else 'FAILED'}")
        ok = ok and passed
    return ok


def demo():
    """Print one 32 x 32 picture as text."""
    images, labels = generate(1, processes=1)
    shades = np.array(list(" .:-=+*#%@"))
    for row in images[0] // 26:
        print("  " + " ".join(shades[row]))
    print(f"label {labels[0]}: the disks (@) sit on the ends of {2 - labels[0]} snake(s)")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("size", nargs="?", type=int, choices=SHEETS, help="pixels per side")
    parser.add_argument("--n", type=int, default=1000, help="number of pictures")
    parser.add_argument(
        "--contour", type=int, default=14, choices=CONTOURS, help="segments per snake"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--processes", type=int, help="default: one per usable CPU")
    parser.add_argument("--out", type=Path, help="file to write (default: pathfinder<size>.npz)")
    parser.add_argument("--check", action="store_true", help="print the check table and stop")
    args = parser.parse_args(argv)
    if args.size is None:
        ok = print_table(self_check())
        if not args.check:
            demo()
        return 0 if ok else 1
    if args.n < 1:
        parser.error(f"--n {args.n}: must be at least 1")
    images, labels = generate(args.n, args.size, args.contour, args.seed, args.processes)
    path = args.out or Path(f"pathfinder{args.size}.npz")
    np.savez_compressed(path, images=images, labels=labels)
    print(f"{path}: images {images.shape}, mean {images.mean():.2f}, label 1 {labels.mean():.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
