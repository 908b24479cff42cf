"""checkpoint.py: a run that is killed, interrupted or damaged goes on to the same bits."""

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import runs
import torch
from runs import TINY, after_step, bits, die, load_small, same

import checkpoint
import pretrain
from settings import Config


@pytest.fixture(autouse=True)
def small_lattice(monkeypatch):
    load_small(monkeypatch)


run = partial(runs.run, dropout=0.1, task="my.csv")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run without interruptions ends in."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        load_small(patch)
        run(folder, "a")
    return bits(folder / "a")


def stop_run(tmp_path, stage, step, act=die):
    """Let a run in tmp_path/cut end after this step, by act(); returns its last words."""
    with pytest.MonkeyPatch.context() as patch:
        after_step(patch, stage, step, act)
        with pytest.raises((RuntimeError, KeyboardInterrupt)) as stop:
            run(tmp_path, "cut")
    return str(stop.value)


@pytest.mark.parametrize(
    ("stop", "last"),
    [
        (("pretrain", 7), ("pretrain", 6)),
        (("pretrain", 12), ("pretrain", 6)),
        (("finetune", 3), ("pretrain", 12)),
        (("finetune", 9), ("finetune", 6)),
    ],
)
def test_a_killed_run_continues_to_the_same_bits(stop, last, whole, tmp_path):
    """From the last checkpoint, which is that of the last validation; the data may have moved."""
    assert stop_run(tmp_path, *stop) == "killed"
    state = checkpoint.load(tmp_path / "cut" / "checkpoint.pt")
    assert (state["stage"], state["step"]) == last
    run(tmp_path, "cut", task="elsewhere/my.csv", resume=True)
    same(whole, bits(tmp_path / "cut"))


def test_a_run_is_continued_only_with_its_settings_and_replaced_only_with_overwrite(
    tmp_path, monkeypatch
):
    """A finished one is refused before the data are loaded; a new run leaves no weights of it."""
    folder = tmp_path / "cut"
    stop_run(tmp_path, "pretrain", 7)
    with pytest.raises(ValueError, match="contains an unfinished run: pass --resume"):
        run(tmp_path, "cut")
    with pytest.raises(ValueError, match=r"seed 0 -> 1; --resume without other flags continues it"):
        run(tmp_path, "cut", resume=True, seed=1)
    (folder / "checkpoint.pt").rename(folder / "checkpoint.pt.previous")
    with pytest.raises(ValueError, match="contains an unfinished run"):
        run(tmp_path, "cut")
    run(tmp_path, "cut", resume=True, accumulate=2, eager=True, pad_to=4)

    before = bits(folder)
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "load_data", lambda config: die())
        with pytest.raises(ValueError, match=r"cut contains a finished run: pass --overwrite"):
            run(tmp_path, "cut")
    with pytest.raises(ValueError, match=r"finetune_steps 12 -> 20; it is finished: for more"):
        run(tmp_path, "cut", resume=True, finetune_steps=20)
    with pytest.raises(ValueError, match="finished run"):  # it may finish while another one loads
        checkpoint.Run(folder, {}).__enter__()
    same(before, bits(folder))
    assert (folder / "pretrained.pt").exists()
    run(tmp_path, "cut", objective="none", seed=1, overwrite=True)
    assert not (folder / "pretrained.pt").exists()
    assert "pretrain" not in (folder / "metrics.jsonl").read_text()


def test_only_overwrite_deletes_weights(tmp_path):
    mine = tmp_path / "a" / "pretrained.pt"
    mine.parent.mkdir()
    mine.write_text("mine")
    run(tmp_path, "a", objective="none", finetune_steps=1)
    assert mine.read_text() == "mine"


def test_a_finished_run_whose_checkpoint_is_gone_stays_as_it_is(tmp_path):
    run(tmp_path, "a", objective="none", finetune_steps=1)
    (tmp_path / "a" / "checkpoint.pt").unlink()
    before = (tmp_path / "a" / "result.json").read_bytes()
    with pytest.raises(ValueError, match="a finished run without its checkpoint: --overwrite"):
        run(tmp_path, "a", objective="none", finetune_steps=1, resume=True)
    assert (tmp_path / "a" / "result.json").read_bytes() == before


def test_a_finished_run_that_cannot_be_continued_keeps_its_result(tmp_path, monkeypatch):
    run(tmp_path, "a", objective="none", finetune_steps=1)
    with pytest.raises(ValueError, match=r"-> 2; it is finished: --overwrite trains it again"):
        run(tmp_path, "a", objective="none", finetune_steps=2, resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Run, "save_weights", lambda *_: die())
        with pytest.raises(RuntimeError, match="killed"):
            run(tmp_path, "a", objective="none", finetune_steps=1, resume=True)
    assert (tmp_path / "a" / "result.json").exists()


