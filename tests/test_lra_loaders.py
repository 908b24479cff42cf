"""lra_data.py: what is read from files. Published formats, broken files, archives, downloads."""

import hashlib
import http.server
import io
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import threading
import wave
import zlib
from pathlib import Path

import numpy as np
import pytest

import lra_data

BOM = b"\xef\xbb\xbf"

# ------------------------------------------------------------- small files in the published formats


def filtered(picture, kinds):
    """The lines of a PNG file; line y of the picture (side, side) is filtered by kinds[y]."""
    padded = np.pad(picture.astype(int), [(1, 0), (1, 0)])
    lines = b""
    for y, kind in enumerate(kinds):
        here = padded[y + 1, 1:]
        left = padded[y + 1, :-1]
        above = padded[y, 1:]
        corner = padded[y, :-1]
        sides = np.stack([left, above, corner])
        nearest = abs(left + above - corner - sides).argmin(0)
        paeth = np.take_along_axis(sides, nearest[None], 0)[0]
        guess = [0, left, above, (left + above) // 2, paeth][kind]
        lines += bytes([kind]) + ((here - guess) % 256).astype(np.uint8).tobytes()
    return lines


def png(picture, lines=None, head=None, crc=0):
    """A picture (side, side) as an 8-bit grayscale PNG file with all five filters."""
    side = len(picture)
    head = struct.pack(">IIBBBBB", *(head or (side, side, 8, 0, 0, 0, 0)))
    packed = zlib.compress(lines or filtered(picture, np.arange(side) % 5))
    chunks = [(b"IHDR", head), (b"IDAT", packed[:9]), (b"IDAT", packed[9:]), (b"IEND", b"")]
    content = b"\x89PNG\r\n\x1a\n"
    for kind, body in chunks:
        check = zlib.crc32(kind + body) ^ crc
        content += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)
    return content


