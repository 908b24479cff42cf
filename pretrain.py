"""Pretrain a long-sequence model on its own task, fine-tune it, and see what that was worth.

The idea in one sentence: before a model is trained on labels, let it denoise the inputs of the
very same training examples, and most of the distance between architectures disappears.

    Amos, Berant, Gupta: Never Train from Scratch (arXiv:2310.02980v4)

The way of the data, which is the order of this file:

    load -> Resident (on the device, once) -> draw (indices) -> make_batch (corrupt) -> model
    -> head -> loss_sums -> gradients -> fit (the loop); train: fit, the same model under a new
    head, fit again, one test evaluation

What a first reading can leave out comes after the loop: several processes (--sequence-parallel
or torchrun), the folder of a run (checkpoints, --resume), the demonstration, the command line.

    paper                        here                                              shape
    self-pretraining (SPT)       --objective masked | causal, the stage "pretrain"
    trained from scratch (TFS)   --objective none
    masked token                 the id vocab_size, one more row in the embedding
    noisy input, mask, clean     Batch.x, Batch.where, Batch.target                (B, L) each

Every random choice is a function of (seed, stage, step) alone: which examples, which positions
are masked, which units are dropped. Nothing about random generators has to be stored.

Departures from the paper: the masks of validation are fixed (there they are drawn anew, so the
choice of the checkpoint is noisy); attention does not see padding (there it does); every example
is evaluated (there the last partial batch is dropped); the rate falls in a cosine.
Not included: data that do not fit the memory of the device.

    python pretrain.py            the demonstration; what it prints stands in README.md
    python pretrain.py --task listops --model s4 --objective masked
"""

import argparse
import copy
import itertools
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import dist_attention
import lra_data
from attention import Attention, Transformer, TransformerConfig
from s4 import S4Config, S4Model, s4_mixer, s4d_mixer
from sgconv import PUBLISHED, SGConv, SGConvConfig, SGConvModel
from structured_ffn import ffn_factory

# ---------------------------------------------------------------------------------- settings

# Masking ratio and denoising loss of the tasks whose names begin so (2310.02980v4, sections 2 and
# C.3; `lattice` is ours). "ce": cross entropy over the symbols or grey levels; "l1": |error|.
DENOISING = {
    "lattice": (0.30, "ce"),
    "listops": (0.10, "ce"),
    "text": (0.15, "ce"),
    "retrieval": (0.15, "ce"),
    "image-real": (0.50, "l1"),
    "image": (0.50, "ce"),  # differs from the paper: symbols, as LRA embeds them
    "scifar": (0.50, "l1"),
    "path": (0.50, "ce"),
    "speech": (0.25, "l1"),
}
# Which of sgconv.PUBLISHED a full-size task takes; the small variants have no published kernel.
KERNELS = {name: name for name in ("listops", "text", "retrieval", "image")}
KERNELS |= {"image-real": "image", "pathfinder32": "pathfinder", "pathfinder128": "pathx"}
FFNS = ("dense", "lowrank", "blockdense", "blockshuffle")
STAGES = ("pretrain", "finetune")
VALIDATION_SEED = 2310_02980  # of the masks of validation and test

# Numbers are more than 0, these may be 0; they are finite, these less than that.
MAY_BE_ZERO = ("seed", "warmup", "weight_decay", "dropout")
SIZES = ("d_model", "n_layers", "n_heads", "d_ff", "d_state", "kernel_dim")
BELOW = dict.fromkeys(("mask_ratio", "warmup", "dropout"), 1) | dict.fromkeys(SIZES, 2**20)


def flag(default, help, *choices, kind=None):
    """A field of Config that is a flag of the command line as well."""
    meta = {"help": help, "choices": choices or None, "kind": kind or type(default)}
    return field(default=default, metadata=meta)


def check_value(name, value, kind=str, choices=None, help=None):
    """ValueError unless a setting is one of its choices, or a number in its range."""
    if choices and value not in choices:
        raise ValueError(f"{name} {value!r}: expected one of {', '.join(choices)}")
    if value == "":
        raise ValueError(f"{name}: expected a value, got an empty one")
    if kind in (int, float):
        zero, end = name in MAY_BE_ZERO, BELOW.get(name, 2**31 if kind is int else math.inf)
        if not (0 < value < end or (zero and value == 0)):
            least = "0 or more" if zero else "a positive number"
            raise ValueError(f"{name} {value}: expected {least} below {end:,}")


