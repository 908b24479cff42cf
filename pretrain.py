"""Pretrain a long-sequence model on its own task, fine-tune it, and see what that was worth.

The idea in one sentence: before a model is trained on labels, let it denoise the inputs of the
very same training examples, and most of the distance between architectures disappears.

    Amos, Berant, Gupta: Never Train from Scratch (arXiv:2310.02980v4)

The way of the data, which is the order of this file:

    load -> Resident (on the device, once) -> draw (indices) -> make_batch (corrupt) -> model
    -> head -> loss -> fit (the loop) -> checkpoint -> the same model, a new head -> fit
    -> one test evaluation -> result.json

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
import json
import math
import os
import pickle
import platform
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import lra_data
from attention import Transformer, TransformerConfig
from s4 import S4Config, S4Model

# ---------------------------------------------------------------------------------- settings

# Masking ratio and denoising loss by task (2310.02980v4, sections 2 and C.3; `lattice` is ours).
# "ce": cross entropy over the symbols or the 256 grey levels; "l1": |error| of the real value.
DENOISING = {
    "lattice": (0.30, "ce"),
    "listops": (0.10, "ce"),
    "text": (0.15, "ce"),
    "retrieval": (0.15, "ce"),
    "image": (0.50, "l1"),
    "cifar": (0.50, "l1"),
    "pathfinder": (0.50, "ce"),
    "speech": (0.25, "l1"),
}
STAGES = ("pretrain", "finetune")
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.float32}  # weights


def flag(default, help, *choices, kind=None):
    """A field of Config that is a flag of the command line as well."""
    meta = {"help": help, "choices": choices or None, "kind": kind or type(default)}
    return field(default=default, metadata=meta)


@dataclass(frozen=True)
class Config:
    """One run: pretraining (unless objective "none") and fine-tuning. ValueError on nonsense."""

    task: str = flag("lattice", "a task of lra_data.py")
    model: str = flag("transformer", "architecture", "transformer", "s4")
    objective: str = flag("masked", "of pretraining", "masked", "causal", "none")
    seed: int = flag(0, "of weights, order, masks, dropout (the data have their own)")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "torch device")
    out: str = flag("runs/latest", "folder for config, metrics, weights and result")
    data_dir: str = flag("data", "folder where tasks are found or cached")
    pretrain_steps: int = flag(3000, "optimiser steps of pretraining")
    finetune_steps: int = flag(300, "optimiser steps of fine-tuning")
    pretrain_lr: float = flag(3e-3, "highest learning rate of pretraining")
    finetune_lr: float = flag(1e-3, "highest learning rate of fine-tuning")
    batch_size: int = flag(64, "sequences a step")
    warmup: float = flag(0.1, "share of a stage's steps in which the rate rises")
    weight_decay: float = flag(0.01, "AdamW decay of the matrices")
    clip: float = flag(1.0, "largest norm of the gradient")
    mask_ratio: float = flag(None, "share of masked positions (default: the task's)", kind=float)
    loss: str = flag(None, "of denoising (default: the task's)", "ce", "l1", kind=str)
    d_model: int = flag(64, "width")
    n_layers: int = flag(2, "blocks")
    n_heads: int = flag(4, "attention heads")
    d_ff: int = flag(None, "hidden width of the FFN (default: 4 d_model)", kind=int)
    d_state: int = flag(64, "state size of S4, real numbers a channel")
    dropout: float = flag(0.0, "probability of dropping a unit")
    rope: bool = flag(False, "rotary positions instead of sinusoids (transformer)")
    causal: bool = flag(False, "left-to-right model (always so for --objective causal)")
    pooling: str = flag("mean", "from positions to one vector", "mean", "max", "last")
    labels: int = flag(None, "fine-tune on this many examples, nested subsets", kind=int)
    pretrained: str = flag(None, "fine-tune these weights (a pretrained.pt)", kind=str)
    eval_every: int = flag(500, "steps from validation to validation")
    precision: str = flag("float32", "arithmetic", "float32", "float64", "bfloat16")

    def __post_init__(self):
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if choices and value is not None and value not in choices:
                raise ValueError(f"{f.name} {value!r}: expected one of {', '.join(choices)}")
            if f.name.endswith(("steps", "size", "every", "lr", "clip")) and not value > 0:
                raise ValueError(f"{f.name} {value}: expected a positive number")
        ratio, loss = DENOISING.get(self.task.split("-")[0], (0.15, "ce"))
        object.__setattr__(self, "mask_ratio", self.mask_ratio or ratio)
        object.__setattr__(self, "loss", self.loss or loss)
        object.__setattr__(self, "causal", self.causal or self.objective == "causal")
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio {self.mask_ratio}: expected a number between 0 and 1")
        if self.objective == "masked" and self.causal:
            raise ValueError("causal with objective 'masked': a masked model looks both ways")


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
        return raw, torch.arange(L, device=raw.device) < torch.tensor(lengths[:, None]).to(
            raw.device
        )


def draw(lengths, batch_size, seed, steps):
    """The index arrays of all steps, a function of the seed alone.

    An epoch is a random permutation, cut into pools of 64 batches; each pool is sorted by length
    and cut into batches, which are shuffled: every example once, little padding.
    """
    batches, epoch = [], 0
    while len(batches) < steps:
        rng, found = np.random.default_rng([seed, epoch]), []
        pools = max(1, len(lengths) // (64 * batch_size))
        for pool in np.array_split(rng.permutation(len(lengths)), pools):
            pool = pool[np.argsort(lengths[pool], kind="stable")]
            found += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
        batches += [found[i] for i in rng.permutation(len(found))]
        epoch += 1
    return batches[:steps]


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
    real = torch.ones_like(raw[:, :, ...], dtype=torch.bool) if keep is None else keep
    real = real if real.ndim == 2 else real[..., 0]
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
    channels = None if data.mean is None else data.train.tokens.shape[2] + 1
    shared = {
        "vocab_size": data.vocab_size + 1 if channels is None else None,  # the last is the mask
        "n_channels": channels,
        **{name: getattr(config, name) for name in ("d_model", "n_layers", "causal", "dropout")},
    }
    if config.model == "s4":
        return S4Model(S4Config(d_state=config.d_state, **shared))
    own = {name: getattr(config, name) for name in ("n_heads", "d_ff", "rope")}
    return Transformer(TransformerConfig(**own, **shared))


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


def pool(h, keep, how):
    """(B, L, D) -> (B, D) over the real positions."""
    keep = torch.ones_like(h[..., 0], dtype=torch.bool) if keep is None else keep
    if how == "mean":
        return (h * keep[..., None]).sum(1) / keep.sum(1, keepdim=True)
    if how == "max":
        return h.masked_fill(~keep[..., None], -math.inf).amax(1)
    return h[torch.arange(len(h), device=h.device), keep.sum(1) - 1]  # "last"


def loss_sums(model, head, batch, pooling):
    """-> sum of the losses, number of right answers, number of terms (positions or examples)."""
    x, target = batch.x, batch.target
    x = x.to(next(head.parameters()).dtype) if x.is_floating_point() else x
    h = model(x, batch.keep)  # (B, L, D)
    if batch.where is None:
        h = pool(h, batch.keep, pooling)  # (B, D)
    else:
        h, target = h[batch.where], target[batch.where]  # (n, D): only the positions that count
    out = head(h)
    if target.is_floating_point():
        loss = F.l1_loss(out, target.to(out), reduction="sum") / target.shape[-1]
        return loss, torch.zeros_like(loss), len(target)
    return F.cross_entropy(out, target, reduction="sum"), (out.argmax(-1) == target).sum(), len(out)


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


@torch.no_grad()
def evaluate(model, head, resident, stage, config):
    """Mean loss and accuracy over every example exactly once; masks fixed by their own seed."""
    model.eval()
    by_length, loss, right, count = np.argsort(resident.longest(), kind="stable"), 0.0, 0, 0
    for start in range(0, len(resident), config.batch_size):
        index = by_length[start : start + config.batch_size]
        batch = make_batch(resident, index, stage, config, seeded(config, 2310_02980, start))
        with autocast(config):
            sums = loss_sums(model, head, batch, config.pooling)
        loss, right, count = loss + sums[0].item(), right + sums[1].item(), count + sums[2]
    model.train()
    return {"loss": loss / count, "accuracy": right / count}


def fit(stage, model, head, train, val, config, run):
    """Train one stage; leave model and head with the weights that were best on validation.

    Judged by validation loss in pretraining, by validation accuracy in fine-tuning.
    """
    number, best = STAGES.index(stage), None
    steps, peak = getattr(config, f"{stage}_steps"), getattr(config, f"{stage}_lr")
    groups = model.param_groups(peak, config.weight_decay)
    groups.append({"params": list(head.parameters()), "lr": peak, "weight_decay": 0.0})
    optimiser, peaks = torch.optim.AdamW(groups), [group["lr"] for group in groups]
    parameters = [p for group in groups for p in group["params"]]
    batches = draw(train.longest(), config.batch_size, config.seed, steps)
    for step in run.bar(stage, steps):
        generator = seeded(config, config.seed, number, step)
        batch = make_batch(train, batches[step], stage, config, generator)
        with autocast(config):
            loss, right, count = loss_sums(model, head, batch, config.pooling)
        optimiser.zero_grad()
        (loss / count).backward()
        nn.utils.clip_grad_norm_(parameters, config.clip)
        for group, lr in zip(optimiser.param_groups, peaks, strict=True):
            group["lr"] = lr * schedule(step, steps, config.warmup)
        optimiser.step()
        run.log(step, loss, right, count, batch.x)
        if (step + 1) % config.eval_every == 0 or step + 1 == steps:
            score = evaluate(model, head, val, stage, config) | {"step": step + 1}
            merit = -score["loss"] if stage == "pretrain" else score["accuracy"]
            if best is None or merit > best["merit"]:
                best = {"merit": merit, "score": score}
                best |= copy.deepcopy({"model": model.state_dict(), "head": head.state_dict()})
            state = {"stage": stage, "step": step + 1, "best": best, "model": model.state_dict()}
            state |= {"head": head.state_dict(), "optimiser": optimiser.state_dict()}
            run.save(score, state)
    model.load_state_dict(best["model"])
    head.load_state_dict(best["head"])
    return best["score"]


def train(config, position=0):
    """One arm: pretrain (unless objective "none"), fine-tune, test once.  Returns the result.

    Raises ValueError on settings that do not fit the data or the model, FloatingPointError on a
    loss that is not finite (the last checkpoint stays).
    """
    data = lra_data.load(config.task, data_dir=config.data_dir)
    splits = [Resident(s, data, config.device) for s in (data.train, data.val, data.test)]
    labelled = splits[0] if config.labels is None else splits[0].subset(config.labels)
    seeded(config, config.seed)
    where = {"device": config.device, "dtype": DTYPES[config.precision]}
    model = build_model(config, data).to(**where)
    if config.pretrained:
        load_weights(model, config.pretrained)
    with Run(config, model, position) as run:
        for stage in STAGES:
            if stage == "pretrain" and (config.objective == "none" or config.pretrained):
                continue
            seeded(config, config.seed, STAGES.index(stage))
            head = build_head(stage, config, splits[0]).to(**where)
            pair = [labelled, splits[1]]
            if stage == "pretrain":
                pair = [s.documents() for s in splits[:2]]
            run.result[stage] = fit(stage, model, head, *pair, config, run)
            if stage == "pretrain":
                save(run.folder / "pretrained.pt", model.state_dict())
        run.result["test"] = evaluate(model, head, splits[2], "finetune", config)
    return run.result


# --------------------------------------------------------- what a run shows and leaves behind


def save(path, state):
    """torch.save, all of the file or nothing: a temporary name, flushed, renamed."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_weights(model, path):
    """Weights of a pretrained.pt into the model.  ValueError says what does not fit."""
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (OSError, RuntimeError, EOFError, TypeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} does not hold weights for this model: {error}") from error


