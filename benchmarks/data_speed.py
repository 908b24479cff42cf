"""Speed of the data generators on one core.

    python benchmarks/data_speed.py              writes results/data_speed.json
    python benchmarks/data_speed.py --pictures   draws results/pathfinder.png: 32 samples per size

Pathfinder: hard pictures (contour 14) in one process, including the brush.  CPU time is that of
this process and counts even if others use the machine.
"""

import argparse
import tempfile
import time

import numpy as np
from measured import ROOT, provenance, pyplot, save

import lra_data
import pathfinder

COUNT = {32: 3000, 64: 300, 128: 300, 256: 3000}  # pictures
CONTOUR = 14


def pathfinder_row(size, n):
    """Milliseconds per picture, and statistics of the pictures."""
    rng = np.random.RandomState(1)
    start = time.process_time()
    _, labels, disks = pathfinder.draw_pictures(rng, size, CONTOUR, n)
    cpu = time.process_time() - start
    return {
        "task": f"pathfinder{size}",
        "version": pathfinder.VERSION,
        "n": n,
        "ms_cpu": round(1e3 * cpu / n, 2),
        "disks_alone": disks_alone(disks / size, labels) if n >= 2000 else None,
    }


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
    """Seconds for all examples of a task, and the scores of trivial baselines."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        data = lra_data.load(task, folder)
        cpu = time.process_time() - start
    n = len(data.train) + len(data.val) + len(data.test)
    return {"task": task, "n": n, "s_cpu": round(cpu, 2), "levels": trivial_levels(data)}


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
    rows = []
    for size, n in COUNT.items():
        rows.append(pathfinder_row(size, n))
        print(rows[-1], flush=True)
    for task in ("listops-tiny", "listops-small", "listops"):
        rows.append(listops_row(task))
        print(rows[-1], flush=True)
    save(ROOT / "results/data_speed.json", {**origin, "numpy": np.__version__, "rows": rows})


if __name__ == "__main__":
    main()
