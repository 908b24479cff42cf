"""One template for six token mixers: y = M(x) v, with M an L x L matrix, and all M in one picture.

    python benchmarks/token_mixing.py    results/token_mixing.json, .png and three_mixers.png

The template is our reading of the abstract of "A Unified View of Long-Sequence Models towards
Modeling Million-Scale Dependencies" (Hè and Kabic 2023, arXiv:2302.06218).  v has one number per
token: a channel of the input or, for attention, a channel of a head's values.  Mixers differ in M:
whether it changes with the input x, and which structure makes it cheaper than L x L numbers.

M is found by probing the layers, not from formulas: `probe` adds unit impulses to the input of a
convolution, `probe_attention` passes the unit matrix as values.  Then M v is compared with the
layer's output.
"""

import sys
from typing import NamedTuple

import torch
from measured import ROOT, provenance, pyplot, save, takes_no_arguments
from torch import nn

from attention import Attention
from s4 import S4, S4D
from sgconv import SGConv

LIMIT = 1e-10  # of max|M v - y| / max|y|, float64


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


def probe(layer, x):
    """M of each channel from the responses to unit impulses added to x (1, L, D).  (D, L, L).

    Exact if the layer is linear and keeps channels apart; `error` shows if it is not.
    """
    impulses = torch.eye(x.shape[1], dtype=x.dtype)[..., None]  # (L, L, 1): row s is 1 at s
    responses = layer(x + impulses) - layer(x)  # (s, t, D)
    return responses.permute(2, 1, 0)


def probe_attention(layer, x):
    """M of each head for x (1, L, D): the unit matrix as values leaves the weights.  (H, L, L)."""
    L = x.shape[1]
    q, k, _ = layer.project(x, torch.arange(L))
    values = torch.eye(L, dtype=x.dtype).expand(1, layer.n_kv_heads, L, L)
    return layer.attend(q, k, values, layer.causal, None)[0]


@torch.no_grad()
def matrices(layer, x):
    """M(x) of a layer, (D or H, L, L)."""
    if isinstance(layer, Attention):
        return probe_attention(layer, x)
    if isinstance(layer, MLPMixer):
        return layer.matrix(x)
    return probe(layer, x)


