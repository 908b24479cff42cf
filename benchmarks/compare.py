"""Arms x seeds of pretrain.py as one job: what is finished is kept, what was cut off continues.

    python benchmarks/compare.py --name mixers --seeds 0 1 2 \\
        --arm "S4: --task lattice --model s4 --objective none" \\
        --arm "SGConv: --task lattice --model sgconv --objective none"

Prints mean and spread (sample standard deviation) of the test accuracy over the seeds, and writes
results/NAME.json with everything a reader needs to repeat it.
"""

import argparse
import json
import os
import platform
import shlex
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pretrain  # noqa: E402


def parse_arm(text):
    """ "name: flags" -> name, Config.  ValueError when there is no name."""
    name, colon, flags = text.partition(":")
    if not colon:
        raise ValueError(f"arm {text!r}: expected 'name: --flag value ...'")
    args = vars(pretrain.parser().parse_args(shlex.split(flags)))
    args.pop("check")
    return name.strip(), pretrain.Config(**args)


def run(config):
    """The result of a run, from its folder when it is there; ValueError on other settings there."""
    path = Path(config.out) / "result.json"
    if not path.exists():
        return pretrain.train(replace(config, resume=True))
    result, now = json.loads(path.read_text()), asdict(config)
    differ = [k for k in now if k != "resume" and result["config"].get(k) != now[k]]
    if differ:
        raise ValueError(f"{path} was made with another {', '.join(differ)}: give another --out")
    return result


def describe(results):
    """Results of one arm over its seeds -> row of the table, percent."""
    test = [100 * r["test"]["accuracy"] for r in results]
    return {
        "test": [round(t, 2) for t in test],
        "mean": round(float(np.mean(test)), 2),
        "spread": round(float(np.std(test, ddof=1)), 2) if len(test) > 1 else None,
        "validation": [round(100 * r["finetune"]["accuracy"], 2) for r in results],
        "seconds": [r["speed"]["seconds"] for r in results],
        "parameters": results[0]["parameters"],
        "settings": {k: v for k, v in results[0]["config"].items() if k not in ("seed", "out")},
    }


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
    try:
        arms = dict(parse_arm(text) for text in args.arm)
    except ValueError as error:
        parser.error(str(error))
    jobs = [
        replace(config, seed=seed, out=f"{args.out}/{args.name}/{name.replace(' ', '-')}-{seed}")
        for name, config in arms.items()
        for seed in args.seeds
    ]
    context = get_context("spawn")
    start = pretrain.one_thread, (context.RLock(),)
    with ProcessPoolExecutor(args.workers, context, *start) as pool:
        results = list(pool.map(run, jobs))
    n, rows = len(args.seeds), {}
    for i, name in enumerate(arms):
        rows[name] = describe(results[i * n : i * n + n])
        spread = f" +- {rows[name]['spread']}" if n > 1 else ""
        print(f"{name:32}{rows[name]['mean']:6.2f}{spread}   {rows[name]['test']}")
    summary = {
        "command": shlex.join(["python", "benchmarks/compare.py", *sys.argv[1:]]),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
        "date": time.strftime("%Y-%m-%d"),
        "seeds": args.seeds,
        **pretrain.versions(),
        "arms": rows,
    }
    path = ROOT / "results" / f"{args.name}.json"
    path.write_text(json.dumps(summary, indent=1) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
