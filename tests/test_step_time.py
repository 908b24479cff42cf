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
SLOW = {  # where a nap of 20 ms is put -> the part that must show it
    "data": (pretrain, "make_batch"),
    "forward": (pretrain, "loss_sums"),
    "backward": (torch.Tensor, "backward"),
    "optimizer": (torch.optim.AdamW, "step"),
    "rest": (pretrain, "schedule"),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    data = lra_data.load("lattice", n_train=8, n_val=8, n_test=8)
    monkeypatch.setattr(lra_data, "load", lambda *args, **options: data)
    return data


@pytest.mark.parametrize("part", SLOW)
def test_a_nap_shows_in_its_part(part, monkeypatch, tmp_path):
    owner, name = SLOW[part]
    function = getattr(owner, name)

    def napping(*args, **options):
        time.sleep(0.02)
        return function(*args, **options)

    monkeypatch.setattr(owner, name, napping)
    patched = [*SLOW.values(), (Run, "steps"), (pretrain, "evaluate")]
    before = [getattr(owner, name) for owner, name in patched]
    found, peak = step_time.measure(replace(TINY, out=str(tmp_path)))
    assert [getattr(owner, name) for owner, name in patched] == before
    assert peak > 2**20
    for row in found.values():
        assert row[part] >= 20 and all(row[other] > 0 for other in SLOW)  # a lower bound, no race
        assert sum(row[other] for other in SLOW) == pytest.approx(row["total"])
        inside = row["forward"] + row["backward"] + row["optimizer"]
        assert step_time.share(row) == pytest.approx(100 * inside / row["total"])


def test_tokens_and_what_is_kept_for_backward_are_counted(small, tmp_path):
    found, _ = step_time.measure(replace(TINY, out=str(tmp_path / "a")))
    L = small.train.tokens.shape[1]
    assert [row["tokens"] for row in found.values()] == [4 * L, 4 * L]
    clock = step_time.Clock(TINY, profile=True)
    with clock.attached():
        x = torch.ones(3, 5, dtype=torch.float64, requires_grad=True)
        (x * x).sigmoid().square().sum()  # keeps x, a leaf, and the sigmoid for two gradients
    assert clock.bytes == 2 * 8 * 15
    least = step_time.bounds(replace(TINY, out=str(tmp_path / "b")))
    activations = 4 * L * 8 * 4  # bytes of one (B, L, D)
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
