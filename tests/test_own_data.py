"""own_data.py: files and functions become the arrays they should, broken ones end in one line."""

import json
import pickle
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import lra_data
import own_data

N = 20
TOKENS = np.arange(N * 6).reshape(N, 6) % 7
VALUES = np.random.RandomState(0).randn(N, 6, 2).astype(np.float32)
CLASSES = np.arange(N) % 2
TARGETS = np.random.RandomState(1).randn(N, 3)
LENGTHS = np.arange(N) % 6 + 1
SPLIT = np.array(["train"] * 10 + ["val"] * 4 + ["test"] * 6)
TEXTS = [f"text {i} ends" for i in range(N)]


def write(folder, content, name="my.csv"):
    """Write arrays (a dict) as my.npz, or text or bytes under a name; returns the path as text."""
    if isinstance(content, dict):
        path = folder / "my.npz"
        np.savez(path, **content)
    else:
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def table(rows, header="text,label"):
    """A .csv file as text, of one line per row."""
    return "\n".join([header, *rows]) + "\n"


def labeled(labels):
    """A .csv file with these labels."""
    return table([f"some text,{label}" for label in labels])


def changed(array, place, value):
    """A copy of an array with another value at one place."""
    array = np.array(array)
    array[place] = value
    return array


def texts_of(data):
    """The texts of all rows of bytes, train then val then test."""
    texts = []
    for split in (data.train, data.val, data.test):
        for row, length in zip(split.tokens, split.lengths, strict=True):
            texts.append(row[:length].tobytes().decode())
    return texts


# ------------------------------------------------------------------------------------ npz


def test_tokens_and_classes_come_back_in_their_splits(tmp_path):
    path = write(tmp_path, dict(x=TOKENS, y=CLASSES + 3, lengths=LENGTHS, split=SPLIT))
    data = lra_data.load(path)
    assert (data.name, data.vocab_size, data.n_classes) == ("my.npz", 7, 2)
    assert data.classes == ("3", "4") and data.mean is None and data.y_mean is None
    assert [len(data.train), len(data.val), len(data.test)] == [10, 4, 6]
    places = (slice(10), slice(10, 14), slice(14, 20))
    for split, rows in zip((data.train, data.val, data.test), places, strict=True):
        real = np.arange(6) < LENGTHS[rows, None]
        assert (split.tokens == TOKENS[rows] * real).all(), "padding is 0"
        assert (split.labels == CLASSES[rows]).all()
        assert (split.lengths == LENGTHS[rows]).all()
        kinds = split.tokens.dtype, split.labels.dtype, split.lengths.dtype
        assert kinds == (np.uint8, np.int64, np.int32)


@pytest.mark.parametrize(("largest", "kind"), [(255, np.uint8), (256, np.int32)])
def test_tokens_take_a_byte_where_they_fit(largest, kind):
    data = own_data.from_arrays(changed(TOKENS, (3, 3), largest)[:10], CLASSES[:10])
    assert data.train.tokens.dtype == kind and data.vocab_size == largest + 1
    assert max(split.tokens.max() for split in (data.train, data.val, data.test)) == largest


PIXELS = np.arange(N * 6 * 3, dtype=np.uint8).reshape(N, 6, 3)  # integers with channels: values


@pytest.mark.parametrize("x", [VALUES, VALUES.astype(np.float64), VALUES[..., 0], PIXELS])
@pytest.mark.parametrize("y", [TARGETS, TARGETS[:, 0]])
def test_values_stay_float32_and_targets_keep_their_units(x, y):
    data = own_data.from_arrays(x, y, split=SPLIT)
    assert data.vocab_size is None and data.n_classes is None and data.classes is None
    assert data.train.tokens.dtype == data.train.labels.dtype == np.float32
    channels = x.reshape(N, 6, -1)  # one channel may have no axis
    targets = y.reshape(N, -1).astype(np.float32)
    assert np.array_equal(data.val.tokens, channels[10:14]) and (data.train.lengths == 6).all()
    assert np.array_equal(data.test.labels, targets[14:])
    np.testing.assert_allclose(data.y_mean, targets[:10].mean(0), rtol=1e-6)
    np.testing.assert_allclose(data.y_std, targets[:10].std(0), rtol=1e-6)


