"""Runs of pretrain.py as one page: settings, curves, a table of the arms, denoised examples.

    python benchmarks/report.py runs/demo/seed0/*            writes runs/report.html
    python benchmarks/report.py runs/a runs/b --out page.html --samples 4

The page is one file without scripts that asks no network: pictures are inline. Runs are told apart
by number and dash, not by colour alone. Runs that differ only in the seed are also summed up as
mean and sample standard deviation. Denoised examples are the first of the validation split under
fixed masks, by the weights in denoiser.pt; a run without that file says so.
Not included: denoised sound.
"""

import argparse
import base64
import json
import math
import sys
import tempfile
import time
from dataclasses import asdict, replace
from html import escape
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import lra_data  # noqa: E402
import pretrain  # noqa: E402
from checkpoint import load, versions  # noqa: E402
from settings import Config  # noqa: E402

STAGES = {"pretrain": "Pretraining", "finetune": "Fine-tuning"}
# Dark enough on white, and a dash pattern each for who sees or prints grey.
COLOURS = ("#0060a0", "#c04a00", "#00755a", "#8a3a8a", "#333333", "#7a6000")
DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4", "4 2 1 2")
HIDDEN = (245, 150, 40)  # a masked pixel: no shade of grey
MOST_TOKENS = 160  # shown of a sequence
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 2rem auto;
       max-width: 66rem; padding: 0 1rem }
