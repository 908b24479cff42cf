"""benchmarks/step_time.py: its clock times the parts of the loop and leaves no trace."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lra_data
import pretrain
from checkpoint import Run
from settings import Config

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import step_time

TINY = Config(
    task="lattice", device="cpu", d_model=8, n_heads=2, n_layers=1, batch_size=4,
    pretrain_steps=6, finetune_steps=6, eval_every=6,
)  # fmt: skip
NAPS = {  # part: function that takes a nap, of so many ms
    "data": (pretrain, "make_batch", 10),
    "forward": (pretrain, "loss_sums", 20),
    "backward": (torch.Tensor, "backward", 30),
    "optimizer": (torch.optim.AdamW, "step", 40),
    "rest": (pretrain, "schedule", 50),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    data = lra_data.load("lattice", n_train=8, n_val=8, n_test=8)
    monkeypatch.setattr(lra_data, "load", lambda *args, **options: data)
    return data


def napping(function, ms):
    def call(*args, **options):
        time.sleep(ms / 1e3)
        return function(*args, **options)

    return call


def test_naps_show_in_their_parts_and_nothing_stays_patched(monkeypatch, tmp_path):
    for owner, name, ms in NAPS.values():
        monkeypatch.setattr(owner, name, napping(getattr(owner, name), ms))
    patched = [(owner, name) for owner, name, _ in NAPS.values()]
    patched += [(Run, "steps"), (pretrain, "evaluate")]
    before = [getattr(owner, name) for owner, name in patched]
    found, peak = step_time.measure(replace(TINY, out=str(tmp_path)))
    assert [getattr(owner, name) for owner, name in patched] == before
    assert peak > 2**20
    for row in found.values():
        for part, (_, _, ms) in NAPS.items():
            assert row[part] >= ms  # a lower bound, no race
        assert sum(row[part] for part in NAPS) == pytest.approx(row["total"])
        inside = row["forward"] + row["backward"] + row["optimizer"]
        assert step_time.share(row) == pytest.approx(100 * inside / row["total"])


def test_what_is_kept_for_backward_is_counted(small, monkeypatch, tmp_path):
    clock = step_time.Clock(TINY, profile=True)
    with clock.attached():
        x = torch.ones(3, 5, dtype=torch.float64, requires_grad=True)
        (x * x).sigmoid().square().sum()  # keeps x, a leaf, and the sigmoid for two gradients
    assert clock.bytes == 2 * 8 * 15
    monkeypatch.setattr(step_time, "PROFILED", 3)
    least = step_time.bounds(replace(TINY, out=str(tmp_path)))
    activations = small.train.tokens[:4].size * 8 * 4  # bytes of one (B, L, D)
    for _, memory in least.values():
        assert memory > 1e3 * 4 * 10 * activations / step_time.BANDWIDTH


def test_of_steps_as_graphs_only_data_are_timed():
    eager = replace(TINY, device="cuda", eager=True)
    assert step_time.Clock(TINY).parts == step_time.Clock(eager).parts == [*step_time.PARTS]
    assert step_time.Clock(replace(TINY, device="cuda")).parts == ["data"]


def test_the_file_has_a_row_per_stage(small, monkeypatch, tmp_path):
    tiny = {"d_model": 8, "n_heads": 2, "n_layers": 1}
    (tmp_path / "tiny.json").write_text(json.dumps({"settings": tiny}))
    flags = "--task lattice --batch-size 4 --steps 6 --settings tiny.json --out found.json"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["step_time.py", *flags.split()])
    step_time.main()
    result = json.loads(Path("found.json").read_text())
    assert [row["stage"] for row in result["rows"]] == ["pretrain", "finetune"]
    for row in result["rows"]:
        tokens = 4 * small.train.tokens.shape[1]
        assert row["tokens_per_s"] == pytest.approx(1e3 * tokens / row["ms"]["total"])
        assert row["share"] == step_time.share(row["ms"]) and 0.05 < row["peak_memory_gib"] < 10
        assert not row["compile"] and "eager" not in row
