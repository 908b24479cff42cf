"""Your own data as the arrays that lra_data.load returns: from a file, or from your own function.

    python lra_data.py my.csv                       read a file, check it and summarize it
    python pretrain.py --task my.csv --model s4     the same for my.tsv, my.npz and my.py:load

    my.npz      x        (n, L) integers: tokens 0, 1, 2, ...
                         (n, L) floats or (n, L, C) numbers: values, C channels, kept as float32;
                         pictures as rows of pixels: reshape(n, -1, C)
                y        (n,) integers or text: classes; (n,) or (n, k) floats: regression
                lengths  (n,), optional: what comes after them in a row is padding
                split    (n,), optional: "train", "val" or "test"; otherwise 80/10/10 at random
    my.csv      UTF-8 with columns text, label and, optionally, split, named in the first line
    my.tsv      the same with tabs instead of commas
    my.py:load  a function without arguments that returns a `Data`: from_arrays makes and checks it

Texts become UTF-8 bytes, or characters, and are cut after 4,096. Labels of a table are classes if
all of them are whole numbers (3, not 3.0) or one is not a number; otherwise they are regression
targets. Every example needs one, also to pretrain; --pretrained RUN starts from what a run on
another file of the same kind has learned. Whatever is wrong ends in an error of one line: the file,
the row of its arrays (from 0) or the line of its text (from 1), the reason, and what to do.
"""

import csv
import importlib.util
import os
import re
import sys
import zipfile
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from textwrap import shorten

import numpy as np

from lra_data import SPLITS, Data, Split, check, pad, reading
from pathfinder import require

SEPARATORS = {".csv": ",", ".tsv": "\t"}
MAX_VOCAB = 2**20
MAX_LEN = 4096  # of a text
NAME = re.compile("[+-]?0[0-9]|.*_|[+-]?[0-9]{19}")  # int() takes 01 for 1; ids beyond int64
BROKEN = re.compile("[\0\ud800-\udfff]")  # NUL bytes, and what is not UTF-8


def load(task, seed=0, text_column="text", label_column="label", characters=False, max_len=MAX_LEN):
    """Return a .npz, .csv or .tsv file, or what `file.py:function` returns, as `Data`.

    seed: of the random split.  Of tables alone: the names of columns; characters, one token per
    character instead of per byte; max_len, the number of tokens after which a text is cut.
    """
    path = Path(task)
    suffix = path.suffix.lower()
    if suffix in SEPARATORS:
        require(max_len > 0, f"{task}: max_len is {max_len}, expected 1 or more")
        texts, labels, split = read_table(path, text_column, label_column)
        if split is None:
            split = random_split(path.name, labels, seed)
        symbols = vocabulary(texts, split, max_len) if characters else None
        size = len(symbols) if characters else 256
        tokens, lengths = encode(path.name, texts, symbols, max_len)
        own = dict(name=path.name, vocab_size=size, symbols=symbols)
        data = from_arrays(tokens, labels, lengths, split, **own)
    else:
        given = (text_column, label_column, characters, max_len)
        only_tables = "columns, characters and max_len are options of .csv and .tsv files"
        require(given == ("text", "label", False, MAX_LEN), f"{task}: {only_tables}")
        if suffix == ".npz":
            data = from_arrays(**read_arrays(path), seed=seed, name=path.name)
        else:
            data = call(str(task))
    say(describe(data))
    return data


