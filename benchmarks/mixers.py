"""Time, peak memory and parameters of the token mixers, L = 1k ... 64k, forward + backward.

    python benchmarks/mixers.py                     width 64, batch 1, all lengths (about 5 min)
    python benchmarks/mixers.py --forward           forward alone, up to a million (about 3 min)
    python benchmarks/mixers.py --width 256 --batch 4 --lengths 4096 16384

Every cell is a process of its own, so its memory is its own: the largest resident size above that
of a process that has imported torch, with weights, input and gradients (on CUDA: allocated).  The
processes of one length take turns, and the least of all rounds counts; on a busy machine
--clock cpu --threads 1 shows the processor time instead.  A cell is left out,
with its reason, when a shorter length says that it would pass --max-seconds or --max-gib.

bare FFT: irfft(rfft(u) rfft(K)) with plain autograd, channels first, K a free (D, L) parameter:
what a convolution costs before any kernel is made.  Attention: 4 heads, with its projections.
Cells are merged into results/mixers.json, so lengths can run one by one; plot: results/mixers.png.
"""

import argparse
import json
import os
import resource
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import torch
from measured import ROOT, provenance, pyplot, save

import attention
import s4
import sgconv

LENGTHS = [2**k for k in range(10, 17)]
FORWARD_LENGTHS = [2**k for k in range(14, 21, 2)]
MIXERS = ("bare FFT", "SGConv", "S4D", "S4", "attention fused", "attention naive")


# ---------------------------------------------------------------- worker: one mixer, one length


class BareFFT(torch.nn.Module):
    """A free kernel and plain autograd, (B, D, L) -> (B, D, L)."""

    def __init__(self, width, L):
        super().__init__()
        self.K = torch.nn.Parameter(torch.randn(width, L))
        self.n = sgconv.fft_length(2 * L - 1)

    def forward(self, u):
        U, K_f = torch.fft.rfft(u, self.n), torch.fft.rfft(self.K, self.n)
        return torch.fft.irfft(U * K_f, self.n)[..., : u.shape[-1]]


def build(name, width, L):
    """The mixer as a causal module (B, L, D) -> (B, L, D)."""
    makers = {
        "bare FFT": lambda: BareFFT(width, L),
        "SGConv": lambda: sgconv.SGConv(width, L, 64),
        "S4D": lambda: s4.S4D(width),
        "S4": lambda: s4.S4(width),
        "attention fused": lambda: attention.Attention(width, 4, causal=True),
        "attention naive": lambda: attention.Attention(
            width, 4, causal=True, attend=attention.attention_slow
        ),
    }
    return makers[name]()


