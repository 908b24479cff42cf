"""Crash-safe run directory: checkpoints, metrics and result.

    with Run("runs/a", settings, data) as run:
        start, best = run.restore(parts)              # (0, None), or where the run was stopped
        for step in run.steps("train", start, last):  # progress bar
            ...
            run.log(step, sums, tokens)               # metrics.jsonl, every LOG_EVERY steps
            run.save(step, parts, best)               # checkpoint.pt
    # config.json: settings and data; result.json: written last

kill -9 costs at most the steps since the last checkpoint. A checkpoint is written under another
name, flushed to disk and renamed: checkpoint.pt or checkpoint.pt.previous is always whole. A
resumed run ends in the same bits if all else follows from settings and step, as in pretrain.py.
"""

import contextlib
import errno
import itertools
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from textwrap import shorten

import torch
import torch.distributed as dist
from tqdm import tqdm

LOG_EVERY = 10  # steps; the losses are read from the device only this often


def save(path, state):
    """torch.save that writes all of the file or nothing; the old file stays as *.previous."""
    with replacing(path) as temporary:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            os.replace(path, path.with_name(path.name + ".previous"))


@contextlib.contextmanager
def replacing(path):
    """Give a temporary path that is renamed to `path` if all goes well, else removed."""
    temporary = path.with_name(path.name + ".new")
    try:
        with naming(path):
            yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path):
    """Let errors of writing, such as "No space left on device", name the file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    except RuntimeError as error:  # of torch.save, after such an error
        raise OSError(f"{path} could not be written: {shorten(str(error), 160)}") from error


def load(path):
    """Read what `save` wrote.  ValueError if the file is damaged or something else."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file may raise anything, also OSError (EINVAL)
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise  # not there, or not to be read now
        reason = shorten(f"{type(error).__name__} {error}", 160)
        how = "copy it again, or train again with --overwrite"
        raise ValueError(f"{path} is not a file of weights: {how} ({reason})") from error


