"""S4 and S4D: linear state space models, one a channel, run as a convolution or as a recurrence.

    x'(t) = A x(t) + B u(t),   y(t) = C x(t) + D_skip u(t)

Trained, the layer is a long convolution whose kernel K[l] = C A_bar^l B_bar is built from few
numbers; generating, it is a recurrence with a state of fixed size.  S4 gives A the structure
(normal plus low rank) of a matrix that remembers the past, and that structure makes K cheap.

Papers: S4, Gu, Goel, Re, "Efficiently Modeling Long Sequences with Structured State Spaces",
arXiv:2111.00396v3.  S4D, Gu, Gupta, Goel, Re, "On the Parameterization and Initialization of
Diagonal State Space Models", arXiv:2206.11893v2.

    paper        code                   shape (complex: N/2, one of each conjugate pair)
    Lambda       Lam                    (D, N/2) complex = -exp(log_decay) + i frequency
    P = Q, B     P, B                   (D, N/2) complex
    C            C                      (n, D, N/2) complex; n = 2 directions if bidirectional, or 1
    Delta        dt                     (D, 1) = exp(log_dt)
    A_bar        E = A_bar - I          (D, N, N) real; or e, f, g: diagonal minus rank r, complex
    B_bar        B_bar                  (D, N/2, 1) complex, or (D, N, 1) real
    K            K                      (D, L)
    D            D_skip                 (D,)
    u, y; x      x, y; State.x          (B, L, D); (B, D, N) real: (Re, Im) of the pairs

Departures from the paper stand at their lines: the two-level kernel in place of the Cauchy kernel,
which is here too, without its pole; Q tied to P; Re Lam kept negative.
Not included: other HiPPO families, (Lam, P, B) shared between channels, 2-D kernels, a CUDA kernel.

    python s4.py            checks, demonstration, timings: about 20 s of one core
    python s4.py --check    the checks alone: about 6 s

Expected: every check ok; the demonstration ends with
    accuracy 1.00, as a recurrence 1.00, target 0.95
"""

import argparse
import math
import sys
import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

# ---------------------------------------------------------------- reference: numpy, one channel


def hippo_legs(N):
    """HiPPO-LegS, A (N, N), B (N,): its states are Legendre coefficients of a fading past."""
    root = np.sqrt(2 * np.arange(N) + 1.0)  # (N,)
    return -np.tril(np.outer(root, root), -1) - np.diag(np.arange(N) + 1.0), root


def nplr_legs(N):
    """Normal plus low rank form of HiPPO-LegS (S4), a half of its pairs.

        A = U (diag(Lam, Lam conj) - q q^*) U^*,   U = (V, V conj),   q = U^* p = (P, P conj)

    Returns Lam, P, B: (N/2,) complex128, V: (N, N/2), the pairs with positive frequency.  With
    p = sqrt(n + 1/2), A + p p^T + I/2 is skew, so a Hermitian solver finds U, exactly unitary; the
    eigenvectors of A itself are useless (condition 1e17 at N = 24).
    """
    if N < 2 or N % 2:
        raise ValueError(f"d_state must be even and at least 2 (conjugate pairs), got {N}")
    A, B = hippo_legs(N)
    p = np.sqrt(np.arange(N) + 0.5)  # (N,)
    frequency, V = np.linalg.eigh(-1j * (A + np.outer(p, p) + 0.5 * np.eye(N)))  # (N,), (N, N)
    V = V[:, frequency > 0]  # (N, N/2)
    V = V * np.exp(1j * np.angle(V.conj().T @ B))  # a solver's phases are arbitrary: now B, P > 0
    return -0.5 + 1j * frequency[frequency > 0], V.conj().T @ p, V.conj().T @ B, V


def both(v):
    """(N/2,) -> (N,): the kept halves of the conjugate pairs, then the others."""
    return np.concatenate([v, v.conj()], -1)


def discretize_ref(A, B, dt):
    """Bilinear discretisation (S4): A_bar (N, N), B_bar (N,)."""
    left = np.eye(len(A)) - dt / 2 * A
    return np.linalg.solve(left, np.eye(len(A)) + dt / 2 * A), np.linalg.solve(left, dt * B)


def recurrence_ref(A_bar, B_bar, C, u):
    """x_l = A_bar x_{l-1} + B_bar u_l,  y_l = C x_l.  u: (L,).  Returns y: (L,)."""
    x, y = np.zeros(len(A_bar), A_bar.dtype), []
    for u_l in u:
        x = A_bar @ x + B_bar * u_l
        y.append((C @ x).real)
    return np.array(y)


def kernel_ref(A_bar, B_bar, C, L):
    """K[l] = C A_bar^l B_bar, l = 0 .. L-1: the response to an impulse.  Returns (L,), O(N^2 L)."""
    return recurrence_ref(A_bar, B_bar, C, np.eye(1, L)[0])


def convolution_ref(u, K):
    """y_l = sum_s K[s] u[l - s].  u, K: (L,).  Returns (L,), O(L^2)."""
    return np.array([K[: l + 1] @ u[l::-1] for l in range(len(u))])


def cut_ref(A_bar, C, L):
    """C~ = C (I - A_bar^L): with it the endless sum over l of K[l] w^l stops at L, if w^L = 1."""
    return C @ (np.eye(len(C)) - np.linalg.matrix_power(A_bar, L))


