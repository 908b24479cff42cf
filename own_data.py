"""Your own data as the arrays that lra_data.load returns: from a file, or from your own function.

    python lra_data.py my.csv                       read a file, check it and summarize it
    python pretrain.py --task my.csv --model s4     the same for my.tsv, my.npz and my.py:load

    my.npz      x        (n, L) integers: tokens 0, 1, 2, ...
                         (n, L) floats or (n, L, C) numbers: values, C channels, kept as float32
                y        (n,) integers or text: classes; (n,) or (n, k) floats: regression
                lengths  (n,), optional: what comes after them in a row is padding
                split    (n,), optional: "train", "val" or "test"; otherwise 80/10/10 at random
    my.csv      UTF-8 with columns text, label and, optionally, split, named in the first line
    my.tsv      the same with tabs instead of commas
    my.py:load  a function without arguments that returns a `Data`: from_arrays makes and checks it

Texts become UTF-8 bytes, or characters, and are cut after 4,096. Labels of a table are classes if
all of them are whole numbers (3, not 3.0) or one is not a number; otherwise they are regression
targets. Whatever is wrong ends in a ValueError of one line: the file, the row of its arrays (from
0) or the line of its text (from 1), and the reason.
"""

import csv
import importlib.util
import io
import os
import sys
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from lra_data import SPLITS, Data, Split, check, pad

TABLES = (".csv", ".tsv")
MAX_VOCAB = 2**20


def load(task, seed=0, text_column="text", label_column="label", characters=False, max_len=None):
    """Return a .npz, .csv or .tsv file, or what `file.py:function` returns, as `Data`.

    seed: of the random split.  Of tables alone: characters, one token per character instead of
    per byte; max_len, the number of tokens after which a text is cut (default: 4,096).
    """
    path = Path(task)
    if path.suffix.lower() in TABLES:
        data = load_table(path, seed, text_column, label_column, characters, max_len)
    else:
        only_tables = not characters and max_len is None
        need(only_tables, f"{task}: characters and max_len are options of .csv and .tsv files")
        if path.suffix.lower() == ".npz":
            arrays = read_arrays(path)
            need("y" in arrays, f"{path}: no array y, found {', '.join(arrays)}")
            data = from_arrays(**arrays, seed=seed, name=path.name)
        else:
            data = call(str(task))
    say(describe(data))
    return data


def load_table(path, seed, text_column, label_column, characters, max_len):
    """Return a .csv or .tsv file as `Data`."""
    max_len = 4096 if max_len is None else max_len
    need(max_len > 0, f"max_len is {max_len}, expected 1 or more")
    texts, labels, split = read_table(path, text_column, label_column)
    if split is None:
        split = random_split(path.name, len(texts), seed)
    symbols = None
    if characters:
        counts = Counter()
        for text, part in zip(texts, split, strict=True):
            if part == "train":
                counts.update(text[:max_len])
        often = sorted(symbol for symbol in counts if counts[symbol] > 1)
        symbols = ("<unk>", *often)  # characters that occur once train <unk>
    tokens, lengths = encode(path.name, texts, symbols, max_len)
    size = len(symbols) if characters else 256
    own = dict(vocab_size=size, symbols=symbols)
    return from_arrays(tokens, labels, lengths, split, name=path.name, **own)


def from_arrays(
    x, y, lengths=None, split=None, *, name="arrays", seed=0, vocab_size=None, symbols=None
):
    """Check the arrays of a .npz file (see above) and return them as `Data`.

    seed: of the random split.  vocab_size: default, the largest token + 1.  symbols: the text of
    each token.  Means and standard deviations are those of the training split without padding.
    """
    tokens, lengths = check_inputs(name, x, lengths)
    labels = check_labels(name, y, len(tokens))
    facts = dict(vocab_size=None, n_classes=None, symbols=symbols)
    if labels.ndim == 1:
        classes, labels = np.unique(labels, return_inverse=True)
        need(len(classes) > 1, f"{name}: only one class, {classes[0]}")
        labels = labels.astype(np.int64)
        facts["classes"] = tuple(str(label) for label in classes.tolist())
        facts["n_classes"] = len(classes)
    split = random_split(name, len(tokens), seed) if split is None else np.asarray(split)
    fits = split.shape == labels.shape[:1]
    need(fits, f"{name}: split has shape {split.shape}, but x has {len(tokens)} rows")
    no_row(~np.isin(split, SPLITS), name, "its split is none of train, val, test")
    parts = []
    for part in SPLITS:
        rows = np.flatnonzero(split == part)
        need(len(rows) > 0, f"{name}: no row of split {part}")
        parts.append(Split(tokens[rows], labels[rows], lengths[rows]))
    train = parts[0]
    if tokens.ndim == 2:
        facts["vocab_size"] = vocab_size or int(tokens.max()) + 1
    else:
        real = np.arange(tokens.shape[1]) < train.lengths[:, None]
        facts["mean"], facts["std"] = moments(name, "channel", train.tokens[real])
    if labels.ndim == 2:
        facts["y_mean"], facts["y_std"] = moments(name, "target", train.labels)
    else:
        unseen = [facts["classes"][i] for i in np.setdiff1d(labels, train.labels)]
        found = ", ".join(unseen)[:60]
        hint = "to predict numbers, write them with decimals"
        need(not unseen, f"{name}: class {found} is not in the training split ({hint})")
    return Data(name, *parts, **facts)