def rss_gib():
    """Largest resident size of this process so far, GiB."""
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def worker(name, L, args, pipe):
    """One pass for every True that comes through the pipe; sends time and memory back."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    before, cuda = rss_gib(), args.device.startswith("cuda")
    mixer = build(name, args.width, L).to(args.device)
    shape = (args.batch, args.width, L) if name == "bare FFT" else (args.batch, L, args.width)
    u = torch.randn(shape, device=args.device, requires_grad=not args.forward)
    grad = None if args.forward else torch.randn(shape, device=args.device)
    params = sum(p.numel() for p in mixer.parameters())
    pipe.send({"params": params})
    while pipe.recv():
        u.grad = None
        mixer.zero_grad(set_to_none=True)
        start, cpu = time.perf_counter(), time.process_time()
        with torch.set_grad_enabled(not args.forward):
            y = mixer(u)
        if not args.forward:
            y.backward(grad)
        if cuda:
            torch.cuda.synchronize()
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        del y
        gib = torch.cuda.max_memory_allocated() / 2**30 if cuda else rss_gib() - before
        pipe.send({"seconds": seconds, "cpu_seconds": cpu, "gib": gib})


# ---------------------------------------------------------------- parent: turns, table, plot


def reason_to_skip(name, L, args, done):
    """Why this cell would take too long or too much memory, or None."""
    if name == "attention naive":
        gib = 4 * 5 * args.batch * 4 * L * L / 2**30  # about five (B, H, L, L) tensors in float32
        if gib > args.max_gib:
            return f"would need about {gib:.0f} GiB"
    shorter = [c for c in done if c["mixer"] == name and "seconds" in c and c["L"] < L]
    if shorter:
        last = max(shorter, key=lambda c: c["L"])
        seconds = last["seconds"] * (L / last["L"]) ** (2 if "attention" in name else 1.1)
        if seconds > args.max_seconds:
            return f"would take about {seconds:.0f} s a pass"
    elif any(c["mixer"] == name and c["L"] < L for c in done):
        return "left out at a shorter length"
    return None


def measure(L, args, done):
    """Cells of one length: all workers start, then take turns."""
    cells, workers = {}, {}
    # a fork has torch imported already, and no thread runs before it; CUDA cannot be forked
    fork = sys.platform == "linux" and args.device == "cpu"
    context = get_context("fork" if fork else "spawn")
    for name in args.mixers:
        reason = reason_to_skip(name, L, args, done)
        cell = {"mixer": name, "L": L, "width": args.width, "batch": args.batch}
        cell |= {"forward": args.forward, "device": args.device, "threads": args.threads}
        cells[name] = cell | ({"left_out": reason} if reason else {})
        if not reason:
            pipe, theirs = context.Pipe()
            process = context.Process(target=worker, args=(name, L, args, theirs), daemon=True)
            process.start()
            workers[name] = process, pipe
    for name, (_, pipe) in workers.items():
        cells[name] |= pipe.recv()
    spent = dict.fromkeys(workers, 0.0)
    for turn in range(5 * args.rounds):  # short passes get more rounds
        for name, (_, pipe) in workers.items():
            if turn >= args.rounds and spent[name] > 1:
                continue
            pipe.send(True)
            reply, cell = pipe.recv(), cells[name]
            for key in ("seconds", "cpu_seconds"):
                cell[key] = min(reply[key], cell.get(key, float("inf")))
            cell["gib"] = reply["gib"]
            spent[name] += reply["seconds"]
    for process, pipe in workers.values():
        pipe.send(False)
        process.join()
    return list(cells.values())


def table(cells, clock):
    """Markdown: ms, ratio to the bare FFT, GiB; a row a mixer, a column a length."""
    lengths = sorted({c["L"] for c in cells})
    heads = [*map(str, lengths), f"parameters, L {lengths[-1]}"]
    print(f"\n| ms / ratio / GiB | {' | '.join(heads)} |")
    print("|---" * (len(lengths) + 2) + "|")
    bare = {c["L"]: c.get(clock) for c in cells if c["mixer"] == "bare FFT"}
    for name in MIXERS:
        row = {c["L"]: c for c in cells if c["mixer"] == name}
        texts = []
        for L in lengths:
            cell, base = row.get(L, {}), bare.get(L)
            if clock not in cell:
                texts.append("-")
                continue
            ratio = f"{cell[clock] / base:.2f}" if base else "-"
            texts.append(f"{1e3 * cell[clock]:.0f} / {ratio} / {cell['gib']:.2f}")
        if not row:
            continue
        params = [c["params"] for _, c in sorted(row.items()) if "params" in c]
        print(f"| {name} | {' | '.join(texts)} | {params[-1] if params else '-'} |")


def plot(cells, clock, path):
    """Time and memory over length, forward + backward."""
    plt = pyplot()

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, key, label in (
        (axes[0], clock, clock.replace("_", " ")),
        (axes[1], "gib", "peak GiB"),
    ):
        for name in MIXERS:
            points = sorted((c["L"], c[key]) for c in cells if c["mixer"] == name and key in c)
            axis.plot(*zip(*points, strict=True), "o-", label=name) if points else None
        axis.set(xscale="log", yscale="log", xlabel="length", ylabel=label)
        axis.set_xticks(LENGTHS, [f"{L // 1024}k" for L in LENGTHS], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    first = cells[0]
    figure.suptitle(
        f"forward + backward, width {first['width']}, batch {first['batch']}, "
        f"{first['device']}, {first['threads']} threads"
    )
    figure.savefig(path, dpi=120)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--lengths", type=int, nargs="+", help="lengths (1k ... 64k; 16k ... 1M with --forward)")
    add("--width", type=int, default=64, help="channels D (default 64)")
    add("--batch", type=int, default=1, help="sequences a pass (default 1)")
    add(
        "--mixers",
        nargs="+",
        choices=MIXERS,
        help="which (default all; no attention with --forward)",
    )
    add("--forward", action="store_true", help="time the forward pass alone, without gradients")
    add("--rounds", type=int, default=4, help="passes a cell; the fastest counts (default 4)")
    add("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all cores)")
    add("--device", default="cpu", help="torch device (default cpu)")
    add("--max-seconds", type=float, default=12, help="leave out slower passes (default 12 s)")
    add("--max-gib", type=float, default=6, help="leave out larger naive attention (default 6 GiB)")
    add("--out", type=Path, default=ROOT / "results" / "mixers.json", help="result file")
    add("--clock", choices=("wall", "cpu"), default="wall", help="time that the table shows")
    args = parser.parse_args(argv)
    args.lengths = sorted(args.lengths or (FORWARD_LENGTHS if args.forward else LENGTHS))
    args.mixers = args.mixers or list(MIXERS[:4] if args.forward else MIXERS)
    return args


def main(argv=None):
    args = parse(argv)
    cells = json.loads(args.out.read_text())["cells"] if args.out.exists() else []
    shape = {k: getattr(args, k) for k in ("width", "batch", "forward", "device", "threads")}
    run = provenance()
    for L in args.lengths:
        same = [c for c in cells if shape.items() <= c.items()]
        fresh = [c | {"run": run} for c in measure(L, args, same)]
        base = next((c for c in fresh if c["mixer"] == "bare FFT"), {})
        for cell in fresh:
            if "seconds" in cell and "seconds" in base:
                cell["over bare"] = cell["seconds"] / base["seconds"]
        cells = [c for c in cells if c not in same or c["L"] != L or c["mixer"] not in args.mixers]
        cells += fresh
        save(args.out, {"cells": cells})
        print(f"length {L} done", flush=True)
    clock = {"wall": "seconds", "cpu": "cpu_seconds"}[args.clock]
    table([c for c in cells if shape.items() <= c.items()], clock)
    if not args.forward:
        shown = [c for c in cells if shape.items() <= c.items()]
        plot(shown, clock, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
