"""Write RESULTS.md, and the numbers of README.md, from the files in results/.

    python benchmarks/results_page.py

Each section is a function that yields lines of Markdown; the last one names the command, hardware,
torch version, date and commit behind every file.
"""

import json
import re
import textwrap

import claims
import demo
from judges import KINDS, arm
from measured import ROOT, takes_no_arguments

REWRITE = "2026-11-27"  # earlier rows were measured before the files were rewritten
NOTES = {  # of files that are older than that
    "step_time_gpu_million": " and before the correction of the Pathfinder pictures",
    "distributed_million_gpu": ", when queries, keys and values were drawn equal by mistake",
}


def load(name):
    return json.loads((ROOT / f"results/{name}.json").read_text("utf-8"))


def measured(*names):
    """Those of the files that exist."""
    return [name for name in names if (ROOT / f"results/{name}.json").exists()]


# ---------------------------------------------------------------- Markdown


def number(value, form, unit=1):
    """The value in units, formatted; a dash if it was not measured."""
    return f"{value / unit:{form}}" if value else "–"


def table(head, rows):
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    for row in rows:
        yield f"| {' | '.join(map(str, row))} |"
    yield ""


def prose(text):
    yield from textwrap.fill(" ".join(text.split()), 110, break_on_hyphens=False).splitlines()
    yield ""


def picture(name, text):
    yield f"![{text}](results/{name}.png)"
    yield ""


def hardware(origin):
    """The GPU, or the number of cores and the kind of processor."""
    text = origin.get("hardware") or origin["cpu"]
    if "NVIDIA" in text:
        return text.split(", ")[-1]
    kind = "x86-64"
    for name in ("AMD EPYC", "Intel Xeon"):
        if name.split()[1] in text:
            kind = name
    cores = re.search(r"(\d+) cores", text)
    return f"{cores[1] if cores else origin['cores']} cores of an {kind}"


def sources():
    """Where the numbers come from"""
    for path in sorted((ROOT / "results").glob("*.json")):
        content = load(path.stem)
        origin = content if "command" in content else content["cells"][0]["run"]
        command = origin["command"]
        if len(command) > 120:  # the whole command stands in the file
            command = re.search(r"benchmarks/\w+\.py", command)[0] + " ..."
        torch = origin.get("torch", "2.13.0").split("+")[0]
        date = origin["date"][:10]
        note = ""
        if date < REWRITE:
            note = ", before the rewrite" + NOTES.get(path.stem, "")
        yield (
            f"- [{path.name}](results/{path.name}): `{command}`, {hardware(origin)}, torch {torch}, "
            f"{date}, commit {origin['commit']}{note}"
        )


# ---------------------------------------------------------------- pretrain.py


def demonstration():
    """Pretraining on the lattice task"""
    d = load("demo")
    rows = []
    for name, row in d["arms"].items():
        scores = [f"{score:.1f}" for score in row["test"]]
        rows.append([name, f"{row['parameters']:,}", *scores, arm(row), f"{row['seconds'][0]:.0f}"])
    seeds = [f"seed {seed}" for seed in d["seeds"]]
    yield from table(["test accuracy in %", "parameters", *seeds, "mean", "seconds (seed 0)"], rows)
    yield from prose("""Learning rates were chosen on the validation split with one seed. From-scratch
        runs take as many steps as pretraining and fine-tuning together.""")


def pictures():
    """Fashion-MNIST, 14 x 14 pixels: when does pretraining begin to pay?"""
    arms = load("fashion_mnist")["arms"]
    rows = []
    for key in arms:
        model, how, budget = key.split(", ")
        if how == "pretrained":
            scratch = arms[f"{model}, from scratch, {budget}"]
            gain = arms[key]["mean"] - scratch["mean"]
            rows.append([model, budget, arm(scratch), arm(arms[key]), f"{gain:+.1f}"])
    yield from table(["", "steps", "from scratch", "pretrained", "points gained"], rows)
    yield from prose("""Test accuracy in %; 1x is 2,400 steps of 16 pictures in all, of which
        pretraining takes two thirds; 5,000 training pictures, all with labels unless noted.
        Learning rates were chosen on validation in runs of half that length.""")


