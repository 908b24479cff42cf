"""Byte language model: dense against structured FFNs, and wide structured ones at equal FLOPs.

    python benchmarks/byte_lm.py            all missing runs, then means (25 min)
    python benchmarks/byte_lm.py --guided   self-guided training at dense's FLOPs (20 min)

Data: the .py files of the running Python's standard library without its tests, every tenth file
held out.  All arms of a seed see the same batches.  Three seeds.  Writes results/byte_lm.json or,
with --guided, results/byte_lm_guided.json run by run: a stopped job continues.
"""

import argparse
import math
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from measured import ROOT, complete, over_seeds, save
from torch import nn

from structured_ffn import BlockShuffle, Guide, LowRank, StructuredFFN, ffn_weights

# ---------------------------------------------------------------- the model and what it costs


@dataclass(frozen=True)
class LMConfig:
    """linear(d_in, d_out) builds the FFN matrices of all blocks but the first (section 4.1)."""

    d_model: int = 64
    n_layers: int = 3
    n_heads: int = 4
    d_ff: int | None = None  # 4 d_model
    d_head: int | None = None  # d_model / n_heads; smaller for "wide and structured"
    n_kv_heads: int | None = None  # n_heads
    vocab_size: int = 256
    linear: Callable = nn.Linear

    def sizes(self):
        """Return (d_ff, d_head, n_kv_heads) with the defaults filled in."""
        d_ff = self.d_ff or 4 * self.d_model
        d_head = self.d_head or self.d_model // self.n_heads
        return d_ff, d_head, self.n_kv_heads or self.n_heads