def ranks():
    """Rank of this process and number of processes: (0, 1) without torchrun."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def means(sums):
    """Sums of loss, count, correct -> mean loss and accuracy; no accuracy if `correct` is nan."""
    loss, count, correct = sums[:3].tolist()
    count = max(count, 1)  # nothing is masked in a small batch
    if math.isnan(correct):
        return {"loss": loss / count}
    return {"loss": loss / count, "accuracy": correct / count}


def differences(old, new, free=()):
    """What differs between two dicts, as text: "seed 0 -> 1"."""
    names = [name for name in new if name not in free and old.get(name) != new[name]]
    return ", ".join(shorten(f"{name} {old.get(name)} -> {new[name]}", 160) for name in names)


def new_folder(name, root="runs"):
    """Make a folder root/name-1, or -2, ...; root/latest becomes a link to it, or has its name."""
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    latest = root / "latest"
    if latest.is_dir() and not latest.is_symlink():
        raise ValueError(f"{latest} is a folder, not a link to one: rename it, or pass --out")
    for i in itertools.count(1):
        folder = root / f"{name}-{i}"
        with contextlib.suppress(FileExistsError):  # also of a run that begins at the same time
            folder.mkdir()
            break
    link = folder / "latest"  # renamed when it is whole: others may read it, or do the same
    try:
        link.symlink_to(folder.name)
    except OSError:  # a file system without links
        link.write_text(folder.name, "utf-8")
    os.replace(link, latest)
    return folder


def find_run(path):
    """The folder that root/latest stands for (see `new_folder`), or the path itself."""
    path = Path(path)
    if path.name == "latest" and path.is_symlink():
        return path.parent / os.readlink(path)
    if path.name == "latest" and path.is_file():
        return path.parent / path.read_text("utf-8")
    return path


def check_free(folder, replace=False):
    """ValueError if the folder contains a run that may not be replaced."""
    found = None
    if any(Path(folder).glob("checkpoint.pt*")):
        found = "an unfinished run: pass --resume to continue it"
    if Path(folder, "result.json").exists():
        found = "a finished run: pass --overwrite to replace it"
    if found and not replace:
        raise ValueError(f"{folder} contains {found} or choose another --out")


def check_out(folder, replace=False):
    """`check_free`, and OSError if a run cannot write to the folder.  Leaves no file."""
    check_free(folder, replace)
    if ranks()[0] > 0:
        return
    folder = Path(folder)
    if folder.is_file():
        raise NotADirectoryError(errno.ENOTDIR, "A file, not the folder of a run", str(folder))
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
    if is_new:
        folder.rmdir()


class Run:
    """One run and its directory. With several processes, only rank 0 writes.

    settings, data: plain values, which must be the same when the run is resumed, except for the
    settings named in `free`.  With resume=True in settings a run goes on from its checkpoint, with
    overwrite=True it is replaced.  position: row of the progress bar.  In a run of one process,
    Ctrl-C and SIGTERM stop it after the current step with a checkpoint (KeyboardInterrupt); a
    second signal stops it at once.
    """

    def __init__(self, folder, settings, data=None, free=(), position=0):
        self.folder = Path(folder)
        self.about = {"settings": settings, "data": data or {}}
        self.free = ("resume", "overwrite", *free)  # these say how it was started
        self.position = position
        self.rank, self.world = ranks()
        self.pending = []  # sums of the steps since the last line of metrics
        self.interrupted = False
        self.handlers = {}

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            self.lock = lock(self.folder)
        try:
            self.begin()
        except BaseException:
            if self.rank == 0:
                self.lock.close()  # else a notebook holds it as long as the traceback
            raise
        return self

    def begin(self):
        """Read the checkpoint, open the files, catch signals."""
        resume = self.about["settings"].get("resume")
        check_free(self.folder, resume or self.about["settings"].get("overwrite"))
        self.state = self.newest() if resume else None
        state = self.state or {"result": {}, "tokens": 0, "seconds": 0.0, "metrics": 0}
        self.result = state["result"]  # scores of the finished stages
        self.tokens = state["tokens"]
        self.started = time.perf_counter() - state["seconds"]
        self.versions = versions()  # now: somebody may commit while this runs
        if self.rank == 0:
            self.open_files(state["metrics"])
        if self.world == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self.interrupt)

    def newest(self):
        """The newest checkpoint that can be read; None if there is none."""
        newest = self.folder / "checkpoint.pt"
        previous = self.folder / "checkpoint.pt.previous"
        finished = (self.folder / "result.json").exists()
        if not newest.exists() and not previous.exists():
            if finished:
                gone = "a finished run without its checkpoint: --overwrite trains it again"
                raise ValueError(f"{self.folder} contains {gone}")
            return None
        try:
            state = load(newest)
        except (ValueError, FileNotFoundError) as error:
            if not previous.exists():
                raise
            print(f"{error}; {previous} is used instead", file=sys.stderr)
            state = load(previous)
            if self.rank == 0:
                newest.unlink(missing_ok=True)  # `save` must not keep it as the previous one
        how = "--resume without other flags continues it, if config.json and data are as they were"
        if finished:
            how = "it is finished: --overwrite trains it again"
            if (self.folder / "pretrained.pt").exists():
                how = f"it is finished: for more, pass --pretrained {self.folder} and another --out"
        for kind, now in self.about.items():
            if changed := differences(state[kind], now, self.free):
                found = f"{self.folder} contains a run with other {kind}: {changed}"
                raise ValueError(f"{found}; {how}")
        return state

    def open_files(self, metrics_size):
        """Begin config.json and metrics.jsonl; what a replaced run left goes."""
        stale = []
        if self.state is None and self.about["settings"].get("overwrite"):
            stale = ["result.json"]
            for name in ("checkpoint.pt", "pretrained.pt", "model.pt"):
                stale += [name, name + ".previous"]
        for name in stale:
            (self.folder / name).unlink(missing_ok=True)
        config = {**self.about["settings"], "data": self.about["data"]}
        write_json(self.folder / "config.json", config)
        self.metrics = open(self.folder / "metrics.jsonl", "ab")
        # drop lines that were written after the checkpoint
        self.metrics.truncate(min(self.metrics.tell(), metrics_size))

    def __exit__(self, failure, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.rank > 0:
            return
        with self.lock:  # closes it
            if failure is None:
                seconds = time.perf_counter() - self.started
                speed = {"seconds": round(seconds, 1), "tokens_per_s": round(self.tokens / seconds)}
                speed["peak_memory"] = peak_memory()
                about = {"config": self.about["settings"], "data": self.about["data"]}
                self.result.update(about, speed=speed, **self.versions)
                write_json(self.folder / "result.json", self.result)
            with naming(self.folder / "metrics.jsonl"):
                self.metrics.close()  # fails again if a write to it has failed

    def interrupt(self, number, _):
        print("Stopping after this step; press Ctrl-C again to quit immediately.", file=sys.stderr)
        self.interrupted = True
        for other in self.handlers:
            signal.signal(other, signal.default_int_handler)

    def restore(self, parts):
        """Load the checkpoint into {name: object}.  Returns the first step and the best so far."""
        state = self.state
        self.state = None  # finished stages are skipped: only the first restore has a checkpoint
        if state is None:
            return 0, None
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return state["step"], state["best"]

    def save(self, step, parts, best):
        """Write a checkpoint after `step`; stop here if the run was interrupted."""
        self.report(step)
        if self.rank == 0:
            self.metrics.flush()
            state = {name: part.state_dict() for name, part in parts.items()}
            state.update(stage=self.stage, step=step + 1, best=best, result=self.result)
            state.update(tokens=self.tokens, seconds=time.perf_counter() - self.started)
            state.update(metrics=self.metrics.tell(), **self.about)
            save(self.folder / "checkpoint.pt", state)
        if self.interrupted:
            raise KeyboardInterrupt(f"interrupted; --resume continues {self.folder}")

    def save_weights(self, name, model, head):
        """Write weights, with all that is needed to rebuild their modules."""
        if self.rank == 0:
            weights = {"model": model.state_dict(), "head": head.state_dict()}
            save(self.folder / name, {**weights, **self.about, "stage": self.stage})

    def steps(self, stage, first, last):
        """The steps of a stage, with a progress bar on a terminal."""
        self.stage = stage
        self.begun = (time.perf_counter(), self.tokens, first)
        options = {"position": self.position, "leave": False, "initial": first, "total": last}
        options["disable"] = None if self.rank == 0 else True  # None: unless it is a terminal
        self.bar = tqdm(range(first, last), f"{self.folder.name} {stage}", **options)
        return self.bar

    def log(self, step, sums, tokens):
        """Note a step: sums of loss, count, correct, ... on the device, tokens read."""
        self.pending.append(sums)
        self.tokens += tokens
        if (step + 1) % LOG_EVERY == 0:
            self.report(step)

    def report(self, step):
        """Write means over the steps since the last report."""
        if not self.pending:
            return
        sums = torch.stack(self.pending).sum(0)
        self.pending = []
        if self.world > 1:
            dist.all_reduce(sums)
        score = means(sums)
        self.bar.set_postfix(score)
        self.write(step, score)

    def validated(self, step, score):
        """Note a validation; print it where there is no terminal for a progress bar."""
        self.write(step, score, "val_")
        if self.rank > 0 or sys.stderr.isatty():
            return
        began, tokens, first = self.begun
        seconds = time.perf_counter() - began
        last = self.bar.total
        left = seconds / (step + 1 - first) * (last - step - 1)
        words = [f"{name} {value:.4g}" for name, value in score.items()]
        words.append(f"{(self.tokens - tokens) / seconds:,.0f} tokens/s")
        words.append(f"{tqdm.format_interval(left)} left")
        line = f"{self.folder.name} {self.stage} {step + 1}/{last}: validation {', '.join(words)}"
        with contextlib.suppress(OSError):  # nobody reads it any more: training goes on
            print(line, file=sys.stderr, flush=True)

    def write(self, step, score, kind=""):
        """Add a line to the metrics.  FloatingPointError if the loss is not finite."""
        if not math.isfinite(score["loss"]):
            path = self.folder / "checkpoint.pt"
            good = f"{path} is the last good checkpoint" if path.exists() else "no checkpoint yet"
            where = f"{self.folder}, {self.stage}, step {step + 1}"
            raise FloatingPointError(f"{where}: {kind}loss is {score['loss']}; {good}")
        line = {"stage": self.stage, f"{kind}step": step + 1}
        line.update({kind + name: value for name, value in score.items()})
        if self.rank == 0:
            self.metrics.write(json.dumps(line).encode() + b"\n")


# ------------------------------------------------------------------------- files, provenance


def lock(folder):
    """An open, locked file; no other run can work in the folder until it is closed."""
    file = open(folder / "lock", "w", encoding="utf-8")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows has no flock
        pass
    except OSError as error:  # some network file systems have none either
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
            raise ValueError(f"{folder} is in use by another run") from error
    return file


def write_json(path, content):
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def peak_memory():
    """Bytes, of the GPU if there is one, else of this process; 0 where it is not known."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else 1024 * used


def git(*words):
    """What git prints about this file's repository."""
    command = ["git", "-C", str(Path(__file__).parent), *words]
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout.strip()


def versions():
    """torch, Python, and the commit of this code ("-dirty": changed outside results/)."""
    try:
        commit = git("rev-parse", "--short", "HEAD")
        if git("status", "--porcelain", "-uno", ".", ":!results"):
            commit += "-dirty"
    except (OSError, subprocess.CalledProcessError):
        commit = None  # a copied file, no repository
    return {"torch": torch.__version__, "python": platform.python_version(), "commit": commit}
