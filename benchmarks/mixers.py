"""Time and memory of the token mixers against length.

    python benchmarks/mixers.py             width 64, batch size 1, L 1k to 64k, forward + backward
    python benchmarks/mixers.py --forward   forward pass alone, up to a million tokens
    python benchmarks/mixers.py --width 256 --batch 4 --lengths 4096 16384

Each cell runs in its own process; its memory is the peak resident size above that of a process
that has imported torch (on CUDA: allocated memory).  The processes of one length take turns and
the fastest round counts.  A cell is skipped, with a reason, if a shorter length predicts that it
would exceed --max-seconds or --max-gib.

"bare FFT" is irfft(rfft(u) rfft(K)) with plain autograd, channels first, and a free kernel K: what
a convolution costs before a kernel is computed.  Attention has 4 heads and its projections.
Cells are merged into results/mixers.json, so lengths can run one by one.  mixers.png shows them.
"""

import argparse
import sys
import time
from multiprocessing import active_children, get_context
from pathlib import Path

import torch
from measured import ROOT, draw_curves, load, need_device, peak_bytes, provenance, save, select

import attention
import s4
import sgconv
from pathfinder import usable_cpus

LENGTHS = [2**k for k in range(10, 17)]
FORWARD_LENGTHS = [2**k for k in range(14, 21, 2)]
MIXERS = ("bare FFT", "SGConv", "S4D", "S4", "attention fused", "attention naive")


# ---------------------------------------------------------------- worker: one mixer, one length


class BareFFT(torch.nn.Module):
    """Convolution with a free kernel, (B, D, L) -> (B, D, L)."""

    def __init__(self, width, L):
        super().__init__()
        self.K = torch.nn.Parameter(torch.randn(width, L))
        self.n = sgconv.fft_length(2 * L - 1)

    def forward(self, u):
        U = torch.fft.rfft(u, self.n)
        K_f = torch.fft.rfft(self.K, self.n)
        return torch.fft.irfft(U * K_f, self.n)[..., : u.shape[-1]]


def build(name, width, L):
    """The mixer as a causal module (B, L, D) -> (B, L, D)."""
    if name == "bare FFT":
        return BareFFT(width, L)
    if name == "SGConv":
        return sgconv.SGConv(width, L, 64)
    if name in ("S4", "S4D"):
        return getattr(s4, name)(width)
    naive = {"attend": attention.attention_slow} if name == "attention naive" else {}
    return attention.Attention(width, 4, causal=True, **naive)


