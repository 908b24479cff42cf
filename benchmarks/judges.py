"""Judges: content of a results file -> (our numbers in words, verdict).

The rules were fixed before the numbers: a difference between two arms counts when it exceeds two
standard errors of the means over seeds (`differs`); what the seeds cannot tell is called "cannot
tell".  An arm is a dict: "test" (one number per seed), "mean", "spread" (standard deviation or
None).
"""

import math
import statistics

import numpy as np
from measured import select

HOLDS = "holds"
PART = "holds in part"
NOT = "does not hold here"
OPEN = "cannot tell"
UNRUN = "not run"
KINDS = ("lowrank", "blockdense", "blockshuffle")


def verdict(full, part=False):
    if full:
        return HOLDS
    return PART if part else NOT


def arm(row, digits=1):
    """Mean, and standard deviation if there are several seeds."""
    text = f"{row['mean']:.{digits}f}"
    if row["spread"] is not None:
        text += f" ± {row['spread']:.{digits}f}"
    return text


def listed(arms, digits=1):
    return ", ".join(f"{name} {arm(row, digits)}" for name, row in arms.items())


def values(numbers):
    """An arm from one number per seed."""
    spread = statistics.stdev(numbers) if len(numbers) > 1 else None
    return {"test": numbers, "mean": statistics.fmean(numbers), "spread": spread}


def differs(a, b):
    """+1 if arm a is above arm b by more than two standard errors, -1 if below, else 0."""
    if a["spread"] is None or b["spread"] is None:
        return 0
    variance = a["spread"] ** 2 / len(a["test"]) + b["spread"] ** 2 / len(b["test"])
    gap = a["mean"] - b["mean"]
    if abs(gap) <= 2 * math.sqrt(variance):
        return 0
    return 1 if gap > 0 else -1


def judged(signs):
    """Verdict over several comparisons, +1 being in favor of the claim."""
    signs = list(signs)
    if not any(signs):
        return OPEN
    return verdict(min(signs) > 0, max(signs) > 0)


def losses(d):
    """{arm: held-out losses over the seeds, as an arm}."""
    names = dict.fromkeys(run["arm"] for run in d["runs"])
    return {name: values([run["loss"] for run in select(d["runs"], arm=name)]) for name in names}


def pairs(*names, digits=1, better=1):
    """A judge: in every pair of arms, the first must beat the second.

    better: 1 if larger numbers are better, -1 if smaller ones are.
    """

    def judge(d):
        arms = d.get("arms") or losses(d)
        text = []
        signs = []
        for new, old in names:
            if new in arms and old in arms:
                text.append(listed({name: arms[name] for name in (new, old)}, digits))
                signs.append(better * differs(arms[new], arms[old]))
        return "; ".join(text), judged(signs)

    return judge


# ---------------------------------------------------------------- Never Train from Scratch


def gap(scratch, after, s4):
    """Pretraining removes most of the gap between the two models trained from scratch."""
    before = s4["mean"] - scratch["mean"]
    left = s4["mean"] - after["mean"]
    text = f"Transformer {arm(scratch)} from scratch, {arm(after)} pretrained; "
    text += f"S4 {arm(s4)} from scratch: "
    if before <= 0:
        return text + "no gap to close", OPEN
    text += f"a gap of {before:.1f} points becomes {left:.1f}"
    return text, verdict(left < 0.25 * before, differs(after, scratch) > 0)


def lattice_gap(d):
    arms = d["arms"]
    return gap(arms["Transformer-scratch"], arms["Transformer-masked"], arms["S4-scratch"])


def task_gap(d):
    arms = d["arms"]
    if len(arms) < 4:
        return f"{listed(arms)}; the others are not run yet", OPEN
    scratch = arms["Transformer, from scratch"]
    return gap(scratch, arms["Transformer, pretrained"], arms["S4, from scratch"])


def redundant(d):
    """Structure is worth less after pretraining than from scratch."""
    names = ("diagonal-scratch", "diagonal-masked", "S4-scratch", "S4-masked")
    arms = {name: d["arms"][name] for name in names}
    before = arms["S4-scratch"]["mean"] - arms["diagonal-scratch"]["mean"]
    after = arms["S4-masked"]["mean"] - arms["diagonal-masked"]["mean"]
    if differs(arms["S4-scratch"], arms["diagonal-scratch"]) <= 0:
        return listed(arms) + ": no gap even from scratch", OPEN
    return listed(arms), verdict(after < 0.25 * before, after < before)


def modest_share(d):
    """A quarter of the steps, spent on pretraining, gives most of the best gain of any share."""
    arms = d["arms"]
    best = max(row["mean"] for row in arms.values()) - arms["0 %"]["mean"]
    gain = arms["25 %"]["mean"] - arms["0 %"]["mean"]
    sign = differs(arms["25 %"], arms["0 %"])
    if sign == 0:
        return listed(arms), OPEN
    return listed(arms), verdict(sign > 0 and gain > 0.75 * best, sign > 0)


