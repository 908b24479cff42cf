"""What a file of results says of a claim: content of the file -> (our numbers in words, verdict).

The rules stand here, before the numbers: a difference between two arms counts when it exceeds two
standard errors of the seeds' means (`differs`); what the seeds cannot tell is called just that.
"""

import math
import statistics

import numpy as np

HOLDS, PART, NOT, OPEN = "holds", "holds in part", "does not hold here", "cannot tell"
UNRUN = "not run"


def verdict(full, part=False):
    return HOLDS if full else PART if part else NOT


def arm(row, digits=1):
    """Mean and, of several seeds, standard deviation."""
    numbers = [row["mean"]] if row["spread"] is None else [row["mean"], row["spread"]]
    return " ± ".join(f"{number:.{digits}f}" for number in numbers)


def values(row):
    """An arm from a list of numbers, one a seed."""
    spread = statistics.stdev(row) if len(row) > 1 else None
    return {"test": row, "mean": statistics.fmean(row), "spread": spread}


def differs(a, b):
    """+1, -1: arm a lies above, below b by more than two standard errors; 0: neither, or one seed.

    An arm: {"test": a number a seed, "mean": ..., "spread": their standard deviation}.
    """
    if a["spread"] is None or b["spread"] is None:
        return 0
    error = math.sqrt(a["spread"] ** 2 / len(a["test"]) + b["spread"] ** 2 / len(b["test"]))
    gap = a["mean"] - b["mean"]
    return 0 if abs(gap) <= 2 * error else 1 if gap > 0 else -1


def gains(pairs):
    """{name: (after, before)} -> text of the differences, {name: differs(after, before)}."""
    text = ", ".join(f"{name} {a['mean'] - b['mean']:+.1f}" for name, (a, b) in pairs.items())
    return text, {name: differs(a, b) for name, (a, b) in pairs.items()}


# ------------------------------------------------------------------ Never Train from Scratch


def gap_closes(d):
    """Most of the gap between scratch arms is gone after pretraining."""
    a = d["arms"]
    scratch, after, s4 = (a[k] for k in ("Transformer-scratch", "Transformer-masked", "S4-scratch"))
    gap, left = s4["mean"] - scratch["mean"], s4["mean"] - after["mean"]
    text = f"Transformer {arm(scratch)} from scratch, {arm(after)} pretrained; S4 {arm(s4)}"
    text += f" from scratch: {gap:.1f} points become {left:.1f}"
    return text, verdict(left < 0.25 * gap, differs(after, scratch) > 0)


def listops_gap(d):
    """As gap_closes, where there is a gap at all."""
    a = d["arms"]
    text = ", ".join(f"{name} {arm(row)}" for name, row in a.items())
    scratch, after = (a[f"Transformer, {way}"] for way in ("from scratch", "pretrained"))
    gap = a["S4, from scratch"]["mean"] - scratch["mean"]
    if gap <= 0:
        return text + ": from scratch no gap to close", OPEN
    left = a["S4, from scratch"]["mean"] - after["mean"]
    return text, verdict(left < 0.25 * gap, differs(after, scratch) > 0)


def causal_too(d):
    """Left-to-right models gain by pretraining on the next token."""
    a, names = d["arms"], ("Transformer", "S4", "SGConv", "diagonal")
    pairs = {n: (a[f"{n}, pretrained"], a[f"{n}, from scratch"]) for n in names}
    text, sure = gains(pairs)
    text = "points of a causal model: " + text
    return text, verdict(all(s > 0 for s in sure.values()), sure["Transformer"] > 0)


def all_gain(d):
    """The convolutions and the recurrence gain too."""
    a, names = d["arms"], ("S4", "SGConv", "diagonal")
    text, sure = gains({n: (a[f"{n}-masked"], a[f"{n}-scratch"]) for n in names})
    if not any(sure.values()):
        return text + " points, within two standard errors", OPEN
    return text + " points", verdict(min(sure.values()) > 0, max(sure.values()) > 0)


