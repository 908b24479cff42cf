"""Which factor of distributed attention comes from where: kernel x causal skipping x ranks.

    torchrun --standalone --nproc-per-node 2 benchmarks/distributed.py                   forward
    torchrun --standalone --nproc-per-node 2 benchmarks/distributed.py --backward       training
    torchrun --standalone --nproc-per-node 2 benchmarks/distributed.py --memory 262144   peak memory
    torchrun --standalone --nproc-per-node 2 benchmarks/distributed.py --tokens 1048576 --heads 1
    python benchmarks/distributed.py --simulate 8 --bandwidth 1e9       more ranks than there are
    python benchmarks/distributed.py --plot                             results/distributed*.png

vanilla: scores and softmax written out, on rank 0.  fused: PyTorch's fused kernel on rank 0, the
same one that the ranks use.  ring: all ranks, zigzag under a causal mask.  Cells of a length take
turns, each is the minimum over rounds; CPU seconds are those of the busiest rank.  Factors come
from wall seconds, or, where others use the machine too, from CPU seconds (--clock cpu), which leave
out the waits for messages.  Where vanilla does not fit --memory-limit, the table says so.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from measured import ROOT, provenance, pyplot, save

import dist_attention as da

# ---------------------------------------------------------------- cells


def vanilla(q, k, v, causal):
    return da.product(q, k, v, causal)


def fused(q, k, v, causal):
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


def ring(q, k, v, causal):
    return da.ring_attention(q, k, v, causal, layout=da.zigzag)


def tensors(L, args, rank=0, world=1):
    """q, k, v of this rank's tokens, zigzag."""
    segments = da.zigzag(L, world)[rank]
    heads = args.heads, args.kv_heads, args.kv_heads
    x = [
        torch.cat([da.random_tokens(s, a, b, h, args.d_head) for a, b in segments], 2)
        for s, h in enumerate(heads)
    ]
    return [y.requires_grad_(args.backward) for y in x]


def once(attend, x, causal, backward):
    """(wall, CPU) seconds of one call of this process."""
    start, cpu = time.perf_counter(), time.process_time()
    with torch.set_grad_enabled(backward):
        out = attend(*x, causal)
        if backward:
            torch.autograd.grad(out, x, out.detach())
    return time.perf_counter() - start, time.process_time() - cpu


