"""Classify pictures: a folder of PNG files per class. Copy this file, change FOLDER, and run

    python pretrain.py --task examples/png_folder.py:load --model s4

from the folder that contains pictures/cat/1.png, pictures/cat/2.png, pictures/dog/1.png, ...
Needs Pillow.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lra_data
import own_data

FOLDER = Path("pictures")
SIDE = 32  # a picture becomes SIDE x SIDE pixels, a sequence of SIDE * SIDE values


def read(path):
    """The gray pixels (SIDE * SIDE, 1) of a picture, row by row, 0 to 1."""
    with lra_data.reading(path, "a picture of 8 bits per channel"), Image.open(path) as picture:
        if picture.mode.startswith("I"):
            raise ValueError("16 bits or more")

        gray = picture.convert("L").resize((SIDE, SIDE))  # "RGB" gives 3 channels
    return np.asarray(gray, np.float32).reshape(SIDE * SIDE, -1) / 255


def load():
    paths = sorted(FOLDER.glob("*/*.png"))
    if not paths:
        raise ValueError(f"{FOLDER.resolve()}: found no files like CLASS/NAME.png")
    x = np.stack([read(path) for path in paths])
    classes = [path.parent.name for path in paths]
    return own_data.from_arrays(x, classes, name=FOLDER.name)


if __name__ == "__main__":
    print(__doc__)
