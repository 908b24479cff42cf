"""The papers' claims beside what was measured here: one table, one command a row.

    python benchmarks/claims.py --list             the rows, how each is measured, its verdict
    python benchmarks/claims.py wide-structured    measure one row anew and judge it
    python benchmarks/claims.py --all              every laptop row whose result file is missing
    python benchmarks/claims.py --table            judge the files in results/, write README's table

Each row names the command that writes a file into results/ and a function that reads that file and
says what came out: "holds", "holds in part", "does not hold here" or "not run". Verdicts go into
results/claims.json, from which the README's table is written.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from measured import ROOT, provenance, save

HOLDS, PART, NOT, UNRUN = "holds", "holds in part", "does not hold here", "not run"
README = re.compile(r"(<!-- claims -->\n).*?(<!-- /claims -->)", re.S)


@dataclass(frozen=True)
class Claim:
    """A row: what a paper says, its number, the command, the file it writes, who judges the file.

    judge: content of the file -> (our number in words, verdict).  None: not run.  why: the reason,
    as far as it was found, shown where the claim does not simply hold.
    """

    name: str
    paper: str
    says: str
    theirs: str
    command: str
    file: str = ""
    judge: Callable | None = None
    why: str = ""
    scale: str = "laptop"


def verdict(full, part=True):
    return HOLDS if full else PART if part else NOT


# ------------------------------------------------------------ judges: content of a file -> words


def arm(row):
    """Mean and, of several seeds, spread."""
    return f"{row['mean']:.1f}" + (f" ± {row['spread']:.1f}" if row["spread"] is not None else "")


def gap_closes(d):
    a = d["arms"]
    before = a["S4-scratch"]["mean"] - a["Transformer-scratch"]["mean"]
    after = a["S4-scratch"]["mean"] - a["Transformer-masked"]["mean"]
    text = (
        f"Transformer {arm(a['Transformer-scratch'])} from scratch, "
        f"{arm(a['Transformer-masked'])} pretrained; S4 {arm(a['S4-scratch'])} from scratch"
    )
    return text, verdict(after < 0.25 * before, after < 0.75 * before)


def listops_gap(d):
    a = d["arms"]
    text = ", ".join(f"{name} {arm(row)}" for name, row in a.items())
    before, after = (a[f"Transformer, {way}"]["mean"] for way in ("from scratch", "pretrained"))
    target = a["S4, from scratch"]["mean"]
    return text, verdict(target - after < 0.25 * (target - before), after > before + 0.5)


def causal_too(d):
    a = d["arms"]
    gain = {
        name: a[f"{name}-causal"]["mean"] - a[f"{name}-scratch"]["mean"]
        for name in ("Transformer", "S4", "SGConv", "diagonal")
    }
    text = ", ".join(f"{name} {value:+.1f}" for name, value in gain.items())
    good = [value > 1 for value in gain.values()]
    return "points against from scratch: " + text, verdict(all(good), good[0])


def all_gain(d):
    a = d["arms"]
    names = ("S4", "SGConv", "diagonal")
    gain = {n: a[f"{n}-masked"]["mean"] - a[f"{n}-scratch"]["mean"] for n in names}
    sure = [
        v > max(a[f"{n}-{w}"]["spread"] for w in ("masked", "scratch")) for n, v in gain.items()
    ]
    text = ", ".join(f"{name} {value:+.1f}" for name, value in gain.items())
    return text + " points", verdict(all(sure), any(sure))


def redundant(d):
    a = d["arms"]
    gaps = [a[f"S4-{way}"]["mean"] - a[f"diagonal-{way}"]["mean"] for way in ("scratch", "masked")]
    text = (
        f"plain recurrence {arm(a['diagonal-scratch'])} from scratch, {arm(a['diagonal-masked'])} "
        f"pretrained; S4 {arm(a['S4-scratch'])}, {arm(a['S4-masked'])}"
    )
    if gaps[0] < 1:
        return text + ": no gap even from scratch", PART
    return text, verdict(gaps[1] < 1, gaps[1] < gaps[0])


def random_start(d):
    a = d["arms"]
    scratch, after = a["S4 at random, from scratch"], a["S4 at random, pretrained"]
    text = f"S4 from random numbers: {arm(scratch)} from scratch, {arm(after)} pretrained"
    return text, verdict(after["mean"] - scratch["mean"] > 2, after["mean"] > scratch["mean"])


def modest_share(d):
    a = {name: row["mean"] for name, row in d["arms"].items()}
    text = ", ".join(f"{name}: {mean:.1f}" for name, mean in a.items())
    return text, verdict(a["25 %"] > a["0 %"] + 1, max(a.values()) > a["0 %"] + 1)


def few_labels(d):
    a, text, gains = d["arms"], [], []
    for n in (100, 400, 1000):
        scratch, after = (a[f"{n} labels, {way}"] for way in ("from scratch", "pretrained"))
        text.append(f"{n}: {scratch['mean']:.1f} -> {after['mean']:.1f}")
        gains.append(after["mean"] - scratch["mean"])
    return "labels " + ", ".join(text), verdict(min(gains) > 1, max(gains) > 1)


def kernel_cost(d):
    cells = {(c["form"], c["width"], c["L"]): c for c in d["cells"]}
    fast = [cells["two-level", 16, L] for L in (1024, 65536)]
    ratio = cells["naive Cauchy", 16, 16384]["seconds"] / cells["two-level", 16, 16384]["seconds"]
    growth = fast[1]["seconds"] / fast[0]["seconds"]
    text = (
        f"64 times the length costs {growth:.1f} times the time; {ratio:.0f} times faster than "
        f"plain Cauchy sums at 16k; error {max(c['error'] for c in fast):.1e} in float32"
    )
    return text, verdict(growth < 64 * 1.3, growth < 64 * 4)


def generation(d):
    rates = {
        r["context"]: r["S4"]["tokens_a_second"] / r["Transformer"]["tokens_a_second"]
        for r in d["rows"]
    }
    text = ", ".join(f"{v:.2g} times at {n // 1024}k" for n, v in rates.items())
    return text, verdict(max(rates.values()) > 50, max(rates.values()) > 1.2)


def sgconv_faster(d):
    run = {}
    for c in d["cells"]:
        if not c["forward"] and "seconds" in c:
            run[c["mixer"], c["L"]] = c["seconds"]
    ratio = {L: run["S4", L] / t for (name, L), t in sorted(run.items()) if name == "SGConv"}
    text = ", ".join(f"{v:.1f} at {L // 1024}k" for L, v in ratio.items())
    good = [v > 1.05 for v in ratio.values()]
    return f"time of S4 / time of SGConv: {text}", verdict(all(good), any(good))


def sgconv_better(d):
    a, text, better = d["arms"], [], []
    for task, s4, sg in (
        ("lattice", "lattice, S4", "lattice, SGConv"),
        ("listops-tiny", "listops-tiny, S4 at 3e-3", "listops-tiny, SGConv at 3e-3"),
    ):
        text.append(f"{task}: {arm(a[sg])} against {arm(a[s4])}")
        better.append(a[sg]["mean"] > a[s4]["mean"])
    return "; ".join(text), verdict(all(better), any(better))


def wide_structured(d):
    loss = {}
    for r in d["runs"]:
        loss.setdefault(r["arm"], []).append(r["loss"])
    mean = {name: np.mean(v) for name, v in loss.items()}
    names = ("dense", "wide LowRank", "wide BlockShuffle")
    text = ", ".join(f"{n} {mean[n]:.4f} ± {np.std(loss[n], ddof=1):.4f}" for n in names)
    better = [mean[n] < mean["dense"] for n in names[1:]]
    return text + " nats a byte, equal FLOPs", verdict(all(better), any(better))


def recall(d):
    rows = {(r["L"], r["model"], r["budget"]): r for r in d["rows"]}
    text, gaps = [], []
    for L in (1024, 16384):
        s4, other = (rows[L, model, "seconds"] for model in ("S4", "Transformer"))
        text.append(f"{L // 1024}k: S4 {s4['mean']:.0%}, Transformer {other['mean']:.0%}")
        gaps.append(s4["mean"] - other["mean"])
    equal = rows.get((1024, "Transformer", "steps"))
    text.append(f"given S4's steps at 1k: {equal['mean']:.0%}" if equal else "")
    return "equal seconds, " + "; ".join(filter(None, text)), verdict(
        min(gaps) > 0.1, max(gaps) > 0
    )


def both_principles(d):
    mean = {name: row["mean"] for name, row in d["arms"].items()}
    text = ", ".join(f"{name} {arm(row)}" for name, row in d["arms"].items())
    decay = mean["as published"] > mean["without decay"]
    few = (
        mean["as published"] > mean["dense"] and mean["as published"] > mean["dense, without decay"]
    )
    return text, verdict(decay and few, decay or few)


def ffn_speed(d):
    one = {k.removesuffix(" speed"): v for k, v in d["ffn"]["1024, 1"].items() if "speed" in k}
    names = ("lowrank", "blockdense", "blockshuffle")
    text = ", ".join(f"{name} {one[name]:.1f}" for name in names)
    good = [one[name] > 1.5 for name in names]
    return f"one token, width 1024, 31 % of the weights: {text} times", verdict(
        all(good), any(good)
    )


def ffn_speed_gpu(d):
    large = d["ffn"]["5120, 30720"]
    names = ("lowrank", "blockdense", "blockshuffle")
    text = ", ".join(f"{name} {large[f'{name} speed']:.1f}" for name in names)
    good = [
        large[f"{name} speed"] > 0.95 * v for name, v in zip(names, (2.6, 2.6, 2.0), strict=True)
    ]
    text = f"width 5120, 30,720 tokens, {d['dtype']}, 31 % of the weights: {text} times"
    return text, verdict(all(good), any(good))


def merging(d):
    most = {width: max(n for _, n in t.values()) for width, t in d["thresholds"].items()}
    text = ", ".join(f"{n} at width {width}" for width, n in most.items())
    return f"merged is faster up to so many tokens: {text}", verdict(
        min(most.values()) > 0, any(most.values())
    )


def self_guided(d):
    text, better = [], []
    for kind in ("LowRank R 16", "BlockShuffle 4 x 4"):
        plain, guided = (d["means"][kind][way]["best"] for way in ("plain", "self-guided"))
        text.append(f"{kind}: error {plain:.3f} plain, {guided:.3f} guided")
        better.append(guided < 0.95 * plain)
    return "teacher and student, " + "; ".join(text), verdict(all(better), any(better))


def guided_language(d):
    text, better = [], []
    for kind in ("LowRank", "BlockShuffle"):
        plain, guided = (
            d["summary"][f"{kind}, {way}"]["loss"] for way in ("longer", "self-guided")
        )
        text.append(f"{kind} {plain:.3f} plain for longer, {guided:.3f} guided")
        better.append(guided < plain - 0.005)
    return "; ".join(text) + " nats a byte", verdict(all(better), any(better))


def steeper(d):
    powers = d["powers"]
    text = ", ".join(f"{name} -{power:.3f}" for name, power in powers.items())
    better = [powers[n] > 1.1 * powers["dense"] for n in ("lowrank", "blockshuffle")]
    return "loss falls with FLOPs to the power " + text, verdict(all(better), any(better))


def longer_context(d):
    loss = {c: [r["loss"][i] for r in d["runs"]] for i, c in enumerate(d["contexts"])}
    mean = {c: float(np.mean(v)) for c, v in loss.items()}
    text = ", ".join(f"{c}: {mean[c]:.2f}" for c in (1, 16, 64, 256, 512))
    good = [mean[b] < mean[a] for a, b in zip(d["contexts"], d["contexts"][1:], strict=False)]
    return f"nats a byte by context, {text}", verdict(all(good), sum(good) > 5)


def million(d):
    row = d["rows"][0]
    tokens = row["setting"].split(" tokens")[0]
    text = f"{tokens} causal tokens, one head, {d['world']} ranks: {row['wall']:.1f} s"
    return text + f", sampled rows wrong by {row['error']:.1e}", verdict(row["error"] < 1e-5, False)


def parallel_attention(d):
    row = next(r for r in d["rows"] if r["L"] == 8192)
    text = (
        f"8,192 causal tokens, two ranks: {row['speedup']['causal']:.1f} times = kernel "
        f"{row['kernel']:.1f} x no mask {row['mask']:.1f} x skipping {row['skipping']:.1f} x "
        f"ranks {row['parallel']['causal']:.1f}"
    )
    return text, verdict(row["speedup"]["causal"] >= 40, row["speedup"]["causal"] > 2)


def one_template(d):
    error = max(m["error of M v"] for m in d["mixers"])
    text = f"six mixers are y = M(x) v, error at most {error:.0e}"
    return text, verdict(error < 1e-10, False)


def tests_pass(d):
    return f"{d['passed']} tests pass, {d['failed']} fail", verdict(not d["failed"], False)


# --------------------------------------------------------------------------------- the rows

PRETRAINING = "python benchmarks/pretraining.py "
# name, task, flags of the model, steps, steps between validations, rate
AGAINST = (
    ("lattice, S4", "lattice", "s4 --d-state 16", 1600, 200, "1e-3"),
    ("lattice, SGConv", "lattice", "sgconv --kernel-dim 16", 1600, 200, "1e-3"),
    ("listops-tiny, S4 at 3e-3", "listops-tiny", "s4 --d-state 16", 2000, 500, "3e-3"),
    ("listops-tiny, SGConv at 3e-3", "listops-tiny", "sgconv --kernel-dim 4", 2000, 500, "3e-3"),
)
AGAINST_S4 = "python benchmarks/compare.py --name sgconv_against_s4 --seeds 0 1 2 --workers 2"
AGAINST_S4 += "".join(
    f" --arm '{name}: --task {task} --model {model} --finetune-steps {steps} --eval-every {every} "
    f"--finetune-lr {rate} --objective none --batch-size 32'"
    for name, task, model, steps, every, rate in AGAINST
)
LISTOPS_GPU = "python benchmarks/compare.py --name gpu_listops --seeds 0 --workers 4"
for name, settings, rate in (
    ("Transformer", "transformer-small.json --batch-size 64", "5e-4"),
    ("S4", "s4-small.json --batch-size 64 --pretrain-batch-size 64", "3e-3"),
):
    flags = f"--settings settings/listops-{settings} --eval-every 400"
    first = (
        "--pretrain-lr 3e-3 " if name == "S4" else ""
    )  # the Transformer's stands in its settings
    LISTOPS_GPU += (
        f" --arm '{name}, from scratch: {flags} --objective none --finetune-steps 3200 "
        f"--finetune-lr {rate}' --arm '{name}, pretrained: {flags} --pretrain-steps 1200 "
        f"--finetune-steps 2000 {first}--finetune-lr {rate}'"
    )
FFN_GPU = (
    "python benchmarks/ffn_latency.py --device cuda --dtype bfloat16 --widths 1024 2048 5120 "
    "--tokens 1 16 256 2048 30720 --out results/ffn_latency_gpu.json"
)
CLAIMS = [
    Claim(
        "scratch-gap", "2310.02980",
        "pretrained on the task's own data, a Transformer matches S4",
        "LRA mean 53.6 -> 86.2, S4 86.1",
        PRETRAINING + "objectives", "pretraining_objectives.json", gap_closes,
        why="The largest rate of the grid was best, so more may be left",
    ),
    Claim(
        "listops-gap", "2310.02980", "the same on ListOps (here: below 128 tokens)",
        "Transformer 47.9 -> 61.5, S4 59.6 (unverified)",
        PRETRAINING + "listops", "pretraining_listops.json", listops_gap,
        why="No gap at this size and length; steps spent on pretraining are missed by fine-tuning",
    ),
    Claim(
        "listops-gpu", "2310.02980", "the same on ListOps at its published length",
        "Transformer 47.9 -> 61.5, S4 59.6 (unverified)",
        LISTOPS_GPU, "gpu_listops.json", listops_gap,
        why="Two epochs in 390 s of a GPU that the arms shared: none is far past what the root "
        "operator alone gives away (35.9 %)", scale="one GPU",
    ),
    Claim(
        "causal", "2310.02980", "causal denoising does it too", "LRA mean 81.8, masked 81.3",
        PRETRAINING + "objectives", "pretraining_objectives.json", causal_too,
        why="The convolutions start so near the best reached here that nothing is left to gain",
    ),
    Claim(
        "all-gain", "2310.02980", "other architectures gain as well", "S4 86.1 -> 86.8",
        PRETRAINING + "objectives", "pretraining_objectives.json", all_gain,
        why="From scratch they already reach the best that was seen on this task",
    ),
    Claim(
        "redundant", "2310.02980", "structured parameterisation becomes redundant",
        "plain recurrence 77 -> 83.4, S4 82.8 -> 84.5 (four tasks)",
        PRETRAINING + "objectives", "pretraining_objectives.json", redundant,
        why="Phases spread evenly do as well as HiPPO's here, numbers at random do not",
    ),
    Claim(
        "random-init", "2310.02980", "pretraining repairs a start from random numbers", "",
        PRETRAINING + "init", "pretraining_init.json", random_start,
        why="Seeds differ widely; SSM parameters learn at most at 1e-3 and start far off",
    ),
    Claim(
        "share", "2310.02980", "a modest share of the compute suffices", "curves",
        PRETRAINING + "share", "pretraining_share.json", modest_share,
    ),
    Claim(
        "labels", "2310.02980", "it helps most when labels are few", "up to about 30 %",
        PRETRAINING + "labels --seeds 0 1", "pretraining_labels.json", few_labels,
    ),
    Claim(
        "lra", "2310.02980", "the Long Range Arena itself, PathX-256", "86.2; 67.8 -> 87.1",
        "python pretrain.py --settings settings/listops-transformer.json",
        why="days of one GPU, and data that are not generated", scale="paper",
    ),
    Claim(
        "kernel-cost", "2111.00396", "the kernel costs O(N + L) up to logarithms, stably", "bound",
        "python benchmarks/s4_kernel.py --clock cpu --threads 1 --rounds 2",
        "s4_kernel.json", kernel_cost,
    ),
    Claim(
        "generation", "2111.00396", "generates faster than a Transformer", "60 times (GPU)",
        "python benchmarks/generation.py --contexts 1024 2048 4096 8192 16384 --clock cpu "
        "--threads 1 --budget 0.4 --max-batch 256",
        "generation.json", generation,
        why="S4 pays for 16 blocks of small operations a token, attention for its cache",
    ),
    Claim(
        "generation-gpu", "2111.00396", "the same on a GPU", "60 times",
        "python benchmarks/generation.py --device cuda --contexts 1024 4096 16384 --cap-gib 16 "
        "--max-batch 16384 --budget 0.3 --out results/generation_gpu.json",
        "generation_gpu.json", generation,
        why="16 GiB for either model's states, float32; the factor grows with the context",
        scale="one GPU",
    ),
    Claim(
        "recall", "2111.00396", "remembers over 16k steps what a Transformer does not",
        "Path-X: 88 to 96 %, Transformers fail",
        "python benchmarks/recall.py --lengths 1024 16384 --extra", "recall.json", recall,
    ),
    Claim(
        "cifar", "2111.00396", "sequential CIFAR-10 without augmentation; Path-X",
        "91 %; 88 to 96 %", "python pretrain.py --settings settings/scifar-s4.json",
        why="the data are not generated; hours of one GPU", scale="one GPU",
    ),
    Claim(
        "sgconv-faster", "2210.09298", "faster than S4", "curves",
        "python benchmarks/mixers.py --mixers 'bare FFT' SGConv S4 --rounds 3 "
        "--out results/mixers_wall.json", "mixers_wall.json", sgconv_faster,
    ),
    Claim(
        "sgconv-faster-gpu", "2210.09298", "the same on a GPU", "curves",
        "python benchmarks/mixers.py --device cuda --width 256 --batch 8 --lengths 1024 4096 "
        "--mixers 'bare FFT' SGConv S4D S4 'attention fused' --max-gib 40 "
        "--out results/mixers_gpu.json", "mixers_gpu.json", sgconv_faster, scale="one GPU",
    ),
    Claim(
        "sgconv-better", "2210.09298", "better than S4", "LRA mean 87.2 against 86.1",
        AGAINST_S4, "sgconv_against_s4.json", sgconv_better,
        why="The two differ by about their spread",
    ),
    Claim(
        "sgconv-principles", "2210.09298", "decay and few parameters are both needed", "ablations",
        "python benchmarks/sgconv_ablation.py", "sgconv_ablation.json", both_principles,
        why="64 positions are short: a dense kernel is no burden (not tested further)",
    ),
    Claim(
        "ffn-speed", "2406.16450", "structured FFNs run faster", "2.6 times with 32 % (GPU)",
        "python benchmarks/ffn_latency.py", "ffn_latency.json", ffn_speed,
    ),
    Claim(
        "pre-merge", "2406.16450", "merged weights decode few tokens faster",
        "online decoding, GPU",
        "python benchmarks/ffn_latency.py", "ffn_latency.json", merging,
        why="One token reads all weights, and the merged matrix has three times as many",
    ),
    Claim(
        "ffn-speed-gpu", "2406.16450", "structured FFNs run faster on a GPU",
        "2.6, 2.6, 2.0 times at width 5120 with 32 %", FFN_GPU, "ffn_latency_gpu.json",
        ffn_speed_gpu, scale="one GPU",
    ),
    Claim(
        "pre-merge-gpu", "2406.16450", "merged weights decode few tokens faster on a GPU",
        "online decoding", FFN_GPU, "ffn_latency_gpu.json", merging, scale="one GPU",
    ),
    Claim(
        "self-guided", "2406.16450", "self-guided training repairs the start",
        "perplexity gap 1.0 -> 0.4", "python benchmarks/self_guided.py --steps 1000 --seeds 3",
        "self_guided.json", self_guided,
    ),
    Claim(
        "self-guided-language", "2406.16450", "and pays for itself on language, at equal FLOPs",
        "same", "python benchmarks/byte_lm.py --guided --steps 500", "byte_lm_guided.json",
        guided_language,
        why="500 steps of dense's FLOPs: half of them pass under the guide, which leaves little",
    ),
    Claim(
        "scaling", "2406.16450", "loss falls more steeply with FLOPs than dense", "curves",
        "python benchmarks/ffn_scaling.py --bytes-a-weight 4 --seeds 3", "ffn_scaling.json",
        steeper, why="Four widths between 32 and 80, 4 bytes a weight: far from the paper's scale",
    ),
    Claim(
        "wide-structured", "2406.16450", "wide and structured beats dense at equal FLOPs",
        "perplexity 17.89 against 18.23", "python benchmarks/byte_lm.py", "byte_lm.json",
        wide_structured,
        why="LowRank is the paper's best kind and not ours",
    ),
    Claim(
        "distributed", "2302.06218", "distributed attention against vanilla",
        "almost 40 times, 4 GPUs",
        "torchrun --standalone --nproc-per-node 2 benchmarks/distributed.py --rounds 2 "
        "--memory-limit 7", "distributed.json", parallel_attention,
        why="Two CPU ranks, not four GPUs",
    ),
    Claim(
        "million", "2302.06218", "million-scale dependencies", "abstract",
        "torchrun --standalone --nproc-per-node 2 benchmarks/distributed.py --tokens 1048576 "
        "--heads 1 --timeout 14400 --name distributed_million", "distributed_million.json", million,
    ),
    Claim(
        "million-gpu", "2302.06218", "the same on one GPU that two ranks share", "abstract",
        "torchrun --standalone --nproc-per-node 2 benchmarks/distributed.py --tokens 1048576 "
        "--heads 1 --device cuda --name distributed_million_gpu", "distributed_million_gpu.json",
        million, scale="one GPU",
    ),
    Claim(
        "context", "2302.06218", "longer context performs better, depending on the application",
        "abstract", "python benchmarks/context.py", "context.json", longer_context,
        why="At 512 the model is trained too lightly to gain",
    ),
    Claim(
        "template", "2302.06218", "long-sequence models share one template of token mixing", "",
        "python benchmarks/token_mixing.py", "token_mixing.json", one_template,
    ),
    Claim(
        "sequence-parallel", "beyond", "S4 and SGConv train on sequences split over ranks, exactly",
        "", "python -m pytest tests/test_sequence_parallel.py", "claims_sequence_parallel.json",
        tests_pass,
    ),
    Claim(
        "exact-gradients", "beyond", "distributed gradients are those of one process", "",
        "python -m pytest tests/test_dist_attention.py", "claims_exact_gradients.json",
        tests_pass,
    ),
    Claim(
        "resume", "beyond", "kill -9 at any moment changes no bit of a run", "",
        "python -m pytest tests/test_pretrain.py -k kills", "claims_resume.json", tests_pass,
    ),
]  # fmt: skip


# ------------------------------------------------------------------------ measure, judge, show


def measure(claim):
    """Run the command of a row; a test run leaves its counts in the row's file."""
    print(f"{claim.name}: {claim.command}", flush=True)
    words, start = shlex.split(claim.command), time.time()
    torchrun = [sys.executable, "-m", "torch.distributed.run"]  # also where no venv is activated
    words[:1] = {"python": [sys.executable], "torchrun": torchrun}[words[0]]
    if "pytest" not in words:
        subprocess.run(words, cwd=ROOT, check=True)
        return
    origin = provenance()
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-500:])
    count = {k: sum(map(int, re.findall(rf"(\d+) {k}", done.stdout))) for k in ("passed", "failed")}
    content = origin | count | {"command": claim.command, "seconds": round(time.time() - start)}
    save(ROOT / "results" / claim.file, content)