def worker(name, L, args, pipe):
    """Run one pass for every True that comes through the pipe; send time and memory back."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    before = peak_bytes()
    cuda = args.device.startswith("cuda")
    mixer = build(name, args.width, L).to(args.device)
    shape = (args.batch, args.width, L) if name == "bare FFT" else (args.batch, L, args.width)
    u = torch.randn(shape, device=args.device, requires_grad=not args.forward)
    grad = torch.randn(shape, device=args.device)
    pipe.send({"params": sum(p.numel() for p in mixer.parameters())})
    while pipe.recv():
        u.grad = None
        mixer.zero_grad()
        start = time.perf_counter()
        cpu = time.process_time()
        with torch.set_grad_enabled(not args.forward):
            y = mixer(u)
        if not args.forward:
            y.backward(grad)
        if cuda:
            torch.cuda.synchronize()
        row = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
        del y
        peak = torch.cuda.max_memory_allocated() if cuda else peak_bytes() - before
        row["gib"] = peak / 2**30
        pipe.send(row)


# ---------------------------------------------------------------- parent


def reason_to_skip(name, L, args, done):
    """Why this cell would take too long or too much memory, or None."""
    if name == "attention naive":
        gib = 4 * 5 * args.batch * 4 * L * L / 2**30  # about five (B, H, L, L) tensors in float32
        if gib > args.max_gib:
            return f"would need about {gib:.0f} GiB"
    shorter = [cell for cell in done if cell["mixer"] == name and cell["L"] < L]
    if not shorter:
        return None
    last = max(shorter, key=lambda cell: cell["L"])
    if "seconds" not in last:
        return "skipped at a shorter length"
    power = 2 if "attention" in name else 1.1
    seconds = last["seconds"] * (L / last["L"]) ** power
    if seconds > args.max_seconds:
        return f"would take about {seconds:.0f} s per pass"
    return None


def measure(L, args, done):
    """Cells of one length: start all workers, then let them take turns."""
    # a fork has torch imported already and no threads running; CUDA cannot be forked
    fork = sys.platform == "linux" and args.device == "cpu"
    context = get_context("fork" if fork else "spawn")
    cells = {}
    pipes = {}
    for name in args.mixers:
        cells[name] = {"mixer": name, "L": L, **shape_of(args)}
        reason = reason_to_skip(name, L, args, done)
        if reason:
            cells[name]["left_out"] = reason
            continue
        pipes[name], theirs = context.Pipe()
        context.Process(target=worker, args=(name, L, args, theirs), daemon=True).start()
    for name, pipe in pipes.items():
        cells[name].update(pipe.recv(), seconds=float("inf"), cpu_seconds=float("inf"))
    spent = dict.fromkeys(pipes, 0.0)
    for turn in range(5 * args.rounds):
        for name, pipe in pipes.items():
            if turn >= args.rounds and spent[name] > 1:  # short passes get more rounds
                continue
            pipe.send(True)
            row = pipe.recv()
            spent[name] += row["seconds"]
            cell = cells[name]
            for clock in ("seconds", "cpu_seconds"):
                cell[clock] = min(cell[clock], row[clock])
            cell["gib"] = row["gib"]
    for pipe in pipes.values():
        pipe.send(False)
    for process in active_children():
        process.join()
    return list(cells.values())


def shape_of(args):
    return {k: getattr(args, k) for k in ("width", "batch", "forward", "device", "threads")}


def show(cells, clock):
    print(f"{'L':>8}  {'mixer':16}{'ms':>9}{'GiB':>7}")
    for cell in cells:
        text = cell.get("left_out")
        if clock in cell:
            text = f"{1e3 * cell[clock]:9.1f}{cell['gib']:7.2f}"
        print(f"{cell['L']:8}  {cell['mixer']:16}{text}")


def plot(cells, clock, path):
    kind = "CPU seconds" if clock == "cpu_seconds" else "seconds"
    labels = {clock: f"{kind} per pass", "gib": "peak memory, GiB"}
    rows = {name: select(cells, mixer=name) for name in MIXERS}
    title = "Attention grows as L², the others almost as L (forward + backward)"
    draw_curves(path, title, rows, "L", labels)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--lengths", type=int, nargs="+", help="lengths (1k to 64k; 16k to 1M with --forward)")
    add("--width", type=int, default=64, help="channels")
    add("--batch", type=int, default=1, help="batch size")
    add("--mixers", nargs="+", choices=MIXERS, help="default: all; no attention with --forward")
    add("--forward", action="store_true", help="time the forward pass alone")
    add("--rounds", type=int, default=4, help="passes per cell; the fastest counts")
    add("--threads", type=int, default=usable_cpus(), help="CPU threads")
    add("--device", default="cpu", help="torch device")
    add("--max-seconds", type=float, default=12, help="skip slower passes")
    add("--max-gib", type=float, default=6, help="skip larger naive attention")
    add("--out", type=Path, default=ROOT / "results" / "mixers.json", help="results file")
    add("--clock", choices=("wall", "cpu"), default="wall", help="time to print")
    args = parser.parse_args()
    args.lengths = sorted(args.lengths or (FORWARD_LENGTHS if args.forward else LENGTHS))
    convolutions = [name for name in MIXERS if "attention" not in name]
    args.mixers = args.mixers or (convolutions if args.forward else list(MIXERS))
    return args


def main():
    args = parse()
    need_device(args.device)
    cells = load(args.out).get("cells", [])
    shape = shape_of(args)
    run = provenance()
    for L in args.lengths:
        same = select(cells, **shape)
        replaced = [cell for cell in same if cell["L"] == L and cell["mixer"] in args.mixers]
        fresh = [cell | {"run": run} for cell in measure(L, args, same)]
        cells = [cell for cell in cells if cell not in replaced] + fresh
        save(args.out, {"cells": cells})
    clock = {"wall": "seconds", "cpu": "cpu_seconds"}[args.clock]
    same = select(cells, **shape)
    show(same, clock)
    if args.out.stem == "mixers" and not args.forward:
        plot(same, clock, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
