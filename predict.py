"""Predict with a finished run of pretrain.py, without the data it was trained on.

    python predict.py runs/latest new.csv                   writes predictions.csv
    python predict.py runs/a new.npz --out guesses.csv

    model = predict.load("runs/latest")    # a torch module, from model.pt alone
    logits = model(x, lengths)             # x as in the .npz file; of a text, as own_data.encode

The file gets one line per example: the class and the probability of every class, or the k values
of a regression. If the new data have labels, their score is printed. Data with other symbols,
classes or channels than those of the run are refused.
"""

import argparse
import csv
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import trange

import batches
import checkpoint
import own_data
import pretrain
from pathfinder import appearing, one_line_errors, require
from settings import Config


class Predictor(nn.Module):
    """Body and head of a run: raw inputs -> logits (B, classes), or y (B, k) in its units.

    x: tokens (B, L), values (B, L, C), or (B, L) if C is 1, or pairs of documents (B, 2, L).
    lengths: (B,), or (B, 2) for pairs; what comes after them is padding, by default nothing.
    The other examples of a batch change a result by rounding alone.  ValueError if x has another
    shape than the data of the run, or a token outside its vocabulary.
    """

    def __init__(self, model, head, config, about):
        super().__init__()
        self.model = model
        self.head = head
        self.config = config
        self.about = about  # what the run knows of its data (batches.describe)

    def forward(self, x, lengths=None):
        raw, keep = batches.trim(*self.checked(x, lengths))
        x = pretrain.inputs(raw, None, self.about)
        with pretrain.autocast(self.config, x):
            h = pretrain.features(self.model, x, keep, self.config)
            out = self.head(pretrain.pool(h, keep, self.config.pooling))
        if self.about["y_mean"] is None:
            return out
        return batches.in_units_of_y(out, self.about)

    def checked(self, x, lengths):
        """x (B, L[, C]) on the device and lengths (B,) on the host, checked; a pair becomes two.

        Padding becomes 0.
        """
        x = as_tensor(x).to(next(self.head.parameters()).device)
        if self.about["n_channels"] == 1 and x.ndim == 2:
            x = x[..., None]
        like = self.about["train"]  # (n, L), (n, L, C) or (n, 2, L)
        axis = 1 if self.about["pairs"] else 2  # of pairs or channels
        fits = x.ndim == len(like) and list(x.shape[axis : axis + 1]) == like[axis : axis + 1]
        fits = fits and len(x) > 0
        require(fits, f"x has shape {tuple(x.shape)}, but the run was trained on {like}")
        if self.about["mean"] is None:
            x = x.flatten(0, -2)
        B, L = x.shape[:2]
        lengths = torch.full((B,), L) if lengths is None else as_tensor(lengths).flatten()
        fits = len(lengths) == B and lengths.min() >= 1 and lengths.max() <= L
        require(fits, f"{len(lengths)} lengths for {B} inputs: expected 1 to {L} for each")
        padding = torch.arange(L, device=x.device) >= lengths.to(x.device)[:, None]
        x = x.masked_fill(padding if x.ndim == 2 else padding[..., None], 0)
        if self.about["mean"] is None:
            size = self.about["vocab_size"]
            fits = not x.is_floating_point() and 0 <= int(x.min()) and int(x.max()) < size
            require(fits, f"x ({x.dtype}) must be integers from 0 to {size - 1}")
        return x, lengths.cpu().numpy()


def as_tensor(values):
    """A tensor of a list, a tensor, or an array of any number type and byte order."""
    if isinstance(values, np.ndarray):
        values = values.astype(np.int64 if values.dtype.kind in "iu" else np.float32)
    return torch.as_tensor(values)


