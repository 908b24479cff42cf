"""Pretrain a long-sequence model on its own task, then fine-tune it.

Amos, Berant, Gupta: Never Train from Scratch (arXiv:2310.02980v4). Before a model is trained on
labels, let it denoise the inputs of the very same examples: most of the distance between
architectures disappears.

Data flow (this file follows the same order; the first line is batches.py):

    load_data -> Resident (on the device, once) -> draw (indices) -> gather
    -> make_batch -> model -> head -> loss_sums -> fit (the loop)
    train: fit, the same model with a new head, fit, test, model.pt (see predict.py)

    paper                        here
    self-pretraining (SPT)       --objective masked | causal, stage "pretrain"
    trained from scratch (TFS)   --objective none
    masked token                 id vocab_size, one more row of the embedding; values: 0 and a flag
    regression                   labels (n, k) instead of classes, trained on (y - y_mean) / y_std
    noisy input, mask, clean     Batch.x, Batch.where, Batch.target (shapes: Batch)

With the same settings, every random choice of training follows from seed, stage, step, rank and
kind of device, so a killed run continues with the same bits (on as many threads). Data, label
subsets and validation masks do not depend on the seed. B counts sequences: a pair of documents is
two of them, with one label.

Differences from the paper: validation masks are fixed (drawn anew there); attention does not see
padding (it does there); every example is evaluated (the last partial batch is dropped there).
Not included: data that do not fit into device memory.

    python pretrain.py                                    four small models (benchmarks/demo.py)
    python pretrain.py --settings lattice-s4              one run, in a new folder of runs/
    python pretrain.py --task my.csv --model s4           your own data (own_data.py)
    torchrun --standalone --nproc-per-node 4 pretrain.py --settings listops-s4
                                          with --max-restarts and --out, a restart resumes the run
"""

import copy
import itertools
import math
import os
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import dist_attention
import gpu_step
import lra_data
import sgconv
from attention import Transformer, TransformerConfig
from batches import Batch, describe, draw, fitted, load_data, normalize, part, resident, send
from checkpoint import Run, check_out, differences, find_run, means, new_folder, ranks
from dist_attention import RankLost, process_group, wait_for_all_ranks
from gpu_kernels import JointS4Model
from own_data import say
from pathfinder import print_anywhere, require
from s4 import S4Config, S4Model, dlr_mixer, print_table, s4_mixer, s4d_mixer
from settings import KERNELS, Config, idle, parser, resolve
from sgconv import SGConvConfig, SGConvModel
from structured_ffn import ffn_factory

STAGES = ("pretrain", "finetune")
VALIDATION_SEED = 2310_02980  # for the masks of validation, the same in every run

# ------------------------------------------------------------------------ make a batch


def inputs(raw, masked, about):
    """Tokens as stored -> what the model reads.  masked: (B, L) bool, or None (nowhere).

    Symbols: (B, L) ids, vocab_size where masked.  Values: (B, L, C + 1), normalized, 0 where
    masked, and a flag that is 1 there. In fine-tuning the flag is 0, which equals dropping its
    weights.
    """
    if masked is None:
        masked = raw.new_zeros(raw.shape[:2], dtype=torch.bool)
    if about["mean"] is None:
        return raw.long().masked_fill(masked, about["vocab_size"])
    x = normalize(raw, about)  # (B, L, C)
    flag = masked[..., None].to(x)
    return torch.cat([x * (1 - flag), flag], dim=-1)  # (B, L, C + 1)


def make_batch(split, index, stage, config, generator):
    """Examples by index -> Batch for a stage (2310.02980v4, section 2)."""
    raw, keep = split.gather(index, config.multiple())
    if stage == "finetune":
        labels = split.labels[send(index, raw.device)]
        return Batch(inputs(raw, None, split.about), keep, None, labels)
    real = raw.new_ones(raw.shape[:2], dtype=torch.bool) if keep is None else keep
    if config.objective == "masked":  # independent positions, all of them replaced (no 80/10/10)
        longest = int(split.lengths[index].max())  # --pad-to must not change what is drawn
        noise = torch.rand(len(raw), longest, generator=generator, device=raw.device)
        where = F.pad(noise < config.mask_ratio, (0, raw.shape[1] - longest)) & real
        x = inputs(raw, where, split.about)
        target = raw
    else:  # causal: predict the input one step later, at all but the last position of a sequence
        where = F.pad(real[:, 1:], (0, 1))
        x = inputs(raw, None, split.about)
        target = torch.roll(raw, -1, dims=1)  # the last position wraps, but is not in where
    if config.loss == "l1":
        return Batch(x, keep, where, normalize(target, split.about))
    if target.ndim == 3:
        target = target[..., 0]  # gray levels, predicted as symbols
    return Batch(x, keep, where, target.long())


