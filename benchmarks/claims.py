"""The papers' claims beside what was measured here: one table, one command a row.

    python benchmarks/claims.py --list             the rows, how each is measured, its verdict
    python benchmarks/claims.py context            complete what a row's file lacks, judge it
    python benchmarks/claims.py context --anew     measure it from the start
    python benchmarks/claims.py --all              every laptop row whose result file is missing
    python benchmarks/claims.py --table            judge the files in results/, write README's table

Each row names the command that writes a file into results/ and a function that reads that file and
says what came out by the rules of judges.py. Verdicts go into results/claims.json, from which the
README's table is written. Rows of trained models take finished runs from runs/, where there are any
(the same bits); a row that needs a GPU or data to be fetched is never run by --all.
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

COUNTED = ("passed", "failed", "skipped")


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
        PRETRAINING + "objectives", "pretraining_objectives.json", judges.gap_closes,
        why="The largest rate of the grid was best, so more may be left",
    ),
    Claim(
        "listops-gap", "2310.02980", "the same on ListOps (here: below 128 tokens)",
        "Transformer 47.9 -> 61.5, S4 59.6 (unverified)",
        PRETRAINING + "listops", "pretraining_listops.json", judges.listops_gap,
        why="Pretraining costs points: the steps it takes, out of 2,000, may be missing afterwards",
    ),
    Claim(
        "listops-gpu", "2310.02980", "the same on ListOps at its published length",
        "Transformer 47.9 -> 61.5, S4 59.6 (unverified)",
        LISTOPS_GPU, "gpu_listops.json", judges.listops_gap,
        why="Two epochs in 390 s of a GPU that the arms shared: none is far past what the root "
        "operator alone gives away (35.9 %)", scale="one GPU",
    ),
    Claim(
        "causal", "2310.02980", "causal denoising does it too", "LRA mean 81.8, masked 81.3",
        PRETRAINING + "causal --workers 2", "pretraining_causal.json", judges.causal_too,
        why="Only the Transformer's gain exceeds two standard errors",
    ),
    Claim(
        "all-gain", "2310.02980", "other architectures gain as well", "S4 86.1 -> 86.8",
        PRETRAINING + "objectives", "pretraining_objectives.json", judges.all_gain,
        why="From scratch they are within two points of the best of any arm here (85.3)",
    ),
    Claim(
        "redundant", "2310.02980", "structured parameterisation becomes redundant",
        "plain recurrence 77 -> 83.4, S4 82.8 -> 84.5 (four tasks)",
        PRETRAINING + "objectives", "pretraining_objectives.json", judges.redundant,
        why="Phases spread evenly do as well as HiPPO's here",
    ),
    Claim(
        "random-init", "2310.02980", "pretraining repairs a start from random numbers", "",
        PRETRAINING + "init", "pretraining_init.json", judges.random_start,
        why="Seeds differ by ten points",
    ),
    Claim(
        "share", "2310.02980", "a modest share of the compute suffices", "curves",
        PRETRAINING + "share --seeds 0 1 2 3 4 5", "pretraining_share.json",
        judges.modest_share,
        why="After a quarter two seeds of six fail, one of them far below scratch; half serves all",
    ),
    Claim(
        "labels", "2310.02980", "it helps most when labels are few", "up to about 30 %",
        PRETRAINING + "labels", "pretraining_labels.json", judges.few_labels,
        why="It helps, by about as much at 1,000 labels as at 100",
    ),
    Claim(
        "lra", "2310.02980", "the Long Range Arena itself, at full size", "mean 53.6 -> 86.2",
        "python pretrain.py --settings settings/listops-transformer.json",
        why="days of one GPU a task; text, retrieval and images must be fetched", scale="paper",
    ),
    Claim(
        "kernel-cost", "2111.00396", "a kernel whose cost grows about as L, stably", "O(N + L)",
        "python benchmarks/s4_kernel.py --clock cpu --threads 1 --rounds 2",
        "s4_kernel.json", judges.kernel_cost,
    ),
    Claim(
        "generation", "2111.00396", "generates faster than a Transformer", "60 times (GPU)",
        "python benchmarks/generation.py --contexts 1024 2048 4096 8192 16384 --clock cpu "
        "--threads 1 --budget 0.4 --max-batch 256",
        "generation.json", judges.generation,
        why="S4 pays for 16 blocks of small operations a token, attention for reading its cache",
    ),
    Claim(
        "generation-gpu", "2111.00396", "the same on a GPU", "60 times",
        "python benchmarks/generation.py --device cuda --contexts 1024 4096 16384 --cap-gib 16 "
        "--max-batch 16384 --budget 0.3 --out results/generation_gpu.json",
        "generation_gpu.json", judges.generation,
        why="16 GiB for either model's states, float32; the factor grows with the context",
        scale="one GPU",
    ),
    Claim(
        "recall", "2111.00396", "remembers over 16k steps what a Transformer does not",
        "Path-X: 88 to 96 %, Transformers fail",
        "python benchmarks/recall.py --lengths 1024 16384 --extra", "recall.json", judges.recall,
        why="A matter of cost at 1k, not of ability; 16k was too slow here to tell the two apart",
    ),
    Claim(
        "cifar", "2111.00396", "sequential CIFAR-10 without augmentation, at two resolutions",
        "91 %", "python pretrain.py --settings settings/scifar-s4.json",
        why="hours of one GPU; the images must be fetched", scale="one GPU",
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
        why="64 positions are short: a dense kernel without decay is no burden",
    ),
    Claim(
        "ffn-speed", "2406.16450", "structured FFNs run faster", "2.6 times with 32 % (GPU)",
        "python benchmarks/ffn_latency.py", "ffn_latency.json", judges.ffn_speed,
        why="One token at small widths costs more calls than arithmetic",
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
        "self-guided", "2406.16450", "self-guided training repairs the start",
        "perplexity gap 1.0 -> 0.4", "python benchmarks/self_guided.py --steps 1000 --seeds 3",
        "self_guided.json", judges.self_guided,
    ),
    Claim(
        "self-guided-language", "2406.16450", "self-guided training pays for itself on language",
        "perplexity gap 1.0 -> 0.4 at equal FLOPs",
        "python benchmarks/byte_lm.py --guided --steps 500", "byte_lm_guided.json",
        judges.guided_language,
        why="500 steps may be too few: half of them pass under the guide (not tested further)",
    ),
    Claim(
        "scaling", "2406.16450", "loss falls more steeply with FLOPs than dense", "curves",
        "python benchmarks/ffn_scaling.py --bytes-a-weight 4 --seeds 3", "ffn_scaling.json",
        judges.steeper,
        why="Four widths from 32 to 80, 4 bytes a weight: far from the paper's scale",
    ),
    Claim(
        "wide-structured", "2406.16450", "wide and structured beats dense at equal FLOPs",
        "perplexity 17.89 against 18.23", "python benchmarks/byte_lm.py", "byte_lm.json",
        judges.wide_structured,
        why="LowRank is the paper's best kind and not ours",
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
        "million-gpu", "2302.06218", "the same on one GPU that two ranks share", "abstract",
        "torchrun --standalone --nproc-per-node 2 benchmarks/distributed.py --tokens 1048576 "
        "--heads 1 --device cuda --name distributed_million_gpu", "distributed_million_gpu.json",
        judges.million, scale="one GPU",
    ),
    Claim(
        "context", "2302.06218", "longer context performs better, depending on the application",
        "abstract", "python benchmarks/context.py", "context.json", judges.longer_context,
        why="Each of the first doublings helps; beyond 64 bytes 500 steps of training show no gain",
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
        "resume", "beyond", "ten kills, half amid the writing of a checkpoint, change no bit", "",
        "python -m pytest tests/test_pretrain.py -k kills", "claims_resume.json", judges.tests_pass,
    ),
]  # fmt: skip


# ------------------------------------------------------------------------ measure, judge, show


def measure(claim, anew):
    """Run the command of a row; a test run leaves its counts in the row's file."""
    if not importlib.util.find_spec("matplotlib"):
        sys.exit("claims.py: plots need matplotlib: pip install -r benchmarks/requirements.txt")
    print(f"{claim.name}: {claim.command}", flush=True)
    path, words, start = ROOT / "results" / claim.file, shlex.split(claim.command), time.time()
    torchrun = [sys.executable, "-m", "torch.distributed.run"]  # also where no venv is activated
    words[:1] = {"python": [sys.executable], "torchrun": torchrun}[words[0]]
    before = path.read_text() if path.exists() else None
    if anew:
        path.unlink(missing_ok=True)
    try:
        if "pytest" not in words:
            subprocess.run(words, cwd=ROOT, check=True)
            return
        origin = provenance()
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        print(done.stdout[-500:])
        count = {k: sum(map(int, re.findall(rf"(\d+) {k}", done.stdout))) for k in COUNTED}
        content = origin | count | {"command": claim.command, "returncode": done.returncode}
        save(path, content | {"seconds": round(time.time() - start)})
    finally:
        if before is not None and not path.exists():  # nothing came of it
            path.write_text(before)


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
    parser.add_argument("--anew", action="store_true", help="from the start, not what is missing")
    parser.add_argument("--list", action="store_true", help="show the rows and their commands")
    parser.add_argument("--table", action="store_true", help="write README's table")
    args = parser.parse_args()
    known = {claim.name: claim for claim in CLAIMS}
    if unknown := set(args.names) - known.keys():
        parser.error(f"no row is called {', '.join(unknown)}; there are {', '.join(known)}")
    if not (args.names or args.all or args.list or args.table):
        parser.error("expected the name of a row, --all, --list or --table")
    todo = [known[name] for name in args.names]
    for claim in todo:
        if claim.file:
            measure(claim, args.anew)
        else:
            print(f"{claim.name} is not run by this script ({claim.why}): {claim.command}")
    for claim in CLAIMS if args.all else ():
        path = ROOT / "results" / claim.file
        if claim.file and claim.scale == "laptop" and not path.exists():  # rows share files
            measure(claim, args.anew)
            todo.append(claim)
    rows = {claim.name: judge(claim) for claim in CLAIMS}
    for name in known if args.list else [c.name for c in todo]:
        print(
            f"{name:18}{rows[name]['verdict']:20}{rows[name]['ours']}\n{'':18}{rows[name]['command']}"
        )
    if args.table or todo:
        save(ROOT / "results/claims.json", rows)
        import readme  # which imports this file

        readme.rewrite()


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"claims.py: {shlex.join(map(str, error.cmd))} ended with {error.returncode}")
