"""The Long Range Arena tasks as numpy arrays: generated or loaded, checked, without TensorFlow.

    python lra_data.py                     check table and timing, about 20 s of one core
    python lra_data.py --list              every task: size, origin, what is on disk
    python lra_data.py listops-tiny --show     about 2 s, prints:

        listops-tiny: 10 classes, 15 symbols
          train  20,000 examples, length 17 .. 38 .. 127, label shares 0.091 .. 0.118
          ...
          without a model: most frequent label 11.2 %, by first token 24.9 %, by length 11.6 %
          sha256 424e90f8e7aa273d6037247d504f7ceb8b323f14e98696bad3d0c4a1c85388a7

Tay et al. 2020, "Long Range Arena", arXiv:2011.04006v1. `load(task)` gives a `Data` with three
`Split`s; the same task, options and seed give the same bytes, whatever the number of processes.

generated   lattice, listops, listops-small, listops-tiny, pathfinder{32,64,128,256} and their
            -medium and -easy (128 is Path-X, 256 PathX-256). Kept under `data_dir`.
read        text, retrieval, image, speech and their variants, from the published files: a
            directory or tar archive given as `source`, or what --download left in `data_dir`.
            listops and pathfinder read published files too when they are given a `source`.

A section a task; what several share comes first. Every bad file is a ValueError that names it, the
line or the numbers, and what was expected. png and wav files are read with the standard library
(zlib, wave): the tasks use one kind of each. Pickles are never loaded.

Validation is never test: where no split was published, a tenth of train is held out by the seed.
Not included: augmentation, tokenisers, the ten-word speech task, TFRecords.
"""

import argparse
import hashlib
import http.client
import lzma
import math
import multiprocessing
import operator
import os
import shutil
import struct
import sys
import tarfile
import tempfile
import time
import tokenize
import urllib.request
import wave
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import count, pairwise
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Split:
    """One split. n examples, the longest has L positions.

    tokens: (n, L) uint8 symbols, or (n, L, C) uint8 or int16 numbers in C channels; zero padded.
    labels: (n,) int64, 0 .. n_classes - 1.   lengths: (n,) int32, how many positions are real.
    Retrieval has two documents an example: tokens (n, 2, L), lengths (n, 2).
    """

    tokens: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray

    def __len__(self):
        return len(self.labels)


@dataclass(frozen=True)
class Data:
    """A task. `mean` and `std` None: tokens are symbols 0 .. vocab_size - 1, to be embedded.

    Otherwise tokens are numbers, one mean and std a channel, and a model reads (x - mean) / std;
    `vocab_size` is then the number of values a number can take (256 for pixels), None for sound.
    """

    name: str
    train: Split
    val: Split
    test: Split
    vocab_size: int | None
    n_classes: int
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    symbols: tuple[str, ...] | None = None  # how token i is written, where tokens are symbols


# --------------------------------------------------------------------- files, arrays and the cache

UNREADABLE = (OSError, EOFError, KeyError, ValueError, zlib.error, lzma.LZMAError, wave.Error)
UNREADABLE += (tarfile.TarError, zipfile.BadZipFile, http.client.HTTPException)
UNREADABLE += (RuntimeError, TypeError, tokenize.TokenError)  # of readers, on damaged headers


@contextmanager
def naming(path, expected):
    """What goes wrong inside becomes a ValueError that names the file and what was expected."""
    try:
        yield
    except UNREADABLE as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path}: damaged or missing ({reason}), expected {expected}") from error


