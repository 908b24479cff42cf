"""benchmarks/report.py: one file that asks no network, and shows what the runs hold."""

import base64
import json
import re
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import lra_data
import pretrain
from settings import Config

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import report  # noqa: E402

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
        page = folder / "page.html"
        report.main([*(str(folder / n) for n in "abc"), "--out", str(page), "--samples", "2"])
        yield folder


def test_the_page_is_alone_and_whole(runs):
    text = (runs / "page.html").read_text("utf-8")
    assert not re.search(
        r"https?:|<script|<link|@import|url\(|src=\"(?!data:image/png;base64,)", text
    )
    assert text.count("<svg") == 4 and text.count("<table") == 2
    assert text.count("<figure>") == 4 and "no denoiser.pt" in text
    for tag in ("svg", "table", "figure", "p", "h2", "ul", "details"):
        assert len(re.findall(rf"<{tag}[ >]", text)) == text.count(f"</{tag}>"), tag


def test_the_table_holds_the_results(runs):
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
    losses = [line["val_loss"] for line in lines if "val_loss" in line]
    found = [report.points(run, stage, "loss", "val_") for stage in ("pretrain", "finetune")]
    assert np.concatenate(found).tolist() == [*map(list, zip([10, 20] * 2, losses, strict=True))]
    svg = report.panel("loss", "nats", [(1, np.array([[0, 2.0], [10, 1.0]]), np.empty((0, 2)))])
    (x0, y0), (x1, y1) = (
        map(float, p.split(",")) for p in re.search(r'points="(.*?)"', svg)[1].split()
    )
    assert x1 - x0 == pytest.approx(500 - 62 - 34) and y1 > y0  # a falling curve falls
    assert report.ticks(0, 300) == [0, 100, 200, 300] and report.ticks(0.21, 0.4)[0] == 0.25


def test_denoised_examples_are_what_validation_judged(runs):
    _, raw, keep, where, guess = report.denoise(report.read_run(runs / "a"), 8)
    assert keep.all() and 0.2 < where.mean() < 0.4  # the mask ratio of lattice is 0.3
    assert (guess[~where] == raw[~where]).all() and set(np.unique(guess)) <= {0, 1}
    judged = json.loads((runs / "a/result.json").read_text())["pretrain"]["accuracy"]
    assert (guess == raw)[where].mean() == pytest.approx(judged, abs=1e-9)  # the one batch of val


def pixels(img):
    """The colours of a picture of the page, (height, width, 3)."""
    png = base64.b64decode(re.search(r"base64,([^\"]+)", img)[1])
    (width, height), start = struct.unpack(">2I", png[16:24]), png.index(b"IDAT")
    lines = np.frombuffer(zlib.decompress(png[start + 4 :]), np.uint8).reshape(height, -1)
    return lines[:, 1:].reshape(height, width, 3)


def test_pictures_show_values_in_grey_and_hidden_pixels_in_colour():
    values = np.array([[-40.0], [51.0], [np.nan], [900.0]])  # a guess may lie beyond the range
    shown = pixels(report.picture(values, 2, 1.0)).reshape(4, 3).tolist()
    assert shown == [[0] * 3, [51] * 3, list(report.HIDDEN), [255] * 3]
    colour = np.array([[10, 20, 30]] * 4)
    assert pixels(report.picture(colour, 2, 2.0))[1, 1].tolist() == [20, 40, 60]
    raw, where = np.array([[0, 1, 1, 0]]), np.array([[True, True, False, True]])
    data = trees(("0", "1"))
    html = report.picture_samples(data, raw, where, np.array([[0, 0, 1, 0]]))
    before, masked, denoised = (pixels(img)[..., 2].ravel() for img in html.split("<img")[1:])
    assert before.tolist() == [0, 255, 255, 0] and denoised.tolist() == [0, 0, 255, 0]
    assert masked.tolist() == [40, 40, 255, 40] and "3 of 4 pixels hidden, 67 % right" in html


def trees(symbols):
    split = lra_data.Split(np.zeros((1, 4), np.uint8), np.zeros(1, np.int64), np.array([4]))
    return lra_data.Data("listops", split, split, split, len(symbols), 2, symbols=symbols)


def test_symbols_are_marked_right_and_wrong():
    data = trees(("0", "1", "[MIN", "]"))
    raw, where = np.array([[2, 0, 1, 3]]), np.array([[False, True, True, False]])
    html = report.token_samples(data, raw, np.ones_like(where), where, np.array([[2, 0, 3, 3]]))
    before, masked, denoised = (
        re.findall(r'<b class="([a-z ]+)">(.*?)</b>', line) for line in html.split("<p ")[1:]
    )
    assert before == [("operator", "[MIN"), ("number", "0"), ("number", "1"), ("close", "]")]
    assert [symbol for _, symbol in masked] == ["[MIN", "?", "?", "]"]
    assert denoised[1:3] == [("number right", "0"), ("close wrong", "]")]
    assert "1 of 2 hidden tokens right" in html


def test_a_folder_that_is_no_run_is_refused_in_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/report.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == "" and not (tmp_path / "runs").exists()
    assert done.stderr.splitlines() == [
        f"report.py: {tmp_path} is no run of pretrain.py: it holds no config.json"
    ]
