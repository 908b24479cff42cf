"""What every file of results says about itself, and how it is written and drawn.

origin = provenance()  # before the work: a commit may follow meanwhile
save(ROOT / "results/x.json", origin | {"rows": rows})
"""

import json
import os
import platform
import shlex
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
    "attention": "#d9822b",  # with PyTorch's fused kernel; also the Transformer
    "plain attention": "#b3403a",  # with all scores in memory
    "ring attention": "#7a3e9d",
    "FFT": "#5b6770",
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
ASIDE = ("--max-runs", "--out")  # options, with a value, that change no number


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


def provenance():
    """Command, hardware, load (processes that want a core before it starts), date and versions."""
    load = {"load": round(os.getloadavg()[0], 2)} if hasattr(os, "getloadavg") else {}
    what = {"command": command(), "hardware": hardware(), "date": time.strftime("%Y-%m-%d")}
    return what | load | versions()


def save(path, result):
    """Write a file of results."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


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
