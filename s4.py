"""S4: a linear state space model per channel, run as a long convolution or as a recurrence.

Paper: Gu, Goel, Re, "Efficiently Modeling Long Sequences with Structured State Spaces",
arXiv:2111.00396v3.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

# ---------------------------------------------------------------------------------------------
# Reference: numpy, float64, straight from the paper
# ---------------------------------------------------------------------------------------------


def hippo_legs(N):
    """HiPPO-LegS: the (A, B) of a memory by Legendre polynomials (arXiv:2111.00396v3, eq. 2).

    Returns A (N, N) and B (N,), float64.
    """
    root = np.sqrt(2 * np.arange(N) + 1.0)  # (N,)
    A = -np.tril(np.outer(root, root), -1) - np.diag(np.arange(N) + 1.0)  # (N, N)
    return A, root


def nplr_legs(N):
    """Normal plus low rank form of HiPPO-LegS (section 3.2, Theorem 1), one of each conjugate pair.

        A = V (diag(Lam) - P P^*) V^*

    Returns Lam, P, B: (N/2,) complex128, in the basis V.  A + p p^T + I/2 is skew for
    p = sqrt(n + 1/2), so its eigenvectors come from a Hermitian solver and V is exactly unitary.
    """
    if N < 2 or N % 2:
        raise ValueError(f"d_state must be even and at least 2 (conjugate pairs), got {N}")
    A, B = hippo_legs(N)
    P = np.sqrt(np.arange(N) + 0.5)  # (N,)
    skew = A + np.outer(P, P) + 0.5 * np.eye(N)  # (N, N)
    omega, V = np.linalg.eigh(-1j * skew)  # (N,), (N, N)
    half = V[:, omega > 0].conj().T  # (N/2, N)
    return -0.5 + 1j * omega[omega > 0], half @ P, half @ B


# ---------------------------------------------------------------------------------------------
# Fast: torch, D independent systems at once
# ---------------------------------------------------------------------------------------------


class System(NamedTuple):
    """D discrete systems x' = x + E x + B_bar u,  y = 2 Re(C x'), one of each conjugate pair kept.

    E = A_bar - I is carried instead of A_bar: near the identity (small dt) the rounding of A_bar
    would be amplified L-fold.  E x = e x - f Re(sum g x): diagonal minus rank one.

    e, f, g, B_bar: (D, N/2) complex; f and g are None for a diagonal system.
    C: (n, D, N/2) complex, n = 2 for a bidirectional layer.
    """

    e: torch.Tensor
    f: torch.Tensor | None
    g: torch.Tensor | None
    B_bar: torch.Tensor
    C: torch.Tensor


def discretize(Lam, P, B, C, dt):
    """Bilinear discretisation of diag(Lam) - P P^* in closed form (eq. 3; Woodbury, Appendix C.2).

    Lam, P, B: (D, N/2) complex, C: (n, D, N/2) complex, dt: (D, 1).  Returns System.
    With h = dt/2, (I - h A)^-1 is diagonal minus rank one, and so is A_bar - I, whose diagonal part
    2 h Lam / (1 - h Lam) needs no subtraction from I.  O(D N), against O(D N^3) of a matrix solve.
    """
    resolvent = 1 / (1 - 0.5 * dt * Lam)  # (D, N/2), of the diagonal part
    RP, RQ, RB = resolvent * P, resolvent * P.conj(), resolvent * B  # (D, N/2)
    scale = dt / (1 + dt * (P.conj() * RP).real.sum(-1, keepdim=True))  # (D, 1)
    B_bar = dt * (RB - scale * RP * (RQ * B).real.sum(-1, keepdim=True))
    return System(dt * Lam * resolvent, 2 * scale * RP, RQ, B_bar, C)


def real_form(system):
    """In real coordinates (Re x, Im x): E (D, N, N), B_bar (D, N, 1), C (D, n, N)."""
    e, f, g, B_bar, C = system
    real, imag = torch.diag_embed(e.real), torch.diag_embed(e.imag)  # (D, N/2, N/2)
    E = torch.cat([torch.cat([real, -imag], -1), torch.cat([imag, real], -1)], -2)  # (D, N, N)
    if f is not None:
        column = torch.cat([f.real, f.imag], -1)[..., None]  # (D, N, 1)
        row = torch.cat([g.real, -g.imag], -1)[..., None, :]  # (D, 1, N)
        E = torch.baddbmm(E, column, row, alpha=-1)
    C = torch.cat([2 * C.real, -2 * C.imag], -1).transpose(0, 1)  # (D, n, N)
    return E, torch.cat([B_bar.real, B_bar.imag], -1)[..., None], C


def two_level_kernel(system, L):
    """K[i m + j] = (C A_bar^(m i)) (A_bar^j B_bar), l = i m + j < L: one small product a channel.

    Both factors are built by doubling, O(D N^2 (N log L + sqrt L)) time; the product costs
    O(D N L).  Nothing larger than D N max(N, sqrt L) is stored, and K(L)[:l] == K(l).
    Returns (n, D, L) real.
    """
    E, W, R = real_form(system)  # (D, N, N), (D, N, 1), (D, n, N)
    D, n = R.shape[:2]
    m = 2 ** ((L - 1).bit_length() // 2)
    rows = -(-L // m)
    while W.shape[-1] < m:
        W = torch.cat([W, torch.baddbmm(W, E, W)], -1)  # (D, N, 2j)
        E = torch.baddbmm(E, E, E, beta=2)  # A_bar^2 - I = 2 E + E E
    while R.shape[1] < n * rows:
        R = torch.cat([R, torch.baddbmm(R, R, E)], 1)  # (D, 2i n, N)
        if R.shape[1] < n * rows:
            E = torch.baddbmm(E, E, E, beta=2)
    K = R[:, : n * rows] @ W  # (D, rows n, m)
    return K.view(D, rows, n, m).permute(2, 0, 1, 3).reshape(n, D, rows * m)[..., :L]


def fft_length(n):
    """A small even number >= n without a prime factor above 5: other FFT lengths are slow."""
    best = 1 << max(1, (n - 1).bit_length())
    for three in (1, 3, 9, 27, 81):
        for five in (1, 5, 25, 125):
            odd = three * five
            best = min(best, odd << max(1, (-(-n // odd) - 1).bit_length()))
    return best


class CircularConv(torch.autograd.Function):
    """u (B, D, L), k (D, n), both real -> (B, D, L): circular convolution of period n, cut to L.

    Written out because autograd turns the backward of a real FFT into a full complex one, at twice
    the time and memory.
    """

    @staticmethod
    def forward(ctx, u, k, n):
        U, K_f = torch.fft.rfft(u, n), torch.fft.rfft(k, n)  # (B, D, n/2+1), (D, n/2+1)
        ctx.save_for_backward(U, K_f)
        ctx.lengths = n, u.shape[-1], k.shape[-1]
        return torch.fft.irfft(U * K_f, n)[..., : u.shape[-1]]

    @staticmethod
    def backward(ctx, grad):
        U, K_f = ctx.saved_tensors
        n, length, k_length = ctx.lengths
        G = torch.fft.rfft(grad, n)  # (B, D, n/2+1)
        grad_k = torch.fft.irfft((G * U.conj()).sum(0), n)[..., :k_length]
        grad_u = torch.fft.irfft(G.mul_(K_f.conj()), n)[..., :length]
        return grad_u, grad_k, None


def fft_conv(u, K):
    """Convolve each channel of u (B, L, D) with its kernel K in O(L log L).  Returns (B, L, D).

    K (D, L): causal, y[t] = sum_s K[s] u[t - s].  K (2, D, L): row 0 holds the lags 0, 1, ...,
    row 1 the lags -1, -2, ...
    """
    L = u.shape[1]
    n = fft_length(2 * L - 1)
    if K.ndim == 3:
        K = torch.cat([K[0], K.new_zeros(K.shape[1], n - 2 * L + 1), K[1, :, : L - 1].flip(-1)], -1)
    return CircularConv.apply(u.transpose(1, 2), K, n).transpose(1, 2)  # (B, L, D)


# ---------------------------------------------------------------------------------------------
# Layer and model
# ---------------------------------------------------------------------------------------------


class S4(nn.Module):
    """The S4 token mixer, linear: y = K * u + D_skip u; each channel has its own Lam, P, B, C, dt.

    (B, L, D) -> (B, L, D) for any L.  No length is stored and forward rewrites no parameter.
    """

    def __init__(self, d_model, d_state=64, bidirectional=False, dt_min=1e-3, dt_max=1e-1):
        super().__init__()
        if not 0 < dt_min <= dt_max < math.inf:
            raise ValueError(f"expected 0 < dt_min <= dt_max, got {dt_min} and {dt_max}")
        self.d_model, self.d_state, self.bidirectional = d_model, d_state, bidirectional
        Lam, P, B = (torch.from_numpy(a).to(torch.complex64) for a in nplr_legs(d_state))
        u = torch.rand(d_model)
        self.log_dt = nn.Parameter(math.log(dt_min) + u * (math.log(dt_max) - math.log(dt_min)))
        # Re Lam = -exp(log_decay) < 0 and the tied P make every system stable, whatever is learned.
        self.log_decay = nn.Parameter((-Lam.real).log().repeat(d_model, 1))  # (D, N/2)
        self.frequency = nn.Parameter(Lam.imag.repeat(d_model, 1))  # (D, N/2)
        self.P = nn.Parameter(torch.view_as_real(P.repeat(d_model, 1)))  # (D, N/2, 2): Re, Im
        self.B = nn.Parameter(torch.view_as_real(B.repeat(d_model, 1)))  # (D, N/2, 2)
        self.C = nn.Parameter(torch.randn(1 + bidirectional, d_model, d_state // 2, 2) * 0.5**0.5)
        self.D_skip = nn.Parameter(torch.randn(d_model))

    def system(self, rate=1.0):
        dt = self.log_dt.exp()[:, None] * rate  # (D, 1)
        Lam = torch.complex(-self.log_decay.exp(), self.frequency)
        P, B, C = (torch.view_as_complex(p) for p in (self.P, self.B, self.C))
        return discretize(Lam, P, B, C, dt)

    def kernel(self, L, rate=1.0):
        """Impulse response without the skip: (D, L), (2, D, L) when bidirectional (fft_conv)."""
        with torch.autocast(self.C.device.type, enabled=False):  # bf16 would ruin it
            K = two_level_kernel(self.system(rate), L)  # (1 or 2, D, L)
        return K if self.bidirectional else K[0]

    def forward(self, x, keep=None, rate=1.0):
        """x (B, L, D), keep (B, L) bool: False positions count as absent (padding at the ends)."""
        if x.ndim != 3 or x.shape[2] != self.d_model:
            raise ValueError(f"expected x (B, L, {self.d_model}), got {tuple(x.shape)}")
        u = x if keep is None else x * keep[..., None]
        K = self.kernel(x.shape[1], rate)
        K = torch.cat([K[..., :1] + self.skip_at_zero(), K[..., 1:]], -1)
        return fft_conv(u.to(K.dtype), K).to(x.dtype)

    def skip_at_zero(self):
        """The skip as a lag-zero tap, which costs no pass over (B, L, D)."""
        D_skip = self.D_skip[:, None]  # (D, 1)
        return torch.stack([D_skip, torch.zeros_like(D_skip)]) if self.bidirectional else D_skip


class S4Block(nn.Module):
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
class S4Config:
    """Exactly one of vocab_size (tokens) and n_channels (real values) is set."""

    d_model: int = 64
    n_layers: int = 2
    d_state: int = 64
    vocab_size: int | None = None
    n_channels: int | None = None
    causal: bool = False
    dropout: float = 0.0
    dt_min: float = 1e-3
    dt_max: float = 1e-1


def s4_mixer(config, i):
    """The default mixer of block i."""
    bidirectional = not config.causal
    return S4(config.d_model, config.d_state, bidirectional, config.dt_min, config.dt_max)


class S4Model(nn.Module):
    """Embedding, blocks, final norm: tokens (B, L) int64 or values (B, L, C) float -> (B, L, D)."""

    def __init__(self, config, mixer=s4_mixer):
        super().__init__()
        if (config.vocab_size is None) == (config.n_channels is None):
            raise ValueError(
                "set exactly one of vocab_size and n_channels, "
                f"got {config.vocab_size} and {config.n_channels}"
            )
        self.config = config
        D = config.d_model
        tokens = config.vocab_size is not None
        self.embed = (
            nn.Embedding(config.vocab_size, D) if tokens else nn.Linear(config.n_channels, D)
        )
        self.blocks = nn.ModuleList(
            S4Block(D, mixer(config, i), config.dropout) for i in range(config.n_layers)
        )
        self.norm = nn.LayerNorm(D)

    def forward(self, x, keep=None):
        """x (B, L) int64 or (B, L, C) float, keep (B, L) bool -> features (B, L, D)."""
        h = self.embed(x)  # (B, L, D)
        for block in self.blocks:
            h = block(h, keep)
        return self.norm(h)

    def param_groups(self, lr, weight_decay):
        """AdamW groups as the papers use them.

        Lam, P, B, dt learn at min(lr, 1e-3) without decay; C, skips, biases and norms at lr without
        decay; the weights of linear maps and embeddings at lr with decay.
        """
        mixers = [m for m in self.modules() if isinstance(m, S4)]
        slow = {id(p) for m in mixers for p in (m.log_dt, m.log_decay, m.frequency, m.P, m.B)}
        plain = {id(p) for m in mixers for p in (m.C, m.D_skip)}
        plain |= {id(p) for p in self.parameters() if p.ndim < 2}
        groups = {"slow": [], "plain": [], "decayed": []}
        for p in self.parameters():
            kind = "slow" if id(p) in slow else "plain" if id(p) in plain else "decayed"
            groups[kind].append(p)
        return [
            {"params": groups["slow"], "lr": min(lr, 1e-3), "weight_decay": 0.0},
            {"params": groups["plain"], "lr": lr, "weight_decay": 0.0},
            {"params": groups["decayed"], "lr": lr, "weight_decay": weight_decay},
        ]
