"""The papers' claims beside what was measured here: one table.

    python benchmarks/claims.py --list             the rows, their commands and verdicts
    python benchmarks/claims.py context            judge a row; run it if its file is missing
    python benchmarks/claims.py context --anew     run it again and print old and new

Each row names a file in results/, which holds the command that wrote it, and a judge from judges.py
that reads it.  Rows that train models reuse finished runs in runs/ (same bits).
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

import judges
from judges import HOLDS, UNRUN, pairs
from measured import ROOT, provenance, save


@dataclass(frozen=True)
class Claim:
    """A row of the table.

    says, theirs: the paper's claim and number.  judge maps the content of results/`file` to (our
    numbers in words, verdict).  why: the likely reason, shown unless the claim holds.  command:
    what writes the file, where there is none yet or the option --out is needed.
    """

    name: str
    paper: str
    says: str
    theirs: str
    file: str = ""
    judge: Callable | None = None
    why: str = ""
    command: str = ""
    scale: str = "laptop"

    @property
    def path(self):
        return ROOT / "results" / self.file

    def content(self):
        """What the results file holds; {} if there is none yet."""
        if not self.file or not self.path.exists():
            return {}
        return json.loads(self.path.read_text("utf-8"))


# ---------------------------------------------------------------- the rows

GPU = "python benchmarks/gpu.py "  # which does all that follows on a GPU
MODELS = ("Transformer", "S4", "SGConv", "diagonal")
BYTE_LM = ("LowRank", "BlockShuffle")
LISTOPS = "Transformer 47.9 -> 61.5, S4 59.6 (unverified)"
FFN_GPU = (
    "python benchmarks/ffn_latency.py --device cuda --dtype bfloat16 --widths 1024 2048 5120 "
    "--tokens 1 16 256 2048 30720 --out results/ffn_latency_gpu.json"
)
CLAIMS = [
    Claim("scratch-gap", "2310.02980",
          "pretrained on the task's own data, a Transformer matches S4",
          "LRA mean 53.6 -> 86.2, S4 86.1", "pretraining_objectives.json", judges.lattice_gap,
          "The largest learning rate of the grid was best, so more may be possible"),
    Claim("listops-gap", "2310.02980", "the same on ListOps (here: below 128 tokens)", LISTOPS,
          "pretraining_listops.json", judges.task_gap,
          "Pretraining hurts here, probably because it uses up part of the 2,000-step budget"),
    Claim("listops-gpu", "2310.02980", "the same on ListOps at its published length", LISTOPS,
          "gpu_listops.json", judges.task_gap,
          "Two epochs, 390 s on a GPU shared by all arms: no arm is far above the 35.9 % that "
          "the root operator alone gives", scale="one GPU"),
    Claim("causal", "2310.02980", "causal (next-token) pretraining works as well",
          "LRA mean 81.8, masked 81.3", "pretraining_causal.json",
          pairs(*[(f"{model}, pretrained", f"{model}, from scratch") for model in MODELS]),
          "Only the Transformer's gain exceeds two standard errors"),
    Claim("all-gain", "2310.02980", "other architectures gain as well", "S4 86.1 -> 86.8",
          "pretraining_objectives.json",
          pairs(*[(f"{model}-masked", f"{model}-scratch") for model in MODELS[1:]]),
          "From scratch they are already within two points of the best arm (85.3)"),
    Claim("redundant", "2310.02980", "structured parameterization becomes redundant",
          "plain recurrence 77 -> 83.4, S4 82.8 -> 84.5 (four tasks)",
          "pretraining_objectives.json", judges.redundant,
          "Evenly spaced frequencies do as well as HiPPO's here"),
    Claim("random-init", "2310.02980", "pretraining makes up for a random initialization", "",
          "pretraining_init.json",
          pairs(("S4 at random, pretrained", "S4 at random, from scratch")),
          "Seeds differ by ten points"),
    Claim("share", "2310.02980", "a small share of the compute is enough", "curves",
          "pretraining_share.json", judges.modest_share,
          "With a quarter of the steps two of six seeds fail, one far below; half is enough"),
    Claim("labels", "2310.02980", "it helps most when labels are few", "up to about 30 %",
          "pretraining_labels.json", judges.few_labels,
          "It helps about as much at 1,000 labels as at 100"),
    Claim("pictures", "2310.02980", "pretraining pays at equal steps on a real data set, "
          "Fashion-MNIST at 14 x 14", "sequential CIFAR-10: Transformer + 11 points",
          "fashion_mnist.json",
          pairs(*[(f"{model}, pretrained, {budget}", f"{model}, from scratch, {budget}")
                  for budget in ("1x", "3x") for model in MODELS[:2]])),
    Claim("listops-lra", "2310.02980", "the same on ListOps at its published length, 20 epochs",
          LISTOPS, "gpu_lra_listops.json", judges.task_gap,
          "From scratch S4 overfits: its validation accuracy falls from 52.9 to 50.3 %",
          command=GPU + "listops", scale="one GPU"),
    Claim("pathfinder-lra", "2310.02980", "the same on Pathfinder-32",
          "Transformer 71.4 -> 88.5, S4 94.2 (unverified)", "gpu_lra_pathfinder.json",
          judges.task_gap, command=GPU + "pathfinder", scale="one GPU"),
    Claim("pictures-lra", "2310.02980", "the same on Fashion-MNIST at 784 pixels", "",
          "gpu_lra_fashion.json", judges.task_gap, command=GPU + "fashion", scale="one GPU"),
    Claim("lra", "2310.02980", "the Long Range Arena itself, at full size", "mean 53.6 -> 86.2",
          why="days of one GPU per task; most data must be downloaded",
          command="python pretrain.py --settings settings/listops-transformer.json", scale="paper"),
    Claim("kernel-cost", "2111.00396",
          "a numerically stable kernel whose cost grows about linearly with L", "O(N + L)",
          "s4_kernel.json", judges.kernel_cost),
    Claim("generation", "2111.00396", "generates faster than a Transformer", "60 times (GPU)",
          "generation.json", judges.generation,
          "S4 is bound by launching 16 small blocks per token, attention by reading its cache"),
    Claim("generation-gpu", "2111.00396", "the same on a GPU", "60 times",
          "generation_gpu.json", judges.generation,
          "16 GiB of float32 states each, keys and values half full: bandwidth allows 32",
          "python benchmarks/generation.py --device cuda --contexts 1024 4096 16384 --cap-gib 16 "
          "--max-batch 16384 --budget 0.3 --out results/generation_gpu.json", "one GPU"),
    Claim("recall", "2111.00396", "remembers over 16k steps what a Transformer does not",
          "Path-X: 88 to 96 %, Transformers fail", "recall.json", judges.recall,
          "At 1k the difference is cost, not ability; 16k was too slow to tell"),
    Claim("cifar", "2111.00396", "sequential CIFAR-10 without augmentation, at two resolutions",
          "91 %", why="hours of one GPU; the images must be downloaded",
          command="python pretrain.py --settings settings/scifar-s4.json", scale="one GPU"),
    Claim("sgconv-faster", "2210.09298", "faster than S4, forward and backward", "curves",
          "mixers_wall.json", judges.sgconv_faster,
          command="python benchmarks/mixers.py --mixers 'bare FFT' SGConv S4 --rounds 3 "
          "--out results/mixers_wall.json"),
    Claim("sgconv-faster-gpu", "2210.09298", "the same on a GPU", "curves",
          "mixers_gpu.json", judges.sgconv_faster,
          command="python benchmarks/mixers.py --device cuda --width 256 --batch 8 "
          "--lengths 1024 4096 --mixers 'bare FFT' SGConv S4D S4 'attention fused' --max-gib 40 "
          "--out results/mixers_gpu.json", scale="one GPU"),
    Claim("sgconv-better", "2210.09298", "better than S4", "LRA mean 87.2 against 86.1",
          "sgconv_against_s4.json",
          pairs(("lattice, SGConv", "lattice, S4"),
                ("listops-tiny, SGConv at 3e-3", "listops-tiny, S4 at 3e-3")),
          "Better on one of two small tasks, not on the other"),
    Claim("sgconv-principles", "2210.09298", "decay and few parameters are both needed",
          "ablations", "sgconv_ablation.json", judges.both_principles,
          "At 64 positions a dense kernel without decay is no handicap"),
    Claim("ffn-speed", "2406.16450", "structured FFNs run faster", "2.6 times with 32 % (GPU)",
          "ffn_latency.json", judges.ffn_speed,
          "With one token at small widths, launch overhead dominates"),
    Claim("pre-merge", "2406.16450", "merged weights decode few tokens faster",
          "online decoding, GPU", "ffn_latency.json", judges.merging,
          "One token reads every weight once, and the merged matrix has three times as many"),
    Claim("ffn-speed-gpu", "2406.16450", "structured FFNs run faster on a GPU",
          "2.6, 2.6, 2.0 times at width 5120 with 32 %", "ffn_latency_gpu.json",
          judges.ffn_speed_gpu, command=FFN_GPU, scale="one GPU"),
    Claim("pre-merge-gpu", "2406.16450", "merged weights decode few tokens faster on a GPU",
          "online decoding", "ffn_latency_gpu.json", judges.merging,
          command=FFN_GPU, scale="one GPU"),
    Claim("self-guided", "2406.16450", "self-guided training fixes slow early training",
          "perplexity gap 1.0 -> 0.4", "self_guided.json", judges.self_guided),
    Claim("self-guided-language", "2406.16450", "self-guided training pays for itself on language",
          "perplexity gap 1.0 -> 0.4 at equal FLOPs", "byte_lm_guided.json",
          pairs(*[(f"{kind}, self-guided", f"{kind}, longer") for kind in BYTE_LM],
                digits=3, better=-1),
          "500 steps may be too few: half of them are guided (not tested further)"),
    Claim("scaling", "2406.16450", "loss falls more steeply with FLOPs than dense", "curves",
          "ffn_scaling.json", judges.steeper,
          "Four widths from 32 to 80, 4 bytes per weight: far from the paper's scale"),
    Claim("wide-structured", "2406.16450", "wide and structured beats dense at equal FLOPs",
          "perplexity 17.89 against 18.23", "byte_lm.json",
          pairs(*[(f"wide {kind}", "dense") for kind in BYTE_LM], digits=4, better=-1),
          "LowRank is the best kind in the paper, but not here"),
    Claim("distributed", "2302.06218", "distributed attention against vanilla",
          "almost 40 times, 4 GPUs", "distributed.json", judges.parallel_attention,
          "Two CPU ranks, not four GPUs"),
    Claim("million", "2302.06218", "million-scale dependencies", "abstract",
          "distributed_million.json", judges.million),
    Claim("million-gpu", "2302.06218", "the same with two ranks on one GPU", "abstract",
          "distributed_million_gpu.json", judges.million, scale="one GPU"),
    Claim("context", "2302.06218", "longer context performs better, depending on the application",
          "abstract", "context.json", judges.longer_context,
          "The first doublings help; beyond 64 bytes there is no gain within 500 steps"),
    Claim("template", "2302.06218", "long-sequence models share one template of token mixing", "",
          "token_mixing.json", judges.one_template),
    Claim("sequence-parallel", "beyond",
          "S4 and SGConv train on sequences split over ranks, exactly", "",
          "claims_sequence_parallel.json", judges.tests_pass),
    Claim("exact-gradients", "beyond", "distributed gradients are those of one process", "",
          "claims_exact_gradients.json", judges.tests_pass),
    Claim("gpu-tests", "beyond", "all tests that need a GPU pass", "", "claims_gpu_tests.json",
          judges.tests_pass, command="python -m pytest -m gpu", scale="one GPU"),
    Claim("resume", "beyond", "ten kills, half of them during a checkpoint write, change no bit",
          "", "claims_resume.json", judges.tests_pass),
]  # fmt: skip


# ---------------------------------------------------------------- measure, judge, show


def command_of(claim):
    content = claim.content()
    if not claim.command and not content:
        sys.exit(
            f"claims.py: results/{claim.file}, which names its command, is missing: restore it"
        )
    return claim.command or content["command"]


def measure(claim, command):
    """Run the command.  It resumes a partial file; a test run leaves its counts."""
    print(f"{claim.name}: {command}", flush=True)
    program, *words = shlex.split(command)
    if program == "torchrun":  # works without an activated environment too
        words = ["-m", "torch.distributed.run", *words]
    words = [sys.executable, *words]
    if "pytest" in words:
        count_tests(claim, command, words)
    else:
        subprocess.run(words, cwd=ROOT, check=True)


def count_tests(claim, command, words):
    """Run pytest; write the numbers of passed, failed and skipped tests into the row's file."""
    origin = provenance()
    start = time.time()
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-500:])
    result = {"command": command, "returncode": done.returncode}
    for outcome in ("passed", "failed", "skipped"):
        result[outcome] = sum(map(int, re.findall(rf"(\d+) {outcome}", done.stdout)))
    result["seconds"] = round(time.time() - start)
    save(claim.path, origin | result)