def few_labels(d):
    """Pretraining on all inputs helps, most with the fewest labels."""
    text = []
    helps = []
    gain = {}
    for n in (100, 400, 1000):
        scratch = d["arms"][f"{n} labels, from scratch"]
        after = d["arms"][f"{n} labels, pretrained"]
        text.append(f"{n}: {scratch['mean']:.1f} -> {after['mean']:.1f}")
        helps.append(differs(after, scratch) > 0)
        gain[n] = values(list(np.subtract(after["test"], scratch["test"])))
    most_when_few = differs(gain[100], gain[1000]) > 0
    return "labels " + ", ".join(text), verdict(all(helps) and most_when_few, all(helps))


# ---------------------------------------------------------------- S4, SGConv


def kernel_cost(d):
    cells = {(c["form"], c["width"], c["L"]): c for c in d["cells"]}
    short = cells["two-level", 16, 1024]
    long = cells["two-level", 16, 65536]
    naive = cells["naive Cauchy", 16, 16384]["seconds"]
    naive /= cells["two-level", 16, 16384]["seconds"]
    growth = long["seconds"] / short["seconds"]
    error = max(short["error"], long["error"])
    text = (
        f"64 times the length costs {growth:.1f} times the time; at 16k {naive:.0f} times faster "
        f"than plain Cauchy sums; float32 error {error:.1e}"
    )
    return text, verdict(growth < 64 * 1.3 and error < 1e-5, growth < 64 * 4)


def generation(d):
    """Throughput at equal memory for the states; S4's does not depend on the context."""
    s4 = statistics.median(row["S4"]["tokens_a_second"] for row in d["rows"])
    ratio = {row["context"]: s4 / row["Transformer"]["tokens_a_second"] for row in d["rows"]}
    text = ", ".join(f"{r:.2g} at {context // 1024}k" for context, r in ratio.items())
    gib = d["settings"]["cap_gib"]
    text = f"throughput over a Transformer's with {gib:g} GiB of states: {text}"
    return text, verdict(max(ratio.values()) > 50, max(ratio.values()) > 1.2)


def recall(d):
    """S4 learns sooner at both lengths, and a Transformer with as many steps does not catch up."""
    rows = {(r["L"], r["model"], r["budget"]): r for r in d["rows"]}
    text = []
    sooner = []
    for L in (1024, 16384):
        s4 = rows[L, "S4", "seconds"]
        other = rows[L, "Transformer", "seconds"]
        text.append(f"{L // 1024}k: S4 {s4['mean']:.0%}, Transformer {other['mean']:.0%}")
        sooner.append(differs(s4, other) > 0)
    equal = rows[1024, "Transformer", "steps"]
    able = equal["mean"] > rows[1024, "S4", "seconds"]["mean"] - 0.1
    text.append(f"with S4's steps at 1k: {equal['mean']:.0%}")
    return "equal time, " + "; ".join(text), verdict(all(sooner) and not able, any(sooner))


def sgconv_faster(d):
    seconds = {(c["mixer"], c["L"]): c["seconds"] for c in d["cells"] if "seconds" in c}
    lengths = sorted(L for name, L in seconds if name == "SGConv")
    ratio = {L: seconds["S4", L] / seconds["SGConv", L] for L in lengths}
    text = ", ".join(f"{r:.1f} at {L // 1024}k" for L, r in ratio.items())
    faster = [r > 1.05 for r in ratio.values()]
    return f"time of S4 / time of SGConv: {text}", verdict(all(faster), any(faster))


def both_principles(d):
    """The published kernel beats those that give up one principle, or at least both."""
    arms = d["arms"]
    beats = {name: differs(arms["as published"], row) > 0 for name, row in arms.items()}
    both = beats["dense, without decay"]
    return listed(arms), verdict(beats["without decay"] and beats["dense"] and both, both)


# ---------------------------------------------------------------- structured FFNs


def ffn_speed(d):
    """Faster than dense at every width and number of tokens."""
    speed = {(cell, kind): row[f"{kind} speed"] for cell, row in d["ffn"].items() for kind in KINDS}
    one = ", ".join(f"{kind} {speed['1024, 1', kind]:.1f}" for kind in KINDS)
    cell, kind = min(speed, key=speed.get)
    width, tokens = cell.split(", ")
    worst = speed[cell, kind]
    text = (
        f"31 % of the weights, over dense: one token at width 1024 {one}; worst: {kind} "
        f"{worst:.2f} at width {width}, tokens {tokens}"
    )
    return text, verdict(worst > 1.05, statistics.median(speed.values()) > 1.05)


