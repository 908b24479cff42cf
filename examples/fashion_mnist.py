"""Fashion-MNIST (Xiao et al. 2017, arXiv:1708.07747) as sequences of pixels.

    apt install dataset-fashion-mnist
    python examples/fashion_mnist.py --size 14
    python pretrain.py --task fashion_mnist.npz --model s4

Or name the folder with the four published IDX files, compressed (.gz) or not. The last tenth of
the published training pictures is for validation.
"""

import argparse
import gzip
from pathlib import Path

import numpy as np

CLASSES = "T-shirt Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag Boot".split()


def read(path):
    """The array of an IDX file: 3 bytes, the number of axes, their sizes, then uint8 values."""
    content = path.read_bytes() if path.exists() else gzip.open(f"{path}.gz").read()
    sizes = np.frombuffer(content, ">u4", count=content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * len(sizes)).reshape(sizes)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = "/usr/share/datasets/fashion-mnist"
    parser.add_argument("folder", nargs="?", default=default, help=f"default: {default}")
    parser.add_argument("--size", type=int, choices=(14, 28), default=28, help="pixels per side")
    parser.add_argument("--train", type=int, default=60_000, help="training pictures to keep")
    parser.add_argument("--out", default="fashion_mnist.npz", help="default: fashion_mnist.npz")
    args = parser.parse_args(argv)
    if args.train < 1:
        parser.error(f"--train {args.train}: expected 1 or more")
    folder = Path(args.folder)

    try:
        images = [read(folder / f"{part}-images-idx3-ubyte") for part in ("train", "t10k")]
        labels = [read(folder / f"{part}-labels-idx1-ubyte") for part in ("train", "t10k")]
    except (OSError, EOFError, ValueError, IndexError) as error:
        parser.exit(1, f"fashion_mnist.py: {folder}: {error}\n")
    n_val = len(images[0]) // 10
    sizes = [len(images[0]) - n_val, n_val, len(images[1])]
    split = np.repeat(["train", "val", "test"], sizes)
    keep = (split != "train") | (np.arange(sum(sizes)) < args.train)
    step = 28 // args.size
    x = np.concatenate(images)[keep].reshape(-1, args.size, step, args.size, step)
    x = x.mean((2, 4), dtype=np.float32) / 255  # (n, size, size)
    x = x.reshape(len(x), -1)  # row by row: (n, size * size)
    y = np.array(CLASSES)[np.concatenate(labels)[keep]]
    np.savez(args.out, x=x, y=y, split=split[keep])
    print(f"{args.out}: x {x.shape}")


if __name__ == "__main__":
    main()