def wav(n=16_000, channels=1, width=2, rate=16_000, seed=0):
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        samples = np.random.RandomState(seed).randint(-9999, 9999, n * channels * width // 2)
        file.writeframes(samples.astype("<i2").tobytes())
    return buffer.getvalue()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


PICTURES = np.random.RandomState(0).randint(0, 256, (30, 32, 32)).astype(np.uint8)


def make_pathfinder(root):
    folder = root / "pathfinder32/curv_contour_length_14"
    lines = ["", "", ""]
    for i, picture in enumerate(PICTURES):
        k = i % 3  # three folders of ten
        write(folder / f"imgs/{k}/sample_{i}.png", png(picture))
        lines[k] += f"imgs/{k} sample_{i}.png {i} {i % 2} 1.0 14 4 2 0.5 1 1\n"
    for k, text in enumerate(lines):
        write(folder / f"metadata/{k}.npy", text)


def make_listops(root):
    trees = ["( ( ( [MIN 3 ) 2 ) ] )\t2", "( ( ( [SM ( ( ( [MAX 1 ) 9 ) ] ) ) 4 ) ] )\t3", "5\t5"]
    for name in lra_data.SPLITS:
        write(root / f"listops-1000/basic_{name}.tsv", "Source\tTarget\n" + "\n".join(trees) + "\n")


def make_cifar(root):
    rng = np.random.RandomState(0)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        records = rng.randint(0, 256, (8, 3073)).astype(np.uint8)
        records[:, 0] = np.arange(8)
        write(root / f"cifar-10-batches-bin/{name}.bin", records.tobytes())


def make_imdb(root):
    for split in ("train", "test"):
        for i in range(24):
            text = "naïve film, " * (i + 1) + "α" * (i % 2) + "\n"
            write(root / f"aclImdb/{split}/{'pos' if i % 2 else 'neg'}/{i}_7.txt", text)


def make_aan(root):
    for split in ("train", "eval", "test"):
        lines = [f'{i % 2}.0\tP{i}\tQ{i}\tsay "{i}\t{"long " * i}"end\n' for i in range(6)]
        write(root / f"tsv_data/new_aan_pairs.{split}.tsv", "".join(lines))


def make_speech(root):
    root = root / "speech_commands_v0.02"
    for word, n in {"yes": 6, "no": 5, "_background_noise_": 1}.items():
        for i in range(n):
            write(root / f"{word}/{i}_nohash_0.wav", wav(16_000 - 1000 * i, seed=i))
    write(root / "validation_list.txt", "yes/0_nohash_0.wav\nno/1_nohash_0.wav\n")
    write(root / "testing_list.txt", "yes/2_nohash_0.wav\nno/3_nohash_0.wav\n")


MAKERS = {
    "listops": make_listops,
    "pathfinder32": make_pathfinder,
    "image": make_cifar,
    "text": make_imdb,
    "retrieval": make_aan,
    "speech": make_speech,
}


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """One directory per task with small files in the published layout."""
    roots = {}
    for task, make in MAKERS.items():
        roots[task] = tmp_path_factory.mktemp(task)
        make(roots[task])
    return roots


@pytest.fixture
def copy(trees, tmp_path):
    """copy(task) -> a directory with the task's files, to be changed."""

    def make(task):
        return shutil.copytree(trees[task], tmp_path / "files")

    return make


# ------------------------------------------------------------------------------------ what is read

PIXELS = (127.5,), (127.5,)
SCIFAR = (125.307, 122.961, 113.8575), (62.985, 61.965, 66.555)
PROPERTIES = {  # files, options, vocab_size, n_classes, (mean, std)
    "lattice": (None, {}, 2, 2, None),
    "listops": ("listops", {}, 15, 10, None),
    "listops-small": ("listops", {}, 15, 10, None),
    "listops-tiny": ("listops", {}, 15, 10, None),
    "text": ("text", {}, 256, 2, None),
    "text-characters": ("text", {"min_count": 1}, 14, 2, None),
    "retrieval": ("retrieval", {}, 256, 2, None),
    "retrieval-characters": ("retrieval", {"min_count": 1}, 18, 2, None),
    "image": ("image", {}, 256, 10, None),
    "image-real": ("image", {}, 256, 10, ((122.6,), (61.0,))),
    "scifar": ("image", {}, 256, 10, SCIFAR),
    "pathfinder32": ("pathfinder32", {}, 256, 2, PIXELS),
    "pathfinder32-easy": (None, {"n": 10, "processes": 1}, 256, 2, PIXELS),
    "pathfinder32-medium": (None, {"n": 10, "processes": 1}, 256, 2, PIXELS),
}


@pytest.mark.parametrize("task", PROPERTIES)
def test_classes_vocabulary_mean_and_std_of_every_task(task, trees, tmp_path):
    files, options, vocab_size, n_classes, normalization = PROPERTIES[task]
    if files:
        options = {"source": trees[files], **options}
    data = lra_data.load(task, tmp_path, **options)
    assert (data.name, data.vocab_size, data.n_classes) == (task, vocab_size, n_classes)
    if normalization is None:
        assert data.mean is None and data.std is None
        assert max(s.tokens.max() for s in (data.train, data.val, data.test)) < vocab_size
    else:
        assert data.mean == pytest.approx(normalization[0], abs=1e-9)
        assert data.std == pytest.approx(normalization[1], abs=1e-9)
    if data.symbols:
        assert len(data.symbols) == vocab_size
    for split in (data.train, data.val, data.test):
        assert split.labels.dtype == np.int64 and split.lengths.dtype == np.int32


def test_listops_written_and_read_is_the_same(tmp_path):
    made = lra_data.load("listops-tiny", tmp_path, n_train=200, n_val=9, n_test=9)
    for name in lra_data.SPLITS:
        split = getattr(made, name)
        text = "Source\tTarget\r\n"
        for row, label, length in zip(split.tokens, split.labels, split.lengths, strict=True):
            words = " ".join(made.symbols[token] for token in row[:length])
            text += f"( {words.replace(']', ') ]')} )\t{label}\r\n"
        write(tmp_path / f"files/listops/basic_{name}.tsv", text)
    read = lra_data.load("listops", tmp_path, source=tmp_path / "files")
    assert lra_data.checksum(read) == lra_data.checksum(made)


def test_pathfinder_png_come_back_exactly(trees, tmp_path):
    data = lra_data.load("pathfinder32", tmp_path, source=trees["pathfinder32"], processes=1)
    splits = (data.train, data.val, data.test)
    assert [len(split) for split in splits] == [24, 3, 3]
    assert data.train.tokens.shape == (24, 1024, 1)
    read = {}
    for split in splits:
        for row, label in zip(split.tokens, split.labels, strict=True):
            read[row.tobytes()] = label
    assert read == {picture.tobytes(): i % 2 for i, picture in enumerate(PICTURES)}
    other = lra_data.load("pathfinder32", tmp_path, 1, source=trees["pathfinder32"], processes=1)
    assert (other.train.tokens != data.train.tokens).any(), "the order depends on the seed"


def test_fewer_than_ten_pictures_are_refused(copy, tmp_path):
    root = copy("pathfinder32")
    for k in (0, 1):
        next(root.rglob(f"metadata/{k}.npy")).unlink()
    table = next(root.rglob("metadata/2.npy"))
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:9]))
    with pytest.raises(ValueError, match="length_14: 9 pictures, expected 10 or more"):
        lra_data.load("pathfinder32", tmp_path / "data", source=root, processes=1)