def test_statistics_are_those_of_real_positions_of_the_training_split():
    x = VALUES.astype(np.float64)
    padding = np.arange(6) >= LENGTHS[:, None]
    x[padding] = np.nan
    x[10:] += 100
    before = x.copy()
    data = own_data.from_arrays(x, CLASSES, LENGTHS, SPLIT)
    real = VALUES[:10][~padding[:10]].astype(np.float64)
    np.testing.assert_allclose(data.mean, real.mean(0), rtol=1e-12)
    np.testing.assert_allclose(data.std, real.std(0), rtol=1e-12)
    assert (data.train.tokens[padding[:10]] == 0).all()
    assert np.array_equal(x, before, equal_nan=True), "the caller's arrays stay as they are"


def test_sums_of_statistics_are_taken_in_float64():
    x = np.full((4000, 250), 4096, np.float32)
    x[::2] += 1
    split = np.array(["train"] * 3998 + ["val", "test"])
    y = np.random.RandomState(0).randint(0, 2, 4000)
    data = own_data.from_arrays(x, y, split=split)
    np.testing.assert_allclose(data.mean, 4096.5, rtol=1e-12)
    np.testing.assert_allclose(data.std, 0.5, rtol=1e-9)


def test_the_random_split_is_80_10_10_and_a_function_of_the_seed(tmp_path, capsys):
    n = 109
    x = np.arange(n)[:, None] * np.ones((1, 2), int)  # a row says where it comes from
    path = write(tmp_path, dict(x=x, y=np.arange(n) % 2))
    first = lra_data.load(path, seed=1)
    assert "split at random, 80/10/10, with seed 1" in capsys.readouterr().out
    assert [len(first.train), len(first.val), len(first.test)] == [89, 10, 10]
    rows = [set(split.tokens[:, 0]) for split in (first.train, first.val, first.test)]
    assert set.union(*rows) == set(range(n))
    assert lra_data.checksum(first) == lra_data.checksum(lra_data.load(path, seed=1))
    assert rows[1] != set(lra_data.load(path, seed=2).val.tokens[:, 0])
    assert rows[2] != set(range(n - 10, n)), "the order of the file does not matter"
    capsys.readouterr()
    own_data.load(path)
    own_data.from_arrays(x, np.arange(n) % 2)
    assert capsys.readouterr().out.count("with seed 0") == 2


@pytest.mark.parametrize("seed", range(5))
def test_a_rare_class_is_in_the_training_split(seed):
    y = ["often"] * 40 + [f"once {i}" for i in range(10)]
    data = own_data.from_arrays(np.arange(100).reshape(50, 2), y, seed=seed)
    assert set(data.train.labels) == set(range(11))


# ---------------------------------------------------------------------------------- tables


QUOTED = ['say "hi", é', "two\r\nlines", "tab\tand, comma", "empty", " x "] + TEXTS[:15]
QUOTES = ['"' + text.replace('"', '""') + '"' for text in QUOTED]


