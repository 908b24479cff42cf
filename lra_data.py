"""Long Range Arena, Speech Commands, sCIFAR and a lattice: numpy arrays, generated or read.

    python lra_data.py                       list all tasks
    python lra_data.py listops-tiny          generate or load a task and summarize it
    python lra_data.py image --download      fetch the published archive first
    python lra_data.py --check               check this file

Tay et al. 2020, "Long Range Arena", arXiv:2011.04006v1.  `load(task)` returns a `Data` with three
`Split`s; the same task, options and seed give the same bytes on every machine.

    tokens    (n, L) uint8 symbols, (n, L, C) numbers, or (n, 2, L) symbols of two documents
    labels    (n,) int64 classes; regression (your own data): (n, k) float32
    lengths   (n,) or (n, 2) int32; tokens beyond the length are zero

listops, pathfinder and lattice are generated.  The other tasks, and listops and pathfinder with a
`source`, are read from the published files: a directory or tar archive, by default what --download
puts into `data_dir`.  A tenth of train is held out where no validation split was published.  Left
out: augmentation, tokenizers, ten-word speech, TFRecords.
"""

import argparse
import hashlib
import statistics
import sys
import tarfile
import urllib.request
import wave
from collections import Counter, namedtuple
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise, product
from pathlib import Path

import numpy as np
from tqdm import tqdm

import pathfinder
from pathfinder import appearing, naming, one_line_errors, print_table, require

