"""Every measured number of README.md, written from the files in results/.

    python benchmarks/readme.py            rewrite the blocks
    python benchmarks/readme.py --check    exit status 1 if one is not what its files say

A block of README.md stands between <!-- name --> and <!-- /name -->; the function `name` below
makes it.  What stands outside of blocks was set or counted, not measured: tests/test_readme.py
lists it.
"""

import argparse
import json
import re
import statistics
import sys
import textwrap

import claims
import demo as demonstration
from judges import KINDS, arm
from measured import ROOT

README = ROOT / "README.md"
BLOCK = re.compile(r"<!-- ([a-z0-9-]+) -->\n(.*?)<!-- /\1 -->", re.S)


def load(name):
    return json.loads((ROOT / f"results/{name}.json").read_text())


def made_by(content):
    """The record of origin, which files of cells keep in each cell."""
    return content if "command" in content else content["cells"][0]["run"]


def where(origin):
    """The hardware in a few words."""
    text = origin.get("hardware") or origin["cpu"]
    if "NVIDIA" in text:
        return text.split(", ")[-1]
    kind = "AMD EPYC" if "EPYC" in text else "Intel Xeon" if "Xeon" in text else "x86-64"
    cores = re.search(r"(\d+) cores", text)
    cores = int(cores[1]) if cores else origin["cores"]
    return f"{'two' if cores == 2 else cores} cores of an {kind}"


def source(*names):
    """ "command, hardware, versions, date: files"; a command that is long stands in its file."""
    groups = {}
    for name in names:
        origin = made_by(load(name))
        words = origin["command"].split()
        script = next(w for w in words if w.startswith("benchmarks/"))
        short = origin["command"] if len(origin["command"]) < 100 else script
        key = where(origin), origin.get("torch", "2.13.0").split("+")[0], origin["date"][:10]
        groups.setdefault(key, []).append((name, script, short))
    parts = []
    for (hardware, torch, date), files in groups.items():
        scripts = dict.fromkeys(f[2] if len(files) == 1 else f[1] for f in files)
        links = ", ".join(f"[{name}.json](results/{name}.json)" for name, *_ in files)
        commands = ", ".join(f"`{text}`" for text in scripts)
        parts.append(f"{commands}, {hardware}, torch {torch}, {date}: {links}")
    return f"({'; '.join(parts)}.)"


def prose(*sentences):
    text = textwrap.fill(" ".join(sentences), 110, break_long_words=False, break_on_hyphens=False)
    return text.splitlines()


def table(head, rows):
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    yield from (f"| {' | '.join(map(str, row))} |" for row in rows)


# ------------------------------------------------------------------------------- pretrain.py


def demo():
    """What `python pretrain.py` prints, seed 0."""
    results = {
        name: {
            "parameters": row["parameters"],
            "config": row["settings"],
            "finetune": {"accuracy": row["validation"][0] / 100},
            "test": {"accuracy": row["test"][0] / 100},
            "speed": {"seconds": row["seconds"][0]},
        }
        for name, row in load("demo")["arms"].items()
    }
    yield "```"
    yield "four arms on `lattice`, seed 0, 2 at a time, into runs/demo/seed0/"
    yield from demonstration.table(results)
    yield "```"


def seeds():
    d = load("demo")
    arms = d["arms"]
    yield "Test accuracy in %, and mean ± standard deviation over the seeds:"
    yield ""
    rows = [[name, *(f"{t:.1f}" for t in row["test"]), arm(row)] for name, row in arms.items()]
    yield from table(["arm", *(f"seed {s}" for s in d["seeds"]), "mean"], rows)
    yield ""
    mean = {name: row["mean"] for name, row in arms.items()}
    gap = mean["S4, from scratch"] - mean["Transformer, from scratch"]
    left = mean["S4, from scratch"] - mean["Transformer, pretrained"]
    change = mean["S4, pretrained"] - mean["S4, from scratch"]
    yield from prose(
        f"The Transformer's distance from S4 shrinks from {gap:.1f} to {left:.1f} points; S4 itself",
        f"changes by {change:+.1f}. The paper's means over the Long Range Arena: Transformer 53.6",
        "from scratch and 86.2 pretrained, S4 86.1 and 86.8.",
        source("demo"),
        "Another processor rounds otherwise, and single seeds move by about as much as their spread.",
        "Rates were chosen on validation, one seed.",
        source("demo_grid"),
    )