@pytest.mark.parametrize(
    ("name", "header", "row", "end", "texts"),
    [
        ("my.csv", "\ufefftext,label,split", "{},{}, {}", "\r\n", QUOTED),
        ("MY.TSV", "text\tlabel\tsplit", "a, b\t{1}\t{2}", "\n\n", ["a, b"] * N),
        ("spreadsheet.csv", "text,label,,", "nan,{1},,", "\n,,,,\n", ["nan"] * N),
    ],
)
def test_texts_are_bytes_whatever_is_around_them(name, header, row, end, texts, tmp_path):
    rows = [row.format(*cells) for cells in zip(QUOTES, CLASSES, SPLIT, strict=True)]
    data = lra_data.load(write(tmp_path, end.join([header, *rows]), name))
    assert texts_of(data) == texts
    assert data.vocab_size == 256 and data.symbols is None and data.classes == ("0", "1")


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["10", "9"], ("9", "10")),
        (["-1", "+1"], ("-1", "1")),
        (["1.5", "b"], ("1.5", "b")),
        ([" no ", "yes"], ("no", "yes")),
        (["01", "1"], ("01", "1")),
        (["1_0", "11"], ("11", "1_0")),
        (["5", str(2**63 + 1)], ("5", str(2**63 + 1))),
        (["-0.5", "0"], None),
        (["1.0", "0"], None),
        (["1e3", "2"], None),
    ],
)
def test_labels_are_targets_if_all_are_numbers_and_not_all_are_whole(labels, classes, tmp_path):
    data = lra_data.load(write(tmp_path, labeled(labels * 10)), seed=1)
    assert data.classes == classes
    assert (data.n_classes is None) == (classes is None)
    if classes is None:
        assert set(data.train.labels.ravel()) == {float(label) for label in labels}


def test_characters_that_occur_once_in_training_are_unknown(tmp_path):
    texts = ["äbb", "äc", "bd"] + ["b"] * 7 + ["dd"] * 10  # d: once in training
    rows = [f"{texts[i]},{i % 2},{part}" for i, part in enumerate(SPLIT)]
    path = write(tmp_path, table(rows, "text,label,split"))
    data = lra_data.load(path, characters=True)
    assert data.symbols == ("<unk>", "b", "ä") and data.vocab_size == 3
    assert data.train.tokens[:3].tolist() == [[2, 1, 1], [2, 0, 0], [1, 0, 0]]
    assert data.train.lengths[:3].tolist() == [3, 2, 2]


def test_long_texts_are_cut_and_counted(tmp_path, capsys):
    texts = ["a" * 200_000, "b" * 4096] + ["ccc"] * 18  # csv alone takes 131,072
    path = write(tmp_path, table([f"{text},{i % 2}" for i, text in enumerate(texts)]))
    data = lra_data.load(path)
    assert "1 of 20 texts were cut after 4,096 tokens" in capsys.readouterr().out
    assert sorted(len(text) for text in texts_of(data))[-2:] == [4096, 4096]
    data = lra_data.load(path, max_len=2)
    assert "20 of 20 texts were cut after 2 tokens" in capsys.readouterr().out
    assert data.train.tokens.shape[1] == 2 and (data.train.lengths == 2).all()
    lra_data.load(path, max_len=200_000)
    assert "cut" not in capsys.readouterr().out


# ------------------------------------------------------------------------------- functions

FUNCTION = """
from __future__ import annotations
from dataclasses import dataclass
import numpy as np
import neighbor_of_mine
import own_data
from lra_data import Data, Split

x = np.arange(120).reshape(20, 6) % 7
y = np.arange(20) % 2
def load():
    return own_data.from_arrays(x, y, name="mine")
def number():
    return 3
def fails():
    raise KeyError("a\\nb")
def data(x, y, lengths):
    split = Split(x, y, np.full(20, lengths))
    return Data("mine", split, split, split, 7, 2)
def floats():
    return data(x + 0.5, y, 6)
def long():
    return data(x, y, 7)
def labels():
    return data(x, np.arange(20), 6)
def short():
    return data(x, y[1:], 6)
def targets():
    split = Split(x + 0.5, y + 0.5, np.full(20, 6))
    return Data("mine", split, split, split, None, None, mean=(3.5,), std=(2,))
def numpy_types():
    split = Split(x + 0.5, y.astype(np.int8), np.full(20, 6))
    mean, std = np.float32([3.5]), (np.float64(2),)
    return Data("mine", split, split, split, None, np.int64(2), mean, std)
@dataclass
class Named:
    field: int
"""


