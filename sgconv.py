"""SGConv: a convolution as long as the sequence, from O(log L) numbers a channel.

    k = [k_0, k_1, ..., k_{S-1}] / Z,   k_i = alpha^i Upsample(w_i)     Li et al. 2022,
    y = k * u + D_skip u                                               arXiv:2210.09298, section 3

Every sub-kernel w_i has the same d numbers, stretched linearly over d, d, 2d, 4d, 8d, ... lags: the
near past is described finely, the far past coarsely, and each further piece is damped.  That is the
whole idea: parameters grow with log L, and weights decay with the lag.

    paper symbol   code name          shape
    L              max_len            longest input; kernel(L) of a shorter one is its beginning
    d              kernel_dim         numbers in one sub-kernel
    N (scales)     n_scales, S        1 + ceil(log2(max_len / (first_factor kernel_dim)))
    w_i            w[i]               (D, d), (2, D, d) when bidirectional; w is (S, ..., D, d)
    alpha^i        decay(i, lags, D)  broadcasts to (D, lags)
    Upsample       upsample           (..., d) -> (..., factor d)
    Z              norm               (..., D, 1): |k|_2 = 1 at construction, constant after
    k              kernel(L)          (D, L); (2, D, L): row 0 lags 0, 1, ..., row 1 -1, -2, ...

The kernels of the Long Range Arena results, all bidirectional (PUBLISHED holds the columns from
kernel_dim on; Path-X also has first_factor 2, which doubles every stretch):

    task             L      layers  D    kernel_dim  decay            init
    listops          2048   8       128  1           constant_decay   normal_init
    text             4096   6       256  2           constant_decay   normal_init
    retrieval        4000   6       256  1           constant_decay   normal_init
    image (CIFAR)    1024   6       512  32          power_law_decay  normal_init
    pathfinder       1024   6       256  32          constant_decay   normal_init
    pathx            16384  6       256  64          ramp_decay       cosine_init

Departures from the paper, marked on their lines: the number of scales is rounded up, one Z each
channel.
Not included: recurrent mode (this kernel is no small state space), sub-kernels added up in place of
concatenated, learned decays, the BatchNorm of most published models (LayerNorm here).

    python sgconv.py            check table, sizes, demo, timing (about 30 s on two cores)
    python sgconv.py --check    check table alone (2 s)

The demo names which of eight periods a sine in noise has: accuracy 1.00, chance 0.125.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------- reference: numpy, float64


def upsample_ref(w, factor):
    """Linear interpolation of w (d,) to (factor d,) samples, each cell split into `factor` cells.

    New cell t is centred at (t + 1/2) / factor - 1/2 of the old grid; beyond the outer centres the
    outer values hold.  So [0, 1, 2] by 2 is [0, .25, .75, 1.25, 1.75, 2].
    """
    centres = (np.arange(factor * len(w)) + 0.5) / factor - 0.5
    return np.interp(centres, np.arange(len(w)), w)


def kernel_ref(w, alpha=0.5, power=0.0, first_factor=1):
    """Multi-scale kernel of one channel before the division by Z (arXiv:2210.09298, section 3.2).

        k_i = alpha^i (lag + 1)^-power Upsample(w_i)

    w: (S, d).  Returns (first_factor d 2^(S-1),): d, d, 2d, 4d, ... lags, times first_factor.
    alpha = 1/2 and power = 0 is the paper's text; alpha = 1 and power = 1 its Image result.
    """
    pieces = []
    for i, w_i in enumerate(w):
        factor = first_factor * 2 ** max(i - 1, 0)
        pieces.append(alpha**i * upsample_ref(w_i, factor))
    k = np.concatenate(pieces)
    return k * (np.arange(len(k)) + 1.0) ** -power


def conv_ref(u, k, k_back=None):
    """Direct convolution of one channel, O(L^2).

        y[t] = sum_{s >= 0} k[s] u[t - s] + sum_{s >= 1} k_back[s - 1] u[t + s]

    u, k, k_back: (L,).  Without k_back it is causal.
    """
    y = np.zeros(len(u))
    for t in range(len(u)):
        for source in range(len(u)):
            lag = t - source
            if lag >= 0:
                y[t] += k[lag] * u[source]
            elif k_back is not None:
                y[t] += k_back[-lag - 1] * u[source]
    return y


# ---------------------------------------------------------------- the variants: decays and inits


def constant_decay(scale, lags, d_model):
    """alpha^i with alpha = 1/2 (arXiv:2210.09298, section 3.2).  Returns a number."""
    return 0.5**scale


def ramp_decay(scale, lags, d_model, slowest=1.0, fastest=3.0):
    """alpha_h^i, 1 / alpha_h from `slowest` to `fastest` over the channels (Path-X).  (D, 1)."""
    base = torch.linspace(slowest, fastest, d_model, dtype=lags.dtype, device=lags.device)
    return base[:, None] ** -scale


def power_law_decay(scale, lags, d_model, power=1.0):
    """(lag + 1)^-power in place of a decay by scale (Image).  (lags,)."""
    return (lags + 1.0) ** -power


def normal_init(shape):
    """w ~ N(0, 1).  shape (S, ..., D, d)."""
    return torch.randn(shape)


def cosine_init(shape):
    """Channel h starts as h cycles of a cosine over its d samples, channels shuffled (Path-X)."""
    d_model, d = shape[-2:]
    phase = torch.arange(d_model)[:, None] * torch.linspace(0, 2 * math.pi, d)  # (D, d)
    waves = [phase.cos()[torch.randperm(d_model)] for _ in range(math.prod(shape[:-2]))]
    return torch.stack(waves).reshape(shape)


# The kernel of each Long Range Arena result: SGConvConfig(..., **PUBLISHED[task]).
PUBLISHED = {
    "listops": dict(kernel_dim=1),
    "text": dict(kernel_dim=2),
    "retrieval": dict(kernel_dim=1),
    "image": dict(kernel_dim=32, decay=power_law_decay),
    "pathfinder": dict(kernel_dim=32),
    "pathx": dict(kernel_dim=64, first_factor=2, decay=ramp_decay, init=cosine_init),
}

# ---------------------------------------------------------------- fast: torch


def upsample(w, factor):
    """Linear interpolation (..., d) -> (..., factor d), the same as upsample_ref.

    Each new sample mixes an old one with one neighbour, with `factor` different weights only: a
    product with a (3, factor) matrix, a quarter of the time of F.interpolate with its backward.
    """
    if factor == 1:
        return w
    offset = (torch.arange(factor, dtype=w.dtype, device=w.device) + 0.5) / factor - 0.5
    left, right = (-offset).clamp(min=0), offset.clamp(min=0)
    weights = torch.stack([left, 1 - left - right, right])  # (3, factor)
    before = torch.cat([w[..., :1], w[..., :-1]], -1)
    after = torch.cat([w[..., 1:], w[..., -1:]], -1)
    return (torch.stack([before, w, after], -1) @ weights).flatten(-2)  # (..., d, 3) x (3, factor)


def multi_scale_kernel(w, L, decay=constant_decay, first_factor=1):
    """w (S, ..., D, d) -> (..., D, L): the first L lags of kernel_ref.  O(D L) time and memory.

    decay(scale, lags, D) gives the damping of one piece, broadcastable to (D, lags).
    """
    pieces, start = [], 0
    for scale, w_i in enumerate(w):
        if start >= L:
            break
        piece = upsample(w_i, first_factor * 2 ** max(scale - 1, 0))  # (..., D, lags)
        stop = start + piece.shape[-1]
        lags = torch.arange(start, stop, dtype=w.dtype, device=w.device)
        pieces.append(piece * decay(scale, lags, w.shape[-2]))
        start = stop
    return torch.cat(pieces, -1)[..., :L]


def fft_length(n):  # same as s4.py:fft_length
    """A small even number >= n without a prime factor above 5: other FFT lengths are slow."""
    best = 1 << max(1, (n - 1).bit_length())
    for three in (1, 3, 9, 27, 81):
        for five in (1, 5, 25, 125):
            odd = three * five
            best = min(best, odd << max(1, (-(-n // odd) - 1).bit_length()))
    return best


class CircularConv(torch.autograd.Function):  # same as s4.py:CircularConv
    """u (B, D, L), k (D, n), both real -> (B, D, L): circular convolution of period n, cut to L.

    Written out because autograd turns the backward of a real FFT into a full complex one, at twice
    the time and memory.  Not for second derivatives (an error), nor for torch.func.
    """

    @staticmethod
    def forward(ctx, u, k, n):
        U, K_f = torch.fft.rfft(u, n), torch.fft.rfft(k, n)  # (B, D, n/2+1), (D, n/2+1)
        ctx.save_for_backward(U, K_f)
        ctx.lengths = n, u.shape[-1], k.shape[-1]
        return torch.fft.irfft(U * K_f, n)[..., : u.shape[-1]]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        U, K_f = ctx.saved_tensors
        n, length, k_length = ctx.lengths
        G = torch.fft.rfft(grad, n)  # (B, D, n/2+1)
        grad_k = torch.fft.irfft((G * U.conj()).sum(0), n)[..., :k_length]
        grad_u = torch.fft.irfft(G.mul_(K_f.conj()), n)[..., :length]
        return grad_u, grad_k, None


def fft_conv(u, K):  # same as s4.py:fft_conv
    """Convolve each channel of u (B, L, D) with its kernel K in O(L log L).  Returns (B, L, D).

    K (D, L): causal, y[t] = sum_s K[s] u[t - s].  K (2, D, L): row 0 holds the lags 0, 1, ...,
    row 1 the lags -1, -2, ...
    """
    L, K = u.shape[1], K[..., : u.shape[1]]
    if not u.numel():  # which FFT libraries refuse
        return u + 0 * K.sum()
    n = fft_length(2 * L - 1)
    if K.ndim == 3:
        K = torch.cat([K[0], K.new_zeros(K.shape[1], n - 2 * L + 1), K[1, :, : L - 1].flip(-1)], -1)
    return CircularConv.apply(u.transpose(1, 2), K, n).transpose(1, 2)  # (B, L, D)


# ---------------------------------------------------------------- layer and model


class SGConv(nn.Module):
    """The SGConv token mixer, linear: y = k * u + D_skip u.  (B, L, D) -> (B, L, D), L <= max_len.

    kernel_dim: numbers in a sub-kernel; decay, init, first_factor: the variant (head of the file).
    Parameters: D kernel_dim n_scales for the kernel (twice that if bidirectional), D for the skip.
    ValueError when max_len has no room for one sub-kernel of first_factor kernel_dim lags.
    """

    def __init__(
        self,
        d_model,
        max_len,
        kernel_dim=64,
        bidirectional=False,
        decay=constant_decay,
        init=normal_init,
        first_factor=1,
    ):
        super().__init__()
        if min(d_model, kernel_dim, first_factor) < 1 or max_len < first_factor * kernel_dim:
            raise ValueError(
                f"expected d_model, kernel_dim, first_factor >= 1 and max_len >= first_factor * "
                f"kernel_dim, got {d_model}, {kernel_dim}, {first_factor} and max_len {max_len}"
            )
        self.d_model, self.max_len, self.bidirectional = d_model, max_len, bidirectional
        self.built_len, self.decay, self.first_factor = max_len, decay, first_factor
        # differs from the paper: ceil(log2(L/d)), not floor, so that the kernel reaches max_len
        n_scales = 1 + ((max_len - 1) // (first_factor * kernel_dim)).bit_length()
        rows = (2,) if bidirectional else ()
        self.w = nn.Parameter(init((n_scales, *rows, d_model, kernel_dim)))  # (S, ..., D, d)
        self.D_skip = nn.Parameter(torch.randn(d_model))
        whole = first_factor * kernel_dim * 2 ** (n_scales - 1)  # >= max_len
        with torch.no_grad():
            w = self.w.to(torch.promote_types(self.w.dtype, torch.float32))
            k = multi_scale_kernel(w, whole, decay, first_factor)  # (..., D, whole)
        # differs from the paper: one Z a channel; a buffer, since trained w belong to their Z
        norm = torch.linalg.vector_norm(k, dim=-1, keepdim=True, dtype=torch.float64)
        if not self.w.is_meta and not (norm > 0).all():
            raise ValueError(f"init gives {int((norm <= 0).sum())} kernels of norm 0")
        self.register_buffer("norm", norm.to(k.dtype))  # (..., D, 1)

    def kernel(self, L):
        """Impulse response without the skip: (D, L), (2, D, L) when bidirectional (fft_conv).

        kernel(L) is the beginning of kernel(max_len).  ValueError unless 1 <= L <= max_len.
        """
        if not 1 <= L <= self.max_len:
            raise ValueError(
                f"length {L} is outside 1 .. max_len = {self.max_len}: construct with a larger "
                f"max_len, or resample({L}) if the same signal is sampled at another rate"
            )
        resampled = self.max_len != self.built_len
        lags = self.built_len if resampled else L
        with torch.autocast(self.w.device.type, enabled=False):  # bf16 would ruin it
            dtype = torch.promote_types(self.w.dtype, torch.float32)
            w = self.w.to(dtype) / self.norm.to(dtype)
            K = multi_scale_kernel(w, lags, self.decay, self.first_factor)
            if resampled:  # stretched cell by cell
                flat = F.interpolate(K.reshape(1, -1, lags), self.max_len, mode="linear")
                K = flat.view(*K.shape[:-1], -1)[..., :L] * (lags / self.max_len)
        return K

    def resample(self, new_max_len):
        """Read from now on signals that are sampled new_max_len / max_len times as densely.

        The kernel keeps its shape and is read on the new grid, linearly, with no filter against
        aliasing; its sum stays where new_max_len is a multiple or half of max_len.  No parameter
        changes and no state_dict records it: call it again after loading.  Returns self.
        """
        if new_max_len < 1:
            raise ValueError(f"expected new_max_len >= 1, got {new_max_len}")
        self.max_len = new_max_len
        return self

    def forward(self, x, keep=None):
        """x (B, L, D), keep (B, L) bool: False positions count as absent (padding at the ends)."""
        self.check(x, keep)
        u = x if keep is None else x.masked_fill(~keep[..., None], 0)
        K = self.kernel(x.shape[1])
        K = torch.cat([K[..., :1] + self.skip_at_zero(), K[..., 1:]], -1)
        return fft_conv(u.to(K.dtype), K).to(x.dtype)

    def check(self, x, keep=None):  # same as s4.py:S4.check
        if x.ndim != 3 or x.shape[1] < 1 or x.shape[2] != self.d_model or not x.is_floating_point():
            text = f"(B, L >= 1, {self.d_model}) floating, got {tuple(x.shape)} {x.dtype}"
            raise ValueError(f"expected x {text}")
        if keep is not None and (keep.shape != x.shape[:2] or keep.dtype != torch.bool):
            raise ValueError(
                f"expected keep {tuple(x.shape[:2])} bool, got {tuple(keep.shape)} {keep.dtype}"
            )

    def skip_at_zero(self):  # same as s4.py:S4.skip_at_zero
        """The skip as a lag-zero tap, which costs no pass over (B, L, D)."""
        D_skip = self.D_skip[:, None]  # (D, 1)
        return torch.stack([D_skip, torch.zeros_like(D_skip)]) if self.bidirectional else D_skip


class SGConv2d(nn.Module):
    """SGConv over an image read row by row, both ways: (B, D, H, W) -> (B, D, H, W), as nn.Conv2d.

    Takes the place of a depthwise convolution such as that of ConvNeXt's blocks (arXiv:2210.09298,
    section 4).  Pixel (i, j) is reached from (s, t) through the lag (i - s) width + j - t, so the
    width is part of what is learned: ValueError for another image size.
    """

    def __init__(self, d_model, height, width, kernel_dim=64, **variant):
        super().__init__()
        self.size = height, width
        self.conv = SGConv(d_model, height * width, kernel_dim, bidirectional=True, **variant)

    def forward(self, x):
        if x.ndim != 4 or tuple(x.shape[2:]) != self.size:
            raise ValueError(
                f"expected x (B, D, {self.size[0]}, {self.size[1]}), got {tuple(x.shape)}"
            )
        y = self.conv(x.flatten(2).transpose(1, 2))  # (B, D, H, W) -> (B, H W, D)
        return y.transpose(1, 2).unflatten(2, self.size)  # (B, D, H, W)


class SGConvBlock(nn.Module):  # same as s4.py:S4Block
    """norm, mixer, GELU, dropout, GLU, residual: (B, L, D) -> (B, L, D)."""

    def __init__(self, d_model, mixer, dropout=0.0):
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.mixer = mixer
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(d_model, 2 * d_model)

    def forward(self, x, keep=None):
        y = self.mixer(self.norm(x), keep)
        return x + F.glu(self.out(self.dropout(F.gelu(y))), dim=-1)


@dataclass(frozen=True)
class SGConvConfig:
    """Exactly one of vocab_size (tokens) and n_channels (real values) is set."""

    d_model: int = 64
    n_layers: int = 2
    max_len: int = 1024
    kernel_dim: int = 32
    vocab_size: int | None = None
    n_channels: int | None = None
    causal: bool = False
    dropout: float = 0.0
    decay: Callable = constant_decay
    init: Callable = normal_init
    first_factor: int = 1


def sgconv_mixer(config, i):
    """The default mixer of block i."""
    variant = dict(decay=config.decay, init=config.init, first_factor=config.first_factor)
    return SGConv(config.d_model, config.max_len, config.kernel_dim, not config.causal, **variant)


class SGConvModel(nn.Module):
    """Embedding, blocks, final norm: tokens (B, L) int64 or values (B, L, C) float -> (B, L, D)."""

    def __init__(self, config, mixer=sgconv_mixer):
        super().__init__()
        if (config.vocab_size is None) == (config.n_channels is None):
            raise ValueError(
                "set exactly one of vocab_size and n_channels, "
                f"got {config.vocab_size} and {config.n_channels}"
            )
        self.config = config
        D, V = config.d_model, config.vocab_size
        self.embed = nn.Linear(config.n_channels, D) if V is None else nn.Embedding(V, D)
        self.blocks = nn.ModuleList(
            SGConvBlock(D, mixer(config, i), config.dropout) for i in range(config.n_layers)
        )
        self.norm = nn.LayerNorm(D)

    def forward(self, x, keep=None):
        """x (B, L) int64 or (B, L, C) float, keep (B, L) bool -> features (B, L, D)."""
        h = self.embed(x)  # (B, L, D)
        for block in self.blocks:
            h = block(h, keep)
        return self.norm(h)

    def param_groups(self, lr, weight_decay):
        """AdamW groups: kernels learn at min(lr, 1e-3) without decay; skips, biases and norms at lr
        without decay; the weights of linear maps and embeddings at lr with decay.
        """
        mixers = [m for m in self.modules() if hasattr(m, "kernel")]
        known = {id(p) for m in mixers for p in m.parameters()}
        known -= {id(getattr(m, "D_skip", None)) for m in mixers}
        kernels = [p for p in self.parameters() if id(p) in known]
        others = [p for p in self.parameters() if id(p) not in known]
        plain, decayed = [p for p in others if p.ndim < 2], [p for p in others if p.ndim >= 2]
        return [
            {"params": kernels, "lr": min(lr, 1e-3), "weight_decay": 0.0},
            {"params": plain, "lr": lr, "weight_decay": 0.0},
            {"params": decayed, "lr": lr, "weight_decay": weight_decay},
        ]


# ---------------------------------------------------------------- self-check


def rel_err(a, b):
    """max|a - b| / max|b|, with max|b| > 0."""
    a, b = (torch.as_tensor(x).detach().double().cpu() for x in (a, b))
    scale = b.abs().max().item()
    assert a.shape == b.shape and scale > 0, f"{tuple(a.shape)}, {tuple(b.shape)}, largest {scale}"
    return (a - b).abs().max().item() / scale


def check_layer(rows, dtype, device, limit, bidirectional):
    """The layer against conv_ref over its own kernel; padding; prefix."""
    torch.manual_seed(1)
    kind = "two-sided" if bidirectional else "causal"
    layer = SGConv(3, 40, 4, bidirectional).to(device, dtype)
    u = torch.randn(2, 37, 3, device=device, dtype=dtype)
    keep = torch.arange(37, device=device) < torch.tensor([[37], [23]], device=device)
    K = layer.kernel(37).detach().double().cpu().numpy()
    y, skip = np.zeros(u.shape), layer.D_skip.detach().double().cpu().numpy()
    for b, d in np.ndindex(2, 3):
        real = np.where(keep[b].cpu(), u[b, :, d].double().cpu(), 0)
        kernels = K[:, d] if bidirectional else [K[d]]
        y[b, :, d] = conv_ref(real, *kernels) + skip[d] * real
    rows.append((f"layer {kind}: FFT == direct convolution", rel_err(layer(u, keep), y), limit))
    short = rel_err(layer(u, keep)[1, :23], layer(u[1:, :23])[0])
    rows.append((f"layer {kind}: padded == unpadded", short, limit))
    short = rel_err(layer.kernel(11), layer.kernel(40)[..., :11])
    rows.append((f"kernel {kind}: kernel(11) begins kernel(40)", short, limit))


def check_2d(dtype, device, limit):
    """SGConv2d against the sum over all pairs of pixels."""
    image = SGConv2d(2, 3, 4, 2).to(device, dtype)
    x = torch.randn(1, 2, 3, 4, device=device, dtype=dtype)
    K, y = image.conv.kernel(12), x * image.conv.D_skip[:, None, None]
    for i, j, s, t in np.ndindex(3, 4, 3, 4):
        lag = (i - s) * 4 + j - t
        y[0, :, i, j] += (K[0, :, lag] if lag >= 0 else K[1, :, -lag - 1]) * x[0, :, s, t]
    return "SGConv2d == sum over pixels", rel_err(image(x), y), limit


def self_check(dtype=torch.float64, device="cpu"):
    """Each fast step against the slower one before it, then exact properties.

    Returns [(name, error, limit)].
    """
    limit = 1e-12 if dtype == torch.float64 else 1e-5
    torch.manual_seed(0)
    w = torch.randn(5, 3, 4, device=device, dtype=dtype)  # (S, D, d)
    w_ref = w.double().cpu().numpy()
    rows = []
    ref = np.stack([upsample_ref(row, 8) for row in w_ref[0]])
    rows.append(("upsample by 8 == interpolation", rel_err(upsample(w[0], 8), ref), limit))
    for decay, alpha, power, factor in (
        (constant_decay, [0.5] * 3, 0, 1),
        (ramp_decay, [1, 1 / 2, 1 / 3], 0, 2),
        (power_law_decay, [1] * 3, 1, 1),
    ):
        ref = [kernel_ref(w_ref[:, d], alpha[d], power, factor) for d in range(3)]
        fast = multi_scale_kernel(w, 64 * factor, decay, factor)
        rows.append((f"kernel, {decay.__name__} == reference", rel_err(fast, np.stack(ref)), limit))
    for name, variant in PUBLISHED.items():
        K = SGConv(8, 256, bidirectional=True, **variant).to(device, dtype).kernel(256)
        error = (K.norm(dim=-1) - 1).abs().max().item()
        rows.append((f"kernel, {name}: norm 1 at construction", error, 1e-6))
    for bidirectional in (False, True):
        check_layer(rows, dtype, device, limit, bidirectional)
    rows.append(check_2d(dtype, device, limit))
    layer = SGConv(3, 32, 4).to(device, dtype)
    total, doubled = layer.kernel(32).sum(-1), layer.resample(64).kernel(64).sum(-1)
    rows.append(("resample by 2 keeps the sum of the kernel", rel_err(doubled, total), limit))
    return rows


def print_table(rows):
    """Print a check table. Returns True when every error is within its limit."""
    print(f"{'check':<56}{'error':>9}{'limit':>9}")
    for name, error, limit in rows:
        print(f"  {name:<54}{error:9.1e}{limit:9.0e}   {'ok' if error <= limit else 'FAIL'}")
    return all(error <= limit for _, error, limit in rows)


# ---------------------------------------------------------------- demo, timing, command line


def print_sizes():
    """Kernel parameters of one channel: they grow with log2 of the length."""
    print(f"\n{'length':>9}{'kernel_dim':>12}{'parameters a channel':>22}{'dense kernel':>14}")
    for L in (2**10, 2**12, 2**14, 2**16, 2**18, 2**20):
        print(f"{L:>9}{64:>12}{SGConv(1, L, 64).w.numel():>22}{L:>14}")


def demo(device, L=512, steps=80, batch=16):
    """Which of eight periods (8 .. 91) has a sine in noise of twice its power? Returns accuracy."""
    torch.manual_seed(0)
    model = SGConvModel(SGConvConfig(d_model=32, max_len=L, n_channels=1)).to(device)
    head = nn.Linear(32, 8).to(device)
    groups = model.param_groups(1e-2, 0.0) + [{"params": list(head.parameters())}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.0)
    hits = []
    for step in range(steps):
        label = torch.randint(8, (batch,))
        period, phase = 8 * 2 ** (label / 2)[:, None], torch.rand(batch, 1)
        wave = torch.sin(2 * math.pi * (torch.arange(L) / period + phase))
        x = (wave + torch.randn(batch, L))[..., None].to(device)  # (B, L, 1)
        logits, label = head(model(x).mean(1)), label.to(device)  # (B, 8)
        loss = F.cross_entropy(logits, label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        hits.append((logits.argmax(-1) == label).float().mean().item())
        if (step + 1) % 20 == 0:
            recent = sum(hits[-10:]) / 10
            print(f"  step {step + 1:3}  loss {loss.item():.3f}  accuracy, last ten {recent:.2f}")
    return recent


def best_ms(run, rounds=3):
    """Least time of `rounds` forward + backward passes, after one to warm up."""
    spans = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        run().sum().backward()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        spans.append(time.perf_counter() - start)
    return 1e3 * min(spans[1:])


def timing(device, D=64, batch=4):
    """The layer, its kernel alone, and the same convolution as a product with a Toeplitz matrix."""
    print(f"\nforward + backward, ms, batch {batch}, width {D}, {torch.get_num_threads()} threads")
    print(f"{'length':>9}{'SGConv':>10}{'kernel':>10}{'Toeplitz':>10}")
    for L in (256, 1024, 4096, 16384):
        layer = SGConv(D, L, 64).to(device)
        u = torch.randn(batch, L, D, device=device, requires_grad=True)

        def toeplitz(layer=layer, u=u, L=L):
            lag = torch.arange(L, device=device)[:, None] - torch.arange(L, device=device)
            matrix = layer.kernel(L)[:, lag.clamp(min=0)] * (lag >= 0)  # (D, L, L)
            return torch.einsum("dts,bsd->btd", matrix, u)

        whole, kernel = best_ms(lambda: layer(u)), best_ms(lambda: layer.kernel(L))  # noqa: B023
        naive = f"{best_ms(toeplitz, 1):10.1f}" if L <= 1024 else f"{'-':>10}"
        print(f"{L:>9}{whole:10.1f}{kernel:10.1f}{naive}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="print the check table and stop")
    parser.add_argument("--device", default="cpu", help="torch device (default cpu)")
    args = parser.parse_args(argv)
    print(f"sgconv.py  torch {torch.__version__}  device {args.device}  seed 0")
    rows = self_check(device=args.device)
    rows += [(f"float32: {n}", e, l) for n, e, l in self_check(torch.float32, args.device)]
    ok = print_table(rows)
    if args.check:
        return 0 if ok else 1
    print_sizes()
    print("\ndemo: one of eight periods in noise (chance 0.125, target 0.95)")
    accuracy = demo(args.device)
    print(f"  accuracy {accuracy:.2f}: {'ok' if accuracy >= 0.95 else 'FAIL'}")
    timing(args.device)
    return 0 if ok and accuracy >= 0.95 else 1


if __name__ == "__main__":
    sys.exit(main())