def steps():
    """Shares of a step, on two cores and on a GPU."""
    cpu = [row["share"] for row in load("step_time")["rows"]]
    yield from prose(
        f"Forward, backward and optimiser take {min(cpu):.1f} to {max(cpu):.1f} % of a step on two",
        "CPU cores, at the sizes of the `small` files with batches of 32 short trees.",
        source("step_time"),
    )
    names = ("step_time_gpu", "step_time_gpu_pathfinder", "step_time_gpu_pathfinder_s4")
    rows = [row for name in names for row in load(name)["rows"]]
    gpu = [row["share"] for row in rows]
    million, compiled = load("step_time_gpu_million")["rows"], load("step_time_gpu_compile")
    peak = max(row["peak_memory_gib"] for row in million)
    slow = max(row["ms"]["total"] for row in million)
    plain, fast = (
        [row["ms"]["total"] for row in compiled["rows"] if row["compile"] == on]
        for on in (False, True)
    )
    ratio = sorted(a / b for a, b in zip(plain, fast, strict=True))
    yield ""
    yield from prose(
        f"On one H100 in bfloat16 it is {min(gpu):.1f} to {max(gpu):.1f} %. A batch of 1,024 pictures",
        f"of Pathfinder-32, 1,048,576 tokens, takes the Transformer or S4 at most {slow:.0f} ms a step and {peak:.1f} GiB.",
        "`--compile` makes the Transformer of `pathfinder32-transformer-small.json`",
        f"{ratio[0]:.2f} to {ratio[-1]:.2f} times as fast.",
        source(*names, "step_time_gpu_million", "step_time_gpu_compile"),
    )


def commands():
    """One laptop command, one for a GPU, one for several, with time and result."""
    row, gpu = load("demo")["arms"]["S4, pretrained"], load("gpu_listops")["arms"]
    a = gpu["S4, from scratch"]
    head = ["command", "where", "time", "test accuracy"]
    yield from table(head, [
        ["`python pretrain.py --settings settings/lattice-s4.json`", "a laptop",
         f"{row['seconds'][0]:.0f} s", f"{row['test'][0]:.1f} %"],
        ["`python pretrain.py --settings settings/listops-s4-small.json --batch-size 64 "
         "--objective none --finetune-steps 3200 --finetune-lr 3e-3`",
         "a quarter of an H100 (four runs shared it)", f"{a['seconds'][0]:.0f} s",
         f"{a['mean']:.1f} %"],
        ["`python pretrain.py --settings settings/listops-transformer-small.json`", "one GPU",
         "not run", "not run"],
        ["`torchrun --standalone --nproc-per-node 4 pretrain.py "
         "--settings settings/listops-s4.json`", "four GPUs", "not run", "not run"],
    ])  # fmt: skip
    yield ""
    yield from prose("The first is `S4, pretrained` of the demonstration.", source("gpu_listops"))


# ------------------------------------------------------------------------------- S4, SGConv


def s4_kernel():
    d = load("s4_kernel")
    names = {
        "naive Cauchy": "naive Cauchy sums",
        "stable Cauchy": "Cauchy sums without their pole",
        "two-level": "two-level product",
    }
    cells = [c for c in d["cells"] if (c["width"], c["L"]) == (16, 16384) and c["form"] in names]
    head = ["kernel, forward + backward, D 16, N 64, L 16384", "ms", "MiB", "float32 error"]
    rows = [
        [names[c["form"]], f"{1e3 * c['seconds']:.0f}", f"{c['mib']:.0f}", f"{c['error']:.1e}"]
        for c in cells
    ]
    yield from table(head, rows)
    yield ""
    yield from prose(source("s4_kernel"))


def s4_mixer():
    d = load("s4_mixer")
    short, long = (row["mixer over"] for row in d["rows"])
    yield from prose(
        "The whole mixer (kernel, convolution, skip; D 256, N 64, batch 4, forward + backward) takes",
        f"{short['bare']:.2f} times a plain FFT convolution under autograd at L 4096 and",
        f"{long['bare']:.2f} times at 16384, and {short['own']:.2f} and {long['own']:.2f} times the",
        "convolution that it uses, whose backward is written out.",
        source("s4_mixer"),
    )


def generating():
    parts = []
    for name in ("generation", "generation_gpu"):
        d = load(name)
        s4 = statistics.median(r["S4"]["tokens_a_second"] for r in d["rows"])
        last, ms = d["rows"][-1], "ms_a_token_at_batch_1"
        batches = last["S4"]["batch"], last["Transformer"]["batch"]
        parts.append(
            f"{s4 / last['Transformer']['tokens_a_second']:.2g} times the throughput of a KV-cached "
            f"Transformer of equal size when {d['settings']['cap_gib']:g} GiB hold the states of a "
            f"batch (of {batches[0]:,} against {batches[1]:,}); one sequence alone "
            f"{last['Transformer'][ms] / last['S4'][ms]:.2g} times as fast"
        )
    yield from prose(
        f"Generating at 16k tokens of context, on one CPU core: {parts[0]}. On an H100: {parts[1]}.",
        "With short contexts S4 is the slower one. The paper reports 60 times.",
        source("generation", "generation_gpu"),
    )


