"""How fast lra_data.py generates and reads, one core, beside the original generators.

    python benchmarks/data_speed.py              about 2 min; writes results/data_speed.json
    python benchmarks/data_speed.py --pictures   results/pathfinder.png, 4 x 8 samples a size

A Pathfinder row: pictures of the hard task (contour 14) from one warm process, brush included once.
CPU time counts this process alone, so it stands even when others use the machine; wall time is
beside it. The original's numbers: the published Python generators, measured on a CPU core like
these (Pathfinder: the seconds an image of drewlinsley/pathfinder at contour 14; ListOps: 1.8 ms an
accepted tree in pure Python).
"""

import argparse
import tempfile
import time

import numpy as np
from measured import ROOT, provenance, pyplot, save

import lra_data

ORIGINAL = {32: (270, 380), 64: (10_000, 10_000), 128: (2_000, 2_000), 256: (180, 180)}  # ms
TARGET = {32: 15, 64: 300, 128: 80, 256: 12}
COUNT = {32: 3000, 64: 300, 128: 300, 256: 3000}


def pathfinder_row(size, n):
    """Milliseconds a picture and what the pictures look like."""
    start = time.perf_counter(), time.process_time()
    pictures, labels, disks = lra_data.draw_pictures(np.random.RandomState(1), size, 14, n)
    wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    return {
        "task": f"pathfinder{size}",
        "n": n,
        "ms_wall": 1e3 * wall / n,
        "ms_cpu": 1e3 * cpu / n,
        "ms_target": TARGET[size],
        "ms_original": ORIGINAL[size],
        "zero_pixels": float((pictures == 0).mean()),
        "mean": float(pictures.mean()),
        "label_1": float(labels.mean()),
        "disks_alone": disks_alone(disks / size, labels) if n >= 2000 else None,
    }


def disks_alone(places, labels):
    """Accuracy of least squares on places (n, 2, 2) and powers of the distance of the disks."""
    far = np.linalg.norm(places[:, 0] - places[:, 1], axis=-1)
    x = np.column_stack([places.reshape(len(places), 4), *(far**i for i in range(6))])
    half = len(x) // 2
    weights = np.linalg.lstsq(x[:half], 2.0 * labels[:half] - 1, rcond=None)[0]
    return float(((x[half:] @ weights > 0) == labels[half:]).mean())


def listops_row(task):
    """All examples of a task, from nothing, without the cache that a second run reads."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter(), time.process_time()
        data = lra_data.load(task, folder)
        wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
        start = time.perf_counter()
        lra_data.load(task, folder)
        again = time.perf_counter() - start
    n = len(data.train) + len(data.val) + len(data.test)
    row = {"task": task, "n": n, "s_wall": wall, "s_cpu": cpu, "s_cached": again}
    row["mean_length"] = float(data.train.lengths.mean())
    row["levels"] = {key: float(value) for key, value in lra_data.trivial_levels(data).items()}
    if task == "listops":
        row |= {"s_target": 90, "s_original": 1.8e-3 * n}
    return row


def pictures(path):
    """Four panels, one a size: 4 x 8 pictures, the label over each."""
    plt = pyplot()

    figure, panels = plt.subplots(4, 1, figsize=(10, 24), layout="constrained")
    for panel, size in zip(panels, lra_data.SHEETS, strict=True):
        drawn, labels, _ = lra_data.draw_pictures(np.random.RandomState(7), size, 14, 32)
        gap, top = size // 16, size // 5  # the label stands above its picture
        framed = np.pad(drawn, [(0, 0), (top, 0), (0, gap)], constant_values=50)
        high, wide = framed.shape[1:]
        grid = framed.reshape(4, 8, high, wide).transpose(0, 2, 1, 3).reshape(4 * high, 8 * wide)
        panel.imshow(grid, cmap="gray", interpolation="nearest")
        for i, label in enumerate(labels):
            x, y = (i % 8) * wide + size / 2, (i // 8) * high + top / 2
            text = "one snake" if label else "two snakes"
            panel.text(x, y, text, color="white", fontsize=7, va="center", ha="center")
        panel.set_title(f"pathfinder{size}: are the two disks the ends of one snake?", fontsize=10)
        panel.axis("off")
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pictures", action="store_true", help="write results/pathfinder.png only")
    parser.add_argument("--sizes", type=int, nargs="*", default=list(COUNT), help="of Pathfinder")
    parser.add_argument("--n", type=int, help="pictures a size (default: 3000, 300, 300, 3000)")
    args = parser.parse_args()
    if args.pictures:
        pictures(ROOT / "results/pathfinder.png")
        return
    result = provenance() | {
        "numpy": np.__version__,
        "rows": [],
    }
    for size in args.sizes:
        row = pathfinder_row(size, args.n or COUNT[size])
        result["rows"].append(row)
        low, high = row["ms_original"]
        print(
            f"{row['task']:14} {row['ms_cpu']:8.1f} ms CPU, {row['ms_wall']:.1f} ms wall, "
            f"target {row['ms_target']}, original {low} .. {high}; "
            f"empty {row['zero_pixels']:.3f}, mean {row['mean']:.1f}"
        )
    for task in ("listops-tiny", "listops-small", "listops"):
        row = listops_row(task)
        result["rows"].append(row)
        levels = ", ".join(f"{name} {100 * level:.1f} %" for name, level in row["levels"].items())
        print(
            f"{task:14} {row['n']:,} trees: {row['s_cpu']:.1f} s CPU, {row['s_wall']:.1f} s wall, "
            f"{row['s_cached']:.1f} s from the cache; {levels}"
        )
    path = ROOT / "results/data_speed.json"
    save(path, result)
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
