"""The papers' claims beside what was measured here: one table, one command per row.

    python benchmarks/claims.py --list             the rows, their commands and verdicts
    python benchmarks/claims.py context            judge a row; run it if its file is missing
    python benchmarks/claims.py context --anew     run it again and print old and new
    python benchmarks/claims.py --all              run every laptop row whose file is missing
    python benchmarks/claims.py --table            rewrite results/claims.json and RESULTS.md

Each row names a command that writes a file into results/ and a judge from judges.py that reads it.
Rows that train models reuse finished runs in runs/ (same bits).  Rows that need a GPU or downloads
are never run by --all.
"""

import argparse
import importlib.util
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import judges
from judges import HOLDS, UNRUN
from measured import ROOT, provenance, save


@dataclass(frozen=True)
class Claim:
    """A row of the table.

    says, theirs: the paper's claim and number.  command writes results/`file`; `judge` maps its
    content to (our numbers in words, verdict), None if it was not run.  why: the likely reason,
    shown unless the claim holds.
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

    @property
    def path(self):
        return ROOT / "results" / self.file


# ---------------------------------------------------------------- the rows

PRETRAINING = "python benchmarks/pretraining.py "
# name, task, model flags, steps, evaluation interval, learning rate
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
        PRETRAINING + "objectives", "pretraining_objectives.json", judges.gap_closes,
        why="The largest learning rate of the grid was best, so more may be possible",
    ),
    Claim(
        "listops-gap", "2310.02980", "the same on ListOps (here: below 128 tokens)",
        "Transformer 47.9 -> 61.5, S4 59.6 (unverified)",
        PRETRAINING + "listops", "pretraining_listops.json", judges.listops_gap,
        why="Pretraining hurts here, probably because it uses up part of the 2,000-step budget",
    ),
    Claim(
        "listops-gpu", "2310.02980", "the same on ListOps at its published length",
        "Transformer 47.9 -> 61.5, S4 59.6 (unverified)",
        LISTOPS_GPU, "gpu_listops.json", judges.listops_gap,
        why="Two epochs, 390 s on a GPU shared by all arms: no arm is far above the 35.9 % that "
        "the root operator alone gives", scale="one GPU",
    ),
    Claim(
        "causal", "2310.02980", "causal (next-token) pretraining works as well",
        "LRA mean 81.8, masked 81.3",
        PRETRAINING + "causal --workers 2", "pretraining_causal.json", judges.causal_too,
        why="Only the Transformer's gain exceeds two standard errors",
    ),
    Claim(
        "all-gain", "2310.02980", "other architectures gain as well", "S4 86.1 -> 86.8",
        PRETRAINING + "objectives", "pretraining_objectives.json", judges.all_gain,
        why="From scratch they are already within two points of the best arm (85.3)",
    ),
    Claim(
        "redundant", "2310.02980", "structured parameterization becomes redundant",
        "plain recurrence 77 -> 83.4, S4 82.8 -> 84.5 (four tasks)",
        PRETRAINING + "objectives", "pretraining_objectives.json", judges.redundant,
        why="Evenly spaced frequencies do as well as HiPPO's here",
    ),
    Claim(
        "random-init", "2310.02980", "pretraining makes up for a random initialization", "",
        PRETRAINING + "init", "pretraining_init.json", judges.random_start,
        why="Seeds differ by ten points",
    ),
    Claim(
        "share", "2310.02980", "a small share of the compute is enough", "curves",
        PRETRAINING + "share --seeds 0 1 2 3 4 5", "pretraining_share.json",
        judges.modest_share,
        why="With a quarter of the steps two of six seeds fail, one far below; half is enough",
    ),
    Claim(
        "labels", "2310.02980", "it helps most when labels are few", "up to about 30 %",
        PRETRAINING + "labels", "pretraining_labels.json", judges.few_labels,
        why="It helps about as much at 1,000 labels as at 100",
    ),
    Claim(
        "lra", "2310.02980", "the Long Range Arena itself, at full size", "mean 53.6 -> 86.2",
        "python pretrain.py --settings settings/listops-transformer.json",
        why="days of one GPU per task; most data must be downloaded", scale="paper",
    ),
    Claim(
        "kernel-cost", "2111.00396",
        "a numerically stable kernel whose cost grows about linearly with L", "O(N + L)",
        "python benchmarks/s4_kernel.py --clock cpu --threads 1 --rounds 2",
        "s4_kernel.json", judges.kernel_cost,
    ),
    Claim(
        "generation", "2111.00396", "generates faster than a Transformer", "60 times (GPU)",
        "python benchmarks/generation.py --contexts 1024 2048 4096 8192 16384 --clock cpu "
        "--threads 1 --budget 0.4 --max-batch 256",
        "generation.json", judges.generation,
        why="S4 is bound by launching 16 small blocks per token, attention by reading its cache",
    ),
    Claim(
        "generation-gpu", "2111.00396", "the same on a GPU", "60 times",
        "python benchmarks/generation.py --device cuda --contexts 1024 4096 16384 --cap-gib 16 "
        "--max-batch 16384 --budget 0.3 --out results/generation_gpu.json",
        "generation_gpu.json", judges.generation,
        why="16 GiB of float32 states for each model; the ratio grows with the context",
        scale="one GPU",
    ),
    Claim(
        "recall", "2111.00396", "remembers over 16k steps what a Transformer does not",
        "Path-X: 88 to 96 %, Transformers fail",
        "python benchmarks/recall.py --lengths 1024 16384 --extra", "recall.json", judges.recall,
        why="At 1k the difference is cost, not ability; 16k was too slow to tell",
    ),
    Claim(
        "cifar", "2111.00396", "sequential CIFAR-10 without augmentation, at two resolutions",
        "91 %", "python pretrain.py --settings settings/scifar-s4.json",
        why="hours of one GPU; the images must be downloaded", scale="one GPU",
    ),
    Claim(
        "sgconv-faster", "2210.09298", "faster than S4, forward and backward", "curves",
        "python benchmarks/mixers.py --mixers 'bare FFT' SGConv S4 --rounds 3 "
        "--out results/mixers_wall.json", "mixers_wall.json", judges.sgconv_faster,
    ),
    Claim(
        "sgconv-faster-gpu", "2210.09298", "the same on a GPU", "curves",
        "python benchmarks/mixers.py --device cuda --width 256 --batch 8 --lengths 1024 4096 "
        "--mixers 'bare FFT' SGConv S4D S4 'attention fused' --max-gib 40 "
        "--out results/mixers_gpu.json", "mixers_gpu.json", judges.sgconv_faster, scale="one GPU",
    ),
    Claim(
        "sgconv-better", "2210.09298", "better than S4", "LRA mean 87.2 against 86.1",
        AGAINST_S4, "sgconv_against_s4.json", judges.sgconv_better,
        why="Better on one of two small tasks, not on the other",
    ),
    Claim(
        "sgconv-principles", "2210.09298", "decay and few parameters are both needed", "ablations",
        "python benchmarks/sgconv_ablation.py", "sgconv_ablation.json", judges.both_principles,
        why="At 64 positions a dense kernel without decay is no handicap",
    ),
    Claim(
        "ffn-speed", "2406.16450", "structured FFNs run faster", "2.6 times with 32 % (GPU)",
        "python benchmarks/ffn_latency.py", "ffn_latency.json", judges.ffn_speed,
        why="With one token at small widths, launch overhead dominates",
    ),
    Claim(
        "pre-merge", "2406.16450", "merged weights decode few tokens faster",
        "online decoding, GPU",
        "python benchmarks/ffn_latency.py", "ffn_latency.json", judges.merging,
        why="One token reads every weight once, and the merged matrix has three times as many",
    ),
    Claim(
        "ffn-speed-gpu", "2406.16450", "structured FFNs run faster on a GPU",
        "2.6, 2.6, 2.0 times at width 5120 with 32 %", FFN_GPU, "ffn_latency_gpu.json",
        judges.ffn_speed_gpu, scale="one GPU",
    ),
    Claim(
        "pre-merge-gpu", "2406.16450", "merged weights decode few tokens faster on a GPU",
        "online decoding", FFN_GPU, "ffn_latency_gpu.json", judges.merging, scale="one GPU",
    ),
    Claim(
        "self-guided", "2406.16450", "self-guided training fixes slow early training",
        "perplexity gap 1.0 -> 0.4", "python benchmarks/self_guided.py --steps 1000 --seeds 3",
        "self_guided.json", judges.self_guided,
    ),
    Claim(
        "self-guided-language", "2406.16450", "self-guided training pays for itself on language",
        "perplexity gap 1.0 -> 0.4 at equal FLOPs",
        "python benchmarks/byte_lm.py --guided --steps 500", "byte_lm_guided.json",
        judges.guided_language,
        why="500 steps may be too few: half of them are guided (not tested further)",
    ),
    Claim(
        "scaling", "2406.16450", "loss falls more steeply with FLOPs than dense", "curves",
        "python benchmarks/ffn_scaling.py --bytes-a-weight 4 --seeds 3", "ffn_scaling.json",
        judges.steeper,
        why="Four widths from 32 to 80, 4 bytes per weight: far from the paper's scale",
    ),
    Claim(
        "wide-structured", "2406.16450", "wide and structured beats dense at equal FLOPs",
        "perplexity 17.89 against 18.23", "python benchmarks/byte_lm.py", "byte_lm.json",
        judges.wide_structured,
        why="LowRank is the best kind in the paper, but not here",
    ),
    Claim(
        "distributed", "2302.06218", "distributed attention against vanilla",
        "almost 40 times, 4 GPUs",
        "torchrun --standalone --nproc-per-node 2 benchmarks/distributed.py --rounds 2 "
        "--memory-limit 7", "distributed.json", judges.parallel_attention,
        why="Two CPU ranks, not four GPUs",
    ),
    Claim(
        "million", "2302.06218", "million-scale dependencies", "abstract",
        "torchrun --standalone --nproc-per-node 2 benchmarks/distributed.py --tokens 1048576 "
        "--heads 1 --timeout 14400 --name distributed_million", "distributed_million.json",
        judges.million,
    ),
    Claim(
        "million-gpu", "2302.06218", "the same with two ranks on one GPU", "abstract",
        "torchrun --standalone --nproc-per-node 2 benchmarks/distributed.py --tokens 1048576 "
        "--heads 1 --device cuda --name distributed_million_gpu", "distributed_million_gpu.json",
        judges.million, scale="one GPU",
    ),
    Claim(
        "context", "2302.06218", "longer context performs better, depending on the application",
        "abstract", "python benchmarks/context.py", "context.json", judges.longer_context,
        why="The first doublings help; beyond 64 bytes there is no gain within 500 steps",
    ),
    Claim(
        "template", "2302.06218", "long-sequence models share one template of token mixing", "",
        "python benchmarks/token_mixing.py", "token_mixing.json", judges.one_template,
    ),
    Claim(
        "sequence-parallel", "beyond", "S4 and SGConv train on sequences split over ranks, exactly",
        "", "python -m pytest tests/test_sequence_parallel.py", "claims_sequence_parallel.json",
        judges.tests_pass,
    ),
    Claim(
        "exact-gradients", "beyond", "distributed gradients are those of one process", "",
        "python -m pytest tests/test_dist_attention.py", "claims_exact_gradients.json",
        judges.tests_pass,
    ),
    Claim(
        "resume", "beyond", "ten kills, half of them during a checkpoint write, change no bit", "",
        "python -m pytest tests/test_pretrain.py -k kills", "claims_resume.json", judges.tests_pass,
    ),
]  # fmt: skip


# ---------------------------------------------------------------- measure, judge, show


def measure(claim):
    """Run the row's command.  It resumes a partial file; a test run leaves its counts."""
    if not importlib.util.find_spec("matplotlib"):
        sys.exit("claims.py: plots need matplotlib: pip install -r benchmarks/requirements.txt")
    print(f"{claim.name}: {claim.command}", flush=True)
    program, *words = shlex.split(claim.command)
    if program == "torchrun":  # works without an activated environment too
        words = ["-m", "torch.distributed.run", *words]
    words = [sys.executable, *words]
    if "pytest" in words:
        count_tests(claim, words)
    else:
        subprocess.run(words, cwd=ROOT, check=True)


