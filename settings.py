"""Settings of pretrain.py: every flag, and the hyperparameters that the papers published.

    Config(task="listops", model="s4")                     # ValueError on nonsense
    config, origin = resolve({"settings": "listops-s4"})   # origin: where each value comes from

    python pretrain.py --settings listops-s4 --seed 1 --print-config

`--settings` takes the name of a row of the table below, or a JSON file of your own:
{"settings": {name: value}, "sources": {name: where the value comes from}}; sources may be left out.
The config.json of a run will do too: it repeats the run, or with --resume continues it.
Flags override settings, settings override the defaults of Config.
"""

import argparse
import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import torch

from pathfinder import require

MODELS = ("transformer", "s4", "s4d", "diagonal", "sgconv")
FFNS = ("dense", "lowrank", "blockdense", "blockshuffle")

# Masking ratio and denoising loss of each task (arXiv:2310.02980v4, sections 2 and C.3).
# "ce": cross entropy over symbols or gray levels; "l1": absolute error of normalized values.
DENOISING = {
    "lattice": (0.30, "ce"),
    **dict.fromkeys(("listops", "listops-small", "listops-tiny"), (0.10, "ce")),
    **dict.fromkeys(("text", "text-characters"), (0.15, "ce")),
    **dict.fromkeys(("retrieval", "retrieval-characters"), (0.15, "ce")),
    "image": (0.50, "ce"),  # differs from the paper: gray levels as symbols
    **dict.fromkeys(("image-real", "scifar"), (0.50, "l1")),
    **dict.fromkeys(("pathx", "pathx256"), (0.50, "ce")),
    **dict.fromkeys(("speech", "speech-8k"), (0.25, "l1")),
}
for side in (32, 64, 128, 256):
    for level in ("", "-medium", "-easy"):
        DENOISING[f"pathfinder{side}{level}"] = (0.50, "ce")
OURS = ("lattice", "image")  # not from the paper
OWN_SYMBOLS = (0.15, "ce")  # your own data, like Text
OWN_VALUES = (0.50, "l1")  # like Image and sCIFAR

# ------------------------------------------------------------------------------- the settings


def flag(default, help, *choices):
    """A field of Config that is also a flag."""
    return field(default=default, metadata={"help": help, "choices": choices or None})