class Run:
    """The folder of a run: config.json, metrics.jsonl, checkpoint.pt, result.json; and the bar."""

    LOG_EVERY = 10  # steps; the device is asked for numbers only this often

    def __init__(self, config, model, position):
        self.config, self.position, self.result = config, position, {}
        self.folder = Path(config.out)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.pending, self.tokens, self.all_tokens = [], 0, 0

    def __enter__(self):
        (self.folder / "config.json").write_text(json.dumps(asdict(self.config), indent=1) + "\n")
        self.metrics = open(self.folder / "metrics.jsonl", "w", encoding="utf-8")
        self.started = self.clock = time.perf_counter()
        return self

    def __exit__(self, failure, *_):
        self.metrics.close()
        if failure is None:
            seconds = round(time.perf_counter() - self.started, 1)
            self.result |= {"parameters": self.parameters, "seconds": seconds, **versions()}
            self.result |= {"tokens": self.all_tokens, "config": asdict(self.config)}
            temporary = self.folder / "result.json.tmp"
            temporary.write_text(json.dumps(self.result, indent=1) + "\n")
            os.replace(temporary, self.folder / "result.json")

    def bar(self, stage, steps):
        """The steps of a stage as a bar (nothing is drawn when the output is no terminal)."""
        self.stage, name = stage, f"{self.folder.name} {stage}"
        self._bar = tqdm(range(steps), name, disable=None, position=self.position, leave=False)
        return self._bar

    def log(self, step, loss, right, count, x):
        """Note a step; every LOG_EVERY steps look at the numbers, write a line, move the bar.

        Raises FloatingPointError when a loss since the last look is not finite.
        """
        self.pending.append((loss.detach(), right, count))
        self.tokens += x.shape[0] * x.shape[1]
        if len(self.pending) < self.LOG_EVERY:
            return
        rows = np.array([[float(v) for v in row] for row in self.pending])  # (LOG_EVERY, 3)
        for i, (value, _, _) in enumerate(rows):
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"{self.stage}: the loss is {value} at step {step + 2 - len(rows) + i}; the "
                    f"last good state is {self.folder / 'checkpoint.pt'}"
                )
        loss, right, count = rows.sum(0)
        speed = round(self.tokens / (time.perf_counter() - self.clock))
        line = {"loss": loss / count, "accuracy": right / count, "tokens_per_s": speed}
        self._bar.set_postfix(line)
        self.metrics.write(json.dumps({"stage": self.stage, "step": step + 1} | line) + "\n")
        self.all_tokens += self.tokens
        self.pending, self.tokens, self.clock = [], 0, time.perf_counter()

    def save(self, score, state):
        """After a validation: its score into the metrics, the state of everything on disk."""
        line = {"stage": self.stage} | {f"val_{k}": v for k, v in score.items()}
        self.metrics.write(json.dumps(line) + "\n")
        self.metrics.flush()
        save(self.folder / "checkpoint.pt", state | {"result": self.result})


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
DEMO = Config(task="lattice", d_ff=128, d_state=16, eval_every=100)
ARMS = {
    ("Transformer", "from scratch"): {"objective": "none", "finetune_steps": 2000},
    ("Transformer", "pretrained"): {"pretrain_steps": 1800, "finetune_steps": 200},
    ("S4", "from scratch"): {"model": "s4", "objective": "none", "finetune_steps": 1000},
    ("S4", "pretrained"): {"model": "s4", "pretrain_steps": 800, "finetune_steps": 200},
}


