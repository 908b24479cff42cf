"""Pretrain a long-sequence model on its own task, fine-tune it, and see what that was worth.

The idea in one sentence: before a model is trained on labels, let it denoise the inputs of the
very same training examples, and most of the distance between architectures disappears.

    Amos, Berant, Gupta: Never Train from Scratch (arXiv:2310.02980v4)

The way of the data, which is the order of this file:

    load -> Resident (on the device, once) -> draw (indices) -> make_batch (corrupt) -> model
    -> head -> loss_sums -> gradients -> fit (the loop); train: fit, the same model under a new
    head, fit again, one test evaluation

    paper                        here                                              shape
    self-pretraining (SPT)       --objective masked | causal, the stage "pretrain"
    trained from scratch (TFS)   --objective none
    masked token                 the id vocab_size, one more row in the embedding
    noisy input, mask, clean     Batch.x, Batch.where, Batch.target                (B, L) of symbols

Every random choice is a function of (seed, stage, step) alone: which examples, which positions
are masked, which units are dropped. Nothing about random generators has to be stored, and a run
that was killed continues to the same bits (run_folder.py). B counts sequences: a pair of documents
is two of them, with one label.

Departures from the paper: the masks of validation are fixed for a batch size (there they are drawn
anew, so the choice of the checkpoint is noisy); attention does not see padding (there it does);
every example is evaluated (there the last partial batch is dropped).
Not included: data that do not fit the memory of the device.

    python pretrain.py            the demonstration; what it prints stands in README.md
    python pretrain.py --task listops --model s4 --objective masked
    python pretrain.py --settings settings/lattice-s4.json --print-config
"""

import copy
import itertools
import math
import sys
from concurrent.futures import BrokenExecutor
from dataclasses import asdict, replace
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import lra_data
import parallel
from attention import Transformer, TransformerConfig
from config import Config, parser, resolve
from dist_attention import RankLost, process_group
from run_folder import Run, load_into, save, versions
from s4 import S4Config, S4Model, diagonal_mixer, s4_mixer, s4d_mixer
from sgconv import PUBLISHED, SGConvConfig, SGConvModel
from structured_ffn import ffn_factory

STAGES = ("pretrain", "finetune")
# What may differ when a run goes on: where and how fast it runs, and so at most the rounding (and
# what dropout drops in the parts of a batch).
FREE = ("out", "resume", "device", "data_dir", "accumulate", "compile")
BODY = ("model", "d_model", "n_layers", "n_heads", "d_ff", "ffn", "d_state", "rope", "causal")
VALIDATION_SEED = 2310_02980  # of the masks of validation and test
# Which of sgconv.PUBLISHED a full-size task takes; the small variants have no published kernel.
KERNELS = {name: name for name in ("listops", "text", "retrieval", "image")}
KERNELS |= {"image-real": "image", "pathfinder32": "pathfinder", "pathfinder128": "pathx"}

# ------------------------------------------------------------- data on the device, by index


def load_data(config):
    """The task as arrays.  ValueError on a task or an option that there is not."""
    options = {"source": config.source, "n": config.pictures}
    options = {k: v for k, v in options.items() if v is not None}
    try:
        return lra_data.load(config.task, data_dir=config.data_dir, **options)
    except TypeError as error:
        names = " and ".join({"n": "pictures"}.get(name, name) for name in options)
        raise ValueError(f"task {config.task} does not take {names}") from error
    except ValueError as error:
        text = str(error).replace(f"n {config.pictures}", f"pictures {config.pictures}")
        raise ValueError(text) from error


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


