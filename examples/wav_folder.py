"""Classify sounds: a folder of WAV files per class. Copy this file, change FOLDER, and run

    python pretrain.py --task examples/wav_folder.py:load --model s4

from the folder that contains sounds/dog/1.wav, sounds/dog/2.wav, sounds/cat/1.wav, ...
"""

import sys
import wave
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import own_data
from lra_data import pad, reading

FOLDER = Path("sounds")


def read(path):
    """The samples (length,) of a file with 16 bits per sample, averaged over its channels."""
    with reading(path, "a wav file with 16 bits per sample"), wave.open(str(path)) as file:
        if file.getsampwidth() != 2:
            raise ValueError(f"{8 * file.getsampwidth()} bits per sample")
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        return samples.reshape(-1, file.getnchannels()).mean(1, dtype=np.float32)


def load():
    paths = sorted(FOLDER.glob("*/[!.]*.wav"))

    if not paths:
        raise ValueError(f"{FOLDER.resolve()}: found no files like CLASS/NAME.wav")
    x, lengths = pad([read(path) for path in paths])  # (n, L) with zeros after each sound
    classes = [path.parent.name for path in paths]
    return own_data.from_arrays(x, classes, lengths, name=FOLDER.name)


if __name__ == "__main__":
    print(__doc__)