def measure_anew(claim):
    """Measure from nothing; the old file stays if the command fails."""
    old = claim.path.read_text("utf-8")
    command = command_of(claim)
    claim.path.unlink()
    try:
        measure(claim, command)
    finally:
        if not claim.path.exists():
            claim.path.write_text(old, encoding="utf-8")


def effort(content):
    """Number of seeds and minutes that the runs in a file took, in words."""
    runs = content.get("runs", [])
    seconds = content["seconds"] if "passed" in content else 0
    seconds += sum(run.get("cpu_s", 0) for run in runs)
    for row in content.get("arms", {}).values():
        seconds += sum(row.get("seconds", []))
    seeds = content.get("seeds") or {run["seed"] for run in runs}
    words = [str(len(seeds))] if seeds else []
    if seconds >= 60:
        words.append(f"{seconds / 60:.0f} min")
    return ", ".join(words)


def judge(claim):
    """(our numbers in words, verdict)."""
    content = claim.content()
    if not content:
        return claim.why or f"needs {claim.scale}", UNRUN
    ours, verdict = claim.judge(content)
    if claim.scale == "one GPU":
        origin = content if "hardware" in content else content["cells"][0]["run"]
        ours = f"{origin['hardware'].split(', ')[-1]}: {ours}"
    if verdict != HOLDS and claim.why:
        ours += f". {claim.why}"
    return ours, verdict