def step_time():
    """Time per training step"""
    names = ("", "_gpu", "_gpu_pathfinder", "_gpu_million")
    head = ["file", "settings, stage", "ms per step", "share of forward, backward, optimizer"]
    head += ["GiB", "M tokens/s", "if the GPU never waited", "if memory were the limit"]
    rows = []
    for name in measured(*[f"step_time{name}" for name in names]):
        for row in load(name)["rows"]:
            model = row["settings"].split("/")[-1].removesuffix(".json")
            steps = {True: ", eager", False: ", CUDA graphs", None: ""}[row.get("eager")]
            steps += ", compiled" * row.get("compile", False)
            cells = [name, f"{model}, {row['stage']}{steps}", f"{row['ms']['total']:.0f}"]
            cells.append("–" if row.get("eager") is False else f"{row['share']:.1f} %")
            cells.append(number(row.get("peak_memory_gib"), ".1f"))
            for key in ("tokens_per_s", "tokens_per_s_busy", "tokens_per_s_memory"):
                cells.append(number(row.get(key), ".2f", 1e6))
            rows.append(cells)
    yield from table(head, rows)


def full_size():
    """The Long Range Arena at full size on one GPU"""
    rows = []
    for name in measured("gpu_listops", "gpu_lra_listops", "gpu_lra_pathfinder", "gpu_lra_fashion"):
        for key, row in load(name)["arms"].items():
            rows.append([name, key, arm(row), f"{row['seconds'][0]:.0f}"])
    yield from table(["file", "arm", "test accuracy in %", "seconds"], rows)
    yield from prose("The four runs of gpu_listops shared the GPU.")


# ---------------------------------------------------------------- S4, SGConv


def s4_kernel():
    """S4 kernel: forward + backward, D 16, N 64, L 16384, float32"""
    rows = []
    for cell in load("s4_kernel")["cells"]:
        if (cell["width"], cell["L"]) == (16, 16384):
            row = [cell["form"], f"{1e3 * cell['seconds']:.0f}", f"{cell['mib']:.0f}"]
            rows.append([*row, number(cell["error"], ".1e")])
    yield from table(["kernel", "ms", "MiB", "error"], rows)
    yield from picture("s4_kernel", "Time, memory and error of the S4 kernels against length")


def generation():
    """Generation: S4 against a Transformer with a KV cache"""
    head = ["tokens per s, S4", "Transformer", "batch, S4", "Transformer"]
    head += ["ms per token alone, S4", "Transformer"]
    keys = {"tokens_a_second": ",.0f", "batch": ",", "ms_a_token_at_batch_1": ".2f"}
    for name in ("generation", "generation_gpu"):
        d = load(name)
        rows = []
        for row in d["rows"]:
            cells = [f"{row['context']:,}"]
            for key, form in keys.items():
                cells += [f"{row[model][key]:{form}}" for model in ("S4", "Transformer")]
            rows.append(cells)
        yield from table([f"{name}: context", *head], rows)
        yield from prose(f"The states of a batch fit in {d['settings']['cap_gib']:g} GiB.")
    yield from picture("generation_gpu", "Throughput and latency of generation on a GPU")


def mixers():
    """Token mixers: forward + backward in ms"""
    for name in ("mixers_wall", "mixers_width256", "mixers_gpu"):
        cells = [cell for cell in load(name)["cells"] if "seconds" in cell]
        ms = {(c["mixer"], c["L"]): f"{1e3 * c['seconds']:.3g}" for c in cells}
        lengths = sorted({c["L"] for c in cells})
        rows = []
        for mixer in dict.fromkeys(c["mixer"] for c in cells):
            rows.append([mixer, *(ms.get((mixer, L), "–") for L in lengths)])
        head = f"{name}: width {cells[0]['width']}, batch {cells[0]['batch']}"
        yield from table([head, *(f"{L // 1024}k" for L in lengths)], rows)
    yield from picture("mixers", "Time and memory of six mixers against length, forward + backward")


