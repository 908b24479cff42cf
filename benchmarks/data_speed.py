"""Speed of the data generators on one core, beside the original ones.

    python benchmarks/data_speed.py              writes results/data_speed.json
    python benchmarks/data_speed.py --pictures   draws results/pathfinder.png: 32 samples per size

Pathfinder: hard pictures (contour 14) in one process, including the brush.  CPU time is that of
this process and counts even if others use the machine.  The original generators were measured on a
CPU core like these: drewlinsley/pathfinder in ms per picture at contour 14.
"""

import argparse
import tempfile
import time

import numpy as np
from measured import ROOT, provenance, pyplot, save

import lra_data
import pathfinder

ORIGINAL = {32: (270, 380), 64: (10_000, 10_000), 128: (2_000, 2_000), 256: (180, 180)}  # ms
COUNT = {32: 3000, 64: 300, 128: 300, 256: 3000}  # pictures
CONTOUR = 14


def timed(function, *args):
    """Call the function.  Returns (result, wall seconds, CPU seconds)."""
    start = time.perf_counter()
    cpu = time.process_time()
    result = function(*args)
    return result, time.perf_counter() - start, time.process_time() - cpu


def pathfinder_row(size, n):
    """Milliseconds per picture, and statistics of the pictures."""
    rng = np.random.RandomState(1)
    drawn, wall, cpu = timed(pathfinder.draw_pictures, rng, size, CONTOUR, n)
    _, labels, disks = drawn
    row = {
        "task": f"pathfinder{size}",
        "version": pathfinder.VERSION,
        "n": n,
        "ms_wall": 1e3 * wall / n,
        "ms_cpu": 1e3 * cpu / n,
        "ms_original": ORIGINAL[size],
        "disks_alone": disks_alone(disks / size, labels) if n >= 2000 else None,
    }
    text = f"{row['ms_cpu']:.1f} ms CPU, {row['ms_wall']:.1f} ms wall per picture"
    print(f"{row['task']:14} {text}, original {ORIGINAL[size]}", flush=True)
    return row


def disks_alone(places, labels):
    """Accuracy of least squares on the places (n, 2, 2) of the disks and powers of their distance.

    Fitted to the first half of the pictures, tested on the second.
    """
    distance = np.linalg.norm(places[:, 0] - places[:, 1], axis=-1)
    powers = [distance**i for i in range(6)]
    x = np.column_stack([places.reshape(-1, 4), *powers])
    half = len(x) // 2
    weights = np.linalg.lstsq(x[:half], 2.0 * labels[:half] - 1, rcond=None)[0]
    guess = x[half:] @ weights > 0
    return float((guess == labels[half:]).mean())


def listops_row(task):
    """Seconds for all examples of a task, without and with the cache."""
    with tempfile.TemporaryDirectory() as folder:
        data, wall, cpu = timed(lra_data.load, task, folder)
        _, again, _ = timed(lra_data.load, task, folder)
    n = len(data.train) + len(data.val) + len(data.test)
    row = {"task": task, "n": n, "s_wall": wall, "s_cpu": cpu, "s_cached": again}
    row["mean_length"] = float(data.train.lengths.mean())
    row["levels"] = trivial_levels(data)
    print(f"{task:14} {n:,} trees: {cpu:.1f} s CPU, {wall:.1f} s wall, {again:.1f} s cached")
    return row


def trivial_levels(data):
    """Test accuracy of the most frequent training label, overall and per operator at the root."""
    counts = np.zeros((data.vocab_size, data.n_classes), int)
    np.add.at(counts, (data.train.tokens[:, 0], data.train.labels), 1)
    overall = counts.sum(0).argmax()
    by_root = counts.argmax(1)[data.test.tokens[:, 0]]
    return {
        "most frequent label": float((data.test.labels == overall).mean()),
        "by first token": float((data.test.labels == by_root).mean()),
    }


def plot(path):
    """One panel of 4 x 8 pictures per size, the label above each picture."""
    plt = pyplot()
    figure, panels = plt.subplots(4, 1, figsize=(10, 24), layout="constrained")
    for panel, size in zip(panels, pathfinder.SHEETS, strict=True):
        rng = np.random.RandomState(7)
        drawn, labels, _ = pathfinder.draw_pictures(rng, size, CONTOUR, 32)
        top = size // 5  # room for the label
        framed = np.pad(drawn, [(0, 0), (top, 0), (0, size // 16)], constant_values=50)
        height, width = framed.shape[1:]
        grid = framed.reshape(4, 8, height, width).transpose(0, 2, 1, 3)
        panel.imshow(grid.reshape(4 * height, 8 * width), cmap="gray", interpolation="nearest")
        for i, label in enumerate(labels):
            x = (i % 8) * width + size / 2
            y = (i // 8) * height + top / 2
            text = "one snake" if label else "two snakes"
            panel.text(x, y, text, color="white", fontsize=7, va="center", ha="center")
        panel.set_title(f"pathfinder{size}: are the two disks the ends of one snake?", fontsize=10)
        panel.axis("off")
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pictures", action="store_true", help="draw results/pathfinder.png")
    args = parser.parse_args()
    if args.pictures:
        return plot(ROOT / "results/pathfinder.png")
    origin = provenance()
    rows = [pathfinder_row(size, n) for size, n in COUNT.items()]
    rows += [listops_row(task) for task in ("listops-tiny", "listops-small", "listops")]
    save(ROOT / "results/data_speed.json", {**origin, "numpy": np.__version__, "rows": rows})


if __name__ == "__main__":
    main()