def spent(content):
    """Processor or wall minutes of the runs in a file, where it says so."""
    arms = content.get("arms", {})
    seconds = [t for row in arms.values() for t in row.get("seconds", [])]
    seconds += [run.get("cpu_s", 0) for run in content.get("runs", [])]
    return round((sum(seconds) or content.get("seconds") or 0) / 60, 1) or None


def judge(claim):
    """A row with what its file says."""
    row = {k: getattr(claim, k) for k in ("paper", "says", "theirs", "scale", "command", "file")}
    path = ROOT / "results" / claim.file
    if not claim.file or not path.exists():
        return row | {"ours": claim.why, "verdict": UNRUN}
    content = json.loads(path.read_text())
    ours, result = claim.judge(content)
    meta = {k: content.get(k) for k in ("seeds", "date", "commit", "hardware", "cpu", "torch")}
    meta = {k: v for k, v in meta.items() if v is not None}
    runs = {run.get("seed") for run in content.get("runs", [])} - {None}
    if runs and "seeds" not in meta:
        meta["seeds"] = sorted(runs)
    if claim.scale == "one GPU":
        made_by = content if "hardware" in content else content["cells"][0]["run"]
        ours = f"{made_by['hardware'].split(', ')[-1]}: {ours}"
    ours += f". {claim.why}" if result != HOLDS and claim.why else ""
    return row | {"ours": ours, "verdict": result, "minutes": spent(content)} | meta


