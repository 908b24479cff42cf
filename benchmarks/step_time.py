"""Where a training step of pretrain.py spends its time: the loop itself, a clock in its parts.

    python benchmarks/step_time.py      listops-tiny at the sizes of settings/listops-*-small.json
    python benchmarks/step_time.py --device cuda --precision bfloat16 --task pathfinder32 \\
        --batch-size 128 --settings settings/pathfinder32-s4-small.json --compile

data        make_batch: gather, mask
forward     loss_sums: model, head, loss
backward    Tensor.backward
optimiser   zero_grad, norm of the gradient, AdamW
rest        everything else in the loop: order, seeds, rates, metrics, the bar

The first steps of a stage are left out (they allocate), and the last one, for it validates. On a
GPU the device is waited for around each part, so nothing overlaps. Writes results/step_time.json.
"""

import argparse
import contextlib
import itertools
import tempfile
import time
from pathlib import Path

import torch
from measured import ROOT, provenance, save

import pretrain
from checkpoint import Run
from settings import resolve

PARTS = ("data", "forward", "backward", "optimiser")
WARM_UP = 3  # steps left out


class Clock:
    """Seconds in each part, a dict a step; `pretrain.fit` runs inside `with clock.attached()`."""

    def __init__(self, device):
        self.steps, self.cuda = [], torch.device(device).type == "cuda"

    def now(self):
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, function, part):
        def call(*args, **options):
            start = self.now()
            out = function(*args, **options)
            if self.steps:
                self.steps[-1][part] += self.now() - start
            return out

        return call

    def counted(self, steps):
        """Run.steps, with the time from each number to the next."""

        def call(run, stage, first, last):
            for step in steps(run, stage, first, last):
                self.steps.append(dict.fromkeys(PARTS, 0.0))
                start = self.now()
                yield step
                self.steps[-1]["total"] = self.now() - start

        return call

    @contextlib.contextmanager
    def attached(self):
        places = [
            (pretrain, "make_batch", "data"),
            (pretrain, "loss_sums", "forward"),
            (torch.Tensor, "backward", "backward"),
            (torch.nn.utils, "clip_grad_norm_", "optimiser"),
            (torch.optim.AdamW, "zero_grad", "optimiser"),
            (torch.optim.AdamW, "step", "optimiser"),
        ]
        before = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
        before += [(Run, "steps", Run.steps), (pretrain, "evaluate", pretrain.evaluate)]
        for (owner, name, part), (*_, function) in zip(places, before, strict=False):
            setattr(owner, name, self.timed(function, part))
        Run.steps = self.counted(Run.steps)
        pretrain.evaluate = lambda *args: {"loss": 0.0, "accuracy": 0.0}  # no part of a step
        try:
            yield self
        finally:
            for owner, name, function in before:
                setattr(owner, name, function)


def measure(config):
    """-> {stage: {part: milliseconds a step, ...}}, means over steps, and peak memory in bytes."""
    clock, out = Clock(config.device), {}
    if clock.cuda:
        torch.cuda.reset_peak_memory_stats()
    with clock.attached():
        result = pretrain.train(config)
    cut = config.pretrain_steps
    for stage, steps in (("pretrain", clock.steps[:cut]), ("finetune", clock.steps[cut:])):
        kept = steps[WARM_UP:-1]
        row = {key: 1e3 * sum(step[key] for step in kept) / len(kept) for key in kept[0]}
        out[stage] = row | {"rest": row["total"] - sum(row[part] for part in PARTS)}
    return out, result["speed"]["peak_memory"]


def share(row):
    """Of forward, backward and optimiser, percent."""
    return 100 * sum(row[part] for part in PARTS[1:]) / row["total"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    small = [f"settings/listops-{model}-small.json" for model in ("transformer", "s4")]
    parser.add_argument("--settings", nargs="+", default=small, help="files of pretrain.py")
    parser.add_argument("--task", default="listops-tiny")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=30, help="of each stage, at least 5")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="compiled too, after plain")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data-dir", default="data")
    out = ROOT / "results/step_time.json"
    parser.add_argument("--out", type=Path, default=out, help="result file")
    args = parser.parse_args()
    if args.steps < WARM_UP + 2:
        parser.error(f"--steps {args.steps}: expected at least {WARM_UP + 2}")
    torch.set_num_threads(args.threads)
    names = ("task", "batch_size", "precision", "device", "data_dir")
    given = {k: getattr(args, k) for k in names}
    given |= dict.fromkeys(("pretrain_steps", "finetune_steps", "eval_every"), args.steps)
    rows, origin = [], provenance()
    print(f"ms a step{'':38}" + "".join(f"{part:>10}" for part in (*PARTS, "rest", "total")))
    for path, compile in itertools.product(args.settings, (False, True)[: 1 + args.compile]):
        with tempfile.TemporaryDirectory() as out:
            given |= {"settings": str(ROOT / path), "out": out, "compile": compile}
            config, _ = resolve(given | {"pretrain_batch_size": args.batch_size})
            found, peak = measure(config)
        for stage, row in found.items():
            rows.append({"settings": path, "compile": compile, "stage": stage, "ms": row})
            rows[-1] |= {"share": share(row), "peak_memory_gib": peak / 2**30}
            times = "".join(f"{row[part]:10.2f}" for part in (*PARTS, "rest", "total"))
            name = Path(path).stem + " compiled" * compile
            print(f"{name:38}{stage:9}{times}   {share(row):.1f} % forward, backward, optimiser",
                  flush=True)  # fmt: skip
    options = {k: v for k, v in vars(args).items() if k != "out"}
    summary = origin | {"threads": torch.get_num_threads(), "options": options}
    save(args.out, summary | {"rows": rows})


if __name__ == "__main__":
    main()
