"""lra_data.py: what is read from files. True formats, broken files, random bytes, downloads."""

import hashlib
import http.server
import io
import shutil
import struct
import tarfile
import threading
import wave
import zlib

import numpy as np
import pytest

import lra_data

# ------------------------------------------------------------- files in the true formats, small


def png(picture, kinds=None, head=None, **damage):
    """A picture (side, side) as an 8-bit grey png; line y is filtered by kinds[y] (0 .. 4)."""
    side = len(picture)
    padded = np.pad(picture.astype(int), [(1, 0), (1, 0)])
    lines = b""
    for y in range(side):
        here, left, above, corner = (
            padded[y + 1, 1:],
            padded[y + 1, :-1],
            padded[y, 1:],
            padded[y, :-1],
        )
        kind = kinds[y] if kinds is not None else 0
        guess = [0 * here, left, above, (left + above) // 2, None][kind]
        if kind == 4:
            sides = np.stack([left, above, corner])
            guess = np.take_along_axis(
                sides, abs(left + above - corner - sides).argmin(0)[None], 0
            )[0]
        lines += bytes([kind]) + ((here - guess) % 256).astype(np.uint8).tobytes()
    head = struct.pack(">IIBBBBB", *(head or (side, side, 8, 0, 0, 0, 0)))
    content = b"\x89PNG\r\n\x1a\n"
    packed = zlib.compress(damage.get("lines", lines))
    for kind, body in [
        (b"IHDR", head),
        (b"IDAT", packed[:9]),
        (b"IDAT", packed[9:]),
        (b"IEND", b""),
    ]:
        check = struct.pack(">I", zlib.crc32(kind + body) ^ damage.get("crc", 0))
        content += struct.pack(">I", len(body)) + kind + body + check
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


def pictures(n=30, side=32):
    return np.random.RandomState(0).randint(0, 256, (n, side, side)).astype(np.uint8)


def make_pathfinder(root, n=30):
    folder = root / "pathfinder32/curv_contour_length_14"
    lines = ["", "", ""]
    for i, picture in enumerate(pictures(n)):
        k = i % 3  # three folders of ten
        write(folder / f"imgs/{k}/sample_{i}.png", png(picture, np.arange(32) % 5))
        lines[k] += f"imgs/{k} sample_{i}.png {i} {i % 2} 1.0 14 4 2 0.5 1 1\n"
    for k, text in enumerate(lines):
        write(folder / f"metadata/{k}.npy", text)


def make_listops(root):
    trees = ["( ( ( [MIN 3 ) 2 ) ] )\t2", "( ( ( [SM ( ( ( [MAX 1 ) 9 ) ] ) ) 4 ) ] )\t3", "5\t5"]
    for name in lra_data.SPLITS:
        write(root / f"listops-1000/basic_{name}.tsv", "Source\tTarget\n" + "\n".join(trees) + "\n")


def make_cifar(root):
    rng = np.random.RandomState(0)
    for i, name in enumerate(["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4"]):
        records = rng.randint(0, 256, (8, 3073)).astype(np.uint8)
        records[:, 0] = np.arange(8) + i % 2
        write(root / f"cifar-10-batches-bin/{name}.bin", records.tobytes())
    for name in ("data_batch_5", "test_batch"):
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
    names = {"yes": 6, "no": 5, "_background_noise_": 1}
    root = root / "speech_commands_v0.02"
    for word, n in names.items():
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
    """One directory a task with small files in the published layout."""
    roots = {}
    for task, make in MAKERS.items():
        roots[task] = tmp_path_factory.mktemp(task)
        make(roots[task])
    return roots


# --------------------------------------------------------------------------------- what is read


def test_listops_is_read_and_evaluated(trees, tmp_path):
    data = lra_data.load("listops", tmp_path, source=trees["listops"])
    assert data.train.labels.tolist() == [2, 3, 5]
    assert data.train.lengths.tolist() == [4, 7, 1]
    words = [data.symbols[token] for token in data.train.tokens[1]]
    assert words == "[SM [MAX 1 9 ] 4 ]".split()


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
    data = lra_data.load("pathfinder32", tmp_path, source=trees["pathfinder32"])
    assert [len(split) for split in (data.train, data.val, data.test)] == [24, 3, 3]
    read = {
        row.tobytes(): label
        for split in (data.train, data.val, data.test)
        for row, label in zip(split.tokens, split.labels, strict=True)
    }
    assert read == {picture.tobytes(): i % 2 for i, picture in enumerate(pictures())}
    assert data.train.tokens.shape == (24, 1024, 1) and data.mean == (127.5,)


def test_pathfinder_reports_the_one_empty_png(trees, tmp_path, capsys):
    shutil.copytree(trees["pathfinder32"], tmp_path / "files")
    empty = next((tmp_path / "files").rglob("sample_7.png"))
    empty.write_bytes(b"")
    data = lra_data.load("pathfinder32", tmp_path, source=tmp_path / "files")
    assert sum(len(split) for split in (data.train, data.val, data.test)) == 29
    assert f"{empty}: empty, left out" in capsys.readouterr().err


def test_the_inner_tree_of_the_release_is_preferred(tmp_path):
    release = tmp_path / "lra_release"
    for place, answer in [(tmp_path, 1), (release, 2), (release / "lra_release", 3)]:
        make_listops(place)
        write(place / "listops-1000/basic_val.tsv", f"Source\tTarget\n{answer}\t{answer}\n")
    for source in (tmp_path, release, release / "lra_release"):
        data = lra_data.load("listops", tmp_path / "cache", source=source)
        assert data.val.labels.tolist() == [3]


def test_image_grey_by_both_formulas(trees, tmp_path):
    symbols = lra_data.load("image", tmp_path, source=trees["image"])
    numbers = lra_data.load("image-real", tmp_path, source=trees["image"])
    colour = lra_data.load("scifar", tmp_path, source=trees["image"])
    assert symbols.train.tokens.shape == (36, 1024) and symbols.mean is None
    assert numbers.train.tokens.shape == (36, 1024, 1) and numbers.mean == (122.6,)
    assert colour.train.tokens.shape == (36, 1024, 3) and len(colour.std) == 3
    assert [len(symbols.val), len(symbols.test)] == [4, 8]
    content = (trees["image"] / "cifar-10-batches-bin/test_batch.bin").read_bytes()
    assert colour.test.tokens[0, 5].tolist() == [content[1 + 1024 * c + 5] for c in range(3)]
    red, green, blue = colour.test.tokens.astype(float).transpose(2, 0, 1)
    for grey in (symbols.test.tokens, numbers.test.tokens[..., 0]):
        assert np.abs(grey - (0.299 * red + 0.587 * green + 0.114 * blue)).max() <= 1.01
    assert (symbols.test.tokens != numbers.test.tokens[..., 0]).any()


def test_image_validation_is_held_out_of_train(trees, tmp_path):
    first, other = (
        lra_data.load("image", tmp_path, seed, source=trees["image"]) for seed in (0, 1)
    )
    rows = [row.tobytes() for split in (first.train, first.val) for row in split.tokens]
    assert len(rows) == 40
    assert sorted(rows) == sorted(
        row.tobytes() for s in (other.train, other.val) for row in s.tokens
    )
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


def test_the_vocabulary_is_built_on_train_alone(trees, tmp_path):
    shutil.copytree(trees["text"], tmp_path / "files")
    for path in (tmp_path / "files/aclImdb/test").rglob("*.txt"):
        path.write_text("ßßßßßßßßßßßßßßßßßß")
    data = lra_data.load("text-characters", tmp_path, source=tmp_path / "files")
    assert "ß" not in data.symbols
    assert (data.test.tokens == 0).all()


@pytest.mark.parametrize("task", ["retrieval", "retrieval-characters"])
def test_retrieval_has_two_documents(task, trees, tmp_path):
    data = lra_data.load(task, tmp_path, source=trees["retrieval"], max_len=20)
    assert data.train.tokens.shape == (6, 2, 20)
    assert data.train.lengths.tolist()[1] == [6, 9]
    assert data.train.labels.tolist() == [0, 1, 0, 1, 0, 1]
    if task == "retrieval":
        assert bytes(data.train.tokens[1, 0, :6]) == b'say "1'
        assert bytes(data.train.tokens[1, 1, :9]) == b'long "end'


@pytest.mark.parametrize(("task", "stride"), [("speech", 1), ("speech-8k", 2)])
def test_speech_follows_the_official_lists(task, stride, trees, tmp_path):
    data = lra_data.load(task, tmp_path, source=trees["speech"])
    assert data.n_classes == 2 and data.train.tokens.dtype == np.int16
    assert (len(data.train), len(data.val), len(data.test)) == (7, 2, 2)
    assert data.val.labels.tolist() == [1, 0] and data.test.labels.tolist() == [1, 0]
    assert data.test.lengths.tolist() == [14_000 // stride, 13_000 // stride]
    rng = np.random.RandomState(2)
    assert (
        data.test.tokens[0, :14_000, 0][:99] == rng.randint(-9999, 9999, 14_000)[::stride][:99]
    ).all()
    clips = [row[:n, 0] for row, n in zip(data.train.tokens, data.train.lengths, strict=True)]
    whole = np.concatenate(clips).astype(float)
    assert abs(data.mean[0] - whole.mean()) < 1e-6 and abs(data.std[0] / whole.std() - 1) < 1e-9


@pytest.mark.parametrize("task", MAKERS)
def test_every_task_is_read_from_a_tar_archive_too(task, trees, tmp_path):
    archive = tmp_path / "packed.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for path in trees[task].iterdir():
            tar.add(path, path.name)
    data = lra_data.load(task, tmp_path / "data", source=archive)
    assert lra_data.checksum(data) == lra_data.checksum(
        lra_data.load(task, tmp_path / "other", source=trees[task])
    )
    again = lra_data.load(task, tmp_path / "data", source=archive)  # the unpacked tree is reused
    assert lra_data.checksum(again) == lra_data.checksum(data)


@pytest.mark.parametrize(("task", "left"), [("listops", 2), ("speech", 1)])
def test_changed_files_are_read_again(task, left, trees, tmp_path):
    shutil.copytree(trees[task], tmp_path / "files")
    lra_data.load(task, tmp_path / "data", source=tmp_path / "files")
    path = sorted((tmp_path / "files").rglob("*val*"))[0]
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    data = lra_data.load(task, tmp_path / "data", source=tmp_path / "files")
    assert len(data.val) == left


# --------------------------------------------------------------------------------- broken files

TREE = "listops-1000/basic_train.tsv"
PAIRS = "tsv_data/new_aan_pairs.train.tsv"
BATCH = "cifar-10-batches-bin/data_batch_3.bin"
REVIEW = "aclImdb/train/pos/1_7.txt"
CLIP = "speech_commands_v0.02/yes/1_nohash_0.wav"
LISTS = "speech_commands_v0.02/validation_list.txt"
SAMPLE = "pathfinder32/curv_contour_length_14/imgs/2/sample_5.png"
META = "pathfinder32/curv_contour_length_14/metadata/1.npy"
HEAD = "Source\tTarget\n"
GREY = np.arange(1024).reshape(32, 32) % 251

BROKEN = {
    # listops: a header, a tab, a tree and its value
    "listops-empty": (TREE, b"", "no examples"),
    "listops-header-only": (TREE, HEAD, "no examples"),
    "listops-no-header": (TREE, "5\t5\n", "expected .*Source"),
    "listops-other-header": (TREE, "Source,Target\n5,5\n", "expected .*Source"),
    "listops-missing-column": (TREE, HEAD + "5\n", ":2: 1 columns"),
    "listops-extra-column": (TREE, HEAD + "5\t5\t5\n", ":2: 3 columns"),
    "listops-unknown-token": (TREE, HEAD + "5\t5\n[AVG 1 ]\t1\n", ":3: unknown token"),
    "listops-glued-token": (TREE, HEAD + "[MIN1 2 ]\t1\n", ":2: unknown token"),
    "listops-unclosed": (TREE, HEAD + "[MIN 1 2\t1\n", ":2: not a tree: 1 operators left open"),
    "listops-closed-twice": (TREE, HEAD + "[MIN 1 ] ]\t1\n", ":2: not a tree: token 3"),
    "listops-no-arguments": (TREE, HEAD + "[MIN ]\t1\n", ":2: not a tree: token 1"),
    "listops-two-roots": (TREE, HEAD + "1 2\t1\n", ":2: not a tree: 0 operators.* 2 roots"),
    "listops-no-tree": (TREE, HEAD + "\t1\n", ":2: not a tree: .* 0 roots"),
    "listops-wrong-label": (TREE, HEAD + "[MIN 1 2 ]\t2\n", ":2: label '2', expected 1"),
    "listops-label-range": (TREE, HEAD + "5\t15\n", ":2: label '15', expected 5"),
    "listops-label-text": (TREE, HEAD + "5\tfive\n", ":2: label 'five'"),
    "listops-cut": (TREE, HEAD + "5\t5\n5\t5", ":3: no end of line"),
    "listops-not-utf8": (TREE, HEAD.encode() + b"\xff\t5\n", ":2: .*utf-8"),
    "listops-binary": (TREE, bytes(range(256)), ":1: "),
    # pathfinder: png and text metadata
    "png-cut": (SAMPLE, png(GREY)[:200], "damaged at byte"),
    "png-signature": (SAMPLE, b"GIF89a" + png(GREY)[6:], "expected a png file"),
    "png-bit-flip": (SAMPLE, png(GREY, crc=1), "damaged at byte 8"),
    "png-wrong-size": (SAMPLE, png(GREY[:31, :31]), "expected 32 x 32"),
    "png-colour": (SAMPLE, png(GREY, head=(32, 32, 8, 2, 0, 0, 0)), "8 bit grey"),
    "png-16-bit": (SAMPLE, png(GREY, head=(32, 32, 16, 0, 0, 0, 0)), "8 bit grey"),
    "png-interlaced": (SAMPLE, png(GREY, head=(32, 32, 8, 0, 0, 0, 1)), "8 bit grey"),
    "png-few-lines": (SAMPLE, png(GREY, lines=bytes(33 * 31)), "1023 bytes of pixels"),
    "png-many-lines": (SAMPLE, png(GREY, lines=bytes(33 * 33)), "1057 bytes of pixels"),
    "png-unknown-filter": (SAMPLE, png(GREY, lines=b"\5" + bytes(33 * 32 - 1)), "lines of 32"),
    "png-no-header": (SAMPLE, png(GREY)[:8] + png(GREY)[33:], "expected one header"),
    "png-is-text": (SAMPLE, "no picture", "expected a png file"),
    "metadata-short-line": (META, "imgs/0 sample_0.png 0\n", "1.npy:1: .*expected folder"),
    "metadata-label": (META, "imgs/0 sample_0.png 0 2 1.0\n", "1.npy:1: .*label 0 or 1"),
    "metadata-numpy": (META, b"\x93NUMPY\1\0v\0", "expected UTF-8 text"),
    "metadata-missing-file": (META, "imgs/9 sample_0.png 0 1 1.0\n", "imgs/9/sample_0.png: "),
    # cifar: records of 3073 bytes
    "cifar-empty": (BATCH, b"", "0 bytes, expected a multiple of 3073"),
    "cifar-cut": (BATCH, bytes(3073 * 4 - 1), "12291 bytes, expected a multiple"),
    "cifar-label": (BATCH, b"\x0a" + bytes(3072), "label 10, expected 0 .. 9"),
    "cifar-pickle": (BATCH, b"\x80\x02}q\x01(U\x0bbatch_labelq", "expected a multiple"),
    # text
    "text-not-utf8": (REVIEW, b"a \xe9 b", "expected UTF-8"),
    "text-empty": (REVIEW, b"", "empty, expected .txt files"),
    # retrieval: five columns
    "pairs-columns": (PAIRS, "1.0\tA\tB\ttext\n", ":1: 4 columns"),
    "pairs-label": (PAIRS, "2.0\tA\tB\ta\tb\n", ":1: label '2.0'"),
    "pairs-empty": (PAIRS, b"", "no examples"),
    "pairs-empty-text": (PAIRS, "1.0\tA\tB\ta\t\n", ":1: an empty document"),
    "pairs-cut": (PAIRS, "1.0\tA\tB\ta\tb", "no end of line"),
    "pairs-not-utf8": (PAIRS, b"1.0\tA\tB\ta\t\xc3\n", ":1: .*utf-8"),
    # speech: one channel, 16 bit, 16 kHz, at most a second
    "wav-empty": (CLIP, b"", "expected a wav file"),
    "wav-cut": (CLIP, wav()[:-1000], "in 31000 bytes"),
    "wav-cut-header": (CLIP, wav()[:20], "expected a wav file"),
    "wav-stereo": (CLIP, wav(100, channels=2), "expected .1, 2, 16000"),
    "wav-32-bit": (CLIP, wav(100, width=4), "expected .1, 2, 16000"),
    "wav-44-kHz": (CLIP, wav(100, rate=44_100), "expected .1, 2, 16000"),
    "wav-too-long": (CLIP, wav(16_001), "16001 samples"),
    "wav-no-samples": (CLIP, wav(0), "0 samples"),
    "wav-is-text": (CLIP, "RIFF nothing", "expected a wav file"),
    "list-unknown-file": (LISTS, "yes/99.wav\n", "names ..yes/99.wav"),
    "list-empty": (LISTS, b"", "expected files below"),
    "list-not-utf8": (LISTS, b"\xff", "expected UTF-8"),
}
OWNER = {
    "listops": "listops",
    "png": "pathfinder32",
    "metadata": "pathfinder32",
    "cifar": "image",
    "text": "text",
    "pairs": "retrieval",
    "wav": "speech",
    "list": "speech",
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_named_with_its_fault(case, trees, tmp_path):
    name, content, reason = BROKEN[case]
    task = OWNER[case.split("-")[0]]
    shutil.copytree(trees[task], tmp_path / "files")
    write(tmp_path / "files" / name, content)
    with pytest.raises(ValueError, match=reason) as caught:
        lra_data.load(task, tmp_path / "data", source=tmp_path / "files")
    assert name.split("/")[-1] in str(caught.value) or case == "metadata-missing-file"
    assert not [path for path in (tmp_path / "data").rglob("*") if path.is_file()]


@pytest.mark.parametrize("task", MAKERS)
def test_a_missing_tree_names_the_expected_layout(task, tmp_path):
    with pytest.raises(ValueError, match=r"expected one of .*published as http"):
        lra_data.load(task, tmp_path, source=tmp_path)
    with pytest.raises(ValueError, match=r"expected one of"):
        lra_data.load(task, tmp_path, source=tmp_path / "nowhere")


def test_a_missing_second_file_is_named(trees, tmp_path):
    for task, name in [("listops", "basic_test.tsv"), ("image", "test_batch.bin")]:
        shutil.copytree(trees[task], tmp_path / task)
        next((tmp_path / task).rglob(name)).unlink()
        with pytest.raises(ValueError, match=name):
            lra_data.load(task, tmp_path / "data", source=tmp_path / task)


# ------------------------------------------------------------------- random bytes and mutations


def parse_png(path):
    return lra_data.unfilter(lra_data.read_png(path, 32)[None])


def parse_table(path):
    return list(lra_data.read_table(path, 5))


VALID = {
    parse_png: png(GREY, np.arange(32) % 5),
    lra_data.read_wav: wav(400),
    parse_table: "1.0\tA\tB\ta\tb\n" * 5,
    lra_data.read_listops_file: HEAD + "[MIN 1 2 ]\t1\n5\t5\n",
    lra_data.read_text: "text",
}


@pytest.mark.parametrize("parse", VALID, ids=lambda parse: parse.__name__)
def test_random_bytes_are_parsed_or_refused(parse, tmp_path):
    """3 x 100 files: noise, a valid file with bytes changed, a valid file cut. Only ValueError."""
    valid = VALID[parse].encode() if isinstance(VALID[parse], str) else VALID[parse]
    path, rng, refused = tmp_path / "file", np.random.RandomState(0), 0
    path.write_bytes(valid)
    parse(path)
    for trial in range(300):
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
            assert str(path) in str(error)
            refused += 1
    assert refused > 100


# --------------------------------------------------------------------------- archives, downloads


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
    "absolute": tar_of(name="/tmp/evil.txt"),
    "above": tar_of(name="../evil.txt"),
    "hidden-above": tar_of(name="folder/../../evil.txt"),
    "link": tar_of(name="link", type=tarfile.SYMTYPE, linkname="/etc"),
    "inner-link": tar_of(name="link", type=tarfile.SYMTYPE, linkname="good.txt"),
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


@pytest.fixture
def server():
    """A loopback server: /whole, /cut (half of what it announces), /refused, /silent."""
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


def test_a_whole_download_arrives(server, tmp_path):
    url, sha256 = server
    path = lra_data.download(lra_data.Remote(f"{url}/whole/a.tar.gz", sha256), tmp_path / "data")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256
    assert [each.name for each in path.parent.iterdir()] == ["a.tar.gz"]
    other = lra_data.Remote(f"{url}/refused/a.tar.gz", sha256)
    assert lra_data.download(other, tmp_path / "data") == path, "what is there is fetched again"


@pytest.mark.parametrize(
    ("name", "sha256", "reason"),
    [
        ("cut", None, "640000 bytes came, expected 1280000"),
        ("refused", None, "403"),
        ("whole", "0" * 64, "sha256 .*expected 000"),
    ],
)
def test_a_failed_download_leaves_nothing(name, sha256, reason, server, tmp_path):
    url = f"{server[0]}/{name}/a.tar.gz"
    with pytest.raises(ValueError, match=f"{reason}.*put it at .*--source"):
        lra_data.download(lra_data.Remote(url, sha256), tmp_path / "data")
    assert not list((tmp_path / "data").iterdir())


def test_a_download_from_nowhere_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"127\.0\.0\.1:9/"):
        lra_data.download(lra_data.Remote("http://127.0.0.1:9/a.gz", None), tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_download_leaves_is_found(trees, tmp_path):
    name = lra_data.CIFAR.url.split("/")[-1]
    with tarfile.open(tmp_path / name, "w:gz") as tar:
        tar.add(trees["image"] / "cifar-10-batches-bin", "cifar-10-batches-bin")
    assert len(lra_data.load("image", tmp_path).test) == 8


# ---------------------------------------------------------------------- what users run into


def test_words_that_lie_in_the_data_dir_stay_the_classes(tmp_path):
    """What is cached beside them is no class of its own."""
    make_speech(tmp_path)
    for path in (tmp_path / "speech_commands_v0.02").iterdir():
        path.rename(tmp_path / path.name)
    first, again = (lra_data.load("speech", tmp_path, source=tmp_path) for _ in range(2))
    assert first.n_classes == again.n_classes and lra_data.checksum(first) == lra_data.checksum(
        again
    )


def test_a_clip_of_two_lists_is_refused(trees, tmp_path):
    shutil.copytree(trees["speech"], tmp_path / "files")
    root = tmp_path / "files/speech_commands_v0.02"
    names = (root / "validation_list.txt").read_text()
    (root / "testing_list.txt").write_text((root / "testing_list.txt").read_text() + names)
    with pytest.raises(ValueError, match=r"testing_list.txt: names a clip twice, or one of"):
        lra_data.load("speech", tmp_path / "data", source=tmp_path / "files")


@pytest.mark.parametrize("options", [{"max_len": -5}, {"max_len": 0}, {"min_count": 0}])
@pytest.mark.parametrize("task", ["text", "retrieval"])
def test_lengths_below_one_are_refused(task, options, trees, tmp_path):
    with pytest.raises(ValueError, match="expected 1 or more"):
        lra_data.load(task, tmp_path, source=trees[task], **options)


def test_a_cache_with_a_damaged_header_is_named(tmp_path):
    """Readers of numpy raise many kinds; each becomes a ValueError with the file's name."""
    good = tmp_path / "a.npy"
    np.save(good, np.arange(9))
    content = bytearray(good.read_bytes())
    rng = np.random.RandomState(0)
    for _ in range(200):
        damaged = bytearray(content)
        damaged[rng.randint(0, 128)] = rng.randint(0, 256)
        good.write_bytes(damaged)
        try:
            lra_data.read_npy(good)
        except ValueError as error:
            assert "a.npy" in str(error)
    np.savez(tmp_path / "b.npz", flat=np.zeros(9, np.uint8), labels=np.zeros(3), lengths=[9])
    with pytest.raises(ValueError, match=r"b\.npz"):
        lra_data.read_npz(tmp_path / "b.npz")
