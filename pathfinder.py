"""Pathfinder: are the two disks in a picture the ends of one dashed snake, or of two?

Linsley et al. 2018, "Learning long-range spatial dependencies with horizontal gated recurrent
units", arXiv:1805.08315, with the parameters of the Long Range Arena, arXiv:2011.04006v1:
32 or 64 pixels per side, 128 (Path-X) or 256 (PathX-256).

Two dashed snakes of `contour` segments start near the middle of a picture and grow in turn
without touching older segments; then short snakes are added as distractors.  One disk sits on the
start of a snake, the other on the end of the same (label 1) or of the other snake (label 0).

    taken  (n, side^2) uint8   maps of n pictures that grow in lock-step: how occupied, 0 to 255
    at     (n, segments)       place where a segment ends: a flat index into its map
    way    (n, segments)       its direction: one of 360 free angles, or that of a ring place
    pivot  (n, 2)              center (row, column) of the ring of places where it can end

The pictures follow the distribution of the published generator (drewlinsley/pathfinder on
GitHub, with scipy 0.19 and Pillow), including its quirks, which are marked "as published".  The
two differences are marked too; neither shows in the statistics that the tests compare.
Not included: single-segment distractors, which the Long Range Arena does not use.

    python pathfinder.py 32 --n 1000    draws 1000 pictures into a folder below data/:
                                        images.npy (n, 32, 32) uint8, labels.npy (n,) int64
    python pathfinder.py --check        the check table
    python pathfinder.py                the check table and a picture
"""

import argparse
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.lib.format import open_memmap
from tqdm import tqdm

VERSION = "v3"  # generator version: do not compare results across versions
CONTOURS = (6, 9, 14)  # segments per snake: easy, intermediate, hard (the Long Range Arena)
SHARD = 500  # pictures drawn from one seed
MEMORY = 2**22  # bytes of the maps in which snakes grow in lock-step
BATCH = 64  # at least so many pictures get their distractors together
SCALE = 2  # antialiasing: shapes are drawn this much larger, then shrunk
TRIES = 3  # per segment
ATTEMPTS = 5  # per distractor
FREE = 76  # a pixel counts as free for a first segment up to 0.3 * 255
FREE_ANGLES = np.arange(-180, 180) * np.pi / 180  # directions of first segments


class Sheet(NamedTuple):
    """The published parameters of one picture size, in pixels."""

    border: int  # width of the empty border
    length: int  # of a segment ("paddle")
    thickness: float  # of a segment
    margins: tuple[int, ...]  # half the gap between segments; drawn per picture
    seed_distance: int  # between the starts of the two snakes
    marker: float  # radius of the disks
    stiffness: float  # "continuity": a segment bends by at most 90 degrees / stiffness
    paddles: int  # segments of all distractors together, at most
    contrast: float  # of the two snakes; disks have 1
    distractor_contrast: float


SHEETS = {
    32: Sheet(1, 2, 0.5, (1,), 7, 1.5, 1.0, 20, 1.5, 2.0),
    64: Sheet(1, 5, 1.0, (1,), 12, 2.5, 1.8, 22, 0.8, 0.8),
    128: Sheet(1, 5, 1.5, (2, 3), 20, 3.0, 1.8, 35, 0.9, 0.9),
    256: Sheet(22, 5, 2.0, (3,), 27, 5.0, 1.8, 30, 1.0, 1.0),
}


# ------------------------------------------------------------------------------------------ shapes


def unit(angle):
    """Return (sin, cos) of angles (n,): steps of length 1 in (row, column)."""
    # numpy's functions round differently on some processors, and `ceil` below sees the last bit
    return np.array([(math.sin(a), math.cos(a)) for a in angle])


def opposite(angle):
    """Return the angle that points back, from -pi to pi."""
    return angle - np.copysign(np.pi, angle)


FREE_STEPS = unit(FREE_ANGLES)
FREE_STEPS_BACK = unit(opposite(FREE_ANGLES))


def disk(radius, side):
    """Draw a disk around the pixel (side // 2, side // 2): (side, side) bool."""
    y, x = np.mgrid[:side, :side] - side // 2
    return y * y + x * x <= radius * radius


def round_away(x):
    """Round to integers, halves away from 0."""
    return (np.sign(x) * np.floor(np.abs(x) + 0.5)).astype(int)


