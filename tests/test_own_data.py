"""own_data.py: files and functions become the arrays they should, broken ones end in one line."""

import pickle
import re
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


def save(folder, **arrays):
    """Write a .npz file with these arrays; returns its path as text."""
    path = folder / "my.npz"
    np.savez(path, **arrays)
    return str(path)


def write(folder, content, name="my.csv"):
    """Write a file of text or bytes; returns its path as text."""
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


def same(a, b):
    """True if two Data are the same but for the name."""
    facts = ("vocab_size", "n_classes", "mean", "std", "symbols", "classes", "y_mean", "y_std")
    equal = all(getattr(a, fact) == getattr(b, fact) for fact in facts)
    return equal and lra_data.checksum(a) == lra_data.checksum(b)


# ------------------------------------------------------------------------------------ npz


def test_tokens_and_classes_come_back_in_their_splits(tmp_path):
    path = save(tmp_path, x=TOKENS, y=CLASSES + 3, lengths=LENGTHS, split=SPLIT)
    data = lra_data.load(path)
    assert (data.name, data.vocab_size, data.n_classes) == ("my.npz", 7, 2)
    assert data.classes == ("3", "4") and data.mean is None and data.y_mean is None
    assert [len(data.train), len(data.val), len(data.test)] == [10, 4, 6]
    for split, rows in [
        (data.train, slice(10)),
        (data.val, slice(10, 14)),
        (data.test, slice(14, 20)),
    ]:
        real = np.arange(6) < LENGTHS[rows, None]
        assert (split.tokens == TOKENS[rows] * real).all(), "padding is 0"
        assert (split.labels == CLASSES[rows]).all()
        assert (split.lengths == LENGTHS[rows]).all()
        kinds = split.tokens.dtype, split.labels.dtype, split.lengths.dtype
        assert kinds == (np.uint8, np.int64, np.int32)


@pytest.mark.parametrize(("largest", "kind"), [(255, np.uint8), (256, np.int32)])
def test_tokens_take_a_byte_where_they_fit(largest, kind, tmp_path):
    x = TOKENS.copy()
    x[3, 3] = largest
    data = lra_data.load(save(tmp_path, x=x, y=CLASSES))
    assert data.train.tokens.dtype == kind and data.vocab_size == largest + 1
    assert max(split.tokens.max() for split in (data.train, data.val, data.test)) == largest


def test_values_stay_float32_and_targets_keep_their_units(tmp_path):
    data = lra_data.load(save(tmp_path, x=VALUES, y=TARGETS, split=SPLIT))
    assert data.vocab_size is None and data.n_classes is None and data.classes is None
    assert data.train.tokens.dtype == data.train.labels.dtype == np.float32
    assert (data.train.tokens == VALUES[:10]).all()
    assert (data.test.labels == TARGETS[14:].astype(np.float32)).all()
    assert (data.train.lengths == 6).all()
    np.testing.assert_allclose(data.y_mean, TARGETS[:10].mean(0), rtol=1e-6)
    np.testing.assert_allclose(data.y_std, TARGETS[:10].std(0), rtol=1e-6)


def test_statistics_are_those_of_real_positions_of_the_training_split(tmp_path):
    x = VALUES.astype(np.float64)
    padding = np.arange(6) >= LENGTHS[:, None]
    x[padding] = np.nan
    x[10:] += 100
    data = lra_data.load(save(tmp_path, x=x, y=CLASSES, lengths=LENGTHS, split=SPLIT))
    real = VALUES[:10][~padding[:10]].astype(np.float64)
    np.testing.assert_allclose(data.mean, real.mean(0), rtol=1e-12)
    np.testing.assert_allclose(data.std, real.std(0), rtol=1e-12)
    assert (data.train.tokens[padding[:10]] == 0).all()


