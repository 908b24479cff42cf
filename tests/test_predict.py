"""predict.py: the outputs of the evaluation, files in and out, and what is refused."""

import csv
import json
import os

import numpy as np
import pytest
import torch
from runs import load_small, numbers, pairs, regression, run, symbols

import checkpoint
import own_data
import predict
import pretrain
from lra_data import SPLITS

SHORT = {"objective": "none", "finetune_steps": 2, "eval_every": 2, "task": "own", "dropout": 0.1}
LENGTHS = [5, 30, 12, 30, 7, 9, 1, 30, 22, 30, 30]
DATA = {
    "symbols": symbols(LENGTHS),
    "pairs": pairs([*LENGTHS, 8]),
    "values": numbers(n=11, L=30),
    "regression": regression(numbers(n=11, L=30, C=1)),
}


def evaluated(monkeypatch, tmp_path, data, **settings):
    """Train on data in batches of 8 with the outputs of the last evaluation, the test."""
    load_small(monkeypatch, data)
    build_head = pretrain.build_head
    seen = []

    def spied_head(*args):
        head = build_head(*args)
        head.register_forward_hook(lambda head, args, out: seen.append(out))
        return head

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "build_head", spied_head)
        run(tmp_path, "a", **(SHORT | settings))
    return seen[-1:] if len(data.test) <= 8 else seen[-2:]


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("objective", ["none", "causal"])
@pytest.mark.parametrize("model", ["transformer", "s4", "s4d", "diagonal", "sgconv"])
def test_predictions_are_those_of_the_evaluation(model, objective, kind, monkeypatch, tmp_path):
    """To the bit on the same batches, and up to rounding one by one."""
    data = DATA[kind]
    settings = {"model": model, "objective": objective, "pretrain_steps": 1}
    expected = torch.cat(evaluated(monkeypatch, tmp_path, data, **settings))
    scale = torch.ones(1)
    if kind == "regression":
        scale = torch.tensor(data.y_std, dtype=torch.float64)
        expected = expected * scale + torch.tensor(data.y_mean, dtype=torch.float64)
    predictor = predict.load(tmp_path / "a")
    x, lengths = data.test.tokens, data.test.lengths
    order = np.argsort(lengths.reshape(len(x), -1).max(1), kind="stable")
    batches = [predictor(x[i], lengths[i]) for i in (order[:8], order[8:]) if len(i)]
    assert torch.equal(torch.cat(batches), expected)
    alone = torch.cat([predictor(x[i : i + 1], lengths[i : i + 1]) for i in order])
    assert ((alone - expected).abs() / scale).max() < 1e-6
    assert (expected.std(0) / scale).min() > 1e-3  # else a constant would do
    if kind == "regression":
        assert torch.equal(predictor(x[order[:8], :, 0]), expected[:8])  # one channel
    else:
        assert next(predict.table(expected, predictor.about)) == ["prediction", "p(0)", "p(1)"]
    if kind == "pairs":
        with pytest.raises(ValueError, match=r"x has shape \(2, 3, 30\)"):
            predictor(np.zeros((2, 3, 30), int))
        with pytest.raises(SystemExit, match="reads pairs of documents"):
            predict.main([str(tmp_path / "a"), "new.npz", "--out", str(tmp_path / "out.csv")])