def against_s4():
    a, d = load("sgconv_against_s4")["arms"], load("data_speed")
    trees = next(r for r in d["rows"] if r["task"] == "listops-tiny")["levels"]["by first token"]
    rows = [
        [f"`lattice`, {a['lattice, S4']['settings']['finetune_steps']:,} steps",
         arm(a["lattice, S4"]), arm(a["lattice, SGConv"])],
        ["`listops-tiny`, 2,000 steps (reading the root operator alone: "
         f"{100 * trees:.1f})", arm(a["listops-tiny, S4 at 3e-3"]),
         arm(a["listops-tiny, SGConv at 3e-3"])],
    ]  # fmt: skip
    yield from table(["test accuracy in %, from scratch", "S4", "SGConv"], rows)
    yield ""
    origin = made_by(load("sgconv_against_s4"))
    yield from prose(
        "Three seeds; rates and kernel sizes chosen on validation, one seed",
        "([results/listops_tiny_rates.json](results/listops_tiny_rates.json);",
        f"`benchmarks/compare.py`, two cores, {origin['date']}:",
        "[results/sgconv_against_s4.json](results/sgconv_against_s4.json) holds the command).",
    )


def mixers():
    cells = load("mixers_wall")["cells"]
    lengths = sorted({c["L"] for c in cells})
    ms = {(c["mixer"], c["L"]): f"{1e3 * c['seconds']:.0f}" for c in cells if "seconds" in c}
    names = {"bare FFT": "plain FFT convolution", "SGConv": "SGConv", "S4": "S4"}
    head = ["forward + backward, width 64, batch 1, ms", *(f"{L // 1024}k" for L in lengths)]
    rows = [[text, *(ms.get((name, L), "–") for L in lengths)] for name, text in names.items()]
    yield from table(head, rows)
    yield ""
    wide = {(c["mixer"], c["L"]): c["over bare"] for c in load("mixers_width256")["cells"]
            if "over bare" in c}  # fmt: skip
    gpu = {(c["mixer"], c["L"]): 1e3 * c["seconds"] for c in load("mixers_gpu")["cells"]}
    long = {c["mixer"]: c["cpu_seconds"] for c in load("mixers")["cells"]
            if c["forward"] and c["L"] == 2**20 and "cpu_seconds" in c}  # fmt: skip
    yield from prose(
        f"At width 256 and batch 4 SGConv takes {wide['SGConv', 4096]:.2f} times the plain",
        f"convolution at L 4096 and {wide['SGConv', 16384]:.2f} times at 16384. Forward alone it",
        f"was no faster than S4: at 1M tokens {long['SGConv']:.1f} s against {long['S4']:.1f} s.",
        "On an H100, width 256, batch 8, forward + backward:",
        f"{gpu['SGConv', 1024]:.1f} ms against {gpu['S4', 1024]:.1f} ms at 1k,",
        f"{gpu['SGConv', 4096]:.1f} against {gpu['S4', 4096]:.1f} at 4k.",
        source("mixers_wall", "mixers_width256", "mixers", "mixers_gpu"),
    )


# ------------------------------------------------------------------------------- data


def data():
    rows = {row["task"]: row for row in load("data_speed")["rows"]}
    names = {"pathfinder32": "Pathfinder 32", "pathfinder64": "Pathfinder 64"}
    names |= {"pathfinder128": "Pathfinder 128 (Path-X)", "pathfinder256": "Pathfinder 256"}
    lines = [
        [f"{name}, a picture", f"{rows[task]['ms_cpu']:.1f} ms"] for task, name in names.items()
    ]
    trees = rows["listops"]
    lines.append([f"ListOps, {trees['n']:,} trees", f"{trees['s_cpu']:.0f} s"])
    yield from table(["one core", "processor time"], lines)
    yield ""
    small, large = (100 * rows[f"pathfinder{s}"]["disks_alone"] for s in (32, 256))
    levels = trees["levels"]
    yield from prose(
        f"Without a model: ListOps {100 * levels['most frequent label']:.1f} % for the commonest",
        f"answer, {100 * levels['by first token']:.1f} % from the root operator alone; Pathfinder from",
        f"the places of the two disks alone {small:.1f} % at 32 pixels, {large:.1f} % at 256.",
        source("data_speed"),
    )