def test_sums_of_statistics_are_taken_in_float64():
    x = np.full((4000, 250), 4096, np.float32)
    x[::2] += 1
    split = np.array(["train"] * 3998 + ["val", "test"])
    y = np.random.RandomState(0).randint(0, 2, 4000)
    data = own_data.from_arrays(x, y, split=split)
    np.testing.assert_allclose(data.mean, 4096.5, rtol=1e-12)
    np.testing.assert_allclose(data.std, 0.5, rtol=1e-9)


@pytest.mark.parametrize("x", [VALUES[..., 0], VALUES[..., :1].astype(np.float64)])
def test_one_channel_may_have_no_axis(x, tmp_path):
    data = lra_data.load(save(tmp_path, x=x, y=TARGETS[:, 0], split=SPLIT))
    assert data.train.tokens.shape == (10, 6, 1) and len(data.mean) == 1
    assert (data.train.tokens[..., 0] == VALUES[:10, :, 0]).all()
    assert data.train.labels.shape == (10, 1)


def test_small_integers_with_channels_are_values(tmp_path):
    pixels = np.arange(N * 6 * 3, dtype=np.uint8).reshape(N, 6, 3)
    data = lra_data.load(save(tmp_path, x=pixels, y=CLASSES, split=SPLIT))
    assert len(data.mean) == 3 and (data.val.tokens == pixels[10:14]).all()


def test_the_arrays_of_the_caller_stay_as_they_are():
    x = VALUES.copy()
    own_data.from_arrays(x, CLASSES, LENGTHS)
    assert (x == VALUES).all()


def test_classes_sort_by_number_or_by_text():
    data = own_data.from_arrays(TOKENS, np.arange(N) % 2 * 8 + 2, split=SPLIT)
    assert data.classes == ("2", "10")
    data = own_data.from_arrays(TOKENS, ["no", "yes"] * 10, split=SPLIT)
    assert data.classes == ("no", "yes") and data.train.labels[1] == 1


# ---------------------------------------------------------------------------------- split


def test_the_random_split_is_80_10_10_and_a_function_of_the_seed(tmp_path, capsys):
    n = 109
    x = np.arange(n)[:, None] * np.ones((1, 2), int)  # a row says where it comes from
    path = save(tmp_path, x=x, y=np.arange(n) % 2)
    first = lra_data.load(path, seed=1)
    assert "split at random, 80/10/10, with seed 1" in capsys.readouterr().out
    assert [len(first.train), len(first.val), len(first.test)] == [89, 10, 10]
    rows = [set(split.tokens[:, 0]) for split in (first.train, first.val, first.test)]
    assert set.union(*rows) == set(range(n))
    assert lra_data.checksum(first) == lra_data.checksum(lra_data.load(path, seed=1))
    assert rows[1] != set(lra_data.load(path, seed=2).val.tokens[:, 0])
    assert rows[2] != set(range(n - 10, n)), "the order of the file does not matter"


# ---------------------------------------------------------------------------------- tables


def test_texts_are_bytes_whatever_the_quotes_commas_and_line_ends(tmp_path):
    texts = ['say "hi", é', "two\r\nlines", "tab\tand, comma"] + [f"row {i}" for i in range(17)]
    rows = ['"' + text.replace('"', '""') + f'",{i % 2}' for i, text in enumerate(texts)]
    content = "\ufefftext,label,split\r\n"
    content += "\r\n".join(f"{row},{part}" for row, part in zip(rows, SPLIT, strict=True))
    data = lra_data.load(write(tmp_path, content))
    assert texts_of(data) == texts
    assert data.vocab_size == 256 and data.symbols is None and data.classes == ("0", "1")


def test_a_tsv_file_has_tabs_and_blank_lines_are_skipped(tmp_path):
    rows = [f"a, b\t{i % 2}\t{part}" for i, part in enumerate(SPLIT)]
    content = "text\tlabel\tsplit\n" + "\n\n".join(rows)
    data = lra_data.load(write(tmp_path, content, "MY.TSV"))
    assert texts_of(data) == ["a, b"] * N


