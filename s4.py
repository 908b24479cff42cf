"""S4, S4D and DLR: state space layers that train as a convolution and generate as an RNN.

    x'(t) = A x(t) + B u(t),   y(t) = C x(t) + D u(t),   one such system per channel

Papers: S4, Gu, Goel, Re, "Efficiently Modeling Long Sequences with Structured State Spaces",
arXiv:2111.00396v3.  S4D, Gu, Gupta, Goel, Re, "On the Parameterization and Initialization of
Diagonal State Space Models", arXiv:2206.11893v2.  DLR, Amos, Berant, Gupta, "Never Train from
Scratch", arXiv:2310.02980v4.

    paper        code            shape
    Lambda       Lam             (D, N/2) complex, one of each conjugate pair
    P = Q, B     P, B            (D, N/2, 2), real and imaginary parts
    C            C               (n, D, N/2, 2), n = 2 directions if bidirectional, else 1; as real
                                 rows (D, n, N)
    Delta        dt              (D, 1) = rate exp(log_dt)
    A_bar        E = A_bar - I   (D, N, N) real; in A_bar itself slow modes, near 1, lose digits
    B_bar        B_bar           (D, N, 1) real
    K            K               (D, L), or (2, D, L) if bidirectional
    D            D_skip          (D,)
    u, y         x, y            (B, L, D)
    x            state.x         (B, D, N) real

Sizes: B sequences, L steps, D channels, N real numbers of state per channel (N/2 conjugate pairs).
In real coordinates a state is Re x_1, Im x_1, Re x_2, ... of the kept half.  There diag(Lam)
consists of N/2 blocks of 2 x 2.  P^* x, summed over both of each pair, is 2 P^T x, so A is these
blocks minus 2 P P^T.

Differences from the papers are marked where they occur.  The largest: K comes from powers of A_bar
(two_level_kernel), in real matrix products that every device is fast at; the paper's Cauchy kernel
is only a reference.  Left out: other HiPPO matrices, parameters shared between channels, 2-D
kernels, a CUDA kernel, torch.func.grad and vmap, torch.jit, devices without float64 (MPS).

    python s4.py            checks, then a demo that ends with
                            accuracy 1.00, as a recurrence 1.00, target 0.95
    python s4.py --check    checks only
"""

import argparse
import math
import sys
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

CHUNK = 64  # tokens per chunk of prefill

# ------------------------------------------- numpy, one channel: initialization, reference (_ref)


def hippo_legs(N):
    """Return HiPPO-LegS, A (N, N) and B (N,): the state holds Legendre coefficients of the past."""
    root = np.sqrt(2 * np.arange(N) + 1.0)  # (N,)
    below = np.tril(np.outer(root, root), -1)
    A = -below - np.diag(np.arange(N) + 1.0)
    return A, root


def dplr_legs(N):
    """Return HiPPO-LegS as diagonal plus low rank (S4): Lam, P, B (N/2,) complex, V (N, N/2).

        A = U (diag(Lam, Lam conj) - q q^*) U^*,   U = (V, V conj),   q = U^* p = (P, P conj)

    With p = sqrt(n + 1/2), A + p p^T + I/2 is skew, so a Hermitian solver finds a unitary U.  (The
    condition number of the eigenvectors of A itself grows exponentially with N.)
    """
    A, B = hippo_legs(N)
    p = np.sqrt(np.arange(N) + 0.5)  # (N,)
    skew = A + np.outer(p, p) + 0.5 * np.eye(N)
    frequency, V = np.linalg.eigh(-1j * skew)  # (N,), (N, N)
    V = V[:, frequency > 0]  # (N, N/2)
    V = V * np.exp(1j * np.angle(V.conj().T @ B))  # the solver's phases are arbitrary: make B > 0
    Lam = -0.5 + 1j * frequency[frequency > 0]
    P = V.conj().T @ p
    B = V.conj().T @ B
    return Lam, P, B, V


def both(v):
    """Append the other half of the conjugate pairs: (N/2,) -> (N,)."""
    return np.append(v, v.conj())


def bilinear_ref(A, B, dt):
    """Discretize with the bilinear method (S4): A_bar (N, N), B_bar (N,)."""
    left = np.eye(len(A)) - dt / 2 * A
    right = np.eye(len(A)) + dt / 2 * A
    A_bar = np.linalg.solve(left, right)
    B_bar = np.linalg.solve(left, dt * B)
    return A_bar, B_bar


def hold_ref(Lam, B, dt):
    """Discretize A = diag(Lam) with zero-order hold (S4D): A_bar (N, N), B_bar (N,)."""
    a = np.exp(dt * Lam)
    B_bar = (a - 1) / Lam * B
    return np.diag(a), B_bar


def recurrence_ref(A_bar, B_bar, C, u):
    """x_l = A_bar x_{l-1} + B_bar u_l,  y_l = C x_l.  u: (L,).  Returns y: (L,)."""
    x = np.zeros(len(A_bar), A_bar.dtype)
    y = []
    for u_l in u:
        x = A_bar @ x + B_bar * u_l
        y.append((C @ x).real)
    return np.array(y)