def peers():
    """Our layers beside the authors' code, forward + backward"""
    yield from prose("""To measure, get their code (`git clone https://github.com/state-spaces/s4`) and
        what it imports, build its CUDA kernel (optional: `setup.py build` in s4/extensions/kernels) and
        run `python benchmarks/peers.py --s4 s4`. Nothing of it is part of this repository.""")
    for name in measured("peers_cpu", "peers_gpu"):
        rows = []
        for row in load(name)["rows"]:
            cells = [row["layer"], row["whose"], f"{row['L']:,}"]
            cells += [number(row.get(key), ".3g") for key in ("ms", "captured_ms", "mib")]
            rows.append(cells)
        yield from table(["layer", "whose", "length", "ms", "ms as a CUDA graph", "MiB"], rows)


# ---------------------------------------------------------------- data


def data():
    """Generated data on one core"""
    rows = []
    for row in load("data_speed")["rows"]:
        if "ms_cpu" in row:
            disks = number(row["disks_alone"], ".1%").replace("%", " %")
            rows.append([row["task"], f"{row['ms_cpu']:.1f} ms per picture", disks])
        else:
            levels = [f"{100 * value:.1f} % {name}" for name, value in row["levels"].items()]
            cost = f"{row['s_cpu']:.0f} s for {row['n']:,} trees"
            rows.append([row["task"], cost, ", ".join(levels)])
    yield from table(["task", "processor time", "accuracy of trivial baselines"], rows)
    yield from prose("The baseline of Pathfinder sees only the places of the two disks.")
    yield from picture("pathfinder", "Pathfinder samples at four sizes")


# ---------------------------------------------------------------- attention


def distributed():
    """Attention over two ranks"""
    training = load("distributed_training")["rows"][0]["parallel"]
    memory = load("distributed_memory")["rows"][0]
    yield from prose(f"""Forward + backward at 16,384 tokens, two ranks against one with the fused
        kernel: {training["full"]:.2f} times without a mask, {training["causal"]:.2f} times causal. One
        head at 262,144 tokens: a rank peaks at {memory["peak"] / 1e6:.0f} MB; vanilla attention would
        need {memory["vanilla"] / 1e9:.0f} GB. Most of the forward speedup comes from the fused kernel,
        not from the second rank.""")
    yield from picture("distributed", "Time of attention against length")


# ---------------------------------------------------------------- structured FFNs


def byte_lm():
    """Structured FFNs: a small byte-level language model"""
    rows = []
    for name, row in load("byte_lm")["summary"].items():
        loss = f"{row['loss']:.4f} ± {row['sd']:.4f}"
        rows.append([name, f"{row['params']:,}", f"{row['flops_over_dense']:.3f}", loss])
    yield from table(["", "parameters", "FLOPs / dense", "held-out loss, nats per byte"], rows)
    yield from picture("ffn_scaling", "Loss against training FLOPs")


def ffn_layer():
    """Structured FFNs: efficiency of one layer, 1024 -> 4096, one CPU thread"""
    names = ("ffn_latency", "ffn_latency_epyc")
    columns = []
    head = ["kind, share of weights", "FLOPs / dense"]
    for what, tokens in (("forward", 2048), ("forward + backward", 1024)):
        for name in names:
            columns.append(load(name)["layer"][f"{what}, {tokens}"])
            head.append(f"{what}, {tokens:,} tokens ({name}.json)")
    rows = []
    for ratio in ("0.625", "0.3125"):
        for kind in KINDS:
            cells = [column[f"{kind} {ratio}"] for column in columns]
            row = [f"{kind}, {100 * float(ratio):.0f} %", f"{cells[0]['share']:.2f}"]
            rows.append(row + [f"{cell['efficiency']:.2f}" for cell in cells])
    yield from table(head, rows)
    yield from prose("""Efficiency = relative FLOPs / relative time; at 1.0 every FLOP saved is time
        saved. The rest is memory traffic: the bias, the regrouping, and the output buffer, which is
        reallocated on every call.""")