@dataclass
class Config:
    """One run: pretraining (unless objective is "none"), then fine-tuning.

    mask_ratio, loss, pretrain_steps, pretrain_batch_size and causal are completed when a Config is
    made.  dataclasses.replace keeps what they became, so name them too: replace(config,
    batch_size=8, pretrain_batch_size=None).
    """

    task: str = flag("lattice", "task of lra_data.py, .npz, .csv or .tsv file, or file.py:function")
    model: str = flag("transformer", "architecture", *MODELS)
    objective: str = flag("masked", "pretraining objective", "masked", "causal", "none")
    seed: int = flag(0, "random seed of weights, data order, masks, dropout (not of the data)")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "cpu or cuda")
    out: str = flag(None, "run directory (default: a new one, which runs/latest links to)")
    overwrite: bool = flag(False, "replace the run in --out")
    data_dir: str = flag("data", "directory of data sets and caches")
    source: str = flag(None, "published files of the task (a directory or an archive)")
    pictures: int = flag(None, "number of pictures to generate (pathfinder)")
    text_column: str = flag(None, "column of a .csv file with the text (default: text)")
    label_column: str = flag(None, "column of a .csv file with the label (default: label)")
    characters: bool = flag(False, "characters instead of bytes as tokens of text")
    max_len: int = flag(None, "cut texts to this many tokens")
    pretrain_steps: int = flag(None, "steps of pretraining (default: 3000; own data: 30 epochs)")
    finetune_steps: int = flag(300, "optimizer steps of fine-tuning")
    pretrain_lr: float = flag(3e-3, "peak learning rate of pretraining")
    finetune_lr: float = flag(1e-3, "peak learning rate of fine-tuning")
    batch_size: int = flag(64, "examples per step, over all processes")
    pretrain_batch_size: int = flag(None, "batch size for pretraining (default: --batch-size)")
    accumulate: int = flag(1, "gradient accumulation steps (saves memory)")
    warmup: float = flag(0.1, "fraction of a stage's steps with warmup")
    schedule: str = flag("cosine", "learning-rate schedule after warmup", "cosine", "constant")
    weight_decay: float = flag(0.01, "AdamW weight decay of the body's matrices")
    clip: float = flag(1.0, "largest gradient norm")
    mask_ratio: float = flag(None, "fraction of masked positions (default: the task's)")
    loss: str = flag(None, "denoising loss (default: the task's)", "ce", "l1")
    d_model: int = flag(64, "model width")
    n_layers: int = flag(2, "number of blocks")
    n_heads: int = flag(4, "attention heads")
    d_ff: int = flag(None, "hidden width of the FFN (default: 4 times --d-model)")
    ffn: str = flag("dense", "FFN of every transformer block but the first", *FFNS)
    d_state: int = flag(64, "state size per channel (s4, s4d, diagonal)")
    dt_min: float = flag(1e-3, "smallest initial step size (s4, s4d), slowest decay (diagonal)")
    dt_max: float = flag(1e-1, "largest initial step size, fastest decay")
    random_init: bool = flag(False, "initialize every parameter from N(0, 0.1^2) (an ablation)")
    kernel_dim: int = flag(None, "parameters per scale of sgconv (default: as published, or 32)")
    dropout: float = flag(0.0, "dropout probability")
    rope: bool = flag(False, "rotary instead of sinusoidal positions (transformer)")
    causal: bool = flag(False, "left-to-right model (implied by --objective causal)")
    pooling: str = flag("mean", "pooling over positions", "mean", "max", "last")
    target_loss: str = flag("l2", "loss of regression, on standardized targets", "l2", "l1")
    labels: int = flag(None, "fine-tune on this many examples (nested subsets)")
    pretrained: str = flag(None, "start from this run's pretrained.pt; its data may be others")
    eval_every: int = flag(500, "steps between validations")
    resume: bool = flag(False, "continue the run in --out, or runs/latest, with its settings")
    precision: str = flag("float32", "arithmetic", "float32", "float64", "bfloat16")
    compile: bool = flag(False, "torch.compile the model (pays on a GPU if lengths are equal)")
    eager: bool = flag(False, "on a GPU, launch kernels one by one instead of as CUDA graphs")
    pad_to: int = flag(None, "round batches up to multiples of this length (128 on a GPU)")
    sequence_parallel: str = flag(None, "split each sequence over processes", "ring", "ulysses")

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            optional = value is None and f.default is None
            expected = None if optional else misfit(f, value)
            require(not expected, f"{f.name} {value!r}: expected {expected}")
        try:
            torch.device(self.device)
        except RuntimeError as error:
            raise ValueError(f"device {self.device!r}: expected cpu, cuda or cuda:0") from error
        if self.task in DENOISING:  # else own data: see `fitted`
            mask_ratio, loss = DENOISING[self.task]
            self.mask_ratio = self.mask_ratio or mask_ratio
            self.loss = self.loss or loss
            self.pretrain_steps = self.pretrain_steps or 3000
        self.pretrain_batch_size = self.pretrain_batch_size or self.batch_size
        self.causal = self.causal or self.objective == "causal"
        one_way = self.objective == "masked" and self.causal
        require(not one_way, "causal: a masked model looks both ways, use another objective")
        fits = self.model == "transformer" or (not self.rope and self.ffn == "dense")
        require(fits, f"model {self.model!r} has no rope and no ffn: use 'transformer'")
        plain = self.pooling == "mean" and self.dropout == 0 and not self.compile
        how = "sequence_parallel: use pooling 'mean', dropout 0 and no compile"
        require(plain or not self.sequence_parallel, how)

    def steps(self, stage):
        return self.pretrain_steps if stage == "pretrain" else self.finetune_steps

    def lr(self, stage):
        return self.pretrain_lr if stage == "pretrain" else self.finetune_lr

    def multiple(self):
        """The length of a batch is rounded up to a multiple of this (128: of attention kernels)."""
        return self.pad_to or (128 if self.device.startswith("cuda") else 1)

    def batch(self, stage):
        return self.pretrain_batch_size if stage == "pretrain" else self.batch_size


# Settings that only some models have.
MODELS_WITH = {
    **dict.fromkeys(("n_heads", "d_ff"), ("transformer",)),
    **dict.fromkeys(("d_state", "dt_min", "dt_max"), ("s4", "s4d", "diagonal")),
    "kernel_dim": ("sgconv",),
}


