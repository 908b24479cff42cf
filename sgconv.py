"""SGConv, structured global convolution: O(log L) parameters per channel, as long as the input.

    k = [k_0, k_1, ..., k_{S-1}] / Z,   k_i = alpha^i Upsample(w_i)
    y = k * u + D_skip u

Paper: Li, Cai, Zhang, Chen, Dey, "What Makes Convolutional Models Great on Long Sequence
Modeling?", arXiv:2210.09298, section 3.

Every sub-kernel w_i has d numbers of its own, stretched linearly over d, d, 2d, 4d, ... lags and
damped by alpha^i, or by a power of the lag: the near past gets a fine description, the far past a
coarse and faint one.

    paper symbol   code name               shape
    L              max_len                 longest input; in the code, L is the length of this one
    d              kernel_dim              numbers per sub-kernel
    N (scales)     n_scales, S             1 + max(0, ceil(log2(max_len / (first_factor d))))
    w_i            w[i]                    (D, d), or (2, D, d) if bidirectional
    alpha^i        decay(i, lags, place)   broadcasts to (D, lags); place (D, 1): 0 at the first
                                           channel, 1 at the last
    Z              norm                    (D, 1), or (2, D, 1): |[k_0, ..., k_{S-1}]|_2 at
                                           initialization, then constant
    k              kernel(L)               (D, L), or (2, D, L): lags 0, 1, ... and lags -1, -2, ...
    u, y           x, y                    (B, L, D)

Differences from the paper are marked where they occur. Left out: a recurrent mode (no small
recurrence gives this kernel), sub-kernels summed instead of concatenated, learned decays, BatchNorm
(LayerNorm here), torch.func.grad and vmap.

    python sgconv.py            checks, then a demo: find the period of a noisy sine
    python sgconv.py --check    checks only
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------- reference: numpy, float64


def upsample_ref(w, factor):
    """Interpolate w (d,) linearly to (factor d,) samples: [0, 1] by 2 is [0, .25, .75, 1]."""
    n = np.arange(factor * len(w))
    centers = (n + 0.5) / factor - 0.5  # of the new samples, in units of the old spacing
    return np.interp(centers, np.arange(len(w)), w)  # constant beyond the outermost old centers


def kernel_ref(w, alpha=0.5, power=0.0, first_factor=1):
    """Multi-scale kernel of one channel before the division by Z (arXiv:2210.09298, section 3.2).

    w: (S, d). Returns (first_factor d 2^(S-1),): d, d, 2d, 4d, ... lags, times first_factor.
    alpha = 1/2, power = 0 is the paper's text; alpha = 1, power = 1 is the authors' code for Image.
    """
    pieces = []
    for i, w_i in enumerate(w):
        factor = first_factor * 2 ** max(i - 1, 0)
        pieces.append(alpha**i * upsample_ref(w_i, factor))
    k = np.concatenate(pieces)
    return k * (np.arange(len(k)) + 1.0) ** -power


def conv_ref(u, k, k_back=None):
    """Direct convolution, O(L^2). u: (L,) or (L, D); k, k_back: (L,) or (D, L). Returns as u.

    y[t] = sum_{s >= 0} k[s] u[t - s] + sum_{s >= 1} k_back[s - 1] u[t + s]; causal without k_back.
    """
    y = np.zeros(u.shape)
    for t in range(len(u)):
        for source in range(len(u)):
            lag = t - source
            if lag >= 0:
                y[t] += k[..., lag] * u[source]
            elif k_back is not None:
                y[t] += k_back[..., -lag - 1] * u[source]
    return y


# ---------------------------------------------------------------- decays and initialization
# constant_decay and w ~ N(0, 1) are in the paper's text, all are in the authors' code. Path-X and
# Image are tasks of the Long Range Arena.


def constant_decay(i, lags, place):
    """alpha^i with alpha = 1/2 (arXiv:2210.09298, section 3.2). Returns a number."""
    return 0.5**i


def ramp_decay(i, lags, place, slowest=1.0, fastest=3.0):
    """alpha^i with 1 / alpha from `slowest` to `fastest` over the channels (Path-X): (D, 1)."""
    return (slowest + (fastest - slowest) * place) ** -i


def power_law_decay(i, lags, place, power=1.0):
    """(lag + 1)^-power, the same for every scale (Image), in the shape of lags."""
    return (lags + 1.0) ** -power


def cosine_init(shape):
    """Sub-kernels start as cosines of 0 .. D-1 cycles, in random order over channels (Path-X)."""
    d_model, d = shape[-2:]
    cycles = torch.arange(d_model)[:, None]
    waves = torch.cos(cycles * torch.linspace(0, 2 * math.pi, d))  # (D, d)
    w = torch.empty(shape)
    for sub_kernel in w.view(-1, d_model, d):
        sub_kernel.copy_(waves[torch.randperm(d_model)])
    return w


# ---------------------------------------------------------------- torch


def upsample(w, factor):
    """Interpolate linearly, (..., d) -> (..., factor d): from w[j] toward w[j - 1] or w[j + 1].

    F.interpolate computes the same, but its backward is slower, and not deterministic on a GPU.
    """
    offset = (torch.arange(factor, dtype=w.dtype, device=w.device) + 0.5) / factor - 0.5
    before = torch.cat([w[..., :1], w[..., :-1]], -1)
    after = torch.cat([w[..., 1:], w[..., -1:]], -1)
    toward_before = (before - w)[..., None] * (-offset).clamp(min=0)  # (..., d, factor)
    toward_after = (after - w)[..., None] * offset.clamp(min=0)
    return (w[..., None] + toward_before + toward_after).flatten(-2)


def multi_scale_kernel(w, L, place, decay=constant_decay, first_factor=1):
    """w (S, ..., D, d) -> (..., D, L): the first L lags of kernel_ref, in O(D L)."""
    pieces = []
    start = 0
    for i, w_i in enumerate(w):
        piece = upsample(w_i, first_factor * 2 ** max(i - 1, 0))  # (..., D, lags)
        stop = start + piece.shape[-1]
        lags = torch.arange(start, stop, dtype=w.dtype, device=w.device)
        pieces.append(piece * decay(i, lags, place))
        start = stop
        if start >= L:
            break
    return torch.cat(pieces, -1)[..., :L]


def fft_length(n):  # same as s4.py:fft_length
    """Return a small even length >= n with factors 2, 3 and 5 only: large ones make FFTs slow."""
    lengths = []
    # 2 times the odd products of 3 and 5 up to 225
    for length in (2, 6, 10, 18, 30, 50, 54, 90, 150, 162, 250, 270, 450):
        while length < n:
            length *= 2
        lengths.append(length)
    return min(lengths)


class CircularConv(torch.autograd.Function):  # same as s4.py:CircularConv
    """Circular convolution with period n of real u (B, D, L) and k (D, m).  Returns (B, D, L).

    Its backward stays with real FFTs; autograd's own takes complex ones, twice the time and memory.
    """

    @staticmethod
    def forward(ctx, u, k, n):
        U = torch.fft.rfft(u, n)  # (B, D, n/2 + 1)
        K_f = torch.fft.rfft(k, n)  # (D, n/2 + 1)
        ctx.save_for_backward(u, k, U, K_f)
        ctx.n = n
        return torch.fft.irfft(U * K_f, n)[..., : u.shape[-1]]

    @staticmethod
    def backward(ctx, grad):
        u, k, U, K_f = ctx.saved_tensors
        n = ctx.n
        twice = torch.is_grad_enabled()  # second derivatives are wanted (create_graph=True)
        if twice:  # U and K_f again, as functions of u and k
            U = torch.fft.rfft(u, n)
            K_f = torch.fft.rfft(k, n)
        G = torch.fft.rfft(grad, n)  # (B, D, n/2 + 1)
        grad_k = torch.fft.irfft((G * U.conj()).sum(0), n)[..., : k.shape[-1]]
        G = G * K_f.conj() if twice else G.mul_(K_f.conj())  # in place: G is large
        grad_u = torch.fft.irfft(G, n)[..., : u.shape[-1]]
        return grad_u, grad_k, None


def fft_conv(u, K):  # same as s4.py:fft_conv
    """Convolve each channel of u (B, L, D) with its kernel in O(L log L).  Returns (B, L, D).

    K (D, L) is causal: y[t] = sum_s K[s] u[t - s].
    K (2, D, L) also looks ahead: K[0] holds the lags 0, 1, ... and K[1] the lags -1, -2, ...
    """
    _, L, D = u.shape
    if K.shape[:-1] not in ((D,), (2, D)) or (K.ndim == 3 and K.shape[2] < L):
        raise ValueError(f"expected K ({D}, L) or (2, {D}, {L}), got {tuple(K.shape)}")
    n = fft_length(2 * L - 1)
    K = K[..., :L]
    if u.numel() == 0:  # FFT libraries refuse an empty batch
        return u + 0 * K.sum()  # both stay in the graph
    if K.ndim == 3:  # in a circle of n, lag -1 is lag n - 1
        gap = K.new_zeros(K.shape[1], n - 2 * L + 1)
        K = torch.cat([K[0], gap, K[1, :, : L - 1].flip(-1)], -1)  # (D, n)
    return CircularConv.apply(u.transpose(1, 2), K, n).transpose(1, 2)


def require(ok, message):  # same as s4.py:require
    """Raise ValueError unless ok."""
    if not ok:
        raise ValueError(message)


def check_input(x, keep, d_model):  # same as s4.py:check_input
    """Refuse shapes that would broadcast by accident, and integers."""
    if x.ndim != 3 or x.shape[2] != d_model or not x.is_floating_point():
        raise ValueError(f"expected float x (B, L, {d_model}), got {tuple(x.shape)} {x.dtype}")
    if keep is not None and (keep.shape != x.shape[:2] or keep.dtype != torch.bool):
        got = f"{tuple(keep.shape)} {keep.dtype}"
        raise ValueError(f"expected bool keep {tuple(x.shape[:2])}, got {got}")


# ---------------------------------------------------------------- layer and model


class SGConv(nn.Module):
    """SGConv token mixer, linear: y = k * u + D_skip u. (B, L, D) -> (B, L, D), 1 <= L <= max_len.

    kernel_dim: numbers per sub-kernel, at most max_len / first_factor (a larger one is reduced).
    decay: constant_decay, ramp_decay or power_law_decay.  init: torch.randn or cosine_init.
    first_factor: lags per number in the first two sub-kernels (2 for Path-X).
    Kernel and FFT are computed in float32 or better.  `norm` is rounded to the dtype in which the
    layer is built; a wider one later does not undo that.
    """

    # axis of the channels where it is not the first: for dist_attention.py
    channel_axes = {"w": -2, "norm": -2}  # noqa: RUF012

    def __init__(
        self,
        d_model,
        max_len,
        kernel_dim=64,
        bidirectional=False,
        decay=constant_decay,
        init=torch.randn,
        first_factor=1,
    ):
        super().__init__()
        sizes = f"{d_model=}, {max_len=}, {kernel_dim=}, {first_factor=}"
        for size in (d_model, max_len, kernel_dim, first_factor):
            fits = isinstance(size, (int, np.integer)) and size >= 1
            require(fits, f"sizes must be integers of at least 1, got {sizes}")
        self.d_model = d_model
        self.max_len = max_len
        self.bidirectional = bidirectional
        self.decay = decay
        self.first_factor = first_factor
        kernel_dim = min(kernel_dim, math.ceil(max_len / first_factor))
        first_len = first_factor * kernel_dim
        # differs from the paper's text, as its code: ceil, not floor, so that k reaches max_len
        n_scales = 1 + max(0, math.ceil(math.log2(max_len / first_len)))
        directions = (2,) if bidirectional else ()
        self.w = nn.Parameter(init((n_scales, *directions, d_model, kernel_dim)))
        self.D_skip = nn.Parameter(torch.randn(d_model))
        # a layer split over ranks has some of the channels; each keeps its place among all of them
        self.first_channel = 0
        self.last_channel = max(1, d_model - 1)
        # differs from the paper's text, as its code: one Z per channel and direction, of all
        # scales, even beyond max_len; a buffer, so that w is saved with its Z
        k = self.unscaled_kernel(self.w.detach().double(), first_len * 2 ** (n_scales - 1))
        norm = k.norm(dim=-1, keepdim=True)
        self.register_buffer("norm", norm.to(self.w.dtype))

    def unscaled_kernel(self, w, L):
        """The kernel before the division by Z: w (S, ..., D, d) -> (..., D, L)."""
        channel = self.first_channel + torch.arange(self.d_model, dtype=w.dtype, device=w.device)
        place = channel[:, None] / self.last_channel
        return multi_scale_kernel(w, L, place, self.decay, self.first_factor)

    def kernel(self, L):
        """Return the impulse response without the skip: (D, L), or (2, D, L) if bidirectional.

        kernel(L) is a prefix of kernel(max_len). Raises ValueError unless 1 <= L <= max_len.
        """
        fits = 1 <= L <= self.max_len
        require(fits, f"the length must be 1 to max_len = {self.max_len}, got {L}")
        # bfloat16 skips integers above 256, so lags would repeat
        dtype = torch.promote_types(self.w.dtype, torch.float32)
        w = self.w.to(dtype) / self.norm.to(dtype)  # k is linear in w, and w has fewer numbers
        return self.unscaled_kernel(w, L)

    def forward(self, x, keep=None):
        """x (B, L, D); keep (B, L) bool, False at padding. Returns (B, L, D) in the dtype of x."""
        check_input(x, keep, self.d_model)
        if keep is not None:
            x = x.masked_fill(~keep[..., None], 0)
        K = self.kernel(x.shape[1])
        y = fft_conv(x.to(K.dtype), K) + self.D_skip * x  # y = k * u + D_skip u
        return y.to(x.dtype)

    def initial_state(self, batch):
        """Raise ValueError: a long convolution has no small state."""
        raise ValueError("SGConv has no recurrent mode: call forward on whole sequences, or use S4")


class SGConv2d(nn.Module):
    """SGConv over an image read row by row, both ways: (B, D, H, W) -> (B, D, H, W), as nn.Conv2d.

    Replaces a depthwise 7 x 7 convolution (arXiv:2210.09298, section 4), for images of one size.
    """

    def __init__(self, d_model, height, width, kernel_dim=64, **variant):
        super().__init__()
        self.size = (height, width)
        self.conv = SGConv(d_model, height * width, kernel_dim, bidirectional=True, **variant)

    def forward(self, x):
        height, width = self.size
        fits = x.shape[2:] == self.size
        require(fits, f"expected x (B, D, {height}, {width}), got {tuple(x.shape)}")
        y = self.conv(x.flatten(2).transpose(1, 2))  # (B, H W, D)
        return y.transpose(1, 2).unflatten(2, self.size)  # (B, D, H, W)


class SGConvBlock(nn.Module):  # as s4.py:S4Block, without its recurrent mode
    """Pre-norm residual block: x + GLU(Linear(dropout(GELU(mixer(norm(x))))))."""

    def __init__(self, d_model, mixer, dropout=0.0):
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.mixer = mixer
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(d_model, 2 * d_model)

    def forward(self, x, keep=None):
        """x (B, L, D), keep (B, L) bool -> (B, L, D)."""
        y = self.mixer(self.norm(x), keep)
        y = F.gelu(y.contiguous())  # the convolution leaves y transposed
        return x + F.glu(self.out(self.dropout(y)), dim=-1)


@dataclass(frozen=True)
class SGConvConfig:
    """Sizes of an SGConvModel. Set exactly one of vocab_size (tokens) and n_channels (values)."""

    d_model: int = 64
    n_layers: int = 2
    max_len: int = 1024
    kernel_dim: int = 32
    vocab_size: int | None = None
    n_channels: int | None = None
    causal: bool = False
    dropout: float = 0.0
    decay: Callable = constant_decay
    init: Callable = torch.randn
    first_factor: int = 1


def sgconv_mixer(config, i):
    """Build the mixer of block i."""
    sizes = (config.d_model, config.max_len, config.kernel_dim)
    variant = (config.decay, config.init, config.first_factor)
    two_sided = not config.causal
    return SGConv(*sizes, two_sided, *variant)


class SGConvModel(nn.Module):
    """Embedding, blocks, final norm: tokens (B, L) or values (B, L, C) -> (B, L, D).

    torch.export: L is fixed, B is free if at least 2 in the example.  Export the longest L, with
    keep, and pad on the right.
    """

    def __init__(self, config, mixer=sgconv_mixer):
        super().__init__()
        D = config.d_model
        inputs = [n for n in (config.vocab_size, config.n_channels) if n is not None]
        fits = len(inputs) == 1 and min(*inputs, D, config.n_layers) >= 1
        rule = "set exactly one of vocab_size and n_channels, and sizes of at least 1"
        require(fits, f"{rule}; got {config}")
        self.config = config
        if config.vocab_size is None:
            self.embed = nn.Linear(config.n_channels, D)
        else:
            self.embed = nn.Embedding(config.vocab_size, D)
        self.blocks = nn.ModuleList()
        for i in range(config.n_layers):
            self.blocks.append(SGConvBlock(D, mixer(config, i), config.dropout))
        self.norm = nn.LayerNorm(D)

    def forward(self, x, keep=None):
        """x (B, L) integers or (B, L, C) float, keep (B, L) bool -> features (B, L, D)."""
        if self.config.vocab_size is None:
            check_input(x, keep, self.config.n_channels)
        else:
            fits = x.ndim == 2 and not x.is_floating_point()
            require(fits, f"expected integer tokens (B, L), got {tuple(x.shape)} {x.dtype}")
            x = x.long()  # nn.Embedding takes no uint8
        h = self.embed(x)  # (B, L, D)
        for block in self.blocks:
            h = block(h, keep)
        return self.norm(h)

    initial_state = SGConv.initial_state  # raises: no recurrent mode

    def param_groups(self, lr, weight_decay):  # same as s4.py:S4Model.param_groups
        """Return AdamW groups.  Kernels: learning rate at most 1e-3.

        Weight decay: of linear maps and embeddings only.
        """
        in_mixers = set()
        for module in self.modules():
            if hasattr(module, "kernel"):
                in_mixers.update(module.parameters())
        groups = [
            {"params": [], "lr": min(lr, 1e-3), "weight_decay": 0.0},  # kernels
            {"params": [], "lr": lr, "weight_decay": 0.0},  # skips, biases, norms
            {"params": [], "lr": lr, "weight_decay": weight_decay},  # linear maps, embeddings
        ]
        for name, p in self.named_parameters():
            if p in in_mixers and not name.endswith((".C", ".D_skip")):
                group = 0
            elif p in in_mixers or p.ndim < 2:
                group = 1
            else:
                group = 2
            groups[group]["params"].append(p)
        return groups


# ---------------------------------------------------------------- self-check


def rel_err(a, b):
    """max|a - b| / max|b|."""
    a = torch.as_tensor(a, dtype=torch.float64).detach().cpu()
    b = torch.as_tensor(b, dtype=torch.float64).detach().cpu()
    assert a.shape == b.shape and b.abs().max() > 0, (a.shape, b.shape)
    return float((a - b).abs().max() / b.abs().max())


def print_table(rows):
    """Print (name, error, limit) rows; return True if every error is within its limit."""
    ok = True
    for name, error, limit in rows:
        passed = error <= limit  # False for nan
        print(f"  {name:<50}{error:9.1e}{limit:9.0e}   {'ok' if passed else 'FAILED'}")
        ok = ok and passed
    return ok


def self_check(dtype=torch.float64, device="cpu"):
    """Check kernels and layers against the reference. Returns [(name, error, limit)]."""
    limit = 1e-12 if dtype == torch.float64 else 1e-5
    torch.manual_seed(0)
    rows = []
    w = torch.randn(5, 3, 4, device=device, dtype=dtype)  # (S, D, d)
    w_ref = w.double().cpu().numpy()
    place = torch.linspace(0, 1, 3, device=device, dtype=dtype)[:, None]
    for decay, alphas, power, factor in (
        (constant_decay, [1 / 2, 1 / 2, 1 / 2], 0, 1),
        (ramp_decay, [1, 1 / 2, 1 / 3], 0, 2),
        (power_law_decay, [1, 1, 1], 1, 1),
    ):
        K = multi_scale_kernel(w, 64 * factor, place, decay, factor)
        ref = []
        for channel, alpha in enumerate(alphas):
            ref.append(kernel_ref(w_ref[:, channel], alpha, power, factor))
        error = rel_err(K, np.stack(ref))
        rows.append((f"kernel, {decay.__name__} == reference", error, limit))
    u = torch.randn(1, 37, 3, device=device, dtype=dtype)
    u_ref = u[0].double().cpu().numpy()
    for kind in ("causal", "bidirectional"):
        layer = SGConv(3, 40, 4, bidirectional=kind == "bidirectional").to(device, dtype)
        K = layer.kernel(37).detach().double().cpu().numpy()
        kernels = K if layer.bidirectional else [K]
        y = layer(u)[0] - layer.D_skip * u[0]
        error = rel_err(y, conv_ref(u_ref, *kernels))
        rows.append((f"{kind} layer == direct convolution", error, limit))
    return rows


# ---------------------------------------------------------------- demo and command line


def demo(device, L=512, steps=80):
    """Learn which of eight periods a noisy sine has.  Returns the accuracy of the last batches."""
    torch.manual_seed(0)
    model = SGConvModel(SGConvConfig(d_model=32, max_len=L, n_channels=1)).to(device)
    head = nn.Linear(32, 8).to(device)
    groups = model.param_groups(lr=1e-2, weight_decay=0.01)
    groups.append({"params": head.parameters()})
    optimizer = torch.optim.AdamW(groups, lr=1e-2)

    right = []
    for _ in range(steps):
        label = torch.randint(8, (16,), device=device)
        period = 8 * 2 ** (label / 2)  # 8 to 91
        phase = torch.rand(16, 1, device=device)
        cycles = torch.arange(L, device=device) / period[:, None] + phase  # (B, L)
        x = torch.sin(2 * math.pi * cycles) + torch.randn(16, L, device=device)
        logits = head(model(x[..., None]).mean(1))  # (B, 8)
        loss = F.cross_entropy(logits, label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        right.append((logits.argmax(-1) == label).float().mean().item())
    return np.mean(right[-10:])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="run the checks only")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device on this machine")
    ok = True
    for dtype in (torch.float64, torch.float32):
        print(f"checks in {dtype} on {args.device}: error, limit")
        ok = print_table(self_check(dtype, args.device)) and ok
    if not args.check:
        print("demo: which of eight periods does the noisy sine have? (chance 0.12)")
        accuracy = demo(args.device)
        print(f"  accuracy {accuracy:.2f}, target 0.95")
        ok = accuracy >= 0.95 and ok
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