def test_the_one_png_that_was_published_empty_is_left_out(copy, tmp_path):
    root = copy("pathfinder32") / "pathfinder32"
    (root / "curv_contour_length_14").rename(root / "curv_baseline")
    table = root / "curv_baseline/metadata/0.npy"
    table.write_text(table.read_text() + "imgs/0 sample_172.png 172 1 1.0 6 2 2 0.5 1 1\n")
    (root / "curv_baseline/imgs/0/sample_172.png").touch()
    data = lra_data.load("pathfinder32-easy", tmp_path, source=root.parent, processes=1)
    assert sum(len(split) for split in (data.train, data.val, data.test)) == 30


def test_the_inner_tree_of_the_release_is_preferred(tmp_path):
    release = tmp_path / "lra_release"
    for place, answer in [(tmp_path, 1), (release, 2), (release / "lra_release", 3)]:
        make_listops(place)
        write(place / "listops-1000/basic_val.tsv", f"Source\tTarget\n{answer}\t{answer}\n")
    for source in (tmp_path, release, release / "lra_release"):
        data = lra_data.load("listops", tmp_path / "cache", source=source)
        assert data.val.labels.tolist() == [3]


def test_image_in_gray_by_both_formulas_and_in_color(trees, tmp_path):
    source = trees["image"]
    symbols = lra_data.load("image", tmp_path, source=source).test.tokens
    numbers = lra_data.load("image-real", tmp_path, source=source).test.tokens
    color = lra_data.load("scifar", tmp_path, source=source).test.tokens
    assert (symbols.shape, numbers.shape, color.shape) == ((8, 1024), (8, 1024, 1), (8, 1024, 3))
    content = (source / "cifar-10-batches-bin/test_batch.bin").read_bytes()
    assert color[0, 5].tolist() == [content[1 + 1024 * c + 5] for c in range(3)]
    red, green, blue = color.astype(int).transpose(2, 0, 1)
    weighted = 0.2989 * red + 0.5870 * green + 0.1140 * blue
    assert (symbols == np.floor(weighted / 255 * 255.5)).mean() > 0.999
    assert (numbers[..., 0] == (19595 * red + 38470 * green + 7471 * blue + 2**15) // 2**16).all()
    assert (symbols != numbers[..., 0]).any()


def test_image_validation_is_held_out_of_train(trees, tmp_path):
    first = lra_data.load("image", tmp_path, 0, source=trees["image"])
    other = lra_data.load("image", tmp_path, 1, source=trees["image"])
    assert [len(first.train), len(first.val), len(first.test)] == [36, 4, 8]
    rows = [row.tobytes() for split in (first.train, first.val) for row in split.tokens]
    again = [row.tobytes() for split in (other.train, other.val) for row in split.tokens]
    assert len(set(rows)) == 40 and sorted(rows) == sorted(again)
    assert first.val.tokens.tobytes() != other.val.tokens.tobytes()
    assert first.test.tokens.tobytes() == other.test.tokens.tobytes()


def test_text_by_bytes_and_by_characters(trees, tmp_path):
    source = trees["text"]
    in_bytes = lra_data.load("text", tmp_path, source=source, max_len=100)
    characters = lra_data.load("text-characters", tmp_path, source=source, max_len=100)
    assert (len(in_bytes.train), len(in_bytes.val), len(in_bytes.test)) == (22, 2, 24)
    row = in_bytes.test.tokens[0][: in_bytes.test.lengths[0]]
    assert bytes(row).decode() == "naïve film, \n"  # neg/0, the first of the test files
    assert characters.test.lengths[0] == in_bytes.test.lengths[0] - 1 == 13
    read = "".join(characters.symbols[t] for t in characters.test.tokens[0][:13])
    assert read == "naïve film, <unk>"
    assert in_bytes.train.lengths.max() == 100 == characters.train.lengths.max()
    assert "α" not in characters.symbols and characters.symbols[0] == "<unk>"
    assert characters.test.labels.tolist() == [0] * 12 + [1] * 12


@pytest.mark.parametrize("split", ["test", "val"])
def test_the_vocabulary_is_built_on_train_alone(split, copy, tmp_path):
    root = copy("text")
    paths = sorted(root.glob("aclImdb/test/*/*.txt"))
    if split == "val":
        train = sorted(root.glob("aclImdb/train/*/*.txt"))
        paths = [train[i] for i in np.random.RandomState([0, 5]).permutation(24)[-2:]]
    for path in paths:
        path.write_text("ß" * 20, encoding="utf-8")
    data = lra_data.load("text-characters", tmp_path, source=root)
    assert "ß" not in data.symbols
    assert (getattr(data, split).tokens == 0).all()


@pytest.mark.parametrize("task", ["retrieval", "retrieval-characters"])
def test_retrieval_has_two_documents(task, trees, tmp_path):
    data = lra_data.load(task, tmp_path, source=trees["retrieval"], max_len=20, min_count=1)
    assert data.train.tokens.shape == (6, 2, 20)
    assert data.train.lengths.tolist()[1] == [6, 9]
    assert data.train.labels.tolist() == [0, 1, 0, 1, 0, 1]
    symbols = data.symbols or [chr(i) for i in range(256)]
    texts = ["".join(symbols[token] for token in row) for row in data.train.tokens[1]]
    assert texts[0].startswith('say "1') and texts[1].startswith('long "end')


@pytest.mark.parametrize(("task", "stride"), [("speech", 1), ("speech-8k", 2)])
def test_speech_follows_the_official_lists(task, stride, trees, tmp_path):
    data = lra_data.load(task, tmp_path, source=trees["speech"])
    assert (data.vocab_size, data.n_classes) == (None, 2)
    assert data.train.tokens.dtype == np.int16
    assert (len(data.train), len(data.val), len(data.test)) == (7, 2, 2)
    assert data.val.labels.tolist() == [1, 0] and data.test.labels.tolist() == [1, 0]
    assert data.test.lengths.tolist() == [14_000 // stride, 13_000 // stride]
    samples = np.random.RandomState(2).randint(-9999, 9999, 14_000)[::stride]
    assert (data.test.tokens[0, : len(samples), 0] == samples).all()
    clips = [row[:n, 0] for row, n in zip(data.train.tokens, data.train.lengths, strict=True)]
    whole = np.concatenate(clips).astype(float)
    assert abs(data.mean[0] - whole.mean()) < 1e-6 and abs(data.std[0] / whole.std() - 1) < 1e-9


def test_a_cache_beside_the_words_is_no_word(trees, tmp_path):
    shutil.copytree(trees["speech"] / "speech_commands_v0.02", tmp_path, dirs_exist_ok=True)
    first, again = [lra_data.load("speech", tmp_path, source=tmp_path) for _ in range(2)]
    assert first.n_classes == again.n_classes == 2
    assert lra_data.checksum(first) == lra_data.checksum(again)


@pytest.mark.parametrize("task", MAKERS)
def test_every_task_is_read_from_a_tar_archive_too(task, trees, tmp_path, monkeypatch):
    archive = tmp_path / "packed.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for path in trees[task].iterdir():
            tar.add(path, path.name)
    expected = lra_data.checksum(lra_data.load(task, tmp_path / "other", source=trees[task]))
    assert lra_data.checksum(lra_data.load(task, tmp_path / "data", source=archive)) == expected
    monkeypatch.setattr(tarfile, "open", None)  # the unpacked tree is used again
    assert lra_data.checksum(lra_data.load(task, tmp_path / "data", source=archive)) == expected


@pytest.mark.parametrize(("task", "left"), [("listops", 2), ("speech", 1)])
def test_changed_files_are_read_again(task, left, copy, tmp_path):
    root = copy(task)
    lra_data.load(task, tmp_path / "data", source=root)
    path = sorted(root.rglob("*val*"))[0]
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert len(lra_data.load(task, tmp_path / "data", source=root).val) == left


# -------------------------------------------------------------- byte order marks, line ends, locale

TEXTS = {
    "listops": "listops-1000/*.tsv",
    "pathfinder32": "*/*/metadata/*.npy",
    "text": "aclImdb/*/*/*.txt",
    "retrieval": "tsv_data/*.tsv",
    "speech": "*/*_list.txt",
}


@pytest.mark.parametrize("change", ["byte order mark", "line ends"])
@pytest.mark.parametrize("task", TEXTS)
def test_byte_order_marks_and_windows_line_ends_change_nothing(task, change, trees, copy, tmp_path):
    if (task, change) == ("text", "line ends"):
        return  # here they are text
    root = copy(task)
    for path in root.glob(TEXTS[task]):
        content = path.read_bytes()
        changed = BOM + content if change == "byte order mark" else content.replace(b"\n", b"\r\n")
        path.write_bytes(changed)
    data = lra_data.load(task, tmp_path / "data", source=root)
    plain = lra_data.load(task, tmp_path / "plain", source=trees[task])
    assert lra_data.checksum(data) == lra_data.checksum(plain)


def test_quotes_and_carriage_returns_inside_a_document_are_text(copy, tmp_path):
    root = copy("retrieval")
    write(root / PAIRS, b'1.0\tA\tB\t"a\rb\t"c"\r\n')
    data = lra_data.load("retrieval", tmp_path, source=root)
    documents = zip(data.train.tokens[0], data.train.lengths[0], strict=True)
    assert [bytes(row[:n]) for row, n in documents] == [b'"a\rb', b'"c"']


def test_the_locale_changes_nothing(trees):
    """The text files are UTF-8, whatever Python would assume."""
    code = "import lra_data as l, sys; print(l.checksum(l.load('text', source=sys.argv[1])))"
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    line = [sys.executable, "-X", "warn_default_encoding", "-W", "error::EncodingWarning"]
    line += ["-c", code, str(trees["text"])]
    root = Path(lra_data.__file__).parent
    out = subprocess.run(line, capture_output=True, text=True, cwd=root, env=environment)
    assert out.stdout.strip() == lra_data.checksum(lra_data.load("text", source=trees["text"]))


# ------------------------------------------------------------------------------------ broken files

TREE = "listops-1000/basic_train.tsv"
PAIRS = "tsv_data/new_aan_pairs.train.tsv"
BATCH = "cifar-10-batches-bin/data_batch_3.bin"
REVIEW = "aclImdb/train/pos/1_7.txt"
CLIP = "speech_commands_v0.02/yes/1_nohash_0.wav"
LISTS = "speech_commands_v0.02/validation_list.txt"
TESTS = "speech_commands_v0.02/testing_list.txt"
SAMPLE = "pathfinder32/curv_contour_length_14/imgs/2/sample_5.png"
META = "pathfinder32/curv_contour_length_14/metadata/1.npy"
HEAD = "Source\tTarget\n"
GRAY = np.arange(1024).reshape(32, 32) % 251

BROKEN = {
    # listops: a header, then a tree, a tab and its value per line
    "listops-empty": (TREE, b"", "no examples; expected Source, Target"),
    "listops-header-only": (TREE, HEAD, "no examples"),
    "listops-no-header": (TREE, "5\t5\n", ":1: header .*expected Source"),
    "listops-other-header": (TREE, "Source,Target\n5,5\n", ":1: header .*expected Source"),
    "listops-missing-column": (TREE, HEAD + "5\n", ":2: .*got 1"),
    "listops-extra-column": (TREE, HEAD + "5\t5\t5\n", ":2: .*expected 2"),
    "listops-unknown-token": (TREE, HEAD + "5\t5\n[AVG 1 ]\t1\n", ":3: unknown token"),
    "listops-glued-token": (TREE, HEAD + "[MIN1 2 ]\t1\n", ":2: unknown token"),
    "listops-unclosed": (TREE, HEAD + "[MIN 1 2\t1\n", ":2: 1 operators left open"),
    "listops-closed-twice": (TREE, HEAD + "[MIN 1 ] ]\t1\n", ":2: '\\]' closes no operator"),
    "listops-no-arguments": (TREE, HEAD + "[SM ]\t0\n", ":2: '\\]' closes no operator"),
    "listops-two-roots": (TREE, HEAD + "1 2\t1\n", ":2: 2 roots"),
    "listops-no-tree": (TREE, HEAD + "\t1\n", ":2: 0 roots"),
    "listops-wrong-label": (TREE, HEAD + "[MIN 1 2 ]\t2\n", ":2: label '2', but the tree is 1"),
    "listops-label-text": (TREE, HEAD + "5\tfive\n", ":2: label 'five'"),
    "listops-cut": (TREE, HEAD + "5\t5\n5\t5", ":3: no end of line"),
    "listops-not-utf8": (TREE, HEAD.encode() + b"\xff\t5\n", ":2: .*utf-8"),
    "listops-binary": (TREE, bytes(range(256)), ":1: "),
    # pathfinder: png and text metadata
    "png-cut": (SAMPLE, png(GRAY)[:200], "unpack_from requires"),
    "png-empty": (SAMPLE, b"", "expected an 8-bit grayscale PNG file"),
    "png-signature": (SAMPLE, b"GIF89a" + png(GRAY)[6:], "starts with .*GIF"),
    "png-bit-flip": (SAMPLE, png(GRAY, crc=1), "damaged at byte 8"),
    "png-wrong-size": (SAMPLE, png(GRAY[:31, :31]), "expected .* of 32 x 32"),
    "png-color": (SAMPLE, png(GRAY, head=(32, 32, 8, 2, 0, 0, 0)), "header .* 8-bit grayscale"),
    "png-16-bit": (SAMPLE, png(GRAY, head=(32, 32, 16, 0, 0, 0, 0)), "header .* 8-bit"),
    "png-interlaced": (SAMPLE, png(GRAY, head=(32, 32, 8, 0, 0, 0, 1)), "header .* 8-bit"),
    "png-few-lines": (SAMPLE, png(GRAY, lines=bytes(33 * 31)), "size 1023"),
    "png-many-lines": (SAMPLE, png(GRAY, lines=bytes(33 * 33)), "size 1089"),
    "png-unknown-filter": (SAMPLE, png(GRAY, lines=b"\5" + bytes(33 * 32 - 1)), "filter 5"),
    "png-no-header": (SAMPLE, png(GRAY)[:8] + png(GRAY)[33:], "IHDR"),
    "metadata-short-line": (META, "imgs/0 sample_0.png 0\n", "1.npy:1: .*expected folder"),
    "metadata-label": (META, "imgs/0 sample_0.png 0 2 1.0\n", "1.npy:1: '2'.*label 0 or 1"),
    "metadata-numpy": (META, b"\x93NUMPY\1\0v\0", "1.npy:1: .*utf-8"),
    "metadata-empty": (META, b"", "1.npy: no examples"),
    "metadata-missing-file": (META, "imgs/9 sample_0.png 0 1 1.0\n", "imgs/9/sample_0.png: "),
    # cifar: records of 3073 bytes
    "cifar-empty": (BATCH, b"", "no records; expected CIFAR-10 records of 3073 bytes"),
    "cifar-cut": (BATCH, bytes(3073 * 4 - 1), "size 12291 .*expected CIFAR-10"),
    "cifar-label": (BATCH, b"\x0a" + bytes(3072), "label 10"),
    "cifar-pickle": (BATCH, b"\x80\x02}q\x01(U\x0bbatch_labelq", "expected CIFAR-10 records"),
    # text
    "text-not-utf8": (REVIEW, b"a \xe9 b", "expected UTF-8"),
    "text-empty": (REVIEW, b"", "empty, expected a review"),
    # retrieval: five columns
    "pairs-columns": (PAIRS, "1.0\tA\tB\ttext\n", ":1: .*got 4.* expected label"),
    "pairs-label": (PAIRS, "2.0\tA\tB\ta\tb\n", ":1: '2.0'; expected label 0.0 or 1.0"),
    "pairs-empty": (PAIRS, b"", "no examples"),
    "pairs-empty-text": (PAIRS, "1.0\tA\tB\ta\t\n", ":1: an empty document"),
    "pairs-cut": (PAIRS, "1.0\tA\tB\ta\tb\n1.0\tA\tB\ta\tb", ":2: no end of line"),
    "pairs-not-utf8": (PAIRS, b"1.0\tA\tB\ta\t\xc3\n", ":1: .*utf-8"),
    # speech: one channel, 16 bit, 16 kHz, at most a second
    "wav-empty": (CLIP, b"", "EOFError; expected a wav file"),
    "wav-cut": (CLIP, wav()[:-1000], "in 31000 bytes"),
    "wav-cut-header": (CLIP, wav()[:20], "expected a wav file"),
    "wav-stereo": (CLIP, wav(100, channels=2), "rate .2, 2, 16000"),
    "wav-32-bit": (CLIP, wav(100, width=4), "rate .1, 4, 16000"),
    "wav-44-kHz": (CLIP, wav(100, rate=44_100), "rate .1, 2, 44100"),
    "wav-too-long": (CLIP, wav(16_001), "16001 samples"),
    "wav-no-samples": (CLIP, wav(0), "0 samples"),
    "wav-is-text": (CLIP, "RIFF nothing", "expected a wav file"),
    "list-unknown-file": (LISTS, "yes/99.wav\n", "names ..yes/99.wav.*expected files below"),
    "list-empty": (LISTS, b"", "expected files below"),
    "list-not-utf8": (LISTS, b"\xff", "expected UTF-8"),
    "list-twice": (TESTS, "yes/0_nohash_0.wav\n", "names a clip twice, or one of .*validation"),
}
OWNER = {"png": "pathfinder32", "metadata": "pathfinder32", "cifar": "image", "pairs": "retrieval"}
OWNER |= {"wav": "speech", "list": "speech", "listops": "listops", "text": "text"}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_named_with_its_fault(case, copy, tmp_path):
    name, content, reason = BROKEN[case]
    task = OWNER[case.split("-")[0]]
    root = copy(task)
    write(root / name, content)
    options = {"processes": 1} if task == "pathfinder32" else {}
    with pytest.raises(ValueError, match=f"(?s){reason}") as caught:
        lra_data.load(task, tmp_path / "data", source=root, **options)
    if case != "metadata-missing-file":
        assert str(caught.value).startswith(str(root / name))
        assert str(caught.value).count(str(root / name)) == 1, "the file is named twice"
    assert not list((tmp_path / "data").glob("*/*.npz")), "a part of the cache is left behind"


def test_a_repaired_picture_is_read_the_next_time(copy, tmp_path):
    root = copy("pathfinder32")
    good = (root / SAMPLE).read_bytes()
    (root / SAMPLE).write_bytes(b"")
    options = dict(source=root, processes=1)
    with pytest.raises(ValueError, match=r"sample_5\.png"):
        lra_data.load("pathfinder32", tmp_path / "data", **options)
    (root / SAMPLE).write_bytes(good)
    data = lra_data.load("pathfinder32", tmp_path / "data", **options)
    assert lra_data.checksum(data) == lra_data.checksum(
        lra_data.load("pathfinder32", tmp_path / "other", **options)
    )


@pytest.mark.parametrize("task", MAKERS)
def test_a_missing_tree_names_the_expected_layout(task, tmp_path):
    with pytest.raises(ValueError, match=r"expected .* in it; published as http"):
        lra_data.load(task, tmp_path, source=tmp_path)
    with pytest.raises(ValueError, match=r"nowhere: expected "):
        lra_data.load(task, tmp_path, source=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("listops", "basic_test.tsv"),
        ("image", "test_batch.bin"),
        ("retrieval", "new_aan_pairs.eval.tsv"),
        ("speech", "testing_list.txt"),
        ("pathfinder32", "sample_7.png"),
    ],
)
@pytest.mark.parametrize("replacement", ["nothing", "a folder"])
def test_a_missing_second_file_is_named(task, name, replacement, copy, tmp_path):
    path = next(copy(task).rglob(name))
    path.unlink()
    if replacement == "a folder":
        path.mkdir()
    with pytest.raises(ValueError, match=rf"{name}: .*(No such file|Is a directory)"):
        lra_data.load(task, tmp_path / "data", source=tmp_path / "files")


def test_a_folder_without_reviews_is_named(copy, tmp_path):
    root = copy("text")
    shutil.rmtree(root / "aclImdb/test/pos")
    with pytest.raises(ValueError, match=r"test/pos: expected \.txt files with reviews"):
        lra_data.load("text", tmp_path, source=root)


def test_too_few_examples_to_hold_a_tenth_out_are_refused(copy, tmp_path):
    root = copy("text")
    for path in sorted(root.glob("aclImdb/train/*/*"))[2:-2]:
        path.unlink()
    with pytest.raises(ValueError, match="4 training examples: expected at least 10"):
        lra_data.load("text", tmp_path, source=root)


# -------------------------------------------------------------------------- random bytes and cuts


def parse_png(path):
    return lra_data.unfilter(lra_data.read_png(path, 32)[None])


def parse_cache(path):
    return lra_data.cached(path.parent, None)


def npz():
    buffer = io.BytesIO()
    np.savez(buffer, tokens=np.zeros((9, 5), np.uint8), labels=np.arange(9), lengths=np.arange(9))
    return buffer.getvalue()


VALID = {
    parse_png: ("file.png", png(GRAY)),
    lra_data.read_wav: ("file.wav", wav(400)),
    lra_data.read_listops: ("file.tsv", (HEAD + "[MIN 1 2 ]\t1\n5\t5\n").encode()),
    lra_data.read_text: ("file.txt", b"text"),
    parse_cache: ("val.npz", npz()),
}


@pytest.mark.parametrize("parse", VALID, ids=lambda parse: parse.__name__)
def test_random_bytes_are_parsed_or_refused(parse, tmp_path):
    """3 x 50 files: noise, a valid file with bytes changed, a valid file cut. Only ValueError."""
    name, valid = VALID[parse]
    for split in lra_data.SPLITS:  # parse_cache reads three files
        (tmp_path / f"{split}.npz").write_bytes(valid)
    path = tmp_path / name
    path.write_bytes(valid)
    parse(path)
    rng = np.random.RandomState(0)
    refused = 0
    for trial in range(150):
        content = bytearray(valid)
        if trial % 3 == 0:
            content = rng.bytes(rng.randint(0, 300))
        elif trial % 3 == 1:
            for place in rng.randint(0, len(content), rng.randint(1, 9)):
                content[place] = rng.randint(0, 256)
        else:
            content = content[: rng.randint(0, len(content))]
        path.write_bytes(content)
        try:
            parse(path)
        except ValueError as error:
            assert str(error).startswith(str(path))
            refused += 1
    assert refused > 50


# ----------------------------------------------------------------------------- archives, downloads


def tar_of(**member):
    """A tar file with one good file and one member as given."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for fields in (dict(name="good.txt"), member):
            info = tarfile.TarInfo()
            for key, value in fields.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(b""))
    return buffer.getvalue()


ARCHIVES = {
    "above": tar_of(name="../evil.txt"),
    "hidden-above": tar_of(name="folder/../../evil.txt"),
    "link": tar_of(name="link", type=tarfile.SYMTYPE, linkname="/etc"),
    "link-above": tar_of(name="link", type=tarfile.SYMTYPE, linkname="../evil.txt"),
    "hard-link": tar_of(name="link", type=tarfile.LNKTYPE, linkname="../evil.txt"),
    "device": tar_of(name="device", type=tarfile.CHRTYPE),
    "pipe": tar_of(name="pipe", type=tarfile.FIFOTYPE),
    "cut": tar_of(name="other")[:60],
    "no-checksum": tar_of(name="other")[:-8],
    "wrong-checksum": tar_of(name="other")[:-8] + b"12345678",
    "flipped": tar_of(name="other")[:30] + b"\xff\xff" + tar_of(name="other")[32:],
    "empty": b"",
    "noise": bytes(range(256)) * 40,
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_archives_stay_inside_their_folder(case, tmp_path):
    archive = tmp_path / "in/archive.tar.gz"
    write(archive, ARCHIVES[case])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"(?s)archive\.tar\.gz: .*expected a whole tar"):
        lra_data.load("image", tmp_path / "data", source=archive)
    left = [path for path in tmp_path.rglob("*") if path not in before and path.is_file()]
    assert not left and not (tmp_path / "evil.txt").exists()


def test_an_absolute_path_in_an_archive_lands_inside(tmp_path):
    name = f"{tmp_path}/evil.txt"
    write(tmp_path / "archive.tar.gz", tar_of(name=name))
    folder = lra_data.unpack(tmp_path / "archive.tar.gz", tmp_path / "data")
    assert not (tmp_path / "evil.txt").exists()
    assert (folder / name.lstrip("/")).exists()


@pytest.fixture
def server():
    """A loopback server: /whole, /cut (half of what it announces), /refused."""
    content = bytes(range(256)) * 5000

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.split("/")[1]
            if name == "refused":
                return self.send_error(403)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if name == "cut" else content)

        def log_message(self, *args):
            pass

    serving = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=serving.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{serving.server_port}", hashlib.sha256(content).hexdigest()
    serving.shutdown()
    thread.join()
    serving.server_close()


def test_a_whole_download_arrives(server, tmp_path, monkeypatch):
    url, sha256 = server
    monkeypatch.setitem(lra_data.SHA256, f"{url}/whole/a.tar.gz", sha256)
    path = lra_data.download(f"{url}/whole/a.tar.gz", tmp_path / "data")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256
    assert [each.name for each in path.parent.iterdir()] == ["a.tar.gz"]
    again = lra_data.download(f"{url}/refused/a.tar.gz", tmp_path / "data")
    assert again == path, "what is there is fetched again"


@pytest.mark.parametrize(
    ("name", "sha256", "reason"),
    [
        ("cut", None, "640000 bytes came, not 1280000"),
        ("nowhere", None, "refused"),
        ("refused", None, "403"),
        ("whole", "0" * 64, "sha256 is .*, not 000"),
    ],
)
def test_a_failed_download_leaves_nothing(name, sha256, reason, server, tmp_path, monkeypatch):
    host = "http://127.0.0.1:9" if name == "nowhere" else server[0]
    url = f"{host}/{name}/a.tar.gz"
    if sha256:
        monkeypatch.setitem(lra_data.SHA256, url, sha256)
    with pytest.raises(ValueError, match=f"{url}: .*{reason}.*put it at .*--source"):
        lra_data.download(url, tmp_path / "data")
    assert not list((tmp_path / "data").iterdir())


def test_what_download_leaves_is_found(trees, tmp_path):
    name = lra_data.CIFAR.split("/")[-1]
    with tarfile.open(tmp_path / name, "w:gz") as tar:
        tar.add(trees["image"] / "cifar-10-batches-bin", "cifar-10-batches-bin")
    assert len(lra_data.load("image", tmp_path).test) == 8