# RandomState([seed, k, ...]) is one stream per use k: 1 lattice, 2 listops, 3 pathfinder, 4 the
# order of pathfinder's published files, 5 the held-out tenth, 6 own data.  They are the same in all
# numpy versions.
SPLITS = ("train", "val", "test")
MIN_COUNT = 15  # with --characters, rarer characters are <unk>
LABELS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}  # as the files of pathfinder and retrieval have them
RELEASE = "https://storage.googleapis.com/long-range-arena/lra_release.gz"
CIFAR = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
IMDB = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
SPEECH = "http://download.tensorflow.org/data/speech_commands_v0.02.tar.gz"
SHA256 = {  # no checksum of RELEASE was published
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
    vocab_size is then the number of different values (256 for pixels), or None.
    """

    name: str
    train: Split
    val: Split
    test: Split
    vocab_size: int | None
    n_classes: int | None  # None: regression, labels are (n, k) float32
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    symbols: tuple[str, ...] | None = None  # the text of each token
    classes: tuple[str, ...] | None = None  # the name of each class
    y_mean: tuple[float, ...] | None = None  # of the training labels of a regression
    y_std: tuple[float, ...] | None = None


# ------------------------------------------------------------------------------------------ listops

LISTOPS_VOCAB = tuple("0 1 2 3 4 5 6 7 8 9 [MIN [MAX [MED [SM ]".split())  # token i is entry i
MIN = 10  # operators are tokens MIN .. CLOSE - 1
CLOSE = 14
OPERATORS = (min, max, lambda args: int(statistics.median(args)), lambda args: sum(args) % 10)
LIMITS = {  # above < tokens per tree < below, and at most so many arguments per operator
    "listops": (500, 2000, 10),
    "listops-small": (100, 500, 10),
    "listops-tiny": (16, 128, 5),
}


def load_listops(name, data_dir, seed, *, n_train=96_000, n_val=2_000, n_test=2_000, source=None):
    """ListOps (Nangia & Bowman 2018, arXiv:1804.06028) as in the Long Range Arena: evaluate a tree.

    The root is an operator, as is any other node with probability 1/4; the rest are digits, and all
    at depth 10 (the root has depth 1).  MED is the median rounded down, SM the sum modulo 10;
    `[MIN`, `7` and `]` are one token each.  The label is the answer, 0 .. 9.  All trees are
    different.  With a source, the published basic_{train,val,test}.tsv are read and checked.
    """
    if source is None:
        key = f"{name}-{n_train}-{n_val}-{n_test}-{seed}"
        make = partial(make_listops, seed, (n_train, n_val, n_test), LIMITS[name])
    else:
        train = find(source, data_dir, RELEASE, "listops-1000", "basic_train.tsv")
        paths = [train.with_name(f"basic_{split}.tsv") for split in SPLITS]
        key = fingerprint("listops-published", paths)
        make = partial(map, read_listops, paths)
    splits = cached(data_dir, key, make)
    return Data(name, *splits, len(LISTOPS_VOCAB), n_classes=10, symbols=LISTOPS_VOCAB)


def make_listops(seed, sizes, limits):
    """Grow trees until there are enough different ones for splits of these sizes."""
    n = sum(sizes)
    answers = {}  # tree -> answer, in the order of growth
    bar = tqdm(total=n, desc="listops", unit=" trees", disable=None)
    chunk = 0
    while len(answers) < n:
        levels = grow_trees(np.random.RandomState([seed, 2, chunk]), 4096, *limits)
        answers.update(zip(write_trees(levels), evaluate_trees(levels), strict=True))
        bar.update(len(answers) - bar.n)
        chunk += 1
    bar.close()
    examples = iter(answers.items())
    return [listops_split(list(islice(examples, size))) for size in sizes]


def listops_split(examples):
    """Make a split from a list of (tree, answer)."""

    trees, answers = zip(*examples, strict=True)
    tokens, lengths = pad([np.frombuffer(tree, np.uint8) for tree in trees])
    return Split(tokens, np.array(answers, np.int64), lengths)


def evaluate_ref(tokens):
    """Return the value of one tree, read token by token with a stack."""
    stack = [[]]  # per open operator: itself, then its arguments so far
    for token in tokens:
        if token < MIN:
            stack[-1].append(int(token))
        elif token < CLOSE:
            stack.append([token])
        else:
            operator, *args = stack.pop()
            stack[-1].append(OPERATORS[operator - MIN](args))
    ((value,),) = stack  # nothing is left open, and there is one root
    return value


def grow_trees(rng, n_trees, above, below, max_args):
    """Grow random trees, all of them one level at a time; keep those of a valid length.

    Returns levels, a list of (kind, n_args) with the nodes of all trees at that depth, left to
    right: kind (nodes,) is the token, n_args (nodes,) is 0 for digits.  The arguments of an
    operator are neighbors in the next level.
    """
    tree = np.arange(n_trees)  # the tree of each node of this level
    length = np.zeros(n_trees, np.int64)
    levels = []
    # the root is always an operator: a tree of one digit would be too short
    for p_operator in [1] + 8 * [0.25] + [0]:
        n = len(tree)
        is_operator = rng.random_sample(n) < p_operator
        n_args = np.where(is_operator, rng.randint(2, max_args + 1, n), 0)
        kind = np.where(is_operator, rng.randint(MIN, CLOSE, n), rng.randint(0, MIN, n))
        length += np.bincount(tree, 1 + is_operator, n_trees).astype(np.int64)  # its "]" counts
        n_args[length[tree] >= below] = 0  # a tree that is too long stops growing
        levels.append((kind.astype(np.uint8), n_args, tree))
        tree = np.repeat(tree, n_args)
    good = (length > above) & (length < below)
    return [(kind[good[tree]], n_args[good[tree]]) for kind, n_args, tree in levels]


def evaluate_trees(levels):
    """Return the value of every root, (trees,) uint8, from the deepest level up."""
    value = levels[-1][0]
    for kind, n_args in reversed(levels[:-1]):
        operators = np.flatnonzero(n_args)
        n = n_args[operators]
        first = np.cumsum(n) - n  # the arguments of operator i are values first[i] .. + n[i] - 1
        owner = np.repeat(np.arange(len(n), dtype=np.int32), n)  # int32 sorts faster
        args = np.sort(10 * owner + value) % 10  # sorted within each operator: values are 0 .. 9
        median = (args[first + (n - 1) // 2] + args[first + n // 2]) // 2
        total = np.add.reduceat(args, first) % 10
        answers = [args[first], args[first + n - 1], median, total]
        value = kind.copy()
        value[operators] = np.choose(kind[operators] - MIN, answers)
    return value


def write_trees(levels):
    """Write every tree in prefix order.  Returns a list of bytes.

    Bottom-up, count the tokens of every subtree; then top-down, place each node after its parent
    and its older siblings.
    """

    left = np.zeros(1, np.int64)  # tokens in all subtrees of a level that are left of node i
    lefts = [left]
    for _, n_args in reversed(levels):
        last = np.cumsum(n_args)  # the arguments of a node are first .. last - 1 of the level below
        first = last - n_args
        size = 1 + (n_args > 0) + left[last] - left[first]  # of the subtree; 1 for its "]"
        left = np.concatenate([[0], np.cumsum(size)])
        lefts.append(left)
    lefts.reverse()
    tokens = np.full(left[-1], CLOSE, np.uint8)
    place = left[:-1]  # of the nodes of this level in tokens
    for (kind, n_args), below in zip(levels, lefts[1:], strict=True):
        tokens[place] = kind
        first = np.cumsum(n_args) - n_args
        # an argument comes 1 after its parent, and after the subtrees of its older siblings
        place = np.repeat(place + 1 - below[first], n_args) + below[:-1]
    return [tree.tobytes() for tree in np.split(tokens, left[:-1])[1:]]


def read_listops(path):
    """Read a published file: a header, then a tree and its answer per line."""
    token = {word: i for i, word in enumerate(LISTOPS_VOCAB)}

    def parse(line):
        tree, answer = line.split("\t")
        words = tree.replace("(", " ").replace(")", " ").split()  # parentheses are redundant
        tokens = bytes([token[word] for word in words])
        expect("answer", int(answer), evaluate_ref(tokens))
        return tokens, int(answer)

    expected = "a header, then a tree, a tab and its answer per line"
    return listops_split(parse_lines(path, parse, expected, skip=1))


# --------------------------------------------------------------------------------------- pathfinder


def load_pathfinder(name, data_dir, seed, *, size=32, contour=14, n=None, source=None):
    """Pathfinder (Linsley et al. 2018, arXiv:1805.08315): are the two disks the ends of one snake?

    n pictures (200,000) of size x size pixels, drawn by pathfinder.py: 80 % train, 10 % val, 10 %
    test.  contour: segments per snake, 14 in the Long Range Arena, 9 and 6 are easier; size 128 is
    Path-X.  With a source, all published PNG files are read, in an order that depends on the seed.
    """
    if source is None:
        images, labels = pathfinder.load(data_dir, n or 200_000, size, contour, seed)
    else:
        require(n is None, f"{name}: n and pictures are for drawing, but a source has its own")
        images, labels = published_pathfinder(source, data_dir, seed, size, contour)
    n = len(labels)
    tenth = n // 10
    sizes = [n - 2 * tenth, tenth, tenth]
    splits = cut(images.reshape(n, size * size, 1), labels, size * size, sizes)
    return Data(name, *splits, vocab_size=256, n_classes=2, mean=(127.5,), std=(127.5,))


def published_pathfinder(source, data_dir, seed, size, contour):
    """Read curv_*/metadata/<k>.npy and the PNG files they name.  Returns images and labels."""
    name = "curv_baseline" if contour == 6 else f"curv_contour_length_{contour}"
    metadata = find(source, data_dir, RELEASE, f"pathfinder{size}", f"{name}/metadata")
    root = metadata.parent
    # text files, in spite of their names; 2.npy comes before 10.npy
    tables = sorted(metadata.glob("[0-9]*.npy"), key=lambda path: (len(path.name), path.name))

    def parse(line):
        folder, picture, _, label = line.split()[:4]
        return f"{folder}/{picture}", LABELS[label]

    rows = []  # (PNG file, label)
    for table in tables:
        rows += parse_lines(table, parse, "folder, PNG file, number, label 0 or 1 per line")
    empty = "imgs/0/sample_172.png"  # one file of pathfinder32/curv_baseline was published empty
    rows = [row for row in rows if row[0] != empty or (root / empty).stat().st_size > 0]
    order = np.random.RandomState([seed, 4]).permutation(len(rows))
    make = partial(read_shard, root, [rows[i] for i in order], size)
    key = fingerprint(f"pathfinder{size}-{contour}-files-{seed}", tables)
    return pathfinder.cached(Path(data_dir) / key, len(rows), size, make)


def read_shard(root, rows, size, i):
    """Pictures (n, size, size) and labels (n,) of shard i of the rows (PNG file, label)."""
    start = i * pathfinder.SHARD
    files, labels = zip(*rows[start : start + pathfinder.SHARD], strict=True)
    return np.stack([read_png(root / file, size) for file in files]), np.array(labels)


def read_png(path, size):
    """Return the pixels (size, size) uint8 of a PNG file."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ValueError(f"reading {path.name} needs Pillow: pip install pillow") from error
    with reading(path, f"an 8-bit grayscale PNG file of {size} x {size} pixels"):
        with Image.open(path, formats=["PNG"]) as picture:
            expect("mode and size", (picture.mode, picture.size), ("L", (size, size)))
            return np.array(picture)


# ------------------------------------------------------------------- image, text, retrieval, speech


def gray_symbols(rgb):
    """(n, 1024, 3) uint8 -> (n, 1024), as tf.image.rgb_to_grayscale: times 255.5, rounded down."""
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
    state space models read it.  scifar: three channels.  Reads the binary version of CIFAR-10.
    """
    test = find(source, data_dir, CIFAR, "cifar-10-batches-bin", "test_batch.bin")
    tokens = []
    labels = []
    for path in [test.with_name(f"data_batch_{i}.bin") for i in range(1, 6)] + [test]:
        with reading(path, "CIFAR-10 records of 3073 bytes, as many in each of the six files"):
            records = np.fromfile(path, np.uint8).reshape(-1, 3073)
            expect("bytes", records.size, test.stat().st_size)
        colors = records[:, 1:].reshape(-1, 3, 1024)
        tokens.append(convert(colors.swapaxes(1, 2)))
        labels.append(records[:, 0])
    tokens = np.concatenate(tokens)
    labels = np.concatenate(labels)
    n_test = len(records)  # the last file
    order, sizes = hold_out(len(labels), len(labels) - n_test, seed)
    splits = cut(tokens[order], labels[order], 1024, sizes)
    return Data(name, *splits, 256, 10, mean, std)


def load_text(name, data_dir, seed, *, characters=False, max_len=4096, source=None):
    """IMDB reviews, positive (1) or negative (0), from the tree aclImdb/{train,test}/{pos,neg}.

    Cut to max_len bytes, or to max_len characters: the frequent ones of train are symbols, all
    others <unk>.  A tenth of train is held out (many published numbers select on test instead).
    """
    root = find(source, data_dir, IMDB, "aclImdb", "train/pos").parent.parent
    texts = []
    labels = []
    for folder in ("train/neg", "train/pos", "test/neg", "test/pos"):
        paths = sorted((root / folder).glob("[!.]*.txt"))
        require(paths, f"{root / folder}: expected .txt files with reviews")
        for path in paths:
            with reading(path, "a review in UTF-8"):
                texts.append(path.read_bytes().decode("utf-8-sig")[:max_len])
        labels += [int(folder.endswith("pos"))] * len(paths)
        if folder == "train/pos":
            n_train = len(texts)
    order, sizes = hold_out(len(texts), n_train, seed)
    texts = [texts[i] for i in order]
    symbols = vocabulary(texts[: sizes[0]]) if characters else None
    tokens, lengths = encode(texts, symbols, max_len)
    splits = cut(tokens, np.array(labels)[order], lengths, sizes)
    vocab_size = len(symbols) if symbols else 256
    return Data(name, *splits, vocab_size, 2, symbols=symbols)


def load_retrieval(name, data_dir, seed, *, characters=False, max_len=4000, source=None):
    """AAN: does one paper cite the other?  Reads the published new_aan_pairs.*.tsv.

    Two documents per example, as in `load_text`, in the published splits (for any seed).
    """
    train = find(source, data_dir, RELEASE, "tsv_data", "new_aan_pairs.train.tsv")

    def parse(line):  # not csv: quotes and carriage returns are text
        label, _, _, first, second = line.split("\t")
        return LABELS[label], first[:max_len], second[:max_len]

    symbols = None
    splits = []
    for split in ("train", "eval", "test"):
        path = train.with_name(f"new_aan_pairs.{split}.tsv")
        rows = parse_lines(path, parse, "label 0 or 1, id, id, text, text per line")
        labels = np.array([label for label, _, _ in rows], np.int64)
        texts = [text for _, *pair in rows for text in pair]
        if characters and split == "train":
            symbols = vocabulary(texts)
        tokens, lengths = encode(texts, symbols, max_len)
        tokens = tokens.reshape(len(rows), 2, -1)
        splits.append(Split(tokens, labels, lengths.reshape(-1, 2)))
    vocab_size = len(symbols) if symbols else 256
    return Data(name, *splits, vocab_size, 2, symbols=symbols)


def vocabulary(texts):
    """<unk>, then at most 254 characters, the most frequent of those that occur MIN_COUNT times."""
    counts = Counter()
    for text in texts:
        counts.update(text)
    known = [character for character in counts if counts[character] >= MIN_COUNT]
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


def load_speech(name, data_dir, seed, *, stride=1, source=None):
    """Speech Commands v0.02, all 35 words, at most a second each: (n, 16000 / stride, 1) int16.

    The folders are the classes, in alphabetical order; the splits are the official ones (for any
    seed).  Every stride-th sample is kept; mean and std are those of the training samples.  Not
    part of the arena.
    """
    root = find(source, data_dir, SPEECH, "speech_commands_v0.02", "validation_list.txt").parent
    clips = sorted(f"{path.parent.name}/{path.name}" for path in root.glob("[!._]*/[!.]*.wav"))
    words = sorted({clip.split("/")[0] for clip in clips})
    lists = [root / "validation_list.txt", root / "testing_list.txt"]

    def make():
        val, test = [parse_lines(path, str.strip, "a clip per line") for path in lists]
        train = sorted(set(clips).difference(val, test))
        for part in (train, val, test):
            waves = [read_wav(root / clip)[::stride] for clip in tqdm(part, "wav", disable=None)]
            tokens, lengths = pad(waves)
            labels = [words.index(clip.split("/")[0]) for clip in part]
            yield Split(tokens[..., None], np.array(labels, np.int64), lengths)

    key = fingerprint(f"speech-{stride}", lists + [root / word for word in words])
    train, val, test = cached(data_dir, key, make)
    total = train.lengths.sum()
    mean = float(train.tokens.sum(dtype=np.float64) / total)  # the padding is zero
    power = sum(np.square(clip, dtype=np.float64).sum() for clip in train.tokens) / total
    std = float(np.sqrt(power - mean**2))
    return Data(name, train, val, test, None, len(words), (mean,), (std,))


def read_wav(path):
    """Return the samples (n,) int16 of a clip of at most a second."""
    with reading(path, "a wav file of one channel, 16 bits, 16 kHz, at most 16000 samples"):
        with wave.open(str(path)) as file:
            form = file.getparams()
            samples = np.frombuffer(file.readframes(16_000), "<i2")
        expect("channels, bytes, rate", form[:3], (1, 2, 16_000))
        expect("samples", len(samples), form.nframes)
    return samples.astype(np.int16)


# ------------------------------------------------------------------------------------------ lattice


def load_lattice(name, data_dir, seed, *, n_train=4000, n_val=1000, n_test=4000):
    """Binary textures on an 8 x 8 torus: at which distance are the sites coupled?

    Ising models with energy -0.45 sum_<ij> s_i s_j, in which a site interacts with the four sites 1
    (class 0) or 3 (class 1) steps away in its row and column: 12 Gibbs sweeps from random spins,
    which do not reach equilibrium.  The map x -> 3x mod 8 turns one energy into the other, so that,
    up to the order of the sweeps, only positions tell the classes apart.  Not part of the arena.
    """
    sizes = [n_train, n_val, n_test]
    rng = np.random.RandomState([seed, 1])
    labels = rng.permutation(sum(sizes)) % 2
    tokens = np.zeros((len(labels), 64), np.uint8)
    for label, distance in [(0, 1), (1, 3)]:
        n = np.count_nonzero(labels == label)
        spins = gibbs(rng, n, 8, distance, 0.45, 12)
        spins *= rng.choice([-1, 1], (n, 1))  # changes nothing: both signs are equally likely
        tokens[labels == label] = spins > 0
    splits = cut(tokens, labels, 64, sizes)
    return Data(name, *splits, vocab_size=2, n_classes=2)


def gibbs(rng, n, side, distance, beta, sweeps):
    """Run n Gibbs samplers in lock-step, site by site.  Returns (n, side^2) int8 of +-1."""
    site = np.arange(side * side).reshape(side, side)
    moves = [(distance, 0), (-distance, 0), (0, distance), (0, -distance)]
    neighbors = np.stack([np.roll(site, move, (0, 1)).ravel() for move in moves], 1)
    fields = np.arange(-4, 5)  # sums of the four neighbors
    p_up = 1 / (1 + np.exp(-2 * beta * fields))
    spins = rng.choice([-1, 1], (side * side, n)).astype(np.int8)
    for _ in range(sweeps):
        for i in range(side * side):
            field = spins[neighbors[i]].sum(0)  # (n,)
            up = rng.random_sample(n) < p_up[field + 4]
            spins[i] = 2 * up - 1
    return np.ascontiguousarray(spins.T)


# ----------------------------------------------------------------------------------- tasks, summary

Task = namedtuple("Task", "load options size url", defaults=[""])
GRAY = dict(convert=gray_numbers, mean=(122.6,), std=(61.0,))
COLOR = dict(convert=np.asarray, mean=(125.307, 122.961, 113.8575), std=(62.985, 61.965, 66.555))
TASKS = {
    "lattice": Task(load_lattice, {}, "4,000/1,000/4,000, L 64"),
    "listops": Task(load_listops, {}, "96,000/2,000/2,000, L < 2000"),
    "listops-small": Task(load_listops, {}, "as listops, L < 500"),
    "listops-tiny": Task(load_listops, dict(n_train=20_000), "20,000/2,000/2,000, L < 128"),
    "text": Task(load_text, {}, "22,500/2,500/25,000, L <= 4096 bytes", IMDB),
    "text-characters": Task(load_text, dict(characters=True), "as text", IMDB),
    "retrieval": Task(load_retrieval, {}, "147,086 pairs to train, L <= 4000", RELEASE),
    "retrieval-characters": Task(load_retrieval, dict(characters=True), "as retrieval", RELEASE),
    "image": Task(load_image, {}, "45,000/5,000/10,000, L 1024", CIFAR),
    "image-real": Task(load_image, GRAY, "as image, numbers", CIFAR),
    "scifar": Task(load_image, COLOR, "as image, in color", CIFAR),
    "speech": Task(load_speech, {}, "84,843 clips to train, L 16000", SPEECH),
    "speech-8k": Task(load_speech, dict(stride=2), "as speech, L 8000", SPEECH),
}
for side, level in product(pathfinder.SHEETS, ("", "-medium", "-easy")):
    options = dict(size=side, contour={"": 14, "-medium": 9, "-easy": 6}[level])
    about = f"160,000/20,000/20,000, L {side**2}"
    TASKS[f"pathfinder{side}{level}"] = Task(load_pathfinder, options, about)
TASKS["pathx"] = TASKS["pathfinder128"]
TASKS["pathx256"] = TASKS["pathfinder256"]


def load(task, data_dir="data", seed=0, **options):
    """Return the named task as `Data`; options are the keyword arguments of its load function.

    A task can also be your own: a .npz, .csv or .tsv file, or file.py:function (own_data.py).
    """
    if str(task).lower().endswith((".npz", ".csv", ".tsv")) or ".py:" in str(task):
        import own_data  # it imports this file

        return own_data.load(task, seed, **options)
    own = "a .npz, .csv or .tsv file, file.py:function"
    expected = f"expected one of {own}, {', '.join(TASKS)}"
    require(task in TASKS, f"unknown task {task!r}: {expected}")
    for name, value in options.items():
        fits = not isinstance(value, int) or isinstance(value, bool) or value > 0
        require(fits, f"{task}: {name} is {value}, expected 1 or more")
    options = TASKS[task].options | options
    data = TASKS[task].load(task, data_dir, seed, **options)
    check(data)
    return data


@contextmanager
def naming_options(task, given):
    """Turn the error of an option that the task does not take into a ValueError."""
    try:
        yield
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise ValueError(f"task {task} does not take all of: {', '.join(given)}") from error


def check(data):
    """Raise ValueError if a split is empty, or has empty inputs or labels of another task."""
    for name in SPLITS:
        labels = getattr(data, name).labels
        empty = np.argwhere(getattr(data, name).lengths < 1)[:1].tolist()
        require(not empty, f"{data.name}: {name}, example {empty} (from 0) has length 0")
        if data.n_classes is None:
            expected = "finite targets"
            fits = np.isfinite(labels).all()
        else:
            expected = f"labels 0 .. {data.n_classes - 1}"
            fits = np.isin(labels, range(data.n_classes)).all()
        found = f"{len(labels)} examples with labels {np.unique(labels)[:20].tolist()}"
        reason = f"{data.name}: {name} has {found}; expected at least one, {expected}"
        require(len(labels) > 0 and fits, reason)


def summary(data):
    """What to know about a task before training, as text."""
    kind = "symbols" if data.mean is None else f"numbers, mean {data.mean}, std {data.std}"
    goal = "regression" if data.n_classes is None else f"{data.n_classes} classes"
    size = "" if data.vocab_size is None else f"{data.vocab_size} "
    lines = [f"{data.name}: {goal}, {size}{kind}"]
    for name in SPLITS:
        split = getattr(data, name)
        low, median, high = np.quantile(split.lengths, [0, 0.5, 1]).astype(int)
        lines.append(f"  {name:5} {len(split):7,} examples, length {low} .. {median} .. {high}")
    if data.n_classes is not None:
        guess = np.bincount(data.train.labels).argmax()
        level = (data.test.labels == guess).mean()
        lines.append(f"  trivial baseline, most frequent label: {100 * level:.1f} %")
    lines.append(f"  sha256 {checksum(data)}")
    return "\n".join(lines)


def checksum(data):
    """sha256 (hex) over tokens, labels and lengths of the three splits."""
    digest = hashlib.sha256()
    for split in (data.train, data.val, data.test):
        for array in (split.tokens, split.labels, split.lengths):
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


# --------------------------------------------------------------------------------- arrays and files


def pad(rows):
    """Pad a list of arrays (length,) with zeros.  Returns tokens (n, L) and lengths (n,)."""
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), lengths.max()), rows[0].dtype)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return tokens, lengths


def cut(tokens, labels, lengths, sizes):
    """Cut arrays into consecutive splits of the given sizes.  lengths: one number, or (n,)."""
    labels = labels.astype(np.int64)
    lengths = np.full(len(labels), lengths, np.int32)
    bounds = np.cumsum([0, *sizes])
    return [Split(tokens[i:j], labels[i:j], lengths[i:j]) for i, j in pairwise(bounds)]


def hold_out(n, n_train, seed):
    """Hold a tenth of train out.  Returns the order of n examples and the sizes of the splits."""
    order = np.arange(n)
    order[:n_train] = np.random.RandomState([seed, 5]).permutation(n_train)
    tenth = n_train // 10
    return order, [n_train - tenth, tenth, n - n_train]


def cached(data_dir, key, make):
    """Return three splits from a file in data_dir; make() and write them first if there is none."""
    path = Path(data_dir) / f"{key}.npz"
    if not path.exists():
        with naming(path), appearing(path) as part:  # not writable: fails before make()
            arrays = []
            for split in make():
                arrays += [split.tokens, split.labels, split.lengths]
            np.savez(part, *arrays)
    with reading(path, "an undamaged cache (delete it to generate it again)"):
        with np.load(path) as file:
            arrays = list(file.values())
        return [Split(*arrays[i : i + 3]) for i in (0, 3, 6)]


def fingerprint(name, paths):
    """Name a cache after files or folders: a change in their size or date changes the name."""
    facts = ""
    for path in paths:
        stat = path.stat()
        facts += f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}\n"
    return f"{name}-{hashlib.sha256(facts.encode()).hexdigest()[:16]}"


@contextmanager
def reading(path, expected):
    """Turn any error inside into a ValueError that names the file and what to expect."""
    try:
        yield
    except Exception as error:  # numpy, zlib, wave and tarfile raise a dozen kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: {reason}; expected {expected}") from error


def expect(name, found, wanted):
    """Raise ValueError if what a file says is not what it should say."""
    require(found == wanted, f"{name} {found}, not {wanted}")


def parse_lines(path, parse, expected, skip=0):
    """Return parse(line) for all lines but the first `skip`; errors name the file and the line."""
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            with reading(f"{path}, line {number}", expected):
                text = line.decode("utf-8-sig").rstrip("\r\n")
                if number > skip:
                    rows.append(parse(text))
    require(rows, f"{path}: no examples; expected {expected}")
    return rows


def find(source, data_dir, url, folder, name):
    """Return the path of `name` in `folder` in source (a directory or an archive) or data_dir."""
    root = Path(data_dir if source is None else source)
    if root.is_file():
        root = unpack(root, data_dir)
    # the inner copies of the release are the good ones
    for place in (f"lra_release/lra_release/{folder}", f"lra_release/{folder}", folder, ""):
        if (root / place / name).exists():
            return root / place / name
    archive = root / url.split("/")[-1]
    if archive.is_file():
        return find(archive, data_dir, url, folder, name)
    raise ValueError(f"{root}: expected {folder}/{name} in it; published as {url}")


def unpack(archive, data_dir):
    """Unpack a tar archive under data_dir, once.  Returns the folder."""
    target = Path(data_dir) / fingerprint(f"unpacked-{archive.name}", [archive])
    if target.exists():
        return target
    expected = f"a whole tar archive, and space for its files in {data_dir}"
    with reading(archive, expected), appearing(target) as part:
        with tarfile.open(archive) as tar:
            members = tqdm(tar, desc=archive.name, unit=" files", disable=None)
            tar.extractall(part, members, filter="data")  # refuses what would land outside
            while tar.fileobj.read(2**20):
                pass  # a compressed file has its checksum at the end
    return target


def download(url, data_dir):
    """Fetch an archive into data_dir, unless it is there.  Returns its path.

    Checks the sha256 if one was published.
    """
    path = Path(data_dir) / url.split("/")[-1]
    if path.exists():
        return path
    advice = f"a whole archive: fetch it in another way, put it at {path} or pass it as --source"
    with reading(url, advice), appearing(path) as part:
        with tqdm(desc=path.name, unit="B", unit_scale=True, disable=None) as bar:
            urllib.request.urlretrieve(url, part, lambda i, size, total: bar.update(size))
        digest = hashlib.sha256(np.memmap(part, mode="r")).hexdigest()
        expect("sha256", digest, SHA256.get(url, digest))
    return path


# ----------------------------------------------------------------------------------- check, command


def self_check():
    """(name, error, limit) rows: the fast way gives what the slow one gives."""
    levels = grow_trees(np.random.RandomState(0), 512, 100, 500, 10)
    slow = np.array([evaluate_ref(tree) for tree in write_trees(levels)])
    wrong = np.mean(evaluate_trees(levels) != slow)
    return [("ListOps: values by level == by stack", wrong, 0)]


@one_line_errors("lra_data.py")
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    own = "a task, a .npz, .csv or .tsv file, or file.py:function (default: list all tasks)"
    parser.add_argument("task", nargs="?", help=own)
    parser.add_argument("--data-dir", default="data", help="folder for data (default: data)")
    parser.add_argument("--source", help="directory or tar archive to read (default: --data-dir)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the data (default: 0)")
    parser.add_argument("--n", type=int, help="number of Pathfinder pictures (default: 200000)")
    parser.add_argument("--text-column", help="column with the texts (default: text)")
    parser.add_argument("--label-column", help="column with the labels (default: label)")
    each = "one token per character of a text (default: per byte)"
    parser.add_argument("--characters", action="store_true", default=None, help=each)

    parser.add_argument("--max-len", type=int, help="tokens per text (default: 4096 or 4000)")
    parser.add_argument("--download", action="store_true", help="fetch the published archive first")
    parser.add_argument("--check", action="store_true", help="check this file, then exit")
    args = parser.parse_args(argv)
    if args.check:
        return 0 if print_table(self_check()) else 1
    if args.task is None:
        for name, task in TASKS.items():
            print(f"{name:22} {task.size:38} {task.url or 'generated'}")
        return 0
    names = ("source", "n", "text_column", "label_column", "characters", "max_len")
    options = {name: getattr(args, name) for name in names}
    options = {name: value for name, value in options.items() if value is not None}
    if args.download:
        url = args.task in TASKS and TASKS[args.task].url
        require(url, f"--download: no published archive of {args.task} is known")
        print(f"archive: {download(url, args.data_dir)}")
    with naming_options(args.task, options):
        data = load(args.task, args.data_dir, args.seed, **options)
    print(summary(data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