# ------------------------------------------------------------------------ model, head, loss


def build_model(config, about):
    """The body, which both stages share: embedding, blocks, final norm."""
    sizes = {name: getattr(config, name) for name in ("d_model", "n_layers", "causal", "dropout")}
    if about["mean"] is None:
        sizes["vocab_size"] = about["vocab_size"] + 1  # the last one is the mask
    else:
        sizes["n_channels"] = about["n_channels"] + 1  # the last one is the flag
    if config.model == "transformer":
        ffn = None if config.ffn == "dense" else ffn_factory(config.ffn)
        sizes.update(n_heads=config.n_heads, d_ff=config.d_ff, rope=config.rope)
        return Transformer(TransformerConfig(**sizes), ffn=ffn)
    if config.model == "sgconv":
        return SGConvModel(SGConvConfig(**sizes, **sgconv_settings(config, about["max_len"])))
    mixer = {"s4": s4_mixer, "s4d": s4d_mixer, "diagonal": dlr_mixer}[config.model]
    sizes.update(d_state=config.d_state, dt_min=config.dt_min, dt_max=config.dt_max)
    # on a GPU, compute the kernels of all layers at once
    joint = config.device.startswith("cuda") and not config.sequence_parallel
    kind = JointS4Model if joint else S4Model
    return kind(S4Config(**sizes), mixer)


def sgconv_settings(config, L):
    """Settings of SGConv's kernel: published for this task, else 32 parameters per scale.

    --kernel-dim overrides both.
    """
    found = {"max_len": L, "kernel_dim": min(32, L), **KERNELS.get(config.task, {})}
    if config.kernel_dim is not None:
        found["kernel_dim"] = config.kernel_dim
    for name in ("decay", "init"):
        if name in found:
            found[name] = getattr(sgconv, found[name])
    return found


class PairHead(nn.Module):
    """Two documents a, b -> classes, from [a, b, a - b, a * b] (Retrieval, 2310.02980v4)."""

    def __init__(self, d_model, n_classes):
        super().__init__()
        self.hidden = nn.Linear(4 * d_model, d_model)
        self.out = nn.Linear(d_model, n_classes)

    def forward(self, pooled):
        a, b = pooled.unflatten(0, (-1, 2)).unbind(1)  # (B, D) -> (B/2, D) twice
        return self.out(F.gelu(self.hidden(torch.cat([a, b, a - b, a * b], -1))))


def build_head(stage, config, about):
    """pretrain: a linear map per position to symbols or values; finetune: to classes or y."""
    if stage == "pretrain":
        width = about["vocab_size"] if config.loss == "ce" else about["n_channels"]
        return nn.Linear(config.d_model, width)
    width = about["n_classes"] or len(about["y_mean"])
    if about["pairs"]:
        return PairHead(config.d_model, width)
    return nn.Linear(config.d_model, width)


def pool(h, keep, how, shared=False):
    """(B, L, D) -> (B, D) over the real positions.

    shared: every rank has some of the tokens (for "mean" alone).
    """
    if keep is None:
        keep = torch.ones_like(h[..., 0], dtype=torch.bool)
    if how == "max":
        return h.masked_fill(~keep[..., None], -math.inf).amax(1)
    if how == "last":
        return h[torch.arange(len(h), device=h.device), keep.sum(1) - 1]
    total = (h * keep[..., None]).sum(1)
    count = keep.sum(1, keepdim=True)
    if shared:
        total = dist_attention.SumOverRanks.apply(total)
        count = dist_attention.SumOverRanks.apply(count)
    return total / count


