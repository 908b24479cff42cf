"""Generating with S4 and with a Transformer of equal size: throughput at a memory cap, and latency.

    python benchmarks/generation.py              contexts 1k to 16k (about 3 min on one core)
    python benchmarks/generation.py --contexts 1024

arXiv:2111.00396v3 reports generation "60x faster" (Table 8: 48K against 0.8K tokens/s): tokens per
second on one A100 with, for each model, the largest batch that its memory holds, the Transformer a
GPT-2 without embedding and softmax.  The same protocol here: sequences of L tokens are generated
from nothing, the batch is as many as fit --cap-gib of state (a KV cache of L tokens, or the state
of S4) up to --max-batch, and the time of a token is that at L/2, the mean over the sequence as
attention costs linear time.  Latency: batch 1, the L-th token.  Both models run in float32 and
without a head.  S4 has as many blocks as give it the Transformer's number of parameters.
Writes results/generation.json and .png.
"""

import argparse
import math
import time
from functools import partial
from pathlib import Path

import torch
from measured import ROOT, provenance, pyplot, save

from attention import Cache, Transformer, TransformerConfig
from s4 import S4Config, S4Model


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def build(width, layers):
    """The Transformer, and the S4Model whose number of parameters comes nearest to its."""
    transformer = Transformer(
        TransformerConfig(width, layers, n_heads=width // 64, vocab_size=256, causal=True)
    )
    size = [parameters(S4Model(S4Config(width, n, vocab_size=256, causal=True))) for n in (1, 2)]
    blocks = 1 + round((parameters(transformer) - size[0]) / (size[1] - size[0]))
    s4 = S4Model(S4Config(width, blocks, vocab_size=256, causal=True))
    return {"Transformer": transformer.eval(), "S4": s4.eval()}


def state_bytes(model, L):
    """Memory that one sequence of L tokens needs while it is generated."""
    config = model.config
    if isinstance(model, S4Model):
        return 4 * config.n_layers * config.d_model * config.d_state
    return 4 * config.n_layers * 2 * L * config.d_model


def state_at(model, batch, seen, capacity, device):
    """The state after `seen` tokens, filled with noise: its contents do not change the time."""
    if isinstance(model, S4Model):
        return model.initial_state(batch)
    heads = model.config.n_heads
    shape = batch, heads, capacity, model.config.d_model // heads
    draw = partial(torch.randn, shape, device=device)
    return [Cache(draw(), draw(), seen) for _ in model.blocks], seen


def seconds_a_step(model, batch, seen, capacity, now, budget):
    """Time of one step: the least of at least two, until the budget (seconds) is spent."""
    device = next(model.parameters()).device
    state = state_at(model, batch, seen, capacity, device)
    token = torch.zeros(batch, dtype=torch.long, device=device)
    best, spent, rounds = math.inf, 0.0, 0
    while rounds < 2 or (spent < budget and rounds < 100 and seen + rounds + 1 < capacity):
        start = now()
        _, state = model.step(token, state)
        elapsed = now() - start
        best, spent, rounds = min(best, elapsed), spent + elapsed, rounds + 1
    return best


def measure(models, L, args):
    clock = time.process_time if args.clock == "cpu" else time.perf_counter

    def now():
        if args.device != "cpu":
            torch.cuda.synchronize()
        return clock()

    row = {"context": L}
    for name, model in models.items():
        batch = max(1, min(args.max_batch, int(args.cap_gib * 2**30 / state_bytes(model, L))))
        step = seconds_a_step(model, batch, L // 2, L, now, args.budget)
        one = seconds_a_step(model, 1, L - 64, L, now, args.budget)
        row[name] = {
            "batch": batch,
            "mib_a_sequence": state_bytes(model, L) / 2**20,
            "tokens_a_second": batch / step,
            "ms_a_token_at_batch_1": 1e3 * one,
        }
    return row


def plot(rows, path):
    plt = pyplot()
    from matplotlib.ticker import LogLocator

    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2))
    titles = {
        "tokens_a_second": "tokens/s, largest batch under the cap",
        "ms_a_token_at_batch_1": "ms a token, batch 1",
    }
    contexts = [r["context"] for r in rows]
    for ax, (key, title) in zip(axes, titles.items(), strict=True):
        for name, style in (("Transformer", "s--"), ("S4", "o-")):
            ax.loglog(contexts, [r[name][key] for r in rows], style, label=name)
        ax.set(title=title, xlabel="context, tokens")
        ax.set_xticks(contexts, [f"{L // 1024}k" for L in contexts])
        ax.minorticks_off()
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:,g}")
        ax.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4, help="of the Transformer")
    parser.add_argument("--cap-gib", type=float, default=1.0, help="memory for the states")
    parser.add_argument("--max-batch", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds a measurement")
    parser.add_argument("--device", default="cpu", help="torch device (default cpu)")
    out = ROOT / "results/generation.json"
    parser.add_argument("--out", type=Path, default=out, help="result file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    models = {k: m.to(args.device) for k, m in build(args.width, args.layers).items()}
    sizes = {name: parameters(model) for name, model in models.items()}
    blocks = {name: len(model.blocks) for name, model in models.items()}
    print(f"parameters {sizes}, blocks {blocks}, cap {args.cap_gib} GiB, {args.clock} clock")
    print(f"{'context':>8} {'model':12} {'batch':>6} {'tokens/s':>9} {'ms at batch 1':>14}")
    rows, origin = [], provenance()
    for L in args.contexts:
        rows.append(measure(models, L, args))
        for name in models:
            r = rows[-1][name]
            print(f"{L:8} {name:12} {r['batch']:6} {r['tokens_a_second']:9.0f} "
                  f"{r['ms_a_token_at_batch_1']:14.2f}")  # fmt: skip
        a, b = rows[-1]["S4"], rows[-1]["Transformer"]
        keys = "tokens_a_second", "ms_a_token_at_batch_1"
        throughput, latency = (a[key] / b[key] for key in keys)
        rows[-1]["S4 over Transformer"] = {"throughput": throughput, "latency": latency}
        print(f"{'':8} S4 / Transformer: throughput {throughput:.2f}, latency {latency:.2f}")
    settings = {k: v for k, v in vars(args).items() if k != "out"}
    result = origin | {
        "settings": settings, "parameters": sizes, "blocks": blocks, "rows": rows
    }  # fmt: skip
    save(args.out, result)
    plot(rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
