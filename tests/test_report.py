"""benchmarks/report.py: one page that works offline and shows what the runs hold."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
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
    """Two seeds of a pretrained run, and one from scratch, which has no denoiser."""
    folder = tmp_path_factory.mktemp("runs")
    small = lra_data.load("lattice", n_train=64, n_val=8, n_test=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lra_data, "load", lambda task, data_dir: small)
        for name, change in {"a": {}, "b": {"seed": 1}, "c": {"objective": "none"}}.items():
            pretrain.train(replace(TINY, out=str(folder / name), **change))
        names = [str(folder / name) for name in "abc"]
        report.main([*names, "--out", str(folder / "page.html"), "--samples", "2"])
        yield folder


def test_the_page_needs_no_network_and_its_tags_are_closed(runs):
    text = (runs / "page.html").read_text("utf-8")
    assert not re.search(r"https?:|<script|<link|@import|url\(", text)
    images = re.findall(r'<img alt="" src="data:image/png;base64,', text)
    assert len(images) == text.count("<img") == 3  # the curves, and examples of two runs
    assert text.count("<table") == 2 and "no pretrained.pt" in text
    for tag in ("table", "div", "h2", "h3", "ul", "details"):
        assert len(re.findall(rf"<{tag}[ >]", text)) == text.count(f"</{tag}>"), tag


def test_the_table_has_the_results(runs):
    text = (runs / "page.html").read_text("utf-8")
    scores = []
    for name in "abc":
        result = json.loads((runs / name / "result.json").read_text())
        row = re.search(rf"<tr><td>\d  {name}</td>.*</tr>", text)[0]
        cells = re.findall(r"<td>(.*?)</td>", row)
        assert cells[1] == f"{result['parameters']:,}"
        assert cells[2] == ("20" if name == "c" else "20 + 20")
        assert cells[3] == ("" if name == "c" else f"{result['pretrain']['loss']:.4f}")
        assert cells[4] == f"{100 * result['finetune']['accuracy']:.2f}"
        assert cells[5] == f"{100 * result['test']['accuracy']:.2f}"
        scores.append(100 * result["test"]["accuracy"])
    spread = abs(scores[0] - scores[1]) / 2**0.5  # sample deviation of two numbers
    assert f"<td>1, 2</td><td>{sum(scores[:2]) / 2:.2f} ± {spread:.2f}</td>" in text


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


def test_denoised_examples_are_what_validation_judged(runs):
    _, raw, keep, where, guess = report.denoise(report.read_run(runs / "a"), 8)
    assert keep.all() and 0.2 < where.mean() < 0.4  # the mask ratio of lattice is 0.3
    assert (guess[~where] == raw[~where]).all() and set(np.unique(guess)) <= {0, 1}
    judged = json.loads((runs / "a/result.json").read_text())["pretrain"]["accuracy"]
    assert (guess == raw)[where].mean() == pytest.approx(judged, abs=1e-9)  # the one batch of val


def listops(symbols):
    split = lra_data.Split(np.zeros((1, 4), np.uint8), np.zeros(1, np.int64), np.array([4]))
    return lra_data.Data("listops", split, split, split, len(symbols), 2, symbols=symbols)


def test_hidden_pixels_are_orange_and_the_others_keep_their_gray():
    raw = np.array([[0, 1, 1, 0]])
    where = np.array([[False, True, False, False]])
    before, masked, after = report.pixels(listops(("0", "1")), raw, where, np.array([[0, 9, 1, 0]]))
    assert before.shape == (1, 2, 2, 3)
    assert before[0, :, :, 0].tolist() == [[0, 1], [1, 0]] == after[0, :, :, 2].tolist()
    assert masked[0, 0, 1].tolist() == list(report.ORANGE)
    assert masked[0, :, :, 2].tolist() == [[0, report.ORANGE[2]], [1, 0]]


def test_tokens_are_marked_hidden_right_and_wrong():
    data = listops(("0", "1", "[MIN", "]"))
    raw = np.array([[2, 0, 1, 3]])
    guess = np.array([[2, 0, 3, 3]])
    where = np.array([[False, True, True, False]])
    html = report.token_samples(data, raw, np.ones_like(where), where, guess)
    before, masked, denoised = html.split("<p ")[1:]
    marks = r'<b class="(\w*)">(.*?)</b>'
    assert re.findall(marks, before) == [("", "[MIN"), ("", "0"), ("", "1"), ("", "]")]
    assert re.findall(marks, masked) == [("", "[MIN"), ("hidden", "?"), ("hidden", "?"), ("", "]")]
    assert re.findall(marks, denoised)[1:3] == [("right", "0"), ("wrong", "]")]
    assert "1 of 2 hidden tokens right" in html


@pytest.mark.parametrize("there", [False, True])
def test_a_full_disk_leaves_no_empty_page(runs, tmp_path, monkeypatch, there):
    page = tmp_path / "page.html"
    if there:
        page.write_text("the page before")
    write_text = Path.write_text

    def full(path, text, *args, **options):
        write_text(path, "")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(SystemExit, match=r"report.py: .*No space left on device"):
        report.main([str(runs / "c"), "--out", str(page), "--samples", "0"])
    left = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert left == ({"page.html": "the page before"} if there else {})


def test_a_folder_that_is_not_a_run_is_refused_in_one_line(tmp_path):
    command = [sys.executable, report.__file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == "" and not (tmp_path / "runs").exists()
    assert done.stderr.splitlines() == [
        f"report.py: {tmp_path} is not a run of pretrain.py: it has no config.json"
    ]