@dataclass(frozen=True)
class Config:
    """One run: pretraining (unless objective "none") and fine-tuning. ValueError on nonsense."""

    task: str = flag("lattice", "a task of lra_data.py")
    model: str = flag("transformer", "architecture", "transformer", "s4", "s4d", "sgconv")
    objective: str = flag("masked", "of pretraining", "masked", "causal", "none")
    seed: int = flag(0, "of weights, order, masks, dropout (the data have their own)")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "torch device")
    out: str = flag("runs/latest", "folder for config, metrics, weights and result")
    data_dir: str = flag("data", "folder where tasks are found or cached")
    source: str = flag(None, "published files of the task: a directory or archive", kind=str)
    pictures: int = flag(None, "how many pictures to draw (pathfinder)", kind=int)
    pretrain_steps: int = flag(3000, "optimiser steps of pretraining")
    finetune_steps: int = flag(300, "optimiser steps of fine-tuning")
    pretrain_lr: float = flag(3e-3, "highest learning rate of pretraining")
    finetune_lr: float = flag(1e-3, "highest learning rate of fine-tuning")
    batch_size: int = flag(64, "sequences a step, of all processes together")
    accumulate: int = flag(1, "parts of a step's batch, one after the other (saves memory)")
    warmup: float = flag(0.1, "share of a stage's steps in which the rate rises")
    weight_decay: float = flag(0.01, "AdamW decay of the matrices")
    clip: float = flag(1.0, "largest norm of the gradient")
    mask_ratio: float = flag(None, "share of masked positions (default: the task's)", kind=float)
    loss: str = flag(None, "of denoising (default: the task's)", "ce", "l1", kind=str)
    d_model: int = flag(64, "width")
    n_layers: int = flag(2, "blocks")
    n_heads: int = flag(4, "attention heads")
    d_ff: int = flag(None, "hidden width of the FFN (default: 4 d_model)", kind=int)
    ffn: str = flag("dense", "FFN of all blocks but the first (transformer)", *FFNS)
    d_state: int = flag(64, "state size of s4 and s4d, real numbers a channel")
    kernel_dim: int = flag(
        None, "numbers a scale of sgconv (default: as published, or 32)", kind=int
    )
    dropout: float = flag(0.0, "probability of dropping a unit")
    rope: bool = flag(False, "rotary positions instead of sinusoids (transformer)")
    causal: bool = flag(False, "left-to-right model (always so for --objective causal)")
    pooling: str = flag("mean", "from positions to one vector", "mean", "max", "last")
    labels: int = flag(None, "fine-tune on this many examples, nested subsets", kind=int)
    pretrained: str = flag(None, "fine-tune these weights (a pretrained.pt)", kind=str)
    eval_every: int = flag(500, "steps from validation to validation")
    resume: bool = flag(False, "continue the run in the folder where it was stopped")
    precision: str = flag("float32", "arithmetic", "float32", "float64", "bfloat16")
    sequence_parallel: str = flag(
        None, "split each sequence over the processes", "ring", "ulysses", kind=str
    )

    def __post_init__(self):
        for f in fields(self):
            if (value := getattr(self, f.name)) is not None and f.name != "labels":
                check_value(f.name, value, **f.metadata)
        known = [name for name in DENOISING if self.task.startswith(name)]
        ratio, loss = DENOISING[known[0]] if known else (0.15, "ce")
        ratio = ratio if self.mask_ratio is None else self.mask_ratio
        object.__setattr__(self, "mask_ratio", ratio)
        object.__setattr__(self, "loss", self.loss or loss)
        object.__setattr__(self, "causal", self.causal or self.objective == "causal")
        if self.accumulate > self.batch_size:
            raise ValueError(
                f"accumulate {self.accumulate}: expected at most batch_size {self.batch_size}"
            )
        if self.objective == "masked" and self.causal:
            raise ValueError("causal with objective 'masked': a masked model looks both ways")
        if self.model != "transformer" and (self.rope or self.ffn != "dense"):
            raise ValueError(f"model {self.model!r} has no rope and no ffn: take 'transformer'")
        if self.sequence_parallel == "ring" and self.model != "transformer":
            raise ValueError(f"sequence_parallel 'ring' with model {self.model!r}: take 'ulysses'")
        if self.sequence_parallel and (self.pooling != "mean" or self.dropout > 0):
            raise ValueError(
                f"sequence_parallel has pooling 'mean' and dropout 0 alone, got {self.pooling!r} "
                f"and {self.dropout}"
            )


# ------------------------------------------------------------- data on the device, by index


class Resident:
    """A split on the device as small integers: a batch is a draw of indices, nothing is copied.

    tokens: (n, L) symbols, (n, L, C) numbers, or (n, 2, L) symbols of pairs of documents.
    """

    def __init__(self, split, data, device):
        self.tokens = torch.from_numpy(np.ascontiguousarray(split.tokens)).to(device)
        self.labels = torch.from_numpy(split.labels).to(device)  # (n,)
        self.lengths = np.asarray(split.lengths)  # (n,) or (n, 2), on the host: it decides order
        self.data, self.pairs = data, split.lengths.ndim == 2

    def __len__(self):
        return len(self.lengths)

    def longest(self):
        """(n,) length of each example (of the longer document of a pair)."""
        return self.lengths.max(1) if self.pairs else self.lengths

    def subset(self, n):
        """The first n examples of one fixed random order, so that subsets are nested."""
        if not 0 < n <= len(self):
            raise ValueError(f"labels {n}: the training split has {len(self)} examples")
        part, chosen = copy.copy(self), np.random.RandomState(42).permutation(len(self))[:n]
        part.tokens, part.labels = self.tokens[chosen], self.labels[chosen]
        part.lengths = self.lengths[chosen]
        return part

    def documents(self):
        """Pairs as twice as many single documents: denoising needs no pairs."""
        single = copy.copy(self)
        if self.pairs:
            single.tokens, single.lengths = self.tokens.flatten(0, 1), self.lengths.reshape(-1)
            single.labels, single.pairs = self.labels.repeat_interleave(2), False
        return single

    def gather(self, index):
        """-> raw (B, L[, C]) cut to the longest, or (2 B, L) of pairs; keep (B, L) or None."""
        lengths = self.lengths[index].reshape(-1)
        L = int(lengths.max())
        raw = self.tokens[torch.from_numpy(index).to(self.tokens.device)]
        raw = (raw.flatten(0, 1) if self.pairs else raw)[:, :L]
        if int(lengths.min()) == L:
            return raw, None  # no padding: attention can take its fastest way
        lengths = torch.from_numpy(lengths).to(raw.device)
        return raw, torch.arange(L, device=raw.device) < lengths[:, None]