def bar(side, end, width):
    """Draw a bar from the middle to `end`, (row, column) from the middle: (side, side) bool.

    The pixels are exactly those of a line drawn by Pillow.
    """
    middle = side // 2
    if width == 1:  # one pixel per step along the longer axis
        steps = np.abs(end).max()
        row, column = middle + round_away(np.outer(np.arange(steps + 1) / steps, end)).T
        image = np.zeros((side, side), bool)
        image[row, column] = True
        return image
    # the corners are whole pixels; with an even width, one side of the middle gets more
    across = np.array([end[1], -end[0]]) / np.hypot(*end)
    a = round_away(across * [width // 2, (width - 1) // 2])
    d = round_away(-across * [(width - 1) // 2, width // 2])
    corners = [a, a + end, d + end, d]
    y, x = np.mgrid[:side, :side] - middle
    crossings = []  # of each row with each edge
    for i in range(4):
        y0, x0 = corners[i - 1]
        y1, x1 = corners[i]
        if y0 != y1:  # the ends of a horizontal edge belong to its neighbors too
            crossing = x0 + (y - y0) * (x1 - x0) / (y1 - y0)
            outside = (y - y0) * (y - y1) > 0
            crossings.append(np.where(outside, np.nan, crossing))
    first = np.fmin.reduce(crossings) - 0.5 + 1e-6
    last = np.fmax.reduce(crossings) + 0.5 - 1e-6
    return (first < x) & (x < last)


def dilate(image, radius):
    """Return the maximum over a disk around every pixel of a square image."""
    out = np.zeros_like(image)
    around = np.pad(image, radius)
    for y, x in np.argwhere(disk(radius, 2 * radius + 1)):
        out = np.maximum(out, around[y : y + len(image), x : x + len(image)])
    return out


def shrink(image, side):
    """Resample a square bool image to 0 .. 255 exactly as Pillow does (Lanczos, in integers)."""
    old = (np.arange(len(image)) + 0.5) * (side / len(image))
    new = np.arange(side) + 0.5
    x = old - new[:, None]
    weight = np.sinc(x) * np.sinc(x / 3) * (np.abs(x) < 3)
    weight /= weight.sum(1, keepdims=True)
    weight = np.round(weight * 2**22).astype(np.int64)
    across = np.clip((255 * image @ weight.T + 2**21) >> 22, 0, 255)
    return np.clip((weight @ across + 2**21) >> 22, 0, 255).astype(np.uint8)


# ------------------------------------------------------------------------------------------- stamps


class Brush:
    """Everything that depends on the picture size and the margin alone.

    A map holds the picture inside a rim that is wide enough for every stamp.  Offsets are
    differences of places.  A stamp is a pair (offsets, values) of arrays (ways, pixels); short
    rows repeat an entry.

    tips, turns, weight   (ways, K): the K places where the next segment can end, as offsets from
                          its pivot; its direction; its probability if nothing is taken
    step                  (ways, 2): from a pivot to the next one
    near                  offsets around a tip that should be free
    line, distractor_line stamps: a segment as it is seen
    mask, room            stamp: the pixels a segment takes; how much of each may be taken before
    dot                   stamp: a marker
    blank, window         a map in which only border and rim are taken; the places in the picture
    seed                  (360, pixels): offsets that must be free for a distractor's first segment
    usable                (360,) bool: angles for the first snake and for distractors
    home                  (360, 2): first row and column where the first snake can start
    home_size             (360, 2): number of such rows and columns
    home_angles           angles for which there is such a place
    """

    def __init__(self, size, margin):
        self.sheet = SHEETS[size]
        self.size = size
        self.margin = margin
        self.reach = self.sheet.length + margin  # from a pivot to the end of its segment
        self.radius = self.reach + int(np.ceil(self.sheet.thickness))  # of a stamp
        self.rim = self.radius + 2 * margin + 3
        self.side = size + 2 * self.rim
        self.window = np.flatnonzero(self.frame(0) == 0)  # the places in the picture
        self.blank = self.frame(self.sheet.border)
        self.make_ring()
        masks = self.make_stamps()
        self.make_seeds(masks[: len(FREE_ANGLES)])

    def frame(self, border):
        """Return the map of a picture in which only the border is taken."""
        inside = np.zeros((self.size - 2 * border,) * 2, np.uint8)
        return np.pad(inside, self.rim + border, constant_values=255).ravel()

    def offset(self, steps):
        """Turn steps in rows and columns (..., 2) into differences of places."""
        return steps.astype(np.int64) @ [self.side, 1]

    def place(self, where):
        """Turn rows and columns (..., 2) of the picture into places."""
        return self.offset(where + self.rim)

    def where(self, place):
        """Turn places into rows and columns (..., 2) of the picture."""
        return np.stack(np.divmod(place, self.side), -1) - self.rim

    def make_ring(self):
        """Places where the next segment can end, and their probabilities."""
        arc = np.arange(0, 2 * np.pi, 1 / self.reach)  # steps of one pixel
        ring = np.unique(np.floor(self.reach * unit(arc) + 1e-9), axis=0)
        ring_angle = np.array([math.atan2(y, x) for y, x in ring])
        angle = np.concatenate([FREE_ANGLES, ring_angle])
        self.step = (self.reach + self.margin) * unit(angle)  # from a pivot to the next
        turn = angle[:, None] - ring_angle
        bend = np.abs((turn + np.pi) % (2 * np.pi) - np.pi)
        weight = np.cos(np.minimum(self.sheet.stiffness * bend, np.pi / 2)) ** 2
        # for each direction, keep the possible places only, in order
        impossible = weight <= 1e-9
        most = len(ring) - impossible.sum(1).min()
        kept = np.argsort(impossible, axis=1, kind="stable")[:, :most]
        self.tips = self.offset(ring)[kept]
        self.turns = len(FREE_ANGLES) + kept
        self.weight = np.take_along_axis(weight, kept, 1)
        # a first segment is drawn forward from its start, any other back from its end
        self.drawn = unit(np.concatenate([FREE_ANGLES, opposite(ring_angle)]))
        around = np.argwhere(disk(self.margin, 2 * self.margin + 1))
        self.near = self.offset(around - self.margin)

    def make_stamps(self):
        """Stamps of a segment in each direction and of a marker; returns the masks as images."""
        side = 2 * self.radius + 1
        middle = self.radius * SCALE
        width = max(1, round(self.sheet.thickness * SCALE))
        lines = []
        masks = []
        for step in self.sheet.length * SCALE * self.drawn:
            # as published, ceil of the sum: rounding errors in sin and cos move some ends
            end = np.ceil(middle + step).astype(int) - middle
            segment = bar(2 * middle + 1, end, width)
            lines.append(shrink(segment, side))
            masks.append(shrink(dilate(segment, self.margin * SCALE), side))
        self.mask = self.stamp(masks)
        offsets, values = self.stamp(lines)
        self.line = (offsets, values * self.sheet.contrast)
        self.distractor_line = (offsets, values * self.sheet.distractor_contrast)
        # a segment collides where old + new >= 1.8 * 255
        self.room = 458 - self.mask[1].astype(np.int16)
        # as published, the center of a marker lies a quarter of a pixel up and left
        # differs from the published code: next to an edge, its disks differ by up to 13 of 255
        side = 2 * int(np.ceil(self.sheet.marker)) + 7
        large = np.pad(disk(self.sheet.marker * SCALE, side * SCALE - 1), (0, 1))
        self.dot = self.stamp([shrink(large, side)])
        return masks

    def stamp(self, images):
        """Return offsets and values (n, pixels) of the nonzero pixels of n square images."""
        most = np.arange(max(np.count_nonzero(image) for image in images))
        offsets = []
        values = []
        for image in images:
            pixels = np.argwhere(image)
            pixels = pixels[most % len(pixels)]
            offsets.append(self.offset(pixels - len(image) // 2))
            values.append(image[pixels[:, 0], pixels[:, 1]])
        return np.stack(offsets), np.stack(values)

    def make_seeds(self, masks):
        """Where first segments can lie.

        As published, the pixels that must be free are those that the mask fills completely,
        shifted by one pixel down and right.  For the first snake and for distractors, an angle is
        never used if, at some corner of the picture, all of them lie outside: at size 32 this
        leaves 30 of 360 angles.
        """
        outer = self.radius - self.reach
        shifted = slice(outer - 1, outer + 2 * self.reach)
        full = np.stack(masks) == 255
        self.seed, _ = self.stamp(full[:, shifted, shifted])
        seed = self.where(self.window[0] + self.seed)  # (360, pixels, 2) rows and columns
        self.usable = np.ones(len(seed), bool)
        for corner in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
            inside = (seed * corner >= 0).all(2)
            self.usable &= inside.any(1)
        # the first segment of the first snake stays 2 seed_distance away from all edges
        border = 2 * self.sheet.seed_distance
        self.home = border - seed.min(1)  # first row and column
        self.home_size = self.size - 2 * border - np.ptp(seed, 1)
        has_home = (self.home_size > 0).all(1)
        self.home_angles = np.flatnonzero(self.usable & has_home)


make_brush = cache(Brush)


def look(maps, row, place):
    """Return the pixels of maps (n, side^2) at places; row and place broadcast."""
    return maps.reshape(-1)[row * maps.shape[1] + place]


def press(maps, row, place, stamp, which):
    """Put rows `which` of a stamp on maps (n, side^2), in place: the larger value wins."""
    offsets, values = stamp
    pixels = (row * maps.shape[1] + place)[:, None] + offsets[which]
    flat = maps.reshape(-1)
    flat[pixels] = np.maximum(flat[pixels], values[which])


# ------------------------------------------------------------------------------------------- growth


def snake_pairs(rng, brush, contour, n):
    """Yield batches (taken, at, way) of n pairs of snakes; at and way are (batch, 2 contour)."""
    lanes = MEMORY // len(brush.blank)
    taken = np.empty((lanes, len(brush.blank)), np.uint8)
    batch = []
    waiting = 0
    while n > 0:
        taken[:] = brush.blank
        start, way = first_segments(rng, brush, lanes)
        at, way = grow(rng, brush, taken, start, way, contour)
        done = np.flatnonzero(way[:, -1] >= 0)[:n]  # most pairs get stuck
        n -= len(done)
        waiting += len(done)
        batch.append((taken[done], at[done], way[done]))
        if n == 0 or waiting >= BATCH:
            yield [np.concatenate(arrays) for arrays in zip(*batch, strict=True)]
            batch = []
            waiting = 0


def first_segments(rng, brush, n):
    """Draw the first segments of n pairs: starts (row, column) (n, 2, 2), directions (n, 2)."""
    way = rng.randint(0, 360, (n, 2))
    way[:, 0] = rng.choice(brush.home_angles, n)
    home = brush.home[way[:, 0]]
    size = brush.home_size[way[:, 0]]
    first = home + np.floor(size * rng.random_sample((n, 2)))
    around = FREE_STEPS[rng.choice(len(FREE_STEPS), n)]
    second = np.round(first + brush.sheet.seed_distance * around)
    return np.stack([first, second], 1), way


def grow(rng, brush, taken, start, way, length):
    """Grow one or two snakes of `length` segments in each map, in turn; writes to `taken`.

    start (n, snakes, 2), rows and columns, and way (n, snakes) describe the first segments.
    Returns at and way (n, snakes * length) with segment i of snake s in column snakes * i + s.
    `at` is the start of a first segment and the end of any other; way is -1 after a failure.
    """
    n, snakes = way.shape
    later = np.full((n, snakes * (length - 1)), -1)
    at = np.concatenate([brush.place(start), later], 1)
    forward = FREE_STEPS[way]
    back = FREE_STEPS_BACK[way]
    way = np.concatenate([way, later], 1)
    # as published, ceil of the sum: near 0 the rounding error of sin and cos moves it by a pixel
    end = np.ceil(start + brush.sheet.length * forward)
    pivot = np.ceil(end + brush.reach * back)  # (n, snakes, 2)
    row = np.arange(n)
    for i in range(snakes, snakes * length):
        snake = i % snakes
        last = way[row, i - snakes]
        tip, turn, ahead = extend(rng, brush, taken, row, pivot[row, snake], last)
        ok = turn >= 0
        row = row[ok]
        at[row, i] = tip[ok]
        way[row, i] = turn[ok]
        pivot[row, snake] = ahead[ok]
        # mark the previous segment only now, because neighbors in a snake may touch
        press(taken, row, at[row, i - snakes], brush.mask, last[ok])
    # as published, the last segment of the first of two snakes is never marked
    press(taken, row, at[row, -1], brush.mask, way[row, -1])
    return at, way


def extend(rng, brush, taken, row, pivot, way):
    """Draw the next segment in some rows of `taken`: tips, directions (-1: none fits), pivots.

    The pivot moves straight on by one segment and gap.  The tip is drawn from the ring around it
    with probability proportional to cos^2(stiffness * bend) and to how free its surroundings are.
    It is rejected if the segment, which runs back from the tip, collides with another one.
    """
    ahead = np.ceil(pivot + brush.step[way])
    tips = brush.place(ahead)[:, None] + brush.tips[way]  # (rows, K)
    around = tips + brush.near[:, None, None]
    near = look(taken, row[:, None], around).max(0)
    weight = np.cumsum(brush.weight[way] * (255 - near), 1)
    tip = np.zeros(len(row), np.int64)
    turn = np.full(len(row), -1)
    todo = np.flatnonzero(weight[:, -1] > 1e-4 * 255)  # else there is no free place
    for _ in range(TRIES):
        drawn = rng.random_sample(len(todo)) * weight[todo, -1]
        choice = (weight[todo] <= drawn[:, None]).sum(1)
        tip[todo] = tips[todo, choice]
        new = brush.turns[way[todo], choice]
        pixels = tip[todo, None] + brush.mask[0][new]
        before = look(taken, row[todo, None], pixels)
        fits = (before <= brush.room[new]).all(1)
        turn[todo[fits]] = new[fits]
        todo = todo[~fits]
    return tip, turn, ahead


def distract(rng, brush, taken, length):
    """Add short snakes: at and way (n, snakes * length), way -1 where one did not fit."""
    n = len(taken)
    count = brush.sheet.paddles // length
    at = np.zeros((n, count, length), np.int64)
    way = np.full((n, count, length), -1)
    for snake in range(count):
        todo = np.arange(n)
        for _ in range(ATTEMPTS):
            start, angle, found = free_starts(rng, brush, taken[todo])
            tried = todo[found]
            maps = taken[tried]
            new_at, new_way = grow(rng, brush, maps, start[:, None], angle[:, None], length)
            good = new_way[:, -1] >= 0
            grown = tried[good]
            at[grown, snake] = new_at[good]
            way[grown, snake] = new_way[good]
            taken[grown] = maps[good]
            todo = np.setdiff1d(todo, grown)
    return at.reshape(n, -1), way.reshape(n, -1)


def free_starts(rng, brush, taken):
    """Draw free first segments: starts (m, 2), angles (m,), and the rows (m,) that have one."""
    # differs from the published code: where a segment would leave the picture, the published code
    # draws angle and place again, here only the place (under 5 % of them, none at size 32)
    angle = rng.randint(0, 360, len(taken))
    place = np.full(len(taken), -1)
    todo = np.flatnonzero(brush.usable[angle])
    # try 20 random places first: usually one is free
    tried = rng.choice(brush.window, (len(todo), 20))
    pixels = tried[..., None] + brush.seed[angle[todo], None]
    free = (look(taken, todo[:, None, None], pixels) <= FREE).all(2)
    some = free.any(1)
    place[todo[some]] = tried[some, free[some].argmax(1)]
    for row in todo[~some]:  # otherwise look at all places
        pixels = brush.window[:, None] + brush.seed[angle[row]]
        free = (taken[row, pixels] <= FREE).all(1)
        if free.any():
            place[row] = rng.choice(brush.window[free])
    found = np.flatnonzero(place >= 0)
    return brush.where(place[found]), angle[found], found


# ----------------------------------------------------------------------------------------- pictures


def scenes(rng, size, contour, n):
    """Yield n scenes in batches (brush, at, way): the two snakes, then the distractors."""
    margins = SHEETS[size].margins
    counts = np.bincount(rng.randint(0, len(margins), n), minlength=len(margins))
    for margin, count in zip(margins, counts, strict=True):
        brush = make_brush(size, margin)
        for taken, at, way in snake_pairs(rng, brush, contour, count):
            more_at, more_way = distract(rng, brush, taken, contour // 3)
            yield brush, np.hstack([at, more_at]), np.hstack([way, more_way])


def paint(rng, brush, contour, at, way):
    """Return pictures (n, size, size) uint8, labels (n,), markers (row, column) (n, 2, 2)."""
    n, segments = at.shape
    canvas = np.zeros((n, brush.side**2), np.float32)
    for i in range(segments):
        line = brush.line if i < 2 * contour else brush.distractor_line
        drawn = np.flatnonzero(way[:, i] >= 0)
        press(canvas, drawn, at[drawn, i], line, way[drawn, i])

    row = np.arange(n)
    labels, first = rng.randint(0, 2, (2, n))
    second = np.where(labels == 1, first, 1 - first)
    markers = np.stack([at[row, first], at[row, 2 * contour - 2 + second]], 1)
    for marker in markers.T:
        press(canvas, row, marker, brush.dot, 0 * row)

    pictures = canvas[:, brush.window]
    scale = 255 / pictures.max(1, keepdims=True)  # as published, the brightest pixel is 255
    pictures = (pictures * scale + 0.5).astype(np.uint8)
    return pictures.reshape(n, brush.size, brush.size), labels, brush.where(markers)


def draw_pictures(rng, size, contour, n):
    """Draw pictures (n, size, size) uint8, labels (n,), markers (row, column) (n, 2, 2)."""
    parts = []
    for brush, at, way in scenes(rng, size, contour, n):
        parts.append(paint(rng, brush, contour, at, way))
    order = rng.permutation(n)
    return [np.concatenate(arrays)[order] for arrays in zip(*parts, strict=True)]


# ------------------------------------------------------------------------- data sets, kept on disk


def require(ok, message):
    """Raise ValueError unless ok."""
    if not ok:
        raise ValueError(message)


def load(data_dir, n, size=32, contour=14, seed=0, processes=None):
    """Draw n pictures: images (n, size, size) uint8, labels (n,) int64.

    They are kept in a folder in data_dir, see `cached`.  The result does not depend on the number
    of processes (default: one per usable CPU).  Raises ValueError for options out of range.
    """
    known = size in SHEETS and contour in CONTOURS
    in_range = 1 <= n <= 10**8 and 0 <= seed < 2**32 and (processes is None or processes >= 1)
    found = f"size {size}, contour {contour}, n {n}, seed {seed}, processes {processes}"
    sizes = f"a size of {list(SHEETS)}, a contour of {list(CONTOURS)}"
    numbers = "n from 1 to 10^8, a seed from 0 to 2^32 - 1, at least 1 process"
    require(known and in_range, f"{found}: expected {sizes}, {numbers}")
    folder = Path(data_dir) / f"pathfinder{size}-{contour}-{n}-seed{seed}-{VERSION}"
    make = partial(draw_shard, n, size, contour, seed)
    return cached(folder, n, size, make, processes or usable_cpus())


def draw_shard(n, size, contour, seed, i):
    """Draw pictures and labels of shard i: examples i * SHARD .. (i + 1) * SHARD - 1."""
    rng = np.random.RandomState([seed, 3, i])  # same stream in every numpy version
    pictures, labels, _ = draw_pictures(rng, size, contour, min(SHARD, n - i * SHARD))
    return pictures, labels


def cached(folder, n, size, make, processes=1):
    """Return images (n, size, size) and labels (n,) kept in a folder; make missing shards first.

    make(i) returns the pictures and labels of shard i, the same ones every time.  An interrupted
    run resumes where it stopped.  Images above 1 GiB are memory-mapped.
    """
    folder = Path(folder)
    if not folder.exists():
        with naming(folder), appearing(folder) as part:
            part.mkdir()
            open_memmap(part / "images.npy", "w+", np.uint8, (n, size, size))  # zeros
            np.save(part / "labels.npy", np.full(n, -1, np.int64))  # -1: not drawn yet
    images, labels = read(folder, n, size)
    missing = np.unique(np.flatnonzero(labels < 0) // SHARD).tolist()
    if missing:
        run_all(partial(fill, folder, n, make), missing, processes, folder.name)
        images, labels = read(folder, n, size)
    return images, labels


def read(folder, n, size):
    """Return the images and labels of a folder; ValueError if damaged."""
    mode = "c" if n * size * size > 2**30 else None  # "c": torch warns about read-only arrays
    try:
        images = np.load(folder / "images.npy", mode)
        labels = np.load(folder / "labels.npy")
        fits = images.shape == (n, size, size) and labels.shape == (n,)
        require(fits, f"images {images.shape}, labels {labels.shape}")
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: damaged ({error}); delete it and try again") from error
    return images, labels


def fill(folder, n, make, i):
    """Make shard i and write it to its place; the labels go last and mark it as done.

    No lock is needed: two processes that make the same shard write the same bytes.
    """
    pictures, labels = make(i)
    for name, rows in (("images", pictures), ("labels", labels.astype(np.int64))):
        path = folder / f"{name}.npy"
        with naming(path), path.open("r+b") as file:  # a memory map dies on a full disk
            file.seek((i * SHARD - n) * rows[0].nbytes, os.SEEK_END)
            file.write(rows.tobytes())
            file.flush()
            os.fsync(file)


@contextmanager
def naming(path):
    """Add the file's name to an OSError that lacks it, such as "disk full"."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise OSError(f"{path}: cannot write: {error}") from error
        raise


@contextmanager
def appearing(path):
    """Give a temporary path that is renamed to `path` at the end: what is there is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        part = Path(folder) / path.name
        yield part
        try:
            os.replace(part, path)
        except OSError:
            if not path.is_dir():  # else another process was faster: what it made is the same
                raise


def usable_cpus():
    """Return the number of CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_all(function, jobs, processes, name):
    """Call function(job) for all jobs on several processes, with a progress bar."""
    progress = partial(tqdm, desc=name, total=len(jobs), unit=" shards", disable=None)
    processes = min(processes, len(jobs), 61)  # 61: the limit of Windows
    if processes < 2:
        for job in progress(jobs):
            function(job)
        return
    spawn = multiprocessing.get_context("spawn")  # a fork hangs if a thread holds a lock
    main = sys.modules["__main__"]
    with ProcessPoolExecutor(processes, spawn, follow_parent) as pool:
        # A spawned process imports the main module.  Let that be this file: the script of the
        # user may import torch for nothing, or draw again because it has no __main__ guard.
        sys.modules["__main__"] = sys.modules[__name__]
        try:
            done = pool.map(function, jobs)  # starts all processes
        finally:
            sys.modules["__main__"] = main
        for _ in progress(done):
            pass


def follow_parent():
    """End this process with its parent; on Ctrl-C, without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()

    def wait():
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


ERRORS = (ValueError, TypeError, OSError, MemoryError, BrokenProcessPool, KeyboardInterrupt)


def print_anywhere():
    """Let print() escape letters that the console lacks, and let progress bars do without one."""
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")  # as on stderr
    if sys.stderr is None:  # closed, by 2>&-
        sys.stderr = open(os.devnull, "w", encoding="utf-8")


@contextmanager
def one_line_errors(program):
    """End in one line instead of a traceback: bad input, a full disk, Ctrl-C, a closed pipe."""
    print_anywhere()
    try:
        yield
        print(end="", flush=True)
    except BrokenPipeError:  # `| head` has read enough
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())  # for the flush at exit
        sys.exit(1)
    except ERRORS as error:
        sys.exit(f"{program}: {str(error) or 'interrupted'}")


# -------------------------------------------------------------------------------- check and command


def self_check():
    """300 pictures against published statistics, and a second run: (name, error, limit) rows."""
    pictures, labels, _ = draw_pictures(np.random.RandomState(0), 32, 14, 300)
    again, _, _ = draw_pictures(np.random.RandomState(0), 32, 14, 300)
    return [
        ("share of empty pixels / 0.66 - 1", abs((pictures == 0).mean() / 0.66 - 1), 0.02),
        ("mean pixel / 20.2 - 1", abs(pictures.mean() / 20.2 - 1), 0.02),
        ("share of label 1 - 0.5", abs(labels.mean() - 0.5), 0.1),
        ("share of pixels that another run changes", (pictures != again).mean(), 0.0),
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
    """Print one picture of size 32 as text."""
    pictures, labels, _ = draw_pictures(np.random.RandomState(0), 32, 14, 1)
    shades = np.array(list(" .:-=+*#%@"))
    for row in pictures[0] // 26:
        print(" ".join(shades[row]))
    print(f"label {labels[0]}: the two disks are the ends of {2 - labels[0]} snake(s)")


@one_line_errors("pathfinder.py")
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("size", nargs="?", type=int, choices=SHEETS, help="pixels per side")
    parser.add_argument("--n", type=int, default=1000, help="number of pictures")
    parser.add_argument("--contour", type=int, default=14, choices=CONTOURS, help="segments")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--processes", type=int, help="default: one per usable CPU")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where to keep them")
    parser.add_argument("--check", action="store_true", help="print the check table and stop")
    args = parser.parse_args(argv)
    if args.size is None:
        ok = print_table(self_check())
        if not args.check:
            demo()
        return 0 if ok else 1
    options = (args.size, args.contour, args.seed, args.processes)
    images, labels = load(args.data_dir, args.n, *options)
    print(f"images {images.shape}, mean {images.mean():.2f}; share of label 1 {labels.mean():.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
