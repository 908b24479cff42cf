"""examples/: every script does what its first lines say, on tiny data."""

import gzip
import importlib.util
import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import lra_data

EXAMPLES = Path(__file__).parent.parent / "examples"


def script(name):
    """A script of examples/ as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def by_label(data):
    """The examples of the three splits by the name of their class, as lists of real values."""
    found = {name: [] for name in data.classes}
    for split in (data.train, data.val, data.test):
        for row, label, length in zip(split.tokens, split.labels, split.lengths, strict=True):
            found[data.classes[label]].append(row[:length])
    return found


# -------------------------------------------------------------------------------- wav_folder


def write_wav(path, samples, channels=1, bits=16):
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, bits // 8, 16_000, 0, "NONE", ""))
        file.writeframes(samples.tobytes())


def test_wav_folder_reads_a_class_per_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(6):
        mono = np.arange(3 + i, dtype="<i2") + 100 * i
        stereo = np.stack([mono, mono + 2], 1) * -1
        write_wav(tmp_path / f"sounds/dog/{i}.wav", mono)
        write_wav(tmp_path / f"sounds/cat/{i}.wav", stereo, channels=2)
    data = lra_data.load(f"{EXAMPLES / 'wav_folder.py'}:load")
    assert (data.name, data.classes) == ("sounds", ("cat", "dog"))
    assert data.train.tokens.dtype == np.float32 and data.train.tokens.shape[1:] == (8, 1)
    found = by_label(data)
    for i in range(6):
        mono = np.arange(3 + i, dtype=np.float32)[:, None] + 100 * i
        assert any(np.array_equal(clip, mono) for clip in found["dog"])
        assert any(np.array_equal(clip, -1 - mono) for clip in found["cat"])


def test_wav_folder_refuses_samples_of_other_sizes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_wav(tmp_path / "sounds/dog/1.wav", np.zeros(4, np.uint8), bits=8)
    with pytest.raises(ValueError, match=r"1.wav: 8 bits per sample, expected 16"):
        lra_data.load(f"{EXAMPLES / 'wav_folder.py'}:load")


# -------------------------------------------------------------------------------- png_folder


def test_png_folder_reads_a_class_per_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.RandomState(0)
    gray = rng.randint(0, 256, (6, 32, 32), np.uint8)
    for name in ("cat", "dog"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
    for i in range(6):
        Image.fromarray(gray[i]).save(f"pictures/dog/{i}.png")
        Image.fromarray(np.full((40, 20, 3), 40 * i, np.uint8)).save(f"pictures/cat/{i}.png")
    data = lra_data.load(f"{EXAMPLES / 'png_folder.py'}:load")
    assert (data.name, data.classes) == ("pictures", ("cat", "dog"))
    assert data.train.tokens.shape[1:] == (1024, 1)
    found = by_label(data)
    for i in range(6):
        pixels = gray[i].reshape(-1, 1).astype(np.float32) / 255
        assert any(np.array_equal(picture, pixels) for picture in found["dog"])
    levels = sorted(float(picture.max()) for picture in found["cat"])
    np.testing.assert_allclose(levels, np.arange(6) * 40 / 255, rtol=1e-6)


@pytest.mark.parametrize("name", ["wav_folder", "png_folder"])
def test_a_folder_without_examples_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"found no files like CLASS/NAME"):
        lra_data.load(f"{EXAMPLES / name}.py:load")


# ------------------------------------------------------------------------------- forecasting


def test_forecasting_predicts_the_next_values_of_the_first_channel(tmp_path, capsys):
    series = np.stack([np.arange(100), np.arange(100) ** 2], 1)
    np.savetxt(tmp_path / "series.csv", series, delimiter=",")
    out = str(tmp_path / "out.npz")
    args = [str(tmp_path / "series.csv"), "--window", "5", "--horizon", "2", "--out", out]
    script("forecasting").main(args)
    assert "x (82, 5, 2), y (82, 2)" in capsys.readouterr().out
    data = lra_data.load(out)
    assert [len(data.train), len(data.val), len(data.test)] == [74, 4, 4]
    assert data.n_classes is None and len(data.y_mean) == 2
    first = [(data.train, 0), (data.val, 80), (data.test, 90)]
    for split, t in first:
        for i in range(len(split)):
            assert (split.tokens[i] == series[t + i : t + i + 5]).all()
            assert split.labels[i].tolist() == [t + i + 5, t + i + 6]


@pytest.mark.parametrize("content", ["1,2\n3\n", "a header\n1\n", "1\n2\n3\n"])
def test_forecasting_says_what_is_wrong_in_one_line(content, tmp_path, capsys):
    (tmp_path / "series.csv").write_text(content, encoding="utf-8")
    out = tmp_path / "out.npz"
    with pytest.raises(SystemExit) as stop:
        script("forecasting").main([str(tmp_path / "series.csv"), "--out", str(out)])
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.count("\n") == 1 and "series.csv: " in error
    assert not out.exists()


# ----------------------------------------------------------------------------- fashion_mnist


def write_idx(path, array):
    """Write an IDX file of uint8, compressed if its name ends in .gz."""
    content = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    content += array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def fashion(folder, suffix=""):
    """Write tiny IDX files; returns pictures and labels, training first."""
    rng = np.random.RandomState(0)
    images = rng.randint(0, 256, (40, 28, 28), np.uint8)
    labels = (np.arange(40) % 10).astype(np.uint8)
    for part, rows in [("train", slice(29)), ("t10k", slice(29, 40))]:
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", images[rows])
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", labels[rows])
    return images, labels


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_fashion_mnist_makes_a_file_that_loads(suffix, tmp_path):
    images, labels = fashion(tmp_path, suffix)
    out = str(tmp_path / "out.npz")
    script("fashion_mnist").main([str(tmp_path), "--out", out])
    data = lra_data.load(out)
    assert [len(data.train), len(data.val), len(data.test)] == [27, 2, 11]
    assert len(data.classes) == 10 and data.mean is not None
    for split, rows in [
        (data.train, slice(27)),
        (data.val, slice(27, 29)),
        (data.test, slice(29, 40)),
    ]:
        pixels = images[rows].reshape(len(split), 784, 1)
        np.testing.assert_allclose(split.tokens, pixels / np.float32(255), rtol=1e-6)
        names = [script("fashion_mnist").CLASSES[label] for label in labels[rows]]
        assert [data.classes[label] for label in split.labels] == names


def test_fashion_mnist_halves_each_side_and_takes_fewer_training_pictures(tmp_path):
    images, _ = fashion(tmp_path)
    out = str(tmp_path / "out.npz")
    script("fashion_mnist").main([str(tmp_path), "--size", "14", "--train", "12", "--out", out])
    data = lra_data.load(out)
    assert [len(data.train), len(data.val), len(data.test)] == [12, 2, 11]
    for i in (0, 11):
        corner = images[i].reshape(14, 2, 14, 2).astype(float).mean((1, 3)).ravel() / 255
        np.testing.assert_allclose(data.train.tokens[i, :, 0], corner, rtol=1e-6)
    test = images[29:, :2, :2].mean((1, 2)) / 255
    np.testing.assert_allclose(data.test.tokens[:, 0, 0], test, rtol=1e-6)


def test_fashion_mnist_names_the_file_that_is_missing_or_cut(tmp_path, capsys):
    for damage in ("missing", "cut", "empty"):
        fashion(tmp_path)
        path = tmp_path / "t10k-labels-idx1-ubyte"
        content = path.read_bytes()
        path.write_bytes(content[:-1] if damage == "cut" else b"")
        if damage == "missing":
            path.unlink()
        with pytest.raises(SystemExit) as stop:
            script("fashion_mnist").main([str(tmp_path), "--out", str(tmp_path / "out.npz")])
        error = capsys.readouterr().err
        assert stop.value.code == 1 and error.count("\n") == 1
        assert str(tmp_path) in error
        assert not (tmp_path / "out.npz").exists()