def test_a_table_and_an_npz_that_mean_the_same_are_the_same(tmp_path):
    rows = [f"{text},{label}" for text, label in zip(TEXTS, CLASSES + 9, strict=True)]
    from_table = lra_data.load(write(tmp_path, table(rows)), seed=3)
    tokens = np.zeros((N, 12), np.int64)
    for row, text in zip(tokens, TEXTS, strict=True):
        row[: len(text)] = list(text.encode())
    x = np.concatenate([tokens, np.full((N, 1), 255)], 1)  # so that all 256 symbols are there
    lengths = [len(text) for text in TEXTS]
    path = save(tmp_path, x=tokens, y=CLASSES + 9, lengths=lengths)
    from_npz = lra_data.load(path, seed=3)
    assert from_npz.vocab_size == x[:, :-1].max() + 1
    assert lra_data.checksum(from_table) == lra_data.checksum(from_npz)
    assert from_table.classes == from_npz.classes == ("9", "10")


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["1", "0"], ("0", "1")),
        (["10", "9"], ("9", "10")),
        (["-1", "+1"], ("-1", "1")),
        (["1.5", "b"], ("1.5", "b")),
        ([" no ", "yes"], ("no", "yes")),
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


def test_columns_go_by_their_names(tmp_path):
    rows = [f"x,{i % 2},{text}" for i, text in enumerate(TEXTS)]
    path = write(tmp_path, table(rows, "id, stars , review"))
    data = lra_data.load(path, text_column="review", label_column="stars")
    assert sorted(texts_of(data)) == sorted(TEXTS)


def test_characters_that_occur_once_in_training_are_unknown(tmp_path):
    texts = ["äbb", "äc", "bd"] + ["b"] * 7 + ["dd"] * 10  # d: once in training
    rows = [
        f"{text},{i % 2},{part}" for i, (text, part) in enumerate(zip(texts, SPLIT, strict=True))
    ]
    path = write(tmp_path, table(rows, "text,label,split"))
    data = lra_data.load(path, characters=True)
    assert data.symbols == ("<unk>", "b", "ä") and data.vocab_size == 3
    assert data.train.tokens[:3].tolist() == [[2, 1, 1], [2, 0, 0], [1, 0, 0]]
    assert data.train.lengths[:3].tolist() == [3, 2, 2]


def test_long_texts_are_cut_and_counted(tmp_path, capsys):
    texts = ["a" * 4097, "b" * 4096] + ["ccc"] * 18
    rows = [f"{text},{i % 2}" for i, text in enumerate(texts)]
    path = write(tmp_path, table(rows))
    data = lra_data.load(path)
    assert "1 of 20 texts were cut after 4,096 tokens" in capsys.readouterr().out
    assert sorted(len(text) for text in texts_of(data))[-2:] == [4096, 4096]
    data = lra_data.load(path, max_len=2)
    assert "20 of 20 texts were cut after 2 tokens" in capsys.readouterr().out
    assert data.train.tokens.shape[1] == 2 and (data.train.lengths == 2).all()
    lra_data.load(path, max_len=4097)
    assert "cut" not in capsys.readouterr().out


def test_a_field_may_be_longer_than_the_csv_module_takes(tmp_path):
    text = "a" * 200_000
    rows = [f"{text},{i % 2}" for i in range(10)]
    data = lra_data.load(write(tmp_path, table(rows)), max_len=10**6)
    assert data.train.lengths[0] == 200_000


# ------------------------------------------------------------------------------- functions

FUNCTION = """
import numpy as np
import own_data
from lra_data import Data, Split

x = np.arange(120).reshape(20, 6) % 7
def load():
    return own_data.from_arrays(x, np.arange(20) % 2, name="mine")
def number():
    return 3
def fails():
    raise KeyError("a\\nb")
def floats():
    split = Split(x + 0.5, np.arange(20) % 2, np.full(20, 6))
    return Data("mine", split, split, split, 7, 2)
def beyond():
    split = Split(x, np.arange(20) % 2, np.full(20, 6))
    return Data("mine", split, split, split, 6, 2)
def long():
    split = Split(x, np.arange(20) % 2, np.full(20, 7))
    return Data("mine", split, split, split, 7, 2)
def labels():
    split = Split(x, np.arange(20), np.full(20, 6))
    return Data("mine", split, split, split, 7, 2)
"""


