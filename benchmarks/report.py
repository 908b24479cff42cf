"""One HTML page about runs of pretrain.py: results, curves, denoised examples, settings.

    python benchmarks/report.py runs/demo/seed0/*            writes runs/report.html
    python benchmarks/report.py runs/a runs/b --out page.html --samples 4

The page is a single file without scripts or links to the network; pictures are inline.  Runs that
differ only in the seed are also summarized as mean and standard deviation.  Denoised examples are
the first of the validation split, by the weights in pretrained.pt.  Needs matplotlib.
"""

import argparse
import base64
import io
import json
import math
import sys
import time
from dataclasses import asdict, replace
from html import escape
from pathlib import Path

import numpy as np
import torch
from measured import pyplot

import pretrain
from checkpoint import load, versions
from settings import Config

STAGES = {"pretrain": "Pretraining", "finetune": "Fine-tuning"}
MAX_TOKENS = 160  # shown per example
ORANGE = (0.96, 0.59, 0.16)  # hidden pixels
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 66rem; margin: 2rem auto }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .45rem; border-bottom: 1px solid #bbb; text-align: right }
th:first-child, td:first-child { text-align: left }
ul { columns: 17rem; padding: 0; list-style: none }
img { max-width: 100% }
.tokens { font: 15px/1.9 ui-monospace, monospace; margin: 0 0 .2rem }
.tokens b { font-weight: 400; padding: 0 .2em; margin-right: .15em; background: #eee }
.tokens .hidden { background: #fff; outline: 1px dashed #333 }
.tokens .right { outline: 2px solid #00755a }
.tokens .wrong { outline: 2px solid #b00020; text-decoration: line-through }
"""


def read_run(folder):
    """Read a run's folder into a dict.  Raises ValueError if it is not one."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a run of pretrain.py: it has no config.json")
    run = {"folder": folder, "metrics": [], "result": {}}
    try:
        run["config"] = json.loads((folder / "config.json").read_text("utf-8"))
        if (folder / "result.json").exists():
            run["result"] = json.loads((folder / "result.json").read_text("utf-8"))
        if (folder / "metrics.jsonl").exists():
            for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines():
                if line.endswith("}"):  # the last line of a running process may be cut
                    run["metrics"].append(json.loads(line))
    except ValueError as error:
        raise ValueError(f"{folder} has a damaged file: {error}") from error
    return run


def name_runs(runs):
    """Name each run by its path below the folder that all have in common."""
    parts = [run["folder"].resolve().parts for run in runs]
    common = 0
    while all(len(p) > common + 1 and p[common] == parts[0][common] for p in parts):
        common += 1
    for run, part in zip(runs, parts, strict=True):
        run["name"] = "/".join(part[common:])


# ---------------------------------------------------------------- tables


def table(head, rows):
    def line(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{escape(str(c))}</{tag}>" for c in cells) + "</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return f'<div class="wide"><table>{line(head, "th")}\n{body}</table></div>'


def score(result, stage, key, scale=1.0, digits=4):
    value = result.get(stage, {}).get(key)
    return "" if value is None else f"{scale * value:.{digits}f}"


def table_of_runs(runs):
    head = ["run", "parameters", "steps", "denoising loss", "validation, %", "test, %", "test loss"]
    head += ["tokens/s", "seconds"]
    rows = []
    for number, run in enumerate(runs, 1):
        config, result = run["config"], run["result"]
        steps = f"{config['finetune_steps']:,}"
        if config["objective"] != "none":
            steps = f"{config['pretrain_steps']:,} + {steps}"
        row = [f"{number}  {run['name']}"]
        row.append(f"{result['parameters']:,}" if "parameters" in result else "unfinished")
        row.append(steps)
        row.append(score(result, "pretrain", "loss"))
        row.append(score(result, "finetune", "accuracy", 100, 2))
        row.append(score(result, "test", "accuracy", 100, 2))
        row.append(score(result, "test", "loss"))
        row.append(score(result, "speed", "tokens_per_s", digits=0))
        row.append(score(result, "speed", "seconds", digits=1))
        rows.append(row)
    return table(head, rows)


def table_of_seeds(runs):
    """Mean and standard deviation of runs that differ only in the seed; "" if there are none."""
    groups = {}
    for number, run in enumerate(runs, 1):
        if "test" in run["result"]:
            same = {k: v for k, v in run["config"].items() if k not in ("seed", "out", "resume")}
            groups.setdefault(json.dumps(same, sort_keys=True), []).append((number, run))
    rows = []
    for group in groups.values():
        if len({run["config"]["seed"] for _, run in group}) > 1:
            test = [100 * run["result"]["test"]["accuracy"] for _, run in group]
            numbers = ", ".join(str(number) for number, _ in group)
            spread = f"{np.mean(test):.2f} ± {np.std(test, ddof=1):.2f}"
            rows.append([f"{group[0][1]['name']} and its seeds", numbers, spread])
    if not rows:
        return ""
    return "<h2>Means over seeds</h2>" + table(["", "runs", "test, %"], rows)


def settings(run):
    """Settings that differ from the defaults, and all of them behind a fold."""

    def listed(pairs):
        rows = [f"<li><b>{escape(k)}</b> {escape(str(v))}</li>" for k, v in pairs]
        return f"<ul>{''.join(rows)}</ul>"

    config = run["config"]
    default = {**asdict(Config()), "data": config.get("data")}
    changed = {k: v for k, v in config.items() if v != default.get(k, "")}
    return (
        f"<p>{escape(str(run['folder']))}; settings that differ from the defaults:</p>"
        f"{listed(changed.items())}<details><summary>All settings</summary>"
        f"{listed(config.items())}</details>"
    )


# ---------------------------------------------------------------- curves


def points(run, stage, key, prefix=""):
    """The curve of a stage: (n, 2) steps and values.  prefix "val_" for validation."""
    rows = []
    for line in run["metrics"]:
        if line["stage"] == stage and line.get(prefix + key) is not None:
            rows.append((line[prefix + "step"], line[prefix + key]))
    return np.array(rows, float).reshape(-1, 2)


def inline(figure):
    """A matplotlib figure as <img> with the PNG inside; closes the figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    pyplot().close(figure)
    text = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" src="data:image/png;base64,{text}">'


def curves(runs):
    """Loss and accuracy of both stages: thin while training, thick on validation."""
    plt = pyplot()
    panels = [(stage, key) for stage in STAGES for key in ("loss", "accuracy")]
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for ax, (stage, key) in zip(axes.flat, panels, strict=True):
        for number, run in enumerate(runs, 1):
            train = points(run, stage, key)
            val = points(run, stage, key, "val_")
            color = f"C{(number - 1) % 10}"
            ax.plot(*train.T, color, linewidth=0.6)
            ax.plot(*val.T, color, linewidth=2, marker=".", label=str(number))
        ax.set_title(f"{STAGES[stage]}: {key}")
        ax.set_xlabel("step")
        ax.legend(title="run", fontsize=8)
    return inline(figure)


# ---------------------------------------------------------------- denoised examples


@torch.no_grad()
def denoise(run, n, data_dir=None):
    """Return data, raw (n, L[, C]), keep, where (n, L), guess (like raw): what pretrained.pt says.

    guess is raw except at the hidden positions `where`.  A causal model guesses each position from
    those before it.  Raises ValueError if the run has no pretrained.pt.
    """
    path = run["folder"] / "pretrained.pt"
    if not path.exists():
        raise ValueError("no pretrained.pt, so no denoised examples: it was not pretrained here")
    state = load(path)
    config = Config(**state["settings"])
    config = replace(config, device="cpu", compile=False, sequence_parallel=None)
    config = replace(config, data_dir=data_dir or config.data_dir, precision="float32")
    data = pretrain.load_data(config)
    about = pretrain.identity(data)
    split = pretrain.resident(data.val, about, "cpu").documents()
    model = pretrain.build_model(config, about).float().eval()
    head = pretrain.build_head("pretrain", config, about)
    model.load_state_dict(state["model"])
    head.load_state_dict(state["head"])

    index = np.arange(min(n, len(split)))
    generator = pretrain.seeded(config, pretrain.VALIDATION_SEED, 0)
    batch = pretrain.make_batch(split, index, "pretrain", config, generator)
    raw, keep = split.gather(index)
    out = head(model(batch.x, keep))  # (n, L, symbols or channels)
    if config.loss == "ce":
        out = out.argmax(-1).reshape(raw.shape)
    else:
        out = out * torch.tensor(data.std) + torch.tensor(data.mean)
    where = batch.where
    if config.objective == "causal":  # position t is predicted at t - 1
        out = out.roll(1, 1)
        where = where.roll(1, 1)
    if keep is None:
        keep = torch.ones_like(where)
    guess = torch.where(where if raw.ndim == 2 else where[..., None], out, raw)
    return data, raw.numpy(), keep.numpy(), where.numpy(), guess.numpy()


def token_line(name, symbols, kinds):
    spans = []
    for symbol, kind in zip(symbols, kinds, strict=True):
        spans.append(f'<b class="{kind}">{escape(symbol) if symbol.strip() else "&nbsp;"}</b>')
    return f'<p class="tokens">{name} {"".join(spans)}</p>'


def token_samples(data, raw, keep, where, guess):
    """Three lines per example: the input, what was hidden, and the guesses."""
    names = data.symbols or [chr(i) if 32 <= i < 127 else "·" for i in range(data.vocab_size)]
    out = []
    for row, real, hidden, filled in zip(raw, keep, where, guess, strict=True):
        length = min(int(real.sum()), MAX_TOKENS)
        row, hidden, filled = row[:length], hidden[:length], filled[:length]
        right = filled == row
        masked, mark, judged = [], [], []
        for token, is_hidden, is_right in zip(row, hidden, right, strict=True):
            masked.append("?" if is_hidden else names[token])
            mark.append("hidden" if is_hidden else "")
            judged.append(("right" if is_right else "wrong") if is_hidden else "")
        hits = int((right & hidden).sum())
        out.append(f"<h3>{hits} of {int(hidden.sum())} hidden tokens right</h3>")
        out.append(token_line("input&nbsp;&nbsp;&nbsp;", [names[i] for i in row], [""] * length))
        out.append(token_line("masked&nbsp;&nbsp;", masked, mark))
        out.append(token_line("denoised", [names[i] for i in filled], judged))
    return "".join(out)


def pixels(data, raw, where, guess):
    """Return (input, masked, denoised), each (n, side, side, 3) in 0 .. 1; hidden is orange."""
    n = len(raw)
    side = math.isqrt(raw.shape[1])
    scale = data.vocab_size - 1
    before = np.broadcast_to(raw.reshape(n, side, side, -1) / scale, (n, side, side, 3))
    after = np.broadcast_to(guess.reshape(n, side, side, -1) / scale, before.shape)
    masked = np.where(where.reshape(n, side, side, 1), ORANGE, before)
    return before, masked, after.clip(0, 1)  # a guess may lie beyond the range


def picture_samples(data, raw, where, guess):
    """Input, masked and denoised: one row of pictures per example."""
    pictures = pixels(data, raw, where, guess)
    titles = ("input", "masked", "denoised")
    size = (7, 2.3 * len(raw))
    figure, axes = pyplot().subplots(len(raw), 3, squeeze=False, figsize=size)
    for i, row in enumerate(axes):
        for ax, picture, title in zip(row, pictures, titles, strict=True):
            ax.imshow(picture[i], interpolation="nearest")
            ax.set_title(title, fontsize=9)
            ax.axis("off")
    return inline(figure)


def samples(run, n, data_dir=None):
    """HTML of denoised examples, or the reason why there are none."""
    try:
        data, raw, keep, where, guess = denoise(run, n, data_dir)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        return f"<p>{escape(str(error)[:400])}</p>"
    if data.name.startswith(("image", "scifar", "pathfinder", "lattice")):
        return picture_samples(data, raw, where, guess)
    if data.mean is not None:
        return "<p>Real values that are not pictures are not drawn.</p>"
    return token_samples(data, raw, keep, where, guess)


# ---------------------------------------------------------------- page


def page(runs, n, data_dir=None):
    made = f"{time.strftime('%Y-%m-%d')}, torch {versions()['torch']}"
    out = [
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Runs of pretrain.py</title>',
        f"<style>{STYLE}</style><h1>Runs of pretrain.py</h1><p>Made on {made}.</p>",
        table_of_runs(runs),
        table_of_seeds(runs),
        f"<h2>Curves</h2><p>Thin: while training. Thick: validation.</p>{curves(runs)}",
    ]
    for number, run in enumerate(runs, 1):
        out.append(f"<h2>{number}  {escape(run['name'])}</h2>{settings(run)}")
        if n:
            out.append("<h3>Denoised examples of the validation split</h3>")
            out.append(samples(run, n, data_dir))
    return "\n".join(out) + "</html>\n"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("--out", default="runs/report.html", help="file to write")
    parser.add_argument("--samples", type=int, default=4, help="denoised examples per run, or 0")
    parser.add_argument("--data-dir", help="folder of the data sets (default: as in the run)")
    args = parser.parse_args(argv)
    out = Path(args.out)
    unfinished = out.with_name(out.name + ".new")
    try:
        runs = [read_run(folder) for folder in args.runs]
        name_runs(runs)
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(page(runs, args.samples, args.data_dir), encoding="utf-8")
        unfinished.replace(out)
    except (ValueError, OSError) as error:
        unfinished.unlink(missing_ok=True)
        sys.exit(f"report.py: {error}")
    print(f"wrote {out}, {out.stat().st_size / 1e3:,.0f} kB")


if __name__ == "__main__":
    main()