def kernel_ref(A_bar, B_bar, C, L):
    """K[l] = C A_bar^l B_bar, the response to an impulse.  Returns (L,), O(N^2 L)."""
    impulse = [1.0] + (L - 1) * [0.0]
    return recurrence_ref(A_bar, B_bar, C, impulse)


def cauchy_ref(Lam, P, B, C, dt, L):
    """Compute K of A = diag(Lam) - P P^* by the paper's Cauchy kernel.  Returns (L,).

    Lam, P, B, C: (N,), both halves of the conjugate pairs; L must be odd.
    At the roots of unity w, C~ (I - A_bar w)^-1 B_bar with C~ = C (I - A_bar^L) is the DFT of K.
        (I - A_bar w)^-1 B_bar = 2 / (1 + w) (z - A)^-1 B,   z = (2 / dt) (1 - w) / (1 + w)
    where (z - A)^-1 is the diagonal (z - Lam)^-1, corrected for P P^* by Woodbury's identity.
    """
    A = np.diag(Lam) - np.outer(P, P.conj())
    A_bar, _ = bilinear_ref(A, B, dt)
    C_cut = C - C @ np.linalg.matrix_power(A_bar, L)
    w = np.exp(-2j * np.pi * np.arange(L) / L)  # (L,); w = -1, for L even, is a pole of z
    z = 2 / dt * (1 - w) / (1 + w)
    cauchy = 1 / (z - Lam[:, None])  # (N, L)
    CB = (C_cut * B) @ cauchy  # (L,)
    CP = (C_cut * P) @ cauchy
    PB = (P.conj() * B) @ cauchy
    PP = (P.conj() * P) @ cauchy
    correction = CP / (1 + PP) * PB
    K_f = 2 / (1 + w) * (CB - correction)
    return np.fft.ifft(K_f).real