def from_arrays(
    x, y, lengths=None, split=None, *, name="arrays", seed=0, vocab_size=None, symbols=None
):
    """Check the arrays of a .npz file (see above) and return them as `Data`.

    seed: of the random split.  vocab_size: default, the largest token + 1.  symbols: the text of
    each token.  Means and standard deviations are those of the training split without padding.
    """
    tokens, lengths = check_inputs(name, x, lengths)
    n = len(tokens)
    labels = check_labels(name, y, n)
    split = random_split(name, labels, seed) if split is None else np.asarray(split)
    facts = dict(vocab_size=None, n_classes=None, symbols=symbols)
    if labels.ndim == 1:
        classes, labels = np.unique(labels, return_inverse=True)
        require(len(classes) > 1, f"{name}: only one class, {classes[0]}")
        facts["classes"] = tuple(str(label) for label in classes.tolist())
        facts["n_classes"] = len(classes)
    require(split.shape == (n,), f"{name}: split has shape {split.shape}, but x has {n} rows")
    unknown = ~np.isin(split, SPLITS)
    found = split[unknown][:1].tolist()
    no_row(unknown, name, f"split is {found}, expected 'train', 'val' or 'test'")
    parts = []
    for part in SPLITS:
        rows = np.flatnonzero(split == part)
        require(len(rows) > 0, f"{name}: no row of split {part}; without split, 80/10/10 at random")
        parts.append(Split(tokens[rows], labels[rows], lengths[rows]))
    train = parts[0]
    if tokens.ndim == 2:
        facts["vocab_size"] = vocab_size or int(tokens.max()) + 1
    else:
        real = np.arange(tokens.shape[1]) < train.lengths[:, None]
        facts["mean"], facts["std"] = moments(name, "x", "channel", train.tokens[real])
    if labels.ndim == 2:
        facts["y_mean"], facts["y_std"] = moments(name, "y", "target", train.labels)
    else:
        unseen = [facts["classes"][i] for i in np.setdiff1d(labels, train.labels)]
        how = "merge rare ones or name the splits; for regression, write floats: 3.0, not 3"
        missing = f"no class {', '.join(unseen)[:60]} in the training split"
        require(not unseen, f"{name}: {missing} ({how})")
    return Data(name, *parts, **facts)