def uses_graphs(config):
    """True if full training steps are CUDA graphs: one process on a GPU, and no --eager."""
    alone = ranks()[1] == 1 and not config.sequence_parallel
    return alone and config.device.startswith("cuda") and not config.eager


def features(model, x, keep, config, positions=()):
    """What the body makes of the inputs: (B, L, D)."""
    if x.is_floating_point():
        x = x.to(next(model.parameters()).dtype)
    # the padding is on the right, where a causal model never looks
    return model(x, None if config.causal else keep, *positions)


def loss_sums(model, head, batch, config):
    """Loss, summed over what counts in this process, and sums of loss, count, correct.

    The sums are float64, without gradient; `correct` is nan where nothing is right or wrong.
    Regression adds 4 k more (see `regression_score`).
    """
    positions = ()
    if config.sequence_parallel:
        batch, positions = own_tokens(batch, config)
    x, keep, where, target = batch
    h = features(model, x, keep, config, positions)
    n = len(target) if where is None else where.sum()
    if where is None:  # one output per example
        out = head(pool(h, keep, config.pooling, bool(config.sequence_parallel)))
    elif uses_graphs(config):  # shapes in a graph must not depend on the data: all positions
        out = head(h).flatten(0, 1)
        target = without_loss(target.flatten(0, 1), ~where.flatten(), out)
    else:  # only the positions that count: a fifth faster on a CPU
        out = head(h[where])
        target = target[where]
    correct = torch.full((), math.nan, device=out.device)
    more = []
    if not target.is_floating_point():
        loss = F.cross_entropy(out, target, reduction="sum")
        correct = (out.argmax(-1) == target).sum()
    elif where is not None:  # denoising
        loss = F.l1_loss(out, target.to(out), reduction="sum") / target.shape[-1]
    else:  # regression
        error = out.double() - target  # (B, k)
        penalty = error.abs() if config.target_loss == "l1" else error.square()
        loss = penalty.mean(1).sum()
        more = [error.detach().abs(), error.detach().square(), target, target.square()]
    count = torch.zeros_like(loss, dtype=torch.float64) + n  # n may be on a GPU: do not wait for it
    sums = torch.stack([loss.detach().double(), count, correct.double()])
    sums = torch.cat([sums, *(values.sum(0) for values in more)])
    if config.sequence_parallel and where is None and ranks()[0] > 0:
        return loss * 0, sums * 0  # all ranks have the same `out`: count it once
    return loss, sums


def without_loss(target, ignored, out):
    """target (n,) or (n, C) with a loss of 0 and no gradient where ignored (n,)."""
    if target.is_floating_point():
        return torch.where(ignored[:, None], out.detach(), target.to(out))
    return target.masked_fill(ignored, -100)  # which cross entropy ignores


def regression_score(sums, y_std):
    """R2, and mean absolute error in the units of y; both are means over the k targets."""
    count = sums[1]
    # sums over the examples, each (k,), of standardized targets
    abs_error, square_error, y, y_square = sums[3:].view(4, -1).cpu()
    total = y_square - y * y / count
    varies = total > 1e-10 * y_square  # else constant, up to rounding
    r2 = torch.where(varies, 1 - square_error / total, 0)
    mae = abs_error / count * torch.tensor(y_std, dtype=torch.float64)
    return {"r2": r2.mean().item(), "mae": mae.mean().item()}


class LossModule(nn.Module):
    """Body and head as one module, as DDP wants it: batch -> (loss, sums), see loss_sums."""

    def __init__(self, model, head, config):
        super().__init__()
        self.model = model
        self.head = head
        self.config = config

    def forward(self, batch):
        with autocast(self.config, batch.x):
            return loss_sums(self.model, self.head, batch, self.config)


def autocast(config, x):
    """A context with matrix products in bfloat16, if the settings ask for them."""
    half = config.precision == "bfloat16"
    return torch.autocast(x.device.type, torch.bfloat16, enabled=half)


def compiled_if(condition):
    """A context that runs compiled code only if condition: each new batch size would recompile."""
    return torch.compiler.set_stance("default" if condition else "force_eager")


