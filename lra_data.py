"""The Long Range Arena tasks as numpy arrays: generated or loaded, checked, without TensorFlow.

    python lra_data.py --list
    python lra_data.py lattice --show

Tay et al. 2020, "Long Range Arena", arXiv:2011.04006v1.

`load(task)` gives a `Data` with three `Split`s. What is slow to make is cached under `data_dir`.
The same task, options and seed give the same bytes, whatever the number of processes.
"""

import argparse
import hashlib
import os
import sys
import zipfile
import zlib
from dataclasses import dataclass
from functools import partial
from itertools import count, pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Split:
    """One split. n examples, the longest has L positions.

    tokens: (n, L) uint8 symbols, or (n, L, C) uint8 or int16 numbers in C channels; zero padded.
    labels: (n,) int64, 0 .. n_classes - 1.   lengths: (n,) int32, how many positions are real.
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


# --------------------------------------------------------------------------- arrays and the cache


def pad(rows):
    """Rows of different lengths as one zero padded array (n, L, ...), and their lengths (n,)."""
    lengths = np.array([len(row) for row in rows], np.int32)
    keep = np.arange(lengths.max(initial=1)) < lengths[:, None]  # (n, L)
    tokens = np.zeros(keep.shape + rows[0].shape[1:], rows[0].dtype)
    tokens[keep] = np.concatenate(rows)
    return tokens, lengths


def cut(tokens, labels, lengths, sizes):
    """Consecutive splits of the given sizes."""
    labels, lengths = labels.astype(np.int64), lengths.astype(np.int32)
    stops = pairwise(np.cumsum([0] + list(sizes)))
    return [Split(tokens[a:b], labels[a:b], lengths[a:b]) for a, b in stops]


def cached(folder, make):
    """The three splits in `folder`, one .npz each; `make()` gives them when the folder is missing.

    Written under a temporary name and renamed: a killed run leaves no half cache. The padding is
    not stored. ValueError when a file is damaged.
    """
    if not folder.exists():
        splits = make()
        part = folder.with_name(f"{folder.name}.part{os.getpid()}")
        part.mkdir(parents=True)
        for name, split in zip(SPLITS, splits, strict=True):
            rows = split.tokens.reshape(
                split.lengths.size, -1, *split.tokens.shape[split.lengths.ndim + 1 :]
            )
            keep = np.arange(rows.shape[1]) < split.lengths.reshape(-1, 1)
            np.savez(
                part / f"{name}.npz", flat=rows[keep], labels=split.labels, lengths=split.lengths
            )
        part.rename(folder)
    return [read_npz(folder / f"{name}.npz") for name in SPLITS]


def read_npz(path):
    """One split that `cached` wrote."""
    try:
        with np.load(path) as file:
            flat, labels, lengths = file["flat"], file["labels"], file["lengths"]
        keep = np.arange(lengths.max()) < lengths[..., None]  # (n, L), (n, 2, L) for pairs
        tokens = np.zeros(keep.shape + flat.shape[1:], flat.dtype)
        tokens[keep] = flat
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path}: damaged ({error}); delete its folder to make it again"
        ) from error
    return Split(tokens, labels, lengths)


# ------------------------------------------------------------------------------------------ lattice


def lattice(
    data_dir,
    seed,
    *,
    distances=(1, 3),
    beta=0.45,
    side=8,
    sweeps=12,
    n_train=1000,
    n_val=500,
    n_test=2000,
):
    """Binary textures on a torus, flattened to L = side^2: at which distance are sites coupled?

    Class c is an Ising model whose sites interact with the four sites `distances[c]` steps away
    along the rows and columns, P(s) ~ exp(beta sum_<ij> s_i s_j), sampled by `sweeps` Gibbs sweeps
    from noise and turned over by a random global sign: neither the mean nor any single site tells
    the class. With side 8, the map x -> 3x mod 8 turns distance 1 into 3, so every statistic that
    ignores positions agrees too. Tokens 0 and 1. Not part of the Long Range Arena: it is the task
    that fits a laptop's minutes.
    """
    if (
        len(distances) != 2
        or not all(0 < d < side for d in distances)
        or distances[0] == distances[1]
    ):
        raise ValueError(
            f"distances {distances}: expected two different integers between 1 and {side - 1}"
        )
    if min(n_train, n_val, n_test) < 2 or sweeps < 0:
        raise ValueError(
            f"sizes {n_train}, {n_val}, {n_test}, sweeps {sweeps}: expected sizes >= 2, sweeps >= 0"
        )
    rng = np.random.RandomState(
        [seed, 1]
    )  # RandomState: its stream is frozen in all versions of numpy
    n = n_train + n_val + n_test
    labels = rng.permutation(n) % 2
    tokens = np.zeros((n, side * side), np.uint8)
    for c, distance in enumerate(distances):
        spins = gibbs(rng, int((labels == c).sum()), side, distance, beta, sweeps)
        spins *= rng.choice([-1, 1], (len(spins), 1)).astype(np.int8)
        tokens[labels == c] = spins > 0
    lengths = np.full(n, side * side)
    splits = cut(tokens, labels, lengths, [n_train, n_val, n_test])
    return Data("lattice", *splits, vocab_size=2, n_classes=2)


def gibbs(rng, n, side, distance, beta, sweeps):
    """n independent Ising samples, (n, side^2) int8 of +-1.

    Sites are visited one after the other, so any coupling distance is valid (a checkerboard is
    not, for even ones); the samples go in lock-step."""
    at = np.arange(side * side).reshape(side, side)
    moves = [(distance, 0), (-distance, 0), (0, distance), (0, -distance)]
    neighbours = np.stack([np.roll(at, move, (0, 1)).ravel() for move in moves], 1)  # (side^2, 4)
    p_up = 1 / (1 + np.exp(-2 * beta * np.arange(-4, 5)))  # by the sum of the four neighbours
    spins = rng.choice([-1, 1], (side * side, n)).astype(
        np.int8
    )  # (side^2, n): a site is contiguous
    for _ in range(sweeps):
        for site in range(side * side):
            field = spins[neighbours[site]].sum(0, dtype=np.int64)  # (n,)
            spins[site] = 2 * (rng.random_sample(n) < p_up[field + 4]) - 1
    return np.ascontiguousarray(spins.T)


# ------------------------------------------------------------------------------------------ listops

LISTOPS_VOCAB = tuple("0 1 2 3 4 5 6 7 8 9 [MIN [MAX [MED [SM ]".split())  # token i is entry i
MIN, CLOSE = 10, 14  # operators are MIN .. CLOSE - 1


def listops(
    data_dir,
    seed,
    *,
    name="listops",
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
    left out. The answer, 0 .. 9, is the label. 100,000 full-size examples take about 25 s.

    source: None generates. A directory or archive with the published `basic_{train,val,test}.tsv`
    reads those and evaluates every tree; ValueError names file and line.
    """
    sizes = [n_train, n_val, n_test]
    if source is not None:
        splits = read_listops(source, data_dir)
    elif not (
        1 <= above <= below - 2 and max_depth >= 2 and 2 <= max_args <= 25 and min(sizes) > 0
    ):
        raise ValueError(
            f"above {above}, below {below}, max_depth {max_depth}, max_args {max_args}, "
            f"sizes {sizes}: expected 1 <= above <= below - 2, max_depth >= 2, "
            "2 <= max_args <= 25, sizes >= 1"
        )
    else:
        limits = (max_depth, max_args, above, below)
        key = "-".join(map(str, ["listops", *limits, *sizes, f"seed{seed}"]))
        splits = cached(
            Path(data_dir) / key, lambda: cut(*listops_trees(seed, sum(sizes), *limits), sizes)
        )
    return Data(name, *splits, len(LISTOPS_VOCAB), n_classes=10, symbols=LISTOPS_VOCAB)


