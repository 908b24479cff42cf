"""Judges: content of a results file -> (our numbers in words, verdict).

The rules were fixed before the numbers: a difference between two arms counts when it exceeds two
standard errors of the means over seeds (`differs`); what the seeds cannot tell is called "cannot
tell".  An arm is a dict: "test" (one number per seed), "mean", "spread" (standard deviation or
None).
"""

import math
import statistics

import numpy as np

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


def all_or_some(signs):
    """Verdict over several comparisons, +1 being in favor of the claim."""
    if not any(signs):
        return OPEN
    return verdict(min(signs) > 0, max(signs) > 0)


# ---------------------------------------------------------------- Never Train from Scratch


def gap_closes(d):
    """Pretraining removes most of the gap between the two models trained from scratch."""
    scratch = d["arms"]["Transformer-scratch"]
    after = d["arms"]["Transformer-masked"]
    s4 = d["arms"]["S4-scratch"]
    gap = s4["mean"] - scratch["mean"]
    left = s4["mean"] - after["mean"]
    text = (
        f"Transformer {arm(scratch)} from scratch, {arm(after)} pretrained; S4 {arm(s4)} from "
        f"scratch: a gap of {gap:.1f} points becomes {left:.1f}"
    )
    return text, verdict(left < 0.25 * gap, differs(after, scratch) > 0)


def listops_gap(d):
    """As gap_closes, if there is a gap at all."""
    arms = d["arms"]
    text = ", ".join(f"{name} {arm(row)}" for name, row in arms.items())
    scratch = arms["Transformer, from scratch"]
    after = arms["Transformer, pretrained"]
    s4 = arms["S4, from scratch"]
    gap = s4["mean"] - scratch["mean"]
    left = s4["mean"] - after["mean"]
    if gap <= 0:
        return text + ": no gap to close", OPEN
    return text, verdict(left < 0.25 * gap, differs(after, scratch) > 0)


def gains(pairs):
    """{name: (after, before)} -> text of the differences, {name: differs(after, before)}."""
    text = []
    signs = {}
    for name, (after, before) in pairs.items():
        text.append(f"{name} {after['mean'] - before['mean']:+.1f}")
        signs[name] = differs(after, before)
    return ", ".join(text), signs


def causal_too(d):
    """Causal models gain by pretraining on the next token."""
    arms = d["arms"]
    pairs = {}
    for name in ("Transformer", "S4", "SGConv", "diagonal"):
        pairs[name] = arms[f"{name}, pretrained"], arms[f"{name}, from scratch"]
    text, signs = gains(pairs)
    full = all(sign > 0 for sign in signs.values())
    return f"gain in points, causal models: {text}", verdict(full, signs["Transformer"] > 0)


def all_gain(d):
    """The convolutions and the recurrence gain as well."""
    arms = d["arms"]
    pairs = {n: (arms[f"{n}-masked"], arms[f"{n}-scratch"]) for n in ("S4", "SGConv", "diagonal")}
    text, signs = gains(pairs)
    if not any(signs.values()):
        return text + " points, within two standard errors", OPEN
    return text + " points", all_or_some(signs.values())


def redundant(d):
    """Structure is worth less after pretraining than from scratch."""
    s4, s4_after = d["arms"]["S4-scratch"], d["arms"]["S4-masked"]
    plain, plain_after = d["arms"]["diagonal-scratch"], d["arms"]["diagonal-masked"]
    text = (
        f"plain recurrence {arm(plain)} from scratch, {arm(plain_after)} pretrained; "
        f"S4 {arm(s4)}, {arm(s4_after)}"
    )
    if differs(s4, plain) <= 0:
        return text + ": no gap even from scratch", OPEN
    before = s4["mean"] - plain["mean"]
    after = s4_after["mean"] - plain_after["mean"]
    return text, verdict(after < 0.25 * before, after < before)


def random_start(d):
    """Pretraining makes up for parameters drawn at random."""
    scratch = d["arms"]["S4 at random, from scratch"]
    after = d["arms"]["S4 at random, pretrained"]
    text = f"randomly initialized S4: {arm(scratch)} from scratch, {arm(after)} pretrained"
    return text, all_or_some([differs(after, scratch)])


