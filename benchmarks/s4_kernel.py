"""What an S4 kernel costs: naive Cauchy, stable Cauchy, two-level, and a bare FFT convolution.

    python benchmarks/s4_kernel.py                  width 16, L 1k to 64k, plus width 256 at L 16k
    python benchmarks/s4_kernel.py --lengths 1024   quickly, one length

Forward and backward, float32, N = 64, one direction.  Every cell runs in a process of its own, so
its peak memory is its own: the largest resident size above that of the process once torch is warm.
Error: relative L2, worst channel, against the two-level kernel in float64 of the same parameters
(which tests/test_s4.py holds against the recurrence).  The naive form is Algorithm 1 of
arXiv:2111.00396v3 in complex64 (its C~ in float64): z = 2 (1 - w) / (1 + w), and an array of
(D, N, L/2 + 1) quotients for each of four sums.  --clock cpu --threads 1 counts processor
time, for a machine that is shared.  Writes results/s4_kernel.json and .png.
"""

import argparse
import copy
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from measured import ROOT, provenance, pyplot, save

import s4

FORMS = ("naive Cauchy", "stable Cauchy", "two-level", "bare FFT convolution")


def peak_mib():
    """Largest resident size of this process so far (Linux counts KiB, macOS bytes)."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / 2**20 if sys.platform == "darwin" else size / 2**10


def alone(call, *args):
    """The result of call(*args) in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(call, *args).result()


def naive_cauchy(system, Lam, P, B, dt, L):
    """Algorithm 1 as it stands, half pairs doubled, in the precision of C.  Returns (D, L)."""
    C = system.C[0]
    E, _, R = s4.real_form(*system[:4], system.C.to(torch.complex128))
    row, power = R, L
    while power:
        row = torch.baddbmm(row, row, E) if power % 2 else row
        E, power = s4.square(E), power // 2
    real, imag = (R - row)[:, 0].chunk(2, -1)  # (D, N/2)
    C_cut = (torch.complex(real, -imag) / 2).to(C.dtype)
    Lam, P, B = (s4_full(v.to(C.dtype)) for v in (Lam, P, B))  # (D, N)
    w = torch.exp(-2j * torch.pi / L * torch.arange(L // 2 + 1, dtype=C.real.dtype))
    z = 2 * (1 - w) / (1 + w)  # (L/2 + 1,), rounding keeps it finite at w = -1
    dt = dt.to(C.real.dtype)

    def cauchy(b, c):
        terms = (b * c * dt)[..., None] / (z - (dt * Lam)[..., None])  # (D, N, L/2 + 1)
        return terms.sum(1)  # (D, L/2 + 1)

    C_cut = s4_full(C_cut)
    K_f = cauchy(B, C_cut)
    K_f = K_f - cauchy(B, P.conj()) * cauchy(P, C_cut) / (1 + cauchy(P, P.conj()))
    return torch.fft.irfft(2 / (1 + w) * K_f, L)


def s4_full(v):
    return torch.cat([v, v.conj()], -1)


def make(form, layer, L):
    """A function without arguments: the kernel (D, L), or the convolution (1, L, D)."""
    if form == "bare FFT convolution":
        u = torch.randn(1, L, layer.d_model, requires_grad=True)
        K = torch.randn(layer.d_model, L, requires_grad=True)
        n = s4.fft_length(2 * L - 1)

        def bare():
            U, K_f = torch.fft.rfft(u.transpose(1, 2), n), torch.fft.rfft(K, n)
            return torch.fft.irfft(U * K_f, n)[..., :L].transpose(1, 2)

        return bare

    def kernel():
        if form == "two-level":
            return layer.kernel(L)
        Lam, B, _, dt = layer.continuous()
        P = torch.view_as_complex(layer.P.double())
        if form == "naive Cauchy":
            return naive_cauchy(layer.system(), Lam, P, B, dt, L)
        return s4.cauchy_kernel(layer.system(), Lam, P, B, dt, L)[0]

    return kernel


def cell(form, width, L, threads, clock, rounds):
    """{seconds, mib, error} of one form, in this process."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    now = time.process_time if clock == "cpu" else time.perf_counter
    make(form, s4.S4(2, 64), 64)().sum().backward()  # libraries warm, before memory counts
    layer = s4.S4(width, 64)
    run, before, best = make(form, layer, L), peak_mib(), float("inf")
    for _ in range(rounds):
        start = now()
        out = run()
        out.backward(torch.ones_like(out))
        best = min(best, now() - start)
    result = {"seconds": best, "mib": peak_mib() - before, "error": None}
    if "FFT" not in form:
        with torch.no_grad():
            exact = copy.deepcopy(layer).double().kernel(L)
            result["error"] = float(((out - exact).norm(dim=-1) / exact.norm(dim=-1)).max())
    return result


def plot(cells, path):
    plt = pyplot()

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4))
    names = ("seconds", "mib", "error")
    titles = ("forward + backward, seconds", "peak memory, MiB", "relative error, float32")
    for ax, name, title in zip(axes, names, titles, strict=True):
        for form in FORMS:
            rows = [c for c in cells if c["form"] == form and c["width"] == 16 and c.get(name)]
            ax.loglog([c["L"] for c in rows], [c[name] for c in rows], "o-", label=form)
        ax.set(title=title, xlabel="L")
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--max-gib", type=float, default=3.0, help="leave out larger cells")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    wanted = [(form, 16, L) for L in args.lengths for form in FORMS]
    wanted += [(form, 256, L) for L in args.lengths if L == 16384 for form in FORMS[2:]]
    cells, origin = [], provenance()
    print(f"{'form':22} {'D':>4} {'L':>6} {'ms':>9} {'MiB':>8} {'error':>9}")
    for form, width, L in wanted:
        row = {"form": form, "width": width, "L": L}
        gib = 5 * 8 * width * 64 * L / 2 / 2**30  # of the naive form's quotients, with gradients
        if form == "naive Cauchy" and gib > args.max_gib:
            row["left_out"] = f"about {gib:.1f} GiB"
            print(f"{form:22} {width:4} {L:6}   left out: {row['left_out']}")
        else:
            row |= alone(cell, form, width, L, args.threads, args.clock, args.rounds)
            error = f"{row['error']:9.1e}" if row["error"] else " " * 9
            print(
                f"{form:22} {width:4} {L:6} {row['seconds'] * 1e3:9.1f} {row['mib']:8.1f} {error}"
            )
        cells.append(row)
    result = origin | {"threads": args.threads, "clock": args.clock, "cells": cells}
    save(ROOT / "results/s4_kernel.json", result)
    plot(cells, ROOT / "results/s4_kernel.png")


if __name__ == "__main__":
    main()