def test_a_function_of_a_file_gives_the_data(tmp_path):
    write(tmp_path, "width = 6\n", "neighbor_of_mine.py")
    path = write(tmp_path, "import neighbor_of_mine\n" + FUNCTION, "mine.py")
    data = lra_data.load(f"{path}:load")
    assert data.name == "mine" and data.n_classes == 2
    assert same(data, own_data.from_arrays(TOKENS, CLASSES))


# ----------------------------------------------------------------------------- prediction


def about(data, max_len=None):
    """What a run keeps of its data."""
    names = ("name", "vocab_size", "n_classes", "classes", "mean", "std", "symbols")
    facts = {name: getattr(data, name) for name in (*names, "y_mean", "y_std")}
    channels = None if data.mean is None else len(data.mean)
    return facts | {"n_channels": channels, "max_len": max_len}


BYTES = about(own_data.from_arrays(TOKENS, ["no", "yes"] * 10, vocab_size=256))
SYMBOLS = about(own_data.from_arrays(TOKENS, CLASSES + 3))
NUMBERS = about(own_data.from_arrays(VALUES, TARGETS))
SIGNAL = about(own_data.from_arrays(VALUES, ["no", "yes"] * 10))
SCORES = {**BYTES, "n_classes": None, "classes": None, "y_mean": (0.0,), "y_std": (1.0,)}


@pytest.mark.parametrize(("characters", "max_len"), [(False, 9), (True, 9), (True, None)])
def test_texts_are_read_for_prediction_as_they_were_for_training(characters, max_len, tmp_path):
    rows = [f"é{text},{label + 9},test" for text, label in zip(TEXTS, CLASSES, strict=True)]
    rows += [row.replace("test", part) for row in rows for part in ("train", "val")]
    path = write(tmp_path, table(rows, "text,label,split"))
    data = lra_data.load(path, characters=characters, max_len=max_len)
    tokens, lengths, labels = own_data.examples(path, about(data, max_len))
    assert (tokens[:N] == data.test.tokens).all()
    assert (lengths[:N] == data.test.lengths).all()
    assert (labels[:N] == data.test.labels).all() and labels.dtype == np.int64


def test_values_and_targets_are_read_for_prediction_as_they_are(tmp_path):
    path = save(tmp_path, x=VALUES[:3], y=TARGETS[:3], lengths=LENGTHS[:3])
    tokens, lengths, labels = own_data.examples(path, NUMBERS)
    padding = np.arange(3) >= LENGTHS[:3, None]
    assert (tokens == np.where(padding[..., None], 0, VALUES[:3, :3])).all()
    assert tokens.dtype == labels.dtype == np.float32 and (lengths == LENGTHS[:3]).all()
    assert (labels == TARGETS[:3].astype(np.float32)).all()


def test_one_new_example_without_a_label_is_enough(tmp_path):
    tokens, lengths, labels = own_data.examples(save(tmp_path, x=TOKENS[:1]), SYMBOLS)
    assert (tokens == TOKENS[:1]).all() and lengths == [6] and labels is None
    path = write(tmp_path, "id,text\n1,hello\n")
    tokens, lengths, labels = own_data.examples(path, BYTES)
    assert tokens.tobytes() == b"hello" and lengths == [5] and labels is None


def test_new_labels_get_the_numbers_of_the_classes_of_the_run(tmp_path):
    path = write(tmp_path, labeled(["yes", "yes", "no"]))
    assert own_data.examples(path, BYTES)[2].tolist() == [1, 1, 0]
    path = save(tmp_path, x=TOKENS[:2], y=[4, 3])
    assert own_data.examples(path, SYMBOLS)[2].tolist() == [1, 0]
    unnamed = {**SYMBOLS, "classes": None, "n_classes": 5}
    assert own_data.examples(path, unnamed)[2].tolist() == [4, 3]