def idle(given, config):
    """Names of settings of other models, and of pretraining where there is none."""
    names = [name for name in given if config.model not in MODELS_WITH.get(name, MODELS)]
    if config.objective == "none" or config.pretrained:
        there = ("mask_ratio", "loss")
        names += [name for name in given if name.startswith("pretrain_") or name in there]
    names += ["random_init"] * bool(config.random_init and config.pretrained)
    return names


BELOW_1 = math.nextafter(1, 0)
# Least, largest, in words.  Products of such numbers stay finite, sizes fit into 32 bits.
LIMITS = {
    int: (1, 1e9, "a positive number up to 1e+09"),
    float: (1e-30, 1e30, "a positive number up to 1e+30"),
    "seed": (0, math.inf, "0 or more"),
    "mask_ratio": (1e-30, BELOW_1, "a positive fraction below 1"),
    "warmup": (0, BELOW_1, "a fraction below 1"),
    "dropout": (0, BELOW_1, "a fraction below 1"),
    "weight_decay": (0, 1e6, "0 or more, up to 1e+06"),  # is multiplied by the learning rate
}


def misfit(f, value):
    """What was expected in place of this value of a field; None if the value is fine."""
    types = (int, float) if f.type is float else f.type
    if not isinstance(value, types) or isinstance(value, bool) != (f.type is bool):
        return f.type.__name__
    choices = f.metadata["choices"]
    if choices and value not in choices:
        return f"one of {', '.join(choices)}"
    if f.type is bool:
        return None
    if f.type is str:
        return None if value else "a value"
    least, largest, words = LIMITS.get(f.name, LIMITS[f.type])
    return None if least <= value <= largest else words


# ---------------------------------------------------- the table of published hyperparameters

# SGConv's kernel for each task (arXiv:2210.09298); decay and init are functions of sgconv.py.
KERNELS = {
    "listops": dict(kernel_dim=1),
    "text": dict(kernel_dim=2),
    "text-characters": dict(kernel_dim=2),
    "retrieval": dict(kernel_dim=1),
    "retrieval-characters": dict(kernel_dim=1),
    "image": dict(kernel_dim=32, decay="power_law_decay"),
    "image-real": dict(kernel_dim=32, decay="power_law_decay"),
    "pathfinder32": dict(kernel_dim=32),
    "pathx": dict(kernel_dim=64, first_factor=2, decay="ramp_decay", init="cosine_init"),
}
KERNELS["pathfinder128"] = KERNELS["pathx"]
# Training examples, which turn epochs into steps.
EXAMPLES = {
    "listops": 96_000,
    "text-characters": 22_500,
    "retrieval-characters": 147_086,
    **dict.fromkeys(("image-real", "scifar"), 45_000),
    "speech": 84_843,  # unverified
    **dict.fromkeys(("pathfinder32", "pathfinder128"), 160_000),
}
SPT = "Amos, Berant, Gupta: Never Train from Scratch, arXiv:2310.02980v4"
TABLE_4 = f"{SPT}: Table 4 (learning rates, pooling), its code's lra/transformer-*.yaml (sizes)"
V3 = "S4, arXiv:2111.00396, as revised in its code (state-spaces/s4), configs lra/old/v3-s4-*.yaml"
GCONV = "SGConv, arXiv:2210.09298, its code (ctlllll/SGConv, preview), configs lra/gconv-lra-*.yaml"
SMALL = "ours: about an hour on one data-center GPU (an estimate)"
LAPTOP = "ours: minutes on a laptop"
NORM = "norm: batch norm (Image: layer norm) there, layer norm before the mixer here; weight decay"
REVIEWS = "data: 25,000 reviews train and the test split validates there, a tenth is held out here"
LOCAL = "attention: local blocks there, the whole sequence here"
CHANNELS = "A and B: two sets for all channels there, one per channel here"


class Row(NamedTuple):
    """All settings of a row, and how they or the model differ from their sources."""

    source: str
    settings: dict  # {name: (value, source)}
    departures: list


ROWS = {}


