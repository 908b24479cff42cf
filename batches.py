"""A split on the device, and the random batches drawn from it (pretrain.py).

    load_data -> describe -> resident (a split on the device, once) -> draw (indices) -> gather

B counts sequences: a pair of documents is two of them, with one label.
"""

import itertools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

import lra_data
from pathfinder import require
from settings import OWN_SYMBOLS, OWN_VALUES

# Settings that are options of lra_data.load, and their names there.
OPTIONS = {
    "source": "source",
    "pictures": "n",
    "text_column": "text_column",
    "label_column": "label_column",
    "characters": "characters",
    "max_len": "max_len",
}


def load_data(config):
    """The task as arrays.  ValueError if there is no such task, or if it has no such option."""
    given = [name for name in OPTIONS if getattr(config, name)]
    options = {OPTIONS[name]: getattr(config, name) for name in given}
    with lra_data.naming_options(config.task, given):
        return lra_data.load(config.task, data_dir=config.data_dir, **options)


def describe(data):
    """What a run keeps of its data: enough to refuse other data and to rebuild its model."""
    names = "name n_classes classes vocab_size symbols mean std y_mean y_std"
    about = {name: getattr(data, name) for name in names.split()}
    splits = [data.train, data.val, data.test]
    for name, split in zip(lra_data.SPLITS, splits, strict=True):
        about[name] = list(split.tokens.shape)  # (n, L), (n, L, C) or (n, 2, L)
    axis = -1 if data.mean is None else 1  # of length L
    about["n_channels"] = None if data.mean is None else about["train"][2]
    about["pairs"] = data.train.lengths.ndim == 2
    about["min_len"] = int(min(split.lengths.min() for split in splits))
    about["max_len"] = max(split.tokens.shape[axis] for split in splits)
    about["checksum"] = lra_data.checksum(data)
    return about


def fitted(config, about):
    """Config completed for these data.  ValueError if it does not fit them.

    For your own data: mask ratio, loss, and pretraining steps (30 epochs, 300 to 3,000).
    """
    ratio, loss = OWN_SYMBOLS if about["mean"] is None else OWN_VALUES
    losses = [loss]
    if about["n_channels"] == 1 and about["vocab_size"]:
        losses = ["ce", "l1"]  # gray levels are symbols and numbers
    config = replace(config, mask_ratio=config.mask_ratio or ratio, loss=config.loss or loss)
    if config.pretrain_steps is None:
        epoch = math.ceil(about["train"][0] / config.pretrain_batch_size)
        steps = min(max(30 * epoch, 300), 3000)
        config = replace(config, pretrain_steps=steps)
    fits = config.objective == "none" or config.loss in losses
    require(fits, f"loss {config.loss!r} does not fit task {config.task}: use --loss")
    short, long = about["min_len"], about["max_len"]
    once = not config.compile or config.model == "transformer" or short == long
    many = f"for each length from {short} to {long}"
    require(once, f"compile: {config.model} would be compiled {many}, drop it")
    return config


def resident(split, about, device):
    """A split on the device, regression targets standardized."""
    tokens = torch.from_numpy(np.ascontiguousarray(split.tokens)).to(device)
    labels = torch.from_numpy(split.labels).to(device)
    if about["y_mean"] is not None:
        labels = standardize(labels, about)
    return Resident(tokens, labels, np.asarray(split.lengths), about)


