"""Does longer context help?  Predict the same bytes from contexts of 1 to 512 bytes.

    python benchmarks/context.py    three seeds, results/context.json

The Transformer and the data of byte_lm.py (Python source, every tenth file held out), trained on
windows of 512 bytes.  Bytes near the start of a training window have a short context too, so short
contexts are not new to the model.  arXiv:2302.06218 says that longer contexts perform better,
depending on the application.
"""

import numpy as np
import torch
import torch.nn.functional as F
from byte_lm import LMConfig, corpus, count, train, windows
from measured import ROOT, complete, takes_no_arguments

L = 512  # bytes per window
BATCH = 4  # windows per step
CONTEXTS = [2**k for k in range(10)]  # 1 ... 512
CONFIG = LMConfig(d_model=64, n_layers=2, n_heads=4)


@torch.no_grad()
def losses(model, data, context, n):
    """Loss in nats of n evenly spread bytes, each predicted from the `context` bytes before it.

    The bytes are the same for every context up to L.  Returns (n,).
    """
    targets = torch.linspace(L, len(data) - 1, n, dtype=torch.float64).long()
    examples = windows(data, targets - context, context)  # (n, context + 1)
    parts = []
    for part in examples.split(max(1, 2**14 // context)):
        last = model(part[:, :-1])[:, -1]  # (n, vocab)
        parts.append(F.cross_entropy(last, part[:, -1], reduction="none"))
    return torch.cat(parts)


def main():
    torch.set_num_threads(1)
    data, held_out = corpus()

    def measure(seed, steps, lr, n):
        model, seconds = train(CONFIG, data, seed, steps, lr, L=L, batch=BATCH)
        model.eval()
        nats = [losses(model, held_out, context, n) for context in CONTEXTS]
        nats = torch.stack(nats)  # (10, n)
        gain = nats[:-1] - nats[1:]  # of each doubling, byte by byte
        return {
            "loss": nats.mean(1).tolist(),
            "gain": gain.mean(1).tolist(),
            "gain_error": (gain.std(1) / n**0.5).tolist(),  # standard error over the bytes
            "cpu_s": round(seconds, 1),
        }

    keys = [{"seed": seed, "steps": 500, "lr": 3e-3, "n": 1024} for seed in range(3)]
    settings = {"contexts": CONTEXTS, "L": L, "batch": BATCH, "bytes": [len(data), len(held_out)]}
    settings["params"] = count(CONFIG, L)["params"]
    runs = complete(ROOT / "results/context.json", keys, measure, settings)["runs"]
    means = np.mean([run["loss"] for run in runs], 0)
    print("context  nats per byte")
    for context, loss in zip(CONTEXTS, means, strict=True):
        print(f"{context:7}  {loss:.4f}")


if __name__ == "__main__":
    takes_no_arguments(__doc__)
    main()