def draw(lengths, batch_size, seed):
    """Yields the index array of each step, without end, as a function of the seed alone.

    An epoch is a random permutation, cut into pools of 64 batches; each pool is sorted by length
    and cut into batches, which are shuffled: every example once, little padding.
    """
    for epoch in itertools.count():
        rng, batches = np.random.default_rng([seed, epoch]), []
        pools = max(1, len(lengths) // (64 * batch_size))
        for pool in np.array_split(rng.permutation(len(lengths)), pools):
            pool = pool[np.argsort(lengths[pool], kind="stable")]
            batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
        yield from (batches[i] for i in rng.permutation(len(batches)))


# ---------------------------------------------------------------------- corrupt: make a batch


class Batch(NamedTuple):
    x: torch.Tensor  # (B, L) ids, or (B, L, C + 1) values and the mask flag
    keep: torch.Tensor | None  # (B, L) bool, True = a real token; None: no padding
    where: torch.Tensor | None  # (B, L) bool: positions that count; None: one label a sequence
    target: torch.Tensor  # (B, L) ids or (B, L, C) values at each position; (B,) labels


def masked(raw, keep, ratio, generator):
    """Masks each real position independently; all masked ones are replaced (no 80/10/10).

    raw: (B, L[, C]), keep: (B, L) or None.  Returns (B, L) bool.  2310.02980v4, section 2.
    """
    where = torch.rand(raw.shape[:2], generator=generator, device=raw.device) < ratio
    return where if keep is None else where & keep


def next_token(raw, keep):
    """The target of a causal model is the input one step later.  2310.02980v4, section 2.

    raw: (B, L[, C]).  Returns where (B, L) bool: all but the last of a sequence; target like raw.
    """
    real = raw.new_ones(raw.shape[:2], dtype=torch.bool) if keep is None else keep  # (B, L)
    return F.pad(real[:, 1:], (0, 1)), torch.roll(raw, -1, dims=1)


def normalised(raw, data):
    """(B, L, C) small integers -> real values."""
    mean, std = (torch.as_tensor(v, device=raw.device) for v in (data.mean, data.std))
    return (raw - mean) / std


def inputs(raw, where, data):
    """Small integers -> what the model takes, hidden where `where` is True (None: nowhere).

    Symbols: (B, L) ids, hidden = vocab_size.  Values: (B, L, C + 1): normalised, hidden = 0, and
    a flag that is 1 there. In fine-tuning the flag is 0, which equals dropping its weights.
    """
    if data.mean is None:
        return raw.long() if where is None else raw.long().masked_fill(where, data.vocab_size)
    x = normalised(raw, data)  # (B, L, C)
    hidden = torch.zeros_like(x[..., :1]) if where is None else where[..., None].to(x)
    return torch.cat([x * (1 - hidden), hidden], dim=-1)  # (B, L, C + 1)


def make_batch(resident, index, stage, config, generator):
    """Examples by index -> Batch of a stage."""
    (raw, keep), data = resident.gather(index), resident.data
    if stage == "finetune":
        labels = resident.labels[torch.from_numpy(index).to(raw.device)]
        return Batch(inputs(raw, None, data), keep, None, labels)
    if config.objective == "masked":
        where, clean = masked(raw, keep, config.mask_ratio, generator), raw
        x = inputs(raw, where, data)
    else:
        (where, clean), x = next_token(raw, keep), inputs(raw, None, data)
    if config.loss == "l1":
        return Batch(x, keep, where, normalised(clean, data))
    return Batch(x, keep, where, (clean if clean.ndim == 2 else clean[..., 0]).long())


# ------------------------------------------------------------------------ model, heads, loss


def build_model(config, data):
    """The body, which both stages share: embedding, positions, blocks, final norm."""
    tokens = data.train.tokens
    shared = {name: getattr(config, name) for name in ("d_model", "n_layers", "causal", "dropout")}
    channels = None if data.mean is None else tokens.shape[2]
    if config.loss != ("ce" if channels is None else "l1") and channels != 1:
        kind = "symbols" if channels is None else f"{channels} channels"
        raise ValueError(f"loss {config.loss!r} does not fit {kind} of task {config.task}")
    if channels is None:
        shared["vocab_size"] = data.vocab_size + 1  # the last one is the mask
    else:
        shared["n_channels"] = channels + 1  # the last one is the flag
    if config.model in ("s4", "s4d"):
        mixer = s4_mixer if config.model == "s4" else s4d_mixer
        return S4Model(S4Config(d_state=config.d_state, **shared), mixer)
    if config.model == "sgconv":
        L = shared["max_len"] = tokens.shape[-1 if channels is None else 1]
        kernel = {"kernel_dim": min(32, L)} | PUBLISHED.get(KERNELS.get(config.task), {})
        if config.kernel_dim is not None:
            kernel["kernel_dim"] = config.kernel_dim
        return SGConvModel(SGConvConfig(**kernel, **shared))
    own = {name: getattr(config, name) for name in ("n_heads", "d_ff", "rope")}
    ffn = None if config.ffn == "dense" else ffn_factory(config.ffn)
    return Transformer(TransformerConfig(**own, **shared), ffn=ffn)


class PairHead(nn.Module):
    """Two documents a, b -> classes from [a, b, a - b, a * b] (Retrieval, 2310.02980v4)."""

    def __init__(self, d_model, n_classes):
        super().__init__()
        self.hidden, self.out = nn.Linear(4 * d_model, d_model), nn.Linear(d_model, n_classes)

    def forward(self, pooled):
        a, b = pooled.unflatten(0, (-1, 2)).unbind(1)  # (2 B, D) -> (B, D) twice
        return self.out(F.gelu(self.hidden(torch.cat([a, b, a - b, a * b], -1))))


def build_head(stage, config, resident):
    """pretrain: a linear map at each position to symbols or values; finetune: to classes."""
    data = resident.data
    if stage == "finetune":
        return (PairHead if resident.pairs else nn.Linear)(config.d_model, data.n_classes)
    width = data.vocab_size if config.loss == "ce" else resident.tokens.shape[2]
    return nn.Linear(config.d_model, width)


def pool(h, keep, how, add=lambda x: x):
    """(B, L, D) -> (B, D) over the real positions; `add` sums what processes have of a sequence."""
    keep = torch.ones_like(h[..., 0], dtype=torch.bool) if keep is None else keep
    if how == "mean":
        return add((h * keep[..., None]).sum(1)) / add(keep.sum(1, keepdim=True))
    if how == "max":
        return h.masked_fill(~keep[..., None], -math.inf).amax(1)
    return h[torch.arange(len(h), device=h.device), keep.sum(1) - 1]  # "last"


def loss_sums(model, head, batch, config):
    """-> sum of the losses, number of right answers, number of terms (positions or examples)."""
    shared = config.sequence_parallel and ranks()[1] > 1  # here are some tokens of each sequence
    (x, keep, where, target), options = own_tokens(batch, config) if shared else (batch, {})
    x = x.to(next(head.parameters()).dtype) if x.is_floating_point() else x
    h = model(x, keep, **options)  # (B, L, D)
    if where is not None:
        h, target = h[where], target[where]  # (n, D): only the positions that count
    else:
        add = {"add": SumOverRanks.apply} if shared else {}
        h = pool(h, keep, config.pooling, **add)  # (B, D)
    out = head(h)  # (n or B, symbols, channels or classes)
    if target.is_floating_point():
        loss = F.l1_loss(out, target.to(out), reduction="sum") / target.shape[-1]
        right = torch.zeros_like(loss)
    else:
        loss = F.cross_entropy(out, target, reduction="sum")
        right = (out.argmax(-1) == target).sum()
    if shared and where is None and ranks()[0] > 0:
        return loss * 0, right * 0, 0  # every process has the same `out`: the first judges it
    return loss, right, len(out)


# ----------------------------------------------------------------------------------- the loop


def seeded(config, *numbers):
    """A generator that is a function of these numbers; seeds weights and dropout as well."""
    value = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
    torch.manual_seed(value)
    return torch.Generator(config.device).manual_seed(value)


def schedule(step, steps, warmup):
    """Share of the highest rate: up to 1 in a line over warmup * steps, to 0 in half a cosine."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def autocast(config):
    device = torch.device(config.device).type
    return torch.autocast(device, torch.bfloat16, enabled=config.precision == "bfloat16")


def part(batch, i, n):
    """The i-th of n parts of a batch, by examples; None when it is empty."""
    examples = len(batch.target)
    low, high = examples * i // n, examples * (i + 1) // n
    rows = len(batch.x) // examples  # 2 of a pair
    cut = [None if t is None else t[low * rows : high * rows] for t in batch[:3]]
    return Batch(*cut, batch.target[low:high]) if high > low else None


@torch.no_grad()
def evaluate(model, head, resident, stage, config):
    """Mean loss and accuracy over every example exactly once; masks fixed by their own seed."""
    model.eval()
    by_length, (rank, world) = np.argsort(resident.longest(), kind="stable"), examples_of(config)
    sums = torch.zeros(3, dtype=torch.float64, device=config.device)
    for i, start in enumerate(range(0, len(resident), config.batch_size)):
        if i % world == rank:
            index = by_length[start : start + config.batch_size]
            generator = seeded(config, VALIDATION_SEED, start)
            batch = make_batch(resident, index, stage, config, generator)
            with autocast(config):
                loss, right, count = loss_sums(model, head, batch, config)
            sums += torch.stack([loss.double(), right.double(), loss.new_tensor(count).double()])
    total([sums])
    model.train()
    loss, right, count = sums.tolist()
    return {"loss": loss / count, "accuracy": right / count}


def gradients(model, head, batch, config):
    """Of the mean loss over the batch of all processes.  Returns sum of losses, right, count.

    Each process takes its own examples, in `accumulate` parts; the sums are those of one process.
    """
    (rank, world), n = examples_of(config), config.accumulate
    count = len(batch.target) if batch.where is None else int(batch.where.sum())
    sums = torch.zeros(2, device=config.device, dtype=torch.float64)
    for i in range(rank * n, rank * n + n):
        if (piece := part(batch, i, world * n)) is not None:
            with autocast(config):
                loss, right, _ = loss_sums(model, head, piece, config)
            (loss / count).backward()
            sums += torch.stack([loss.detach().double(), right.double()])
    if ranks()[1] > 1:
        parameters = [p for m in (model, head) for p in m.parameters()]
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        total([p.grad for p in parameters])
        total([sums])
    return (*sums, count)


def fit(stage, model, head, train, val, config, run):
    """Train one stage; leave model and head with the weights that were best on validation.

    Judged by validation loss in pretraining, by validation accuracy in fine-tuning.
    """
    number = STAGES.index(stage)
    steps, peak = getattr(config, f"{stage}_steps"), getattr(config, f"{stage}_lr")
    groups = model.param_groups(peak, config.weight_decay)
    groups.append({"params": list(head.parameters()), "lr": peak, "weight_decay": 0.0})
    optimiser, peaks = torch.optim.AdamW(groups), [group["lr"] for group in groups]
    parameters = [p for group in groups for p in group["params"]]
    parts = {"model": model, "head": head, "optimiser": optimiser}
    first, best = run.restore(stage, parts)
    order = itertools.islice(draw(train.longest(), config.batch_size, config.seed), first, None)
    for step in run.bar(stage, first, steps):
        generator = seeded(config, config.seed, number, step)
        batch = make_batch(train, next(order), stage, config, generator)
        optimiser.zero_grad()
        loss, right, count = gradients(model, head, batch, config)
        nn.utils.clip_grad_norm_(parameters, config.clip)
        for group, lr in zip(optimiser.param_groups, peaks, strict=True):
            group["lr"] = lr * schedule(step, steps, config.warmup)
        optimiser.step()
        run.log(step, loss, right, count, batch.x)
        if (step + 1) % config.eval_every == 0 or step + 1 == steps:
            run.look(step)
            score = evaluate(model, head, val, stage, config) | {"step": step + 1}
            merit = -score["loss"] if stage == "pretrain" else score["accuracy"]
            if best is None or merit > best["merit"]:
                best = {"merit": merit, "score": score}
                best |= copy.deepcopy({"model": model.state_dict(), "head": head.state_dict()})
            run.save(step, parts, best, score)
        elif run.interrupted:
            run.look(step)
            run.save(step, parts, best)
    if not math.isfinite(best["score"]["loss"]):
        raise FloatingPointError(f"{stage}: the loss of validation is {best['score']['loss']}")
    model.load_state_dict(best["model"])
    head.load_state_dict(best["head"])
    return best["score"]


def train(config, position=0):
    """One arm: pretrain (unless objective "none"), fine-tune, test once.  Returns the result.

    Raises ValueError on settings that do not fit the data or the model, FloatingPointError on a
    loss that is not finite (the last checkpoint stays).
    """
    data = load_data(config)
    train_split, val_split, test_split = (
        Resident(split, data, config.device) for split in (data.train, data.val, data.test)
    )
    labelled = train_split if config.labels is None else train_split.subset(config.labels)
    seeded(config, config.seed)
    dtype = torch.float64 if config.precision == "float64" else torch.float32  # of the weights
    model = spread(build_model(config, data).to(config.device, dtype), config)
    if config.pretrained:
        load_weights(model, config.pretrained)
    skip = config.objective == "none" or config.pretrained
    with Run(config, model, position) as run:
        for stage in STAGES[1:] if skip else STAGES:
            seeded(config, config.seed, STAGES.index(stage))
            head = build_head(stage, config, train_split).to(config.device, dtype)
            if stage in run.result:
                continue  # finished before the run was resumed
            pair = labelled, val_split
            if stage == "pretrain":
                pair = train_split.documents(), val_split.documents()
            run.result[stage] = fit(stage, model, head, *pair, config, run)
            if stage == "pretrain" and run.leader:
                save(run.folder / "pretrained.pt", model.state_dict())
        run.result["test"] = evaluate(model, head, test_split, "finetune", config)
    return run.result


# ----------------------------------------------------------- several processes, one training


def ranks():
    """This process's number and how many there are: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def examples_of(config):
    """This process's share of the examples: (0, 1), all, when the processes share the tokens."""
    return (0, 1) if config.sequence_parallel else ranks()


def total(tensors):
    """Sums each tensor over the processes, in place, in one message."""
    if ranks()[1] > 1:
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        for t, piece in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.copy_(piece.view_as(t))


def load_data(config):
    """The task; the first of several processes makes what is not cached, the others wait."""
    options = {"source": config.source, "n": config.pictures}
    options = {k: v for k, v in options.items() if v is not None}
    rank, world = ranks()
    if world > 1:
        patient = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    if rank > 0:
        dist.barrier(patient)
    try:
        data = lra_data.load(config.task, data_dir=config.data_dir, **options)
    except TypeError as error:
        raise ValueError(f"task {config.task} does not take {', '.join(options)}") from error
    if world > 1 and rank == 0:
        dist.barrier(patient)
    return data


def token_layout(config):
    """Which process holds which tokens: zigzag balances a causal Transformer."""
    zigzag = config.causal and config.model == "transformer"
    return dist_attention.zigzag if zigzag else dist_attention.contiguous


def spread(model, config):
    """Lets the mixers of a model work on tokens that are shared out over the processes.

    Parameters keep their names, so that weights of one process serve several and the other way.
    """
    layout = token_layout(config)

    def attend(q, k, v, causal, keep):
        return product(q, k, v, causal, layout=layout, keep=keep)

    if config.sequence_parallel:
        product = getattr(dist_attention, f"{config.sequence_parallel}_attention")
        for block in model.blocks:
            mixer = block.mixer
            if isinstance(mixer, Attention):
                mixer.attend = attend
                continue
            axes = {"C": 1}  # of S4 and S4D; every other parameter counts channels first
            if isinstance(mixer, SGConv):
                axes = {"w": mixer.w.ndim - 2, "norm": mixer.norm.ndim - 2}
            dist_attention.check_channels(mixer, axes)
            mixer.forward = partial(dist_attention.mix, mixer, axes=axes, layout=layout)
    return model


class SumOverRanks(torch.autograd.Function):
    """Adds over the processes; its gradient does so too, for one process alone has the loss."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return SumOverRanks.forward(ctx, grad)


def own_tokens(batch, config):
    """This process's tokens of a batch -> Batch, and what the model has to know besides."""
    (rank, world), layout = ranks(), token_layout(config)

    def own(t):
        per_token = t is not None and t.ndim > 1  # not the labels
        return dist_attention.shard(t, rank, world, 1, layout) if per_token else t

    positions = dist_attention.positions(batch.x.shape[1], rank, world, layout)
    transformer = config.model == "transformer"
    options = {"positions": positions.to(batch.x.device)} if transformer else {}
    return Batch(*map(own, batch)), options


# --------------------------------------------------------- what a run shows and leaves behind


def save(path, state):
    """torch.save, all of the file or nothing: a temporary name, flushed, read back, renamed.

    The file that stood there stays as *.previous. Raises OSError (disk full), which loses nothing.
    """
    temporary = path.with_name(path.name + ".new")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        torch.load(temporary, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} not written ({error}); the one before is intact") from error
    if path.exists():
        os.replace(path, path.with_name(path.name + ".previous"))
    os.replace(temporary, path)


def load(path):
    """What `save` wrote.  ValueError names the file that is no such thing."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file may raise any kind
        reason = shorten(f"{type(error).__name__} {error}", 200)
        raise ValueError(f"{path} is not a file of weights: {reason}") from error


def load_weights(model, path):
    """Weights of a pretrained.pt into the model.  ValueError says what does not fit."""
    try:
        model.load_state_dict(load(path))
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = shorten(str(error), 300)  # it would name every tensor
        raise ValueError(f"{path} does not hold weights of this model: {reason}") from error


class Run:
    """The folder of a run and the bar: config.json, metrics.jsonl, checkpoint.pt, result.json.

    Only the first of several processes writes. Ctrl-C is noted and obeyed after the step.
    """

    LOG_EVERY = 10  # steps; the device is asked for numbers only this often

    def __init__(self, config, model, position):
        self.config, self.position = config, position  # of the bar, when runs are side by side
        self.folder, self.leader, self.alone = Path(config.out), ranks()[0] == 0, ranks()[1] == 1
        self.parameters = sum(p.numel() for p in model.parameters())
        self.state = None  # a checkpoint, until the stage that it was written in takes it
        self.result = {}  # scores of the stages that are finished
        self.pending = []  # (loss, right, count) of the steps since the last line of metrics
        self.tokens, self.interrupted = 0, False

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        finished, unfinished = self.folder / "result.json", self.folder / "checkpoint.pt"
        if self.leader:
            self.lock = open(self.folder / "lock", "w")
            claim(self.lock, self.folder)
        if self.config.resume:
            self.state = self.find()
        elif unfinished.exists() and not finished.exists():
            raise ValueError(f"{self.folder} holds an unfinished run: --resume, or another --out")
        state = self.state or {"result": {}, "tokens": 0, "metrics": 0, "seconds": 0.0}
        self.result, self.tokens = state["result"], state["tokens"]
        if self.leader:
            finished.unlink(missing_ok=True)
            write_json(self.folder / "config.json", asdict(self.config))
            self.metrics = open(self.folder / "metrics.jsonl", "ab")
            self.metrics.truncate(state["metrics"])  # lines after the checkpoint come once more
        self.mark = self.tokens, time.perf_counter()  # when the speed was last looked at
        self.started = self.mark[1] - state["seconds"]
        if self.alone:  # several processes might stop at different steps
            self.handler = signal.signal(signal.SIGINT, self.interrupt)
        return self

    def interrupt(self, *_):
        signal.signal(signal.SIGINT, self.handler)  # the second Ctrl-C is obeyed at once
        self.interrupted = True

    def __exit__(self, failure, *_):
        if self.alone:
            signal.signal(signal.SIGINT, self.handler)
        if not self.leader:
            return
        if failure is None:
            seconds = time.perf_counter() - self.started
            speed = {"seconds": round(seconds, 1), "tokens_per_s": round(self.tokens / seconds)}
            self.result |= {"parameters": self.parameters, "config": asdict(self.config)}
            self.result |= {"speed": speed | {"peak_memory": peak_memory()}} | versions()
            write_json(self.folder / "result.json", self.result)
        self.metrics.close()
        self.lock.close()

    def find(self):
        """The newest checkpoint that can be read; None when there is none."""
        state = None
        for path in (self.folder / "checkpoint.pt", self.folder / "checkpoint.pt.previous"):
            try:
                state = state or (load(path) if path.exists() else None)
            except ValueError as error:
                print(f"{error}: not used", file=sys.stderr)
        old, new = state["config"] if state else {}, asdict(self.config)
        free = {"out", "resume", "device", "data_dir", "accumulate"}
        if differ := [k for k in new if state and k not in free and old.get(k) != new[k]]:
            text = ", ".join(f"{k} {old.get(k)} -> {new[k]}" for k in differ)
            raise ValueError(f"{self.folder} holds a run with other settings: {text}")
        return state

    def restore(self, stage, parts):
        """Continue from the checkpoint if it is of this stage.  Returns first step, best so far."""
        if self.state is None or self.state["stage"] != stage:
            return 0, None
        state, self.state = self.state, None
        for name, holder in parts.items():
            holder.load_state_dict(state[name])
        return state["step"], state["best"]

    def bar(self, stage, first, steps):
        """The steps of a stage as a bar (nothing is drawn when the output is no terminal)."""
        self.stage, name = stage, f"{self.folder.name} {stage}"
        show = {"disable": None if self.leader else True, "position": self.position, "leave": False}
        self._bar = tqdm(range(first, steps), name, initial=first, total=steps, **show)
        return self._bar

    def log(self, step, loss, right, count, x):
        """Note a step; look at the numbers every LOG_EVERY steps."""
        self.pending.append((loss, right, count))
        self.tokens += x.shape[0] * x.shape[1]
        if (step + 1) % self.LOG_EVERY == 0:
            self.look(step)

    def look(self, step):
        """Write a line, move the bar.  FloatingPointError when a loss is not finite."""
        if not self.pending:
            return
        rows = np.array([[float(v) for v in row] for row in self.pending])  # (steps, 3)
        if not np.isfinite(rows).all():
            bad = int(np.argmin(np.isfinite(rows[:, 0])))
            path = self.folder / "checkpoint.pt"
            raise FloatingPointError(
                f"{self.stage}: the loss is {rows[bad, 0]} at step {step + 2 - len(rows) + bad}; "
                + (f"the state before it is {path}" if path.exists() else "no checkpoint yet")
            )
        loss, right, count = rows.sum(0)
        now = self.tokens, time.perf_counter()
        speed = round((now[0] - self.mark[0]) / (now[1] - self.mark[1]))
        line = {"loss": loss / count, "accuracy": right / count, "tokens_per_s": speed}
        self._bar.set_postfix(line)
        self.write({"stage": self.stage, "step": step + 1} | line)
        self.pending, self.mark = [], now

    def write(self, line):
        if self.leader:
            self.metrics.write(json.dumps(line).encode() + b"\n")

    def save(self, step, parts, best, score=None):
        """The state of everything on disk; the score of a validation into the metrics."""
        if score:
            self.write({"stage": self.stage} | {f"val_{k}": v for k, v in score.items()})
        if self.leader:
            self.metrics.flush()
            state = {name: holder.state_dict() for name, holder in parts.items()}
            state |= {"stage": self.stage, "step": step + 1, "best": best, "result": self.result}
            state |= {"metrics": self.metrics.tell(), "tokens": self.tokens}
            state["seconds"] = time.perf_counter() - self.started
            save(self.folder / "checkpoint.pt", state | {"config": asdict(self.config)})
        if self.interrupted:
            raise KeyboardInterrupt


def write_json(path, content):
    """All of the file or nothing: a temporary name, renamed."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


def claim(file, folder):
    """Locks an open file until it is closed.  ValueError when another process holds it."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows: no lock
        pass
    except OSError as error:
        raise ValueError(f"{folder} is in use by another run") from error


def peak_memory():
    """Bytes: of the GPU when there is one, else of this process; None when it cannot be told."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used if sys.platform == "darwin" else 1024 * used
    except ImportError:  # Windows
        return None


def versions():
    """What a number depends on besides the settings."""
    try:
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None  # a copied file, no repository
    return {"torch": torch.__version__, "python": platform.python_version(), "commit": commit}


# ------------------------------------------------- the demonstration: what pretraining was worth

# Strict protocol: every arm sees the same training examples and nothing else; a from-scratch arm
# takes as many steps as its twin for both stages. Rates: `python benchmarks/demo.py --grid`.
DEMO = Config(task="lattice", d_ff=128, d_state=16, batch_size=32, eval_every=200)
SCRATCH = {"objective": "none", "finetune_lr": 1e-3}
PRETRAINED = {"objective": "masked", "pretrain_lr": 3e-3, "finetune_lr": 3e-3}
ARMS = {
    ("Transformer", "from scratch"): SCRATCH | {"finetune_steps": 4400},
    ("Transformer", "pretrained"): PRETRAINED | {"pretrain_steps": 3600, "finetune_steps": 800},
    ("S4", "from scratch"): SCRATCH | {"model": "s4", "finetune_steps": 1600},
    ("S4", "pretrained"): PRETRAINED
    | {"model": "s4", "pretrain_steps": 1200, "finetune_steps": 400},
}


def one_thread(lock):
    """A worker of the demonstration: the models are small, arms side by side are faster."""
    torch.set_num_threads(1)
    tqdm.set_lock(lock)


def one_arm(config, position):
    """`train` in a worker, which ends at Ctrl-C: one that lived on would begin the next arm."""
    try:
        return train(config, position)
    except KeyboardInterrupt:
        os._exit(130)


def demo(seed=0, out="runs/demo"):
    """Train the four arms, side by side on a CPU, print what they reached.  -> {arm: result}."""
    context, arms = get_context("spawn"), {}
    workers = 1 if DEMO.device == "cuda" else min(len(ARMS), os.cpu_count() or 1)
    print(f"four arms on `{DEMO.task}`, seed {seed}, {workers} at a time, into {out}/", flush=True)
    with ProcessPoolExecutor(workers, context, one_thread, (context.RLock(),)) as pool:
        for position, (arm, settings) in enumerate(ARMS.items()):
            folder = f"{out}/{'-'.join(arm).lower().replace(' ', '-')}"
            begun = not Path(folder, "result.json").exists()  # a finished arm starts anew
            config = replace(DEMO, seed=seed, out=folder, resume=begun, **settings)
            arms[arm] = pool.submit(one_arm, config, position)
        arms = {arm: future.result() for arm, future in arms.items()}
    print("\n".join(table(arms)))
    return arms


def table(arms):
    """{(model, way): result} -> lines of text: what each arm reached, and the two gaps."""
    yield f"{'':26}{'parameters':>12}{'steps':>13}{'validation %':>14}{'test %':>8}{'seconds':>9}"
    test = {arm: 100 * result["test"]["accuracy"] for arm, result in arms.items()}
    for arm, result in arms.items():
        config, val = result["config"], 100 * result["finetune"]["accuracy"]
        steps = f"{config['pretrain_steps']} + " if config["objective"] != "none" else ""
        steps += str(config["finetune_steps"])
        yield (
            f"{', '.join(arm):26}{result['parameters']:12,}{steps:>13}{val:14.1f}"
            f"{test[arm]:8.1f}{result['speed']['seconds']:9.0f}"
        )

    def against(way, other):
        gap = test["S4", other] - test["Transformer", way]
        return f"{abs(gap):.1f} points {'below' if gap > 0 else 'above'}"

    yield f"From scratch, the Transformer is {against('from scratch', 'from scratch')} S4."
    yield (
        f"Pretrained on the same examples, it is {against('pretrained', 'from scratch')} that S4 "
        f"and {against('pretrained', 'pretrained')} a pretrained S4."
    )


# ------------------------------------------------------------------- processes, command line


def check_device(name):
    """ValueError unless tensors can be made and read there."""
    try:
        torch.empty(1, device=name).tolist()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r}: {shorten(str(error), 120)}") from error