def test_whole_numbers_are_targets_where_the_run_predicts_numbers(tmp_path):
    _, _, labels = own_data.examples(write(tmp_path, labeled(["3", "4"])), SCORES)
    assert labels.tolist() == [[3], [4]] and labels.dtype == np.float32


def test_columns_of_new_texts_go_by_their_names(tmp_path):
    path = write(tmp_path, "review,stars\nhello,yes\n")
    tokens, _, labels = own_data.examples(path, BYTES, "review", "stars")
    assert tokens.tobytes() == b"hello" and labels == [1]


def test_long_new_texts_are_cut_and_counted(tmp_path, capsys):
    path = write(tmp_path, "text\nhello\nhell\n")
    tokens, lengths, _ = own_data.examples(path, {**BYTES, "max_len": 4})
    assert tokens.tobytes() == b"hellhell" and lengths.tolist() == [4, 4]
    assert "my.csv: 1 of 2 texts were cut after 4 tokens" in capsys.readouterr().out


def test_new_texts_stay_whole_where_the_run_reads_any_length(tmp_path, capsys):
    path = write(tmp_path, table(["a" * 5000], "text"))
    assert own_data.examples(path, BYTES)[1] == [5000]
    assert capsys.readouterr().out == ""


def test_arrays_as_long_as_the_run_can_read_pass(tmp_path):
    path = save(tmp_path, x=TOKENS, lengths=np.full(N, 4))
    tokens, lengths, _ = own_data.examples(path, {**SYMBOLS, "max_len": 4})
    assert (tokens == TOKENS[:, :4]).all() and (lengths == 4).all()