def modest_share(d):
    """A quarter of the steps, spent on pretraining, gives most of the best gain of any share."""
    arms = d["arms"]
    text = ", ".join(f"{name}: {arm(row)}" for name, row in arms.items())
    none, quarter = arms["0 %"], arms["25 %"]
    best = max(row["mean"] for row in arms.values()) - none["mean"]
    gain = quarter["mean"] - none["mean"]
    sign = differs(quarter, none)
    if best <= 0 or sign == 0:
        return text, OPEN
    text += f": a quarter gives {gain / best:.0%} of the best gain"
    return text, verdict(sign > 0 and gain > 0.75 * best, sign > 0)


def few_labels(d):
    """Pretraining on all inputs helps, most with the fewest labels."""
    text, helps, gain = [], [], {}
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
    fast = cells["two-level", 16, 16384]["seconds"]
    naive = cells["naive Cauchy", 16, 16384]["seconds"] / fast
    stable = cells["stable Cauchy", 16, 16384]["seconds"] / fast
    short = cells["two-level", 16, 1024]
    long = cells["two-level", 16, 65536]
    growth = long["seconds"] / short["seconds"]
    error = max(short["error"], long["error"])
    text = (
        f"N 64: 64 times the length costs {growth:.1f} times the time; at 16k {naive:.0f} times "
        f"faster than plain Cauchy sums, {stable:.0f} times faster than the pole-free form; "
        f"float32 error {error:.1e}"
    )
    return text, verdict(growth < 64 * 1.3 and error < 1e-5, growth < 64 * 4)


def generation(d):
    """Throughput at equal memory for the states; S4's does not depend on the context."""
    s4 = statistics.median(row["S4"]["tokens_a_second"] for row in d["rows"])
    ratio = {row["context"]: s4 / row["Transformer"]["tokens_a_second"] for row in d["rows"]}
    last = d["rows"][-1]
    alone = last["Transformer"]["ms_a_token_at_batch_1"] / last["S4"]["ms_a_token_at_batch_1"]
    text = ", ".join(f"{r:.2g} at {context // 1024}k" for context, r in ratio.items())
    text = (
        f"throughput over a Transformer's with {d['settings']['cap_gib']:g} GiB of states: {text}; "
        f"single sequence: {alone:.2g} at {last['context'] // 1024}k"
    )
    return text, verdict(max(ratio.values()) > 50, max(ratio.values()) > 1.2)


def recall(d):
    rows = {(r["L"], r["model"], r["budget"]): r for r in d["rows"]}
    text, sooner = [], []
    for L in (1024, 16384):
        s4, other = rows[L, "S4", "seconds"], rows[L, "Transformer", "seconds"]
        text.append(f"{L // 1024}k: S4 {s4['mean']:.0%}, Transformer {other['mean']:.0%}")
        sooner.append(differs(s4, other) > 0)
    equal = rows.get((1024, "Transformer", "steps"))
    able = False
    if equal:
        able = equal["mean"] > rows[1024, "S4", "seconds"]["mean"] - 0.1
        text.append(f"with S4's steps at 1k ({len(equal['test'])} seeds): {equal['mean']:.0%}")
    return "equal time, " + "; ".join(text), verdict(all(sooner) and not able, any(sooner))


def sgconv_faster(d):
    seconds = {(c["mixer"], c["L"]): c["seconds"] for c in d["cells"] if "seconds" in c}
    lengths = sorted(L for name, L in seconds if name == "SGConv")
    ratio = {L: seconds["S4", L] / seconds["SGConv", L] for L in lengths}
    text = ", ".join(f"{r:.1f} at {L // 1024}k" for L, r in ratio.items())
    faster = [r > 1.05 for r in ratio.values()]
    return f"time of S4 / time of SGConv: {text}", verdict(all(faster), any(faster))


def sgconv_better(d):
    text, signs = [], []
    for task, end in (("lattice", ""), ("listops-tiny", " at 3e-3")):
        s4 = d["arms"][f"{task}, S4{end}"]
        sgconv = d["arms"][f"{task}, SGConv{end}"]
        text.append(f"{task}: {arm(sgconv)} against {arm(s4)}")
        signs.append(differs(sgconv, s4))
    return "; ".join(text), all_or_some(signs)


def both_principles(d):
    """The published kernel beats those that give up one principle, or at least both."""
    arms = d["arms"]
    text = ", ".join(f"{name} {arm(row)}" for name, row in arms.items())
    beats = {name: differs(arms["as published"], row) > 0 for name, row in arms.items()}
    both = beats["dense, without decay"]
    return text, verdict(beats["without decay"] and beats["dense"] and both, both)