@pytest.fixture
def mine(tmp_path):
    """A Python file with functions, beside another one; both in a folder with a colon."""
    folder = tmp_path / "12:30"
    folder.mkdir()
    write(folder, "width = 6\n", "neighbor_of_mine.py")
    return write(folder, FUNCTION, "mine.py")


def test_a_function_of_a_file_gives_the_data(mine, capsys):
    data = lra_data.load(f"{mine}:load")
    expected = own_data.from_arrays(TOKENS, CLASSES)
    assert (data.name, data.vocab_size, data.classes) == ("mine", 7, ("0", "1"))
    assert lra_data.checksum(data) == lra_data.checksum(expected)
    unnamed = own_data.describe(replace(data, classes=None))
    assert "; 2 classes: 0, 1; 7 symbols, length 6" in unnamed


def test_a_function_may_return_what_numpy_makes(mine):
    data = lra_data.load(f"{mine}:numpy_types")
    assert data.train.tokens.shape == (20, 6, 1) and data.train.labels.dtype == np.int64
    assert json.dumps([data.n_classes, data.mean, data.std])


# ----------------------------------------------------------------------------- prediction


def about(data, max_len=None):
    """What a run keeps of its data."""
    names = "vocab_size n_classes classes mean std symbols y_mean y_std"
    facts = {name: getattr(data, name) for name in names.split()}
    return facts | {"max_len": max_len}


BYTES = about(own_data.from_arrays(TOKENS, ["no", "yes"] * 10, vocab_size=256))
SYMBOLS = about(own_data.from_arrays(TOKENS, CLASSES + 3))
NUMBERS = about(own_data.from_arrays(VALUES, TARGETS))
SIGNAL = about(own_data.from_arrays(VALUES, ["no", "yes"] * 10))
SCORES = {**BYTES, "n_classes": None, "classes": None, "y_mean": (0.0,)}
VERSIONS = {**BYTES, "classes": ("1.0", "n/a")}
UNNAMED = {**SYMBOLS, "classes": None, "n_classes": 5}


@pytest.mark.parametrize(("characters", "max_len"), [(False, 9), (True, 9), (True, None)])
def test_texts_are_read_for_prediction_as_they_were_for_training(characters, max_len, tmp_path):
    rows = [f"x,{CLASSES[i] + 9},é{text},test" for i, text in enumerate(TEXTS)]
    rows += [row.replace("test", part) for row in rows for part in ("train", "val")]
    path = write(tmp_path, table(rows, "id, stars , review,split"))
    columns = dict(text_column="review", label_column="stars")
    data = lra_data.load(path, characters=characters, max_len=max_len or 4096, **columns)
    tokens, lengths, labels = own_data.examples(path, about(data, max_len), **columns)
    assert (tokens[:N] == data.test.tokens).all()
    assert (lengths[:N] == data.test.lengths).all()
    assert (labels[:N] == data.test.labels).all() and labels.dtype == np.int64


@pytest.mark.parametrize(
    ("content", "run", "expected"),
    [
        (dict(x=TOKENS[:1]), SYMBOLS, None),
        ("id,text\n1,hello\n", BYTES, None),
        (labeled(["", " "]), BYTES, None),
        (labeled(["yes", "yes", "no"]), BYTES, [1, 1, 0]),
        (labeled(["1.0", "n/a"]), VERSIONS, [0, 1]),
        (labeled(["1.0", "1.0"]), VERSIONS, [0, 0]),  # text, as in training
        (dict(x=TOKENS[:2], y=[4, 3]), SYMBOLS, [1, 0]),
        (dict(x=TOKENS[:2], y=[4, 3]), UNNAMED, [4, 3]),
        (labeled(["3", "4"]), SCORES, [[3], [4]]),  # whole numbers may be targets
        (dict(x=VALUES, y=TARGETS), NUMBERS, TARGETS.astype(np.float32).tolist()),
    ],
)
def test_new_labels_are_those_of_the_run_and_may_be_missing(content, run, expected, tmp_path):
    path = write(tmp_path, content, "MY.CSV")
    tokens, lengths, labels = own_data.examples(path, run)
    assert len(tokens) == len(lengths) > 0
    assert labels is expected or labels.tolist() == expected