def one_thread(lock):
    """A worker of the demonstration: the models are small, arms side by side are faster."""
    torch.set_num_threads(1)
    tqdm.set_lock(lock)


def demo(seed=0, out="runs/demo"):
    """Train the four arms, print the table and the two gaps.  Returns {arm: result}."""
    context, arms = get_context("spawn"), {}
    workers = 1 if DEMO.device == "cuda" else min(len(ARMS), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, context, one_thread, (context.RLock(),)) as pool:
        for position, (arm, settings) in enumerate(ARMS.items()):
            folder = f"{out}/{'-'.join(arm).lower().replace(' ', '-')}"
            config = replace(DEMO, seed=seed, out=folder, **settings)
            arms[arm] = pool.submit(train, config, position)
        arms = {arm: future.result() for arm, future in arms.items()}
    print(f"{'':28}{'parameters':>12}{'steps':>12}{'val %':>8}{'test %':>8}{'seconds':>9}")
    test = {}
    for arm, result in arms.items():
        config, test[arm] = result["config"], 100 * result["test"]["accuracy"]
        steps = str(config["finetune_steps"])
        if config["objective"] != "none":
            steps = f"{config['pretrain_steps']} + {steps}"
        val = 100 * result["finetune"]["accuracy"]
        print(f"{', '.join(arm):28}{result['parameters']:12,}{steps:>12}", end="")
        print(f"{val:8.1f}{test[arm]:8.1f}{result['seconds']:9.0f}")
    gaps = [test["S4", way] - test["Transformer", way] for way in ("from scratch", "pretrained")]
    print(
        f"From scratch the Transformer is {gaps[0]:.1f} points below S4; "
        f"when both are pretrained on the same examples, {gaps[1]:.1f} points."
    )
    return arms