@torch.no_grad()
def apply(layer, M, x):
    """The template: y = M v with the layer's own v of x (1, L, D).  (1, L, D)."""
    if not isinstance(layer, Attention):
        return torch.einsum("dts,bsd->btd", M, x)
    _, _, v = layer.project(x, torch.arange(x.shape[1]))  # (1, G, L, E)
    v = v.repeat_interleave(layer.n_heads // layer.n_kv_heads, dim=1)  # (1, H, L, E)
    return layer.out((M @ v).transpose(1, 2).flatten(2))  # (H, L, L) x (1, H, L, E)


# ---------------------------------------------------------------- measures


def distance(a, b):
    """max|a - b| / max|b|."""
    return ((a - b).abs().max() / b.abs().max()).item()


def error(layer, M, x):
    """How far M v is from the layer's own output."""
    return distance(apply(layer, M, x), layer(x).detach())


def toeplitz_error(M):
    """Largest distance of an entry from the mean of its diagonal, over max|M|.  M: (L, L).

    0 if an entry depends on the lag t - s alone.
    """
    worst = 0.0
    for lag in range(1 - len(M), len(M)):
        diagonal = M.diagonal(lag)
        worst = max(worst, (diagonal - diagonal.mean()).abs().max().item())
    return worst / M.abs().max().item()


def rank(block, M):
    """Number of singular values of a block of M above 1e-10 times the largest of M."""
    least = 1e-10 * torch.linalg.matrix_norm(M, 2)
    return int((torch.linalg.svdvals(block) > least).sum())


def off_diagonal_rank(M):
    """Largest numerical rank of a block off the diagonal, below or above it.

    M (L, L) is semiseparable of order N if it is at most N: a state of N numbers, passed from token
    to token, is then enough to compute M v.
    """
    largest = 0
    for i in range(1, len(M)):
        largest = max(largest, rank(M[i:, :i], M), rank(M[:i, i:], M))
    return largest


def change(layer, x, other):
    """How far M(other) is from M(x): 0 if M does not depend on the input."""
    return distance(matrices(layer, other), matrices(layer, x))


# ---------------------------------------------------------------- the six mixers


class Mixer(NamedTuple):
    name: str
    layer: nn.Module
    structure: str
    cost: str  # multiply-adds of M v for all D channels, up to a constant


def mixers(L=64, D=16, N=8, d=4, R=8):
    """The six layers in float64.  N: d_state, d: SGConv's kernel_dim, R: width of the MLP."""
    torch.manual_seed(0)
    steps = {"dt_min": 2 / L, "dt_max": 8 / L}
    conv = "D L log L, or D L N by steps"
    six = [
        Mixer("attention", Attention(D, 2, causal=True), "data dependent", "D L²"),
        Mixer("S4", S4(D, N, **steps), "Toeplitz, semiseparable", conv),
        Mixer("S4D", S4D(D, N, **steps), "Toeplitz, semiseparable", conv),
        Mixer("SGConv", SGConv(D, L, d), "Toeplitz, multi-scale", "D L log L"),
        Mixer("Fourier", Fourier(), "fixed, without parameters", "D L log L"),
        Mixer("MLP", MLPMixer(L, R), "low rank, data dependent", "D L R"),
    ]
    for mixer in six:
        mixer.layer.double()
    return six


def inputs(L, D, seed):
    """(1, L, D) float64, large enough that softmax weights differ visibly."""
    return 4 * torch.randn(1, L, D, generator=torch.Generator().manual_seed(seed)).double()


def measure(mixer, M, x, other):
    """One row of the result: the worst head or channel of each measure."""
    return {
        "mixer": mixer.name,
        "structure": mixer.structure,
        "cost": mixer.cost,
        "error of M v": error(mixer.layer, M, x),
        "Toeplitz error": max(map(toeplitz_error, M)),
        "off-diagonal rank": max(map(off_diagonal_rank, M)),
        "change with x": change(mixer.layer, x, other),
    }


# ---------------------------------------------------------------- pictures


def draw(ax, M, title):
    """Show |M| as an image; the square root makes small entries visible."""
    image = ax.imshow((M.abs() / M.abs().max()).sqrt(), cmap="Blues", vmin=0, vmax=1)
    ax.set_title(title, fontsize=11)
    ax.set(xlabel="input token", ylabel="output token")
    ax.set_xticks([0, len(M) - 1])
    ax.set_yticks([0, len(M) - 1])
    return image


def plot_all(rows, shown, path):
    """The six matrices with their structure, cost and rank."""
    plt = pyplot()
    fig, axes = plt.subplots(2, 3, figsize=(11, 8.4), layout="constrained")
    for ax, row in zip(axes.flat, rows, strict=True):
        image = draw(ax, shown[row["mixer"]], f"{row['mixer']}: {row['structure']}")
        fixed = row["change with x"] < 1e-9
        text = "same for every input" if fixed else "changes with the input"
        blocks = f"off-diagonal rank {row['off-diagonal rank']}"
        ax.set_xlabel(f"input token\ncost {row['cost']}\n{blocks}, {text}")
    bar = fig.colorbar(image, ax=axes, shrink=0.6, ticks=[0, 0.1**0.5, 0.5**0.5, 1])
    bar.ax.set_yticklabels(["0", "0.1", "0.5", "1"])
    bar.set_label("|M[t, s]| / max|M|")
    fig.suptitle("Every token mixer is a matrix: y = M(x) v", fontsize=14)
    fig.savefig(path)


def plot_three(shown, path):
    """Attention, S4 and SGConv in one row: the picture at the top of README.md."""
    captions = {
        "attention": "Attention: weights depend on the data",
        "S4": "S4: a kernel from a small state",
        "SGConv": "SGConv: a kernel, coarser with distance",
    }
    plt = pyplot()
    fig, axes = plt.subplots(1, 3, figsize=(11, 3.9), layout="constrained")
    for ax, (name, caption) in zip(axes, captions.items(), strict=True):
        draw(ax, shown[name], caption)
    fig.savefig(path)


def main():
    torch.set_num_threads(1)
    origin = provenance()
    x = inputs(64, 16, seed=1)
    other = inputs(64, 16, seed=2)
    rows = []
    shown = {}
    for mixer in mixers():
        M = matrices(mixer.layer, x)
        rows.append(measure(mixer, M, x, other))
        shown[mixer.name] = M[0]
        print("  ".join(f"{v:.1e}" if isinstance(v, float) else str(v) for v in rows[-1].values()))
    settings = {"L": 64, "D": 16, "N": 8, "kernel_dim": 4, "hidden": 8}
    folder = ROOT / "results"
    save(folder / "token_mixing.json", {"settings": settings, "mixers": rows, **origin})
    plot_all(rows, shown, folder / "token_mixing.png")
    plot_three(shown, folder / "three_mixers.png")
    return 0 if all(row["error of M v"] <= LIMIT for row in rows) else 1


if __name__ == "__main__":
    takes_no_arguments(__doc__)
    sys.exit(main())