@contextmanager
def appearing(path):
    """Gives a temporary name for a file or folder that is renamed to `path` at the end.

    So what stands at `path` is whole, even after a kill. Of two processes that make the same
    folder, the slower one leaves that of the faster one.
    """
    part = path.with_name(f"{path.name}.part{os.getpid()}-{os.urandom(4).hex()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield part
        try:
            part.replace(path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        part.unlink(missing_ok=True) if part.is_file() else shutil.rmtree(part, ignore_errors=True)


@contextmanager
def alone(folder):
    """One process at a time makes what stands in `folder` (where the system has such locks)."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f"{folder.name}.lock")
    try:
        import fcntl
    except ImportError:  # Windows: no lock
        yield
        return
    while True:
        with open(path, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
            # who had it before has removed the file: then this is not the lock any more
            if path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                try:
                    yield
                finally:
                    path.unlink()
                return


def read_bytes(path):
    with naming(path, "a readable file"):
        return path.read_bytes()


def read_text(path):
    with naming(path, "UTF-8 text"):
        return path.read_bytes().decode()


def read_table(path, columns, header=None):
    """Lines of a tab separated UTF-8 file without quoting, one by one: (line number, fields)."""
    number = 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                fields = line.decode().rstrip("\r\n").split("\t")
                if len(fields) != columns or (number == 1 and header not in (None, fields)):
                    found = f"{len(fields)} columns {line[:60]!r}"
                    raise ValueError(f"{found}, expected {header or columns}")
                if not line.endswith(b"\n"):
                    raise ValueError("no end of line: the file is cut, expected whole lines")
                if number > 1 or header is None:
                    yield number, fields
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}:{number}: {error}") from error
    if number < 1 + (header is not None):
        raise ValueError(f"{path}: no examples, expected {columns} columns, separated by tabs")


def fill(flat, lengths):
    """Rows that lie one after the other, of the given lengths (n,), as one array (n, L, ...)."""
    keep = np.arange(lengths.max(initial=1)) < lengths[..., None]  # (n, L), (n, 2, L) for pairs
    tokens = np.zeros(keep.shape + flat.shape[1:], flat.dtype)
    tokens[keep] = flat
    return tokens


def pad(rows):
    """Rows of different lengths as one zero padded array (n, L, ...), and their lengths (n,)."""
    lengths = np.array([len(row) for row in rows], np.int32)
    return fill(np.concatenate(rows), lengths), lengths


def cut(tokens, labels, lengths, sizes):
    """Consecutive splits of the given sizes."""
    labels, lengths = labels.astype(np.int64), lengths.astype(np.int32)
    stops = pairwise(np.cumsum([0] + list(sizes)))
    return [Split(tokens[a:b], labels[a:b], lengths[a:b]) for a, b in stops]


def hold_out(tokens, labels, lengths, n_test, seed):
    """Splits of (train, test): train is shuffled by the seed and its last tenth becomes val."""
    n = len(labels) - n_test
    if n < 10:
        raise ValueError(f"{n} training examples, expected 10 or more to hold a tenth out")
    order = np.random.RandomState([seed, 5]).permutation(n)
    order = np.concatenate([order, np.arange(n, n + n_test)])
    return cut(tokens[order], labels[order], lengths[order], [n - n // 10, n // 10, n_test])


CACHE = "what was written; delete its folder to make it again"


def cached(folder, make):
    """The three splits in `folder`, one .npz each, without padding; made when it is missing."""
    if not folder.exists():
        splits = make()
        with appearing(folder) as part:
            part.mkdir()
            for name, split in zip(SPLITS, splits, strict=True):
                keep = np.arange(split.tokens.shape[split.lengths.ndim]) < split.lengths[..., None]
                arrays = dict(labels=split.labels, lengths=split.lengths)
                np.savez(part / f"{name}.npz", flat=split.tokens[keep], **arrays)
    return [read_npz(folder / f"{name}.npz") for name in SPLITS]


def read_npz(path):
    with naming(path, CACHE), np.load(path) as file:
        labels, lengths = file["labels"], file["lengths"]
        if len(labels) != len(lengths):
            raise ValueError(f"{len(labels)} labels, {len(lengths)} lengths")
        return Split(fill(file["flat"], lengths), labels, lengths)


def save_npy(path, array):
    with appearing(path) as part, open(part, "wb") as file:
        np.save(file, array)


def read_npy(path):
    """An array; above 1 GiB it stays on disk, memory-mapped."""
    with naming(path, CACHE):
        array = np.lib.format.open_memmap(path, "r")
        return array if array.nbytes > 2**30 else np.array(array)


def fingerprint(name, files):
    """A cache name that changes when one of the files does."""
    stats = [(f.resolve(), f.stat()) for f in files if f.exists()]
    stats = [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    return f"{name}-{hashlib.sha256(repr(stats).encode()).hexdigest()[:16]}"


def run_all(function, jobs, processes, name, total):
    """function(job) for all jobs, on several cores, with a progress bar."""
    processes = min(processes or os.cpu_count(), len(jobs))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(processes, 1), spawn) as pool:  # starts a process only when used
        done = map(function, jobs) if processes < 2 else pool.map(function, jobs)
        for _ in tqdm(done, name, total, unit=" shards", initial=total - len(jobs), disable=None):
            pass


# ------------------------------------------------------------------------- archives and their files


class Remote(NamedTuple):
    """A published archive. sha256: as other loaders have it; None when nobody published one."""

    url: str
    sha256: str | None


RELEASE = Remote("https://storage.googleapis.com/long-range-arena/lra_release.gz", None)
CIFAR = Remote(
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
)
IMDB = Remote(
    "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
    "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe",
)
SPEECH = Remote(
    "http://download.tensorflow.org/data/speech_commands_v0.02.tar.gz",
    "af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58",
)


def find(source, data_dir, remote, name, *folders):
    """The path `name`, in one of the folders or at the top of `source`: a directory or tar archive.

    Without source: under data_dir, or in the archive that --download leaves there. The release
    holds some folders twice: the inner tree comes first, its copies outside differ.
    """
    root = Path(data_dir if source is None else source)
    archive = root / remote.url.split("/")[-1]
    if root.is_file():
        root = unpack(root, data_dir)
    names = [f"{folder}/{name}" for folder in folders] + [name]
    for above in ("lra_release/lra_release", "lra_release", ""):
        for candidate in names:
            if (root / above / candidate).exists():
                return root / above / candidate
    if source is None and archive.exists():
        return find(archive, data_dir, remote, name, *folders)
    raise ValueError(f"{root}: expected one of {', '.join(names)} in it; published as {remote.url}")


def unpack(archive, data_dir):
    """Unpacks a tar archive under data_dir, once. Refuses all but files and folders inside."""
    target = Path(data_dir) / fingerprint(f"unpacked-{archive.name}", [archive])
    if target.exists():
        return target
    if not hasattr(tarfile, "data_filter"):
        raise ValueError(f"{archive}: expected Python 3.10.12 or newer, which unpacks safely")
    with naming(archive, "a whole tar archive"), appearing(target) as part:
        part.mkdir()
        with tarfile.open(archive) as tar:
            for member in tqdm(tar, desc=archive.name, unit=" files", disable=None):
                path = PurePosixPath(member.name)
                inside = not path.is_absolute() and ".." not in path.parts
                if not (inside and (member.isreg() or member.isdir())):
                    raise ValueError(f"{member.name!r} is no file or folder inside the archive")
                tar.extract(member, part, filter="data")
            while tar.fileobj.read(2**20):
                pass  # to the end, where a compressed file holds its checksum
    return target


def download(remote, data_dir):
    """Fetches an archive into data_dir, where it appears when it is whole and right."""
    path, digest = Path(data_dir) / remote.url.split("/")[-1], hashlib.sha256()
    if path.exists():
        return path
    advice = f"a whole archive. Get it in another way and put it at {path}, or its tree anywhere"
    with naming(remote.url, f"{advice}, and pass --source"), appearing(path) as part:
        with urllib.request.urlopen(remote.url, timeout=60) as answer, open(part, "wb") as file:
            total = int(answer.headers.get("Content-Length") or 0)
            bar = tqdm(total=total or None, desc=path.name, unit="B", unit_scale=True, disable=None)
            while block := answer.read(2**20):
                digest.update(block)
                bar.update(file.write(block))
            bar.close()
        if total not in (0, part.stat().st_size):
            raise OSError(f"{part.stat().st_size} bytes came, expected {total}")
        if remote.sha256 not in (None, digest.hexdigest()):
            raise OSError(f"sha256 {digest.hexdigest()}, expected {remote.sha256}")
    return path


# ------------------------------------------------------------------------------------------ lattice


def lattice(
    name, data_dir, seed, *, distances=(1, 3), sweeps=12, n_train=4000, n_val=1000, n_test=4000
):
    """Binary textures on an 8 x 8 torus, L = 64: at which distance are sites coupled?

    Class c is an Ising model whose sites interact with the four sites `distances[c]` steps away
    along the rows and columns, P(s) ~ exp(.45 sum_<ij> s_i s_j), sampled by `sweeps` Gibbs sweeps
    from noise and turned over by a random global sign: neither the mean nor any single site tells
    the class. The map x -> 3x mod 8 turns distance 1 into 3, so every statistic that ignores
    positions agrees too. Tokens 0 and 1. Not part of the Long Range Arena: it is the task that
    fits a laptop's minutes.
    """
    if len(distances) != 2 or not {*distances} <= {1, 2, 3} or distances[0] == distances[1]:
        # 8 - d is d again, and at 4 both neighbours are one
        raise ValueError(f"distances {distances}: expected two different ones, 1 .. 3")
    sizes = [n_train, n_val, n_test]
    if min(sizes) < 2 or sweeps < 0:
        raise ValueError(f"sizes {sizes}, sweeps {sweeps}: expected sizes >= 2, sweeps >= 0")
    rng = np.random.RandomState([seed, 1])  # its stream is frozen in all versions of numpy
    n = sum(sizes)
    labels = rng.permutation(n) % 2
    tokens = np.zeros((n, 64), np.uint8)
    for c, distance in enumerate(distances):
        spins = gibbs(rng, int((labels == c).sum()), 8, distance, 0.45, sweeps)
        spins *= rng.choice([-1, 1], (len(spins), 1)).astype(np.int8)
        tokens[labels == c] = spins > 0
    return Data(name, *cut(tokens, labels, np.full(n, 64), sizes), vocab_size=2, n_classes=2)


def gibbs(rng, n, side, distance, beta, sweeps):
    """n independent Ising samples, (n, side^2) int8 of +-1.

    Sites are visited one after the other, so any coupling distance is valid (a checkerboard is
    not, for even ones); the samples go in lock-step.
    """
    at = np.arange(side * side).reshape(side, side)
    moves = [(distance, 0), (-distance, 0), (0, distance), (0, -distance)]
    neighbours = np.stack([np.roll(at, move, (0, 1)).ravel() for move in moves], 1)  # (side^2, 4)
    p_up = 1 / (1 + np.exp(-2 * beta * np.arange(-4, 5)))  # by the sum of the four neighbours
    spins = rng.choice([-1, 1], (side * side, n)).astype(np.int8)  # a site is contiguous
    for _ in range(sweeps):
        for site in range(side * side):
            field = spins[neighbours[site]].sum(0, dtype=np.int64)  # (n,)
            spins[site] = 2 * (rng.random_sample(n) < p_up[field + 4]) - 1
    return np.ascontiguousarray(spins.T)


# ------------------------------------------------------------------------------------------ listops

LISTOPS_VOCAB = tuple("0 1 2 3 4 5 6 7 8 9 [MIN [MAX [MED [SM ]".split())  # token i is entry i
MIN, CLOSE = 10, 14  # operators are MIN .. CLOSE - 1


def listops(
    name,
    data_dir,
    seed,
    *,
    above=500,
    below=2000,
    max_depth=10,
    max_args=10,
    n_train=96_000,
    n_val=2_000,
    n_test=2_000,
    source=None,
):
    """ListOps (Nangia & Bowman 2018, arXiv:1804.06028) as in the Long Range Arena: evaluate a tree.

    A node is an operator with probability 1/4, else a digit; the root has depth 1 and a node at
    `max_depth` is a digit; operators have 2 .. max_args arguments; MED is the median rounded down,
    SM the sum modulo 10. Kept are different trees with above < length < below, the length counted
    in tokens `[MIN`, `7`, `]`. The binary parentheses of the published files carry nothing and are
    left out. The answer, 0 .. 9, is the label. 100,000 full-size examples take 23 s of one core.

    source: None generates. A directory or archive with the published `basic_{train,val,test}.tsv`
    reads those and evaluates every tree; ValueError names file and line.
    """
    sizes, limits = [n_train, n_val, n_test], (max_depth, max_args, above, below)
    if source is not None:
        splits = read_listops(source, data_dir)
    elif min(sizes) < 1 or max_depth < 2 or not 2 <= max_args <= 25 or not 1 <= above <= below - 2:
        raise ValueError(
            f"sizes {sizes}, max_depth, max_args, above, below {limits}: expected sizes >= 1, "
            "max_depth >= 2, 2 <= max_args <= 25, 1 <= above <= below - 2"
        )
    else:
        folder = Path(data_dir) / "-".join(map(str, [name, *limits, *sizes, f"seed{seed}"]))
        splits = cached(folder, lambda: cut(*listops_trees(seed, sum(sizes), *limits), sizes))
    return Data(name, *splits, len(LISTOPS_VOCAB), n_classes=10, symbols=LISTOPS_VOCAB)


def listops_trees(seed, n, max_depth, max_args, above, below):
    """n different trees: tokens (n, L) uint8, answers (n,), lengths (n,)."""
    answers = {}  # of each tree, in the order they are found
    with tqdm(total=n, desc="listops", unit=" trees", disable=None) as bar:
        for chunk in count():
            rng = np.random.RandomState([seed, 2, chunk])
            levels, length = grow_trees(rng, 4096, max_depth, max_args, above, below)
            trees = np.split(lay_out(levels), np.cumsum(length)[:-1])
            for tree, answer in zip(trees, evaluate_trees(levels), strict=True):
                answers.setdefault(tree.tobytes(), answer)
            bar.update(min(len(answers), n) - bar.n)
            if len(answers) >= n:
                break
            if chunk >= 20 + len(answers) // 10:
                raise ValueError(
                    f"found {len(answers)} of {n} different trees with {above} < length < {below} "
                    f"among {4096 * (chunk + 1)}: expected wider limits or a smaller set"
                )
    tokens, lengths = pad([np.frombuffer(tree, np.uint8) for tree in list(answers)[:n]])
    return tokens, np.array(list(answers.values())[:n]), lengths


def grow_trees(rng, n_trees, max_depth, max_args, above, below):
    """Random trees, all of them one level at a time.

    Returns levels, a list of (kind, n_args) with the nodes of all trees at that depth, left to
    right: kind (nodes,) uint8 is the token, n_args (nodes,) is 0 for a digit, and the arguments of
    an operator stand together in the next level; and the lengths (n_good,) in tokens.
    A tree that grows too long is dropped on the way. The root is always an operator: trees of one
    digit are too short to be kept, so leaving them out changes no probability.
    """
    tree = np.arange(n_trees)  # which tree a node of the present level belongs to
    length = np.zeros(n_trees, np.int64)
    levels = []
    for depth in range(1, max_depth + 1):
        n = len(tree)
        is_operator = rng.random_sample(n) < (1 if depth == 1 else 0.25 if depth < max_depth else 0)
        n_args = np.where(is_operator, rng.randint(2, max_args + 1, n), 0)
        kind = np.where(is_operator, rng.randint(MIN, CLOSE, n), rng.randint(0, MIN, n))
        length += np.bincount(tree, 1 + is_operator, n_trees).astype(np.int64)  # 1 for its "]"
        n_args[length[tree] >= below] = 0
        levels.append((kind.astype(np.uint8), n_args, tree))
        tree = np.repeat(tree, n_args)
    good = (length > above) & (length < below)
    return [(kind[good[t]], n_args[good[t]]) for kind, n_args, t in levels], length[good]


def evaluate_trees(levels):
    """The value of every root, (trees,) uint8, from the deepest level up."""
    value = levels[-1][0]
    for kind, n_args in levels[-2::-1]:
        at = np.flatnonzero(n_args)
        n = n_args[at]
        column = np.arange(n.max(initial=1))
        inside = column < n[:, None]  # (operators, max_args)
        args = np.full(inside.shape, 10, np.uint8)  # 10 sorts after every digit
        args[inside] = value
        args.sort(1)
        row = np.arange(len(at))
        median = (args[row, (n - 1) // 2] + args[row, n // 2]) // 2
        answers = [args[:, 0], args[row, n - 1], median, (args * inside).sum(1) % 10]
        value = kind.copy()
        value[at] = np.choose(kind[at] - MIN, answers)
    return value


def lay_out(levels):
    """The trees written out in prefix order, one after the other: (their tokens,) uint8."""
    before = [np.zeros(1, np.int64)]  # level by level: tokens under all nodes left of the i-th
    for _, n_args in levels[::-1]:
        first = np.cumsum(n_args) - n_args  # of each node's arguments
        under = before[0][first + n_args] - before[0][first]
        size = 1 + (n_args > 0) + under  # 1 for its "]"
        before.insert(0, np.concatenate([[0], np.cumsum(size)]))
    flat = np.full(before[0][-1], CLOSE, np.uint8)
    place = before[0][:-1]  # of the nodes of the present level
    for (kind, n_args), below in zip(levels, before[1:], strict=True):
        flat[place] = kind
        first = np.cumsum(n_args) - n_args
        place = np.repeat(place + 1 - below[first], n_args) + below[:-1]
    return flat


def listops_value(tokens):
    """The answer of one tree, read token by token with a stack. ValueError when it is no tree."""
    stack = [[]]  # the arguments of the open operators; the operator itself comes first
    for place, token in enumerate(tokens):
        if token < MIN:
            stack[-1].append(token)
        elif token < CLOSE:
            stack.append([token])
        else:
            operator, *args = stack.pop() if len(stack) > 1 else [None]
            if not args:
                raise ValueError(f"token {place}: ']' closes no operator with arguments")
            stack[-1].append(apply(operator - MIN, sorted(args)))
    if len(stack) > 1 or len(stack[0]) != 1:
        found = f"{len(stack) - 1} operators left open, {len(stack[0])} roots"
        raise ValueError(f"{found}: expected 0 and 1")
    return int(stack[0][0])


def apply(operator, args):
    """Operator 0 .. 3 of sorted digits."""
    median = (args[(len(args) - 1) // 2] + args[len(args) // 2]) // 2
    return (args[0], args[-1], median, sum(args) % 10)[operator]


def read_listops(source, data_dir):
    """The published files: a header `Source<tab>Target`, then lines of a tree and its value."""
    first = find(source, data_dir, RELEASE, "basic_train.tsv", "listops-1000", "listops")
    files = [first.with_name(f"basic_{name}.tsv") for name in SPLITS]
    folder = Path(data_dir) / fingerprint("listops-files", files)
    return cached(folder, lambda: [read_listops_file(path) for path in files])


def read_listops_file(path):
    """Trees of a published *.tsv -> rows of ids, labels.  ValueError names the wrong line."""
    index, known = {word: i for i, word in enumerate(LISTOPS_VOCAB)}, " ".join(LISTOPS_VOCAB)
    rows, labels = [], []
    for number, (tree, label) in read_table(path, 2, ["Source", "Target"]):
        words = tree.replace("(", " ").replace(")", " ").split()
        try:
            row = [index[word] for word in words]
            labels.append(listops_value(row))
        except KeyError as error:
            raise ValueError(f"{path}:{number}: unknown token {error}, expected {known}") from None
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not a tree: {error}") from None
        if label != str(labels[-1]):
            value = f"{labels[-1]}, the value of the tree"
            raise ValueError(f"{path}:{number}: label {label!r}, expected {value}")
        rows.append(np.array(row, np.uint8))
    tokens, lengths = pad(rows)
    return Split(tokens, np.array(labels, np.int64), lengths)


# --------------------------------------------------------------------------------------- pathfinder


class Sheet(NamedTuple):
    """The published parameters of one picture size, in pixels.

    contrast is that of the segments, the disks have 1: the published one of the snakes, at 32 and
    64 times that of their segments, .75, which together gives the brightness of the original.
    """

    border: int  # nothing is drawn this close to the edge
    length: int  # of a segment ("paddle")
    thickness: float
    margins: tuple[int, ...]  # about half the gap between segments; one is drawn for each picture
    seed_distance: int  # between the starts of the two snakes
    marker: float  # radius of the two disks
    stiffness: float  # "continuity": a next segment bends by at most 90 degrees / stiffness
    paddles: int  # segments in all distractor snakes
    contrast: float


SHEETS = {
    32: Sheet(1, 2, 0.5, (1,), 7, 1.5, 1.0, 20, 1.5),
    64: Sheet(1, 5, 1.0, (1,), 12, 2.5, 1.8, 22, 0.6),
    128: Sheet(1, 5, 1.5, (2, 3), 20, 3.0, 1.8, 35, 0.9),
    256: Sheet(22, 5, 2.0, (3,), 27, 5.0, 1.8, 30, 1.0),
}
SCALE = 2  # shapes are drawn this much larger, then shrunk
SHARD = 500  # pictures that are drawn from one seed and kept together
LANES = 256  # pictures that grow in lock-step


def pathfinder(
    name, data_dir, seed, *, size=32, contour=14, n=200_000, processes=None, source=None
):
    """Pathfinder (Linsley et al. 2018, arXiv:1805.08315): are the two disks the ends of one snake?

    Two dashed snakes of `contour` segments start near the middle of a size x size picture and grow
    without touching older segments; short snakes distract. One disk sits on the start of a snake,
    the other on the end of the same (label 1) or the other snake (label 0): the label is drawn
    after the geometry. contour 14 is the task of the Long Range Arena, 9 and 6 are easier; size 128
    is Path-X, 256 PathX-256. L = size^2 pixels, row by row, (x - 127.5) / 127.5. Of n pictures 80 %
    train, 10 % validate, 10 % test. Least squares on the places and distance of the disks alone
    scores 53 % at 32 and 64 % at 256 (there the ends of two snakes can lie further apart than a
    snake reaches): measure a model against that, not against 50 %.

    Drawing takes about 1, 50, 40, 7 ms of CPU a picture at 32, 64, 128, 256, most of it at 64 in
    the 900 pairs that get stuck for each that ends. `processes` (default: all cores) share the
    work; they are spawned: a script that calls this needs the usual `if __name__ == "__main__"`.
    A killed run goes on where it stopped. Pictures above 1 GiB stay on disk, memory-mapped.
    source: the published folders of png files and text metadata are read instead.
    """
    if size not in SHEETS or contour not in (6, 9, 14) or n < 10:
        raise ValueError(
            f"size {size}, contour {contour}, n {n}: expected size 32, 64, 128 or 256, "
            "contour 6, 9 or 14, n >= 10"
        )
    if source is None:
        folder = Path(data_dir) / f"pathfinder{size}-{contour}-{n}-seed{seed}"
        plan = partial(plan_drawing, seed, size, contour, n)
    else:
        folder, plan = plan_reading(source, data_dir, seed, size, contour)
    images, labels = make_pictures(folder, size, plan, processes)
    tenth = len(labels) // 10
    sizes = [len(labels) - 2 * tenth, tenth, tenth]
    splits = cut(images, labels, np.full(len(labels), size * size), sizes)
    return Data(name, *splits, 256, 2, (127.5,), (127.5,))


def make_pictures(folder, size, plan, processes):
    """images (n, L, 1) uint8 and labels (n,) in `folder`; what it lacks is made shard by shard.

    plan() gives n and functions, one for each SHARD of the n; these return pictures and labels.
    """
    if not (folder / "images.npy").exists():
        with alone(folder):
            make_missing(folder, size, plan, processes)
    images, labels = read_npy(folder / "images.npy"), read_npy(folder / "labels.npy")
    if images.shape != (*labels.shape, size * size, 1):
        raise ValueError(
            f"{folder}: {images.shape} images, {labels.shape} labels, expected {CACHE}"
        )
    return images, labels


def make_missing(folder, size, plan, processes):
    """What make_pictures finds: another process may have made it meanwhile."""
    if not (folder / "images.npy").exists():
        part = folder / "images.part.npy"
        n, shards = plan()
        if not part.exists():  # labels without their images mean nothing
            for mark in folder.glob("labels-*.npy"):
                mark.unlink()
        if not part.exists():
            with appearing(part) as new:
                np.lib.format.open_memmap(new, "w+", np.uint8, (n, size * size, 1)).flush()
        marks = [folder / f"labels-{first:09}.npy" for first in range(0, n, SHARD)]
        jobs = [(part, *job) for job in zip(marks, shards, strict=True) if not job[0].exists()]
        try:
            run_all(pathfinder_shard, jobs, processes, folder.name, len(shards))
        except ValueError:  # a file that cannot be read: the next try starts anew
            shutil.rmtree(folder)
            raise
        save_npy(folder / "labels.npy", np.concatenate([read_npy(mark) for mark in marks]))
        part.replace(folder / "images.npy")
    for mark in folder.glob("labels-*.npy"):
        mark.unlink(missing_ok=True)


def pathfinder_shard(job):
    """Puts one shard into its place among the images; its labels, written last, say it is done."""
    part, mark, make = job
    first = int(mark.stem.split("-")[1])
    pictures, labels = make()
    images = np.lib.format.open_memmap(part, "r+")
    images[first : first + len(labels)] = pictures.reshape(len(labels), -1, 1)
    images.flush()
    save_npy(mark, labels)


def plan_drawing(seed, size, contour, n):
    """n and what draws it, for make_pictures."""
    return n, [
        partial(draw_shard, [seed, 3, i], size, contour, min(SHARD, n - first))
        for i, first in enumerate(range(0, n, SHARD))
    ]


def draw_shard(seed, *options):
    """One piece of a data set: (pictures, labels)."""
    return draw_pictures(np.random.RandomState(seed), *options)[:2]


def draw_pictures(rng, size, contour, n):
    """n pictures (n, size, size) uint8, labels (n,), row and column of the markers (n, 2, 2)."""
    margins = SHEETS[size].margins
    share = np.bincount(rng.randint(0, len(margins), n), minlength=len(margins))
    parts = []
    for margin, want in zip(margins, share, strict=True):
        brush = make_brush(size, margin)
        for scene, at, way in snake_pairs(rng, brush, contour, want):
            more_at, more_way = distract(rng, scene, contour // 3)
            at, way = np.concatenate([at, more_at], 1), np.concatenate([way, more_way], 1)
            parts.append(paint(rng, brush, contour, at, way))
    order = rng.permutation(n)
    return [np.concatenate(part)[order] for part in zip(*parts, strict=True)]


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
    side, reach = images.shape[-1], range(-radius, radius + 1)
    around = np.pad(images, [(0, 0)] * (images.ndim - 2) + [(radius, radius)] * 2)
    disk = [(y + radius, x + radius) for y in reach for x in reach if y * y + x * x <= radius**2]
    out = images.copy()
    for y, x in disk:
        np.maximum(out, around[..., y : y + side, x : x + side], out=out)
    return out


class Brush:
    """Everything that can be stamped on a picture of one size and margin, by direction.

    A direction is an index: 0 .. n_ring - 1 for the places of the ring around a pivot, where a next
    segment ends, then 360 for the free angles of first segments. Places are flat indices into a map
    of `side` rows, the picture inside a rim that is wide enough for every stamp. A stamp is a row
    of offsets and a row of values; short rows repeat an entry.

    ring    (n_ring,) places around a pivot      weight  (angles, n_ring), how likely each is next
    step    (angles,) from a pivot to the next   pivot   (360,) from the start of a first segment
    line    stamp: what is seen of a segment     mask    stamp: what it occupies
    wide    stamp: where no tip may lie          room    how full the pixels of mask may be before
    dot     stamp: a marker                      blank   (2, side^2) maps of an empty picture
    """

    def __init__(self, size, margin):
        self.sheet = sheet = SHEETS[size]
        self.size = size
        reach = sheet.length + margin
        radius = reach + int(np.ceil(sheet.thickness))
        self.rim = radius + 2 * margin + 3
        self.side = size + 2 * self.rim
        turns = np.deg2rad(np.arange(0, 360, 180 / np.pi / reach))  # one pixel of arc
        ring = np.unique(np.floor(reach * unit(turns) + 1e-9).astype(int), axis=0)
        ring_angle = np.arctan2(ring[:, 0], ring[:, 1])
        free_angle = np.deg2rad(np.arange(360))
        angle = np.concatenate([ring_angle, free_angle])  # of travel
        self.n_ring, self.ring = len(ring), self.flat(ring)
        bend = np.abs((angle[:, None] - ring_angle + np.pi) % (2 * np.pi) - np.pi)
        self.weight = np.cos(np.minimum(sheet.stiffness * bend, np.pi / 2)) ** 2  # (angles, n_ring)
        self.step = self.flat(np.ceil((reach + margin) * unit(angle) - 1e-9))
        first = np.ceil(sheet.length * unit(free_angle)) + np.ceil(-reach * unit(free_angle))
        self.pivot = self.flat(first)  # from the start of a first segment
        self.draw_stamps(np.concatenate([ring_angle + np.pi, free_angle]), margin, radius)
        self.mark_borders(margin)

    def flat(self, steps):
        """(n, 2) rows and columns as flat offsets."""
        return steps.astype(np.int64) @ [self.side, 1]

    def draw_stamps(self, angles, margin, radius):
        """A segment at each angle, what it covers with its margin, and the disk of a marker."""
        sheet = self.sheet
        large = np.stack([self.segment(angle, radius * SCALE) for angle in angles])
        lines, masks = [
            np.stack([shrink(image, 2 * radius + 1) for image in images])
            for images in (large, dilate(large, margin * SCALE))
        ]
        wide = dilate(np.pad(masks, [(0, 0), (margin, margin), (margin, margin)]), margin)
        self.line, self.mask, self.wide = map(self.sparse, (lines, masks, wide))
        # a segment hits what is there where old + new >= 1.8 of full, that is old > room
        self.room = (458 - self.mask[1].astype(int)).clip(0, 255).astype(np.uint8)
        r = int(np.ceil(sheet.marker)) + 1
        y, x = np.mgrid[-r * SCALE : r * SCALE + 1, -r * SCALE : r * SCALE + 1]
        disk = 255 * (y * y + x * x <= (sheet.marker * SCALE) ** 2)
        self.dot = self.sparse(shrink(disk, 2 * r + 1)[None])

    def segment(self, angle, reach):
        """One enlarged segment that starts in the middle of a square: 0 or 255."""
        y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
        sin, cos = unit(angle)
        along, across = sin * y + cos * x, sin * x - cos * y
        width = max(1, round(self.sheet.thickness * SCALE))
        half = width / 2 * (max(abs(sin), abs(cos)) if width == 1 else 1)  # 1: no double pixels
        end = self.sheet.length * SCALE + (0.5 if width == 1 else 1e-9)
        inside = (across > 1e-9 - half) & (across < half + 1e-9) & (along > -1e-9) & (along < end)
        return (255 * inside).astype(np.uint8)

    def sparse(self, images):
        """Offsets (n, most) and values (n, most) uint8 of the pixels that are not 0."""
        r = images.shape[-1] // 2
        most = np.arange((images > 0).sum((1, 2)).max())
        offsets = np.zeros((len(images), len(most)), np.int64)
        values = np.zeros(offsets.shape, np.uint8)
        for i, image in enumerate(images):
            y, x = np.nonzero(image)
            chosen = most % len(y)
            offsets[i] = ((y - r) * self.side + x - r)[chosen]
            values[i] = image[y, x][chosen]
        return offsets, values

    def mark_borders(self, margin):
        """Maps of what is occupied from the start, and where first segments may lie."""
        sheet = self.sheet

        def frame(border):
            inside = np.zeros((self.size - 2 * border,) * 2, np.uint8)
            return np.pad(inside, self.rim + border, constant_values=255)

        edge = frame(sheet.border)
        self.blank = np.stack([edge.ravel(), dilate(edge, margin).ravel()])  # (2, side^2)
        self.frame = frame(sheet.border + 1).ravel()
        self.places = np.flatnonzero(self.frame == 0)
        # the two snakes start in the middle, 2 seed_distance away from all edges
        # differs from the paper: both ends of the segment lie there, not its whole blurred stamp,
        # which hardly ever fits the 4 x 4 pixels that this leaves at size 32
        end = np.round(sheet.length * unit(np.deg2rad(np.arange(360)))).astype(int)
        self.home = 2 * sheet.seed_distance - np.minimum(0, end)  # (360, 2) first row and column
        self.home_span = self.size - 4 * sheet.seed_distance - np.abs(end)


make_brush = cache(Brush)


class Scene:
    """Maps (2, n, side^2) of n pictures: what is `taken` and, dilated, where no tip may lie."""

    def __init__(self, brush, maps):
        self.brush, self.maps = brush, np.ascontiguousarray(maps)
        self.taken, self.near = self.maps.reshape(2, -1)  # flat views of the same memory
        self.base = np.arange(maps.shape[1]) * brush.side**2

    def occupy(self, lanes, at, way):
        """Adds the segments of direction `way` at `at` to the pictures `lanes`."""
        press(self.taken, self.base[lanes] + at, self.brush.mask, way)
        press(self.near, self.base[lanes] + at, self.brush.wide, way)


def press(maps, at, stamps, which):
    """Stamps on flat maps: the larger value wins."""
    offsets, values = stamps
    pixels = at[:, None] + offsets[which]
    maps[pixels] = np.maximum(maps[pixels], values[which])


def snake_pairs(rng, brush, contour, n):
    """Grows n pairs of snakes; yields batches (Scene, at, way), at and way (batch, 2 contour).

    Segment 2 i + s is the i-th of snake s; at is its tip (of a first segment the start), way its
    direction. All lanes take one step at a time; a lane whose snake is stuck starts anew, a
    finished one is handed out and starts anew. Every pair takes the same number of steps, so who
    finishes first is no selection.
    """
    last = 2 * contour
    scene = Scene(brush, np.repeat(brush.blank[:, None], LANES, 1))
    at, way = np.zeros((2, LANES, last), np.int64)
    pivot = np.zeros((LANES, 2), np.int64)
    lane, step = np.arange(LANES), np.full(LANES, last)  # "finished": all lanes start below
    finished = []
    while n > 0:
        anew = np.flatnonzero(step == last)
        scene.maps[:, anew] = brush.blank[:, None]
        at[anew, :2], way[anew, :2] = first_segments(rng, brush, len(anew))
        pivot[anew] = at[anew, :2] + brush.pivot[way[anew, :2] - brush.n_ring]
        step[anew] = 2
        snake = step % 2
        tip, turn, ahead = extend(rng, scene, lane, pivot[lane, snake], way[lane, step - 2], 3)
        stuck, ok = np.flatnonzero(turn < 0), np.flatnonzero(turn >= 0)
        # only now does the segment before count: neighbours in a snake may touch
        scene.occupy(ok, at[ok, step[ok] - 2], way[ok, step[ok] - 2])
        at[ok, step[ok]], way[ok, step[ok]], pivot[ok, snake[ok]] = tip[ok], turn[ok], ahead[ok]
        step[ok] += 1
        step[stuck] = last
        done = ok[step[ok] == last][:n]
        if len(done):
            # as published, the last segment of the second snake counts, that of the first does not
            scene.occupy(done, at[done, last - 1], way[done, last - 1])
            finished.append((scene.maps[:, done], at[done], way[done]))
            n -= len(done)
        if finished and (n == 0 or sum(len(ats) for _, ats, _ in finished) >= LANES // 4):
            maps, ats, ways = zip(*finished, strict=True)
            yield Scene(brush, np.concatenate(maps, 1)), np.concatenate(ats), np.concatenate(ways)
            finished = []


def first_segments(rng, brush, n):
    """Starts and directions of the first segments of n pairs, (2, n, 2), flat places."""
    angle = rng.randint(0, 360, (n, 2))
    start = brush.home[angle[:, 0]] + (rng.random_sample((n, 2)) * brush.home_span[angle[:, 0]])
    away = brush.sheet.seed_distance * unit(np.deg2rad(rng.randint(0, 360, n)))
    start = brush.rim + start.astype(np.int64)  # (n, 2) row and column
    places = [brush.flat(start), brush.flat(start + np.round(away))]
    return np.stack(places, 1), brush.n_ring + angle


def extend(rng, scene, lanes, pivot, way, tries):
    """One more segment for each of the lanes: tip, direction (-1 when none fits) and next pivot.

    The pivot moves one segment and gap straight on; the tip is drawn from the ring around it, with
    probability cos^2(stiffness x bend) where `near` is free, and refused when the segment, which
    runs back from the tip, hits one that is there.
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
        pixels = (base[todo] + brush.ring[choice])[:, None] + brush.mask[0][choice]
        good = (scene.taken[pixels] <= brush.room[choice]).all(1)
        turn[todo[good]] = choice[good]
        todo = todo[~good]
    return ahead + brush.ring[turn], turn, ahead


def distract(rng, scene, length):
    """Adds short snakes: at and way (pictures, snakes x length), way -1 where there is none.

    Each has 5 attempts; where they fail, the picture gets no more.
    """
    # differs from the paper: a first segment keeps a margin (there, it just meets nothing), later
    # ones have one try, and 100 probes without a free place count as crowded (there, less than 1 %
    # of the whole map). So the empty pixels and the mean agree with those of the original.
    n, count = len(scene.base), scene.brush.sheet.paddles // length
    at, way = np.zeros((n, count, length), np.int64), np.full((n, count, length), -1)
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
    at, way = np.zeros((len(lanes), length), np.int64), np.full((len(lanes), length), -1)
    angle = rng.randint(0, 360, len(lanes))
    at[:, 0] = free_places(rng, scene, lanes, angle)
    row = np.flatnonzero(at[:, 0] >= 0)
    way[row, 0] = brush.n_ring + angle[row]
    pivot = at[:, 0] + brush.pivot[angle]
    for i in range(1, length):
        tip, turn, ahead = extend(rng, scene, lanes[row], pivot[row], way[row, i - 1], 1)
        good = turn >= 0
        row = row[good]
        at[row, i], way[row, i], pivot[row] = tip[good], turn[good], ahead[good]
        scene.occupy(lanes[row], at[row, i - 1], way[row, i - 1])
    scene.occupy(lanes[row], at[row, -1], way[row, -1])
    return at, way


def free_places(rng, scene, lanes, angle):
    """A uniform free place for a first segment in each lane, -1 where 100 probes find none."""
    brush, place = scene.brush, np.full(len(lanes), -1)
    todo = np.arange(len(lanes))
    for _ in range(10):
        probe = brush.places[rng.randint(0, len(brush.places), (len(todo), 10))]
        pixels = probe[:, :, None] + brush.wide[0][brush.n_ring + angle[todo], None]
        meets = scene.taken[scene.base[lanes[todo], None, None] + pixels] | brush.frame[pixels]
        free = ~meets.any(2)
        good = free.any(1)
        place[todo[good]] = probe[good, free[good].argmax(1)]
        todo = todo[~good]
    return place


def paint(rng, brush, contour, at, way):
    """Pictures (n, size, size) uint8, labels (n,), markers (n, 2, 2) of finished scenes."""
    n = len(at)
    base, row = np.arange(n) * brush.side**2, np.arange(n)
    lines, dots = np.zeros((2, n * brush.side**2), np.uint8)
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


def plan_reading(source, data_dir, seed, size, contour):
    """The published tree `curv_*/{imgs/<k>/sample_<i>.png, metadata/<k>.npy}`, in an order by seed.

    Returns the folder to keep it in and the plan for make_pictures. One published png is empty
    (pathfinder32/curv_baseline/imgs/0/sample_172.png): an empty file is reported and left out, a
    second one is an error.
    """
    name = "curv_baseline" if contour == 6 else f"curv_contour_length_{contour}"
    folders = f"pathfinder{size}", f"pathfinder/pathfinder{size}"
    found = find(source, data_dir, RELEASE, f"{name}/metadata", *folders)
    tables = sorted(found.glob("*.npy"), key=lambda path: (len(path.name), path.name))

    def plan():
        """How many pictures, and what reads them."""
        rows = [row for table in tables for row in read_metadata(table)]
        empty = [path for path, _ in rows if path.exists() and path.stat().st_size == 0]
        if len(empty) > 1 or len(rows) < 10 + len(empty):
            counts = f"{len(rows)} pictures, {len(empty)} of them empty files {empty[:3]}"
            raise ValueError(f"{found}: {counts}, expected 10 or more and at most one")
        for path in empty:
            print(f"{path}: empty, left out", file=sys.stderr)
        rows = [row for row in rows if row[0] not in empty]
        order = np.random.RandomState([seed, 4]).permutation(len(rows))
        rows = [rows[i] for i in order]
        shards = [rows[first : first + SHARD] for first in range(0, len(rows), SHARD)]
        return len(rows), [partial(read_shard, shard, size) for shard in shards]

    key = fingerprint(f"pathfinder{size}-{contour}-files-seed{seed}", tables)
    return Path(data_dir) / key, plan


def read_metadata(path):
    """(png path, label) of every line: text in spite of the name: folder, file, number, label."""
    for number, line in enumerate(read_text(path).splitlines(), 1):
        fields = line.split()
        if len(fields) < 4 or fields[3] not in ("0", "1", "0.0", "1.0"):
            expected = "folder, file, number, label 0 or 1, ..."
            raise ValueError(f"{path}:{number}: {line[:80]!r}, expected {expected}")
        yield path.parent.parent / fields[0] / fields[1], int(fields[3][0])


def read_shard(rows, size):
    """Pictures (n, size, size) and labels (n,) of rows of (png path, label)."""
    lines = np.stack([read_png(path, size) for path, _ in rows])
    return unfilter(lines), np.array([label for _, label in rows])


PNG = b"\x89PNG\r\n\x1a\n"


def png_head(width, height, colour):
    """8 bits a channel, one channel or, colour 2, three; no interlacing."""
    return struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)


def png_chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def read_png(path, size):
    """The filtered lines (size, 1 + size) of an 8-bit grey png without interlacing, the only kind
    in these files: the standard library suffices.
    """
    content = read_bytes(path)
    chunks, at = [], 8
    while not chunks or chunks[-1][0] != b"IEND":
        stop = at + 12 + int.from_bytes(content[at : at + 4], "big")
        kind, body = content[at + 4 : at + 8], content[at + 8 : stop - 4]
        if content[:8] != PNG or content[at:stop] != png_chunk(kind, body):
            raise ValueError(f"{path}: expected a png file: damaged at byte {at}")
        chunks.append((kind, body))
        at = stop
    if [kind for kind, _ in chunks].count(b"IHDR") != 1 or chunks[0][0] != b"IHDR":
        raise ValueError(f"{path}: starts with {chunks[0]}, expected one header")
    if chunks[0][1] != png_head(size, size, 0):
        raise ValueError(f"{path}: header {chunks[0][1]}, expected {size} x {size}, 8 bit grey")
    data = b"".join(body for kind, body in chunks if kind == b"IDAT")
    with naming(path, "a png file"):
        data = zlib.decompressobj().decompress(data, size * (size + 1) + 1)
    lines = np.frombuffer(data, np.uint8)
    if len(lines) != size * (size + 1) or lines[:: size + 1].max() > 4:
        raise ValueError(f"{path}: {len(lines)} bytes of pixels, expected {size} lines of {size}")
    return lines.reshape(size, size + 1)


def unfilter(lines):
    """Undoes the png filters of many pictures at once: (n, side, 1 + side) -> (n, side, side)."""
    n, side, _ = lines.shape
    out = np.zeros((side + 1, side + 1, n), np.int16)  # a line and a column of zeros come first
    lines = lines.transpose(1, 2, 0)
    for y, x in np.ndindex(side, side):
        left, above, corner = out[y + 1, x], out[y, x + 1], out[y, x]
        near_left, near_above = abs(above - corner), abs(left - corner)
        near_corner = abs(left + above - 2 * corner)
        paeth = np.where(near_above <= near_corner, above, corner)
        paeth = np.where((near_left <= near_above) & (near_left <= near_corner), left, paeth)
        guess = np.choose(lines[y, 0], [0, left, above, (left + above) // 2, paeth])
        out[y + 1, x + 1] = (lines[y, x + 1] + guess) & 255
    return out[1:, 1:].transpose(2, 0, 1).astype(np.uint8)


# -------------------------------------------------------------------------------------------- image


def grey_symbols(rgb):
    """(n, 1024, 3) uint8 -> (n, 1024), as tf.image.rgb_to_grayscale, times 255.5 / 255, cut."""
    return np.floor(rgb @ (np.array([0.2989, 0.5870, 0.1140]) * 255.5 / 255)).astype(np.uint8)


def grey_numbers(rgb):
    """(n, 1024, 3) uint8 -> (n, 1024, 1), as "L" of PIL."""
    grey = (rgb.astype(np.uint32) @ np.array([19595, 38470, 7471], np.uint32) + 32768) >> 16
    return grey.astype(np.uint8)[..., None]


IMAGES = {  # the tokens, and mean and deviation of their channels
    "image": (grey_symbols, None, None),
    "image-real": (grey_numbers, (122.6,), (61.0,)),
    "scifar": (
        np.asarray,
        (255 * 0.4914, 255 * 0.4822, 255 * 0.4465),
        (255 * 0.247, 255 * 0.243, 255 * 0.261),
    ),
}


def image(name, data_dir, seed, *, source=None):
    """CIFAR-10, L = 1024 pixels row by row: 45,000 / 5,000 / 10,000, a tenth of train held out.

    image: grey symbols 0 .. 255, the task of the Long Range Arena. image-real: grey numbers, as
    state-space models read it. scifar: numbers in three channels. Reads the binary version (the
    python version is pickles, which can run code): a record is a label and 3 x 1024 bytes, R, G, B.
    """
    convert, mean, std = IMAGES[name]
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    folders = "cifar-10-batches-bin", "cifar10/cifar-10-batches-bin", "cifar10"
    folder = find(source, data_dir, CIFAR, names[0], *folders).parent
    tokens, labels = [], []
    for path in (folder / file for file in names):
        content = np.frombuffer(read_bytes(path), np.uint8)
        if len(content) == 0 or len(content) % 3073:
            raise ValueError(f"{path}: {len(content)} bytes, expected a multiple of 3073")
        records = content.reshape(-1, 3073)
        if records[:, 0].max() > 9:
            raise ValueError(f"{path}: label {records[:, 0].max()}, expected 0 .. 9")
        tokens.append(convert(records[:, 1:].reshape(-1, 3, 1024).swapaxes(1, 2)))
        labels.append(records[:, 0])
    n_test, labels = len(labels[-1]), np.concatenate(labels)
    lengths = np.full(len(labels), 1024)
    splits = hold_out(np.concatenate(tokens), labels, lengths, n_test, seed)
    return Data(name, *splits, 256, 10, mean, std)


# --------------------------------------------------------------------------------- text, retrieval


def text(name, data_dir, seed, *, characters=False, max_len=4096, min_count=15, source=None):
    """IMDB reviews, positive (1) or negative (0), from the tree aclImdb/{train,test}/{pos,neg}.

    Cut to max_len bytes (0 .. 255) or characters, of which those seen min_count times in train (at
    most the 254 most frequent) are symbols and all others <unk>: both conventions exist. A tenth of
    train is held out for val (many published numbers select on test instead).
    """
    check_texts(max_len, min_count)
    root = find(source, data_dir, IMDB, "train/pos", "aclImdb").parent.parent
    texts, labels, n_train = [], [], 0
    for folder in ("train/neg", "train/pos", "test/neg", "test/pos"):
        files = sorted((root / folder).glob("*.txt"))
        for path in tqdm(files, desc=folder, disable=None):
            texts.append(read_text(path)[:max_len])
            if not texts[-1]:
                raise ValueError(f"{path}: empty, expected .txt files with reviews")
        if not files:
            raise ValueError(f"{root / folder}: empty, expected .txt files with reviews")
        labels += [int(folder.endswith("pos"))] * len(files)
        n_train += len(files) * folder.startswith("train")
    order = np.random.RandomState([seed, 5]).permutation(n_train)  # as in hold_out
    train = [texts[i] for i in order[: n_train - n_train // 10]]
    symbols = vocabulary(train, min_count) if characters else None
    tokens, lengths = encode(texts, symbols, max_len)
    splits = hold_out(tokens, np.array(labels), lengths, len(labels) - n_train, seed)
    return Data(name, *splits, len(symbols) if characters else 256, 2, symbols=symbols)


def retrieval(name, data_dir, seed, *, characters=False, max_len=4000, min_count=15, source=None):
    """AAN: does one paper cite the other? tokens (n, 2, L) and lengths (n, 2), two documents each.

    Reads the published new_aan_pairs.{train,eval,test}.tsv: label, id, id, text, text, separated by
    tabs; quotes are characters like others. Bytes or characters as in `text`. The splits are the
    published ones: the seed changes nothing.
    """
    check_texts(max_len, min_count)
    names = [f"new_aan_pairs.{split}.tsv" for split in ("train", "eval", "test")]
    folder = find(source, data_dir, RELEASE, names[0], "tsv_data", "aan").parent
    symbols, splits = None, []
    for path in (folder / file for file in names):
        texts, labels = [], []
        for number, (label, _, _, *pair) in read_table(path, 5):
            if label not in ("0", "1", "0.0", "1.0"):
                raise ValueError(f"{path}:{number}: label {label!r}, expected 0.0 or 1.0")
            if not all(pair):
                raise ValueError(f"{path}:{number}: an empty document, expected two texts")
            labels.append(int(label[0]))
            texts += [document[:max_len] for document in pair]
        if characters and not splits:
            symbols = vocabulary(texts, min_count)
        tokens, lengths = encode(texts, symbols, max_len)
        tokens, lengths = tokens.reshape(len(labels), 2, -1), lengths.reshape(-1, 2)
        splits.append(Split(tokens, np.array(labels, np.int64), lengths))
    return Data(name, *splits, len(symbols) if characters else 256, 2, symbols=symbols)


def vocabulary(texts, min_count):
    """<unk>, then the characters that occur min_count times or more, most frequent first."""
    counts = Counter()
    for document in texts:
        counts.update(document)
    known = sorted((c for c in counts if counts[c] >= min_count), key=lambda c: (-counts[c], c))
    return ("<unk>", *known[:254])


def check_texts(max_len, min_count):
    if max_len < 1 or min_count < 1:
        raise ValueError(f"max_len {max_len}, min_count {min_count}: expected 1 or more")


def encode(texts, symbols, max_len):
    """Texts of at most max_len characters: tokens (n, L) uint8, bytes or places in symbols."""
    if symbols is None:
        return pad([np.frombuffer(each.encode()[:max_len], np.uint8) for each in texts])
    index = np.zeros(0x110000, np.uint8)
    index[[ord(symbol) for symbol in symbols[1:]]] = np.arange(1, len(symbols))
    return pad([index[np.frombuffer(each.encode("utf-32-le"), np.uint32)] for each in texts])


# ------------------------------------------------------------------------------------------- speech


def speech(name, data_dir, seed, *, rate=16_000, source=None):
    """Speech Commands v0.02, all 35 words, one second each: (n, 16000, 1) int16, one channel.

    The folders are the classes, in alphabetical order; validation_list.txt and testing_list.txt are
    the official splits, so the seed changes nothing. rate 8000 keeps every second sample. Shorter
    clips are zero padded. Normalised by mean and deviation over the training samples.
    """
    if rate not in (16_000, 8_000):
        raise ValueError(f"rate {rate}, expected 16000 or 8000 Hz")
    top = "speech_commands_v0.02"
    folders = top, f"SpeechCommands/{top}", "speech_commands"
    root = find(source, data_dir, SPEECH, "validation_list.txt", *folders).parent
    lists = [root / "validation_list.txt", root / "testing_list.txt"]
    folders = (path for path in root.glob("[!._]*") if path.is_dir())
    words = sorted(path.name for path in folders if any(path.glob("*.wav")))  # not our own cache
    key = fingerprint(f"speech-{rate}", lists + [root / word for word in words])
    splits = cached(Path(data_dir) / key, lambda: read_speech(root, words, lists, 16_000 // rate))
    train, total = splits[0].tokens, splits[0].lengths.sum()
    mean = train.sum(dtype=np.float64) / total  # the padding is zero
    std = np.sqrt(sum(np.square(clip, dtype=np.float64).sum() for clip in train) / total - mean**2)
    return Data(name, *splits, None, len(words), (float(mean),), (float(std) or 1.0,))


def read_speech(root, words, lists, stride):
    """Splits train, val, test of all wav files; the two lists name those that are not for train."""
    official = [read_text(path).split() for path in lists]
    files = [f"{word}/{path.name}" for word in words for path in sorted(root.glob(f"{word}/*.wav"))]
    for path, names in zip(lists, official, strict=True):
        missing = sorted(set(names) - set(files))
        if missing or not names:
            raise ValueError(f"{path}: names {missing[:3]}, expected files below {root}")
    others = set(official[0]) | set(official[1])
    if len(others) != len(official[0]) + len(official[1]):
        raise ValueError(f"{lists[1]}: names a clip twice, or one of {lists[0]}")
    splits = []
    for part in ([name for name in files if name not in others], *official):
        clips = [read_wav(root / name)[::stride] for name in tqdm(part, desc="wav", disable=None)]
        if not clips:
            raise ValueError(f"{root}: no training clips besides those in the lists")
        tokens, lengths = pad(clips)
        labels = np.array([words.index(name.split("/")[0]) for name in part], np.int64)
        splits.append(Split(tokens[..., None], labels, lengths))
    return splits


def read_wav(path):
    """Samples (n,) int16 of a 16-bit, one-channel, 16 kHz file of at most a second."""
    with naming(path, "a wav file"), wave.open(str(path)) as file:
        form = file.getnchannels(), file.getsampwidth(), file.getframerate()
        n, data = file.getnframes(), file.readframes(16_001)
    if form != (1, 2, 16_000) or not 0 < n <= 16_000 or len(data) != 2 * n:
        raise ValueError(
            f"{path}: channels, bytes, rate {form}, {n} samples in {len(data)} bytes, "
            "expected (1, 2, 16000) and 1 .. 16000 samples"
        )
    return np.frombuffer(data, "<i2").astype(np.int16)


# -------------------------------------------------------------------------------------------- tasks


class Task(NamedTuple):
    function: Callable  # (name, data_dir, seed, **options) -> Data
    options: dict  # what makes the task, in place of the function's defaults
    size: str
    origin: Remote | str
    stem: str  # of what it keeps under data_dir


MADE = "generated"
SMALL = dict(above=100, below=500)
TINY = dict(above=16, below=128, max_args=5, n_train=20_000)
CHARACTERS = dict(characters=True)
TASKS = {
    "lattice": Task(lattice, {}, "4,000/1,000/4,000, L 64", MADE, "lattice"),
    "listops": Task(listops, {}, "96,000/2,000/2,000, L < 2000", MADE, "listops-1"),
    "listops-small": Task(listops, SMALL, "as listops, L < 500", MADE, "listops-small"),
    "listops-tiny": Task(listops, TINY, "20,000/2,000/2,000, L < 128", MADE, "listops-tiny"),
    "text": Task(text, {}, "22,500/2,500/25,000, L <= 4096 bytes", IMDB, "aclImdb"),
    "text-characters": Task(text, CHARACTERS, "as text", IMDB, "aclImdb"),
    "retrieval": Task(retrieval, {}, "147,086 pairs to train, L <= 4000", RELEASE, "lra_release"),
    "retrieval-characters": Task(retrieval, CHARACTERS, "as retrieval", RELEASE, "lra_release"),
    "image": Task(image, {}, "45,000/5,000/10,000, L 1024", CIFAR, "cifar-10"),
    "image-real": Task(image, {}, "as image, numbers", CIFAR, "cifar-10"),
    "scifar": Task(image, {}, "as image, in colour", CIFAR, "cifar-10"),
    "speech": Task(speech, {}, "84,843 clips to train, L 16000", SPEECH, "speech"),
    "speech-8k": Task(speech, dict(rate=8_000), "as speech, L 8000", SPEECH, "speech"),
} | {
    f"pathfinder{size}{suffix}": Task(
        pathfinder,
        dict(size=size, contour=contour),
        f"160,000/20,000/20,000, L {size**2}",
        MADE,
        f"pathfinder{size}-{contour}",
    )
    for size in SHEETS
    for suffix, contour in (("", 14), ("-medium", 9), ("-easy", 6))
}


def load(task, data_dir="data", seed=0, **options):
    """The named task as `Data`. `options` are the keyword arguments of the function in `TASKS`.

    ValueError for an unknown task, a bad option value or file; TypeError for an unknown option or
    one of the wrong type; OSError where data_dir cannot be written.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}: expected one of {', '.join(TASKS)}")
    if not 0 <= operator.index(seed) < 2**32:
        raise ValueError(f"seed {seed}: expected 0 <= seed < 2^32")
    return TASKS[task].function(task, data_dir, seed, **(TASKS[task].options | options))


def checksum(data):
    """sha256 (hex) over tokens, labels and lengths of the three splits."""
    digest = hashlib.sha256()
    for split in (data.train, data.val, data.test):
        for array in (split.tokens, split.labels, split.lengths):
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def trivial_levels(data):
    """Test accuracy of the most frequent training label: of all, by first token, by length.

    Numbers and lengths are sorted into twenty bins.
    """

    def score(feature):
        table = np.zeros((1 + max(map(np.max, feature)), data.n_classes), np.int64)
        np.add.at(table, (feature[0], data.train.labels), 1)
        return (data.test.labels == table.argmax(1)[feature[1]]).mean()

    def binned(values):
        edges = np.quantile(values[0], np.arange(0.05, 1, 0.05))
        return [np.searchsorted(edges, each) for each in values]

    pair = (data.train, data.test)
    first = [each.tokens.reshape(len(each), -1)[:, 0].astype(np.int64) for each in pair]
    lengths = [each.lengths.reshape(len(each), -1).sum(1) for each in pair]
    return {
        "most frequent label": score([np.zeros(len(each), np.int64) for each in pair]),
        "by first token": score(binned(first) if data.mean else first),
        "by length": score(binned(lengths)),
    }


def summary(data):
    """What a reader wants to know of a task before training, as text."""
    kind = "symbols" if data.mean is None else f"numbers, mean {data.mean}, deviation {data.std}"
    lines = [f"{data.name}: {data.n_classes} classes, {data.vocab_size} {kind}"]
    for name in SPLITS:
        split = getattr(data, name)
        share = np.bincount(split.labels, minlength=data.n_classes) / len(split)
        low, mid, high = split.lengths.min(), int(np.median(split.lengths)), split.lengths.max()
        lines.append(
            f"  {name:5} {len(split):7,} examples, length {low} .. {mid} .. {high}, "
            f"label shares {share.min():.3f} .. {share.max():.3f}"
        )
    levels = trivial_levels(data).items()
    lines.append("  without a model: " + ", ".join(f"{k} {100 * v:.1f} %" for k, v in levels))
    lines.append(f"  sha256 {checksum(data)}")
    return "\n".join(lines)


def listing(data_dir):
    """One line a task: name, size, where it comes from, what is on disk."""
    lines = []
    for name, task in TASKS.items():
        tops = Path(data_dir).glob(f"*{task.stem}*")
        kept = (path for top in tops for path in [top, *top.rglob("*")] if path.is_file())
        size = sum(path.stat().st_size for path in kept)
        origin = task.origin if isinstance(task.origin, str) else task.origin.url
        lines.append(f"{name:22} {task.size:41} {size / 1e6:9,.1f} MB  {origin}")
    return "\n".join(lines)


def show(data, folder):
    """Writes 4 x 8 training pictures to folder/<task>.png, or prints three training examples."""
    tokens, lengths = data.train.tokens[:32], data.train.lengths[:32]
    side = math.isqrt(tokens.shape[1])
    if data.name.startswith(("image", "scifar", "pathfinder", "lattice")) and len(tokens) == 32:
        pictures = tokens.reshape(4, 8, side, side, -1)
        pictures = pictures * (255 if data.name == "lattice" else 1)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{data.name}.png"
        write_png(path, pictures.transpose(0, 2, 1, 3, 4).reshape(4 * side, 8 * side, -1))
        return f"wrote {path}"
    lines = []
    for row, label, length in zip(tokens[:3], data.train.labels, lengths, strict=False):
        row = row[0] if lengths.ndim == 2 else row  # of a pair, the first document
        row = row[: np.ravel(length)[0]][:400]
        if data.symbols:
            text = (" " if data.n_classes == 10 else "").join(data.symbols[token] for token in row)
        elif data.mean is None:
            text = bytes(row).decode(errors="replace")
        else:
            text = " ".join(map(str, row[:40, 0]))
        lines.append(f"label {label}, length {length}: {text}")
    return "\n".join(lines)


def write_png(path, picture):
    """(height, width, 1 or 3) uint8 as an 8-bit png."""
    height, width, channels = picture.shape
    lines = np.pad(picture.reshape(height, -1).astype(np.uint8), [(0, 0), (1, 0)]).tobytes()
    head = png_chunk(b"IHDR", png_head(width, height, 2 if channels == 3 else 0))
    data = png_chunk(b"IDAT", zlib.compress(lines))
    path.write_bytes(PNG + head + data + png_chunk(b"IEND", b""))


def self_check():
    """(name, error, limit): fast == slow, made ~ published statistics, written == read."""
    rng = np.random.RandomState(0)
    levels, length = grow_trees(rng, 512, 10, 10, 100, 500)
    trees = np.split(lay_out(levels), np.cumsum(length)[:-1])
    wrong = [listops_value(t) != v for t, v in zip(trees, evaluate_trees(levels), strict=True)]
    states = np.array(list(np.ndindex(*[2] * 9))).reshape(-1, 3, 3) * 2 - 1
    bonds = sum((states * np.roll(states, 1, axis)).sum((1, 2)) for axis in (1, 2))
    exact = np.average(bonds, weights=np.exp(0.2 * bonds)) / 18
    spins = gibbs(rng, 20_000, 3, 1, 0.2, 30).reshape(-1, 3, 3)
    sampled = sum((spins * np.roll(spins, 1, axis)).mean() for axis in (1, 2)) / 2
    pictures, labels, _ = draw_pictures(rng, 32, 14, 300)
    with tempfile.TemporaryDirectory() as folder:
        write_png(Path(folder) / "picture.png", pictures[0][..., None])
        again = unfilter(read_png(Path(folder) / "picture.png", 32)[None])[0]
        made, read = (load("listops-tiny", folder, n_train=500) for _ in range(2))
    return [
        ("ListOps: values by level == by stack, share", float(np.mean(wrong)), 0.0),
        ("lattice: 3 x 3 torus, sampled == enumerated", abs(sampled / exact - 1), 0.03),
        ("pathfinder32: empty pixels / .66 - 1", abs((pictures == 0).mean() / 0.66 - 1), 0.1),
        ("pathfinder32: mean pixel / 20 - 1", abs(pictures.mean() / 20 - 1), 0.1),
        ("pathfinder32: share of label 1 - 1/2", abs(labels.mean() - 0.5), 0.1),
        ("png: written == read", float((again != pictures[0]).any()), 0.0),
        ("cache: made == read", float(checksum(made) != checksum(read)), 0.0),
    ]


def print_table(rows):
    """Print (name, error, limit) rows; True when every error is within its limit."""
    print(f"lra_data.py  numpy {np.__version__}  seed 0\n{'check':46}{'error':>10}{'limit':>10}")
    for name, error, limit in rows:
        print(f"  {name:44}{error:10.1e}{limit:10.0e}   {'ok' if error <= limit else 'FAIL'}")
    return all(error <= limit for _, error, limit in rows)


def timing():
    """What a picture and a tree cost, CPU time: one core, whatever else runs."""
    for size, n in ((32, 500), (64, 40), (128, 20), (256, 200)):
        start = time.process_time()
        draw_pictures(np.random.RandomState(0), size, 14, n)
        each = 1e3 * (time.process_time() - start) / n
        print(f"  pathfinder{size:<4} {each:8.1f} ms CPU a picture")
    start = time.process_time()
    listops_trees(0, 4000, 10, 10, 500, 2000)
    print(f"  listops        {1e3 * (time.process_time() - start) / 4000:8.2f} ms CPU a tree")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("task", nargs="?", help="load or generate this task and print its summary")
    parser.add_argument("--list", action="store_true", help="every task and what is on disk")
    parser.add_argument("--data-dir", default="data", help="where things are kept (default: data)")
    parser.add_argument("--source", help="directory or tar archive to read (default: --data-dir)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of generation and of splits (default: 0)"
    )
    parser.add_argument("--n", type=int, help="pictures of a pathfinder task (default: 200000)")
    parser.add_argument("--download", action="store_true", help="fetch the published archive first")
    parser.add_argument("--show", action="store_true", help="write a picture or print examples")
    parser.add_argument("--check", action="store_true", help="print the check table and stop")
    args = parser.parse_args()
    if args.list:
        print(listing(args.data_dir))
        return 0
    if args.check or not args.task:
        ok = print_table(self_check())
        if not args.check:
            timing()
        return 0 if ok else 1
    options = {key: getattr(args, key) for key in ("source", "n") if getattr(args, key) is not None}
    try:
        remote = TASKS[args.task].origin if args.task in TASKS else MADE
        if args.download and remote != MADE:
            print(f"wrote {download(remote, args.data_dir)}")
        data = load(args.task, args.data_dir, args.seed, **options)
        print(summary(data))
        if args.show:
            print(show(data, Path(args.data_dir)))
    except (ValueError, TypeError, OSError) as error:
        parser.exit(1, f"lra_data.py: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