def generating_ref(A_bar, B_bar, C, L):
    """K from its generating function (S4): (L,).

    sum_{l<L} K[l] w^l = C~ (I - A_bar w)^-1 B_bar at the roots of unity w is the DFT of K.
    """
    C_cut, eye = cut_ref(A_bar, C, L), np.eye(len(A_bar))
    roots = np.exp(-2j * np.pi * np.arange(L) / L)  # (L,)
    K_f = np.array([C_cut @ np.linalg.solve(eye - A_bar * w, B_bar) for w in roots])
    return np.fft.ifft(K_f).real


def cauchy_ref(Lam, P, B, C, dt, L):
    """K of A = diag(Lam) - P P^*, all (N,), by Cauchy sums (S4).  Returns (L,), L odd.

        (I - A_bar w)^-1 B_bar = 2 / (1 + w) (z - A)^-1 B,   z = (2 / dt) (1 - w) / (1 + w)

    and (z - A)^-1 is the diagonal (z - Lam)^-1, corrected for P P^* by Woodbury's identity.
    """
    A_bar, _ = discretize_ref(np.diag(Lam) - np.outer(P, P.conj()), B, dt)
    C_cut = cut_ref(A_bar, C, L)
    w = np.exp(-2j * np.pi * np.arange(L) / L)  # (L,); w = -1, for L even, is a pole of z
    cauchy = 1 / (2 / dt * (1 - w) / (1 + w) - Lam[:, None])  # (N, L)
    CB, CP = (C_cut * B) @ cauchy, (C_cut * P) @ cauchy  # (L,)
    QB, QP = (P.conj() * B) @ cauchy, (P.conj() * P) @ cauchy  # (L,)
    return np.fft.ifft(2 / (1 + w) * (CB - CP / (1 + QP) * QB)).real


def diagonal_kernel_ref(Lam, B, C, dt, L):
    """S4D, zero-order hold: Lam, B, C (N/2,), halves.  Returns (L,)."""
    B_bar = (np.exp(dt * Lam) - 1) / Lam * B
    return np.array([2 * (C * B_bar * np.exp(dt * Lam * l)).sum().real for l in range(L)])