def row(name, *parents, source=None, departures=None, **settings):
    """Add a row.  Later parents override earlier ones, the row's own settings override all.

    Without a source, its own values take that of the last parent.
    """
    source = source or ROWS[parents[-1]].source
    merged = {}
    notes = []
    for parent in parents:
        merged.update(ROWS[parent].settings)
        notes += ROWS[parent].departures
    merged.update({key: (value, source) for key, value in settings.items()})
    if departures:
        notes.append(departures)
    ROWS[name] = Row(source, merged, notes)


# fmt: off
# A name without a dash is a part of other rows. First the Long Range Arena in S4's configurations,
# whose sizes the other papers keep.
row("scratch", source=V3, objective="none", schedule="cosine", weight_decay=0.05, dropout=0.0,
    pooling="mean", clip=1e9)  # clips nothing
row("listops", "scratch", task="listops", n_layers=8, d_model=128, batch_size=50,
    finetune_epochs=40, finetune_lr=0.01, warmup=0.0125)
row("text", "scratch", task="text-characters", departures=REVIEWS, n_layers=6, d_model=256,
    batch_size=16, finetune_epochs=32, finetune_lr=0.01, warmup=0.1)
row("retrieval", "scratch", task="retrieval-characters", n_layers=6, d_model=256,
    batch_size=64, finetune_epochs=20, finetune_lr=0.01, warmup=0.05)
row("image", "scratch", task="image-real", departures="dropout: one mask for all positions there",
    n_layers=6, d_model=512, dropout=0.1,
    batch_size=50, finetune_epochs=200, finetune_lr=0.01, warmup=0.005)
row("pathfinder32", "scratch", task="pathfinder32", n_layers=6, d_model=256, weight_decay=0.03,
    pooling="last", batch_size=64, finetune_epochs=200, finetune_lr=0.004, warmup=0.005)
row("pathfinder128", "scratch", task="pathfinder128", n_layers=6, d_model=256,
    batch_size=16, finetune_epochs=50, finetune_lr=0.001, warmup=0.1)

row("s4", source=V3, model="s4", d_state=64, dt_min=1e-3, dt_max=0.1, departures=f"{NORM} "
    "of C: there, not here; learning rate of A, B and dt: at most 1e-3 here")
row("listops-s4-scratch", "listops", "s4")
row("text-s4-scratch", "text", "s4")
row("retrieval-s4-scratch", "retrieval", "s4")
row("image-s4-scratch", "image", "s4")
row("pathfinder32-s4-scratch", "pathfinder32", "s4")
row("pathfinder128-s4-scratch", "pathfinder128", "s4", dt_min=1e-4)
row("scifar-s4", "image-s4-scratch", source="S4's code, config cifar/s4-cifar", task="scifar",
    departures=CHANNELS)
row("speech-s4", "scratch", "s4", source="S4's code, config sc/s4-sc; warmup and pooling: ours",
    departures=CHANNELS, task="speech", n_layers=6, d_model=128,
    batch_size=16, finetune_epochs=40, finetune_lr=0.01, warmup=0.1)

row("sgconv", source=GCONV, model="sgconv", departures=f"{NORM} of kernels: there, not here")
row("listops-sgconv", "listops", "sgconv", kernel_dim=1)
row("text-sgconv", "text", "sgconv", kernel_dim=2)
row("retrieval-sgconv", "retrieval", "sgconv", kernel_dim=1, warmup=0.054)
row("image-sgconv", "image", "sgconv", kernel_dim=32, dropout=0.2,
    departures="schedule: 200,000 steps there, of which 180,000 are run; here it ends with them")
row("pathfinder32-sgconv", "pathfinder32", "sgconv", kernel_dim=32, dropout=0.2)
row("pathfinder128-sgconv", "pathfinder128", "sgconv", kernel_dim=64, weight_decay=0.03,
    batch_size=64, finetune_lr=0.004, warmup=0.08)

# Self-pretraining: S4 and DLR (Table 5).
row("spt", source=f"{SPT}, section 2 and C.1: at most 200 epochs per stage or 24 h on one GPU",
    objective="masked", pretrain_epochs=200, finetune_epochs=200)
row("sizes", source=f"{SPT}: its code, lra/s4-lra-*.yaml", weight_decay=0.05, pooling="mean")
row("s4spt", "s4", "spt", "sizes", source=f"{SPT}: Table 5",
    departures="schedule and warmup: not recovered, here S4's")