h1, h2, h3 { line-height: 1.2; margin: 2rem 0 .5rem } h3 { font-size: 1rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .45rem; border-bottom: 1px solid #bbb; text-align: right }
td { white-space: nowrap } th { vertical-align: bottom }
th:first-child, td:first-child { text-align: left }
.settings { columns: 17rem; padding: 0; list-style: none } .settings b { font-weight: 600 }
svg { max-width: 100%; height: auto }
svg text { font: 13px system-ui, sans-serif; fill: #1a1a1a } svg .bold { font-weight: 700 }
.panels { display: flex; flex-wrap: wrap; gap: 1rem }
.tokens { font: 15px/1.9 ui-monospace, monospace; margin: 0 0 .2rem }
.tokens b { display: inline-block; line-height: 1.4; font-weight: 400; padding: 0 .2em;
  margin-right: .15em; border-radius: 3px }
.operator { background: #d5e5f7; color: #00325e } .number { background: #eee }
.close { background: #f4e2cc; color: #5c3000 }
.tokens .hidden { background: #fff; outline: 1px dashed #333 }
.tokens .right { outline: 2px solid #00755a } .tokens .wrong { outline: 2px solid #b00020;
  text-decoration: line-through }
figure { display: inline-block; width: 30rem; margin: 0 1rem 1rem 0 }
figure img { width: 9.4rem; height: 9.4rem; image-rendering: pixelated; border: 1px solid #888;
  margin-right: .4rem }
"""

# ----------------------------------------------------------------------------- what a run left


def read_run(folder):
    """-> dict of a run's folder.  ValueError when it is none."""
    folder, path = Path(folder), Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is no run of pretrain.py: it holds no config.json")
    result, metrics = folder / "result.json", folder / "metrics.jsonl"
    try:
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        return {
            "folder": folder,
            "config": json.loads(path.read_text()),
            "metrics": [json.loads(line) for line in lines if line.endswith("}")],
            "result": json.loads(result.read_text()) if result.exists() else {},
        }
    except ValueError as error:
        raise ValueError(f"{folder} holds a damaged file: {error}") from error


def points(run, stage, key, prefix=""):
    """The curve of a stage as (n, 2): step, value."""
    rows = [
        (line[f"{prefix}step"], line[prefix + key])
        for line in run["metrics"]
        if line["stage"] == stage and prefix + key in line
    ]
    return np.array(rows, float).reshape(-1, 2)


def thinned(curve, most=300):
    """At most `most` points, each the mean of its neighbours."""
    parts = np.array_split(curve, min(most, len(curve))) if len(curve) else []
    return np.array([part.mean(0) for part in parts]).reshape(-1, 2)


# ------------------------------------------------------------------------------------- tables


def table(head, rows):
    def line(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{escape(str(c))}</{tag}>" for c in cells) + "</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return f'<div class="wide"><table>{line(head, "th")}\n{body}</table></div>'


def percent(result, stage):
    return f"{100 * result[stage]['accuracy']:.2f}" if stage in result else ""


def table_of_runs(runs):
    head = "run", "parameters", "steps", "denoising loss", "validation, %", "test, %", "test loss"
    head += "tokens/s", "peak memory, MiB", "seconds"
    rows = []
    for number, run in enumerate(runs, 1):
        config, result = run["config"], run["result"]
        steps = f"{config['pretrain_steps']:,} + " if config["objective"] != "none" else ""
        cells = [f"{number}  {run['name']}"]
        cells += [f"{result['parameters']:,}" if result else "unfinished"]
        cells += [f"{steps}{config['finetune_steps']:,}"]
        cells += [f"{result['pretrain']['loss']:.4f}" if "pretrain" in result else ""]
        cells += [percent(result, "finetune"), percent(result, "test")]
        cells += [f"{result['test']['loss']:.4f}" if "test" in result else ""]
        speed = result.get("speed", {})
        memory = speed.get("peak_memory")
        cells += [f"{speed['tokens_per_s']:,}" if speed else ""]
        cells += [f"{memory / 2**20:,.0f}" if memory else ""]
        rows.append([*cells, f"{speed['seconds']:,}" if speed else ""])
    return table(head, rows)


def table_of_arms(runs):
    """Mean and spread of runs that differ in nothing but the seed; empty when there are none."""
    arms = {}
    for number, run in enumerate(runs, 1):
        if "test" in run["result"]:
            rest = {k: v for k, v in run["config"].items() if k not in ("seed", "out", "resume")}
            arms.setdefault(json.dumps(rest, sort_keys=True), []).append((number, run))
    rows = []
    for group in arms.values():
        if len({run["config"]["seed"] for _, run in group}) > 1:
            test = [100 * run["result"]["test"]["accuracy"] for _, run in group]
            spread = f"{np.mean(test):.2f} ± {np.std(test, ddof=1):.2f}"
            numbers = ", ".join(str(number) for number, _ in group)
            rows.append([f"{group[0][1]['name']} and its seeds", numbers, spread])
    head = "arm", "runs", "test, %: mean ± standard deviation"
    return "<h2>Arms over seeds</h2>" + table(head, rows) if rows else ""


def settings(run):
    """The settings that are no defaults; all of them behind a fold."""

    def listed(pairs):
        rows = (f"<li><b>{escape(k)}</b> {escape(str(v))}</li>" for k, v in pairs)
        return f'<ul class="settings">{"".join(rows)}</ul>'

    every, default = run["config"].items(), asdict(Config())
    own = [(k, v) for k, v in every if k not in ("out", "data_dir") and v != default.get(k, "")]
    made = [f"{k} {run['result'][k]}" for k in ("torch", "python", "commit") if k in run["result"]]
    return (
        f"<p>{escape(', '.join([str(run['folder']), *made]))}. Settings that are no defaults:</p>"
        f"{listed(own)}<details><summary>All {len(every)} settings</summary>"
        f"{listed(every)}</details>"
    )


# ------------------------------------------------------------------------------------- curves


def ticks(low, high, most=5):
    """Round numbers in [low, high], `most` + 1 at most."""
    if high <= low:
        return [low]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * min(m for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def spaced(ends, gap):
    """Ends (x, y) of curves -> heights of their labels, `gap` apart where they would overlap."""
    done = []
    for x, y in ends:
        while any(abs(x - other) < 2 * gap and abs(y - taken) < gap for other, taken in done):
            y += 1
        done.append((x, y))
    return [y for _, y in done]


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 500, 320, 62, 34, 34, 48  # of a panel, pixels


def text(x, y, content, anchor="middle", kind="", turn=""):
    place = f'transform="translate({x:.1f} {y:.1f}) {turn}"'
    return f'<text {place} text-anchor="{anchor}" class="{kind}">{escape(str(content))}</text>'


def axes(title, y_label, low, high, place):
    """Grid, numbers, labels.  low, high: (2,) ends of step and value."""
    middle, base = (LEFT + WIDTH - RIGHT) / 2, HEIGHT - BOTTOM
    out = [text(LEFT, 18, title, "start", "bold"), text(middle, HEIGHT - 8, "step")]
    out.append(text(14, (TOP + base) / 2, y_label, turn="rotate(-90)"))
    for value in ticks(low[1], high[1]):
        y = place(np.array([[0, value]]))[0, 1]
        out.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        out.append(text(LEFT - 6, y + 4, f"{value:.4g}", "end"))
    for value in ticks(low[0], high[0]):
        out.append(text(place(np.array([[value, 0]]))[0, 0], base + 20, f"{value:,.0f}"))
    frame = f"M{LEFT} {TOP}V{base}H{WIDTH - RIGHT}"
    return [*out, f'<path d="{frame}" fill="none" stroke="#1a1a1a"/>']


def panel(title, y_label, lines):
    """An SVG of [(number, train (n, 2), val (m, 2))]: thin while training, thick on validation."""
    every = np.concatenate([curve for _, *pair in lines for curve in pair])
    low, high = every.min(0), every.max(0)
    margin = 0.05 * (high[1] - low[1]) or 0.5
    low, high = np.array([0, low[1] - margin]), np.array([high[0], high[1] + margin])
    size = np.array([WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM])

    def place(curve):
        share = (curve - low) / (high - low)
        return [LEFT, TOP] + size * np.stack([share[:, 0], 1 - share[:, 1]], 1)

    out = axes(title, y_label, low, high, place)
    ends = [place(val if len(val) else train)[-1] for _, train, val in lines]
    labels = spaced(ends, 14)
    for (number, train, val), (x, _), y in zip(lines, ends, labels, strict=True):
        look = f'stroke="{COLOURS[(number - 1) % 6]}" stroke-dasharray="{DASHES[(number - 1) % 6]}"'
        for curve, width in ((train, 0.8), (val, 2.2)):
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in place(curve))
            out.append(f'<polyline points="{path}" fill="none" stroke-width="{width}" {look}/>')
        if len(val) == 1:  # no line to be seen
            out.append(f'<circle cx="{x:.1f}" cy="{place(val)[0, 1]:.1f}" r="3"/>')
        out.append(text(x + 6, y + 4, number, "start", "bold"))
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" '
        f'aria-label="{escape(title)} against step">' + "".join(out) + "</svg>"
    )


def unit(stage, key, loss):
    """What stands at the y axis."""
    term = {"pretrain": "position", "finetune": "example"}[stage]
    if key == "accuracy":
        return f"% of {term}s"
    l1 = stage == "pretrain" and loss == "l1"
    return "|error|, standard deviations" if l1 else f"nats per {term}"


def curves(runs):
    """Loss and accuracy of both stages, every run in the panel of its unit."""
    panels = []
    for stage, name in STAGES.items():
        for key in ("loss", "accuracy"):
            scale, lines = np.array([1, 100 if key == "accuracy" else 1]), {}
            for number, run in enumerate(runs, 1):
                train = thinned(points(run, stage, key)) * scale
                val = points(run, stage, key, "val_") * scale
                loss = run["config"]["loss"]
                judged = loss == "ce" or (stage, key) != ("pretrain", "accuracy")  # l1: none right
                if len(train) + len(val) and judged:
                    kind = unit(stage, key, loss)
                    lines.setdefault(kind, []).append((number, train, val))
            panels += [panel(f"{name}: {key}", kind, lines[kind]) for kind in lines]
    return "".join(panels)


# -------------------------------------------------------------------------- denoised examples


@torch.no_grad()
def denoise(run, n, data_dir=None):
    """-> data, raw (n, L[, C]), keep, where (n, L), guess like raw, over the whole input.

    guess: the likeliest symbol or the value at each position that was hidden, raw elsewhere (a
    causal model guesses each position from those before it).  ValueError says what is missing.
    """
    path = run["folder"] / "denoiser.pt"
    if not path.exists():
        raise ValueError("no denoiser.pt, so no denoised examples: it was not pretrained here")
    state = load(path)
    try:
        config = Config(**state["config"])
    except TypeError as error:
        raise ValueError(f"{path} has settings that this version does not know: {error}") from error
    config = replace(config, device="cpu", compile=False, sequence_parallel=None)
    config = replace(config, data_dir=data_dir or config.data_dir, precision="float32")
    data = pretrain.load_data(config)
    resident = pretrain.Resident(data.val, data, "cpu").documents()
    model = pretrain.build_model(config, data).float().eval()
    head = pretrain.build_head("pretrain", config, resident)
    model.load_state_dict(state["model"])
    head.load_state_dict(state["head"])
    index = np.arange(min(n, len(resident)))
    generator = pretrain.seeded(config, pretrain.VALIDATION_SEED, 0)
    batch = pretrain.make_batch(resident, index, "pretrain", config, generator)
    raw, keep = resident.gather(index)
    x = batch.x.float() if batch.x.is_floating_point() else batch.x
    out = head(model(x, keep))  # (n, L, symbols or channels)
    if config.loss == "ce":
        out = out.argmax(-1).reshape(raw.shape)
    else:
        out = out * torch.tensor(data.std) + torch.tensor(data.mean)
    where = batch.where
    if config.objective == "causal":  # what stands at t was guessed at t - 1
        out, where = out.roll(1, 1), where.roll(1, 1)
    shape = where if raw.ndim == 2 else where[..., None]
    keep = torch.ones_like(where) if keep is None else keep
    guess = torch.where(shape, out, raw)
    return data, raw.numpy(), keep.numpy(), where.numpy(), guess.numpy()


def kind_of(symbol):
    """The class of a ListOps symbol: its colour."""
    if symbol == "]":
        return "close"
    return "operator" if symbol.startswith("[") else "number"


def token_line(name, symbols, kinds):
    spans = (
        f'<b class="{kind}">{escape(symbol) if symbol.strip() else "&nbsp;"}</b>'
        for symbol, kind in zip(symbols, kinds, strict=True)
    )
    return f'<p class="tokens">{name} ' + "".join(spans) + "</p>"


def token_samples(data, raw, keep, where, guess):
    """Three lines an example; frames and strokes say what was hidden, right and wrong."""
    names = data.symbols or [chr(i) if 32 <= i < 127 else "·" for i in range(data.vocab_size)]
    out = []
    for row, real, hidden, filled in zip(raw, keep, where, guess, strict=True):
        length = min(int(real.sum()), MOST_TOKENS)
        row, hidden, filled = row[:length], hidden[:length], filled[:length]
        clean = [names[i] for i in row]
        colour = [kind_of(s) if data.symbols else "number" for s in clean]
        masked = ["?" if h else s for s, h in zip(clean, hidden, strict=True)]
        judged = [
            f"{kind_of(names[g]) if data.symbols else 'number'} {'right' if g == r else 'wrong'}"
            if h
            else c
            for g, r, h, c in zip(filled, row, hidden, colour, strict=True)
        ]
        hit, of = int(((filled == row) & hidden).sum()), int(hidden.sum())
        cut = f", first {length} of {int(real.sum())} tokens" if length < real.sum() else ""
        out.append(f"<h3>{hit} of {of} hidden tokens right{cut}</h3>")
        shown = ["hidden" if h else c for h, c in zip(hidden, colour, strict=True)]
        out.append(token_line("before&nbsp;&nbsp;", clean, colour))
        out.append(token_line("masked&nbsp;&nbsp;", masked, shown))
        out.append(token_line("denoised", [names[i] for i in filled], judged))
    return "".join(out)


def picture(values, side, scale):
    """(L,) or (L, C) numbers -> <img>: a png inside the page.  nan is a hidden pixel."""
    values = np.asarray(values, float).reshape(side * side, -1)
    colours = np.broadcast_to(values * scale, (side * side, max(3, values.shape[1])))
    colours = np.where(np.isnan(colours), HIDDEN, colours.clip(0, 255).round())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.png"
        lra_data.write_png(path, colours.reshape(side, side, 3).astype(np.uint8))
        text = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="" src="data:image/png;base64,{text}">'


def picture_samples(data, raw, where, guess):
    """Before, masked (hidden pixels orange), denoised, side by side."""
    side, out = math.isqrt(raw.shape[1]), []
    scale = 255 / (data.vocab_size - 1)
    for row, hidden, filled in zip(raw.astype(float), where, guess, strict=True):
        masked = np.where(hidden if row.ndim == 1 else hidden[:, None], np.nan, row)
        images = "".join(picture(values, side, scale) for values in (row, masked, filled))
        off = np.abs(filled - row)[hidden]
        text = f"before, masked, denoised: {hidden.sum()} of {len(row)} pixels hidden"
        if guess.dtype.kind in "iu":  # symbols, not values
            text += f", {100 * (off == 0).mean():.0f} % right"
        if data.vocab_size > 2:
            text += f", mean error {off.mean():.1f} of {data.vocab_size - 1}"
        out.append(f"<figure>{images}<figcaption>{text}</figcaption></figure>")
    return "".join(out)


def samples(run, n, data_dir=None):
    """HTML of denoised examples, or of the reason why there are none."""
    try:
        data, raw, keep, where, guess = denoise(run, n, data_dir)
    except (ValueError, OSError, RuntimeError) as error:
        return f"<p>{escape(str(error)[:400])}</p>"
    if data.name.startswith(("image", "scifar", "pathfinder", "lattice")):
        return picture_samples(data, raw, where, guess)
    if data.mean is not None:
        return "<p>Sound is not drawn.</p>"
    return token_samples(data, raw, keep, where, guess)


# --------------------------------------------------------------------------------------- page


def page(runs, n, data_dir=None):
    made = f"{time.strftime('%Y-%m-%d')}, torch {versions()['torch']}"
    out = [
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Runs of pretrain.py</title>',
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>',
        f"<h1>Runs of pretrain.py</h1><p>Made on {made}.</p>",
        table_of_runs(runs),
        table_of_arms(runs),
        "<h2>Curves</h2><p>At the end of a curve, the number of its run. Thin: while training, a ",
        "mean over steps. Thick: validation. Losses of different tasks do not compare, nor do ",
        f'those of different mask ratios.</p><div class="panels">{curves(runs)}</div>',
    ]
    for number, run in enumerate(runs, 1):
        out.append(f"<h2>{number}  {escape(run['name'])}</h2>{settings(run)}")
        if n:
            how = ", each position from those before it" if run["config"]["causal"] else ""
            out.append(f"<h3>Denoised examples of the validation split{how}</h3>")
            out.append(samples(run, n, data_dir))
    return "\n".join(out) + "</html>\n"


def name_runs(runs):
    """Each run's path below what all have in common."""
    parts = [run["folder"].resolve().parts for run in runs]
    common = 0
    while all(len(p) > common + 1 and p[common] == parts[0][common] for p in parts):
        common += 1
    for run, part in zip(runs, parts, strict=True):
        run["name"] = "/".join(part[common:])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", help="folders of runs")
    parser.add_argument("--out", default="runs/report.html", help="the page")
    parser.add_argument("--samples", type=int, default=4, help="denoised examples a run, 0: none")
    parser.add_argument("--data-dir", help="where the tasks are (default: as the run had it)")
    args = parser.parse_args(argv)
    try:
        runs = [read_run(folder) for folder in args.runs]
        name_runs(runs)
        out = Path(args.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page(runs, args.samples, args.data_dir), encoding="utf-8")
    except (ValueError, OSError) as error:
        sys.exit(f"report.py: {error}")
    print(f"wrote {out}, {out.stat().st_size / 1e3:,.0f} kB")


if __name__ == "__main__":
    main()
