"""All that needs a GPU, in one resumable job: tests, times, the Long Range Arena at full size.

    python benchmarks/gpu.py --s4 CLONE    everything; the same command continues a stopped job
    python benchmarks/gpu.py listops       one step (also: pathfinder, fashion, and those of STEPS)

--s4: clone of state-spaces/s4 (see peers.py; left out without it).  --folder: the four published
files of Fashion-MNIST.  Training: a Transformer and S4, from scratch and pretrained, all with the
same number of steps, about 20 epochs, half of them pretraining; learning rates are chosen on
validation with a twentieth of the steps.  A step that is done is not repeated (its mark in runs/gpu
says so), nor an arm that its results file has.
"""

import argparse
import itertools
import json
import shlex
import subprocess
import sys
from pathlib import Path

from compare import compare, job, print_rows, tuned
from fashion import FOLDER, write_pictures
from measured import ROOT, load, need_device, provenance, save

from settings import published, resolve

RUNS = ROOT / "runs" / "gpu"
SGCONV = "runs/gpu/pathfinder32-sgconv-small.json"
STEP_TIME = "benchmarks/step_time.py --device cuda --precision bfloat16 --batch-size 128"
SIZES = f"pathfinder32-transformer-small pathfinder32-s4-small {SGCONV}"
STEPS = {  # in this order
    "tests": "benchmarks/claims.py gpu-tests --anew",
    "peers": "benchmarks/peers.py --device cuda --s4",
    "pathfinder-time": f"{STEP_TIME} --task pathfinder32 --steps 60 --warm-up 15 --compile "
    f"--settings {SIZES} --out results/step_time_gpu_pathfinder.json",
    "listops-time": f"{STEP_TIME} --task listops --steps 100 --warm-up 70 "
    "--out results/step_time_gpu.json",
    "generation": "benchmarks/claims.py generation-gpu --anew",
}
MODELS = {"s4": "S4", "transformer": "Transformer"}
RATES = {"s4": (1e-3, 4e-3), "transformer": (3e-4, 1e-3)}
SHORT = 1 / 20  # of the steps, to choose a rate
PICTURES = "data/fashion_mnist_28.npz"
ON_PICTURES = {"task": PICTURES, "loss": "l1", "mask_ratio": 0.5}
TASKS = {  # settings, steps of 128 examples in about 20 epochs, other flags
    "listops": ("listops", 15_000, {}),
    "pathfinder": ("pathfinder32", 25_000, {"compile": True}),
    "fashion": ("pathfinder32", 8_600, {"compile": True, **ON_PICTURES}),
}


def arm(task, model, how, share=1.0, **own):
    """The Config of one arm that takes a share of the steps."""
    settings, all_steps, flags = TASKS[task]
    steps = round(share * all_steps)
    plan = {"objective": "masked", "pretrain_steps": steps // 2, "finetune_steps": steps // 2}
    if how == "from scratch":
        plan = {"objective": "none", "finetune_steps": steps}
    if task == "listops":  # of many lengths: S4 would be compiled for each
        plan["compile"] = model == "transformer"
    plan.update(batch_size=128, pretrain_batch_size=128, eval_every=all_steps // 20)
    config, _ = resolve({"settings": f"{settings}-{model}-small", **flags, **plan, **own})
    return config


def train(task, workers, device):
    """Train the arms that results/gpu_lra_TASK.json lacks, each with the best of its rates."""
    path = ROOT / f"results/gpu_lra_{task}.json"
    folder = f"runs/gpu/{task}"
    for model, how in itertools.product(RATES, ("from scratch", "pretrained")):
        origin = provenance()
        rows = load(path).get("arms", {})
        name = f"{MODELS[model]}, {how}"
        if name in rows:
            continue
        out = f"{folder}/rates-{model}-{how.replace(' ', '-')}"
        short = arm(task, model, how, SHORT, out=out, device=device)
        best, _ = tuned(short, RATES[model], workers)
        chosen = arm(task, model, how, device=device, **best)
        row = compare({name: chosen}, [0], folder, workers)[name]
        row["curve"] = curve(f"{folder}/{name.replace(',', '').replace(' ', '-')}-0")
        rows[name] = row | {"hardware": origin["hardware"]}
        save(path, {**origin, "seeds": [0], "arms": rows})
    print_rows(load(path)["arms"])


def curve(folder):
    """Validation of a run: {"pretrain": {step: loss}, "finetune": {step: accuracy}}."""
    judged_by = {"pretrain": "val_loss", "finetune": "val_accuracy"}
    found = {"pretrain": {}, "finetune": {}}
    for line in (ROOT / folder / "metrics.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        if "val_step" in row:
            stage = row["stage"]
            found[stage][row["val_step"]] = round(row[judged_by[stage]], 4)
    return found


def prepare(args):
    """What the steps read: settings of SGConv at the size of S4, the pictures."""
    RUNS.mkdir(parents=True, exist_ok=True)
    values = {name: value for name, (value, _) in published("pathfinder32-s4-small")[0].items()}
    own = {"model": "sgconv", "kernel_dim": 32}
    (ROOT / SGCONV).write_text(json.dumps({"settings": {**values, **own}}), encoding="utf-8")
    if "fashion" in args.names and not Path(PICTURES).exists():
        write_pictures(args.folder, Path(PICTURES), 28, 60_000)


def run_step(name, args):
    """Run one step unless it is marked as done.  True if it is done."""
    mark = RUNS / f"{name}.done"
    if mark.exists():
        print(f"{name}: done before; delete {mark.relative_to(ROOT)} to repeat it")
        return True
    if name == "peers" and not args.s4:
        print("peers: left out, it needs --s4")
        return True
    print(f"== {name}", flush=True)
    if name in TASKS:
        job(lambda: train(name, args.workers, args.device), "gpu.py")
    else:
        words = [*shlex.split(STEPS[name]), *([args.s4] if name == "peers" else [])]
        if subprocess.run([sys.executable, *words], cwd=ROOT).returncode:
            return False
    mark.touch()
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    every = [*STEPS, *TASKS]
    add("names", nargs="*", metavar="step", help=f"all of {', '.join(every)} unless named")
    add("--s4", help="clone of state-spaces/s4")
    add("--folder", type=Path, default=FOLDER, help="folder of Fashion-MNIST")
    add("--workers", type=int, default=1, help="parallel training runs (1)")
    add("--device", choices=["cpu", "cuda"], default="cuda", help="torch device (cuda)")
    args = parser.parse_args()
    if unknown := set(args.names) - set(every):
        parser.error(f"unknown step {', '.join(unknown)}; choose from {', '.join(every)}")
    need_device(args.device)
    args.names = args.names or every
    job(lambda: prepare(args), "gpu.py")
    failed = [name for name in args.names if not run_step(name, args)]
    if failed:
        sys.exit(f"gpu.py: failed: {', '.join(failed)}; the same command tries them again")


if __name__ == "__main__":
    main()
