"""benchmarks/report.py: one page that works offline and shows what the runs hold."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import lra_data
import pretrain
from settings import Config

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import report

TINY = Config(
    task="lattice", device="cpu", d_model=16, n_layers=1, n_heads=2, d_ff=16, batch_size=8,
    pretrain_steps=20, finetune_steps=20, eval_every=10,
)  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds of a pretrained run, and one from scratch whose metrics end in a cut line."""
    folder = tmp_path_factory.mktemp("runs")
    small = lra_data.load("lattice", n_train=64, n_val=8, n_test=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lra_data, "load", lambda *args, **options: small)
        for name, change in {"a": {}, "b": {"seed": 1}, "c": {"objective": "none"}}.items():
            pretrain.train(replace(TINY, out=str(folder / name), **change))
    with open(folder / "c/metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"stage": "fine')
    (folder / "latest").symlink_to("b")  # as runs/* has it
    page = str(folder / "page.html")
    names = [str(folder / name) for name in ("a", "b", "c", "latest")]
    report.main([*names, page, "--out", page])
    return folder


def test_the_page_needs_no_network_and_has_the_results(runs):
    text = (runs / "page.html").read_text("utf-8")
    assert not re.search(r"https?:|<script|<link|@import|url\(", text)
    assert text.count('<img alt="" src="data:image/png;base64,') == 1
    assert text.count("<table") == text.count("</table>") == 4
    losses = []
    for number, name in enumerate("abc", 1):
        result = json.loads((runs / name / "result.json").read_text())
        row = re.search(rf"<tr><td>{number}</td>.*</tr>", text)[0]
        cells = re.findall(r"<td>(.*?)</td>", row)
        assert cells[1:3] == [str(runs / name), f"{result['parameters']:,}"]
        assert cells[3] == ("20" if name == "c" else "20 + 20")
        loss = result.get("pretrain", {}).get("loss")
        assert (f"loss {loss:.5g}," in cells[4]) if name != "c" else cells[4] == ""
        assert f"accuracy {result['finetune']['accuracy']:.5g}" in cells[5]
        assert f"accuracy {result['test']['accuracy']:.5g}" in cells[6]
        losses.append(result["test"]["loss"])
    mean = round((losses[0] + losses[1]) / 2, 4)
    spread = round(abs(losses[0] - losses[1]) / 2**0.5, 4)  # sample deviation of two numbers
    assert f"<td>1, 2</td><td>loss {mean} ± {spread}</td>" in text
    differ, same = text.split("<h2>Settings</h2>")[1].split("<h3>")
    assert "<th>1</th><th>2</th><th>3</th></tr>" in differ
    assert "<td>seed</td><td>0</td><td>1</td><td>0</td>" in differ
    assert "<td>d_model</td><td>16</td>" in same and "<td>d_model</td>" not in differ


def test_curves_are_those_of_the_metrics(runs):
    run = report.read_run(runs / "a")
    lines = [json.loads(line) for line in (runs / "a/metrics.jsonl").read_text().splitlines()]
    for stage in ("pretrain", "finetune"):
        mine = [line for line in lines if line["stage"] == stage]
        train = [[line["step"], line["loss"]] for line in mine if "loss" in line]
        val = [[line["val_step"], line["val_loss"]] for line in mine if "val_loss" in line]
        assert report.points(run, stage, "loss").tolist() == train
        assert report.points(run, stage, "loss", "val_").tolist() == val
        assert [step for step, _ in val] == [10, 20]


def test_a_full_disk_leaves_the_page_before(runs, tmp_path, monkeypatch):
    before = tmp_path / "page.html"
    before.write_text("the page before")
    write_text = Path.write_text

    def full(path, text, *args, **options):
        write_text(path, "")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(SystemExit, match=r"report.py: .*No space left on device"):
        report.main([str(runs / "c"), "--out", str(before)])
    assert [path.read_text() for path in tmp_path.iterdir()] == ["the page before"]


def test_a_folder_that_is_not_a_run_is_refused_in_one_line(tmp_path):
    message = f"^report.py: {tmp_path} is not a run of pretrain.py: it has no config.json$"
    with pytest.raises(SystemExit, match=message):
        report.main([str(tmp_path), "--out", str(tmp_path / "runs/page.html")])
    assert not list(tmp_path.iterdir())
