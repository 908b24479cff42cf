"""The Long Range Arena tasks as numpy arrays: generated or read from the published files.

    python lra_data.py                       list all tasks
    python lra_data.py listops-tiny          generate or load a task and summarize it
    python lra_data.py image --download      fetch the published archive first
    python lra_data.py --check               check this file

Tay et al. 2020, "Long Range Arena", arXiv:2011.04006v1.  `load(task)` returns a `Data` with three
`Split`s; the same task, options and seed give the same bytes on every machine.

    tokens    (n, L) uint8 symbols, (n, L, C) numbers, or (n, 2, L) symbols of two documents
    labels    (n,) int64
    lengths   (n,) or (n, 2) int32; tokens beyond the length are zero

lattice, listops and pathfinder are generated (the last two are cached in `data_dir`).  The others,
and these two if they get a `source`, are read from the published files: a directory or tar archive,
by default the one that --download puts into `data_dir`.  Where no validation split was published, a
tenth of train is held out.  Left out: augmentation, tokenizers, ten-word speech, TFRecords.
"""

import argparse
import hashlib
import itertools
import math
import statistics
import struct
import sys
import tarfile
import tempfile
import urllib.request
import wave
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pathfinder
from tqdm import tqdm

SPLITS = ("train", "val", "test")
RELEASE = "https://storage.googleapis.com/long-range-arena/lra_release.gz"
CIFAR = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
IMDB = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
SPEECH = "http://download.tensorflow.org/data/speech_commands_v0.02.tar.gz"
SHA256 = {  # nobody published one of RELEASE
    CIFAR: "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    IMDB: "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe",
    SPEECH: "af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58",
}


@dataclass(frozen=True)
class Split:
    tokens: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray

    def __len__(self):
        return len(self.labels)


@dataclass(frozen=True)
class Data:
    """A task.  If mean is None, tokens are symbols 0 .. vocab_size - 1, to be embedded.

    Otherwise tokens are numbers and a model reads (x - mean) / std, one mean and std per channel;
    vocab_size is then the number of different values (256 for pixels), or None for sound.
    """

    name: str
    train: Split
    val: Split
    test: Split
    vocab_size: int | None
    n_classes: int
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    symbols: tuple[str, ...] | None = None  # the text of each token


# ------------------------------------------------------------------------------------------ lattice


def load_lattice(name, data_dir, seed, *, n_train=4000, n_val=1000, n_test=4000):
    """Binary textures on an 8 x 8 torus: at which distance are the sites coupled?

    An Ising model, P(s) ~ exp(0.45 sum_<ij> s_i s_j), whose sites interact with the four sites that
    are 1 (class 0) or 3 (class 1) steps away along the rows and columns.  Twelve Gibbs sweeps from
    noise sample it; a random global sign makes the mean and single sites useless.  The map x -> 3x
    mod 8 turns distance 1 into 3, so statistics that ignore positions are useless too.  Not part of
    the Long Range Arena: a task that small models learn in minutes.
    """
    sizes = [n_train, n_val, n_test]
    check(min(sizes) >= 2, f"sizes {sizes}: expected >= 2")
    rng = np.random.RandomState([seed, 1])  # its stream is the same in all versions of numpy
    n = sum(sizes)
    labels = rng.permutation(n) % 2
    tokens = np.zeros((n, 64), np.uint8)
    for label, distance in [(0, 1), (1, 3)]:
        spins = gibbs(rng, int((labels == label).sum()), 8, distance, 0.45, 12)
        spins *= rng.choice([-1, 1], (len(spins), 1)).astype(np.int8)
        tokens[labels == label] = spins > 0
    splits = cut(tokens, labels, np.full(n, 64), sizes)
    return Data(name, *splits, vocab_size=2, n_classes=2)


def gibbs(rng, n, side, distance, beta, sweeps):
    """Sample n Ising models in lock-step, site by site.  Returns (n, side^2) int8 of +-1."""
    site = np.arange(side * side).reshape(side, side)
    moves = [(distance, 0), (-distance, 0), (0, distance), (0, -distance)]
    neighbors = np.stack([np.roll(site, move, (0, 1)).ravel() for move in moves], 1)
    p_up = 1 / (1 + np.exp(-2 * beta * np.arange(-4, 5)))  # by the sum of the four neighbors
    spins = rng.choice([-1, 1], (side * side, n)).astype(np.int8)
    for _ in range(sweeps):
        for i in range(side * side):
            field = spins[neighbors[i]].sum(0, dtype=np.int64)  # (n,)
            spins[i] = 2 * (rng.random_sample(n) < p_up[field + 4]) - 1
    return np.ascontiguousarray(spins.T)


# ------------------------------------------------------------------------------------------ listops

LISTOPS_VOCAB = tuple("0 1 2 3 4 5 6 7 8 9 [MIN [MAX [MED [SM ]".split())  # token i is entry i
MIN = 10  # operators are tokens MIN .. CLOSE - 1
CLOSE = 14
OPERATORS = (min, max, lambda args: int(statistics.median(args)), lambda args: sum(args) % 10)


