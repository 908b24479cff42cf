"""Byte language model: dense against structured FFNs, and wide structured ones at equal FLOPs.

    python benchmarks/byte_lm.py                all missing runs, then table and plot (25 min)
    python benchmarks/byte_lm.py --max-runs 1   one run more (about 90 s on one core), resumable
    python benchmarks/byte_lm.py --text FILE --out OTHER.json   other data

Data: the .py files of the running Python's standard library without its tests, every tenth file
held out.  All arms of a seed see the same batches.  Three seeds.  Writes results/byte_lm.json run
by run, and results/byte_lm.png.
"""

import argparse
import json
import math
import platform
import subprocess
import sys
import sysconfig
import time
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from structured_ffn import LM, BlockShuffle, Guide, LMConfig, LowRank, count  # noqa: E402

# The wide arms are 80 wide with attention left at 64 (the paper narrows its attention too), so that
# their training FLOPs are those of dense to 0.2 %.
DENSE = LMConfig(d_model=64, n_layers=3, n_heads=4)
ARMS = {
    "dense": DENSE,
    "LowRank": LMConfig(64, 3, 4, linear=partial(LowRank, R=16)),
    "BlockShuffle": LMConfig(64, 3, 4, linear=partial(BlockShuffle, n_blocks=4)),
    "wide LowRank": LMConfig(80, 3, 4, d_head=16, d_ff=316, linear=partial(LowRank, R=20)),
    "wide BlockShuffle": LMConfig(
        80, 3, 4, d_head=16, d_ff=316, linear=partial(BlockShuffle, n_blocks=4)
    ),
}
GUIDED = {"LowRank, self-guided": "LowRank", "BlockShuffle, self-guided": "BlockShuffle"}


def corpus(text=None):
    """Returns (train, held out), uint8 tensors. A file of its own is cut at 90 %."""
    if text:
        data = Path(text).read_bytes()
        cut = len(data) * 9 // 10
        parts = [data[:cut], data[cut:]]
    else:
        root = Path(sysconfig.get_path("stdlib"))
        skip = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
        files = [p for p in sorted(root.rglob("*.py")) if not skip & set(p.relative_to(root).parts)]
        held = set(files[::10])
        parts = [b"".join(p.read_bytes() for p in files if (p in held) == h) for h in (False, True)]
    return [torch.from_numpy(np.frombuffer(bytearray(part), dtype=np.uint8)) for part in parts]


def windows(data, starts, L):
    """Returns the L + 1 bytes from each start, (len(starts), L + 1) int64."""
    return data[starts[:, None] + torch.arange(L + 1)].long()


@torch.no_grad()
def held_out_loss(model, data, L, n=4096):
    """Nats a byte over n windows spread evenly over the held-out files, the same for every run."""
    starts = torch.linspace(0, len(data) - L - 1, n).long()
    model.eval()
    losses = []
    for part in starts.split(256):
        x = windows(data, part, L)
        losses.append(F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()))
    model.train()
    return float(torch.stack(losses).mean())


