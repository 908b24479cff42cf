"""One template for six token mixers: y = M(x) v, with M an L x L matrix, and all M in one picture.

    python benchmarks/token_mixing.py    measures, results/token_mixing.json and .png (20 s)

The template is our reading of the abstract of "A Unified View of Long-Sequence Models towards
Modeling Million-Scale Dependencies" (Hè and Kabic 2023, arXiv:2302.06218), of which we know the
abstract alone: words, matrices and measures here are ours.  v holds one number a token, a channel
of the input or, for attention, a channel of a head's values.  What tells the mixers apart is M:
whether it changes with the input x, and which structure makes it cheaper than L x L numbers.

    attention   lower triangular; any weights that sum to 1; another M for every x
    S4, S4D     lower triangular, Toeplitz; blocks below the diagonal have rank <= d_state
    SGConv      lower triangular, Toeplitz; the far past is coarse and faint
    Fourier     the real part of the discrete Fourier transform, no parameter
    MLP         an MLP across tokens: rank at most its hidden width; its gates change with x

M of the shipped layers is found by probing them, not from formulas: `probe` adds unit impulses to
x in front of a convolutional mixer, `probe_attention` gives the layer's own product the unit matrix
as values.  M v is then compared with the layer's output.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from measured import ROOT, provenance, pyplot, save
from torch import nn

from attention import Attention
from s4 import S4, S4D
from sgconv import SGConv

LIMIT = 1e-10  # of |M v - y| / |y|, float64


class Fourier(nn.Module):
    """y_t = sum_s cos(2 pi t s / L) x_s: the real part of the discrete Fourier transform."""

    def forward(self, x):
        return torch.fft.fft(x, dim=1).real / x.shape[1] ** 0.5  # (B, L, D)


class MLPMixer(nn.Module):
    """y = W2 gelu(W1 x) across tokens, the same W1 (R, L) and W2 (L, R) for all channels."""

    def __init__(self, L, R):
        super().__init__()
        self.W1 = nn.Parameter(torch.randn(R, L) * (2 / L**0.5))
        self.W2 = nn.Parameter(torch.randn(L, R) / R**0.5)

    def forward(self, x):
        return self.W2 @ nn.functional.gelu(self.W1 @ x)  # (L, R) x (B, R, D) -> (B, L, D)

    def matrix(self, x):
        """M(x) of x (1, L, D): gelu(a) = gate(a) a, so M = W2 diag(gate) W1.  (D, L, L)."""
        gate = 0.5 * torch.erfc(-(self.W1 @ x[0]) / 2**0.5)  # (R, D)
        return torch.einsum("tr,rd,rs->dts", self.W2, gate, self.W1)


# ---------------------------------------------------------------- M, by probing


@torch.no_grad()
def probe(layer, x):
    """M of each channel from the responses to unit impulses added to x (1, L, D).  (D, L, L).

    Exact for a layer that is linear and keeps channels apart; `error` tells if one is not.
    """
    impulses = torch.eye(x.shape[1], dtype=x.dtype)[..., None]  # (L, L, 1): row s is 1 at s
    return (layer(x + impulses) - layer(x)).permute(2, 1, 0)  # (s, t, D) -> (D, t, s)


@torch.no_grad()
def probe_attention(layer, x):
    """M of each head at the scores of x (1, L, D): what the layer's product makes of v = 1.

    Queries and keys are the layer's own; the unit matrix as values, (1, H, L, L), leaves the
    weights.  Returns (H, L, L).
    """
    q, k, _ = layer.project(x, torch.arange(x.shape[1]))
    values = torch.eye(x.shape[1], dtype=x.dtype).expand(1, layer.n_kv_heads, -1, -1)
    return layer.attend(q, k, values, layer.causal, None)[0]


@torch.no_grad()
def apply(layer, M, x):
    """The template: y = M v with the layer's own v of x (1, L, D).  (1, L, D)."""
    if not isinstance(layer, Attention):
        return torch.einsum("dts,bsd->btd", M, x)
    v = layer.project(x, torch.arange(x.shape[1]))[2]  # (1, G, L, E)
    v = v.repeat_interleave(layer.n_heads // layer.n_kv_heads, dim=1)  # (1, H, L, E)
    return layer.out((M @ v).transpose(1, 2).flatten(2))  # (H, L, L) x (1, H, L, E)


def matrices(layer, x):
    """M(x) of a layer, (D or H, L, L)."""
    if isinstance(layer, Attention):
        return probe_attention(layer, x)
    if isinstance(layer, MLPMixer):
        return layer.matrix(x).detach()
    return probe(layer, x)


# ---------------------------------------------------------------- what M is like


def error(layer, M, x):
    """max|M v - y| / max|y|, y the layer's own output."""
    y = layer(x).detach()
    return ((apply(layer, M, x) - y).abs().max() / y.abs().max()).item()


def toeplitz_error(M):
    """Largest distance of an entry from the mean of its diagonal, over max|M|.

    0 when only the lag t - s matters.  M: (L, L).
    """
    L = len(M)
    worst = max(
        (M.diagonal(lag) - M.diagonal(lag).mean()).abs().max().item() for lag in range(1 - L, L)
    )
    return worst / M.abs().max().item()


def rank(M, block=slice(None), of=slice(None)):
    """Numerical rank of M[block, of]: its singular values above 1e-10 times the largest of M."""
    least = 1e-10 * torch.linalg.matrix_norm(M, 2)
    return int((torch.linalg.svdvals(M[block, of]) > least).sum())


def off_diagonal_rank(M):
    """Largest numerical rank of the blocks that lead across a step i, forwards or backwards.

    M (L, L) is semiseparable of order N when it is at most N: a state of N numbers, handed from
    token to token, is then enough to compute M v.
    """
    cuts = [(slice(i, None), slice(i)) for i in range(1, len(M))]
    return max(max(rank(M, late, early), rank(M, early, late)) for late, early in cuts)


def change(layer, x, other):
    """max|M(other) - M(x)| / max|M(x)|: 0 when M does not depend on the input."""
    M = matrices(layer, x)
    return ((matrices(layer, other) - M).abs().max() / M.abs().max()).item()


# ---------------------------------------------------------------- the six, measured and drawn


@dataclass(frozen=True)
class Mixer:
    name: str
    layer: nn.Module
    structure: str
    cost: str  # of M v for all D channels, multiply-adds up to a constant
    growth: str  # of the parameters, up to lower order


def mixers(L=64, D=16, N=8, d=4, R=8):
    """The six layers in float64.  N: d_state, d: SGConv's kernel_dim, R: width of the MLP."""
    torch.manual_seed(0)
    steps = dict(dt_min=2 / L, dt_max=8 / L)
    conv = "D L log L, or D L N by steps"
    six = [
        Mixer("attention", Attention(D, 2, causal=True), "data dependent", "D L²", "4 D²"),
        Mixer("S4", S4(D, N, **steps), "Toeplitz, semiseparable", conv, "4 D N"),
        Mixer("S4D", S4D(D, N, **steps), "Toeplitz, semiseparable", conv, "3 D N"),
        Mixer("SGConv", SGConv(D, L, d), "Toeplitz, multi-scale", "D L log L", "D d log(L/d)"),
        Mixer("Fourier", Fourier(), "fixed, without parameters", "D L log L", "0"),
        Mixer("MLP", MLPMixer(L, R), "low rank, data dependent", "D L R", "2 L R"),
    ]
    for mixer in six:
        mixer.layer.double()
    return six


def inputs(L, D, seed):
    """(1, L, D) float64, large enough that softmax weights differ visibly."""
    return 4 * torch.randn(1, L, D, generator=torch.Generator().manual_seed(seed)).double()


def measure(mixer, x, other):
    """One row of the result, the worst head or channel of each measure, and the first matrix."""
    M = matrices(mixer.layer, x)
    row = {
        "mixer": mixer.name,
        "structure": mixer.structure,
        "cost": mixer.cost,
        "growth": mixer.growth,
        "parameters": sum(p.numel() for p in mixer.layer.parameters()),
        "error of M v": error(mixer.layer, M, x),
        "Toeplitz error": max(map(toeplitz_error, M)),
        "rank": max(map(rank, M)),
        "off-diagonal rank": max(map(off_diagonal_rank, M)),
        "change with x": change(mixer.layer, x, other),
    }
    return row, M[0]


def draw(ax, M, title):
    """Show |M| as an image; the square root makes small entries visible."""
    size = (M.abs() / M.abs().max()).sqrt()
    image = ax.imshow(size, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    ax.set_title(title, fontsize=12)
    ax.set_xlabel("input token")
    ax.set_ylabel("output token")
    ax.set_xticks([0, len(M) - 1])
    ax.set_yticks([0, len(M) - 1])
    return image


def plot_all(rows, shown, path):
    """The six matrices with their structure, cost and rank."""
    plt = pyplot()
    fig, axes = plt.subplots(2, 3, figsize=(11, 8.4), layout="constrained")
    for ax, row, M in zip(axes.flat, rows, shown, strict=True):
        image = draw(ax, M, f"{row['mixer']}: {row['structure']}")
        changes = (
            "changes with the input" if row["change with x"] > 1e-9 else "same for every input"
        )
        ax.set_xlabel(
            f"cost {row['cost']}, off-diagonal rank {row['off-diagonal rank']}\n{changes}"
        )
    bar = fig.colorbar(image, ax=axes, shrink=0.6, ticks=[0, 0.1**0.5, 0.5**0.5, 1])
    bar.ax.set_yticklabels(["0", "0.1", "0.5", "1"])
    bar.set_label("|M[t, s]| / max|M|")
    fig.suptitle("Every token mixer is a matrix: y = M(x) v", fontsize=14)
    fig.savefig(path, dpi=110)


def plot_three(rows, shown, path):
    """Attention, S4 and SGConv in one row: the picture at the top of README.md."""
    captions = {
        "attention": "Attention: weights depend on the data",
        "S4": "S4: a kernel from a small state",
        "SGConv": "SGConv: a kernel, coarser with distance",
    }
    plt = pyplot()
    fig, axes = plt.subplots(1, 3, figsize=(11, 3.9), layout="constrained")
    matrices = {row["mixer"]: M for row, M in zip(rows, shown, strict=True)}
    for ax, (name, caption) in zip(axes, captions.items(), strict=True):
        draw(ax, matrices[name], caption)
    fig.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--length", type=int, default=64, help="tokens L (64)")
    parser.add_argument("--width", type=int, default=16, help="channels D (16)")
    parser.add_argument("--state", type=int, default=8, help="state size N of S4 and S4D (8)")
    out = ROOT / "results" / "token_mixing.json"
    parser.add_argument("--out", type=Path, default=out, help="result file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    six = mixers(args.length, args.width, args.state)
    x, other = (inputs(args.length, args.width, seed) for seed in (1, 2))
    rows, shown = zip(*(measure(mixer, x, other) for mixer in six), strict=True)
    settings = {"L": args.length, "D": args.width, "N": args.state, "seeds": [0, 1, 2]}
    settings |= {"kernel_dim": 4, "hidden": 8, "dtype": "float64", "rank_tolerance": 1e-10}
    save(args.out, {"settings": settings, "mixers": rows} | provenance())
    for row in rows:
        print("  ".join(f"{v:.1e}" if isinstance(v, float) else str(v) for v in row.values()))
    plot_all(rows, shown, args.out.with_suffix(".png"))
    plot_three(rows, shown, args.out.with_name("three_mixers.png"))
    return 0 if all(row["error of M v"] <= LIMIT for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