def redundant(d):
    """Structure is worth less after pretraining than from scratch."""
    a = d["arms"]
    gaps = [a[f"S4-{way}"]["mean"] - a[f"diagonal-{way}"]["mean"] for way in ("scratch", "masked")]
    text = (
        f"plain recurrence {arm(a['diagonal-scratch'])} from scratch, {arm(a['diagonal-masked'])} "
        f"pretrained; S4 {arm(a['S4-scratch'])}, {arm(a['S4-masked'])}"
    )
    if differs(a["S4-scratch"], a["diagonal-scratch"]) <= 0:
        return text + ": no gap even from scratch", OPEN
    return text, verdict(gaps[1] < 0.25 * gaps[0], gaps[1] < gaps[0])


def random_start(d):
    """Pretraining makes up for parameters drawn at random."""
    a = d["arms"]
    scratch, after = a["S4 at random, from scratch"], a["S4 at random, pretrained"]
    text = f"S4 from random numbers: {arm(scratch)} from scratch, {arm(after)} pretrained"
    sure = differs(after, scratch)
    return text, OPEN if sure == 0 else verdict(sure > 0)


def modest_share(d):
    """A quarter of the steps, spent on pretraining, gives most of what any share gives."""
    a = d["arms"]
    text = ", ".join(f"{name}: {arm(row)}" for name, row in a.items())
    best = max(row["mean"] for row in a.values()) - a["0 %"]["mean"]
    quarter = a["25 %"]["mean"] - a["0 %"]["mean"]
    sure = differs(a["25 %"], a["0 %"])
    if best <= 0 or sure == 0:
        return text, OPEN
    return text + f": a quarter gives {quarter / best:.0%} of the most", verdict(
        sure > 0 and quarter > 0.75 * best, sure > 0
    )


def few_labels(d):
    """Pretraining on all inputs helps, most where labels are fewest."""
    a, text, found = d["arms"], [], {}
    for n in (100, 400, 1000):
        scratch, after = (a[f"{n} labels, {way}"] for way in ("from scratch", "pretrained"))
        text.append(f"{n}: {scratch['mean']:.1f} -> {after['mean']:.1f}")
        pairs = zip(after["test"], scratch["test"], strict=True)
        found[n] = values([x - y for x, y in pairs]), differs(after, scratch)
    most_when_few = differs(found[100][0], found[1000][0]) > 0
    helps = all(sure > 0 for _, sure in found.values())
    return "labels " + ", ".join(text), verdict(helps and most_when_few, helps)


# ------------------------------------------------------------------ S4, SGConv


def kernel_cost(d):
    cells = {(c["form"], c["width"], c["L"]): c for c in d["cells"]}
    fast = [cells["two-level", 16, L] for L in (1024, 65536)]
    naive, stable = (
        cells[form, 16, 16384]["seconds"] / cells["two-level", 16, 16384]["seconds"]
        for form in ("naive Cauchy", "stable Cauchy")
    )
    growth, error = fast[1]["seconds"] / fast[0]["seconds"], max(c["error"] for c in fast)
    text = (
        f"N 64: 64 times the length costs {growth:.1f} times the time; at 16k {naive:.0f} times "
        f"faster than plain Cauchy sums, {stable:.0f} times than those without their pole; error "
        f"{error:.1e} in float32"
    )
    return text, verdict(growth < 64 * 1.3 and error < 1e-5, growth < 64 * 4)


def generation(d):
    """Throughput at one memory for the states; S4's, which no context changes, is the median."""
    rows = d["rows"]
    s4 = statistics.median(r["S4"]["tokens_a_second"] for r in rows)
    ratio = {r["context"]: s4 / r["Transformer"]["tokens_a_second"] for r in rows}
    ms = "ms_a_token_at_batch_1"
    alone = {r["context"]: r["Transformer"][ms] / r["S4"][ms] for r in rows}
    text = ", ".join(f"{v:.2g} at {n // 1024}k" for n, v in ratio.items())
    last = max(ratio)
    text = (
        f"times the throughput with {d['settings']['cap_gib']:g} GiB of states: {text}; one "
        f"sequence alone: {alone[last]:.2g} at {last // 1024}k"
    )
    return text, verdict(max(ratio.values()) > 50, max(ratio.values()) > 1.2)