@dataclass
class Resident:
    """A split, so that a batch is a draw of indices."""

    tokens: torch.Tensor  # (n, L) symbols, (n, L, C) numbers, or (n, 2, L) symbols of pairs
    labels: torch.Tensor  # (n,) classes or (n, k) targets
    lengths: np.ndarray  # (n,) or (n, 2), on the host: they decide the order of batches
    about: dict  # see `describe`

    def __len__(self):
        return len(self.lengths)

    def longest(self):
        """(n,) length of each example, or of the longer document of each pair."""
        return self.lengths.reshape(len(self), -1).max(1)

    def subset(self, n):
        """The first n examples of one fixed random order, so that subsets are nested."""
        fits = 0 < n <= len(self)
        require(fits, f"labels {n}: the training split has {len(self)} examples")
        chosen = np.random.RandomState(42).permutation(len(self))[:n]
        lengths = self.lengths[chosen]
        return Resident(self.tokens[chosen], self.labels[chosen], lengths, self.about)

    def documents(self):
        """Pairs as twice as many single documents: denoising needs no pairs."""
        if self.lengths.ndim == 1:
            return self
        tokens = self.tokens.flatten(0, 1)
        labels = self.labels.repeat_interleave(2, 0)
        return Resident(tokens, labels, self.lengths.reshape(-1), self.about)

    def gather(self, index, multiple=1):
        """Examples by index, cut by `trim`; pairs as two sequences each."""
        raw = self.tokens[send(index, self.tokens.device)]
        if self.lengths.ndim == 2:
            raw = raw.flatten(0, 1)
        return trim(raw, self.lengths[index].reshape(-1), multiple)


def send(values, device):
    """A small array or list on the device; does not wait for the work that is queued there."""
    values = torch.as_tensor(values)
    if torch.device(device).type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def trim(raw, lengths, multiple=1):
    """Cut (B, L[, C]) to the longest of lengths, a numpy (B,).

    Returns raw (B, L[, C]) and keep (B, L) bool, None without padding.  L is rounded up to a
    multiple: on a GPU each new length is set up by the attention kernel and captured as a graph.
    """
    longest = int(lengths.max())
    raw = raw[:, : longest + -longest % multiple]
    L = raw.shape[1]
    if lengths.min() == L:
        return raw, None  # attention can use its fastest kernel
    lengths = send(lengths, raw.device)
    return raw, torch.arange(L, device=raw.device) < lengths[:, None]


def normalize(raw, about):
    """(B, L, C) numbers -> (raw - mean) / std, with the task's mean and std (lra_data.Data)."""
    mean = send(about["mean"], raw.device)
    std = send(about["std"], raw.device)
    return (raw - mean) / std


def standardize(y, about):
    """y (n, k) -> float64 targets of mean 0 and standard deviation 1 in training."""
    y = y.double()
    return (y - y.new_tensor(about["y_mean"])) / y.new_tensor(about["y_std"])


def in_units_of_y(target, about):
    """The inverse of `standardize`."""
    target = target.double()
    return target * target.new_tensor(about["y_std"]) + target.new_tensor(about["y_mean"])


def draw(lengths, batch_size, *seed):
    """Yield the indices of each step, without end; the same arguments give the same indices.

    An epoch is a random permutation, cut into pools of 64 to 127 batches (one pool if there are
    fewer).  Each pool is sorted by length and cut into batches: every example once, with little
    padding.  The batches are shuffled.
    """
    for epoch in itertools.count():
        rng = np.random.default_rng([*seed, epoch])
        pools = max(1, len(lengths) // (64 * batch_size))
        batches = []
        for pool in np.array_split(rng.permutation(len(lengths)), pools):
            pool = pool[np.argsort(lengths[pool], kind="stable")]
            for first in range(0, len(pool), batch_size):
                batches.append(pool[first : first + batch_size])
        for i in rng.permutation(len(batches)):
            yield batches[i]


# -------------------------------------------------------------------------------- a batch


class Batch(NamedTuple):
    x: torch.Tensor  # (B, L) ids, or (B, L, C + 1) values and the mask flag
    keep: torch.Tensor | None  # (B, L) bool, True = real token; None: no padding
    where: torch.Tensor | None  # (B, L) bool, positions that count; None: one label per example
    target: torch.Tensor  # (B, L) ids, (B, L, C) values; or labels (B,), (B / 2,) of pairs, (B, k)


def part(batch, i, n):
    """The i-th of n parts of a batch, by examples, and its weight: 0 if it is empty, else 1."""
    examples = len(batch.target)
    start = examples * i // n
    stop = examples * (i + 1) // n
    weight = float(stop > start)
    stop = max(stop, start + 1)  # an empty part gets one example, of weight 0

    rows = len(batch.x) // examples  # 2 for pairs
    own = [None if t is None else t[start * rows : stop * rows] for t in batch[:3]]
    return Batch(*own, batch.target[start:stop]), weight