def self_check(device="cpu"):
    """-> list of (name, error, limit): the steps that go wrong silently when they do."""
    config = Config(device=device, batch_size=8)
    data = lra_data.load("lattice", n_train=64, n_val=8, n_test=8)
    train = Resident(data.train, data, device)
    seen = np.concatenate(list(itertools.islice(draw(train.longest(), 8, 0), 8)))
    index = np.arange(64)
    batch = make_batch(train, index, "pretrain", config, seeded(config, 1))
    hidden = batch.x == data.vocab_size
    share = batch.where.float().mean().item()
    again = make_batch(train, index, "pretrain", config, seeded(config, 1))
    causal = make_batch(train, index, "pretrain", replace(config, objective="causal"), None)
    aligned = (causal.target[:, :-1] != causal.x[:, 1:]).sum().item()
    where = causal.where[:, :-1].all() and not causal.where[:, -1].any()
    sigma = math.sqrt(0.3 * 0.7 / batch.where.numel())
    return [
        ("draw: an epoch holds every example once", float((np.sort(seen) != index).sum()), 0),
        ("masked: share, in standard deviations", abs(share - config.mask_ratio) / sigma, 4),
        ("masked: hidden exactly where the loss is", float((hidden != batch.where).sum()), 0),
        ("masked: target is the clean input", float((batch.target != train.tokens).sum()), 0),
        ("masked: same seed, same bits", float((batch.x != again.x).sum()), 0),
        ("causal: target is the input one later", float(aligned + (not where)), 0),
    ]