# ---------------------------------------------------------------------- check, command line


def self_check(device="cpu"):
    """-> list of (name, error, limit): the steps that go wrong silently when they do."""
    config = Config(device=device, batch_size=8)
    data = lra_data.load("lattice", n_train=64, n_val=8, n_test=8)
    train = Resident(data.train, data, device)
    seen = np.concatenate(draw(train.longest(), 8, 0, 8))
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


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = vars(parser().parse_args(argv))
    print(f"pretrain.py  {'  '.join(f'{k} {v}' for k, v in versions().items())}")
    if args.pop("check"):
        rows = self_check(args["device"])
        for name, error, limit in rows:
            print(f"  {name:42}{error:9.2g}{limit:9}   {'ok' if error <= limit else 'FAILED'}")
        sys.exit(any(not error <= limit for _, error, limit in rows))
    if not argv:
        return demo()
    try:
        config = Config(**args)
        print("\n".join(f"  {name:16}{value}" for name, value in asdict(config).items()))
        result = train(config)
    except (ValueError, FloatingPointError) as error:
        sys.exit(f"pretrain.py: {error}")
    for stage in (*STAGES, "test"):
        if stage in result:
            print(stage, "  ".join(f"{k} {v:.4g}" for k, v in result[stage].items()))
    print(f"{result['parameters']:,} parameters, {result['seconds']} s, {config.out}/result.json")


if __name__ == "__main__":
    main()