def recall(d):
    rows = {(r["L"], r["model"], r["budget"]): r for r in d["rows"]}
    text, sooner = [], []
    for L in (1024, 16384):
        s4, other = (rows[L, model, "seconds"] for model in ("S4", "Transformer"))
        text.append(f"{L // 1024}k: S4 {s4['mean']:.0%}, Transformer {other['mean']:.0%}")
        sooner.append(differs(s4, other) > 0)
    equal = rows.get((1024, "Transformer", "steps"))
    able = equal and equal["mean"] > rows[1024, "S4", "seconds"]["mean"] - 0.1
    if equal:
        text.append(f"given S4's steps at 1k ({len(equal['test'])} seeds): {equal['mean']:.0%}")
    return "equal seconds, " + "; ".join(text), verdict(all(sooner) and not able, any(sooner))


def sgconv_faster(d):
    run = {(c["mixer"], c["L"]): c["seconds"] for c in d["cells"] if "seconds" in c}
    ratio = {L: run["S4", L] / t for (name, L), t in sorted(run.items()) if name == "SGConv"}
    text = ", ".join(f"{v:.1f} at {L // 1024}k" for L, v in ratio.items())
    good = [v > 1.05 for v in ratio.values()]
    return f"time of S4 / time of SGConv: {text}", verdict(all(good), any(good))


def sgconv_better(d):
    a, text, sure = d["arms"], [], []
    for task, s4, sg in (
        ("lattice", "lattice, S4", "lattice, SGConv"),
        ("listops-tiny", "listops-tiny, S4 at 3e-3", "listops-tiny, SGConv at 3e-3"),
    ):
        text.append(f"{task}: {arm(a[sg])} against {arm(a[s4])}")
        sure.append(differs(a[sg], a[s4]))
    return "; ".join(text), OPEN if not any(sure) else verdict(min(sure) > 0, max(sure) > 0)


def both_principles(d):
    """The published kernel beats those that give up a principle, or at least both."""
    a = d["arms"]
    text = ", ".join(f"{name} {arm(row)}" for name, row in a.items())
    others = {name: differs(a["as published"], row) for name, row in a.items()}
    one = others["without decay"] > 0 and others["dense"] > 0
    return text, verdict(
        one and others["dense, without decay"] > 0, others["dense, without decay"] > 0
    )


# ------------------------------------------------------------------ structured FFNs

KINDS = ("lowrank", "blockdense", "blockshuffle")


def ffn_speed(d):
    """Faster than dense at every width and number of tokens."""
    speed = {(cell, kind): row[f"{kind} speed"] for cell, row in d["ffn"].items() for kind in KINDS}
    one = ", ".join(f"{kind} {speed['1024, 1', kind]:.1f}" for kind in KINDS)
    (cell, kind), worst = min(speed.items(), key=lambda x: x[1])
    width, tokens = cell.split(", ")
    text = (
        f"31 % of the weights: one token at width 1024 {one} times; at width {width}, {tokens} "
        f"token(s), {kind} {worst:.2f} times"
    )
    return text, verdict(worst > 1.05, statistics.median(speed.values()) > 1.05)


def ffn_speed_gpu(d):
    """What the paper reports of 30k tokens at width 5120, to 5 %."""
    large, paper = d["ffn"]["5120, 30720"], dict(zip(KINDS, (2.6, 2.6, 2.0), strict=True))
    text = ", ".join(f"{kind} {large[f'{kind} speed']:.1f}" for kind in KINDS)
    good = [large[f"{kind} speed"] > 0.95 * paper[kind] for kind in KINDS]
    text = f"width 5120, 30,720 tokens, {d['dtype']}, 31 % of the weights: {text} times"
    few = min(row[f"{kind} speed"] for row in d["ffn"].values() for kind in KINDS)
    return text + f"; few tokens, small widths: down to {few:.2g} times", verdict(
        all(good), any(good)
    )


def merging(d):
    """At every width some calls are faster merged than by the factors of any kind."""
    most = {width: max(n for _, n in t.values()) for width, t in d["thresholds"].items()}
    text = ", ".join(f"{n} at width {width}" for width, n in most.items())
    works = [n > 0 for n in most.values()]
    return f"merged is faster up to so many tokens: {text}", verdict(
        all(works), sum(works) > len(works) / 2
    )