def table(rows):
    """Lines of the README's table."""
    yield "| claim | the paper | here | seeds, minutes | verdict | row |"
    yield "|---|---|---|---|---|---|"
    for name, r in rows.items():
        effort = [len(r["seeds"])] if r.get("seeds") else []
        effort += [f"{r['minutes']:.0f} min"] if (r.get("minutes") or 0) >= 1 else []
        yield (
            f"| {r['says']} ({r['paper']}) | {r['theirs'] or '–'} | {r['ours']} | "
            f"{', '.join(map(str, effort)) or '–'} | {r['verdict']} | `{name}` |"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="rows to measure anew")
    parser.add_argument("--all", action="store_true", help="measure what has no result file yet")
    parser.add_argument("--list", action="store_true", help="show the rows and their commands")
    parser.add_argument("--table", action="store_true", help="write README's table")
    args = parser.parse_args()
    known = {claim.name: claim for claim in CLAIMS}
    if unknown := set(args.names) - known.keys():
        parser.error(f"no row is called {', '.join(unknown)}; there are {', '.join(known)}")
    if not (args.names or args.all or args.list or args.table):
        parser.error("expected the name of a row, --all, --list or --table")
    todo = [known[name] for name in args.names]
    if args.all:
        todo += [c for c in CLAIMS if c.file and not (ROOT / "results" / c.file).exists()]
    for claim in todo:
        if claim.file and (
            claim.name in args.names or not (ROOT / "results" / claim.file).exists()
        ):
            measure(claim)
    rows = {claim.name: judge(claim) for claim in CLAIMS}
    for name in known if args.list else [c.name for c in todo]:
        print(
            f"{name:18}{rows[name]['verdict']:20}{rows[name]['ours']}\n{'':18}{rows[name]['command']}"
        )
    if args.table or todo:
        save(ROOT / "results/claims.json", rows)
        text = (ROOT / "README.md").read_text(encoding="utf-8")
        lines = "\n".join(table(rows)) + "\n"
        new = README.sub(lambda m: m[1] + lines + m[2], text)
        (ROOT / "README.md").write_text(new, encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"claims.py: {shlex.join(map(str, error.cmd))} ended with {error.returncode}")
