"""Forecast a time series: predict its next values from a window of past values, by regression.

    python examples/forecasting.py series.csv --window 96 --horizon 8
    python pretrain.py --task forecasting.npz --model s4

series.csv has a line per time step and a number per channel, separated by commas, without a
header. The model reads all channels and predicts the next values of the first one. The first 80 %
of the series are for training, the next 10 % for validation, the last 10 % for the test; no window
reaches from one part into another, so the last ones need at least window + horizon steps each.
"""

import argparse

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view


def windows(series, window, horizon):
    """(T, C) -> inputs (n, window, C) and the next values of the first channel (n, horizon)."""
    spans = sliding_window_view(series, window + horizon, axis=0)  # (n, C, window + horizon)
    return spans[..., :window].swapaxes(1, 2), spans[:, 0, window:]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("series", help="text file: a line per time step, commas between numbers")
    parser.add_argument("--window", type=int, default=96, help="steps to read (default: 96)")
    parser.add_argument("--horizon", type=int, default=8, help="steps to predict (default: 8)")
    parser.add_argument("--out", default="forecasting.npz", help="default: forecasting.npz")
    args = parser.parse_args(argv)
    try:
        with open(args.series, encoding="utf-8-sig") as file:
            series = np.loadtxt(file, np.float32, delimiter=",", ndmin=2)  # (T, C)
        parts = np.split(series, [len(series) * 8 // 10, len(series) * 9 // 10])
        least = args.window + args.horizon
        if min(args.window, args.horizon) < 1 or len(series) < 10 * least:
            expected = f"window and horizon of at least 1, and {10 * least} steps"
            raise ValueError(f"{len(series)} steps; expected {expected}")

        pairs = [windows(part, args.window, args.horizon) for part in parts]
        x = np.concatenate([past for past, _ in pairs])
        y = np.concatenate([future for _, future in pairs])
        split = np.repeat(["train", "val", "test"], [len(past) for past, _ in pairs])
        with open(args.out, "wb") as file:
            np.savez(file, x=x, y=y, split=split)
    except (OSError, ValueError) as error:
        parser.exit(1, f"forecasting.py: {args.series}: {error}\n")
    print(f"{args.out}: x {x.shape}, y {y.shape}")


if __name__ == "__main__":
    main()
