"""Every setting of pretrain.py: as a dataclass, as a flag, as an entry of a JSON file.

    Config(task="listops", model="s4")                 # ValueError on nonsense, with the numbers
    config, origin = resolve(vars(parser().parse_args()))    # origin: where each value comes from

    python pretrain.py --settings settings/lattice-s4.json --seed 1 --print-config

A file of settings (settings/*.json: the papers' own values, or ours where the file says so) is
{"settings": {name: value}, "sources": {name: where the value is from}}; flags override it.
"""

import argparse
import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

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
MODELS = ("transformer", "s4", "s4d", "diagonal", "sgconv")
FFNS = ("dense", "lowrank", "blockdense", "blockshuffle")
# A number is positive and finite. These may be 0; those of BELOW are less than what stands there.
MAY_BE_ZERO = ("seed", "warmup", "weight_decay", "dropout")
SIZES = ("d_model", "n_layers", "n_heads", "d_ff", "d_state", "kernel_dim")
BELOW = dict.fromkeys(("mask_ratio", "warmup", "dropout"), 1) | dict.fromkeys(SIZES, 2**20)


def flag(default, help, *choices, kind=None):
    """A field of Config that is a flag of the command line as well."""
    meta = {"help": help, "choices": choices or None, "kind": kind or type(default)}
    return field(default=default, metadata=meta)


def check_value(name, value, kind=str, choices=None, **_):
    """ValueError unless a setting has its type and is one of its choices or in its range."""
    fits = isinstance(value, (int, float) if kind is float else kind)
    if not fits or (kind in (int, float) and isinstance(value, bool)):
        raise ValueError(f"{name} {value!r}: expected {kind.__name__}")
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
    model: str = flag("transformer", "architecture", *MODELS)
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
    pretrain_batch_size: int = flag(None, "the same in pretraining (default: the same)", kind=int)
    accumulate: int = flag(1, "parts of a step's batch, one after the other (saves memory)")
    warmup: float = flag(0.1, "share of a stage's steps in which the rate rises")
    schedule: str = flag("cosine", "of the rate after that", "cosine", "constant")
    weight_decay: float = flag(0.01, "AdamW decay of the matrices")
    clip: float = flag(1.0, "largest norm of the gradient")
    mask_ratio: float = flag(None, "share of masked positions (default: the task's)", kind=float)
    loss: str = flag(None, "of denoising (default: the task's)", "ce", "l1", kind=str)
    d_model: int = flag(64, "width")
    n_layers: int = flag(2, "blocks")
    n_heads: int = flag(4, "attention heads")
    d_ff: int = flag(None, "hidden width of the FFN (default: 4 d_model)", kind=int)
    ffn: str = flag("dense", "FFN of all blocks but the first (transformer)", *FFNS)
    d_state: int = flag(64, "state size of s4, s4d and diagonal, real numbers a channel")
    dt_min: float = flag(1e-3, "shortest time step of s4 and s4d, slowest decay of diagonal")
    dt_max: float = flag(1e-1, "longest time step, fastest decay")
    random_init: bool = flag(False, "every parameter from N(0, 0.1^2), an ablation of the paper")
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
    compile: bool = flag(False, "torch.compile the model (pays for a transformer on a GPU)")
    sequence_parallel: str = flag(
        None, "split each sequence over the processes", "ring", "ulysses", kind=str
    )

    def __post_init__(self):
        for f in fields(self):
            if (value := getattr(self, f.name)) is not None or f.default is not None:
                check_value(f.name, value, **f.metadata)
        # the first that fits: "image-real" stands before "image"
        known = (v for name, v in DENOISING.items() if self.task.startswith(name))
        ratio, loss = next(known, (0.15, "ce"))
        resolved = {"mask_ratio": ratio, "loss": loss, "pretrain_batch_size": self.batch_size}
        for name, value in resolved.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        object.__setattr__(self, "causal", self.causal or self.objective == "causal")
        least = min(self.batch_size, self.pretrain_batch_size)
        if self.accumulate > least:
            raise ValueError(f"accumulate {self.accumulate}: expected at most batch_size {least}")
        if self.objective == "masked" and self.causal:
            raise ValueError("causal with objective 'masked': a masked model looks both ways")
        if self.model != "transformer" and (self.rope or self.ffn != "dense"):
            raise ValueError(f"model {self.model!r} has no rope and no ffn: take 'transformer'")
        if self.model != "transformer" and self.sequence_parallel == "ring":
            raise ValueError(f"sequence_parallel 'ring' with model {self.model!r}: take 'ulysses'")
        if self.sequence_parallel and (self.pooling != "mean" or self.dropout or self.compile):
            raise ValueError(
                f"sequence_parallel has pooling 'mean', dropout 0 and no compile, got "
                f"{self.pooling!r}, {self.dropout} and {self.compile}"
            )

    def batch(self, stage):
        """Sequences a step of a stage."""
        return self.batch_size if stage == "finetune" else self.pretrain_batch_size


# ------------------------------------------------------------------ flags, files of settings


def parser():
    """Every field of Config as a flag; only the flags that are given come back."""
    parser = argparse.ArgumentParser(
        prog="pretrain.py",
        description="Pretrain a long-sequence model on its own task, fine-tune it, test it once.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--settings", help="JSON file of flags; those given here override it")
    for f in fields(Config):
        kind = {"type": f.metadata["kind"], "choices": f.metadata["choices"]}
        if f.metadata["kind"] is bool:
            kind = {"action": "store_true"}
        default = "" if f.default is None or f.default is False else f" (default: {f.default})"
        parser.add_argument(
            "--" + f.name.replace("_", "-"), help=f.metadata["help"] + default, **kind
        )
    parser.add_argument(
        "--print-config", action="store_true", help="show the settings and where they come from"
    )
    parser.add_argument("--check", action="store_true", help="check this file, in seconds")
    return parser


def resolve(given):
    """Flags {name: value}, perhaps with "settings" -> Config, {name: where its value comes from}.

    A file of settings holds {"settings": {name: value}, "sources": {name: text}}.
    """
    given, origin, values = dict(given), {f.name: "default" for f in fields(Config)}, {}
    sources = {}
    if (path := given.pop("settings", None)) is not None:
        try:
            file = json.loads(Path(path).read_text())
            values, sources = dict(file["settings"]), dict(file.get("sources") or {})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            expected = 'expected {"settings": {name: value}, "sources": {name: text}}'
            raise ValueError(f"{path} is not a file of settings ({error}): {expected}") from error
    if unknown := (values.keys() | given.keys()) - origin.keys():
        where = f"{path}: " if path else ""
        raise ValueError(f"{where}no setting is called {', '.join(sorted(unknown))}")
    origin |= {name: f"{path}: {sources.get(name, 'no source')}" for name in values}
    origin |= dict.fromkeys(given, "command line")
    return Config(**values | given), origin