def random_split(name, n, seed):
    """Names of splits (n,): a tenth of the rows is val, a tenth is test."""
    need(n >= 10, f"{name}: {n} examples are too few to split, expected 10 or more")
    order = np.random.RandomState([seed, 6]).permutation(n)
    split = np.full(n, "train")
    split[order[: n // 10]] = "val"
    split[order[n // 10 : n // 10 * 2]] = "test"
    say(f"{name}: split at random, 80/10/10, with seed {seed}")
    return split


def moments(name, what, values):
    """Mean and standard deviation of each column of (n, C), as tuples."""
    constant = np.flatnonzero(values.min(0) == values.max(0))
    where = ", ".join(map(str, constant))
    need(not where, f"{name}: {what} {where} is constant in the training split")
    mean = values.mean(0, dtype=np.float64)
    std = values.std(0, dtype=np.float64)
    return tuple(mean.tolist()), tuple(std.tolist())


def describe(data):
    """One line: examples, classes or targets, inputs."""
    parts = [getattr(data, part) for part in SPLITS]
    sizes = ", ".join(f"{len(part):,} {name}" for part, name in zip(parts, SPLITS, strict=True))
    goal = f"{data.n_classes} classes"
    if data.n_classes is None:
        goal = f"regression, targets per example: {len(data.y_mean)}"
    elif data.classes:
        goal += ": " + ", ".join(data.classes[:8])
        if data.n_classes > 8:
            goal += ", ..."
    kind = f"{data.vocab_size} symbols"
    if data.mean is not None:
        kind = f"{len(data.mean)}-channel values"
    lengths = np.concatenate([part.lengths for part in parts])
    length = f"{lengths.max():,}"
    if lengths.min() < lengths.max():
        length = f"{lengths.min():,} to {length}"
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
    max_len = about["max_len"]
    if path.suffix.lower() in TABLES:
        if symbols is None:
            reads_text = about["vocab_size"] == 256
        else:
            reads_text = all(len(symbol) == 1 for symbol in symbols[1:])
        need(reads_text and about["mean"] is None, f"{path}: text, but the run reads no text")
        texts, labels, _ = read_table(path, text_column, label_column, labeled=False)
        tokens, lengths = encode(path.name, texts, symbols, max_len)
    else:
        arrays = read_arrays(path)
        tokens, lengths = check_inputs(path.name, arrays["x"], arrays.get("lengths"))
        labels = arrays.get("y")
    check_kind(path.name, tokens, about)
    L = tokens.shape[1]
    fits = max_len is None or L <= max_len
    need(fits, f"{path}: length {L}, but the run reads at most {max_len}")
    if labels is not None:
        labels = known_labels(path.name, labels, len(tokens), about)
    return tokens, lengths, labels


def check_kind(name, tokens, about):
    """Refuse tokens (n, L) or values (n, L, C) that a run cannot read."""
    if about["mean"] is None:
        need(tokens.ndim == 2, f"{name}: these are values, but the run reads tokens (integers)")
        size = about["vocab_size"]
        no_row(tokens >= size, name, f"a token is not in the run's vocabulary, 0 .. {size - 1}")
    else:
        need(tokens.ndim == 3, f"{name}: these are tokens, but the run reads values (floats)")
        found, channels = tokens.shape[2], len(about["mean"])
        need(found == channels, f"{name}: {found} channels, but the run reads {channels}")


def known_labels(name, labels, n, about):
    """Labels as numbers of the classes of a run, (n,) int64, or as its targets (n, k) float32."""
    labels = np.asarray(labels)
    if about["n_classes"] is None:
        need(labels.dtype.kind in "iuf", f"{name}: the run predicts numbers, but labels are text")
        labels = check_labels(name, labels.astype(np.float64), n)
        found, k = labels.shape[1], len(about["y_mean"])
        need(found == k, f"{name}: {found} targets per example, but the run predicts {k}")
        return labels
    labels = check_labels(name, labels, n)
    need(labels.ndim == 1, f"{name}: the run predicts classes, but labels are decimal numbers")
    classes = about["classes"] or range(about["n_classes"])
    place = {str(label): i for i, label in enumerate(classes)}
    labels = [str(label) for label in labels.tolist()]
    unknown = sorted(set(labels) - set(place))
    need(not unknown, f"{name}: the run does not know class {', '.join(unknown)[:60]}")
    return np.array([place[label] for label in labels], np.int64)


# ---------------------------------------------------------------------------------------- checks


def need(ok, message):
    """Raise ValueError unless ok."""
    if not ok:
        raise ValueError(message)


def no_row(bad, name, reason):
    """Raise ValueError that names the first row of bad (n, ...) with anything True in it."""
    rows = np.flatnonzero(bad.reshape(len(bad), -1).any(1))
    if len(rows) > 0:
        raise ValueError(f"{name}, row {rows[0]}: {reason}")


def check_inputs(name, x, lengths):
    """Tokens (n, L) uint8 or int32, or values (n, L, C) float32, 0 at padding; lengths (n,).

    L is the longest length.
    """
    x = np.array(x)  # a copy
    need(x.dtype.kind in "iuf", f"{name}: x is {x.dtype}, expected integers or floats")
    need(x.ndim in (2, 3) and x.size > 0, f"{name}: x has shape {x.shape}, expected (n, L[, C])")
    n, L = x.shape[:2]
    lengths = np.full(n, L) if lengths is None else np.asarray(lengths)
    found = f"{lengths.dtype} {lengths.shape}"
    fits = lengths.shape == (n,) and lengths.dtype.kind in "iu"
    need(fits, f"{name}: lengths are {found}, expected integers {(n,)}")
    no_row((lengths < 1) | (lengths > L), name, f"its length is not in 1 .. {L}")
    x[np.arange(L) >= lengths[:, None]] = 0
    x = x[:, : lengths.max()]
    lengths = lengths.astype(np.int32)
    if x.ndim == 2 and x.dtype.kind in "iu":
        no_row(x < 0, name, "a negative token (integers are tokens; turn values into floats)")
        no_row(x >= MAX_VOCAB, name, f"a token above {MAX_VOCAB - 1:,}: number them from 0")
        return x.astype(np.uint8 if x.max() < 256 else np.int32), lengths
    x = x.astype(np.float32).reshape(*x.shape[:2], -1)
    no_row(~np.isfinite(x), name, "NaN or infinity in x")
    return x, lengths


def check_labels(name, y, n):
    """Targets (n, k) float32, or the classes as they are, integers or text (n,)."""
    y = np.asarray(y)
    need(y.dtype.kind in "iufU", f"{name}: y is {y.dtype}, expected integers, floats or text")
    need(y.shape[:1] == (n,), f"{name}: y has shape {y.shape}, but x has {n} rows")
    if y.dtype.kind == "f":
        need(y.ndim < 3, f"{name}: y has shape {y.shape}, expected (n,) or (n, k)")
        y = y.astype(np.float32).reshape(n, -1)
        no_row(~np.isfinite(y), name, "NaN or infinity in y")
        return y
    need(y.ndim == 1, f"{name}: y has shape {y.shape}, expected (n,); regression needs floats")
    no_row(np.char.str_len(np.char.strip(y.astype(str))) == 0, name, "its label is missing")
    return y


# -------------------------------------------------------------------------------- files, functions


def say(message):
    """Print on one of the processes that load the same data."""
    if os.environ.get("RANK", "0") == "0":
        print(message)


def read_arrays(path):
    """Return the arrays of a .npz file by name."""
    need(path.is_file(), f"{path}: no such file")
    need(zipfile.is_zipfile(path), f"{path}: not a .npz file, make it with numpy.savez")
    try:
        with np.load(path) as file:
            arrays = dict(file)
    except Exception as error:  # numpy, zipfile and zlib raise many kinds
        raise ValueError(f"{path}: {one_line(error)}; expected numbers or text") from error
    known = "x" in arrays and set(arrays) <= {"x", "y", "lengths", "split"}
    found = ", ".join(arrays)
    need(known, f"{path}: arrays {found}, expected x, y and optionally lengths and split")
    return arrays


def read_table(path, text_column, label_column, labeled=True):
    """Return texts, labels and names of splits of a .csv or .tsv file, None if it has none."""
    csv.field_size_limit(2**31 - 1)  # texts may be long
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    file = io.StringIO(decode(path), newline="")
    reader = csv.DictReader(file, delimiter=delimiter, strict=True)
    rows = []
    try:
        header = [name.strip() for name in reader.fieldnames or []]
        reader.fieldnames = header
        check_header(path, header, text_column, label_column, labeled)
        wanted = [name for name in (text_column, label_column, "split") if name in header]
        for row in reader:
            line = f"{path}, line {reader.line_num}"
            ragged = None in row or None in row.values()
            need(not ragged, f"{line}: expected {len(header)} fields, as in the first line")
            for name in wanted:
                field = row[name].strip()
                missing = field.lower() in ("", "nan", "inf", "-inf")
                need(not missing, f"{line}: {name} is {field or 'empty'}")
            rows.append(row)
    except csv.Error as error:
        line = reader.line_num + 1  # after the last good row
        raise ValueError(f"{path}, line {line}: {error}, check the quotes") from error
    need(rows, f"{path}: no examples after the first line")
    columns = {name: [row[name] for row in rows] for name in wanted}
    labels = None
    if label_column in columns:
        labels = parse(columns[label_column])
    return columns[text_column], labels, columns.get("split")


def decode(path):
    """Return the text of a UTF-8 file."""
    need(path.is_file(), f"{path}: no such file")
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 ({error.reason})") from error
    line = text.partition("\0")[0].count("\n") + 1
    need("\0" not in text, f"{path}, line {line}: a NUL byte, is this a text file?")
    return text


def check_header(path, header, text_column, label_column, labeled):
    """Refuse a table without the columns that are needed."""
    found = ", ".join(header)
    need(header, f"{path}: an empty file")
    need(len(set(header)) == len(header), f"{path}: two columns have one name: {found}")
    need(text_column in header, f"{path}: no column {text_column} (--text-column) in {found}")
    has_label = label_column in header or not labeled
    need(has_label, f"{path}: no column {label_column} (--label-column) in {found}")


def parse(labels):
    """(n,) labels as whole numbers, else as numbers, else as text."""
    for kind in (int, float):
        try:
            return np.array([kind(label) for label in labels])
        except ValueError:
            pass
    return np.array([label.strip() for label in labels])


def encode(name, texts, symbols, max_len):
    """Turn texts into tokens (n, L), places in symbols or bytes, and lengths (n,)."""
    if symbols is None:
        rows = [np.frombuffer(text.encode(), np.uint8) for text in texts]
    else:
        place = {symbol: i for i, symbol in enumerate(symbols)}
        rows = [np.array([place.get(symbol, 0) for symbol in text]) for text in texts]
    longest = max(len(row) for row in rows)
    max_len = longest if max_len is None else max_len
    n_cut = sum(len(row) > max_len for row in rows)
    if n_cut > 0:
        say(f"{name}: {n_cut:,} of {len(rows):,} texts were cut after {max_len:,} tokens")
    return pad([row[:max_len] for row in rows])


def call(task):
    """Return the `Data` that `file.py:function` returns."""
    path, _, function = task.rpartition(":")
    need(Path(path).is_file(), f"{path}: no such file")
    sys.path.append(str(Path(path).parent))  # its neighbors can be imported
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        data = getattr(module, function)()
    except Exception as error:
        raise ValueError(f"{task}: {one_line(error)}") from error
    need(isinstance(data, Data), f"{task} returned {type(data).__name__}, expected lra_data.Data")
    for part in SPLITS:
        split = getattr(data, part)
        tokens, _ = check_inputs(f"{task}, {part}", split.tokens, split.lengths)
        check_kind(f"{task}, {part}", tokens, vars(data))
    check(replace(data, name=task))
    return data


def one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
