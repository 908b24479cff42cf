"""Latency of dense, structured and merged FFNs over tokens and widths, and one layer's efficiency.

    python benchmarks/ffn_latency.py    all missing cells, then the numbers (7 min)
    python benchmarks/ffn_latency.py --device cuda --dtype bfloat16 --widths 1024 2048 5120 \\
        --tokens 1 16 256 2048 30720 --out results/ffn_latency_gpu.json

On a CPU one thread and its CPU time, on a GPU wall time; the forms take turns and the fastest turn
counts.  Each cell is saved when it is measured: stop at any time and start again.

ffn: two matrices (d_model, 4 d_model) with GELU, 31 % of the weights, no gradients.  "merged" is
merged(LowRank) with max_tokens above the number of tokens: the dense product plus the dispatch.
thresholds: the number of tokens up to which the dense product is the faster one.
layer (CPU only): efficiency = share of the FLOPs / share of the time.
"""

import argparse
import itertools
import math
import time
from functools import partial
from pathlib import Path

import torch
from measured import ROOT, draw_curves, load, need_device, provenance, save
from torch import nn

from structured_ffn import KINDS, Merged, StructuredFFN, merged, plan_linear

WIDTHS = (256, 512, 1024, 2048)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
LAYER = [("forward", 1), ("forward", 2048), ("forward + backward", 1024)]


def now():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def seconds(calls, rounds, least=2e-3):
    """Seconds per call: calls take turns of at least `least` seconds, the fastest turn counts."""
    best = [math.inf] * len(calls)
    repeats = [1] * len(calls)
    for _ in range(rounds):
        for i, call in enumerate(calls):
            start = now()
            for _ in range(repeats[i]):
                call()
            best[i] = min(best[i], (now() - start) / repeats[i])
            repeats[i] = max(repeats[i], min(1000, math.ceil(least / best[i])))
    return best


def random_(module):
    """Give memory and random weights: the SVD of LowRank's start would take long."""
    module = module.to_empty(device=torch.get_default_device())
    for p in module.parameters():
        nn.init.normal_(p, std=0.02)
    return module.eval()


def build(kind, width, ratio=0.3125):
    with torch.device("meta"):
        ffn = StructuredFFN(width, 4 * width, plan_linear(width, 4 * width, kind, ratio))
    return random_(ffn)


@torch.no_grad()
def latency(width, tokens):
    """Return {form: milliseconds per call, "form speed": times as fast as dense} of one FFN."""
    forms = {kind: build(kind, width) for kind in ("dense", *KINDS)}
    forms["merged"] = merged(forms["lowrank"], max_tokens=10**9)
    x = torch.randn(tokens, width)
    rounds = 25 if x.is_cuda else max(2, min(25, 2**31 // (width * width * tokens)))
    times = seconds([partial(ffn, x) for ffn in forms.values()], rounds)
    result = {}
    for form, t in zip(forms, times, strict=True):
        result[form] = 1e3 * t
        result[f"{form} speed"] = times[0] / t
    return result


@torch.no_grad()
def crossover(layer):
    """Return the most tokens, a power of two up to 4096, at which the dense product is faster."""
    dense = Merged(layer, max_tokens=4096)
    most = 0
    for k in range(13):
        x = torch.zeros(2**k, layer.d_in)
        dense_s, factors_s = seconds([partial(dense, x), partial(layer, x)], rounds=5, least=2e-4)
        if dense_s > factors_s:
            break
        most = 2**k
    return most


def thresholds(width):
    """Return {kind: [tokens for fc1, tokens for fc2]} up to which the dense product is faster."""
    found = {}
    for kind in KINDS:
        ffn = build(kind, width)
        found[kind] = [crossover(ffn.fc1), crossover(ffn.fc2)]
    return found


def efficiency(what, tokens, d_in=1024, d_out=4096):
    """Return {form: {"ms", "share" of the FLOPs, "efficiency"}} of one layer."""
    layers = {"dense": nn.Linear(d_in, d_out)}
    for ratio in (0.625, 0.3125):
        for kind in KINDS:
            with torch.device("meta"):
                layer = plan_linear(d_in, d_out, kind, ratio)(d_in, d_out)
            layers[f"{kind} {ratio}"] = random_(layer)
    recorded = what != "forward"
    x = torch.randn(tokens, d_in, requires_grad=recorded)
    g = torch.randn(tokens, d_out)

    def run(layer):
        y = layer(x)
        if recorded:
            torch.autograd.grad(y, [x, *layer.parameters()], g)

    with torch.set_grad_enabled(recorded):
        times = seconds([partial(run, layer) for layer in layers.values()], rounds=16)
    result = {}
    for (name, layer), t in zip(layers.items(), times, strict=True):
        share = sum(p.numel() for p in layer.parameters() if p.dim() > 1) / (d_in * d_out)
        result[name] = {"ms": 1e3 * t, "share": share, "efficiency": share * times[0] / t}
    return result


def cells(args):
    """Yield (section, key, function), cheap ones first."""
    if args.device == "cpu":
        for what, n in LAYER:
            yield "layer", f"{what}, {n}", partial(efficiency, what, n)
    for width in args.widths:
        yield "thresholds", str(width), partial(thresholds, width)
    sizes = itertools.product(args.widths, args.tokens)
    for width, n in sorted(sizes, key=lambda size: size[0] ** 2 * size[1]):
        yield "ffn", f"{width}, {n}", partial(latency, width, n)


def show(result):
    for what, forms in result["layer"].items():
        for name, row in forms.items():
            cost = f"{row['ms']:9.2f} ms, efficiency {row['efficiency']:.2f}"
            print(f"layer, {what}: {name:<20}{cost}")
    for key, row in result["ffn"].items():
        speeds = [f"{form} {row[form + ' speed']:.2f}" for form in (*KINDS, "merged")]
        print(f"FFN, {key}: dense {row['dense']:.3f} ms, times as fast: {', '.join(speeds)}")
    for width, found in result["thresholds"].items():
        print(f"width {width}: dense product faster up to (fc1, fc2) {found}")


def plot(result, path):
    """Speed over the number of tokens, one panel per width."""
    rows = {form: [] for form in (*KINDS, "merged")}
    widths = set()
    for key, row in result["ffn"].items():
        width, tokens = map(int, key.split(", "))
        widths.add(width)
        for form in rows:
            rows[form].append({"tokens": tokens, width: row[f"{form} speed"]})
    labels = {width: f"speed / dense FFN, width {width}" for width in sorted(widths)}
    title = "Structured FFNs are faster on many tokens"
    draw_curves(path, title, rows, "tokens", labels, xlabel="tokens")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    out = ROOT / "results/ffn_latency.json"
    parser.add_argument("--out", type=Path, default=out, help="result file")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="d_model of the FFNs")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="tokens per call")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    need_device(args.device)
    torch.set_num_threads(1)
    torch.set_default_device(args.device)
    torch.set_default_dtype(getattr(torch, args.dtype))
    result = {"layer": {}, "thresholds": {}, "ffn": {}} | load(args.out)
    result.pop("runs", None)
    found = result.get("device", args.device), result.get("dtype", args.dtype)
    if found != (args.device, args.dtype):
        parser.error(f"{args.out} was measured with {found}: choose another --out")
    origin = provenance() | {"device": args.device, "dtype": args.dtype}
    for section, key, measure in cells(args):
        if key not in result[section]:
            result[section][key] = measure()
            save(args.out, result | origin)
    show(result)
    if args.device == "cuda":
        plot(result, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