# --------------------------------------------------------------------------------- the loop


def seeded(config, *numbers, rank=0):
    """A generator that is a function of these integers. Seeds torch's own (weights, dropout) too.

    rank: added to torch's own seed, so that processes, which hold other examples, drop other units.
    """
    # the length comes first: numpy treats (1,) and (1, 0) as one seed; >> 1 leaves room for rank
    entropy = np.random.SeedSequence((len(numbers), *numbers))
    value = int(entropy.generate_state(1, np.uint64)[0]) >> 1
    torch.manual_seed(value + rank)
    return torch.Generator(config.device).manual_seed(value)


def schedule(step, steps, warmup, shape="cosine"):
    """Fraction of the peak learning rate: linear warmup, then half a cosine to 0, or constant 1."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    if shape == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def make_optimizer(model, head, lr, config):
    """AdamW over the model's own groups and the head; every group knows its peak learning rate."""
    groups = model.param_groups(lr, config.weight_decay)
    groups.append({"params": list(head.parameters()), "lr": lr, "weight_decay": 0.0})
    for group in groups:
        group["peak_lr"] = group["lr"]
    return torch.optim.AdamW(groups)


def fixed_batches(split, stage, config, rank=0, world=1):
    """Yield the batches of a rank, with fixed masks: over all ranks, every example once."""
    by_length = np.argsort(split.longest(), kind="stable")
    size = config.batch(stage)
    for first in range(rank * size, len(split), world * size):
        generator = seeded(config, VALIDATION_SEED, first)
        yield make_batch(split, by_length[first : first + size], stage, config, generator)


@torch.no_grad()
def evaluate(model, head, split, stage, config):
    """Loss, and accuracy or R2, over the `fixed_batches` of all ranks."""
    objective = LossModule(model, head, config).eval()
    y_std = split.about["y_std"] if stage == "finetune" else None
    sums = torch.zeros(3 + 4 * len(y_std or ()), dtype=torch.float64, device=config.device)
    for batch in fixed_batches(split, stage, config, *share_of_examples(config)):
        with compiled_if(len(batch.target) == config.batch(stage)):
            sums += objective(batch)[1]
    objective.train()
    wait_for_all_ranks()  # ranks may finish minutes apart: a sum over them would time out
    sums = dist_attention.SumOverRanks.apply(sums)
    score = means(sums)
    if y_std:
        score.update(regression_score(sums, y_std))
    return score


def take_step(objective, optimizer, config, batch):
    """Forward, backward, clip, update.  Returns the sums of `loss_sums` in this process."""
    rank, world = share_of_examples(config)
    count = len(batch.target) if batch.where is None else batch.where.sum().clamp(min=1)
    pieces = config.accumulate
    sums = 0
    for i in range(pieces):
        piece, weight = part(batch, rank * pieces + i, world * pieces)
        objective.require_backward_grad_sync = i + 1 == pieces  # as no_sync; only DDP reads it
        loss, seen = objective(piece)
        (loss * weight * world / count).backward()  # DDP averages over the processes
        sums = sums + weight * seen
    if config.sequence_parallel:
        dist_attention.sum_gradients(objective.parameters())
    nn.utils.clip_grad_norm_(objective.parameters(), config.clip)
    optimizer.step()
    optimizer.zero_grad()
    return sums


