"""Generation with S4 and with a Transformer of equal size: throughput at equal memory, latency.

    python benchmarks/generation.py              contexts 1k to 16k
    python benchmarks/generation.py --device cuda --out results/generation_gpu.json

arXiv:2111.00396v3 reports generation "60x faster" (Table 8: 48K against 0.8K tokens/s), on an A100
with the largest batch that fits into memory.  The same protocol here: the batch is the largest, up
to --max-batch, whose states (a KV cache of L tokens, or the state of S4) fit into --cap-gib.  The
token at L/2 takes the mean time of the sequence, as attention costs linear time per token.  Latency
is the time of the L-th token at batch size 1.  Both models run in float32 without a head; S4 has
the number of blocks that matches the Transformer's parameters.  On a GPU a step is a CUDA graph.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import torch
from measured import ROOT, draw_curves, need_device, provenance, save

from attention import Cache, Transformer, TransformerConfig
from gpu_generate import decoder_of
from gpu_step import Graphs
from s4 import S4Config, S4Model

CONTEXTS = [1024, 2048, 4096, 8192, 16384]


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def build():
    """The Transformer, and the S4Model closest to it in number of parameters."""
    sizes = {"d_model": 256, "vocab_size": 256, "causal": True}
    transformer = Transformer(TransformerConfig(n_layers=4, n_heads=4, **sizes))
    one = parameters(S4Model(S4Config(n_layers=1, **sizes)))
    two = parameters(S4Model(S4Config(n_layers=2, **sizes)))
    blocks = 1 + round((parameters(transformer) - one) / (two - one))
    s4 = S4Model(S4Config(n_layers=blocks, **sizes))
    return {"Transformer": transformer.eval(), "S4": s4.eval()}


def state_bytes(model, L):
    """Memory of the state of one sequence of L tokens, float32."""
    config = model.config
    if isinstance(model, S4Model):
        return 4 * config.n_layers * config.d_model * config.d_state
    return 4 * config.n_layers * 2 * L * config.d_model


def state_at(model, batch, seen, capacity, device):
    """The state after `seen` tokens, filled with noise: its values do not change the time."""
    if isinstance(model, S4Model):
        return model.initial_state(batch)
    heads = model.config.n_heads
    shape = (2, batch, heads, capacity, model.config.d_model // heads)
    caches = [Cache(*torch.randn(shape, device=device), seen) for _ in model.blocks]
    return caches, seen


def eager(model, token, state):
    """Return step(i), which runs the model on the token."""

    def step(i):
        nonlocal state
        _, state = model.step(token, state)

    return step


def captured(model, token, state, n):
    """Return step(i), i < n, the same as CUDA graphs."""
    graphs = Graphs()
    decoder = decoder_of(model, state, n)
    replays = {}
    for reach in {decoder.reach(0), decoder.reach(1)}:
        function = partial(decoder, token, reach)
        graphs.warm_up(function)
        replays[reach] = graphs.capture(function)
    return lambda i: replays[decoder.reach(i)]()


def seconds_per_step(model, batch, seen, capacity, args):
    """Time of one step: the fastest of two or more, until --budget seconds are spent."""
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    state = state_at(model, batch, seen, capacity, args.device)
    token = torch.zeros(batch, dtype=torch.long, device=args.device)
    step = eager(model, token, state)
    if args.device != "cpu":
        step = captured(model, token, state, capacity - seen)
    spent = []
    for i in range(min(60, capacity - seen - 4)):
        start = clock()
        step(i)
        if args.device != "cpu":
            torch.cuda.synchronize()
        spent.append(clock() - start)
        if i > 0 and sum(spent) >= args.budget:
            break
    return min(spent)


def measure(models, L, args):
    """Measure both models at one context length; return the row."""
    row = {"context": L}
    for name, model in models.items():
        size = state_bytes(model, L)
        batch = int(args.cap_gib * 2**30 / size)
        batch = max(1, min(args.max_batch, batch))
        step = seconds_per_step(model, batch, L // 2, L, args)
        alone = seconds_per_step(model, 1, L - 64, L, args)
        row[name] = {
            "batch": batch,
            "mib_a_sequence": size / 2**20,
            "tokens_a_second": batch / step,
            "ms_a_token_at_batch_1": 1e3 * alone,
        }
        print(f"{L:8} {name:12} {batch:6} {batch / step:9.0f} {1e3 * alone:14.2f}", flush=True)
    return row


def plot(rows, path):
    labels = {
        "tokens_a_second": "tokens per second, largest batch",
        "ms_a_token_at_batch_1": "ms per token, batch size 1",
    }
    models = {}
    for name in ("Transformer", "S4"):
        models[name] = [row[name] | {"context": row["context"]} for row in rows]
    title = "S4 generates at the same speed after any context; a Transformer slows down"
    draw_curves(path, title, models, "context", labels)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--contexts", type=int, nargs="+", default=CONTEXTS, help="context lengths in tokens")
    add("--cap-gib", type=float, default=1.0, help="memory for the states of a batch (1)")
    add("--max-batch", type=int, default=1024, help="largest batch size (1024)")
    add("--threads", type=int, default=2, help="CPU threads (2)")
    add("--clock", choices=["wall", "cpu"], default="wall", help="clock to measure with (wall)")
    add("--budget", type=float, default=1.0, help="seconds per measurement (1)")
    add("--device", default="cpu", help="torch device (cpu)")
    add("--out", type=Path, default=ROOT / "results/generation.json", help="results file")
    return parser.parse_args()


@torch.no_grad()
def main():
    args = parse()
    need_device(args.device)
    torch.set_num_threads(args.threads)
    origin = provenance()
    models = {name: m.to(args.device) for name, m in build().items()}
    sizes = {name: parameters(model) for name, model in models.items()}
    blocks = {name: len(model.blocks) for name, model in models.items()}
    print(f"parameters {sizes}, blocks {blocks}")
    print(f"{'context':>8} {'model':12} {'batch':>6} {'tokens/s':>9} {'ms at batch 1':>14}")
    rows = [measure(models, L, args) for L in args.contexts]
    out = vars(args).pop("out")
    found = {"settings": vars(args), "parameters": sizes, "blocks": blocks, "rows": rows}
    save(out, {**origin, **found})
    if args.device != "cpu":
        plot(rows, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