def count_tests(claim, words):
    """Run pytest; write the numbers of passed, failed and skipped tests into the row's file."""
    origin = provenance()
    start = time.time()
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-500:])
    result = {"command": claim.command, "returncode": done.returncode}
    for outcome in ("passed", "failed", "skipped"):
        result[outcome] = sum(map(int, re.findall(rf"(\d+) {outcome}", done.stdout)))
    result["seconds"] = round(time.time() - start)
    save(claim.path, origin | result)


def measure_anew(claim):
    """Measure from nothing; the old file stays if the command fails."""
    old = claim.path.read_text("utf-8") if claim.path.exists() else None
    claim.path.unlink(missing_ok=True)
    try:
        measure(claim)
    finally:
        if old is not None and not claim.path.exists():
            claim.path.write_text(old, encoding="utf-8")


def minutes(content):
    """Minutes that the runs in a file took, or None."""
    seconds = 0
    for row in content.get("arms", {}).values():
        seconds += sum(row.get("seconds", []))
    for run in content.get("runs", []):
        seconds += run.get("cpu_s", 0)
    seconds = seconds or content.get("seconds") or 0
    return round(seconds / 60, 1) or None


def judge(claim):
    """The row as a dict: the claim, our numbers, the verdict, seeds, hardware, date and commit."""
    row = {k: getattr(claim, k) for k in ("paper", "says", "theirs", "scale", "command", "file")}
    if not claim.file or not claim.path.exists():
        return row | {"ours": claim.why, "verdict": UNRUN}
    content = json.loads(claim.path.read_text("utf-8"))
    ours, verdict = claim.judge(content)
    row["minutes"] = minutes(content)
    for key in ("seeds", "date", "commit", "hardware", "cpu", "torch"):
        if content.get(key) is not None:
            row[key] = content[key]
    seeds = {run.get("seed") for run in content.get("runs", [])} - {None}
    if seeds:
        row.setdefault("seeds", sorted(seeds))
    if claim.scale == "one GPU":
        origin = content if "hardware" in content else content["cells"][0]["run"]
        ours = f"{origin['hardware'].split(', ')[-1]}: {ours}"
    if verdict != HOLDS and claim.why:
        ours += f". {claim.why}"
    return row | {"ours": ours, "verdict": verdict}


