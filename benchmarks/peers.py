"""Our S4 and S4D beside the authors' code, in one run: forward + backward, time and memory.

    git clone https://github.com/state-spaces/s4
    python benchmarks/peers.py --s4 s4                  writes results/peers_cpu.json
    python benchmarks/peers.py --s4 s4 --device cuda    writes results/peers_gpu.json

Their layer is FFTConv of models/s4/s4.py, with its CUDA kernel if that is built (`setup.py build`
in s4/extensions/kernels) and without its GELU.  Causal, width 256, d_state 64, float32, gradients
of the input and all parameters.  "4 layers" is our S4Model with our mixers or with theirs.  Times
are medians; on a GPU eager and captured in a CUDA graph, with the peak of allocated memory.  Their
S4 cannot be captured.
"""

import argparse
import importlib.util
import itertools
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from measured import ROOT, need_device, provenance, save
from torch import nn

from gpu_kernels import JointS4Model
from gpu_step import Graphs
from s4 import S4, S4D, S4Config, S4Model

WIDTH = 256
D_STATE = 64
BATCH = {1024: 16, 4096: 8, 16384: 4}  # by length
LAYERS = ("S4", "S4D", "4 layers")


def load_theirs(path):
    """The module models/s4/s4.py of a clone.  ValueError if it or one of its imports is missing."""
    file = path / "models" / "s4" / "s4.py"
    if not file.is_file():
        raise ValueError(f"--s4 {path} is no clone of state-spaces/s4: it has no models/s4/s4.py")
    kernels = path / "extensions" / "kernels"
    sys.path += map(str, [path, kernels, *kernels.glob("build/lib*")])
    spec = importlib.util.spec_from_file_location("their_s4", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["their_s4"] = module
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise ValueError(f"{file}: {error}; install what it imports") from error
    return module


class Theirs(nn.Module):
    """Their layer as a mixer of ours: (B, L, D) -> (B, L, D)."""

    def __init__(self, module, mode, L):
        super().__init__()
        self.conv = module.FFTConv(WIDTH, l_max=L, mode=mode, d_state=D_STATE, n_ssm=WIDTH)
        self.conv.activation = nn.Identity()

    def forward(self, x, keep=None):
        y, _ = self.conv(x.transpose(1, 2))  # (B, D, L)
        return y.transpose(1, 2)


def build(layer, whose, module, L, device="cpu"):
    """A module (B, L, D) -> (B, L, D)."""
    mode = "diag" if layer == "S4D" else "dplr"
    if layer == "4 layers":
        config = S4Config(WIDTH, 4, D_STATE, n_channels=WIDTH, causal=True)
        if whose == "ours":
            return (JointS4Model if device == "cuda" else S4Model)(config)
        return S4Model(config, lambda config, i: Theirs(module, mode, L))
    if whose == "theirs":
        return Theirs(module, mode, L)
    return S4(WIDTH, D_STATE) if layer == "S4" else S4D(WIDTH, D_STATE)


def median_ms(run, device, rounds):
    """Median time of a call, after calls that load and plan."""
    found = []
    for _ in range(rounds + 3):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(1e3 * (time.perf_counter() - start))
    return statistics.median(found[3:])


def captured(run):
    """A CUDA graph of run(), as a function."""
    graphs = Graphs()
    graphs.warm_up(run)
    return graphs.capture(run)


def measure(layer, whose, module, L, device):
    """One row of the results."""
    torch.manual_seed(0)
    mixer = build(layer, whose, module, L, device).to(device)
    x = torch.randn(BATCH[L], L, WIDTH, device=device, requires_grad=True)
    grad = torch.randn(BATCH[L], L, WIDTH, device=device)
    inputs = [x, *(p for p in mixer.parameters() if p.requires_grad)]

    def run():
        torch.autograd.grad(mixer(x), inputs, grad, allow_unused=True)

    row = {"layer": layer, "whose": whose, "L": L, "batch": BATCH[L]}
    if device == "cpu":
        return row | {"ms": median_ms(run, device, 3)}
    torch.cuda.reset_peak_memory_stats()
    row["ms"] = median_ms(run, device, 30)
    row["mib"] = torch.cuda.max_memory_allocated() / 2**20
    if whose == "ours" or layer == "S4D":
        row["captured_ms"] = median_ms(captured(run), device, 30)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--s4", type=Path, required=True, help="clone of state-spaces/s4")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="torch device (cpu)")
    args = parser.parse_args()
    need_device(args.device)
    origin = provenance()
    try:
        module = load_theirs(args.s4)
    except ValueError as error:
        sys.exit(f"peers.py: {error}")
    # on a CPU their kernel needs 20 GiB at 16,384
    lengths = [1024] if args.device == "cpu" else [*BATCH]
    rows = []
    for L, layer, whose in itertools.product(lengths, LAYERS, ("ours", "theirs")):
        row = measure(layer, whose, module, L, args.device)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        rows.append(row)
    git = ["git", f"--git-dir={args.s4}/.git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    about = {"their_commit": commit, "cuda_kernel": getattr(module, "has_cuda_extension", None)}
    kind = {"cpu": "cpu", "cuda": "gpu"}[args.device]
    save(ROOT / f"results/peers_{kind}.json", {**origin, **about, "rows": rows})


if __name__ == "__main__":
    main()
