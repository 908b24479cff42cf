"""Every script: --check passes, a device that does not work ends in one clear line."""

import importlib

import pytest
import torch

FILES = ["s4", "sgconv", "attention", "structured_ffn", "dist_attention", "pretrain"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("device", ["cuda", "mps", "nonsense"])
def test_a_device_that_does_not_work_ends_in_one_line(name, device, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    script = importlib.import_module(name)
    with pytest.raises(SystemExit) as stop:
        script.main(["--check", "--device", device])
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2
    assert "device" in last and device in last
