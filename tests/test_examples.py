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


@pytest.fixture(autouse=True)
def run_in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def script(name):
    """A script of examples/ as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fails_in_one_line(name, source, capsys):
    """What the script prints before it ends with status 1 and without a file."""
    with pytest.raises(SystemExit) as stop:
        script(name).main([source])
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.count("\n") == 1
    assert not list(Path().glob("*.npz"))
    return error


# ----------------------------------------------------------------------------- folders of files


def load_folder(name):
    """Data of a script that reads a folder, and its examples by class, as lists of real values."""
    data = lra_data.load(f"{EXAMPLES / name}.py:load")
    assert data.classes == ("cat", "dog") and data.train.tokens.dtype == np.float32
    found = {"cat": [], "dog": []}
    for split in (data.train, data.val, data.test):
        for row, label, length in zip(split.tokens, split.labels, split.lengths, strict=True):
            found[data.classes[label]].append(row[:length])
    return data, found


def write_wav(path, samples, channels=1, bits=16):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with wave.open(path, "wb") as file:
        file.setparams((channels, bits // 8, 16_000, 0, "NONE", ""))
        file.writeframes(samples.tobytes())


def test_wav_folder_reads_a_class_per_folder_with_16_bits_per_sample():
    for i in range(6):
        mono = np.arange(3 + i, dtype="<i2") + 100 * i
        stereo = np.stack([mono, mono + 2], 1) * -1
        write_wav(f"sounds/dog/{i}.wav", mono)
        write_wav(f"sounds/cat/{i}.wav", stereo, channels=2)
    data, found = load_folder("wav_folder")
    assert data.name == "sounds" and data.train.tokens.shape[1:] == (8, 1)
    for i in range(6):
        mono = np.arange(3 + i, dtype=np.float32)[:, None] + 100 * i
        assert any(np.array_equal(clip, mono) for clip in found["dog"])
        assert any(np.array_equal(clip, -1 - mono) for clip in found["cat"])
    write_wav("sounds/dog/1.wav", np.zeros(4, np.uint8), bits=8)
    with pytest.raises(ValueError, match=r"1.wav: 8 bits per sample; expected .* 16 bits"):
        load_folder("wav_folder")


def test_png_folder_reads_a_class_per_folder():
    gray = np.random.RandomState(0).randint(0, 256, (6, 32, 32), np.uint8)
    for name in ("cat", "dog"):
        Path("pictures", name).mkdir(parents=True)
    for i in range(6):
        Image.fromarray(gray[i]).save(f"pictures/dog/{i}.png")
        Image.fromarray(np.full((40, 20, 3), 40 * i, np.uint8)).save(f"pictures/cat/{i}.png")
    data, found = load_folder("png_folder")
    assert data.name == "pictures" and data.train.tokens.shape[1:] == (1024, 1)
    for i in range(6):
        pixels = gray[i].reshape(-1, 1).astype(np.float32) / 255
        assert any(np.array_equal(picture, pixels) for picture in found["dog"])
    levels = sorted(float(picture.max()) for picture in found["cat"])
    np.testing.assert_allclose(levels, np.arange(6) * 40 / 255, rtol=1e-6)


@pytest.mark.parametrize("name", ["wav_folder", "png_folder"])
def test_a_folder_without_examples_is_named(name):
    with pytest.raises(ValueError, match=r"found no files like CLASS/NAME"):
        load_folder(name)


# ------------------------------------------------------------------------------- forecasting


def test_forecasting_predicts_the_next_values_of_the_first_channel():
    series = np.stack([np.arange(100), np.arange(100) ** 2], 1)
    np.savetxt("series.csv", series, delimiter=",")
    flags = ["--window", "5", "--horizon", "2", "--out", "out.npz"]
    script("forecasting").main(["series.csv", *flags])
    data = lra_data.load("out.npz")
    assert [len(data.train), len(data.val), len(data.test)] == [74, 4, 4]
    assert data.n_classes is None and len(data.y_mean) == 2
    for split, t in [(data.train, 0), (data.val, 80), (data.test, 90)]:
        for i in range(len(split)):
            assert (split.tokens[i] == series[t + i : t + i + 5]).all()
            assert split.labels[i].tolist() == [t + i + 5, t + i + 6]


@pytest.mark.parametrize("content", ["1,2\n3\n", "a header\n1\n", "1\n2\n3\n"])
def test_forecasting_says_what_is_wrong_in_one_line(content, capsys):
    Path("series.csv").write_text(content, encoding="utf-8")
    assert "series.csv: " in fails_in_one_line("forecasting", "series.csv", capsys)


# ----------------------------------------------------------------------------- fashion_mnist


def fashion(suffix=""):
    """Write tiny IDX files to "published"; returns pictures and labels, training first."""
    Path("published").mkdir()
    images = np.random.RandomState(0).randint(0, 256, (40, 28, 28), np.uint8)
    labels = (np.arange(40) % 10).astype(np.uint8)
    for part, rows in [("train", slice(30)), ("t10k", slice(30, 40))]:
        for kind, array in [("images-idx3", images[rows]), ("labels-idx1", labels[rows])]:
            content = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            content += array.tobytes()
            content = gzip.compress(content) if suffix == ".gz" else content
            Path(f"published/{part}-{kind}-ubyte{suffix}").write_bytes(content)
    return images, labels


@pytest.mark.parametrize(
    ("suffix", "flags", "side", "n_train"),
    [("", [], 28, 27), (".gz", [], 28, 27), ("", ["--size", "14", "--train", "12"], 14, 12)],
)
def test_fashion_mnist_makes_a_file_that_loads(suffix, flags, side, n_train):
    """--size halves each side, --train takes fewer training pictures, but not fewer others."""
    images, labels = fashion(suffix)
    fashion_mnist = script("fashion_mnist")
    fashion_mnist.main(["published", *flags, "--out", "out.npz"])
    data = lra_data.load("out.npz")
    step = 28 // side
    pixels = images.reshape(40, side, step, side, step).astype(float).mean((2, 4)) / 255
    assert len(data.classes) == 10
    for split, first, n in [(data.train, 0, n_train), (data.val, 27, 3), (data.test, 30, 10)]:
        rows = slice(first, first + n)
        expected = pixels[rows].reshape(n, side * side, 1)
        np.testing.assert_allclose(split.tokens, expected, rtol=1e-6)
        names = [fashion_mnist.CLASSES[label] for label in labels[rows]]
        assert [data.classes[label] for label in split.labels] == names


@pytest.mark.parametrize("content", [None, b"", b"\0\0\x08\x01\0\0\0\n012345678"])
def test_fashion_mnist_names_the_folder_of_a_missing_or_cut_file(content, capsys):
    fashion()
    path = Path("published/t10k-labels-idx1-ubyte")
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert "published: " in fails_in_one_line("fashion_mnist", "published", capsys)