def listops_trees(seed, n, max_depth, max_args, above, below):
    """n different trees: tokens (n, L) uint8, answers (n,), lengths (n,)."""
    seen, rows, answers = set(), [], []
    bar = tqdm(total=n, desc="listops", unit=" trees", disable=None)
    for chunk in count():
        if chunk > 20 + len(rows) // 10:
            raise ValueError(
                f"found {len(rows)} of {n} different trees with {above} < length < {below} among "
                f"{4096 * chunk}: expected wider limits or a smaller set"
            )
        rng = np.random.RandomState([seed, 2, chunk])
        levels, length = grow_trees(rng, 4096, max_depth, max_args, above, below)
        flat, value = lay_out(levels, length), evaluate_trees(levels)
        for tree, answer in zip(np.split(flat, np.cumsum(length)[:-1]), value, strict=True):
            fingerprint = tree.tobytes()
            if fingerprint not in seen:
                seen.add(fingerprint)
                rows.append(tree)
                answers.append(answer)
        bar.update(min(len(rows), n) - bar.n)
        if len(rows) >= n:
            break
    bar.close()
    tokens, lengths = pad(rows[:n])
    return tokens, np.array(answers[:n]), lengths


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


def lay_out(levels, length):
    """The trees written out in prefix order, one after the other: (length.sum(),) uint8."""
    sizes = [np.ones(len(levels[-1][0]), np.int64)]  # tokens under each node, from the deepest up
    for _, n_args in levels[-2::-1]:
        at, size = np.flatnonzero(n_args), np.ones(len(n_args), np.int64)
        if len(at):
            size[at] = 2 + np.add.reduceat(sizes[0], np.cumsum(n_args[at]) - n_args[at])
        sizes.insert(0, size)
    flat = np.full(length.sum(), CLOSE, np.uint8)
    place = np.cumsum(length) - length  # of the nodes of the present level
    for depth, (kind, n_args) in enumerate(levels):
        flat[place] = kind
        if depth + 1 < len(levels):
            at = np.flatnonzero(n_args)
            before = np.cumsum(sizes[depth + 1]) - sizes[depth + 1]
            first = before[np.cumsum(n_args[at]) - n_args[at]]  # of each operator's arguments
            place = np.repeat(place[at] + 1 - first, n_args[at]) + before
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
                raise ValueError(
                    f"token {place}: ']' closes nothing, expected an operator with arguments"
                )
            stack[-1].append(apply(operator - MIN, sorted(args)))
    if len(stack) > 1 or len(stack[0]) != 1:
        raise ValueError(
            f"{len(stack) - 1} operators left open, {len(stack[0])} roots: expected 0 and 1"
        )
    return int(stack[0][0])


