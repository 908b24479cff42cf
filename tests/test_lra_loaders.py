"""lra_data.py: what is read from files. Published formats, broken files, archives, downloads."""

import hashlib
import io
import shutil
import sys
import tarfile
import wave

import numpy as np
import pytest
from PIL import Image

import lra_data

# ------------------------------------------------------------- small files in the published formats


def png(pixels, mode="L", form="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, form)
    return buffer.getvalue()


def wav(n=16_000, channels=1, width=2, rate=16_000, seed=0):
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        samples = np.random.RandomState(seed).randint(-9999, 9999, n * channels * width // 2)
        file.writeframes(samples.astype("<i2").tobytes())
    return buffer.getvalue()


def write(path, content):
    """None: remove the file."""
    if content is None:
        path.unlink()
        return
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
            text = "α" * (i % 2) + "naïve film, " * (i + 1) + "\n"
            write(root / f"aclImdb/{split}/{'pos' if i % 2 else 'neg'}/{i}_7.txt", text)


def make_aan(root):
    for split, n in [("train", 6), ("eval", 4), ("test", 2)]:
        # not csv: quotes and carriage returns are text
        lines = [f'{i % 2}.0\tP{i}\tQ{i}\t"say\r{i}\t{"long " * i}"end"\n' for i in range(n)]
        write(root / f"tsv_data/new_aan_pairs.{split}.tsv", "".join(lines))


def make_speech(root):
    root = root / "speech_commands_v0.02"
    clips = {"yes": 6, "no": 5, "dog": 1, "cat": 1, "bed": 1, "_background_noise_": 1}
    for word, n in clips.items():
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
    root = tmp_path_factory.mktemp("published")
    for task, make in MAKERS.items():
        make(root / task)
    return root


@pytest.fixture
def copy(trees, tmp_path):
    """copy(task) -> a directory with the task's files, to be changed."""
    return lambda task: shutil.copytree(trees / task, tmp_path / "files" / task)


# ------------------------------------------------------------------------------------ what is read

PIXELS = (127.5,), (127.5,)
SCIFAR = (125.307, 122.961, 113.8575), (62.985, 61.965, 66.555)
SYMBOLS = None, None
PROPERTIES = {  # vocab_size, n_classes, (mean, std)
    "lattice": (2, 2, SYMBOLS),
    "listops": (15, 10, SYMBOLS),
    "listops-small": (15, 10, SYMBOLS),
    "listops-tiny": (15, 10, SYMBOLS),
    "text": (256, 2, SYMBOLS),
    "text-characters": (14, 2, SYMBOLS),
    "retrieval": (256, 2, SYMBOLS),
    "retrieval-characters": (19, 2, SYMBOLS),
    "image": (256, 10, SYMBOLS),
    "image-real": (256, 10, ((122.6,), (61.0,))),
    "scifar": (256, 10, SCIFAR),
    "pathfinder32": (256, 2, PIXELS),
}


@pytest.mark.parametrize("task", PROPERTIES)
def test_classes_vocabulary_mean_and_std_of_every_task(task, trees, tmp_path, monkeypatch):
    monkeypatch.setattr(lra_data, "MIN_COUNT", 1)
    files = trees / task.replace("scifar", "image").split("-")[0]
    options = {"source": files} if files.exists() else {}
    data = lra_data.load(task, tmp_path, **options)
    assert (data.vocab_size, data.n_classes, (data.mean, data.std)) == PROPERTIES[task]
    assert data.name == task
    assert data.symbols is None or len(data.symbols) == data.vocab_size
    for split in (data.train, data.val, data.test):
        assert split.labels.dtype == np.int64 and split.lengths.dtype == np.int32
        assert split.tokens.max() < data.vocab_size


def test_listops_is_read_without_its_parentheses(trees, tmp_path):
    data = lra_data.load("listops", tmp_path, source=trees / "listops")
    tree = data.val.tokens[1][: data.val.lengths[1]]
    assert [data.symbols[token] for token in tree] == "[SM [MAX 1 9 ] 4 ]".split()
    assert data.val.labels.tolist() == [2, 3, 5]


def test_pathfinder_png_come_back_exactly_in_an_order_that_depends_on_the_seed(trees, tmp_path):
    data = lra_data.load("pathfinder32", tmp_path, 1, source=trees / "pathfinder32")
    splits = (data.train, data.val, data.test)
    assert [len(split) for split in splits] == [24, 3, 3]
    published = np.arange(30).reshape(10, 3).T.flatten()  # folder by folder
    order = published[np.random.RandomState([1, 4]).permutation(30)]
    tokens = np.concatenate([split.tokens for split in splits])
    assert (tokens == PICTURES[order].reshape(30, 1024, 1)).all()
    assert (np.concatenate([split.labels for split in splits]) == order % 2).all()


def test_a_missing_pillow_is_named(trees, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ValueError, match=r"sample_\d+.png needs Pillow: pip install pillow$"):
        lra_data.load("pathfinder32", tmp_path, source=trees / "pathfinder32")


def test_the_one_png_that_was_published_empty_is_left_out(copy, tmp_path):
    root = copy("pathfinder32") / "pathfinder32"
    (root / "curv_contour_length_14").rename(root / "curv_baseline")
    table = root / "curv_baseline/metadata/0.npy"
    table.write_text(table.read_text() + "imgs/0 sample_172.png 172 1 1.0 6 2 2 0.5 1 1\n")
    (root / "curv_baseline/imgs/0/sample_172.png").touch()
    data = lra_data.load("pathfinder32-easy", tmp_path, source=root.parent)
    assert sum(len(split) for split in (data.train, data.val, data.test)) == 30


def test_symbols_are_characters_that_occur_fifteen_times():
    symbols = lra_data.vocabulary(["a" * 14, "b" * 8, "c" * 99 + "b" * 7])
    assert symbols == ("<unk>", "c", "b")


def test_the_inner_tree_of_the_release_is_preferred(tmp_path):
    release = tmp_path / "lra_release"
    for place, answer in [(tmp_path, 1), (release, 2), (release / "lra_release", 3)]:
        make_listops(place)
        write(place / "listops-1000/basic_val.tsv", f"Source\tTarget\n{answer}\t{answer}\n")
    for source in (tmp_path, release, release / "lra_release"):
        data = lra_data.load("listops", tmp_path / "cache", source=source)
        assert data.val.labels.tolist() == [3]


def test_image_in_gray_by_both_formulas_and_in_color(trees, tmp_path):
    source = trees / "image"
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


def test_a_tenth_of_the_pictures_is_held_out(trees, tmp_path):
    data = lra_data.load("scifar", tmp_path, 1, source=trees / "image")
    assert [len(data.train), len(data.val), len(data.test)] == [36, 4, 8]
    batches = sorted((trees / "image/cifar-10-batches-bin").glob("data_batch_*"))
    records = np.stack([np.fromfile(path, np.uint8) for path in batches]).reshape(40, 3073)
    records = records[np.random.RandomState([1, 5]).permutation(40)]
    tokens = np.concatenate([data.train.tokens, data.val.tokens])
    assert (tokens == records[:, 1:].reshape(40, 3, 1024).swapaxes(1, 2)).all()
    assert (np.concatenate([data.train.labels, data.val.labels]) == records[:, 0]).all()


def test_text_by_bytes_and_by_characters(trees, tmp_path):
    source = trees / "text"
    in_bytes = lra_data.load("text", tmp_path, source=source, max_len=100)
    characters = lra_data.load("text-characters", tmp_path, source=source, max_len=100)
    assert (len(in_bytes.train), len(in_bytes.val), len(in_bytes.test)) == (22, 2, 24)
    row = in_bytes.test.tokens[0][: in_bytes.test.lengths[0]]
    assert bytes(row).decode() == "naïve film, \n"  # neg/0, the first of the test files
    assert characters.test.lengths[0] == in_bytes.test.lengths[0] - 1 == 13
    read = "".join(characters.symbols[t] for t in characters.test.tokens[0][:13])
    assert read == "naïve film, <unk>"
    assert in_bytes.train.lengths.max() == 100 == characters.train.lengths.max()
    assert characters.test.labels.tolist() == [0] * 12 + [1] * 12
    assert ((in_bytes.train.tokens[:, 0] == "α".encode()[0]) == in_bytes.train.labels).all()


def test_the_vocabulary_is_built_on_train_alone(copy, tmp_path):
    root = copy("text")
    train = sorted(root.glob("aclImdb/train/*/*.txt"))
    val = [train[i] for i in np.random.RandomState([0, 5]).permutation(24)[-2:]]
    for path in [*val, *root.glob("aclImdb/test/*/*.txt")]:
        path.write_text("ß" * 20, encoding="utf-8")
    data = lra_data.load("text-characters", tmp_path, source=root)
    assert "ß" not in data.symbols
    assert (data.val.tokens == 0).all() and (data.test.tokens == 0).all()


@pytest.mark.parametrize("task", ["retrieval", "retrieval-characters"])
def test_retrieval_has_two_documents(task, trees, tmp_path, monkeypatch):
    monkeypatch.setattr(lra_data, "MIN_COUNT", 1)
    data = lra_data.load(task, tmp_path, source=trees / "retrieval", max_len=20)
    assert data.train.tokens.shape == (6, 2, 20)
    assert (len(data.val), len(data.test)) == (4, 2)
    assert data.train.lengths.tolist()[1] == [6, 10]
    assert data.train.labels.tolist() == [0, 1, 0, 1, 0, 1]
    symbols = data.symbols or [chr(i) for i in range(256)]
    first, second = data.train.tokens[1]
    assert "".join(symbols[token] for token in first[:6]) == '"say\r1'
    assert "".join(symbols[token] for token in second[:10]) == 'long "end"'


@pytest.mark.parametrize(("task", "stride"), [("speech", 1), ("speech-8k", 2)])
def test_speech_follows_the_official_lists(task, stride, trees, tmp_path):
    data = lra_data.load(task, tmp_path, source=trees / "speech")
    assert (data.vocab_size, data.n_classes) == (None, 5)
    assert data.train.tokens.dtype == np.int16
    assert data.train.labels.tolist() == [0, 1, 2, 3, 3, 3, 4, 4, 4, 4]  # bed, cat, dog, no, yes
    assert data.val.labels.tolist() == [4, 3] and data.test.labels.tolist() == [4, 3]
    assert data.test.lengths.tolist() == [14_000 // stride, 13_000 // stride]
    samples = np.random.RandomState(2).randint(-9999, 9999, 14_000)[::stride]
    assert (data.test.tokens[0, : len(samples), 0] == samples).all()
    clips = [row[:n, 0] for row, n in zip(data.train.tokens, data.train.lengths, strict=True)]
    whole = np.concatenate(clips).astype(float)
    assert abs(data.mean[0] - whole.mean()) < 1e-6 and abs(data.std[0] / whole.std() - 1) < 1e-9


@pytest.mark.parametrize("task", ["listops-tiny", "pathfinder32"])
def test_an_unwritable_folder_is_noticed_before_the_work(task, tmp_path, monkeypatch):
    for work in ("lra_data.make_listops", "pathfinder.draw_pictures"):
        monkeypatch.setattr(work, lambda *_: pytest.fail("too late"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        lra_data.load(task, tmp_path / "file")


@pytest.mark.parametrize(
    ("task", "name", "content"),
    [
        ("listops", "listops-1000/basic_val.tsv", "Source\tTarget\n7\t7\n"),
        ("speech", "speech_commands_v0.02/yes/4_nohash_0.wav", None),
    ],
)
def test_files_that_changed_or_are_gone_are_noticed(task, name, content, copy, tmp_path):
    root = copy(task)
    before = lra_data.load(task, tmp_path / "data", source=root)
    write(root / name, content)
    after = lra_data.load(task, tmp_path / "data", source=root)
    assert lra_data.checksum(before) != lra_data.checksum(after)


# ---------------------------------------------------------------------- byte order marks, line ends

TEXTS = {
    "listops": "listops-1000/*.tsv",
    "pathfinder32": "*/*/metadata/*.npy",
    "text": "aclImdb/*/*/*.txt",
    "retrieval": "tsv_data/*.tsv",
    "speech": "*/*_list.txt",
}


@pytest.mark.parametrize("task", TEXTS)
def test_byte_order_marks_and_windows_line_ends_change_nothing(task, trees, copy, tmp_path):
    root = copy(task)
    for path in root.glob(TEXTS[task]):
        content = path.read_bytes()
        if task != "text":  # there, line ends are text
            content = content.replace(b"\n", b"\r\n")
        path.write_bytes(b"\xef\xbb\xbf" + content)
    data = lra_data.load(task, tmp_path / "data", source=root)
    plain = lra_data.load(task, tmp_path / "plain", source=trees / task)
    assert lra_data.checksum(data) == lra_data.checksum(plain)


# ------------------------------------------------------------------------------------ broken files

TREE = "listops-1000/basic_train.tsv"
PAIRS = "tsv_data/new_aan_pairs.train.tsv"
PAIR = "1.0\tA\tB\ta\tb\n"
BATCH = "cifar-10-batches-bin/data_batch_3.bin"
REVIEW = "aclImdb/train/pos/1_7.txt"
LIST = "speech_commands_v0.02/testing_list.txt"
CLIP = "speech_commands_v0.02/yes/1_nohash_0.wav"
TABLE = "pathfinder32/curv_contour_length_14/metadata/1.npy"
ROW = "imgs/1 sample_1.png 1 1\n"
SAMPLE = "pathfinder32/curv_contour_length_14/imgs/2/sample_5.png"
HEAD = "Source\tTarget\n"
GRAY = np.arange(1024, dtype=np.uint8).reshape(32, 32)

BROKEN = {  # task, file, content, reason
    "unknown token": ("listops", TREE, HEAD + "[AVG 1 ]\t1\n", "line 2: .*AVG"),
    "unclosed": ("listops", TREE, HEAD + "[MIN 1 2\t2\n", "expected a header, then a tree"),
    "no arguments": ("listops", TREE, HEAD + "[MIN ]\t0\n", "expected a header, then a tree"),
    "two roots": ("listops", TREE, HEAD + "1 2\t1\n", "expected a header, then a tree"),
    "wrong answer": ("listops", TREE, HEAD + "1\t1\n[MIN 1 2 ]\t2\n", "line 3: answer 2, not 1"),
    "three columns": ("pathfinder32", TABLE, ROW + "imgs/0 sample_1.png 1\n", "line 2: not enough"),
    "label 2": ("pathfinder32", TABLE, ROW + "imgs/0 sample_1.png 1 2\n", "line 2: '2'.* 0 or 1"),
    "no text": ("pathfinder32", TABLE, b"\x93NUMPY\x01\x00v", "line 1: .*utf-8.* expected folder"),
    "png cut": ("pathfinder32", SAMPLE, png(GRAY)[:-30], "truncated"),
    "no png": ("pathfinder32", SAMPLE, png(GRAY, form="BMP"), "expected an 8-bit grayscale"),
    "other size": ("pathfinder32", SAMPLE, png(GRAY[:31, :31]), "expected .* of 32 x 32"),
    "color": ("pathfinder32", SAMPLE, png(GRAY, "RGB"), r"\('RGB', \(32, 32\)\), not .* 8-bit"),
    "record cut": ("image", BATCH, bytes(3073 * 4 - 1), "size 12291 .*expected CIFAR-10"),
    "record missing": ("image", BATCH, bytes(3073 * 7), "bytes 21511, not 24584"),
    "batch missing": ("image", BATCH, None, "No such file"),
    "review not UTF-8": ("text", REVIEW, b"a \xe9 b", "expected a review in UTF-8"),
    "four columns": ("retrieval", PAIRS, "1.0\tA\tB\ttext\n", "line 1: .*got 4.* expected label"),
    "label 0.5": ("retrieval", PAIRS, PAIR + PAIR.replace("1.0", "0.5"), "line 2: '0.5'; expected"),
    "wav empty": ("speech", CLIP, b"", "EOFError; expected a wav file"),
    "wav cut": ("speech", CLIP, wav()[:-1000], "samples 15500, not 16000"),
    "stereo": ("speech", CLIP, wav(100, channels=2), r"rate \(2, 2, 16000\), not \(1, 2, 16000\)"),
    "32 bit": ("speech", CLIP, wav(100, width=4), r"rate \(1, 4, 16000\), not"),
    "44 kHz": ("speech", CLIP, wav(100, rate=44_100), r"rate \(1, 2, 44100\), not"),
    "too long": ("speech", CLIP, wav(16_001), "samples 16000, not 16001"),
    "no clips": ("speech", LIST, "", "no examples; expected a clip per line"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_named_and_read_when_it_is_repaired(case, trees, copy, tmp_path):
    task, name, content, reason = BROKEN[case]
    root = copy(task)
    write(root / name, content)
    with pytest.raises(ValueError, match=reason) as caught:
        lra_data.load(task, tmp_path / "data", source=root)
    assert str(caught.value).startswith(str(root / name))
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "data").glob("*.npz")), "a part of the cache is left behind"
    write(root / name, (trees / task / name).read_bytes())
    repaired = lra_data.load(task, tmp_path / "data", source=root)
    whole = lra_data.load(task, tmp_path / "whole", source=trees / task)
    assert lra_data.checksum(repaired) == lra_data.checksum(whole)


def test_a_folder_without_reviews_is_named(copy, tmp_path):
    root = copy("text")
    shutil.rmtree(root / "aclImdb/test/pos")
    with pytest.raises(ValueError, match=r"aclImdb/test/pos: expected \.txt files with reviews"):
        lra_data.load("text", tmp_path, source=root)


# ----------------------------------------------------------------------------- archives, downloads


def tar_of(name):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("good.txt"))
        tar.addfile(tarfile.TarInfo(name))
    return buffer.getvalue()


ARCHIVES = {
    "above": tar_of("../evil.txt"),
    "cut": tar_of("other")[:60],
    "wrong checksum": tar_of("other")[:-8] + b"12345678",
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_archives_stay_inside_their_folder(case, tmp_path):
    archive = tmp_path / "in/archive.tar.gz"
    write(archive, ARCHIVES[case])
    with pytest.raises(ValueError, match=r"(?s)archive\.tar\.gz: .*expected a whole tar"):
        lra_data.load("image", tmp_path / "data", source=archive)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [archive]


def test_a_download_arrives_once_and_is_found(trees, tmp_path, monkeypatch):
    packed = tmp_path / lra_data.CIFAR.split("/")[-1]
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(trees / "image" / "cifar-10-batches-bin", "cifar-10-batches-bin")
    digest = hashlib.sha256(packed.read_bytes()).hexdigest()
    monkeypatch.setitem(lra_data.SHA256, packed.as_uri(), digest)
    path = lra_data.download(packed.as_uri(), tmp_path / "data")
    assert [each.name for each in path.parent.iterdir()] == [packed.name]
    packed.unlink()
    assert lra_data.download(packed.as_uri(), tmp_path / "data") == path, "fetched again"
    expected = lra_data.checksum(lra_data.load("image", tmp_path, source=trees / "image"))
    assert lra_data.checksum(lra_data.load("image", tmp_path / "data")) == expected
    monkeypatch.setattr(tarfile, "open", None)  # the unpacked tree is used again
    read = lra_data.load("image", tmp_path / "data", source=path)
    assert lra_data.checksum(read) == expected


@pytest.mark.parametrize(
    ("name", "reason"), [("gone", "No such file"), ("other", "sha256 .*, not 0000")]
)
def test_a_failed_download_leaves_nothing(name, reason, tmp_path, monkeypatch):
    write(tmp_path / "other", "something else")
    url = (tmp_path / name).as_uri()
    monkeypatch.setitem(lra_data.SHA256, url, "0" * 64)
    with pytest.raises(ValueError, match=f"{url}: .*{reason}.*put it at .*--source"):
        lra_data.download(url, tmp_path / "data")
    assert not list((tmp_path / "data").iterdir())