def train(config, data, seed, steps, lr, batch=16, L=64, guide=None, warmup=0.05):
    """AdamW (weight decay 0.1, clip 1), linear warm-up, cosine to a tenth.

    Returns (held-out loss in nats a byte, CPU seconds).
    """
    torch.manual_seed(seed)
    model = LM(config)
    guide = guide and Guide(model, steps // 2, stochastic=guide == "stochastic", seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)

    def factor(t):
        rise = min(1.0, (t + 1) / (warmup * steps))
        return rise * (0.55 + 0.45 * math.cos(math.pi * t / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    draws = torch.Generator().manual_seed(seed)
    start = time.process_time()
    for _ in range(steps):
        x = windows(data[0], torch.randint(len(data[0]) - L, (batch,), generator=draws), L)
        loss = F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if guide:
            guide.step(optimizer)
    return held_out_loss(model, data[1], L), time.process_time() - start


def provenance():
    """What a result was measured with; the command without the options that only resume."""
    resume = [i for i, a in enumerate(sys.argv) if a in ("--max-runs", "--out", "--budget")]
    kept = [a for i, a in enumerate(sys.argv[1:], 1) if i not in resume and i - 1 not in resume]
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        rows = [row.split(":", 1)[1].strip() for row in info.open() if row.startswith("model name")]
        cpu = f"{rows[0]}, {len(rows)} cores" if rows else cpu
    git = ["git", "rev-parse", "--short", "HEAD"]
    git = subprocess.run(git, cwd=ROOT, capture_output=True, text=True)
    return {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *kept]),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": git.stdout.strip(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def load(path):
    return json.loads(path.read_text()) if path.exists() else {"runs": []}


def save(path, result):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def table(result):
    """Returns markdown lines: mean and spread of each arm over its seeds."""
    dense = count(DENSE, result["L"])["flops"]
    lines = [
        "| arm | weights | FLOPs / dense | held-out loss, nats a byte (± sd) | seeds | CPU s |",
        "|---|---|---|---|---|---|",
    ]
    for arm in [*ARMS, *GUIDED]:
        runs = [r for r in result["runs"] if r["arm"] == arm]
        if runs:
            loss = np.array([r["loss"] for r in runs])
            spread = f" ± {loss.std(ddof=1):.4f}" if len(loss) > 1 else ""
            cpu = np.mean([r["cpu_s"] for r in runs])
            row = f"| {arm} | {runs[0]['params']} | {runs[0]['flops'] / dense:.3f} "
            lines.append(row + f"| {loss.mean():.4f}{spread} | {len(loss)} | {cpu:.0f} |")
    return lines


def plot(result, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(7, 4))
    arms = [a for a in (*ARMS, *GUIDED) if any(r["arm"] == a for r in result["runs"])]
    for i, arm in enumerate(arms):
        loss = [r["loss"] for r in result["runs"] if r["arm"] == arm]
        ax.plot([i] * len(loss), loss, "o", alpha=0.8)
        ax.hlines(np.mean(loss), i - 0.25, i + 0.25, color="black", lw=1)
    share = {r["arm"]: r["flops"] / count(DENSE, result["L"])["flops"] for r in result["runs"]}
    labels = [f"{arm}\n{share[arm]:.2f} of the FLOPs" for arm in arms]
    ax.set_xticks(range(len(arms)), labels, fontsize=7)
    ax.set_ylabel("held-out loss (nats a byte), mean and seeds")
    ax.grid(alpha=0.3)
    fig.tight_layout()
    fig.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(
        description="Byte language model, dense against structured FFNs."
    )
    parser.add_argument("--text", help="a file to learn instead of the standard library's source")
    parser.add_argument(
        "--steps", type=int, default=2000, help="optimiser steps of 16 x 64 bytes (2000)"
    )
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate (3e-3)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds an arm (3)")
    parser.add_argument("--guided", action="store_true", help="also the self-guided arms")
    parser.add_argument("--max-runs", type=int, default=10**9, help="stop after so many runs")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "results" / "byte_lm.json", help="result file"
    )
    args = parser.parse_args()
    data = corpus(args.text)
    arms = [*ARMS, *(GUIDED if args.guided else ())]
    for seed, arm in [(s, a) for s in range(args.seeds) for a in arms]:
        result = load(args.out)
        known = {(r["arm"], r["seed"], r["steps"], r["lr"]) for r in result["runs"]}
        if args.max_runs <= 0 or (arm, seed, args.steps, args.lr) in known:
            continue
        args.max_runs -= 1
        config = ARMS[GUIDED.get(arm, arm)]
        loss, cpu = train(
            config, data, seed, args.steps, args.lr, guide="stochastic" if arm in GUIDED else None
        )
        counts = count(config, 64)
        run = {
            "arm": arm,
            "seed": seed,
            "steps": args.steps,
            "lr": args.lr,
            "loss": loss,
            "cpu_s": cpu,
        }
        result["runs"].append(run | {"params": counts["params"], "flops": counts["flops"]})
        result |= {"L": 64, "batch": 16, "bytes": [len(d) for d in data], **provenance()}
        save(args.out, result)
        print(f"{arm:<26} seed {seed}  loss {loss:.4f}  {cpu:.0f} s CPU", flush=True)
    result = load(args.out)
    print("\n".join(table(result)))
    plot(result, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