def table():
    """Lines of the table in RESULTS.md."""
    yield "| claim | the paper | here | seeds, minutes | verdict | row |"
    yield "|---|---|---|---|---|---|"
    for claim in CLAIMS:
        ours, verdict = judge(claim)
        cells = [f"{claim.says} ({claim.paper})", claim.theirs, ours]
        cells += [effort(claim.content()), verdict, f"`{claim.name}`"]
        yield "| " + " | ".join(cell or "–" for cell in cells) + " |"


def show(claim):
    ours, verdict = judge(claim)
    print(f"{claim.name:20}{verdict:20}{ours}\n{'':20}{command_of(claim)}")


def update(claim, anew):
    """Measure what was asked for, and say what was and was not done."""
    old = claim.content()
    if not claim.file:
        print(f"{claim.name}: too long for this script; its command follows")
    elif old and not anew:
        origin = f"{old.get('date', '')}, commit {old.get('commit', '')}"
        print(f"{claim.name}: nothing was run; results/{claim.file} is of {origin}.")
        print("  --anew runs the command again.")
    elif old:
        ours, verdict = judge(claim)
        measure_anew(claim)
        print(f"before: {verdict}: {ours}")
    else:
        measure(claim, command_of(claim))
    show(claim)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="row", help="row to judge, or to run")
    parser.add_argument("--anew", action="store_true", help="run again, even with a file")
    parser.add_argument("--list", action="store_true", help="show all rows")
    args = parser.parse_args()
    known = {claim.name: claim for claim in CLAIMS}
    if unknown := set(args.names) - known.keys():
        parser.error(f"unknown row {', '.join(unknown)}; choose from {', '.join(known)}")
    if not (args.names or args.list):
        parser.error("name a row, or pass --list")
    for name in args.names:
        update(known[name], args.anew)
    if args.list:
        for claim in CLAIMS:
            show(claim)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"claims.py: {shlex.join(map(str, error.cmd))} ended with {error.returncode}")