def test_a_refused_run_does_not_keep_the_folder(tmp_path):
    """Also while somebody holds the error, as a notebook does."""
    stop_run(tmp_path, "pretrain", 7)
    with pytest.raises(ValueError, match="seed 0 -> 1") as error:
        run(tmp_path, "cut", resume=True, seed=1)
    run(tmp_path, "cut", resume=True)
    assert error.value is not None


def test_the_example_of_the_docstring_resumes(tmp_path):
    part = torch.nn.Linear(1, 1)
    with pytest.raises(KeyboardInterrupt), checkpoint.Run(tmp_path, {"lr": 1}) as run:
        for step in run.steps("train", 0, 5):
            run.interrupted = step == 1
            run.save(step, {"part": part}, None)
    with checkpoint.Run(tmp_path, {"lr": 1, "resume": True}) as run:
        assert run.restore({"part": part}) == (2, None)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_with_a_checkpoint(number, whole, tmp_path, capsys):
    began = time.perf_counter() - 0.1  # seconds are rounded to tenths
    words = stop_run(tmp_path, "pretrain", 4, lambda: signal.raise_signal(number))
    assert "interrupted; --resume continues" in words
    assert "press Ctrl-C again to quit immediately" in capsys.readouterr().err
    state = checkpoint.load(tmp_path / "cut" / "checkpoint.pt")
    assert state["step"] == 4 and state["seconds"] > 0
    speed = run(tmp_path, "cut", resume=True)["speed"]
    assert 0 < speed["seconds"] < time.perf_counter() - began
    assert bits(tmp_path / "cut")[0] == whole[0]


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_acts_at_once(first, tmp_path):
    def twice():
        signal.raise_signal(first)
        signal.raise_signal(signal.SIGINT)

    assert stop_run(tmp_path, "pretrain", 4, twice) == ""
    assert not (tmp_path / "cut" / "checkpoint.pt").exists()


def test_signals_are_as_before_after_a_run_and_untouched_by_one_in_a_thread(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    options = {"objective": "none", "finetune_steps": 1}
    run(tmp_path, "a", **options)
    done = []
    thread = threading.Thread(target=lambda: done.append(run(tmp_path, "b", **options)))
    thread.start()
    thread.join()
    assert done and done[0]["test"]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# ------------------------------------------------------------------------------------- files


def test_a_damaged_checkpoint_is_named_and_never_replaces_the_sound_one(
    whole, tmp_path, monkeypatch, capsys
):
    """Killed between the two renames of `save`, the sound one must still be there.

    The metrics are lost too: they are not filled with zeros up to their former length.
    """
    run(tmp_path, "a")
    newest = tmp_path / "a" / "checkpoint.pt"
    previous = tmp_path / "a" / "checkpoint.pt.previous"
    saved = previous.read_bytes()
    newest.write_bytes(newest.read_bytes()[:-500])
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", lambda path, state: die())
        with pytest.raises(RuntimeError, match="killed"):
            run(tmp_path, "a", resume=True)
    assert f"{newest} is not a file of weights" in capsys.readouterr().err
    assert not newest.exists() and previous.read_bytes() == saved
    (tmp_path / "a" / "metrics.jsonl").unlink()
    run(tmp_path, "a", resume=True)
    scores, metrics, weights = bits(tmp_path / "a")
    assert metrics and whole[1].endswith(metrics)
    same(whole, (scores, whole[1], weights))
    newest.unlink()
    previous.write_bytes(b"half")
    with pytest.raises(ValueError, match=r"previous is not a file of weights"):
        run(tmp_path, "a", resume=True)
    assert previous.read_bytes() == b"half"


def test_a_file_cut_short_anywhere_is_a_damaged_one(tmp_path, capsys):
    """torch.load raises OSError, errno EINVAL, at some of the lengths."""
    path = tmp_path / "checkpoint.pt"
    state = {"settings": {"resume": True}, "data": {}, "result": {}, "best": None}
    state.update(tokens=1, seconds=1.0, metrics=0, model=torch.randn(20_000))
    checkpoint.save(path, state | {"step": 7})
    checkpoint.save(path, state | {"step": 8})
    whole = path.read_bytes()
    for i in range(40):
        path.write_bytes(whole[: len(whole) * i // 40])
        with pytest.raises(ValueError, match=rf"^{path} is not a file of weights: copy it again"):
            checkpoint.load(path)
        with checkpoint.Run(tmp_path, {"resume": True}) as resumed:
            assert resumed.restore({}) == (7, None)
            assert time.perf_counter() - resumed.started > 1
        assert f"{path}.previous is used instead" in capsys.readouterr().err
    path.write_bytes(whole[:-9])
    path.with_name("checkpoint.pt.previous").unlink()
    with pytest.raises(ValueError, match=rf"{path} is not a file of weights"):
        checkpoint.Run(tmp_path, {"resume": True}).__enter__()
    with pytest.raises(IsADirectoryError):  # not damaged: an error of the system stays what it is
        checkpoint.load(tmp_path)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"step": 1})

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(path, {"step": 2})
    assert checkpoint.load(path) == {"step": 1}


FULL = Path("/dev/full")
WRITTEN = "config.json pretrained.pt checkpoint.pt model.pt result.json metrics.jsonl"


@pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("name", WRITTEN.split())
def test_a_full_disk_is_reported_with_the_file(name, tmp_path, monkeypatch):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / f"{name}.new").symlink_to(FULL)

    def open_full(self, size):
        self.metrics = open(FULL, "ab")

    if name == "metrics.jsonl":
        monkeypatch.setattr(checkpoint.Run, "open_files", open_full)
    with pytest.raises(OSError, match="No space left") as error:
        run(tmp_path, "a", resume=True)
    assert error.value.filename == str(folder / name)
    if name != "metrics.jsonl":
        assert not (folder / f"{name}.new").is_symlink(), "half-written"


