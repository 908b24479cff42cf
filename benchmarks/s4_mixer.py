"""The S4 mixer (kernel, convolution, skip) against the FFT convolution that it contains.

    python benchmarks/s4_mixer.py                             width 256, N 64, batch 4, two threads
    python benchmarks/s4_mixer.py --clock cpu --threads 1     on a machine that is shared

Forward and backward, float32, (B, L, D) in and out.
"bare": irfft(rfft(u) rfft(k)) with plain autograd, k a free (D, L) parameter, FFT lengths made of
2, 3 and 5.  "own": s4.fft_conv of the same k, with its own backward; the mixer uses it too, so
mixer / own is the share of the kernel and the skip.
Times: the three take turns in one process, the least of all rounds.  Memory: one process each, the
largest resident size above that of the warm process with its input, weights and output gradient.
Writes results/s4_mixer.json.
"""

import argparse
import time

import torch
from measured import ROOT, provenance, save
from s4_kernel import alone, peak_mib

import s4

FORMS = ("bare", "own", "mixer")


def make(form, D, N, batch, L):
    """A function that runs one forward and backward."""
    u = torch.randn(batch, L, D, requires_grad=True)
    grad, k = torch.randn(batch, L, D), torch.randn(D, L, requires_grad=True)
    layer, n = s4.S4(D, N), s4.fft_length(2 * L - 1)

    def bare():
        U, K_f = torch.fft.rfft(u.transpose(1, 2), n), torch.fft.rfft(k, n)
        return torch.fft.irfft(U * K_f, n)[..., :L].transpose(1, 2)

    call = {"bare": bare, "own": lambda: s4.fft_conv(u, k), "mixer": lambda: layer(u)}[form]

    def run():
        u.grad = k.grad = None
        layer.zero_grad()
        call().backward(grad)

    return run


def times(L, args):
    torch.set_num_threads(args.threads)
    now = time.process_time if args.clock == "cpu" else time.perf_counter
    runs = [make(form, args.width, args.d_state, args.batch, L) for form in FORMS]
    best = [float("inf")] * len(runs)
    for _ in range(args.rounds + 1):  # the least counts, so the first, cold round does no harm
        for i, run in enumerate(runs):
            start = now()
            run()
            best[i] = min(best[i], now() - start)
    return best


def memory(form, L, args):
    torch.set_num_threads(args.threads)
    make(form, 8, args.d_state, 1, 64)()
    run, before = make(form, args.width, args.d_state, args.batch, L), peak_mib()
    run()
    return peak_mib() - before


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--d-state", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    rows, origin = [], provenance()
    for L in args.lengths:
        seconds = dict(zip(FORMS, alone(times, L, args), strict=True))
        mib = {form: alone(memory, form, L, args) for form in FORMS}
        print(f"L {L}, {args.clock} clock, {args.threads} threads")
        print(
            f"  {'':6} {'ms':>8} {'MiB':>8} {'time / bare':>12} {'/ own':>6} {'memory / bare':>14}"
        )
        for form in FORMS:
            t, m = seconds[form], mib[form]
            ratios = t / seconds["bare"], t / seconds["own"], m / mib["bare"]
            print(f"  {form:6} {t * 1e3:8.0f} {m:8.0f} {ratios[0]:12.2f} {ratios[1]:6.2f} "
                  f"{ratios[2]:14.2f}")  # fmt: skip
        over = {form: seconds["mixer"] / seconds[form] for form in ("bare", "own")}
        over["bare, memory"] = mib["mixer"] / mib["bare"]
        rows.append({"L": L, "seconds": seconds, "mib": mib, "mixer over": over})
    path = ROOT / f"results/s4_mixer{'_cpu' if args.clock == 'cpu' else ''}.json"
    save(path, origin | {"settings": vars(args), "rows": rows})


if __name__ == "__main__":
    main()
