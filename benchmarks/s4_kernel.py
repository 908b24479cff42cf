"""Cost of an S4 kernel: naive Cauchy, stable Cauchy, two-level, and the FFT convolution alone.

    python benchmarks/s4_kernel.py                  width 16, L 1k to 64k, plus width 256 at L 16k
    python benchmarks/s4_kernel.py --lengths 1024   quick: one length

Forward and backward, float32, N = 64, one direction.  Every cell runs in its own process, so its
peak memory is its own: the largest resident size above that of the process once torch is warm.
Error: relative L2, worst channel, against the two-level kernel in float64 of the same parameters
(which tests/test_s4.py compares with the recurrence).  The naive form is Algorithm 1 of
arXiv:2111.00396v3 in complex64 (its C~ in float64): z = 2 (1 - w) / (1 + w), and an array of
(D, N, L/2 + 1) quotients for each of four sums.  --clock cpu --threads 1 counts processor
time, for a machine that is shared.  Writes results/s4_kernel.json and .png.
"""

import argparse
import copy
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from measured import ROOT, draw_curves, peak_bytes, provenance, save, select

import s4

FORMS = ("naive Cauchy", "stable Cauchy", "two-level", "bare FFT convolution")


def halves(layer):
    """Lam, P, B: (D, N/2) complex128, dt: (D, 1) float64."""
    Lam = s4.eigenvalues(layer.log_decay, layer.frequency)
    P = torch.view_as_complex(layer.P.double())
    B = torch.view_as_complex(layer.B.double())
    return Lam, P, B, layer.log_dt.double().exp()[:, None]


def cut(layer, L):
    """C~ = C (I - A_bar^L): (n, D, N/2) in the precision of C, by the binary digits of L."""
    E, _, C = layer.system()
    C = C.double()
    row = C  # (D, n, N): C A_bar^L in the end
    power = L
    while power:
        if power % 2:
            row = row + row @ E
        E = torch.baddbmm(E, E, E, beta=2)
        power //= 2
    pairs = ((C - row) / 2).unflatten(-1, (-1, 2))  # a row is 2 (Re C, -Im C)
    halved = torch.complex(pairs[..., 0], -pairs[..., 1])
    return halved.to(layer.C.dtype.to_complex()).transpose(0, 1)


