"""The Long Range Arena tasks as numpy arrays: generated or loaded, checked, without TensorFlow.

    python lra_data.py --list
    python lra_data.py lattice --show

Tay et al. 2020, "Long Range Arena", arXiv:2011.04006v1.

`load(task)` gives a `Data` with three `Split`s. What is slow to make is cached under `data_dir`.
The same task, options and seed give the same bytes, whatever the number of processes.
"""

import argparse
import hashlib
import sys
from dataclasses import dataclass
from itertools import pairwise

import numpy as np


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
    return Data(
        "lattice", *cut(tokens, labels, [n_train, n_val, n_test]), vocab_size=2, n_classes=2
    )


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


def cut(tokens, labels, sizes, lengths=None):
    """Consecutive splits of the given sizes."""
    if lengths is None:
        lengths = np.full(len(labels), tokens.shape[1])
    stops = np.cumsum([0] + list(sizes))
    return [
        Split(tokens[a:b], labels[a:b].astype(np.int64), lengths[a:b].astype(np.int32))
        for a, b in pairwise(stops)
    ]


# -------------------------------------------------------------------------------------------- tasks

TASKS = {"lattice": lattice}


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
    lines.append(f"  sha256 {checksum(data)}")
    return "\n".join(lines)


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
