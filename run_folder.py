"""The folder of a training run that kill -9 at any moment cannot spoil.

    with Run("runs/a", settings, resume=True) as run:
        first, best = run.restore("train", parts)          # (0, None), or where it was stopped
        for step in run.steps("train", first, last):       # the bar
            ...
            run.log(step, loss, right, count, tokens)      # metrics.jsonl, now and then
            run.save(step, parts, best)                    # checkpoint.pt
        run.result["train"] = best["score"]
    # result.json

A checkpoint is written under another name, flushed to the disk, read back and then renamed: at each
moment one of checkpoint.pt and checkpoint.pt.previous is whole. metrics.jsonl is cut back to its
length at the checkpoint: no line is missing and none comes twice. `parts` are objects with
state_dict and load_state_dict. Whatever else a run needs must follow from settings and step (as
the random numbers of pretrain.py do), then the run that continues ends in the same bits.

    config.json               the settings
    metrics.jsonl             a line every LOG_EVERY steps and one for each validation
    checkpoint.pt, .previous  everything to go on with
    result.json               written last: scores, settings, versions; "speed" alone may vary
    lock                      held while a process works here

Not included: several versions of a checkpoint, a queue of runs (benchmarks/compare.py is one).
"""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from textwrap import shorten

import numpy as np
import torch
from tqdm import tqdm

LOG_EVERY = 10  # steps; the losses are read from the device only this often
WEIGHTS = ("checkpoint.pt", "pretrained.pt", "denoiser.pt")  # what a finished run leaves

# ----------------------------------------------------------------- files: all of it or nothing


def save(path, state):
    """torch.save, all of the file or nothing; the file that stood there stays as *.previous.

    OSError (a full disk) leaves what was there.
    """
    temporary = path.with_name(path.name + ".new")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        torch.load(temporary, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        before = "; the one before is intact" if path.exists() else ""
        free = shutil.disk_usage(path.parent).free >> 20
        raise OSError(f"{path} not written ({error}; {free:,} MiB free){before}") from error
    if path.exists():
        os.replace(path, path.with_name(path.name + ".previous"))
    os.replace(temporary, path)


def load(path):
    """What `save` wrote.  ValueError names the file that is no such thing."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):  # the file may be sound
        raise
    except Exception as error:  # a damaged file may raise any kind
        reason = str(error).partition(" In PyTorch")[0]  # of what follows nothing helps here
        text = shorten(f"{type(error).__name__} {reason}", 200)
        raise ValueError(f"{path} is not a file of weights: {text}") from error


def load_into(model, path, settings, names):
    """The weights of an earlier run into the model of a run with these settings.

    names: settings that must be those of that run, for a head count shows in no shape.  ValueError
    says what does not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"pretrained {path}: there is no such file")
    if path.resolve().parent == Path(settings["out"]).resolve():
        raise ValueError(f"out {settings['out']} holds the weights of {path}: take another --out")
    if (beside := path.with_name("config.json")).is_file():
        old = json.loads(beside.read_text())
        if differ := [k for k in names if old.get(k) != settings[k]]:
            text = ", ".join(f"{k} {old.get(k)}, not {settings[k]}" for k in differ)
            raise ValueError(f"{path} was pretrained with {text}")
    try:
        model.load_state_dict(load(path))
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = shorten(str(error), 300)  # it would name every tensor
        text = f"{path} does not hold weights of this model (same --model and sizes?): {reason}"
        raise ValueError(text) from error


def write_json(path, content):
    """All of the file or nothing."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


def claim(file, folder):
    """Locks an open file until it is closed.  ValueError when another process holds it."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows: no lock
        pass
    except OSError as error:
        raise ValueError(f"{folder} is in use by another run") from error


# ------------------------------------------------------------------------------------ the run