row("listops-s4", "listops", "s4spt",
    pretrain_lr=1e-3, pretrain_batch_size=128, finetune_lr=1e-3, batch_size=16)
row("text-s4", "text", "s4spt",
    pretrain_lr=5e-4, pretrain_batch_size=8, finetune_lr=5e-4, batch_size=16)
row("retrieval-s4", "retrieval", "s4spt",
    pretrain_lr=5e-4, pretrain_batch_size=8, finetune_lr=5e-4, batch_size=256)
row("image-s4", "image", "s4spt",
    pretrain_lr=1e-3, pretrain_batch_size=32, finetune_lr=1e-3, batch_size=512)
row("pathfinder32-s4", "pathfinder32", "s4spt",
    pretrain_lr=1e-3, pretrain_batch_size=8, finetune_lr=1e-3, batch_size=64)
row("pathfinder128-s4", "pathfinder128", "s4spt", dt_min=1e-4,
    pretrain_lr=1e-3, pretrain_batch_size=8, finetune_lr=1e-3, batch_size=64)

row("dlr", "spt", source=f"{SPT}: Table 5; state: its code (dss.py); initial decays: ours",
    departures="width, depth, pooling, schedule, weight decay: not recovered, here S4's; learning "
    "rates of the recurrence and the output: 1e-4 there, at most 1e-3 and the main one here; "
    "state: 1,024 complex numbers there, 512 with their conjugates here",
    model="diagonal", d_state=1024, dt_min=1e-3, dt_max=0.1)
row("listops-diagonal", "listops", "dlr",
    pretrain_lr=1e-3, pretrain_batch_size=128, finetune_lr=5e-4, batch_size=16)
row("text-diagonal", "text", "dlr",
    pretrain_lr=5e-4, pretrain_batch_size=8, finetune_lr=1e-3, batch_size=16)
row("image-diagonal", "image", "dlr",
    pretrain_lr=1e-3, pretrain_batch_size=32, finetune_lr=1e-3, batch_size=64)
row("pathfinder128-diagonal", "pathfinder128", "dlr", dt_min=1e-4,
    pretrain_lr=5e-4, pretrain_batch_size=8, finetune_lr=5e-4, batch_size=64)

# Self-pretraining: Transformers (Table 4), with sinusoids, then with rotary positions.
row("transformer", "spt", source=f"{SPT}, section 3.1; ours: batch size (in the grid of C.1), clip",
    departures="batch size: not recovered; start: four equal projections there, independent here; "
    "warmup: 2,000 to 5,000 steps there, a fraction of each stage here",
    model="transformer", rope=False, batch_size=32, schedule="constant", weight_decay=0.0,
    dropout=0.0, clip=1.0, pooling="mean")
row("listops-transformer", "transformer", source=TABLE_4, task="listops",
    d_model=512, n_layers=6, n_heads=8, d_ff=2048, pretrain_lr=1e-3, finetune_lr=1e-4, warmup=0.005)
row("text-transformer", "listops-transformer", task="text-characters", departures=REVIEWS,
    weight_decay=0.1, pretrain_lr=5e-4, finetune_lr=1e-4, warmup=0.021)
row("retrieval-transformer", "transformer", source=TABLE_4, task="retrieval-characters",
    d_model=128, n_layers=4, n_heads=4, d_ff=512, pretrain_lr=5e-3, finetune_lr=5e-4, warmup=0.0033)
row("image-transformer", "transformer", source=TABLE_4, task="image-real", pooling="max",
    d_model=64, n_layers=3, n_heads=4, d_ff=128, pretrain_lr=1e-3, finetune_lr=1e-3, warmup=0.011)
row("pathfinder32-transformer", "transformer", source=TABLE_4, task="pathfinder32",
    d_model=128, n_layers=4, n_heads=8, d_ff=128, pretrain_lr=1e-3, finetune_lr=5e-4, warmup=0.003)
row("pathfinder128-transformer", "pathfinder32-transformer", task="pathfinder128", n_heads=4,
    departures=LOCAL, pooling="max", pretrain_lr=5e-4, finetune_lr=5e-4)
row("speech-transformer", "transformer", source=f"{SPT}: Table 4, sc/transformer-sc*.yaml",
    task="speech", departures=LOCAL, rope=True, pooling="max",
    d_model=128, n_layers=4, n_heads=4, d_ff=128, pretrain_lr=1e-3, finetune_lr=1e-3, warmup=0.0057)
