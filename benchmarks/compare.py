"""Arms x seeds of pretrain.py as one job: what is finished is kept, what was cut off continues.

    python benchmarks/compare.py --name mixers --seeds 0 1 2 \\
        --arm "S4: --task lattice --model s4 --objective none" \\
        --arm "SGConv: --settings settings/lattice-sgconv.json"

Prints mean and spread (sample standard deviation) of the test accuracy over the seeds, and writes
results/NAME.json with everything a reader needs to repeat it.
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

import numpy as np
import torch
from measured import ROOT, provenance, save
from tqdm import tqdm

import pretrain
import settings


def one_thread(lock):
    """Start of a worker: the models are small, runs side by side are faster than threads.

    Ctrl-C ends a worker without a word (a run that is under way saves itself first).
    """
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    torch.set_num_threads(1)
    tqdm.set_lock(lock)


def run(config, position=0):
    """The result of a run, from its folder when it is there; ValueError on other settings there."""
    path = Path(config.out) / "result.json"
    if path.exists():
        try:
            result = json.loads(path.read_text())
            old, now = result["config"], asdict(config)
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path} is not the result of a run: {error}") from error
        differ = [k for k in now if k not in pretrain.FREE and old.get(k) != now[k]]
        if differ:
            raise ValueError(f"{path} was made with another {', '.join(differ)}: remove it")
        return result
    try:
        return pretrain.train(replace(config, resume=True), position)
    except KeyboardInterrupt:
        os._exit(130)  # a worker that lived on would begin the next run


def side_by_side(configs, workers):
    """Results of the runs, `workers` at a time, a thread each (one after the other on a GPU)."""
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context, one_thread, (context.RLock(),)) as pool:
        return list(pool.map(run, configs, range(len(configs))))


def parse_arm(text):
    """ "name: flags" -> name, Config.  ValueError when there is no name."""
    name, colon, flags = text.partition(":")
    if not colon or not name.strip():
        raise ValueError(f"arm {text!r}: expected 'name: --flag value ...'")
    return name.strip(), settings.resolve(vars(settings.parser().parse_args(shlex.split(flags))))[0]


def describe(results):
    """Results of one arm over its seeds -> row of the table, percent."""
    test = [100 * r["test"]["accuracy"] for r in results]
    return {
        "test": [round(t, 2) for t in test],
        "mean": round(float(np.mean(test)), 2),
        "spread": round(float(np.std(test, ddof=1)), 2) if len(test) > 1 else None,
        "validation": [round(100 * r["finetune"]["accuracy"], 2) for r in results],
        "seconds": [r["speed"]["seconds"] for r in results],
        "commits": [r["commit"] for r in results],
        "parameters": results[0]["parameters"],
        "settings": {k: v for k, v in results[0]["config"].items() if k not in ("seed", "out")},
    }


def compare(arms, seeds, folder, workers=2):
    """{name: Config} -> {name: row of the table}, every arm with every seed.

    "{seed}" in a path of --pretrained stands for the seed.
    """
    jobs = []
    for name, config in arms.items():
        for seed in seeds:
            out = f"{folder}/{name.replace(',', '').replace(' ', '-')}-{seed}"
            weights = config.pretrained and config.pretrained.replace("{seed}", str(seed))
            jobs.append(replace(config, seed=seed, out=out, pretrained=weights))
    if len({job.out for job in jobs}) < len(jobs):
        raise ValueError(f"two runs would share a folder: arms {list(arms)}, seeds {seeds}")
    results, n = side_by_side(jobs, workers), len(seeds)
    return {name: describe(results[i * n : i * n + n]) for i, name in enumerate(arms)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--arm", action="append", required=True, help='"name: flags of pretrain.py"'
    )
    parser.add_argument("--name", required=True, help="of the job: results/NAME.json, runs/NAME/")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of each arm")
    parser.add_argument("--workers", type=int, default=2, help="runs side by side, a thread each")
    parser.add_argument("--out", default="runs", help="folder of the runs")
    args = parser.parse_args()
    origin = provenance() | {"seeds": args.seeds}
    try:
        if Path(args.name).name != args.name:
            raise ValueError(f"name {args.name!r}: expected the name of a file, without a folder")
        arms = [parse_arm(text) for text in args.arm]
        if len(dict(arms)) < len(arms):
            raise ValueError(f"two arms of one name: {', '.join(name for name, _ in arms)}")
        arms = dict(arms)
        rows = compare(arms, args.seeds, f"{args.out}/{args.name}", args.workers)
    except (ValueError, OSError, FloatingPointError, BrokenExecutor) as error:
        sys.exit(f"compare.py: {error}")
    except KeyboardInterrupt:
        sys.exit("compare.py: interrupted; the same command continues")
    for name, row in rows.items():
        spread = f" +- {row['spread']}" if len(args.seeds) > 1 else ""
        print(f"{name:32}{row['mean']:6.2f}{spread}   {row['test']}")
    path = ROOT / "results" / f"{args.name}.json"
    save(path, origin | {"arms": rows})
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