# ---------------------------------------------------------------- structured FFNs


def ffn_speed(d):
    """Faster than dense at every width and number of tokens."""
    speed = {(cell, kind): row[f"{kind} speed"] for cell, row in d["ffn"].items() for kind in KINDS}
    one = ", ".join(f"{kind} {speed['1024, 1', kind]:.1f}" for kind in KINDS)
    (cell, kind), worst = min(speed.items(), key=lambda item: item[1])
    width, tokens = cell.split(", ")
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
    arms = [values([run["error"] for run in runs if run["lr"] == lr]) for lr in rates]
    return min(arms, key=lambda row: row["mean"])


def self_guided(d):
    """Lowest error over the learning rates, plain and self-guided."""
    text, better = [], []
    for teacher in ("LowRank R 16", "BlockShuffle 4 x 4"):
        runs = [run for run in d["runs"] if run["teacher"] == teacher]
        plain = best_arm([run for run in runs if run["arm"] == "plain"])
        guided = best_arm([run for run in runs if run["arm"] == "self-guided"])
        text.append(f"{teacher}: error {plain['mean']:.3f} plain, {guided['mean']:.3f} guided")
        better.append(differs(plain, guided) > 0)
    return "teacher-student, " + "; ".join(text), verdict(all(better), any(better))


def losses(d, name):
    return [run["loss"] for run in d["runs"] if run["arm"] == name]


def guided_language(d):
    text, signs = [], []
    for kind in ("LowRank", "BlockShuffle"):
        plain = values(losses(d, f"{kind}, longer"))
        guided = values(losses(d, f"{kind}, self-guided"))
        text.append(f"{kind} {arm(plain, 3)} plain for longer, {arm(guided, 3)} guided")
        signs.append(differs(plain, guided))
    return "; ".join(text) + " nats per byte", all_or_some(signs)


def steeper(d):
    """The exponent of loss against FLOPs, fitted per seed."""
    power = {}
    for kind in ("dense", "lowrank", "blockshuffle"):
        runs = [run for run in d["runs"] if run["kind"] == kind]
        slopes = []
        for seed in sorted({run["seed"] for run in runs}):
            flops = [run["flops"] for run in runs if run["seed"] == seed]
            loss = [run["loss"] for run in runs if run["seed"] == seed]
            slopes.append(-float(np.polyfit(np.log(flops), np.log(loss), 1)[0]))
        power[kind] = values(slopes)
    text = ", ".join(f"{kind} {arm(row, 3)}" for kind, row in power.items())
    signs = [differs(power[kind], power["dense"]) for kind in ("lowrank", "blockshuffle")]
    return f"exponent of loss against FLOPs: {text}", all_or_some(signs)


def wide_structured(d):
    arms = {}
    for name in ("dense", "wide LowRank", "wide BlockShuffle"):
        if len(losses(d, name)) < 2:
            return "fewer than two seeds", OPEN
        arms[name] = values(losses(d, name))
    text = ", ".join(f"{name} {arm(row, 4)}" for name, row in arms.items())
    dense = arms.pop("dense")
    better = [differs(dense, row) > 0 for row in arms.values()]
    return text + " nats per byte, equal FLOPs", verdict(all(better), any(better))


# ---------------------------------------------------------------- unified view, beyond


def longer_context(d):
    contexts = d["contexts"]
    loss = [values([run["loss"][i] for run in d["runs"]]) for i in range(len(contexts))]
    shown = [(c, row) for c, row in zip(contexts, loss, strict=True) if c in (1, 16, 64, 256, 512)]
    text = ", ".join(f"{c}: {row['mean']:.2f}" for c, row in shown)
    helps = [differs(loss[i], loss[i + 1]) > 0 for i in range(len(loss) - 1)]
    return f"nats per byte by context length: {text}", verdict(all(helps), helps[0])


def million(d):
    row = d["rows"][0]
    tokens = row["setting"].split(" tokens")[0]
    text = (
        f"{tokens} causal tokens, one head, {d['world']} ranks: {row['wall']:.1f} s, "
        f"error of sampled rows {row['error']:.1e}"
    )
    return text, verdict(row["error"] <= 2e-6)


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