def load_listops(
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

    A node is an operator with probability 1/4, else a digit; the root has depth 1, a node at
    `max_depth` is a digit, operators have 2 .. max_args arguments.  MED is the median rounded down,
    SM the sum modulo 10.  Duplicates are removed and only trees with above < length < below are
    kept; `[MIN`, `7` and `]` are one token each.  The label is the answer, 0 .. 9.

    With a source, the published basic_{train,val,test}.tsv are read and every answer is checked;
    their parentheses are redundant and dropped.
    """
    sizes = [n_train, n_val, n_test]
    limits = [max_depth, max_args, above, below]
    if source is not None:
        first = find(source, data_dir, RELEASE, "basic_train.tsv", "listops-1000", "listops")
        paths = [first.with_name(f"basic_{split}.tsv") for split in SPLITS]
        folder = Path(data_dir) / fingerprint("listops-published", paths)
        splits = cached(folder, lambda: [read_listops(path) for path in paths])
    else:
        found = f"sizes {sizes}, max_depth {max_depth}, max_args {max_args}"
        check(min(*sizes, max_depth - 1, max_args - 1) >= 1, f"{found}: expected >= 1, 2 and 2")
        folder = Path(data_dir) / "-".join(map(str, [name, *limits, *sizes, seed]))
        splits = cached(folder, lambda: listops_splits(seed, sizes, *limits))
    return Data(name, *splits, len(LISTOPS_VOCAB), n_classes=10, symbols=LISTOPS_VOCAB)


def listops_splits(seed, sizes, *limits):
    """Grow different trees until there are enough for splits of these sizes."""
    n = sum(sizes)
    answers = {}  # tree -> answer, in the order of growth
    chunk = 0
    bar = tqdm(total=n, desc="listops", unit=" trees", disable=None)
    while len(answers) < n:
        found = f"found {len(answers)} of {n} different trees"
        check(chunk <= 20 + len(answers) // 10, f"{found}: expected wider limits or a smaller n")
        rng = np.random.RandomState([seed, 2, chunk])
        levels, lengths = grow_trees(rng, 4096, *limits)
        trees = np.split(lay_out(levels), np.cumsum(lengths))[:-1]
        for tree, answer in zip(trees, evaluate_trees(levels), strict=True):
            answers.setdefault(tree.tobytes(), answer)
        bar.update(min(len(answers), n) - bar.n)
        chunk += 1
    bar.close()
    pairs = iter(answers.items())
    return [listops_split(itertools.islice(pairs, size)) for size in sizes]


def listops_split(pairs):
    """Make a split of (tree, answer) pairs."""
    trees, answers = zip(*pairs, strict=True)
    tokens, lengths = pad([np.frombuffer(tree, np.uint8) for tree in trees])
    return Split(tokens, np.array(answers, np.int64), lengths)


def grow_trees(rng, n_trees, max_depth, max_args, above, below):
    """Grow random trees, all of them one level at a time.

    Returns levels, a list of (kind, n_args) with the nodes of all trees at that depth, left to
    right, and the lengths (trees,) in tokens.  kind (nodes,) is the token; n_args (nodes,) is 0 for
    digits.  The arguments of an operator are neighbors in the next level.  The root is always an
    operator: a tree of one digit would be too short.  Only trees of a valid length are returned.
    """
    tree = np.arange(n_trees)  # the tree of each node of this level
    length = np.zeros(n_trees, np.int64)
    levels = []
    for p_operator in [1] + [0.25] * (max_depth - 2) + [0]:
        n = len(tree)
        is_operator = rng.random_sample(n) < p_operator
        n_args = np.where(is_operator, rng.randint(2, max_args + 1, n), 0)
        kind = np.where(is_operator, rng.randint(MIN, CLOSE, n), rng.randint(0, MIN, n))
        length += np.bincount(tree, 1 + is_operator, n_trees).astype(np.int64)  # its "]" counts
        n_args[length[tree] >= below] = 0  # a tree that is too long stops growing
        levels.append((kind.astype(np.uint8), n_args, tree))
        tree = np.repeat(tree, n_args)
    good = (length > above) & (length < below)
    kept = [(kind[good[tree]], n_args[good[tree]]) for kind, n_args, tree in levels]
    return kept, length[good]


def evaluate_trees(levels):
    """Return the value of every root, (trees,) uint8, from the deepest level up."""
    value = levels[-1][0]
    for kind, n_args in reversed(levels[:-1]):
        operators = np.flatnonzero(n_args)
        n = n_args[operators]
        first = np.cumsum(n) - n
        owner = np.repeat(np.arange(len(n), dtype=np.int32), n)  # int32 sorts faster
        args = np.sort(10 * owner + value) % 10  # sorted within each operator
        median = (args[first + (n - 1) // 2] + args[first + n // 2]) // 2
        total = np.add.reduceat(args, first) % 10
        answers = [args[first], args[first + n - 1], median, total]
        value = kind.copy()
        value[operators] = np.choose(kind[operators] - MIN, answers)
    return value


def lay_out(levels):
    """Write the trees in prefix order, one after the other: (their tokens,) uint8."""
    offsets = [np.zeros(1, np.int64)]  # per level: tokens in the subtrees left of node i
    for _, n_args in reversed(levels):
        last = np.cumsum(n_args)  # the arguments of a node are first .. last - 1 of the level below
        first = last - n_args
        size = 1 + (n_args > 0) + offsets[-1][last] - offsets[-1][first]  # 1 for its "]"
        offsets.append(np.concatenate([[0], np.cumsum(size)]))
    offsets.reverse()
    flat = np.full(offsets[0][-1], CLOSE, np.uint8)
    place = offsets[0][:-1]  # of the nodes of this level
    for (kind, n_args), below in zip(levels, offsets[1:], strict=True):
        flat[place] = kind
        first = np.cumsum(n_args) - n_args
        place = np.repeat(place + 1 - below[first], n_args) + below[:-1]
    return flat


def listops_value(tokens):
    """Return the value of a tree, read token by token with a stack (ValueError if it is none)."""
    stack = [[]]  # the arguments so far of each open operator, after the operator itself
    for token in tokens:
        if token < MIN:
            stack[-1].append(int(token))
        elif token < CLOSE:
            stack.append([token])
        else:
            group = stack.pop()
            check(stack and len(group) > 1, "']' closes no operator with arguments")
            operator = OPERATORS[group[0] - MIN]
            stack[-1].append(operator(group[1:]))
    check(len(stack) == 1, f"{len(stack) - 1} operators left open")
    check(len(stack[0]) == 1, f"{len(stack[0])} roots")
    return stack[0][0]


def read_listops(path):
    """Read a published file: a tree and its value per line."""
    return listops_split(read_lines(path, parse_tree, "Source, Target", "Source\tTarget"))


def parse_tree(line):
    """Turn "( ( ( [MIN 3 ) 2 ) ] )<tab>2" into its tokens and 2."""
    tree, label = tsv_fields(line)
    words = tree.replace("(", " ").replace(")", " ").split()
    unknown = set(words).difference(LISTOPS_VOCAB)
    check(not unknown, f"unknown token {sorted(unknown)}")
    tokens = [LISTOPS_VOCAB.index(word) for word in words]
    value = listops_value(tokens)
    check(label == str(value), f"label {label!r}, but the tree is {value}")
    return bytes(tokens), value


# --------------------------------------------------------------------------------------- pathfinder

BINARY = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}


def load_pathfinder(
    name, data_dir, seed, *, size=32, contour=14, n=200_000, processes=None, source=None
):
    """Pathfinder (Linsley et al. 2018, arXiv:1805.08315): are the two disks the ends of one snake?

    n pictures of size x size pixels drawn by pathfinder.py: 80 % train, 10 % val, 10 % test.
    contour 14 (segments per snake) is the task of the Long Range Arena, 9 and 6 are easier; size
    128 is Path-X, 256 PathX-256.  Large sets stay on disk, memory-mapped.  With a source, the
    published PNG files are read, in an order that depends on the seed.
    """
    check(n >= 10, f"n {n}: expected at least 10 pictures, for three splits")
    if source is None:
        images, labels = pathfinder.load(data_dir, n, size, contour, seed, processes)
    else:
        images, labels = published_pathfinder(source, data_dir, seed, size, contour, processes)
    n = len(labels)
    sizes = [n - 2 * (n // 10), n // 10, n // 10]
    splits = cut(images.reshape(n, -1, 1), labels, np.full(n, size * size), sizes)
    return Data(name, *splits, 256, 2, (127.5,), (127.5,))


def published_pathfinder(source, data_dir, seed, size, contour, processes):
    """Read curv_*/metadata/<k>.npy and the PNG files they name.  Returns images and labels."""
    name = "curv_baseline" if contour == 6 else f"curv_contour_length_{contour}"
    folders = [f"pathfinder{size}", f"pathfinder/pathfinder{size}"]
    metadata = find(source, data_dir, RELEASE, f"{name}/metadata", *folders)
    tables = sorted(metadata.glob("*.npy"), key=lambda path: (len(path.name), path.name))
    rows = []
    for table in tables:
        rows += read_lines(table, parse_metadata, "folder, file, number, label 0 or 1, ...")
    root = metadata.parent
    empty = "imgs/0/sample_172.png"  # one file of pathfinder32/curv_baseline was published empty
    rows = [row for row in rows if row[0] != empty or (root / empty).stat().st_size > 0]
    check(len(rows) >= 10, f"{root}: {len(rows)} pictures, expected 10 or more")
    order = np.random.RandomState([seed, 4]).permutation(len(rows))
    make = partial(read_shard, root, [rows[i] for i in order], size)
    key = fingerprint(f"pathfinder{size}-{contour}-files-{seed}", tables)
    return pathfinder.cached(Path(data_dir) / key, len(rows), size, make, processes)


def parse_metadata(line):
    """Return the name of a PNG file and its label; metadata/*.npy is text in spite of its name."""
    folder, file, _, label = line.split()[:4]
    return f"{folder}/{file}", BINARY[label]


def read_shard(root, rows, size, i):
    """Pictures (n, size, size) and labels (n,) of shard i of the rows (PNG file, label)."""
    shard = rows[i * pathfinder.SHARD : (i + 1) * pathfinder.SHARD]
    pictures = unfilter(np.stack([read_png(root / file, size) for file, _ in shard]))
    return pictures, np.array([label for _, label in shard])


# -------------------------------------------------------------------------------------------- image


def gray_symbols(rgb):
    """(n, 1024, 3) uint8 -> (n, 1024), as tf.image.rgb_to_grayscale, times 255.5 / 255, cut."""
    weights = np.array([0.2989, 0.5870, 0.1140]) * 255.5 / 255
    return np.floor(rgb @ weights).astype(np.uint8)


def gray_numbers(rgb):
    """(n, 1024, 3) uint8 -> (n, 1024, 1), as mode "L" of PIL."""
    weights = np.array([19595, 38470, 7471], np.uint32)
    gray = (rgb.astype(np.uint32) @ weights + 32768) >> 16
    return gray.astype(np.uint8)[..., None]


def load_image(name, data_dir, seed, *, convert=gray_symbols, mean=None, std=None, source=None):
    """CIFAR-10 row by row, L = 1024: 45,000 / 5,000 / 10,000, a tenth of train held out.

    image: gray symbols 0 .. 255, the task of the Long Range Arena.  image-real: gray numbers, as
    state space models read it.  scifar: three channels.  Reads the binary version: a record is a
    label and 3 x 1024 bytes, R, G, B.
    """
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    folders = "cifar-10-batches-bin", "cifar10/cifar-10-batches-bin", "cifar10"
    folder = find(source, data_dir, CIFAR, names[0], *folders).parent
    tokens = []
    labels = []
    for path in [folder / file for file in names]:
        with reading(path, "CIFAR-10 records of 3073 bytes"):
            content = np.frombuffer(path.read_bytes(), np.uint8)
            check(len(content), "no records")
            records = content.reshape(-1, 3073)
            check(records[:, 0].max() <= 9, f"label {records[:, 0].max()}")
        pixels = records[:, 1:].reshape(-1, 3, 1024)
        tokens.append(convert(pixels.swapaxes(1, 2)))
        labels.append(records[:, 0])
    n_test = len(labels[-1])
    tokens = np.concatenate(tokens)
    labels = np.concatenate(labels)
    order, sizes = hold_out(len(labels) - n_test, n_test, seed)
    splits = cut(tokens[order], labels[order], np.full(len(labels), 1024), sizes)
    return Data(name, *splits, 256, 10, mean, std)


# ---------------------------------------------------------------------------------- text, retrieval


def load_text(name, data_dir, seed, *, characters=False, max_len=4096, min_count=15, source=None):
    """IMDB reviews, positive (1) or negative (0), from the tree aclImdb/{train,test}/{pos,neg}.

    Cut to max_len bytes, or to max_len characters: those seen min_count times in train are symbols,
    all others <unk>.  A tenth of train is held out (many published numbers select on test instead).
    """
    check(max_len >= 1, f"max_len {max_len}: expected >= 1")
    root = find(source, data_dir, IMDB, "train/pos", "aclImdb").parent.parent
    texts = []
    labels = []
    for folder in ("train/neg", "train/pos", "test/neg", "test/pos"):
        paths = sorted((root / folder).glob("*.txt"))
        check(paths, f"{root / folder}: expected .txt files with reviews")
        for path in tqdm(paths, desc=folder, disable=None):
            review = read_text(path)
            check(review, f"{path}: empty, expected a review")
            texts.append(review[:max_len])
            labels.append(int(folder.endswith("pos")))
        if folder == "train/pos":
            n_train = len(texts)
    order, sizes = hold_out(n_train, len(texts) - n_train, seed)
    texts = [texts[i] for i in order]
    symbols = vocabulary(texts[: sizes[0]], min_count) if characters else None
    tokens, lengths = encode(texts, symbols, max_len)
    splits = cut(tokens, np.array(labels)[order], lengths, sizes)
    vocab_size = len(symbols) if symbols else 256
    return Data(name, *splits, vocab_size, 2, symbols=symbols)


def load_retrieval(
    name, data_dir, seed, *, characters=False, max_len=4000, min_count=15, source=None
):
    """AAN: does one paper cite the other?  Reads the published new_aan_pairs.*.tsv.

    Two documents per example, in bytes or characters as in `load_text`.  The splits are the
    published ones, so the seed changes nothing.
    """
    check(max_len >= 1, f"max_len {max_len}: expected >= 1")

    def parse(line):
        label, _, _, first, second = tsv_fields(line)
        check(first and second, "an empty document")
        return BINARY[label], first[:max_len], second[:max_len]

    first_path = find(source, data_dir, RELEASE, "new_aan_pairs.train.tsv", "tsv_data", "aan")
    symbols = None
    splits = []
    for split in ("train", "eval", "test"):
        path = first_path.with_name(f"new_aan_pairs.{split}.tsv")
        rows = read_lines(path, parse, "label 0.0 or 1.0, id, id, text, text")
        texts = [text for row in rows for text in row[1:]]
        if characters and split == "train":
            symbols = vocabulary(texts, min_count)
        tokens, lengths = encode(texts, symbols, max_len)
        labels = np.array([row[0] for row in rows], np.int64)
        splits.append(Split(tokens.reshape(len(rows), 2, -1), labels, lengths.reshape(-1, 2)))
    vocab_size = len(symbols) if symbols else 256
    return Data(name, *splits, vocab_size, 2, symbols=symbols)


def vocabulary(texts, min_count):
    """<unk>, then the 254 most frequent characters that occur min_count times or more."""
    counts = Counter()
    for document in texts:
        counts.update(document)
    known = [character for character in counts if counts[character] >= min_count]
    known.sort(key=lambda character: (-counts[character], character))
    return ("<unk>", *known[:254])


def encode(texts, symbols, max_len):
    """Turn texts into tokens (n, L) uint8, bytes or places in symbols, and lengths (n,)."""
    if symbols is None:
        return pad([np.frombuffer(text.encode()[:max_len], np.uint8) for text in texts])
    index = np.zeros(0x110000, np.uint8)  # of every character; 0 is <unk>
    for i, symbol in enumerate(symbols[1:], 1):
        index[ord(symbol)] = i
    return pad([index[np.frombuffer(text.encode("utf-32-le"), np.uint32)] for text in texts])


# ------------------------------------------------------------------------------------------- speech


def load_speech(name, data_dir, seed, *, rate=16_000, source=None):
    """Speech Commands v0.02, all 35 words, one second each: (n, 16000, 1) int16.

    The folders are the classes, in alphabetical order; the splits are the official ones, so the
    seed changes nothing.  rate 8000 keeps every second sample.  Shorter clips are zero-padded.
    mean and std are those of the training samples.
    """
    check(rate in (16_000, 8_000), f"rate {rate}: expected 16000 or 8000 Hz")
    top = "speech_commands_v0.02"
    folders = top, f"SpeechCommands/{top}", "speech_commands"
    root = find(source, data_dir, SPEECH, "validation_list.txt", *folders).parent
    words = sorted({path.parent.name for path in root.glob("[!._]*/*.wav")})
    lists = [root / "validation_list.txt", root / "testing_list.txt"]
    key = fingerprint(f"speech-files-{rate}", lists + [root / word for word in words])
    splits = cached(Path(data_dir) / key, lambda: read_speech(root, words, lists, 16_000 // rate))
    train = splits[0]
    total = train.lengths.sum()
    mean = train.tokens.sum(dtype=np.float64) / total  # the padding is zero
    power = sum(np.square(clip, dtype=np.float64).sum() for clip in train.tokens) / total
    std = math.sqrt(power - mean**2)
    return Data(name, *splits, None, len(words), (float(mean),), (std,))


def read_speech(root, words, lists, stride):
    """Read all clips; the two lists name those of val and test, the others are for train."""
    files = [f"{word}/{path.name}" for word in words for path in sorted(root.glob(f"{word}/*.wav"))]
    val, test = [read_text(path).split() for path in lists]
    for path, names in zip(lists, [val, test], strict=True):
        missing = sorted(set(names).difference(files))
        check(names and not missing, f"{path}: names {missing[:3]}, expected files below {root}")
    listed = set(val + test)
    check(len(listed) == len(val + test), f"{lists[1]}: names a clip twice, or one of {lists[0]}")
    train = [name for name in files if name not in listed]
    check(train, f"{root}: no training clips besides those in the lists")
    splits = []
    for part in (train, val, test):
        clips = [read_wav(root / name)[::stride] for name in tqdm(part, desc="wav", disable=None)]
        tokens, lengths = pad(clips)
        labels = [words.index(name.split("/")[0]) for name in part]
        splits.append(Split(tokens[..., None], np.array(labels, np.int64), lengths))
    return splits


def read_wav(path):
    """Return the samples (n,) int16 of a clip of at most a second."""
    with reading(path, "a wav file of one channel, 16 bits, 16 kHz, 1 .. 16000 samples"):
        with wave.open(str(path)) as file:
            form = file.getnchannels(), file.getsampwidth(), file.getframerate()
            n = file.getnframes()
            data = file.readframes(16_001)
        check(form == (1, 2, 16_000), f"channels, bytes per sample, rate {form}")
        check(0 < n <= 16_000 and len(data) == 2 * n, f"{n} samples in {len(data)} bytes")
    return np.frombuffer(data, "<i2").astype(np.int16)


# -------------------------------------------------------------------------------------------- tasks


class Task(NamedTuple):
    load: Callable  # (name, data_dir, seed, **options) -> Data
    options: dict  # instead of the defaults of load
    size: str
    origin: str = "generated"  # or the URL of the archive


SMALL = dict(above=100, below=500)
TINY = dict(above=16, below=128, max_args=5, n_train=20_000)
CHARACTERS = dict(characters=True)
GRAY = dict(convert=gray_numbers, mean=(122.6,), std=(61.0,))
COLOR = dict(
    convert=np.asarray,
    mean=(255 * 0.4914, 255 * 0.4822, 255 * 0.4465),
    std=(255 * 0.247, 255 * 0.243, 255 * 0.261),
)
TASKS = {
    "lattice": Task(load_lattice, {}, "4,000/1,000/4,000, L 64"),
    "listops": Task(load_listops, {}, "96,000/2,000/2,000, L < 2000"),
    "listops-small": Task(load_listops, SMALL, "as listops, L < 500"),
    "listops-tiny": Task(load_listops, TINY, "20,000/2,000/2,000, L < 128"),
    "text": Task(load_text, {}, "22,500/2,500/25,000, L <= 4096 bytes", IMDB),
    "text-characters": Task(load_text, CHARACTERS, "as text", IMDB),
    "retrieval": Task(load_retrieval, {}, "147,086 pairs to train, L <= 4000", RELEASE),
    "retrieval-characters": Task(load_retrieval, CHARACTERS, "as retrieval", RELEASE),
    "image": Task(load_image, {}, "45,000/5,000/10,000, L 1024", CIFAR),
    "image-real": Task(load_image, GRAY, "as image, numbers", CIFAR),
    "scifar": Task(load_image, COLOR, "as image, in color", CIFAR),
    "speech": Task(load_speech, {}, "84,843 clips to train, L 16000", SPEECH),
    "speech-8k": Task(load_speech, dict(rate=8_000), "as speech, L 8000", SPEECH),
}
for size in (32, 64, 128, 256):
    for suffix, contour in [("", 14), ("-medium", 9), ("-easy", 6)]:
        options = dict(size=size, contour=contour)
        task = Task(load_pathfinder, options, f"160,000/20,000/20,000, L {size**2}")
        TASKS[f"pathfinder{size}{suffix}"] = task
TASKS["pathx"] = TASKS["pathfinder128"]
TASKS["pathx256"] = TASKS["pathfinder256"]


def load(task, data_dir="data", seed=0, **options):
    """Return the named task as `Data`; options are the keyword arguments of its load function.

    Raises ValueError for an unknown task, a bad option value or file, TypeError for an unknown
    option, OSError if data_dir cannot be written.
    """
    check(task in TASKS, f"unknown task {task!r}: expected one of {', '.join(TASKS)}")
    check(0 <= seed < 2**32, f"seed {seed}: expected 0 <= seed < 2^32")
    function = TASKS[task].load
    for option in options:
        if option not in function.__kwdefaults__:
            known = ", ".join(function.__kwdefaults__)
            raise TypeError(f"task {task} has no option {option}: expected one of {known}")
    return function(task, data_dir, seed, **(TASKS[task].options | options))


# ------------------------------------------------------------------------------------------ summary


def summary(data):
    """What to know about a task before training, as text."""
    kind = "symbols" if data.mean is None else f"numbers, mean {data.mean}, std {data.std}"
    lines = [f"{data.name}: {data.n_classes} classes, {data.vocab_size} {kind}"]
    for name in SPLITS:
        split = getattr(data, name)
        share = np.bincount(split.labels, minlength=data.n_classes) / len(split)
        low, median, high = np.quantile(split.lengths, [0, 0.5, 1]).astype(int)
        lines.append(
            f"  {name:5} {len(split):7,} examples, length {low} .. {median} .. {high}, "
            f"label shares {share.min():.3f} .. {share.max():.3f}"
        )
    levels = [f"{name} {100 * level:.1f} %" for name, level in trivial_levels(data).items()]
    lines.append(f"  trivial baselines: {', '.join(levels)}")
    lines.append(f"  sha256 {checksum(data)}")
    return "\n".join(lines)


def trivial_levels(data):
    """Test accuracy of the most frequent training label: overall, by first token, by length."""
    features = {
        "most frequent label": lambda split: 0 * split.labels,
        "by first token": lambda split: split.tokens.reshape(len(split), -1)[:, 0],
        "by length": lambda split: split.lengths.reshape(len(split), -1).sum(1),
    }
    return {name: accuracy_by(feature, data) for name, feature in features.items()}


def accuracy_by(feature, data):
    """Test accuracy of the most frequent training label in each of twenty bins of a feature."""
    edges = np.quantile(feature(data.train), np.arange(0.05, 1, 0.05))
    train = np.searchsorted(edges, feature(data.train))
    test = np.searchsorted(edges, feature(data.test))
    counts = np.zeros((20, data.n_classes), np.int64)
    np.add.at(counts, (train, data.train.labels), 1)
    guess = counts.argmax(1)[test]
    return float((guess == data.test.labels).mean())


def checksum(data):
    """sha256 (hex) over tokens, labels and lengths of the three splits."""
    digest = hashlib.sha256()
    for split in (data.train, data.val, data.test):
        for array in (split.tokens, split.labels, split.lengths):
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


# --------------------------------------------------------------------------------- arrays and files


def check(ok, message):
    if not ok:
        raise ValueError(message)


def pad(rows):
    """Pad a list of arrays with zeros.  Returns tokens (n, L, ...) and lengths (n,)."""
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), lengths.max(), *rows[0].shape[1:]), rows[0].dtype)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return tokens, lengths