def s4d_lin(N):
    """Return S4D-Lin: Lam, B (N/2,) complex128."""
    n = np.arange(N // 2)
    return -0.5 + 1j * np.pi * n, np.ones(N // 2, complex)


def s4d_inv(N):
    """Return S4D-Inv, whose frequencies are spread like those of HiPPO-LegS."""
    n = np.arange(N // 2)
    frequency = N / np.pi * (N / (2 * n + 1) - 1)
    return -0.5 + 1j * frequency, np.ones(N // 2, complex)


def s4d_legs(N):
    """Return S4D-LegS, Lam and B / 2 of `dplr_legs`; for large N its kernel is HiPPO-LegS's."""
    Lam, _, B, _ = dplr_legs(N)
    return Lam, B / 2


# ---------------------------------------------------------------- torch: D channels at once


def require(ok, message):
    """Raise ValueError unless ok."""
    if not ok:
        raise ValueError(message)


def eigenvalues(log_decay, frequency):
    """Return Lam (D, N/2) complex128 = -exp(log_decay) + i frequency."""
    # differs from S4, follows S4D: Re Lam < 0 whatever is learned, so no system can grow (for S4
    # also because Q = P); the bounds keep exp from 0 and inf
    log_decay = F.hardtanh(log_decay.double(), -100, 100)
    return torch.complex(-log_decay.exp(), frequency.double())


def coordinates(z):
    """Write complex vectors as Re z_1, Im z_1, Re z_2, ...: (..., N/2) -> (..., N)."""
    return torch.view_as_real(z).flatten(-2)


def as_matrix(z):
    """Write x -> z x, z = a + i b (D, N/2), in real coordinates: (D, N, N), blocks a -b; b a."""
    a = z.real
    b = z.imag
    blocks = torch.stack([a, -b, b, a], 1).unflatten(1, (2, 2))  # (D, 2, 2, N/2)
    matrix = torch.diag_embed(blocks, dim1=1, dim2=3)  # (D, N/2, 2, N/2, 2)
    return matrix.flatten(3, 4).flatten(1, 2)


def output_rows(C):
    """Write x -> 2 Re(C x), C (..., N/2), in real coordinates: (..., N)."""
    return coordinates(2 * C.conj())  # Re(c x) = Re c Re x - Im c Im x


def bilinear(Lam, P, B, dt):
    """Discretize A = diag(Lam) - P P^* (S4) without a solve.  Returns E, B_bar, left, right.

    Differs from the S4 paper: P P^* instead of P Q^*.
    Lam: (D, N/2) complex128; P, B: (D, N, 1) float64, real coordinates; dt: (D, 1).
    With A = diag(Lam) - 2 P P^T in real coordinates,
        A_bar = 2 M - I,   B_bar = dt M B,   M = (I - dt A / 2)^-1
    and by Woodbury's identity
        M = R - s (R P) (P^T R),   R = (I - dt diag(Lam) / 2)^-1,   s = dt / (1 + dt P^T R P)
    E (D, N, N) = A_bar - I; B_bar (D, N, 1).  What E has besides 2 x 2 blocks is left @ right,
    (D, N, 1) and (D, 1, N).
    """
    half = dt / 2 * Lam
    R_minus_I = as_matrix(half / (1 - half))  # accurate also for small dt
    RP = P + R_minus_I @ P  # (D, N, 1)
    PR = P.mT + P.mT @ R_minus_I  # (D, 1, N)
    dt = dt[..., None]  # (D, 1, 1)
    s = dt / (1 + dt * (PR @ P))
    sRP = s * RP
    M_minus_I = R_minus_I - sRP @ PR
    return 2 * M_minus_I, dt * (B + M_minus_I @ B), -2 * sRP, PR


def krylov(E, V, count):
    """Return [V, A V, ..., A^(p-1) V], at least `count` columns, by repeated doubling; and A^p - I.

    A = I + E.  E (D, N, N), V (D, N, k) -> (D, N, k p) with p a power of 2, (D, N, N).
    """
    while V.shape[-1] < count:
        AV = torch.baddbmm(V, E, V)  # V + E V
        V = torch.cat([V, AV], -1)
        E = torch.baddbmm(E, E, E, beta=2)  # (I + E)^2 - I = 2 E + E E
    return V, E


def two_level_kernel(E, B_bar, C, L):
    """K[i m + j] = (C A_bar^(i m)) (A_bar^j B_bar): sqrt L rows times sqrt L columns.

    E (D, N, N), B_bar (D, N, 1) in float64, C (D, n, N).  Returns (n, D, L) in the dtype of C.
    O(D N (N^2 log L + L)) time, O(D (N^2 log L + N sqrt L + L)) memory: autograd keeps every power.
    """
    # differs from the S4 paper: powers of A_bar; the paper's Cauchy kernel is cauchy_ref
    require(C.is_floating_point(), f"expected float C, got {C.dtype}")
    columns, E = krylov(E, B_bar, 2)  # B_bar, A_bar B_bar
    # E is now A_bar^2 - I: at large dt, rounding A_bar itself would double the error of K
    E = E.to(C.dtype)
    columns = columns.to(C.dtype)
    columns, E = krylov(E, columns, math.sqrt(L))  # (D, N, m), A_bar^m - I
    n = C.shape[1]
    m = columns.shape[-1]
    rows, _ = krylov(E.mT, C.mT, n * L / m)  # (D, N, >= n L / m), columns in the order (i, n)
    K = torch.bmm(rows.mT, columns)  # (D, >= n L / m, m)
    K = K.unflatten(1, (-1, n)).movedim(2, 0)  # (n, D, >= L / m, m)
    return K.flatten(2)[..., :L]


def diagonal_kernel(log_A, B_bar, C, L):
    """K[i m + j] = 2 Re sum (C B_bar A_bar^(i m)) A_bar^j: rows times columns, no (D, N, L) array.

    log_A, B_bar (D, N/2) complex128, C (n, D, N/2).  Returns (n, D, L) in the dtype of C, but real.
    O(D N L) time, O(D N sqrt L + D L) memory.  Below, L / m is rounded up.
    """
    m = max(1, int(math.sqrt(L)))  # torch.compile knows no isqrt
    start = torch.arange(0, L, m, device=C.device)[:, None]  # (L / m, 1): i m
    j = torch.arange(m, device=C.device)[:, None]  # (m, 1)
    v = (C * B_bar)[:, :, None]  # (n, D, 1, N/2)
    rows = output_rows(v * torch.exp(log_A[:, None] * start))  # (n, D, L / m, N)
    columns = coordinates(torch.exp(log_A[:, None] * j))  # (D, m, N)
    # up to here in float64: float32 phases lose digits at large l
    rows = rows.to(C.real.dtype)
    columns = columns.to(C.real.dtype)
    K = rows @ columns.mT  # (n, D, L / m, m)
    return K.flatten(2)[..., :L]


def fft_length(n):
    """Return a small even length >= n with factors 2, 3 and 5 only: large ones make FFTs slow."""
    lengths = []
    # 2 times the odd products of 3 and 5 up to 225
    for length in (2, 6, 10, 18, 30, 50, 54, 90, 150, 162, 250, 270, 450):
        while length < n:
            length *= 2
        lengths.append(length)
    return min(lengths)


class CircularConv(torch.autograd.Function):
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


def fft_conv(u, K):
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


# ---------------------------------------------------------------- layers


def check_input(x, keep, d_model):
    """Refuse shapes that would broadcast by accident, and integers."""
    if x.ndim != 3 or x.shape[2] != d_model or not x.is_floating_point():
        raise ValueError(f"expected float x (B, L, {d_model}), got {tuple(x.shape)} {x.dtype}")
    if keep is not None and (keep.shape != x.shape[:2] or keep.dtype != torch.bool):
        got = f"{tuple(keep.shape)} {keep.dtype}"
        raise ValueError(f"expected bool keep {tuple(x.shape[:2])}, got {got}")


def parameter_dtype():
    """Return the default dtype, but float32 if that is a half precision."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


def per_channel(v, d_model):
    """Return v (N/2,) as a parameter (D, N/2), or (D, N/2, 2) if complex."""
    v = torch.tensor(v)
    if v.is_complex():
        v = torch.view_as_real(v)
    return nn.Parameter(torch.stack([v] * d_model).to(parameter_dtype()))


def as_complex(p):
    """Read a parameter (..., 2) as complex (...), also where FSDP has cast it to half precision."""
    dtype = torch.promote_types(p.dtype, torch.float32)
    return torch.view_as_complex(p.to(dtype).contiguous())


def without_autocast(device):
    """A context without autocast, which does not know the device "meta"."""
    return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)


def log_uniform(low, high, *shape):
    """Return a parameter whose values are uniform between log low and log high."""
    fits = 0 < low <= high < math.inf
    require(fits, f"expected finite 0 < dt_min <= dt_max, got {low} and {high}")
    u = torch.rand(shape, dtype=parameter_dtype())
    return nn.Parameter(math.log(low) + u * math.log(high / low))


class State(NamedTuple):
    """Recurrent state and the discretized system; make a new one after changing parameters.

    To keep x over training steps: layer.initial_state(B)._replace(x=state.x.detach()).
    To reorder for beam search: state._replace(x=state.x[idx]), as only x has a batch axis.
    To load saved ones with weights_only=True: torch.serialization.add_safe_globals([s4.State]).
    """

    x: torch.Tensor  # (B, D, N)
    E: torch.Tensor  # (D, N, N)
    B_bar: torch.Tensor  # (D, N, 1)
    C: torch.Tensor  # (D, 1, N)

    def __deepcopy__(self, memo):  # torch's deepcopy refuses non-leaf tensors with gradients
        return State(*[part.clone() for part in self])


class StateSpace(nn.Module):
    """Linear token mixer y = K * u + D u, (B, L, D) -> (B, L, D): what S4, S4D and DLR share.

    A subclass with a diagonal A has discretize(rate), which returns log A_bar and B_bar, (D, N/2)
    complex128; any other replaces system and impulse_response.
    rate: multiplies dt; 2 for input that is sampled half as often as in training.
    Discretizes in float64; kernels and states are float32 (or float64), also under autocast and in
    a half-precision model.  The FFT leaks rounding error (and NaNs) across positions: causality
    holds up to float precision.  A pruned C follows its mask in forward alone, so call
    torch.nn.utils.prune.remove before initial_state.
    """

    # axis of the channels where it is not the first: for gpu_kernels.py, dist_attention.py
    channel_axes = {"C": 1}  # noqa: RUF012

    def __init__(self, d_model, d_state, bidirectional):
        super().__init__()
        even = d_state >= 2 and d_state % 2 == 0
        require(even, f"d_state must be even and at least 2, got {d_state}")
        self.d_model = d_model
        self.bidirectional = bidirectional

    def add_output(self):
        """Add C, complex with variance 1, and D_skip.  Call it last: it needs self.frequency."""
        n = 2 if self.bidirectional else 1
        shape = (n, *self.frequency.shape)
        C = torch.randn(shape, dtype=parameter_dtype().to_complex())
        self.C = nn.Parameter(torch.view_as_real(C))  # (n, D, N/2, 2)
        self.D_skip = nn.Parameter(torch.randn(self.d_model, dtype=parameter_dtype()))

    def _apply(self, fn, recurse=True):
        """Move and convert, but never to half precision."""

        def convert(tensor):
            new = fn(tensor)
            return tensor.to(new.device) if new.itemsize < 4 else new

        return super()._apply(convert, recurse)

    def system(self, rate=1.0):
        """Return the recurrence: E (D, N, N) and B_bar (D, N, 1) in float64, C (D, n, N)."""
        log_A, B_bar = self.discretize(rate)
        E = as_matrix(torch.expm1(log_A))
        C = output_rows(as_complex(self.C))
        return E, coordinates(B_bar)[..., None], C.transpose(0, 1)

    def impulse_response(self, L, rate):
        """Return K (n, D, L)."""
        log_A, B_bar = self.discretize(rate)
        return diagonal_kernel(log_A, B_bar, as_complex(self.C), L)

    def time_step(self, rate):
        """Return dt (D, 1) float64."""
        require(0 < rate < math.inf, f"rate must be positive, got {rate}")
        return rate * self.log_dt.double().exp()[:, None]

    def kernel(self, L, rate=1.0):
        """Return K: (D, L), or (2, D, L) if bidirectional (see fft_conv)."""
        require(L >= 1, f"the length must be at least 1, got {L}")
        with without_autocast(self.C.device):
            K = self.impulse_response(L, rate)  # (n, D, L)
        return K if self.bidirectional else K[0]

    def forward(self, x, keep=None, rate=1.0, K=None):
        """x (B, L, D), keep (B, L) bool, False at padding -> (B, L, D).

        K: kernel(L, rate), if it is there already; then rate is not used.
        """
        check_input(x, keep, self.d_model)
        if K is None:
            K = self.kernel(x.shape[1], rate)
        else:
            fits = K.shape[-1] == x.shape[1] and K.ndim == 2 + self.bidirectional
            require(fits, f"K must be that of kernel(L), got {tuple(K.shape)}")
        u = x.to(K.dtype)
        if keep is not None:
            u = u.masked_fill(~keep[..., None], 0)
        K = K.clone()  # somebody may keep it
        forward_K = K if K.ndim == 2 else K[0]  # (D, L): lags 0, 1, ...
        forward_K[:, 0] += self.D_skip  # D joins K, which saves a pass over the activations
        y = fft_conv(u, K)  # y = K * u + D u
        return y.to(x.dtype)

    def initial_state(self, batch, rate=1.0):
        """Return the State before the first token.  ValueError if bidirectional."""
        how = "a layer with bidirectional=False, or a model with causal=True, can step"
        require(not self.bidirectional, f"a bidirectional layer needs the future; {how}")
        E, B_bar, C = self.system(rate)
        E = E.to(C.dtype)
        B_bar = B_bar.to(C.dtype)
        x = C.new_zeros(batch, *E.shape[:2])
        return State(x, E, B_bar, C)

    def check_piece(self, x, state):
        """Refuse x unless it is float (B, L, D) with the batch size of the state."""
        check_input(x, None, self.d_model)
        size = len(state.x)
        require(len(x) == size, f"expected batch size {size} as in the state, got {len(x)}")

    def step(self, x_t, state):
        """x_t (B, D), State -> y_t (B, D), new State."""
        self.check_piece(x_t[:, None], state)
        h, E, B_bar, C = state  # h: the paper's x
        h = h.transpose(0, 1)  # (D, B, N): one product per channel
        u = x_t.to(h.dtype).T[..., None]  # (D, B, 1)
        with without_autocast(h.device):
            h = torch.baddbmm(h, h, E.mT)  # A_bar h = h + E h
            h = torch.baddbmm(h, u, B_bar.mT)
            y = h @ C.mT + self.D_skip[:, None, None] * u  # (D, B, 1)
        return y[..., 0].T.to(x_t.dtype), state._replace(x=h.transpose(0, 1))

    def prefill(self, x, state):
        """x (B, L, D), State -> y (B, L, D), new State: L % CHUNK steps, then chunks."""
        self.check_piece(x, state)
        rest = x.shape[1] % CHUNK
        y = [x[:, :0]]  # something to join also at L = 0
        for x_t in x[:, :rest].unbind(1):
            y_t, state = self.step(x_t, state)
            y.append(y_t[:, None])
        if x.shape[1] < CHUNK:
            return torch.cat(y, 1), state
        h, E, B_bar, C = state
        h = h.permute(1, 2, 0)  # (D, N, B)
        i = torch.arange(CHUNK, device=x.device)
        with without_autocast(x.device):
            # (D, N, CHUNK): B_bar, A_bar B_bar, ... and A_bar^CHUNK - I
            columns, E_chunk = krylov(E, B_bar, CHUNK)
            CA = torch.baddbmm(C, C, E)
            rows, _ = krylov(E.mT, CA.mT, CHUNK)  # (D, N, CHUNK): C A_bar, C A_bar^2, ...
            K = (C @ columns)[:, 0]  # (D, CHUNK)
            # (D, CHUNK, CHUNK): K[row - column]; tril drops negative lags, which wrapped around
            toeplitz = K[:, i[:, None] - i].tril()
            for chunk in x[:, rest:].split(CHUNK, 1):
                u = chunk.to(h.dtype).permute(2, 1, 0)  # (D, CHUNK, B)
                from_state = rows.mT @ h
                from_input = toeplitz @ u + self.D_skip[:, None, None] * u
                y_chunk = (from_state + from_input).permute(2, 1, 0)
                y.append(y_chunk.to(x.dtype))
                h = torch.baddbmm(h, E_chunk, h)
                h = torch.baddbmm(h, columns.flip(-1), u)  # the last token has B_bar
        return torch.cat(y, 1), state._replace(x=h.permute(2, 0, 1))


class S4(StateSpace):
    """S4: A starts as HiPPO-LegS, diagonal plus low rank; bilinear discretization."""

    def __init__(self, d_model, d_state=64, bidirectional=False, dt_min=1e-3, dt_max=1e-1):
        super().__init__(d_model, d_state, bidirectional)
        Lam, P, B, _ = dplr_legs(d_state)
        self.log_dt = log_uniform(dt_min, dt_max, d_model)  # (D,)
        self.log_decay = per_channel(np.log(-Lam.real), d_model)  # (D, N/2)
        self.frequency = per_channel(Lam.imag, d_model)  # (D, N/2)
        self.B = per_channel(B, d_model)  # (D, N/2, 2)
        self.P = per_channel(P, d_model)  # (D, N/2, 2)
        self.add_output()

    def low_rank(self, rate=1.0):
        """Return E, B_bar, left, right as `bilinear` does; gpu_generate.py uses left and right."""
        Lam = eigenvalues(self.log_decay, self.frequency)
        P = self.P.double().flatten(-2)[..., None]  # (D, N, 1)
        B = self.B.double().flatten(-2)[..., None]  # (D, N, 1)
        return bilinear(Lam, P, B, self.time_step(rate))

    def system(self, rate=1.0):
        E, B_bar, _, _ = self.low_rank(rate)
        C = output_rows(as_complex(self.C))
        return E, B_bar, torch.stack(C.unbind(), 1)  # torch 2.9 cannot compile a transpose here

    def impulse_response(self, L, rate):
        return two_level_kernel(*self.system(rate), L)


class S4D(StateSpace):
    """S4D: A is diagonal; zero-order hold.  init (N -> Lam, B): s4d_lin, s4d_inv, s4d_legs."""

    def __init__(
        self, d_model, d_state=64, bidirectional=False, dt_min=1e-3, dt_max=1e-1, init=s4d_lin
    ):
        super().__init__(d_model, d_state, bidirectional)
        Lam, B = init(d_state)
        self.log_dt = log_uniform(dt_min, dt_max, d_model)  # (D,)
        self.log_decay = per_channel(np.log(-Lam.real), d_model)  # (D, N/2)
        self.frequency = per_channel(Lam.imag, d_model)  # (D, N/2)
        self.B = per_channel(B, d_model)  # (D, N/2, 2)
        self.add_output()

    def discretize(self, rate):
        Lam = eigenvalues(self.log_decay, self.frequency)
        B = as_complex(self.B)
        dt = self.time_step(rate)
        log_A = dt * Lam
        return log_A, torch.expm1(log_A) / Lam * B  # expm1: accurate for small dt Lam


class DLR(StateSpace):
    """Diagonal linear RNN x_l = exp(Lam) x_{l-1} + u_l, y_l = 2 Re(C x_l): no HiPPO, no time step.

    arXiv:2310.02980v4, equation 3.  Phases start at 2 pi k / N as there, k < N/2: 2 Re stands for
    the other half.  The paper gives no decays; here they are log-uniform in [dt_min, dt_max].
    """

    def __init__(self, d_model, d_state=64, bidirectional=False, dt_min=1e-3, dt_max=1e-1):
        super().__init__(d_model, d_state, bidirectional)
        k = np.arange(d_state // 2)
        self.log_decay = log_uniform(dt_min, dt_max, d_model, len(k))  # (D, N/2)
        self.frequency = per_channel(2 * np.pi * k / d_state, d_model)  # (D, N/2)
        self.add_output()

    def discretize(self, rate):
        require(rate == 1, f"rate {rate}: expected 1, a plain recurrence has no time step")
        Lam = eigenvalues(self.log_decay, self.frequency)
        return Lam, torch.ones_like(Lam)


# ---------------------------------------------------------------- model


class S4Block(nn.Module):
    """Pre-norm residual block: x + GLU(Linear(dropout(GELU(mixer(norm(x))))))."""

    def __init__(self, d_model, mixer, dropout=0.0):
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.mixer = mixer
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(d_model, 2 * d_model)

    def forward(self, x, keep=None, **options):
        """x (B, L, D), keep (B, L) bool -> (B, L, D).  options, such as rate, go to the mixer."""
        return x + self.gate(self.mixer(self.norm(x), keep, **options))

    def gate(self, y):
        y = F.gelu(y.contiguous())  # the convolution leaves y transposed
        return F.glu(self.out(self.dropout(y)), dim=-1)


@dataclass(frozen=True)
class S4Config:
    """Sizes of an S4Model; set exactly one of vocab_size (tokens) and n_channels (real values)."""

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
    """Build the mixer of block i."""
    two_sided = not config.causal
    return kind(config.d_model, config.d_state, two_sided, config.dt_min, config.dt_max)


s4d_mixer = partial(s4_mixer, kind=S4D)
dlr_mixer = partial(s4_mixer, kind=DLR)


class S4Model(nn.Module):
    """Embedding, blocks, final norm: tokens (B, L) or values (B, L, C) -> features (B, L, D).

    Tokens are integers of any type.  mixer(config, i) builds the mixer of block i.  options, such
    as rate, go to every mixer.
    torch.export: L is fixed, B is free if at least 2 in the example.  Export the longest L, with
    keep, and pad on the right.
    """

    def __init__(self, config, mixer=s4_mixer):
        super().__init__()
        self.config = config
        inputs = [n for n in (config.vocab_size, config.n_channels) if n is not None]
        fits = len(inputs) == 1 and min(*inputs, config.d_model, config.n_layers) >= 1
        rule = "set exactly one of vocab_size and n_channels, and sizes of at least 1"
        require(fits, f"{rule}; got {config}")
        if config.vocab_size is None:
            self.embed = nn.Linear(config.n_channels, config.d_model)
        else:
            self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList()
        for i in range(config.n_layers):
            self.blocks.append(S4Block(config.d_model, mixer(config, i), config.dropout))
        self.norm = nn.LayerNorm(config.d_model)

    def embed_input(self, x):
        """Tokens (B, L) or values (B, L, C) -> (B, L, D)."""
        C = self.config.n_channels
        got = f"got {tuple(x.shape)} {x.dtype}"
        if C is None:
            require(not x.is_floating_point(), f"expected integer tokens (B, L), {got}")
            return self.embed(x.long())
        fits = x.is_floating_point() and x.shape[-1] == C
        require(fits, f"expected float values (B, L, {C}), {got}")
        return self.embed(x)

    def forward(self, x, keep=None, **options):
        """keep: (B, L) bool, False at padding."""
        h = self.embed_input(x)  # (B, L, D)
        require(h.ndim == 3, f"expected tokens (B, L) or values (B, L, C), got {tuple(x.shape)}")
        for block in self.blocks:
            h = block(h, keep, **options)
        return self.norm(h)

    def initial_state(self, batch, **options):
        """Return one state per block (S4, S4D, DLR: a State).  ValueError if bidirectional."""
        return [block.mixer.initial_state(batch, **options) for block in self.blocks]

    def prefill(self, x, state, keep=None):
        """Continue state by x, (B, L) or (B, L, C).  Returns features (B, L, D), new state.

        x without the axis L is a single token or value (see step).
        keep: (B, L) bool, False at padding, all of it before the real tokens.  Attention mixers
        would remember padding, so they refuse it; they give no gradients here either.
        """
        forgets = all(isinstance(s, State) for s in state)
        how = "keep: mixers without an s4.State, such as Attention, would remember padding"
        require(forgets or keep is None or keep.all(), how)
        h = self.embed_input(x)
        if keep is not None:
            check_input(h, keep, self.config.d_model)
        new_state = []
        for block, s in zip(self.blocks, state, strict=True):
            u = block.norm(h)
            if keep is not None:
                u = u.masked_fill(~keep[..., None], 0)  # no input: a zero state stays zero
            run = block.mixer.step if h.ndim == 2 else block.mixer.prefill
            y, s = run(u, s)
            h = h + block.gate(y)  # as S4Block.forward
            new_state.append(s)
        return self.norm(h), new_state

    step = prefill  # x (B,) or (B, C) -> features (B, D), new state

    @torch.no_grad()
    def generate(self, prompt, n, head, temperature=0.0, lengths=None):
        """Continue each prompt of (B, L) by n tokens, (B, n) int64; temperature 0 is greedy.

        head: features (B, D) -> logits (B, vocab_size).  lengths (B,): only the first lengths[b]
        tokens of a prompt are real; None: all L.  Call eval() first if there is dropout.
        """
        fits = prompt.ndim == 2 and len(prompt) > 0
        require(fits, f"expected prompt (B, L), B at least 1; got {tuple(prompt.shape)}")
        B, L = prompt.shape
        if lengths is None:
            lengths = [L] * B
        lengths = torch.as_tensor(lengths, device=prompt.device)
        fits = lengths.shape == (B,) and torch.all((lengths >= 1) & (lengths <= L))
        wanted = f"expected {B} lengths from 1 to L = {L} (no empty prompt)"
        require(fits, f"{wanted}, got {lengths.tolist()}")
        require(temperature >= 0, f"temperature must be at least 0, got {temperature}")
        # move padding to the left, where the state is zero and stays zero
        padding = L - lengths
        position = torch.arange(L, device=prompt.device) - padding[:, None]  # (B, L)
        prompt = prompt.gather(1, position.clamp(min=0))
        features, state = self.prefill(prompt, self.initial_state(B), position >= 0)
        h = features[:, -1]
        tokens = position.new_empty(B, n)
        for i in range(n):
            if i > 0:
                h, state = self.step(tokens[:, i - 1], state)
            logits = head(h)
            if temperature > 0:
                p = (logits / temperature).softmax(-1)
                tokens[:, i] = torch.multinomial(p, 1)[:, 0]
            else:
                tokens[:, i] = logits.argmax(-1)
        return tokens

    def param_groups(self, lr, weight_decay):
        """Return three AdamW groups; a module with a method `kernel` is a mixer.

        Mixers, but not their C and D_skip: learning rate at most 1e-3, no weight decay.
        C, D_skip, biases, norms: no weight decay.  The rest: both as given.
        """
        in_mixers = set()
        for module in self.modules():
            if hasattr(module, "kernel"):
                in_mixers.update(module.parameters())
        groups = [
            {"params": [], "lr": min(lr, 1e-3), "weight_decay": 0.0},  # Lam, P, B, dt, others
            {"params": [], "lr": lr, "weight_decay": 0.0},  # C, D_skip, biases, norms
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


def check_reference(N=8, L=63, dt=0.05):
    """In numpy, float64: convolution against recurrence, the Cauchy kernel against K."""
    Lam, P, B, V = dplr_legs(N)
    C = np.cos(np.arange(N))
    u = np.sin(np.arange(L) ** 2)
    A_bar, B_bar = bilinear_ref(*hippo_legs(N), dt)
    K = kernel_ref(A_bar, B_bar, C, L)
    y = recurrence_ref(A_bar, B_bar, C, u)
    yield "convolution with K == recurrence", rel_err(np.convolve(u, K)[:L], y), 1e-10
    K_cauchy = cauchy_ref(both(Lam), both(P), both(B), both(C @ V), dt, L)
    yield "Cauchy kernel == K", rel_err(K_cauchy, K), 1e-10


def check_kernels(dtype, device, limit, N=64, L=16384):
    """The causal S4 and S4D kernels of one channel against the reference."""
    for kind in (S4, S4D):
        layer = kind(1, N).to(device, dtype)
        p = {}
        for name, parameter in layer.named_parameters():
            p[name] = parameter.double().cpu().numpy().ravel()
        Lam = both(-np.exp(p["log_decay"]) + 1j * p["frequency"])
        B = both(p["B"].view(complex))
        dt = np.exp(p["log_dt"])
        C = both(p["C"].view(complex))
        if kind is S4:
            P = both(p["P"].view(complex))
            A = np.diag(Lam) - np.outer(P, P.conj())
            A_bar, B_bar = bilinear_ref(A, B, dt)
        else:
            A_bar, B_bar = hold_ref(Lam, B, dt)
        K = kernel_ref(A_bar, B_bar, C, L)
        error = rel_err(layer.kernel(L)[0], K)
        yield f"{kind.__name__} kernel == K, L = {L}", error, limit


def check_layers(dtype, device, limit, L=150):
    """The convolution of each layer against its recurrence."""
    x = torch.randn(2, L, 4, dtype=dtype, device=device)
    for kind in (S4, S4D, DLR):
        layer = kind(4, 16).to(device, dtype)
        y, state = layer.prefill(x[:, :87], layer.initial_state(2))  # 23 steps, then a chunk
        y_rest, _ = layer.prefill(x[:, 87:], state)  # steps
        error = rel_err(layer(x), torch.cat([y, y_rest], 1))
        yield f"{kind.__name__} layer == prefill, then steps", error, limit


@torch.no_grad()
def self_check(dtype=torch.float64, device="cpu"):
    """Return a list of (name, error, limit).  Seeds torch with 0."""
    torch.manual_seed(0)
    limit = 1e-10 if dtype == torch.float64 else 1e-5
    rows = list(check_reference()) if dtype == torch.float64 else []
    rows += check_kernels(dtype, device, limit)
    rows += check_layers(dtype, device, limit)
    return rows


def print_table(rows):
    """Print (name, error, limit) rows; return True if every error is within its limit."""
    ok = True
    for name, error, limit in rows:
        passed = error <= limit  # False for nan
        print(f"  {name:<50}{error:9.1e}{limit:9.0e}   {'ok' if passed else 'FAILED'}")
        ok = ok and passed
    return ok


# ---------------------------------------------------------------- demo, command line


def demo(device="cpu", steps=120, L=256, target=0.95):
    """Learn to name the one symbol before L blanks, then do so as a recurrence."""
    torch.manual_seed(0)
    model = S4Model(S4Config(d_model=32, n_layers=1, d_state=32, vocab_size=5, causal=True))
    model = model.to(device)
    head = nn.Linear(32, 4, device=device)
    groups = model.param_groups(lr=2e-2, weight_decay=0.0)
    groups.append({"params": head.parameters()})
    optimizer = torch.optim.AdamW(groups, lr=2e-2)
    print(f"\ndemo: name the symbol before {L} blanks (chance 0.25), {steps} steps")
    symbol = torch.arange(4, device=device)  # all four cases
    x = F.pad(symbol[:, None], (0, L), value=4)  # (4, L + 1)
    for _ in range(steps):
        logits = head(model(x)[:, -1])
        loss = F.cross_entropy(logits, symbol)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    guess = head(model(x)[:, -1]).argmax(-1)
    accuracy = (guess == symbol).double().mean()
    guess = model.generate(x, 1, head)[:, 0]
    recurrent = (guess == symbol).double().mean()
    print(f"  accuracy {accuracy:.2f}, as a recurrence {recurrent:.2f}, target {target}")
    return min(accuracy, recurrent) >= target


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="print the check tables and stop")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device on this machine")
    ok = True
    for dtype in (torch.float64, torch.float32):
        print(f"checks in {dtype} on {args.device}: error, limit")

        ok = print_table(self_check(dtype, args.device)) and ok
    if not args.check:
        ok = demo(args.device) and ok
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
