"""Latency of dense, structured and merged FFNs over tokens and widths, and one layer's efficiency.

    python benchmarks/ffn_latency.py                all missing cells, then tables and plot (7 min)
    python benchmarks/ffn_latency.py --budget 45    stop after about 45 s, resumable
    python benchmarks/ffn_latency.py --device cuda --dtype bfloat16 --widths 1024 2048 5120 \\
        --tokens 1 16 256 2048 30720 --out results/ffn_latency_gpu.json

On a CPU one thread and its CPU time, on a GPU wall time; the forms take turns.  FFN: two matrices
(d_model, 4 d_model) with GELU, 31 % of the weights, nothing recorded, the fastest round counts.
"merged" is merged(LowRank) with max_tokens above the number of tokens: the dense product plus the
dispatch.  The thresholds are the numbers of tokens up to which the dense product is the faster one.

One layer (CPU alone): efficiency = share of the FLOPs / share of the time, of the fastest turn and
of the median one.  The ceiling is the efficiency of the bare matrix products, on operands laid out
as the product wants them, into memory that is there already.  "Huge pages": a result of 32 MiB is
taken from the system anew in every call, page by page, the same for dense as for a faster layer;
these cells run with THP_MEM_ALLOC_ENABLE=1, by which torch asks Linux for pages of 2 MiB.
Writes results/ffn_latency.json cell by cell.
"""

import argparse
import math
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from byte_lm import load
from measured import ROOT, provenance, pyplot, save
from torch import nn

from structured_ffn import KINDS, Grid, Merged, StructuredFFN, ffn_weights, match, merged

WIDTHS, TOKENS = (256, 512, 1024, 2048), (1, 4, 16, 64, 256, 1024, 4096)
LAYER = [("forward", 1), ("forward", 2048), ("forward + backward", 1024)]
TURNS = 8  # of each form of a layer, two calls or more per turn


def clock():
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def seconds(calls, rounds=5, least=2e-4, clock=time.perf_counter):
    """Seconds per call: calls take turns of at least `least` seconds, the fastest turn counts."""
    best = [math.inf] * len(calls)
    repeats = [1] * len(calls)
    for _ in range(rounds):
        for i, call in enumerate(calls):
            synchronize()
            start = clock()
            for _ in range(repeats[i]):
                call()
            synchronize()
            best[i] = min(best[i], (clock() - start) / repeats[i])
            repeats[i] = max(repeats[i], min(1000, math.ceil(least / best[i])))
    return best


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@torch.no_grad()
def crossover(layer, clock=clock):
    """Return the most tokens, a power of two up to 4096, at which the dense product is faster."""
    dense = Merged(layer, max_tokens=4096)
    most = 0
    for T in [2**k for k in range(13)]:
        x = dense.weight.new_zeros(T, layer.d_in)
        dense_s, factors_s = seconds([partial(dense, x), partial(layer, x)], clock=clock)
        if dense_s > factors_s:
            break
        most = T
    return most


def random_(module):
    """Fill quickly: the spectral start of LowRank costs an SVD and does not change the time."""
    for p in module.parameters():
        nn.init.normal_(p, std=0.02)
    return module.eval()


def build(linear, d_model):
    with torch.device("meta"):
        ffn = StructuredFFN(d_model, 4 * d_model, linear)
    return random_(ffn.to_empty(device=torch.get_default_device()))