def random_split(name, labels, seed):
    """Names of splits (n,): a tenth of the rows is val, a tenth is test.

    A class (text labels) that would be in these alone goes to the training split.
    """
    n = len(labels)
    require(n >= 10, f"{name}: {n} examples are too few to split, expected 10 or more")
    order = np.random.RandomState([seed, 6]).permutation(n)
    split = np.full(n, "train")
    split[order[: n // 10]] = "val"
    split[order[n // 10 : n // 10 * 2]] = "test"
    if labels.dtype.kind == "U":  # rare integers may be meant as a regression: see from_arrays
        for label in set(labels.tolist()) - set(labels[split == "train"].tolist()):
            split[labels == label] = "train"
        found = f"almost every label occurs once, such as {labels[0]}"
        why = "text among numbers, such as NA, makes all of them classes"
        require(set(split) == set(SPLITS), f"{name}: {found} ({why})")
    say(f"{name}: split at random, 80/10/10, with seed {seed}")
    return split


def moments(name, array, what, values):
    """Mean and standard deviation of each column of float32 (n, C), as tuples.

    ValueError if a column is constant, or nearly so beside its mean.
    """
    constant = np.flatnonzero(values.min(0) == values.max(0)).tolist()
    how = f"drop it, np.delete({array}, {constant[:20]}, -1)"
    if values.shape[1] == 1:
        how = "nothing can be learned from it"
    reason = f"{what} {constant[:20]} (from 0) is constant in the training split, as float32: {how}"
    require(not constant, f"{name}: {reason}")
    mean = values.mean(0, dtype=np.float64)
    std = values.std(0, dtype=np.float64)
    offset = np.flatnonzero(std < 1e-5 * abs(mean)).tolist()
    reason = f"{what} {offset[:20]} (from 0) varies too little around its mean for float32"
    require(not offset, f"{name}: {reason}: subtract a number from {array} first")
    return tuple(mean.tolist()), tuple(std.tolist())


def describe(data):
    """One line: examples, classes or targets, inputs."""
    parts = [getattr(data, part) for part in SPLITS]
    sizes = ", ".join(f"{len(part):,} {name}" for part, name in zip(parts, SPLITS, strict=True))
    if data.n_classes is None:
        goal = f"regression, targets per example: {len(data.y_mean)}"
        if (data.train.labels == data.train.labels.round()).all():
            goal += " (whole numbers; classes would be integers or text)"
    else:
        names = ", ".join(data.classes or map(str, range(data.n_classes)))
        goal = f"{data.n_classes} classes: {shorten(names, 60, placeholder=' ...')}"
    kind = f"{data.vocab_size} symbols" if data.mean is None else kind_of(data.train.tokens)
    lengths = np.concatenate([part.lengths for part in parts])
    ends = sorted({lengths.min(), lengths.max()})
    length = " to ".join(f"{end:,}" for end in ends)
    return f"{data.name}: {sizes}; {goal}; {kind}, length {length}"


# -------------------------------------------------------------------------------- for prediction


def examples(path, about, text_column="text", label_column="label"):
    """Read new examples as the data of a run were read.  Returns tokens, lengths, labels or None.

    about: what the run keeps of its data: vocab_size, symbols, mean, n_classes, classes, y_mean,
    and max_len, the longest input it can read (None: any).  Longer texts are cut.  ValueError for
    a file of another kind, unknown tokens and unknown classes.
    """
    path = Path(path)
    symbols = about["symbols"]
    max_len = about["max_len"] or sys.maxsize
    if path.suffix.lower() in SEPARATORS:
        reads_text = symbols[0] == "<unk>" if symbols else about["vocab_size"] == 256
        require(reads_text and not about["mean"], f"{path}: text, but the run reads no text")
        texts, labels, _ = read_table(path, text_column, label_column, labeled=False)
        if labels is not None and not set(labels) <= set(about["classes"] or ()):
            labels = parse(labels)  # of another form: 3 for 3.0
        tokens, lengths = encode(path.name, texts, symbols, max_len)
    else:
        arrays = read_arrays(path, labeled=False)
        tokens, lengths = check_inputs(path.name, arrays["x"], arrays.get("lengths"))
        labels = arrays.get("y")
    check_kind(path.name, tokens, about)
    L = tokens.shape[1]
    require(L <= max_len, f"{path}: length {L}, but the run reads at most {max_len}")
    if labels is not None:
        labels = known_labels(path.name, labels, len(tokens), about)
    return tokens, lengths, labels


def kind_of(tokens):
    return "tokens" if tokens.ndim == 2 else f"{tokens.shape[2]}-channel values"


def check_kind(name, tokens, about):
    """Refuse tokens (n, L) or values (n, L, C) that a run cannot read."""
    kind = f"{len(about['mean'])}-channel values" if about["mean"] else "tokens"
    found = kind_of(tokens)
    require(found == kind, f"{name}: x are {found}, but the run reads {kind} (integers are tokens)")
    if kind == "tokens":
        size = about["vocab_size"]
        no_row(tokens >= size, name, f"a token is not in the run's vocabulary, 0 .. {size - 1}")


def known_labels(name, labels, n, about):
    """Labels as numbers of the classes of a run, (n,) int64, or as its targets (n, k) float32."""
    labels = np.asarray(labels)
    if about["n_classes"] is None:
        shape = (n, len(about["y_mean"]))
        goal = f"{shape[1]} numbers per example"
        if labels.dtype.kind in "iu":
            labels = labels.astype(np.float64)
    else:
        shape = (n,)
        goal = "classes (integers or text)"
    labels = check_labels(name, labels, n)
    found = f"{labels.dtype} {labels.shape}"
    require(labels.shape == shape, f"{name}: labels are {found}, but the run predicts {goal}")
    if labels.ndim == 2:
        return labels
    classes = about["classes"] or range(about["n_classes"])
    place = {str(label): i for i, label in enumerate(classes)}
    labels = [str(label) for label in labels.tolist()]
    unknown = ", ".join(sorted(set(labels) - set(place)))
    bad = np.array([label not in place for label in labels])
    no_row(bad, name, f"the run does not know class {unknown[:60]}: leave all labels out")
    return np.array([place[label] for label in labels])


# ---------------------------------------------------------------------------------------- checks


def no_row(bad, name, reason):
    """Raise ValueError that names the first row of bad (n, ...) with anything True in it."""
    rows = np.flatnonzero(bad.reshape(len(bad), -1).any(1))
    if len(rows) > 0:
        raise ValueError(f"{name}, row {rows[0]}: {reason}")


def as_float32(name, array, values):
    """Values as float32, finite."""
    with np.errstate(over="ignore"):  # it becomes infinite
        values = values.astype(np.float32)
    no_row(~np.isfinite(values), name, f"{array} is NaN, infinite or too large for float32")
    return values


def check_inputs(name, x, lengths):
    """Tokens (n, L) uint8 or int32, or values (n, L, C) float32, 0 at padding; lengths (n,).

    L is the longest length.
    """
    require(not np.ma.is_masked(x), f"{name}: x has masked values: fill them, or use lengths")
    x = np.array(x)  # a copy: padding becomes 0
    require(x.dtype.kind in "iuf", f"{name}: x is {x.dtype}, expected integers or floats")
    shape = "(n, L) or (n, L, C); a picture is a row of pixels: reshape(n, -1, C)"
    require(x.ndim in (2, 3) and x.size > 0, f"{name}: x has shape {x.shape}, expected {shape}")
    n, L = x.shape[:2]
    lengths = np.full(n, L) if lengths is None else np.asarray(lengths)
    found = f"{lengths.dtype} {lengths.shape}"
    fits = lengths.shape == (n,) and lengths.dtype.kind in "iu"
    require(fits, f"{name}: lengths are {found}, expected integers {(n,)}")
    no_row((lengths < 1) | (lengths > L), name, f"its length is not in 1 .. {L}")
    x[np.arange(L) >= lengths[:, None]] = 0
    x = x[:, : lengths.max()]
    lengths = lengths.astype(np.int32)
    if x.ndim == 2 and x.dtype.kind in "iu":
        how = "integers are tokens: turn values into floats, and mark padding by lengths"
        no_row(x < 0, name, f"a negative token ({how})")
        no_row(x >= MAX_VOCAB, name, f"a token above {MAX_VOCAB - 1:,}: number them from 0")
        return x.astype(np.uint8 if x.max() < 256 else np.int32), lengths
    return as_float32(name, "x", x.reshape(*x.shape[:2], -1)), lengths


def check_labels(name, y, n):
    """Targets (n, k) float32, or the classes as they are, integers or text (n,)."""
    require(not np.ma.is_masked(y), f"{name}: y has masked values: drop these rows")
    y = np.asarray(y)
    kinds = "integers, floats or text; for classes, save y.astype(str)"
    require(y.dtype.kind in "iufU", f"{name}: y is {y.dtype}, expected {kinds}")
    require(y.shape[:1] == (n,), f"{name}: y has shape {y.shape}, but x has {n} rows")
    if y.dtype.kind == "f":
        fits = y.ndim < 3 and y.size > 0
        require(fits, f"{name}: y has shape {y.shape}, expected (n,) or (n, k)")
        return as_float32(name, "y", y.reshape(n, -1))
    shapes = "(n,), such as y[:, 0], or y.argmax(1) if one-hot; regression needs floats"
    require(y.ndim == 1, f"{name}: y has shape {y.shape}, expected {shapes}")
    text = np.char.lower(np.char.strip(y.astype(str)))
    no_row((text == "") | (text == "nan"), name, "its label is missing")
    return y


# -------------------------------------------------------------------------------- files, functions


def say(message):
    """Print on one of the processes that load the same data."""
    if os.environ.get("RANK", "0") == "0":
        print(message)


def read_arrays(path, labeled=True):
    """Return the arrays of a .npz file by name."""
    is_npz = zipfile.is_zipfile(path)
    require(is_npz, f"{path}: no such .npz, .csv or .tsv file: numpy.savez makes .npz files")
    expected = "numbers or text, not objects: pad rows to one length, save text by .astype(str)"
    with reading(path, expected), np.load(path) as file:
        arrays = dict(file)
    complete = "x" in arrays and ("y" in arrays or not labeled)
    known = complete and set(arrays) <= {"x", "y", "lengths", "split"}
    expected = "x, y and optionally lengths and split, as in numpy.savez(path, x=x, y=y)"
    require(known, f"{path}: arrays {', '.join(arrays)}, expected {expected}")
    return arrays


def read_table(path, text_column, label_column, labeled=True):
    """Return texts, labels and names of splits of a .csv or .tsv file, None if it has none."""
    rows = rows_of(path)
    _, header = next(rows, (path, []))
    header = [name.strip() for name in header]
    while header and not header[-1]:  # a spreadsheet's empty columns
        header.pop()
    width = len(header)
    found = shorten(", ".join(header), 100) or "an empty file"
    require(len(set(header)) == width, f"{path}: two columns have one name: {found}")
    separator = SEPARATORS[path.suffix.lower()]
    hint = f"--text-column and --label-column name yours, {separator!r} separates them; "
    hint += "numbers go into a .npz file"
    needed = [text_column, label_column] if labeled else [text_column]
    for name in needed:
        require(name in header, f"{path}: no column {name} in {found} ({hint})")
    columns = {name: [] for name in (text_column, label_column, "split") if name in header}
    places = []
    for place, row in rows:
        fits = len(row) >= width and not any(row[width:])
        require(fits, f"{place}: {len(row)} fields, but the first line has {width}: quote texts")
        places.append(place)
        for name, values in columns.items():
            value = row[header.index(name)]
            values.append(value if name == text_column else value.strip())
    texts = columns[text_column]
    require(texts, f"{path}: no examples after the first line")
    for place, text in zip(places, texts, strict=True):
        require(text.strip(), f"{place}: {text_column} is empty")
    labels = columns.get(label_column)
    if labels and (labeled or any(labels)):  # else an empty column
        for place, label in zip(places, labels, strict=True):
            known = label.lower() not in ("", "nan", "inf", "-inf")
            require(known, f"{place}: {label_column} is {label or 'empty'}")
        labels = parse(labels) if labeled else labels
    else:
        labels = None
    return texts, labels, columns.get("split")


def rows_of(path):
    """Yield the place of each row of a .csv or .tsv file, as text, and its fields."""
    csv.field_size_limit(2**31 - 1)  # texts may be long
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        separator = SEPARATORS[path.suffix.lower()]
        is_tsv = separator == "\t"
        reader = csv.reader(file, delimiter=separator, strict=True)
        place = f"{path}, line 1"
        try:
            for row in reader:
                good = not BROKEN.search("".join(row))
                require(good, f"{place}: not UTF-8 text, or a NUL byte: save the file as UTF-8")
                swallowed = is_tsv and any("\t" in field and "\n" in field for field in row)
                how = 'a quote opens a field that ends lines later: write " as """", or save a .csv'
                require(not swallowed, f"{place}: {how}")
                if any(row) or len(row) == 1:  # else it is empty, perhaps a spreadsheet's ",,"
                    yield place, row
                place = f"{path}, line {reader.line_num + 1}"
        except csv.Error as error:
            raise ValueError(f"{place}: {error}, check the quotes") from error


def parse(labels):
    """(n,) labels as whole numbers, else as numbers, else as text.  01, 1_0 and ids are text."""
    if any(NAME.match(label) for label in labels):
        return np.array(labels)
    for kind in (int, float, str):
        with suppress(ValueError):
            return np.array([kind(label) for label in labels])


def vocabulary(texts, split, max_len):
    """<unk>, then the characters that occur more than once in the training split."""
    counts = Counter()
    for text, part in zip(texts, split, strict=True):
        if part == "train":
            counts.update(text[:max_len])
    return ("<unk>", *sorted(symbol for symbol in counts if counts[symbol] > 1))


def encode(name, texts, symbols, max_len):
    """Turn texts into tokens (n, L), places in symbols or bytes, and lengths (n,)."""
    if symbols is None:
        rows = [np.frombuffer(text.encode(), np.uint8) for text in texts]
    else:
        place = {symbol: i for i, symbol in enumerate(symbols)}
        rows = [np.array([place.get(symbol, 0) for symbol in text]) for text in texts]
    n_cut = sum(len(row) > max_len for row in rows)
    if n_cut > 0:
        say(f"{name}: {n_cut:,} of {len(rows):,} texts were cut after {max_len:,} tokens")
    return pad([row[:max_len] for row in rows])


def call(task):
    """Return the `Data` that `file.py:function` returns."""
    path, _, function = task.rpartition(":")
    sys.path.append(str(Path(path).parent))  # its neighbors can be imported
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    try:
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(spec.name, module)  # dataclasses and processes look there
        spec.loader.exec_module(module)
        data = getattr(module, function)()
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{task}: {reason}") from error
    found = type(data).__name__
    require(isinstance(data, Data), f"{task} returned {found}, expected lra_data.Data")
    checked = {}
    for name in ("vocab_size", "n_classes", "mean", "std", "y_mean", "y_std"):
        value = np.asarray(getattr(data, name)).tolist()  # no numpy scalars
        checked[name] = tuple(value) if isinstance(value, list) else value
    for part in SPLITS:
        split = getattr(data, part)
        name = f"{task}, {part}"
        tokens, lengths = check_inputs(name, split.tokens, split.lengths)
        check_kind(name, tokens, checked)
        labels = check_labels(name, split.labels, len(tokens))
        regression = labels.ndim == 2 and checked["y_mean"] is not None
        expected = "integer classes if there is n_classes, else float targets, y_mean and y_std"
        require(regression == (data.n_classes is None), f"{name}: expected {expected}")
        labels = labels if regression else labels.astype(np.int64)
        checked[part] = Split(tokens, labels, lengths)
    check(replace(data, **checked, name=task))
    return replace(data, **checked)