def draw(lengths, batch_size, *seed):
    """Yields the index array of each step, without end, as a function of the seed (ints) alone.

    An epoch is a random permutation, cut into pools of 64 batches; each pool is sorted by length
    and cut into batches, which are shuffled: every example once, little padding.
    """
    for epoch in itertools.count():
        rng, batches = np.random.default_rng([*seed, epoch]), []
        pools = max(1, len(lengths) // (64 * batch_size))
        for pool in np.array_split(rng.permutation(len(lengths)), pools):
            pool = pool[np.argsort(lengths[pool], kind="stable")]
            batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
        yield from (batches[i] for i in rng.permutation(len(batches)))


# ---------------------------------------------------------------------- corrupt: make a batch


class Batch(NamedTuple):
    x: torch.Tensor  # (B, L) ids, or (B, L, C + 1) values and the mask flag
    keep: torch.Tensor | None  # (B, L) bool, True = a real token; None: no padding
    where: torch.Tensor | None  # (B, L) bool: positions that count; None: one label an example
    target: torch.Tensor  # (B, L) ids or (B, L, C) values at each position; (B,) or (B/2,) labels


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
    grey = channels == 1 and data.vocab_size  # levels are symbols too
    if config.loss != ("ce" if channels is None else "l1") and not grey:
        kind = "symbols" if channels is None else f"{channels} channels"
        raise ValueError(f"loss {config.loss!r} does not fit {kind} of task {config.task}")
    if channels is None:
        shared["vocab_size"] = data.vocab_size + 1  # the last one is the mask
    else:
        shared["n_channels"] = channels + 1  # the last one is the flag
    if config.model in ("s4", "s4d", "diagonal"):
        mixer = {"s4": s4_mixer, "s4d": s4d_mixer, "diagonal": diagonal_mixer}[config.model]
        own = {name: getattr(config, name) for name in ("d_state", "dt_min", "dt_max")}
        return S4Model(S4Config(**own, **shared), mixer)
    if config.model == "sgconv":
        L = shared["max_len"] = tokens.shape[-1 if channels is None else 1]
        published = KERNELS.get(config.task.removesuffix("-characters"))
        kernel = {"kernel_dim": min(32, L)} | PUBLISHED.get(published, {})
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
    rank, world = parallel.ranks()
    split = config.sequence_parallel and world > 1  # here are some tokens of each sequence
    batch, options = parallel.own_tokens(model, batch, config.causal) if split else (batch, {})
    x, keep, where, target = batch
    x = x.to(next(head.parameters()).dtype) if x.is_floating_point() else x
    h = model(x, keep, **options)  # (B, L, D)
    if where is not None:
        h, target = h[where], target[where]  # (n, D): only the positions that count
    else:
        add = {"add": parallel.SumOverRanks.apply} if split else {}
        h = pool(h, keep, config.pooling, **add)  # (B, D)
    out = head(h)  # (n or B, symbols, channels or classes)
    if target.is_floating_point():
        loss = F.l1_loss(out, target.to(out), reduction="sum") / target.shape[-1]
        right = torch.zeros_like(loss)
    else:
        loss = F.cross_entropy(out, target, reduction="sum")
        right = (out.argmax(-1) == target).sum()
    if split and where is None and rank > 0:
        return loss * 0, right * 0, 0  # every process has the same `out`: the first judges it
    return loss, right, len(out)


# ----------------------------------------------------------------------------------- the loop


def seeded(config, *numbers, own=0):
    """A generator that is a function of these numbers; seeds torch's own (weights, dropout) too.

    own: of torch's own alone, so that processes with other examples drop other units.
    """
    # the length first: numpy takes (1,) and (1, 0) for the same; 63 bits: torch's seeds are signed
    value = int(np.random.SeedSequence((len(numbers), *numbers)).generate_state(1, np.uint64)[0])
    value >>= 1
    # not torch.manual_seed, which keeps a stack trace of every call where there is no GPU
    torch.default_generator.manual_seed(value + own)
    devices = {"cuda": torch.cuda.manual_seed_all, "mps": torch.mps.manual_seed}
    devices.get(torch.device(config.device).type, lambda seed: None)(value + own)
    return torch.Generator(config.device).manual_seed(value)


def schedule(step, steps, warmup, shape="cosine"):
    """Share of the highest rate: a line up to 1 over warmup * steps; half a cosine to 0, or 1."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    if shape == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def autocast(config):
    device = torch.device(config.device).type
    return torch.autocast(device, torch.bfloat16, enabled=config.precision == "bfloat16")


@torch.no_grad()
def evaluate(model, head, resident, stage, config):
    """Mean loss and accuracy over every example exactly once; masks fixed by their own seed."""
    model.eval()
    by_length, size = np.argsort(resident.longest(), kind="stable"), config.batch(stage)
    rank, world = parallel.share_of_examples(config.sequence_parallel)
    sums = torch.zeros(3, dtype=torch.float64, device=config.device)
    for first in range(rank * size, len(resident), world * size):
        generator = seeded(config, VALIDATION_SEED, first)
        index = by_length[first : first + size]
        batch = make_batch(resident, index, stage, config, generator)
        with autocast(config):
            loss, right, count = loss_sums(model, head, batch, config)
        sums += torch.stack([loss.double(), right.double(), loss.new_tensor(count).double()])
    parallel.total([sums])
    model.train()
    loss, right, count = sums.tolist()
    if count == 0:
        how = (
            f"mask_ratio {config.mask_ratio}" if config.objective == "masked" else "one step ahead"
        )
        raise ValueError(f"{how}: nothing to predict in {len(resident)} examples")
    return {"loss": loss / count, "accuracy": right / count}


def gradients(model, head, batch, config):
    """Puts those of the mean loss over the batch into .grad.  -> sum of losses, right, count.

    Each process takes its own examples, in `accumulate` parts; the sums are those of one process.
    """
    (rank, world), n = parallel.share_of_examples(config.sequence_parallel), config.accumulate
    count = len(batch.target) if batch.where is None else int(batch.where.sum())
    count = max(1, count)  # nothing is masked in a small batch: no gradient
    sums = torch.zeros(2, device=config.device, dtype=torch.float64)
    for i in range(rank * n, rank * n + n):
        if (piece := parallel.part(batch, i, world * n)) is not None:
            with autocast(config):
                loss, right, _ = loss_sums(model, head, piece, config)
            (loss / count).backward()
            sums += torch.stack([loss.detach().double(), right.double()])
    if parallel.ranks()[1] > 1:
        parameters = [p for m in (model, head) for p in m.parameters()]
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        parallel.total([p.grad for p in parameters])
        parallel.total([sums])
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
    order = draw(train.longest(), config.batch(stage), config.seed, number)
    order = itertools.islice(order, first, None)
    for step in run.steps(stage, first, steps):
        rank, _ = parallel.share_of_examples(config.sequence_parallel)
        generator = seeded(config, config.seed, number, step, own=rank)
        batch = make_batch(train, next(order), stage, config, generator)
        optimiser.zero_grad()
        loss, right, count = gradients(model, head, batch, config)
        nn.utils.clip_grad_norm_(parameters, config.clip)
        for group, lr in zip(optimiser.param_groups, peaks, strict=True):
            group["lr"] = lr * schedule(step, steps, config.warmup, config.schedule)
        optimiser.step()
        run.log(step, loss, right, count, batch.x.shape[:2].numel())
        if (step + 1) % config.eval_every == 0 or step + 1 == steps:
            run.report(step)
            score = evaluate(model, head, val, stage, config) | {"step": step + 1}
            if not math.isfinite(score["loss"]):
                where = f"of validation is {score['loss']} at step {step + 1}"
                raise FloatingPointError(f"{config.out}, {stage}: the loss {where}")
            merit = -score["loss"] if stage == "pretrain" else score["accuracy"]
            if best is None or merit > best["merit"]:
                best = {"merit": merit, "score": score}
                best |= copy.deepcopy({"model": model.state_dict(), "head": head.state_dict()})
            run.save(step, parts, best, score)
        elif run.interrupted:
            run.report(step)
            run.save(step, parts, best)
    model.load_state_dict(best["model"])
    head.load_state_dict(best["head"])
    return best["score"]


def initial_model(config, data):
    """The model as a run begins with it: weights from the seed or a file, on the device."""
    seeded(config, config.seed)
    model = build_model(config, data)
    if config.random_init:  # 2310.02980v4, section C.1
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(0, 0.1)
    if config.pretrained:
        load_into(model, config.pretrained, asdict(config), BODY)
    if config.sequence_parallel:
        layout = parallel.token_layout(model, config.causal)
        parallel.spread(model, config.sequence_parallel, layout)
    if config.compile:
        low, high = data.train.lengths.min(), data.train.lengths.max()
        if config.model != "transformer" and low < high:  # their kernels compile for one length
            lengths = f"{config.task} has lengths {low} to {high}, each would be compiled anew"
            raise ValueError(f"compile with model {config.model!r}: {lengths}; expected one length")
        model.compile()
    return model.to(config.device, torch.float64 if config.precision == "float64" else None)


def train(config, position=0):
    """One arm: pretrain (unless objective "none"), fine-tune, test once.  Returns the result.

    position: line of the bar on the screen.  Raises ValueError on settings that do not fit the
    data or the model, FloatingPointError on a loss that is not finite (the last checkpoint stays).
    """
    data = parallel.leader_first(lambda: load_data(config))
    train_split, val_split, test_split = (
        Resident(split, data, config.device) for split in (data.train, data.val, data.test)
    )
    labelled = train_split if config.labels is None else train_split.subset(config.labels)
    model, (rank, world) = initial_model(config, data), parallel.ranks()
    settings = {name: value for name, value in asdict(config).items() if name != "resume"}
    with Run(config.out, settings, FREE, config.resume, rank, world, position) as run:
        run.result["parameters"] = sum(p.numel() for p in model.parameters())
        skip = config.objective == "none" or config.pretrained
        for stage in STAGES[1:] if skip else STAGES:
            seeded(config, config.seed, STAGES.index(stage))  # the head, alike after a resume
            head = build_head(stage, config, train_split).to(next(model.parameters()))
            if stage in run.result:
                continue  # finished before the run was resumed
            pair = labelled, val_split
            if stage == "pretrain":
                pair = train_split.documents(), val_split.documents()
            score = fit(stage, model, head, *pair, config, run)
            if stage == "pretrain" and run.leader:
                save(run.folder / "pretrained.pt", model.state_dict())
                denoiser = {"model": model.state_dict(), "head": head.state_dict()}
                save(run.folder / "denoiser.pt", denoiser | {"config": settings})
            run.result[stage] = score
        run.result["test"] = evaluate(model, head, test_split, "finetune", config)
    return run.result


# ------------------------------------------------------------------- self-check, command line


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
    sigma = math.sqrt(config.mask_ratio * (1 - config.mask_ratio) / batch.where.numel())
    return [
        ("draw: an epoch holds every example once", float((np.sort(seen) != index).sum()), 0),
        ("masked: share, in standard deviations", abs(share - config.mask_ratio) / sigma, 4),
        ("masked: hidden exactly where the loss is", float((hidden != batch.where).sum()), 0),
        ("masked: target is the clean input", float((batch.target != train.tokens).sum()), 0),
        ("masked: same seed, same bits", float((batch.x != again.x).sum()), 0),
        ("causal: target is the input one later", float(aligned + (not where)), 0),
    ]


def run_once(config):
    """One run as the command line asks for it: settings, training, result on the screen."""
    if config.resume and not Path(config.out, "config.json").exists():
        raise ValueError(f"{config.out} holds no run: nothing to resume")
    with process_group(config.device) as (rank, _, device):
        config = replace(config, device=str(device))
        if rank == 0:
            print("\n".join(f"{k:20}{v}" for k, v in (asdict(config) | versions()).items()))
        result = train(config)
    if rank == 0:
        for stage in (*STAGES, "test"):
            if stage in result:
                score = {k: v if k == "step" else f"{v:.4g}" for k, v in result[stage].items()}
                print(f"{stage:10}" + "  ".join(f"{k} {v}" for k, v in score.items()))
        speed = "  ".join(f"{k} {v:,}" for k, v in result["speed"].items() if v is not None)
        print(f"parameters {result['parameters']:,}  {speed}\n{config.out}/result.json")


def command(argv, args):
    """What the command line asks for: the demonstration, a table of checks, settings, or a run."""
    if not argv:
        sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
        from demo import demo

        return demo()
    if args.pop("check", False):
        check_device(args.get("device", "cpu"))
        rows = self_check(args.get("device", "cpu"))
        for name, error, limit in rows:
            print(f"  {name:42}{error:9.2g}{limit:9}   {'ok' if error <= limit else 'FAILED'}")
        sys.exit(any(not error <= limit for _, error, limit in rows))
    show = args.pop("print_config", False)
    config, origin = resolve(args)
    if show:
        return print("\n".join(f"{k:20}{v!s:24} {origin[k]}" for k, v in asdict(config).items()))
    check_device(config.device)
    run_once(config)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = vars(parser().parse_args(argv))
    try:
        command(argv, args)
    except (ValueError, OSError, FloatingPointError, BrokenExecutor, RankLost) as error:
        sys.exit(f"pretrain.py: {shorten(str(error), 600)}")
    except (RuntimeError, MemoryError) as error:
        if "allocate" not in str(error):  # no memory left
            raise
        sys.exit(f"pretrain.py: {shorten(str(error), 600)}")
    except KeyboardInterrupt as stop:
        how = "".join(f"; {text}" for text in stop.args) if argv else "; the same command continues"
        print(f"pretrain.py: interrupted{how}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