def cut(tokens, labels, lengths, sizes):
    """Cut arrays into consecutive splits of the given sizes."""
    arrays = tokens, labels.astype(np.int64), lengths.astype(np.int32)
    parts = [np.split(array, np.cumsum(sizes)[:-1]) for array in arrays]
    return [Split(*part) for part in zip(*parts, strict=True)]


def hold_out(n, n_test, seed):
    """Hold a tenth of train out: the order of n training and n_test test examples, the sizes."""
    check(n >= 10, f"{n} training examples: expected at least 10, to hold a tenth out")
    order = np.random.RandomState([seed, 5]).permutation(n)
    return np.concatenate([order, np.arange(n, n + n_test)]), [n - n // 10, n // 10, n_test]


def cached(folder, make):
    """Return the three splits in `folder`; make() and write them first if it does not exist."""
    if not folder.exists():
        splits = make()
        with appearing(folder) as part:
            part.mkdir()
            for name, split in zip(SPLITS, splits, strict=True):
                np.savez(part / f"{name}.npz", **vars(split))
    splits = []
    for path in [folder / f"{name}.npz" for name in SPLITS]:
        with reading(path, f"a whole cache: delete {folder} to make it again"):
            with np.load(path) as file:
                splits.append(Split(**file))
    return splits


@contextmanager
def reading(path, expected):
    """Turn any error inside into a ValueError that names the file, the reason, what to expect."""
    try:
        yield
    except Exception as error:  # numpy, zlib, wave and tarfile raise a dozen kinds
        reason = str(error) or type(error).__name__
        if reason.startswith(f"{path}:"):
            raise  # it names the line already
        raise ValueError(f"{path}: {reason}; expected {expected}") from error


def read_text(path):
    """Return the text of a UTF-8 file, without its byte order mark, line ends unchanged."""
    with reading(path, "UTF-8 text"):
        return path.read_bytes().decode("utf-8-sig")


def read_lines(path, parse, expected, header=None):
    """Return [parse(line) of each line] of a UTF-8 file; an error names the line."""
    rows = []
    with reading(path, expected), open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            with reading(f"{path}:{number}", expected):
                text = line.decode("utf-8-sig")
                if header and number == 1:
                    check(text.strip() == header, f"header {text!r}")
                else:
                    rows.append(parse(text))
        check(rows, "no examples")
    return rows


def tsv_fields(line):
    """Split at tabs.  Not csv: quotes and carriage returns are text in these files."""
    check(line.endswith("\n"), "no end of line, so the file is cut")
    return line.rstrip("\r\n").split("\t")


def read_png(path, size):
    """Return the lines (size, 1 + size) uint8 of a PNG file: the filter first, then the pixels."""
    with reading(path, f"an 8-bit grayscale PNG file of {size} x {size} pixels"):
        content = path.read_bytes()
        check(content.startswith(b"\x89PNG\r\n\x1a\n"), f"starts with {content[:8]}")
        chunks = {b"IDAT": b""}
        at = 8
        while b"IEND" not in chunks:
            n, kind = struct.unpack_from(">I4s", content, at)
            body, crc = struct.unpack_from(f">{n}sI", content, at + 8)
            check(crc == zlib.crc32(kind + body), f"damaged at byte {at}")
            chunks[kind] = chunks.get(kind, b"") + body
            at += 12 + n
        header = struct.pack(">IIBBBBB", size, size, 8, 0, 0, 0, 0)
        check(chunks[b"IHDR"] == header, f"header {chunks[b'IHDR']}")
        lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(size, 1 + size)
        check(lines[:, 0].max() <= 4, f"filter {lines[:, 0].max()}")
    return lines


def unfilter(lines):
    """Undo the filters of many pictures at once: (n, side, 1 + side) -> (n, side, side)."""
    n, side, _ = lines.shape
    lines = lines.transpose(1, 2, 0)  # every step below decodes one pixel of all pictures
    out = np.zeros((side + 1, side + 1, n), np.int16)  # a row and a column of zeros come first
    for y, x in np.ndindex(side, side):
        left, above, corner = out[y + 1, x], out[y, x + 1], out[y, x]
        to_left = abs(above - corner)  # distances from left + above - corner
        to_above = abs(left - corner)
        to_corner = abs(left + above - 2 * corner)
        paeth = np.where(to_above <= to_corner, above, corner)
        paeth = np.where(to_left <= np.minimum(to_above, to_corner), left, paeth)
        guess = np.choose(lines[y, 0], [0, left, above, (left + above) // 2, paeth])
        out[y + 1, x + 1] = (lines[y, x + 1] + guess) & 255
    return out[1:, 1:].transpose(2, 0, 1).astype(np.uint8)


# ----------------------------------------------------------------------------------------- archives


def find(source, data_dir, url, name, *folders):
    """Return the path of `name`, which lies in one of the folders or at the top of `source`.

    source is a directory or a tar archive; None stands for data_dir or the archive in it.
    """
    root = Path(data_dir if source is None else source)
    if root.is_file():
        root = unpack(root, data_dir)
    names = [f"{folder}/{name}" for folder in folders] + [name]
    for above in ("lra_release/lra_release", "lra_release", ""):  # its outer copies differ
        for candidate in names:
            if (root / above / candidate).exists():
                return root / above / candidate
    archive = root / url.split("/")[-1]
    if source is None and archive.exists():
        return find(archive, data_dir, url, name, *folders)
    raise ValueError(f"{root}: expected {' or '.join(names)} in it; published as {url}")


def unpack(archive, data_dir):
    """Unpack a tar archive under data_dir, once.  Returns the folder."""
    target = Path(data_dir) / fingerprint(f"unpacked-{archive.name}", [archive])
    if target.exists():
        return target
    with reading(archive, "a whole tar archive"), appearing(target) as part:
        part.mkdir()
        with tarfile.open(archive) as tar:
            for member in tqdm(tar, desc=archive.name, unit=" files", disable=None):
                tar.extract(member, part, filter="data")  # refuses what would land outside
            while tar.fileobj.read(2**20):
                pass  # a compressed file has its checksum at the end
    return target


def download(url, data_dir):
    """Fetch an archive into data_dir and check it.  Returns its path."""
    path = Path(data_dir) / url.split("/")[-1]
    if path.exists():
        return path
    advice = f"a whole archive: fetch it in another way, put it at {path} or pass it as --source"
    digest = hashlib.sha256()
    with reading(url, advice), appearing(path) as part:
        with urllib.request.urlopen(url, timeout=60) as answer, open(part, "wb") as file:
            size = int(answer.headers.get("Content-Length", 0))
            bar = tqdm(desc=path.name, total=size or None, unit="B", unit_scale=True, disable=None)
            while block := answer.read(2**20):
                digest.update(block)
                bar.update(file.write(block))
        got = part.stat().st_size
        check(size in (0, got), f"{got} bytes came, not {size}")
        wanted = SHA256.get(url, digest.hexdigest())
        check(digest.hexdigest() == wanted, f"sha256 is {digest.hexdigest()}, not {wanted}")
    return path


def fingerprint(name, paths):
    """A cache name that changes when one of the files changes."""
    stats = [(str(path.resolve()), path.stat()) for path in paths if path.exists()]
    facts = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    return f"{name}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}"


@contextmanager
def appearing(path):
    """Give a temporary path that is renamed to `path` at the end: what is there is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        part = Path(folder) / path.name
        yield part
        try:
            part.replace(path)
        except OSError:
            if not path.is_dir():  # else another process was faster: keep its folder
                raise


# ----------------------------------------------------------------------------------- check, command


def self_check():
    """(name, error, limit) rows: fast == slow, and the generated bytes are those of any machine."""
    levels, lengths = grow_trees(np.random.RandomState(0), 512, 10, 10, 100, 500)
    trees = np.split(lay_out(levels), np.cumsum(lengths))[:-1]
    slow = np.array([listops_value(tree) for tree in trees])
    made = checksum(load("lattice", n_train=900, n_val=50, n_test=50))
    frozen = "213d12bd9941e504b05cafd781b3cb6e45e229609a668b14ddb8dcff96110155"
    return [
        ("ListOps: values by level == by stack", np.mean(evaluate_trees(levels) != slow), 0),
        ("lattice: the same bytes on every machine", made != frozen, 0),
    ]


def print_table(rows):
    """Print (name, error, limit) rows; return True if every error is within its limit."""
    ok = True
    for name, error, limit in rows:
        passed = error <= limit  # False for nan
        print(f"  {name:<50}{error:9.1e}{limit:9.0e}   {'ok' if passed else 'FAILED'}")
        ok = ok and passed
    return ok


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("task", nargs="?", help="task to load or generate (default: list all)")
    parser.add_argument("--data-dir", default="data", help="folder for data (default: data)")
    parser.add_argument("--source", help="directory or tar archive to read (default: --data-dir)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the data (default: 0)")
    parser.add_argument("--n", type=int, help="number of Pathfinder pictures (default: 200000)")
    parser.add_argument("--download", action="store_true", help="fetch the published archive first")
    parser.add_argument("--check", action="store_true", help="check this file, then exit")
    args = parser.parse_args(argv)
    if args.check:
        return 0 if print_table(self_check()) else 1
    if args.task is None:
        for name, task in TASKS.items():
            print(f"{name:22} {task.size:38} {task.origin}")
        return 0
    options = {name: getattr(args, name) for name in ("source", "n")}
    options = {name: value for name, value in options.items() if value is not None}
    try:
        if args.download and args.task in TASKS and "://" in TASKS[args.task].origin:
            print(f"archive: {download(TASKS[args.task].origin, args.data_dir)}")
        data = load(args.task, args.data_dir, args.seed, **options)
        print(summary(data))
    except (ValueError, TypeError, OSError) as error:
        parser.exit(1, f"lra_data.py: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