def latency(width, tokens):
    """Return {form: milliseconds per call, "form speed": times as fast as dense} of one FFN."""
    forms = {
        kind: build(match(width, 4 * width, kind, 0.3125), width) for kind in ("dense", *KINDS)
    }
    forms["merged"] = merged(forms["lowrank"], max_tokens=10**9)
    x = torch.randn(tokens, width)
    rounds = 25 if x.is_cuda else max(2, min(25, 2**31 // (width * width * tokens)))
    with torch.no_grad():
        calls = [partial(ffn, x) for ffn in forms.values()]
        times = seconds(calls, rounds, 2e-3, clock)
    ms = {form: 1e3 * t for form, t in zip(forms, times, strict=True)}
    return ms | {f"{form} speed": times[0] / t for form, t in zip(forms, times, strict=True)}


def thresholds(width):
    """Return {kind: [tokens for fc1, tokens for fc2]} up to which the dense product is faster."""
    found = {}
    for kind in KINDS:
        ffn = build(match(width, 4 * width, kind, 0.3125), width)
        found[kind] = [crossover(layer) for layer in ffn.modules() if isinstance(layer, Grid)]
    return found


def products(layer, tokens, backward):
    """Return a function that runs the matrix products of a layer and nothing else."""
    jobs = []
    if isinstance(layer, nn.Linear):
        matrices = [layer.weight[None]]
    else:
        matrices = [layer.V.flatten(1, 2), layer.U.flatten(2)]
    for M in matrices:
        M = M.detach()
        n, q, p = M.shape
        x, g = torch.randn(n, tokens, p), torch.randn(n, tokens, q)
        jobs.append((x, M.mT, torch.empty(n, tokens, q)))
        if backward:
            jobs += [(g, M, torch.empty(n, tokens, p)), (g.mT, x, torch.empty(n, q, p))]
    return lambda: [torch.bmm(a, b, out=out) for a, b, out in jobs]


def with_huge_pages(*job):
    """Run a job in a process of its own, to whose torch Linux gives huge pages."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, torch.set_num_threads, (1,)) as pool:
        os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # a process reads it once
        try:
            return pool.submit(*job).result()
        finally:
            del os.environ["THP_MEM_ALLOC_ENABLE"]


def efficiency(what, tokens, d_in=1024, d_out=4096):
    """Return {form: {"ms", "median_ms", "share" of the FLOPs, "efficiency", ..., "ceiling"}}."""
    layers = {"dense": nn.Linear(d_in, d_out)}
    for ratio in (0.625, 0.3125):
        for kind in KINDS:
            with torch.device("meta"):
                layer = match(d_in, d_out, kind, ratio)(d_in, d_out)
            layers[f"{kind} {ratio}"] = random_(layer.to_empty(device="cpu"))
    recorded = what != "forward"
    x = torch.randn(tokens, d_in, requires_grad=recorded)
    g = torch.randn(tokens, d_out)

    def backward(layer):
        torch.autograd.grad(layer(x), [x, *layer.parameters()], g)

    calls = [partial(backward, l) if recorded else partial(l, x) for l in layers.values()]
    bare = [products(layer, tokens, recorded) for layer in layers.values()]
    turns = []
    for _ in range(TURNS):
        with torch.set_grad_enabled(recorded):
            turn = seconds(calls, 2, 2e-3, clock)
        with torch.no_grad():
            turns.append(turn + seconds(bare, 2, 2e-3, clock))
    columns = [*zip(*turns, strict=True)]
    best, middle = [*map(min, columns)], [*map(statistics.median, columns)]
    result = {}
    for i, (name, layer) in enumerate(layers.items()):
        share = sum(p.numel() for p in layer.parameters() if p.dim() > 1) / (d_in * d_out)
        j = i + len(layers)  # its bare products
        result[name] = {
            "ms": 1e3 * best[i],
            "median_ms": 1e3 * middle[i],
            "share": share,
            "efficiency": share * best[0] / best[i],
            "median_efficiency": share * middle[0] / middle[i],
            "ceiling": share * best[len(layers)] / best[j],
        }
    return result


def cells(result, widths, tokens, layers):
    """Yields (section, key, function) of what is missing, cheap ones first."""
    found = [("layer", f"{what}, {n}", partial(efficiency, what, n)) for what, n in layers]
    for what, n in layers[1:]:
        job = partial(with_huge_pages, efficiency, what, n)
        found.append(("layer", f"{what}, {n}, huge pages", job))
    found += [("thresholds", str(width), partial(thresholds, width)) for width in widths]
    sizes = sorted(((w, n) for w in widths for n in tokens), key=lambda c: c[0] ** 2 * c[1])
    found += [("ffn", f"{w}, {n}", partial(latency, w, n)) for w, n in sizes]
    return [cell for cell in found if cell[1] not in result[cell[0]]]


def tables(result):
    lines = ["| one layer 1024 -> 4096 | FLOPs | " + " | ".join(result["layer"]) + " |"]
    lines.append("|---" * (2 + len(result["layer"])) + "|")
    for name, first in next(iter(result["layer"].values()), {}).items():
        row = [cell[name] for cell in result["layer"].values()]
        text = " | ".join(
            f"{r['ms']:.2f} ms, {r['efficiency']:.2f} (median {r['median_efficiency']:.2f},"
            f" ceiling {r['ceiling']:.2f})"
            for r in row
        )
        lines.append(f"| {name} | {first['share']:.3f} | {text} |")
    lines += ["", "| FFN width | tokens | dense ms | " + " | ".join(KINDS) + " | merged |"]
    lines.append("|---" * (4 + len(KINDS)) + "|")
    for key, cell in sorted(result["ffn"].items(), key=lambda c: [*map(int, c[0].split(","))]):
        speed = [f"{cell[form + ' speed']:.2f}x" for form in (*KINDS, "merged")]
        width, tokens = key.split(", ")
        lines.append(f"| {width} | {tokens} | {cell['dense']:.3f} | {' | '.join(speed)} |")
    lines += ["", "| width | dense product faster up to (tokens: fc1, fc2) |", "|---|---|"]
    for width, found in result["thresholds"].items():
        text = "; ".join(f"{kind} {a}, {b}" for kind, (a, b) in found.items())
        lines.append(f"| {width} | {text} |")
    return lines


def plot(result, path):
    plt = pyplot()
    sizes = [[*map(int, key.split(","))] for key in result["ffn"]]
    widths = sorted({width for width, _ in sizes})
    fig, axes = plt.subplots(1, len(widths), figsize=(1 + 3 * len(widths), 3.4), sharey=True)
    for ax, width in zip(axes, widths, strict=True):
        for form, style in zip((*KINDS, "merged"), ("o-", "s--", "^-.", "x:"), strict=True):
            done = sorted(t for w, t in sizes if w == width)
            rows = [result["ffn"][f"{width}, {t}"] for t in done]
            ax.semilogx(done, [r[form + " speed"] for r in rows], style, ms=4, label=form)
        share = ffn_weights(match(width, 4 * width, "lowrank", 0.3125), width, 4 * width)
        ax.axhline(8 * width**2 / share, color="grey", ls=":", lw=1)
        ax.axhline(1, color="black", lw=0.8)
        ax.set_title(f"width {width}", fontsize=10)
        ax.set_xlabel("tokens")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("speed / dense FFN")
    axes[0].legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description="Latency of dense, structured and merged FFNs.")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which to stop")
    out = ROOT / "results" / "ffn_latency.json"
    parser.add_argument("--out", type=Path, default=out, help="result file")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="d_model of the FFNs")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="tokens per call")
    parser.add_argument("--device", default="cpu", help="torch device (default cpu)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_device(args.device)
    torch.set_default_dtype(getattr(torch, args.dtype))
    layers = LAYER if args.device == "cpu" else []
    result = {"layer": {}, "thresholds": {}, "ffn": {}} | load(args.out)
    result.pop("runs", None)
    start, origin = time.perf_counter(), provenance()
    for section, key, measure in cells(result, args.widths, args.tokens, layers):
        if time.perf_counter() - start > args.budget:
            break
        result[section][key] = measure()
        result |= origin | {"device": args.device, "dtype": args.dtype}
        save(args.out, result)
    print("\n".join(tables(result)))
    if result["ffn"]:
        plot(result, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