def table(rows):
    """Lines of the table in RESULTS.md."""
    yield "| claim | the paper | here | seeds, minutes | verdict | row |"
    yield "|---|---|---|---|---|---|"
    for name, row in rows.items():
        effort = []
        if row.get("seeds"):
            effort.append(str(len(row["seeds"])))
        if (row.get("minutes") or 0) >= 1:
            effort.append(f"{row['minutes']:.0f} min")
        cells = [f"{row['says']} ({row['paper']})", row["theirs"], row["ours"]]
        cells += [", ".join(effort), row["verdict"], f"`{name}`"]
        yield "| " + " | ".join(cell or "–" for cell in cells) + " |"


def show(name, row):
    print(f"{name:20}{row['verdict']:20}{row['ours']}\n{'':20}{row['command']}")


def update(claim, anew):
    """Measure what was asked for, and say what was and was not done."""
    if not claim.file:
        print(f"{claim.name}: not run ({claim.why}); its command is\n  {claim.command}")
        return
    old = judge(claim)
    if claim.path.exists() and not anew:
        origin = f"{old.get('date', '')}, commit {old.get('commit', '')}"
        print(f"{claim.name}: nothing was run; results/{claim.file} is of {origin}.")
        print("  --anew runs the command again.")
    elif claim.path.exists():
        measure_anew(claim)
        print(f"before: {old['verdict']}: {old['ours']}")
    else:
        measure(claim)
    show(claim.name, judge(claim))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="row", help="row to judge, or to run")
    parser.add_argument("--all", action="store_true", help="run laptop rows that have no file yet")
    parser.add_argument("--anew", action="store_true", help="run again, even with a file")
    parser.add_argument("--list", action="store_true", help="show all rows")
    parser.add_argument("--table", action="store_true", help="rewrite claims.json and RESULTS.md")
    args = parser.parse_args()
    known = {claim.name: claim for claim in CLAIMS}
    if unknown := set(args.names) - known.keys():
        parser.error(f"unknown row {', '.join(unknown)}; choose from {', '.join(known)}")
    if not (args.names or args.all or args.list or args.table):
        parser.error("name a row, or pass --all, --list or --table")
    for name in args.names:
        update(known[name], args.anew)
    if args.all:
        for claim in CLAIMS:
            if claim.file and claim.scale == "laptop" and not claim.path.exists():
                update(claim, anew=False)
    rows = {claim.name: judge(claim) for claim in CLAIMS}
    if args.list:
        for name, row in rows.items():
            show(name, row)
    if args.table:
        import results_page  # which imports this file

        save(ROOT / "results/claims.json", rows)
        results_page.write()


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"claims.py: {shlex.join(map(str, error.cmd))} ended with {error.returncode}")
