"""Write tests/golden/<name>.json from the numpy references: python tests/make_golden.py [name ...]

One function a file, named as the file.  Inputs are closed forms, so that no random stream of a
library can change a golden value; each JSON says in "input" how its inputs are made.
"""

import json
import sys
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))


def sgconv_losses(steps=10):
    """Losses of a tiny SGConvModel in float64, every number of it a closed form."""
    import torch

    from sgconv import SGConvConfig, SGConvModel

    config = SGConvConfig(
        d_model=4, n_layers=2, max_len=20, kernel_dim=2, vocab_size=5, causal=True
    )
    model = SGConvModel(config).double()
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            n = torch.arange(p.numel(), dtype=torch.float64).view_as(p)
            p.copy_((1.0 if "norm" in name else 0.0) + 0.5 * torch.sin(0.7 * n + i))
        for block in model.blocks:
            block.mixer.norm.fill_(2.0)
    tokens = (torch.arange(40) ** 2 % 7 % 5).view(2, 20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(steps):
        logits = model(tokens[:, :-1]) @ model.embed.weight.T  # (B, L, D) x (D, 5) -> (B, L, 5)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def sgconv():
    """Kernels of each decay, and the direct two-sided convolution, all by sgconv's references."""
    from sgconv import conv_ref, kernel_ref

    w = np.cos(1.7 * np.arange(12) + 0.3).reshape(4, 3)  # (S, d)
    u = np.sin(0.9 * np.arange(24) ** 1.1)  # (L,)
    constant, power = kernel_ref(w), kernel_ref(w, alpha=1.0, power=1.0)
    return {
        "input": "w = cos(1.7 n + 0.3), n < 12, as (4, 3); u = sin(0.9 n^1.1), n < 24; "
        "back = the power-law kernel",
        "constant": constant.tolist(),
        "ramp_third": kernel_ref(w, alpha=1 / 3, first_factor=2).tolist(),
        "power_law": power.tolist(),
        "causal": conv_ref(u, constant).tolist(),
        "two_sided": conv_ref(u, constant, power).tolist(),
        "losses": sgconv_losses(),
    }


GENERATORS = [sgconv]


def main(names):
    for make in GENERATORS:
        if not names or make.__name__ in names:
            path = FOLDER / "golden" / f"{make.__name__}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(make(), indent=1) + "\n")
            print(f"wrote {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