def fit(stage, model, head, train, val, config, run):
    """Train one stage; leave model and head as they were at their best on validation.

    Judged by validation loss, except in classification, where it is accuracy.
    """
    number = STAGES.index(stage)
    steps = config.steps(stage)
    optimizer = make_optimizer(model, head, config.lr(stage), config)
    parts = {"model": model, "head": head, "optimizer": optimizer}
    start, best = run.restore(parts)  # (0, None) for a new run
    gpu_step.prepare_optimizer(optimizer, config.device, uses_graphs(config))
    rank, world = share_of_examples(config)
    objective = LossModule(model, head, config)  # batch -> loss_sums
    if world > 1:
        objective = data_parallel(objective, stage, train, config)
    eager_step = partial(take_step, objective, optimizer, config)
    full_step = eager_step  # of whole batches
    if uses_graphs(config):
        full_step = gpu_step.CapturedStep(eager_step, objective, optimizer)
    order = draw(train.longest(), config.batch(stage), config.seed, number)
    order = itertools.islice(order, start, None)

    for step in run.steps(stage, start, steps):
        generator = seeded(config, config.seed, number, step, rank=rank)
        index = next(order)
        batch = make_batch(train, index, stage, config, generator)  # of all processes
        factor = schedule(step, steps, config.warmup, config.schedule)
        for group in optimizer.param_groups:
            gpu_step.set_lr(group, group["peak_lr"] * factor)
        is_full = len(index) == config.batch(stage)  # the few smaller ones are not worth a graph
        with compiled_if(is_full):
            sums = full_step(batch) if is_full else eager_step(batch)
        run.log(step, sums, int(train.lengths[index].sum()))

        validate = (step + 1) % config.eval_every == 0 or step + 1 == steps
        if validate:
            score = evaluate(model, head, val, stage, config)
            run.validated(step, score)
            by_accuracy = stage == "finetune" and "accuracy" in score
            merit = score["accuracy"] if by_accuracy else -score["loss"]
            if best is None or merit > best["merit"]:
                weights = {"model": model.state_dict(), "head": head.state_dict()}
                score = {**score, "step": step + 1}
                best = {"merit": merit, "score": score, **copy.deepcopy(weights)}
        if validate or run.interrupted:
            run.save(step, parts, best)  # raises KeyboardInterrupt if interrupted
            wait_for_all_ranks()  # rank 0 writes

    model.load_state_dict(best["model"])
    head.load_state_dict(best["head"])
    return best["score"]


# Settings that may change when a run is resumed: the data themselves are compared.
FREE = ("out", "resume", "overwrite", "data_dir", "task")
# These change rounding and, except eager, what dropout drops; another kind of device, masks too.
FREE += ("device", "accumulate", "compile", "eager", "pad_to")


@torch.random.fork_rng(devices=[])
def train(config, position=0):
    """One run: pretrain (unless objective is "none" or pretrained is given), fine-tune, test once.

    Returns the result.
    position: row of the progress bar.  ValueError if settings do not fit the data or the model;
    FloatingPointError if the run diverges (the last checkpoint stays).  Random numbers of the
    caller go on as if nothing had been drawn (those of a GPU do not).
    """
    config, about, splits = prepare_run(config)
    train_split, val_split, test_split = splits
    labeled = train_split.subset(config.labels) if config.labels else train_split
    model = initial_model(config, about)
    if config.out is None:
        config = replace(config, out=agreed_folder(config))
    stored = {**asdict(config), "device": config.device.split(":")[0]}  # each rank has its own
    with Run(config.out, stored, about, FREE, position) as run:
        wait_for_all_ranks()
        run.result["parameters"] = sum(p.numel() for p in model.parameters())
        pretraining = config.objective != "none" and not config.pretrained
        if pretraining and "pretrain" not in run.result:  # it is there if a resumed run finished it
            head = initial_head("pretrain", model, config, about)
            documents = (train_split.documents(), val_split.documents())
            score = fit("pretrain", model, head, *documents, config, run)
            run.save_weights("pretrained.pt", model, head)
            wait_for_all_ranks()
            run.result["pretrain"] = score
        head = initial_head("finetune", model, config, about)
        run.result["finetune"] = fit("finetune", model, head, labeled, val_split, config, run)
        run.result["test"] = evaluate(model, head, test_split, "finetune", config)
        run.save_weights("model.pt", model, head)
        wait_for_all_ranks()
    return run.result


def prepare_run(config):
    """Load the data.  Returns the completed config, `describe` of the data, and three splits."""
    if config.out or config.resume:
        folder = find_run(config.out or "runs/latest")
        require(config.out or folder.exists(), f"{folder}: no run to resume")
        config = replace(config, out=str(folder))
        check_out(config.out, config.resume or config.overwrite)
    if config.pretrained:  # now: this run may become runs/latest
        config = replace(config, pretrained=weights_path(config.pretrained))
    data = rank0_first(load_data, config)
    about = describe(data)
    if config.pretrained:
        about = as_pretrained(about, config)
    config = fitted(config, about)
    splits = [resident(split, about, config.device) for split in (data.train, data.val, data.test)]
    if config.objective != "none" and not config.pretrained:
        validation = fixed_batches(splits[1].documents(), "pretrain", config)
        how = "use longer examples, more of them, or a larger --mask-ratio"
        few = f"no position of the {len(splits[1])} validation examples is masked or has a next one"
        require(any(batch.where.any() for batch in validation), f"{few}: {how}")
    return config, about, splits


