"""One HTML page about runs of pretrain.py: results, curves, settings.

    python benchmarks/report.py runs/demo/seed0/* --out runs/report.html

The page is a single file without scripts or links to the network; pictures are inline.  Runs that
differ only in the seed are also summarized as mean and standard deviation.  Needs matplotlib.
"""

import argparse
import base64
import io
import json
import sys
import time
from html import escape
from pathlib import Path

import numpy as np
from measured import over_seeds, pyplot, write

from checkpoint import find_run, versions

STAGES = {"pretrain": "Pretraining", "finetune": "Fine-tuning"}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 66rem; margin: 2rem auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block }
table { overflow-x: auto }
th, td { padding: .25rem .45rem; border-bottom: 1px solid #bbb; text-align: left }
img { max-width: 100% }
"""


def read_run(folder):
    """Read a run's folder into a dict.  Raises ValueError if it is not one."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a run of pretrain.py: it has no config.json")
    texts = {"result.json": "{}", "metrics.jsonl": ""}  # of a run that has just begun
    for name in ("config.json", "result.json", "metrics.jsonl"):
        if (folder / name).exists():
            texts[name] = (folder / name).read_text("utf-8")
    # the last line of a running process may be cut
    lines = [line for line in texts["metrics.jsonl"].splitlines() if line.endswith("}")]
    try:
        config = json.loads(texts["config.json"])
        result = json.loads(texts["result.json"])
        metrics = [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"{folder} has a damaged file: {error}") from error
    return {"folder": folder, "config": config, "result": result, "metrics": metrics}


# ---------------------------------------------------------------- tables


def table(head, rows):
    def line(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{escape(str(c))}</{tag}>" for c in cells) + "</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return f"<table>{line(head, 'th')}\n{body}</table>"


def scores(result, part):
    """All numbers of a part of the result, in words; "" if there are none yet."""
    return ", ".join(f"{name} {value:,.5g}" for name, value in result.get(part, {}).items())


def table_of_runs(runs):
    rows = []
    for number, run in enumerate(runs, 1):
        config = run["config"]
        result = run["result"]
        steps = f"{config['finetune_steps']:,}"
        if config["objective"] != "none":
            steps = f"{config['pretrain_steps']:,} + {steps}"
        parameters = f"{result['parameters']:,}" if "parameters" in result else "unfinished"
        parts = [scores(result, part) for part in ("pretrain", "finetune", "test", "speed")]
        rows.append([number, run["folder"], parameters, steps, *parts])
    head = ["", "run", "parameters", "steps", "denoising", "validation", "test", "speed"]
    return table(head, rows)


def table_of_seeds(runs):
    """Mean and standard deviation of runs that differ only in the seed; "" if there are none."""
    groups = {}
    for number, run in enumerate(runs, 1):
        if "test" in run["result"]:
            how = dict.fromkeys(("seed", "out", "resume", "overwrite"))
            same = run["config"] | how
            groups.setdefault(json.dumps(same, sort_keys=True), {})[number] = run["result"]["test"]
    rows = []
    for group in groups.values():
        if len(group) > 1:
            row = [", ".join(map(str, group))]
            for name in next(iter(group.values())):  # loss, accuracy or R2
                test = over_seeds([result[name] for result in group.values()], digits=4)
                row.append(f"{name} {test['mean']} ± {test['spread']}")
            rows.append(row)
    return "<h2>Means over seeds</h2>" + table(["runs", "test"], rows) if rows else ""


def table_of_settings(runs):
    """Settings in which the runs differ, then those that they share."""
    names = dict.fromkeys(name for run in runs for name in run["config"] if name != "out")
    differ = []
    same = []
    for name in names:
        found = [json.dumps(run["config"].get(name)) for run in runs]
        if len(set(found)) > 1:
            differ.append([name, *found])
        else:
            same.append([name, found[0]])
    head = ["differs", *range(1, len(runs) + 1)]
    return table(head, differ) + "<h3>The same in all</h3>" + table(["setting", "value"], same)


# ---------------------------------------------------------------- curves


def points(run, stage, key, prefix=""):
    """The curve of a stage: (n, 2) steps and values.  prefix "val_" for validation."""
    rows = []
    for line in run["metrics"]:
        if line["stage"] == stage and line.get(prefix + key) is not None:
            rows.append((line[prefix + "step"], line[prefix + key]))
    return np.array(rows, float).reshape(-1, 2)


def curves(runs):
    """Loss and accuracy of both stages as <img>: thin while training, thick on validation."""
    plt = pyplot()
    panels = [(stage, key) for stage in STAGES for key in ("loss", "accuracy")]
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for ax, (stage, key) in zip(axes.flat, panels, strict=True):
        for number, run in enumerate(runs, 1):
            color = f"C{(number - 1) % 10}"
            val = points(run, stage, key, "val_")
            ax.plot(*points(run, stage, key).T, color, linewidth=0.6)
            ax.plot(*val.T, color, linewidth=2, marker=".", label=str(number))
        ax.set_title(f"{STAGES[stage]}: {key}")
        ax.set_xlabel("step")
        ax.legend(title="run", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    plt.close(figure)
    text = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" src="data:image/png;base64,{text}">'


# ---------------------------------------------------------------- page


def page(runs):
    made = f"{time.strftime('%Y-%m-%d')}, torch {versions()['torch']}"
    return f"""<!doctype html><html lang="en"><meta charset="utf-8">
<title>Runs of pretrain.py</title><style>{STYLE}</style>
<h1>Runs of pretrain.py</h1><p>Made on {made}.</p>
{table_of_runs(runs)}
{table_of_seeds(runs)}
<h2>Curves</h2><p>Thin: while training. Thick: validation.</p>{curves(runs)}
<h2>Settings</h2>{table_of_settings(runs)}</html>
"""


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", default="runs/report.html", type=Path, help="file to write")
    args = parser.parse_args(argv)
    try:
        folders = [find_run(path) for path in args.runs if path.resolve() != args.out.resolve()]
        folders = {folder.resolve(): folder for folder in folders}  # runs/latest is one of runs/*
        write(args.out, page([read_run(folder) for folder in folders.values()]))
    except (ValueError, OSError) as error:
        sys.exit(f"report.py: {error}")
    print(f"wrote {args.out}, {args.out.stat().st_size / 1e3:,.0f} kB")


if __name__ == "__main__":
    main()