# ------------------------------------------------------------------------------- attention


def distributed():
    row = next(r for r in load("distributed")["rows"] if r["L"] == 8192)
    s, p = row["speedup"], row["parallel"]
    yield from prose(
        "8,192 tokens, 8 heads of 64, forward, two ranks of one thread, wall clock: causal",
        f"{s['causal']:.1f} times vanilla on one thread = {row['kernel']:.1f} (kernel) x",
        f"{row['mask']:.1f} (no mask written) x {row['skipping']:.1f} (masked work skipped) x",
        f"{p['causal']:.1f} (two ranks); without a mask {s['full']:.1f} = {row['kernel']:.1f} x",
        f"{p['full']:.1f}. Most of such a factor is the kernel, not the ranks.",
        source("distributed"),
    )
    both = load("distributed_training")["rows"][0]["parallel"]
    yield ""
    yield from prose(
        "Forward + backward at 16,384 tokens, two ranks of one thread against one thread with the",
        f"fused kernel: {both['full']:.2f} times without a mask, {both['causal']:.2f} times causal",
        "(two rounds, the better one).",
        source("distributed_training"),
    )
    memory = load("distributed_memory")["rows"][0]
    yield ""
    yield from prose(
        f"One head at 262,144 tokens: a rank peaks at {memory['peak'] / 1e6:.0f} MB; vanilla would",
        f"need {memory['vanilla'] / 1e9:.0f} GB.",
        source("distributed_memory"),
    )
    yield ""
    for name, where in (("distributed_million_gpu", "one H100 that two ranks share"),
                        ("distributed_million", "two CPU cores")):  # fmt: skip
        if (ROOT / f"results/{name}.json").exists():
            run = load(name)["rows"][0]
            yield from prose(
                f"One head at 1,048,576 causal tokens, {where}: {run['wall']:.1f} s, rows checked",
                f"against float64 wrong by at most {run['error']:.1e}.",
                source(name),
            )


# ------------------------------------------------------------------------------- structured FFNs


def byte_lm():
    rows = load("byte_lm")["summary"]
    lines = [
        [
            name,
            f"{r['params']:,}",
            f"{r['flops_over_dense']:.3f}",
            f"{r['loss']:.4f} ± {r['sd']:.4f}",
        ]
        for name, r in rows.items()
    ]
    yield from table(["", "parameters", "FLOPs / dense", "held-out loss, nats a byte"], lines)
    yield ""
    yield from prose("Three seeds, one learning rate for all.", source("byte_lm"))


def ffn_training():
    text, _ = claims.judges.steeper(load("ffn_scaling"))
    yield from prose(
        f"Over four widths, three seeds, the {text}: no steeper than dense here.",
        source("ffn_scaling"),
    )
    best = {
        teacher: {way: row["best"] for way, row in arms.items()}
        for teacher, arms in load("self_guided")["means"].items()
    }
    low, grid = best["LowRank R 16"], best["BlockShuffle 4 x 4"]
    dense = best["dense, LowRank R 16 student"]
    yield ""
    yield from prose(
        "Self-guided training helps where the factors can equal what they are fitted to. Fitting a",
        f"random LowRank network it ends with the error {low['self-guided']:.3f} against",
        f"{low['plain']:.3f} plain, fitting a BlockShuffle one with {grid['self-guided']:.3f} against",
        f"{grid['plain']:.3f}; the stochastic form gains less ({low['stochastic']:.3f},",
        f"{grid['stochastic']:.3f}), and a dense teacher leaves nothing to gain",
        f"({dense['self-guided']:.3f} against {dense['plain']:.3f}, one rate). Three seeds; the best",
        "rate of four, which for most arms was the largest.",
        source("self_guided"),
    )
    s = {
        name: f"{r['loss']:.3f} ± {r['sd']:.3f}"
        for name, r in load("byte_lm_guided")["summary"].items()
    }
    yield ""
    yield from prose(
        "On the language model it does not pay at equal FLOPs here: LowRank ends at",
        f"{s['LowRank, self-guided']} self-guided and at {s['LowRank, longer']} trained plainly for",
        f"longer instead, BlockShuffle at {s['BlockShuffle, self-guided']} and",
        f"{s['BlockShuffle, longer']}, dense at {s['dense']}; three seeds, 500 steps of dense's FLOPs.",
        source("byte_lm_guided"),
    )