def load(folder, device="cpu"):
    """The fine-tuned model of a finished run, as a Predictor in eval mode, without gradients.

    folder: of the run, or the path of its model.pt.
    """
    folder = checkpoint.find_run(folder)
    path = folder if folder.is_file() else folder / "model.pt"
    reason = "no run of pretrain.py, or unfinished: continue it with --resume"
    require(path.exists(), f"{folder} has no model.pt ({reason})")
    state = checkpoint.load(path)
    try:
        about = state["data"]
        settings = {**state["settings"], "device": str(device), "sequence_parallel": None}
        config = Config(**settings)
        model = pretrain.build_model(config, about)
        head = pretrain.build_head("finetune", config, about)
        model.load_state_dict(state["model"])
        head.load_state_dict(state["head"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} is not the model.pt of a run: {error!r:.200}") from error
    predictor = Predictor(model, head, config, about).requires_grad_(False).eval()
    return predictor.to(device, torch.float64 if config.precision == "float64" else None)


def predict(predictor, tokens, lengths, batch_size):
    """Outputs (n, classes or k) of all examples, in batches of similar lengths as in evaluation."""
    order = np.argsort(lengths, kind="stable")
    out = []
    for first in trange(0, len(order), batch_size, desc="predict", unit=" batches", disable=None):
        index = order[first : first + batch_size]
        out.append(predictor(tokens[index], lengths[index]).cpu())
    out = torch.cat(out)
    return out[np.argsort(order)]


def table(out, about):
    """Outputs -> rows of the file, the first with the names of the columns."""
    if about["y_mean"]:
        yield [f"prediction {i}" for i in range(out.shape[1])]
        for row in out.tolist():
            yield [f"{value:.9g}" for value in row]
        return
    classes = about["classes"] or range(about["n_classes"])
    yield ["prediction", *(f"p({name})" for name in classes)]
    for row in out.double().softmax(1).tolist():
        yield [classes[row.index(max(row))], *(f"{p:.6g}" for p in row)]


def score(out, labels, about):
    """Accuracy, or R2 and mean absolute error, as text."""
    labels = torch.from_numpy(labels)
    if about["y_mean"] is None:
        right = (out.argmax(1) == labels).double().mean().item()
        loss = F.cross_entropy(out.double(), labels).item()
        return f"accuracy {100 * right:.2f} %, loss {loss:.4g}"
    error = out - labels
    r2 = 1 - error.square().sum(0) / (labels - labels.mean(0)).square().sum(0)
    varies = labels.amax(0) > labels.amin(0)  # else R2 is 0, as in training
    r2 = torch.where(varies, r2, 0)
    return f"R2 {r2.mean().item():.4g}, mean absolute error {error.abs().mean().item():.4g}"


def command(args):
    world = int(os.environ.get("WORLD_SIZE", 1))
    how = "start it with python, not torchrun"
    require(world == 1, f"this is one process, but WORLD_SIZE is {world}: {how}")
    out = Path(args.out)
    regular = not out.is_symlink() and (out.is_file() or not out.exists())  # no /dev/stdout
    writable = os.access(out.parent, os.W_OK)
    require(regular and writable, f"--out {out}: expected a file in an existing, writable folder")
    itself = out.exists() and out.samefile(args.data)
    require(not itself, f"--out {out} is the file to read: choose another")
    free = args.overwrite or not out.exists()
    require(free, f"{out} exists: choose another --out, or pass --overwrite")
    predictor = load(args.run, args.device)
    about = predictor.about
    config = predictor.config
    require(not about["pairs"], f"{args.run} reads pairs of documents: use predict.load in Python")
    limit = None  # of the length of arrays
    if not args.data.lower().endswith(".npz"):
        limit = config.max_len or own_data.MAX_LEN  # texts are cut as in training
    if config.model == "sgconv":
        limit = about["max_len"]
    text = args.text_column or config.text_column or "text"
    label = args.label_column or config.label_column or "label"
    kind = {**about, "max_len": limit}
    tokens, lengths, labels = own_data.examples(args.data, kind, text, label)
    found = predict(predictor, tokens, lengths, config.batch_size)
    with appearing(out) as part, open(part, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(table(found, about))
    print(f"{len(found):,} predictions in {out}")
    print("no labels, no score" if labels is None else score(found, labels, about))


@one_line_errors("predict.py")
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("run", help="folder of a finished run")
    add("data", help=".csv, .tsv or .npz file, as the run was trained on; labels may be missing")
    add("--out", default="predictions.csv", help="file to write (default: predictions.csv)")
    add("--overwrite", action="store_true", help="replace --out if it exists")
    add("--text-column", help="column with the text (default: as in training)")
    add("--label-column", help="column with the labels (default: as in training)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, choices=["cpu", "cuda"], help=f"default here: {device}")
    args = parser.parse_args(argv)
    if args.device == "cuda" and device == "cpu":
        parser.error("--device cuda: PyTorch finds no CUDA device on this machine")
    command(args)


if __name__ == "__main__":
    main()