# -------------------------------------------------------------------------------- files in and out


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Finished runs on a table with columns review and stars, and on arrays with two targets."""
    folder = tmp_path_factory.mktemp("runs")
    lines = ["review,stars,split"]
    for i in range(30):
        label, word = [("up", "good "), ('"down, very"', "bad ")][i % 2]
        lines.append(f"{(1 + i % 7) * word},{label},{SPLITS[i % 3]}")
    (folder / "train.csv").write_text("\n".join(lines), encoding="utf-8")
    x = np.random.RandomState(0).randn(30, 12, 2).astype(np.float32)
    y = np.stack([100 * x[:, :, 0].mean(1), x[:, 0, 1] - 7], 1)
    np.savez(folder / "train.npz", x=x, y=y)
    options = {"objective": "none", "finetune_steps": 40, "eval_every": 20, "finetune_lr": 1e-2}
    columns = {"text_column": "review", "label_column": "stars"}
    run(folder, "table", task=str(folder / "train.csv"), **columns, **options)
    run(folder, "arrays", task=str(folder / "train.npz"), **options)
    return folder


def main(*args):
    predict.main([str(arg) for arg in args])


def rows_of(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_a_table_gets_a_class_and_probabilities_per_line(runs, tmp_path, capsys):
    """In the order of the file, by the columns of the run; its accuracy is that of the labels."""
    out = tmp_path / "out.csv"
    main(runs / "table", runs / "train.csv", "--out", out)
    header, *rows = rows_of(out)
    assert header == ["prediction", "p(down, very)", "p(up)"]
    assert [row[0] for row in rows] == ["up", "down, very"] * 15  # it is easy
    for name, down, up in rows:
        assert float(down) + float(up) == pytest.approx(1, abs=1e-5)
        assert (float(up) > 0.5) == (name == "up")
    assert f"30 predictions in {out}\naccuracy 100.00 %" in capsys.readouterr().out
    assert b"\r" not in out.read_bytes()


def test_arrays_get_values_and_the_score_of_the_run(runs, tmp_path, capsys):
    """Without labels no score; else R2 and mean absolute error, as the run itself printed them."""
    test = own_data.load(runs / "train.npz").test
    command = [runs / "arrays", tmp_path / "new.npz", "--out", tmp_path / "out"]
    np.savez(tmp_path / "new.npz", x=test.tokens)
    main(*command)
    header, *rows = rows_of(tmp_path / "out")
    assert header == ["prediction 0", "prediction 1"]
    expected = predict.load(runs / "arrays")(test.tokens)
    assert np.allclose(np.array(rows, float), expected, rtol=1e-6)
    assert "R2" not in capsys.readouterr().out
    np.savez(tmp_path / "new.npz", x=test.tokens, y=test.labels)
    main(*command, "--overwrite")
    result = json.loads((runs / "arrays" / "result.json").read_text())["test"]
    r2, mae = result["r2"], result["mae"]
    assert f"R2 {r2:.4g}, mean absolute error {mae:.4g}" in capsys.readouterr().out


def test_the_r2_of_a_constant_target_is_0():
    labels = np.full((37, 1), 0.1, np.float32)
    assert predict.score(torch.zeros(37, 1), labels, {"y_mean": (0.0,)}).startswith("R2 0, mean")


def test_model_pt_needs_nothing_else(runs, tmp_path):
    """It is plain tensors and values, and predicts in a folder of its own."""
    state = torch.load(runs / "arrays" / "model.pt", weights_only=True)
    assert {"model", "head", "settings", "data"} <= state.keys()
    (tmp_path / "model.pt").write_bytes((runs / "arrays" / "model.pt").read_bytes())
    x = torch.randn(3, 12, 2)
    for place in (tmp_path, tmp_path / "model.pt"):
        assert torch.equal(predict.load(place)(x), predict.load(runs / "arrays")(x))


def failure(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        main(*args)
    text = str(stop.value.code)
    assert text.startswith("predict.py: ") and "\n" not in text
    return text


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_does_not_work_ends_in_one_line(device, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        predict.main(["runs/a", "new.csv", "--device", device])
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "--device" in last and device in last


def test_torchrun_is_refused(runs, tmp_path, capsys, monkeypatch):
    """Each of its processes would write the same file."""
    command = [runs / "table", runs / "train.csv", "--out", tmp_path / "out.csv"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "WORLD_SIZE is 2: start it with python, not torchrun" in failure(capsys, *command)
    assert not (tmp_path / "out.csv").exists()
    monkeypatch.setenv("WORLD_SIZE", "1")
    main(*command)


def test_what_is_no_finished_run_gets_one_line(runs, tmp_path, capsys):
    path = tmp_path / "model.pt"
    command = [tmp_path, runs / "train.csv", "--out", tmp_path / "out.csv"]
    unfinished = failure(capsys, *command)
    assert "no run of pretrain.py, or unfinished: continue it with --resume" in unfinished
    path.write_bytes((runs / "arrays" / "model.pt").read_bytes()[:-9])
    assert f"{path} is not a file of weights: copy it again" in failure(capsys, *command)
    checkpoint.save(path, {"step": 3})
    assert "is not the model.pt of a run: KeyError" in failure(capsys, *command)
    assert not (tmp_path / "out.csv").exists()


def test_data_of_another_kind_are_refused(runs, tmp_path, capsys):
    out = ["--out", tmp_path / "out.csv"]
    table = [runs / "table", runs / "train.csv", *out]
    assert "the run reads no text" in failure(capsys, runs / "arrays", runs / "train.csv", *out)
    assert "No such file" in failure(capsys, runs / "table", tmp_path / "no.csv", *out)
    assert "no column text" in failure(capsys, *table, "--text-column", "text")
    assert "class test, train, val" in failure(capsys, *table, "--label-column", "split")
    assert not (tmp_path / "out.csv").exists()


def test_a_file_is_replaced_only_with_overwrite_and_only_by_a_whole_one(
    runs, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out.csv"
    out.write_text("precious")
    table = runs / "train.csv"
    command = [runs / "table", table, "--out", out]
    assert "exists: choose another --out, or pass --overwrite" in failure(capsys, *command)
    itself = [runs / "table", table, "--out", table, "--overwrite"]
    assert "is the file to read" in failure(capsys, *itself)

    def full(*_):
        yield ["prediction"]
        raise OSError("No space left on device")

    def locked(*_):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:  # a spreadsheet keeps its file open on Windows
        patch.setattr(os, "replace", locked)
        assert "Permission denied" in failure(capsys, *command, "--overwrite")
    with monkeypatch.context() as patch:
        patch.setattr(predict, "table", full)
        assert "No space left" in failure(capsys, *command, "--overwrite")
    assert out.read_text() == "precious" and list(tmp_path.iterdir()) == [out]
    main(*command, "--overwrite")
    assert len(rows_of(out)) == 31


def test_inputs_that_cannot_be_right_are_refused(runs):
    table = predict.load(runs / "table")
    arrays = predict.load(runs / "arrays")
    for model, x, lengths, message in [
        (table, np.zeros((2, 5, 1), int), None, r"x has shape \(2, 5, 1\)"),
        (table, np.array([[0, 256]]), None, "must be integers from 0 to 255"),
        (table, np.array([[0, -1]]), None, "must be integers from 0 to 255"),
        (table, np.zeros((2, 5)), None, "must be integers"),
        (table, np.zeros((2, 5), int), [5], "1 lengths for 2 inputs"),
        (table, np.zeros((2, 5), int), [5, 6], "expected 1 to 5 for each"),
        (table, np.zeros((2, 5), int), [5, 0], "expected 1 to 5 for each"),
        (arrays, np.zeros((2, 5, 3)), None, r"x has shape \(2, 5, 3\)"),
        (arrays, np.zeros((2, 5)), None, r"x has shape \(2, 5\)"),
        (table, np.zeros((0, 5), int), None, r"x has shape \(0, 5\)"),
        (arrays, np.zeros((2, 5, 2, 1)), None, r"x has shape \(2, 5, 2, 1\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(x, lengths)


def test_padding_may_hold_anything_and_integers_may_be_of_any_kind(runs):
    arrays = predict.load(runs / "arrays")
    x = np.random.RandomState(0).randn(2, 12, 2)
    x[0, 5:] = np.nan
    clean = np.nan_to_num(x).astype(np.float32)
    assert torch.equal(arrays(x.astype(">f8"), np.uint16([5, 12])), arrays(clean, [5, 12]))
    table = predict.load(runs / "table")
    tokens = np.array([[1, 2, -1], [3, 4, 5]])
    expected = table(np.array([[1, 2, 0], [3, 4, 5]]), [2, 3])
    assert torch.equal(table(tokens, [2, 3]), expected)
    assert torch.equal(table(tokens.astype(np.uint16), [2, 3]), expected)
    assert torch.equal(table(tokens.astype(">i4"), [2, 3]), expected)


def test_a_text_is_cut_as_in_training_not_at_the_longest_text_of_training(runs, tmp_path):
    text = "good bad " * 30  # training had 35 bytes at most
    (tmp_path / "new.csv").write_text(f"review\n{text}\n", encoding="utf-8")
    main(runs / "table", tmp_path / "new.csv", "--out", tmp_path / "out.csv")
    logits = predict.load(runs / "table")([list(text.encode())])
    found = [float(p) for p in rows_of(tmp_path / "out.csv")[1][1:]]
    assert found == pytest.approx(logits.softmax(1)[0].tolist(), rel=1e-4)


def test_only_sgconv_refuses_inputs_longer_than_those_of_training(runs, tmp_path, capsys):
    options = {"objective": "none", "finetune_steps": 1}
    run(tmp_path, "a", task=str(runs / "train.npz"), model="sgconv", **options)
    np.savez(tmp_path / "new.npz", x=np.zeros((1, 4097, 2), np.float32))
    os.rename(tmp_path / "new.npz", tmp_path / "new.NPZ")
    command = [tmp_path / "new.NPZ", "--out", tmp_path / "o"]
    assert "length 4097, but the run reads at most 12" in failure(capsys, tmp_path / "a", *command)
    main(runs / "arrays", *command)


@pytest.mark.parametrize("out", ["missing/p.csv", "pipe", "folder", "link"])
def test_out_must_be_a_file_in_a_folder_that_exists(out, tmp_path, monkeypatch):
    """A pipe or a device, such as /dev/stdout, is not replaced by a file."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    os.mkdir("folder")
    os.symlink(__file__, "link")  # as /dev/stdout is, if the output goes to a file
    with pytest.raises(SystemExit, match="expected a file in an existing, writable folder"):
        predict.main(["run", "new.csv", "--out", out, "--overwrite"])
    assert sorted(os.listdir()) == ["folder", "link", "pipe"]
    assert os.path.islink("link")