def ffn_layer():
    here, there = (load(name) for name in ("ffn_latency", "ffn_latency_epyc"))
    a, b = (where(made_by(d)).split()[-1] for d in (here, there))
    head, columns = ["share of an FFN's weights", "FLOPs / dense"], []
    for key, text in {
        "forward, 2048": "forward, 2,048 tokens",
        "forward + backward, 1024": "forward + backward, 1,024 tokens",
    }.items():
        head += [f"{text} ({a})", f"the same, huge pages ({a})", f"the same ({b})"]
        columns += [
            d["layer"][k] for d, k in ((here, key), (here, f"{key}, huge pages"), (there, key))
        ]
    lines, ceiling = [], []
    for ratio in ("0.625", "0.3125"):
        for kind in KINDS:
            name = f"{kind} {ratio}"
            cells = [column[name] for column in columns]
            ceiling += [cell["ceiling"] for cell in cells]
            share = f"{100 * float(ratio):.0f} %"
            row = [f"{kind}, {share}", f"{cells[0]['share']:.2f}"]
            lines.append(row + [f"{cell['efficiency']:.2f}" for cell in cells])
    yield from table(head, lines)
    ffn = load("ffn_latency")["ffn"]
    one = ", ".join(f"{ffn['1024, 1'][f'{kind} speed']:.1f} ({kind})" for kind in KINDS)
    least = min(cell[f"{kind} speed"] for cell in ffn.values() for kind in KINDS)
    yield ""
    yield from prose(
        f"The best of eight rounds. The matrix products alone reach {min(ceiling):.2f} to",
        f"{max(ceiling):.2f}; the rest is memory: the bias, the regrouping, and a result of 32 MiB,",
        "taken from the system anew in every call. That costs dense and structured alike, and weighs",
        "the more the faster the arithmetic is; `THP_MEM_ALLOC_ENABLE=1`, by which torch asks Linux",
        'for pages of 2 MiB ("huge pages"), saves most of it.',
        f"A whole FFN of width 1024 serves one token {one} times as fast as",
        f"dense; the least of all widths and numbers of tokens is {least:.2f}.",
        claims.judges.merging(load("ffn_latency"))[0].capitalize() + ".",
        source("ffn_latency", "ffn_latency_epyc"),
    )


def ffn_gpu():
    d = load("ffn_latency_gpu")
    lines = []
    for key in ("1024, 30720", "2048, 30720", "5120, 1", "5120, 256", "5120, 2048", "5120, 30720"):
        row, (width, tokens) = d["ffn"][key], key.split(", ")
        speed = [f"{row[f'{kind} speed']:.2f}" for kind in KINDS]
        lines.append([width, f"{int(tokens):,}", f"{row['dense']:.2f}", *speed])
    yield from table(["width", "tokens", "dense, ms", *KINDS], lines)
    yield ""
    yield from prose(
        "A whole FFN at 31 % of the weights on an H100 in bfloat16, times as fast as dense (paper, A100,",
        "width 5120, 30k tokens: 2.6, 2.6, 2.0). Few tokens are calls, not arithmetic: their times vary",
        "up to twofold from run to run, and there the merged form serves:",
        f"{claims.judges.merging(d)[0]}.",
        source("ffn_latency_gpu"),
    )


# ------------------------------------------------------------------------------- the claims


def template():
    d = load("token_mixing")
    ranks = {m["mixer"]: m["off-diagonal rank"] for m in d["mixers"]}
    yield from prose(
        "The state of S4 shows as the rank of any block off the diagonal",
        f"({ranks['S4']} of S4, {ranks['S4D']} of S4D, whose `d_state` is {d['settings']['N']}),",
        "convolutions as Toeplitz matrices, and attention alone with the MLP mixer changes with its",
        "input.",
        source("token_mixing"),
    )


def claims_table():
    yield from claims.table(load("claims"))


BLOCKS = {"claims": claims_table} | {
    f.__name__.replace("_", "-"): f
    for f in (demo, seeds, steps, commands, s4_kernel, s4_mixer, generating, against_s4, mixers,
              data, distributed, byte_lm, ffn_training, ffn_layer, ffn_gpu, template)
}  # fmt: skip


def written(text):
    """README's text with every block as its files say.  ValueError: a block without a function."""

    def new(match):
        if match[1] not in BLOCKS:
            raise ValueError(f"README.md has a block {match[1]!r}, which no function makes")
        lines = "\n".join(BLOCKS[match[1]]())
        return f"<!-- {match[1]} -->\n{lines}\n<!-- /{match[1]} -->"

    return BLOCK.sub(new, text)


def rewrite():
    README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing, compare")
    args = parser.parse_args()
    old = README.read_text(encoding="utf-8")
    if args.check:
        sys.exit("README.md is not what results/ says" if old != written(old) else 0)
    rewrite()


if __name__ == "__main__":
    main()
