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

ASIDE = ("--max-runs", "--out")  # options, with a value, that change no number


def hardware():
    """The processor, its cores, and the GPU if there is one, in words."""
    cpu, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        rows = [row.split(":", 1)[1].strip() for row in info.open() if row.startswith("model name")]
        cpu = rows[0] if rows else cpu
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{cpu}, {os.cpu_count()} cores{gpu}"


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
    path.write_text(json.dumps(result, indent=1) + "\n")


def pyplot():
    """matplotlib without a display; imported here, as only plots need it."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("plots need matplotlib: pip install -r benchmarks/requirements.txt")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