def ffn_gpu():
    """Structured FFNs on a GPU: a whole FFN at 31 % of the weights, bfloat16"""
    rows = []
    for key, row in load("ffn_latency_gpu")["ffn"].items():
        width, tokens = key.split(", ")
        speeds = [f"{row[f'{kind} speed']:.2f}" for kind in KINDS]
        rows.append([width, f"{int(tokens):,}", f"{row['dense']:.2f}", *speeds])
    yield from table(["width", "tokens", "dense, ms", *(f"{k}, times" for k in KINDS)], rows)
    yield from prose("""The paper reports 2.6, 2.6 and 2.0 times at width 5120 with 30k tokens on an
        A100. With few tokens, launch overhead dominates and times vary up to twofold between runs.""")
    yield from picture("ffn_latency_gpu", "Speed of FFNs on a GPU against the number of tokens")


def token_mixing():
    """One template for all token mixers"""
    d = load("token_mixing")
    ranks = {mixer["mixer"]: mixer["off-diagonal rank"] for mixer in d["mixers"]}
    yield from prose(f"""Six mixers written as y = M(x) v, our reading of the unified view
        (2302.06218). S4's state shows as the rank of any block off the diagonal ({ranks["S4"]} for S4,
        {ranks["S4D"]} for S4D, with d_state {d["settings"]["N"]}), convolutions as Toeplitz matrices;
        only attention and the MLP mixer change with their input.""")
    yield from picture("token_mixing", "Mixing matrices of six layers")


SECTIONS = (demonstration, pictures, step_time, full_size, s4_kernel, generation, mixers, peers,
            data, distributed, byte_lm, ffn_layer, ffn_gpu, token_mixing, sources)  # fmt: skip


def page():
    """The text of RESULTS.md."""
    lines = ["# Results", ""]
    lines += prose("""Written by `python benchmarks/results_page.py` from the files in results/; do not
        edit it by hand. Every file names its command, hardware, date, torch version and commit. Numbers
        vary slightly between machines; expect single runs to differ by about one standard
        deviation.""")
    lines += ["## What the papers claim, and what came out here", ""]
    lines += prose("""A difference counts when it exceeds two standard errors of the means over seeds
        (the rules are in `benchmarks/judges.py`). Verdicts hold at this scale, a two-core machine or
        minutes of one GPU, and no further. `python benchmarks/claims.py ROW --anew` measures a row
        again. Minutes are the sum over all runs; ± is the standard deviation over seeds.""")
    lines += [*claims.table(), ""]
    for section in SECTIONS:
        lines += [f"## {section.__doc__}", "", *section()]
    return "\n".join(lines).rstrip() + "\n"


# ---------------------------------------------------------------- README.md


def demo_screen():
    """What `python pretrain.py` prints after training, from demo.json, seed 0."""
    results = {}
    for name, row in load("demo")["arms"].items():
        results[name] = {
            "parameters": row["parameters"],
            "config": row["settings"],
            "test": {"accuracy": row["test"][0] / 100},
        }
    yield from demo.table(results)


def front_page_numbers():
    """The sentences of README.md that hold a measured number."""
    forms = {(c["form"], c["width"], c["L"]): c["seconds"] for c in load("s4_kernel")["cells"]}
    kernel = forms["naive Cauchy", 16, 16384] / forms["two-level", 16, 16384]
    ffn = load("ffn_latency_gpu")["ffn"]["5120, 30720"]["lowrank speed"]
    return [
        f"At length 16,384 its kernel is {kernel:.0f} times faster on a CPU than the Cauchy kernel, "
        "written plainly.",
        f"a LowRank FFN of width 5120 is {ffn:.1f} times as fast as dense",
    ]


def write():
    """Rewrite RESULTS.md, and in README.md the line counts and the screen of the demonstration."""
    (ROOT / "RESULTS.md").write_text(page(), encoding="utf-8")
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")

    def count(match):
        lines = len((ROOT / match[1]).read_text(encoding="utf-8").splitlines())
        return f"| [`{match[1]}`]({match[1]}) | {lines} |"

    text = re.sub(r"\| \[`(\w+\.py)`\]\(\1\) \| [\d,]+ \|", count, text)
    screen = "\n\n```\n" + "\n".join(demo_screen()) + "\n```"
    text = re.sub(r"\n\n```\n.*?```", lambda _: screen, text, count=1, flags=re.S)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    takes_no_arguments(__doc__)
    write()