LISTOPS = {**BYTES, "symbols": lra_data.LISTOPS_VOCAB, "vocab_size": 15}
KINDS = {
    "values": (dict(x=VALUES), SYMBOLS, "my.npz: these are values, but the run reads tokens"),
    "tokens": (dict(x=TOKENS), SIGNAL, "my.npz: these are tokens, but the run reads values"),
    "channels": (dict(x=VALUES[..., :1]), SIGNAL, "my.npz: 1 channels, but the run reads 2"),
    "vocabulary": (dict(x=TOKENS + 1), SYMBOLS, "my.npz, row 1: a token is not in .* 0 .. 6"),
    "length": (dict(x=TOKENS), {**SYMBOLS, "max_len": 5}, "length 6, but the run reads at most 5"),
    "class": (dict(x=TOKENS[:3], y=[3, 5, 9]), SYMBOLS, "the run does not know class 5, 9"),
    "targets for classes": (dict(x=TOKENS, y=TARGETS), SYMBOLS, "predicts classes, but .* decimal"),
    "classes for targets": (dict(x=VALUES, y=["a"] * N), NUMBERS, "numbers, but labels are text"),
    "too few targets": (dict(x=VALUES, y=CLASSES), NUMBERS, "1 targets per example, but .* 3"),
    "text for values": (labeled(["yes"]), SIGNAL, "my.csv: text, but the run reads no text"),
    "text for tokens": (labeled(["yes"]), SYMBOLS, "my.csv: text, but the run reads no text"),
    "text for trees": (labeled(["yes"]), LISTOPS, "my.csv: text, but the run reads no text"),
    "no text": ("a,label\nb,yes\n", BYTES, r"my.csv: no column text \(--text-column\) in a, label"),
    "no x": (dict(y=CLASSES), SYMBOLS, "my.npz: arrays y, expected x"),
    "NaN": (dict(x=changed(VALUES, 1, np.nan)), SIGNAL, "my.npz, row 1: NaN or infinity in x"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_new_data_of_another_kind_are_refused_by_name(kind, tmp_path):
    content, run, reason = KINDS[kind]
    path = write(tmp_path, content) if isinstance(content, str) else save(tmp_path, **content)
    with pytest.raises(ValueError, match=reason) as refused:
        own_data.examples(path, run)
    assert "\n" not in str(refused.value)


def test_the_name_of_a_function_follows_the_last_colon(tmp_path):
    folder = tmp_path / "12:30"
    folder.mkdir()
    path = write(folder, FUNCTION, "mine.py")
    assert lra_data.load(f"{path}:load").name == "mine"


# --------------------------------------------------------------------- what prints, what fails


def test_two_lines_say_what_was_read(tmp_path, capsys):
    lra_data.load(save(tmp_path, x=VALUES, y=["no", "yes"] * 10, lengths=LENGTHS))
    assert capsys.readouterr().out.splitlines() == [
        "my.npz: split at random, 80/10/10, with seed 0",
        "my.npz: 16 train, 2 val, 2 test; 2 classes: no, yes; 2-channel values, length 1 to 6",
    ]
    lra_data.load(save(tmp_path, x=TOKENS, y=TARGETS, split=SPLIT))
    line = (
        "my.npz: 10 train, 4 val, 6 test; regression, targets per example: 3; 7 symbols, length 6"
    )
    assert capsys.readouterr().out == line + "\n"


def test_one_process_of_several_prints(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    lra_data.load(save(tmp_path, x=TOKENS, y=CLASSES))
    assert capsys.readouterr().out == ""


ARRAYS = {
    "NaN in x": (
        dict(x=changed(VALUES, (4, 1, 0), np.nan), y=CLASSES),
        "row 4: NaN or infinity in x",
    ),
    "infinity in x": (dict(x=changed(VALUES, (5, 1), np.inf), y=CLASSES), "row 5: NaN or infinity"),
    "NaN in y": (dict(x=TOKENS, y=changed(TARGETS, (7, 2), np.nan)), "row 7: NaN or infinity in y"),
    "infinite y": (
        dict(x=TOKENS, y=changed(TARGETS, (0, 0), -np.inf)),
        "row 0: NaN or infinity in y",
    ),
    "constant channel": (dict(x=changed(VALUES, (..., 1), 3), y=CLASSES), "channel 1 is constant"),
    "constant target": (dict(x=TOKENS, y=changed(TARGETS, (..., 2), 3)), "target 2 is constant"),
    "one class": (dict(x=TOKENS, y=0 * CLASSES + 5), "only one class, 5"),
    "label missing": (dict(x=TOKENS, y=["a", " "] * 10), "row 1: its label is missing"),
    "negative token": (dict(x=changed(TOKENS, (6, 0), -1), y=CLASSES), "row 6: a negative token"),
    "huge token": (
        dict(x=changed(TOKENS, (6, 5), 2**20), y=CLASSES),
        "row 6: a token above 1,048,575",
    ),
    "boolean x": (dict(x=TOKENS > 3, y=CLASSES), "x is bool, expected integers or floats"),
    "boolean y": (dict(x=TOKENS, y=CLASSES > 0), "y is bool, expected integers, floats or text"),
    "text x": (dict(x=TOKENS.astype(str), y=CLASSES), "x is <U21"),
    "x of one axis": (dict(x=TOKENS[:, 0], y=CLASSES), r"x has shape \(20,\), expected"),
    "x of four axes": (dict(x=VALUES[..., None], y=CLASSES), r"x has shape \(20, 6, 2, 1\)"),
    "no rows": (dict(x=TOKENS[:0], y=CLASSES[:0]), r"x has shape \(0, 6\), expected"),
    "y of another length": (
        dict(x=TOKENS, y=CLASSES[1:]),
        r"y has shape \(19,\), but x has 20 rows",
    ),
    "classes with an axis": (
        dict(x=TOKENS, y=CLASSES[:, None]),
        r"shape \(20, 1\), expected \(n,\)",
    ),
    "targets of three axes": (dict(x=TOKENS, y=TARGETS[..., None]), r"y has shape \(20, 3, 1\)"),
    "length 0": (
        dict(x=TOKENS, y=CLASSES, lengths=changed(LENGTHS, 8, 0)),
        "row 8: its length is not in 1 .. 6",
    ),
    "length beyond x": (
        dict(x=TOKENS, y=CLASSES, lengths=changed(LENGTHS, 9, 7)),
        "row 9: its length is not in 1 .. 6",
    ),
    "lengths with decimals": (
        dict(x=TOKENS, y=CLASSES, lengths=LENGTHS / 1),
        "lengths are float64",
    ),
    "too few lengths": (
        dict(x=TOKENS, y=CLASSES, lengths=LENGTHS[1:]),
        r"lengths are int64 \(19,\)",
    ),
    "unknown split": (
        dict(x=TOKENS, y=CLASSES, split=changed(SPLIT, 3, "dev")),
        "row 3: its split is none of train, val, test",
    ),
    "no validation": (
        dict(x=TOKENS, y=CLASSES, split=np.where(SPLIT == "val", "train", SPLIT)),
        "no row of split val",
    ),
    "too few splits": (
        dict(x=TOKENS, y=CLASSES, split=SPLIT[1:]),
        r"split has shape \(19,\), but x has 20 rows",
    ),
    "class not in training": (
        dict(x=TOKENS, y=changed(CLASSES, 19, 2), split=SPLIT),
        "class 2 is not in the training split ",
    ),
    "too few to split": (dict(x=TOKENS[:9], y=CLASSES[:9]), "9 examples are too few to split"),
    "no y": (dict(x=TOKENS), "no array y, found x"),
    "no x": (dict(X=TOKENS, y=CLASSES), "arrays X, y, expected x, y"),
    "misspelled lengths": (
        dict(x=TOKENS, y=CLASSES, length=LENGTHS),
        "arrays x, y, length, expected",
    ),
    "object array": (
        dict(x=np.array([[1], [1, 2]], object), y=[0, 1]),
        "Object arrays cannot .*expected numbers or text",
    ),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_broken_arrays_end_in_one_line_that_names_file_row_and_reason(kind, tmp_path, capsys):
    arrays, reason = ARRAYS[kind]
    ends_in_one_line(save(tmp_path, **arrays), reason, capsys)


TABLES = {
    "empty file": ("", "my.csv: an empty file"),
    "header only": ("text,label\n", "my.csv: no examples after the first line"),
    "no column text": (
        table(["a,b"], "review,label"),
        r"no column text \(--text-column\) in review",
    ),
    "no column label": (
        table(["a,b"], "text,stars"),
        r"no column label \(--label-column\) in text",
    ),
    "column twice": (
        table(["a,b,c"], "text,label,text"),
        "two columns have one name: text, label, text",
    ),
    "empty text": (table(["a,b", " ,b"]), "line 3: text is empty"),
    "label missing": (table(["a,b", "b,"]), "line 3: label is empty"),
    "label nan": (labeled(["1.5", "nan"]), "line 3: label is nan"),
    "label infinite": (labeled(["1.5", "-inf"]), "line 3: label is -inf"),
    "a field less": (table(["a,b", "c"]), "line 3: expected 2 fields, as in the first line"),
    "a field more": (table(["a,b", "c,d", "e,f,g"]), "line 4: expected 2 fields"),
    "line numbers count lines": (table(['"a\nb\nc",0', "d,"]), "line 5: label is empty"),
    "not UTF-8": (
        b"text,label\nb,0\ncaf\xe9,1\n",
        r"line 3: not UTF-8 \(invalid continuation byte\)",
    ),
    "a NUL byte": (table(["a,b", "c,d", "e\0f,g"]), "line 4: a NUL byte"),
    "an open quote": (table(["a,b", '"c,d', "e,f"]), "line 3: unexpected end of data"),
    "text after a quote": (table(['"a" b,c']), "line 2: ',' expected after '\"'"),
    "one class": (labeled(["same"] * 20), "only one class, same"),
    "too few to split": (labeled(["0", "1"] * 4), "8 examples are too few to split"),
    "constant target": (labeled(["0.5"] * 20), "target 0 is constant in the training split"),
    "many whole numbers": (labeled(range(20)), r"class 6, .* training split \(to predict numbers"),
    "unknown split": (
        table(["a,b,dev", "a,c,train"], "text,label,split"),
        "row 0: its split is none",
    ),
}


@pytest.mark.parametrize("kind", TABLES)
def test_broken_tables_end_in_one_line_that_names_file_line_and_reason(kind, tmp_path, capsys):
    content, reason = TABLES[kind]
    ends_in_one_line(write(tmp_path, content), reason, capsys)


def test_what_is_not_an_npz_file_ends_in_one_line(tmp_path, capsys):
    path = write(tmp_path, pickle.dumps({"x": 1}), "my.npz")
    ends_in_one_line(path, "not a .npz file, make it with numpy.savez", capsys)


def test_a_damaged_npz_file_ends_in_one_line(tmp_path, capsys):
    path = save(tmp_path, x=TOKENS, y=CLASSES)
    content = bytearray((tmp_path / "my.npz").read_bytes())
    content[200:300] = bytes(100)
    write(tmp_path, bytes(content), "my.npz")
    ends_in_one_line(path, "BadZipFile: Bad CRC-32", capsys)


@pytest.mark.parametrize("name", ["none.npz", "none.csv", "none.py:load"])
def test_a_file_that_is_not_there_ends_in_one_line(name, tmp_path, capsys):
    ends_in_one_line(str(tmp_path / name), "no such file", capsys)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("number", "returned int, expected lra_data.Data"),
        ("fails", "KeyError: 'a.*b'"),
        ("lod", "AttributeError: module 'mine' has no attribute 'lod'"),
        ("floats", "train: these are values, but .* tokens"),
        ("beyond", "train, row 1: a token is not in .* 0 .. 5"),
        ("long", "train, row 0: its length is not in 1 .. 6"),
        ("labels", "train has 20 examples with labels .*expected at least one, labels 0 .. 1"),
    ],
)
def test_a_function_that_fails_ends_in_one_line(function, reason, tmp_path, capsys):
    path = write(tmp_path, FUNCTION, "mine.py")
    ends_in_one_line(f"{path}:{function}", reason, capsys)


def test_a_function_file_with_a_syntax_error_ends_in_one_line(tmp_path, capsys):
    path = write(tmp_path, "def load(:\n", "mine.py")
    ends_in_one_line(f"{path}:load", "SyntaxError", capsys)


@pytest.mark.parametrize("flags", [["--characters"], ["--max-len", "3"]])
def test_options_of_tables_do_not_fit_arrays(flags, tmp_path, capsys):
    path = save(tmp_path, x=TOKENS, y=CLASSES)
    ends_in_one_line(path, "characters and max_len are options of .csv", capsys, flags)


def test_a_text_of_length_0_is_refused(tmp_path, capsys):
    path = write(tmp_path, labeled(["0", "1"] * 10))
    ends_in_one_line(path, "max_len is 0, expected 1 or more", capsys, ["--max-len", "0"])


def ends_in_one_line(task, reason, capsys, flags=()):
    """Assert that reading the task from the command line fails with this line."""
    with pytest.raises(SystemExit) as stop:
        lra_data.main([task, *flags])
    error = stop.value.code  # what Python prints, before it ends with status 1
    assert "\n" not in error and error.startswith("lra_data.py: ")
    assert capsys.readouterr().err == ""
    name = Path(task).name.split(":")[0]
    assert name in error or "max_len is" in error
    assert re.search(reason, error), error


def test_the_command_line_summarizes_a_file(tmp_path, capsys):
    path = write(tmp_path, labeled(["0.5", "1"] * 10))
    assert lra_data.main([path, "--characters", "--max-len", "4", "--seed", "1"]) == 0
    out = capsys.readouterr().out
    assert "20 of 20 texts were cut after 4 tokens" in out
    assert "my.csv: regression, 5 symbols" in out
    assert "trivial" not in out