def naive_cauchy(layer, L):
    """Algorithm 1 as it stands, over all N eigenvalues.  Returns (n, D, L)."""
    C = cut(layer, L)
    Lam, P, B, dt = [v.to(C.dtype) for v in halves(layer)]
    k = torch.arange(L // 2 + 1, dtype=C.real.dtype)
    w = torch.exp(-2j * torch.pi / L * k)
    z = 2 * (1 - w) / (1 + w)  # (L/2 + 1,), rounding keeps it finite at w = -1

    def both(v):
        return torch.cat([v, v.conj()], -1)

    def cauchy(b, c):
        weights = both(b * c * dt)[..., None]
        poles = both(dt * Lam)[..., None]
        return (weights / (z - poles)).sum(-2)  # ([n,] D, L/2 + 1)

    low_rank = cauchy(B, P.conj()) * cauchy(P, C)
    K_f = cauchy(B, C) - low_rank / (1 + cauchy(P, P.conj()))
    return torch.fft.irfft(2 / (1 + w) * K_f, L)


def stable_cauchy(layer, L):
    """The Cauchy kernel without its pole, O(D N L) time and memory.  Returns (n, D, L).

    At the root of unity exp(-2 i t), z = (2 / dt) i tan t is infinite at t = pi / 2 and large
    around it, where float32 loses three digits.  Numerator and denominator times cos t are bounded:
        sum over a pair of b c / (z - Lam) / cos t = (4 i Re(v) sin t - 2 Re(v a^*) cos t) / den,
        den = |a|^2 cos^2 t - 4 sin^2 t - 4 i Re(a) sin t cos t,   a = dt Lam,  v = dt b c.
    All sums (b: B, P; c: C~, P^*) are one real product with a table of 1 / den.  The factor before
    them, 2 / (1 + w) = exp(i t) / cos t, takes the last cosine away.
    """
    C = cut(layer, L)  # (n, D, N/2)
    Lam, P, B, dt = [v.to(C.dtype) for v in halves(layer)]
    t = torch.arange(L // 2 + 1, dtype=torch.float64) * (torch.pi / L)  # (M,), M = L//2 + 1
    cos = t.cos().to(C.real.dtype)
    sin = t.sin().to(C.real.dtype)
    a = (dt * Lam)[..., None]  # (D, N/2, 1)
    size = a.abs()
    real = (size * cos - 2 * sin) * (size * cos + 2 * sin)
    den = torch.complex(real, -4 * a.real * sin * cos)
    table = torch.view_as_real(1 / den).flatten(-2)  # (D, N/2, 2 M) real
    b = torch.stack([B, P], 1)  # (D, 2, N/2)
    c = torch.cat([C.transpose(0, 1), P.conj()[:, None]], 1)  # (D, n + 1, N/2)
    v = (dt[:, None] * b)[:, :, None] * c[:, None]  # (D, 2, n + 1, N/2)
    turned = v * a.mT[:, None].conj()
    weights = torch.stack([v.real, turned.real], 1)  # (D, 2, 2, n + 1, N/2)
    sums = weights.flatten(1, 3) @ table  # (D, 4 (n + 1), 2 M)
    sums = torch.view_as_complex(sums.unflatten(-1, (-1, 2)))
    sums = sums.unflatten(1, (2, 2, -1))  # (D, 2, 2, n + 1, M)
    sums = 4j * sin * sums[:, 0] - 2 * cos * sums[:, 1]  # (D, 2, n + 1, M)
    BC, PC = sums[:, :, :-1].unbind(1)  # (D, n, M)
    BP, PP = sums[:, :, -1:].unbind(1)  # (D, 1, M)
    factor = torch.polar(torch.ones_like(t), t).to(C.dtype)
    K_f = factor * (BC - cos * BP * PC / (1 + cos * PP))
    return torch.fft.irfft(K_f, L).transpose(0, 1)


def bare_convolution(layer, L):
    """A function of nothing: the FFT convolution with a free kernel, (1, L, D)."""
    u = torch.randn(1, L, layer.d_model, requires_grad=True)
    K = torch.randn(layer.d_model, L, requires_grad=True)
    n = s4.fft_length(2 * L - 1)

    def convolution():
        K_f = torch.fft.rfft(K, n)
        U = torch.fft.rfft(u.transpose(1, 2), n)
        return torch.fft.irfft(U * K_f, n)[..., :L].transpose(1, 2)

    return convolution


def make(form, layer, L):
    """A function of nothing: the kernel (D, L), or the convolution (1, L, D)."""
    if form == "naive Cauchy":
        return lambda: naive_cauchy(layer, L)[0]
    if form == "stable Cauchy":
        return lambda: stable_cauchy(layer, L)[0]
    if form == "two-level":
        return lambda: layer.kernel(L)
    return bare_convolution(layer, L)


def measure(form, width, L, args):
    """{seconds, mib, error} of one form, in this process."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    now = time.process_time if args.clock == "cpu" else time.perf_counter
    make(form, s4.S4(2, 64), 64)().sum().backward()  # libraries warm, before memory counts
    layer = s4.S4(width, 64)
    run = make(form, layer, L)
    before = peak_bytes()
    best = float("inf")
    for _ in range(args.rounds):
        start = now()
        out = run()
        out.backward(torch.ones_like(out))
        best = min(best, now() - start)
    result = {"seconds": best, "mib": (peak_bytes() - before) / 2**20, "error": None}
    if "FFT" not in form:
        with torch.no_grad():
            exact = copy.deepcopy(layer).double().kernel(L)
            error = (out - exact).norm(dim=-1) / exact.norm(dim=-1)
            result["error"] = float(error.max())
    return result


def plot(cells, path):
    labels = {
        "seconds": "forward + backward, seconds",
        "mib": "peak memory, MiB",
        "error": "relative error, float32",
    }
    rows = {form: select(cells, form=form, width=16) for form in FORMS}
    title = "The two-level kernel costs about as much as the convolution"
    draw_curves(path, title, rows, "L", labels)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    wanted = [(form, 16, L) for L in args.lengths for form in FORMS]
    if 16384 in args.lengths:
        wanted += [(form, 256, 16384) for form in FORMS[2:]]
    origin = provenance()
    cells = []
    print(f"{'form':22} {'D':>4} {'L':>6} {'ms':>9} {'MiB':>8} {'error':>9}")
    for form, width, L in wanted:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            row = fresh.submit(measure, form, width, L, args).result()
        cells.append({"form": form, "width": width, "L": L, **row})
        error = f"{row['error']:9.1e}" if row["error"] else ""
        text = f"{1e3 * row['seconds']:9.1f} {row['mib']:8.1f} {error}"
        print(f"{form:22} {width:4} {L:6} {text}", flush=True)
    result = origin | {"threads": args.threads, "clock": args.clock, "cells": cells}
    save(ROOT / "results/s4_kernel.json", result)
    plot(cells, ROOT / "results/s4_kernel.png")


if __name__ == "__main__":
    main()