row("colors", source="ours: the rates of Image", pretrain_lr=1e-3, finetune_lr=1e-3, warmup=0.011)
row("scifar-transformer", "transformer", "colors", source=f"{SPT}: Table 3, cifar/*.yaml",
    task="scifar", departures="head: one hidden layer there, linear here", rope=True,
    d_model=256, n_layers=6, n_heads=4, d_ff=512)

row("rope", source=f"{SPT}, section 3.2 and Table 4 (rotary)", rope=True,
    departures="sizes: Table 2 used larger models, not recovered; here those of Table 1")
row("listops-transformer-rope", "listops-transformer", "rope")
row("text-transformer-rope", "text-transformer", "rope", finetune_lr=5e-4)
row("retrieval-transformer-rope", "retrieval-transformer", "rope")
row("image-transformer-rope", "image-transformer", "rope", pooling="mean")
row("pathfinder32-transformer-rope", "pathfinder32-transformer", "rope")
row("pathfinder128-transformer-rope", "pathfinder128-transformer", "rope", pretrain_lr=1e-3)

# Ours: the same models or smaller ones, trained for a shorter time.
row("small", source=SMALL, schedule="cosine", warmup=0.1, precision="bfloat16")
row("listops-s4-small", "listops-s4", "small", n_layers=6,
    batch_size=64, pretrain_epochs=10, finetune_epochs=10)
row("listops-transformer-small", "listops-transformer", "small", d_model=256, n_layers=4, d_ff=1024,
    batch_size=128, pretrain_epochs=10, finetune_epochs=20)
row("pathfinder32-s4-small", "pathfinder32-s4", "small", d_model=128, n_layers=4,
    batch_size=128, pretrain_batch_size=128, pretrain_epochs=5, finetune_epochs=10)
row("pathfinder32-transformer-small", "pathfinder32-transformer", "small",
    batch_size=256, pretrain_epochs=15, finetune_epochs=15)

row("laptop", source=LAPTOP, objective="masked", d_model=64, n_layers=2, batch_size=32,
    schedule="cosine", warmup=0.1, weight_decay=0.01, clip=1.0, pretrain_lr=3e-3, finetune_lr=3e-3)
row("trees", "laptop", task="listops-tiny", pretrain_steps=1000, finetune_steps=1000,
    eval_every=250)
row("listops-s4-laptop", "trees", model="s4", d_state=16)
row("listops-diagonal-laptop", "trees", model="diagonal", d_state=64)
row("listops-sgconv-laptop", "trees", model="sgconv", objective="none", kernel_dim=4,
    finetune_steps=2000)
row("listops-transformer-laptop", "trees", model="transformer", n_heads=4, d_ff=128,
    pretrain_steps=1500, finetune_steps=500, finetune_lr=1e-3)
row("pictures", "laptop", task="pathfinder32-easy", pictures=2000, d_model=32, batch_size=16,
    pretrain_steps=300, finetune_steps=100, finetune_lr=1e-3, eval_every=100)  # too short to learn
row("pathfinder32-s4-laptop", "pictures", model="s4", d_state=16)
row("pathfinder32-transformer-laptop", "pictures", model="transformer", n_heads=4, d_ff=64)
row("demo", "laptop", source=f"{LAPTOP}; learning rates: results/demo_grid.json",
    task="lattice", pretrain_steps=1200, finetune_steps=400, eval_every=200)
row("lattice-s4", "demo", model="s4", d_state=16)
row("lattice-diagonal", "demo", model="diagonal", d_state=64)
row("lattice-sgconv", "demo", model="sgconv", objective="none", kernel_dim=16,
    finetune_steps=1600, finetune_lr=1e-3)
row("lattice-transformer", "demo", model="transformer", n_heads=4, d_ff=128,
    pretrain_steps=3600, finetune_steps=800)
# fmt: on
NAMES = [name for name in ROWS if "-" in name]


