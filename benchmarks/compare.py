"""Arms x seeds of pretrain.py as one job: finished runs are kept, interrupted ones continue.

    python benchmarks/compare.py --name my_mixers --seeds 0 1 2 \\
        --arm "S4: --task lattice --model s4 --objective none" \\
        --arm "SGConv: --settings lattice-sgconv"

Prints the mean and standard deviation over the seeds of the test accuracy (regression: R2), and
writes results/NAME.json with everything needed to repeat it.
"""

import argparse
import json
import os
import shlex
import signal
import sys
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path

import torch
from measured import ROOT, load, over_seeds, provenance, save
from tqdm import tqdm

import pretrain
import settings
from checkpoint import differences


def start_worker(lock):
    """One thread per process: the models are small.  Ctrl-C ends a worker without a traceback."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    torch.set_num_threads(1)
    tqdm.set_lock(lock)


def run(config, position=0):
    """Return the result of a run, from its folder if it is finished.

    position: row of the progress bar.  ValueError if the folder has a run with other settings.
    """
    path = Path(config.out) / "result.json"
    if path.exists():
        return finished(path, config)
    try:
        return pretrain.train(replace(config, resume=True), position)
    except KeyboardInterrupt:
        os._exit(130)  # the run has saved itself; a worker that lived on would begin the next one


def finished(path, config):
    """Read a finished run.  ValueError if it was not made with these settings."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        old = result["config"]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path} is not the result of a run: {error}") from error
    new = asdict(config)
    if config.pretrained:
        new["pretrained"] = pretrain.weights_path(config.pretrained)
    own = ("mask_ratio", "loss", "pretrain_steps")  # chosen by the kind of your own data, if None
    free = pretrain.FREE + tuple(name for name in own if new[name] is None)
    changed = differences(old, new, free)
    if changed:
        raise ValueError(f"{path} has other settings: {changed}; remove it")
    return result


def side_by_side(configs, workers):
    """Results of the runs, `workers` at a time, one thread each."""
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context, start_worker, (context.RLock(),)) as pool:
        return list(pool.map(run, configs, range(len(configs))))


def parse_arms(texts):
    """Texts "name: flags" -> {name: Config}.  ValueError if a name is missing or repeated."""
    arms = {}
    for text in texts:
        name, _, flags = text.partition(":")
        name = name.strip()
        if not name or ":" not in text:
            raise ValueError(f"arm {text!r}: expected 'name: --flag value ...'")
        if name in arms:
            raise ValueError(f"two arms are called {name!r}: rename one")
        given = settings.parser().parse_args(shlex.split(flags))
        arms[name], _ = settings.resolve(vars(given))
    return arms


def describe(results):
    """Results of one arm over its seeds -> row of the table, in %: accuracy, or R2."""
    score = "accuracy" if "accuracy" in results[0]["test"] else "r2"
    return {
        **over_seeds([100 * r["test"][score] for r in results]),
        "validation": [round(100 * r["finetune"][score], 2) for r in results],
        "seconds": [r["speed"]["seconds"] for r in results],
        "commits": [r["commit"] for r in results],
        "parameters": results[0]["parameters"],
        "settings": {k: v for k, v in results[0]["config"].items() if k not in ("seed", "out")},
    }


def compare(arms, seeds, folder, workers=2):
    """Run every arm with every seed: {name: Config} -> {name: row of the table}.

    "{seed}" in the path of --pretrained stands for the seed.
    """
    jobs = []
    for name, config in arms.items():
        for seed in seeds:
            out = f"{folder}/{name.replace(',', '').replace(' ', '-')}-{seed}"
            weights = config.pretrained and config.pretrained.replace("{seed}", str(seed))
            jobs.append(replace(config, seed=seed, out=out, pretrained=weights))
    if len({job.out for job in jobs}) < len(jobs):
        raise ValueError(f"two runs would share a folder: arms {list(arms)}, seeds {seeds}")
    results = iter(side_by_side(jobs, workers))
    return {name: describe([next(results) for _ in seeds]) for name in arms}


def tuned(config, rates, workers):
    """Train with every learning rate, stage by stage.  Return the best on validation, all scores.

    Validation loss decides in pretraining and regression, else accuracy.  Both results are dicts:
    {"pretrain_lr": rate, "finetune_lr": rate} and {stage: {rate: score}}.
    """
    best = {}
    scores = {}
    stages = ["finetune"] if config.objective == "none" else ["pretrain", "finetune"]
    for stage in stages:
        short = replace(config, finetune_steps=1) if stage == "pretrain" else config
        trials = []
        for lr in rates:
            out = f"{config.out}-{stage}-{lr:g}"
            trials.append(replace(short, out=out, **{f"{stage}_lr": lr}))
        results = [result[stage] for result in side_by_side(trials, workers)]
        by_accuracy = stage == "finetune" and "accuracy" in results[0]
        score, choose = ("accuracy", max) if by_accuracy else ("loss", min)
        scores[stage] = {lr: row[score] for lr, row in zip(rates, results, strict=True)}
        lr = choose(rates, key=scores[stage].get)
        best[f"{stage}_lr"] = lr
        print(f"{config.out} {stage}: {scores[stage]}, best {lr:g}", flush=True)
        if stage == "pretrain":
            config = replace(config, pretrained=f"{config.out}-{stage}-{lr:g}/pretrained.pt")
    return best, scores


def print_rows(rows):
    for name, row in rows.items():
        print(f"{name:32}{row['mean']:6.2f} +- {row['spread']}   {row['test']}")


def job(run, script):
    """Return run(), or end the script with one line: finished runs are kept, others continue."""
    try:
        return run()
    except (ValueError, OSError, FloatingPointError, BrokenExecutor) as error:
        sys.exit(f"{script}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{script}: interrupted; the same command continues")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--arm", action="append", required=True, help='"name: flags of pretrain.py"')
    add("--name", required=True, help="name of the job: results/NAME.json, runs/NAME/")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds per arm")
    add("--workers", type=int, default=2, help="parallel runs, one thread each")
    args = parser.parse_args()
    origin = provenance()
    out = ROOT / f"results/{args.name}.json"

    def run():
        arms = parse_arms(args.arm)
        if Path(args.name).name != args.name:
            raise ValueError(f"name {args.name!r}: expected a file name without a folder")
        if out.exists() and "arms" not in load(out):
            raise ValueError(f"{out} was written by another script: choose another --name")
        return compare(arms, args.seeds, f"runs/{args.name}", args.workers)

    rows = job(run, "compare.py")
    print_rows(rows)
    save(out, {**origin, "seeds": args.seeds, "arms": rows})


if __name__ == "__main__":
    main()
