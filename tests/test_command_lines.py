"""Every script: a device that does not work ends in one clear line, text files are UTF-8."""

import ast
import importlib
import io
import sys
from pathlib import Path

import pytest
import torch

import pathfinder

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")])
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


def text_calls(tree):
    """Calls that read or write text: open (not binary), read_text, write_text."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        constants = [a.value for a in node.args if isinstance(a, ast.Constant)]
        binary = any(isinstance(c, str) and "b" in c and len(c) < 4 for c in constants)
        module = getattr(getattr(node.func, "value", None), "id", "")
        if name in ("read_text", "write_text") or (name == "open" and not binary):
            if module not in ("Image", "tarfile", "wave"):
                yield node


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_text_is_read_and_written_as_utf8_whatever_the_locale(path):
    for call in text_calls(ast.parse(path.read_text(encoding="utf-8"))):
        named = [k for k in call.keywords if k.arg == "encoding"]
        given = [a for a in call.args if isinstance(a, ast.Constant) and "utf" in str(a.value)]
        assert named or given, f"{path.name}:{call.lineno} has no encoding"


@pytest.mark.parametrize("name", ["lra_data", "pretrain", "predict"])
def test_a_console_that_lacks_a_letter_does_not_stop_a_command(name, monkeypatch):
    script = importlib.import_module(name)
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", console)
    with pytest.raises(SystemExit):
        script.main(["--help"])
    print("データ é")
    console.flush()
    assert console.buffer.getvalue().decode("cp1252").endswith("\\u30c7\\u30fc\\u30bf é\n")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_every_command_reads_its_arguments(path):
    """Else --help would start a measurement and replace its results."""
    text = path.read_text(encoding="utf-8")
    reads = "ArgumentParser(" in text or "takes_no_arguments(__doc__)" in text or "argv" in text
    assert reads or '__name__ == "__main__"' not in text


def test_a_command_without_a_console_shows_no_progress(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)  # as after 2>&-
    pathfinder.main(["32", "--n", "3", "--processes", "1", "--data-dir", str(tmp_path)])
    assert list(tmp_path.iterdir())