def published(name):
    """A row, its epochs as steps: {setting: (value, source)}; and its departures, as text."""
    found = dict(ROWS[name].settings)
    every = [1]
    for stage, validations in (("pretrain", 5), ("finetune", 1)):  # per epoch
        if f"{stage}_epochs" in found:
            epoch = steps_per_epoch(stage, found)
            epochs, source = found.pop(f"{stage}_epochs")
            note = f"{source}: {epochs} epochs of {epoch:,} steps"
            found[f"{stage}_steps"] = (epochs * epoch, note)
            every.append(epoch // validations)
    if len(every) > 1:
        note = "ours: an epoch of fine-tuning or a fifth of one of pretraining"
        found["eval_every"] = (max(every), note)
    if found["objective"][0] == "none":
        found = {key: found[key] for key in found if not key.startswith("pretrain")}
    return found, "; ".join(dict.fromkeys(ROWS[name].departures))  # each once


def steps_per_epoch(stage, found):
    task = found["task"][0]
    batch_size = found["batch_size"][0]
    examples = EXAMPLES[task]
    if stage == "pretrain":
        batch_size = found.get("pretrain_batch_size", [batch_size])[0]
        if task.startswith("retrieval"):
            examples *= 2  # both documents of a pair
    return math.ceil(examples / batch_size)


# --------------------------------------------------------------------- flags, files of settings


def parser():
    """Every field of Config as a flag; only the flags that were given come back."""
    parser = argparse.ArgumentParser(
        prog="pretrain.py",
        usage="pretrain.py [--settings NAME] [flags]",  # one line, also before an error
        description="Pretrain a long-sequence model on its own task, fine-tune it, test it once.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--settings", help="published settings by name (listops-s4) or a JSON file")
    for f in fields(Config):
        name = "--" + f.name.replace("_", "-")
        text = f.metadata["help"]
        choices = f.metadata["choices"]
        if f.name == "device":
            choices = ["cpu", "cuda"]  # Config takes any device of torch
        if f.default is not None:
            text += f" (default: {f.default})"
        if f.type is bool:
            add(name, action="store_true", help=f.metadata["help"])
        else:
            add(name, type=f.type, choices=choices, help=text)
    add("--print-config", action="store_true", help="print the settings and stop")
    add("--check", action="store_true", help="print the check table and stop")
    return parser


def resolve(given):
    """Flags {name: value}, perhaps with "settings" -> Config, {setting: where it comes from}."""
    given = dict(given)
    name = given.pop("settings", None)
    found, departures = read_settings(name) if name else ({}, "")
    values = {key: value for key, (value, _) in found.items()}
    values.update(given)
    for key in values:
        where = name if key in found else "command line"
        require(key in Config.__annotations__, f"{where}: no setting is called {key}")
    config = Config(**values)
    origin = {}
    for key in vars(config):
        if key in given:
            origin[key] = "command line"
        elif key in found:
            origin[key] = f"{name}: {found[key][1]}"
        elif key in ("mask_ratio", "loss") and config.task in DENOISING:
            source = "ours" if config.task in OURS else f"{SPT}, sections 2 and C.3"
            origin[key] = f"of task {config.task}: {source}"
        elif key in ("mask_ratio", "loss"):
            origin[key] = f"your own data: {OWN_SYMBOLS} if symbols, {OWN_VALUES} if values"
        elif getattr(config, key) == getattr(Config, key):
            origin[key] = "default"
        else:
            origin[key] = "follows from other settings"
    if departures:
        origin["departures"] = departures
    return config, origin


def read_settings(name):
    """A row of the table or a JSON file -> {setting: (value, source)}, departures."""
    path = Path(name)
    if path.parent.name == "settings" and not path.exists():
        name = path.stem  # settings/listops-s4.json is the row listops-s4
    if name in NAMES:
        return published(name)
    expected = f"expected a JSON file or one of {', '.join(NAMES)}"
    require(path.suffix == ".json", f"no settings {name!r}: {expected}")
    try:
        content = json.loads(path.read_text("utf-8-sig"))  # skips a byte-order mark
        sources = content.get("sources", {})
        values = content.get("settings", content)  # config.json of a run has no key "settings"
        found = {}
        for key, value in values.items():
            found[key] = (value, sources.get(key, "no source"))
    except (ValueError, AttributeError) as error:
        expected = 'expected {"settings": {name: value}, "sources": {name: text}}'
        raise ValueError(f"{path} is not a file of settings ({error}): {expected}") from error
    for key in ("data", "resume", "overwrite"):  # of a run: what it read, how it was started
        found.pop(key, None)
    return found, ""
