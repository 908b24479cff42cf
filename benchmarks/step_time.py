"""Where a training step of pretrain.py spends its time: the loop itself, its parts timed.

    python benchmarks/step_time.py      listops-tiny at the sizes of the listops-*-small settings
    python benchmarks/step_time.py --device cuda --precision bfloat16 --task pathfinder32 \\
        --batch-size 128 --settings pathfinder32-s4-small --compile

The parts are data (make_batch), forward (loss_sums), backward, optimizer (clipping and AdamW), and
the rest of the loop (order, seeds, learning rate, metrics).  The first --warm-up steps of a stage
are left out because they allocate memory and capture graphs, one for each length of a batch, the
last one because it validates.  On a GPU the clock waits for the device before and after each part,
so nothing overlaps, and a second run gives two bounds: tokens/s if the GPU never waited
(torch.profiler's sum of kernel times), and if it only moved bytes at 3 TB/s.  The bytes are an
estimate: what autograd keeps for backward is written and read, and so are gradients of the same
size; weights, gradients and AdamW's moments are passed over ten times.
Parts and bounds are those of eager steps.  Steps as CUDA graphs overlap as in training: the clock
waits only before the first and after the last of them, and a step has only data and rest.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from compare import job
from measured import ROOT, need_device, provenance, save
from torch.autograd import DeviceType

import pretrain
from checkpoint import Run
from settings import resolve

PARTS = {
    "data": [(pretrain, "make_batch")],
    "forward": [(pretrain, "loss_sums")],
    "backward": [(torch.Tensor, "backward")],
    "optimizer": [
        (torch.nn.utils, "clip_grad_norm_"),
        (torch.optim.AdamW, "step"),
        (torch.optim.AdamW, "zero_grad"),
    ],
}
ALL = (*PARTS, "rest", "total")
PROFILED = 20  # steps per stage
BANDWIDTH = 3e12  # bytes per second
SMALL = ["settings/listops-transformer-small.json", "settings/listops-s4-small.json"]


class Clock:
    """Seconds of each part and number of tokens: one dict per step.

    profile: note kernel times and bytes of each stage too, which slows the parts down.
    """

    def __init__(self, config, warm_up=3, profile=False):
        self.cuda = torch.device(config.device).type == "cuda"
        self.warm_up = warm_up
        self.profile = profile
        # what a graph contains cannot be timed, and its parts run once only
        self.graphs = pretrain.uses_graphs(config)
        self.parts = ["data"] if self.graphs else [*PARTS]
        self.steps = []
        self.busy = {}  # ms of kernels per step, by stage
        self.kept = {}  # bytes kept for backward per step, by stage
        self.bytes = 0

    def now(self, wait=False):
        if self.cuda and (wait or not self.graphs):
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, function, part):
        """The same function, which adds its time to a part of the current step."""

        def call(*args, **options):
            start = self.now()
            result = function(*args, **options)
            if self.steps:
                self.steps[-1][part] += self.now() - start
                if part == "data":
                    self.steps[-1]["tokens"] += result.x.shape[:2].numel()
            return result

        return call

    def keep(self, tensor):
        """Count a tensor that autograd keeps, unless it is a parameter or an input."""
        if not tensor.is_leaf:
            self.bytes += tensor.nbytes
        return tensor

    def counted(self, steps):
        """Run.steps, which times each step from its number to the next."""

        def call(run, stage, first, last):
            for step in steps(run, stage, first, last):
                self.steps.append(dict.fromkeys((*PARTS, "tokens"), 0.0))
                start = self.now(wait=step == first + self.warm_up)
                yield step
                self.steps[-1]["total"] = self.now(wait=step == last - 2) - start

        def profiled(run, stage, first, last):
            self.bytes = 0
            with torch.profiler.profile() as found:
                yield from call(run, stage, first, last)
            kernels = [e for e in found.key_averages() if e.device_type == DeviceType.CUDA]
            us = sum(kernel.self_device_time_total for kernel in kernels)  # not once more per op
            self.busy[stage] = us / 1e3 / (last - first)
            self.kept[stage] = self.bytes / (last - first)

        return profiled if self.profile else call

    def attached(self):
        """A context in which the parts of pretrain.fit are timed; validation is skipped."""
        stack = ExitStack()
        for part in self.parts:
            for owner, name in PARTS[part]:
                timed = self.timed(getattr(owner, name), part)
                stack.enter_context(patch.object(owner, name, timed))
        stack.enter_context(patch.object(Run, "steps", self.counted(Run.steps)))
        score = {"loss": 0.0, "accuracy": 0.0}
        stack.enter_context(patch.object(pretrain, "evaluate", lambda *args: score))
        if self.profile:
            hooks = torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor)
            stack.enter_context(hooks)
        return stack


def measure(config, warm_up=3):
    """Return {stage: {part: mean ms per step, "tokens": tokens per step}}, and peak memory."""
    clock = Clock(config, warm_up)
    if clock.cuda:
        torch.cuda.reset_peak_memory_stats()
    with clock.attached():
        result = pretrain.train(config)
    first = config.pretrain_steps
    stages = {"pretrain": clock.steps[:first], "finetune": clock.steps[first:]}
    rows = {}
    for stage, steps in stages.items():
        kept = steps[warm_up:-1]
        row = {part: 1e3 * statistics.fmean(step[part] for step in kept) for part in kept[0]}
        row["tokens"] /= 1e3
        row["rest"] = row["total"] - sum(row[part] for part in PARTS)
        rows[stage] = row
    return rows, result["speed"]["peak_memory"]


def bounds(config):
    """Return {stage: (ms of kernels, ms to move the bytes)}, the least that a step can take."""
    few = dict.fromkeys(("pretrain_steps", "finetune_steps", "eval_every"), PROFILED)
    config = replace(config, **few)
    clock = Clock(config, profile=True)
    with clock.attached():
        parameters = pretrain.train(config)["parameters"]
    found = {}
    for stage, busy in clock.busy.items():
        moved = 4 * clock.kept[stage] + 10 * 4 * parameters
        found[stage] = busy, 1e3 * moved / BANDWIDTH
    return found


def share(row):
    """Share of forward, backward and optimizer, in %."""
    return 100 * (row["forward"] + row["backward"] + row["optimizer"]) / row["total"]


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--settings", nargs="+", default=SMALL, help="settings of pretrain.py")
    add("--task", default="listops-tiny", help="task (listops-tiny)")
    add("--batch-size", type=int, default=32, help="batch size of both stages (32)")
    add("--steps", type=int, default=30, help="steps per stage (30)")
    add("--warm-up", type=int, default=3, help="steps left out (3)")
    add("--precision", default="float32", help="precision (float32)")
    add("--device", default="cpu", help="torch device (cpu)")
    add("--compile", action="store_true", help="measure compiled models too")
    add("--out", type=Path, default=ROOT / "results/step_time.json", help="results file")
    args = parser.parse_args()
    if args.steps < args.warm_up + 2:
        parser.error(f"--steps {args.steps}: expected at least {args.warm_up + 2}")
    return args


def measure_all(given, name, compiled, warm_up, eager=False):
    """Print and return the rows of one setting, one per stage."""
    with tempfile.TemporaryDirectory() as folder:
        options = {**given, "settings": name, "compile": compiled, "eager": eager}
        config, _ = resolve({**options, "out": f"{folder}/timed"})
        found, peak = measure(config, warm_up)
        least = bounds(replace(config, out=f"{folder}/profiled")) if eager else {}
    rows = []
    for stage, ms in found.items():
        tokens = ms.pop("tokens")
        row = {"settings": name, "compile": compiled, "stage": stage, "ms": ms}
        row.update(share=share(ms), peak_memory_gib=peak / 2**30)
        row["tokens_per_s"] = 1e3 * tokens / ms["total"]
        if stage in least:
            busy, memory = least[stage]
            row["tokens_per_s_busy"] = 1e3 * tokens / busy
            row["tokens_per_s_memory"] = 1e3 * tokens / memory
        if config.device == "cuda":
            row["eager"] = eager
        rows.append(row)
        label = f"{Path(name).stem}{' compiled' * compiled}{' eager' * eager}"
        times = "".join(f"{ms[part]:10.2f}" for part in ALL)
        print(f"{label:38}{stage:9}{times}{share(ms):8.1f} %", flush=True)
    return rows


def run(args):
    need_device(args.device)
    origin = provenance() | {"threads": torch.get_num_threads()}
    out = vars(args).pop("out")
    given = {key: getattr(args, key) for key in ("task", "batch_size", "precision", "device")}
    given["pretrain_batch_size"] = args.batch_size
    given.update(dict.fromkeys(("pretrain_steps", "finetune_steps", "eval_every"), args.steps))
    print(f"{'ms per step':47}" + "".join(f"{part:>10}" for part in ALL) + "   model and optimizer")
    rows = []
    for name, compiled in itertools.product(args.settings, sorted({False, args.compile})):
        if args.device == "cuda" and not compiled:
            rows += measure_all(given, name, compiled, args.warm_up, eager=True)
        rows += measure_all(given, name, compiled, args.warm_up)
    save(out, {**origin, "options": vars(args), "rows": rows})


def main():
    args = parse()
    job(lambda: run(args), "step_time.py")


if __name__ == "__main__":
    main()