def rope(x, base=10000.0):
    """Rotate the pair (x[i], x[i + E/2]) at position l by l base^(-2i/E).  x: (B, H, L, E)."""
    L, E = x.shape[-2:]
    rate = base ** (-2 * torch.arange(E // 2, dtype=torch.float64) / E)
    angle = torch.arange(L, dtype=torch.float64)[:, None] * rate  # (L, E/2)
    cos = angle.cos().to(x)
    sin = angle.sin().to(x)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Block(nn.Module):
    """norm, causal attention, residual, norm, FFN, residual.  (B, L, D) -> (B, L, D)."""

    def __init__(self, config, i):
        super().__init__()
        D = config.d_model
        H = config.n_heads
        d_ff, self.d_head, G = config.sizes()
        self.heads = [H, G, G]
        self.norm1 = nn.LayerNorm(D)
        self.norm2 = nn.LayerNorm(D)
        self.qkv = nn.Linear(D, (H + 2 * G) * self.d_head)
        self.out = nn.Linear(H * self.d_head, D)
        self.ffn = StructuredFFN(D, d_ff, config.linear if i else nn.Linear)

    def forward(self, x):
        heads = self.qkv(self.norm1(x)).unflatten(-1, (-1, self.d_head))  # (B, L, H + 2 G, E)
        q, k, v = heads.transpose(1, 2).split(self.heads, dim=1)  # (B, H, L, E), (B, G, L, E)
        y = F.scaled_dot_product_attention(rope(q), rope(k), v, is_causal=True, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.ffn(self.norm2(x))


class LM(nn.Module):
    """Tokens (B, L) int64 -> logits (B, L, vocab_size); the head is the embedding (section 4.1)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.norm = nn.LayerNorm(config.d_model)
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Embedding)):
                nn.init.normal_(m.weight, std=0.02)
            if isinstance(m, nn.Linear):
                nn.init.zeros_(m.bias)

    def forward(self, tokens):
        x = self.embed(tokens)  # (B, L) -> (B, L, D)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embed.weight)  # (B, L, D) x (D, vocab)


def count(config, L=1024):
    """Count as the paper does: matrices only, attention in full, backward = 2 forward.

    L: tokens per sequence.  Returns exact integers: weights of all FFNs ("ffn") and of the model
    ("params"), training FLOPs per token ("flops").
    """
    d_ff, E, G = config.sizes()
    D = config.d_model
    H = config.n_heads
    n = config.n_layers
    ffn = ffn_weights(nn.Linear, D, d_ff) + (n - 1) * ffn_weights(config.linear, D, d_ff)
    params = ffn + n * 2 * D * (H + G) * E + config.vocab_size * D  # q, out (D, H E), k, v (D, G E)
    macs = params + n * 2 * L * H * E  # per token: the matrices, then scores and mixing over L
    return {"ffn": ffn, "params": params, "flops": 3 * 2 * macs}


def guided_fraction(structured, dense, L=1024):
    """The share f of steps to guide and to repeat at the cost of training `dense` (section 4.4).

    (1 + f) F_s + f G / 2 = F_d;  G: FLOPs of the guides, halved by the mean of alpha (stochastic).
    """
    F_s = count(structured, L)["flops"]
    F_d = count(dense, L)["flops"]
    d_ff, _, _ = structured.sizes()
    G = 6 * (structured.n_layers - 1) * ffn_weights(nn.Linear, structured.d_model, d_ff)
    return (F_d - F_s) / (F_s + 0.5 * G)


# ---------------------------------------------------------------- the experiment

# The wide arms are 80 wide with attention left at 64 (the paper narrows its attention too), so that
# their training FLOPs are those of dense to 0.2 %.
L, BATCH = 64, 16  # bytes per sequence, sequences per step
DENSE = LMConfig(d_model=64, n_layers=3, n_heads=4)
WIDE = replace(DENSE, d_model=80, d_head=16, d_ff=316)
ARMS = {
    "dense": DENSE,
    "LowRank": replace(DENSE, linear=partial(LowRank, R=16)),
    "BlockShuffle": replace(DENSE, linear=partial(BlockShuffle, n_blocks=4)),
    "wide LowRank": replace(WIDE, linear=partial(LowRank, R=20)),
    "wide BlockShuffle": replace(WIDE, linear=partial(BlockShuffle, n_blocks=4)),
}
GUIDED = ["dense"]
for name in ("LowRank", "BlockShuffle"):
    GUIDED += [f"{name}, longer", f"{name}, self-guided"]


def corpus():
    """Return (train, held out), uint8 tensors: the standard library, every tenth file held out."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    files = [p for p in sorted(root.rglob("*.py")) if not skip & set(p.relative_to(root).parts)]
    train = bytearray()
    held_out = bytearray()
    for i, path in enumerate(files):
        part = held_out if i % 10 == 0 else train
        part += path.read_bytes()
    return [torch.frombuffer(part, dtype=torch.uint8) for part in (train, held_out)]


def windows(data, starts, L=L):
    """Return the L + 1 bytes from each start, (len(starts), L + 1) int64."""
    return data[starts[:, None] + torch.arange(L + 1)].long()


@torch.no_grad()
def held_out_loss(model, data, n=4096):
    """Nats per byte over n windows, spread evenly over the held-out files."""
    starts = torch.linspace(0, len(data) - L - 1, n).long()
    model.eval()
    losses = []
    for part in starts.split(256):
        x = windows(data, part)
        losses.append(F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()))
    model.train()
    return float(torch.stack(losses).mean())


def plan(arm, steps):
    """Return (config, optimizer steps, guided ones among them, training FLOPs per token).

    "longer" and "self-guided" spend what dense spends in `steps`: the first by more steps, the
    second by a guide in a share f of the steps, and f of them once more (section 4.4).
    """
    name, _, how = arm.partition(", ")
    config = ARMS[name]
    flops = count(config, L)["flops"]
    dense = count(DENSE, L)["flops"]
    if how == "longer":
        return config, round(steps * dense / flops), 0, flops
    if how == "self-guided":
        f = guided_fraction(config, DENSE, L)
        total = round((1 + f) * steps)
        return config, total, round(f * steps), round(dense * steps / total)
    return config, steps, 0, flops


def train(config, data, seed, steps, lr, guided=0, L=L, batch=BATCH):
    """Train on windows of L bytes.  Returns (model, CPU seconds).

    AdamW (weight decay 0.1, clip 1), linear warmup over 5 % of the steps, cosine to a tenth.
    guided: number of steps, from the first, with the stochastic guide.
    """
    torch.manual_seed(seed)
    model = LM(config)
    guide = Guide(model, guided, stochastic=True, seed=seed) if guided else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    draws = torch.Generator().manual_seed(seed)
    start = time.process_time()
    for t in range(steps):
        rise = min(1.0, (t + 1) / (0.05 * steps))
        cosine = 0.55 + 0.45 * math.cos(math.pi * t / steps)
        optimizer.param_groups[0]["lr"] = lr * rise * cosine
        x = windows(data, torch.randint(len(data) - L, (batch,), generator=draws), L)
        loss = F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if guide:
            guide.step(optimizer)
    return model, time.process_time() - start


def summary(runs, arms):
    """Return {arm: mean and standard deviation of its seeds' losses, weights, training FLOPs}."""
    rows = {}
    for arm in arms:
        mine = [run for run in runs if run["arm"] == arm]
        loss = over_seeds([run["loss"] for run in mine], digits=4)
        first = mine[0]
        flops = first["flops"] * first["steps"] * L * BATCH
        rows[arm] = {
            "loss": loss["mean"],
            "sd": loss["spread"],
            "seeds": len(mine),
            "params": first["params"],
            "steps": first["steps"],
            "training_flops": flops,
        }
        rows[arm]["flops_over_dense"] = flops / rows["dense"]["training_flops"]
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=2000, help="steps of 16 x 64 bytes (2000)")
    parser.add_argument("--guided", action="store_true", help="the arms of self-guided training")
    args = parser.parse_args()
    out = ROOT / f"results/{'byte_lm_guided' if args.guided else 'byte_lm'}.json"
    arms = GUIDED if args.guided else [*ARMS]
    data, held_out = corpus()

    def measure(arm, seed, steps, lr):
        config, _, guided, flops = plan(arm, args.steps)
        model, cpu = train(config, data, seed, steps, lr, guided)
        loss = held_out_loss(model, held_out)
        params = count(config, L)["params"]
        return {"loss": loss, "cpu_s": round(cpu, 1), "params": params, "flops": flops}

    keys = []
    for seed in range(3):
        for arm in arms:
            steps = plan(arm, args.steps)[1]
            keys.append({"arm": arm, "seed": seed, "steps": steps, "lr": 3e-3})
    settings = {"L": L, "batch": BATCH, "bytes": [len(data), len(held_out)]}
    result = complete(out, keys, measure, settings)
    rows = summary(result["runs"], arms)
    save(out, result | {"summary": rows})
    for arm, row in rows.items():
        cost = f"{row['steps']} steps, {row['flops_over_dense']:.3f} x dense's training FLOPs"
        print(f"{arm:28}{row['loss']:.4f} nats per byte, {cost}")


if __name__ == "__main__":
    main()
