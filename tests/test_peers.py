"""benchmarks/peers.py: beside a tiny module with the interface of state-spaces/s4."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import peers

FAKE = """
import torch

class FFTConv(torch.nn.Module):
    def __init__(self, d_model, l_max=None, mode="dplr", **kernel):
        super().__init__()
        assert mode in ("dplr", "diag") and kernel == {"d_state": 64, "n_ssm": d_model}
        self.D = torch.nn.Parameter(torch.randn(d_model, 1))
        self.L = l_max
        self.activation = torch.nn.GELU()

    def forward(self, x):  # (B, D, L)
        assert x.shape[1:] == (len(self.D), self.L)
        return self.activation(x * self.D), None
"""


@pytest.fixture
def clone(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = tmp_path / "models" / "s4"
    folder.mkdir(parents=True)
    (folder / "s4.py").write_text(FAKE)
    return tmp_path


def run(monkeypatch, path, *flags):
    monkeypatch.setattr(sys, "argv", ["peers.py", "--s4", str(path), *flags])
    peers.main()


def test_every_layer_is_timed_beside_theirs(clone, monkeypatch):
    monkeypatch.setattr(peers, "ROOT", clone)
    monkeypatch.setattr(peers, "WIDTH", 4)
    monkeypatch.setattr(peers, "BATCH", {1024: 2})
    run(monkeypatch, clone)
    result = json.loads((clone / "results/peers_cpu.json").read_text())
    found = [(row["layer"], row["whose"]) for row in result["rows"]]
    assert found == [(k, w) for k in ("S4", "S4D", "4 layers") for w in ("ours", "theirs")]
    assert all(row["ms"] > 0 and (row["L"], row["batch"]) == (1024, 2) for row in result["rows"])
    assert result["command"] == "python benchmarks/peers.py" and result["cuda_kernel"] is None


def test_their_layer_is_a_mixer_without_its_activation(clone):
    module = peers.load_theirs(clone)
    layer = peers.build("S4D", "theirs", module, 8)
    x = torch.randn(2, 8, peers.WIDTH)
    torch.testing.assert_close(layer(x), x * layer.conv.D[:, 0])
    four = peers.build("4 layers", "theirs", module, 8)
    assert [type(block.mixer) for block in four.blocks] == [peers.Theirs] * 4
    for name in ("S4", "S4D"):
        assert type(peers.build(name, "ours", module, 8)).__name__ == name


def test_a_wrong_path_and_a_missing_import_end_in_one_line(clone, monkeypatch):
    with pytest.raises(SystemExit, match=r"^peers.py: --s4 .* has no models/s4/s4.py$"):
        run(monkeypatch, clone / "models")
    (clone / "models/s4/s4.py").write_text("from no_such_module.x import y\n" + FAKE)
    with pytest.raises(SystemExit, match=r"^peers.py: .*No module named .no_such_module.; install"):
        run(monkeypatch, clone)
