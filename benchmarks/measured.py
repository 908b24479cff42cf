"""What every results file says about itself, and how it is measured, written and drawn.

origin = provenance()  # before the work: a commit may follow meanwhile
save(ROOT / "results/x.json", origin | {"rows": rows})
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from checkpoint import versions  # noqa: E402
from pathfinder import usable_cpus  # noqa: E402

# one color per method, in all pictures
COLORS = {
    "S4": "#1f5fa8",
    "S4D": "#6aaed6",
    "SGConv": "#2a8c5a",
    "Transformer": "#d9822b",
    "attention fused": "#d9822b",  # PyTorch's fused kernel
    "attention naive": "#b3403a",  # all scores in memory
    "ring attention": "#7a3e9d",
    "bare FFT": "#5b6770",
    "dense": "#222222",
    "lowrank": "#c2185b",
    "blockdense": "#00838f",
    "blockshuffle": "#8d6e14",
}
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "savefig.dpi": 120,
}
ASIDE = ("--out", "--folder", "--s4")  # options, with a value, that change no number

# ---------------------------------------------------------------- provenance


def hardware():
    """The processor, the cores that may be used, and the GPU if there is one, in words."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for row in info.read_text(encoding="utf-8").splitlines():
            if row.startswith("model name"):
                cpu = row.partition(":")[2].strip()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{cpu}, {usable_cpus()} cores{gpu}"


def essential(words):
    """A command without the options that change no number."""
    aside = {i for i, word in enumerate(words) if word in ASIDE}
    return [word for i, word in enumerate(words) if not {i, i - 1} & aside]


def command():
    """What was typed, but for the options that change no number."""
    start = ["python"]
    if "WORLD_SIZE" in os.environ:
        start = ["torchrun", "--standalone", "--nproc-per-node", os.environ["WORLD_SIZE"]]
    script = f"benchmarks/{Path(sys.argv[0]).name}"
    return shlex.join([*start, script, *essential(sys.argv[1:])])


def need_device(device):
    """End in one line if there is no such device."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit(f"{Path(sys.argv[0]).name}: --device {device}: PyTorch finds no CUDA device")


def takes_no_arguments(about):
    """Answer --help with the first line of a script's docstring, and refuse anything else."""
    argparse.ArgumentParser(description=about.split("\n")[0]).parse_args()


def provenance():
    """Command, hardware, load (processes that want a core before it starts), date and versions."""
    load = {"load": round(os.getloadavg()[0], 2)} if hasattr(os, "getloadavg") else {}
    what = {"command": command(), "hardware": hardware(), "date": time.strftime("%Y-%m-%d")}
    return what | load | versions()


# ---------------------------------------------------------------- measuring, writing


def peak_bytes():
    """Largest resident size of this process so far."""
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def over_seeds(scores, digits=2):
    """One score per seed, their mean and standard deviation (None for a single seed)."""
    spread = statistics.stdev(scores) if len(scores) > 1 else None
    return {
        "test": [round(score, digits) for score in scores],
        "mean": round(statistics.fmean(scores), digits),
        "spread": spread if spread is None else round(spread, digits),
    }


def select(rows, **where):
    """The rows with these values."""
    return [row for row in rows if where.items() <= row.items()]


def write(path, text):
    """Write a text file; a process that is killed or a full disk leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".new")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def save(path, result):
    write(path, json.dumps(result, indent=1) + "\n")


def load(path):
    return json.loads(path.read_text("utf-8")) if path.exists() else {"runs": []}


def complete(path, keys, measure, settings):
    """Measure the runs that `path` lacks, print and save each.  Returns the content of the file.

    keys: one dict per run, which names it; measure(**key): dict of results.
    """
    origin = provenance()
    made_by = {name: origin[name] for name in ("commit", "hardware")}
    for key in keys:
        same = {name: value for name, value in key.items() if name != "steps"}
        other = [run["steps"] for run in select(load(path)["runs"], **same) if "steps" in key]
        if set(other) - {key.get("steps")}:
            sys.exit(f"{path} has {same} with {other} steps: move it away, or take as many")
    for key in keys:
        result = load(path)
        if select(result["runs"], **key):
            continue
        run = key | measure(**key)
        print(*run.values(), flush=True)
        result["runs"].append(run | made_by)
        save(path, result | settings | origin)
    return load(path)


# ---------------------------------------------------------------- pictures


def pyplot():
    """matplotlib without a display, in our style; imported here, as only plots need it."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("plots need matplotlib: pip install -r benchmarks/requirements.txt")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(STYLE)
    return plt


def series(rows, x, y):
    """(x values, y values) of the rows that have y, in the order of x."""
    rows = [row for row in rows if row.get(y) is not None]
    rows.sort(key=lambda row: row[x])
    return [row[x] for row in rows], [row[y] for row in rows]


def draw_curves(path, title, rows, x, labels, xlabel="length in tokens"):
    """Draw rows {method: rows} against their x, log-log: one panel per entry of {y: label}."""
    plt = pyplot()
    size = (2 + 4 * len(labels), 4)
    figure, axes = plt.subplots(1, len(labels), figsize=size, layout="constrained", squeeze=False)
    for ax, (y, label) in zip(axes[0], labels.items(), strict=True):
        curves = {name: series(mine, x, y) for name, mine in rows.items()}
        for name, curve in curves.items():
            ax.loglog(*curve, "o-", color=COLORS.get(name), label=name)
        ticks = sorted({tick for at, _ in curves.values() for tick in at})
        names = [f"{n // 1024}k" if n % 1024 == 0 else f"{n:.3g}" for n in ticks]
        ax.set_xticks(ticks, names)
        ax.minorticks_off()
        ax.yaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.set(xlabel=xlabel, ylabel=label)
        ax.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path)