def test_new_inputs_are_as_long_as_the_run_can_read(tmp_path, capsys):
    path = write(tmp_path, table(["hello", "hell" * 2000], "text"))
    assert own_data.examples(path, BYTES)[1].tolist() == [5, 8000]
    assert capsys.readouterr().out == ""
    tokens, lengths, _ = own_data.examples(path, {**BYTES, "max_len": 4})
    assert tokens.tobytes() == b"hellhell" and lengths.tolist() == [4, 4]
    assert "my.csv: 2 of 2 texts were cut after 4 tokens" in capsys.readouterr().out
    path = write(tmp_path, dict(x=TOKENS, lengths=np.full(N, 4)))
    tokens, lengths, _ = own_data.examples(path, {**SYMBOLS, "max_len": 4})
    assert (tokens == TOKENS[:, :4]).all() and (lengths == 4).all()


TREES = {**BYTES, "symbols": lra_data.LISTOPS_VOCAB, "vocab_size": 15}
SHORT = {**SYMBOLS, "max_len": 5}
KINDS = {
    "values": (dict(x=VALUES), SYMBOLS, "my.npz: x are 2-channel values, but the run reads tokens"),
    "tokens": (dict(x=TOKENS), SIGNAL, "my.npz: x are tokens, but the run reads 2-channel values"),
    "channels": (dict(x=VALUES[..., :1]), SIGNAL, "1-channel values, but .* 2-channel values"),
    "vocabulary": (dict(x=TOKENS + 1), SYMBOLS, "my.npz, row 1: a token is not in .* 0 .. 6"),
    "length": (dict(x=TOKENS), SHORT, "my.npz: length 6, but the run reads at most 5"),
    "class": (
        dict(x=TOKENS[:3], y=[3, 5, 9]),
        SYMBOLS,
        "row 1: .* class 5, 9: leave all labels out",
    ),
    "targets for classes": (dict(x=TOKENS, y=TARGETS), SYMBOLS, "float32 .*run predicts classes"),
    "classes for targets": (dict(x=VALUES, y=["a"] * N), NUMBERS, "<U1 .*run predicts 3 numbers"),
    "too few targets": (dict(x=VALUES, y=CLASSES), NUMBERS, r"\(20, 1\), but .* predicts 3 "),
    "some labels": (labeled(["yes", ""]), BYTES, "my.csv, line 3: label is empty"),
    "text for values": (labeled(["yes"]), {**SIGNAL, "vocab_size": 256}, "the run reads no text"),
    "text for tokens": (labeled(["yes"]), SYMBOLS, "my.csv: text, but the run reads no text"),
    "text for trees": (labeled(["yes"]), TREES, "my.csv: text, but the run reads no text"),
    "no text": ("a,label\nb,yes\n", BYTES, r"my.csv: no column text in a, label \(--text-column"),
    "no x": (dict(y=CLASSES), SYMBOLS, "my.npz: arrays y, expected x"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_new_data_of_another_kind_are_refused_by_name(kind, tmp_path):
    content, run, reason = KINDS[kind]
    with pytest.raises(ValueError, match=reason) as refused:
        own_data.examples(write(tmp_path, content), run)
    assert "\n" not in str(refused.value)


# --------------------------------------------------------------------- what prints, what fails


def test_two_lines_say_what_was_read(tmp_path, capsys, monkeypatch):
    path = write(tmp_path, dict(x=VALUES, y=["no", "yes"] * 10, lengths=LENGTHS))
    lra_data.load(path)
    assert capsys.readouterr().out.splitlines() == [
        "my.npz: split at random, 80/10/10, with seed 0",
        "my.npz: 16 train, 2 val, 2 test; 2 classes: no, yes; 2-channel values, length 1 to 6",
    ]
    goal = "10 train, 4 val, 6 test; regression, targets per example: 3"
    y = changed(TARGETS, (0, 0), 1)
    lra_data.load(write(tmp_path, dict(x=TOKENS, y=y, split=SPLIT)))
    assert capsys.readouterr().out == f"my.npz: {goal}; 7 symbols, length 6\n"
    lra_data.load(write(tmp_path, dict(x=TOKENS, y=TARGETS.round(), split=SPLIT)))
    hint = "(whole numbers; classes would be integers or text)"
    assert f"{goal} {hint}; 7 symbols" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    lra_data.load(path)
    assert capsys.readouterr().out == ""


def xy(x=TOKENS, y=CLASSES, **others):
    return dict(x=x, y=y, **others)


OBJECTS = np.array([[1], [1, 2]], object)
NO_VAL = np.where(SPLIT == "val", "train", SPLIT)
BROKEN = {
    "NaN in x": (xy(changed(VALUES, (4, 1, 0), np.nan)), "row 4: x is NaN, infinite or too large"),
    "too large": (xy(VALUES.astype(float) * 1e39), "row 0: x is NaN, infinite or too large"),
    "NaN in y": (xy(y=changed(TARGETS, (7, 2), np.nan)), "row 7: y is NaN, infinite or too large"),
    "constant channel": (
        xy(changed(VALUES, (..., 1), 3)),
        r"channel \[1\] \(from 0\) is constant .* float32: drop it, np.delete\(x, \[1\], -1\)",
    ),
    "constant target": (
        xy(y=changed(TARGETS, (..., 2), 3)),
        r"target \[2\] \(from 0\) is constant in .*: drop it, np.delete\(y, \[2\], -1\)",
    ),
    "offset in x": (
        xy(VALUES + 1e6),
        r"channel \[0, 1.*varies too little .*subtract a number from x",
    ),
    "offset in y": (xy(y=TARGETS + 1e6), r"target \[0, .*subtract a number from y first"),
    "NA among prices": (
        xy(y=["NA", *(f"{i}.5" for i in range(19))]),
        "almost every label occurs once, such as NA",
    ),
    "one class": (xy(y=0 * CLASSES + 5), "only one class, 5"),
    "label missing": (xy(y=["a", " "] * 10), "row 1: its label is missing"),
    "pandas' nan": (xy(y=["a", "nan"] * 10), "row 1: its label is missing"),
    "no targets": (xy(y=TARGETS[:, :0]), r"y has shape \(20, 0\)"),
    "negative token": (xy(changed(TOKENS, (6, 0), -1)), "row 6: a negative token .*by lengths"),
    "huge token": (xy(changed(TOKENS, (6, 5), 2**20)), "row 6: a token above 1,048,575"),
    "boolean x": (xy(TOKENS > 3), "x is bool, expected integers or floats"),
    "boolean y": (xy(y=CLASSES > 0), r"y is bool, .*; for classes, save y.astype\(str\)"),
    "x of one axis": (xy(TOKENS[:, 0]), r"x has shape \(20,\), expected \(n, L\) or"),
    "x of four axes": (xy(VALUES[..., None]), r"\(20, 6, 2, 1\).*reshape\(n, -1, C\)"),
    "no rows": (xy(TOKENS[:0], CLASSES[:0]), r"x has shape \(0, 6\), expected"),
    "y of another length": (xy(y=CLASSES[1:]), r"y has shape \(19,\), but x has 20 rows"),
    "classes with an axis": (xy(y=CLASSES[:, None]), r"\(20, 1\), expected \(n,\), .*y\[:, 0\]"),
    "targets of three axes": (xy(y=TARGETS[..., None]), r"y has shape \(20, 3, 1\)"),
    "length 0": (xy(lengths=changed(LENGTHS, 8, 0)), "row 8: its length is not in 1 .. 6"),
    "length beyond x": (xy(lengths=changed(LENGTHS, 9, 7)), "row 9: its length is not in 1 .. 6"),
    "lengths with decimals": (xy(lengths=LENGTHS / 1), "lengths are float64"),
    "too few lengths": (xy(lengths=LENGTHS[1:]), r"lengths are int64 \(19,\)"),
    "unknown split": (xy(split=changed(SPLIT, 3, "dev")), r"row 3: split is \['dev'\], expected"),
    "no validation": (xy(split=NO_VAL), "no row of split val; without split, 80/10/10"),
    "too few splits": (xy(split=SPLIT[1:]), r"split has shape \(19,\), but x has 20 rows"),
    "class not in training": (
        xy(y=changed(CLASSES, 19, 2), split=SPLIT),
        "no class 2 in the training split .*merge rare",
    ),
    "too few to split": (xy(TOKENS[:9], CLASSES[:9]), "9 examples are too few to split"),
    "no y": (dict(x=TOKENS), "arrays x, expected x, y"),
    "no x": (dict(X=TOKENS, y=CLASSES), "arrays X, y, expected x, y .*numpy.savez"),
    "misspelled lengths": (xy(length=LENGTHS), "arrays x, y, length, expected"),
    "object array": (xy(OBJECTS), r"numbers or text, not objects: .*.astype\(str\)"),
    "empty file": ("", "my.csv: no column text in an empty file"),
    "header only": ("text,label\n", "my.csv: no examples after the first line"),
    "no column text": (table(["a,b"], "x,label"), r"no column text in x, label \(--text-column"),
    "no column label": (table(["a,b"], "text,stars"), "no column label in text, stars .*--label-"),
    "semicolons": (
        table(["a;b"], "text;label"),
        "no column text in text;label .*',' separates .*; numbers go into",
    ),
    "column twice": (table(["a,b,c"], "text,label,text"), "two columns have one name: text, label"),
    "empty text": (table(["a,b", " ,b"]), "line 3: text is empty"),
    "empty label": (table(["a,b", "a, "]), "line 3: label is empty"),
    "empty labels": (labeled(["", ""]), "line 2: label is empty"),
    "label nan": (labeled(["1.5", "nan"]), "line 3: label is nan"),
    "label infinite": (labeled(["1.5", "-inf"]), "line 3: label is -inf"),
    "constant label": (labeled(["1.5"] * 20), "target .0. .* is constant .*: nothing can be"),
    "a field less": (table(["a,b", "c"]), "line 3: 1 fields, but the first line has 2"),
    "a field more": (table(["a,b", "c,d", "e,f,g"]), "line 4: 3 fields, but the first line has 2"),
    "line numbers count lines": (table(['"a\nb\nc",0', "", "d,"]), "line 6: label is empty"),
    "not UTF-8": (b"text,label\nb,0\ncaf\xe9,1\n", "line 3: not UTF-8 text, or a NUL byte: save"),
    "a NUL byte": (table(["a,b", "c,d", "e\0f,g"]), "line 4: (not UTF-8 text|.*NUL)"),  # csv's
    "UTF-16": (labeled("01").encode("utf-16"), "line 1: (not UTF-8 text|.*NUL)"),
    "an open quote": (table(["a,b", '"c,d', "e,f"]), "line 3: unexpected end of data"),
    "text after a quote": (table(['"a" b,c']), "line 2: ',' expected after '\"', check the quotes"),
    "many whole numbers": (labeled(range(20)), "class 6, .* for regression, write floats: 3.0,"),
    "unknown split in a table": (table(["a,1,a", "b,2,b"], "text,label,split"), "split is .'a'.,"),
}


def test_masked_values_and_fields_that_swallow_lines_are_refused(tmp_path):
    masked = np.ma.masked_less(TARGETS, 0)
    for x, y, name in ((VALUES, masked, "y"), (np.ma.masked_less(VALUES, 0), CLASSES, "x")):
        with pytest.raises(ValueError, match=f"{name} has masked values"):
            own_data.from_arrays(x, y)
    lines = ["text\tlabel", *(f"a{i}\t{i % 2}" for i in range(10)), '"He .\t1', "b\t0", 'c "\t1']
    (tmp_path / "a.tsv").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="line 12: a quote opens a field that ends lines later"):
        own_data.load(tmp_path / "a.tsv")


@pytest.mark.filterwarnings("error")  # they would be a second line
@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_end_in_one_line_that_names_file_place_and_reason(kind, tmp_path, capsys):
    content, reason = BROKEN[kind]
    ends_in_one_line(write(tmp_path, content), reason, capsys)


@pytest.mark.parametrize(
    ("name", "content", "reason", "flags"),
    [
        ("none.csv", None, "(?i)no such file", []),
        ("my.xlsx", "PK", "expected one of a .npz, .csv or .tsv file, file.py:function, ", []),
        ("none.npz", None, "no such .npz, .csv or .tsv file: numpy.savez", []),
        ("a.npz", pickle.dumps({"x": 1}), "no such .npz, .csv or .tsv file: numpy.savez", []),
        ("none.py:load", None, "FileNotFoundError: ", []),
        ("a.py:load", "def load(:", "SyntaxError: ", []),
        ("my.npz", xy(), "characters and max_len are options of .csv", ["--characters"]),
        ("my.npz", xy(), "columns, characters and max_len are", ["--text-column", "t"]),
        ("my.npz", xy(), "characters and max_len are options of .csv", ["--max-len", "3"]),
        ("my.csv", labeled("01" * 10), "max_len is 0, expected 1 or more", ["--max-len", "0"]),
    ],
)
def test_what_is_no_such_file_or_option_ends_in_one_line(
    name, content, reason, flags, tmp_path, capsys
):
    if content:
        write(tmp_path, content, name.split(":")[0])
    ends_in_one_line(str(tmp_path / name), reason, capsys, flags)


def test_a_damaged_npz_file_ends_in_one_line(tmp_path, capsys):
    path = write(tmp_path, xy())
    content = bytearray(Path(path).read_bytes())
    content[200:300] = bytes(100)
    write(tmp_path, bytes(content), "my.npz")
    ends_in_one_line(path, "my.npz: Bad CRC-32", capsys)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("number", "returned int, expected lra_data.Data"),
        ("fails", "KeyError: 'a.*b'"),
        ("floats", "train: x are 1-channel values, but .* tokens"),
        ("long", "train, row 0: its length is not in 1 .. 6"),
        ("labels", "train has 20 examples with labels .*expected at least one, labels 0 .. 1"),
        ("short", r"train: y has shape \(19,\), but x has 20 rows"),
        ("targets", "train: expected integer classes if .* y_mean and y_std"),
    ],
)
def test_a_function_that_fails_ends_in_one_line(function, reason, mine, capsys):
    ends_in_one_line(f"{mine}:{function}", reason, capsys)


def ends_in_one_line(task, reason, capsys, flags=()):
    """Assert that reading the task from the command line fails with this line."""
    with pytest.raises(SystemExit) as stop:
        lra_data.main([task, *flags])
    error = stop.value.code  # what Python prints, before it ends with status 1
    assert "\n" not in error and error.startswith("lra_data.py: ")
    assert capsys.readouterr().err == ""
    assert Path(task).name.split(":")[0] in error
    assert re.search(reason, error), error


def test_the_command_line_summarizes_a_file(tmp_path, capsys):
    path = write(tmp_path, labeled(["0.5", "1"] * 10))
    assert lra_data.main([path, "--characters", "--max-len", "4", "--seed", "1"]) == 0
    out = capsys.readouterr().out
    assert "my.csv: split at random, 80/10/10, with seed 1" in out
    assert "20 of 20 texts were cut after 4 tokens" in out
    assert "my.csv: regression, 5 symbols" in out
    assert "trivial" not in out