def ffn_speed_gpu(d):
    """The paper's speedups for 30k tokens at width 5120, to 5 %."""
    paper = {"lowrank": 2.6, "blockdense": 2.6, "blockshuffle": 2.0}
    large = {kind: d["ffn"]["5120, 30720"][f"{kind} speed"] for kind in KINDS}
    reached = [large[kind] > 0.95 * paper[kind] for kind in KINDS]
    worst = min(row[f"{kind} speed"] for row in d["ffn"].values() for kind in KINDS)
    speeds = ", ".join(f"{kind} {large[kind]:.1f}" for kind in KINDS)
    text = (
        f"width 5120, 30,720 tokens, {d['dtype']}, 31 % of the weights: {speeds} times; few "
        f"tokens, small widths: down to {worst:.2g} times"
    )
    return text, verdict(all(reached), any(reached))


def merging(d):
    """At every width, calls with few tokens are faster merged than with the factors of any kind."""
    most = {width: max(n for _, n in row.values()) for width, row in d["thresholds"].items()}
    text = ", ".join(f"{n} at width {width}" for width, n in most.items())
    works = [n > 0 for n in most.values()]
    half = sum(works) > len(works) / 2
    return f"largest number of tokens for which merging pays: {text}", verdict(all(works), half)


def best_arm(runs):
    """The learning rate with the lowest mean error, as an arm."""
    rates = {run["lr"] for run in runs}
    arms = [values([run["error"] for run in select(runs, lr=lr)]) for lr in rates]
    return min(arms, key=lambda row: row["mean"])


def self_guided(d):
    """Lowest error over the learning rates, plain and self-guided."""
    text = []
    signs = []
    for teacher in ("LowRank R 16", "BlockShuffle 4 x 4"):
        arms = {}
        for name in ("plain", "self-guided"):
            arms[name] = best_arm(select(d["runs"], teacher=teacher, arm=name))
        text.append(f"{teacher}: error {listed(arms, 3)}")
        signs.append(differs(arms["plain"], arms["self-guided"]))
    return "teacher-student, " + "; ".join(text), judged(signs)


def power(runs):
    """The p of loss = constant / FLOPs^p, by least squares of the logarithms."""
    flops = np.log([run["flops"] for run in runs])
    loss = np.log([run["loss"] for run in runs])
    return -float(np.polyfit(flops, loss, 1)[0])


def steeper(d):
    """The exponent of loss against FLOPs, fitted per seed."""
    arms = {}
    for kind in ("dense", "lowrank", "blockshuffle"):
        runs = select(d["runs"], kind=kind)
        seeds = sorted({run["seed"] for run in runs})
        arms[kind] = values([power(select(runs, seed=seed)) for seed in seeds])
    signs = [differs(arms[kind], arms["dense"]) for kind in ("lowrank", "blockshuffle")]
    return f"exponent of loss against FLOPs: {listed(arms, 3)}", judged(signs)


# ---------------------------------------------------------------- unified view, beyond


def longer_context(d):
    contexts = d["contexts"]
    loss = [values([run["loss"][i] for run in d["runs"]]) for i in range(len(contexts))]
    text = ", ".join(f"{contexts[i]}: {loss[i]['mean']:.2f}" for i in (0, 4, 6, 8, 9))
    helps = [differs(loss[i], loss[i + 1]) > 0 for i in range(len(loss) - 1)]
    return f"nats per byte by context length: {text}", verdict(all(helps), helps[0])


def million(d):
    row = d["rows"][0]
    tokens = row["setting"].split(" tokens")[0]
    text = f"{tokens} causal tokens, one head, {d['world']} ranks: {row['wall']:.1f} s, "
    return text + f"error of sampled rows {row['error']:.1e}", verdict(row["error"] <= 2e-6)


def parallel_attention(d):
    row = next(r for r in d["rows"] if r["L"] == 8192)
    speedup = row["speedup"]["causal"]
    text = (
        f"8,192 causal tokens, two ranks: {speedup:.1f} times = kernel {row['kernel']:.1f} x no "
        f"mask {row['mask']:.1f} x skipping {row['skipping']:.1f} x ranks "
        f"{row['parallel']['causal']:.1f}"
    )
    return text, verdict(speedup >= 40, speedup > 2)


def one_template(d):
    error = max(mixer["error of M v"] for mixer in d["mixers"])
    return f"six mixers equal y = M(x) v, error at most {error:.0e}", verdict(error < 1e-10)


def tests_pass(d):
    good = d["passed"] > 0 and not d["failed"] and not d.get("returncode")
    return f"{d['passed']} tests pass, {d['failed']} fail", verdict(good)