def apply(operator, args):
    """Operator 0 .. 3 of sorted digits."""
    median = (args[(len(args) - 1) // 2] + args[len(args) // 2]) // 2
    return (args[0], args[-1], median, sum(args) % 10)[operator]


def read_listops(source, data_dir):
    """The published files: header `Source<tab>Target`; lines of a tree and its value."""
    names = [f"basic_{name}.tsv" for name in SPLITS]
    folder = find(
        source, data_dir, [place + names[0] for place in places("listops-1000", "listops")]
    ).parent
    files = [folder / name for name in names]
    return cached(
        Path(data_dir) / fingerprint("listops", files), lambda: list(map(read_listops_file, files))
    )


def read_listops_file(path):
    index = {word: i for i, word in enumerate(LISTOPS_VOCAB)}
    rows, labels = [], []
    for number, (tree, label) in read_table(path, ["Source", "Target"]):
        words = tree.replace("(", " ").replace(")", " ").split()
        try:
            row = [index[word] for word in words]
            value = listops_value(row)
        except KeyError as error:
            raise ValueError(
                f"{path}:{number}: unknown token {error}, expected one of {LISTOPS_VOCAB}"
            ) from None
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not a tree: {error}") from None
        if label != str(value):
            raise ValueError(
                f"{path}:{number}: label {label!r}, expected {value}, the value of the tree"
            )
        rows.append(np.array(row, np.uint8))
        labels.append(value)
    tokens, lengths = pad(rows)
    return Split(tokens, np.array(labels, np.int64), lengths)


# --------------------------------------------------------------- directories, archives, text files


def places(*names):
    """Where the release has a folder: its inner tree first, the outer copies differ."""
    return [
        f"{above}{name}/"
        for above in ("lra_release/lra_release/", "lra_release/", "")
        for name in names
    ] + [""]


def find(source, data_dir, candidates):
    """The first of the relative paths that exists under `source`."""
    root = Path(data_dir if source is None else source)
    for candidate in candidates:
        if (root / candidate).exists():
            return root / candidate
    raise ValueError(f"{root}: expected one of {', '.join(candidates)} in it")


def fingerprint(name, files):
    """A cache name that changes when one of the files does."""
    stats = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists()
    ]
    return f"{name}-{hashlib.sha256(repr(stats).encode()).hexdigest()[:16]}"


def read_text(path):
    """A whole UTF-8 file."""
    try:
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a UTF-8 text file: {error}") from error


def read_table(path, header):
    """Lines of a tab separated file with a header, no quoting: yields (line number, fields)."""
    lines = read_text(path).split("\n")
    if lines[0].rstrip("\r").split("\t") != header:
        raise ValueError(
            f"{path}:1: header {lines[0][:80]!r}, expected {header} separated by a tab"
        )
    if lines[-1] != "":
        raise ValueError(f"{path}:{len(lines)}: the last line has no end: the file is cut")
    if len(lines) < 3:
        raise ValueError(f"{path}: no examples after the header")
    for number, line in enumerate(lines[1:-1], 2):
        fields = line.rstrip("\r").split("\t")
        if len(fields) != len(header):
            raise ValueError(
                f"{path}:{number}: {len(fields)} columns, expected {len(header)}: {header}"
            )
        yield number, fields


# -------------------------------------------------------------------------------------------- tasks

TASKS = {
    "lattice": lattice,
    "listops": listops,
    "listops-small": partial(listops, name="listops-small", above=100, below=500),
    "listops-tiny": partial(
        listops, name="listops-tiny", above=16, below=128, max_args=5, n_train=20_000
    ),
}


def load(task, data_dir="data", seed=0, **options):
    """The named task as `Data`. `options` are the keyword arguments of the function in `TASKS`.

    ValueError for an unknown task or a bad option value, TypeError for an unknown option.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}: expected one of {', '.join(sorted(TASKS))}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed {seed}: expected 0 <= seed < 2^32")
    return TASKS[task](data_dir, seed, **options)


def checksum(data):
    """sha256 (hex) over tokens, labels and lengths of the three splits."""
    digest = hashlib.sha256()
    for split in (data.train, data.val, data.test):
        for array in (split.tokens, split.labels, split.lengths):
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def summary(data):
    """What a reader wants to know of a task before training, as text."""
    lines = [f"{data.name}: vocabulary {data.vocab_size}, {data.n_classes} classes"]
    for name in ("train", "val", "test"):
        split = getattr(data, name)
        share = np.bincount(split.labels, minlength=data.n_classes) / len(split)
        low, mid, high = split.lengths.min(), int(np.median(split.lengths)), split.lengths.max()
        lines.append(
            f"  {name:5} {len(split):7,} examples, length {low} .. {mid} .. {high}, "
            f"label shares {share.min():.3f} .. {share.max():.3f}"
        )
    majority, first = trivial_levels(data)
    lines.append(
        f"  most frequent label {100 * majority:.1f} %, label by first token {100 * first:.1f} %"
    )
    lines.append(f"  sha256 {checksum(data)}")
    return "\n".join(lines)


def trivial_levels(data):
    """Test accuracy of the most frequent label, and of the most frequent one by first token."""
    first = [
        split.tokens.reshape(len(split), -1)[:, 0].astype(np.int64)
        for split in (data.train, data.test)
    ]
    table = np.zeros((int(max(map(np.max, first))) + 1, data.n_classes), np.int64)
    np.add.at(table, (first[0], data.train.labels), 1)
    majority = table.sum(0).argmax()
    return (data.test.labels == majority).mean(), (
        data.test.labels == table.argmax(1)[first[1]]
    ).mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("task", nargs="?", help="print the summary of this task")
    parser.add_argument("--data-dir", default="data", help="cache directory (default: data)")
    parser.add_argument("--seed", type=int, default=0, help="seed of generated data (default: 0)")
    parser.add_argument("--list", action="store_true", help="name every task")
    args = parser.parse_args()
    if args.list or not args.task:
        print("\n".join(sorted(TASKS)))
        return 0
    print(summary(load(args.task, args.data_dir, args.seed)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