class Run:
    """A folder, from the first step to result.json.  Of several processes rank 0 alone writes.

    settings: dict of plain values; a run is continued under the same ones, but for the names in
    `free`.  position: line of the bar, when runs are side by side.  Ctrl-C and SIGTERM are obeyed
    after the step, by a checkpoint and KeyboardInterrupt; the second one at once.  Without resume
    a finished run is replaced.  ValueError: the folder is in use, holds an unfinished run (without
    resume), one of other settings or none that can be read (with it).
    """

    def __init__(self, folder, settings, free=(), resume=False, rank=0, world=1, position=0):
        self.folder, self.settings, self.free, self.resume = Path(folder), settings, free, resume
        self.leader, self.alone, self.position = rank == 0, world == 1, position
        self.result = {}  # scores of the stages that are finished
        self.pending = []  # (loss, right, count) of the steps since the last line of metrics
        self.tokens, self.interrupted, self.handlers = 0, False, {}

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.leader:
            self.lock = open(self.folder / "lock", "w")
            claim(self.lock, self.folder)
        # a checkpoint, until the stage that it was written in takes it
        self.state = self.find() if self.resume else None
        state = self.state or {"result": {}, "tokens": 0, "metrics": 0, "seconds": 0.0}
        self.result, self.tokens = state["result"], state["tokens"]
        if self.leader:
            if self.state is None:
                self.clear()
            (self.folder / "result.json").unlink(missing_ok=True)
            write_json(self.folder / "config.json", self.settings)
            self.metrics = open(self.folder / "metrics.jsonl", "ab")
            self.metrics.truncate(min(self.metrics.tell(), state["metrics"]))
        self.versions = versions()  # of the code that runs, whatever is committed meanwhile
        self.mark = self.tokens, time.perf_counter()  # when the speed was last looked at
        self.started = self.mark[1] - state["seconds"]
        if self.alone:  # several processes might stop at different steps
            signals = signal.SIGINT, signal.SIGTERM
            self.handlers = {number: signal.signal(number, self.interrupt) for number in signals}
        return self

    def interrupt(self, *_):
        """Note that Ctrl-C was pressed; the second time it works as ever."""
        print("stopping after this step; again: at once", file=sys.stderr)
        self.interrupted = True
        self.let_go()

    def let_go(self):
        """Signals do what they did before."""
        while self.handlers:
            signal.signal(*self.handlers.popitem())

    def __exit__(self, failure, *_):
        self.let_go()
        if not self.leader:
            return
        if failure is None:
            seconds = time.perf_counter() - self.started
            speed = {"seconds": round(seconds, 1), "tokens_per_s": round(self.tokens / seconds)}
            speed["peak_memory"] = peak_memory()
            self.result |= {"config": self.settings, "speed": speed} | self.versions
            write_json(self.folder / "result.json", self.result)
        self.metrics.close()
        self.lock.close()

    def clear(self):
        """Begin anew: an unfinished run is refused, what a finished one left is removed."""
        names = [name + end for name in WEIGHTS for end in ("", ".previous", ".damaged")]
        old = [path for name in names if (path := self.folder / name).exists()]
        if any("checkpoint" in path.name for path in old):
            if not (self.folder / "result.json").exists():
                raise ValueError(
                    f"{self.folder} holds an unfinished run: --resume, or another --out"
                )
        for path in old:
            path.unlink()

    def find(self):
        """The newest checkpoint that can be read, damaged ones set aside; None: there is none."""
        paths = [self.folder / ("checkpoint.pt" + end) for end in ("", ".previous")]
        state, damaged = None, []
        for path in paths:
            if state is None and path.exists():
                try:
                    found = load(path)
                    if not isinstance(found, dict) or "settings" not in found:
                        raise ValueError(f"{path} is not a checkpoint")
                    state = found
                except ValueError as error:
                    print(f"{error}: not used", file=sys.stderr)
                    damaged.append(path)
        if state is None:
            if damaged:
                raise ValueError(
                    f"{self.folder}: no checkpoint can be read; delete checkpoint.pt* to begin anew"
                )
            return None
        old, new = state["settings"], self.settings
        if differ := [k for k in new if k not in self.free and old.get(k) != new[k]]:
            text = ", ".join(f"{k} {old.get(k)} -> {new[k]}" for k in differ)
            raise ValueError(f"{self.folder} holds a run with other settings: {text}")
        for path in damaged if self.leader else []:
            path.replace(path.with_name(path.name + ".damaged"))
        return state

    def restore(self, stage, parts):
        """Continue from the checkpoint if it is of this stage.  Returns first step, best so far."""
        if self.state is None or self.state["stage"] != stage:
            return 0, None
        state, self.state = self.state, None
        for name, holder in parts.items():
            holder.load_state_dict(state[name])
        return state["step"], state["best"]

    def save(self, step, parts, best, score=None):
        """The state of everything on disk; the score of a validation into the metrics."""
        if score:
            self.write({"stage": self.stage} | {f"val_{k}": v for k, v in score.items()})
        if self.leader:
            self.metrics.flush()
            state = {name: holder.state_dict() for name, holder in parts.items()}
            state |= {"stage": self.stage, "step": step + 1, "best": best, "result": self.result}
            state |= {"metrics": self.metrics.tell(), "tokens": self.tokens}
            state["seconds"] = time.perf_counter() - self.started
            save(self.folder / "checkpoint.pt", state | {"settings": self.settings})
        if self.interrupted:
            raise KeyboardInterrupt("--resume continues")
        self.mark = self.tokens, time.perf_counter()  # validation does not count as training

    def steps(self, stage, first, last):
        """The numbers of the steps, as a bar (nothing is drawn when the output is no terminal)."""
        self.stage, name = stage, f"{self.folder.name} {stage}"
        show = {"disable": None if self.leader else True, "position": self.position, "leave": False}
        self.bar = tqdm(range(first, last), name, initial=first, total=last, **show)
        return self.bar

    def log(self, step, loss, right, count, tokens):
        """Note the sums of a step; look at them every LOG_EVERY steps."""
        self.pending.append((loss, right, count))
        self.tokens += tokens
        if (step + 1) % LOG_EVERY == 0:
            self.report(step)

    def report(self, step):
        """Write a line, move the bar.  FloatingPointError when a loss is not finite."""
        if not self.pending:
            return
        rows = np.array([[float(v) for v in row] for row in self.pending])  # (steps, 3)
        if not np.isfinite(rows).all():
            bad = int(np.argmin(np.isfinite(rows[:, 0])))
            at = f"{self.folder}, {self.stage}: the loss is {rows[bad, 0]} at step"
            path = self.folder / "checkpoint.pt"
            before = f"the state before it is {path}" if path.exists() else "no checkpoint yet"
            raise FloatingPointError(f"{at} {step + 2 - len(rows) + bad}; {before}")
        loss, right, count = rows.sum(0)
        now = self.tokens, time.perf_counter()
        speed = round((now[0] - self.mark[0]) / (now[1] - self.mark[1]))
        line = {"loss": loss / count, "accuracy": right / count, "tokens_per_s": speed}
        self.bar.set_postfix(line)
        self.write({"stage": self.stage, "step": step + 1} | line)
        self.pending, self.mark = [], now

    def write(self, line):
        if self.leader:
            self.metrics.write(json.dumps(line).encode() + b"\n")


# --------------------------------------------------------------- what a number depends on


def peak_memory():
    """In bytes, of the GPU when there is one, else of this process; None when it cannot be told."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used if sys.platform == "darwin" else 1024 * used
    except ImportError:  # Windows
        return None


def versions():
    """torch, Python, and the commit of the code ("-dirty": with changes outside results/)."""
    folder = str(Path(__file__).parent)

    def git(*words):
        done = subprocess.run(
            ["git", "-C", folder, *words], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "--short", "HEAD")
        commit += "-dirty" if git("status", "--porcelain", "-uno", ".", ":!results") else ""
    except (OSError, subprocess.CalledProcessError):
        commit = None  # a copied file, no repository
    return {"torch": torch.__version__, "python": platform.python_version(), "commit": commit}