def initial_model(config, about):
    """The model at the start of a run: weights from the seed or from a file, on the device."""
    seeded(config, config.seed)
    model = build_model(config, about)
    if config.random_init:  # 2310.02980v4, section C.1
        for p in model.parameters():
            nn.init.normal_(p, 0, 0.1)
    if config.pretrained:
        load_pretrained(model, config, about)
    if config.sequence_parallel:
        dist_attention.spread(model, config.sequence_parallel, layout_of(config))
    if config.compile:
        model.compile()
    dtype = torch.float64 if config.precision == "float64" else torch.float32
    return model.to(config.device, dtype)


def initial_head(stage, model, config, about):
    """The head at the start of a stage, the same after a resume."""
    seeded(config, config.seed, STAGES.index(stage))
    return build_head(stage, config, about).to(next(model.parameters()))


# What must be the same for pretrained weights to make sense (n_heads, say, changes no shape).
BODY = ("model", "d_model", "n_layers", "n_heads", "d_ff", "ffn", "d_state", "rope", "causal")
TOKENS = ("vocab_size", "n_channels", "symbols")


def weights_path(pretrained):
    """The file that --pretrained names: itself, or pretrained.pt in the folder of a run."""
    path = find_run(pretrained)
    return str(path / "pretrained.pt" if path.is_dir() else path)


def read_pretrained(path):
    state = checkpoint.load(Path(path))
    fits = "model" in state and "optimizer" not in state and state.get("stage") != "finetune"
    require(fits, f"{path} is not what pretraining left: pass the pretrained.pt of a run")
    return state


def as_pretrained(about, config):
    """`about` with the mean and std of the pretraining run, if values have the same channels."""
    old = read_pretrained(config.pretrained).get("data", {})
    if about["mean"] is None or old.get("n_channels") != about["n_channels"]:
        return about
    return {**about, "mean": old["mean"], "std": old["std"]}


def load_pretrained(model, config, about):
    """Load the weights of an earlier run, whose model and symbols must be those of this run."""
    path = Path(config.pretrained)
    elsewhere = not config.out or path.resolve().parent != Path(config.out).resolve()
    reason = f"--out {config.out} contains {path} and would replace it: choose another"
    require(elsewhere, reason)
    state = read_pretrained(path)
    old = {**state.get("settings", {}), **state.get("data", {})}
    now = {name: getattr(config, name) for name in BODY}
    now.update({name: about[name] for name in TOKENS})
    changed = differences(old, now)
    require(not changed, f"{path} was pretrained with other settings or data: {changed}")
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:  # sizes that follow from the data, such as sgconv's longest input
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} does not fit this model: {reason[:300]}") from error


# ------------------------------------------------------------------------ several processes


def data_parallel(objective, stage, train, config):
    """The objective, its gradients averaged over processes that share the examples of a batch."""
    parallel = DistributedDataParallel(objective)
    # DDP regroups gradients after the first backward, and then sums in another order. So run one
    # backward and discard it: then a resumed run adds up in the order of an uninterrupted one.
    batch = make_batch(train, np.arange(1), stage, config, seeded(config, config.seed))
    parallel(batch)[0].backward()
    parallel.zero_grad()
    return parallel


def rank0_first(make, config):
    """make(config), first on rank 0, which may fill a cache, then on the others."""
    rank, _ = ranks()
    if rank > 0:
        wait_for_all_ranks()
    data = make(config)
    if rank == 0:
        wait_for_all_ranks()
    wait_for_all_ranks()
    return data