def self_guided(d):
    """The least error over the rates, three seeds each, of plain and of self-guided training."""
    text, sure = [], []
    for kind in ("LowRank R 16", "BlockShuffle 4 x 4"):
        best = {}
        for way in ("plain", "self-guided"):
            runs = [r for r in d["runs"] if (r["teacher"], r["arm"]) == (kind, way)]
            arms = [
                values([r["error"] for r in runs if r["lr"] == lr])
                for lr in {r["lr"] for r in runs}
            ]
            best[way] = min(arms, key=lambda row: row["mean"])
        plain, guided = best["plain"], best["self-guided"]
        text.append(f"{kind}: error {plain['mean']:.3f} plain, {guided['mean']:.3f} guided")
        sure.append(differs(plain, guided) > 0)
    return "teacher and student, " + "; ".join(text), verdict(all(sure), any(sure))


def guided_language(d):
    text, sure = [], []
    for kind in ("LowRank", "BlockShuffle"):
        plain, guided = (
            values([r["loss"] for r in d["runs"] if r["arm"] == f"{kind}, {way}"])
            for way in ("longer", "self-guided")
        )
        text.append(f"{kind} {arm(plain, 3)} plain for longer, {arm(guided, 3)} guided")
        sure.append(differs(plain, guided))
    text = "; ".join(text) + " nats a byte"
    return text, OPEN if not any(sure) else verdict(min(sure) > 0, max(sure) > 0)


def steeper(d):
    """The power of the FLOPs, fitted to each seed."""
    power = {}
    for kind in ("dense", "lowrank", "blockshuffle"):
        runs = [r for r in d["runs"] if r["kind"] == kind]
        slopes = []
        for seed in sorted({r["seed"] for r in runs}):
            points = [(r["flops"], r["loss"]) for r in runs if r["seed"] == seed]
            flops, loss = np.log(points).T
            slopes.append(-float(np.polyfit(flops, loss, 1)[0]))
        power[kind] = values(slopes)
    text = ", ".join(f"{k} {arm(p, 3)}" for k, p in power.items())
    sure = [differs(power[k], power["dense"]) for k in ("lowrank", "blockshuffle")]
    text = "loss falls with FLOPs to the power " + text
    return text, OPEN if not any(sure) else verdict(min(sure) > 0, max(sure) > 0)


def wide_structured(d):
    names = ("dense", "wide LowRank", "wide BlockShuffle")
    losses = {n: [r["loss"] for r in d["runs"] if r["arm"] == n] for n in names}
    if min(map(len, losses.values())) < 2:
        return "fewer than two seeds", OPEN
    dense, *wide = arms = [values(losses[n]) for n in names]
    text = ", ".join(f"{n} {arm(row, 4)}" for n, row in zip(names, arms, strict=True))
    better = [differs(dense, row) > 0 for row in wide]
    return text + " nats a byte, equal FLOPs", verdict(all(better), any(better))


# ------------------------------------------------------------------ unified view, beyond


def longer_context(d):
    loss = {c: values([r["loss"][i] for r in d["runs"]]) for i, c in enumerate(d["contexts"])}
    text = ", ".join(f"{c}: {loss[c]['mean']:.2f}" for c in (1, 16, 64, 256, 512))
    steps = zip(d["contexts"], d["contexts"][1:], strict=False)
    good = [differs(loss[a], loss[b]) > 0 for a, b in steps]
    return f"nats a byte by context, {text}", verdict(all(good), good[0])


def million(d):
    row = d["rows"][0]
    tokens = row["setting"].split(" tokens")[0]
    text = f"{tokens} causal tokens, one head, {d['world']} ranks: {row['wall']:.1f} s"
    return text + f", sampled rows wrong by {row['error']:.1e}", verdict(row["error"] <= 2e-6)


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
    return text, verdict(error < 1e-10)


def tests_pass(d):
    good = d["passed"] > 0 and not d["failed"] and not d.get("returncode")
    return f"{d['passed']} tests pass, {d['failed']} fail", verdict(good)