def s4d_lin(N):
    """S4D-Lin: Lam, B (N/2,) complex128."""
    return -0.5 + 1j * np.pi * np.arange(N // 2), np.ones(N // 2, complex)


def s4d_inv(N):
    """S4D-Inv: frequencies spread as those of HiPPO-LegS do."""
    return -0.5 + 1j * N / np.pi * (N / (2 * np.arange(N // 2) + 1) - 1), np.ones(N // 2, complex)


def s4d_legs(N):
    """S4D-LegS: the normal part of HiPPO-LegS with B / 2, its limit for large N."""
    Lam, _, B, _ = nplr_legs(N)
    return Lam, B / 2


# ---------------------------------------------------------------- fast: torch, D systems at once


class System(NamedTuple):
    """D discrete systems  x_l = x_{l-1} + E x_{l-1} + B_bar u_l,  y_l = 2 Re(C x_l).

    x holds one of each conjugate pair, hence the 2 Re.  E = A_bar - I is carried, not A_bar: near
    I (small dt) the rounding of A_bar would grow L-fold.  E x = e x - f Re(g x), written
    diag(e) - f g below, has r = 1 for S4 and 0 for S4D.
    """

    e: torch.Tensor  # (D, N/2, 1) complex128
    f: torch.Tensor  # (D, N/2, r) complex128
    g: torch.Tensor  # (D, r, N/2) complex128
    B_bar: torch.Tensor  # (D, N/2, 1) complex128
    C: torch.Tensor  # (n, D, N/2) complex, n = 2 if bidirectional; its dtype is the results'


def discretize(Lam, P, B, C, dt):
    """Bilinear discretisation of A = diag(Lam) - P P^*, O(D N), without a solve.

    Lam, P, B: (D, N/2) complex128, C: (n, D, N/2), dt: (D, 1).  With R = (1 - dt Lam / 2)^-1, by
    Woodbury's identity,
        (I - dt A / 2)^-1 = R - (dt / 2) R P P^* R / (1 + (dt / 2) P^* R P),
        B_bar = dt (I - dt A / 2)^-1 B,   A_bar - I = 2 (I - dt A / 2)^-1 - 2 I,
    where P^* v over whole pairs is twice the real part over halves, and 2 R - 2 = dt Lam R.
    """
    R = 1 / (1 - dt / 2 * Lam)  # (D, N/2)
    RP, QR = R * P, P.conj() * R  # (D, N/2)
    scale = dt / (1 + dt * (QR * P).real.sum(-1, keepdim=True))  # (D, 1)
    B_bar = dt * (R * B - scale * RP * (QR * B).real.sum(-1, keepdim=True))
    e = dt * Lam * R
    return System(e[..., None], 2 * (scale * RP)[..., None], QR[:, None], B_bar[..., None], C)


def hold(Lam, B, C, dt):
    """Zero-order hold of diag(Lam) (S4D), through expm1: exact for small dt Lam."""
    e = torch.expm1(dt * Lam)  # (D, N/2)
    none = e.new_zeros(*e.shape, 0)  # (D, N/2, 0)
    return System(e[..., None], none, none.mT, (B * e / Lam)[..., None], C)


def real_form(e, f, g, W, C):
    """In coordinates (Re x, Im x): E (D, N, N), columns W (D, N, j), rows C (D, n, N)."""
    dtype = C.real.dtype
    real, imag = (torch.diag_embed(part[..., 0].to(dtype)) for part in (e.real, e.imag))
    E = torch.cat([torch.cat([real, -imag], -1), torch.cat([imag, real], -1)], -2)  # (D, N, N)
    f, W = (torch.cat([v.real, v.imag], -2).to(dtype) for v in (f, W))  # (D, N, r), (D, N, j)
    # a row v acts by Re(v x) = (Re v, -Im v) (Re x, Im x); the 2 of 2 Re(C x) goes into C
    g, C = (torch.cat([v.real, -v.imag], -1).to(dtype) for v in (g, C))  # (D, r, N), (n, D, N)
    return torch.baddbmm(E, f, g, alpha=-1), W, 2 * C.transpose(0, 1)


def square(E):
    """A_bar^2 - I from E = A_bar - I: (D, N, N)."""
    return torch.baddbmm(E, E, E, beta=2)


def square_low_rank(e, f, g):
    """The same of E = diag(e) - f g, in the same form, of twice the rank."""
    gf = (g @ f).real.to(g.dtype)  # (D, r, r)
    return e * (2 + e), torch.cat([f + e * f, f], -1), torch.cat([g, g + g * e.mT - gf @ g], -2)


def two_level_kernel(system, L):
    """K[i m + j] = (C A_bar^(m i)) (A_bar^j B_bar), l = i m + j < L.  Returns (n, D, L) real.

    Exact for every L, K(L)[:l] == K(l); no parameter knows a length (the paper's C~ does).
    The columns W = A_bar^j B_bar and the rows R = C A_bar^(m i) double in number with each power
    A_bar^1, 2, 4, 8 ...: up to 8 columns with diagonal plus rank 1, 2, 4 in float64 (most of the
    rounding would enter there), then densely.  O(D N (N^2 log L + N sqrt L + L)) time,
    O(D N max(N, sqrt L) + D L) memory.
    """
    # differs from the paper: powers of A_bar, no Cauchy sums
    e, f, g, W, C = system
    m = 2 ** ((L - 1).bit_length() // 2)  # about sqrt L
    while W.shape[-1] < min(m, 8):
        W = torch.cat([W, W + e * W - f @ (g @ W).real.to(W.dtype)], -1)  # (D, N/2, 2j)
        e, f, g = square_low_rank(e, f, g)
    E, W, R = real_form(e, f, g, W, C)  # (D, N, N), (D, N, j), (D, n, N)
    while W.shape[-1] < m:
        W = torch.cat([W, torch.baddbmm(W, E, W)], -1)  # (D, N, 2j)
        E = square(E)
    (D, n, _), rows = R.shape, -(-L // m)
    while R.shape[1] < n * rows:  # E = A_bar^m - I, A_bar^(2m) - I, ...
        R = torch.cat([R, torch.baddbmm(R, R, E)], 1)  # (D, 2i n, N)
        E = square(E) if R.shape[1] < n * rows else E
    K = R[:, : n * rows] @ W  # (D, rows n, m), directions innermost
    return K.view(D, rows, n, m).permute(2, 0, 1, 3).reshape(n, D, rows * m)[..., :L]


def cauchy_kernel(system, Lam, P, B, dt, L):
    """The paper's kernel (cauchy_ref) without its pole: (n, D, L) real, O(D N L) time and memory,
    and O(D N^3 log L) time for C~.

    At the root of unity exp(-2 i t), z = (2 / dt) i tan t is infinite at t = pi / 2 and large
    around it, where float32 loses three digits.  Numerator and denominator times cos t are bounded:
        sum over a pair of b c / (z - Lam) / cos t = (4 i Re(v) sin t - 2 Re(v a^*) cos t) / den,
        den = |a|^2 cos^2 t - 4 sin^2 t - 4 i Re(a) sin t cos t,   a = dt Lam,  v = dt b c.
    All sums (b: B, P; c: C~, P^*) are one real product with a table of 1 / den.  The factor before
    them, 2 / (1 + w) = exp(i t) / cos t, takes the last cosine away.
    """
    C = system.C
    E, _, R = real_form(*system[:4], C.to(torch.complex128))  # (D, N, N), (D, n, N)
    row, power = R, L  # R A_bar^L, by the binary digits of L
    while power:
        row = torch.baddbmm(row, row, E) if power % 2 else row
        E, power = square(E), power // 2
    C_cut = torch.complex(*(R - row).chunk(2, -1)).conj().to(C.dtype) / 2  # (D, n, N/2)
    t = torch.arange(L // 2 + 1, dtype=torch.float64, device=E.device) * (math.pi / L)
    cos, sin = t.cos().to(C.real.dtype), t.sin().to(C.real.dtype)  # (M,), M = L//2 + 1
    Lam, P, B, dt = (v.to(C.dtype) for v in (Lam, P, B, dt))
    a = (dt * Lam)[..., None]  # (D, N/2, 1)
    size = a.abs()
    den = torch.complex((size * cos - 2 * sin) * (size * cos + 2 * sin), -4 * a.real * sin * cos)
    table = torch.view_as_real(1 / den).flatten(-2)  # (D, N/2, 2 M) real
    b, c = torch.stack([B, P], 1), torch.cat([C_cut, P.conj()[:, None]], 1)  # (D, 2 or n+1, N/2)
    v = (dt[:, None] * b)[:, :, None] * c[:, None]  # (D, 2, n + 1, N/2)
    weights = torch.stack([v.real, (v * a.mT[:, None].conj()).real], 1)  # (D, 2, 2, n + 1, N/2)
    sums = (weights.flatten(1, 3) @ table).unflatten(-1, (-1, 2))  # (D, 4 (n + 1), M, 2)
    sums = torch.view_as_complex(sums).unflatten(1, (2, 2, -1))  # (D, 2, 2, n + 1, M)
    (BC, BP), (PC, PP) = (
        s.split([len(C), 1], 1) for s in (4j * sin * sums[:, 0] - 2 * cos * sums[:, 1]).unbind(1)
    )
    K_f = torch.polar(torch.ones_like(t), t).to(C.dtype) * (BC - cos * BP * PC / (1 + cos * PP))
    return torch.fft.irfft(K_f, L).transpose(0, 1)  # (D, n, L) -> (n, D, L)


def diagonal_kernel(Lam, B_bar, C, dt, L):
    """S4D's K[i m + j] = 2 Re sum (C a^(m i)) (a^j B_bar), a = exp(dt Lam).  Returns (n, D, L).

    No (D, N, L) array.  The two small factors are made in float64 (a float32 phase at l = 16384 has
    lost three digits), the product in C's precision.  O(D N L) time, O(D N sqrt L + D L) memory.
    """
    m = 2 ** ((L - 1).bit_length() // 2)
    rows = torch.arange(0, L, m, dtype=dt.dtype, device=dt.device)  # (rows,)
    a = dt * Lam  # (D, N/2)
    R = 2 * C[:, :, None] * torch.exp(a[:, None] * rows[:, None])  # (n, D, rows, N/2)
    W = B_bar * torch.exp(a[..., None] * torch.arange(m, dtype=dt.dtype, device=dt.device))
    R, W = torch.cat([R.real, -R.imag], -1), torch.cat([W.real, W.imag], -2)
    return (R.to(C.real.dtype) @ W.to(C.real.dtype)).flatten(-2)[..., :L]  # (n, D, L)


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


def fft_conv(u, K):
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


# ---------------------------------------------------------------- layers and model


class State(NamedTuple):
    """What a recurrence remembers, and the system at work: new parameters need a new state."""

    x: torch.Tensor  # (B, D, N) real: N numbers a channel, (Re, Im) of the pairs
    system: System
    dense: tuple  # real_form(system): E (D, N, N), B_bar (D, N, 1), C (D, 1, N)


class S4(nn.Module):
    """The S4 token mixer, linear: y = K * u + D_skip u, (B, L, D) -> (B, L, D).

    Each channel has its own dt, Lam, P, B, C, as in the paper.  Any L: no length is stored and
    forward rewrites no parameter.  float32, float64; under autocast or with parameters of half
    precision the layer computes in float32 and returns the dtype of x.  Causal up to the rounding
    of the largest input (FFT); one that is not finite spoils all positions.
    """

    def __init__(self, d_model, d_state=64, bidirectional=False, dt_min=1e-3, dt_max=1e-1):
        super().__init__()
        if d_model < 1:
            raise ValueError(f"expected d_model >= 1, got {d_model}")
        if not 0 < dt_min <= dt_max < math.inf:
            raise ValueError(f"expected finite 0 < dt_min <= dt_max, got {dt_min} and {dt_max}")
        self.d_model, self.bidirectional = d_model, bidirectional
        Lam, P, B, _ = nplr_legs(d_state)  # (N/2,) each
        low, high = math.log(dt_min), math.log(dt_max)
        self.log_dt = nn.Parameter(low + torch.rand(d_model) * (high - low))  # (D,)
        self.set_dynamics(Lam, B)
        self.P = self.per_channel(np.stack([P.real, P.imag], -1))  # (D, N/2, 2)
        C = torch.randn(1 + bidirectional, *self.B.shape)  # (n, D, N/2, 2)
        self.C = nn.Parameter(C * 0.5**0.5)  # complex, of variance 1
        self.D_skip = nn.Parameter(torch.randn(d_model))

    def set_dynamics(self, Lam, B):
        if Lam.shape != B.shape or Lam.ndim != 1 or not (Lam.real < 0).all():
            raise ValueError(
                f"expected Lam, B (N/2,), Re Lam < 0, got {Lam.shape}, {B.shape}: {Lam}"
            )
        # differs from the paper: Re Lam < 0 whatever is learned and Q = P, so no system can grow
        self.log_decay = self.per_channel(np.log(-Lam.real))  # (D, N/2)
        self.frequency = self.per_channel(Lam.imag)  # (D, N/2)
        self.B = self.per_channel(np.stack([B.real, B.imag], -1))  # (D, N/2, 2)

    def per_channel(self, value):
        value = torch.tensor(value, dtype=torch.get_default_dtype())  # on the default device
        return nn.Parameter(value.expand(self.d_model, *value.shape).clone())

    def continuous(self, rate=1.0):
        """Lam, B: (D, N/2) complex128, C: (n, D, N/2) complex, dt: (D, 1) float64."""
        dt = self.log_dt.double().exp()[:, None] * rate
        if not torch.compiler.is_compiling():  # a compiled graph cannot look at values
            bad = dt[~(dt.isfinite() & (dt > 0))].tolist()
            if bad:
                raise ValueError(f"dt not positive and finite: {bad[:3]} in {len(bad)} channels")
        Lam = torch.complex(-self.log_decay.double().exp(), self.frequency.double())
        C = self.C.to(torch.promote_types(self.C.dtype, torch.float32))
        return Lam, torch.view_as_complex(self.B.double()), torch.view_as_complex(C), dt

    def system(self, rate=1.0):
        """The discrete System at step rate * dt."""
        Lam, B, C, dt = self.continuous(rate)
        return discretize(Lam, torch.view_as_complex(self.P.double()), B, C, dt)

    def impulse_response(self, L, rate):
        return two_level_kernel(self.system(rate), L)  # (n, D, L)

    def kernel(self, L, rate=1.0):
        """Impulse response without the skip: (D, L), (2, D, L) when bidirectional (see fft_conv).

        rate: input step in units of that of training, 2 for half the sampling rate.  The integral
        of the kernel stays the same.  ValueError if L < 1 or a dt is not positive and finite.
        """
        if L < 1:
            raise ValueError(f"length {L}: expected 1 or more")
        with torch.autocast(self.C.device.type, enabled=False):
            K = self.impulse_response(L, rate)  # (n, D, L)
        return K if self.bidirectional else K[0]

    def forward(self, x, keep=None, rate=1.0):
        """x (B, L, D), keep (B, L) bool: False positions count as absent (padding at the ends)."""
        self.check(x, keep)
        u = x if keep is None else x.masked_fill(~keep[..., None], 0)
        K = self.kernel(x.shape[1], rate)
        K = torch.cat([K[..., :1] + self.skip_at_zero(), K[..., 1:]], -1)
        return fft_conv(u.to(K.dtype), K).to(x.dtype)

    def check(self, x, keep=None):
        if x.ndim != 3 or x.shape[1] < 1 or x.shape[2] != self.d_model or not x.is_floating_point():
            text = f"(B, L >= 1, {self.d_model}) floating, got {tuple(x.shape)} {x.dtype}"
            raise ValueError(f"expected x {text}")
        if keep is not None and (keep.shape != x.shape[:2] or keep.dtype != torch.bool):
            raise ValueError(
                f"expected keep {tuple(x.shape[:2])} bool, got {tuple(keep.shape)} {keep.dtype}"
            )

    def skip_at_zero(self):
        """The skip as a lag-zero tap, which costs no pass over (B, L, D)."""
        D_skip = self.D_skip[:, None]  # (D, 1)
        return torch.stack([D_skip, torch.zeros_like(D_skip)]) if self.bidirectional else D_skip

    def initial_state(self, batch, rate=1.0):
        """Nothing seen yet.  ValueError for a bidirectional layer."""
        if self.bidirectional:
            raise ValueError("a bidirectional layer needs the future; bidirectional=False can step")
        with torch.autocast(self.C.device.type, enabled=False):
            system = self.system(rate)
            system = System(*(part.to(system.C.dtype) for part in system))
            dense = real_form(*system)
        return State(dense[0].new_zeros(batch, *dense[0].shape[:2]), system, dense)

    def step(self, x_t, state):
        """One position: x_t (B, D), State -> y_t (B, D), State.  O(N) a channel, or dense."""
        if x_t.shape != state.x.shape[:2]:
            raise ValueError(f"expected x_t {tuple(state.x.shape[:2])}, got {tuple(x_t.shape)}")
        x, (e, f, g, _, _), (E, B_bar, C) = state
        u = x_t.to(x.dtype)  # (B, D)
        with torch.autocast(x.device.type, enabled=False):
            if len(x) >= 8:  # E, read once for the batch, beats many small operations
                change = torch.einsum("dij,bdj->bdi", E, x)  # (B, D, N)
            else:
                z = torch.complex(*x.chunk(2, -1))  # (B, D, N/2)
                along = (g * z[..., None, :]).real.sum(-1)  # (B, D, r)
                z = e[..., 0] * z - (f * along[..., None, :]).sum(-1)
                change = torch.cat([z.real, z.imag], -1)
            x = x + (change + B_bar[..., 0] * u[..., None])
            y = torch.einsum("dj,bdj->bd", C[:, 0], x) + self.D_skip * u
        return y.to(x_t.dtype), state._replace(x=x)

    def prefill(self, x, state):
        """The next positions: x (B, L, D), State -> y (B, L, D), State, by chunks of m = 64."""
        self.check(x)
        if len(x) != len(state.x):
            raise ValueError(
                f"expected x of the state's batch {len(state.x)}, got {tuple(x.shape)}"
            )
        m = 1 << min(6, (x.shape[1] - 1).bit_length())
        with torch.autocast(self.C.device.type, enabled=False):
            E, W, C = state.dense  # (D, N, N), (D, N, 1), (D, 1, N)
            powers, R = [E], torch.baddbmm(C, C, E)  # A_bar^(2^i) - I; rows C A_bar^(j + 1)
            while W.shape[-1] < m:
                W = torch.cat([W, torch.baddbmm(W, powers[-1], W)], -1)  # (D, N, 2j)
                R = torch.cat([R, torch.baddbmm(R, R, powers[-1])], 1)  # (D, 2j, N)
                powers.append(square(powers[-1]))
            T = F.pad((C @ W)[:, 0], (m - 1, 0)).unfold(-1, m, 1)  # T[i, q] = K[i + q - m + 1]
            h = state.x.permute(1, 2, 0)  # (D, N, B)
            out = []
            for u in x.to(W.dtype).permute(2, 1, 0).split(m, 1):  # (D, t, B), t <= m
                t, back = u.shape[1], u.flip(1)  # the latest first, as T and W count lags
                out.append(T[:, :t, m - t :] @ back + R[:, :t] @ h)  # (D, t, B): chunk, before it
                for i, power in enumerate(powers):  # h <- A_bar^t h, t in binary
                    h = torch.baddbmm(h, power, h) if t >> i & 1 else h
                h = h + W[..., :t] @ back
            y = torch.cat(out, 1).permute(2, 1, 0) + self.D_skip * x.to(W.dtype)  # (B, L, D)
        return y.to(x.dtype), state._replace(x=h.permute(2, 0, 1))


class S4D(S4):
    """S4 with a diagonal A under zero-order hold.  init: s4d_lin, s4d_inv, s4d_legs or your own."""

    def __init__(
        self, d_model, d_state=64, bidirectional=False, dt_min=1e-3, dt_max=1e-1, init=s4d_lin
    ):
        super().__init__(d_model, d_state, bidirectional, dt_min, dt_max)
        del self.P
        self.set_dynamics(*init(d_state))

    def system(self, rate=1.0):
        return hold(*self.continuous(rate))

    def impulse_response(self, L, rate):
        Lam, _, C, dt = self.continuous(rate)
        return diagonal_kernel(Lam, self.system(rate).B_bar, C, dt, L)


class DLR(S4D):
    """x_l = exp(Lam) x_{l-1} + u_l, y_l = 2 Re(C x_l): a plain recurrence, no HiPPO and no dt.

    The model of 2310.02980v4, equation 3, which asks what structured initialisation is worth.
    Phases 2 pi k / N as there; decays log-uniform in [dt_min, dt_max] (ours: no value is given).
    """

    def __init__(self, d_model, d_state=64, bidirectional=False, dt_min=1e-3, dt_max=1e-1):
        super().__init__(d_model, d_state, bidirectional, dt_min, dt_max)
        del self.log_dt, self.B
        low, high = math.log(dt_min), math.log(dt_max)
        self.log_decay = nn.Parameter(low + torch.rand(d_model, d_state // 2) * (high - low))
        self.frequency = self.per_channel(2 * np.pi * np.arange(d_state // 2) / d_state)

    def continuous(self, rate=1.0):
        """As S4, with dt = 1 and the B of which B_bar is 1.  ValueError for another rate."""
        if rate != 1:
            raise ValueError(f"rate {rate}: expected 1, a plain recurrence has no time step")
        Lam = torch.complex(-self.log_decay.double().exp(), self.frequency.double())
        C = self.C.to(torch.promote_types(self.C.dtype, torch.float32))
        return (
            Lam,
            Lam / torch.expm1(Lam),
            torch.view_as_complex(C),
            torch.ones_like(Lam.real[:, :1]),
        )


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


def s4_mixer(config, i, kind=S4):
    """The default mixer of block i."""
    return kind(config.d_model, config.d_state, not config.causal, config.dt_min, config.dt_max)


def s4d_mixer(config, i):
    """The mixer of block i in S4Model(config, s4d_mixer)."""
    return s4_mixer(config, i, S4D)


def diagonal_mixer(config, i):
    """The mixer of block i in S4Model(config, diagonal_mixer)."""
    return s4_mixer(config, i, DLR)


class S4Model(nn.Module):
    """Embedding, blocks, final norm: tokens (B, L) int64 or values (B, L, C) float -> (B, L, D)."""

    def __init__(self, config, mixer=s4_mixer):
        super().__init__()
        D, vocab, n = config.d_model, config.vocab_size, config.n_channels
        if (vocab is None) == (n is None):
            raise ValueError(f"set exactly one of vocab_size and n_channels, got {vocab} and {n}")
        self.config = config
        self.embed = nn.Linear(n, D) if vocab is None else nn.Embedding(vocab, D)
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

    def initial_state(self, batch):
        """One State a block; ValueError unless config.causal."""
        return [block.mixer.initial_state(batch) for block in self.blocks]

    def step(self, x_t, state):
        """x_t (B,) int64 or (B, C) float, state -> features (B, D), state."""
        return self.advance("step", x_t, state)

    def prefill(self, x, state):
        """x (B, L) int64 or (B, L, C) float, state -> features (B, L, D), state."""
        return self.advance("prefill", x, state)

    def advance(self, mode, x, state):
        """As forward, by the method `mode` ("step" or "prefill") of each mixer."""
        h, after = self.embed(x), []
        for block, before in zip(self.blocks, state, strict=True):
            y, s = getattr(block.mixer, mode)(block.norm(h), before)
            h = h + F.glu(block.out(block.dropout(F.gelu(y))), dim=-1)  # as S4Block.forward
            after.append(s)
        return self.norm(h), after

    @torch.no_grad()
    def generate(self, prompt, n, head, temperature=0.0):
        """n further tokens after prompt (B, L >= 1) int64: (B, n).

        head: features (B, D) -> logits (B, vocab_size).  temperature 0 takes the likeliest token.
        Call eval() first where there is dropout.
        """
        h, state = self.prefill(prompt, self.initial_state(len(prompt)))
        h, out = h[:, -1], prompt.new_empty(len(prompt), n)
        for i in range(n):
            logits = head(h)
            if temperature > 0:
                out[:, i] = torch.multinomial((logits / temperature).softmax(-1), 1)[:, 0]
            else:
                out[:, i] = logits.argmax(-1)
            h, state = self.step(out[:, i], state)
        return out

    def param_groups(self, lr, weight_decay):
        """AdamW groups as the papers use them: three dicts, every parameter in one.

        What makes a kernel, in any mixer that has one, learns at min(lr, 1e-3) without decay.
        """
        mixers = [m for m in self.modules() if hasattr(m, "kernel")]
        group = {id(p): 0 for m in mixers for p in m.parameters()}
        group |= {id(getattr(m, k)): 1 for m in mixers for k in ("C", "D_skip") if hasattr(m, k)}
        groups = [
            {"params": [], "lr": min(lr, 1e-3), "weight_decay": 0.0},  # Lam, P, B, dt
            {"params": [], "lr": lr, "weight_decay": 0.0},  # C, skips, biases, norms
            {"params": [], "lr": lr, "weight_decay": weight_decay},  # linear maps, embeddings
        ]
        for p in self.parameters():
            groups[group.get(id(p), 1 if p.ndim < 2 else 2)]["params"].append(p)
        return groups


# ---------------------------------------------------------------- self-check


def rel_err(a, b):
    """max|a - b| / max|b|, the one error measure here."""
    a, b = (torch.as_tensor(v).detach().double().cpu() for v in (a, b))
    assert b.abs().max() > 0 and a.shape == b.shape, (a.shape, b.shape)
    return float((a - b).abs().max() / b.abs().max())


def check_reference(N=8, L=63, dt=0.05):
    """The ladder of the paper in numpy, float64; each rung against the one before."""
    (Lam, P, B_half, V), C = nplr_legs(N), np.cos(np.arange(N))
    A_bar, B_bar = discretize_ref(*hippo_legs(N), dt)
    u, K = np.sin(np.arange(L) ** 2), kernel_ref(A_bar, B_bar, C, L)
    y = recurrence_ref(A_bar, B_bar, C, u)
    yield "recurrence == convolution with K", rel_err(convolution_ref(u, K), y), 1e-10
    yield "generating function == K", rel_err(generating_ref(A_bar, B_bar, C, L), K), 1e-10
    full = [both(v) for v in (Lam, P, B_half, C @ V)]
    yield "Cauchy sums, Woodbury == K", rel_err(cauchy_ref(*full, dt, L), K), 1e-10


def check_kernels(dtype, device, limit, N=8, dt=0.05):
    """The fast kernels and their gradients against the reference, L odd and even."""

    def one_channel(*arrays):
        return (torch.as_tensor(v, device=device)[None] for v in arrays)

    (Lam, P, B, V), C = nplr_legs(N), np.cos(np.arange(N))
    Lam, P, B, c, step = one_channel(Lam, P, B, (C @ V)[None], np.array([dt]))
    c = c.to(dtype.to_complex()).requires_grad_()
    system = discretize(Lam, P, B, c, step)
    for L in (1, 63, 200):
        K = kernel_ref(*discretize_ref(*hippo_legs(N), dt), C, L)
        fast, slow = two_level_kernel(system, L), cauchy_kernel(system, Lam, P, B, step, L)
        yield f"two-level kernel, L = {L} == K", rel_err(fast[0, 0], K), limit
        yield f"stable Cauchy kernel, L = {L} == K", rel_err(slow[0, 0], K), limit
        weight = torch.cos(torch.arange(L, dtype=dtype, device=device))
        g = [torch.autograd.grad((k * weight).sum(), c, retain_graph=True)[0] for k in (fast, slow)]
        yield f"its gradient == Cauchy's, L = {L}", rel_err(*map(torch.view_as_real, g)), limit
    (Lam, B), C = s4d_inv(N), C[: N // 2]
    K = diagonal_kernel_ref(Lam, B, C, dt, 200)
    Lam, B, c = one_channel(Lam, B, C[None] + 0j)
    c = c.to(dtype.to_complex())
    fast = diagonal_kernel(Lam, hold(Lam, B, c, step).B_bar, c, step, 200)
    yield "S4D two-level kernel == direct sum", rel_err(fast[0, 0], K), limit


def stream(module, x, sizes):
    """x in pieces through the recurrent mode, pieces of 1 by `step`: y (B, L, D), state."""
    state, out = module.initial_state(len(x)), []
    for piece in x.split(sizes, 1):
        if piece.shape[1] > 1:
            y, state = module.prefill(piece, state)
        else:
            y, state = module.step(piece[:, 0], state)
        out.append(y.reshape(*piece.shape[:2], -1))
    return torch.cat(out, 1), state


def check_layers(dtype, device, limit):
    """The layers against the definition of the convolution, the recurrence, and each other."""
    x = torch.randn(2, 150, 4, dtype=dtype, device=device)
    u = x.cpu().numpy()
    for kind in (S4, S4D):
        layer, name = kind(4, 16).to(device, dtype), kind.__name__
        K, D_skip = (v.detach().cpu().numpy() for v in (layer.kernel(150), layer.D_skip))
        y = [[convolution_ref(u[b, :, d], K[d]) for d in range(4)] for b in range(2)]
        y = np.swapaxes(y, 1, 2) + D_skip * u
        yield f"{name} layer == convolution and skip", rel_err(layer(x), y), limit
        stepped, last = stream(layer, x, 1)
        yield f"{name} step by step == convolution", rel_err(stepped, y), limit
        chunked, state = stream(layer, x, [2, 69, 64, 15])
        yield f"{name} in chunks == convolution", rel_err(chunked, y), limit
        yield f"{name} state after chunks == after steps", rel_err(state.x, last.x), limit
        both_ways = kind(4, 16, bidirectional=True).to(device, dtype)
        ahead, back = both_ways.kernel(150)
        want = fft_conv(x, ahead) + both_ways.D_skip * x
        want[:, :-1] += fft_conv(x.flip(1), back).flip(1)[:, 1:]
        yield f"{name} both ways == there and back", rel_err(both_ways(x), want), limit


def check_model(dtype, device, limit):
    """The whole model: padding, recurrent mode."""
    tokens = torch.arange(2 * 90, device=device).view(2, 90) ** 2 % 11
    keep = torch.arange(90, device=device).expand(2, 90) < 50
    for name, kind in (("S4", s4_mixer), ("S4D", s4d_mixer)):
        for way in ("causal", "both ways"):
            config = S4Config(d_model=8, d_state=16, vocab_size=11, causal=way == "causal")
            model = S4Model(config, kind).to(device, dtype)
            error = rel_err(model(tokens, keep)[:, :50], model(tokens[:, :50]))
            yield f"{name} model, {way}: padded == alone", error, limit
            if config.causal:
                error = rel_err(stream(model, tokens, [77] + [1] * 13)[0], model(tokens))
                yield f"{name} model, prefill and step == forward", error, limit


def check_float32(L=16384, N=64, dt=0.01):
    """float32 kernels against a float64 recurrence of the same parameters."""
    for kind in (S4, S4D):
        layer = kind(2, N, dt_min=dt, dt_max=dt)
        E, x, C = real_form(*layer.double().system())
        K = []
        for _ in range(L):
            K.append((C @ x)[:, 0, 0])
            x = torch.baddbmm(x, E, x)
        error = rel_err(layer.float().kernel(L), torch.stack(K, 1))
        yield f"float32 {kind.__name__} kernel, L = {L}", error, 1e-5


@torch.no_grad()
def self_check(dtype=torch.float64, device="cpu"):
    """List of (name, error, limit).  Also seeds torch with 0."""
    torch.manual_seed(0)
    to = dtype, device, 1e-10 if dtype == torch.float64 else 1e-5
    with torch.enable_grad():
        rows = [*check_reference(), *check_kernels(*to)]
    return [*rows, *check_layers(*to), *check_model(*to), *check_float32()]


# ---------------------------------------------------------------- demo, timing, command line


def print_table(rows):
    """Prints the check table; True when every error is within its limit (nan is not)."""
    print(f"{'check':48} {'error':>10} {'limit':>10}")
    for name, error, limit in rows:
        print(f"  {name:46} {error:10.1e} {limit:10.0e}   {'ok' if error <= limit else 'FAILED'}")
    return all(error <= limit for _, error, limit in rows)


def demo(steps=120, L=256, target=0.95):
    """Learns to name the one symbol before L blanks, then does so as a recurrence."""
    torch.manual_seed(0)
    model = S4Model(S4Config(d_model=32, n_layers=1, d_state=32, vocab_size=5, causal=True))
    head = nn.Linear(32, 4)
    groups = [*model.param_groups(2e-2, 0.0), {"params": head.parameters(), "lr": 2e-2}]
    optimizer = torch.optim.AdamW(groups)
    print(f"\ndemo: name the symbol before {L} blanks (chance 0.25), {steps} steps of 16 sequences")
    for i in range(1, steps + 1):
        x = F.pad(torch.randint(0, 4, (16, 1)), (0, L), value=4)  # (B, L + 1)
        loss = F.cross_entropy(head(model(x)[:, -1]), x[:, 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if i % (steps // 6) == 0:
            print(f"  step {i:4}  loss {loss.item():.3f}")
    x = F.pad(torch.arange(4)[:, None], (0, L), value=4)  # all four cases
    with torch.no_grad():
        ends = [features[:, -1] for features in (model(x), stream(model, x, [L, 1])[0])]
        whole, stepped = ((head(h).argmax(-1) == x[:, 0]).double().mean().item() for h in ends)
    ok = min(whole, stepped) >= target
    result = f"accuracy {whole:.2f}, as a recurrence {stepped:.2f}, target {target}"
    print(f"  {result}{'' if ok else '  MISSED'}")
    return ok


def timing(D=64, N=64, L=4096, rounds=3):
    """Kernel and mixer, forward and backward, beside the convolution they feed."""
    layer, u = S4(D, N), torch.randn(4, L, D, requires_grad=True)
    k = torch.randn(D, L, requires_grad=True)

    def cauchy():
        Lam, B, _, dt = layer.continuous()
        P = torch.view_as_complex(layer.P.double())
        return cauchy_kernel(layer.system(), Lam, P, B, dt, L)

    print(f"\nforward and backward, D {D}, N {N}, L {L}, {torch.get_num_threads()} threads")
    for name, run in (
        ("kernel, stable Cauchy form", cauchy),
        ("kernel, two-level form", lambda: layer.kernel(L)),
        ("convolution of (4, L, D) alone", lambda: fft_conv(u, k)),
        ("mixer: kernel, convolution, skip", lambda: layer(u)),
    ):
        seconds = []
        for _ in range(rounds):
            start = time.perf_counter()
            run().sum().backward()
            seconds.append(time.perf_counter() - start)
        print(f"  {name:34} {min(seconds) * 1e3:8.1f} ms")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="print the check tables and stop")
    parser.add_argument("--device", default="cpu", help="torch device (default cpu)")
    args = parser.parse_args(argv)
    ok = True
    for dtype in (torch.float64, torch.float32):
        print(f"s4.py  torch {torch.__version__}  device {args.device}  {dtype}  seed 0")
        ok = print_table(self_check(dtype, args.device)) and ok
    if not args.check:
        ok = demo() and ok
        timing()
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