def agreed_folder(config):
    """A new folder under runs/, made by rank 0, for all ranks."""
    rank, world = ranks()
    folder = [None]
    if rank == 0:
        folder = [str(new_folder(f"{Path(config.task).stem}-{config.model}"))]
    if world > 1:
        with dist_attention.lost("rank 0 made no folder for this run"):
            dist.broadcast_object_list(folder)
    return folder[0]


def share_of_examples(config):
    """(rank, world): this process takes part `rank` of `world` of every batch."""
    return (0, 1) if config.sequence_parallel else ranks()


def layout_of(config):
    """Which tokens a rank holds: zigzag balances the work of causal attention."""
    return "zigzag" if config.causal and config.model == "transformer" else "contiguous"


def own_tokens(batch, config):
    """This rank's tokens of a batch, and their positions if the model is a Transformer."""
    layout = layout_of(config)
    tensors = batch if batch.where is not None else batch[:3]  # without where, targets of examples
    own = [t if t is None else dist_attention.own_tokens(t, layout) for t in tensors]
    own = Batch(*own, *batch[len(own) :])
    if config.model != "transformer":
        return own, ()
    positions = dist_attention.positions(batch.x.shape[1], *ranks(), layout)
    return own, (positions.to(batch.x.device),)


# -------------------------------------------------------------------- self-check, command line


def self_check(device="cpu"):
    """[(name, error, limit)] for the steps that go wrong silently."""
    config = Config(device=device)
    data = lra_data.load("lattice", n_train=64, n_val=8, n_test=8)
    split = resident(data.train, describe(data), device)
    index = np.arange(64)
    epoch = np.concatenate(list(itertools.islice(draw(split.longest(), 8, 0), 8)))
    batch = make_batch(split, index, "pretrain", config, seeded(config, 1))
    masked = batch.x == data.vocab_size
    ratio = masked.double().mean().item()  # its standard deviation is 0.007
    causal = make_batch(split, index, "pretrain", replace(config, objective="causal"), None)
    shifted = causal.target[:, :-1] != causal.x[:, 1:]
    return [
        ("draw: an epoch has every example once", float((np.sort(epoch) != index).sum()), 0),
        ("masked: share of masked symbols", abs(ratio - config.mask_ratio), 0.03),
        ("masked: masked exactly where the loss is", float((masked != batch.where).sum()), 0),
        ("masked: target is the clean input", float((batch.target != split.tokens).sum()), 0),
        ("causal: target is the input one step later", float(shifted.sum()), 0),
    ]


def run_command(config):
    """Train on the processes of torchrun, or on this one alone; print the result."""
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if restarts > 0 and config.out:
        config = replace(config, resume=True)
    with process_group(config.device) as (rank, _, device):
        result = train(replace(config, device=str(device)))
    if rank == 0:
        for name in ("pretrain", "finetune", "test", "speed"):
            row = result.get(name, {})
            print(f"{name:10}" + "  ".join(f"{key} {row[key]:,.6g}" for key in row))
        print(f"{result['config']['out']}/result.json")


def command(argv):
    flags = parser()
    args = vars(flags.parse_args(argv))
    check = args.pop("check", False)
    show = args.pop("print_config", False)
    if args.get("resume"):
        folder = find_run(args.get("out", "runs/latest"))
        stored = folder / "config.json"
        require(stored.exists(), f"{folder} contains no run: nothing to resume")
        args = {"settings": str(stored), **args, "out": str(folder)}
    config, origin = resolve(args)
    if show:
        for name, value in asdict(config).items():
            print(f"{name:20}{value!s:24} {origin[name]}")
        print(f"differs from the source: {origin.get('departures', '-')}")
    elif config.device.startswith("cuda") and not torch.cuda.is_available():
        flags.error("--device cuda: PyTorch finds no CUDA device on this machine")
    elif check:
        sys.exit(not print_table(self_check(config.device)))
    else:
        for name in idle(args, config):
            say(f"{name} has no effect in this run")
        run_command(config)


def main(argv=None):
    print_anywhere()
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv:
            command(argv)
        else:
            sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
            from demo import demo

            demo()
    except (KeyboardInterrupt, ValueError, OSError, FloatingPointError, RankLost) as error:
        sys.exit(f"pretrain.py: {str(error) or 'interrupted'}")


if __name__ == "__main__":
    main()