@pytest.mark.parametrize("name", ["file", "file/a", "dangling", "long" * 75, "refused"])
def test_an_unusable_folder_is_noticed_before_the_data_are_loaded(name, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "load_data", lambda config: die())
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")

    def refuse(dir):
        raise PermissionError(errno.EACCES, "Permission denied", str(dir))

    if name == "refused":
        monkeypatch.setattr(checkpoint.tempfile, "TemporaryFile", refuse)
    with pytest.raises(OSError) as error:
        run(tmp_path, name)
    assert name.split("/")[0] in str(error.value.filename)


def test_metrics_are_means_over_every_ten_steps(tmp_path):
    with checkpoint.Run(tmp_path / "a", {}) as a:
        for step in a.steps("pretrain", 0, 35):
            count = 0 if step < 19 else 1  # positions that were masked
            a.log(step, torch.tensor([step * count, count, count / 2]).double(), 1)
    text = (tmp_path / "a" / "metrics.jsonl").read_text("utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["step"] for line in lines] == [10, 20, 30]
    assert [line["loss"] for line in lines] == [0, 19, 24.5]
    assert [line["accuracy"] for line in lines] == [0, 0.5, 0.5]
    checkpoint.lock(tmp_path / "a").close()  # the run has released its lock


def test_metrics_are_means_over_all_processes(tmp_path, monkeypatch):
    """The other process saw two positions, with a loss of 3 each and both right."""
    others = torch.tensor([6, 2, 2]).double()
    monkeypatch.setattr(checkpoint, "ranks", lambda: (0, 2))
    monkeypatch.setattr(checkpoint.dist, "all_reduce", lambda sums: sums.add_(others))
    with checkpoint.Run(tmp_path / "a", {}) as a:
        for step in a.steps("pretrain", 0, 10):
            a.log(step, torch.tensor([1, 1, 0]).double(), 1)
    line = json.loads((tmp_path / "a" / "metrics.jsonl").read_text("utf-8"))
    assert line["loss"] == 16 / 12 and line["accuracy"] == 2 / 12


@pytest.mark.parametrize("links", [True, False])
def test_a_run_without_a_folder_gets_a_new_one_that_latest_stands_for(links, tmp_path, monkeypatch):
    """Without symbolic links, by a text file; --resume continues it, under its own name."""

    def refuse(*_):
        raise OSError("no links")

    monkeypatch.chdir(tmp_path)
    if not links:
        monkeypatch.setattr(checkpoint.Path, "symlink_to", refuse)
    config = Config(**TINY, model="s4", pretrain_steps=4, finetune_steps=4, eval_every=2)
    pretrain.train(config)
    with monkeypatch.context() as patch:
        after_step(patch, "finetune", 3, die)
        with pytest.raises(RuntimeError, match="killed"):
            pretrain.train(config)
    latest = Path("runs/latest")
    assert latest.is_symlink() == links
    assert checkpoint.find_run(latest) == Path("runs/lattice-s4-2")
    assert checkpoint.find_run("runs") == Path("runs")
    result = pretrain.train(replace(config, resume=True))
    assert result["config"]["out"] == "runs/lattice-s4-2"
    assert sorted(os.listdir("runs")) == ["latest", "lattice-s4-1", "lattice-s4-2"]
    tuned = pretrain.train(replace(config, pretrained="runs/latest"))  # which it becomes
    assert tuned["config"]["pretrained"] == "runs/lattice-s4-2/pretrained.pt"
    same(bits(Path("runs/lattice-s4-1")), bits(Path("runs/lattice-s4-2")))
    assert not Path("runs/lattice-s4-1/latest").exists()


def test_a_folder_called_latest_is_not_replaced(tmp_path):
    (tmp_path / "latest").mkdir()
    with pytest.raises(ValueError, match="latest is a folder, not a link to one: rename it"):
        checkpoint.new_folder("a", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]


def test_a_line_per_validation_where_there_is_no_terminal(tmp_path, monkeypatch, capsys):
    """On standard error; a run goes on when nobody reads it any more."""
    run(tmp_path, "a")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    number = r"[\d.,]+"
    scores = rf"validation loss {number}, accuracy {number}, {number} tokens/s"
    assert re.fullmatch(rf"a pretrain 6/12: {scores}, 00:0\d left", lines[0])
    assert re.fullmatch(rf"a finetune 12/12: {scores}, 00:00 left", lines[3])

    class Pipe(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    short = {"objective": "none", "finetune_steps": 1}
    monkeypatch.setattr(sys, "stderr", Pipe())
    run(tmp_path, "b", **short)
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    run(tmp_path, "c", **short)
    assert "validation" not in terminal.getvalue() and "c finetune" in terminal.getvalue()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_folder_in_use_is_refused_where_there_are_locks(number, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(number, "no locks")

    with checkpoint.Run(tmp_path, {}):
        with pytest.raises(ValueError, match="in use by another run"):
            checkpoint.lock(tmp_path)
        monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", refuse)
        checkpoint.lock(tmp_path).close()


# ---------------------------------------------------------------------------------- diverged


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    log = checkpoint.Run.log

    def spoil(self, step, sums, tokens):
        log(self, step, sums * (float("nan") if step == 7 else 1), tokens)

    monkeypatch.setattr(checkpoint.Run, "log", spoil)
    message = r"a, pretrain, step 9: loss is nan; .*checkpoint.pt is the last good checkpoint"
    with pytest.raises(FloatingPointError, match=message):
        run(tmp_path, "a", eval_every=3)
    assert checkpoint.load(tmp_path / "a" / "checkpoint.pt")["step"] == 6
    assert not (tmp_path / "a" / "result.json").exists()


def test_validation_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    """It would never be beaten, and the checkpoint would hold it."""
    nan = float("nan")
    monkeypatch.setattr(pretrain, "evaluate", lambda *_: {"loss": nan, "accuracy": nan})
    message = "a, pretrain, step 6: val_loss is nan; no checkpoint yet"
    with pytest.raises(FloatingPointError, match=message):
        run(tmp_path, "a")
    assert not (tmp_path / "a" / "checkpoint.pt").exists()


@pytest.mark.parametrize("model", ["transformer", "s4", "s4d", "diagonal", "sgconv"])
def test_every_model_that_diverges_says_where(tmp_path, model):
    """A learning rate of 1e30: the loss, its step and the last good checkpoint, no other error."""
    options = {"pretrain_lr": 1e30, "clip": 1e30, "weight_decay": 1e-9, "warmup": 0.0}
    message = r"step \d+: (val_)?loss is (nan|inf); .*checkpoint"
    with pytest.raises(FloatingPointError, match=message):
        run(tmp_path, "a", model=model, **options)


# -------------------------------------------------------------------------------- provenance


def test_the_commit_is_dirty_if_the_code_is(tmp_path, monkeypatch):
    """A benchmark writes into results/ as it goes: that alone does not make its commit dirty."""
    (tmp_path / "results").mkdir()
    code = tmp_path / "checkpoint.py"
    result = tmp_path / "results" / "a.json"
    for path in (code, result):
        path.write_text("1")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "a"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(checkpoint, "__file__", str(code))
    clean = checkpoint.versions()["commit"]
    result.write_text("2")
    assert checkpoint.versions()["commit"] == clean
    code.write_text("2")
    assert checkpoint.versions()["commit"] == clean + "-dirty"
    monkeypatch.setattr(checkpoint, "__file__", "/proc/nowhere/checkpoint.py")
    assert checkpoint.versions()["commit"] is None
