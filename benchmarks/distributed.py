"""Where the speed of attention over several ranks comes from: kernel x causal skipping x ranks.

    torchrun --standalone --nproc-per-node 2 benchmarks/distributed.py                   forward
    torchrun --standalone --nproc-per-node 2 benchmarks/distributed.py --backward        training
    torchrun --standalone --nproc-per-node 2 benchmarks/distributed.py --memory 262144   peak memory
    torchrun --standalone --nproc-per-node 2 benchmarks/distributed.py --tokens 1048576 --heads 1

vanilla: one rank, with scores and softmax written out.  fused: one rank, with PyTorch's fused
kernel, which the ring uses too.  ring: all ranks, zigzag layout.  Cells of one length take turns;
each is the minimum over rounds.  vanilla is skipped if it needs more than --memory-limit GB.  The
forward run also draws results/distributed.png.
"""

import argparse
import itertools
import math
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from measured import ROOT, draw_curves, need_device, provenance, save

import dist_attention as da

LENGTHS = [1024, 2048, 4096, 8192, 16384]
MASKS = {"full": False, "causal": True}
D_HEAD = 64

# ---------------------------------------------------------------- cells


def fused(q, k, v, causal):
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def ring(q, k, v, causal):
    return da.ring_attention(q, k, v, causal, layout="zigzag")


ATTENTION = {"vanilla": da.attention_slow, "fused": fused, "ring": ring}


def tensors(L, args, rank=0, world=1):
    """q, k, v of this rank's tokens, zigzag."""
    n = len(da.positions(L, rank, world, "zigzag"))
    shape = (1, args.heads, n, D_HEAD)
    return [torch.randn(shape).requires_grad_(args.backward) for _ in range(3)]


def once(attend, x, causal, backward):
    """Seconds of one call in this process."""
    start = time.perf_counter()
    with torch.set_grad_enabled(backward):
        out = attend(*x, causal)
        if backward:
            torch.autograd.grad(out, x, out.detach())
    return time.perf_counter() - start


def largest(values):
    """The largest of all ranks' values, one by one, on all ranks."""
    values = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values.tolist()


def vanilla_bytes(L, args):
    """Scores, weights and a mask; in training their gradients too.  float32."""
    return args.heads * L * L * (20 if args.backward else 12)


def measure(L, args, rank, world):
    """{cell: {"wall": seconds, "bytes": sent}} of one length; the cells take turns."""
    whole = tensors(L, args)
    shards = tensors(L, args, rank, world)
    names = ["fused", "ring"]
    if vanilla_bytes(L, args) <= args.memory_limit * 1e9:
        names.insert(0, "vanilla")
    cells = {}
    for _ in range(args.rounds):
        for name, mask in itertools.product(names, MASKS):
            largest([0.0])  # all ranks start together
            da.traffic.clear()
            wall = 0.0
            if name == "ring" or rank == 0:
                x = shards if name == "ring" else whole
                wall = once(ATTENTION[name], x, MASKS[mask], args.backward)
            wall, sent = largest([wall, float(da.traffic["bytes"])])
            fastest = cells.get(f"{name} {mask}", {"wall": math.inf})["wall"]
            cells[f"{name} {mask}"] = {"wall": min(wall, fastest), "bytes": sent}
    return cells


def factors(cells):
    """Speedups over vanilla, and what they are products of."""
    seconds = {name: cell["wall"] for name, cell in cells.items()}
    out = {"parallel": {m: seconds[f"fused {m}"] / seconds[f"ring {m}"] for m in MASKS}}
    out["skipping"] = seconds["fused full"] / seconds["fused causal"]
    if "vanilla full" in seconds:
        out["kernel"] = seconds["vanilla full"] / seconds["fused full"]
        out["mask"] = seconds["vanilla causal"] / seconds["vanilla full"]
        out["speedup"] = {m: seconds[f"vanilla {m}"] / seconds[f"ring {m}"] for m in MASKS}
    return out


def table(args, rank, world):
    """Measure and print all lengths; return the rows."""
    if rank == 0:
        print(f"{'L':>8} {'':14}{'wall s':>9}{'MB sent':>10}")
    rows = []
    for L in args.lengths:
        cells = measure(L, args, rank, world)
        rows.append({"L": L, **cells, **factors(cells)})
        if rank == 0:
            for name, cell in cells.items():
                sent = cell["bytes"] / 1e6
                print(f"{L:8} {name:14}{cell['wall']:9.3f}{sent:10.2f}")
            print(f"{'':9}", factors(cells), flush=True)
    return rows


# ---------------------------------------------------------------- memory


def peak_bytes():
    """Peak resident size of this process (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def memory(args, rank, world):
    """Peak memory of one causal ring above that of its process before."""
    L = args.memory
    once(ring, tensors(64 * world, args, rank, world), True, args.backward)  # loads code
    Path("/proc/self/clear_refs").write_bytes(b"5")  # resets the peak
    before = peak_bytes()
    x = tensors(L, args, rank, world)
    wall = once(ring, x, True, args.backward)
    wall, used = largest([wall, float(peak_bytes() - before)])
    vanilla = vanilla_bytes(L, args)
    if rank == 0:
        print(
            f"{L:,} tokens, {args.heads} heads, causal: {used / 1e6:.0f} MB per rank, {wall:.1f} s"
        )
        print(f"vanilla would need {vanilla / 1e9:.0f} GB")
    return [{"L": L, "wall": wall, "peak": used, "vanilla": vanilla}]


def plot(rows, world, path):
    names = {"vanilla": "attention naive", "fused": "attention fused", "ring": "ring attention"}
    curves = {name: [] for name in names.values()}
    for row, (cell, name) in itertools.product(rows, names.items()):
        if f"{cell} causal" in row:
            curves[name].append({"L": row["L"], **row[f"{cell} causal"]})
    labels = {"wall": f"seconds, causal, forward; the ring has {world} ranks"}
    title = "The fused kernel saves most of the time, more ranks the rest"
    draw_curves(path, title, curves, "L", labels)


# ---------------------------------------------------------------- command line


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--lengths", type=int, nargs="+", default=LENGTHS, help="lengths in tokens")
    add("--heads", type=int, default=8, help="heads (8)")
    add("--rounds", type=int, default=3, help="calls per cell; the fastest counts (3)")
    add("--backward", action="store_true", help="time forward + backward")
    add("--memory-limit", type=float, default=8, help="skip vanilla above this many GB (8)")
    add("--memory", type=int, help="measure the peak memory at this length instead")
    add("--tokens", type=int, help="run once at this length, verified, instead")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="device for --tokens")
    add("--timeout", type=float, default=600, help="seconds until a rank is lost (600)")
    add("--name", help="write results/NAME.json")
    return parser.parse_args()


def main():
    args = parse()
    need_device(args.device)
    origin = provenance()
    with da.process_group(args.device, args.timeout) as (rank, world, device):
        if args.tokens:
            name = "distributed_tokens"
            rows = [da.run(args.tokens, args.heads, D_HEAD, device, rank, world)]
            if rank == 0:
                da.print_run(rows[0])
        elif args.memory:
            name = "distributed_memory"
            rows = memory(args, rank, world)
        else:
            name = "distributed_training" if args.backward else "distributed"
            rows = table(args, rank, world)
        if rank == 0:
            path = ROOT / f"results/{args.name or name}.json"
            heads = [args.heads, args.heads, D_HEAD]
            sizes = {"world": world, "threads": torch.get_num_threads(), "heads": heads}
            save(path, {**origin, **sizes, "rows": rows})
            if path.stem == "distributed":
                plot(rows, world, path.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(da.guarded(main))
