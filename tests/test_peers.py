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
    layer = peers.Theirs(peers.load_theirs(clone), "dplr", 8)
    x = torch.randn(2, 8, peers.WIDTH)
    torch.testing.assert_close(layer(x), x * layer.conv.D[:, 0])
    four = peers.build("4 layers", "theirs", peers.load_theirs(clone), 8)
    assert [type(block.mixer) for block in four.blocks] == [peers.Theirs] * 4


def test_a_wrong_path_ends_in_one_line(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"^peers.py: --s4 .* has no models/s4/s4.py$"):
        run(monkeypatch, tmp_path)


def test_missing_imports_are_named_in_one_line(clone, monkeypatch):
    (clone / "models/s4/s4.py").write_text("import no_such_b\nfrom no_such_a.x import y\n" + FAKE)
    with pytest.raises(SystemExit, match=r"^peers.py: .* imports no_such_a, no_such_b: install"):
        run(monkeypatch, clone)