def together(value, op=dist.ReduceOp.MAX):
    """The largest of all ranks' values, on all ranks."""
    value = torch.tensor(value, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(value, op=op)
    return value.tolist()


def measure(L, args, rank, world):
    """{name: (wall, cpu, bytes sent)}: the cells of one length, taking turns."""
    alone, shared = tensors(L, args), tensors(L, args, rank, world)
    cells = [("fused", c) for c in (False, True)] + [("ring", c) for c in (False, True)]
    if vanilla_bytes(L, args) <= args.memory_limit * 1e9:
        cells = [("vanilla", c) for c in (False, True)] + cells
    best = {}
    for _ in range(args.rounds):
        for name, causal in cells:
            together(0.0)  # nobody starts before all are here
            da.traffic.clear()
            if name == "ring":
                wall, cpu = once(ring, shared, causal, args.backward)
            elif rank == 0:
                wall, cpu = once(
                    {"vanilla": vanilla, "fused": fused}[name], alone, causal, args.backward
                )
            else:
                wall = cpu = 0.0
            wall, cpu, sent = together([wall, cpu, float(da.traffic["bytes"])])
            key = f"{name} {'causal' if causal else 'full'}"
            old = best.get(key, (1e9, 1e9))
            best[key] = min(old[0], wall), min(old[1], cpu), sent
    return best


def vanilla_bytes(L, args):
    """Scores and weights, and when training their gradients and a mask: float32."""
    return args.heads * L * L * (20 if args.backward else 12)


def predicted_bytes(L, args, world):
    """What a rank sends at most in a ring (equal shares), forward, and backward when asked."""
    chunk = 2 * -(-L // world) * args.kv_heads * args.d_head  # elements of keys and values
    return (world - 1) * chunk * (4 + 8 * args.backward)


# ---------------------------------------------------------------- tables


def table(args, rank, world):
    rows = []
    for L in args.lengths:
        best = measure(L, args, rank, world)
        row = {"L": L, "predicted_bytes": predicted_bytes(L, args, world)}
        row |= {name: {"wall": w, "cpu": c, "bytes": b} for name, (w, c, b) in best.items()}
        rows.append(row | factors(best, args.clock))
        if rank == 0:
            print_length(rows[-1], len(rows) == 1)
    return rows


def factors(best, clock):
    """Speedups against vanilla, as products."""
    time = {name: x[clock == "cpu"] for name, x in best.items()}
    seen = {"parallel": {m: time[f"fused {m}"] / time[f"ring {m}"] for m in ("full", "causal")}}
    seen["skipping"] = time["fused full"] / time["fused causal"]
    if "vanilla full" in time:
        seen["kernel"] = time["vanilla full"] / time["fused full"]
        seen["mask"] = time["vanilla causal"] / time["vanilla full"]
        seen["speedup"] = {m: time[f"vanilla {m}"] / time[f"ring {m}"] for m in ("full", "causal")}
    return seen


def print_length(row, first):
    if first:
        print(f"{'L':>8} {'':14}{'wall s':>9}{'CPU s':>9}{'MB sent':>10}{'formula':>9}")
    for name, x in row.items():
        if isinstance(x, dict) and "wall" in x:
            formula = f"{row['predicted_bytes'] / 1e6:9.2f}" if name.startswith("ring") else ""
            sent = f"{x['bytes'] / 1e6:10.2f}"
            print(f"{row['L']:8} {name:14}{x['wall']:9.3f}{x['cpu']:9.3f}{sent}{formula}")
    p, s = row["parallel"], row["skipping"]
    if "speedup" not in row:
        print(
            f"{'':9}no room for vanilla; ring {p['full']:.2f} x fused, causal {p['causal']:.2f} x"
        )
        return
    k, m, total = row["kernel"], row["mask"], row["speedup"]
    print(f"{'':9}full   {total['full']:6.2f} x vanilla = {k:.2f} kernel x {p['full']:.2f} ranks")
    print(
        f"{'':9}causal {total['causal']:6.2f} x vanilla = {k:.2f} kernel x {m:.2f} no mask "
        f"x {s:.2f} skipping x {p['causal']:.2f} ranks",
        flush=True,
    )


# ---------------------------------------------------------------- memory


def peak(reset=False):
    """Peak resident bytes of this process since the last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def memory(args, rank, world):
    """Peak memory of the ring over that of its process before, next to the formula."""
    L, n = args.memory, -(-args.memory // world)
    once(ring, tensors(64 * world, args, rank, world), True, args.backward)  # loads code
    before = peak(reset=True)
    x = tensors(L, args, rank, world)
    wall, _ = once(ring, x, True, args.backward)
    used = together(float(peak() - before))
    q_size, kv_size = n * args.heads * args.d_head * 4, 2 * n * args.kv_heads * args.d_head * 4
    # inputs; keys packed, and those that come in; out and one block's out, lse and one block's
    formula = q_size + 3 * kv_size + 2 * q_size + 4 * n * args.heads * 4
    if args.backward:  # dq and a block's; travelling and own dk, dv and a block's, both messages
        formula += 3 * q_size + 6 * kv_size
    whole = 12 * args.heads * L * L
    row = {"L": L, "wall": together(wall), "peak": used, "formula": formula, "vanilla": whole}
    if rank == 0:
        print(
            f"{L:,} tokens, {args.heads} heads of {args.d_head}, {world} ranks, causal: peak "
            f"{used / 1e6:.0f} MB a rank, formula {formula / 1e6:.0f} MB, {used / formula:.2f} x; "
            f"{row['wall']:.1f} s; vanilla would need {whole / 1e9:.0f} GB"
        )
    return [row]


# ---------------------------------------------------------------- simulation


def timed_block(shape, args, known):
    """Seconds of one block of (queries, keys, diagonal) on this machine, measured once."""
    if shape not in known:
        rows, cols, diagonal = shape
        q = torch.randn(1, args.heads, rows, args.d_head)
        k = torch.randn(1, args.kv_heads, cols, args.d_head)
        runs, now = [], time.process_time if args.clock == "cpu" else time.perf_counter
        for _ in range(args.rounds):
            start = now()
            da.attention_block(q, k, k, diagonal)
            runs.append(now() - start)
        known[shape] = min(runs)
    return known[shape]


def simulate(L, layout, causal, args, known):
    """Wall seconds of a ring of args.simulate ranks: measured blocks, messages by bandwidth.

    A step starts when a rank has finished the one before and has its keys; a message leaves when
    its sender starts the step, and takes bytes / bandwidth.
    """
    W = args.simulate
    segments = layout(L, W)
    hop = 8 * -(-L // W) * args.kv_heads * args.d_head / args.bandwidth
    free, arrived = [0.0] * W, [0.0] * W
    steps = []
    for step in range(W):
        start = [max(a, b) for a, b in zip(free, arrived, strict=True)]
        work = []
        for rank in range(W):
            blocks = da.visible_blocks(segments[rank], segments[(rank - step) % W], causal)
            sizes = [(r.stop - r.start, c.stop - c.start, d) for r, c, d in blocks]
            work.append(sum(timed_block(size, args, known) for size in sizes))
        free = [a + b for a, b in zip(start, work, strict=True)]
        arrived = [start[(rank - 1) % W] + hop for rank in range(W)]
        steps.append(work)
    return max(free), steps


def simulation(args):
    rows, known = [], {}
    print(f"SIMULATED: {args.simulate} ranks, {args.bandwidth / 1e9:g} GB/s; blocks measured")
    for L in args.lengths:
        row = {"L": L, "world": args.simulate}
        for layout in (da.contiguous, da.zigzag):
            for causal in (False, True):
                seconds, steps = simulate(L, layout, causal, args, known)
                name = f"{layout.__name__} {'causal' if causal else 'full'}"
                faster = sum(map(sum, steps)) / seconds
                row[name] = {"simulated wall": seconds, "parallel": faster, "steps": steps}
                print(
                    f"{L:8} {name:18} simulated {seconds:8.3f} s, {faster:5.2f} x as fast as one "
                    f"rank with all these blocks"
                )
        rows.append(row)
    return rows


# ---------------------------------------------------------------- results


def about(args, world):
    """What makes the numbers: asked before the work, during which a commit may follow."""
    return provenance() | {
        "world": world,
        "threads": torch.get_num_threads(),
        "clock": args.clock,
        "heads": [args.heads, args.kv_heads, args.d_head],
    }


def plot():
    """Time against length, and the balance of the two layouts."""
    plt = pyplot()

    data = json.loads((ROOT / "results/distributed.json").read_text())
    rows, W = data["rows"], data["world"]
    fig, ax = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    names = {"vanilla causal": "vanilla, one rank", "fused causal": "fused, one rank"}
    names["ring causal"] = f"ring, {W} ranks"
    for (name, label), color in zip(names.items(), ("#b3403a", "#5b6770", "#1f5fa8"), strict=True):
        points = [(row["L"], row[name][data["clock"]]) for row in rows if name in row]
        ax.loglog(*zip(*points, strict=True), "o-", color=color, label=label)
        if name.startswith("vanilla") and len(points) < len(rows):
            ax.annotate(
                "memory limit", points[-1], xytext=(8, -4), textcoords="offset points", color=color
            )
    ax.set_xticks([row["L"] for row in rows], [f"{row['L']:,}" for row in rows])
    ax.minorticks_off()
    ax.set_xlabel("tokens")
    clock = {"cpu": "CPU seconds a rank", "wall": "wall seconds"}[data["clock"]]
    ax.set_ylabel(f"{clock}, forward, causal")
    ax.set_title(f"{data['heads'][0]} heads of {data['heads'][2]}, float32, one thread a rank")
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(ROOT / "results/distributed.png", dpi=150)
    plot_balance(plt)
    print("wrote results/distributed.png and results/distributed_balance.png")


def plot_balance(plt, L=4096, W=8):
    """Score pairs of each rank and step under a causal mask, counted."""
    fig, axes = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained", sharey=True)
    for ax, layout in zip(axes, (da.contiguous, da.zigzag), strict=True):
        segments = layout(L, W)
        work = torch.zeros(W, W)
        for rank in range(W):
            for step in range(W):
                blocks = da.visible_blocks(segments[rank], segments[(rank - step) % W], True)
                for r, c, diagonal in blocks:
                    pairs = (r.stop - r.start) * (c.stop - c.start)
                    work[rank, step] += pairs / 2 if diagonal else pairs
        work /= (L / W) ** 2
        image = ax.imshow(work, cmap="Blues", vmin=0, vmax=1)
        critical = work.max(0).values.sum().item()
        ax.set_title(f"{layout.__name__}: {work.sum().item() / W / critical:.0%} busy")
        ax.set_xlabel("step of the ring")
    axes[0].set_ylabel("rank")
    fig.colorbar(image, ax=axes, label="work, 1 = a full block", shrink=0.8)
    fig.savefig(ROOT / "results/distributed_balance.png", dpi=150)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--heads", type=int, default=8, help="query heads (8)")
    parser.add_argument("--kv-heads", type=int, help="key and value heads (as many)")
    parser.add_argument("--d-head", type=int, default=64, help="size of a head (64)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each cell (3)")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="of the factors")
    parser.add_argument("--backward", action="store_true", help="forward and backward")
    parser.add_argument(
        "--memory-limit", type=float, default=8, help="GB that vanilla may take (8)"
    )
    parser.add_argument("--memory", type=int, help="measure peak memory at so many tokens instead")
    parser.add_argument("--tokens", type=int, help="one verified causal run of so many instead")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="with --tokens")
    parser.add_argument("--simulate", type=int, help="predict so many ranks instead")
    parser.add_argument("--bandwidth", type=float, default=1e9, help="bytes/s of a simulated link")
    parser.add_argument("--timeout", type=float, default=600, help="seconds till a rank is lost")
    parser.add_argument("--plot", action="store_true", help="draw what results/ has instead")
    parser.add_argument("--name", help="results/<name>.json")
    args = parser.parse_args(argv)
    args.kv_heads = args.kv_heads or args.heads
    if args.plot:
        return plot()
    with da.process_group(args.device, args.timeout) as (rank, world, device):
        made_by = about(args, world)
        if args.tokens:
            row = da.run(args.tokens, args.heads, args.d_head, device, rank, world)
            name, rows = "distributed_tokens", [row]
            if rank == 0:
                da.print_run(row)
        elif args.memory:
            name, rows = "distributed_memory", memory(args, rank, world)
        elif args.simulate:
            name, rows = "distributed_simulated", simulation(args)
        else:
            name = "distributed_training" if args.backward else "distributed"
            rows = table(args, rank, world)
        if rank == 0:
            path = ROOT / f"results/{args.name or name}.json"
            save(path, made_by | {"rows": rows})
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