def report(config, result):
    """The result of a run as lines of text."""
    for stage in (*STAGES, "test"):
        if stage in result:
            print(f"{stage:10}" + "  ".join(f"{k} {v:.4g}" for k, v in result[stage].items()))
    speed = "  ".join(f"{k} {v:,}" for k, v in result["speed"].items())
    print(f"parameters {result['parameters']:,}  {speed}\n{config.out}/result.json")


def parser():
    help = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=help)
    for f in fields(Config):
        kind = {"type": f.metadata["kind"], "choices": f.metadata["choices"]}
        if f.metadata["kind"] is bool:
            kind = {"action": "store_true"}
        name = "--" + f.name.replace("_", "-")
        parser.add_argument(name, default=f.default, help=f.metadata["help"], **kind)
    parser.add_argument("--check", action="store_true", help="check this file, in seconds")
    return parser


def run_once(config):
    """One run as the command line asks for it: settings, training, result on the screen."""
    if config.resume and not list(Path(config.out).glob("checkpoint.pt*")):
        raise ValueError(f"{config.out} holds no checkpoint: nothing to resume")
    with dist_attention.process_group(config.device) as (rank, _, device):
        config = replace(config, device=str(device))
        if rank == 0:
            print("\n".join(f"{k:16}{v}" for k, v in (asdict(config) | versions()).items()))
        result = train(config)
        if rank == 0:
            report(config, result)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = vars(parser().parse_args(argv))
    try:
        check_device(args["device"])
        if args.pop("check"):
            rows = self_check(args["device"])
            for name, error, limit in rows:
                print(f"  {name:42}{error:9.2g}{limit:9}   {'ok' if error <= limit else 'FAILED'}")
            sys.exit(any(not error <= limit for _, error, limit in rows))
        run_once(Config(**args)) if argv else demo()
    except (ValueError, OSError, FloatingPointError, BrokenExecutor) as error:
        sys.exit(f"pretrain.py: {shorten(str(error), 600)}")
    except RuntimeError as error:
        if not isinstance(error, dist_attention.RankLost) and "allocate" not in str(error):
            raise
        sys.exit(f"pretrain.py: {shorten(str(error), 600)}")  # a lost process, no memory left
    except KeyboardInterrupt:
        how = "--resume" if argv else "the same command"
        print(f"pretrain.py: interrupted; {how} continues from a checkpoint", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
